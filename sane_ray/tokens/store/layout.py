"""What goes where in a token store: splits, architectures, row groups and files, decided from what pass 1 found.

Pure functions of the findings and the config, so that a store is the same on every cluster. Never opens a file, never
imports Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.normalization import LayerStatistics, fit
from sane_ray.tokens.store.inspection import Found, Seen
from sane_ray.tokens.store.reading import SPLITS, Architecture
from sane_ray.tokens.symmetry import Symmetry, derive_symmetry
from sane_ray.tokens.tokenizer import LayerTable
from sane_ray.zoo.readers import Record
from sane_ray.zoo.splits import assign_splits

_BYTES_BESIDE_VALUES = 5 * 4
_LISTED = 20
"""Examples in an error message."""


@dataclass(frozen=True)
class Row:
    """One checkpoint of the store."""

    ordinal: int
    """Its row in models.parquet."""
    position: int
    """Its place among the inputs."""
    record: Record
    sha256: str
    split: str
    architecture: Architecture


@dataclass(frozen=True)
class Piece:
    """One segment: a run of a checkpoint's tokens."""

    row: Row
    first: int
    tokens: int


@dataclass(frozen=True)
class Part:
    """One token file."""

    file: str
    """Relative to the store."""
    groups: list[list[Piece]]


def arrange(found: Found, config: TokensConfig) -> tuple[list[Row], list[Architecture]]:
    """Decides which checkpoints the store holds, in which split, and how they are normalised.

    Takes out of ``found`` what is not wanted, and checkpoints whose normalised values do not fit the stored number
    format; the normalisation is fitted without them.

    Raises:
        InputError: Too many architectures or unusable checkpoints, or too few models to fill the splits.
    """
    _check_skipped(found, config)
    pass_over(found, config)
    _check_wanted(found)
    _check_architectures(found, config)
    splits = _split(found, config)
    _check_wanted(found)
    while True:
        architectures = _fit(found, splits, config)
        overflowing = _overflowing(found, architectures, config)
        for position, reason in overflowing:
            found.leave_out(position, reason)
        _check_skipped(found, config)
        if not overflowing:
            break
    rows = [_row(found, ordinal, *usable, splits, architectures) for ordinal, usable in enumerate(found.usable())]
    models = {row.record.model: row.split for row in rows}
    check_splits([list(models.values()).count(split) for split in SPLITS], config)
    return rows, list(architectures.values())


def plan(rows: Sequence[Row], config: TokensConfig) -> list[Part]:
    """Files and row groups. Checkpoints are shuffled, so that a row group mixes models."""
    parts: list[Part] = []
    for number, split in enumerate(SPLITS):
        members = [row for row in rows if row.split == split]
        order = np.random.default_rng([config.seed, len(SPLITS), number]).permutation(len(members))
        pieces = [piece for index in order for piece in segments(members[index], config)]
        groups = _gather(pieces, lambda piece: _bytes(piece, config), config.row_group_mb)
        files = _gather(groups, lambda group: sum(_bytes(piece, config) for piece in group), config.file_mb)
        parts += [Part(f"tokens/split={split}/part-{index:05d}.parquet", file) for index, file in enumerate(files)]
    return parts


def segments(row: Row, config: TokensConfig) -> list[Piece]:
    """The whole checkpoint, or a large one cut evenly into about the size of a row group."""
    table = row.architecture.table
    if is_whole(table, config):
        return [Piece(row, 0, table.num_tokens)]
    size = table.num_tokens * bytes_per_token(table.token_size, config)
    bounds = np.linspace(0, table.num_tokens, math.ceil(size / (config.row_group_mb * 1e6)) + 1).astype(int).tolist()
    return [Piece(row, first, stop - first) for first, stop in itertools.pairwise(bounds) if stop > first]


def is_whole(table: LayerTable, config: TokensConfig) -> bool:
    """Whether checkpoints of this table are stored in one piece."""
    return table.num_tokens * bytes_per_token(table.token_size, config) <= config.segment_mb * 1e6


def check_splits(models: Sequence[int], config: TokensConfig) -> None:
    """Raises ``InputError`` if a split that should hold models holds none."""
    if config.split_file or config.split_by != "model":  # somebody else decided; without training there is no store
        if models[0] == 0:
            raise InputError(
                f"config field tokens.{'split_file' if config.split_file else 'split_by'} puts none of {sum(models):,} "
                "usable models into train: name another"
            )
        return
    sizes = zip(SPLITS, models, config.split, strict=True)
    empty = [name for name, count, fraction in sizes if fraction > 0 and count == 0]
    if empty:
        raise InputError(
            f"config field tokens.split is {config.split}, but {sum(models)} usable models leave none for "
            f"{', '.join(empty)}: set that fraction to 0 (as in --tokens.split '[1.0, 0.0, 0.0]'), or add models"
        )


def bytes_per_token(token_size: int, config: TokensConfig) -> int:
    """Bytes of a row in memory."""
    return token_size * getattr(torch, config.dtype).itemsize + _BYTES_BESIDE_VALUES


def table_settings(config: TokensConfig) -> dict[str, Any]:
    """How layer tables are built."""
    return {name: getattr(config, name) for name in ("token_size", "batch_norm", "layout", "parameters")}


def duplicates(found: Found) -> dict[int, int]:
    """Usable checkpoints with the same weights as an earlier one, and that one."""
    first: dict[str, int] = {}
    same: dict[int, int] = {}
    for position, _ in found.usable():
        if first.setdefault(found.digests[position], position) != position:
            same[position] = first[found.digests[position]]
    return same


def l2_scale(seen: Seen) -> list[float]:
    """Norms that l2 normalisation divides a checkpoint's layers by: 1 where a layer is all zero."""
    norms = seen.statistics[2]
    return np.where(norms > np.finfo(np.float32).tiny, norms, 1.0).astype(np.float32).tolist()


def pass_over(found: Found, config: TokensConfig) -> None:
    """Takes out what can be used and is not wanted: weights above the threshold, and duplicates."""
    if config.weight_threshold:
        for position, _ in found.usable():
            if (largest := found.seen[position].largest) > config.weight_threshold:
                found.pass_over(position, f"has a weight of size {largest:.3g}, above tokens.weight_threshold")
    if config.duplicates == "drop":
        for position, earlier in duplicates(found).items():
            found.pass_over(position, f"has the same weights as {found.records[earlier].id}")


def _check_wanted(found: Found) -> None:
    if found.usable():
        return
    position, reason = min(found.unwanted.items())
    raise InputError(
        f"none of {len(found.unwanted):,} usable checkpoints is wanted; for example, {found.records[position].id} "
        f"{reason}"
    )


def _row(
    found: Found,
    ordinal: int,
    position: int,
    key: str,
    splits: Mapping[str, str],
    architectures: Mapping[str, Architecture],
) -> Row:
    record = found.records[position]
    return Row(ordinal, position, record, found.digests[position], splits[record.model], architectures[key])


def _check_skipped(found: Found, config: TokensConfig) -> None:
    total = len(found.records)
    if len(found.reasons) <= config.max_skipped * total and found.usable():
        return
    listed = [f"{found.records[position].path}: {reason}" for position, reason in sorted(found.reasons.items())]
    more = [f"and {len(listed) - _LISTED:,} more"] if len(listed) > _LISTED else []
    raise InputError(
        f"{len(listed):,} of {total:,} checkpoints cannot be used, and config field tokens.max_skipped is "
        f"{config.max_skipped}: repair or remove them, or raise it:\n  " + "\n  ".join(listed[:_LISTED] + more)
    )


def _check_architectures(found: Found, config: TokensConfig) -> None:
    counts = Counter(key for _, key in found.usable())
    if len(counts) <= config.max_architectures:
        return
    first = counts.most_common(1)[0][0]
    lines = []
    for key, count in counts.most_common(_LISTED):
        example = found.records[found.keys.index(key)]
        difference = "" if key == first else f"; {_difference(found.tables[first], found.tables[key])}"
        lines.append(f"{_name(key, example)}: {count:,} checkpoints, for example {example.path}{difference}")
    raise InputError(
        f"the zoo holds {len(counts)} architectures, and config field tokens.max_architectures is "
        f"{config.max_architectures}: set it to {len(counts)}, or name a --source with one:\n  " + "\n  ".join(lines)
    )


def _name(key: str, record: Record) -> str:
    kind = record.config.get("model::type") or record.config.get("model_type") or "network"
    return f"{kind}-{key[:8]}"


def _difference(table: LayerTable, other: LayerTable) -> str:
    """The first key that two architectures do not have in common, or have with different shapes."""
    shapes, others = _shapes(table), _shapes(other)
    for key in [*shapes, *others]:
        if shapes.get(key) != others.get(key):
            return f"{key} has shape {others.get(key, 'none')} where the first has {shapes.get(key, 'none')}"
    return "the order of its keys differs"


def _shapes(table: LayerTable) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in table.layers:
        shapes[layer.key] = layer.shape
        if layer.bias_key is not None:
            shapes[layer.bias_key] = (layer.channels,)
    return shapes | {entry.key: entry.shape for entry in table.untokenized}


def _split(found: Found, config: TokensConfig) -> dict[str, str]:
    """Split of every usable model; models without one are passed over."""
    splits = assign_splits([found.records[position] for position, _ in found.usable()], config)
    for position, _ in found.usable():
        if found.records[position].model not in splits:
            found.pass_over(position, "its model is in no split")
    return splits


def _fit(found: Found, splits: Mapping[str, str], config: TokensConfig) -> dict[str, Architecture]:
    """Architectures by fingerprint, in order of their first checkpoint, normalised by the training split."""
    members: dict[str, list[int]] = {}
    for position, key in found.usable():
        members.setdefault(key, []).append(position)
    token_size = config.token_size or max(found.tables[key].widest_channel for key in members)
    given = {path: _given(path) for path in config.symmetry}
    tables = {key: found.tables[key].resized(token_size) for key in members}
    trained = {
        key: [found.seen[position] for position in positions if splits[found.records[position].model] == "train"]
        for key, positions in members.items()
    }
    statistics = {key: _statistics(seen) for key, seen in trained.items() if seen}
    if not statistics:
        raise InputError("no model is in the train split: change tokens.split or tokens.seed, or add models")
    pooled = by_kind(statistics, tables)
    architectures: dict[str, Architecture] = {}
    for key, positions in members.items():
        records = [found.records[position] for position in positions]
        normalization = fit(statistics.get(key) or of_kinds(pooled, tables[key]), config.normalization)
        symmetry = _symmetry(tables[key], hints(records), given)
        architectures[key] = Architecture(_name(key, records[0]), tables[key], symmetry, normalization)
    _check_used(given, architectures.values())
    return architectures


def _statistics(trained: Sequence[Seen]) -> LayerStatistics:
    values = np.stack([seen.statistics for seen in trained])
    mean, variance, norm = values[:, :3].sum(axis=0)
    return LayerStatistics(len(values), mean, variance, norm, values[:, 3].min(axis=0), values[:, 4].max(axis=0))


Pooled = dict[str | None, NDArray[np.float64]]
"""For each kind of layer, and for all together under None: mean, variance, norm, minimum and maximum."""


def by_kind(statistics: Mapping[str, LayerStatistics], tables: Mapping[str, LayerTable]) -> Pooled:
    """What the training models of all architectures say of each kind of layer, every layer of a model alike."""
    layers: dict[str | None, list[tuple[LayerStatistics, int]]] = {None: []}
    for key, seen in statistics.items():
        for number, layer in enumerate(tables[key].layers):
            layers.setdefault(layer.kind, []).append((seen, number))
            layers[None].append((seen, number))
    pooled: Pooled = {}
    for kind, members in layers.items():
        count = sum(seen.models for seen, _ in members)
        sums = np.sum([[seen.mean[n], seen.variance[n], seen.norm[n]] for seen, n in members], axis=0)
        low, high = min(seen.minimum[n] for seen, n in members), max(seen.maximum[n] for seen, n in members)
        pooled[kind] = np.array([*(sums / count), low, high])
    return pooled


def of_kinds(pooled: Pooled, table: LayerTable) -> LayerStatistics:
    """Statistics for an architecture that no training model has: those of its layers' kinds."""
    columns = np.stack([pooled.get(layer.kind, pooled[None]) for layer in table.layers], axis=1)
    return LayerStatistics(1, *columns)


def _given(path: str) -> Symmetry:
    symmetry = Symmetry.load(path)
    return dataclasses.replace(symmetry, origin=symmetry.origin or f"given in {Path(path).name}")


def _symmetry(table: LayerTable, hints: Mapping[str, Any], given: Mapping[str, Symmetry]) -> Symmetry:
    """The first of the given symmetries that fits, else what is known of the family."""
    return next((one for one in given.values() if _misfit(one, table) is None), None) or derive_symmetry(table, hints)


def hints(records: Sequence[Record]) -> dict[str, Any]:
    """What the configs of all models of one architecture say alike.

    Nothing of attention heads unless all say the same of them, since no shape shows how many there are.
    """
    common = {
        name: value
        for name, value in records[0].config.items()
        if all(name in record.config and record.config[name] == value for record in records)
    }
    heads = {tuple(sorted(item for item in record.config.items() if _is_of_heads(*item))) for record in records}
    return common if len(heads) == 1 else {n: value for n, value in common.items() if not _is_of_heads(n, value)}


def _is_of_heads(name: str, value: Any) -> bool:
    return "head" in name.lower() or "alibi" in f"{name}={value}".lower()


def _misfit(symmetry: Symmetry, table: LayerTable) -> InputError | None:
    try:
        symmetry.check(table)
    except InputError as error:
        return error
    return None


def _check_used(given: Mapping[str, Symmetry], architectures: Iterable[Architecture]) -> None:
    """Raises ``InputError`` for a symmetry file that fits none of the architectures."""
    for path, symmetry in given.items():
        misfits = [_misfit(symmetry, architecture.table) for architecture in architectures]
        if None not in misfits:
            raise InputError(f"config field tokens.symmetry: {path} fits no architecture of the zoo ({misfits[0]})")


def _overflowing(
    found: Found, architectures: Mapping[str, Architecture], config: TokensConfig
) -> list[tuple[int, str]]:
    """Checkpoints whose normalised values the stored number format cannot hold, told from the ends of their layers."""
    if config.normalization == "l2":
        return []  # at most 1 by construction
    limit = torch.finfo(getattr(torch, config.dtype)).max * (1 - 1e-6)
    overflowing = []
    for position, key in found.usable():
        normalization, layers = architectures[key].normalization, architectures[key].table.layers
        ends = found.seen[position].statistics[3:]
        ends = np.abs((ends - normalization.shift) / normalization.scale).max(axis=0)
        worst = int(ends.argmax())
        if ends[worst] > limit:
            reason = f"{layers[worst].key} reaches {ends[worst]:.3g} after normalisation, too large for {config.dtype}"
            overflowing.append((position, reason))
    return overflowing


def _bytes(piece: Piece, config: TokensConfig) -> int:
    return piece.tokens * bytes_per_token(piece.row.architecture.table.token_size, config)


def _gather(items: Iterable[Any], size: Callable[[Any], float], megabytes: float) -> list[list[Any]]:
    """Runs of consecutive items of about so many megabytes, each at least one item."""
    gathered: list[list[Any]] = []
    total = math.inf
    for item in items:
        if total + size(item) / 2 > megabytes * 1e6:  # nearest to the size, not always below it
            gathered.append([])
            total = 0.0
        gathered[-1].append(item)
        total += size(item)
    return gathered
