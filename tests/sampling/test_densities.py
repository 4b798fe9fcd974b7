"""Densities: the published draws bit for bit, and what sets ours apart from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KernelDensity

from sane_ray.sampling import densities
from sane_ray.sampling.densities import PUBLISHED_SEED, shared_seed_kde

ALL = (
    densities.anchors_themselves,
    densities.joint_kde,
    densities.shared_kde,
    densities.token_kde,
    densities.dimension_kde,
    densities.published_kde,
    densities.gaussian,
    densities.mixture,
    densities.interpolation,
    densities.average,
    densities.random,
)
SEEDED = [density for density in ALL if density not in (densities.anchors_themselves, densities.published_kde)]


@pytest.fixture
def anchors() -> torch.Tensor:
    return torch.randn(9, 7, 4, generator=torch.Generator().manual_seed(3))


def _drawn(values: np.ndarray, count: int, bandwidth: float = 0.2) -> np.ndarray:
    return KernelDensity(kernel="gaussian", bandwidth=bandwidth).fit(values).sample(count, random_state=PUBLISHED_SEED)


@pytest.mark.parametrize("bandwidth", [0.2, 0.002])
def test_published_draws_are_those_of_scikit_learn_bit_for_bit(anchors, bandwidth):
    values, count = anchors.numpy(), 11
    tokens = np.stack([_drawn(values[:, token], count, bandwidth) for token in range(7)], axis=1)
    whole = _drawn(values.reshape(9, -1), count, bandwidth).reshape(count, 7, 4)
    single = [
        [_drawn(values[:, token, place : place + 1], count, bandwidth)[:, 0] for place in range(4)]
        for token in range(7)
    ]
    np.testing.assert_array_equal(shared_seed_kde(values, count, "token", bandwidth), tokens)
    np.testing.assert_array_equal(shared_seed_kde(values, count, "joint", bandwidth), whole)
    np.testing.assert_array_equal(
        shared_seed_kde(values, count, "dimension", bandwidth), np.array(single).transpose(2, 0, 1)
    )


def test_published_draws_repeat_one_anchor_and_one_noise_over_all_tokens(anchors):
    draws = densities.published_kde(anchors, 20, seed=1, scale=0.2)
    noise = draws.values_RNX - torch.stack([anchors[index] for (index,) in draws.parents])
    assert torch.allclose(noise, noise[:, :1].expand_as(noise), atol=1e-6)
    again = densities.published_kde(anchors, 20, seed=2, scale=0.2)
    assert torch.equal(draws.values_RNX, again.values_RNX)


def test_default_draws_have_independent_noise_and_differ_between_seeds(anchors):
    draws = densities.joint_kde(anchors, 4000, seed=1, scale=0.2)
    noise_RX = (draws.values_RNX - torch.stack([anchors[index] for (index,) in draws.parents])).flatten(1)
    correlation = torch.corrcoef(noise_RX.T) - torch.eye(28)
    assert correlation.abs().max() < 0.08  # 378 correlations of 4,000 draws: five standard errors
    assert noise_RX.std(0).tolist() == pytest.approx([0.2] * 28, rel=0.08)
    assert not torch.equal(draws.values_RNX, densities.joint_kde(anchors, 4000, seed=2, scale=0.2).values_RNX)


def test_token_and_dimension_densities_choose_anchors_independently(anchors):
    tokens = densities.token_kde(anchors, 500, seed=0, scale=0.0).values_RNX
    chosen_RN = (tokens[:, None] == anchors[None]).all(-1).float().argmax(1)
    assert torch.equal(anchors[chosen_RN, torch.arange(7)], tokens)
    assert (chosen_RN[:, 0] == chosen_RN[:, 1]).float().mean() == pytest.approx(1 / 9, abs=0.06)
    values = densities.dimension_kde(anchors, 500, seed=0, scale=0.0).values_RNX
    chosen_RNX = (values[:, None] == anchors[None]).float().argmax(1)
    assert (chosen_RNX[:, 0, 0] == chosen_RNX[:, 0, 1]).float().mean() == pytest.approx(1 / 9, abs=0.06)


def test_gaussian_has_the_mean_and_the_shrunk_covariance(anchors):
    draws = densities.gaussian(anchors, 60_000, seed=0, scale=1.0).values_RNX.flatten(1)
    expected = LedoitWolf().fit(anchors.flatten(1).numpy())
    assert draws.mean(0).numpy() == pytest.approx(expected.location_, abs=0.03)
    assert np.cov(draws.numpy().T) == pytest.approx(expected.covariance_, abs=0.05)


def test_mixture_stays_in_the_space_of_the_anchors_and_without_scale_at_its_means(anchors):
    flat = anchors.flatten(1)
    draws = densities.mixture(anchors, 200, seed=0, scale=1.0).values_RNX.flatten(1)
    basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:8]
    centred = draws - flat.mean(0)
    assert torch.allclose(centred @ basis.T @ basis, centred, atol=1e-4)
    at_means = densities.mixture(anchors, 200, seed=0, scale=0.0).values_RNX.flatten(1)
    assert len(torch.unique(at_means.round(decimals=4), dim=0)) <= 2  # nine anchors: two components


def test_interpolation_lies_between_neighbours(anchors):
    draws = densities.interpolation(anchors, 300, seed=0, scale=0.3)
    distance = torch.cdist(anchors.flatten(1), anchors.flatten(1)).fill_diagonal_(np.inf)
    for value, (first, second) in zip(draws.values_RNX, draws.parents, strict=True):
        assert torch.allclose(value, 0.7 * anchors[first] + 0.3 * anchors[second], atol=1e-6)
        assert second in distance[first].argsort()[: densities.NEIGHBORS].tolist()


def test_average_is_the_mean_of_its_parents(anchors):
    draws = densities.average(anchors, 50, seed=0, scale=4)
    for value, parents in zip(draws.values_RNX, draws.parents, strict=True):
        assert len(set(parents)) == 4
        assert torch.allclose(value, anchors[parents].mean(0), atol=1e-6)


def test_random_does_not_look_at_the_anchors(anchors):
    draws = densities.random(anchors, 3000, seed=0, scale=10.0).values_RNX
    assert torch.equal(draws, densities.random(100 * anchors, 3000, seed=0, scale=10.0).values_RNX)
    assert float(draws.std()) == pytest.approx(10.0, rel=0.02)


@pytest.mark.parametrize("density", ALL, ids=lambda density: density.__name__)
@pytest.mark.parametrize("count_of_anchors", [1, 2, 9])
def test_every_density_draws_as_many_as_asked_from_any_number_of_anchors(anchors, density, count_of_anchors):
    draws = density(anchors[:count_of_anchors], 12, 0, 0.5)
    assert draws.values_RNX.shape == (12, 7, 4)
    assert draws.values_RNX.dtype == torch.float32
    assert draws.values_RNX.isfinite().all()
    assert len(draws.parents) == 12


@pytest.mark.parametrize("density", SEEDED, ids=lambda density: density.__name__)
def test_a_seed_repeats_its_draws_and_leaves_the_global_state_alone(anchors, density):
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = density(anchors, 12, 5, 0.5).values_RNX
    assert torch.equal(first, density(anchors, 12, 5, 0.5).values_RNX)
    assert not torch.equal(first, density(anchors, 12, 6, 0.5).values_RNX)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
