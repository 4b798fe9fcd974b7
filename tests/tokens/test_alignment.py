import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import alignment as benchmark

from sane_ray.errors import InputError
from sane_ray.tokens.alignment import Matcher, match
from sane_ray.tokens.symmetry import Symmetry, derive_symmetry, permute, random_permutations
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.tokens.tracing import trace_symmetry


def mlp(seed=0, widths=(12, 40, 30, 5), bias=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(inputs, outputs, bias) for inputs, outputs in pairwise(widths)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.Tanh())][:-1])


def weights_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def mlp_weights(seed=0):
    return weights_of(mlp(seed))


def wide(seed=0):
    """Permutations long enough for the relaxed problem to be solved first."""
    return weights_of(mlp(seed, (30, 150, 120, 10)))


def resnet(seed=0):
    return benchmark.resnet18(seed, width=8)


NETWORKS = {"mlp": mlp_weights, "wide": wide, "cnn": benchmark.cnn, "resnet18": resnet}


def symmetry_of(weights):
    return derive_symmetry(build_layer_table(weights))


def scrambled(weights, symmetry, noise=0.0, seed=0):
    """The weights with permuted channels and noise, and the permutations that undo it."""
    rng = np.random.default_rng(seed)
    permutations = random_permutations(symmetry, rng)
    generator = torch.Generator().manual_seed(seed)
    moved = {
        key: value + noise * value.std() * torch.randn(value.shape, generator=generator) if value.dim() else value
        for key, value in permute(weights, symmetry, permutations).items()
    }
    return moved, {name: np.argsort(order) for name, order in permutations.items()}


def similarity(one, other, symmetry):
    products = np.zeros(3)
    for key in symmetry.axes:
        a, b = one[key].double().flatten(), other[key].double().flatten()
        products += [float(a @ b), float(a @ a), float(b @ b)]
    return products[0] / np.sqrt(products[1] * products[2])


def best_single_gain(reference, other, symmetry, permutations):
    """How much cosine one permutation could gain while the others stay, by profits in float64."""
    gains = []
    aligned = {key: value.double() for key, value in permute(other, symmetry, permutations).items()}
    norm = np.sqrt(
        np.prod([sum(float((s[key].double() ** 2).sum()) for key in symmetry.axes) for s in (reference, other)])
    )
    for name, size in symmetry.sizes.items():
        profit = np.zeros((size, size))
        for key in symmetry.axes:
            for axis, length in enumerate(reference[key].shape):
                for part in symmetry.parts(key, axis, length):
                    if part.name != name:
                        continue
                    one, two = (
                        value.double().movedim(axis, 0)[part.start : part.stop].reshape(size, -1).numpy()
                        for value in (reference[key], aligned[key])
                    )
                    profit += one @ two.T
        rows, columns = linear_sum_assignment(profit, maximize=True)
        gains.append((profit[rows, columns].sum() - np.trace(profit)) / norm)
    return max(gains)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_planted_permutation_is_recovered(name, noise):
    weights = NETWORKS[name](0)
    symmetry = symmetry_of(weights)
    other, planted = scrambled(weights, symmetry, noise, seed=3)
    alignment = match(weights, other, symmetry)
    assert alignment.permutations.keys() == symmetry.sizes.keys()
    for key, order in planted.items():
        np.testing.assert_array_equal(alignment.permutations[key], order)
        assert alignment.permutations[key].dtype == np.int64
    aligned = permute(other, symmetry, alignment.permutations)
    assert alignment.similarity_after == pytest.approx(similarity(weights, aligned, symmetry), abs=1e-6)
    assert alignment.similarity_before == pytest.approx(similarity(weights, other, symmetry), abs=1e-6)
    if not noise:
        assert all(torch.equal(aligned[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_unrelated_networks_end_where_no_single_permutation_can_be_improved(name, seed):
    weights, other = NETWORKS[name](0), NETWORKS[name](seed + 1)
    symmetry = symmetry_of(weights)
    alignment = match(weights, other, symmetry, seed=seed)
    assert best_single_gain(weights, other, symmetry, alignment.permutations) < 1e-6
    identity = {name: np.arange(size) for name, size in symmetry.sizes.items()}
    assert best_single_gain(weights, other, symmetry, identity) > 1e-3
    aligned = permute(other, symmetry, alignment.permutations)
    assert alignment.similarity_after == pytest.approx(similarity(weights, aligned, symmetry), abs=1e-6)
    assert alignment.similarity_after > alignment.similarity_before
    assert 1 <= alignment.sweeps < 100


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_networks_stay_as_they_are(name):
    weights = NETWORKS[name](0)
    alignment = match(weights, weights, symmetry_of(weights))
    assert all((order == np.arange(len(order))).all() for order in alignment.permutations.values())
    assert alignment.similarity_before == alignment.similarity_after == pytest.approx(1)


def test_a_network_with_equal_channels_and_dead_channels_stays_as_it_is():
    weights = mlp_weights()
    weights["0.weight"][3:9] = weights["0.weight"][2].clone()
    weights["0.bias"][3:9] = weights["0.bias"][2].clone()
    weights["2.weight"][:, 3:9] = 0
    weights["2.weight"][:, 2] = 0
    alignment = match(weights, weights, symmetry_of(weights))
    assert all((order == np.arange(len(order))).all() for order in alignment.permutations.values())


def test_the_function_stays_the_same():
    network, images = mlp(1), torch.randn(7, 12)
    weights = weights_of(network)
    symmetry = symmetry_of(weights)
    alignment = match(mlp_weights(0), weights, symmetry)
    aligned = permute(weights, symmetry, alignment.permutations)
    assert not torch.equal(aligned["0.weight"], weights["0.weight"])
    torch.testing.assert_close(functional_call(network, aligned, images), network(images))


@pytest.mark.parametrize("name", ["wide", "resnet18"])
def test_similarity_never_decreases_from_sweep_to_sweep(name):
    weights, other = NETWORKS[name](0), NETWORKS[name](1)
    symmetry = symmetry_of(weights)
    steps = [match(weights, other, symmetry, max_sweeps=most) for most in range(1, 6)]
    after = [steps[0].similarity_before, *(step.similarity_after for step in steps)]
    assert all(late >= early - 1e-9 for early, late in pairwise(after))
    assert [step.sweeps for step in steps][:2] == [1, 2]


def test_the_start_of_a_close_network_is_kept():
    weights = resnet()
    generator = torch.Generator().manual_seed(1)
    close = {
        key: value + 0.02 * torch.randn(value.shape, generator=generator) if value.dim() else value
        for key, value in weights.items()
    }
    alignment = match(weights, close, symmetry_of(weights))
    assert all((order == np.arange(len(order))).all() for order in alignment.permutations.values())


def test_the_seed_alone_decides():
    weights, other = resnet(0), resnet(1)
    symmetry = symmetry_of(weights)
    matcher = Matcher(weights, symmetry)
    first, again, third = (matcher.match(other, seed=seed) for seed in (4, 4, 5))
    with threadpool_limits(2):
        alone = match(weights, other, symmetry, seed=4)
    for found in (again, alone):
        assert all(np.array_equal(found.permutations[name], order) for name, order in first.permutations.items())
    assert any(not np.array_equal(third.permutations[name], order) for name, order in first.permutations.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_point_type_is_aligned(dtype):
    weights = mlp_weights()
    symmetry = symmetry_of(weights)
    other, planted = scrambled(weights, symmetry, 0.1)
    alignment = match(
        {key: value.to(dtype) for key, value in weights.items()},
        {key: value.to(dtype) for key, value in other.items()},
        symmetry,
    )
    assert all(np.array_equal(alignment.permutations[name], order) for name, order in planted.items())


def test_running_statistics_count_unless_only_weights_shall():
    weights = resnet()
    symmetry = symmetry_of(weights)
    other, planted = scrambled(weights, symmetry)
    for key in other:
        if key.endswith("running_var"):
            other[key] = 1e3 * other[key].flip(0)
    by_weights = match(weights, other, symmetry, cost="weights")
    assert all(np.array_equal(by_weights.permutations[name], order) for name, order in planted.items())
    by_all = match(weights, other, symmetry)
    assert any(not np.array_equal(by_all.permutations[name], order) for name, order in planted.items())


def test_segments_blocks_and_fixed_entries_are_aligned():
    """Packed projections of heads, a concatenation with fixed entries, and blocks of an axis."""
    symmetry = Symmetry(
        {
            "qkv": (("heads", "heads", "heads"), "stream"),
            "out": ("stream", "heads"),
            "embed": (None, "stream"),
            "cat": (None, ("stream", 4, "heads")),
        },
        {"heads": 6, "stream": 10},
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv": (54, 10), "out": (10, 18), "embed": (7, 10), "cat": (3, 20)}
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    other, planted = scrambled(weights, symmetry, 0.2, seed=2)
    alignment = match(weights, other, symmetry)
    assert all(np.array_equal(alignment.permutations[name], order) for name, order in planted.items())
    unrelated = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    alignment = match(weights, unrelated, symmetry)
    assert best_single_gain(weights, unrelated, symmetry, alignment.permutations) < 1e-6
    aligned = permute(unrelated, symmetry, alignment.permutations)
    assert alignment.similarity_after == pytest.approx(similarity(weights, aligned, symmetry), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_permutation_on_two_axes_of_a_tensor_only_moves_uphill(seed):
    """A recurrent layer: the profit is quadratic, an assignment only a guess at a better permutation."""
    symmetry = Symmetry({"in": ("h", None), "hidden": (("h", "h"), "h"), "out": (None, "h")}, {"h": 12})
    generator = torch.Generator().manual_seed(seed)

    def draw():
        shapes = {"in": (12, 5), "hidden": (24, 12), "out": (4, 12)}
        return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}

    weights, unrelated = draw(), draw()
    other, planted = scrambled(weights, symmetry, 0.1, seed)
    assert np.array_equal(match(weights, other, symmetry).permutations["h"], planted["h"])
    alignment = match(weights, unrelated, symmetry)
    aligned = permute(unrelated, symmetry, alignment.permutations)
    assert alignment.similarity_after == pytest.approx(similarity(weights, aligned, symmetry), abs=1e-6)
    assert alignment.similarity_after > alignment.similarity_before


def test_hidden_layers_without_fixed_neighbours_or_biases_are_aligned():
    network = mlp(0, (12, 40, 30, 20, 5), bias=False)
    weights, symmetry = weights_of(network), trace_symmetry(network, torch.randn(2, 12))
    assert len(symmetry.sizes) == 3
    other, planted = scrambled(weights, symmetry, 0.1)
    for seed in range(4):
        alignment = match(weights, other, symmetry, seed=seed)
        assert all(np.array_equal(alignment.permutations[name], order) for name, order in planted.items())


def test_without_symmetry_or_use_for_a_permutation_nothing_moves():
    weights = mlp_weights()
    alignment = match(weights, mlp_weights(1), Symmetry({}, {}))
    assert alignment.permutations == {}
    assert alignment.similarity_before == alignment.similarity_after == 0
    spare = match(weights, mlp_weights(1), Symmetry({"0.bias": ("a",)}, {"a": 40, "b": 3}))
    np.testing.assert_array_equal(spare.permutations["b"], np.arange(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("2.weight"), "2.weight is missing"),
        (lambda weights: weights.update({"2.weight": torch.zeros(3, 4)}), r"2.weight has the shape \(3, 4\)"),
        (lambda weights: weights.update({"2.weight": torch.zeros(4)}), r"2.weight has the shape \(4,\)"),
        (lambda weights: weights["2.weight"].fill_(float("nan")), "2.weight of the network to align .* not finite"),
        (lambda weights: weights["2.bias"].fill_(float("inf")), "2.bias of the network to align .* not finite"),
    ],
)
def test_networks_that_cannot_be_aligned_are_refused(change, message):
    weights, other = mlp_weights(0), mlp_weights(1)
    change(other)
    with pytest.raises(InputError, match=message):
        match(weights, other, symmetry_of(weights))


def test_a_reference_that_is_not_finite_and_no_sweep_are_refused():
    weights = mlp_weights()
    symmetry = symmetry_of(weights)
    with pytest.raises(InputError, match="max_sweeps is 0"):
        match(weights, weights, symmetry, max_sweeps=0)
    broken = {**weights, "0.bias": torch.full((40,), float("nan"))}
    with pytest.raises(InputError, match=r"0\.bias of the reference"):
        match(broken, weights, symmetry)
