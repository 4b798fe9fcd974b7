"""Anchors: the training networks that new ones are drawn near, as a condition, a property or their names choose them.

Reads the index of a token store, and the weights of the anchors alone. Never looks at networks of the validation or
test split, never draws, never imports Ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sane_ray.config import SamplingConfig
from sane_ray.errors import InputError
from sane_ray.pretraining.networks import groups_of
from sane_ray.tokens.alignment import Matcher
from sane_ray.tokens.store import Architecture, TokenStore
from sane_ray.tokens.store.reading import settings_of
from sane_ray.tokens.symmetry import Symmetry, permute
from sane_ray.zoo.filters import select
from sane_ray.zoo.readers import Record

_CONFIG, _PROPERTY = "config.", "property."


@dataclass(frozen=True)
class Anchors:
    """Chosen networks of one kind: they differ in nothing but their weights and how they were trained."""

    store: TokenStore
    ordinals: list[int]
    """In the store, the best first."""
    others: list[int]
    """Ordinals of the other training checkpoints of the same kind: what a copy could be of, too."""
    words: str
    """How they were chosen."""

    @property
    def architecture(self) -> Architecture:
        """Of all of them."""
        return self.store.architecture_of(self.ordinals[0])

    @property
    def are_aligned(self) -> bool:
        """Whether the store holds its networks aligned to one of them: the order of channels that SANE knows."""
        return settings_of(self.store).get("align", "none") != "none"

    @property
    def ids(self) -> list[str]:
        """Of the anchors, as the store names them."""
        return [str(name) for name in self.store.models["id"].take(self.ordinals).to_pylist()]

    @property
    def params(self) -> dict[str, Any]:
        """How the best anchor was built and trained: the recipe for all that is sampled."""
        return params_of(self.store, self.ordinals[0])

    def networks(self, ordinals: Sequence[int]) -> list[dict[str, Tensor]]:
        """State dicts of checkpoints of the store."""
        return [self.store.state_dict(ordinal) for ordinal in ordinals]

    def runs(self, ordinals: Sequence[int]) -> list[str]:
        """The trained network that each checkpoint belongs to."""
        return [str(name) for name in self.store.models["model"].take(list(ordinals)).to_pylist()]


def params_of(store: TokenStore, ordinal: int) -> dict[str, Any]:
    """The params.json of one checkpoint, as far as the store knows it."""
    row = store.models.slice(ordinal, 1).to_pylist()[0]
    return {
        name.removeprefix(_CONFIG): value
        for name, value in row.items()
        if name.startswith(_CONFIG) and value is not None
    }


def choose(store: TokenStore, config: SamplingConfig) -> Anchors:
    """Chooses the anchors of a store; reads no weights.

    Raises:
        InputError: none is left, a property or a name is not there, or those named are of several kinds.
    """
    if config.checkpoints:
        ordinals = _named(store, config.checkpoints)
        _check_one_kind(store, ordinals)
        words = f"{len(ordinals)} named checkpoints"
        outside = len(set(ordinals) - set(_training(store)))
        words += f", {outside} of them not of the training split" if outside else ""
    else:
        ordinals, words = _best(store, config)
    alike = (group.checkpoints for group in groups_of(store, [*_training(store), ordinals[0]]))
    same_kind = next(checkpoints for checkpoints in alike if ordinals[0] in checkpoints)
    return Anchors(store, ordinals, sorted(set(same_kind) - set(ordinals)), words)


def aligned(
    networks: Sequence[Mapping[str, Tensor]], symmetry: Symmetry, reference: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Networks permuted to match a reference as well as they can; as they are where there is no symmetry."""
    if symmetry.is_trivial:
        return [dict(network) for network in networks]
    matcher = Matcher(reference, symmetry)
    return [permute(network, symmetry, matcher.match(network).permutations) for network in networks]


def _training(store: TokenStore) -> list[int]:
    return np.flatnonzero(np.array(store.models["split"].to_pylist()) == "train").tolist()


def _named(store: TokenStore, names: Sequence[str]) -> list[int]:
    ids, sources = store.models["id"].to_pylist(), store.models["source"].to_pylist()
    found = []
    for name in names:
        path = Path(name).expanduser().as_posix()
        rows = [
            row for row, (one, source) in enumerate(zip(ids, sources, strict=True)) if one == name or _is(path, source)
        ]
        if len(rows) != 1:
            what = "no checkpoint" if not rows else f"{len(rows)} checkpoints"
            raise InputError(
                f"config field sampling.checkpoints names {name!r}, but {what} of {store.path} has that id or path; "
                f"ids are such as {ids[0]!r}, paths such as {sources[0]!r}"
            )
        found += rows
    return list(dict.fromkeys(found))


def _is(path: str, source: str) -> bool:
    return path == source or path.endswith(f"/{source}")


def _check_one_kind(store: TokenStore, ordinals: Sequence[int]) -> None:
    groups = groups_of(store, ordinals)
    if len(groups) > 1:
        kinds = "; ".join(f"{_kind(group.params, group.architecture)}: {len(group.checkpoints)}" for group in groups)
        raise InputError(
            f"config field sampling.checkpoints names networks of different kinds ({kinds}): name those of one, "
            "as what is drawn between them would be none of them"
        )


def _best(store: TokenStore, config: SamplingConfig) -> tuple[list[int], str]:
    """The anchors among the training networks, best first."""
    candidates = _training(store)
    if not candidates:
        raise InputError(f"{store.path} has no networks in its training split: prepare it with some")
    if config.anchor_epochs == "last":
        candidates = _last(store, candidates)
    if config.where:
        candidates = _where(store, candidates, config.where)
    _check_no_test(config)
    goodness = _goodness(store, candidates, config.best_by)
    group = _best_kind(store, candidates, goodness)
    members = sorted(group.checkpoints, key=lambda ordinal: -goodness[ordinal])
    wanted = len(members) if config.anchors == "all" else max(2, round(config.best_fraction * len(members)))
    chosen = members[:wanted]
    words = f"{len(chosen)} of {len(members)} training networks of {_kind(group.params, group.architecture)}"
    first, last = (abs(goodness[chosen[place]]) for place in (0, -1))
    words += f", {config.anchors} by {config.best_by} ({first:.3f} to {last:.3f})"
    return chosen, words


def _check_no_test(config: SamplingConfig) -> None:
    """Raises ``InputError`` if test images would choose the anchors."""
    for name, value in (("best_by", config.best_by), ("where", config.where)):
        if re.search(r"\btest_|\bggap\b", value):
            raise InputError(
                f"config field sampling.{name} is {value!r}: test images must decide nothing; take those of validation "
                "or training, such as val_acc"
            )


def _last(store: TokenStore, ordinals: Sequence[int]) -> list[int]:
    last: dict[tuple[str, str], tuple[int, int]] = {}
    rows = store.models.select(["model", "architecture", "epoch"]).take(ordinals).to_pylist()
    for ordinal, row in zip(ordinals, rows, strict=True):
        key = (row["model"], row["architecture"])
        last[key] = max(last.get(key, (-1, -1)), (row["epoch"] or 0, ordinal))
    return [ordinal for _, ordinal in last.values()]


def _where(store: TokenStore, ordinals: Sequence[int], where: str) -> list[int]:
    rows = store.models.take(ordinals).to_pylist()
    records = [_record(row) for row in rows]
    chosen, _ = select(records, where, "sampling.where")
    ids = {record.id for record in chosen}
    found = [ordinal for ordinal, record in zip(ordinals, records, strict=True) if record.id in ids]
    if not found:
        raise InputError(
            f"config field sampling.where is {where!r}: none of the {len(records)} training networks of {store.path} "
            "fulfils it"
        )
    return found


def _record(row: Mapping[str, Any]) -> Record:
    properties = {name.removeprefix(_PROPERTY): value for name, value in row.items() if name.startswith(_PROPERTY)}
    config = {name.removeprefix(_CONFIG): value for name, value in row.items() if name.startswith(_CONFIG)}
    config = {name.split("::")[-1]: value for name, value in config.items()} | config  # `nlin` for `model::nlin` too
    return Record(
        row["id"], row["model"], row["epoch"] or 0, row["source"], properties, config, row["reader"], split=row["split"]
    )


def _goodness(store: TokenStore, ordinals: Sequence[int], name: str) -> dict[int, float]:
    """How good each checkpoint is, by a property; those without a number there are left out."""
    column = f"{_PROPERTY}{name}"
    if column not in store.models.column_names:
        known = [each.removeprefix(_PROPERTY) for each in store.models.column_names if each.startswith(_PROPERTY)]
        raise InputError(
            f"config field sampling.best_by is {name!r}, which {store.path} does not have: it has "
            f"{', '.join(known) or 'no properties'}"
        )
    sign = -1.0 if "loss" in name else 1.0
    values = store.models[column].take(list(ordinals)).to_pylist()
    good = {
        ordinal: sign * float(value)
        for ordinal, value in zip(ordinals, values, strict=True)
        if isinstance(value, int | float) and np.isfinite(value)
    }
    if not good:
        raise InputError(f"config field sampling.best_by is {name!r}, which no anchor of {store.path} has a number for")
    return good


def _best_kind(store: TokenStore, ordinals: Sequence[int], goodness: Mapping[int, float]) -> Any:
    """The kind of networks whose best third is best: networks of several kinds cannot be mixed."""
    groups = groups_of(store, [ordinal for ordinal in ordinals if ordinal in goodness])

    def score(group: Any) -> float:
        values = sorted((goodness[ordinal] for ordinal in group.checkpoints), reverse=True)
        return float(np.mean(values[: max(2, len(values) // 3)])) if len(values) > 1 else -np.inf

    return max(groups, key=score)


def _kind(params: Mapping[str, Any], architecture: Architecture) -> str:
    nlin = params.get("model::nlin")
    return f"{architecture.name} with {nlin}" if nlin else architecture.name
