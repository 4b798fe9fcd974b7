"""Which models are trained on, validated on and tested on.

A model's split follows from the seed and its own name alone: a hash of both is a number in [0, 1), and the fractions
cut that interval. So models that come or go move no other. Never splits the checkpoints of one model.

Small zoos need more care than chance gives, and only there do other models count: up to ``SMALL`` models the fractions
are met as exactly as whole models allow, in the order of the numbers, so that a model that is added moves at most its
neighbours at the two borders. In zoos of any size, a split that stayed empty takes the model whose number is nearest,
training first and never its last model. Architectures play no part: one may be in the test split alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.zoo.catalog import SPLIT_NAMES, Record
from sane_ray.zoo.filters import values_of
from sane_ray.zoo.readers import Value
from sane_ray.zoo.tables import plain_rows, read_table

SPLITS = ("train", "val", "test")

SMALL = 40
"""Up to so many models, fractions are met exactly."""

_FORMS = "a table with columns model and split, or JSON {model: split} or {split: [models]}"
_LOG = logging.getLogger(__name__)


def assign_splits(records: Sequence[Record], config: TokensConfig) -> dict[str, str]:
    """Says the split of every model: ``train``, ``val`` or ``test``.

    Args:
        records: The checkpoints that a store is to hold.
        config: ``split_file`` wins over ``split_by``, which wins over ``split`` and ``seed``.

    Returns:
        By model. Models that a split file or a published split does not name are not in it: they are left out.

    Raises:
        InputError: A file or a property does not say what is needed, or puts one model into two splits.
    """
    models = list(dict.fromkeys(record.model for record in records))
    if config.split_file:
        return _from_file(Path(config.split_file).expanduser(), models)
    if config.split_by == "published":
        return _published(records)
    groups = {model: model for model in models}
    if config.split_by != "model":
        values = _by_property(records, config.split_by)
        if all(isinstance(value, str) and value.lower() in SPLIT_NAMES for value in values.values()):
            return {model: SPLIT_NAMES[str(value).lower()] for model, value in values.items()}
        groups = {model: _group(value) for model, value in values.items()}
    splits = split_groups(set(groups.values()), config.split, config.seed)
    return {model: splits[group] for model, group in groups.items()}


def split_groups(groups: Collection[str], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Splits groups of models by a hash of seed and name.

    Args:
        groups: Their names, each once.
        fractions: Of train, val and test.
        seed: Another one gives another split.

    Returns:
        The split of each group. A split of a positive fraction is empty only if there are too few groups; training is
        served first.
    """
    numbers = {group: _number(seed, group) for group in groups}
    ranked = sorted(numbers, key=lambda group: (numbers[group], group))
    if len(ranked) <= SMALL:
        numbers = {group: (rank + 0.5) / len(ranked) for rank, group in enumerate(ranked)}
    intervals = _intervals(fractions)
    splits = {group: _split_of(numbers[group], intervals) for group in ranked}
    for split, (low, high) in intervals.items():
        counts = Counter(splits.values())
        spare = [group for group in ranked if split == "train" or counts[splits[group]] > 1]
        if not counts[split] and spare:
            splits[min(spare, key=lambda group: max(low - numbers[group], numbers[group] - high, 0.0))] = split
    return splits


def _intervals(fractions: Sequence[float]) -> dict[str, tuple[float, float]]:
    """The part of [0, 1) that is each split's, without those of fraction 0."""
    ends = list(accumulate(fractions))
    starts = [0.0, *ends[:-1]]
    intervals = {split: (starts[i], ends[i]) for i, split in enumerate(SPLITS) if fractions[i] > 0}
    last = list(intervals)[-1]
    return intervals | {last: (intervals[last][0], 1.0)}  # whatever the fractions add up to in floating point


def _split_of(number: float, intervals: Mapping[str, tuple[float, float]]) -> str:
    return next(split for split, (_, end) in intervals.items() if number < end)


def _number(seed: int, group: str) -> float:
    digest = hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _published(records: Sequence[Record]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for record in records:
        if record.split is not None:
            _put(splits, record.model, record.split, f"the published split of {record.id}")
    if not splits:
        raise InputError(
            "config field tokens.split_by is 'published': this zoo comes with no split; leave it at 'model', or name a "
            "--tokens.split_file"
        )
    return splits


def _by_property(records: Sequence[Record], name: str) -> dict[str, Value]:
    """The value of each model, the same at all its checkpoints."""
    field = f"config field tokens.split_by is {name!r}"
    try:
        column = values_of(records, name)
    except InputError as error:
        raise InputError(f"{field}: {error}") from error
    values: dict[str, Value] = {}
    for record, value in zip(records, column, strict=True):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise InputError(
                f"{field}, and {record.id} has no such value; add --tokens.where 'not missing(...)' to leave such "
                "checkpoints out, or split by model"
            )
        if _group(values.setdefault(record.model, value)) != _group(value):
            raise InputError(
                f"{field}: the checkpoints of model {record.model} differ in it ({values[record.model]!r}, {value!r}), "
                "and one model must stay in one split; name a value that does not change while training"
            )
    return values


def _group(value: Value) -> str:
    """As text; 1 and 1.0 are one value, since a table may turn one into the other."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _put(splits: dict[str, str], model: str, split: Any, where: str) -> None:
    name = SPLIT_NAMES.get(str(split).lower())
    if name is None:
        raise InputError(f"{where} is {split!r}; make it train, val or test")
    if splits.setdefault(model, name) != name:
        raise InputError(f"{where} is {name}, and another puts model {model} into {splits[model]}; keep one of them")


# ---------------------------------------------------------------- split files


def _from_file(path: Path, models: Sequence[str]) -> dict[str, str]:
    """The split of each model that the file names: all by their names, or all by the path of a file of them."""
    entries = list(_entries(path))
    known = set(models)
    exact = any(name in known for name, _ in entries)
    find: Callable[[str], str | None] = (lambda name: name if name in known else None) if exact else _finder(known)
    splits: dict[str, str] = {}
    unknown = []
    for name, split in entries:
        model = find(name)
        if model is None:
            unknown.append(name)
        else:
            _put(splits, model, split, f"{path}: the split of {name}")
    if not splits:
        raise InputError(
            f"config field tokens.split_file is {str(path)!r}: names none of the zoo's {len(models):,} models; it has "
            f"{unknown[0] if unknown else 'nothing'!r} where a model is called {models[0] if models else ''!r}"
        )
    if unknown:
        _LOG.warning("%s: %d names of no model of the zoo, for example %s", path, len(unknown), unknown[0])
    if len(splits) < len(models):
        _LOG.warning("%s: %d models of the zoo are not in it, and are left out", path, len(models) - len(splits))
    return {model: splits[model] for model in models if model in splits}


def _finder(known: Collection[str]) -> Callable[[str], str | None]:
    """A function from the path of a model's file, wherever its zoo once lay, to the model; None if it is no model's."""

    @cache
    def find(name: str) -> str | None:
        folder, slash, file = name.rpartition("/")
        for place in (name, folder + slash + file.partition(".")[0]):  # models of loose files have no suffix
            parts = place.split("/")
            tails = ("/".join(parts[start:]) for start in range(len(parts)))
            model = next((tail for tail in tails if tail in known), None)
            if model is not None:
                return model
        return find(folder) if folder else None

    return lambda name: find(name.replace("\\", "/").strip("/"))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and splits, as the file has them."""
    if path.suffix == ".json":
        yield from _json_entries(path)
        return
    table = read_table(path)
    column = next((name for name in ("model", "path", "id") if name in table.column_names), None)
    if column is None or "split" not in table.column_names:
        raise InputError(f"{path}: has columns {', '.join(table.column_names[:20])}; make it {_FORMS}")
    for row in plain_rows(table.select([column, "split"])):
        if row[column] is None or row["split"] is None:
            raise InputError(f"{path}: a row has no {column if row[column] is None else 'split'}; fill it in")
        yield str(row[column]), row["split"]


def _json_entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such split file; check config field tokens.split_file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON ({error}); make it {_FORMS}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds a {type(content).__name__}; make it {_FORMS}")
    for key, value in content.items():
        names = value.get("path") if isinstance(value, dict) else value  # the park's own lists scores beside paths
        if isinstance(names, str):
            yield key, names
        elif isinstance(names, list):
            yield from ((str(name), key) for name in names)
        else:
            raise InputError(f"{path}: {key} holds a {type(value).__name__}; make it {_FORMS}")
