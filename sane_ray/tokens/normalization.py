"""Per-layer normalisation of tokens, invertible in every mode, with statistics from one streaming pass.

``standardize`` and ``minmax`` follow the published code but for one quirk: it concatenates a batch norm's running
statistics with themselves and normalises them twice; here they are layers like any other, normalised once. ``l2``,
which the published code cannot undo, keeps each model's norms. A model need not fit into memory: tensors can be read in
slices (``Moments``) and tokens in ranges. This module never chooses the split that the statistics come from, never
touches padding (it stays exactly zero), and never imports Ray.

Shape suffixes: N tokens of a checkpoint, T token size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import Layer, LayerTable

Mode = Literal["standardize", "minmax", "l2", "none"]
Array = NDArray[np.float64]

_FLOAT32 = np.finfo(np.float32)
_BLOCK = 1 << 17  # values worked on at once: as float64 they stay in a core's own cache


@dataclass(frozen=True)
class Moments:
    """What the statistics need to know of some values; that of their parts can be merged.

    Attributes:
        count: How many values.
        mean: Their mean; NaN if one of them is, NaN or infinite if one of them is infinite.
        m2: Sum of their squared deviations from the mean.
        low: Smallest value, NaN if there is one.
        high: Largest value, NaN if there is one.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @property
    def norm(self) -> float:
        """Euclidean norm of the values."""
        return math.sqrt(self.m2 + self.count * self.mean * self.mean)

    @property
    def variance(self) -> float:
        """Unbiased variance of the values, 0 for a single one."""
        return self.m2 / max(self.count - 1, 1)


def moments(values: Tensor) -> Moments:
    """The moments of a tensor of any floating-point dtype and shape, in float64, without a float64 copy of it."""
    flat, total = values.detach().reshape(-1), Moments()
    with np.errstate(all="ignore"):  # what is not finite shows in the result
        for begin in range(0, len(flat), _BLOCK):
            block = flat[begin : begin + _BLOCK].to("cpu", torch.float64)
            total = merge(total, _moments_of_block(block.numpy()))
    return total


def _moments_of_block(values: Array) -> Moments:
    mean = np.add.reduce(values) / len(values)
    deviations = values - mean
    low, high = np.minimum.reduce(values), np.maximum.reduce(values)
    return Moments(len(values), float(mean), float(deviations @ deviations), float(low), float(high))


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of the values of both (Chan, Golub and LeVeque 1979)."""
    if first.count == 0 or second.count == 0:
        return first if second.count == 0 else second
    count, gap = first.count + second.count, second.mean - first.mean
    mean = first.mean + gap * (second.count / count)
    m2 = first.m2 + second.m2 + gap * gap * (first.count * (second.count / count))
    low, high = np.minimum(first.low, second.low), np.maximum(first.high, second.high)  # unlike min, keep NaN
    return Moments(count, mean, m2, float(low), float(high))


def _no_layers() -> Array:
    return np.empty(0)


@dataclass(eq=False)
class LayerStatistics:
    """What every normalisation needs to know of the models of one layer table, accumulated in float64.

    An empty one takes its number of layers from the first model. Merging is exact but for the rounding of float64 sums,
    whatever the order.

    Attributes:
        models: Checkpoints seen.
        mean: Sum over models of the mean of a layer's values, [layers].
        variance: Sum over models of the unbiased variance of a layer's values (0 for a single value), [layers].
        norm: Sum over models of the Euclidean norm of a layer's values, [layers].
        minimum: Smallest value of a layer in any model, [layers].
        maximum: Largest value of a layer in any model, [layers].
    """

    models: int = 0
    mean: Array = field(default_factory=_no_layers)
    variance: Array = field(default_factory=_no_layers)
    norm: Array = field(default_factory=_no_layers)
    minimum: Array = field(default_factory=_no_layers)
    maximum: Array = field(default_factory=_no_layers)

    def update(self, tokens_NT: Tensor, table: LayerTable) -> LayerStatistics:
        """Adds one model and returns itself.

        Args:
            tokens_NT: Its tokens [N, T], not normalised.
            table: Their layers.

        Raises:
            InputError: The tokens do not fit the table, or the table is not that of the models before.
        """
        _check_tokens(tokens_NT, table)
        if len(tokens_NT) != table.num_tokens:
            raise InputError(f"statistics need all {table.num_tokens} tokens of a model, not {len(tokens_NT)}")
        return self._add([moments(values) for values in _layer_values(tokens_NT.detach().cpu(), table)])

    def add(self, moments_by_key: Mapping[str, Moments], table: LayerTable) -> LayerStatistics:
        """Adds one model, known by the moments of its tensors, and returns itself: the same as ``update``.

        Args:
            moments_by_key: Moments of every tensor that the table tokenises; others may be there.
            table: Its layers.

        Raises:
            InputError: A tensor is missing or of another size, or the table is not that of the models before.
        """
        return self._add(_layer_moments(moments_by_key, table))

    def _add(self, layers: list[Moments]) -> LayerStatistics:
        rows = [(layer.mean, layer.variance, layer.norm, layer.low, layer.high) for layer in layers]
        return self.merge(LayerStatistics(1, *np.array(rows).T))

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Adds the models that another one has seen and returns itself.

        Raises:
            InputError: The other one is of another number of layers.
        """
        if other.models == 0:
            return self
        if self.models == 0:
            self.mean, self.variance, self.norm = np.zeros((3, len(other.mean)))
            self.minimum, self.maximum = np.full_like(other.minimum, np.inf), np.full_like(other.maximum, -np.inf)
        if len(self.mean) != len(other.mean):
            raise InputError(
                f"statistics of {len(other.mean)} layers cannot be merged into those of {len(self.mean)}: "
                "keep one for each architecture"
            )
        self.models += other.models
        self.mean += other.mean
        self.variance += other.variance
        self.norm += other.norm
        self.minimum = np.minimum(self.minimum, other.minimum)
        self.maximum = np.maximum(self.maximum, other.maximum)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for another process."""
        return {name: value if name == "models" else value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerStatistics:
        """The statistics that ``to_dict`` described."""
        arrays = {name: np.array(value, dtype=float) for name, value in data.items() if name != "models"}
        return cls(models=data["models"], **arrays)


@dataclass(frozen=True, eq=False)
class Normalization:
    """Maps each layer's values x to (x - shift) / scale and back.

    Attributes:
        mode: Where shift and scale come from; see ``fit``.
        shift: float64 [layers].
        scale: float64 [layers], never zero. For ``l2`` the mean norm, used to undo tokens of a model without its own.
    """

    mode: Mode
    shift: Array
    scale: Array

    def as_statistics(self) -> LayerStatistics:
        """Statistics of one model that ``fit`` makes this normalisation of, whatever its mode."""
        shift, scale = self.shift, self.scale
        return LayerStatistics(1, shift, scale**2, scale, shift - scale, shift + scale)

    @torch.no_grad()
    def normalize(
        self,
        tokens_NT: Tensor,
        table: LayerTable,
        start: int = 0,
        model_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Normalised tokens and, for ``l2``, the norms that they were divided by.

        Args:
            tokens_NT: Tokens of one model, all of them or the range that begins at ``start``.
            table: The layers of the model.
            start: Index of the first token.
            model_scale: For ``l2``, the model's scale as ``scale_of`` gives it; needed where the tokens are not the
                whole model.
            out: float32 of the tokens' shape to write the result to, such as the tokens themselves; None takes new
                memory.

        Returns:
            The tokens, float32; and for ``l2`` the model's scale, float32 [layers] (1 where a layer is all zero), to
            be kept beside the tokens, otherwise None.

        Raises:
            InputError: Tokens, range, table, scale and normalisation do not fit.
        """
        self._check(tokens_NT, table, start, model_scale)
        if self.mode == "l2" and model_scale is None:
            model_scale = _whole_model_scale(tokens_NT, table)
        out = torch.empty_like(tokens_NT, dtype=torch.float32) if out is None else out
        block = max(_BLOCK // table.token_size, 1)
        for rows, layer, first, shift, scale in self._slices(tokens_NT, table, start, model_scale):
            for begin in range(rows.start, rows.stop, block):
                end = min(begin + block, rows.stop)
                torch.sub(tokens_NT[begin:end].float(), shift, out=out[begin:end]).div_(scale)
            _clear_padding(out[rows], layer, first)
        return out, model_scale

    def denormalize(
        self, tokens_NT: Tensor, table: LayerTable, model_scale: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """The inverse of ``normalize`` up to float32 rounding, in float32, differentiable in the tokens.

        Args:
            tokens_NT: Normalised tokens of one model, stored or decoded, all of them or the range that begins at
                ``start``; what is in their padding becomes zero.
            table: The layers of the model.
            model_scale: For ``l2``, the scale that ``normalize`` returned; without it the training models' mean norms.
            start: Index of the first token.

        Raises:
            InputError: Tokens, range, table, scale and normalisation do not fit, or a scale for a mode that has none.
        """
        self._check(tokens_NT, table, start, model_scale)
        parts = []
        for rows, layer, first, shift, scale in self._slices(tokens_NT, table, start, model_scale):
            part = tokens_NT[rows].float()
            part = part.clone() if self.mode == "none" else part * scale + shift  # a copy keeps the sign of zero
            _clear_padding(part, layer, first)
            parts.append(part)
        return torch.cat(parts) if parts else tokens_NT.float()

    def _slices(
        self, tokens_NT: Tensor, table: LayerTable, start: int, model_scale: Tensor | None
    ) -> Iterator[tuple[slice, Layer, int, float, float]]:
        """Of each layer in the range: its tokens, itself, the first of its own tokens, its shift and scale."""
        shifts, scales = self.shift.tolist(), (self.scale if model_scale is None else model_scale).tolist()
        for index, first, end in table.slices(start, start + len(tokens_NT)):
            begin = int(table.layer_starts[index]) + first - start
            yield slice(begin, begin + end - first), table.layers[index], first, shifts[index], scales[index]

    def _check(self, tokens_NT: Tensor, table: LayerTable, start: int, model_scale: Tensor | None) -> None:
        _check_tokens(tokens_NT, table, start)
        if len(self.scale) != len(table.layers):
            raise InputError(
                f"normalization of {len(self.scale)} layers does not fit a table of {len(table.layers)}: "
                "use the one fitted on the same architecture"
            )
        if model_scale is not None and (self.mode != "l2" or model_scale.shape != self.scale.shape):
            raise InputError(
                f"model_scale of shape {tuple(model_scale.shape)} with normalization {self.mode} of "
                f"{len(self.scale)} layers: only l2 takes one, one value a layer"
            )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Normalization)
            and self.mode == other.mode
            and np.array_equal(self.shift, other.shift)
            and np.array_equal(self.scale, other.scale)
        )

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """The normalisation as JSON-able values."""
        return {"mode": self.mode, "shift": self.shift.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Normalization:
        """The normalisation that ``to_dict`` described, also after a trip through JSON."""
        return cls(data["mode"], np.array(data["shift"], dtype=float), np.array(data["scale"], dtype=float))


def fit(statistics: LayerStatistics, mode: Mode) -> Normalization:
    """The normalisation for the models that were seen, which should be the training split alone.

    With x = [w | b] the values of a layer in one model:

    * ``standardize``: shift is the mean over models of mean(x), scale the root of the mean over models of the unbiased
      variance of x. Variance between models does not count, as in the published code.
    * ``minmax``: the smallest and largest x of any model become -1 and 1.
    * ``l2``: each model's x is divided by its own Euclidean norm.
    * ``none``: nothing is changed.

    A layer without spread (one value, or all values alike to float32 resolution) is shifted but not scaled.

    Raises:
        InputError: No model was seen, or the models hold NaN or infinite values.
    """
    if statistics.models == 0:
        raise InputError("no model to fit a normalization on: the training split is empty")
    shift, scale = _shift_and_scale(statistics, mode)
    finite = np.isfinite(shift) & np.isfinite(scale)
    if not finite.all():
        raise InputError(
            f"layer {int(np.argmin(finite))} holds NaN or infinite weights, so it has no {mode} statistics: "
            "leave those models out"
        )
    flat = scale <= np.maximum(_FLOAT32.eps * np.abs(shift), _FLOAT32.tiny)
    return Normalization(mode, shift, np.where(flat, 1.0, scale))


def _shift_and_scale(statistics: LayerStatistics, mode: Mode) -> tuple[Array, Array]:
    zeros, models = np.zeros_like(statistics.mean), statistics.models
    if mode == "standardize":
        return statistics.mean / models, np.sqrt(statistics.variance / models)
    if mode == "minmax":
        low, high = statistics.minimum, statistics.maximum
        return low + (high - low) / 2, (high - low) / 2
    if mode == "l2":
        return zeros, statistics.norm / models
    if mode == "none":
        return zeros, zeros + 1
    raise InputError(f"normalization is {mode!r}: it must be standardize, minmax, l2 or none")


def scale_of(moments_by_key: Mapping[str, Moments], table: LayerTable) -> Tensor:
    """The norms that ``l2`` divides a model's layers by, from the moments of its tensors.

    Returns:
        float32 [layers]; 1 where a layer is all zero.

    Raises:
        InputError: A tensor is missing or of another size.
    """
    return _scale(_layer_moments(moments_by_key, table))


def _whole_model_scale(tokens_NT: Tensor, table: LayerTable) -> Tensor:
    if len(tokens_NT) != table.num_tokens:
        raise InputError(
            f"{len(tokens_NT)} of the {table.num_tokens} tokens of a model do not tell its norms: pass its model_scale"
        )
    return _scale([moments(values) for values in _layer_values(tokens_NT.detach(), table)]).to(tokens_NT.device)


def _scale(layers: list[Moments]) -> Tensor:
    norms = torch.tensor([layer.norm for layer in layers], dtype=torch.float64).float()
    return torch.where(norms > float(_FLOAT32.tiny), norms, 1.0)


def _layer_values(tokens_NT: Tensor, table: LayerTable) -> Iterator[Tensor]:
    """The values of each layer of a model without padding, [C, width]."""
    for layer, part in zip(table.layers, tokens_NT.split([layer.num_tokens for layer in table.layers]), strict=True):
        stride = layer.stride(table.token_size)
        yield part.reshape(-1)[: layer.channels * stride].view(layer.channels, stride)[:, : layer.width]


def _layer_moments(moments_by_key: Mapping[str, Moments], table: LayerTable) -> list[Moments]:
    """Moments of each layer, its weight and bias together."""
    found = []
    for layer in table.layers:
        of_layer = _moments_of(moments_by_key, layer.key, layer.channels * layer.fan_in)
        if layer.bias_key is not None:
            of_layer = merge(of_layer, _moments_of(moments_by_key, layer.bias_key, layer.channels))
        found.append(of_layer)
    return found


def _moments_of(moments_by_key: Mapping[str, Moments], key: str, count: int) -> Moments:
    found = moments_by_key.get(key, Moments())
    if found.count != count:
        raise InputError(f"{key} has moments of {found.count} values, but the layer table says {count}: read all of it")
    return found


def _clear_padding(tokens_nT: Tensor, layer: Layer, first: int) -> None:
    """Sets to zero the padding of tokens of one layer, in place; ``first`` is the first of the layer's tokens."""
    size = tokens_nT.shape[1]
    period = layer.num_tokens if layer.dense else layer.tokens_per_channel
    values = layer.channels * layer.width if layer.dense else layer.width
    signal = values - (period - 1) * size  # in the last token of each period, the only one that has padding
    if signal < size:
        tokens_nT[(period - 1 - first) % period :: period, signal:] = 0.0


def _check_tokens(tokens_NT: Tensor, table: LayerTable, start: int = 0) -> None:
    fits = tokens_NT.dim() == 2 and tokens_NT.shape[1] == table.token_size
    if not fits or not 0 <= start <= table.num_tokens - len(tokens_NT):
        raise InputError(
            f"tokens have shape {tuple(tokens_NT.shape)} from token {start}, but the architecture has "
            f"{table.num_tokens} tokens of size {table.token_size}: use the layer table they were made with"
        )
