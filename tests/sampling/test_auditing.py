"""The audit of a run: copies are found whatever the order of channels, and sources are compared with baselines."""

import re

import numpy as np
import pytest
import torch

from sane_ray.config import SamplingConfig
from sane_ray.sampling.anchors import aligned, choose
from sane_ray.sampling.auditing import Auditor, Training, points_of
from sane_ray.sampling.generation import Codec
from sane_ray.sampling.methods import Measured, Pool
from sane_ray.tokens.symmetry import Symmetry, permute, random_permutations


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
    epochs = store.models["epoch"].take(ordinals).to_pylist()
    others = Training(training, ids, anchors.runs(ordinals), epochs, predictions, labels)
    return codec, training, ids, predictions, Auditor(codec, others, anchors.architecture.symmetry)


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


def test_a_permuted_copy_is_a_copy(audited, store):
    codec, training, ids, predictions, auditor = audited
    symmetry = store.architecture_of(0).symmetry
    rng = np.random.default_rng(5)
    shuffled = [permute(network, symmetry, random_permutations(symmetry, rng)) for network in training[:3]]
    near = aligned(shuffled, symmetry, training[0])  # as sampled networks are: in the anchors' order, about
    found = list(auditor.rows(pool(codec.tokens(near), predictions[:3])))
    assert [row["nearest"] for row in found] == ids[:3]
    assert [row["novelty"] for row in found] == pytest.approx([0] * 3, abs=1e-4)


def test_noise_of_one_unit_is_as_new_as_a_run(audited):
    codec, training, _, predictions, auditor = audited
    tokens = codec.tokens(training[:1])
    noisy = tokens + auditor.reference.median_distance * torch.randn(
        20, *tokens.shape[1:], generator=torch.Generator().manual_seed(0)
    )
    novelty = [row["novelty"] for row in auditor.rows(pool(noisy, predictions[:1].repeat(20, 0)))]
    assert np.mean(novelty) == pytest.approx(1, abs=0.1)


def test_unmatched_channels_make_a_permuted_copy_look_new(audited, store):
    codec, training, ids, predictions, _ = audited
    others = Training(
        training, ids, [f"run {place}" for place in range(len(training))], [0] * len(training), None, None
    )
    blind = Auditor(codec, others, Symmetry({}, {}))
    symmetry = store.architecture_of(0).symmetry
    shuffled = permute(training[0], symmetry, random_permutations(symmetry, np.random.default_rng(5)))
    (row,) = blind.rows(pool(codec.tokens([shuffled]), predictions[:1]))
    assert row["novelty"] > 0.3
    assert row["wrong_agreement"] is None


def row(source, scale, novelty, accuracy, as_method=True):
    values = {"novelty": novelty, "test_acc": accuracy, "wrong_agreement": 0.1}
    return {"source": source, "method": source, "scale": scale, "as_method": as_method, **values}


_AGAINST = ("Ahead of noise at novelty 0.50", "Behind its anchors")


def test_sources_of_sane_are_compared_with_every_swept_baseline(audited):
    rng = np.random.default_rng(0)
    noise = [row("noise", s, 0.2 + 0.2 * s, 0.9 - 0.2 * s + 0.01 * rng.normal()) for s in range(4) for _ in range(20)]
    ours = [row("sane_kde", 1.0, 0.5 + 0.01 * rng.normal(), 0.8 + 0.01 * rng.normal()) for _ in range(20)]
    swept = [row("sane_kde", 2.0, 0.1, 0.1, as_method=False) for _ in range(20)]
    anchors = [row("anchors", 1.0, 0.0, 0.95) for _ in range(5)]
    kept = [row("sane_kde:best", 1.0, 0.5, 0.85) for _ in range(5)] + [row("noise:best", 1.0, 0.5, 0.85)]
    of_source, of_kept = audited[-1].verdict(kept, [*ours, *swept, *noise, *anchors])
    assert of_source[0].startswith("sane_kde: ")
    assert "20 models" in of_source[0]
    against = {words: re.search(rf"{words}: ([+-][\d.]+) points", " ".join(of_source)) for words in _AGAINST}
    assert float(against["Ahead of noise at novelty 0.50"][1]) == pytest.approx(20, abs=1.5)
    assert float(against["Behind its anchors"][1]) == pytest.approx(-15, abs=1.5)
    assert of_kept[0].startswith("sane_kde:best: ")


def test_networks_of_one_run_tell_nothing_of_novelty(audited):
    codec, training, ids, predictions, _ = audited
    auditor = Auditor(codec, Training(training[:3], ids[:3], ["one"] * 3, [0, 1, 2], None, None), Symmetry({}, {}))
    assert auditor.reference is None
    (found,) = auditor.rows(pool(codec.tokens(training[:1]), predictions[:1]))
    assert found["novelty"] is None
    assert found["distance"] == pytest.approx(0, abs=1e-6)
    assert auditor.verdict([], []) == [
        ["Nothing is said of novelty: the store holds networks of one training run alone."]
    ]


def test_what_is_not_known_is_not_a_number():
    points = points_of([{"novelty": None, "test_acc": 0.5, "wrong_agreement": None, "scale": 1.0}], swept=True)
    assert np.isnan(points.novelty_n).all()
    assert points.agreement_n is None
    assert points.scale_n.tolist() == [1.0]
