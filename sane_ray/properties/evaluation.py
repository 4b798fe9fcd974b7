"""How good predictions are, with intervals: 95 % of a bootstrap over models, all checkpoints of a model drawn together.

Draws depend on a seed and the models alone, so the draws of two feature sets on the same rows are pairs. Never fits.

Shape suffixes: n rows, S seeds, D draws, M models.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUMBER_METRICS = ("r2", "tau", "mae")
CATEGORY_METRICS = ("accuracy",)

INTERVAL = (2.5, 97.5)
"""Percentiles of the draws."""

MOST_PAIRED_ROWS, MOST_PAIRED_MODELS = 20_000, 2_500
"""Up to so many Kendall's tau of all draws comes from one table of pairs; beyond, each draw takes a sort of its own."""
PAIRS_AT_ONCE = 8_000_000
"""Pairs of rows that are compared at once: a few bytes each."""


@dataclass(frozen=True, eq=False)
class Score:
    """One metric of one fit.

    Attributes:
        value: Mean over seeds.
        draws_D: Its value in each draw, of a seed drawn with it; NaN where a draw does not define it.
    """

    value: float
    draws_D: Array

    @property
    def interval(self) -> tuple[float, float]:
        """Between which values 95 % of the draws lie; NaN if there are none."""
        return percentile_interval(self.draws_D)


def percentile_interval(draws_D: Array) -> tuple[float, float]:
    """The middle 95 % of the draws; NaN if none is a number."""
    known = draws_D[np.isfinite(draws_D)]
    if len(known) == 0:
        return np.nan, np.nan
    low, high = np.percentile(known, INTERVAL)
    return float(low), float(high)


def evaluate_numbers(
    truth_n: Array, predictions_Sn: Array, models_n: NDArray[Any], draws: int, seed: int
) -> dict[str, Score]:
    """R^2, Kendall's tau-b and mean absolute error.

    R^2 is 1 - mean(e^2) / var(truth) with the variance of these rows, as published.

    Args:
        truth_n: Targets.
        predictions_Sn: Predictions of each seed.
        models_n: Whose checkpoint each row is.
        draws: How often models are drawn with replacement.
        seed: Of the draws.
    """
    counts_DM, index_n = _draw(models_n, draws, seed)
    chosen_D = np.random.default_rng([seed, 1]).integers(len(predictions_Sn), size=draws)
    r2s, maes, taus = zip(*(_numbers(truth_n, p_n, index_n, counts_DM, seed) for p_n in predictions_Sn), strict=True)
    return {name: _over_seeds(scores, chosen_D) for name, scores in zip(NUMBER_METRICS, (r2s, taus, maes), strict=True)}


def evaluate_categories(
    truth_n: NDArray[Any], predictions_Sn: NDArray[Any], models_n: NDArray[Any], draws: int, seed: int
) -> dict[str, Score]:
    """Accuracy; arguments as ``evaluate_numbers``."""
    counts_DM, index_n = _draw(models_n, draws, seed)
    chosen_D = np.random.default_rng([seed, 1]).integers(len(predictions_Sn), size=draws)
    scores = []
    for prediction_n in predictions_Sn:
        right_n = (prediction_n == truth_n).astype(float)
        (right_D, rows_D) = (counts_DM @ _by_model(values, index_n) for values in (right_n, np.ones_like(right_n)))
        scores.append(Score(float(right_n.mean()), right_D / rows_D))
    return {"accuracy": _over_seeds(scores, chosen_D)}


def r2_score(truth_n: Array, prediction_n: Array) -> float:
    """1 - mean(e^2) / var(truth), biased variance; NaN if the truth does not vary."""
    variance = float(np.var(truth_n))
    return 1 - float(np.mean((truth_n - prediction_n) ** 2)) / variance if variance > 0 else np.nan


def kendall_tau(truth_n: Array, prediction_n: Array) -> float:
    """Kendall's tau-b, in n log n; NaN if either does not vary."""
    from scipy.stats import kendalltau

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, whose tau is NaN
        return float(kendalltau(truth_n, prediction_n).statistic)


def _numbers(
    truth_n: Array, prediction_n: Array, index_n: NDArray[np.intp], counts_DM: Array, seed: int
) -> tuple[Score, Score, Score]:
    """R^2, MAE and tau of one seed's predictions."""
    centre = truth_n.mean()  # squares of what is centred do not cancel
    sums = (np.ones_like(truth_n), truth_n - centre, (truth_n - centre) ** 2, (truth_n - prediction_n) ** 2)
    rows_D, first_D, second_D, squares_D = (counts_DM @ _by_model(values, index_n) for values in sums)
    variance_D = second_D / rows_D - (first_D / rows_D) ** 2
    varies_D = variance_D > 1e-12 * max(float(np.var(truth_n)), 1e-300)
    r2_D = np.where(varies_D, 1 - squares_D / rows_D / np.where(varies_D, variance_D, 1.0), np.nan)
    errors_n = np.abs(truth_n - prediction_n)
    mae_D = counts_DM @ _by_model(errors_n, index_n) / rows_D
    tau_D = _tau_draws(truth_n, prediction_n, index_n, counts_DM)
    return (
        Score(r2_score(truth_n, prediction_n), r2_D),
        Score(float(errors_n.mean()), mae_D),
        Score(kendall_tau(truth_n, prediction_n), tau_D),
    )


def _tau_draws(truth_n: Array, prediction_n: Array, index_n: NDArray[np.intp], counts_DM: Array) -> Array:
    """tau-b of each draw.

    A draw's concordant minus discordant pairs are sums over pairs of models of what the pair contributes, times how
    often both were drawn; so are the pairs that are not tied. A row drawn twice is tied with itself in both.
    """
    models = counts_DM.shape[1]
    if len(truth_n) > MOST_PAIRED_ROWS or models > MOST_PAIRED_MODELS:
        return _tau_one_by_one(truth_n, prediction_n, index_n, counts_DM)
    pairs_3MM = _pairs_of_models(truth_n, prediction_n, index_n, models)
    agreeing, untied_1, untied_2 = (((counts_DM @ p_MM) * counts_DM).sum(axis=1) for p_MM in pairs_3MM)
    defined = (untied_1 > 0) & (untied_2 > 0)
    return np.where(defined, agreeing / np.sqrt(np.where(defined, untied_1 * untied_2, 1.0)), np.nan)


def _pairs_of_models(truth_n: Array, prediction_n: Array, index_n: NDArray[np.intp], models: int) -> Array:
    """Concordant less discordant pairs of rows of each two models, and those untied in the first and in the second.

    Every pair of rows is compared, some rows with all others at a time.

    Returns:
        [3, M, M].
    """
    order = np.argsort(index_n, kind="stable")
    models_n, truth_n, prediction_n = index_n[order], truth_n[order], prediction_n[order]
    starts = np.searchsorted(models_n, np.arange(models))
    sums_3MM = np.zeros((3, models, models))
    step = max(1, PAIRS_AT_ONCE // len(order))
    for begin in range(0, len(order), step):
        rows = slice(begin, begin + step)
        here, first_rows = np.unique(models_n[rows], return_index=True)
        first, second = (_signs(values[rows, None], values) for values in (truth_n, prediction_n))
        for sums_MM, pairs_rn in zip(sums_3MM, (first * second, np.abs(first), np.abs(second)), strict=True):
            by_model_rM = np.add.reduceat(pairs_rn, starts, axis=1, dtype=np.int32)
            sums_MM[here] += np.add.reduceat(by_model_rM, first_rows, axis=0, dtype=np.int64)
    return sums_3MM


def _signs(left: Array, right: Array) -> NDArray[np.int8]:
    return (left > right).astype(np.int8) - (left < right).astype(np.int8)


def _tau_one_by_one(truth_n: Array, prediction_n: Array, index_n: NDArray[np.intp], counts_DM: Array) -> Array:
    """``_tau_draws`` in the memory of the rows alone, n log n a draw."""
    taus = np.full(len(counts_DM), np.nan)
    for draw, counts_M in enumerate(counts_DM):
        rows = np.repeat(np.arange(len(truth_n)), counts_M[index_n].astype(int))
        taus[draw] = kendall_tau(truth_n[rows], prediction_n[rows])
    return taus


def _draw(models_n: NDArray[Any], draws: int, seed: int) -> tuple[Array, NDArray[np.intp]]:
    """How often each model is in each draw, [D, M], and each row's model, [n]."""
    names, index_n = np.unique(models_n, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts.astype(np.float64) if len(names) > 1 else np.empty((0, 1)), index_n


def _by_model(values_n: Array, index_n: NDArray[np.intp]) -> Array:
    return np.bincount(index_n, weights=values_n).astype(np.float64)


def _over_seeds(scores: Sequence[Score], chosen_D: NDArray[np.int64]) -> Score:
    draws_SD = np.stack([score.draws_D for score in scores])
    count = draws_SD.shape[1]
    return Score(float(np.mean([score.value for score in scores])), draws_SD[chosen_D[:count], np.arange(count)])
