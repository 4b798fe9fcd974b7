"""The novelty audit: are generated models new, and are they better than what costs nothing?

Zeng et al. ("Generative Modeling of Weights: Generalization or Memorization?", CVPR 2026, arXiv 2506.07998) found that
generators of weights mostly replicate checkpoints they were trained on, and do not beat checkpoints with noise or
averages of checkpoints. So here each generated model is compared with the training models, in its weights (distance to
the nearest) and in what it does (wrong answers in common), both in units of how far training runs are from each other;
and its accuracy with that of such baselines at the same novelty. What cannot be told from so few models is not claimed.

Weights are flat and normalised: each layer divided by its scale, by the caller, so that all layers count. Never
generates or evaluates a model, never imports Ray.

Shape suffixes: R generated models; M training models; r, m blocks of these; X weights of a model; I images; k nearest
training models; n models of one method; S scales of a baseline; D draws of a bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.finetuning.statistics import difference
from sane_ray.properties.evaluation import percentile_interval
from sane_ray.tokens.alignment import Cost, Matcher
from sane_ray.tokens.symmetry import Symmetry, permute

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
StateDict = Mapping[str, Tensor]
Verdict = Literal["ahead", "behind", "not told apart", "not comparable"]

REPLICA_NOVELTY = 0.5
"""Models nearer to a training model than this share of the distance between training runs are replicas."""
REPLICA_QUANTILE = 0.95
"""Models whose wrong answers agree more than this quantile among training runs are replicas, too."""
LEAST_MODELS = 5
"""Nothing is claimed from fewer."""
DRAWS = 2000
"""Of a bootstrap."""
MOST_OUTSIDE = 0.05
"""Share of draws that may fall beyond the ends of a baseline's curve."""

_AT_ONCE = 2**24
"""Values (of 8 bytes) that are held at once."""
_ROWS = 1024
"""Models of a block."""
_ROUNDING = 1e-11
"""Most that a squared distance by a product of matrices is off, as a share of both squared norms."""


def weight_distances(
    generated_RX: NDArray[Any],
    training_MX: NDArray[Any],
    runs_R: ArrayLike | None = None,
    runs_M: ArrayLike | None = None,
    *,
    at_once: int = _AT_ONCE,
) -> tuple[Floats, Indices]:
    """Root-mean-square difference between each model and the nearest training model.

    Exact: a product of matrices only tells which training models can be nearest.

    Args:
        generated_RX: Normalised weights, of any floating-point type; may be a memory map.
        training_MX: The same of the training models, in the same frame of permutations.
        runs_R: Training run of each generated model, where it has one: the pairs within a run are left out.
        runs_M: Training run of each training model.
        at_once: Values that are held at once, about.

    Returns:
        The distance [R] and the number of that training model [R] (the first of equals). NaN and -1 for a model that is
        not finite, or has nothing to be compared with; training models that are not finite are nobody's nearest.

    Raises:
        InputError: Widths differ, or only one of the runs is given.
    """
    distance_R1, index_R1 = nearest_models(generated_RX, training_MX, 1, runs_R, runs_M, at_once=at_once)
    return distance_R1[:, 0], index_R1[:, 0]


def nearest_models(
    generated_RX: NDArray[Any],
    training_MX: NDArray[Any],
    nearest: int,
    runs_R: ArrayLike | None = None,
    runs_M: ArrayLike | None = None,
    *,
    at_once: int = _AT_ONCE,
) -> tuple[Floats, Indices]:
    """The ``nearest`` training models of each model, nearest first; see ``weight_distances``.

    Returns:
        Distances [R, k] and numbers of the training models [R, k]; NaN and -1 where there are fewer.
    """
    if generated_RX.ndim != 2 or training_MX.ndim != 2 or generated_RX.shape[1] != training_MX.shape[1]:
        raise InputError(
            f"weights of shapes {generated_RX.shape} and {training_MX.shape} cannot be compared: flatten models of one "
            "architecture, a row each"
        )
    distance_Rk = np.full((len(generated_RX), nearest), np.nan)
    index_Rk = np.full((len(generated_RX), nearest), -1, np.int64)
    for rows in _blocks(len(generated_RX), _ROWS):
        squares_rM, rounding_rM = _screen(generated_RX[rows], training_MX, at_once)
        squares_rM[_same_run(runs_R, runs_M, rows, squares_rM.shape)] = np.nan
        for row, squares_M, rounding_M in zip(range(rows.start, rows.stop), squares_rM, rounding_rM, strict=True):
            candidates = _candidates(squares_M, rounding_M, nearest)
            exact = np.array([_mean_square(generated_RX[row], training_MX[place]) for place in candidates])
            order = np.argsort(exact, kind="stable")[:nearest]
            distance_Rk[row, : len(order)] = np.sqrt(exact[order])
            index_Rk[row, : len(order)] = candidates[order]
    return distance_Rk, index_Rk


def aligned_distances(
    generated_RX: NDArray[Any],
    training_MX: NDArray[Any],
    states_R: Sequence[StateDict],
    states_M: Sequence[StateDict],
    symmetry: Symmetry,
    flatten: Callable[[StateDict], NDArray[Any]],
    *,
    nearest: int = 5,
    runs_R: ArrayLike | None = None,
    runs_M: ArrayLike | None = None,
    cost: Cost = "all",
) -> tuple[Floats, Indices]:
    """``weight_distances`` after the channels of the nearest training models are matched to each model's own.

    In one common frame two models are aligned to a third, not to each other. So the ``nearest`` of that frame are
    matched in pairs (``tokens.alignment``), which can only bring them nearer: where it does not, the frame's stays.

    Args:
        generated_RX: Normalised weights in a common frame, as for ``weight_distances``.
        training_MX: The same of the training models.
        states_R: The same generated models as state dicts; only items are asked for, so they may be read when needed.
        states_M: The training models. Matching minimises the distance of these tensors: give normalised ones.
        symmetry: Symmetry of the architecture.
        flatten: Makes a state dict one row of ``training_MX``.
        nearest: How many training models are matched.
        runs_R: As for ``weight_distances``.
        runs_M: As for ``weight_distances``.
        cost: Which tensors matching counts, as in ``tokens.alignment.match``.

    Returns:
        The distance [R], never more than that of ``weight_distances``, and the number of that training model [R].

    Raises:
        InputError: Models, symmetry and weights do not fit.
    """
    coarse_Rk, index_Rk = nearest_models(generated_RX, training_MX, nearest, runs_R, runs_M)
    distance_R, index_R = coarse_Rk[:, 0].copy(), index_Rk[:, 0].copy()
    for row in np.flatnonzero(index_R >= 0).tolist():
        state = states_R[row]
        if not _is_finite(state):
            continue
        matcher = Matcher(state, symmetry, cost=cost)
        for place in index_Rk[row][index_Rk[row] >= 0].tolist():
            other = states_M[place]
            if _is_finite(other):
                aligned = permute(other, symmetry, matcher.match(other).permutations)
                distance = np.sqrt(_mean_square(generated_RX[row], np.asarray(flatten(aligned))))
                if distance < distance_R[row]:
                    distance_R[row], index_R[row] = distance, place
    return distance_R, index_R


def wrong_agreement(
    predictions_RI: NDArray[Any],
    training_predictions_MI: NDArray[Any],
    labels_I: NDArray[Any],
    runs_R: ArrayLike | None = None,
    runs_M: ArrayLike | None = None,
    *,
    at_once: int = _AT_ONCE,
) -> tuple[Floats, Indices]:
    """How far each model's wrong answers are those of one training model: intersection over union of wrong predictions.

    Images where both give the same wrong class, of the images where at least one is wrong; 0 where neither ever is.
    1 is a model that errs as a training model does (Zeng et al., arXiv 2506.07998, whose IoU of wrong predictions this
    is, with a prediction being an image and its class).

    Args:
        predictions_RI: Classes, from 0. A model with an answer that is negative or not finite is left out.
        training_predictions_MI: The same of the training models.
        labels_I: True classes.
        runs_R: As for ``weight_distances``.
        runs_M: As for ``weight_distances``.
        at_once: Values that are held at once, about.

    Returns:
        The largest [R] and the number of that training model [R] (the first of equals); NaN and -1 for a model that is
        left out, or has nothing to be compared with.

    Raises:
        InputError: There are not as many predictions as labels, or only one of the runs is given.
    """
    images = len(labels_I)
    for name, predictions in (("generated", predictions_RI), ("training", training_predictions_MI)):
        if predictions.ndim != 2 or predictions.shape[1] != images:
            raise InputError(f"predictions of {name} models have the shape {predictions.shape}: give {images} a model")
    largest_R, index_R = np.full(len(predictions_RI), np.nan), np.full(len(predictions_RI), -1, np.int64)
    size = max(1, min(_ROWS, at_once // (4 * max(images, 1))))
    for rows in _blocks(len(predictions_RI), size):
        mine = _wrong_answers(predictions_RI[rows], labels_I)
        parts = [
            _overlap(mine, _wrong_answers(training_predictions_MI[block], labels_I))
            for block in _blocks(len(training_predictions_MI), size)
        ]
        if parts:
            overlap_rM = np.concatenate(parts, axis=1)
            overlap_rM[_same_run(runs_R, runs_M, rows, overlap_rM.shape)] = -1
            best_r = overlap_rM.argmax(axis=1)
            known_r = overlap_rM[np.arange(len(best_r)), best_r] >= 0
            largest_R[rows] = np.where(known_r, overlap_rM.max(axis=1), np.nan)
            index_R[rows] = np.where(known_r, best_r, -1)
    return largest_R, index_R


@dataclass(frozen=True, eq=False)
class Reference:
    """How near training models of different runs are to each other: what novelty is measured in.

    Attributes:
        distances_M: Distance of training models to the nearest one of another run. Measure them as those of the
            generated models: by ``weight_distances`` or by ``aligned_distances``, with the runs.
        agreements_M: Their largest wrong agreement with one of another run.

    Raises:
        InputError: No two runs can be compared, or all are the same.
    """

    distances_M: Floats
    agreements_M: Floats

    def __post_init__(self) -> None:
        if not np.isfinite(self.distances_M).any() or not self.median_distance > 0:
            raise InputError(
                "novelty needs finite training models of at least two runs that differ: give the run of each training "
                "model, and more of them"
            )

    @classmethod
    def measure(
        cls,
        training_MX: NDArray[Any],
        predictions_MI: NDArray[Any],
        labels_I: NDArray[Any],
        runs_M: ArrayLike,
        *,
        most: int = 500,
        seed: int = 0,
    ) -> Reference:
        """Compares training models with those of other runs; checkpoints of a model's own run never count.

        Args:
            training_MX: Normalised weights, as for ``weight_distances``.
            predictions_MI: Classes, as for ``wrong_agreement``.
            labels_I: True classes.
            runs_M: Training run of each model.
            most: So many models, drawn at random, are compared with all others.
            seed: Of that draw.
        """
        runs = np.asarray(runs_M)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(runs))[:most])
        distances_M, _ = weight_distances(training_MX[chosen], training_MX, runs[chosen], runs)
        agreements_M, _ = wrong_agreement(predictions_MI[chosen], predictions_MI, labels_I, runs[chosen], runs)
        return cls(distances_M, agreements_M)

    @property
    def median_distance(self) -> float:
        """The unit of novelty."""
        return self.distance_quantile(0.5)

    def distance_quantile(self, quantile: float) -> float:
        """Which distance such a share of the training models stays below."""
        return _quantile(self.distances_M, quantile)

    def agreement_quantile(self, quantile: float = REPLICA_QUANTILE) -> float:
        """Which wrong agreement such a share of the training models stays below; NaN where none is known."""
        return _quantile(self.agreements_M, quantile)

    def novelty(self, distances_R: Floats) -> Floats:
        """Distances in units of those between training runs: 0 is a copy, 1 as far as runs are from each other."""
        return distances_R / self.median_distance


@dataclass(frozen=True, eq=False)
class Points:
    """What was measured of the models of one method.

    Attributes:
        novelty_n: NaN where a model is not finite.
        accuracy_n: On test images, in [0, 1].
        agreement_n: Largest wrong agreement; None if not measured.
        scale_n: Of a baseline that is swept, how strong each model's noise was (or its weight in the interpolation, or
            the number of models averaged); None for one that is not.
    """

    novelty_n: Floats
    accuracy_n: Floats
    agreement_n: Floats | None = None
    scale_n: Floats | None = None

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.novelty_n, self.accuracy_n, self.agreement_n, self.scale_n)
                   if values is not None}  # fmt: skip
        if len(lengths) > 1:
            raise InputError(f"measures of the models of one method have {sorted(lengths)} values: give one a model")

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which models have both novelty and accuracy [n]."""
        return np.isfinite(self.novelty_n) & np.isfinite(self.accuracy_n)

    @property
    def left_out(self) -> int:
        """How many models have not."""
        return int((~self.known).sum())


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline; differences of accuracies, in [-1, 1].

    Attributes:
        verdict: "ahead" or "behind" where the interval is on one side of 0, else "not told apart"; "not comparable"
            where there is nothing to be said.
        novelty: The method's median, at which both are compared.
        difference: Accuracy of the method less that of the baseline; NaN where not comparable.
        low: Lower end of the 95 % interval.
        high: Upper end.
        reason: Why the two are not comparable.
    """

    verdict: Verdict
    novelty: float
    difference: float = np.nan
    low: float = np.nan
    high: float = np.nan
    reason: str = ""


def compare_at_equal_novelty(method: Points, baseline: Points, *, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Mean accuracy of a method less that of a baseline at the method's median novelty.

    The baseline's curve runs through its scales (median novelty, mean accuracy), linear between neighbours. Nothing is
    said beyond its ends. The interval is 95 % of a bootstrap over the models of the method and of each scale; the
    median novelty is that of the draw.

    Args:
        method: Models of the method.
        baseline: Models of the baseline, with ``scale_n``. Scales of fewer than 5 models are left out.
        draws: Of the bootstrap.
        seed: Of the draws.

    Raises:
        InputError: The baseline has no scales.
    """
    novelty_n, accuracy_n = method.novelty_n[method.known], method.accuracy_n[method.known]
    scales, middle = _scales(baseline), _quantile(novelty_n, 0.5)
    curve_2S = np.array([[np.median(novelty), np.mean(accuracy)] for novelty, accuracy in scales]).reshape(-1, 2).T
    reason = _why_not(len(novelty_n), middle, curve_2S[0])
    if reason:
        return Comparison("not comparable", middle, reason=reason)
    rng = np.random.default_rng(seed)
    middle_D, mean_D = _draw(novelty_n, accuracy_n, draws, rng)
    drawn = [_draw(novelty, accuracy, draws, rng) for novelty, accuracy in scales]
    novelty_DS, accuracy_DS = (np.stack(values, axis=1) for values in zip(*drawn, strict=True))
    expected_D = np.array([_on_curve(*curve) for curve in zip(novelty_DS, accuracy_DS, middle_D, strict=True)])
    if np.isnan(expected_D).mean() > MOST_OUTSIDE:
        return Comparison("not comparable", middle, reason=f"this is too near an end of {_reach(curve_2S[0])}")
    return _judge(middle, float(accuracy_n.mean()) - _on_curve(curve_2S[0], curve_2S[1], middle), mean_D - expected_D)


def compare_accuracy(method: Points, other: Points) -> Comparison:
    """Mean accuracy of a method less that of other models, such as its anchors, whatever their novelty."""
    mine_n, theirs_n = (points.accuracy_n[np.isfinite(points.accuracy_n)] for points in (method, other))
    middle = _quantile(method.novelty_n, 0.5)
    for count in (len(mine_n), len(theirs_n)):
        if count < LEAST_MODELS:
            return Comparison("not comparable", middle, reason=_too_few(count))
    gap, low, high = difference(mine_n, theirs_n)
    found: Verdict = "ahead" if low > 0 else "behind" if high < 0 else "not told apart"
    return Comparison(found, middle, gap, low, high)


def interval(
    values_n: NDArray[Any], statistic: Literal["mean", "median"] = "mean", *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """Mean or median of the finite values, and the 95 % interval of its bootstrap; NaN where there are none."""
    known_n = np.asarray(values_n, float)[np.isfinite(np.asarray(values_n, float))]
    if not len(known_n):
        return np.nan, np.nan, np.nan
    of = np.mean if statistic == "mean" else np.median
    return float(of(known_n)), *percentile_interval(of(_resample(known_n, draws, np.random.default_rng(seed)), axis=1))


def verdict(
    method: str,
    models: Points,
    reference: Reference,
    baselines: Mapping[str, Points],
    anchors: Points | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[str]:
    """What the audit found of one method, in sentences for a reader.

    Args:
        method: Its name.
        models: Its models.
        reference: What novelty was measured in.
        baselines: By name, the swept baselines that it is compared with at equal novelty.
        anchors: The training models that it started from.
        draws: Of the bootstraps.
        seed: Of the draws.

    Returns:
        Whether the models are replicas, by their weights and by their errors; whether they are ahead of each baseline
        and of the anchors; how many were left out. One sentence alone where there are fewer than 5 models.
    """
    known, count = models.known, int(models.known.sum())
    left_out = [f"Left out: {models.left_out} of {len(known)} models, which are not finite."] if models.left_out else []
    if count < LEAST_MODELS:
        return [f"{method}: nothing is claimed from {count} models; at least {LEAST_MODELS} are needed.", *left_out]
    novelty = interval(models.novelty_n[known], "median", draws=draws, seed=seed)
    sides, sentences = _weights_sentence(novelty)
    if models.agreement_n is not None and np.isfinite(reference.agreement_quantile()):
        agreement = interval(models.agreement_n[known], "median", draws=draws, seed=seed)
        if np.isfinite(agreement[0]):
            errors = _errors_sentence(agreement, reference.agreement_quantile())
            sides, sentences = sides + errors[0], sentences + errors[1]
    kind = "replicas of training models" if 1 in sides else "perhaps replicas" if 0 in sides else "no replicas"
    sentences = [f"{method}: {kind} ({count} models).", *sentences]
    for name, baseline in baselines.items():
        found = compare_at_equal_novelty(models, baseline, draws=draws, seed=seed)
        sentences.append(said_of(found, name, f" at novelty {found.novelty:.2f}"))
    if anchors is not None:
        sentences.append(said_of(compare_accuracy(models, anchors), "its anchors"))
    return sentences + left_out


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _same_run(
    runs_R: ArrayLike | None, runs_M: ArrayLike | None, rows: slice, shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Which pairs of a block are of one training run [r, M]."""
    if runs_R is None and runs_M is None:
        return np.zeros(shape, bool)
    if runs_R is None or runs_M is None:
        raise InputError("runs are given of the generated or of the training models alone: give both, or neither")
    return np.asarray(np.asarray(runs_R)[rows, None] == np.asarray(runs_M)[None, :])


def _screen(models_rX: NDArray[Any], training_MX: NDArray[Any], at_once: int) -> tuple[Floats, Floats]:
    """Squared distances [r, M] but for rounding, and how much this may be; not finite where a model is not."""
    squares_rM = np.zeros((len(models_rX), len(training_MX)))
    sizes_rM = np.zeros_like(squares_rM)
    for block in _blocks(len(training_MX), _ROWS):
        for columns in _blocks(models_rX.shape[1], max(1, at_once // (len(models_rX) + _ROWS))):
            mine = models_rX[:, columns].astype(np.float64)
            theirs = training_MX[block, columns].astype(np.float64)
            sizes = np.vecdot(mine, mine)[:, None] + np.vecdot(theirs, theirs)
            sizes_rM[:, block] += sizes
            with np.errstate(invalid="ignore"):  # of models that are not finite
                squares_rM[:, block] += sizes - 2 * (mine @ theirs.T)
    return squares_rM, _ROUNDING * sizes_rM


def _candidates(squares_M: Floats, rounding_M: Floats, nearest: int) -> Indices:
    """Those training models that can be among the nearest."""
    known = np.flatnonzero(np.isfinite(squares_M))
    if not len(known):
        return known
    place = min(nearest, len(known)) - 1
    bound = np.partition(squares_M[known] + rounding_M[known], place)[place]
    return known[squares_M[known] - rounding_M[known] <= bound]


def _mean_square(one_X: NDArray[Any], other_X: NDArray[Any]) -> float:
    """Mean squared difference, in float64 whatever the weights' type."""
    total = 0.0
    for columns in _blocks(len(one_X), 2**20):
        total += float(np.square(one_X[columns].astype(np.float64) - other_X[columns]).sum())
    return total / max(len(one_X), 1)


def _is_finite(state: StateDict) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


@dataclass(frozen=True, eq=False)
class _Wrong:
    """Wrong answers of a block of models."""

    wrong_rI: NDArray[np.bool_]
    classes_rI: Indices
    answered_r: NDArray[np.bool_]


def _wrong_answers(predictions_rI: NDArray[Any], labels_I: NDArray[Any]) -> _Wrong:
    valid_rI = np.isfinite(predictions_rI) & (predictions_rI >= 0)
    classes_rI = np.where(valid_rI, predictions_rI, 0).astype(np.int64)
    return _Wrong(classes_rI != labels_I, classes_rI, valid_rI.all(axis=1))


def _overlap(one: _Wrong, other: _Wrong) -> Floats:
    """Intersection over union of wrong predictions [r, m]; -1 where a model is left out."""
    classes = int(max(one.classes_rI.max(initial=0), other.classes_rI.max(initial=0))) + 1
    same_rm = (_one_hot(one, classes) @ _one_hot(other, classes).T).toarray()
    both_rm = one.wrong_rI.astype(np.float32) @ other.wrong_rI.astype(np.float32).T  # exact up to 2^24 images
    either_rm = one.wrong_rI.sum(axis=1)[:, None] + other.wrong_rI.sum(axis=1) - both_rm.astype(np.float64)
    overlap_rm = same_rm / np.maximum(either_rm, 1)
    overlap_rm[~(one.answered_r[:, None] & other.answered_r)] = -1
    return overlap_rm


def _one_hot(answers: _Wrong, classes: int) -> Any:
    """A sparse row a model, with a column for each image and class."""
    from scipy.sparse import csr_array

    models, images = np.nonzero(answers.wrong_rI)
    columns = images * classes + answers.classes_rI[models, images]
    count, width = answers.wrong_rI.shape
    return csr_array((np.ones(len(models), np.int32), (models, columns)), shape=(count, width * classes))


def _quantile(values: Floats, quantile: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, quantile)) if len(known) else np.nan


def _scales(points: Points) -> list[tuple[Floats, Floats]]:
    """Novelty and accuracy of the models of each scale that has enough of them."""
    if points.scale_n is None:
        raise InputError(
            "the baseline has no scale_n: give the strength (noise, weight, number averaged) of each model"
        )
    groups = [points.known & (points.scale_n == scale) for scale in np.unique(points.scale_n)]
    return [(points.novelty_n[g], points.accuracy_n[g]) for g in groups if g.sum() >= LEAST_MODELS]


def _why_not(count: int, middle: float, novelty_S: Floats) -> str:
    """Why a method of so many models cannot be compared with a curve at a novelty; empty if it can."""
    if count < LEAST_MODELS:
        return _too_few(count)
    if len(novelty_S) < 2:
        return f"fewer than 2 of its scales have {LEAST_MODELS} models"
    if not novelty_S.min() <= middle <= novelty_S.max():
        return f"this is beyond {_reach(novelty_S)}"
    return ""


def _reach(novelty_S: Floats) -> str:
    return f"what was tried, {novelty_S.min():.2f} to {novelty_S.max():.2f}"


def _on_curve(novelty_S: Floats, accuracy_S: Floats, at: float) -> float:
    """Accuracy on the line between the neighbouring scales; NaN beyond the first or last."""
    order = np.argsort(novelty_S)
    return float(np.interp(at, novelty_S[order], accuracy_S[order], left=np.nan, right=np.nan))


def _resample(values_n: NDArray[Any], draws: int, rng: np.random.Generator) -> NDArray[Any]:
    """As many values drawn with replacement, [D, n]."""
    return values_n[rng.integers(len(values_n), size=(draws, len(values_n)))]


def _draw(novelty_n: Floats, accuracy_n: Floats, draws: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Median novelty and mean accuracy of models drawn with replacement, [D] each."""
    rows_Dn = _resample(np.arange(len(novelty_n)), draws, rng)
    return np.median(novelty_n[rows_Dn], axis=1), accuracy_n[rows_Dn].mean(axis=1)


def _judge(novelty: float, difference: float, draws_D: Floats) -> Comparison:
    low, high = percentile_interval(draws_D)
    found: Verdict = "ahead" if low > 0 else "behind" if high < 0 else "not told apart"
    return Comparison(found, novelty, difference, low, high)


def _too_few(count: int) -> str:
    return f"{count} models are too few, at least {LEAST_MODELS} are needed"


def _side(low: float, high: float, bound: float) -> int:
    """Whether an interval lies above (1), below (-1) or around a bound (0)."""
    return int(low > bound) - int(high < bound)


def _weights_sentence(novelty: tuple[float, float, float]) -> tuple[list[int], list[str]]:
    """Whether the models are replicas (1), perhaps (0) or not (-1) by their weights, and the sentence."""
    middle, low, high = novelty
    side = -_side(low, high, REPLICA_NOVELTY)
    where = {1: "below", 0: "not told apart from", -1: "above"}[side]
    text = f"In weights: novelty {middle:.2f} [{low:.2f}, {high:.2f}] is {where} {REPLICA_NOVELTY}"
    return [side], [f"{text} (0: a copy; 1: as far as training runs are from each other)."]


def _errors_sentence(agreement: tuple[float, float, float], bound: float) -> tuple[list[int], list[str]]:
    """The same by their errors."""
    middle, low, high = agreement
    side = _side(low, high, bound)
    where = {1: "above", 0: "not told apart from", -1: "below"}[side]
    text = f"In errors: wrong agreement {middle:.2f} [{low:.2f}, {high:.2f}] is {where} {bound:.2f}"
    return [side], [f"{text}, the {100 * REPLICA_QUANTILE:.0f} % quantile among training runs."]


def said_of(found: Comparison, name: str, where: str = "") -> str:
    """A comparison in words."""
    if found.verdict == "not comparable":
        return f"Not comparable with {name}{where}: {found.reason}."
    how = {"ahead": "Ahead of", "behind": "Behind", "not told apart": "Not told apart from"}[found.verdict]
    numbers = f"{100 * found.difference:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{how} {name}{where}: {numbers}."
