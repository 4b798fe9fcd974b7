"""What each operation does to axes: which of its inputs' axes it ties together, and which axes its outputs have.

A rule states under which reorderings of its inputs an operation only reorders its outputs. An operation without a rule
pins whatever it touches, so a missing rule costs permutations and never correctness. Operations are ATen's, as
``torch.export`` writes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sane_ray.tokens.tracing.space import Dim, Space, fixed

Shape = tuple[int, ...]


class NoRule(Exception):
    """The operation, or this use of it, has no rule."""


@dataclass
class Value:
    """A tensor of the graph, by its axes."""

    dims: list[Dim]
    uniform: bool = False
    """Whether all entries are known to be equal."""


Rule = Callable[[Space, Mapping[str, Any], Sequence[Shape]], list[Value]]
RULES: dict[str, Rule] = {}
"""By the operation's name without namespace, overload, and the underscore of in-place operations."""


VIEWS = frozenset({
    "alias", "detach", "contiguous", "clone", "to", "_to_copy", "type_as", "lift_fresh_copy", "view", "reshape",
    "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "permute",
    "transpose", "swapaxes", "t", "mT", "adjoint", "numpy_T", "movedim", "moveaxis", "select", "unbind", "slice",
    "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk",
})  # fmt: skip
"""Operations that only hand entries on, without looking at their values."""


def tensors(value: object) -> Iterable[Value]:
    """The tensors among an operation's arguments, also in lists."""
    if isinstance(value, Value):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def broadcast(space: Space, values: Iterable[Value], shape: Shape) -> Value:
    """The result of an elementwise operation: axes that meet are one, axes of length one are repeated."""
    dims = [fixed(1)] * len(shape)
    for value in values:
        offset = len(shape) - len(value.dims)
        if offset < 0:
            raise NoRule
        for place, dim in enumerate(value.dims, start=offset):
            if space.size(dim) == 1:
                continue
            dims[place] = dim if space.size(dims[place]) == 1 else space.tie(dims[place], dim)
    return Value([dim if space.size(dim) == size else space.fresh(size) for dim, size in zip(dims, shape, strict=True)])


def elementwise(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    """The rule of all operations that ATen calls pointwise."""
    return [broadcast(space, tensors(list(args.values())), shape) for shape in shapes]


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


_rule("_weight_norm", "copy", "masked_fill", "fill", "clamp", "where")(elementwise)


def _first(args: Mapping[str, Any]) -> list[Dim]:
    value = next(iter(args.values()))
    if not isinstance(value, Value):
        raise NoRule
    return list(value.dims)


def _wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _pin_all(space: Space, dims: Iterable[Dim]) -> list[Dim]:
    return [space.pin(dim) for dim in dims]


@_rule(
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous", "clone", "to", "_to_copy",
    "detach", "alias", "lift_fresh_copy", "type_as", "softmax", "_softmax", "log_softmax", "_log_softmax", "softmin",
    "positive", "requires_grad", "view_of",
)  # fmt: skip
def _same(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    return [Value(_first(args))]


@_rule(
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
)  # fmt: skip
def _uniform(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    return [Value([space.fresh(size) for size in shapes[0]], uniform=True)]


@_rule("linear")
def _linear(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x, weight, bias = args["input"].dims, args["weight"].dims, args["bias"]
    if len(weight) != 2:
        raise NoRule
    space.tie(x[-1], weight[1])
    if bias is not None:
        space.tie(weight[0], bias.dims[0])
    return [Value([*x[:-1], weight[0]])]


@_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _convolution(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    weight, groups = args["weight"].dims, args["groups"]
    kernel = len(weight) - 2
    *batch, channels = args["input"].dims[:-kernel]
    _pin_all(space, [*weight[2:], *args["input"].dims[-kernel:]])
    group = space.fresh(groups)
    if args.get("transposed", "output_padding" in args):
        space.tie(channels, weight[0])
        space.tie(weight[0], space.times(group, space.fresh(space.size(weight[0]) // groups)))
        result = space.times(group, weight[1])
    else:
        space.tie(channels, space.times(group, weight[1]))
        space.tie(weight[0], space.times(group, space.fresh(space.size(weight[0]) // groups)))
        result = weight[0]
    if args["bias"] is not None:
        space.tie(result, args["bias"].dims[0])
    return [Value([*batch, result, *map(fixed, shapes[0][-kernel:])])]


@_rule("batch_norm", "instance_norm")
def _batch_norm(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = args["input"].dims
    for name in ("weight", "bias", "running_mean", "running_var"):
        if args[name] is not None:
            space.tie(x[1], args[name].dims[0])
    return [Value(list(x))]


@_rule("layer_norm", "rms_norm")
def _layer_norm(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = args["input"].dims
    for name in ("weight", "bias"):
        if args.get(name) is not None:
            for dim, other in zip(x[-len(args["normalized_shape"]) :], args[name].dims, strict=True):
                space.tie(dim, other)
    return [Value(list(x))]


@_rule("group_norm")
def _group_norm(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x, groups = args["input"].dims, args["num_groups"]
    space.tie(x[1], space.times(space.fresh(groups), space.fresh(space.size(x[1]) // groups)))
    for name in ("weight", "bias"):
        if args[name] is not None:
            space.tie(x[1], args[name].dims[0])
    return [Value(list(x))]


@_rule("prelu")
def _prelu(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x, weight = args["self"].dims, args["weight"].dims[0]
    if space.size(weight) > 1:
        space.tie(x[1] if len(x) > 1 else x[0], weight)
    return [Value(list(x))]


@_rule("embedding")
def _embedding(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    rows, features = args["weight"].dims
    space.pin(rows)
    return [Value([*args["indices"].dims, features])]


@_rule(
    "sum", "mean", "amax", "amin", "var", "std", "logsumexp", "prod", "any", "all", "linalg_vector_norm", "norm",
    "nansum", "nanmean", "std_mean", "var_mean",
)  # fmt: skip
def _reduce(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x, dim = _first(args), args.get("dim")
    chosen = range(len(x)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    reduced = {_wrap(each, len(x)) for each in chosen}
    kept = [fixed(1) if place in reduced else each for place, each in enumerate(x)]
    dims = kept if args.get("keepdim") else [each for place, each in enumerate(x) if place not in reduced]
    return [Value(list(dims)) for _ in shapes]


@_rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort", "topk", "argsort")
def _ordered(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    """Operations that look at the order along some axes, which stay as they are."""
    x = _first(args)
    dim = args.get("dim", args.get("dims"))
    chosen = range(len(x)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    for place in {_wrap(each, len(x)) for each in chosen}:
        space.pin(x[place])
        x[place] = fixed(shapes[0][place])
    return [Value(list(x)) for _ in shapes]


@_rule("argmax", "argmin", "max", "min")
def _extreme(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    """Values and where they were found, which ties the axis to its order."""
    if isinstance(args.get("other"), Value):
        return elementwise(space, args, shapes)
    if args.get("dim") is None:
        raise NoRule
    space.pin(_first(args)[_wrap(args["dim"], len(_first(args)))])
    return _reduce(space, args, shapes)


@_rule(
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel",
)  # fmt: skip
def _reshape(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    """Groups of axes with the same number of entries are flattened and cut anew."""
    old, new = _first(args), list(shapes[0])
    if 0 in new:
        raise NoRule
    dims: list[Dim] = []
    while old or new:
        group, sizes = old[:1], new[:1]
        del old[:1], new[:1]
        entries, wanted = math.prod(map(space.size, group)), math.prod(sizes)
        while entries != wanted:
            if entries < wanted and old:
                group.append(old.pop(0))
                entries *= space.size(group[-1])
            elif wanted < entries and new:
                sizes.append(new.pop(0))
                wanted *= sizes[-1]
            else:
                raise NoRule
        if sizes:
            dims += space.split(space.times(*group), sizes)
    return [Value(dims)]


@_rule("expand", "expand_as", "broadcast_to")
def _expand(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    return [broadcast(space, [Value(_first(args))], shapes[0])]


@_rule("permute")
def _permute(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    return [Value([x[_wrap(dim, len(x))] for dim in args["dims"]])]


@_rule("transpose", "swapaxes", "swapdims")
def _transpose(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    first, second = (_wrap(dim, len(x)) for dim in list(args.values())[1:3])
    x[first], x[second] = x[second], x[first]
    return [Value(x)]


@_rule("t", "mT", "adjoint", "mH")
def _last_two(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    return [Value([*x[:-2], *reversed(x[-2:])])]


@_rule("numpy_T")
def _reversed(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    return [Value(_first(args)[::-1])]


@_rule("movedim", "moveaxis")
def _movedim(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    ends = [[each] if isinstance(each, int) else list(each) for each in (args["source"], args["destination"])]
    moves = {_wrap(to, len(x)): _wrap(source, len(x)) for source, to in zip(*ends, strict=True)}
    others = iter([place for place in range(len(x)) if place not in moves.values()])
    return [Value([x[moves[place]] if place in moves else x[next(others)] for place in range(len(x))])]


@_rule("select")
def _select(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    space.pin(x.pop(_wrap(args["dim"], len(x))))
    return [Value(x)]


@_rule("unbind")
def _unbind(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    return [each for _ in shapes for each in _select(space, args, shapes)]


@_rule("slice", "narrow")
def _slice(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    place = _wrap(args["dim"], len(x))
    size = space.size(x[place])
    start = args["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if not isinstance(start, int) or args.get("step", 1) != 1:
        raise NoRule
    x[place] = space.cut(space.cut(x[place], start)[1], shapes[0][place])[0]
    return [Value(x)]


@_rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def _split(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    place = _wrap(args["dim"], len(x))
    rest, found = x[place], []
    for shape in shapes:
        piece, rest = space.cut(rest, shape[place])
        found.append(Value([*x[:place], piece, *x[place + 1 :]]))
    return found


@_rule("cat", "concat", "concatenate")
def _cat(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    values = [list(value.dims) for value in args["tensors"]]
    place = _wrap(args["dim"], len(shapes[0]))
    if any(len(value) != len(shapes[0]) for value in values):
        raise NoRule
    joined = tuple(segment for value in values for segment in space.resolve(value.pop(place)))
    for other in values[1:]:
        for dim, same in zip(values[0], other, strict=True):
            space.tie(dim, same)
    return [Value([*values[0][:place], joined, *values[0][place:]])]


@_rule("stack")
def _stack(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    first, *others = args["tensors"]
    for other in others:
        for dim, same in zip(first.dims, other.dims, strict=True):
            space.tie(dim, same)
    place = _wrap(args["dim"], len(shapes[0]))
    return [Value([*first.dims[:place], fixed(1 + len(others)), *first.dims[place:]])]


@_rule("repeat", "tile")
def _repeat(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    x = [fixed(1)] * (len(shapes[0]) - len(x)) + x
    dims = [
        space.times(space.fresh(size // space.size(dim)), dim) for dim, size in zip(x, shapes[0], strict=True)
    ]  # each copy holds the axis, so copies may be exchanged
    return [Value(dims)]


@_rule("repeat_interleave")
def _repeat_interleave(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x, repeats = _first(args), args.get("repeats")
    if not isinstance(repeats, int) or args.get("dim") is None:
        raise NoRule
    place = _wrap(args["dim"], len(x))
    x[place] = space.times(x[place], space.fresh(repeats))
    return [Value(x)]


@_rule("index_select")
def _index_select(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    place = _wrap(args["dim"], len(x))
    space.pin(x[place])
    x[place] = space.pin(args["index"].dims[0])
    return [Value(x)]


@_rule("index")
def _index(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    """A table looked up by one tensor of places."""
    x, indices = _first(args), args["indices"]
    places = [place for place, index in enumerate(indices) if index is not None]
    if len(places) != 1:
        raise NoRule
    space.pin(x[places[0]])
    return [Value([*x[: places[0]], *_pin_all(space, indices[places[0]].dims), *x[places[0] + 1 :]])]


@_rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    first, second = (list(value.dims) for value in list(args.values())[:2])
    rows, columns = ([first[-2]] if len(first) > 1 else []), ([second[-1]] if len(second) > 1 else [])
    space.tie(first[-1], second[-2] if columns else second[0])
    batch = len(shapes[0]) - len(rows) - len(columns)
    stacks = [Value(first[:-2]), Value(second[:-2])]
    return [Value([*broadcast(space, stacks, shapes[0][:batch]).dims, *rows, *columns])]


@_rule("addmm", "baddbmm", "addbmm")
def _addmm(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    added, *factors = list(args.values())[:3]
    if any(len(factor.dims) != len(shapes[0]) for factor in factors):
        raise NoRule
    product = _matmul(space, dict(enumerate(factors)), shapes)  # type: ignore[arg-type]
    return [broadcast(space, [added, *product], shapes[0])]


@_rule("einsum")
def _einsum(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    inputs, arrow, output = args["equation"].replace(" ", "").partition("->")
    if not arrow or "." in inputs:
        raise NoRule
    letters: dict[str, Dim] = {}
    for names, value in zip(inputs.split(","), args["tensors"], strict=True):
        for name, dim in zip(names, value.dims, strict=True):
            if space.size(dim) == 1:
                letters.setdefault(name, dim)
            else:
                known = letters.get(name, dim)
                letters[name] = space.tie(known, dim) if space.size(known) > 1 else dim
    return [Value([letters[name] for name in output])]


@_rule("scaled_dot_product_attention")
def _attention(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    query, key, value = (list(args[name].dims) for name in ("query", "key", "value"))
    if args.get("enable_gqa"):
        repeated = space.size(query[-3]) // space.size(key[-3])
        space.tie(key[-3], value[-3])
        key[-3] = value[-3] = space.times(key[-3], space.fresh(repeated))
    space.tie(query[-1], key[-1])
    space.tie(key[-2], value[-2])
    if args.get("is_causal"):
        _pin_all(space, [query[-2], key[-2]])
    batch = [broadcast(space, [Value(each[:-2]) for each in (query, key, value)], shapes[0][:-2])]
    scores = [*batch[0].dims, query[-2], key[-2]]
    if args.get("attn_mask") is not None:
        broadcast(space, [Value(scores), args["attn_mask"]], tuple(map(space.size, scores)))
    return [Value([*batch[0].dims, query[-2], value[-1]])]


_SPATIAL = re.compile(r"(?:.*_pool|upsample_\w+?|_upsample_\w+?)([123])d.*")


def _spatial(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape], axes: int) -> list[Value]:
    """Pooling and resizing: the last axes are a grid, all before them are treated alike."""
    x = _first(args)
    _pin_all(space, x[-axes:])
    return [Value([*x[:-axes], *map(fixed, shape[-axes:])]) for shape in shapes]


@_rule("pad", "constant_pad_nd")
def _pad(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x, pad = _first(args), args["pad"]
    constant = args.get("mode", "constant") == "constant"
    for place, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        if (before or after) and not (constant and before >= 0 and after >= 0):
            space.pin(x[-1 - place])
            x[-1 - place] = fixed(shapes[0][-1 - place])
        else:
            edges = [fixed(size) if size else () for size in (before, after)]
            x[-1 - place] = space.resolve(edges[0] + x[-1 - place] + edges[1])
    return [Value(x)]


@_rule("glu")
def _glu(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    place = _wrap(args["dim"], len(x))
    x[place] = space.tie(*space.cut(x[place], shapes[0][place]))
    return [Value(x)]


@_rule("pixel_shuffle")
def _pixel_shuffle(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    x = _first(args)
    channels = space.split(x[-3], [shapes[0][-3], args["upscale_factor"] ** 2])
    _pin_all(space, [channels[1], *x[-2:]])
    return [Value([*x[:-3], channels[0], *map(fixed, shapes[0][-2:])])]


@_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(space: Space, args: Mapping[str, Any], shapes: Sequence[Shape]) -> list[Value]:
    """Stacked recurrent layers: the hidden units of each direction move together, in every gate alike."""
    if "batch_sizes" in args:
        raise NoRule
    *outer, features = args["input"].dims
    _pin_all(space, outer)
    directions = 2 if args["bidirectional"] else 1
    weights, each = [value.dims for value in args["params"]], 4 if args["has_biases"] else 2
    if len(weights) != each * directions * args["num_layers"]:
        raise NoRule  # projections
    units: list[Dim] = []
    for layer in range(0, len(weights), each * directions):
        cells = range(layer, layer + each * directions, each)
        hidden = [_recurrent_cell(space, features, weights[start : start + each]) for start in cells]
        features = tuple(segment for unit in hidden for segment in unit)
        units += hidden
    given = [state.dims[-1] for state in tensors(args["hx"]) if not state.uniform]
    if given or len(shapes) > 1:  # states of all layers are stacked in one tensor
        for unit in [*given, *units[1:]]:
            space.tie(units[0], unit)
    states = [Value([*map(fixed, shape[:-1]), units[0]]) for shape in shapes[1:]]
    return [Value([*outer, features]), *states]


def _recurrent_cell(space: Space, features: Dim, weights: Sequence[list[Dim]]) -> Dim:
    inputs, recurrent, *biases = weights
    hidden = recurrent[1]
    gates = hidden * (space.size(recurrent[0]) // space.size(hidden))
    space.tie(inputs[1], features)
    for weight in (inputs, recurrent, *biases):
        space.tie(gates, weight[0])
    return space.resolve(hidden)


def rule_for(name: str, pointwise: bool) -> Rule:
    """The rule of an operation.

    Args:
        name: Without namespace, overload and in-place underscore.
        pointwise: Whether ATen calls it so.

    Raises:
        NoRule: There is none.
    """
    if name in RULES:
        return RULES[name]
    grid = _SPATIAL.fullmatch(name)
    if grid:
        return lambda space, args, shapes: _spatial(space, args, shapes, int(grid[1]))
    if pointwise:
        return elementwise
    raise NoRule
