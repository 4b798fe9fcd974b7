"""What goes where in a token store: splits, architectures, row groups and files, decided from what pass 1 found.

Pure functions of the findings and the config, so that a store is the same on every cluster. Never opens a file, never
imports Ray.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.normalization import LayerStatistics, fit
from sane_ray.tokens.store.inspection import Found
from sane_ray.tokens.store.reading import SPLITS, Architecture
from sane_ray.tokens.symmetry import derive_symmetry
from sane_ray.tokens.tokenizer import LayerTable
from sane_ray.zoo.catalog import Record

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
class Part:
    """One token file."""

    file: str
    """Relative to the store."""
    groups: list[list[Row]]


def arrange(found: Found, config: TokensConfig) -> tuple[list[Row], list[Architecture]]:
    """Decides which checkpoints the store holds, in which split, and how they are normalised.

    Checkpoints whose normalised values do not fit the stored number format are left out of ``found``.

    Raises:
        InputError: Too many architectures or unusable checkpoints, or too few models to fill the splits.
    """
    _check_architectures(found, config)
    _check_skipped(found, config)
    splits = _split(found, config)
    architectures = _fit(found, splits, config)
    for position, reason in _overflowing(found, architectures, config):
        found.leave_out(position, reason)
    _check_skipped(found, config)
    rows = [_row(found, ordinal, *usable, splits, architectures) for ordinal, usable in enumerate(found.usable())]
    models = {row.record.model: row.split for row in rows}
    check_splits([list(models.values()).count(split) for split in SPLITS], config)
    used = {row.architecture.name for row in rows}
    return rows, [architecture for architecture in architectures.values() if architecture.name in used]


def plan(rows: Sequence[Row], config: TokensConfig) -> list[Part]:
    """Files and row groups. Checkpoints are shuffled, so that a row group mixes models."""
    parts: list[Part] = []
    for number, split in enumerate(SPLITS):
        members = [row for row in rows if row.split == split]
        order = np.random.default_rng([config.seed, len(SPLITS), number]).permutation(len(members))
        groups = _gather((members[index] for index in order), lambda row: _bytes(row, config), config.row_group_mb)
        files = _gather(groups, lambda group: sum(_bytes(row, config) for row in group), config.file_mb)
        parts += [Part(f"tokens/split={split}/part-{index:05d}.parquet", file) for index, file in enumerate(files)]
    return parts


def allocate(count: int, fractions: Sequence[float]) -> list[int]:
    """Models in each split: nearest whole numbers, but at least one where the fraction is not 0 while models last."""
    wanted = [index for index, fraction in enumerate(fractions) if fraction > 0]
    if count <= len(wanted):
        return [int(index in wanted[:count]) for index in range(len(fractions))]
    exact = np.array(fractions) * count
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: count - counts.sum()]:
        counts[index] += 1
    for index in wanted:
        if counts[index] == 0:
            counts[np.argmax(counts)] -= 1
            counts[index] = 1
    return counts.tolist()


def check_splits(models: Sequence[int], config: TokensConfig) -> None:
    """Raises ``InputError`` if a split that should hold models holds none."""
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
    return f"{record.config.get('model::type') or 'network'}-{key[:8]}"


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
    """Split of every usable model. Each architecture is split on its own, so that all of them are trained on."""
    key_of_model: dict[str, str] = {}
    for position, key in found.usable():
        key_of_model.setdefault(found.records[position].model, key)
    splits: dict[str, str] = {}
    for number, key in enumerate(dict.fromkeys(key_of_model.values())):
        models = [model for model, other in key_of_model.items() if other == key]
        order = np.random.default_rng([config.seed, number]).permutation(len(models))
        names = [
            name for name, count in zip(SPLITS, allocate(len(models), config.split), strict=True) for _ in range(count)
        ]
        splits |= {models[index]: name for index, name in zip(order, names, strict=True)}
    return splits


def _fit(found: Found, splits: Mapping[str, str], config: TokensConfig) -> dict[str, Architecture]:
    """Architectures by fingerprint, in order of their first checkpoint, normalised by the training split."""
    examples: dict[str, int] = {}
    for position, key in found.usable():
        examples.setdefault(key, position)
    token_size = config.token_size or max(layer.width for key in examples for layer in found.tables[key].layers)
    architectures: dict[str, Architecture] = {}
    for key, position in examples.items():
        name, statistics = _name(key, found.records[position]), LayerStatistics()
        for (other, model), seen in found.statistics.items():
            if other == key and splits[model] == "train":
                statistics.merge(seen)
        if statistics.models == 0:
            raise InputError(f"architecture {name} has no model in the train split: change tokens.seed, or remove it")
        table = _resize(found.tables[key], token_size)
        architectures[key] = Architecture(name, table, derive_symmetry(table), fit(statistics, config.normalization))
    return architectures


def _resize(table: LayerTable, token_size: int) -> LayerTable:
    """The same layers in tokens of another size."""
    layers = tuple(
        dataclasses.replace(layer, tokens_per_channel=math.ceil(layer.width / token_size)) for layer in table.layers
    )
    return LayerTable(token_size, layers, table.untokenized)


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
        ends = np.abs((found.ranges[position] - normalization.shift) / normalization.scale).max(axis=0)
        worst = int(ends.argmax())
        if ends[worst] > limit:
            reason = f"{layers[worst].key} reaches {ends[worst]:.3g} after normalisation, too large for {config.dtype}"
            overflowing.append((position, reason))
    return overflowing


def _bytes(row: Row, config: TokensConfig) -> int:
    table = row.architecture.table
    return table.num_tokens * bytes_per_token(table.token_size, config)


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
