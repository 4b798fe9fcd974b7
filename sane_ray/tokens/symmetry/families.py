"""Symmetries of known families of networks, read off the keys and shapes of a layer table alone.

What is not recognised gets the trivial symmetry: a wrong permutation would silently destroy a model, a missing one
costs nothing but data augmentation. This module never runs a network and never imports Ray.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sane_ray.tokens.symmetry.axes import Axis, Symmetry
from sane_ray.tokens.tokenizer import LayerTable

Modules = dict[str, dict[str, tuple[int, ...]]]


def derive_symmetry(table: LayerTable) -> Symmetry:
    """The symmetry of a network of a known family, otherwise the trivial one.

    Known are:

    * Chains: all modules are convolutions, linear layers and batch norms numbered under one prefix (``0``,
      ``module_list.3``, ``net.layers.1``), each reading the output of the one before, with elementwise functions,
      pooling and a channel-first flatten between them. Where another module has one value a channel (layer norm, group
      norm, PReLU), the channels around it stay fixed.
    * ResNets of basic or bottleneck blocks: ``conv1, bn1, layer{k}.{j}.{conv,bn}{n}``, shortcuts ``downsample`` or
      ``shortcut`` of a convolution and a batch norm, and ``fc`` or ``linear``. A residual stream has one permutation
      until a shortcut with weights begins a new one.

    The channels of the input and the outputs of the last layer are always fixed. What has no trace in keys and shapes
    cannot be seen: a function that treats channels unlike without having weights, a skip connection in a chain, or
    that a convolution is transposed if it has as many inputs as outputs.

    Args:
        table: Its tokenised and untokenised entries are both looked at, so batch norms are permuted even if they are
            not tokenised.
    """
    modules = _modules(table)
    for family in (_chain, _resnet):
        try:
            return family(modules)
        except _NotThisFamily:
            continue
    return Symmetry({}, {})


class _NotThisFamily(Exception):
    """The keys and shapes are not those of the family that was tried."""


@dataclass(frozen=True)
class _Stream:
    """Features that flow between modules: their number, the permutation they carry, and whether each may be a map."""

    size: int
    name: str | None
    maps: bool

    def feeds(self, inputs: int, flattened: bool) -> bool:
        """Whether a module of so many inputs can read the stream, in blocks where maps have been flattened."""
        return inputs == self.size or (self.maps and flattened and inputs % self.size == 0)


@dataclass
class _Assembly:
    """Collects the axes of a symmetry while a family walks its modules, each of which must be used."""

    modules: Modules
    axes: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def layer(self, module: str, source: _Stream | None, name: str | None) -> _Stream:
        """A convolution or linear layer that reads ``source`` (None: the network's input) and writes ``name``."""
        tensors = self._take(module)
        if not _is_layer(tensors):
            raise _NotThisFamily
        channels, inputs, *kernel = tensors["weight"]
        if source is not None and not source.feeds(inputs, flattened=not kernel):
            raise _NotThisFamily
        self._name(f"{module}.weight", (name, source.name if source else None, *[None] * len(kernel)))
        if "bias" in tensors:
            self._name(f"{module}.bias", (name,))
        if name is not None:
            self.sizes[name] = channels
        return _Stream(channels, name, maps=bool(kernel))

    def norm(self, module: str, stream: _Stream) -> None:
        """A batch norm of a stream."""
        tensors = self._take(module)
        if not _is_batch_norm(tensors) or not stream.feeds(tensors["running_mean"][0], flattened=True):
            raise _NotThisFamily
        for tensor in tensors:
            self._name(f"{module}.{tensor}", (stream.name,))

    def skip(self, module: str) -> None:
        """A module whose tensors stay as they are."""
        self._take(module)

    def finish(self) -> Symmetry:
        """The symmetry, if no module was left over."""
        if self.used != self.modules.keys():
            raise _NotThisFamily
        return Symmetry(self.axes, self.sizes)

    def _take(self, module: str) -> dict[str, tuple[int, ...]]:
        if module not in self.modules:
            raise _NotThisFamily
        self.used.add(module)
        return self.modules[module]

    def _name(self, key: str, names: tuple[Axis, ...]) -> None:
        if any(names):
            self.axes[key] = names


def _modules(table: LayerTable) -> Modules:
    """Shapes of the tensors of each module, scalars and counters left out."""
    shapes = {entry.key: entry.shape for entry in table.untokenized}
    for layer in table.layers:
        shapes[layer.key] = layer.shape
        if layer.bias_key is not None:
            shapes[layer.bias_key] = layer.shape[:1]
    modules: Modules = {}
    for key, shape in shapes.items():
        module, _, name = key.rpartition(".")
        if shape and name != "num_batches_tracked":
            modules.setdefault(module, {})[name] = shape
    return modules


def _is_layer(tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a module is a convolution or linear layer: a weight, and at most one bias a channel."""
    weight = tensors.get("weight", ())
    return len(weight) >= 2 and tensors.keys() <= {"weight", "bias"} and tensors.get("bias", weight[:1]) == weight[:1]


def _is_batch_norm(tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a module is a batch norm: running statistics, and at most weight and bias of the same length."""
    statistics = {"running_mean", "running_var"}
    one_length = len(set(tensors.values())) == 1 and all(len(shape) == 1 for shape in tensors.values())
    return one_length and statistics <= tensors.keys() <= statistics | {"weight", "bias"}


def _leaves_channels_alone(tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a module between two layers treats all channels alike: a batch norm, or single values for all."""
    return _is_batch_norm(tensors) or all(math.prod(shape) == 1 for shape in tensors.values())


def _chain(modules: Modules) -> Symmetry:
    """Modules numbered under one prefix, each reading the one before."""
    paths = [re.fullmatch(r"(|.+\.)(\d+)", module) for module in modules]
    if not all(paths) or len({path[1] for path in paths if path}) != 1:
        raise _NotThisFamily
    ordered = sorted(modules, key=lambda module: int(module.rpartition(".")[2]))
    places = [place for place, module in enumerate(ordered) if _is_layer(modules[module])]
    if not places:
        raise _NotThisFamily
    assembly, stream = _Assembly(modules), None
    for module in ordered[: places[0]]:
        assembly.skip(module)
    for place, end in zip(places, [*places[1:], len(ordered)], strict=True):
        layer, between = ordered[place], ordered[place + 1 : end]
        free = place != places[-1] and all(_leaves_channels_alone(modules[module]) for module in between)
        stream = assembly.layer(layer, stream, layer if free else None)
        for module in between:
            if free and _is_batch_norm(modules[module]):
                assembly.norm(module, stream)
            else:
                assembly.skip(module)
    return assembly.finish()


def _resnet(modules: Modules) -> Symmetry:
    """A stem, residual blocks in numbered stages, and a linear head, under any prefix."""
    stems = [module for module in modules if module.rpartition(".")[2] == "conv1"]
    prefix = min(stems, key=len, default="").removesuffix("conv1")
    blocks: dict[tuple[int, int], set[str]] = {}
    for module in modules:
        part = re.fullmatch(r"layer(\d+)\.(\d+)\.(.+)", module.removeprefix(prefix))
        if part:
            blocks.setdefault((int(part[1]), int(part[2])), set()).add(part[3])
    head = next((name for name in ("fc", "linear") if prefix + name in modules), None)
    if not blocks or head is None:
        raise _NotThisFamily
    assembly = _Assembly(modules)
    stream = assembly.layer(f"{prefix}conv1", None, f"{prefix}conv1")
    assembly.norm(f"{prefix}bn1", stream)
    for stage, block in sorted(blocks):
        stream = _residual_block(assembly, f"{prefix}layer{stage}.{block}", blocks[stage, block], stream)
    assembly.layer(prefix + head, stream, None)
    return assembly.finish()


def _residual_block(assembly: _Assembly, block: str, parts: set[str], stream: _Stream) -> _Stream:
    """Two or three convolutions whose sum with the shortcut shares one permutation; the stream after the block."""
    shortcut = next((name for name in ("downsample", "shortcut") if f"{name}.0" in parts), None)
    result = stream
    if shortcut is not None:
        result = assembly.layer(f"{block}.{shortcut}.0", stream, f"{block}.{shortcut}")
        assembly.norm(f"{block}.{shortcut}.1", result)
    depth = 3 if "conv3" in parts else 2
    inner = stream
    for place in range(1, depth + 1):
        name = result.name if place == depth else f"{block}.conv{place}"
        inner = assembly.layer(f"{block}.conv{place}", inner, name)
        assembly.norm(f"{block}.bn{place}", inner)
    if inner.size != result.size:  # a shortcut that pads channels with zeros ties them to their places
        raise _NotThisFamily
    return result
