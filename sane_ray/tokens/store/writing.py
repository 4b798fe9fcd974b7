"""Writes a token store from the checkpoints of a zoo, with Ray Data, in two passes over the files.

Pass 1 reads every checkpoint once: architecture, digest, ranges, statistics. The driver then leaves out what cannot be
used or is not wanted, splits by model, fits the normalisation on the training split and plans the files. If asked to,
each model is aligned to a reference. Pass 2 writes each file in one task. Plan and bytes depend on the inputs and the
config alone, never on the cluster; the memory of a task does not grow with the models.

Never leaves a half-written store: everything happens in a hidden sibling folder that is renamed at the end. Reading is
``sane_ray.tokens.store.reading``, and needs no Ray.
"""

from __future__ import annotations

import itertools
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
from sane_ray.tokens.alignment import Alignment
from sane_ray.tokens.store import aligning
from sane_ray.tokens.store.aligning import NOT_ALIGNED, Aligned
from sane_ray.tokens.store.audit import audit
from sane_ray.tokens.store.index import Contents, write_contents, write_store_catalog
from sane_ray.tokens.store.inputs import Inputs, matching
from sane_ray.tokens.store.inspection import (
    BATCH_BYTES,
    Found,
    Seen,
    batches,
    describe,
    inspect_batch,
    inspect_share,
    shares,
    why,
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
from sane_ray.tokens.store.progress_bar import checkpoint_bar
from sane_ray.tokens.store.reading import SPLITS, Architecture, Segment, TokenStore
from sane_ray.tokens.store.token_files import FileJob, Job, Settings, write_part
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table
from sane_ray.zoo.catalog import open_record
from sane_ray.zoo.readers import Record, bare
from sane_ray.zoo.splits import assign_splits

_MAX_BLOCKS = 1000
_MAX_TRIED = 20


def write_store(
    records: Sequence[Record], destination: str | Path, config: TokensConfig, *, source: str | Path
) -> TokenStore:
    """Writes the token store of a zoo; does nothing if it is there.

    Runs on the Ray that this process is connected to, or here if ``needs_ray`` says no; the bytes are the same.

    Checkpoints that cannot be used (unreadable, NaN or infinite weights, values beyond the stored number format) or
    that the config does not want are left out and listed in the store's catalog.

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


def needs_ray(records: Sequence[Record], config: TokensConfig, *, source: str | Path) -> bool:
    """Whether ``write_store`` and ``audit_zoo`` need Ray: a small zoo is done before a cluster has started."""
    return not Inputs.of(records, config, source).is_small


def preview(records: Sequence[Record], config: TokensConfig, *, source: str | Path) -> str:
    """What ``write_store`` would read and write, told from the first readable checkpoint; needs no Ray.

    Raises:
        InputError: Too few models to split, no checkpoint is wanted, or none of the first is readable.
    """
    inputs = Inputs.of(records, config, source)
    models = dict.fromkeys((record.model for record in inputs.records), "")
    splits = Counter(assign_splits(inputs.records, models, config).values())
    check_splits([splits[split] for split in SPLITS], config)
    table = _first_table(inputs.records, config)
    written = bytes_per_token(table.token_size, config) * table.num_tokens * len(inputs.records) / 1e6
    left_out = f", {len(inputs.unwanted):,} more are not wanted" if inputs.unwanted else ""
    counts = ", ".join(f"{splits[split]:,} {split}" for split in SPLITS)
    return (
        f"would read {len(inputs.records):,} checkpoints of {len(models):,} models ({counts}), "
        f"{sum(inputs.sizes) / 1e6:,.1f} MB{left_out}\n"
        f"would write about {written:,.1f} MB of {config.dtype} tokens: {table.num_tokens:,} of {table.token_size} "
        "values a checkpoint, if all are like the first"
    )


def audit_zoo(
    records: Sequence[Record],
    catalog: str | Path,
    config: TokensConfig,
    *,
    source: str | Path,
    unclaimed: Sequence[str] = (),
) -> str:
    """Reads a zoo, writes its catalog and says what it holds and what a store would leave out; writes no store.

    Args:
        records: The zoo's checkpoints.
        catalog: The Parquet file to write; a later ``--source``.
        config: What a store would be made with.
        source: Folder of the zoo.
        unclaimed: Files that look like weights, but that the zoo's reader did not list.

    Raises:
        InputError: No checkpoint is wanted, or the catalog cannot be written.
    """
    inputs = Inputs.of(records, config, source)
    found = inspect(inputs)
    pass_over(found, config)
    write_store_catalog(Path(catalog), found, inputs)
    return audit(found, inputs.unwanted, config, source=source, sizes=inputs.sizes, unclaimed=unclaimed)


def inspect(inputs: Inputs) -> Found:
    """Pass 1: reads every checkpoint once."""
    run = partial(_map, here=inputs.is_small)
    found = Found.nothing(inputs.records)
    settings = table_settings(inputs.config)
    large = [position for position, size in enumerate(inputs.sizes) if size > BATCH_BYTES]
    small = [position for position, size in enumerate(inputs.sizes) if size <= BATCH_BYTES]
    with checkpoint_bar("inspect checkpoints", len(inputs.records)) as progress:
        records = [bare(inputs.records[position]) for position in small]
        work = batches(records, [inputs.sizes[position] for position in small])
        for batch, (seen, tables) in zip(work, run(partial(inspect_batch, settings=settings), work), strict=True):
            for place, one in enumerate(seen, start=batch.first):
                found.add(small[place], [one], tables)
            progress.update(len(seen))
        for position, seen, tables in _inspect_large(large, inputs.records, settings, run):
            found.add(position, [seen], tables)
            progress.update()
    return found


def _inspect_large(
    positions: Sequence[int], records: Sequence[Record], settings: dict[str, Any], run: Callable[..., Iterator[Any]]
) -> Iterator[tuple[int, Seen, dict[str, LayerTable]]]:
    """Checkpoints whose slices are read by many tasks."""
    metas: dict[int, dict[str, Tensor]] = {}
    for position in positions:
        try:
            metas[position] = open_record(records[position]).meta
        except Exception as error:  # one odd file must not end the work on all the others
            yield position, Seen("", why(error, records[position])), {}
    work = [share for position, meta in metas.items() for share in shares(position, bare(records[position]), meta)]
    tables: dict[Any, LayerTable] = {}
    results = zip(work, run(inspect_share, work), strict=True)
    for position, group in itertools.groupby(results, lambda result: result[0].position):
        answers = [answer for _, answer in group]
        failed = next((answer for answer in answers if isinstance(answer, str)), None)
        if failed is not None:
            yield position, Seen("", failed), {}
            continue
        glances = [glance for answer in answers for glance in answer]
        seen = describe(metas[position], glances, settings, tables)
        yield position, seen, {table.fingerprint: table for table in tables.values()}


def _first_table(records: Sequence[Record], config: TokensConfig) -> LayerTable:
    reason = ""
    for record in records[:_MAX_TRIED]:
        try:
            return build_layer_table(open_record(record).meta, **table_settings(config))
        except InputError as error:
            reason = reason or str(error)
    raise InputError(f"none of the first {min(len(records), _MAX_TRIED)} checkpoints can be read; the first: {reason}")


def _write(inputs: Inputs, folder: Path) -> None:
    """Fills the folder; store.json comes last."""
    found = inspect(inputs)
    rows, architectures = arrange(found, inputs.config)
    parts = plan(rows, inputs.config)
    aligned = _align(rows, inputs) if inputs.config.align == "weights" else NOT_ALIGNED
    files = _write_parts(parts, architectures, found, aligned, inputs, folder)
    write_contents(Contents(rows, parts, architectures, files, found, aligned, inputs), folder)


def _align(rows: Sequence[Row], inputs: Inputs) -> Aligned:
    chosen = aligning.references(rows, inputs.config)
    work = aligning.jobs(rows, chosen)
    alignments: dict[str, Alignment] = {}
    with checkpoint_bar("align models", sum(len(job.records) for job in work), unit="model") as progress:
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
    with checkpoint_bar("write tokens", tokens, unit="token") as progress:
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
            aligned.permutations(row.record.model),
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
