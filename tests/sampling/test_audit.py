"""The audit measures what a plain loop measures, knows copies from news, and claims nothing it cannot tell."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from sane_ray.errors import InputError
from sane_ray.sampling.audit import (
    Comparison,
    Points,
    Reference,
    aligned_distances,
    compare_accuracy,
    compare_at_equal_novelty,
    interval,
    nearest_models,
    verdict,
    weight_distances,
    wrong_agreement,
)
from sane_ray.tokens.symmetry import derive_symmetry, permute, random_permutations
from sane_ray.tokens.tokenizer import build_layer_table


def models(count, weights=37, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(count, weights)).astype(dtype)


def brute_force(generated, training, excluded=None):
    differences = generated[:, None].astype(np.float64) - training[None].astype(np.float64)
    distances = np.sqrt(np.square(differences).mean(axis=2))
    if excluded is not None:
        distances[excluded] = np.inf
    return distances.min(axis=1), distances.argmin(axis=1)


def answers(count, images=200, classes=10, right=0.7, seed=0):
    """Labels, and the answers of models that are right on about so many images."""
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(classes, size=images)
    others = (labels + rng.integers(1, classes, size=(count, images))) % classes
    return labels, np.where(rng.random((count, images)) < right, labels, others)


def brute_agreement(one, other, labels):
    same = sum(a == b != label for a, b, label in zip(one, other, labels, strict=True))
    either = sum(a != label or b != label for a, b, label in zip(one, other, labels, strict=True))
    return same / either if either else 0.0


# --- distances ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("at_once", [1, 50_000, 2**24])
def test_distances_are_those_of_brute_force_whatever_is_held_at_once(dtype, at_once):
    generated, training = models(11, seed=1, dtype=dtype), models(23, seed=2, dtype=dtype)
    distances, index = weight_distances(generated, training, at_once=at_once)
    expected, nearest = brute_force(generated, training)
    assert np.allclose(distances, expected, rtol=1e-12, atol=0) and np.array_equal(index, nearest)


def test_more_models_than_a_block_are_all_compared(monkeypatch):
    monkeypatch.setattr("sane_ray.sampling.audit._ROWS", 4)
    generated, training = models(11, seed=1), models(23, seed=2)
    expected, nearest = brute_force(generated, training)
    distances, index = weight_distances(generated, training)
    assert np.allclose(distances, expected, rtol=1e-12, atol=0) and np.array_equal(index, nearest)


def test_a_copy_is_at_no_distance_and_near_copies_are_told_apart_though_weights_are_large():
    training = models(40, 500) + 1000
    twin = training.copy()
    twin[:, 0] += np.float32(1e-3)
    distances, index = weight_distances(training[:5], np.concatenate([twin, training]))
    assert distances.tolist() == [0] * 5 and index.tolist() == [40, 41, 42, 43, 44]
    distances, index = weight_distances(twin[:5], training)
    expected, _ = brute_force(twin[:5], training)
    assert np.array_equal(distances, expected) and index.tolist() == [0, 1, 2, 3, 4]


def test_the_first_of_equals_is_the_nearest_and_the_next_follow():
    training = models(6)[[0, 1, 2, 1, 3]]
    _, index = weight_distances(training[1:2], training)
    assert index.tolist() == [1]
    distances, index = nearest_models(training[1:2], training, 9)
    assert index[0, :2].tolist() == [1, 3] and index[0, 5:].tolist() == [-1] * 4
    assert (np.diff(distances[0, :5]) >= 0).all() and np.isnan(distances[0, 5:]).all()


def test_models_of_the_same_run_are_not_compared():
    training = models(12)
    training[1::2] = training[::2] + np.float32(0.01)  # two checkpoints of each run, close to each other
    runs = np.repeat([f"run-{number}" for number in range(6)], 2)
    distances, index = weight_distances(training, training, runs, runs)
    expected, nearest = brute_force(training, training, runs[:, None] == runs[None])
    assert np.allclose(distances, expected, rtol=1e-12) and np.array_equal(index, nearest)
    assert (runs[index] != runs).all()
    distances, index = weight_distances(training[:2], training[:2], runs[:2], runs[:2])
    assert np.isnan(distances).all() and index.tolist() == [-1, -1]


def test_what_is_not_finite_is_left_out_on_both_sides():
    generated, training = models(4, seed=1), models(8, seed=2)
    generated[1, 3], training[0, 0], training[5] = np.inf, np.nan, generated[2]
    training[5, 1] = -np.inf
    distances, index = weight_distances(generated, training)
    kept = [row for row in range(8) if row not in (0, 5)]
    expected, nearest = brute_force(generated[[0, 2, 3]], training[kept])
    assert np.isnan(distances[1]) and index[1] == -1
    assert np.allclose(distances[[0, 2, 3]], expected, rtol=1e-12)
    assert index[[0, 2, 3]].tolist() == [kept[place] for place in nearest]


def test_weights_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="shapes"):
        weight_distances(models(2, 5), models(2, 6))
    with pytest.raises(InputError, match="both, or neither"):
        weight_distances(models(2), models(2), runs_R=[1, 2])
    distances, index = weight_distances(models(2), models(0))
    assert np.isnan(distances).all() and index.tolist() == [-1, -1]


# --- distances after matching in pairs ---


def network(seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise((6, 16, 12, 3))]
    return {key: value.clone() for key, value in nn.Sequential(*layers).state_dict().items()}


def flatten(state):
    return torch.cat([tensor.reshape(-1) for tensor in state.values()]).numpy()


def flat(states):
    return np.stack([flatten(state) for state in states])


def symmetry():
    return derive_symmetry(build_layer_table(network(0)))


def test_matching_finds_the_copy_that_another_order_of_channels_hides():
    training = [network(seed) for seed in range(6)]
    hidden = permute(training[4], symmetry(), random_permutations(symmetry(), np.random.default_rng(0)))
    states = [hidden, network(7)]
    coarse, _ = weight_distances(flat(states), flat(training))
    arguments = (flat(states), flat(training), states, training, symmetry(), flatten)
    distances, index = aligned_distances(*arguments, nearest=6)
    assert coarse[0] > 0.1 and distances[0] < 1e-7 and index[0] == 4
    assert (distances <= coarse).all() and distances[1] > 0.05


def test_matching_looks_at_the_nearest_only_never_at_the_own_run_and_never_loses():
    training = [network(seed) for seed in range(8)]
    weights, runs = flat(training), np.arange(8) // 2
    coarse, _ = weight_distances(weights, weights, runs, runs)
    asked = []

    class Read(list):
        def __getitem__(self, place):
            asked.append(place)
            return super().__getitem__(place)

    distances, index = aligned_distances(
        weights[:3], weights, training[:3], Read(training), symmetry(), flatten, nearest=2, runs_R=runs[:3], runs_M=runs
    )
    assert len(asked) == 6
    assert (distances <= coarse[:3]).all() and (distances < coarse[:3]).any()
    assert (runs[index] != runs[:3]).all()


def test_what_is_not_finite_is_not_matched():
    states, training = [network(8), network(9)], [network(seed) for seed in range(3)]
    states[0]["0.weight"][0, 0] = torch.nan
    training[0]["0.weight"][0, 0] = torch.inf
    distances, index = aligned_distances(flat(states), flat(training), states, training, symmetry(), flatten)
    assert np.isnan(distances[0]) and index[0] == -1 and index[1] in (1, 2)


# --- wrong answers ---


@pytest.mark.parametrize("at_once", [1, 4000, 2**24])
def test_agreement_is_that_of_brute_force_whatever_is_held_at_once(at_once):
    labels, training = answers(13, seed=1)
    _, generated = answers(7, right=0.4, seed=2)
    expected = np.array([[brute_agreement(one, other, labels) for other in training] for one in generated])
    largest, index = wrong_agreement(generated, training, labels, at_once=at_once)
    assert np.allclose(largest, expected.max(axis=1)) and np.array_equal(index, expected.argmax(axis=1))


def test_agreement_has_known_values():
    labels = np.array([0, 0, 0, 0, 0])
    training = np.array([[0, 1, 2, 0, 0], [0, 0, 0, 0, 0]])
    generated = np.array([[0, 1, 2, 0, 0], [0, 1, 1, 0, 0], [3, 1, 2, 3, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
    largest, index = wrong_agreement(generated, training, labels)
    assert largest.tolist() == [
        1,
        0.5,
        0.5,
        0,
        0,
    ]  # the same; the same image, another class; two more errors; none; none
    assert index.tolist() == [0] * 5
    largest, _ = wrong_agreement(generated[3:4], training[1:], labels)
    assert largest.tolist() == [0]  # neither is ever wrong


def test_answers_that_are_none_and_the_own_run_are_left_out():
    labels, training = answers(6, seed=1)
    runs = np.arange(6) // 2
    training = training.astype(float)
    training[5, 3] = np.nan
    largest, index = wrong_agreement(training, training, labels, runs, runs)
    assert (runs[index[:5]] != runs[:5]).all() and (largest[:5] < 1).all() and not (index == 5).any()
    assert np.isnan(largest[5]) and index[5] == -1
    training[0, 0] = -1
    largest, _ = wrong_agreement(training[:1], training, labels)
    assert np.isnan(largest).all()
    with pytest.raises(InputError, match="200 a model"):
        wrong_agreement(training[:, :-1], training, labels)


# --- novelty ---


def zoo(runs=12, checkpoints=3, seed=0):
    """Checkpoints that are near those of their run, and runs that are 1.4 apart in the mean."""
    centres = models(runs, 400, seed)
    noise = 0.1 * models(runs * checkpoints, 400, seed + 1)
    return np.repeat(centres, checkpoints, axis=0) + noise, np.repeat(np.arange(runs), checkpoints)


def reference_of(weights, runs, **options):
    labels, predictions = answers(len(runs), seed=5)
    return Reference.measure(weights, predictions, labels, runs, **options)


def test_novelty_is_measured_in_distances_between_runs():
    weights, runs = zoo()
    reference = reference_of(weights, runs)
    expected, _ = brute_force(weights, weights, runs[:, None] == runs[None])
    assert np.allclose(reference.distances_M, expected, rtol=1e-12)
    assert reference.median_distance == pytest.approx(np.median(expected)) and 1.2 < reference.median_distance < 1.5
    assert reference.distance_quantile(0.9) == pytest.approx(np.quantile(expected, 0.9))
    assert 0 < reference.agreement_quantile() < 0.2
    copies, _ = weight_distances(weights[:5], weights)
    fresh, _ = weight_distances(zoo(seed=50)[0], weights)
    assert reference.novelty(copies).tolist() == [0] * 5
    assert np.median(reference.novelty(fresh)) == pytest.approx(1, abs=0.05)


def test_some_training_models_stand_for_all():
    weights, runs = zoo()
    one, same, other = (reference_of(weights, runs, most=10, seed=seed) for seed in (0, 0, 1))
    assert len(one.distances_M) == len(one.agreements_M) == 10
    assert np.array_equal(one.distances_M, same.distances_M) and not np.array_equal(one.distances_M, other.distances_M)
    assert set(one.distances_M) <= set(reference_of(weights, runs).distances_M)


def test_one_run_or_equal_runs_give_no_reference():
    weights, runs = zoo(runs=1)
    with pytest.raises(InputError, match="at least two runs"):
        reference_of(weights, runs)
    with pytest.raises(InputError, match="differ"):
        reference_of(np.ones((4, 3), np.float32), np.arange(4))


# --- comparisons ---


def curve(seed=0, count=20, scales=(0.2, 0.6, 1.0), spread=0.02):
    """A baseline whose accuracy falls from 0.8 by 0.5 a unit of novelty."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(scales, count)
    novelty = scale * (1 + 0.01 * rng.normal(size=scale.size))
    return Points(novelty, 0.8 - 0.5 * scale + spread * rng.normal(size=scale.size), scale_n=scale)


def method(novelty=0.4, ahead=0.0, seed=1, count=20, spread=0.02):
    rng = np.random.default_rng(seed)
    accuracy = 0.8 - 0.5 * novelty + ahead + spread * rng.normal(size=count)
    return Points(np.full(count, novelty) + 0.001 * rng.normal(size=count), accuracy)


@pytest.mark.parametrize(("ahead", "found"), [(0.1, "ahead"), (-0.1, "behind"), (0.0, "not told apart")])
def test_a_method_is_compared_on_the_line_between_scales(ahead, found):
    comparison = compare_at_equal_novelty(method(ahead=ahead), curve())
    assert comparison.verdict == found and comparison.novelty == pytest.approx(0.4, abs=0.01)
    assert comparison.low <= comparison.difference <= comparison.high
    assert comparison.difference == pytest.approx(ahead, abs=0.02)
    assert comparison == compare_at_equal_novelty(method(ahead=ahead), curve())


def test_without_spread_the_difference_is_exact_whatever_the_order_of_scales():
    scale = np.repeat([3.0, 1.0, 2.0], 5)
    baseline = Points(np.repeat([1.0, 0.0, 0.5], 5), np.repeat([0.1, 0.9, 0.5], 5), scale_n=scale)
    found = compare_at_equal_novelty(Points(np.full(5, 0.25), np.full(5, 0.75)), baseline)
    assert (found.difference, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))


@pytest.mark.parametrize("novelty", [0.1, 1.2])
def test_nothing_is_extrapolated(novelty):
    found = compare_at_equal_novelty(method(novelty), curve())
    assert found.verdict == "not comparable" and "beyond what was tried, 0.20 to 1.0" in found.reason
    assert np.isnan([found.difference, found.low, found.high]).all()


def test_an_end_of_the_curve_that_half_of_the_draws_miss_is_no_place_to_compare():
    edge = Points(np.linspace(0.9, 1.09, 21), np.full(21, 0.3))
    found = compare_at_equal_novelty(edge, Points(*curve(spread=0).__dict__.values()))
    assert found.verdict == "not comparable" and "too near an end" in found.reason


def test_few_models_are_not_compared():
    assert "4 models are too few" in compare_at_equal_novelty(method(count=4), curve()).reason
    assert "fewer than 2" in compare_at_equal_novelty(method(), curve(count=4)).reason
    assert "fewer than 2" in compare_at_equal_novelty(method(), curve(scales=(0.4,))).reason
    assert "3 models are too few" in compare_accuracy(method(), method(count=3)).reason
    with pytest.raises(InputError, match="scale_n"):
        compare_at_equal_novelty(method(), method())
    with pytest.raises(InputError, match="one a model"):
        Points(np.zeros(3), np.zeros(2))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """95 % nominal; a percentile bootstrap over 20 models falls a little short."""
    truth, held, claimed, means = 0.03, 0, 0, 0
    for seed in range(200):
        mine = method(ahead=truth, seed=1000 + seed, spread=0.04)
        found = compare_at_equal_novelty(mine, curve(seed=5000 + seed, spread=0.04), draws=400, seed=seed)
        held += found.low <= truth <= found.high
        same = method(seed=9000 + seed, spread=0.04)
        claimed += compare_at_equal_novelty(same, curve(seed=seed), draws=400, seed=seed).verdict != "not told apart"
        _, low, high = interval(mine.accuracy_n, draws=400, seed=seed)
        means += low <= 0.8 - 0.5 * 0.4 + truth <= high
    assert 0.88 <= held / 200 <= 0.99
    assert 0.88 <= means / 200 <= 0.99
    assert claimed / 200 <= 0.12


def test_intervals_of_means_and_medians():
    values = np.array([1.0, 2.0, 9.0, np.nan, np.inf])
    assert interval(values)[0] == 4 and interval(values, "median")[0] == 2
    _, low, high = interval(values)
    assert 1 <= low < 4 < high <= 9
    assert np.isnan(interval(np.array([np.nan]))).all()


# --- sentences ---


def audited(weights, predictions, seed=0):
    """The measures of some models against a zoo, and its reference."""
    training, runs = zoo()
    labels, training_predictions = answers(len(runs), seed=5)
    reference = Reference.measure(training, training_predictions, labels, runs)
    distances, _ = weight_distances(weights, training)
    agreement, _ = wrong_agreement(predictions, training_predictions, labels)
    return Points(reference.novelty(distances), (predictions == labels).mean(axis=1), agreement), reference


def test_copies_with_a_little_noise_are_called_replicas_and_fresh_models_are_not():
    copies = zoo()[0][:10] + 0.05 * models(10, 400, 9)
    points, reference = audited(copies, answers(36, seed=5)[1][:10])
    sentences = verdict("copies", points, reference, {})
    assert sentences[0] == "copies: replicas of training models (10 models)."
    assert "is below 0.5" in sentences[1] and "wrong agreement 1.00 [1.00, 1.00] is above 0.0" in sentences[2]
    points, reference = audited(zoo(seed=50)[0][:10], answers(10, seed=8)[1])
    sentences = verdict("fresh", points, reference, {})
    assert sentences[0] == "fresh: no replicas (10 models)."
    assert "is above 0.5" in sentences[1] and "In errors" in sentences[2]


def test_a_model_far_away_that_errs_as_a_training_model_is_a_replica_too():
    points, reference = audited(zoo(seed=50)[0][:10], answers(36, seed=5)[1][:10])
    sentences = verdict("rescaled", points, reference, {})
    assert sentences[0].startswith("rescaled: replicas") and "is above 0.5" in sentences[1]


def test_models_around_the_bound_are_perhaps_replicas():
    _, reference = audited(zoo()[0][:1], answers(1)[1])
    points = Points(np.linspace(0.3, 0.72, 11), np.full(11, 0.5))
    sentences = verdict("between", points, reference, {})
    assert sentences[0] == "between: perhaps replicas (11 models)." and "not told apart from 0.5" in sentences[1]
    assert len(sentences) == 2  # nothing is said of errors that were not measured


def test_sentences_give_numbers_with_intervals_and_say_what_cannot_be_compared():
    _, reference = audited(zoo()[0][:1], answers(1)[1])
    mine = method(0.7, ahead=0.1, spread=0)
    sentences = verdict("sane", mine, reference, {"noise": curve(spread=0), "average": curve(scales=(0.2, 0.5))},
                        Points(np.zeros(6), np.full(6, 0.8)))  # fmt: skip
    assert sentences[0] == "sane: no replicas (20 models)."
    assert sentences[2].startswith("Ahead of noise at novelty 0.70: +10.") and sentences[2].endswith("].")
    assert sentences[3] == ("Not comparable with average at novelty 0.70: this is beyond what was tried, 0.20 to 0.50.")
    assert sentences[4] == "Behind its anchors: -25.0 points [-25.0, -25.0]."


def test_from_few_models_nothing_is_claimed_and_those_left_out_are_counted():
    _, reference = audited(zoo()[0][:1], answers(1)[1])
    few = Points(np.array([0.1, 0.1, 0.1, np.nan, 0.1]), np.array([0.5, 0.5, 0.5, 0.5, 0.5]))
    assert verdict("few", few, reference, {"noise": curve()}) == [
        "few: nothing is claimed from 4 models; at least 5 are needed.",
        "Left out: 1 of 5 models, which are not finite.",
    ]
    many = Points(np.r_[np.full(6, 0.1), np.nan], np.full(7, 0.5))
    assert verdict("many", many, reference, {})[-1] == "Left out: 1 of 7 models, which are not finite."


def test_a_comparison_without_numbers_is_one_of_them():
    assert np.isnan(Comparison("not comparable", 0.3).difference)


def test_the_audit_needs_no_ray():
    code = "import sys; import sane_ray.sampling.audit; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
