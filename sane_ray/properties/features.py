"""Feature sets of a zoo's checkpoints, by the names that results use, such as ``sane+statistics``.

A set is a sum of blocks. Weights are read off the token store, embeddings off what ``jobs/embed.py`` wrote. Rows of one
length need one layout: architectures with the same kinds of layers in the same order have a column for each layer and
number; others are described by the mean, deviation, minimum and maximum of each number over their layers. Never fits
anything, and never looks at a property.

Shape suffixes: R checkpoints, F features, L latent values, K layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sane_ray.embedding.encoder import SHAPE, VECTORS
from sane_ray.errors import InputError
from sane_ray.properties.spectral import spectral_features
from sane_ray.properties.statistics import published_statistics, tensor_statistics
from sane_ray.properties.tensors import Batch, batches, normalizations_of, renormalized
from sane_ray.tokens.layers import LayerTable
from sane_ray.tokens.normalization import Normalization
from sane_ray.tokens.store import TokenStore

Array = NDArray[np.floating[Any]]

PUBLISHED = ("weights", "statistics_published", "sane_mean")
"""Blocks of the published tables, which the published probe reads alone."""

FROM_WEIGHTS: dict[str, Callable[[Batch], tuple[list[str], Array]]] = {
    "statistics": tensor_statistics,
    "statistics_published": published_statistics,
    "spectral": spectral_features,
}
NORMALIZED = ("statistics_published", "weights")
"""Blocks of normalised weights: two zoos must be normalised alike."""
FROM_EMBEDDINGS = ("sane_mean", "sane_vectors", "sane_shape")
COMPOSED = {"sane": ("sane_vectors", "sane_shape")}
"""Names of several blocks at once, each of which a probe weighs by itself."""
BLOCKS = (*FROM_WEIGHTS, "weights", *FROM_EMBEDDINGS)

LAYER_SUMMARIES = ("mean", "std")
"""What is read of the tokens of a layer; of a network's, all of ``VECTORS``."""

SMALLEST = 1e-6
"""Lengths and variances are read by their logarithm, down to this."""

MOST_WEIGHTS = 100_000_000
"""Raw weights are features up to so many values in all (checkpoints times parameters).

While the published ridge is fitted each takes 37 bytes (measured: the block, its float64 copy, that of the training
rows, and their singular vectors): 3.7 GB for so many.
"""


class EmbeddingTables(Protocol):
    """The part of ``sane_ray.embedding.Embeddings`` that is read here."""

    @property
    def index(self) -> dict[str, Any]:
        """What they are of: ``latent_dim``, ``architectures`` and more."""
        ...

    @property
    def models(self) -> pa.Table:
        """One row a checkpoint."""
        ...

    def vectors(self, name: str) -> NDArray[np.float32]:
        """A summary over the tokens of each checkpoint, [R, L]."""
        ...

    def layer_vectors(self, name: str, architecture: str) -> tuple[list[str], NDArray[np.float32]]:
        """Ids of an architecture's checkpoints, and a summary over the tokens of each of their layers, [r, K, L]."""
        ...


class Unavailable(Exception):
    """A block of features that this zoo does not give, and why."""


@dataclass(frozen=True, eq=False)
class Zoo:
    """Checkpoints whose properties are predicted; at least one of store and embeddings is there.

    Attributes:
        name: For tables.
        store: Their weights.
        embeddings: Their embeddings.
    """

    name: str
    store: TokenStore | None = None
    embeddings: EmbeddingTables | None = None

    @cached_property
    def table(self) -> pa.Table:
        """One row a checkpoint: id, model, epoch, split, architecture, and every property that is known.

        What embeddings do not know (of checkpoints as they are, the split), the store may.
        """
        if self.embeddings is None:
            assert self.store is not None
            return self.store.models
        table = self.embeddings.models
        if self.store is not None:
            order = np.argsort(self.rows_of_store, kind="stable")[len(self.store.models) - len(table) :]
            for name in self.store.models.column_names:
                stored = self.store.models[name].take(order)
                if name not in table.column_names:
                    table = table.append_column(name, stored)
                elif table[name].null_count:
                    table = table.set_column(table.column_names.index(name), name, _filled(table[name], stored))
        return table

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def digests(self) -> list[str | None]:
        """What identifies the weights of each checkpoint, whatever its name; None where no store says it."""
        return self.table["sha256"].to_pylist() if "sha256" in self.table.column_names else [None] * len(self)

    def column(self, name: str) -> NDArray[Any]:
        """One of the columns that every zoo has."""
        return np.array(self.table[name].to_pylist())

    @cached_property
    def rows_of_store(self) -> NDArray[np.int64]:
        """Row of each checkpoint of the store; -1 for one that was not embedded.

        Raises:
            InputError: Embeddings are of checkpoints that the store does not have.
        """
        assert self.store is not None
        ids = self.store.models["id"].to_pylist()
        rows = self.store.models if self.embeddings is None else self.embeddings.models
        place = {identity: row for row, identity in enumerate(rows["id"].to_pylist())}
        if not place.keys() <= set(ids):
            missing = next(identity for identity in place if identity not in set(ids))
            raise InputError(
                f"the embeddings have a checkpoint {missing}, which the store {self.store.path} has not: "
                "name the store that was embedded with --store"
            )
        return np.array([place.get(identity, -1) for identity in ids])

    @cached_property
    def tables(self) -> dict[str, LayerTable]:
        """Layers of each architecture, by the name that the store has for it, if there is one."""
        if self.store is not None:
            return {name: architecture.table for name, architecture in self.store.architectures.items()}
        return self.embedded_tables

    @cached_property
    def embedded_tables(self) -> dict[str, LayerTable]:
        """Layers of each architecture, by the name that the embeddings have for it."""
        assert self.embeddings is not None
        described = self.embeddings.index["architectures"]
        return {name: LayerTable.from_dict(table) for name, table in described.items()}


@dataclass(frozen=True, eq=False)
class Block:
    """Features of one kind, of every checkpoint of one or several zoos.

    Attributes:
        name: Such as ``statistics``.
        columns: What each feature is.
        values_RF: NaN where a feature is not defined.
        note: How architectures were brought to one length.
    """

    name: str
    columns: list[str]
    values_RF: Array
    note: str = ""


@dataclass(eq=False)
class FeatureSource:
    """Computes blocks once, for all the sets that need them.

    Attributes:
        zoos: Rows of a block are theirs, one zoo after the other.
    """

    zoos: Sequence[Zoo]
    _blocks: dict[str, Block | Unavailable] = field(default_factory=dict)

    def prepare(self, names: Sequence[str]) -> None:
        """Computes what these sets need, in one pass over each store."""
        wanted = dict.fromkeys(block for name in names for block in parts(name))
        reading = [name for name in wanted if name in (*FROM_WEIGHTS, "weights") and name not in self._blocks]
        self._blocks |= self._read(reading)
        for name in wanted:
            if name not in self._blocks:
                self._blocks[name] = _or_reason(lambda name=name: self._embedded(name))  # type: ignore[misc]

    def blocks(self, name: str) -> list[Block]:
        """The blocks of a set.

        Raises:
            Unavailable: One of them cannot be had.
        """
        self.prepare([name])
        found = []
        for part in parts(name):
            block = self._blocks[part]
            if isinstance(block, Unavailable):
                raise block
            found.append(block)
        return found

    def _read(self, names: list[str]) -> dict[str, Block | Unavailable]:
        if not names:
            return {}
        lacking = [zoo.name for zoo in self.zoos if zoo.store is None]
        if lacking:
            reason = Unavailable(f"it needs the weights of {lacking[0]}: name its token store with --store")
            return dict.fromkeys(names, reason)
        found: dict[str, Block | Unavailable] = {n: Unavailable(why) for n in names if (why := self._refuse(n))}
        pieces: dict[str, list[_Piece]] = {name: [] for name in names if name not in found}
        one_layout = _is_one([table for zoo in self.zoos for table in zoo.tables.values()])
        notes = []
        for zoo, start in zip(self.zoos, self._starts, strict=True):
            assert zoo.store is not None
            alike = self._normalized_alike(zoo) if set(NORMALIZED) & pieces.keys() else {}
            notes += [f"weights of {zoo.name} are normalised as those of {self.zoos[0].name}"] if alike else []
            for batch in batches(zoo.store):
                rows = zoo.rows_of_store[batch.checkpoints]
                other = (
                    renormalized(batch, alike[batch.architecture.name]) if batch.architecture.name in alike else batch
                )
                for name, held in pieces.items():
                    columns, values = _from_weights(name, other if name in NORMALIZED else batch)
                    held.append(_Piece(start + rows[rows >= 0], columns, values[rows >= 0]))
        for name, held in pieces.items():
            noted = notes if name in NORMALIZED else []
            found[name] = _or_reason(lambda n=name, h=held, w=noted: self._join(n, h, one_layout, w))  # type: ignore[misc]
        return found

    def _normalized_alike(self, zoo: Zoo) -> dict[str, Normalization]:
        """How architectures of a zoo are normalised as the first zoo is, where they are not."""
        first = self.zoos[0].store
        assert first is not None and zoo.store is not None
        return {} if zoo is self.zoos[0] else normalizations_of(first, zoo.store)

    @property
    def _starts(self) -> list[int]:
        return np.cumsum([0, *map(len, self.zoos)])[:-1].tolist()

    def _refuse(self, name: str) -> str:
        """Why a block cannot be had of these stores; empty if it can."""
        if name == "weights":
            return self._refuse_weights()
        if name != "statistics_published":
            return ""
        layouts = {(table.token_size, table.layout) for zoo in self.zoos for table in zoo.tables.values()}
        if len(layouts) == 1:
            return ""
        sizes = " and ".join(f"{layout} of {size}" for size, layout in sorted(layouts))
        return (
            f"its tokens are {sizes} values, and their padding counts: prepare both stores with one "
            "--tokens.token_size and --tokens.layout"
        )

    def _refuse_weights(self) -> str:
        """Why raw weights are no features; empty if they are."""
        shapes = {tuple(layer.shape for layer in table.layers) for zoo in self.zoos for table in zoo.tables.values()}
        if len(shapes) > 1:
            return "raw weights of architectures of different shapes have no common columns"
        table = next(iter(self.zoos[0].tables.values()))
        values = sum(map(len, self.zoos)) * table.parameters
        if values > MOST_WEIGHTS:
            return (
                f"{values:,} raw weights are more than the {MOST_WEIGHTS:,} that may be features: a fit would take "
                f"{37e-9 * values:,.1f} GB"
            )
        return ""

    def _embedded(self, name: str) -> Block:
        pieces = []
        for zoo, start in zip(self.zoos, self._starts, strict=True):
            if zoo.embeddings is None:
                raise Unavailable(f"it needs embeddings of {zoo.name}: name them with --embeddings, or a --model")
            columns, values_RF = _whole(zoo.embeddings, name)
            pieces.append(_Piece(start + np.arange(len(zoo)), columns, values_RF))
        whole = self._join(name, pieces, True, [note for zoo in self.zoos if (note := _window_note(zoo, name))])
        if name == "sane_mean":
            return whole
        one_layout = _is_one([table for zoo in self.zoos for table in zoo.embedded_tables.values()])
        layers = self._join(name, list(self._layer_pieces(name)), one_layout)
        values_RF = np.concatenate([whole.values_RF, layers.values_RF], axis=1)
        return Block(name, whole.columns + layers.columns, values_RF, layers.note)

    def _layer_pieces(self, name: str) -> Iterator[_Piece]:
        for zoo, start in zip(self.zoos, self._starts, strict=True):
            assert zoo.embeddings is not None
            place = {identity: row for row, identity in enumerate(zoo.table["id"].to_pylist())}
            for architecture, table in zoo.embedded_tables.items():
                yield _layer_piece(name, zoo.embeddings, architecture, table, place, start)

    def _join(self, name: str, pieces: list[_Piece], one_layout: bool, notes: Sequence[str] = ()) -> Block:
        """Pieces of different architectures as rows of one length."""
        if not pieces:
            raise Unavailable("no architecture has any layers")
        if not one_layout and name != "weights":
            pieces = [piece.over_layers() for piece in pieces]
            notes = ["architectures differ: mean, std, min and max over layers", *notes]
        columns = pieces[0].columns if one_layout else list(dict.fromkeys(c for p in pieces for c in p.columns))
        if not columns:
            raise Unavailable("no layer has a matrix of at least 2 x 2")
        values_RF = np.full((sum(map(len, self.zoos)), len(columns)), np.nan, pieces[0].values.dtype)
        for piece in pieces:
            places = slice(None) if one_layout else [columns.index(column) for column in piece.columns]
            values_RF[piece.rows[:, None], np.arange(len(columns))[places]] = piece.values
        return Block(name, columns, values_RF, "; ".join(notes))


@dataclass(frozen=True, eq=False)
class _Piece:
    """Features of the checkpoints of one architecture; columns are called ``<layer>/<number>``."""

    rows: NDArray[np.int64]
    columns: list[str]
    values: Array

    def over_layers(self) -> _Piece:
        """Mean, deviation, minimum and maximum of each number over the layers that have it."""
        numbers = [column.rpartition("/")[2] for column in self.columns]
        columns, values = [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a number that no layer has is NaN
            for number in dict.fromkeys(numbers):
                of_layers = self.values[:, [other == number for other in numbers]]
                columns += [f"{number}, {how} of layers" for how in ("mean", "std", "min", "max")]
                values += [reduce(of_layers, axis=1) for reduce in (np.nanmean, np.nanstd, np.nanmin, np.nanmax)]
        return _Piece(self.rows, columns, np.stack(values, axis=1) if values else self.values)


def parts(name: str) -> list[str]:
    """The blocks of a feature set: those of ``sane``, and another one, in ``sane+statistics``."""
    return [block for part in name.split("+") for block in COMPOSED.get(part, (part,))]


def layout(table: LayerTable) -> tuple[tuple[str, bool, bool], ...]:
    """What two architectures must share to have the same columns: kinds, biases and matrices, layer by layer."""
    return tuple(
        (layer.kind, layer.bias_key is not None, min(layer.channels, layer.fan_in) >= 2) for layer in table.layers
    )


def embedded_as(index: Mapping[str, Any]) -> dict[str, Any]:
    """How a model has embedded networks, but for which model and networks; None for what embeddings do not say."""
    precision = index.get("settings", {}).get("precision")
    known = None if precision == "auto" else precision
    return {"window": index.get("window"), "halo": index.get("halo"), "precision": known}


def _is_one(tables: Sequence[LayerTable]) -> bool:
    """Whether all architectures have the same kinds of layers in the same order."""
    return len({layout(table) for table in tables}) == 1


def _filled(values: pa.ChunkedArray, others: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values, and where they are missing the others, if these are of their type."""
    if values.null_count == len(values):
        return others
    return pc.coalesce(values, others) if values.type == others.type else values


def _window_note(zoo: Zoo, block: str) -> str:
    """In what the published mean embedding is not the published one."""
    assert zoo.embeddings is not None
    window = zoo.embeddings.index.get("window")
    longest = max((table.num_tokens for table in zoo.embedded_tables.values()), default=0)
    if block != "sane_mean" or window is None or window >= longest:
        return ""
    return (
        f"{zoo.name} is embedded in windows of {window:,} tokens: the published protocol reads {longest:,} at once "
        f"(jobs/embed.py --embedding.window {longest})"
    )


def _from_weights(name: str, batch: Batch) -> tuple[list[str], Array]:
    return _raw(batch) if name == "weights" else FROM_WEIGHTS[name](batch)


def _raw(batch: Batch) -> tuple[list[str], Array]:
    """Normalised weights one after the other; the published W has the padding too, which is zero and changes no fit."""
    count = len(batch.checkpoints)
    layers = [batch.rows(index).reshape(count, -1) for index in range(len(batch.architecture.table.layers))]
    values = np.concatenate(layers, axis=1)
    return [str(index) for index in range(values.shape[1])], values


def _whole(embeddings: EmbeddingTables, block: str) -> tuple[list[str], Array]:
    """What a block has of whole networks: names of columns, and values [R, F]."""
    if block == "sane_shape":
        return list(SHAPE), _logarithms(embeddings.vectors("shape"))
    names = VECTORS if block == "sane_vectors" else ("mean",)
    columns = [f"{name} {index}" for name in names for index in range(embeddings.index["latent_dim"])]
    return columns, np.concatenate([embeddings.vectors(name) for name in names], axis=1)


def _logarithms(shape_X: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log10 of the numbers of ``SHAPE``, which lie along the last axis."""
    return np.log10(np.maximum(shape_X, SMALLEST))


def _layer_piece(
    block: str,
    embeddings: EmbeddingTables,
    architecture: str,
    table: LayerTable,
    place: dict[str, int],
    start: int,
) -> _Piece:
    columns: list[str] = []
    values: list[Array] = []
    ids: list[str] = []
    for name in ("shape",) if block == "sane_shape" else LAYER_SUMMARIES:
        ids, vectors_rKX = embeddings.layer_vectors(name, architecture)
        if name == "shape":
            numbers, vectors_rKX = list(SHAPE), _logarithms(vectors_rKX)
        else:
            numbers = [f"{name} {index}" for index in range(vectors_rKX.shape[2])]
        values.append(vectors_rKX.reshape(len(ids), -1))
        columns += [f"{layer.key}/layer {number}" for layer in table.layers for number in numbers]
    rows = start + np.array([place[identity] for identity in ids], np.int64)
    return _Piece(rows, columns, np.concatenate(values, axis=1))


def _or_reason(compute: Callable[[], Block]) -> Block | Unavailable:
    try:
        return compute()
    except Unavailable as reason:
        return reason
