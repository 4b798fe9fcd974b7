"""Maps and neighbours: where networks lie among others, by their embeddings.

Shape suffixes: R networks, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sane_ray.embedding import Embeddings
from sane_ray.errors import InputError

Array = NDArray[np.float64]

LEAST_SPREAD = 1e-8

LEAST_CLOSE, MOST_CLOSE = 5, 3000
"""Networks on a map by t-SNE: of fewer it shows nothing, of more it takes minutes, so it is of a sample."""

PERPLEXITY = 30


class Map(NamedTuple):
    """Networks as points of a plane."""

    points_R2: Array
    explained: tuple[float, float]
    """Share of the variance along each axis."""


class Neighbour(NamedTuple):
    """A network near another one."""

    row: int
    distance: float
    """In units of the typical (median) distance between two networks."""


def places(embeddings: Embeddings) -> Array:
    """What is compared: mean and standard deviation of each network's token embeddings, standardised over networks."""
    features_RF = np.concatenate([embeddings.vectors("mean"), embeddings.vectors("std")], axis=1).astype(np.float64)
    spread_F = features_RF.std(axis=0)
    varied = spread_F > LEAST_SPREAD
    return (features_RF[:, varied] - features_RF[:, varied].mean(axis=0)) / spread_F[varied]


def principal_map(places_RF: Array) -> Map:
    """The plane of the two principal components.

    Raises:
        InputError: Fewer than three networks, or all of them alike.
    """
    from sklearn.decomposition import PCA

    if len(places_RF) < 3 or places_RF.shape[1] == 0:
        raise InputError(f"a map needs at least 3 networks that differ: there are {len(places_RF)}")
    pca = PCA(n_components=min(2, places_RF.shape[1]), svd_solver="full")
    points = pca.fit_transform(places_RF)
    shares = [*pca.explained_variance_ratio_.tolist(), 0.0][:2]
    if points.shape[1] == 1:
        points = np.concatenate([points, np.zeros_like(points)], axis=1)
    return Map(points, (shares[0], shares[1]))


def close_map(places_RF: Array, seed: int = 0) -> Array | None:
    """The plane of t-SNE (van der Maaten & Hinton 2008), which keeps near networks near; far distances mean nothing.

    Begins at the principal components, and takes a third of the networks for the perplexity where these are few.

    Args:
        places_RF: Of ``places``.
        seed: Of the sample of ``MOST_CLOSE`` networks and of t-SNE.

    Returns:
        [R, 2], NaN for networks that are not of the sample; None where there are too few that differ.
    """
    from sklearn.manifold import TSNE

    if len(places_RF) < LEAST_CLOSE or places_RF.shape[1] == 0:
        return None
    rows = np.arange(len(places_RF))
    if len(rows) > MOST_CLOSE:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_CLOSE, replace=False))
    start = principal_map(places_RF[rows]).points_R2
    start = (start / max(float(start[:, 0].std()), LEAST_SPREAD) * 1e-4).astype(np.float32)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(places_RF[rows])
    points = np.full((len(places_RF), 2), np.nan)
    points[rows] = found
    return points


def nearest(
    places_RF: Array, row: int, count: int = 5, models: Sequence[Any] | None = None, unit: float | None = None
) -> list[Neighbour]:
    """The networks nearest to one, the nearest first.

    Args:
        places_RF: Of ``places``.
        row: Whose neighbours.
        count: How many at most.
        models: Whose checkpoint each row is; other checkpoints of the row's own model are then left out.
        unit: Of the distances; ``typical_distance`` where none is given.
    """
    distance_R = np.linalg.norm(places_RF - places_RF[row], axis=1)
    allowed_R = np.arange(len(places_RF)) != row
    if models is not None:
        allowed_R &= np.asarray(models) != models[row]
    order = [int(other) for other in np.argsort(distance_R, kind="stable") if allowed_R[other]][:count]
    unit = typical_distance(places_RF) if unit is None else unit
    return [Neighbour(other, float(distance_R[other] / unit)) for other in order]


def typical_distance(places_RF: Array, pairs: int = 10_000) -> float:
    """The median distance of two different networks, of that many drawn pairs; 1 where all are alike."""
    if len(places_RF) < 2:
        return 1.0
    generator = np.random.default_rng(0)
    one, step = generator.integers(len(places_RF), size=pairs), generator.integers(1, len(places_RF), size=pairs)
    median = float(np.median(np.linalg.norm(places_RF[one] - places_RF[(one + step) % len(places_RF)], axis=1)))
    return median or 1.0
