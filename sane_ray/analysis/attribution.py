"""Which layers a prediction rests on: how much worse a fitted probe gets when a layer's features are those of others.

Permutation importance (Breiman, "Random forests", 2001, section 10) of groups of columns, on test networks alone: the
fit is the same each time, since training and validation rows stay as they are. Works for any probe.

Shape suffixes: R rows, F features, n test rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sane_ray.properties.evaluation import r2_score
from sane_ray.properties.features import Block, Unavailable
from sane_ray.properties.prediction import Prediction
from sane_ray.properties.probes import Probe
from sane_ray.properties.protocols import Part
from sane_ray.properties.targets import Target

WHOLE = "whole network"
"""Group of the columns that are of no layer."""

Rows = NDArray[np.int64]
Features = dict[str, NDArray[Any]]
"""Of the same rows, by block."""
BuildProbe = Callable[[Features], Probe]


MOST_VALUES = 20_000_000
"""Changed features that are predicted from at once: 160 MB."""


class Importance(NamedTuple):
    """What a group of columns is worth."""

    group: str
    drop: float
    """Mean loss of R^2 on test rows."""
    deviation: float
    """Over the permutations."""
    moved: float = float("nan")
    """How far it moves predictions: deviation of its ``Contributions`` over test rows, in the property's units."""


class Contributions(NamedTuple):
    """What each group of columns adds to each prediction."""

    groups: list[str]
    base: float
    """The prediction for a network all of whose features are the training rows' means."""
    moved_nG: NDArray[np.float64]


def groups_of(blocks: Sequence[Block]) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Columns of each layer, by block: what stands before the last ``/`` of a column's name is its layer."""
    found: dict[str, dict[str, list[int]]] = {}
    for block in blocks:
        for place, column in enumerate(block.columns):
            layer, slash, _ = column.rpartition("/")
            found.setdefault(layer if slash else WHOLE, {}).setdefault(block.name, []).append(place)
    return {group: {name: np.array(at) for name, at in of.items()} for group, of in found.items()}


def importances(
    build: BuildProbe,
    blocks: Sequence[Block],
    target_R: NDArray[Any],
    splits: tuple[Rows, Rows, Rows],
    *,
    repeats: int = 5,
    seed: int = 0,
) -> list[Importance]:
    """The loss of R^2 when the columns of a layer are exchanged among test rows, the largest first.

    Args:
        build: Makes a probe of features by block name.
        blocks: Features of all rows.
        target_R: What is predicted.
        splits: Training, validation and test rows.
        repeats: Permutations of each group.
        seed: Of the permutations.
    """
    test, groups, generator = splits[2], groups_of(blocks), np.random.default_rng(seed)
    values = _values(blocks)

    def variants() -> Iterator[Features]:
        yield {name: block[test] for name, block in values.items()}
        for columns in groups.values():
            for _ in range(repeats):
                yield _exchanged(values, columns, test, generator.permutation(test))

    scores = [r2_score(target_R[test], one) for one in _answers(build, values, variants(), target_R, splits, seed)]
    drops_GP = scores[0] - np.reshape(scores[1:], (len(groups), repeats))
    found = [Importance(group, float(d.mean()), float(d.std())) for group, d in zip(groups, drops_GP, strict=True)]
    return sorted(found, key=lambda importance: -importance.drop)


def contributions(
    build: BuildProbe,
    blocks: Sequence[Block],
    target_R: NDArray[Any],
    splits: tuple[Rows, Rows, Rows],
    *,
    seed: int = 0,
) -> Contributions:
    """How far each layer moves each prediction away from that for the typical training network.

    A row's contribution of a layer is the prediction for a network that has this layer's features and otherwise the
    means of the training rows, less the prediction for the means alone. For linear probes (either ridge) that is the
    sum of coefficient times centred feature, and base and contributions add up to the prediction exactly.

    Args:
        build: Makes a probe of features by block name.
        blocks: Features of all rows.
        target_R: What is predicted.
        splits: Training, validation and test rows.
        seed: Of the probe.
    """
    train, _, test = splits
    groups, values = groups_of(blocks), _values(blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column that no training row has stays NaN
        typical = {name: np.tile(np.nanmean(block[train], axis=0), (len(test), 1)) for name, block in values.items()}

    def variants() -> Iterator[Features]:
        yield typical
        for columns in groups.values():
            changed = {name: block.copy() for name, block in typical.items()}
            for name, at in columns.items():
                changed[name][:, at] = values[name][np.ix_(test, at)]
            yield changed

    base_n, *moved = _answers(build, values, variants(), target_R, splits, seed)
    moved_nG = np.stack(moved, axis=1) - base_n[:, None] if moved else np.empty((len(test), 0))
    return Contributions(list(groups), float(base_n[0]) if len(base_n) else np.nan, moved_nG)


def layers_behind(prediction: Prediction, fits: Mapping[str, tuple[str, str]]) -> dict[str, list[Importance]]:
    """What each layer of a zoo's networks is worth to the fits of numeric properties.

    Args:
        prediction: Whose zoos, targets and probes.
        fits: Feature set and probe, by target; a target that cannot be predicted is left out.

    Returns:
        By target and fit, in words, the most important layer first; none where no layer is alone.
    """
    targets, found = {target.name: target for target in prediction.targets}, {}
    for name, (features, probe) in fits.items():
        target, blocks = targets[name], _blocks(prediction, features)
        part = prediction.population.split().only(target.known_R)
        if len(groups_of(blocks)) < 2 or not _has_r2(target, part, prediction.population.model_R):
            continue
        build, splits = prediction.build(features, probe), (part.train, part.val, part.test)
        worth = importances(build, blocks, target.values_R, splits, seed=prediction.config.seed)
        added = contributions(build, blocks, target.values_R, splits, seed=prediction.config.seed)
        moved = dict(zip(added.groups, added.moved_nG.std(axis=0).tolist(), strict=True))
        found[f"{name} by {features}, {probe}"] = [one._replace(moved=moved[one.group]) for one in worth]
    return found


def _blocks(prediction: Prediction, features: str) -> list[Block]:
    try:
        return prediction.source.blocks(features)
    except Unavailable:
        return []


def _has_r2(target: Target, part: Part, model_R: NDArray[Any]) -> bool:
    """Whether the target is a number that varies where it is fitted and judged."""
    if not target.usable or target.kind != "number" or part.complaint(model_R):
        return False
    return all(np.ptp(target.values_R[rows]) > 0 for rows in (part.train, part.test))


def _values(blocks: Sequence[Block]) -> Features:
    return {block.name: np.asarray(block.values_RF, np.float64) for block in blocks}


def _exchanged(values: Features, columns: Mapping[str, Rows], test: Rows, partner: Rows) -> Features:
    """Features of the test rows, those columns of one another's: the same partner in all blocks."""
    changed = {name: block[test] for name, block in values.items()}
    for name, at in columns.items():
        changed[name][:, at] = values[name][np.ix_(partner, at)]
    return changed


def _answers(
    build: BuildProbe,
    values: Features,
    variants: Iterator[Features],
    target_R: NDArray[Any],
    splits: tuple[Rows, Rows, Rows],
    seed: int,
) -> list[NDArray[Any]]:
    """What a probe says of each variant of the test rows, [n] each.

    Variants stand behind the real rows: neither for training nor for validation, they change no fit, and one fit
    answers for as many as there is memory for.
    """
    train, val, test = splits
    columns = sum(block.shape[1] for block in values.values())
    at_once, answers = max(1, int(MOST_VALUES / max(1, columns * len(test)))), []
    while some := list(islice(variants, at_once)):
        stacked = {name: np.concatenate([block, *(one[name] for one in some)]) for name, block in values.items()}
        behind = build(stacked)(target_R, train, val, seed).prediction_R[len(target_R) :]
        answers += np.split(behind, len(some))
    return answers
