"""The audit: copies are found, baselines are compared at equal novelty, and little is claimed of little."""

import numpy as np
import pytest
import torch

from sane_ray.config import SamplingConfig
from sane_ray.sampling.anchors import aligned, choose
from sane_ray.sampling.auditing import Auditor, compare_at_equal_novelty, verdict
from sane_ray.sampling.generation import Codec
from sane_ray.sampling.methods import Measured, Pool


@pytest.fixture(scope="module")
def audited(store, exact):
    anchors = choose(store, SamplingConfig(anchors="all"))
    ordinals = [*anchors.ordinals, *anchors.others]
    raw = anchors.networks(ordinals)
    training = aligned(raw, anchors.architecture.symmetry, raw[0])
    codec = Codec(exact, anchors.architecture, SamplingConfig())
    ids = store.models["id"].take(ordinals).to_pylist()
    labels = np.arange(40) % 4
    predictions = np.random.default_rng(0).integers(4, size=(len(ordinals), 40)).astype(np.int16)
    return codec, training, ids, predictions, Auditor(codec, training, ids, anchors.runs(ordinals), predictions, labels)


def pool(tokens, predictions):
    count = len(tokens)
    values = np.linspace(0.5, 0.9, count)
    return Pool(tokens, None, [[] for _ in range(count)], Measured(values, -values, values, predictions), 1.0, 0)


def test_a_copy_has_no_novelty_and_errs_as_its_original(audited):
    codec, training, ids, predictions, auditor = audited
    tokens = codec.tokens([training[3], training[0]])
    rows = list(auditor.rows(pool(tokens, predictions[[3, 0]])))
    assert [row["nearest"] for row in rows] == [ids[3], ids[0]]
    assert [row["novelty"] for row in rows] == pytest.approx([0, 0], abs=1e-5)
    assert [row["wrong_agreement"] for row in rows] == [1, 1]
    assert [row["val_acc"] for row in rows] == [0.5, 0.9]


def test_a_permuted_copy_is_a_copy_only_after_alignment(audited, store):
    codec, training, ids, predictions, auditor = audited
    symmetry = store.architecture_of(0).symmetry
    from sane_ray.tokens.symmetry import permute, random_permutations

    shuffled = permute(training[2], symmetry, random_permutations(symmetry, np.random.default_rng(5)))
    (as_it_is,) = auditor.rows(pool(codec.tokens([shuffled]), predictions[:1]))
    (matched,) = auditor.rows(pool(codec.tokens(aligned([shuffled], symmetry, training[2])), predictions[:1]))
    assert as_it_is["novelty"] > 0.5
    assert matched["novelty"] == pytest.approx(0, abs=1e-4)
    assert matched["nearest"] == ids[2]


def test_noise_of_one_unit_is_as_new_as_a_run(audited):
    codec, training, _, predictions, auditor = audited
    tokens = codec.tokens(training[:1])
    noisy = tokens + auditor.unit * torch.randn(20, *tokens.shape[1:], generator=torch.Generator().manual_seed(0))
    novelty = [row["novelty"] for row in auditor.rows(pool(noisy, predictions[:1].repeat(20, 0)))]
    assert np.mean(novelty) == pytest.approx(1, abs=0.1)


def curve(accuracies, novelties, count=30, deviation=0.01):
    rng = np.random.default_rng(1)
    return [
        {"scale": scale, "novelty": novelty, "test_acc": accuracy + deviation * rng.normal()}
        for scale, (accuracy, novelty) in enumerate(zip(accuracies, novelties, strict=True))
        for _ in range(count)
    ]


def test_at_equal_novelty_the_baseline_is_interpolated():
    baseline = curve([0.9, 0.7, 0.5], [0.2, 0.4, 0.6])
    novelty, accuracy = np.full(20, 0.3), np.full(20, 0.85)
    gap, low, high = compare_at_equal_novelty(novelty, accuracy, baseline)
    assert gap == pytest.approx(0.05, abs=0.01)
    assert low < gap < high
    assert low > 0


def test_nothing_is_extrapolated():
    baseline = curve([0.9, 0.7], [0.2, 0.4])
    assert compare_at_equal_novelty(np.full(9, 0.5), np.full(9, 0.9), baseline) is None
    assert compare_at_equal_novelty(np.full(9, 0.1), np.full(9, 0.9), baseline) is None
    assert compare_at_equal_novelty(np.full(9, 0.2), np.full(9, 0.9), curve([0.9], [0.2])) is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(3), 0
    for _ in range(60):
        baseline = [
            {"scale": scale, "novelty": novelty, "test_acc": 0.9 - novelty + 0.05 * rng.normal()}
            for scale, novelty in enumerate((0.2, 0.4))
            for _ in range(25)
        ]
        novelty = rng.uniform(0.25, 0.35, size=25)
        accuracy = 0.9 - novelty + 0.03 + 0.05 * rng.normal(size=25)
        _, low, high = compare_at_equal_novelty(novelty, accuracy, baseline)
        held += low <= 0.03 <= high
    assert held >= 50  # of 60 at 95 %: fewer than one time in 2,000


def row(method, novelty=0.3, agreement=0.1, accuracy=0.9):
    return {"method": method, "novelty": novelty, "wrong_agreement": agreement, "test_acc": accuracy}


def candidates(source, accuracy, novelty, count=30, scale=0, as_method=True):
    return [
        {"source": source, "scale": scale, "as_method": as_method, "novelty": novelty, "test_acc": accuracy + 1e-3 * i}
        for i in range(count)
    ]


def test_the_verdict_says_what_the_numbers_say():
    noise = [*candidates("noise", 0.9, 0.1, scale=0), *candidates("noise", 0.5, 0.5, scale=1)]
    said = verdict([row("sane_kde:best"), row("noise")], [*candidates("sane_kde", 0.9, 0.3), *noise], 0.5)
    assert said[0].startswith("sane_kde:best: 0.30 of the distance between two training runs")
    assert said[0].endswith("close copies of training networks")
    assert "sane_kde is ahead of noise added to anchors at equal novelty: +20." in said[1]
    assert len(said) == 2
    behind = verdict([], [*candidates("sane_kde", 0.6, 0.3), *noise], 0.5)
    assert "behind noise added to anchors" in behind[0]
    alike = verdict([], [*candidates("sane_kde", 0.7, 0.3), *noise], 0.5)
    assert "not told apart from noise" in alike[0]


def test_copies_are_told_by_weights_or_by_wrong_answers():
    assert verdict([row("sane_kde", 0.9, 0.1)], [], 0.5)[0].endswith("no copies")
    assert verdict([row("sane_kde", 0.9, 0.6)], [], 0.5)[0].endswith("close copies of training networks")
    assert verdict([row("sane_kde", 0.2, 0.1)], [], 0.5)[0].endswith("close copies of training networks")
    assert verdict([row("sane_kde", 0.9, None)], [], None)[0].endswith("no copies")


def test_of_few_networks_nothing_is_claimed():
    noise = [*candidates("noise", 0.9, 0.1, scale=0), *candidates("noise", 0.5, 0.5, scale=1)]
    said = verdict([], [*candidates("sane_kde", 0.9, 0.3, count=4), *noise], 0.5)
    assert said == ["sane_kde against noise added to anchors: 4 networks are too few to tell"]
