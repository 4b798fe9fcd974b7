"""Per-layer normalisation of tokens, invertible in every mode, with statistics from one streaming pass.

``standardize`` and ``minmax`` follow the published code but for one quirk: it concatenates a batch norm's running
statistics with themselves and normalises them twice; here they are layers like any other, normalised once. ``l2``,
which the published code cannot undo, keeps each model's norms. This module never chooses the split that the statistics
come from, never touches padding (it stays exactly zero), and never imports Ray.

Shape suffixes: N tokens of a checkpoint, T token size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import LayerTable

Mode = Literal["standardize", "minmax", "l2", "none"]
Array = NDArray[np.float64]

_FLOAT32 = np.finfo(np.float32)


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
        values = tokens_NT.detach().cpu().numpy()
        rows = [_layer_statistics(values, table, index) for index in range(len(table.layers))]
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

    def normalize(self, tokens_NT: Tensor, table: LayerTable) -> tuple[Tensor, Tensor | None]:
        """Normalised tokens [N, T] and, for ``l2``, the norms that they were divided by.

        Args:
            tokens_NT: Tokens of one model [N, T].
            table: Their layers.

        Returns:
            The tokens, float32 in new memory; and for ``l2`` that model's scale, float32 [layers] (1 where a layer is
            all zero), to be kept beside the tokens, otherwise None.

        Raises:
            InputError: Tokens, table and normalisation do not fit.
        """
        self._check(tokens_NT, table)
        tokens_NT = tokens_NT.float()
        model_scale = _model_scale(tokens_NT, table) if self.mode == "l2" else None
        shift_N1, scale_N1 = self._columns(tokens_NT, table, model_scale)
        return ((tokens_NT - shift_N1) / scale_N1).masked_fill_(_padding(tokens_NT, table), 0.0), model_scale

    def denormalize(self, tokens_NT: Tensor, table: LayerTable, model_scale: Tensor | None = None) -> Tensor:
        """The inverse of ``normalize`` up to float32 rounding, in float32, differentiable in the tokens.

        Args:
            tokens_NT: Normalised tokens of one model [N, T], stored or decoded; what is in their padding becomes zero.
            table: Their layers.
            model_scale: For ``l2``, the scale that ``normalize`` returned; without it the training models' mean norms.

        Raises:
            InputError: Tokens, table, scale and normalisation do not fit, or a scale for a mode that has none.
        """
        self._check(tokens_NT, table)
        if model_scale is not None and (self.mode != "l2" or model_scale.shape != self.scale.shape):
            raise InputError(
                f"model_scale of shape {tuple(model_scale.shape)} with normalization {self.mode} of "
                f"{len(self.scale)} layers: only l2 takes one, one value a layer"
            )
        tokens_NT = tokens_NT.float()
        shift_N1, scale_N1 = self._columns(tokens_NT, table, model_scale)
        return torch.addcmul(shift_N1, tokens_NT, scale_N1).masked_fill(_padding(tokens_NT, table), 0.0)

    def _columns(self, tokens_NT: Tensor, table: LayerTable, model_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Shift and scale of each token, two columns [N, 1]."""
        scale = torch.from_numpy(self.scale) if model_scale is None else model_scale
        layer_of_token = torch.from_numpy(table.layer_of_token).to(tokens_NT.device)
        shift_N, scale_N = (
            values.to(tokens_NT).index_select(0, layer_of_token) for values in (torch.from_numpy(self.shift), scale)
        )
        return shift_N[:, None], scale_N[:, None]

    def _check(self, tokens_NT: Tensor, table: LayerTable) -> None:
        _check_tokens(tokens_NT, table)
        if len(self.scale) != len(table.layers):
            raise InputError(
                f"normalization of {len(self.scale)} layers does not fit a table of {len(table.layers)}: "
                "use the one fitted on the same architecture"
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


def _layer_statistics(values_NT: NDArray[np.float32], table: LayerTable, index: int) -> tuple[float, ...]:
    """Mean, unbiased variance, norm, minimum and maximum of one layer of one model, in float64."""
    layer, (start, stop) = table.layers[index], table.layer_starts[index : index + 2]
    values = values_NT[start:stop].reshape(layer.channels, -1)[:, : layer.width].astype(np.float64).reshape(-1)
    mean = values.mean()
    deviations = values - mean
    variance = deviations @ deviations / max(values.size - 1, 1)
    return float(mean), float(variance), float(np.linalg.norm(values)), float(values.min()), float(values.max())


def _model_scale(tokens_NT: Tensor, table: LayerTable) -> Tensor:
    """Euclidean norm of each layer, float32 [layers]; 1 where it is zero."""
    parts = tokens_NT.detach().double().square().sum(dim=1).split([layer.num_tokens for layer in table.layers])
    norms = torch.stack([part.sum() for part in parts]).sqrt().float()
    return torch.where(norms > float(_FLOAT32.tiny), norms, 1.0)


def _padding(tokens_NT: Tensor, table: LayerTable) -> Tensor:
    """Where the padding is, bool [N, T]."""
    counts_N = torch.from_numpy(table.signal_counts).to(tokens_NT.device)
    return torch.arange(table.token_size, device=tokens_NT.device) >= counts_N[:, None]


def _check_tokens(tokens_NT: Tensor, table: LayerTable) -> None:
    if tuple(tokens_NT.shape) != (table.num_tokens, table.token_size):
        raise InputError(
            f"tokens have shape {tuple(tokens_NT.shape)}, but the architecture has {table.num_tokens} tokens of size "
            f"{table.token_size}: use the layer table they were made with"
        )
