"""The novelty audit: whether sampled networks are more than copies of training networks, and better than cheaper ways.

Zeng et al. (CVPR 2026) found that generators of weights mostly replicate the checkpoints that they were trained on, and
do not beat noise added to them, or their averages. Each sampled network is compared with every training network of its
kind, in aligned weights and in wrong answers, and each method with noise and interpolation at equal novelty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.sampling.generation import Codec
from sane_ray.sampling.methods import Pool
from sane_ray.sampling.novelty import other_runs, weight_distances, wrong_agreement

COPY = 0.5
"""A network less far from a training network than this fraction of the usual distance of two runs is called near it."""

DRAWS = 2000
FEWEST = 5
"""With fewer networks of a method nothing is claimed of it."""


class Auditor:
    """Compares sampled networks with the training networks of their kind.

    Args:
        codec: of their architecture.
        training: state dicts, aligned as the samples are.
        ids: of the training networks.
        runs: the trained network that each is a checkpoint of.
        predictions_MI: their answers to the test images; None where they do not answer them.
        labels_I: classes of the test images.
    """

    def __init__(
        self,
        codec: Codec,
        training: Sequence[Mapping[str, Tensor]],
        ids: Sequence[str],
        runs: Sequence[str],
        predictions_MI: NDArray[np.int16] | None,
        labels_I: NDArray[np.int64] | None,
    ) -> None:
        self._codec, self._ids = codec, list(ids)
        self._values_MV = codec.values(codec.tokens(training))
        self._predictions_MI, self._labels_I = predictions_MI, labels_I
        distances = other_runs(weight_distances(self._values_MV, self._values_MV), runs, np.inf).min(1)
        finite = distances[np.isfinite(distances)]
        self.unit = float(np.median(finite)) if len(finite) else 1.0
        """Distance that counts as novelty 1: the median over training networks to the nearest of another run."""
        self.usual_agreement: float | None = None
        """95 % of the training networks agree less than this in wrong answers with their likest of another run."""
        if predictions_MI is not None and labels_I is not None and len(finite):
            alike = other_runs(wrong_agreement(predictions_MI, predictions_MI, labels_I), runs, 0.0).max(1)
            self.usual_agreement = float(np.quantile(alike, 0.95))

    def rows(self, pool: Pool) -> Iterator[dict[str, Any]]:
        """What is known of each network of a pool."""
        if not len(pool):
            return
        distances_RM = weight_distances(self._codec.values(pool.tokens_RNT), self._values_MV)
        nearest_R = distances_RM.argmin(1)
        alike_RM = None
        if self._predictions_MI is not None and self._labels_I is not None and pool.measured is not None:
            alike_RM = wrong_agreement(pool.measured.predictions_RI, self._predictions_MI, self._labels_I)
        for row, nearest in enumerate(nearest_R):
            distance = float(distances_RM[row, nearest])
            known: dict[str, Any] = {
                "distance": distance,
                "novelty": distance / self.unit,
                "nearest": self._ids[nearest],
            }
            if pool.measured is not None:
                measured = pool.measured
                known |= {name: float(getattr(measured, name)[row]) for name in ("val_acc", "val_loss", "test_acc")}
            known["wrong_agreement"] = None if alike_RM is None else float(alike_RM[row].max())
            yield known


def compare_at_equal_novelty(
    novelty_R: NDArray[np.float64], accuracy_R: NDArray[np.float64], curve: Sequence[Mapping[str, Any]]
) -> tuple[float, float, float] | None:
    """Mean accuracy of a method less that of a baseline at the same novelty, with 95 % of its bootstrap.

    Each network of the method is compared with the baseline's mean accuracy at its own novelty, interpolated between
    the scales that the baseline was drawn at. None where the method's median novelty is outside of these: nothing is
    extrapolated.

    Args:
        novelty_R: of the method's networks.
        accuracy_R: of the same.
        curve: the baseline's networks: ``scale``, ``novelty``, ``test_acc``.
    """
    scales = sorted({row["scale"] for row in curve})
    samples = [
        np.array([[row["novelty"], row["test_acc"]] for row in curve if row["scale"] == scale]) for scale in scales
    ]
    middle = float(np.median(novelty_R))
    centres = [float(sample[:, 0].mean()) for sample in samples]
    if len(centres) < 2 or not min(centres) <= middle <= max(centres):
        return None
    rng, differences = np.random.default_rng(0), []
    for draw in range(DRAWS + 1):
        ours = np.arange(len(novelty_R)) if draw == 0 else rng.integers(len(novelty_R), size=len(novelty_R))
        theirs = [sample if draw == 0 else sample[rng.integers(len(sample), size=len(sample))] for sample in samples]
        points = np.array([sample.mean(0) for sample in theirs])
        points = points[points[:, 0].argsort()]
        expected = np.interp(novelty_R[ours], points[:, 0], points[:, 1])
        differences.append(float((accuracy_R[ours] - expected).mean()))
    low, high = np.percentile(differences[1:], [2.5, 97.5])
    return differences[0], float(low), float(high)


CURVES = {
    "noise": "noise added to anchors",
    "shared_noise": "noise that all tokens share",
    "interpolation": "interpolation of anchors",
    "average": "averages of anchors",
}
"""Baselines that methods are compared with at equal novelty."""

_WITHOUT_SANE = ("scratch", "anchors", "noise", "shared_noise", "average", "interpolation")


def verdict(
    rows: Sequence[Mapping[str, Any]],
    candidates: Sequence[Mapping[str, Any]],
    usual_agreement: float | None,
) -> list[str]:
    """Plain sentences: whether each method of SANE copies, and whether it beats noise and interpolation.

    Args:
        rows: kept networks of all methods.
        candidates: drawn networks of all sources at all scales; comparisons are of unselected draws of both sides.
        usual_agreement: as the auditor has it.
    """
    said = []
    for method in dict.fromkeys(row["method"] for row in rows):
        if method.split(":")[0] not in _WITHOUT_SANE:
            said.append(_of_copies(method, [row for row in rows if row["method"] == method], usual_agreement))
    for source in dict.fromkeys(row["source"] for row in candidates):
        if source in _WITHOUT_SANE or source == "reconstruction":
            continue
        mine = [row for row in candidates if row["source"] == source and row["as_method"]]
        for baseline, words in CURVES.items():
            curve = [row for row in candidates if row["source"] == baseline]
            if mine and curve:
                said.append(_against(source, mine, words, curve))
    return said


def _of_copies(method: str, rows: Sequence[Mapping[str, Any]], usual: float | None) -> str:
    novelty = float(np.median([row["novelty"] for row in rows]))
    words = f"{method}: {novelty:.2f} of the distance between two training runs from its nearest training network"
    near = novelty < COPY
    agreements = [row["wrong_agreement"] for row in rows if row["wrong_agreement"] is not None]
    if agreements and usual is not None:
        agreement = float(np.median(agreements))
        near = near or agreement > usual
        words += f", {100 * agreement:.0f} % of wrong answers shared with the likest (runs: below {100 * usual:.0f} %)"
    return f"{words}: {'close copies of training networks' if near else 'no copies'}"


def _against(source: str, mine: Sequence[Mapping[str, Any]], words: str, curve: Sequence[Mapping[str, Any]]) -> str:
    if len(mine) < FEWEST:
        return f"{source} against {words}: {len(mine)} networks are too few to tell"
    novelty, accuracy = (np.array([row[name] for row in mine], dtype=float) for name in ("novelty", "test_acc"))
    found = compare_at_equal_novelty(novelty, accuracy, curve)
    if found is None:
        return f"{source} against {words}: not comparable, as no scale of it is as far from the training networks"
    gap, low, high = (100 * value for value in found)
    word = "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"
    return f"{source} is {word} {words} at equal novelty: {gap:+.1f} points of accuracy [{low:+.1f}, {high:+.1f}]"
