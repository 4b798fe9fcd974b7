"""Turns a state dict into a sequence of tokens and back, by an explicit table of layers.

A layer's weight is read as one row a channel, ``[w | b]`` with the bias as its last column; a row is padded with zeros
to a multiple of the token size and cut into tokens (SANE, arXiv 2406.09997, section 3.1). What cannot become tokens is
listed in the table with the reason. This module never reads a file, never normalises, and never imports Ray.

Shape suffixes: N tokens of a checkpoint, T token size, C channels of a layer, R = tokens a channel x T (padded row).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError

Kind = Literal["conv", "linear", "norm", "running_mean", "running_var", "other"]
BatchNorm = Literal["keep", "ignore"]
Layout = Literal["sparse", "dense", "mixed"]
Parameters = Literal["all", "weights"]
Read = Callable[[str, int, int], Tensor]

_CACHED_TOKENS = 1 << 18  # positions of larger models are computed for the range that is asked for
_MIXED_PADDING = 0.25


@dataclass(frozen=True)
class Layer:
    """One tokenised tensor, with its bias.

    The row space of a layer is its rows ``[w | b]`` one after the other: each padded to whole tokens where the layer is
    sparse, without gaps where it is dense. Token t of the layer is values ``t * T`` to ``(t + 1) * T`` of that space;
    only behind its last row can a dense layer have padding.

    Attributes:
        key: Name of the tensor in the state dict.
        shape: Its shape; the first axis is the channels.
        kind: What the tensor is, by its name, shape and neighbours.
        bias_key: Name of the bias that is the last column of each row, or None.
        channels: Rows, C.
        width: Signal values of a row, the bias included.
        num_tokens: Tokens of the layer.
        dense: Whether rows follow each other without padding.
    """

    key: str
    shape: tuple[int, ...]
    kind: Kind
    bias_key: str | None
    channels: int
    width: int
    num_tokens: int
    dense: bool = False

    @property
    def fan_in(self) -> int:
        """Values of a row without the bias."""
        return self.width - (self.bias_key is not None)

    @property
    def tokens_per_channel(self) -> int:
        """Tokens of a row of a sparse layer; 0 for a dense layer, whose rows share tokens."""
        return 0 if self.dense else self.num_tokens // self.channels

    def stride(self, token_size: int) -> int:
        """Values from the start of a row to the start of the next in the row space."""
        return self.width if self.dense else self.tokens_per_channel * token_size


@dataclass(frozen=True)
class Untokenized:
    """An entry of the state dict that does not become tokens, and why."""

    key: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class LayerTable:
    """How the state dicts of one architecture become tokens, in the order of the state dict.

    Attributes:
        token_size: Values of a token, T.
        layers: Tokenised tensors; a layer's index is its second position.
        untokenized: Everything else the state dict holds.
        layout: How it was decided which layers are dense; see ``build_layer_table``.
    """

    token_size: int
    layers: tuple[Layer, ...]
    untokenized: tuple[Untokenized, ...]
    layout: Layout = "sparse"

    @cached_property
    def layer_starts(self) -> NDArray[np.int64]:
        """First token of each layer, and at the end the number of tokens, [layers + 1]."""
        return np.cumsum([0, *(layer.num_tokens for layer in self.layers)], dtype=np.int64)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of a checkpoint, N."""
        return int(self.layer_starts[-1])

    @cached_property
    def parameters(self) -> int:
        """Tokenised values, padding not counted."""
        return sum(layer.channels * layer.width for layer in self.layers)

    @cached_property
    def signal_counts(self) -> NDArray[np.int32]:
        """Real weights of each token, [N]; the rest of the token is padding."""
        return self._signal(0, self.num_tokens)

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """Token index, layer and channel of each token, [N, 3]; the channel is that of the token's first value."""
        return self._positions(0, self.num_tokens)

    @cached_property
    def layer_of_token(self) -> NDArray[np.int32]:
        """Layer of each token, [N]."""
        return self._layers(0, self.num_tokens)

    def signal_of(self, start: int, stop: int) -> NDArray[np.int32]:
        """``signal_counts`` of a range of tokens, [stop - start]. Do not write to the result.

        Raises:
            InputError: The model has no such range.
        """
        self._check_range(start, stop)
        return self.signal_counts[start:stop] if self._is_small else self._signal(start, stop)

    def positions_of(self, start: int, stop: int) -> NDArray[np.int32]:
        """``positions`` of a range of tokens, [stop - start, 3]. Do not write to the result.

        Raises:
            InputError: The model has no such range.
        """
        self._check_range(start, stop)
        return self.positions[start:stop] if self._is_small else self._positions(start, stop)

    def layers_of(self, start: int, stop: int) -> NDArray[np.int32]:
        """``layer_of_token`` of a range of tokens, [stop - start]. Do not write to the result.

        Raises:
            InputError: The model has no such range.
        """
        self._check_range(start, stop)
        return self.layer_of_token[start:stop] if self._is_small else self._layers(start, stop)

    def slices(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The layers that a range of tokens meets: layer, and the first and last + 1 of its own tokens in the range.

        Raises:
            InputError: The model has no such range.
        """
        self._check_range(start, stop)
        index = int(np.searchsorted(self.layer_starts, start, side="right")) - 1
        while start < stop:
            first, end = self.layer_starts[index : index + 2].tolist()
            yield index, start - first, min(stop, end) - first
            start, index = end, index + 1

    @cached_property
    def position_sizes(self) -> tuple[int, int, int]:
        """Rows that the three position tables (token index, layer, channel) need."""
        size = self.token_size
        channels = ((layer.num_tokens - 1) * size // layer.stride(size) + 1 for layer in self.layers)
        return self.num_tokens, len(self.layers), max(channels)

    def resized(self, token_size: int) -> LayerTable:
        """The same layers in tokens of another size; what is dense in a ``mixed`` layout is decided anew."""
        layers = tuple(_laid_out(layer, token_size, self.layout) for layer in self.layers)
        return dataclasses.replace(self, token_size=token_size, layers=layers)

    @property
    def _is_small(self) -> bool:
        return self.num_tokens <= _CACHED_TOKENS

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise InputError(f"tokens {start} to {stop} do not lie in a model of {self.num_tokens} tokens")

    @cached_property
    def _geometry(self) -> NDArray[np.int64]:
        """Of each layer: stride of its rows, length of a run without padding, stride of such runs, [3, layers]."""
        rows = []
        for layer in self.layers:
            stride = layer.stride(self.token_size)
            runs = (layer.channels * layer.width, layer.num_tokens * self.token_size)
            rows.append((stride, *(runs if layer.dense else (layer.width, stride))))
        return np.array(rows, dtype=np.int64).T

    def _layers(self, start: int, stop: int) -> NDArray[np.int32]:
        counts = np.diff(self.layer_starts.clip(start, stop))
        return np.repeat(np.arange(len(self.layers), dtype=np.int32), counts)

    def _offsets(self, start: int, stop: int, layers: NDArray[np.int32]) -> NDArray[np.int64]:
        """Where each token begins in the row space of its layer."""
        return (np.arange(start, stop) - self.layer_starts[layers]) * self.token_size

    def _signal(self, start: int, stop: int) -> NDArray[np.int32]:
        layers = self._layers(start, stop)
        _, lengths, strides = self._geometry[:, layers]
        within = self._offsets(start, stop, layers) % strides
        return (lengths - within).clip(0, self.token_size).astype(np.int32)

    def _positions(self, start: int, stop: int) -> NDArray[np.int32]:
        layers = self._layers(start, stop)
        channels = self._offsets(start, stop, layers) // self._geometry[0, layers]
        return np.stack((np.arange(start, stop), layers, channels), axis=1).astype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the architecture: keys, shapes, kinds, biases and their order, whatever the tokens."""
        layers = [(layer.key, layer.shape, layer.kind, layer.bias_key) for layer in self.layers]
        others = [(entry.key, entry.shape) for entry in self.untokenized]
        return hashlib.sha256(json.dumps([layers, others]).encode()).hexdigest()[:16]

    @cached_property
    def _keys(self) -> frozenset[str]:
        biases = {layer.bias_key for layer in self.layers if layer.bias_key is not None}
        return frozenset({layer.key for layer in self.layers} | biases | {entry.key for entry in self.untokenized})

    def __hash__(self) -> int:
        return hash((self.token_size, self.fingerprint))

    def __getstate__(self) -> dict[str, Any]:
        # Cached arrays are cheap to rebuild and would multiply what travels between processes.
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerTable:
        """The table that ``to_dict`` described, also after a trip through JSON."""
        layers = tuple(Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in data["layers"])
        others = tuple(Untokenized(**{**entry, "shape": tuple(entry["shape"])}) for entry in data["untokenized"])
        return cls(token_size=data["token_size"], layers=layers, untokenized=others)


def discover_token_size(state_dict: Mapping[str, Tensor], batch_norm: BatchNorm = "keep") -> int:
    """The width of the widest channel, bias included, so that each channel is one token.

    The published code looks only at layers with a bias (513 instead of 4608 for a ResNet-18); this looks at all.

    Raises:
        InputError: Nothing in the state dict can become tokens.
    """
    return max(width for _, _, _, width in _tokenizable(state_dict, batch_norm))


def build_layer_table(
    state_dict: Mapping[str, Tensor],
    *,
    token_size: int = 0,
    batch_norm: BatchNorm = "keep",
    layout: Layout = "sparse",
    parameters: Parameters = "all",
) -> LayerTable:
    """Reads off a state dict how checkpoints of its architecture become tokens; only shapes and dtypes are looked at.

    Tokenised are floating-point tensors whose last name is ``weight``, with ``bias`` of the same module if it has one
    value a channel, and ``running_mean`` / ``running_var`` where a module has both. Such a module is a batch norm.

    Args:
        state_dict: Any checkpoint of the architecture, in the order the tokens shall have.
        token_size: Values of a token; 0 takes ``discover_token_size``.
        batch_norm: ``ignore`` leaves out the weights, biases and running statistics of batch norms.
        layout: ``sparse`` pads each row to whole tokens, as published; ``dense`` only the end of a layer; ``mixed`` is
            dense for a layer whose sparse tokens would be more than a quarter padding, and sparse for the others.
        parameters: ``all`` tokenises every floating-point tensor, ``weights`` those that the published code does.

    Raises:
        InputError: A negative token size, or nothing in the state dict can become tokens.
    """
    if token_size < 0:
        raise InputError(f"token_size is {token_size}: it must be positive, or 0 to take the widest channel")
    found = _tokenizable(state_dict, batch_norm)
    size = token_size or max(width for _, _, _, width in found)
    shapes = {key: tuple(state_dict[key].shape) for key, *_ in found}
    rows = (Layer(key, shapes[key], kind, bias, shapes[key][0], width, 0) for key, kind, bias, width in found)
    layers = tuple(_laid_out(layer, size, layout) for layer in rows)
    taken = {layer.key for layer in layers} | {layer.bias_key for layer in layers}
    untokenized = tuple(
        Untokenized(key, tuple(getattr(value, "shape", ())), _reason(state_dict, key, batch_norm))
        for key, value in state_dict.items()
        if key not in taken
    )
    return LayerTable(size, layers, untokenized, layout)


def _laid_out(layer: Layer, token_size: int, layout: Layout) -> Layer:
    """The layer with its number of tokens, dense where the layout wants it."""
    sparse = layer.channels * math.ceil(layer.width / token_size)
    values = layer.channels * layer.width
    dense = layout == "dense" or (layout == "mixed" and values < (1 - _MIXED_PADDING) * sparse * token_size)
    return dataclasses.replace(layer, num_tokens=math.ceil(values / token_size) if dense else sparse, dense=dense)


@torch.no_grad()
def tokenize(state_dict: Mapping[str, Tensor], table: LayerTable, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tokens of a checkpoint.

    Args:
        state_dict: Weights of any floating-point dtype and memory layout.
        table: Layers of the architecture. Entries it lists as untokenised may be missing.
        dtype: Of the tokens. float32 holds every narrower dtype exactly and rounds float64.

    Returns:
        [N, T] on the device of the first layer, zero where there is padding.

    Raises:
        InputError: A key is missing, unknown, of another shape, or not floating point.
    """
    _check_fits(state_dict, table)
    device = state_dict[table.layers[0].key].device
    tokens_NT = torch.empty(table.num_tokens, table.token_size, dtype=dtype, device=device)

    def read(key: str, start: int, stop: int) -> Tensor:
        return state_dict[key].reshape(-1)[start:stop]

    _fill(tokens_NT, read, table, 0)
    return tokens_NT


@torch.no_grad()
def tokenize_range(read: Read, table: LayerTable, start: int, stop: int) -> Tensor:
    """Some tokens of a checkpoint, without reading the rest of it.

    Args:
        read: Gives values ``start`` to ``stop`` of a tensor, flat in row-major order: ``Checkpoint.read``. It is asked
            for no more values at once than the range holds.
        table: Layers of the architecture.
        start: First token of the range.
        stop: End of the range.

    Returns:
        float32 [stop - start, T], the same as that slice of ``tokenize``.

    Raises:
        InputError: The model has no such range, or a tensor is not what the table says.
    """
    tokens_NT = torch.empty(stop - start if stop > start else 0, table.token_size)
    _fill(tokens_NT, read, table, start, stop)
    return tokens_NT


def detokenize(
    tokens_NT: Tensor, table: LayerTable, reference: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict of a token sequence: the exact inverse of ``tokenize``, differentiable in the tokens.

    Args:
        tokens_NT: Tokens [N, T]; what stands in the padding is ignored.
        table: Layers of the architecture.
        reference: A checkpoint of the same architecture that gives the order of the keys, the dtypes, and copies of
            everything that is not tokenised. Without it those keys are left out and the dtype is that of the tokens.

    Returns:
        Tensors that share no memory with the tokens or the reference.

    Raises:
        InputError: The tokens or the reference do not fit the table.
    """
    if tuple(tokens_NT.shape) != (table.num_tokens, table.token_size):
        raise InputError(
            f"tokens have shape {tuple(tokens_NT.shape)}, but the architecture has {table.num_tokens} tokens of size "
            f"{table.token_size}: use the layer table they were made with"
        )
    weights: dict[str, Tensor] = {}
    parts = tokens_NT.split([layer.num_tokens for layer in table.layers])
    for layer, part in zip(table.layers, parts, strict=True):
        stride = layer.stride(table.token_size)
        rows_CS = part.reshape(-1)[: layer.channels * stride].view(layer.channels, stride)
        weights[layer.key] = rows_CS[:, : layer.fan_in].clone(memory_format=torch.contiguous_format).view(layer.shape)
        if layer.bias_key is not None:
            weights[layer.bias_key] = rows_CS[:, layer.fan_in].clone(memory_format=torch.contiguous_format)
    if reference is None:
        return weights
    _check_fits(reference, table)
    return {key: weights[key].to(value.dtype) if key in weights else _copy(value) for key, value in reference.items()}


def _fill(tokens_NT: Tensor, read: Read, table: LayerTable, start: int, stop: int | None = None) -> None:
    """Writes a range of tokens of a checkpoint, padding included."""
    stop = table.num_tokens if stop is None else stop
    done = 0
    for index, first, end in table.slices(start, stop):
        layer, part = table.layers[index], tokens_NT[done : done + end - first].view(-1)
        _fill_layer(part, read, layer, layer.stride(table.token_size), first * table.token_size)
        done += end - first


def _fill_layer(out: Tensor, read: Read, layer: Layer, stride: int, offset: int) -> None:
    """Writes ``len(out)`` values of a layer's row space from ``offset``: a partial row, whole rows, a partial row."""
    if stride == layer.fan_in:  # rows without bias and padding: one run of values
        count = min(len(out), layer.channels * stride - offset)
        out[:count] = _values(read, layer.key, offset, offset + count)
        out[count:] = 0
        return
    row, column = divmod(offset, stride)
    if column:
        count = min(stride - column, len(out))
        _fill_row(out[:count], read, layer, row, column)
        out, row = out[count:], row + 1
    rows = min(len(out) // stride, layer.channels - row)
    if rows > 0:
        rows_CS = out[: rows * stride].view(rows, stride)
        weights = _values(read, layer.key, row * layer.fan_in, (row + rows) * layer.fan_in)
        rows_CS[:, : layer.fan_in] = weights.view(rows, -1)
        if layer.bias_key is not None:
            rows_CS[:, layer.fan_in] = _values(read, layer.bias_key, row, row + rows)
        rows_CS[:, layer.width :] = 0
        out, row = out[rows * stride :], row + rows
    if row < layer.channels:
        _fill_row(out, read, layer, row, 0)
    else:
        out.zero_()  # behind the last row of a dense layer


def _fill_row(out: Tensor, read: Read, layer: Layer, row: int, column: int) -> None:
    """Writes ``len(out)`` values of one row of a layer from ``column``."""
    count = max(min(len(out), layer.fan_in - column), 0)
    if count:
        start = row * layer.fan_in + column
        out[:count] = _values(read, layer.key, start, start + count)
    if layer.bias_key is not None and column <= layer.fan_in < column + len(out):
        out[count : count + 1] = _values(read, layer.bias_key, row, row + 1)
        count += 1
    out[count:] = 0


def _values(read: Read, key: str, start: int, stop: int) -> Tensor:
    values = read(key, start, stop)
    if values.numel() != stop - start:
        raise InputError(
            f"{key} gave {values.numel()} of its values {start} to {stop}: the checkpoint is shorter than its "
            "header says, so copy it again"
        )
    return values


def _check_fits(state_dict: Mapping[str, Tensor], table: LayerTable) -> None:
    """Raises ``InputError`` naming the first key that does not fit."""
    for layer in table.layers:
        _check_tensor(state_dict, layer.key, layer.shape)
        if layer.bias_key is not None:
            _check_tensor(state_dict, layer.bias_key, layer.shape[:1])
    if not state_dict.keys() <= table._keys:
        unknown = next(key for key in state_dict if key not in table._keys)
        raise InputError(f"state dict has {unknown}, which the layer table does not name: use its own table")


def _check_tensor(state_dict: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> None:
    tensor = state_dict.get(key)
    if tensor is None:
        raise InputError(f"state dict lacks {key}, which the layer table names: use its own table")
    if tensor.shape != shape:
        raise InputError(f"{key} has shape {tuple(tensor.shape)}, but the layer table says {shape}: use its own table")
    if not tensor.is_floating_point():
        raise InputError(f"{key} is {tensor.dtype}: only floating-point weights become tokens, so dequantise it first")


def _tokenizable(state_dict: Mapping[str, Tensor], batch_norm: BatchNorm) -> list[tuple[str, Kind, str | None, int]]:
    """Key, kind, bias key and width of every tensor that becomes tokens, in the order of the state dict."""
    found: list[tuple[str, Kind, str | None, int]] = []
    for key in state_dict:
        kind = _kind(state_dict, key)
        if kind is None or (batch_norm == "ignore" and kind in ("norm", "running_mean", "running_var")):
            continue
        shape = state_dict[key].shape
        bias_key = _bias_of(state_dict, key) if kind not in ("running_mean", "running_var") else None
        found.append((key, kind, bias_key, math.prod(shape[1:]) + (bias_key is not None)))
    if not found:
        raise InputError(
            f"none of the {len(state_dict)} entries of the state dict can become tokens: it needs floating-point "
            f"tensors named weight; found {', '.join(list(state_dict)[:5]) or 'nothing'}"
        )
    return found


def _kind(state_dict: Mapping[str, Tensor], key: str) -> Kind | None:
    """What a tensor is, by its name, its shape and its siblings; None if it does not become tokens by itself."""
    tensor, name = state_dict[key], key.rpartition(".")[2]
    if _unusable(tensor) is not None:
        return None
    if name in ("running_mean", "running_var"):
        return name if _is_batch_norm(state_dict, key) else None  # type: ignore[return-value]
    if name != "weight":
        return None
    if tensor.dim() == 1:
        return "norm" if _is_batch_norm(state_dict, key) else "other"
    return "linear" if tensor.dim() == 2 else "conv"


def _is_batch_norm(state_dict: Mapping[str, Tensor], key: str) -> bool:
    """Whether the module of ``key`` keeps both running statistics, of the shape that the tensor has."""
    shape = state_dict[key].shape
    statistics = (state_dict.get(_sibling(key, name)) for name in ("running_mean", "running_var"))
    return all(_unusable(value) is None and value.shape == shape for value in statistics)  # type: ignore[union-attr]


def _bias_of(state_dict: Mapping[str, Tensor], key: str) -> str | None:
    """The bias beside a weight, if it has one value a channel."""
    bias_key = _sibling(key, "bias")
    bias = state_dict.get(bias_key)
    fits = _unusable(bias) is None and bias.shape == state_dict[key].shape[:1]  # type: ignore[union-attr]
    return bias_key if fits else None


def _unusable(value: object) -> str | None:
    """Why a value can never become tokens, or None if it can."""
    if not isinstance(value, Tensor):
        return "not a tensor"
    if not value.is_floating_point():
        return f"{value.dtype} is not floating point"
    if value.layout != torch.strided:
        return f"{value.layout} is not dense"
    if value.dim() == 0:
        return "a scalar has no channels"
    return "holds no values" if value.numel() == 0 else None


def _reason(state_dict: Mapping[str, Tensor], key: str, batch_norm: BatchNorm) -> str:
    """Why an entry that did not become tokens did not."""
    name = key.rpartition(".")[2]
    unusable = _unusable(state_dict[key])
    if unusable is not None:
        return unusable
    if batch_norm == "ignore" and _is_batch_norm(state_dict, key):
        return "batch norm is ignored"
    if name in ("running_mean", "running_var"):
        return "running statistic without the other one of the same shape beside it"
    if name == "bias":
        weight = state_dict.get(_sibling(key, "weight"))
        if _unusable(weight) is not None:
            return "bias without a tokenised weight beside it"
        return f"bias does not have one value for each channel of its weight {tuple(weight.shape)}"  # type: ignore[union-attr]
    return f"named {name}, not weight, bias or running statistic"


def _sibling(key: str, name: str) -> str:
    """Another entry of the same module."""
    module, dot, _ = key.rpartition(".")
    return f"{module}{dot}{name}"


def _copy(value: Tensor) -> Tensor:
    return value.clone() if isinstance(value, Tensor) else value
