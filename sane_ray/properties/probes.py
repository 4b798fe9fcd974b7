"""Probes: what reads a property off features. Each is fitted on training rows, chosen on validation rows.

Estimators come from scikit-learn; the ridge path, which is one decomposition for all its penalties and all targets, is
a few lines here. A probe never sees the target of a test row, and never says how good it is.

Shape suffixes: R rows in all, n training rows, F features, r components, P penalties.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Refit = Literal["train", "train_val"]

PUBLISHED_PENALTIES = (1e3, 3e2, 1e2, 3e1, 1e1, 3e0, 1e0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""The published list, in its order: of equally good ones the first counts."""

PENALTIES = tuple(float(penalty) for penalty in 10.0 ** np.arange(3, -5.01, -0.5))
"""Of the block ridge, for features whose blocks have variance 1 in all."""

BLOCK_WEIGHTS = (1.0, 0.25, 0.0625, 0.0)
FEW_BLOCK_WEIGHTS = (1.0, 0.125, 0.0)
"""Variance that a block may have beside one of weight 1; fewer choices where there are three blocks or more."""

LARGEST_DEVIATION = 10.0
"""Standardised features are clipped here: one network that diverged should not decide a fit."""

COMPONENTS = 32
"""Wider blocks are rotated to so many principal components before trees are grown: they are strongly correlated."""

BOOSTING_ROUNDS = 300

LOGISTIC_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


@dataclass(frozen=True, eq=False)
class Fit:
    """What one fitted probe says.

    Attributes:
        prediction_R: For every row, training rows included: numbers, or the texts of categories.
        choice: What validation chose.
    """

    prediction_R: NDArray[Any]
    choice: str


class Probe(Protocol):
    """One way to fit, over fixed features of all rows."""

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int) -> Fit:
        """Fits on the training rows and chooses on the validation rows; their targets must be known."""
        ...


@dataclass(frozen=True, eq=False)
class RidgePath:
    """Ridge regressions of every penalty on fixed training features, b = (X^T X + penalty I)^-1 X^T y, decomposed once.

    Attributes:
        rows_Rr: All rows in the coordinates of the components.
        eigenvalues_r: Of X^T X.
        projection_rn: What takes training targets to X^T y in those coordinates.
    """

    rows_Rr: Array
    eigenvalues_r: Array
    projection_rn: Array

    @classmethod
    def of_features(cls, features_RF: Array, train: Rows) -> RidgePath:
        """By singular values of the training rows: exact also where X^T X is near singular."""
        left_nr, singular_r, right_rF = np.linalg.svd(features_RF[train], full_matrices=False)
        return cls(features_RF @ right_rF.T, singular_r**2, singular_r[:, None] * left_nr.T)

    @classmethod
    def of_kernel(cls, kernel_Rn: Array, train: Rows) -> RidgePath:
        """From the products X X^T of all rows with the training rows, for more features than rows."""
        eigenvalues_r, vectors_nr = np.linalg.eigh(kernel_Rn[train])
        keep = eigenvalues_r > 1e-12 * eigenvalues_r[-1]
        vectors_nr = vectors_nr[:, keep]
        return cls(kernel_Rn @ vectors_nr, eigenvalues_r[keep], vectors_nr.T)

    def predict(self, target_n: Array, penalties: Sequence[float]) -> Array:
        """Predictions for all rows with each penalty, [P, R]."""
        shrunk_Pr = self.projection_rn @ target_n / (self.eigenvalues_r + np.array(penalties)[:, None])
        return shrunk_Pr @ self.rows_Rr.T


class PublishedRidge:
    """The published probe: no standardisation, a column of ones whose weight is penalised too, float64.

    SANE (arXiv 2406.09997, section 4.1) and its code (``solve_linear_system``): the penalty with the best validation
    R^2, or with the best training R^2 where no row is for validation.
    """

    def __init__(self, blocks: Mapping[str, NDArray[Any]], refit: Refit = "train") -> None:
        values = list(blocks.values())
        features_RF = np.concatenate([*values, np.ones((len(values[0]), 1))], axis=1, dtype=np.float64)
        self._path = _cached(lambda train: RidgePath.of_features(_imputed(features_RF, train), train))
        self._refit = refit

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``; nothing is random."""
        judged = val if len(val) else train
        predictions_PR = self._path(train).predict(target_R[train], PUBLISHED_PENALTIES)
        best, _ = _best(target_R[judged], predictions_PR[:, judged])
        penalty, choice = PUBLISHED_PENALTIES[best], f"published, penalty {PUBLISHED_PENALTIES[best]:g}"
        if self._refit == "train":
            return Fit(predictions_PR[best], choice)
        rows = np.concatenate([train, val])
        return Fit(self._path(rows).predict(target_R[rows], [penalty])[0], choice)


class BlockRidge:
    """Ridge on blocks of features that weigh as much as validation says, down to nothing.

    Each block is standardised on the training rows and has variance 1 in all, whatever its width, times its weight:
    a penalty of its own. A set of features holds every smaller set (weight 0), so more features cost little more than
    the noise of the choice. The intercept is free.
    """

    def __init__(self, blocks: Mapping[str, NDArray[Any]], refit: Refit = "train") -> None:
        self._names, self._blocks = list(blocks), [np.asarray(block, np.float64) for block in blocks.values()]
        self._paths = _cached(lambda train: list(self._decompose(train, list(block_weights(len(blocks))))))
        self._refit = refit

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``; nothing is random."""
        judged = val if len(val) else train
        best_score, best = -np.inf, (0, np.array([]), block_weights(1)[0], PENALTIES[0])
        for weights, path in self._paths(train):
            predictions_PR = _centred(path, target_R[train], PENALTIES)
            index, score = _best(target_R[judged], predictions_PR[:, judged])
            if score > best_score:
                best_score, best = score, (index, predictions_PR[index], weights, PENALTIES[index])
        _, prediction_R, weights, penalty = best
        shares = [f"{name} {weight:g}" for name, weight in zip(self._names, weights, strict=True)]
        choice = f"penalty {penalty:.3g}" + (f", weights {', '.join(shares)}" if len(shares) > 1 else "")
        if self._refit == "train" or not len(val):
            return Fit(prediction_R, choice)
        rows = np.concatenate([train, val])
        ((_, path),) = self._decompose(rows, [weights])
        return Fit(_centred(path, target_R[rows], [penalty])[0], choice)

    def _decompose(self, train: Rows, choices: Sequence[tuple[float, ...]]) -> Iterator[tuple[tuple[float, ...], RidgePath]]:
        """A path for each choice of weights, on the smaller of features and rows."""
        blocks = [standardized(block, train) / np.sqrt(max(block.shape[1], 1)) for block in self._blocks]
        if sum(block.shape[1] for block in blocks) > len(train):
            kernels = [block @ block[train].T for block in blocks]
            for weights in choices:
                kernel_Rn = sum((w * k for w, k in zip(weights, kernels, strict=True) if w), np.zeros_like(kernels[0]))
                yield weights, RidgePath.of_kernel(kernel_Rn, train)
            return
        features_RF = np.concatenate(blocks, axis=1)
        gram_FF = features_RF[train].T @ features_RF[train]
        for weights in choices:
            scale_F = np.repeat(np.sqrt(weights), [block.shape[1] for block in blocks])
            eigenvalues_r, vectors_Fr = np.linalg.eigh(scale_F[:, None] * gram_FF * scale_F)
            rows_Rr = features_RF @ (scale_F[:, None] * vectors_Fr)
            yield weights, RidgePath(rows_Rr, eigenvalues_r.clip(min=0), rows_Rr[train].T)


class Boosting:
    """Gradient-boosted trees (scikit-learn's histogram ones), with as many rounds as validation wants.

    Several blocks are read together and each by itself; validation chooses one of these fits or their mean, so that
    many weak features need not hide a few strong ones. Blocks of more than ``2 COMPONENTS`` columns are standardised
    and rotated to their principal components. The seed draws the columns that a split may use.
    """

    def __init__(self, blocks: Mapping[str, NDArray[Any]], refit: Refit = "train") -> None:
        def prepare(train: Rows) -> dict[str, Array]:
            each = {name: components(block, train) for name, block in blocks.items()}
            return {"all": np.concatenate(list(each.values()), axis=1)} | (each if len(each) > 1 else {})

        self._features = _cached(prepare)

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``."""
        judged = val if len(val) else train
        fits = {name: _boost(x_RF, target_R, train, judged, seed) for name, x_RF in self._features(train).items()}
        predictions = {name: prediction_R for name, (prediction_R, _) in fits.items()}
        if len(fits) == 1:
            return Fit(predictions["all"], f"{fits['all'][1]} rounds")
        predictions |= {"mean": np.mean(list(predictions.values()), axis=0)}
        best, _ = _best(target_R[judged], np.stack([prediction_R[judged] for prediction_R in predictions.values()]))
        return Fit(list(predictions.values())[best], f"{list(predictions)[best]} of {', '.join(fits)}")


class Logistic:
    """Multinomial logistic regression on standardised blocks; the strength with the best validation accuracy.

    The published probe of categories is the same model, trained with Adam for 50 epochs.
    """

    def __init__(self, blocks: Mapping[str, NDArray[Any]], refit: Refit = "train") -> None:
        def prepare(train: Rows) -> Array:
            return np.concatenate([standardized(b, train) / np.sqrt(max(b.shape[1], 1)) for b in blocks.values()], axis=1)

        self._features = _cached(prepare)

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``; nothing is random."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        features_RF, judged = self._features(train), val if len(val) else train
        best, choice = (-1.0, np.array([], dtype=object)), ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a path's weak end need not converge to be judged
            for strength in LOGISTIC_STRENGTHS:
                model = LogisticRegression(C=strength, max_iter=300)
                prediction_R = model.fit(features_RF[train], target_R[train].astype(str)).predict(features_RF)
                accuracy = float(np.mean(prediction_R[judged] == target_R[judged]))
                if accuracy > best[0]:
                    best, choice = (accuracy, prediction_R), f"C {strength:g}"
        return Fit(best[1].astype(object), choice)


PROBES: dict[str, Callable[..., Probe]] = {
    "ridge": BlockRidge,
    "published": PublishedRidge,
    "boosting": Boosting,
    "logistic": Logistic,
}


def _boost(features_RF: Array, target_R: Array, train: Rows, judged: Rows, seed: int) -> tuple[Array, int]:
    """Predictions for all rows after the rounds that judge best, and how many these are."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    model = HistGradientBoostingRegressor(
        learning_rate=0.05,
        max_iter=BOOSTING_ROUNDS,
        max_leaf_nodes=8,
        min_samples_leaf=10,
        l2_regularization=1.0,
        max_features=0.5,
        early_stopping=False,
        random_state=seed,
    ).fit(features_RF[train], target_R[train])
    best, _ = _best(target_R[judged], np.stack(list(model.staged_predict(features_RF[judged]))))
    return next(itertools.islice(model.staged_predict(features_RF), best, None)), best + 1


def block_weights(blocks: int) -> list[tuple[float, ...]]:
    """Weights to choose from: all combinations in which the largest is 1, equal ones first."""
    if blocks == 1:
        return [(1.0,)]
    grid = BLOCK_WEIGHTS if blocks == 2 else FEW_BLOCK_WEIGHTS
    return [weights for weights in itertools.product(grid, repeat=blocks) if max(weights) == 1.0]


def standardized(features_RF: NDArray[Any], train: Rows) -> Array:
    """Features with mean 0 and variance 1 on the training rows, clipped; columns that do not vary there are 0.

    NaN becomes the column's median over the training rows.
    """
    filled_RF = _imputed(np.asarray(features_RF, np.float64), train)
    mean_F, deviation_F = filled_RF[train].mean(axis=0), filled_RF[train].std(axis=0)
    varies_F = deviation_F > 1e-9 * np.abs(mean_F) + 1e-30
    scaled_RF = (filled_RF - mean_F) / np.where(varies_F, deviation_F, 1.0)
    return np.where(varies_F, scaled_RF.clip(-LARGEST_DEVIATION, LARGEST_DEVIATION), 0.0)


def components(features_RF: NDArray[Any], train: Rows) -> Array:
    """A narrow block as it is, NaN imputed; of a wide one the first principal components of its standardised training rows."""
    if features_RF.shape[1] <= 2 * COMPONENTS:
        return _imputed(np.asarray(features_RF, np.float64), train)
    from sklearn.decomposition import PCA

    scaled_RF = standardized(features_RF, train)
    model = PCA(min(COMPONENTS, len(train)), svd_solver="randomized", random_state=0).fit(scaled_RF[train])
    return np.asarray(model.transform(scaled_RF))


def _imputed(features_RF: Array, train: Rows) -> Array:
    """NaN and infinity as the column's median over the training rows; 0 where there is none."""
    bad = ~np.isfinite(features_RF)
    if not bad.any():
        return features_RF
    filled = np.where(bad, np.nan, features_RF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without any value
        medians_F = np.nanmedian(filled[train], axis=0)
    return np.where(bad, np.where(np.isfinite(medians_F), medians_F, 0.0), filled)


def _centred(path: RidgePath, target_n: Array, penalties: Sequence[float]) -> Array:
    """Predictions with a free intercept: features have mean 0 over the training rows."""
    mean = target_n.mean()
    return path.predict(target_n - mean, penalties) + mean


def _best(target: Array, predictions_PR: Array) -> tuple[int, float]:
    """The first of the predictions with the least squared error, and its R^2 up to the target's variance."""
    errors_P = np.square(predictions_PR - target).mean(axis=1)
    best = int(np.nanargmin(errors_P))
    return best, -float(errors_P[best])


def _cached(compute: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
    """What depends on the training rows alone, kept for the next target that has the same."""

    @lru_cache(maxsize=2)
    def by_bytes(rows: bytes) -> Any:
        return compute(np.frombuffer(rows, np.int64))

    return lambda rows: by_bytes(np.ascontiguousarray(rows, np.int64).tobytes())
