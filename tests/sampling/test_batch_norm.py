import copy

import pytest
import torch
from torch import nn

from sane_ray.errors import InputError
from sane_ray.sampling.batch_norm import condition


def images(count, channels=3, seed=0):
    return 2 + 3 * torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    for index, norm in enumerate(each for each in net if hasattr(each, "running_mean")):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 9)
        norm.num_batches_tracked.fill_(7 + index)
    net[2].eval()
    return net


def state(network):
    """Everything that must be as before: all tensors, all flags, all momenta."""
    modules = dict(network.named_modules())
    flags = {name: (module.training, getattr(module, "momentum", None)) for name, module in modules.items()}
    return {key: value.clone() for key, value in network.state_dict().items()}, flags


def assert_same(after, before, ignoring=()):
    assert after[1] == before[1]
    for key, value in before[0].items():
        assert torch.equal(after[0][key], value) or key.rpartition(".")[2] in ignoring, key


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def test_one_batch_gives_the_exact_statistics_of_the_population(network):
    population = images(64)
    assert condition(network, [population]) == 3
    network.eval()
    x = population.double()
    for module in copy.deepcopy(network).double():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            axes = [axis for axis in range(x.ndim) if axis != 1]
            torch.testing.assert_close(module.running_mean, x.mean(axes), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(module.running_var, x.var(axes), rtol=1e-5, atol=1e-5)
            module.train()  # the next layer sees this batch normalised by itself
        x = module(x)


def test_batches_of_one_size_are_averaged(network):
    batches = images(96).split(16)
    condition(network, batches)
    first = torch.cat([network[0](batch) for batch in batches])
    by_batch = torch.stack([network[0](batch).var((0, 2, 3)) for batch in batches])
    torch.testing.assert_close(network[1].running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(network[1].running_var, by_batch.mean(0))
    assert network[1].num_batches_tracked == 6


def test_the_order_of_batches_and_what_was_there_before_do_not_matter(network):
    other, batches = copy.deepcopy(network), images(96).split(16)
    other[1].running_mean.fill_(1e6)
    condition(network, batches)
    condition(other, batches[::-1])
    for key, value in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)


def test_a_conditioned_network_answers_as_it_does_in_training(network):
    batch = images(64)
    condition(network, [batch])
    expected = copy.deepcopy(network).eval()
    for module in expected:
        module.train(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d))
    torch.testing.assert_close(network.eval()(batch), expected(batch), rtol=0.02, atol=0.02)


def test_the_published_variant_is_a_plain_loop(network):
    plain, batches = copy.deepcopy(network), images(60).split(12)
    for module in plain.modules():
        module.train(not isinstance(module, nn.Dropout))
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 0.1
    plain[3].eval()
    with torch.no_grad():
        for batch in batches:
            plain(batch)
    condition(network, batches, reset=False, momentum=0.1)
    for key, value in plain.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


def test_nothing_changes_but_statistics(network):
    before, generator_state = state(network), torch.random.get_rng_state()
    condition(network, iter(images(32).split(8)))
    assert_same(state(network), before, ignoring=STATISTICS)
    assert torch.equal(torch.random.get_rng_state(), generator_state)  # dropout would have drawn
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_without_batch_norm_nothing_is_read():
    def unread():
        raise AssertionError
        yield

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    before = state(network)
    assert condition(network, unread()) == 0
    assert_same(state(network), before)


def poisoned(value):
    batch = images(8)
    batch[3, 1, 2, 2] = value
    return batch


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no batch of images"),
        ([images(8), images(8, channels=1)], r"batch 2, torch.float32 of shape \[8, 1, 8, 8\].*channels"),
        ([images(8)[:, :, :7]], "batch 1, .*does not go through the network"),
        ([images(1)], "batch 1, .*more than 1 value per channel"),
        ([images(8).to(torch.uint8)], "batch 1, torch.uint8"),
        ([(images(8), torch.zeros(8))], "batch 1 is a tuple"),
        ([images(8), poisoned(float("nan"))], "batch 2 has pixels that are not finite"),
        ([images(8) * 1e30], "batch norm '1' has statistics that are not finite after batch 1"),
    ],
)
def test_an_error_leaves_everything_as_it_was(network, batches, words):
    before = state(network)
    with pytest.raises(InputError, match=words):
        condition(network, batches)
    assert_same(state(network), before)


def test_weights_that_overflow_behind_the_last_norm_are_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        network[3].weight.fill_(float("inf"))
    with pytest.raises(InputError, match="answers to batch 1 are not finite"):
        condition(network, [images(8)])


def test_any_other_error_leaves_everything_as_it_was_too(network):
    def broken():
        yield images(8)
        raise KeyboardInterrupt

    before = state(network)
    with pytest.raises(KeyboardInterrupt):
        condition(network, broken())
    assert_same(state(network), before)


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5])
def test_momentum_must_be_a_weight(network, momentum):
    with pytest.raises(InputError, match="momentum is"):
        condition(network, [images(8)], momentum=momentum)
