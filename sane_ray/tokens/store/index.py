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
from sane_ray.zoo.catalog import value_columns, write_catalog


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


def write_contents(contents: Contents, folder: Path) -> None:
    """Writes the tables, and store.json last."""
    tables = {MODELS_FILE: _models(contents), SEGMENTS_FILE: _segments(contents)}
    if contents.aligned.references:
        tables[ALIGNMENT_FILE] = contents.aligned.table()
    for name, table in tables.items():
        pq.write_table(table, folder / name, compression="zstd")
    write_store_catalog(folder / CATALOG_FILE, contents.found, contents.inputs, contents.rows)
    files = [_described(folder, name) for name in (*tables, CATALOG_FILE)]
    index = json.dumps(_index(contents, files), indent=1)
    (folder / INDEX_FILE).write_text(index, encoding="utf-8")


def _described(folder: Path, name: str) -> dict[str, Any]:
    return {"path": name, "bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}


def _models(contents: Contents) -> pa.Table:
    rows, inputs = contents.rows, contents.inputs
    columns = {
        "checkpoint": pa.array([row.ordinal for row in rows], pa.int32()),
        "id": pa.array([row.record.id for row in rows], pa.string()),
        "model": pa.array([row.record.model for row in rows], pa.string()),
        "epoch": pa.array([row.record.epoch for row in rows], pa.int64()),
        "split": pa.array([row.split for row in rows], pa.string()),
        "architecture": pa.array([row.architecture.name for row in rows], pa.string()),
        "parameters": pa.array([row.architecture.table.parameters for row in rows], pa.int64()),
        "tokens": pa.array([row.architecture.table.num_tokens for row in rows], pa.int64()),
        "source": pa.array([inputs.entries[row.record.id].path for row in rows], pa.string()),
        "member": pa.array([row.record.member for row in rows], pa.string()),
        "reader": pa.array([row.record.reader for row in rows], pa.string()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "license": pa.array([row.record.license for row in rows], pa.string()),
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


def write_store_catalog(path: Path, found: Found, inputs: Inputs, rows: Sequence[Row] = ()) -> None:
    """Everything that the zoo held: first what was read, then what was not wanted from the start.

    Args:
        path: The Parquet file.
        found: What pass 1 saw, and what was left out since.
        inputs: What it was asked to read.
        rows: The checkpoints of the store, if there is one.
    """
    early = dict(enumerate((reason for _, reason in inputs.unwanted), start=len(found.records)))
    reasons = found.reasons | found.unwanted | early
    records = [*found.records, *(record for record, _ in inputs.unwanted)]
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
    columns = {name: [*values, *[None] * len(inputs.unwanted)] for name, values in read.items()}
    columns["status"] = ["left out" if position in reasons else "kept" for position in range(len(records))]
    columns["reason"] = [reasons.get(position) for position in range(len(records))]
    write_catalog(path, records, columns)


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
        "left_out": {"unusable": len(found.reasons), "not wanted": len(found.unwanted) + len(inputs.unwanted)},
        "files": [*files, *contents.files],
        "inputs": {"source": str(inputs.source), "digest": inputs.digest, "tokens": inputs.settings},
    }
