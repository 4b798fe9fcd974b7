"""Which layers a prediction rests on: how much worse a fitted probe gets when a layer's features are those of others.

Permutation importance (Breiman, "Random forests", 2001, section 10) of groups of columns, on test networks alone: the
fit is the same each time, since training and validation rows stay as they are. Works for any probe.

Shape suffixes: R rows, F features, n test rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sane_ray.properties.evaluation import r2_score
from sane_ray.properties.features import Block, FeatureSource, Unavailable, Zoo
from sane_ray.properties.probes import BlockRidge, Probe
from sane_ray.properties.protocols import Population
from sane_ray.properties.targets import find_target

WHOLE = "whole network"
"""Group of the columns that are of no layer."""

Rows = NDArray[np.int64]
BuildProbe = Callable[[Mapping[str, NDArray[Any]]], Probe]


class Importance(NamedTuple):
    """What a group of columns is worth."""

    group: str
    drop: float
    """Mean loss of R^2 on test rows."""
    deviation: float
    """Over the permutations."""


def groups_of(blocks: Sequence[Block]) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Columns of each layer, by block: what stands before the first ``/`` of a column's name is its layer."""
    found: dict[str, dict[str, list[int]]] = {}
    for block in blocks:
        for place, column in enumerate(block.columns):
            layer, slash, _ = column.partition("/")
            found.setdefault(layer if slash else WHOLE, {}).setdefault(block.name, []).append(place)
    return {group: {name: np.array(at) for name, at in of.items()} for group, of in found.items()}


def importances(
    build: BuildProbe,
    blocks: Sequence[Block],
    target_R: NDArray[Any],
    splits: tuple[Rows, Rows, Rows],
    *,
    repeats: int = 3,
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
    train, val, test = splits
    values = {block.name: np.asarray(block.values_RF, np.float64) for block in blocks}

    def score(changed: Mapping[str, NDArray[Any]]) -> float:
        prediction_R = build(changed)(target_R, train, val, seed).prediction_R
        return r2_score(target_R[test], prediction_R[test])

    whole, generator, found = score(values), np.random.default_rng(seed), []
    for group, columns in groups_of(blocks).items():
        drops = [whole - score(_exchanged(values, columns, test, generator)) for _ in range(repeats)]
        found.append(Importance(group, float(np.mean(drops)), float(np.std(drops))))
    return sorted(found, key=lambda importance: -importance.drop)


def _exchanged(
    values: Mapping[str, NDArray[Any]],
    columns: Mapping[str, NDArray[np.int64]],
    test: Rows,
    generator: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    """Features in which test rows have those columns of one another, the same partner in all blocks."""
    partner, changed = generator.permutation(test), dict(values)
    for name, at in columns.items():
        changed[name] = values[name].copy()
        changed[name][test[:, None], at] = values[name][partner[:, None], at]
    return changed


def layers_behind(
    zoo: Zoo, targets: Sequence[str], features: str, *, last_epoch_only: bool = False, seed: int = 0
) -> dict[str, list[Importance]]:
    """What each layer of a zoo's networks is worth to a ridge, on all features as one block, of each numeric property.

    Args:
        zoo: Whose properties.
        targets: Their names; what cannot be predicted is left out.
        features: A feature set, such as ``sane+statistics``.
        last_epoch_only: Each model counts with its last checkpoint alone.
        seed: Of the permutations.

    Returns:
        By property, the most important layer first; empty where the features cannot be had or no layer is alone.
    """
    try:
        blocks = FeatureSource([zoo]).blocks(features)
    except Unavailable:
        return {}
    population, found = Population.of([zoo], last_epoch_only), {}
    models_R = population.model_R.astype(str)
    for name in targets:
        target = find_target(name, zoo.table)
        part = population.split().only(target.known_R)
        if not target.usable or target.kind != "number" or part.complaint(population.model_R):
            continue
        if np.ptp(target.values_R[part.train]) == 0 or np.ptp(target.values_R[part.test]) == 0:
            continue

        def build(values: Mapping[str, NDArray[Any]]) -> Probe:
            return BlockRidge({features: np.concatenate(list(values.values()), axis=1)}, models_R)

        found[name] = importances(build, blocks, target.values_R, (part.train, part.val, part.test), seed=seed)
    return found
