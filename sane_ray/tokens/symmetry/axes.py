"""What a symmetry is, and how it moves weights and tokens.

Reordering the channels of a hidden layer, and with them its bias, its batch norm and the inputs of the next layer,
gives other weights and the same function (SANE, arXiv 2406.09997, section 3.3). A permuted model is one gather over its
flattened tokens, so views are made on the fly and never stored. This module never imports Ray, and never finds out what
the symmetry of a network is: see ``families`` and ``sane_ray.tokens.tracing``.

Shape suffixes: N tokens of a checkpoint, T token size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import Layer, LayerTable

Indices = NDArray[np.int64]
Axis = str | tuple[str | int, ...] | None
"""What reorders an axis of a tensor: nothing, the permutation of that name, or consecutive segments, each of which has
a permutation's name or is a number of entries that stay where they are."""


class Part(NamedTuple):
    """A segment of an axis."""

    name: str | None
    """Its permutation, or None if it is fixed."""
    start: int
    stop: int
    """The entries of the axis that it covers."""
    block: int
    """Neighbouring entries that move as one; ``(stop - start) / block`` is the permutation's length."""


@dataclass(frozen=True)
class Symmetry:
    """Named permutations, and the tensor axes that each of them reorders.

    An axis may be longer than its permutations: then it is reordered in equal blocks of
    ``length / sum of the segments' sizes`` entries, one block size for an axis. So are the inputs of a linear layer
    after a flattened convolution, or the rows of a packed query-key-value projection,
    ``("heads", "heads", "heads")`` in blocks of the head size.

    Attributes:
        axes: For each tensor that takes part, what reorders each of its axes.
        sizes: Length of each permutation.
        origin: How it was found, for people to read, such as ``traced and proved``; empty if nobody said. Symmetries
            that permute alike are equal whatever their origins.

    Raises:
        InputError: An axis names a permutation without a size, or a size is not positive.
    """

    axes: dict[str, tuple[Axis, ...]]
    sizes: dict[str, int]
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name, size in self.sizes.items():
            if not _is_count(size):
                raise InputError(f"symmetry gives permutation {name} the size {size!r}: it must be a positive integer")
        for key, axes in self.axes.items():
            for axis in axes:
                for segment in _segments(axis):
                    if not _is_count(segment) and not (isinstance(segment, str) and segment in self.sizes):
                        raise InputError(
                            f"symmetry of {key} names {segment!r}, which is neither a permutation of known size nor a "
                            "positive number of fixed entries"
                        )

    @property
    def is_trivial(self) -> bool:
        """Whether there is nothing to permute."""
        return not self.sizes

    def parts(self, key: str, axis: int, length: int) -> tuple[Part, ...]:
        """The segments of an axis of a tensor, in their order; one fixed part where the symmetry names none.

        Args:
            key: Name of the tensor.
            axis: Number of the axis.
            length: Its entries.

        Raises:
            InputError: So many entries cannot be cut into the blocks that the segments need.
        """
        names = self.axes.get(key)
        if names is None or names[axis] is None:
            return (Part(None, 0, length, 1),)
        sizes = [(segment, self._size(segment)) for segment in _segments(names[axis])]
        needed = sum(size for _, size in sizes)
        block, rest = divmod(length, needed)
        if rest or not block:
            segments = " + ".join(
                f"{segment} of {size}" if isinstance(segment, str) else str(size) for segment, size in sizes
            )
            raise InputError(
                f"axis {axis} of {key} has {length} entries, but the symmetry's {segments} need a multiple of "
                f"{needed}: use the symmetry of this architecture"
            )
        parts, start = [], 0
        for segment, size in sizes:
            stop = start + size * block
            parts.append(Part(segment if isinstance(segment, str) else None, start, stop, block))
            start = stop
        return tuple(parts)

    def check(self, table: LayerTable) -> None:
        """Whether the symmetry fits an architecture.

        Raises:
            InputError: It names a tensor that the architecture lacks, or that has another number of axes or another
                size; the message says which.
        """
        shapes = shapes_of(table)
        for key in self.axes:
            if key not in shapes:
                raise InputError(f"symmetry names {key}, which the architecture lacks: use its own symmetry")
            self._check_tensor(key, shapes[key])

    def to_dict(self) -> dict[str, Any]:
        """The symmetry as JSON-able values."""
        axes = {key: [list(a) if isinstance(a, tuple) else a for a in axes] for key, axes in self.axes.items()}
        return {"axes": axes, "sizes": dict(self.sizes), "origin": self.origin}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Symmetry:
        """The symmetry that ``to_dict`` described, also after a trip through JSON.

        Raises:
            InputError: The values do not describe a symmetry.
        """
        try:
            axes = {
                key: tuple(tuple(a) if isinstance(a, list) else a for a in axes) for key, axes in data["axes"].items()
            }
            return cls(axes, dict(data["sizes"]), _text(data.get("origin", "")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                "symmetry must have 'axes' (for each tensor a list with null, a name or a list of names for each axis) "
                "and 'sizes' (the length of each permutation), and may have 'origin' (a text); "
                f"found {str(data)[:80]}"
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the symmetry as a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Symmetry:
        """Reads what ``save`` wrote.

        Raises:
            InputError: The file cannot be read, or holds no symmetry.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a symmetry: {error}; write it with Symmetry.save") from error

    def _size(self, segment: str | int) -> int:
        return self.sizes[segment] if isinstance(segment, str) else segment

    def _check_tensor(self, key: str, shape: tuple[int, ...]) -> None:
        """Raises ``InputError`` if the tensor does not have the axes that the symmetry gives it."""
        axes = self.axes.get(key)
        if axes is None:
            return
        if len(axes) != len(shape):
            raise InputError(
                f"symmetry names {len(axes)} axes of {key}, which has {len(shape)}: use the architecture's own symmetry"
            )
        for axis, length in enumerate(shape):
            self.parts(key, axis, length)


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
        stop: End of that window; None for the last token. Only the window's rows are computed.

    Returns:
        int64 [(stop - start) * T], indices into all N * T values of the model.

    Raises:
        InputError: Permutations, symmetry, table and window do not fit.
    """
    _check_permutations(symmetry, permutations)
    stop = table.num_tokens if stop is None else stop
    if not 0 <= start <= stop <= table.num_tokens:
        raise InputError(f"window of tokens {start} to {stop} does not lie in a model of {table.num_tokens} tokens")
    size = table.token_size
    indices = np.empty((stop - start) * size, dtype=np.int64)
    first = int(np.searchsorted(table.layer_starts, start, side="right")) - 1
    for layer, layer_start in zip(table.layers[first:], table.layer_starts[first:-1].tolist(), strict=True):
        if layer_start >= stop:
            break
        low, high = max(start - layer_start, 0), min(stop - layer_start, layer.num_tokens)
        out = indices[(layer_start + low - start) * size : (layer_start + high - start) * size]
        _gather_layer(out, layer, layer_start * size, low * size, size, symmetry, permutations)
    return indices


def _gather_layer(
    out: Indices,
    layer: Layer,
    origin: int,
    low: int,
    token_size: int,
    symmetry: Symmetry,
    permutations: Mapping[str, Indices],
) -> None:
    """Fills in the sources of a layer's values from ``low`` on, counted from ``origin``, where the layer begins."""
    symmetry._check_tensor(layer.key, layer.shape)
    stride = layer.stride(token_size)
    row, skipped = divmod(low, stride)
    rows = slice(row, min(-(-(low + len(out)) // stride), layer.channels))
    starts_R = order_of(symmetry.parts(layer.key, 0, layer.channels), permutations)[rows] * stride + origin
    columns_S = _columns(layer, stride, symmetry, permutations)
    whole = not skipped and len(starts_R) * stride == len(out)
    sources_RS = np.add(starts_R[:, None], columns_S, out=out.reshape(-1, stride) if whole else None)
    if layer.bias_key is not None and symmetry.axes.get(layer.bias_key, (None,))[0] != _axes(layer, symmetry)[0]:
        biases_R = order_of(symmetry.parts(layer.bias_key, 0, layer.channels), permutations)[rows]
        sources_RS[:, layer.fan_in] = biases_R * stride + (origin + layer.fan_in)
    if not whole:
        found = sources_RS.reshape(-1)[skipped : skipped + len(out)]
        out[: len(found)] = found
        out[len(found) :] = np.arange(low + len(found), low + len(out)) + origin  # padding at a dense layer's end


def _axes(layer: Layer, symmetry: Symmetry) -> tuple[Axis, ...]:
    return symmetry.axes.get(layer.key, (None,) * len(layer.shape))


def _columns(layer: Layer, stride: int, symmetry: Symmetry, permutations: Mapping[str, Indices]) -> Indices:
    """Sources of the values of a row within a row, [stride]."""
    columns_S = np.arange(stride)
    names = _axes(layer, symmetry)
    if any(names[1:]):
        inputs = columns_S[: layer.fan_in].reshape(layer.shape[1:])
        for axis, name in enumerate(names[1:]):
            if name is not None:
                order = order_of(symmetry.parts(layer.key, axis + 1, layer.shape[axis + 1]), permutations)
                inputs = inputs.take(order, axis=axis)
        columns_S[: layer.fan_in] = inputs.reshape(-1)
    return columns_S


def _permute_tensor(key: str, tensor: Tensor, symmetry: Symmetry, permutations: Mapping[str, Indices]) -> Tensor:
    names = symmetry.axes.get(key, ())
    if names:
        symmetry._check_tensor(key, tuple(tensor.shape))
    for axis, name in enumerate(names):
        if name is not None:
            order = torch.from_numpy(order_of(symmetry.parts(key, axis, tensor.shape[axis]), permutations))
            tensor = tensor.index_select(axis, order.to(tensor.device))
    return tensor


def order_of(parts: Sequence[Part], permutations: Mapping[str, Indices]) -> Indices:
    """Sources of the entries of an axis.

    Args:
        parts: Its segments, as ``Symmetry.parts`` gives them.
        permutations: A permutation for each name among them.

    Returns:
        int64, as long as the axis.
    """
    orders = []
    for part in parts:
        if part.name is None:
            orders.append(np.arange(part.start, part.stop))
            continue
        order = np.asarray(permutations[part.name])
        if part.block > 1:
            order = (order[:, None] * part.block + np.arange(part.block)).reshape(-1)
        orders.append(order + part.start if part.start else order)
    return orders[0] if len(orders) == 1 else np.concatenate(orders)


def _check_permutations(symmetry: Symmetry, permutations: Mapping[str, Indices]) -> None:
    for name, size in symmetry.sizes.items():
        if name not in permutations or len(permutations[name]) != size:
            found = f"has {len(permutations[name])} entries" if name in permutations else "is missing"
            raise InputError(f"permutation {name} {found}, but the symmetry needs {size}")


def _segments(axis: Axis) -> Iterator[str | int]:
    if isinstance(axis, tuple):
        yield from axis
    elif axis is not None:
        yield axis


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def shapes_of(table: LayerTable) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an architecture by its key, tokenised or not."""
    shapes = {entry.key: entry.shape for entry in table.untokenized}
    for layer in table.layers:
        shapes[layer.key] = layer.shape
        if layer.bias_key is not None:
            shapes[layer.bias_key] = layer.shape[:1]
    return shapes
