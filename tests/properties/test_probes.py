import numpy as np
import pytest

from sane_ray.properties.probes import (
    PENALTIES,
    PUBLISHED_PENALTIES,
    BlockRidge,
    Boosting,
    Logistic,
    PublishedRidge,
    RidgePath,
    block_weights,
    folds,
    grouped,
    standardized,
)

TRAIN, VAL, TEST = np.arange(0, 60), np.arange(60, 80), np.arange(80, 100)
MODELS = np.array([f"m{row // 4}" for row in range(100)])


def data(features: int = 12, noise: float = 0.3, seed: int = 0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(100, features)) * np.logspace(-2, 2, features) + 3
    return x, x @ generator.normal(size=features) / 100 + noise * generator.normal(size=100) + 5


def published_formula(x, y):
    """b = (X^T X + lambda I)^-1 X^T y with a column of ones; the best validation R^2 of the published list."""
    ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    best = (-np.inf,)
    for penalty in (1e3, 3e2, 1e2, 3e1, 1e1, 3e0, 1e0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5):
        gram = ones[TRAIN].T @ ones[TRAIN] + penalty * np.eye(ones.shape[1])
        prediction = ones @ np.linalg.solve(gram, ones[TRAIN].T @ y[TRAIN])
        r2 = 1 - np.mean((y[VAL] - prediction[VAL]) ** 2) / np.var(y[VAL])
        if r2 > best[0]:
            best = (r2, penalty, prediction)
    return best


@pytest.mark.parametrize("features", [1, 12, 200])
def test_the_published_ridge_is_the_published_formula(features):
    x, y = data(features)
    _, penalty, expected = published_formula(x, y)
    fit = PublishedRidge({"w": x[:, :1], "more": x[:, 1:]}, MODELS)(y, TRAIN, VAL)
    np.testing.assert_allclose(fit.prediction_R, expected, rtol=1e-6, atol=1e-6)
    if features < len(TRAIN):  # beyond, small penalties differ by less than rounding
        assert fit.choice == f"published, penalty {penalty:g}"


def test_the_published_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge

    x, y = data()
    ones = np.concatenate([x, np.ones((100, 1))], axis=1)
    path = RidgePath.of_features(ones, TRAIN).predict(y[TRAIN], PUBLISHED_PENALTIES)
    for penalty, prediction in zip(PUBLISHED_PENALTIES, path, strict=True):
        expected = Ridge(alpha=penalty, fit_intercept=False).fit(ones[TRAIN], y[TRAIN]).predict(ones)
        np.testing.assert_allclose(prediction, expected, atol=1e-6)


def test_without_validation_the_best_training_fit_counts():
    x, y = data()
    fit = PublishedRidge({"x": x}, MODELS)(y, TRAIN, np.array([], int))
    assert fit.choice == "published, penalty 1e-05"


def test_refit_also_uses_validation_rows():
    x, y = data(noise=1.0)
    train, both = (PublishedRidge({"x": x}, MODELS, refit)(y, TRAIN, VAL) for refit in ("train", "train_val"))
    assert train.choice == both.choice and not np.allclose(train.prediction_R, both.prediction_R)


@pytest.mark.parametrize("probe", [PublishedRidge, BlockRidge])
def test_validation_is_predicted_by_the_fit_without_it(probe):
    x, y = data(noise=1.0)
    train, both = (probe({"x": x}, MODELS, refit)(y, TRAIN, VAL) for refit in ("train", "train_val"))
    assert np.array_equal(both.of_validation(VAL), train.prediction_R[VAL])
    assert not np.allclose(both.prediction_R[VAL], train.prediction_R[VAL])
    assert np.array_equal(train.of_validation(VAL), train.prediction_R[VAL])


@pytest.mark.parametrize("features", [10, 150])
def test_held_out_predictions_are_those_of_fits_without_the_model(features):
    x, y = data(features)
    x = standardized(x, TRAIN)
    kernel = RidgePath.of_kernel(x @ x[TRAIN].T, TRAIN)
    plain = RidgePath.of_features(x, TRAIN)
    groups = grouped(MODELS[TRAIN])
    found = [path.held_out(y[TRAIN], [0.5, 20.0], TRAIN, groups) for path in (kernel, plain)]
    for place, penalty in enumerate((0.5, 20.0)):
        for group in groups[::5]:
            rest = np.setdiff1d(np.arange(len(TRAIN)), group)
            centre, mean = x[TRAIN][rest].mean(0), y[TRAIN][rest].mean()
            design = x[TRAIN][rest] - centre
            b = np.linalg.solve(design.T @ design + penalty * np.eye(features), design.T @ (y[TRAIN][rest] - mean))
            expected = (x[TRAIN][group] - centre) @ b + mean
            for one in found:
                np.testing.assert_allclose(one[place, group], expected, rtol=1e-6, atol=1e-6)


def test_block_ridge_gives_useless_blocks_no_weight():
    x, y = data(6, noise=0.1)
    noise = np.random.default_rng(1).normal(size=(100, 300))
    alone, both = BlockRidge({"x": x}, MODELS)(y, TRAIN, VAL), BlockRidge({"x": x, "n": noise}, MODELS)(y, TRAIN, VAL)
    errors = [np.mean((fit.prediction_R[TEST] - y[TEST]) ** 2) for fit in (alone, both)]
    assert errors[1] <= 1.3 * errors[0]
    assert "weights x 1, n 0" in both.choice


def test_block_ridge_uses_what_a_block_adds():
    x, y = data(6, noise=0.1)
    other = np.random.default_rng(1).normal(size=(100, 3))
    y = y + other[:, 0]
    errors = [
        np.var((BlockRidge(blocks, MODELS)(y, TRAIN, VAL).prediction_R - y)[TEST])
        for blocks in ({"x": x}, {"x": x, "other": other})
    ]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("probe", [PublishedRidge, BlockRidge, Boosting])
def test_no_probe_sees_test_targets(probe):
    x, y = data()
    blinded = y.copy()
    blinded[TEST] = np.nan
    fits = [probe({"x": x, "y": x[:, :2]}, MODELS)(target, TRAIN, VAL) for target in (y, blinded)]
    assert np.array_equal(fits[0].prediction_R, fits[1].prediction_R) and fits[0].choice == fits[1].choice


def test_nan_features_are_training_medians_and_empty_columns_are_nothing():
    x, y = data(4)
    x[0, 0] = x[90, 1] = np.nan
    x[:, 3] = np.nan
    for probe in (PublishedRidge, BlockRidge, Boosting):
        assert np.isfinite(probe({"x": x}, MODELS)(y, TRAIN, VAL).prediction_R).all()
    filled = standardized(x, TRAIN)
    other = x.copy()
    other[0, 0] = np.nanmedian(x[TRAIN, 0])
    assert np.allclose(filled[:, 0], standardized(other, TRAIN)[:, 0]) and not filled[:, 3].any()


def test_boosting_learns_what_no_line_can_and_depends_on_its_seed():
    x = np.random.default_rng(0).normal(size=(100, 3))
    y = np.abs(x[:, 0])
    boosting, ridge = Boosting({"x": x}, MODELS), BlockRidge({"x": x}, MODELS)
    errors = [np.mean((probe(y, TRAIN, VAL, 0).prediction_R - y)[TEST] ** 2) for probe in (boosting, ridge)]
    assert errors[0] < 0.5 * errors[1]
    again, other = boosting(y, TRAIN, VAL, 0), boosting(y, TRAIN, VAL, 1)
    assert not np.array_equal(again.prediction_R, other.prediction_R)
    assert np.array_equal(again.prediction_R, Boosting({"x": x}, MODELS)(y, TRAIN, VAL, 0).prediction_R)


def test_logistic_regression_tells_categories():
    generator = np.random.default_rng(0)
    classes = np.array(["relu", "tanh", "gelu"], dtype=object)[np.arange(100) // 4 % 3]
    x = generator.normal(size=(100, 4)) + 4 * np.stack([classes == "relu", classes == "tanh"] * 2, axis=1)
    fit = Logistic({"x": x, "noise": generator.normal(size=(100, 40))}, MODELS)(classes, TRAIN, VAL)
    assert np.mean(fit.prediction_R[TEST] == classes[TEST]) > 0.9


def test_logistic_regression_of_a_category_that_one_model_alone_has():
    classes = np.where(MODELS == "m3", "tanh", "relu").astype(object)
    x = np.random.default_rng(0).normal(size=(100, 4)) + 4 * (classes == "tanh")[:, None]
    fit = Logistic({"x": x}, MODELS)(classes, TRAIN, VAL)  # a fold without m3 sees one category
    assert np.mean(fit.prediction_R == classes) > 0.9


def test_choices_of_weights_and_folds():
    assert block_weights(1) == [(1.0,)] and block_weights(2)[0] == (1.0, 1.0) and len(block_weights(2)) == 7
    assert (1.0, 0.0) in block_weights(2) and all(max(weights) == 1 for weights in block_weights(3))
    assert PENALTIES[0] > PENALTIES[-1]
    fold = folds(MODELS, 0)
    assert all(len(set(fold[model == MODELS])) == 1 for model in set(MODELS)) and len(set(fold)) == 3
