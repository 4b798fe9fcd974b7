"""Stacks of any module against plain PyTorch: one network, ``torch.optim``, a loop that anyone can read."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from sane_ray.config import FanOutConfig
from sane_ray.errors import InputError
from sane_ray.finetuning import modules
from sane_ray.finetuning.evaluation import METRICS, Evaluation, Piece
from sane_ray.finetuning.measuring import Measuring
from sane_ray.finetuning.modules import BATCH_NORM, ModuleEvaluation
from sane_ray.sampling.batch_norm import condition_as, training_batches
from sane_ray.zoo.architectures import from_params, generator
from sane_ray.zoo.images import load_images
from sane_ray.zoo.user_network import UserNetwork

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))

ADAM = {
    "optim::optimizer": "adam",
    "optim::lr": 2e-3,
    "optim::wd": 1e-2,
    "optim::momentum": 0.9,
    "training::batchsize": 32,
}
ADAMW = ADAM | {"optim::optimizer": "adamw", "optim::wd": 0.1}
SGD = ADAM | {"optim::optimizer": "sgd", "optim::lr": 0.02, "optim::momentum": 0.8}


@pytest.fixture(scope="module")
def images():
    return load_images("digits", seed=0)


def networks_of(name, count):
    network = UserNetwork(f"user_networks:{name}", 10)
    return network, [network.state_dict(seed) for seed in range(count)]


def piece_of(states, recipe, seeds=None, **params):
    weights = {key: torch.stack([state[key] for state in states]).numpy() for key in states[0]}
    return Piece([recipe | {"seed": seed} | params for seed in seeds or range(len(states))], weights)


def plain_loop(network, state, recipe, seed, images, epochs):
    """Metrics by epoch, and the answers of the last."""
    net = network.build()
    net.load_state_dict(state)
    rate, decay = recipe["optim::lr"], recipe["optim::wd"]
    optimizer = {
        "adam": lambda: torch.optim.Adam(net.parameters(), lr=rate, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay),
        "sgd": lambda: torch.optim.SGD(
            net.parameters(), lr=rate, weight_decay=decay, momentum=recipe["optim::momentum"]
        ),
    }[recipe["optim::optimizer"]]()
    order, (x, y) = generator({"seed": seed}, "order"), map(torch.tensor, images.split("train"))
    metrics = []
    torch.manual_seed(generator({"seed": seed}, "dropout").initial_seed())
    for epoch in range(epochs + 1):
        net.train()
        for rows in torch.randperm(len(y), generator=order).split(recipe["training::batchsize"]) if epoch else ():
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        net.eval()
        row = {}
        for split in ("train", "val", "test"):
            inputs, labels = map(torch.tensor, images.split(split))
            with torch.no_grad():
                logits = net(inputs)
            row[f"{split}_loss"] = float(functional.cross_entropy(logits, labels))
            row[f"{split}_acc"] = float((logits.argmax(1) == labels).double().mean())
        metrics.append([row[name] for name in METRICS])
    return np.array(metrics), logits.numpy()


@pytest.mark.parametrize("recipe", [ADAM, ADAMW, SGD], ids=["adam", "adamw", "sgd"])
def test_networks_without_batch_norm_at_once_are_as_a_plain_loop(images, recipe):
    network, states = networks_of("plain", 3)
    evaluation = ModuleEvaluation(network, images, 1, [0, 1])
    assert evaluation.can_stack
    found = evaluation(piece_of(states, recipe, [5, 6, 7]))
    assert found.metrics_REM.shape == (3, 2, len(METRICS)) and found.logits_RTIC.shape[:2] == (3, 2)
    assert found.logits_RTIC.dtype == np.float16
    for index in range(3):
        metrics, logits = plain_loop(network, states[index], recipe, 5 + index, images, 1)
        np.testing.assert_allclose(found.metrics_REM[index], metrics, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(found.logits_RTIC[index, 1], logits, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(("name", "stacked"), [("residual", True), ("averaging", False), ("dropping", False)])
def test_batch_norm_and_dropout_are_as_a_plain_loop(images, name, stacked):
    network, states = networks_of(name, 2)
    evaluation = ModuleEvaluation(network, images, 1, [1])
    assert evaluation.can_stack is stacked
    found = evaluation(piece_of(states, SGD))
    for index in range(2):
        metrics, _ = plain_loop(network, states[index], SGD, index, images, 1)
        np.testing.assert_allclose(
            found.metrics_REM[index], metrics, atol=2e-3, rtol=2e-3
        )  # rounding grows in training
        np.testing.assert_allclose(found.metrics_REM[index, 0], metrics[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["residual", "dropping"])
def test_neighbours_change_nothing(images, name):
    network, states = networks_of(name, 3)
    together = ModuleEvaluation(network, images, 1, [1])(piece_of(states, ADAM))
    pair = ModuleEvaluation(network, images, 1, [1])(piece_of([states[2], states[1]], ADAM, [2, 1]))
    np.testing.assert_allclose(pair.metrics_REM, together.metrics_REM[[2, 1]], atol=1e-4, rtol=1e-3)
    alone = ModuleEvaluation(network, images, 1, [1])(piece_of(states[2:], ADAM, [2]))
    np.testing.assert_allclose(alone.metrics_REM[0], together.metrics_REM[2], atol=2e-3, rtol=2e-3)


def test_one_after_the_other_is_the_same_to_the_bit(images):
    network, states = networks_of("dropping", 2)
    evaluation = ModuleEvaluation(network, images, 1, [1])
    first, second = evaluation(piece_of(states, ADAM)), evaluation(piece_of(states[1:], ADAM, [1]))
    assert np.array_equal(first.metrics_REM[1:], second.metrics_REM)
    assert np.array_equal(first.logits_RTIC[1:], second.logits_RTIC)


def test_networks_of_our_own_are_trained_as_the_stack_of_our_own_does(images):
    params = ADAM | {
        "model::type": "digits_cnn", "model::channels_in": 1, "model::o_dim": 10, "model::nlin": "tanh",
        "model::dropout": 0.0, "model::init_type": "kaiming_uniform",
    }  # fmt: skip
    piece = piece_of([from_params(params | {"seed": seed}).state_dict() for seed in range(2)], params)
    ours = Evaluation(images, 1, [1])(piece)
    theirs = ModuleEvaluation(lambda: from_params(params | {"seed": 0}), images, 1, [1])(piece)
    np.testing.assert_allclose(ours.metrics_REM, theirs.metrics_REM, atol=1e-5, rtol=1e-5)


def test_networks_of_other_recipes_are_not_stacked(images):
    network, states = networks_of("plain", 2)
    piece = piece_of(states, ADAM)
    piece.params[1]["optim::lr"] = 0.0
    found = ModuleEvaluation(network, images, 1, [0])(piece)
    assert found.metrics_REM[1, 0, 0] == pytest.approx(found.metrics_REM[1, 1, 0])
    assert found.metrics_REM[0, 1, 0] < found.metrics_REM[0, 0, 0]


def test_without_weights_the_seed_initialises(images):
    network, _ = networks_of("plain", 1)
    found = ModuleEvaluation(network, images, 0, [])(Piece([{"seed": 4}, {"seed": 4}, {"seed": 5}], None))
    assert np.array_equal(found.metrics_REM[0], found.metrics_REM[1]) and found.logits_RTIC.shape[:2] == (3, 0)
    assert not np.array_equal(found.metrics_REM[0], found.metrics_REM[2])


@pytest.mark.parametrize("how", ["reset", "published"])
def test_params_ask_for_conditioning_before_anything_is_measured(images, how):
    network, states = networks_of("residual", 2)
    for state in states:
        state["norm.running_mean"] += 30
    by_hand = []
    for state in states:
        module = network.build()
        module.load_state_dict(state)
        assert condition_as(how, module, training_batches(images, how))
        by_hand.append(module.state_dict())
    evaluation = ModuleEvaluation(network, images, 0, [])
    found = evaluation(piece_of(states, {}, **{BATCH_NORM: how})).metrics_REM
    np.testing.assert_array_equal(found, evaluation(piece_of(by_hand, {})).metrics_REM)
    assert (found != evaluation(piece_of(states, {}, **{BATCH_NORM: "keep"})).metrics_REM).all(axis=-1).all()


def test_weights_of_another_network_are_refused(images):
    network, states = networks_of("plain", 1)
    del states[0]["0.bias"]
    with pytest.raises(InputError, match=r"weights do not fit the network: .*0\.bias"):
        ModuleEvaluation(network, images, 0, [])(piece_of(states, {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_told(images):
    with pytest.raises(InputError, match=r"fan_out\.gpus asks for GPUs"):
        ModuleEvaluation(UserNetwork("user_networks:plain", 10), images, 0, [], "cuda")


def test_without_memory_for_all_at_once_they_go_one_after_the_other(images, monkeypatch):
    network, states = networks_of("plain", 2)
    wanted = ModuleEvaluation(network, images, 1, [1])(piece_of(states, ADAM))
    evaluation = ModuleEvaluation(network, images, 1, [1])
    assert evaluation.can_stack
    losses = modules._Stacked.losses

    def out_of_memory(stack, *batch):
        losses(stack, *batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(modules._Stacked, "losses", out_of_memory)
    found = evaluation(piece_of(states, ADAM))
    np.testing.assert_allclose(found.metrics_REM, wanted.metrics_REM, atol=1e-5, rtol=1e-5)


def test_actors_are_told_of_the_network_and_their_gpu(images, tmp_path):
    network = UserNetwork("user_networks:plain", 10)
    for gpus, device in ((0.0, "cpu"), (0.25, "cuda")):
        work, arguments = Measuring(images, 1, [0], tmp_path, FanOutConfig(gpus=gpus), network=network)._work
        assert work is ModuleEvaluation and arguments == [network, images, 1, [0], device]
    assert Measuring(images, 1, [0], tmp_path, FanOutConfig())._work[0] is Evaluation


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_answers_at_once_as_on_a_gpu_are_those_of_each(images, name):
    network, _ = networks_of(name, 3)
    nets = [network.build(seed).eval() for seed in range(3)]
    stack, x = modules._Stacked(nets), torch.tensor(images.images_NCHW[:50])
    with torch.no_grad():
        at_once = torch.func.vmap(stack._call, in_dims=(0, 0, None))(stack.weights, stack.buffers, x)
        torch.testing.assert_close(at_once, torch.stack([net(x) for net in nets]), atol=1e-5, rtol=1e-5)
        assert torch.equal(stack.answers(x), torch.stack([net(x) for net in nets]))


def test_a_cpu_trains_only_small_networks_at_once(images, monkeypatch):
    network, states = networks_of("plain", 2)
    nets, params = [network.build(), network.build()], piece_of(states, ADAM).params
    assert ModuleEvaluation(network, images, 1, [])._at_once(nets, params)
    assert not ModuleEvaluation(network, images, 0, [])._at_once(nets, params), "nothing is trained"
    monkeypatch.setattr(modules, "SMALL", 1000)
    assert not ModuleEvaluation(network, images, 1, [])._at_once(nets, params)
