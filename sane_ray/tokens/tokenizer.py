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
from collections.abc import Iterator, Mapping
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


@dataclass(frozen=True)
class Layer:
    """One tokenised tensor, with its bias.

    Attributes:
        key: Name of the tensor in the state dict.
        shape: Its shape; the first axis is the channels.
        kind: ``conv`` (3 or more axes), ``linear`` (2), ``norm`` (weight of a batch norm), ``running_mean``,
            ``running_var``, or ``other`` (1 axis and no running statistics beside it, such as a layer norm).
        bias_key: Name of the bias that is the last column of each row, or None.
        channels: Rows, C.
        width: Signal values of a row, the bias included.
        tokens_per_channel: Tokens of a row.
    """

    key: str
    shape: tuple[int, ...]
    kind: Kind
    bias_key: str | None
    channels: int
    width: int
    tokens_per_channel: int

    @property
    def fan_in(self) -> int:
        """Values of a row without the bias."""
        return self.width - (self.bias_key is not None)

    @property
    def num_tokens(self) -> int:
        """Tokens of the layer."""
        return self.channels * self.tokens_per_channel


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
    """

    token_size: int
    layers: tuple[Layer, ...]
    untokenized: tuple[Untokenized, ...]

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
        counts = []
        for layer in self.layers:
            starts = np.arange(layer.tokens_per_channel) * self.token_size
            counts.append(np.tile(np.clip(layer.width - starts, 0, self.token_size), layer.channels))
        return np.concatenate(counts).astype(np.int32)

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """Token index, layer and channel of each token, [N, 3]; all tokens of a channel repeat its index."""
        channels = [np.repeat(np.arange(layer.channels), layer.tokens_per_channel) for layer in self.layers]
        columns = (np.arange(self.num_tokens), self.layer_of_token, np.concatenate(channels))
        return np.stack(columns, axis=1).astype(np.int32)

    @cached_property
    def layer_of_token(self) -> NDArray[np.int32]:
        """Layer of each token, [N]."""
        return np.repeat(np.arange(len(self.layers), dtype=np.int32), np.diff(self.layer_starts))

    @cached_property
    def position_sizes(self) -> tuple[int, int, int]:
        """Rows that the three position tables (token index, layer, channel) need."""
        return self.num_tokens, len(self.layers), max(layer.channels for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the architecture: keys, shapes, kinds, biases and their order, whatever the token size."""
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
    state_dict: Mapping[str, Tensor], *, token_size: int = 0, batch_norm: BatchNorm = "keep"
) -> LayerTable:
    """Reads off a state dict how checkpoints of its architecture become tokens; only shapes and dtypes are looked at.

    Tokenised are floating-point tensors whose last name is ``weight``, with ``bias`` of the same module if it has one
    value a channel, and ``running_mean`` / ``running_var`` where a module has both. Such a module is a batch norm.

    Args:
        state_dict: Any checkpoint of the architecture, in the order the tokens shall have.
        token_size: Values of a token; 0 takes ``discover_token_size``.
        batch_norm: ``ignore`` leaves out the weights, biases and running statistics of batch norms.

    Raises:
        InputError: A negative token size, or nothing in the state dict can become tokens.
    """
    if token_size < 0:
        raise InputError(f"token_size is {token_size}: it must be positive, or 0 to take the widest channel")
    found = _tokenizable(state_dict, batch_norm)
    size = token_size or max(width for _, _, _, width in found)
    layers = tuple(
        Layer(key, shape := tuple(state_dict[key].shape), kind, bias_key, shape[0], width, math.ceil(width / size))
        for key, kind, bias_key, width in found
    )
    taken = {layer.key for layer in layers} | {layer.bias_key for layer in layers}
    untokenized = tuple(
        Untokenized(key, tuple(getattr(value, "shape", ())), _reason(state_dict, key, batch_norm))
        for key, value in state_dict.items()
        if key not in taken
    )
    return LayerTable(size, layers, untokenized)


@torch.no_grad()
def tokenize(state_dict: Mapping[str, Tensor], table: LayerTable) -> Tensor:
    """The tokens of a checkpoint.

    Args:
        state_dict: Weights of any floating-point dtype and memory layout; float64 is rounded to float32.
        table: Layers of the architecture. Entries it lists as untokenised may be missing.

    Returns:
        float32 [N, T] on the device of the first layer, zero where there is padding.

    Raises:
        InputError: A key is missing, unknown, of another shape, or not floating point.
    """
    _check_fits(state_dict, table)
    device = state_dict[table.layers[0].key].device
    tokens_NT = torch.zeros(table.num_tokens, table.token_size, device=device)
    for layer, rows_CR in _rows(tokens_NT, table):
        rows_CR[:, : layer.fan_in] = state_dict[layer.key].reshape(layer.channels, -1)
        if layer.bias_key is not None:
            rows_CR[:, layer.fan_in] = state_dict[layer.bias_key]
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
    for layer, rows_CR in _rows(tokens_NT, table):
        weights[layer.key] = rows_CR[:, : layer.fan_in].clone(memory_format=torch.contiguous_format).view(layer.shape)
        if layer.bias_key is not None:
            weights[layer.bias_key] = rows_CR[:, layer.fan_in].clone(memory_format=torch.contiguous_format)
    if reference is None:
        return weights
    _check_fits(reference, table)
    return {key: weights[key].to(value.dtype) if key in weights else _copy(value) for key, value in reference.items()}


def _rows(tokens_NT: Tensor, table: LayerTable) -> Iterator[tuple[Layer, Tensor]]:
    """Each layer with its tokens as padded rows [C, R], a view."""
    parts = tokens_NT.split([layer.num_tokens for layer in table.layers])
    for layer, part in zip(table.layers, parts, strict=True):
        yield layer, part.reshape(layer.channels, -1)


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
