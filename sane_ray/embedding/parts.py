"""What one unit of networks gives: a folder that is there when it is complete, and all of them made into the tables.

A part is written under another name and renamed, so that a run that is killed leaves whole parts and no others; those
stay until the tables are written. Its tables are Arrow files, which are read without copying them into memory. Never
runs a model, never imports Ray.

==================  ===================================================================================================
``models.arrow``    a row a checkpoint: ``row`` (which of the input's), architecture, errors, vectors
``layers.arrow``    a row a checkpoint and layer: ``row``, layer, errors, vectors
``tokens.parquet``  a row a token, where they were asked for; goes to the embeddings as it is
``part.json``       layer tables of the architectures, and checkpoints that were left out
==================  ===================================================================================================
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.embedding.encoder import SHAPE, VECTORS, Keep, Summary
from sane_ray.embedding.networks import Batch, LeftOut
from sane_ray.embedding.reading import LAYERS_FILE, MODELS_FILE, TOKENS_FOLDER
from sane_ray.tokens.layers import LayerTable

PARTS_FOLDER = "parts"
_MODELS, _LAYERS, _TOKENS, _JSON = "models.arrow", "layers.arrow", "tokens.parquet", "part.json"
_ROWS_AT_ONCE = 65536


@dataclass
class Part:
    """A part that is being made: add what batches give, then ``write`` it."""

    folder: Path
    """Its place; what is written meanwhile lies beside it."""
    latent_dim: int
    token_dtype: Literal["float16", "float32"] = "float16"
    left_out: list[LeftOut] = field(default_factory=list)
    _models: list[pa.Table] = field(default_factory=list)
    _layers: list[pa.Table] = field(default_factory=list)
    _architectures: dict[str, LayerTable] = field(default_factory=dict)
    _tokens: pq.ParquetWriter | None = None

    def __post_init__(self) -> None:
        self._partial = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex[:8]}")
        self._partial.mkdir(parents=True)

    def add(self, batch: Batch, summary: Summary) -> None:
        """Takes the summary of a batch."""
        self._architectures[batch.prepared.name] = batch.prepared.table
        self._models.append(_models(batch, summary, self.latent_dim))
        self._layers.append(_layers(batch, summary, self.latent_dim))

    def keeper(self, batch: Batch) -> Keep:
        """What writes the embeddings of a batch's tokens."""

        def keep(first: int, z_RnL: Tensor) -> None:
            for identifier, z_nL in zip(batch.ids, z_RnL, strict=True):
                self._keep(_tokens(identifier, first, z_nL, batch.prepared.table, self.token_dtype))

        return keep

    def discard(self, batch: Batch, reason: str) -> None:
        """Leaves out a batch that could not be read to its end, and takes back what was kept of its tokens."""
        self.left_out += [LeftOut(row, reason) for row in batch.rows]
        if self._tokens is None:
            return
        self._tokens.close()
        self._tokens, before = None, self._partial / f"{_TOKENS}.before"
        (self._partial / _TOKENS).rename(before)
        with pq.ParquetFile(before) as kept:
            for number in range(kept.num_row_groups):  # each of one network
                table = kept.read_row_group(number)
                if table["id"][0].as_py() not in batch.ids:
                    self._keep(table)
        before.unlink()

    def _keep(self, tokens: pa.Table) -> None:
        if self._tokens is None:
            self._tokens = pq.ParquetWriter(self._partial / _TOKENS, tokens.schema, compression="none")
        self._tokens.write_table(tokens)

    def write(self) -> None:
        """Puts the part in its place; another that is already there is the same, and stays."""
        if self._tokens is not None:
            self._tokens.close()
        for name, tables in ((_MODELS, self._models), (_LAYERS, self._layers)):
            if tables:
                table = pa.concat_tables(tables)
                with pa.OSFile(str(self._partial / name), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table.combine_chunks())
        content = {
            "left_out": {str(one.row): one.reason for one in self.left_out},
            "architectures": {name: table.to_dict() for name, table in self._architectures.items()},
        }
        (self._partial / _JSON).write_text(json.dumps(content), encoding="utf-8")
        try:
            self._partial.rename(self.folder)
        except OSError:
            if not self.folder.is_dir():
                raise
            shutil.rmtree(self._partial)

    def drop(self) -> None:
        """Deletes what is not in its place."""
        if self._tokens is not None and self._tokens.is_open:
            self._tokens.close()
        shutil.rmtree(self._partial, ignore_errors=True)


@dataclass(frozen=True)
class Gathered:
    """All parts as tables."""

    rows: NDArray[np.int64]
    """Of the input's checkpoints, those that were embedded, in order."""
    left_out: dict[int, str]
    """Those that were not, and why."""
    architectures: dict[str, dict[str, Any]]
    """By name, the layer table as it says itself."""
    trained_on: dict[str, bool]
    layers: int
    """Rows of layers.parquet."""


def part_folder(output: Path, number: int) -> Path:
    """Where the part of a unit lies."""
    return output / PARTS_FOLDER / f"{number:06d}"


def gather(output: Path, numbers: Sequence[int], known: Callable[[NDArray[np.int64]], dict[str, Any]]) -> Gathered:
    """Writes models.parquet and layers.parquet from the parts, and moves the tokens; can be done again.

    Args:
        output: Folder of the embeddings.
        numbers: Of the units.
        known: Gives what the input says of some of its checkpoints: columns, among them ``id``.
    """
    parts = [part_folder(output, number) for number in numbers]
    said = [json.loads((part / _JSON).read_text(encoding="utf-8")) for part in parts]
    left_out = {int(row): reason for part in said for row, reason in part["left_out"].items()}
    architectures = {name: table for part in said for name, table in part["architectures"].items()}
    _move_tokens(parts, output / TOKENS_FOLDER)
    models = [_mapped(part / _MODELS) for part in parts if (part / _MODELS).exists()]
    if not models:
        return Gathered(np.empty(0, np.int64), left_out, {}, {}, 0)
    table = pa.concat_tables(models).sort_by("row")
    rows = table["row"].to_numpy()
    columns = known(rows)
    own = {name: table[name] for name in table.column_names if name != "row"}
    names = [name for name in columns if not name.startswith("property.")]
    ordered = [*names, "architecture", "trained_on", "parameters", "tokens"]
    ordered += [name for name in columns if name not in names]
    everything = columns | own
    ordered += [name for name in own if name not in ordered]
    pq.write_table(pa.table({name: everything[name] for name in ordered}), output / MODELS_FILE, compression="zstd")
    names_of = pa.chunked_array([columns["id"]]) if isinstance(columns["id"], pa.Array) else columns["id"]
    layers = _write_layers(parts, output / LAYERS_FILE, rows, names_of)
    trained = dict(zip(table["architecture"].to_pylist(), table["trained_on"].to_pylist(), strict=True))
    return Gathered(rows, left_out, architectures, trained, layers)


def _write_layers(parts: Sequence[Path], path: Path, rows: NDArray[np.int64], ids: pa.ChunkedArray) -> int:
    """Layers of all checkpoints in their order, some at a time: the tables of the parts are never all in memory."""
    tables = [_mapped(part / _LAYERS) for part in parts if (part / _LAYERS).exists()]
    row, layer = (np.concatenate([table[name].to_numpy() for table in tables]) for name in ("row", "layer"))
    order = np.lexsort((layer, row))
    starts = np.cumsum([0, *map(len, tables)])
    with pq.ParquetWriter(path, _with_ids(tables[0].slice(0, 0), rows, ids).schema, compression="zstd") as writer:
        for begin in range(0, len(order), _ROWS_AT_ONCE):
            writer.write_table(_with_ids(_taken(tables, starts, order[begin : begin + _ROWS_AT_ONCE]), rows, ids))
    return len(order)


def _taken(tables: Sequence[pa.Table], starts: NDArray[np.int64], places: NDArray[np.int64]) -> pa.Table:
    """Rows of the tables one after the other; ``starts`` says where each begins."""
    table_of = np.searchsorted(starts, places, side="right") - 1
    by_table = np.argsort(table_of, kind="stable")
    taken = [
        tables[number].take(places[by_table][table_of[by_table] == number] - starts[number])
        for number in np.unique(table_of)
    ]
    return pa.concat_tables(taken).take(np.argsort(by_table))


def _with_ids(layers: pa.Table, rows: NDArray[np.int64], ids: pa.ChunkedArray) -> pa.Table:
    """The id of the checkpoint in place of its row."""
    return layers.set_column(0, "id", ids.take(np.searchsorted(rows, layers["row"].to_numpy())))


def _move_tokens(parts: Sequence[Path], folder: Path) -> None:
    for number, part in enumerate(parts):
        if (part / _TOKENS).exists():
            folder.mkdir(exist_ok=True)
            (part / _TOKENS).rename(folder / f"part-{number:05d}.parquet")


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _models(batch: Batch, summary: Summary, latent_dim: int) -> pa.Table:
    count, prepared = len(batch.rows), batch.prepared
    columns: dict[str, Any] = {
        "row": pa.array(batch.rows, pa.int64()),
        "architecture": pa.array([prepared.name] * count),
        "trained_on": pa.array([prepared.trained_on] * count),
        "parameters": pa.array([prepared.table.parameters] * count, pa.int64()),
        "tokens": pa.array([prepared.table.num_tokens] * count, pa.int64()),
    }
    return pa.table(columns | _values(summary, slice(0, 1), latent_dim))


def _layers(batch: Batch, summary: Summary, latent_dim: int) -> pa.Table:
    layers, count = batch.prepared.table.layers, len(batch.rows)
    columns: dict[str, Any] = {
        "row": pa.array(np.repeat(batch.rows, len(layers)), pa.int64()),
        "layer": pa.array(np.tile(np.arange(len(layers), dtype=np.int32), count)),
        "name": pa.array([layer.key for layer in layers] * count),
        "kind": pa.array([layer.kind for layer in layers] * count),
        "tokens": pa.array([layer.num_tokens for layer in layers] * count, pa.int64()),
    }
    return pa.table(columns | _values(summary, slice(1, None), latent_dim))


def _values(summary: Summary, groups: slice, latent_dim: int) -> dict[str, Any]:
    """Errors and vectors of the groups of every network, one after the other."""
    columns: dict[str, Any] = {}
    size = summary.vectors["mean"][:, groups].shape[0] * summary.vectors["mean"][:, groups].shape[1]
    for name, errors in (("reconstruction_mse", summary.mse), ("explained_variance", summary.explained_variance)):
        values = np.full(size, np.nan) if errors is None else errors[:, groups].reshape(-1)
        columns[name] = pa.array(values, pa.float64(), mask=np.isnan(values))
    for name in VECTORS:
        flat = np.ascontiguousarray(summary.vectors[name][:, groups]).reshape(-1)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), latent_dim)
    flat = np.ascontiguousarray(summary.shape[:, groups]).reshape(-1)
    return columns | {"shape": pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), len(SHAPE))}


def _tokens(identifier: str, first: int, z_nL: Tensor, table: LayerTable, dtype: str) -> pa.Table:
    count, size = z_nL.shape
    places = table.positions_of(first, first + count)
    flat = z_nL.cpu().numpy().astype(dtype).reshape(-1)
    return pa.table(
        {
            "id": pa.array([identifier] * count),
            "token": pa.array(places[:, 0].astype(np.int64)),
            "layer": pa.array(np.ascontiguousarray(places[:, 1])),
            "channel": pa.array(np.ascontiguousarray(places[:, 2])),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat), size),
        }
    )
