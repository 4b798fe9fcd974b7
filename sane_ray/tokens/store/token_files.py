"""Pass 2 over a zoo: one Parquet file of tokens, a row group at a time.

Memory is bounded by a row group, however large the models are. Plain functions of plain data:
``sane_ray.tokens.store.writing`` runs them in Ray tasks. Never imports Ray.

Shape suffixes: N tokens of a segment, T token size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.store.inputs import look
from sane_ray.tokens.store.inspection import why
from sane_ray.tokens.store.reading import (
    ALIGNMENT_FILE,
    RAW_DTYPES,
    Architecture,
    Dtype,
    Segment,
    read_alignments,
    to_stored,
)
from sane_ray.tokens.symmetry import permute
from sane_ray.tokens.tokenizer import LayerTable, tokenize_range
from sane_ray.zoo.catalog import open_record
from sane_ray.zoo.checkpoint import Checkpoint, LoadedCheckpoint
from sane_ray.zoo.readers import Record

_BYTES_AT_ONCE = 2**24
"""Tokens (float32) that are made at once."""


@dataclass(frozen=True)
class Job:
    """One segment to write."""

    segment: Segment
    record: Record
    size: int
    """Of the file when it was inspected."""
    mtime_ns: int
    architecture: str
    scale: list[float] | None
    """For l2 normalisation: the checkpoint's own norms."""
    aligned: bool
    """Whether its model is reordered, as the store's alignment.parquet says."""


@dataclass(frozen=True)
class FileJob:
    """One token file to write."""

    file: str
    groups: list[list[Job]]


@dataclass(frozen=True)
class Settings:
    """What all token files of a store have in common."""

    folder: str
    dtype: Dtype
    architectures: list[dict[str, Any]]


def write_part(job: FileJob, settings: Settings) -> dict[str, Any]:
    """Writes one token file. A second try after a lost worker writes the same file again.

    Returns:
        Its ``path``, ``bytes``, ``rows`` and ``row_groups``, or under ``error`` the sentence that says what is wrong.
    """
    path = Path(settings.folder, job.file)
    try:
        source = _Source(job, settings)
        written = write_token_file(path, ([source.segment(one) for one in group] for group in job.groups))
    except InputError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{path}: cannot be written ({error}); free some space, or name another --store"}
    return {"path": job.file, "bytes": path.stat().st_size, **written}


class _Source:
    """The segments of one file, made from their checkpoints."""

    def __init__(self, job: FileJob, settings: Settings) -> None:
        self._architectures = {data["name"]: Architecture.from_dict(data) for data in settings.architectures}
        self._dtype = settings.dtype
        models = {one.record.model for group in job.groups for one in group if one.aligned}
        self._alignments = read_alignments(Path(settings.folder, ALIGNMENT_FILE), list(models)) if models else {}
        self._opened: tuple[int, Checkpoint] | None = None

    def segment(self, job: Job) -> tuple[Segment, LayerTable, NDArray[Any]]:
        """One segment: which, its layer table, and its normalised values as they are stored, [N, T].

        Raises:
            InputError: The checkpoint has changed since it was inspected, or cannot be read any more.
        """
        architecture, (_, first, tokens) = self._architectures[job.architecture], job.segment
        table, checkpoint = architecture.table, self._open(job, architecture)
        scale = None if job.scale is None else torch.tensor(job.scale, dtype=torch.float32)
        values_NT = np.empty((tokens, table.token_size), RAW_DTYPES[self._dtype])
        buffer_NT: Tensor | None = None
        for start, stop in _ranges(first, first + tokens, table.token_size):
            if buffer_NT is None or len(buffer_NT) != stop - start:
                buffer_NT = torch.empty(stop - start, table.token_size)
            tokenize_range(checkpoint.read, table, start, stop, out=buffer_NT)
            architecture.normalization.normalize(buffer_NT, table, start, scale, out=buffer_NT)
            values_NT[start - first : stop - first] = to_stored(buffer_NT, self._dtype)
        return job.segment, table, values_NT

    def _open(self, job: Job, architecture: Architecture) -> Checkpoint:
        """The checkpoint of a segment; the one before is kept, since some files are read whole when they are opened."""
        ordinal = job.segment.checkpoint
        if self._opened is not None and self._opened[0] == ordinal:
            return self._opened[1]
        self._opened = None  # before the next is there
        checkpoint = _unchanged(job)
        if job.aligned:
            permutations = self._alignments[job.record.model, job.architecture]
            weights = permute(checkpoint.state_dict(), architecture.symmetry, permutations)
            checkpoint = LoadedCheckpoint(checkpoint.path, weights)
        self._opened = ordinal, checkpoint
        return checkpoint


def _unchanged(job: Job) -> Checkpoint:
    try:
        if look(job.record.path) == (job.size, job.mtime_ns):
            return open_record(job.record)
    except Exception as error:
        raise InputError(f"{job.record.path}: {why(error, job.record)}") from error
    raise InputError(
        f"{job.record.path}: changed while the store was being written; run again when the zoo is complete"
    )


def _ranges(first: int, stop: int, token_size: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BYTES_AT_ONCE // (4 * token_size))
    return ((start, min(start + step, stop)) for start in range(first, stop, step))


def write_token_file(
    path: Path, groups: Iterable[Sequence[tuple[Segment, LayerTable, NDArray[Any]]]]
) -> dict[str, int]:
    """Writes one Parquet file of tokens, a row group at a time, and sees it to the disk.

    Values are one column of fixed-size binary, uncompressed and without dictionary: float weights neither repeat nor
    shrink, and so a reader gets them as one buffer. The integer columns are dictionary-encoded, a few bits a row.

    Args:
        path: The file.
        groups: For each row group its segments: which, layer table, and stored values [N, T] (``to_stored``).

    Returns:
        Its ``rows`` and ``row_groups``.
    """
    writer: pq.ParquetWriter | None = None
    rows = row_groups = 0
    with path.open("wb") as file:
        try:
            for group in groups:
                table = _token_table(group)
                if writer is None:
                    plain = [name for name in table.column_names if name != "values"]
                    writer = pq.ParquetWriter(
                        file, table.schema, compression="none", use_dictionary=plain, write_statistics=plain
                    )
                writer.write_table(table, row_group_size=len(table))
                rows, row_groups = rows + len(table), row_groups + 1
        finally:
            if writer is not None:
                writer.close()
        file.flush()
        os.fsync(file.fileno())
    return {"rows": rows, "row_groups": row_groups}


def _token_table(group: Sequence[tuple[Segment, LayerTable, NDArray[Any]]]) -> pa.Table:
    """The rows of one row group: a chunk a segment, each a view of its values."""
    chunks = []
    for (ordinal, first, tokens), table, values_NT in group:
        places = table.positions_of(first, first + tokens)
        columns = [np.full(tokens, ordinal, np.int32), *places.T, table.signal_of(first, first + tokens)]
        arrays = [pa.array(np.ascontiguousarray(column, np.int32)) for column in columns]
        width = values_NT.shape[1] * values_NT.itemsize
        buffer = pa.py_buffer(np.ascontiguousarray(values_NT))
        arrays.append(pa.Array.from_buffers(pa.binary(width), tokens, [None, buffer]))
        chunks.append(pa.record_batch(arrays, names=["checkpoint", "index", "layer", "channel", "signal", "values"]))
    return pa.Table.from_batches(chunks)
