import numpy as np
import pytest

from sane_ray.finetuning.evaluation import METRICS, Histories
from sane_ray.finetuning.results import (
    Method,
    diverged,
    methods_of,
    rows_of,
    table_of,
    verdict,
)
from sane_ray.finetuning.statistics import FEWEST, difference, interval_of_mean

TEST, VAL = METRICS.index("test_acc"), METRICS.index("val_acc")


def method(name, accuracy_RE, logits_RTIC=None, validation_RE=None):
    accuracy_RE = np.asarray(accuracy_RE, dtype=float)
    networks, epochs = accuracy_RE.shape
    metrics = np.zeros((networks, epochs, len(METRICS)))
    metrics[:, :, TEST] = accuracy_RE
    metrics[:, :, VAL] = accuracy_RE if validation_RE is None else validation_RE
    if logits_RTIC is None:
        logits_RTIC = np.zeros((networks, epochs, 2, 3), np.float16)
    return Method(name, list(range(networks)), metrics, logits_RTIC)


def around(means, networks=8, spread=0.01, seed=0):
    return np.array(means) + np.random.default_rng(seed).normal(scale=spread, size=(networks, len(means)))


def test_histories_are_gathered_by_method_and_missing_ones_left_out():
    rows = [{"method": name, "repetition": number} for number in range(3) for name in ("b", "a", "c")]
    histories = {
        (row["method"], row["repetition"]): Histories(
            np.full((1, 2, len(METRICS)), row["repetition"]), np.zeros((1, 1, 2, 3), np.float16)
        )
        for row in rows
        if row["method"] != "c" and (row["method"], row["repetition"]) != ("a", 1)
    }
    first, second = methods_of(rows, histories)
    assert (first.name, first.repetitions, second.name, second.repetitions) == ("b", [0, 1, 2], "a", [0, 2])
    assert second.test_RE.tolist() == [[0, 0], [2, 2]]
    flat = list(rows_of([second]))
    assert [(row["repetition"], row["epoch"]) for row in flat] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert set(flat[0]) == {"method", "repetition", "epoch", *METRICS}


def test_the_table_by_hand():
    # At epoch 0 both networks answer class 1 and 2; at epoch 2 the first is sure of class 0, the second prefers 1.
    logits = np.zeros((2, 2, 2, 3), np.float16)
    logits[:, 0, 0, 1] = logits[:, 0, 1, 2] = 1
    logits[0, 1, :, 0] = 9
    logits[1, 1, :, 1] = 2
    first, last = table_of([method("a", [[0.1, 0.0, 0.5], [0.3, 0.0, 0.9]], logits)], [0, 2], np.array([1, 0]))
    assert (first["epoch"], last["epoch"], first["networks"]) == (0, 2, 2)
    assert (first["mean"], first["std"]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert (last["mean"], last["std"]) == (pytest.approx(0.7), pytest.approx(0.2))
    assert (first["low"], first["high"]) == (0, 1)  # two networks tell next to nothing
    assert first["ensemble_logits"] == first["ensemble_probabilities"] == 0.5
    # logits: mean [4.5, 1, 0], class 0. Probabilities of class 0: (1.0 + 0.11) / 2, of class 1: (0.0 + 0.79) / 2.
    assert last["ensemble_logits"] == last["ensemble_probabilities"] == 0.5


def test_intervals():
    values = np.random.default_rng(0).normal(0.5, 0.1, size=400)
    low, high = interval_of_mean(values)
    error = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - error, abs=2e-3),
        pytest.approx(values.mean() + error, abs=2e-3),
    )
    assert np.isnan(interval_of_mean(np.array([0.4]))).all()
    assert interval_of_mean(np.array([0.4, 0.4])) == (0.4, 0.4)
    gap, low, high = difference(values + 0.2, values)
    assert gap == pytest.approx(0.2)
    assert (high - low) / 2 == pytest.approx(error * 2**0.5, rel=0.1)


@pytest.mark.parametrize("networks", [5, 10])
def test_of_few_networks_intervals_miss_as_often_as_they_say(networks):
    rng, means, gaps = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        first, second = rng.normal(size=(2, networks))
        low, high = interval_of_mean(first)
        means += not low <= 0 <= high
        _, low, high = difference(first, 3 * second)
        gaps += not low <= 0 <= high
    assert means / 2000 == pytest.approx(0.05, abs=0.015)
    assert gaps / 2000 == pytest.approx(0.05, abs=0.02)


def test_validation_says_which_are_best_whatever_test_images_say():
    ours = [method("sane_kde", around([0.5, 0.5]), validation_RE=around([0.9, 0.9]))]
    ours.append(method("sane_mixture", around([0.9, 0.9]), validation_RE=around([0.5, 0.5])))
    (line,) = verdict([*ours, method("noise", around([0.4, 0.4]))], [0])
    assert line.startswith("sane_kde against noise")


def test_words_of_the_verdict():
    ours = method("sane_kde:best", around([0.6, 0.7, 0.9], seed=1))
    scratch = method("scratch", around([0.1, 0.75, 0.9], seed=2))
    (line,) = verdict([ours, scratch], [0, 1, 2])
    assert line.startswith("sane_kde:best against scratch: epoch 0 ahead (+")
    assert "epoch 1 behind (-" in line and "epoch 2 not told apart (" in line


def test_the_best_of_sane_meets_the_best_of_the_others_and_the_anchors():
    methods = [
        method("anchors", around([0.9, 0.92], seed=1)),
        method("scratch", around([0.1, 0.6], seed=2)),
        method("sane_random", around([0.2, 0.6], seed=3)),
        method("sane_kde", around([0.7, 0.8], seed=4)),
        method("noise", around([0.4, 0.7], seed=5)),
        method("average", around([0.1, 0.1], seed=6)),
    ]
    pairs = [line.split(":")[0] for line in verdict(methods, [0, 1])]
    assert pairs == [
        "sane_random against scratch",
        "sane_kde against scratch",
        "sane_kde against noise",
        "sane_kde against anchors",
    ]
    assert verdict(methods[:2], [0, 1]) == []


def test_few_networks_are_not_judged():
    few = method("sane_kde", around([0.9], networks=FEWEST - 1))
    (line,) = verdict([few, method("scratch", around([0.1]))], [0])
    assert line == (
        "sane_kde against scratch: too few networks to tell them apart (4 of sane_kde; sample with "
        "--sampling.repetitions 5 or more)"
    )
    (line,) = verdict([method("sane_kde", around([0.9], networks=FEWEST)), method("scratch", around([0.1]))], [0])
    assert "epoch 0 ahead" in line


def test_equal_networks_are_not_told_apart():
    same = [[0.5, 0.5]] * FEWEST
    (line,) = verdict([method("sane_kde", same), method("scratch", same)], [0, 1])
    assert line.count("not told apart (+0.0 points [+0.0, +0.0])") == 2


def test_diverged_networks_are_named_with_their_first_epoch():
    broken = method("noise", np.full((3, 4), 0.5))
    broken.metrics_REM[1, 2:, METRICS.index("train_loss")] = np.nan
    broken.metrics_REM[2, 0, METRICS.index("val_loss")] = np.inf
    assert diverged([method("scratch", np.full((2, 4), 0.5)), broken]) == [
        {"method": "noise", "repetition": 1, "epoch": 2},
        {"method": "noise", "repetition": 2, "epoch": 0},
    ]
    (row,) = table_of([broken], [3], np.array([0, 1]))
    assert np.isfinite([value for value in row.values() if not isinstance(value, str)]).all()
