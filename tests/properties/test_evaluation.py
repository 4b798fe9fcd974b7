import numpy as np
import pytest
from scipy.stats import kendalltau

from sane_ray.properties import evaluation
from sane_ray.properties.evaluation import evaluate_categories, evaluate_numbers, kendall_tau, r2_score

MODELS = np.repeat(np.arange(15), 4).astype(str)


def data(seed: int = 0):
    generator = np.random.default_rng(seed)
    truth = np.round(generator.normal(size=60), 1) + np.repeat(generator.normal(size=15), 4)
    return truth, np.round(truth + generator.normal(size=60), 1)


def drawn_rows(draw: int, draws: int, seed: int) -> np.ndarray:
    """The rows of one draw, model by model, the slow way."""
    names, index = np.unique(MODELS, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.repeat(np.arange(60), counts[draw][index])


@pytest.mark.parametrize(
    ("rows", "models", "at_once"), [(3000, 100, 10**6), (3000, 100, 7 * 60), (10, 100, 1), (60, 9, 1)]
)
def test_draws_are_the_metrics_of_drawn_models(monkeypatch, rows, models, at_once):
    monkeypatch.setattr(evaluation, "MOST_PAIRED_ROWS", rows)
    monkeypatch.setattr(evaluation, "MOST_PAIRED_MODELS", models)
    monkeypatch.setattr(evaluation, "PAIRS_AT_ONCE", at_once)
    truth, prediction = data()
    scores = evaluate_numbers(truth, prediction[None], MODELS, draws=150, seed=7)
    assert scores["r2"].value == pytest.approx(1 - np.mean((truth - prediction) ** 2) / np.var(truth))
    assert scores["tau"].value == pytest.approx(kendalltau(truth, prediction).statistic)
    for draw in (0, 13, 149):
        drawn = drawn_rows(draw, 150, 7)
        t, p = truth[drawn], prediction[drawn]
        assert scores["r2"].draws_D[draw] == pytest.approx(r2_score(t, p))
        assert scores["mae"].draws_D[draw] == pytest.approx(np.abs(t - p).mean())
        assert scores["tau"].draws_D[draw] == pytest.approx(kendalltau(t, p).statistic)


def test_intervals_hold_the_value_and_widen_when_checkpoints_of_a_model_agree():
    truth, prediction = data()
    by_model = evaluate_numbers(truth, prediction[None], MODELS, 500, 0)["r2"]
    low, high = by_model.interval
    assert low < by_model.value < high
    shared = np.repeat(np.random.default_rng(1).normal(size=15), 4)
    widths = []
    for models in (MODELS, np.arange(60).astype(str)):
        low, high = evaluate_numbers(truth, (truth + shared)[None], models, 500, 0)["mae"].interval
        widths.append(high - low)
    assert widths[0] > 1.4 * widths[1]


def test_seeds_are_averaged_and_widen_intervals():
    truth, prediction = data()
    worse = prediction + 5
    both = evaluate_numbers(truth, np.stack([prediction, worse]), MODELS, 200, 0)
    each = [evaluate_numbers(truth, one[None], MODELS, 200, 0)["mae"] for one in (prediction, worse)]
    assert both["mae"].value == pytest.approx((each[0].value + each[1].value) / 2)
    assert both["mae"].interval[0] < each[0].interval[1] < each[1].interval[0] < both["mae"].interval[1]


def test_accuracy_and_what_is_not_defined():
    truth = np.array(["a", "b"] * 30, dtype=object)
    score = evaluate_categories(truth, np.array(["a"] * 60, dtype=object)[None], MODELS, 100, 0)["accuracy"]
    assert score.value == 0.5 and score.interval == (0.5, 0.5)
    constant = evaluate_numbers(np.ones(60), np.arange(60.0)[None], MODELS, 20, 0)
    assert np.isnan(constant["r2"].value) and np.isnan(constant["tau"].value) and constant["mae"].value > 0
    assert all(np.isnan(bound) for bound in constant["r2"].interval)
    single = evaluate_numbers(np.arange(4.0), np.arange(4.0)[None], np.array(["m"] * 4), 20, 0)
    assert single["r2"].value == 1 and np.isnan(single["r2"].interval[0])
    assert np.isnan(kendall_tau(np.ones(3), np.arange(3.0)))
