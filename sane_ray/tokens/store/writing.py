"""Writes a token store from the checkpoints of a zoo, with Ray Data, in two passes over the files.

Pass 1 reads every checkpoint once: architecture, digest, ranges, statistics. The driver then leaves out what cannot be
used or is not wanted, splits by model, fits the normalisation on the training split and plans the files. If asked to,
each model is aligned to a reference. Pass 2 writes each file in one task. Plan and bytes depend on the inputs and the
config alone, never on the cluster; the memory of a task does not grow with the models.

Never leaves a half-written store: everything happens in a hidden sibling folder that is renamed at the end. Reading is
``sane_ray.tokens.store.reading``, and needs no Ray.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.store import aligning
from sane_ray.tokens.store.aligning import NOT_ALIGNED, Aligned
from sane_ray.tokens.store.audit import audit
from sane_ray.tokens.store.index import Contents, write_alignment, write_contents, write_store_catalog
from sane_ray.tokens.store.inputs import Inputs, matching
from sane_ray.tokens.store.inspection import (
    BATCH_BYTES,
    Found,
    Glance,
    Seen,
    batches,
    describe,
    inspect_batch,
    inspect_share,
    meta_of,
    shares,
    survey,
)
from sane_ray.tokens.store.layout import (
    Part,
    Row,
    arrange,
    bytes_per_token,
    check_splits,
    l2_scale,
    pass_over,
    plan,
    table_settings,
)
from sane_ray.tokens.store.partial import partial_folder
from sane_ray.tokens.store.progress_bar import progress_bar
from sane_ray.tokens.store.reading import SPLITS, Architecture, Segment, TokenStore
from sane_ray.tokens.store.token_files import FileJob, Job, Settings, write_part
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table
from sane_ray.zoo.catalog import open_record
from sane_ray.zoo.readers import Record, bare
from sane_ray.zoo.splits import assign_splits

_MAX_BLOCKS = 1000
_LARGE_AT_ONCE = 256
"""Large checkpoints whose headers the driver holds together."""
_MAX_TRIED = 20


def write_store(
    records: Sequence[Record],
    destination: str | Path,
    config: TokensConfig,
    *,
    source: str | Path,
    unread: Sequence[str] = (),
) -> TokenStore:
    """Writes the token store of a zoo; does nothing if it is there.

    Runs on the Ray that this process is connected to, or here if the zoo is small; the bytes are the same.

    Checkpoints that cannot be used (unreadable, NaN or infinite weights, values beyond the stored number format) or
    that the config does not want are left out and listed in the store's catalog.

    Args:
        records: The zoo's checkpoints.
        destination: The store's folder, on a file system that every node shares.
        config: How weights become tokens, and the layout.
        source: Folder of the zoo, for provenance; paths in the store are relative to it.
        unread: Files that look like weights, but that the zoo's reader did not list; they are named in the catalog.

    Raises:
        InputError: Too many unusable checkpoints or architectures, too few models to split, or a destination that holds
            something else or that another run is writing.
    """
    return write(Inputs.of(records, config, source), destination, unread)


def write(inputs: Inputs, destination: str | Path, unread: Sequence[str] = ()) -> TokenStore:
    """As ``write_store``, of inputs that were looked at before."""
    destination = Path(destination).expanduser().absolute()
    store = matching(inputs, destination)
    if store is not None:
        return store
    with partial_folder(destination) as folder:
        if matching(inputs, destination) is None:  # another run may have finished between the look and the lock
            _write(inputs, unread, folder)
    return TokenStore.open(destination)


def matching_store(
    records: Sequence[Record], destination: str | Path, config: TokensConfig, *, source: str | Path
) -> TokenStore | None:
    """The complete store that these inputs would give, if it is already there; needs no Ray.

    Raises:
        InputError: The destination holds a store of other inputs (says what differs), an incomplete one, or no store.
    """
    return matching(Inputs.of(records, config, source), Path(destination).expanduser().absolute())


def preview(inputs: Inputs) -> str:
    """What ``write_store`` would read and write, told from the first readable checkpoint; needs no Ray.

    Raises:
        InputError: Too few models to split, or none of the first checkpoints is readable.
    """
    config = inputs.config
    splits = Counter(assign_splits(inputs.records, config).values())
    check_splits([splits[split] for split in SPLITS], config)
    table = _first_table(inputs.records, config)
    written = bytes_per_token(table.token_size, config) * table.num_tokens * len(inputs.records) / 1e6
    left_out = f", {len(inputs.unwanted):,} more are not wanted" if inputs.unwanted else ""
    counts = ", ".join(f"{splits[split]:,} {split}" for split in SPLITS)
    return (
        f"would read {len(inputs.records):,} checkpoints of {sum(splits.values()):,} models ({counts}), "
        f"{sum(inputs.sizes) / 1e6:,.1f} MB{left_out}\n"
        f"would write about {written:,.1f} MB of {config.dtype} tokens: {table.num_tokens:,} a checkpoint, "
        f"of {table.token_size} values each, if all are usable and like the first"
    )


def audit_zoo(inputs: Inputs, catalog: str | Path, *, origin: str | Path = "", unread: Sequence[str] = ()) -> str:
    """Reads a zoo, writes its catalog and says what it holds and what a store would leave out; writes no store.

    Args:
        inputs: The zoo's checkpoints, and what a store would be made with.
        catalog: The Parquet file to write; a later ``--source``.
        origin: What was read, to be noted in the catalog; empty is the source.
        unread: Files that look like weights, but that the zoo's reader did not list.

    Raises:
        InputError: The catalog cannot be written.
    """
    found = inspect(inputs)
    pass_over(found, inputs.config)
    origin = origin or inputs.source
    write_store_catalog(Path(catalog), found, inputs, unread, origin=str(origin))
    return audit(found, inputs.unwanted, inputs.config, source=origin, sizes=inputs.sizes, unclaimed=unread)


def inspect(inputs: Inputs) -> Found:
    """Pass 1: reads every checkpoint once."""
    run = partial(_map, here=inputs.is_small)
    found = Found.nothing(inputs.records)
    settings = table_settings(inputs.config)
    large = [position for position, size in enumerate(inputs.sizes) if size > BATCH_BYTES]
    small = [position for position, size in enumerate(inputs.sizes) if size <= BATCH_BYTES]
    with progress_bar("inspect checkpoints", sum(inputs.sizes), unit="B") as progress:
        records = [bare(inputs.records[position]) for position in small]
        work = batches(records, [inputs.sizes[position] for position in small])
        for batch, (seen, tables) in zip(work, run(partial(inspect_batch, settings=settings), work), strict=True):
            positions = small[batch.first : batch.first + len(seen)]
            found.add(positions, seen, tables)
            progress.update(sum(inputs.sizes[position] for position in positions))
        for start in range(0, len(large), _LARGE_AT_ONCE):
            _inspect_large(large[start : start + _LARGE_AT_ONCE], found, settings, run, progress.update)
    return found


def _inspect_large(
    positions: Sequence[int],
    found: Found,
    settings: dict[str, Any],
    run: Callable[..., Iterator[Any]],
    advance: Callable[[float], object],
) -> None:
    """Checkpoints whose slices are read by many tasks, where the file can be read in slices."""
    records = {position: bare(found.records[position]) for position in positions}
    metas: dict[int, dict[str, Tensor]] = {}
    surveys = run(partial(survey, settings=settings), list(records.values()))
    for position, (shapes, seen, tables) in zip(positions, surveys, strict=True):
        if shapes is None:
            found.add([position], [seen], tables)
        else:
            metas[position] = meta_of(shapes)
    work = [
        share for position, meta in metas.items() for share in shares(position, bare(found.records[position]), meta)
    ]
    glances: dict[int, list[Glance]] = {position: [] for position in metas}
    for share, answer in zip(work, run(inspect_share, work), strict=True):
        if isinstance(answer, str):
            found.add([share.position], [Seen("", answer)], {})
            glances.pop(share.position, None)
        elif share.position in glances:
            glances[share.position] += answer
        advance(
            sum((piece.stop - piece.start) * metas[share.position][piece.key].element_size() for piece in share.slices)
        )
    tables_by_shape: dict[Any, LayerTable] = {}
    for position, seen_of_slices in glances.items():
        seen = describe(metas[position], seen_of_slices, settings, tables_by_shape)
        found.add([position], [seen], {table.fingerprint: table for table in tables_by_shape.values()})


def _first_table(records: Sequence[Record], config: TokensConfig) -> LayerTable:
    reason = ""
    for record in records[:_MAX_TRIED]:
        try:
            return build_layer_table(open_record(record).meta, **table_settings(config))
        except InputError as error:
            reason = reason or str(error)
    raise InputError(f"none of the first {min(len(records), _MAX_TRIED)} checkpoints can be read; the first: {reason}")


def _write(inputs: Inputs, unread: Sequence[str], folder: Path) -> None:
    """Fills the folder; store.json comes last."""
    found = inspect(inputs)
    rows, architectures = arrange(found, inputs.config)
    parts = plan(rows, inputs.config)
    aligned = _align(rows, inputs) if inputs.config.align == "weights" else NOT_ALIGNED
    write_alignment(aligned, folder)
    files = _write_parts(parts, architectures, found, aligned, inputs, folder)
    write_contents(Contents(rows, parts, architectures, files, found, aligned, inputs, unread), folder)


def _align(rows: Sequence[Row], inputs: Inputs) -> Aligned:
    chosen = aligning.references(rows, inputs.config)
    work = aligning.jobs(rows, chosen)
    alignments: aligning.Models = {}
    with progress_bar("align models", sum(len(job.records) for job in work), unit="model") as progress:
        align = partial(aligning.align, seed=inputs.config.seed)
        for result in _map(align, work, here=inputs.is_small):
            if isinstance(result, str):
                raise InputError(result)
            alignments |= result
            progress.update(len(result))
    return Aligned({name: row.record.id for name, row in chosen.items()}, dict(sorted(alignments.items())))


def _write_parts(
    parts: Sequence[Part],
    architectures: Sequence[Architecture],
    found: Found,
    aligned: Aligned,
    inputs: Inputs,
    folder: Path,
) -> list[dict[str, Any]]:
    """Pass 2. Returns the files."""
    for part in parts:
        (folder / part.file).parent.mkdir(parents=True, exist_ok=True)
    described = [architecture.to_dict() for architecture in architectures]
    settings = Settings(str(folder), inputs.config.dtype, described)
    work = [_job(part, found, aligned, inputs) for part in parts]
    files: list[dict[str, Any]] = []
    tokens = sum(job.segment.tokens for job in _segments(work))
    with progress_bar("write tokens", tokens, unit="token") as progress:
        results = _map(partial(write_part, settings=settings), work, here=inputs.is_small)
        for job, result in zip(work, results, strict=True):
            if "error" in result:
                raise InputError(result["error"])
            files.append(_arrived(folder, result))
            progress.update(sum(one.segment.tokens for one in _segments([job])))
    return files


def _segments(work: Iterable[FileJob]) -> Iterator[Job]:
    return (job for file in work for group in file.groups for job in group)


def _job(part: Part, found: Found, aligned: Aligned, inputs: Inputs) -> FileJob:
    def segment(row: Row, first: int, tokens: int) -> Job:
        entry = inputs.entries[row.record.id]
        scale = l2_scale(found.seen[row.position]) if inputs.config.normalization == "l2" else None
        return Job(
            Segment(row.ordinal, first, tokens),
            bare(row.record),
            entry.bytes,
            entry.mtime_ns,
            row.architecture.name,
            scale,
            aligned.holds(row),
        )

    return FileJob(
        part.file, [[segment(piece.row, piece.first, piece.tokens) for piece in group] for group in part.groups]
    )


def _arrived(folder: Path, file: dict[str, Any]) -> dict[str, Any]:
    path = folder / file["path"]
    if not path.is_file() or path.stat().st_size != file["bytes"]:
        raise InputError(
            f"{path} was written by another node and is not here: --store must be on a file system that all nodes share"
        )
    return file


def _map(function: Callable[[Any], Any], items: Sequence[Any], *, here: bool) -> Iterator[Any]:
    """Runs a function on each item, in this process or in Ray Data tasks; results come in the order of the items.

    Items and results travel pickled, as everything does between the processes of one cluster.
    """
    if here:
        yield from map(function, items)
        return
    import ray

    if not items:
        return
    dataset = ray.data.from_items(
        [{"item": pickle.dumps(item)} for item in items], override_num_blocks=min(len(items), _MAX_BLOCKS)
    )
    dataset.context.execution_options.preserve_order = True
    for row in dataset.map_batches(partial(_call, function=function), batch_size=1).iter_rows():
        yield pickle.loads(row["result"])


def _call(batch: dict[str, NDArray[Any]], *, function: Callable[[Any], Any]) -> dict[str, NDArray[Any]]:
    return {"result": np.array([pickle.dumps(function(pickle.loads(item))) for item in batch["item"]], dtype=object)}
