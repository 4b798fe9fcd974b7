"""Fits generated weights of a source architecture to another network: other classes, wider layers, more layers.

Known from keys and shapes alone: a ``Target`` is made from both architectures' shapes, says layer by layer what it will
do, and refuses what it cannot. Weights are moved, never trained. This module never reads a file and never imports Ray.

* Other classes: the head, which is the last layer, is initialised anew.
* Wider layers (Net2WiderNet; Chen, Goodfellow, Shlens 2016, section 2.2): entry j of an axis that grew from n entries
  takes entry j mod n of draw j div n, and input columns are divided by how often their entry occurs. An axis of
  flattened maps follows its channels by the same rule, as channels are the slowest of it. With equal draws the function
  stays the same. With different ones the copies of a channel learn differently, and what the draws get wrong averages
  out: of 20 trained ``digits_cnn`` with noise on the weights (0.3 of a tensor's standard deviation) one draw answers
  85.7 % of the test digits, and two in a ``digits_cnn_wide`` 90.6 % (after an epoch 95.3 and 96.3 %).
* More layers (Net2DeeperNet, section 2.3): layers are matched in order, by kind and relative depth, and a layer without
  a match starts as the identity. The function stays the same behind a ReLU, and nearly so behind the others: 20 trained
  ``digits_cnn`` of four activation functions answer 95.8 % of the test digits, as ``digits_cnn_deep`` 95.8 % (and after
  an epoch 96.5 %). With a copy of the layer before instead it is 10.6 % (59.8 %), from scratch 9.1 % (42.8 %).

Strides, padding and groups are not in shapes: that the target has those of the source, and that a new layer keeps the
size of its maps, is for the caller to know.

Shapes: R networks, K draws of each, C output channels, I input columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.kinds import find_layers
from sane_ray.tokens.layers import Layer
from sane_ray.zoo.architectures import BIAS, INITIALIZATIONS, generator

Shape = Sequence[int]

_TRACKED = "num_batches_tracked"
_NORMS = ("norm", "running_mean", "running_var")


@dataclass(frozen=True)
class _Unit:
    """A layer and the norms behind it, up to the next layer; or tensors that can only be taken as they are."""

    layers: tuple[Layer, ...]

    @property
    def layer(self) -> Layer:
        return self.layers[0]

    @property
    def name(self) -> str:
        return _module(self.layer.key) or self.layer.key

    @property
    def is_layer(self) -> bool:
        return _is_layer(self.layer)

    @property
    def outputs(self) -> int:
        return self.layer.channels

    @property
    def inputs(self) -> int:
        """Columns of a layer."""
        return self.layer.shape[1]

    @property
    def form(self) -> tuple[object, ...]:
        """What a target's layer must have in common with its source's."""
        return self.layer.kind, self.layer.shape[2:], *((each.kind, each.bias_key is None) for each in self.layers)


@dataclass(frozen=True)
class _Step:
    """How one unit of the target comes to be."""

    how: Literal["take", "identity", "fresh"]
    target: _Unit
    source: _Unit | None


class Target:
    """How weights of one architecture become weights of another.

    Chains of convolutions, linear layers and batch norms may become wider and deeper. Other networks may become wider
    where each layer reads channels of one layer before, or a sum of such; a network that concatenates, pads or groups
    channels is refused where shapes show it. Anything keeps tensors of the same shape, so every network whose last
    entry is its head can get other classes.

    Attributes:
        copies: Draws of the source network, K, with which no channel of the target occurs twice.
    """

    def __init__(
        self,
        source_shapes: Mapping[str, Shape],
        target_shapes: Mapping[str, Shape],
        *,
        initialization: str = "uniform",
    ) -> None:
        """Matches the layers.

        Args:
            source_shapes: Shape of every tensor by its key, in the order of the state dict.
            target_shapes: The same of the target.
            initialization: What a new head is drawn from: a key of ``zoo.architectures.INITIALIZATIONS``, what
                ``model::init_type`` of the architecture's params says; ``uniform`` is torch's own.

        Raises:
            InputError: The source's weights cannot be fitted to the target; names the layer, its shapes and a remedy.
        """
        if initialization not in INITIALIZATIONS:
            raise InputError(f"initialization is {initialization!r}: must be one of {', '.join(INITIALIZATIONS)}")
        self._source = {key: tuple(shape) for key, shape in source_shapes.items()}
        self._target = {key: tuple(shape) for key, shape in target_shapes.items()}
        self._initialization = initialization
        self._steps = _steps(_units(self._source), _units(self._target))
        self.copies = max(_multiple(step) for step in self._steps)

    def describe(self) -> list[str]:
        """A line for each layer of the target, such as ``module_list.3: 10 -> 20 channels, from module_list.3``."""
        return [_line(step, self._initialization) for step in self._steps]

    def apply(self, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The target's weights.

        A network's weights depend on its own draws, its place among the R, and the seed alone.

        Args:
            weights: By key, [R, *shape] or [R, copies, *shape]: without an axis of draws, a channel's copies are equal.
                Norms' counts of batches may be missing.
            seed: Of new heads.

        Returns:
            [R, *shape] by the target's keys, in their order, on the device of the weights; none shares their memory.

        Raises:
            InputError: The weights are not those of the source.
        """
        draws = self._draws(weights)
        fitted: dict[str, Tensor] = {}
        for step in self._steps:
            if step.how == "fresh":
                fitted |= _fresh(step, draws, self._initialization, seed)
            elif step.how == "identity":
                fitted |= _identity(step, draws)
            else:
                fitted |= _taken(step, draws)
        return {key: fitted[key] if key in fitted else _uncounted(draws) for key in self._target}

    def _draws(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with an axis of draws, [R, K, *shape]."""
        unknown = next((key for key in weights if key not in self._source), None)
        if unknown is not None:
            raise InputError(f"the weights have {unknown}, which the source has not: they are of another architecture")
        draws = {}
        for key, shape in self._source.items():
            if key in weights:
                draws[key] = _with_draws(key, weights[key], shape, self.copies)
            elif not key.endswith(_TRACKED):
                raise InputError(f"the weights lack {key}, which the source has: generate all of its tensors")
        _check_alike({key: value for key, value in draws.items() if not key.endswith(_TRACKED)})
        return draws


def _with_draws(key: str, value: Tensor, shape: Shape, copies: int) -> Tensor:
    """Weights [R, *shape] or [R, copies, *shape] as [R, K, *shape]."""
    sizes = tuple(value.shape)
    if sizes[1:] == shape:
        return value.unsqueeze(1)
    if sizes[1:] == (copies, *shape):
        return value
    wanted = ", ".join(map(str, shape))
    raise InputError(
        f"{key} has shape {list(sizes)}: it must be [R, {wanted}], or [R, {copies}, {wanted}] with {copies} draws of "
        "each of the R networks"
    )


def _check_alike(draws: Mapping[str, Tensor]) -> None:
    """Raises ``InputError`` unless all tensors hold as many networks and draws."""
    first, *others = draws
    for key in others:
        found, expected = draws[key].shape[:2], draws[first].shape[:2]
        if found != expected:
            raise InputError(
                f"{key} has {found[0]} networks of {found[1]} draws, and {first} {expected[0]} of {expected[1]}: give "
                "all tensors of all networks"
            )


def _units(shapes: Mapping[str, Shape]) -> list[_Unit]:
    """Layers with their norms, in the order of the state dict."""
    meta = {
        key: torch.empty(tuple(shape), dtype=torch.int64 if key.endswith(_TRACKED) else torch.float32, device="meta")
        for key, shape in shapes.items()
    }
    units: list[_Unit] = []
    for layer in find_layers(meta, "keep", "all"):
        if layer.kind in _NORMS and units and units[-1].is_layer:
            units[-1] = _Unit((*units[-1].layers, layer))
        else:
            units.append(_Unit((layer,)))
    return units


def _is_layer(layer: Layer) -> bool:
    """Whether rows are output channels and the second axis is input channels, with nothing else to it."""
    plain = layer.key.rpartition(".")[2] == "weight" and len(layer.shape) >= 2
    return plain and (layer.kind == "conv" or (layer.kind == "linear" and len(layer.shape) == 2))


def _steps(source: list[_Unit], target: list[_Unit]) -> list[_Step]:
    """What becomes of each unit of the target."""
    for name, units in (("source", source), ("target", target)):
        if not any(unit.is_layer for unit in units):
            raise InputError(f"the {name} has no convolution or linear layer: there is nothing to fit")
    if len(source) == len(target):
        matches = _matches_by_place(source, target)
    elif len(source) > len(target):
        raise InputError(
            f"the target has {len(target)} layers and the source {len(source)}: weights are fitted to networks of as "
            "many layers or more, so choose a deeper target"
        )
    else:
        matches = _matches_by_depth(source, target)
    steps = [_step(match, unit, unit is _head(target)) for match, unit in zip(matches, target, strict=True)]
    _check(steps)
    return steps


def _head(units: Sequence[_Unit]) -> _Unit:
    return [unit for unit in units if unit.is_layer][-1]


def _step(source: _Unit | None, target: _Unit, is_head: bool) -> _Step:
    if source is None:
        return _Step("identity", target, None)
    if is_head and source.is_layer and source.outputs != target.outputs:
        return _Step("fresh", target, source)
    return _Step("take", target, source)


def _matches_by_place(source: list[_Unit], target: list[_Unit]) -> list[_Unit | None]:
    """Each unit's source: that of its name, or where names differ the one in its place."""
    by_key = {unit.layer.key: unit for unit in source}
    if by_key.keys() == {unit.layer.key for unit in target}:
        return [by_key[unit.layer.key] for unit in target]
    return list(source)


def _matches_by_depth(source: list[_Unit], target: list[_Unit]) -> list[_Unit | None]:
    """Each unit's source, or None for a new one: all of the source's in order, as near in relative depth as can be."""
    _check_chain(source, "source")
    _check_chain(target, "target")

    def deviation(i: int, j: int) -> float:
        return abs(i / max(len(source) - 1, 1) - j / (len(target) - 1))

    @cache
    def best(i: int, j: int) -> tuple[float, tuple[int | None, ...]]:
        """Least deviation of the source from i and the target from j on, and the source of each unit of the target."""
        if len(source) - i > len(target) - j or j == len(target):
            return (0.0 if i == len(source) and j == len(target) else math.inf), ()
        choices = []
        if i < len(source) and _fits(source[i], target[j], i == len(source) - 1, j == len(target) - 1):
            cost, rest = best(i + 1, j + 1)
            choices.append((cost + deviation(i, j), (i, *rest)))
        if j and _may_be_new(target[j - 1], target[j]) and j < len(target) - 1:
            cost, rest = best(i, j + 1)
            choices.append((cost, (None, *rest)))
        return min(choices, key=lambda choice: choice[0], default=(math.inf, ()))

    cost, places = best(0, 0)
    if math.isinf(cost):
        raise InputError(
            f"the source's {len(source)} layers ({_forms(source)}) cannot be found in order among the target's "
            f"{len(target)} ({_forms(target)}): kernels must be equal and layers no narrower, and a layer more must "
            "have as many input as output channels and an odd kernel"
        )
    return [None if place is None else source[place] for place in places]


def _fits(source: _Unit, target: _Unit, source_is_head: bool, target_is_head: bool) -> bool:
    if source_is_head != target_is_head or source.form != target.form:
        return False
    return source_is_head or (target.outputs >= source.outputs and target.inputs >= source.inputs)


def _may_be_new(before: _Unit, unit: _Unit) -> bool:
    """Whether a unit can pass on what the one before it makes."""
    same = before.layer.kind == unit.layer.kind and before.outputs == unit.inputs == unit.outputs
    return same and all(side % 2 for side in unit.layer.shape[2:]) and _norms_are_batch_norms(unit)


def _norms_are_batch_norms(unit: _Unit) -> bool:
    keeping = {_module(layer.key) for layer in unit.layers if layer.kind == "running_mean"}
    return all(_module(layer.key) in keeping for layer in unit.layers[1:])


def _check_chain(units: Sequence[_Unit], name: str) -> None:
    """Raises ``InputError`` unless each unit is a layer that can read the one before."""
    width = None
    for unit in units:
        reads = unit.is_layer and (
            width is None or unit.inputs == width or (unit.layer.kind == "linear" and unit.inputs % width == 0)
        )
        if not reads:
            raise InputError(
                f"{unit.layer.key} of the {name}, {_list(unit.layer.shape)}, is no layer that reads the one before: "
                "only chains of convolutions and linear layers can become deeper, so choose a target of as many layers"
            )
        width = unit.outputs


def _check(steps: Sequence[_Step]) -> None:
    """Raises ``InputError`` for the first unit that cannot be taken from its source."""
    widths: list[tuple[int, int]] = []
    for step in steps:
        if step.how == "take" and step.source is not None:
            _check_form(step.source, step.target)
            if step.target.is_layer:
                _check_inputs(step.source, step.target, widths)
        if step.target.is_layer and step.source is not None:
            widths.append((step.source.outputs, step.target.outputs))


def _check_form(source: _Unit, target: _Unit) -> None:
    if [layer.shape for layer in source.layers] == [
        layer.shape for layer in target.layers
    ] and source.form == target.form:
        return
    if not (source.is_layer and target.is_layer and source.layer.kind == target.layer.kind):
        raise _misfit(source.layer, target.layer, "only convolutions, linear layers and their batch norms can change")
    if source.layer.shape[2:] != target.layer.shape[2:]:
        raise _misfit(
            source.layer, target.layer, "kernels must be of the same size, so choose a target with the source's"
        )
    if source.form != target.form:
        raise _misfit(source.layer, target.layer, "both must have a bias and norms or both must not")
    if target.outputs < source.outputs or target.inputs < source.inputs:
        raise _misfit(source.layer, target.layer, "the target is narrower, so choose one that is as wide or wider")
    for old, new in zip(source.layers[1:], target.layers[1:], strict=True):
        if old.channels * target.outputs != new.channels * source.outputs:
            raise _misfit(old, new, f"it must grow as {target.layer.key} does")
        if old.shape != new.shape and not _norms_are_batch_norms(target):
            raise _misfit(old, new, "of norms only batch norms may become wider, so choose a target of the same width")


def _check_inputs(source: _Unit, target: _Unit, widths: Sequence[tuple[int, int]]) -> None:
    """Raises ``InputError`` unless the columns are channels of a layer before, times places where they are flattened.

    Args:
        source: The layer in the source.
        target: The layer in the target.
        widths: Output channels of all layers before, in the source and in the target.
    """
    if source.inputs == target.inputs and all(old == new for old, new in widths):
        return
    if not widths:
        raise _misfit(source.layer, target.layer, "both must take images of as many channels")
    if source.layer.kind == "linear":
        old, new = widths[-1]
        if source.inputs % old == 0 and source.inputs * new == target.inputs * old:
            return
        remedy = f"the layer before has {old} -> {new} channels, and as many places must be flattened in both"
    else:
        if (source.inputs, target.inputs) in widths:
            return
        remedy = "no layer before grows like its inputs: concatenated or grouped channels cannot become wider"
    raise _misfit(source.layer, target.layer, remedy)


def _misfit(source: Layer, target: Layer, remedy: str) -> InputError:
    return InputError(
        f"{target.key} is {_list(target.shape)} in the target, and {source.key} is {_list(source.shape)} in the "
        f"source: {remedy}"
    )


def _multiple(step: _Step) -> int:
    """Draws of the source that a unit has room for."""
    if step.how != "take" or step.source is None or not step.target.is_layer:
        return 1
    source, target = step.source, step.target
    return max(-(-target.outputs // source.outputs), -(-target.inputs // source.inputs))


def _taken(step: _Step, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit from its source: wider where the target is."""
    assert step.source is not None
    source, target = step.source, step.target
    first = draws[source.layer.key]
    grows = target.is_layer and target.outputs > source.outputs
    used = 1 if grows or not target.is_layer else min(-(-target.inputs // source.inputs), first.shape[1])
    fitted = {}
    for old, new in zip(source.layers, target.layers, strict=True):
        is_weight = new is target.layer and target.is_layer
        fitted[new.key] = _weight(first, new.shape) if is_weight else _channels(draws[old.key], new.channels, used)
        if new.bias_key is not None and old.bias_key is not None:
            fitted[new.bias_key] = _channels(draws[old.bias_key], new.channels, used)
        counted = f"{_module(old.key)}.{_TRACKED}"
        if new.kind == "running_mean" and counted in draws:
            fitted[f"{_module(new.key)}.{_TRACKED}"] = draws[counted][:, 0].clone()
    return fitted


def _weight(draws_RKCI: Tensor, shape: Shape) -> Tensor:
    """A layer's weight [R, *shape] from draws [R, K, C, I, *kernel].

    Where the outputs grow, a row comes from one draw; where they do not, its columns come from the draws of the
    channels that they read.
    """
    _, count, outputs, inputs, *kernel = draws_RKCI.shape
    rows, columns = (torch.arange(size, device=draws_RKCI.device) for size in shape[:2])
    sources = columns % inputs
    times = torch.bincount(sources, minlength=inputs)[sources].to(draws_RKCI.dtype)
    draw = (rows // outputs)[:, None] if shape[0] > outputs else (columns // inputs)[None, :]
    taken = draws_RKCI[:, draw.clamp(max=count - 1), (rows % outputs)[:, None], sources[None, :]]
    return taken / times.view(-1, *[1] * len(kernel))


def _channels(draws_RKC: Tensor, channels: int, used: int) -> Tensor:
    """A value for each channel from draws [R, K, C, ...]: of each channel's own draw, or the mean of the draws used."""
    count, old = draws_RKC.shape[1], draws_RKC.shape[2] if draws_RKC.ndim > 2 else 1
    if channels == old:
        return draws_RKC[:, 0].clone() if used == 1 else draws_RKC[:, :used].mean(1)
    places = torch.arange(channels, device=draws_RKC.device)
    return draws_RKC[:, (places // old).clamp(max=count - 1), places % old]


def _identity(step: _Step, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit that passes on what it gets: exactly but for its activation function and the epsilon of its norms."""
    layer = step.target.layer
    like = next(iter(draws.values()))
    weight_CCk = torch.zeros(layer.channels, layer.channels, layer.fan_in // layer.channels)
    weight_CCk[:, :, weight_CCk.shape[2] // 2] = torch.eye(layer.channels)  # the middle: all sides are odd
    return _started(step.target, weight_CCk.view(layer.shape).repeat(len(like), *[1] * len(layer.shape)).to(like), 0.0)


def _fresh(step: _Step, draws: Mapping[str, Tensor], initialization: str, seed: int) -> dict[str, Tensor]:
    """A unit as networks of the zoo are initialised, each of the R in its turn."""
    layer = step.target.layer
    like = next(iter(draws.values()))
    weight = torch.empty(len(like), *layer.shape)
    random = generator({"seed": seed}, "head")
    for each in weight:
        INITIALIZATIONS[initialization](each, random)
    return _started(step.target, weight.to(like), BIAS)


def _started(unit: _Unit, weight: Tensor, bias: float) -> dict[str, Tensor]:
    """A unit with that weight [R, *shape] and bias, and norms that do nothing."""

    def filled(channels: int, value: float) -> Tensor:
        return torch.full((len(weight), channels), value, dtype=weight.dtype, device=weight.device)

    started = {unit.layer.key: weight}
    if unit.layer.bias_key is not None:
        started[unit.layer.bias_key] = filled(unit.outputs, bias)
    for norm in unit.layers[1:]:
        started[norm.key] = filled(norm.channels, float(norm.kind != "running_mean"))
        if norm.bias_key is not None:
            started[norm.bias_key] = filled(norm.channels, 0.0)
    return started


def _uncounted(draws: Mapping[str, Tensor]) -> Tensor:
    """Counts of batches, [R], of norms that have seen none that we know of."""
    first = next(iter(draws.values()))
    return torch.zeros(len(first), dtype=torch.int64, device=first.device)


def _line(step: _Step, initialization: str) -> str:
    target, source = step.target, step.source
    if source is None:
        return f"{target.name}: {target.outputs} channels, new, starts as the identity"
    sizes = [f"{_grown(source.outputs, target.outputs)} channels"]
    if step.how == "fresh":
        return f"{target.name}: {_grown(source.outputs, target.outputs)} classes, initialised anew ({initialization})"
    if target.is_layer and source.inputs != target.inputs:
        sizes.append(f"{_grown(source.inputs, target.inputs)} inputs")
    return f"{target.name}: {', '.join(sizes)}, from {source.name}"


def _grown(old: int, new: int) -> str:
    return str(old) if old == new else f"{old} -> {new}"


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _list(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a single value"


def _forms(units: Sequence[_Unit]) -> str:
    return ", ".join(_list(unit.layer.shape) for unit in units)
