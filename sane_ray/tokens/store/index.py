"""The tables beside the tokens: models, segments, catalog, alignment, and store.json, which makes a store complete.

Plain functions of what the writer decided; never reads weights, never imports Ray.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sane_ray import __version__
from sane_ray.tokens.store.aligning import Aligned
from sane_ray.tokens.store.inputs import Inputs
from sane_ray.tokens.store.inspection import Found
from sane_ray.tokens.store.layout import Part, Row, l2_scale
from sane_ray.tokens.store.reading import (
    ALIGNMENT_FILE,
    CATALOG_FILE,
    FORMAT,
    INDEX_FILE,
    MODELS_FILE,
    SEGMENTS_FILE,
    SPLITS,
    VERSION,
    Architecture,
    file_digest,
    json_digest,
)
from sane_ray.zoo import foreign
from sane_ray.zoo.catalog import value_columns, write_catalog
from sane_ray.zoo.readers import Record
from sane_ray.zoo.tables import clean_text, text_column


@dataclass(frozen=True)
class Contents:
    """All that a store holds beside the tokens themselves."""

    rows: Sequence[Row]
    parts: Sequence[Part]
    architectures: Sequence[Architecture]
    files: Sequence[dict[str, Any]]
    """Of the tokens."""
    found: Found
    aligned: Aligned
    inputs: Inputs
    unread: Sequence[str]
    """Files that look like weights, but that the zoo's reader did not list; relative to the source."""


def write_contents(contents: Contents, folder: Path) -> None:
    """Writes the tables, and store.json last."""
    tables = {MODELS_FILE: _models(contents), SEGMENTS_FILE: _segments(contents)}
    for name, table in tables.items():
        pq.write_table(table, folder / name, compression="zstd")
    write_store_catalog(folder / CATALOG_FILE, contents.found, contents.inputs, contents.unread, contents.rows)
    aligned = [ALIGNMENT_FILE] if contents.aligned.references else []
    files = [_described(folder, name) for name in (*tables, CATALOG_FILE, *aligned)]
    index = json.dumps(_index(contents, files), indent=1)
    (folder / INDEX_FILE).write_text(index, encoding="utf-8")


def write_alignment(aligned: Aligned, folder: Path) -> None:
    """Writes the permutations, which the writing of the tokens reads; nothing if no architecture can be aligned."""
    if aligned.references:
        pq.write_table(aligned.table(), folder / ALIGNMENT_FILE, compression="zstd")


def _described(folder: Path, name: str) -> dict[str, Any]:
    return {"path": name, "bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}


def _models(contents: Contents) -> pa.Table:
    rows, inputs = contents.rows, contents.inputs
    columns = {
        "checkpoint": pa.array([row.ordinal for row in rows], pa.int32()),
        "id": text_column([row.record.id for row in rows]),
        "model": text_column([row.record.model for row in rows]),
        "epoch": pa.array([row.record.epoch for row in rows], pa.int64()),
        "split": pa.array([row.split for row in rows], pa.string()),
        "architecture": text_column([row.architecture.name for row in rows]),
        "parameters": pa.array([row.architecture.table.parameters for row in rows], pa.int64()),
        "tokens": pa.array([row.architecture.table.num_tokens for row in rows], pa.int64()),
        "source": pa.array([inputs.entries[row.record.id].path for row in rows], pa.string()),
        "member": text_column([row.record.member for row in rows]),
        "reader": pa.array([row.record.reader for row in rows], pa.string()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "license": text_column([row.record.license for row in rows]),
        "parents": pa.array([list(row.record.parents) for row in rows], pa.list_(pa.string())),
    }
    if inputs.config.normalization == "l2":
        scales = [l2_scale(contents.found.seen[row.position]) for row in rows]
        columns["model_scale"] = pa.array(scales, pa.list_(pa.float32()))
    columns |= value_columns("property", [row.record.properties for row in rows])
    columns |= value_columns("config", [row.record.config for row in rows])
    return pa.table(columns)


def _segments(contents: Contents) -> pa.Table:
    rows = []
    for part in contents.parts:
        for number, group in enumerate(part.groups):
            offset = 0
            for piece in group:
                rows.append((piece.row.ordinal, piece.first, piece.tokens, part.file, number, offset))
                offset += piece.tokens
    names = ("checkpoint", "first", "tokens", "file", "row_group", "row_offset")
    types = (pa.int32(), pa.int64(), pa.int64(), pa.string(), pa.int32(), pa.int64())
    columns = zip(*rows, strict=True)
    return pa.table({name: pa.array(values, kind) for name, values, kind in zip(names, columns, types, strict=True)})


def write_store_catalog(
    path: Path,
    found: Found,
    inputs: Inputs,
    unread: Sequence[str] = (),
    rows: Sequence[Row] = (),
    origin: str = "",
) -> None:
    """Everything that the zoo held: first what was read, then what was not wanted or not recognised from the start.

    Args:
        path: The Parquet file.
        found: What pass 1 saw, and what was left out since.
        inputs: What it was asked to read.
        unread: Files that look like weights, but that the zoo's reader did not list; relative to the source.
        rows: The checkpoints of the store, if there is one.
        origin: What was read, to be noted in a catalog that stands alone.
    """
    readers = ", ".join(sorted({record.reader for record in found.records}))
    not_read = [
        (
            Record(name, name, 0, str(inputs.source / name), reader="files"),
            known.is_not_read if (known := foreign.by_suffix(name)) else f"not read: the source was read as {readers}",
        )
        for name in map(clean_text, unread)
    ]
    early = [*inputs.unwanted, *not_read]
    reasons = found.reasons | found.unwanted
    reasons |= dict(enumerate((reason for _, reason in early), start=len(found.records)))
    records = [*found.records, *(record for record, _ in early)]
    kept = {row.position: row for row in rows}
    tables = [found.tables.get(key or "") for key in found.keys]
    read: dict[str, list[Any]] = {
        "split_taken": [kept[position].split if position in kept else None for position in range(len(found.records))],
        "architecture": [key and key[:8] for key in found.keys],
        "parameters": [table and table.parameters for table in tables],
        "sha256": [digest or None for digest in found.digests],
    }
    for column in ("path", "bytes", "mtime_ns", "metadata"):
        values = [getattr(inputs.entries[record.id], column) for record in found.records]
        read["source" if column == "path" else f"source_{column}"] = values
    columns = {name: [*values, *[None] * len(early)] for name, values in read.items()}
    columns["status"] = ["left out" if position in reasons else "kept" for position in range(len(records))]
    columns["reason"] = [reasons.get(position) for position in range(len(records))]
    write_catalog(path, records, columns, source=origin)


def _index(contents: Contents, files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    config, found, inputs = contents.inputs.config, contents.found, contents.inputs
    described = [architecture.to_dict() for architecture in contents.architectures]
    weights = [[row.record.id, row.sha256, row.split] for row in contents.rows]
    return {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"sane_ray {__version__}",
        "fingerprint": json_digest([VERSION, inputs.settings, described, weights]),
        "token_size": contents.architectures[0].table.token_size,
        "dtype": config.dtype,
        "normalization": config.normalization,
        "alignment": {"method": config.align, "references": contents.aligned.references, "seed": config.seed},
        "split": {
            "by": config.split_file or config.split_by,
            "seed": config.seed,
            "fractions": dict(zip(SPLITS, config.split, strict=True)),
        },
        "architectures": described,
        "left_out": {
            "unusable": len(found.reasons),
            "not wanted": len(found.unwanted) + len(inputs.unwanted),
            "not read": len(contents.unread),
        },
        "files": [*files, *contents.files],
        "inputs": {
            "source": str(inputs.source),
            "readers": inputs.readers,
            "digest": inputs.digest,
            "tokens": inputs.settings,
        },
    }
