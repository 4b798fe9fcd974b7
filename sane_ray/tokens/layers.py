"""The table of layers: which tensors of an architecture become tokens, in what order, and where each value stands.

It knows names, shapes and sizes, never values; ``sane_ray.tokens.tokenizer`` makes it and moves the values. It never
imports Ray.

Shape suffixes: N tokens of a checkpoint, T token size, C channels of a layer.
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
from numpy.typing import NDArray

from sane_ray.errors import InputError

Kind = Literal[
    "conv",
    "conv_transpose",
    "linear",
    "embedding",
    "attention",
    "recurrent",
    "norm",
    "running_mean",
    "running_var",
    "weight_norm",
    "position",
    "bias",
    "other",
]
Layout = Literal["sparse", "dense", "mixed"]

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
        shape: Its shape; the first axis is the channels, and a tensor without axes is one channel of one value.
        kind: What the tensor is; see ``sane_ray.tokens.kinds``.
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
    def widest_channel(self) -> int:
        """Width of the widest row, bias included: the token size with which each channel is one token.

        Position tables and what has no channels (experts stacked in one tensor, and the rest) count only where there
        is nothing else: their rows can be whole matrices.
        """
        rows = [layer.width for layer in self.layers if _has_channels(layer)]
        return max(rows or [layer.width for layer in self.layers])

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
        layers = tuple(lay_out(layer, token_size, self.layout) for layer in self.layers)
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
        return cls(token_size=data["token_size"], layers=layers, untokenized=others, layout=data["layout"])


def lay_out(layer: Layer, token_size: int, layout: Layout) -> Layer:
    """The layer with its number of tokens, dense where the layout wants it."""
    sparse = layer.channels * math.ceil(layer.width / token_size)
    values = layer.channels * layer.width
    dense = layout == "dense" or (layout == "mixed" and values < (1 - _MIXED_PADDING) * sparse * token_size)
    return dataclasses.replace(layer, num_tokens=math.ceil(values / token_size) if dense else sparse, dense=dense)


def _has_channels(layer: Layer) -> bool:
    return layer.kind not in ("position", "bias", "other") and not (layer.kind == "linear" and len(layer.shape) > 2)
