"""The networks to embed, from a token store or from checkpoints as they are: units of work, and tokens in batches.

A unit is some checkpoints that are embedded and written together; units depend on the input alone, so that a later run
has the same. Reads tokens a row group or a range at a time. Never runs a model, never imports Ray.

Shape suffixes: R networks of one architecture, N tokens of a network, T values of a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.embedding.encoder import Read, in_memory
from sane_ray.embedding.preprocessing import Prepared, Preprocessing
from sane_ray.errors import InputError
from sane_ray.tokens.layers import LayerTable
from sane_ray.tokens.normalization import Moments, merge, scale_of
from sane_ray.tokens.store.inspection import glance, slices_of, why
from sane_ray.tokens.store.reading import SPLITS, RowGroup, TokenStore, as_float32, settings_of
from sane_ray.tokens.tokenizer import tokenize, tokenize_range
from sane_ray.zoo.catalog import open_record
from sane_ray.zoo.checkpoint import Checkpoint
from sane_ray.zoo.readers import Record

UNIT_CHECKPOINTS, UNIT_BYTES = 128, 64e6
"""Most that a unit holds, and a resumed run does again; a larger checkpoint is a unit by itself."""

AtOnce = Callable[[LayerTable], int]
"""How many networks of an architecture are embedded together."""


@dataclass(frozen=True)
class Unit:
    """Checkpoints that are embedded and written together."""

    number: int
    rows: tuple[int, ...]
    """Which of the input's checkpoints."""
    groups: tuple[tuple[str, int], ...] = ()
    """Of a store: file and index of the row groups that hold them, in order of their tokens."""
    records: tuple[Record, ...] = ()
    """Of checkpoints as they are: the records of the rows."""


@dataclass(frozen=True)
class Batch:
    """Networks of one architecture that are embedded together."""

    rows: list[int]
    ids: list[str]
    prepared: Prepared
    read: Read


@dataclass(frozen=True)
class LeftOut:
    """A checkpoint that cannot be embedded, and why."""

    row: int
    reason: str


class Unreadable(Exception):
    """A checkpoint that broke off while its tokens were read; the message says why, without its path."""


class Networks(Protocol):
    """Where tokens come from."""

    def batches(self, unit: Unit, at_once: AtOnce) -> Iterator[Batch | LeftOut]:
        """The networks of a unit, ready to embed."""
        ...


# --- From a token store -----------------------------------------------------------------------------------------------


def units_of_store(store: TokenStore) -> list[Unit]:
    """Runs of the checkpoints of a row group; a checkpoint of several row groups is a unit."""
    units: list[Unit] = []
    large: dict[int, list[tuple[str, int]]] = {}
    for group in (group for split in SPLITS for group in store.row_groups(split)):
        place = (group.file, group.index)
        first = group.segments[0]
        if first.tokens != store.architecture_of(first.checkpoint).table.num_tokens:
            large.setdefault(first.checkpoint, []).append(place)
            continue
        rows = [segment.checkpoint for segment in group.segments]
        for begin in range(0, len(rows), UNIT_CHECKPOINTS):
            units.append(Unit(len(units), tuple(rows[begin : begin + UNIT_CHECKPOINTS]), (place,)))
    for checkpoint, places in large.items():
        units.append(Unit(len(units), (checkpoint,), tuple(places)))
    return units


class StoredNetworks:
    """Networks of a token store, whose tokens are already normalised as in training, or are made so."""

    def __init__(self, store: TokenStore, preprocessing: Preprocessing) -> None:
        self._store = store
        self._prepared = prepared_of_store(store, preprocessing)
        self._groups = {(group.file, group.index): group for split in SPLITS for group in self._store.row_groups(split)}
        self._ids = store.models["id"]

    def batches(self, unit: Unit, at_once: AtOnce) -> Iterator[Batch | LeftOut]:
        """See ``Networks``."""
        by_architecture: dict[str, list[int]] = {}
        for row in unit.rows:
            by_architecture.setdefault(self._store.architecture_of(row).name, []).append(row)
        groups = [self._groups[place] for place in unit.groups]
        for name, rows in by_architecture.items():
            prepared = self._prepared[name]
            if isinstance(prepared, str):
                yield from (LeftOut(row, prepared) for row in rows)
            elif len(groups) > 1:
                yield self._batch(rows, prepared, _Segments(self._store, groups, self._as_prepared(rows[0], prepared)))
            else:
                yield from self._whole(rows, prepared, groups[0], at_once(prepared.table))

    def _whole(self, rows: list[int], prepared: Prepared, group: RowGroup, at_once: int) -> Iterator[Batch]:
        values = {segment.checkpoint: values for segment, values in self._store.read_row_group(group)}
        for begin in range(0, len(rows), at_once):
            some = rows[begin : begin + at_once]
            tokens = [self._as_prepared(row, prepared)(as_float32(values[row], self._store.dtype), 0) for row in some]
            yield self._batch(some, prepared, in_memory(torch.stack(tokens)))

    def _batch(self, rows: list[int], prepared: Prepared, read: Read) -> Batch:
        return Batch(rows, [self._ids[row].as_py() for row in rows], prepared, read)

    def _as_prepared(self, row: int, prepared: Prepared) -> Callable[[Tensor, int], Tensor]:
        """Makes a range of a checkpoint's stored tokens the model's, given with its first token."""
        stored, scale = prepared.stored, self._store.model_scale(row)
        if stored is None:
            return lambda tokens, start: tokens

        own = scale if prepared.normalization.mode == "l2" else None

        def again(tokens_nT: Tensor, start: int) -> Tensor:
            weights_nT = stored.denormalize(tokens_nT, prepared.table, scale, start)
            return prepared.normalization.normalize(weights_nT, prepared.table, start, own)[0]

        return again


def prepared_of_store(store: TokenStore, preprocessing: Preprocessing) -> dict[str, Prepared | str]:
    """How the model reads each architecture of a store, or why it cannot."""
    settings = settings_of(store)
    found: dict[str, Prepared | str] = {}
    for name, architecture in store.architectures.items():
        try:
            found[name] = preprocessing.of_store(architecture, settings)
        except InputError as error:
            found[name] = f"architecture {name} does not fit the model: {error}"
    return found


class _Segments:
    """Tokens of one large checkpoint, read a row group at a time; the last two are kept, as ranges overlap."""

    def __init__(
        self, store: TokenStore, groups: Sequence[RowGroup], as_prepared: Callable[[Tensor, int], Tensor]
    ) -> None:
        self._store, self._as_prepared = store, as_prepared
        self._groups = sorted(groups, key=lambda group: group.segments[0].first)
        self._values = functools.lru_cache(maxsize=2)(self._read)

    def __call__(self, start: int, stop: int) -> Tensor:
        parts = []
        for number, group in enumerate(self._groups):
            first, tokens = group.segments[0].first, group.segments[0].tokens
            begin, end = max(start, first), min(stop, first + tokens)
            if begin < end:
                parts.append(as_float32(self._values(number)[begin - first : end - first], self._store.dtype))
        return self._as_prepared(torch.cat(parts), start)[None]

    def _read(self, number: int) -> NDArray[Any]:
        return self._store.read_row_group(self._groups[number])[0][1]


# --- From checkpoints as they are -------------------------------------------------------------------------------------


def units_of_records(records: Sequence[Record], sizes: Sequence[float]) -> list[Unit]:
    """Runs of records, by the bytes of their weights."""
    units: list[Unit] = []
    start, size = 0, 0.0
    for row, added in enumerate([*sizes, float("inf")]):
        if row > start and (size + added > UNIT_BYTES or row - start == UNIT_CHECKPOINTS):
            units.append(Unit(len(units), tuple(range(start, row)), records=tuple(records[start:row])))
            start, size = row, 0.0
        size += added
    return units


class CheckpointNetworks:
    """Networks as their checkpoints hold them, preprocessed on the way as in the model's training."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        self._prepared: dict[Any, Prepared] = {}

    def batches(self, unit: Unit, at_once: AtOnce) -> Iterator[Batch | LeftOut]:
        """See ``Networks``."""
        waiting: dict[str, list[tuple[int, Record, Tensor]]] = {}
        tables: dict[str, Prepared] = {}
        for row, record in zip(unit.rows, unit.records, strict=True):
            try:
                checkpoint = open_record(record)
                prepared = self._prepare(checkpoint.meta)
                if prepared.table.num_tokens * prepared.table.token_size * 4 > UNIT_BYTES:
                    yield Batch([row], [record.id], prepared, _Ranges(record, checkpoint, prepared))
                    continue
                tokens_NT = _finite(tokenize(checkpoint.state_dict(), prepared.table))
                tokens_NT, _ = prepared.normalization.normalize(tokens_NT, prepared.table)
            except Exception as error:  # one odd file must not end the work on all the others
                yield LeftOut(row, why(error, record))
                continue
            tables[prepared.name] = prepared
            waiting.setdefault(prepared.name, []).append((row, record, tokens_NT))
            if len(waiting[prepared.name]) == at_once(prepared.table):
                yield _together(waiting.pop(prepared.name), prepared)
        yield from (_together(some, tables[name]) for name, some in waiting.items())

    def _prepare(self, meta: Mapping[str, Tensor]) -> Prepared:
        shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in meta.items())
        if shapes not in self._prepared:
            self._prepared[shapes] = self._preprocessing.of_weights(meta)
        return self._prepared[shapes]


class _Ranges:
    """Tokens of one large checkpoint, made as they are asked for.

    Raises:
        Unreadable: When it is asked: the tokens cannot be read.
    """

    def __init__(self, record: Record, checkpoint: Checkpoint, prepared: Prepared) -> None:
        self._record, self._checkpoint, self._prepared = record, checkpoint, prepared
        self._scale = _own_norms(checkpoint, prepared.table) if prepared.normalization.mode == "l2" else None

    def __call__(self, start: int, stop: int) -> Tensor:
        try:
            return self._tokens(start, stop)
        except Exception as error:  # one odd file must not end the work on all the others
            raise Unreadable(why(error, self._record)) from error

    def _tokens(self, start: int, stop: int) -> Tensor:
        table = self._prepared.table
        tokens_nT = _finite(tokenize_range(self._checkpoint.read, table, start, stop))
        return self._prepared.normalization.normalize(tokens_nT, table, start, self._scale, out=tokens_nT)[0][None]


def _own_norms(checkpoint: Checkpoint, table: LayerTable) -> Tensor:
    """The norms of a checkpoint's layers, from one pass over it."""
    found: dict[str, Moments] = {}
    for piece in slices_of(checkpoint.meta):
        moments = glance(checkpoint, piece).moments
        if moments is not None:
            found[piece.key] = merge(found.get(piece.key, Moments()), moments)
    return scale_of(found, table)


def _together(waiting: Sequence[tuple[int, Record, Tensor]], prepared: Prepared) -> Batch:
    rows, records, tokens = zip(*waiting, strict=True)
    return Batch(list(rows), [record.id for record in records], prepared, in_memory(torch.stack(tokens)))


def _finite(tokens_nT: Tensor) -> Tensor:
    if not bool(torch.isfinite(tokens_nT).all()):
        raise InputError("holds NaN or infinite values")
    return tokens_nT
