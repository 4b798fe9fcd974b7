"""Pass 1 over a zoo: what each checkpoint is, and whether it can be used.

Every tensor is read once, in slices, so that memory does not grow with the model; the slices of a large checkpoint may
be read by many tasks. Plain functions of plain data: ``sane_ray.tokens.store.writing`` runs them in Ray tasks. Never
imports Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.normalization import LayerStatistics, Moments, merge, moments
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table
from sane_ray.zoo.catalog import open_record
from sane_ray.zoo.checkpoint import Checkpoint, LoadedCheckpoint
from sane_ray.zoo.readers import Record

BATCH_CHECKPOINTS, BATCH_BYTES = 256, 64e6
"""What one task inspects. Fixed, so that sums are formed in the same order on every cluster."""

SLICE_BYTES = 2**24
"""What is read at once. Fixed, because the digest of a checkpoint is one of the digests of its slices."""

_LONGEST_REASON = 500
"""Letters: a hostile file may have names of any length."""

_RUNNING = (".running_mean", ".running_var")


class Slice(NamedTuple):
    """Flat values ``start`` to ``stop`` of a tensor."""

    key: str
    start: int
    stop: int


class Glance(NamedTuple):
    """What one slice is."""

    digest: str
    moments: Moments | None
    """None where the tensor is not floating point, or empty."""


class Seen(NamedTuple):
    """What one checkpoint is."""

    sha256: str
    """Of the weights; empty where they could not be read."""
    reason: str = ""
    """Why it cannot be used; empty where it can."""
    key: str = ""
    """Fingerprint of its architecture."""
    statistics: NDArray[np.float64] = np.empty((5, 0))
    """The fields of its ``LayerStatistics`` (mean, variance, norm, minimum, maximum), [5, layers]."""
    largest: float = 0.0
    """Size of its largest weight or bias; running statistics do not count."""


class Batch(NamedTuple):
    """Checkpoints that one task inspects: those from position ``first`` on."""

    first: int
    records: list[Record]


class Share(NamedTuple):
    """Slices of one large checkpoint that one task reads."""

    position: int
    record: Record
    slices: list[Slice]
    size: float
    """Bytes of the slices."""


@dataclass
class Found:
    """What pass 1 saw, by position of the checkpoint among the inputs; architectures by fingerprint."""

    records: list[Record]
    keys: list[str | None]
    """Fingerprint of the architecture; None for a checkpoint that is left out."""
    seen: list[Seen]
    reasons: dict[int, str] = field(default_factory=dict)
    """Why a checkpoint cannot be used."""
    unwanted: dict[int, str] = field(default_factory=dict)
    """Why a checkpoint that could be used is left out, as the config asks."""
    tables: dict[str, LayerTable] = field(default_factory=dict)

    @classmethod
    def nothing(cls, records: list[Record]) -> Found:
        """Before the first batch."""
        return cls(records, [None] * len(records), [Seen("")] * len(records))

    @property
    def digests(self) -> list[str]:
        """Of the weights; empty where they could not be read."""
        return [seen.sha256 for seen in self.seen]

    def usable(self) -> list[tuple[int, str]]:
        """Position and fingerprint of every checkpoint that is not left out."""
        return [(position, key) for position, key in enumerate(self.keys) if key is not None]

    def leave_out(self, position: int, reason: str) -> None:
        """Takes a checkpoint that cannot be used from the usable ones."""
        self.keys[position], self.reasons[position] = None, reason[:_LONGEST_REASON]

    def pass_over(self, position: int, reason: str) -> None:
        """Takes a checkpoint that is not wanted from the usable ones."""
        self.keys[position], self.unwanted[position] = None, reason

    def add(self, positions: Sequence[int], seen: Sequence[Seen], tables: Mapping[str, LayerTable]) -> None:
        """Takes in what the checkpoints at these positions are."""
        for key, table in tables.items():
            self.tables.setdefault(key, table)
        for position, one in zip(positions, seen, strict=True):
            self.seen[position] = one
            described = self.records[position].sha256
            if described is not None and one.sha256 and one.sha256 != described:
                self.leave_out(
                    position, "its weights are not those of the catalog (sha256 of its tensors); audit the zoo again"
                )
            elif one.reason:
                self.leave_out(position, one.reason)
            else:
                self.keys[position] = one.key


def batches(records: Sequence[Record], sizes: Sequence[float]) -> list[Batch]:
    """The work of pass 1 over whole checkpoints, cut into what one task does."""
    work: list[Batch] = []
    start, size = 0, 0.0
    for position, added in enumerate(sizes):
        if position > start and (size + added > BATCH_BYTES or position - start >= BATCH_CHECKPOINTS):
            work.append(Batch(start, list(records[start:position])))
            start, size = position, 0.0
        size += added
    if start < len(records):
        work.append(Batch(start, list(records[start:])))
    return work


def shares(position: int, record: Record, meta: Mapping[str, Tensor]) -> list[Share]:
    """The work of pass 1 over one large checkpoint, cut into what one task does."""
    gathered: list[list[Slice]] = []
    sizes: list[float] = []
    for piece in slices_of(meta):
        added = (piece.stop - piece.start) * meta[piece.key].element_size()
        if not gathered or sizes[-1] + added > BATCH_BYTES:
            gathered.append([])
            sizes.append(0.0)
        gathered[-1].append(piece)
        sizes[-1] += added
    return [Share(position, record, pieces, size) for pieces, size in zip(gathered, sizes, strict=True)]


def slices_of(meta: Mapping[str, Tensor]) -> list[Slice]:
    """Every tensor in pieces of at most ``SLICE_BYTES``; one empty piece for a tensor without values."""
    slices = []
    for key, value in meta.items():
        step = SLICE_BYTES // value.element_size()
        slices += [Slice(key, start, min(start + step, value.numel())) for start in range(0, value.numel() or 1, step)]
    return slices


def inspect_batch(batch: Batch, settings: Mapping[str, Any]) -> tuple[list[Seen], dict[str, LayerTable]]:
    """Reads a batch of checkpoints, each once.

    Args:
        batch: One of ``batches``.
        settings: Arguments of ``build_layer_table``.

    Returns:
        What each of them is, and their layer tables by fingerprint.
    """
    tables: dict[Any, LayerTable] = {}
    seen = [_inspect(record, tables, settings) for record in batch.records]
    return seen, {table.fingerprint: table for table in tables.values()}


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of every tensor of a checkpoint, in order: its ``meta`` in a form that travels."""


def survey(record: Record, settings: Mapping[str, Any]) -> tuple[Shapes | None, Seen, dict[str, LayerTable]]:
    """Opens a large checkpoint; inspects it at once if its file can only be read whole.

    Returns:
        Its shapes, if it can be read in slices; else None, what it is, and its layer table.
    """
    try:
        checkpoint = open_record(record)
        if checkpoint.is_lazy:
            return {key: (tuple(value.shape), value.dtype) for key, value in checkpoint.meta.items()}, Seen(""), {}
    except Exception as error:  # one odd file must not end the work on all the others
        return None, Seen("", why(error, record)), {}
    (seen,), tables = inspect_batch(Batch(0, [record]), settings)
    return None, seen, tables


def meta_of(shapes: Shapes) -> dict[str, Tensor]:
    """The tensors of a surveyed checkpoint on the meta device."""
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in shapes.items()}


def inspect_share(share: Share) -> list[Glance] | str:
    """Reads slices of a large checkpoint; a string says why that cannot be done."""
    try:
        checkpoint = open_record(share.record)
        return [glance(checkpoint, piece) for piece in share.slices]
    except Exception as error:
        return why(error, share.record)


def glance(checkpoint: Checkpoint, piece: Slice) -> Glance:
    """Reads one slice."""
    values = checkpoint.read(*piece)
    digest = hashlib.sha256(bytes_of(values)).hexdigest()
    return Glance(digest, moments(values) if values.is_floating_point() and values.numel() else None)


def _glances(checkpoint: Checkpoint) -> list[Glance]:
    """Reads a whole checkpoint, slice by slice."""
    return [glance(checkpoint, piece) for piece in slices_of(checkpoint.meta)]


def describe(
    meta: Mapping[str, Tensor],
    glances: Sequence[Glance],
    settings: Mapping[str, Any],
    tables: dict[Any, LayerTable],
) -> Seen:
    """What a checkpoint is, from its shapes and from what ``glance`` said of its slices, in their order.

    Args:
        meta: Its tensors.
        glances: One for each of ``slices_of(meta)``.
        settings: Arguments of ``build_layer_table``.
        tables: The tables built so far, by shapes; a new one is added.
    """
    sha256 = _digest(meta, glances)
    by_key: dict[str, Moments] = {}
    for piece, (_, found) in zip(slices_of(meta), glances, strict=True):
        if found is not None:
            by_key[piece.key] = merge(by_key[piece.key], found) if piece.key in by_key else found
    endless = next((key for key, found in by_key.items() if not np.isfinite([found.low, found.high]).all()), None)
    if endless is not None:
        return Seen(sha256, f"{endless} holds NaN or infinite values")
    shapes = tuple((key, tuple(value.shape), value.dtype, value.layout) for key, value in meta.items())
    try:
        if shapes not in tables:
            tables[shapes] = build_layer_table(meta, **settings)
    except InputError as error:
        return Seen(sha256, str(error))
    table = tables[shapes]
    statistics = LayerStatistics().add(by_key, table)
    rows = (statistics.mean, statistics.variance, statistics.norm, statistics.minimum, statistics.maximum)
    beyond = np.flatnonzero(np.abs(np.stack(rows[2:])).max(axis=0) > np.finfo(np.float32).max)
    if len(beyond):
        return Seen(sha256, f"{table.layers[beyond[0]].key} holds values that float32 does not")
    sizes = [max(-found.low, found.high) for key, found in by_key.items() if not f".{key}".endswith(_RUNNING)]
    return Seen(sha256, "", table.fingerprint, np.stack(rows), float(max(sizes, default=0.0)))


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Hex sha256 of keys, number formats, shapes and values, whatever the file format."""
    checkpoint = LoadedCheckpoint("", state_dict)
    return _digest(checkpoint.meta, _glances(checkpoint))


def digest_if_readable(record: Record) -> str:
    """The digest of a checkpoint's weights; empty if it cannot be read."""
    try:
        checkpoint = open_record(record)
        return _digest(checkpoint.meta, _glances(checkpoint))
    except Exception:  # whatever is wrong with it, it is not what it was
        return ""


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of flat values, without a copy where they lie in a row."""
    return values.contiguous().view(torch.uint8).numpy().data


def why(error: Exception, record: Record) -> str:
    """Why a checkpoint cannot be read, in words that do not repeat its path."""
    if isinstance(error, InputError):
        return str(error).removeprefix(f"{record.path}: ")
    return f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"


def _inspect(record: Record, tables: dict[Any, LayerTable], settings: Mapping[str, Any]) -> Seen:
    try:
        checkpoint = open_record(record)
        return describe(checkpoint.meta, _glances(checkpoint), settings, tables)
    except Exception as error:  # one odd file must not end the work on all the others
        return Seen("", why(error, record))


def _digest(meta: Mapping[str, Tensor], glances: Sequence[Glance]) -> str:
    digest = hashlib.sha256()
    for piece, (of_slice, _) in zip(slices_of(meta), glances, strict=True):
        if piece.start == 0:
            value = meta[piece.key]
            digest.update(f"{piece.key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(of_slice.encode())
    return digest.hexdigest()
