"""Writes a token store from the checkpoints of a zoo, with Ray Data, in two passes over the files.

Pass 1 reads every checkpoint once: architecture, digest, ranges, statistics. The driver then leaves out what cannot be
used, splits by model, fits the normalisation on the training split and plans the files. Pass 2 writes each file in one
task. Plan and bytes depend on the inputs and the config alone, never on the cluster.

Never leaves a half-written store: everything happens in a hidden sibling folder that is renamed at the end. Reading is
``sane_ray.tokens.store.reading``, and needs no Ray.

Shape suffixes: N tokens of a checkpoint, T token size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray import __version__
from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.store.inputs import Entry, Inputs, matching
from sane_ray.tokens.store.inspection import Found, batches, inspect_batch, weights_digest
from sane_ray.tokens.store.layout import Part, Row, allocate, arrange, bytes_per_token, check_splits, plan
from sane_ray.tokens.store.partial import partial_folder
from sane_ray.tokens.store.progress_bar import checkpoint_bar
from sane_ray.tokens.store.reading import (
    FORMAT,
    INDEX_FILE,
    MODELS_FILE,
    SPLITS,
    VERSION,
    Architecture,
    TokenStore,
    file_digest,
    json_digest,
    to_stored,
)
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table, tokenize
from sane_ray.zoo.catalog import Record
from sane_ray.zoo.checkpoint import load_state_dict

_MAX_BLOCKS = 1000
_MAX_TRIED = 20


def write_store(
    records: Sequence[Record], destination: str | Path, config: TokensConfig, *, source: str | Path
) -> TokenStore:
    """Writes the token store of a zoo, on the Ray that this process is connected to; does nothing if it is there.

    Checkpoints that cannot be used (unreadable, NaN or infinite weights, values beyond the stored number format) are
    left out and listed in the store.

    Args:
        records: The zoo's checkpoints.
        destination: The store's folder, on a file system that every node shares.
        config: How weights become tokens, and the layout.
        source: Folder of the zoo, for provenance; paths in the store are relative to it.

    Raises:
        InputError: Too many unusable checkpoints or architectures, too few models to split, or a destination that holds
            something else or that another run is writing.
    """
    destination = Path(destination).expanduser().absolute()
    inputs = Inputs.of(records, config, source)
    store = matching(inputs, destination)
    if store is not None:
        return store
    with partial_folder(destination) as folder:
        if matching(inputs, destination) is None:  # another run may have finished between the look and the lock
            _write(inputs, folder)
    return TokenStore.open(destination)


def matching_store(
    records: Sequence[Record], destination: str | Path, config: TokensConfig, *, source: str | Path
) -> TokenStore | None:
    """The complete store that these inputs would give, if it is already there; needs no Ray.

    Raises:
        InputError: The destination holds a store of other inputs (says what differs), an incomplete one, or no store.
    """
    return matching(Inputs.of(records, config, source), Path(destination).expanduser().absolute())


def preview(records: Sequence[Record], config: TokensConfig, *, source: str | Path) -> str:
    """What ``write_store`` would read and write, told from the first readable checkpoint; needs no Ray.

    Raises:
        InputError: Too few models to split, or no readable checkpoint among the first.
    """
    inputs = Inputs.of(records, config, source)
    models = allocate(len({record.model for record in inputs.records}), config.split)
    check_splits(models, config)
    table = _first_table(inputs.records, config)
    megabytes = sum(max(entry.bytes, 0) for entry in inputs.entries.values()) / 1e6
    written = bytes_per_token(table.token_size, config) * table.num_tokens * len(inputs.records) / 1e6
    splits = ", ".join(f"{count:,} {split}" for split, count in zip(SPLITS, models, strict=True))
    return (
        f"would read {len(inputs.records):,} checkpoints of {sum(models):,} models ({splits}), {megabytes:,.1f} MB\n"
        f"would write about {written:,.1f} MB of {config.dtype} tokens: {table.num_tokens:,} of {table.token_size} "
        "values a checkpoint, if all are like the first"
    )


def _first_table(records: Sequence[Record], config: TokensConfig) -> LayerTable:
    reason = ""
    for record in records[:_MAX_TRIED]:
        try:
            weights = load_state_dict(record.path)
            return build_layer_table(weights, token_size=config.token_size, batch_norm=config.batch_norm)
        except InputError as error:
            reason = reason or str(error)
    raise InputError(f"none of the first {min(len(records), _MAX_TRIED)} checkpoints can be read; the first: {reason}")


def _write(inputs: Inputs, folder: Path) -> None:
    """Fills the folder; store.json comes last."""
    found = _inspect(inputs)
    rows, architectures = arrange(found, inputs.config)
    parts = plan(rows, inputs.config)
    files, scales = _write_parts(parts, architectures, folder, inputs.config)
    _write_models(rows, parts, scales, inputs, folder)
    _write_index(rows, architectures, files, found, inputs, folder)


def _inspect(inputs: Inputs) -> Found:
    """Pass 1."""
    found = Found.nothing(inputs.records)
    paths = [record.path for record in inputs.records]
    work = batches(paths, [entry.bytes for entry in inputs.entries.values()])
    settings = {"token_size": inputs.config.token_size, "batch_norm": inputs.config.batch_norm}
    with checkpoint_bar("inspect checkpoints", len(paths)) as progress:
        for result in _map(inspect_batch, work, settings):
            found.add(result)
            progress.update(len(result["checkpoints"]))
    return found


def _write_parts(
    parts: Sequence[Part], architectures: Sequence[Architecture], folder: Path, config: TokensConfig
) -> tuple[list[dict[str, Any]], dict[int, list[float]]]:
    """Pass 2. Returns the files, and for l2 each checkpoint's own norms by ordinal."""
    for part in parts:
        (folder / part.file).parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "folder": str(folder),
        "dtype": config.dtype,
        "architectures": [architecture.to_dict() for architecture in architectures],
    }
    files: list[dict[str, Any]] = []
    scales: dict[int, list[float]] = {}
    with checkpoint_bar("write token files", sum(len(group) for part in parts for group in part.groups)) as progress:
        for result in _map(_write_part, [_task(part) for part in parts], settings):
            if "error" in result:
                raise InputError(result["error"])
            files.append(_arrived(folder, result["file"]))
            scales |= {int(ordinal): scale for ordinal, scale in result["scales"].items()}
            progress.update(result["checkpoints"])
    return files, scales


def _task(part: Part) -> dict[str, Any]:
    members = [
        [(row.ordinal, row.record.path, row.sha256, row.architecture.name) for row in group] for group in part.groups
    ]
    return {"file": part.file, "groups": members}


def _arrived(folder: Path, file: dict[str, Any]) -> dict[str, Any]:
    path = folder / file["path"]
    if not path.is_file() or path.stat().st_size != file["bytes"]:
        raise InputError(
            f"{path} was written by another node and is not here: --store must be on a file system that all nodes share"
        )
    return file


def _write_part(task: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Writes one token file; runs in a Ray task. A second try after a lost worker writes the same file again."""
    architectures = {data["name"]: Architecture.from_dict(data) for data in settings["architectures"]}
    path = Path(settings["folder"], task["file"])
    scales: dict[int, list[float]] = {}

    def load(ordinal: int, source: str, sha256: str, name: str) -> tuple[int, LayerTable, NDArray[Any]]:
        table, normalization = architectures[name].table, architectures[name].normalization
        state_dict = load_state_dict(source)
        if weights_digest(state_dict) != sha256:
            raise InputError(f"{source}: changed while the store was being written; run again when the zoo is complete")
        tokens_NT, scale = normalization.normalize(tokenize(state_dict, table), table)
        if scale is not None:
            scales[ordinal] = scale.tolist()
        return ordinal, table, to_stored(tokens_NT, settings["dtype"])

    try:
        written = write_token_file(path, ([load(*member) for member in group] for group in task["groups"]))
    except InputError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{path}: cannot be written ({error}); free some space, or name another --store"}
    return {
        "file": {"path": task["file"], "bytes": path.stat().st_size, **written},
        "checkpoints": sum(len(group) for group in task["groups"]),
        "scales": scales,
    }


def write_token_file(path: Path, groups: Iterable[Sequence[tuple[int, LayerTable, NDArray[Any]]]]) -> dict[str, int]:
    """Writes one Parquet file of tokens, a row group at a time.

    Values are one column of fixed-size binary, uncompressed and without dictionary: float weights neither repeat nor
    shrink, and so a reader gets them as one buffer. The integer columns are dictionary-encoded, a few bits a row.

    Args:
        path: The file.
        groups: For each row group its checkpoints: ordinal, layer table, and stored values [N, T] (``to_stored``).

    Returns:
        Its ``rows`` and ``row_groups``.
    """
    writer: pq.ParquetWriter | None = None
    rows = row_groups = 0
    try:
        for group in groups:
            table = _token_table(group)
            if writer is None:
                plain = [name for name in table.column_names if name != "values"]
                writer = pq.ParquetWriter(
                    path, table.schema, compression="none", use_dictionary=plain, write_statistics=plain
                )
            writer.write_table(table, row_group_size=len(table))
            rows, row_groups = rows + len(table), row_groups + 1
    finally:
        if writer is not None:
            writer.close()
    return {"rows": rows, "row_groups": row_groups}


def _token_table(group: Sequence[tuple[int, LayerTable, NDArray[Any]]]) -> pa.Table:
    """The rows of one row group: a chunk a checkpoint, each a view of its values."""
    chunks = []
    for ordinal, table, values_NT in group:
        positions = table.positions
        columns = [np.full(table.num_tokens, ordinal, np.int32), *positions.T, table.signal_counts]
        arrays = [pa.array(np.ascontiguousarray(column, np.int32)) for column in columns]
        width = values_NT.shape[1] * values_NT.itemsize
        buffer = pa.py_buffer(np.ascontiguousarray(values_NT))
        arrays.append(pa.Array.from_buffers(pa.binary(width), table.num_tokens, [None, buffer]))
        chunks.append(pa.record_batch(arrays, names=["checkpoint", "index", "layer", "channel", "signal", "values"]))
    return pa.Table.from_batches(chunks)


def _write_models(
    rows: Sequence[Row], parts: Sequence[Part], scales: Mapping[int, Sequence[float]], inputs: Inputs, folder: Path
) -> None:
    places = _places(parts)
    entries = [inputs.entries[row.record.id] for row in rows]
    columns = {
        "checkpoint": pa.array([row.ordinal for row in rows], pa.int32()),
        "id": pa.array([row.record.id for row in rows], pa.string()),
        "model": pa.array([row.record.model for row in rows], pa.string()),
        "epoch": pa.array([row.record.epoch for row in rows], pa.int64()),
        "split": pa.array([row.split for row in rows], pa.string()),
        "architecture": pa.array([row.architecture.name for row in rows], pa.string()),
        "parameters": pa.array([row.architecture.table.parameters for row in rows], pa.int64()),
        "tokens": pa.array([row.architecture.table.num_tokens for row in rows], pa.int64()),
        "file": pa.array([places[row.ordinal][0] for row in rows], pa.string()),
        "row_group": pa.array([places[row.ordinal][1] for row in rows], pa.int32()),
        "row_offset": pa.array([places[row.ordinal][2] for row in rows], pa.int64()),
        "source": pa.array([entry.path for entry in entries], pa.string()),
        "source_bytes": pa.array([entry.bytes for entry in entries], pa.int64()),
        "source_mtime_ns": pa.array([entry.mtime_ns for entry in entries], pa.int64()),
        "source_metadata": pa.array([entry.metadata for entry in entries], pa.string()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "license": pa.array([row.record.license for row in rows], pa.string()),
    }
    if scales:
        columns["model_scale"] = pa.array([scales[row.ordinal] for row in rows], pa.list_(pa.float32()))
    columns |= _value_columns("property", [row.record.properties for row in rows])
    columns |= _value_columns("config", [row.record.config for row in rows])
    pq.write_table(pa.table(columns), folder / MODELS_FILE, compression="zstd")


def _places(parts: Sequence[Part]) -> dict[int, tuple[str, int, int]]:
    """File, row group and first row in it of each checkpoint, by ordinal."""
    places: dict[int, tuple[str, int, int]] = {}
    for part in parts:
        for number, group in enumerate(part.groups):
            offset = 0
            for row in group:
                places[row.ordinal] = (part.file, number, offset)
                offset += row.architecture.table.num_tokens
    return places


def _value_columns(prefix: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """One column for each key that any row has; null where a row lacks it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {f"{prefix}.{key}": _value_column([row.get(key) for row in rows]) for key in keys}


def _value_column(values: Sequence[Any]) -> pa.Array:
    """Booleans, integers or floats where all values are such (integers among floats become floats), else strings."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if kinds and kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([_text(value) for value in values], pa.string())


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _write_index(
    rows: Sequence[Row],
    architectures: Sequence[Architecture],
    files: Sequence[dict[str, Any]],
    found: Found,
    inputs: Inputs,
    folder: Path,
) -> None:
    config, models = inputs.config, folder / MODELS_FILE
    described = [architecture.to_dict() for architecture in architectures]
    contents = [[row.record.id, row.sha256, row.split] for row in rows]
    index = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"sane_ray {__version__}",
        "fingerprint": json_digest([VERSION, inputs.settings, described, contents]),
        "token_size": architectures[0].table.token_size,
        "dtype": config.dtype,
        "normalization": config.normalization,
        "split": {"seed": config.seed, "fractions": dict(zip(SPLITS, config.split, strict=True))},
        "architectures": described,
        "skipped": [_skipped(found, position, inputs) for position in sorted(found.reasons)],
        "files": [{"path": MODELS_FILE, "bytes": models.stat().st_size, "sha256": file_digest(models)}, *files],
        "inputs": {"source": str(inputs.source), "digest": inputs.digest, "tokens": inputs.settings},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _skipped(found: Found, position: int, inputs: Inputs) -> dict[str, Any]:
    record = found.records[position]
    entry: Entry = inputs.entries[record.id]
    return {
        "id": record.id,
        "reason": found.reasons[position],
        "sha256": found.digests[position],
        "source": entry.path,
        "source_bytes": entry.bytes,
        "source_mtime_ns": entry.mtime_ns,
        "source_metadata": entry.metadata,
    }


def _map(
    function: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    items: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Runs ``function(item, settings)`` on each item in Ray Data tasks; results come in the order of the items."""
    import ray

    dataset = ray.data.from_items(
        [{"item": json.dumps(item)} for item in items], override_num_blocks=min(len(items), _MAX_BLOCKS)
    )
    dataset.context.execution_options.preserve_order = True
    mapped = dataset.map_batches(partial(_call, function=function, settings=settings), batch_size=1)
    for row in mapped.iter_rows():
        yield json.loads(row["result"])


def _call(
    batch: dict[str, NDArray[Any]], *, function: Callable[..., dict[str, Any]], settings: Mapping[str, Any]
) -> dict[str, list[str]]:
    return {"result": [json.dumps(function(json.loads(str(item)), settings)) for item in batch["item"]]}
