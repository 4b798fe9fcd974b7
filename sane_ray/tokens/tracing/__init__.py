"""Finds the permutation symmetry of any module by tracing it, and proves it before it is returned.

``torch.export`` writes the module down as a graph of operations; a rule for each operation says which axes it ties
together (``rules``), and union-find over axes says what may move (``space``). What comes out is tried on the module:
permutations that change its outputs are dropped. The module itself is never changed. This module needs torch alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from sane_ray.errors import InputError
from sane_ray.tokens.symmetry import Axis, Indices, Symmetry, permute
from sane_ray.tokens.tracing.rules import VIEWS, NoRule, Value, rule_for, tensors
from sane_ray.tokens.tracing.space import Dim, Space, fixed

TOLERANCE = 1e-5
"""Largest change of an output, relative to the largest output, that counts as the same function in float64."""

_DRAWS = ("normal", "uniform", "normal")
"""Distributions of the inputs of the proof; uniform ones, in [0, 1), serve functions of positive numbers too."""


def trace_symmetry(module: nn.Module, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> Symmetry:
    """The permutations of a module's inner units that leave its function in eval mode as it is.

    Inputs and outputs of the module stay in place. Attention heads move as blocks where the module cuts them out by a
    view or split of a projection, and so do groups of channels. Operations that are not known hold what they touch in
    place. In the end random permutations are applied and the outputs compared in float64 (relative 1e-5); permutations
    that do not pass are dropped. The outputs are those of random inputs, not of the given ones, which may be zeros.

    Args:
        module: Any module that ``torch.export`` can trace; it stays as it is. A symmetry fits the sizes of the module
            that was traced, and needs its memory twice in float64.
        example_inputs: Its positional arguments, or the one tensor that it takes, or its arguments by name. Shapes and
            types count, and the values of tensors that are not floating-point: in the proof these are shuffled, where
            the module allows it.

    Returns:
        A symmetry over the keys of ``module.state_dict()``.

    Raises:
        InputError: The module does not run on the inputs or on random ones in float64, cannot be traced, or gives the
            same outputs for all inputs, which would prove nothing.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"a {type(module).__name__} cannot be traced: give the torch module itself")
    if isinstance(example_inputs, Mapping):
        example = _Example((), dict(example_inputs))
    else:
        example = _Example((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {})
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation would hide the heads
    try:
        double, example = _in_double(module, example)
        _run(double, example)
        program = _exported(double, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    found = _verified(double, example, _symmetry_of_graph(program, _aliases(module)))
    return dataclasses.replace(found, origin="" if found.is_trivial else "traced and proved")


def _run(module: nn.Module, example: _Example) -> None:
    try:
        _outputs(module, example)
    except Exception as error:  # whatever the module's own code raises
        raise InputError(
            f"{type(module).__name__} does not run on these example inputs in float64: {_first_line(error)}; give "
            "inputs of the shapes and types that it takes"
        ) from error


def _exported(module: nn.Module, example: _Example) -> torch.export.ExportedProgram:
    """The module as a graph; torch's own report of what it cannot follow is kept from the screen."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return torch.export.export(module, example.args, example.kwargs, strict=False)
    except Exception as error:  # whatever torch cannot follow
        raise InputError(
            f"{type(module).__name__} cannot be traced: {_first_line(error)}; trace a version without control flow "
            "that depends on data"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _Example:
    """Arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _in_double(module: nn.Module, example: _Example) -> tuple[nn.Module, _Example]:
    """A copy of the module in eval mode, and the inputs, in float64 on the CPU."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu()

    args, kwargs = pytree.tree_map(convert, (example.args, example.kwargs))
    return copy.deepcopy(module).cpu().double().eval(), _Example(args, kwargs)


def _aliases(module: nn.Module) -> list[list[str]]:
    """Keys of the state dict, those of one tensor together."""
    names: dict[int, list[str]] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            names.setdefault(id(value), []).append(key)
    return list(names.values())


def _symmetry_of_graph(program: torch.export.ExportedProgram, aliases: list[list[str]]) -> Symmetry:
    space = Space()
    parameters = _walk(program, space, {key: keys[0] for keys in aliases for key in keys})
    space.settle(dim for dims in parameters.values() for dim in dims)
    names: dict[int, str] = {}
    sizes: dict[str, int] = {}
    axes: dict[str, tuple[Axis, ...]] = {}
    for keys in aliases:
        dims = parameters.get(keys[0], [])
        found = tuple(_axis(space, dim, f"{keys[0]}:{place}", names, sizes) for place, dim in enumerate(dims))
        if any(axis is not None for axis in found):
            axes.update(dict.fromkeys(keys, found))
    return Symmetry(axes, sizes)


def _axis(space: Space, dim: Dim, place: str, names: dict[int, str], sizes: dict[str, int]) -> Axis:
    """An axis in names; an atom is named after the first module whose channels it is."""
    _, segments = space.blocks(dim)
    if all(segment < 0 for segment in segments):
        return None
    for atom in segments:
        if atom >= 0 and atom not in names:
            name = re.sub(r"(\.weight)?:0$", "", place)
            number = sum(known == name or known.startswith(f"{name}#") for known in sizes)
            names[atom] = f"{name}#{number + 1}" if number else name
            sizes[names[atom]] = space.atom_size(atom)
    named = tuple(names[segment] if segment >= 0 else -segment for segment in segments)
    return named[0] if len(named) == 1 and isinstance(named[0], str) else named


def _walk(program: torch.export.ExportedProgram, space: Space, canonical: Mapping[str, str]) -> dict[str, list[Dim]]:
    """Goes through the graph once, tying axes; returns those of the parameters that the graph uses."""
    placeholders = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    parameters: dict[str, list[Dim]] = {}
    known: dict[torch.fx.Node, Any] = {}
    read: set[Dim] = set()
    for node in program.graph.nodes:
        shapes = _shapes(node)
        if node.op == "placeholder":
            spec = placeholders.get(node.name)
            stored = spec is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
            key = canonical.get(str(spec.target)) if spec is not None and stored else None
            if key is not None and node.users:
                parameters.setdefault(key, [space.fresh(size) for size in shapes[0]])
                known[node] = Value(parameters[key])
            else:
                known[node] = Value([fixed(size) for size in shapes[0]])
        elif node.op == "output":
            _pin(space, _arguments(node.args, known))
            read.update(dim for value in tensors(_arguments(node.args, known)) for dim in value.dims)
        elif node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
            known[node] = _output(known, node)
        else:
            known[node] = _apply(space, node, known, shapes)
            if _name(node) not in VIEWS:
                read.update(dim for value in tensors([_arguments(node.args, known)]) for dim in value.dims)
    _pin_unread(space, parameters, read)
    return parameters


def _pin_unread(space: Space, parameters: Mapping[str, list[Dim]], read: Iterable[Dim]) -> None:
    """Fixes entries that no operation looked at, such as the rows of a table beyond the length of the inputs.

    With longer inputs they would take part, and then they might not be alike.
    """
    seen = {factor for dim in read for segment in space.resolve(dim) for factor in segment}
    for dims in parameters.values():
        for dim in dims:
            for segment in space.resolve(dim):
                if not seen.issuperset(factor for factor in segment if factor >= 0):
                    space.pin((segment,))


def _apply(space: Space, node: torch.fx.Node, known: Mapping[torch.fx.Node, Any], shapes: list[tuple[int, ...]]) -> Any:
    """The outputs of an operation, after its rule has tied what it ties; without a rule it pins what it touches."""
    args, kwargs = _arguments(node.args, known), _arguments(node.kwargs, known)
    several = isinstance(node.meta.get("val"), list | tuple)
    wanted = shapes[: _outputs_read(node)] if several else shapes
    try:
        values = _follow_rule(space, node, args, kwargs, wanted)
        if [tuple(map(space.size, value.dims)) for value in values[: len(wanted)]] != wanted:
            raise NoRule
    except (NoRule, LookupError, TypeError, ValueError, AttributeError):  # also a use that the rule does not foresee
        _pin(space, [args, kwargs])
        values = [Value([fixed(size) for size in shape]) for shape in shapes]
    return values if several else values[0]


def _output(known: Mapping[torch.fx.Node, Any], node: torch.fx.Node) -> Value | None:
    """The output that a getitem reads, or None if nobody reads it in turn."""
    source, place = node.args
    values = known[source]  # type: ignore[index]
    return values[place] if place < len(values) else None  # type: ignore[operator]


def _follow_rule(
    space: Space, node: torch.fx.Node, args: list[Any], kwargs: dict[str, Any], shapes: list[tuple[int, ...]]
) -> list[Value]:
    if not isinstance(node.target, torch._ops.OpOverload):
        raise NoRule
    schema = node.target._schema
    rule = rule_for(_name(node), torch.Tag.pointwise in node.target.tags)
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    defaults = {each.name: each.default_value if each.has_default_value() else None for each in schema.arguments}
    values = rule(space, defaults | given, shapes)
    if schema.name.endswith("_") and args and isinstance(args[0], Value):
        args[0].uniform = False  # written in place
    return values


def _name(node: torch.fx.Node) -> str:
    """Name of an operation without namespace, overload, and the underscore of in-place operations."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name.partition("::")[2]
    return name.removesuffix("_") if not name.endswith("__") else name


def _outputs_read(node: torch.fx.Node) -> int:
    """How many outputs there are up to the last one that is read: what nobody reads shall tie nothing."""
    used = [0]
    for user in node.users:
        if getattr(user.target, "__name__", "") != "getitem":
            return len(node.meta["val"])
        if user.users:
            used.append(int(user.args[1]))  # type: ignore[arg-type]
    return max(used) + 1


def _arguments(value: Any, known: Mapping[torch.fx.Node, Any]) -> Any:
    """Arguments of a node with the axes of tensors in place of nodes."""
    if isinstance(value, torch.fx.Node):
        return known.get(value)
    if isinstance(value, list | tuple):
        return [_arguments(entry, known) for entry in value]
    if isinstance(value, dict):
        return {key: _arguments(entry, known) for key, entry in value.items()}
    return value


def _shapes(node: torch.fx.Node) -> list[tuple[int, ...]]:
    """Shapes of a node's outputs."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [tuple(map(int, each.shape)) if isinstance(each, Tensor) else () for each in values]


def _pin(space: Space, value: Any) -> None:
    """Fixes all tensors among arguments."""
    if isinstance(value, Value):
        for dim in value.dims:
            space.pin(dim)
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _pin(space, each)


def _verified(module: nn.Module, example: _Example, symmetry: Symmetry) -> Symmetry:
    """The permutations that leave the outputs as they are; ``module`` is a copy that may be changed."""
    if symmetry.is_trivial:
        return symmetry
    rng = np.random.default_rng(0)
    draws = _random_inputs(module, example, rng)
    _make_channels_differ(module, draws, rng)
    weights = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    expected = [_outputs(module, draw) for draw in draws]
    if _say_nothing(draws, expected):
        raise InputError(
            f"the outputs of {type(module).__name__} are the same for all inputs that were tried, so its symmetry "
            "cannot be proved: trace it with trained weights, and with example inputs whose integers differ"
        )

    def keeps_function(names: Iterable[str]) -> bool:
        chosen = set(names)
        permutations: dict[str, Indices] = {
            name: rng.permutation(size) if name in chosen else np.arange(size) for name, size in symmetry.sizes.items()
        }
        module.load_state_dict(permute(weights, symmetry, permutations), strict=False)
        return all(
            all(map(_equal, outputs, _outputs(module, draw))) for outputs, draw in zip(expected, draws, strict=True)
        )

    names = list(symmetry.sizes)
    if all(keeps_function(names) for _ in range(2)):
        return symmetry
    names = [name for name in names if keeps_function([name]) and keeps_function([name])]
    if names and all(keeps_function(names) for _ in range(2)):
        return _without(symmetry, symmetry.sizes.keys() - set(names))
    return Symmetry({}, {})


def _random_inputs(module: nn.Module, example: _Example, rng: np.random.Generator) -> list[_Example]:
    """Inputs for the proof, with the shapes and types of the example, on which the module runs."""
    draws, reason = [], ""
    for distribution in _DRAWS:
        usable = []
        for shuffled in (True, False):  # some integers, such as lengths and offsets, must stay in order
            draw = _random_input(example, distribution, shuffled, rng)
            try:
                finite = _are_finite(module, draw)
            except Exception as error:  # whatever the module's own code raises
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                continue
            usable.append(draw)
            if finite:
                break
        draws += usable[-1:]
    if not draws:
        raise InputError(
            f"{type(module).__name__} does not run on random inputs of the shapes of the example: {reason}; its "
            "symmetry cannot be proved"
        )
    return draws


def _random_input(example: _Example, distribution: str, shuffled: bool, rng: np.random.Generator) -> _Example:
    """The example with random floating-point values, and with its other values shuffled if they shall be."""

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            drawn = rng.normal(size=value.shape) if distribution == "normal" else rng.random(value.shape)
            return torch.as_tensor(drawn, dtype=value.dtype)
        order = torch.from_numpy(rng.permutation(value.numel()))
        return value.flatten()[order].view(value.shape) if shuffled else value

    args, kwargs = pytree.tree_map(draw, (example.args, example.kwargs))
    return _Example(args, kwargs)


def _say_nothing(draws: list[_Example], outputs: list[list[Tensor]]) -> bool:
    """Whether no output depends on what differs between the inputs; if nothing does, whether all values are equal."""
    given = [[v for v in pytree.tree_leaves((draw.args, draw.kwargs)) if isinstance(v, Tensor)] for draw in draws]
    if any(not _same(given[0], others) for others in given[1:]):
        return all(_same(outputs[0], others) for others in outputs[1:])
    return all(_is_constant(output) for output in outputs[0])


def _is_constant(output: Tensor) -> bool:
    values = output.flatten()
    return bool((values == (values[0] if len(values) > 1 else 0)).all() or values.isnan().all())


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether values are equal, holes included."""
    return all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(first, second, strict=True)
    )


def _without(symmetry: Symmetry, dropped: Iterable[str]) -> Symmetry:
    """The symmetry with some permutations held in place."""
    gone = set(dropped)

    def hold(axis: Axis) -> Axis:
        if isinstance(axis, tuple):
            held = tuple(symmetry.sizes[part] if part in gone else part for part in axis)
            return held if any(isinstance(part, str) for part in held) else None
        return None if axis in gone else axis

    axes = {key: tuple(map(hold, names)) for key, names in symmetry.axes.items()}
    kept = {name: size for name, size in symmetry.sizes.items() if name not in gone}
    return Symmetry({key: names for key, names in axes.items() if any(name is not None for name in names)}, kept)


@torch.no_grad()
def _make_channels_differ(module: nn.Module, draws: list[_Example], rng: np.random.Generator) -> None:
    """Fresh batch norms and scales are alike in all channels, and a wrong permutation of them would not be seen."""
    finite = [_are_finite(module, draw) for draw in draws]
    before = copy.deepcopy(module.state_dict())
    for value in module.state_dict(keep_vars=True).values():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            continue
        first = value.flatten()[0]
        if bool((value == first).all()):
            noise = rng.normal(0, 0.3, value.shape) if first == 0 else rng.uniform(0.5, 1.5, value.shape)
            value.copy_(torch.from_numpy(noise))
    if any(was and not _are_finite(module, draw) for was, draw in zip(finite, draws, strict=True)):
        module.load_state_dict(before)


def _are_finite(module: nn.Module, example: _Example) -> bool:
    return all(bool(output.isfinite().all()) for output in _outputs(module, example))


@torch.no_grad()
def _outputs(module: nn.Module, example: _Example) -> list[Tensor]:
    """All tensors that the module returns; what it draws at random is the same each time, and nobody else's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = module(*example.args, **example.kwargs)
    return [each.clone() for each in pytree.tree_leaves(found) if isinstance(each, Tensor)]


def _equal(first: Tensor, second: Tensor) -> bool:
    if not first.is_floating_point() or not first.numel():
        return torch.equal(first, second)
    change = (first - second).nan_to_num().abs().max()
    same_holes = torch.equal(first.isnan(), second.isnan())
    return same_holes and bool(change <= TOLERANCE * first.nan_to_num().abs().max())
