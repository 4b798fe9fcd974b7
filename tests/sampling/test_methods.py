"""Methods: each draws where it says, keeps the best by validation images, and reports what exploded."""

import dataclasses

import numpy as np
import pytest
import torch

from sane_ray.config import SAMPLING_METHODS, SamplingConfig
from sane_ray.sampling import methods
from sane_ray.sampling.anchors import aligned, choose
from sane_ray.sampling.densities import Draws
from sane_ray.sampling.generation import Codec
from sane_ray.sampling.methods import SOURCES, Measured, Sampler, Source

CONFIG = SamplingConfig(repetitions=3, candidates=12, rounds=3, best_fraction=0.8)


@pytest.fixture(scope="module")
def anchors(store):
    chosen = choose(store, CONFIG)
    networks = chosen.networks(chosen.ordinals)
    return chosen, aligned(networks, chosen.architecture.symmetry, networks[0])


def toy_measure(weights):
    """Validation likes a large first bias, test accuracy is the opposite: nothing may look at it."""
    values = weights["module_list.0.bias"][:, 0].double().numpy()
    return Measured(values, -values, -values, np.zeros((len(values), 4), dtype=np.int16))


def sampler(anchors, exact, measure=toy_measure, **settings):
    chosen, networks = anchors
    config = dataclasses.replace(CONFIG, **settings)
    return Sampler(Codec(exact, chosen.architecture, config), networks, measure, config)


def test_every_method_has_a_source_and_keeps_as_many_as_asked(anchors, exact):
    assert {*SOURCES, "scratch"} == set(SAMPLING_METHODS)
    some = sampler(anchors, exact)
    for source in SOURCES:
        for selection in ("", ":best", ":bootstrap"):
            kept = some.kept(source + selection)
            assert 1 <= len(kept) <= 3, source + selection
            assert len(kept) == 3 or source in ("average", "interpolation", "sane_interpolation")
            assert len(kept.parents) == len(kept.measured.val_acc) == len(kept)
            assert kept.exploded == 0


def test_anchors_are_kept_as_they_are_and_reconstruction_is_exact_without_loss(anchors, exact):
    some = sampler(anchors, exact)
    for method in ("anchors", "reconstruction"):
        kept = some.kept(method)
        torch.testing.assert_close(
            some.codec.values(kept.tokens_RNT), some.codec.values(some.tokens_KNT[:3]), atol=1e-6, rtol=1e-6
        )
        assert kept.parents == [[0], [1], [2]]


def test_the_best_are_those_of_validation_and_a_bootstrap_goes_beyond_them(anchors, exact):
    some = sampler(anchors, exact)
    drawn = some.pool("noise").measured.val_acc
    best = some.kept("noise:best").measured.val_acc
    assert best.tolist() == sorted(drawn, reverse=True)[:3]
    assert some.kept("noise").measured.val_acc.tolist() == drawn[:3].tolist()
    bootstrapped = some.kept("noise:bootstrap").measured.val_acc
    assert bootstrapped.tolist() == sorted(bootstrapped, reverse=True)
    assert bootstrapped[0] > best[0]


def test_noise_is_as_far_from_the_anchors_as_the_kernel_density(anchors, exact):
    some = sampler(anchors, exact, bandwidth=0.05)
    assert some.bandwidth == 0.05
    noise = some.distances(some.pool("noise").tokens_RNT)
    assert noise.mean() == pytest.approx(some.distances(some.pool("sane_kde").tokens_RNT).mean(), rel=0.05)
    assert some.distances(some.pool("anchors").tokens_RNT).max() < 1e-3


def test_the_bandwidth_is_the_largest_within_a_standard_error_of_the_best(anchors, exact):
    accuracies = {0.1: [0.90, 0.92], 0.2: [0.915, 0.895], 0.4: [0.5, 0.6]}  # the best's standard error is 0.0058
    some = sampler(anchors, exact, bandwidths=list(accuracies), candidates=3)
    values = iter(accuracies.values())

    def measure(weights):
        three = np.array([*(pair := next(values)), np.mean(pair)])
        return Measured(three, -three, three, np.zeros((3, 4), dtype=np.int16))

    some.measure = measure
    assert some.bandwidth == some.bandwidths[1]


def test_what_explodes_is_counted_and_left_out(anchors, exact, monkeypatch):
    def broken(anchors_KNX, count, seed, scale):
        values = anchors_KNX[torch.arange(count) % len(anchors_KNX)].clone()
        values[0, 0, 0] = float("nan")
        values[1, 0, 0] = float("inf")
        values[2, 0, 0] = 1e30
        return Draws(values, [[index] for index in range(count)])

    monkeypatch.setitem(methods.SOURCES, "noise", Source("weights", broken, "one", ""))
    kept = sampler(anchors, exact).kept("noise")
    assert kept.exploded == 3
    assert kept.parents == [[3], [4], [5]]
    assert kept.tokens_RNT.isfinite().all()


def test_all_may_explode(anchors, exact, monkeypatch):
    def broken(anchors_KNX, count, seed, scale):
        return Draws(torch.full((count, *anchors_KNX.shape[1:]), float("nan")), [[] for _ in range(count)])

    monkeypatch.setitem(methods.SOURCES, "noise", Source("weights", broken, "one", ""))
    some = sampler(anchors, exact)
    for method in ("noise", "noise:best", "noise:bootstrap"):
        assert len(some.kept(method)) == 0
        assert some.kept(method).exploded >= CONFIG.candidates


def test_draws_repeat_and_change_with_the_seed(anchors, exact):
    first, again, other = (sampler(anchors, exact, seed=seed).kept("sane_kde").tokens_RNT for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_images_draws_are_kept_unmeasured(anchors, exact):
    some = sampler(anchors, exact, measure=None)
    kept = some.kept("sane_kde")
    assert len(kept) == 3
    assert kept.measured is None
    assert some.bandwidth == some.bandwidths[0]


def test_sweeps_go_over_the_scales_of_the_config(anchors, exact):
    some = sampler(anchors, exact, noises=[0.1, 0.5])
    assert [pool.scale for pool in some.sweep("noise")] == [0.1, 0.5]
    distances = [some.distances(pool.tokens_RNT).mean() for pool in some.sweep("noise")]
    assert distances == pytest.approx([0.1, 0.5], rel=0.05)
    assert [pool.scale for pool in some.sweep("sane_kde")] == some.bandwidths


def test_a_network_that_is_drawn_twice_is_kept_once(anchors, exact):
    count = len(anchors[1])
    some = sampler(anchors, exact, candidates=60)
    assert len(some.pool("average", float(count))) == 1  # of all anchors there is one mean
    pairs = {frozenset(parents) for parents in some.pool("interpolation").parents}
    assert len(some.pool("interpolation")) == len(pairs) <= count * (count - 1) // 2
    for method in ("interpolation:best", "average:best", "interpolation:bootstrap"):
        values = some.codec.values(some.kept(method).tokens_RNT)
        apart = torch.cdist(values, values) + torch.eye(len(values)) * 1e9
        assert apart.min() > 1e-3
    assert len(some.pool("noise")) == 60
