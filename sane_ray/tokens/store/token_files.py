"""Pass 2 over a zoo: one Parquet file of tokens, a row group at a time.

Memory is bounded by a row group, however large the models are. Plain functions of plain data:
``sane_ray.tokens.store.writing`` runs them in Ray tasks. Never imports Ray.

Shape suffixes: N tokens of a segment, T token size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from sane_ray.tokens.store.reading import RAW_DTYPES, Architecture, Dtype, Segment, to_stored
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
    permutations: Mapping[str, NDArray[np.int64]] | None
    """What aligns its model to the reference."""


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
    architectures = {data["name"]: Architecture.from_dict(data) for data in settings.architectures}
    path = Path(settings.folder, job.file)
    groups = (
        [
            (piece.segment, table_of(architectures, piece), stored_values(piece, architectures, settings.dtype))
            for piece in group
        ]
        for group in job.groups
    )
    try:
        written = write_token_file(path, groups)
    except InputError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{path}: cannot be written ({error}); free some space, or name another --store"}
    return {"path": job.file, "bytes": path.stat().st_size, **written}


def table_of(architectures: Mapping[str, Architecture], job: Job) -> LayerTable:
    """The layers of the checkpoint that a segment belongs to."""
    return architectures[job.architecture].table


def stored_values(job: Job, architectures: Mapping[str, Architecture], dtype: Dtype) -> NDArray[Any]:
    """Normalised values of one segment as they are stored, [N, T].

    Raises:
        InputError: The checkpoint has changed since it was inspected, or cannot be read any more.
    """
    architecture, (_, first, tokens) = architectures[job.architecture], job.segment
    checkpoint = _opened(job, architecture)
    scale = None if job.scale is None else torch.tensor(job.scale, dtype=torch.float32)
    values_NT = np.empty((tokens, architecture.table.token_size), RAW_DTYPES[dtype])
    buffer_NT: Tensor | None = None
    for start, stop in _ranges(first, first + tokens, architecture.table.token_size):
        if buffer_NT is None or len(buffer_NT) != stop - start:
            buffer_NT = torch.empty(stop - start, architecture.table.token_size)
        tokenize_range(checkpoint.read, architecture.table, start, stop, out=buffer_NT)
        architecture.normalization.normalize(buffer_NT, architecture.table, start, scale, out=buffer_NT)
        values_NT[start - first : stop - first] = to_stored(buffer_NT, dtype)
    return values_NT


def _opened(job: Job, architecture: Architecture) -> Checkpoint:
    try:
        unchanged = look(job.record.path) == (job.size, job.mtime_ns)
        checkpoint = open_record(job.record) if unchanged else None
    except Exception as error:
        raise InputError(f"{job.record.path}: {why(error, job.record)}") from error
    if checkpoint is None:
        raise InputError(
            f"{job.record.path}: changed while the store was being written; run again when the zoo is complete"
        )
    if job.permutations is None:
        return checkpoint
    return LoadedCheckpoint(checkpoint.path, permute(checkpoint.state_dict(), architecture.symmetry, job.permutations))


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
