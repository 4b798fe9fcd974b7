"""Windows of a network after a random symmetry of it: what a permuted view of the contrastive loss shows.

Gives the same values as ``gather_indices`` of ``sane_ray.tokens.symmetry``, several times as fast: whole rows are
fetched first, and within them blocks of columns that move together, so that no index is made for each value.
Never decides who sees which view, and never imports Ray.

Shape suffixes: N tokens of a network, W of a window, T values of a token; R rows of a layer, S values from the start of
a row to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.tokens.symmetry import Indices, Part, Symmetry, order_of, random_permutations
from sane_ray.tokens.tokenizer import Layer, LayerTable

Permutations = Mapping[str, Indices]

_CUT_WHOLE = 2**20
"""Bytes of a network up to which all of it is permuted at once, since an epoch shows every part of it anyway."""


class Permuted:
    """A network's tokens after one random symmetry, of which windows are cut."""

    def __init__(self, values_NT: NDArray[Any], mover: Mover, rng: np.random.Generator) -> None:
        """Draws the symmetry.

        Args:
            values_NT: All tokens of the network, as stored: normalisation is affine in each layer and so commutes with
                a permutation of channels.
            mover: Of its architecture.
            rng: What the permutations are drawn from.
        """
        self._values_NT = values_NT
        self._mover = mover
        self._permutations: Permutations | None = random_permutations(mover.symmetry, rng)
        if values_NT.nbytes <= _CUT_WHOLE:
            whole_NT = np.empty_like(values_NT)
            mover.cut(values_NT, self._permutations, 0, whole_NT)
            self._values_NT, self._permutations = whole_NT, None

    def cut(self, start: int, out_WT: NDArray[Any]) -> None:
        """Writes the window that begins with token ``start`` into ``out_WT``."""
        if self._permutations is None:
            out_WT[:] = self._values_NT[start : start + len(out_WT)]
        else:
            self._mover.cut(self._values_NT, self._permutations, start, out_WT)


class Mover:
    """Moves the values of an architecture's networks as permutations say."""

    def __init__(self, table: LayerTable, symmetry: Symmetry) -> None:
        symmetry.check(table)
        self.symmetry = symmetry
        self._table = table
        self._layers = [_LayerMover(layer, symmetry, layer.stride(table.token_size)) for layer in table.layers]

    def cut(self, values_NT: NDArray[Any], permutations: Permutations, start: int, out_WT: NDArray[Any]) -> None:
        """Writes tokens ``start`` to ``start + W`` of the permuted network into ``out_WT``, which is contiguous."""
        size = self._table.token_size
        values, out, done = values_NT.reshape(-1), out_WT.reshape(-1), 0
        for index, low, high in self._table.slices(start, start + len(out_WT)):
            first, end = (self._table.layer_starts[index : index + 2] * size).tolist()
            count = (high - low) * size
            self._layers[index].cut(values[first:end], permutations, low * size, out[done : done + count])
            done += count


@dataclass(frozen=True)
class _LayerMover:
    """The same for one layer, whose values are rows ``[w | b]`` of equal stride, and perhaps padding after them."""

    layer: Layer
    symmetry: Symmetry
    stride: int

    def cut(self, values: NDArray[Any], permutations: Permutations, low: int, out: NDArray[Any]) -> None:
        """Writes the layer's values from ``low`` on into ``out``, as many as it holds."""
        row, skipped = divmod(low, self.stride)
        end = min(-(-(low + len(out)) // self.stride), self.layer.channels)
        values_RS = values[: self.layer.channels * self.stride].reshape(-1, self.stride)
        rows_RS = values_RS[order_of(self._rows, permutations)[row:end]]
        self._move_columns(rows_RS, permutations)
        if self._biases is not None:
            rows_RS[:, self.layer.fan_in] = values_RS[order_of(self._biases, permutations)[row:end], self.layer.fan_in]
        found = rows_RS.reshape(-1)[skipped : skipped + len(out)]
        out[: len(found)] = found
        out[len(found) :] = values[low + len(found) : low + len(out)]  # padding behind the last row

    def _move_columns(self, rows_RS: NDArray[Any], permutations: Permutations) -> None:
        for shape, axis, parts in self._columns:
            weights = rows_RS[:, : self.layer.fan_in]
            if len(parts) == 1 and parts[0].name is not None:  # blocks of entries move as one
                order, around = permutations[parts[0].name], parts[0].block * prod(shape[axis:])
            else:
                order, around = order_of(parts, permutations), prod(shape[axis:])
            blocks = weights.reshape(len(rows_RS), prod(shape[: axis - 1]), len(order), around)
            weights[:] = blocks.take(order, axis=2).reshape(weights.shape)

    @cached_property
    def _axes(self) -> tuple[Any, ...]:
        return self.symmetry.axes.get(self.layer.key, (None,) * len(self.layer.shape))

    @cached_property
    def _rows(self) -> tuple[Part, ...]:
        return self.symmetry.parts(self.layer.key, 0, self.layer.channels)

    @cached_property
    def _biases(self) -> tuple[Part, ...] | None:
        """What reorders the biases, where they do not go with their rows."""
        key = self.layer.bias_key
        if key is None or self.symmetry.axes.get(key, (None,))[0] == self._axes[0]:
            return None
        return self.symmetry.parts(key, 0, self.layer.channels)

    @cached_property
    def _columns(self) -> list[tuple[tuple[int, ...], int, tuple[Part, ...]]]:
        """Shape of a row's weights, and for each of its axes that is reordered its number, from 1, and its parts."""
        shape = self.layer.shape[1:]
        return [
            (shape, axis, self.symmetry.parts(self.layer.key, axis, shape[axis - 1]))
            for axis in range(1, len(shape) + 1)
            if self._axes[axis] is not None
        ]
