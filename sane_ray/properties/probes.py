"""Probes: what reads a property off features. Each is fitted on training rows, chosen on validation rows.

Estimators come from scikit-learn; the ridge path, which is one decomposition for all its penalties and all targets, is
a few lines here. A probe never sees the target of a test row, and never says how good it is.

Shape suffixes: R rows in all, n training rows, F features, r components, P penalties.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Refit = Literal["train", "train_val"]

PUBLISHED_PENALTIES = (1e3, 3e2, 1e2, 3e1, 1e1, 3e0, 1e0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
"""The published list, in its order: of equally good ones the first counts."""

PENALTIES = tuple(float(penalty) for penalty in 10.0 ** np.arange(3, -5.01, -0.5))
"""Of the block ridge, for features whose blocks have variance 1 in all."""

BLOCK_WEIGHTS = (1.0, 0.25, 0.0625, 0.0)
FEW_BLOCK_WEIGHTS, FEWER_BLOCK_WEIGHTS = (1.0, 0.125, 0.0), (1.0, 0.0)
"""Variance that a block may have beside one of weight 1; fewer choices of three blocks, and of more."""

LARGEST_DEVIATION = 10.0
"""Standardised features are clipped here: one network that diverged should not decide a fit."""

MOST_KEPT_VALUES = 50_000_000
"""Decompositions are kept for the next target up to so many float64 values, 400 MB."""

COMPONENTS = 32
"""Wider blocks are rotated to so many principal components before trees are grown: they are strongly correlated."""

BOOSTING_ROUNDS, PATIENCE = 200, 20

SERIAL_VALUES = 1_000_000
"""Trees on fewer training values are grown by one thread: more would wait for each other."""

FOLDS = 3
"""Parts that training models are cut into, where a choice needs more than the validation split."""

LEAST_PROBABILITY = 1e-6
"""Of a category, in the cross-entropy that logistic regressions are chosen by."""

LOGISTIC_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


@dataclass(frozen=True, eq=False)
class Fit:
    """What one fitted probe says.

    Attributes:
        prediction_R: For every row, training rows included: numbers, or the texts of categories.
        choice: What validation chose.
        chosen_by_R: Of a fit that was repeated with validation rows: what the fit without them, by which it was chosen,
            said of every row. None of one that never was.
    """

    prediction_R: NDArray[Any]
    choice: str
    chosen_by_R: NDArray[Any] | None = None

    def of_validation(self, val: Rows) -> NDArray[Any]:
        """Predictions of validation rows by a fit that was not trained on them."""
        return (self.prediction_R if self.chosen_by_R is None else self.chosen_by_R)[val]


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

    def held_out(self, target_n: Array, penalties: Sequence[float], train: Rows, groups_Mg: Rows) -> Array:
        """What each training row is predicted by the fit that leaves its group out, with a free intercept, [P, n].

        Exact, without a second fit: the residuals of a group are (I - H_gg)^-1 times its residuals in the whole fit,
        H_gg the group's part of the hat matrix. Features must have mean 0 over the training rows.

        Args:
            target_n: Training targets.
            penalties: Of the fits.
            train: Training rows.
            groups_Mg: Each group's places among the training rows, filled up with -1.
        """
        count, real_Mg = len(target_n), groups_Mg >= 0
        both_Mgg = real_Mg[:, :, None] & real_Mg[:, None, :]
        rows_Mgr = self.rows_Rr[train[groups_Mg]]
        weights_Mgr = self.projection_rn.T[groups_Mg]
        residuals_Pn = target_n - target_n.mean() - self.predict(target_n - target_n.mean(), penalties)[:, train]
        out_Pn = np.empty((len(penalties), count))
        for place, penalty in enumerate(penalties):
            hat_Mgg = (rows_Mgr / (self.eigenvalues_r + penalty)) @ weights_Mgr.transpose(0, 2, 1) + 1 / count
            system_Mgg = np.eye(groups_Mg.shape[1]) - np.where(both_Mgg, hat_Mgg, 0.0)
            residuals_Mg = np.where(real_Mg, residuals_Pn[place][groups_Mg], 0.0)
            left_Mg = np.linalg.solve(system_Mgg, residuals_Mg[:, :, None])[:, :, 0]
            out_Pn[place, groups_Mg[real_Mg]] = target_n[groups_Mg[real_Mg]] - left_Mg[real_Mg]
        return out_Pn


class PublishedRidge:
    """The published probe: no standardisation, a column of ones whose weight is penalised too, float64.

    SANE (arXiv 2406.09997, section 4.1) and its code (``solve_linear_system``): the penalty with the best validation
    R^2, or with the best training R^2 where no row is for validation.
    """

    def __init__(self, blocks: Mapping[str, NDArray[Any]], models_R: NDArray[Any], refit: Refit = "train") -> None:
        values = list(blocks.values())
        features_RF = np.concatenate([*values, np.ones((len(values[0]), 1))], axis=1, dtype=np.float64)
        self._path = _cached(lambda train: RidgePath.of_features(_imputed(features_RF, train), train))
        self._refit = refit

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``; nothing is random."""
        judged = val if len(val) else train
        predictions_PR = self._path(train).predict(target_R[train], PUBLISHED_PENALTIES)
        best = _best(target_R[judged], predictions_PR[:, judged])
        penalty, choice = PUBLISHED_PENALTIES[best], f"published, penalty {PUBLISHED_PENALTIES[best]:g}"
        if self._refit == "train":
            return Fit(predictions_PR[best], choice)
        rows = np.concatenate([train, val])
        return Fit(self._path(rows).predict(target_R[rows], [penalty])[0], choice, predictions_PR[best])


class BlockRidge:
    """Ridge on blocks of features that weigh as much as held-out models say, down to nothing.

    Each block is standardised on the training rows and has variance 1 in all, whatever its width, times its weight: a
    penalty of its own. Weights and penalty are those with the least squared error on validation rows and on training
    models that are left out one at a time: a set of features holds every smaller set (weight 0), so more features cost
    little. The intercept is free.
    """

    def __init__(self, blocks: Mapping[str, NDArray[Any]], models_R: NDArray[Any], refit: Refit = "train") -> None:
        self._names, self._blocks = list(blocks), [np.asarray(block, np.float64) for block in blocks.values()]
        self._models_R, self._refit = models_R, refit
        self._kept_paths = _cached(lambda train: list(self._decompose(train, block_weights(len(blocks)))))

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``; nothing is random."""
        groups_Mg, least = grouped(self._models_R[train]), np.inf
        prediction_R, weights, penalty = np.empty(0), block_weights(1)[0], PENALTIES[0]
        truth = target_R[np.concatenate([train, val])]
        for tried, path in self._paths(train):
            predictions_PR = _centred(path, target_R[train], PENALTIES)
            left_out_Pn = path.held_out(target_R[train], PENALTIES, train, groups_Mg)
            errors_P = np.square(np.concatenate([left_out_Pn, predictions_PR[:, val]], axis=1) - truth).mean(axis=1)
            best = int(np.argmin(errors_P))
            if errors_P[best] < least:
                least, prediction_R, weights, penalty = errors_P[best], predictions_PR[best], tried, PENALTIES[best]
        shares = [f"{name} {weight:g}" for name, weight in zip(self._names, weights, strict=True)]
        choice = f"penalty {penalty:.3g}" + (f", weights {', '.join(shares)}" if len(shares) > 1 else "")
        if self._refit == "train" or not len(val):
            return Fit(prediction_R, choice)
        rows = np.concatenate([train, val])
        ((_, path),) = self._decompose(rows, [weights])
        return Fit(_centred(path, target_R[rows], [penalty])[0], choice, prediction_R)

    def _paths(self, train: Rows) -> Iterable[tuple[tuple[float, ...], RidgePath]]:
        """A path for each choice of weights; kept for the next target, unless that takes too much memory."""
        choices = block_weights(len(self._blocks))
        components = min(sum(block.shape[1] for block in self._blocks), len(train))
        if len(self._models_R) * components * len(choices) <= MOST_KEPT_VALUES:
            return self._kept_paths(train)
        return self._decompose(train, choices)

    def _decompose(
        self, train: Rows, choices: Sequence[tuple[float, ...]]
    ) -> Iterator[tuple[tuple[float, ...], RidgePath]]:
        """A path for each choice of weights, on the smaller of features and rows."""
        blocks = [scaled(block, train) for block in self._blocks]
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
    """Gradient-boosted trees (scikit-learn's histogram ones): the mean of ``FOLDS`` fits, each without some models.

    What a fit left out, and the validation rows, say how many rounds it takes. Several blocks are read together and
    each by itself, and the fits are added up with weights that predict left-out models and validation rows best (non-
    negative least squares: Breiman, "Stacked regressions", 1996). Blocks of more than ``2 COMPONENTS`` columns are
    rotated to their principal components. The seed draws the folds, and the columns that a split may use.

    Args:
        blocks: Features of all rows, by name.
        models_R: Whose checkpoint each row is.
        fitted: Fits of single blocks, to be shared by sets that have a block in common.
    """

    def __init__(
        self,
        blocks: Mapping[str, NDArray[Any]],
        models_R: NDArray[Any],
        fitted: dict[Any, Any] | None = None,
    ) -> None:
        def prepare(train: Rows) -> dict[str, Array]:
            each = {name: components(block, train) for name, block in blocks.items()}
            return each | ({"all": np.concatenate(list(each.values()), axis=1)} if len(each) > 1 else {})

        self._features, self._models_R = _cached(prepare), models_R
        self._fitted = {} if fitted is None else fitted

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``."""
        features = self._features(train)
        fits = [self._fit(name, x_RF, target_R, train, val, seed) for name, x_RF in features.items()]
        if len(fits) == 1:
            return Fit(*fits[0][1:])
        from scipy.optimize import nnls

        honest_nC, means_RC = (np.stack(columns, axis=1) for columns in ([f[0] for f in fits], [f[1] for f in fits]))
        mean = target_R[train].mean()
        weights_C, _ = nnls(honest_nC - mean, target_R[np.concatenate([train, val])] - mean)
        shares = [f"{name} {weight:.2f}" for name, weight in zip(features, weights_C, strict=True)]
        return Fit((means_RC - mean) @ weights_C + mean, f"weights {', '.join(shares)}")

    def _fit(
        self, name: str, features_RF: Array, target_R: NDArray[Any], train: Rows, val: Rows, seed: int
    ) -> tuple[Array, Array, str]:
        def compute() -> tuple[Array, Array, str]:
            return _bagged(features_RF, target_R, train, val, folds(self._models_R[train], seed), seed)

        if name == "all":
            return compute()
        key = (name, seed, target_R.tobytes(), train.tobytes(), val.tobytes())
        if key not in self._fitted:
            self._fitted[key] = compute()
        return self._fitted[key]


class Logistic:
    """Multinomial logistic regression on standardised blocks, together or one of them alone.

    Blocks and strength are those with the least cross-entropy on validation rows and on training models left out in
    ``FOLDS`` parts. The published probe of categories is the same model, trained with Adam for 50 epochs.
    """

    def __init__(self, blocks: Mapping[str, NDArray[Any]], models_R: NDArray[Any]) -> None:
        def prepare(train: Rows) -> dict[str, Array]:
            each = {name: scaled(block, train) for name, block in blocks.items()}
            return ({"all": np.concatenate(list(each.values()), axis=1)} if len(each) > 1 else {}) | each

        self._features, self._models_R = _cached(prepare), models_R

    def __call__(self, target_R: NDArray[Any], train: Rows, val: Rows, seed: int = 0) -> Fit:
        """See ``Probe``; folds are the same whatever the seed."""
        fold_n, least, best = folds(self._models_R[train], 0), np.inf, ("", 0.0)
        features = self._features(train)
        for name, x_RF in features.items():
            for strength in LOGISTIC_STRENGTHS:
                loss = _logistic_loss(x_RF, target_R, train, val, fold_n, strength)
                if loss < least:
                    least, best = loss, (name, strength)
        name, strength = best
        prediction_R = _logistic(features[name], target_R, train, strength).predict(features[name])
        return Fit(prediction_R.astype(object), f"C {strength:g}" + (f" of {name}" if len(features) > 1 else ""))


def _bagged(
    features_RF: Array, target_R: NDArray[Any], train: Rows, val: Rows, fold_n: Rows, seed: int
) -> tuple[Array, Array, str]:
    """One boosting without each fold, and their mean.

    Returns:
        Predictions of training rows by the fit that left them out, and of validation rows by the mean; predictions of
        all rows by the mean; how many rounds the fits took.
    """
    left_out_n, predictions, rounds = np.empty(len(train)), [], []
    for fold in np.unique(fold_n):
        left = train[fold_n == fold]
        judged = np.concatenate([left, val])
        prediction_R, best = _boosted(features_RF, target_R, train[fold_n != fold], judged, seed)
        left_out_n[fold_n == fold] = prediction_R[left]
        predictions.append(prediction_R)
        rounds.append(best)
    mean_R = np.mean(predictions, axis=0)
    return np.concatenate([left_out_n, mean_R[val]]), mean_R, f"{np.mean(rounds):.0f} rounds"


def _boosted(features_RF: Array, target_R: NDArray[Any], rows: Rows, judged: Rows, seed: int) -> tuple[Array, int]:
    """Predictions for all rows after the rounds that judge best, and how many these are.

    Rounds are added until the last ``PATIENCE`` of them were none of the best.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    model = HistGradientBoostingRegressor(
        learning_rate=0.1,
        max_leaf_nodes=8,
        min_samples_leaf=10,
        l2_regularization=1.0,
        max_features=0.5,
        early_stopping=False,
        warm_start=True,
        random_state=seed,
    )
    best, is_small = 0, len(rows) * features_RF.shape[1] < SERIAL_VALUES
    with threadpool_limits(1 if is_small else None, user_api="openmp"):
        for count in range(PATIENCE, BOOSTING_ROUNDS + 1, PATIENCE):
            model.set_params(max_iter=count).fit(features_RF[rows], target_R[rows])
            best = _best(target_R[judged], np.stack(list(model.staged_predict(features_RF[judged]))))
            if best < count - PATIENCE:
                break
        return next(itertools.islice(model.staged_predict(features_RF), best, None)), best + 1


@dataclass(frozen=True, eq=False)
class _OneClass:
    """What rows of a single category teach: that there is no other."""

    classes_: NDArray[Any]

    def predict(self, features_RF: Array) -> NDArray[Any]:
        return np.repeat(self.classes_, len(features_RF))

    def predict_proba(self, features_RF: Array) -> Array:
        return np.full((len(features_RF), 1), 1 - LEAST_PROBABILITY)


def _logistic(
    features_RF: Array, target_R: NDArray[Any], rows: Rows, strength: float
) -> LogisticRegression | _OneClass:
    classes = np.unique(target_R[rows].astype(str))
    if len(classes) == 1:
        return _OneClass(classes)
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a path's weak end need not converge to be judged
        return LogisticRegression(C=strength, max_iter=300).fit(features_RF[rows], target_R[rows].astype(str))


def _logistic_loss(
    features_RF: Array, target_R: NDArray[Any], train: Rows, val: Rows, fold_n: Rows, strength: float
) -> float:
    """Mean cross-entropy of rows that a fit did not see; a category that it never saw has a small probability."""
    losses = []
    for fold in np.unique(fold_n):
        model = _logistic(features_RF, target_R, train[fold_n != fold], strength)
        judged = np.concatenate([train[fold_n == fold], val])
        probability = dict(zip(model.classes_, model.predict_proba(features_RF[judged]).T, strict=True))
        unseen = np.full(len(judged), LEAST_PROBABILITY)
        truth = target_R[judged]
        chances = [probability.get(value, unseen)[place] for place, value in enumerate(truth)]
        losses.append(-np.log(np.maximum(chances, LEAST_PROBABILITY)).mean())
    return float(np.mean(losses))


def grouped(models_n: NDArray[Any]) -> Rows:
    """The places of each model's rows, filled up with -1, [models, most rows of a model]."""
    _, index_n, counts_M = np.unique(models_n, return_inverse=True, return_counts=True)
    order = np.argsort(index_n, kind="stable")
    starts_M = np.cumsum(counts_M) - counts_M
    groups_Mg = np.full((len(counts_M), counts_M.max()), -1)
    groups_Mg[index_n[order], np.arange(len(order)) - starts_M[index_n[order]]] = order
    return groups_Mg


def folds(models_n: NDArray[Any], seed: int) -> Rows:
    """A fold of each row: all rows of a model in one, models drawn into equal folds."""
    names, index_n = np.unique(models_n, return_inverse=True)
    fold_M = np.random.default_rng(seed).permutation(len(names)) % min(FOLDS, len(names))
    return fold_M[index_n]


def block_weights(blocks: int) -> list[tuple[float, ...]]:
    """Weights to choose from: all combinations in which the largest is 1, equal ones first."""
    if blocks == 1:
        return [(1.0,)]
    grid = {2: BLOCK_WEIGHTS, 3: FEW_BLOCK_WEIGHTS}.get(blocks, FEWER_BLOCK_WEIGHTS)
    return [weights for weights in itertools.product(grid, repeat=blocks) if max(weights) == 1.0]


def standardized(features_RF: NDArray[Any], train: Rows) -> Array:
    """Features with mean 0 and, before outliers are clipped, variance 1 on the training rows.

    Columns that do not vary there are 0; NaN becomes the column's median over the training rows.
    """
    filled_RF = _imputed(np.asarray(features_RF, np.float64), train)
    mean_F, deviation_F = filled_RF[train].mean(axis=0), filled_RF[train].std(axis=0)
    varies_F = deviation_F > 1e-9 * np.abs(mean_F) + 1e-30
    scaled_RF = (filled_RF - mean_F) / np.where(varies_F, deviation_F, 1.0)
    clipped_RF = np.where(varies_F, scaled_RF.clip(-LARGEST_DEVIATION, LARGEST_DEVIATION), 0.0)
    return clipped_RF - clipped_RF[train].mean(axis=0)


def scaled(features_RF: NDArray[Any], train: Rows) -> Array:
    """``standardized``, with variance 1 in all."""
    values_RF = standardized(features_RF, train)
    return values_RF / np.sqrt(max(values_RF.shape[1], 1))


def components(features_RF: NDArray[Any], train: Rows) -> Array:
    """A narrow block as it is, NaN imputed; a wide one as the first principal components of its training rows."""
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


def _best(target: Array, predictions_PR: Array) -> int:
    """The first of the predictions with the least squared error."""
    return int(np.nanargmin(np.square(predictions_PR - target).mean(axis=1)))


def _cached(compute: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
    """What depends on the training rows alone, kept for the next target that has the same."""

    @lru_cache(maxsize=1)
    def by_bytes(rows: bytes) -> Any:
        return compute(np.frombuffer(rows, np.int64))

    return lambda rows: by_bytes(np.ascontiguousarray(rows, np.int64).tobytes())
