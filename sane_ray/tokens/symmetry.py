"""Permutation symmetries: which axes of a network's weights may be reordered together without changing its function.

Reordering the channels of a hidden layer, and with them its bias, its batch norm and the inputs of the next layer,
gives other weights and the same function (SANE, arXiv 2406.09997, section 3.3). A permuted model is one gather over its
flattened tokens, so views are made on the fly and never stored. This module knows networks by the keys and shapes of a
layer table alone; what it does not recognise gets the trivial symmetry. It never imports Ray.

Shape suffixes: N tokens of a checkpoint, T token size, C channels of a layer, R = tokens a channel x T (padded row).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import Layer, LayerTable

Indices = NDArray[np.int64]
Modules = dict[str, dict[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Symmetry:
    """Named permutations, and the tensor axes that each of them reorders.

    Attributes:
        axes: For each tensor that takes part, the permutation of each of its axes, or None for a fixed axis. An axis
            longer than its permutation is reordered in blocks (the inputs of a linear layer after a flattened
            convolution).
        sizes: Length of each permutation.
    """

    axes: dict[str, tuple[str | None, ...]]
    sizes: dict[str, int]

    @property
    def is_trivial(self) -> bool:
        """Whether there is nothing to permute."""
        return not self.sizes

    def to_dict(self) -> dict[str, Any]:
        """The symmetry as JSON-able values."""
        return {"axes": {key: list(names) for key, names in self.axes.items()}, "sizes": dict(self.sizes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Symmetry:
        """The symmetry that ``to_dict`` described, also after a trip through JSON."""
        return cls({key: tuple(names) for key, names in data["axes"].items()}, dict(data["sizes"]))


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


def random_permutations(symmetry: Symmetry, rng: np.random.Generator) -> dict[str, Indices]:
    """Independent, uniformly drawn permutations, one for each name."""
    return {name: rng.permutation(symmetry.sizes[name]) for name in sorted(symmetry.sizes)}


def permute(
    state_dict: Mapping[str, Tensor], symmetry: Symmetry, permutations: Mapping[str, Indices]
) -> dict[str, Tensor]:
    """The same function with other weights: channel c becomes what channel ``permutation[c]`` was.

    Args:
        state_dict: Weights of the architecture, tokenised or not.
        symmetry: Which axes to reorder.
        permutations: A permutation for each name of the symmetry.

    Returns:
        The same keys in the same order. Tensors that the symmetry does not name are passed through, not copied.

    Raises:
        InputError: A permutation is missing or of the wrong length, or a tensor does not fit the symmetry.
    """
    _check_permutations(symmetry, permutations)
    return {key: _permute_tensor(key, value, symmetry, permutations) for key, value in state_dict.items()}


def gather_indices(
    table: LayerTable,
    symmetry: Symmetry,
    permutations: Mapping[str, Indices],
    start: int = 0,
    stop: int | None = None,
) -> Indices:
    """Where each value of a permuted model's tokens stands in the tokens of the model.

    ``tokens.reshape(-1)[gather_indices(...)].reshape(N, T)`` equals ``tokenize(permute(state_dict, ...), table)``.
    Padding is read from padding.

    Args:
        table: Layers of the architecture.
        symmetry: Its symmetry.
        permutations: A permutation for each name of the symmetry.
        start: First token of the window that is wanted.
        stop: End of that window; None for the last token. Only the window's indices are computed.

    Returns:
        int64 [(stop - start) * T], indices into all N * T values of the model.

    Raises:
        InputError: Permutations, symmetry, table and window do not fit.
    """
    _check_permutations(symmetry, permutations)
    stop = table.num_tokens if stop is None else stop
    if not 0 <= start <= stop <= table.num_tokens:
        raise InputError(f"window of tokens {start} to {stop} does not lie in a model of {table.num_tokens} tokens")
    indices = np.empty((stop - start, table.token_size), dtype=np.int64)
    first = int(np.searchsorted(table.layer_starts, start, side="right")) - 1
    for layer, layer_start in zip(table.layers[first:], table.layer_starts[first:-1].tolist(), strict=True):
        if layer_start >= stop:
            break
        low, high = max(start - layer_start, 0), min(stop - layer_start, layer.num_tokens)
        channel, skipped = divmod(low, layer.tokens_per_channel)
        channels = slice(channel, math.ceil(high / layer.tokens_per_channel))
        rows_CR = _layer_indices(layer, table.token_size, channels, symmetry, permutations)
        tokens = rows_CR.reshape(-1, table.token_size)[skipped : skipped + high - low]
        np.add(tokens, layer_start * table.token_size, out=indices[layer_start + low - start :][: high - low])
    return indices.reshape(-1)


def _layer_indices(
    layer: Layer, token_size: int, channels: slice, symmetry: Symmetry, permutations: Mapping[str, Indices]
) -> Indices:
    """Sources of some channels of a layer within that layer's padded rows, [channels, R]."""
    names = _layer_axes(layer, symmetry)
    row = layer.tokens_per_channel * token_size
    columns_R = np.arange(row)
    if any(names[1:]):
        inputs = columns_R[: layer.fan_in].reshape(layer.shape[1:])
        for axis, name in enumerate(names[1:]):
            if name is not None:
                inputs = inputs.take(_order(layer.key, permutations[name], inputs.shape[axis]), axis=axis)
        columns_R[: layer.fan_in] = inputs.reshape(-1)
    if names[0] is None:
        sources_C = np.arange(channels.start, channels.stop)
    else:
        sources_C = _order(layer.key, permutations[names[0]], layer.channels)[channels]
    return (sources_C * row)[:, None] + columns_R


def _layer_axes(layer: Layer, symmetry: Symmetry) -> tuple[str | None, ...]:
    """The permutations of a layer's axes; its bias must follow its channels, or a row could not be moved whole."""
    fixed = (None,) * len(layer.shape)
    names = symmetry.axes.get(layer.key, fixed)
    if len(names) != len(layer.shape):
        raise InputError(f"symmetry names {len(names)} axes of {layer.key}, which has {len(layer.shape)}")
    if layer.bias_key is not None and symmetry.axes.get(layer.bias_key, fixed)[0] != names[0]:
        raise InputError(f"symmetry moves {layer.key} and {layer.bias_key} by different permutations")
    return names


def _permute_tensor(key: str, tensor: Tensor, symmetry: Symmetry, permutations: Mapping[str, Indices]) -> Tensor:
    names = symmetry.axes.get(key, ())
    if names and len(names) != tensor.dim():
        raise InputError(f"symmetry names {len(names)} axes of {key}, which has {tensor.dim()}")
    for axis, name in enumerate(names):
        if name is not None:
            order = torch.from_numpy(_order(key, permutations[name], tensor.shape[axis]))
            tensor = tensor.index_select(axis, order.to(tensor.device))
    return tensor


def _order(key: str, permutation: Indices, size: int) -> Indices:
    """A permutation of blocks as a permutation of an axis of ``size`` entries."""
    block, rest = divmod(size, len(permutation))
    if rest or not block:
        raise InputError(f"{key} has an axis of {size}, which a permutation of {len(permutation)} cannot reorder")
    if block == 1:
        return permutation
    return (permutation[:, None] * block + np.arange(block)).reshape(-1)


def _check_permutations(symmetry: Symmetry, permutations: Mapping[str, Indices]) -> None:
    for name, size in symmetry.sizes.items():
        if name not in permutations or len(permutations[name]) != size:
            found = f"has {len(permutations[name])} entries" if name in permutations else "is missing"
            raise InputError(f"permutation {name} {found}, but the symmetry needs {size}")


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
    axes: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
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

    def _name(self, key: str, names: tuple[str | None, ...]) -> None:
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
