"""The stack against plain PyTorch: one network, ``torch.optim``, a loop that anyone can read."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from sane_ray.errors import InputError
from sane_ray.zoo.architectures import from_params, generator
from sane_ray.zoo.images import ImageData, load_images
from sane_ray.zoo.stacked import _Drop, stack_key, train_stack

BASE = {
    "model::type": "digits_cnn",
    "model::channels_in": 1,
    "model::o_dim": 10,
    "model::nlin": "tanh",
    "model::dropout": 0.0,
    "model::init_type": "kaiming_uniform",
    "optim::optimizer": "adam",
    "optim::lr": 1e-3,
    "optim::wd": 1e-3,
    "training::batchsize": 32,
    "seed": 1,
}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_images("digits", seed=0)


def random_images(folder, channels, size):
    rng = np.random.default_rng(0)
    np.savez(folder / "random.npz", images=rng.normal(size=(60, channels, size, size)), labels=np.arange(60) % 10)
    return load_images(str(folder / "random.npz"), seed=0)


def train_plainly(params, images, epochs, weights=None):
    """A state dict and accuracies and losses by split, after each epoch from 0."""
    net = from_params(params)
    net.load_state_dict(weights or net.state_dict())
    rate, decay = params["optim::lr"], params["optim::wd"]
    if params["optim::optimizer"] == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    order = generator(params, "order")
    pixels, labels = (torch.tensor(values) for values in images.split("train"))
    history = []
    for epoch in range(epochs + 1):
        if epoch > 0:
            net.train()
            for rows in torch.randperm(len(labels), generator=order).split(params["training::batchsize"]):
                optimizer.zero_grad()
                functional.cross_entropy(net(pixels[rows]), labels[rows]).backward()
                optimizer.step()
        net.eval()
        metrics = {}
        for split in ("train", "val", "test"):
            inputs, targets = (torch.tensor(values) for values in images.split(split))
            with torch.no_grad():
                logits = net(inputs)
            metrics[f"{split}_loss"] = functional.cross_entropy(logits, targets).item()
            metrics[f"{split}_acc"] = (logits.argmax(1) == targets).float().mean().item()
        history.append(({key: value.clone() for key, value in net.state_dict().items()}, metrics))
    return history


def assert_equal_histories(trained, plain, tolerance):
    for epoch, (state, metrics) in enumerate(plain):
        for key, value in state.items():
            torch.testing.assert_close(trained.checkpoints[epoch][key], value, atol=tolerance, rtol=tolerance)
        assert trained.results[epoch] == pytest.approx(metrics, abs=10 * tolerance)


@pytest.mark.parametrize("nlin", ["relu", "leakyrelu", "tanh", "sigmoid", "silu", "gelu"])
def test_stack_equals_a_plain_loop(digits, nlin):
    models = [
        {**BASE, "model::nlin": nlin, "optim::optimizer": "adam", "seed": 1},
        {**BASE, "model::nlin": nlin, "optim::optimizer": "sgd", "optim::lr": 1e-2, "optim::wd": 0.0, "seed": 2},
        {**BASE, "model::nlin": nlin, "optim::optimizer": "adam", "optim::lr": 3e-4, "seed": 3},
    ]
    trained = train_stack(models, digits, [0, 1, 2])
    for params, history in zip(models, trained, strict=True):
        assert_equal_histories(history, train_plainly(params, digits, 2), 2e-5)


@pytest.mark.parametrize(("kind", "channels", "size"), [("CNN", 1, 28), ("CNN3", 3, 32)])
def test_published_architectures_equal_a_plain_loop(tmp_path, kind, channels, size):
    images = random_images(tmp_path, channels, size)
    params = {**BASE, "model::type": kind, "model::channels_in": channels, "training::batchsize": 10}
    models = [{**params, "seed": seed, "optim::optimizer": name} for seed, name in ((1, "sgd"), (2, "adam"))]
    for model, history in zip(models, train_stack(models, images, [0, 1, 2]), strict=True):
        assert_equal_histories(history, train_plainly(model, images, 2), 2e-5)


@pytest.mark.parametrize("kind", ["digits_cnn_wide", "digits_cnn_deep"])
def test_wide_and_deep_networks_equal_a_plain_loop(digits, kind):
    params = {**BASE, "model::type": kind}
    (history,) = train_stack([params], digits, [0, 1])
    assert_equal_histories(history, train_plainly(params, digits, 1), 2e-5)


@pytest.mark.parametrize("batch_size", [32, 10])
@pytest.mark.parametrize("nlin", ["tanh", "gelu"])
def test_a_network_does_not_depend_on_its_neighbours_to_the_bit(digits, nlin, batch_size):
    models = [
        {
            **BASE,
            "model::nlin": nlin,
            "model::dropout": (0.0, 0.1, 0.3)[index % 3],
            "optim::optimizer": ("adam", "sgd")[index // 2 % 2],
            "training::batchsize": batch_size,
            "seed": index,
        }
        for index in range(7)
    ]
    together = train_stack(models, digits, [0, 1])
    for group in ([3], [6, 1], [5, 4, 0]):
        for index, alone in zip(group, train_stack([models[index] for index in group], digits, [0, 1]), strict=True):
            assert alone.results == together[index].results
            for epoch, state in alone.checkpoints.items():
                for key, value in state.items():
                    assert torch.equal(value, together[index].checkpoints[epoch][key])


@pytest.mark.parametrize(("kind", "channels", "size"), [("CNN", 1, 28), ("CNN3", 3, 32)])
def test_published_architectures_do_not_depend_on_neighbours_either(tmp_path, kind, channels, size):
    images = random_images(tmp_path, channels, size)
    models = [{**BASE, "model::type": kind, "model::channels_in": channels, "seed": seed} for seed in range(4)]
    together = train_stack(models, images, [2])
    (alone,) = train_stack(models[2:3], images, [2])
    for key, value in alone.checkpoints[2].items():
        assert torch.equal(value, together[2].checkpoints[2][key])


def test_epoch_0_is_the_initialisation(digits):
    (history,) = train_stack([BASE], digits, [0])
    for key, value in from_params(BASE).state_dict().items():
        assert torch.equal(value, history.checkpoints[0][key])
    assert len(history.results) == 1


def test_what_is_recorded_does_not_change_the_training(digits):
    (often,) = train_stack([BASE], digits, [0, 1, 2])
    (once,) = train_stack([BASE], digits, [2])
    assert list(once.checkpoints) == [2]
    assert once.results == often.results
    assert torch.equal(once.checkpoints[2]["module_list.0.weight"], often.checkpoints[2]["module_list.0.weight"])


def test_dropout_zeroes_at_each_networks_rate_and_keeps_the_mean():
    drop = _Drop([{**BASE, "model::dropout": rate, "seed": seed} for seed, rate in ((0, 0.0), (1, 0.3), (2, 0.3))])
    x = torch.ones(3, 100, 320)
    y = drop(x)
    assert torch.equal(y[0], x[0])
    assert y[1].unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (y[1] == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert not torch.equal(y[1], y[2])


def test_dropout_changes_the_training_and_not_the_measuring(digits):
    none, some = train_stack([BASE, {**BASE, "model::dropout": 0.3}], digits, [0, 1])
    assert none.results[0] == some.results[0]
    assert none.results[1] != some.results[1]


def test_networks_of_different_operations_are_not_stacked(digits):
    other = {**BASE, "model::nlin": "relu"}
    assert stack_key(BASE) != stack_key(other)
    with pytest.raises(ValueError, match="stack_key"):
        train_stack([BASE, other], digits, [1])


# --- from given weights


def given_weights(*seeds):
    """Those of networks of other seeds than the params."""
    return [from_params({**BASE, "seed": seed}).state_dict() for seed in seeds]


def assert_same(first, second):
    assert first.results == second.results
    for epoch, state in first.checkpoints.items():
        for key, value in state.items():
            assert torch.equal(value, second.checkpoints[epoch][key])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_given_weights_are_trained_as_a_plain_loop_does(digits, name):
    models = [{**BASE, "optim::optimizer": name, "seed": seed} for seed in (1, 2)]
    weights = given_weights(11, 12)
    for params, state, history in zip(
        models, weights, train_stack(models, digits, [0, 1, 2], weights=weights), strict=True
    ):
        assert_equal_histories(history, train_plainly(params, digits, 2, state), 2e-5)


def test_from_its_initial_weights_a_network_becomes_itself_to_the_bit(digits):
    models = [{**BASE, "model::dropout": 0.2, "seed": seed} for seed in (1, 2, 3)]
    weights = [from_params(params).state_dict() for params in models]
    for own, given in zip(
        train_stack(models, digits, [0, 2]), train_stack(models, digits, [0, 2], weights=weights), strict=True
    ):
        assert_same(own, given)


def test_neighbours_and_the_order_of_keys_do_not_matter(digits):
    models = [{**BASE, "model::dropout": 0.1, "seed": seed} for seed in range(5)]
    weights = given_weights(11, 12, 13, 14, 15)
    together = train_stack(models, digits, [1], weights=weights)
    turned = [dict(sorted(state.items(), reverse=True)) for state in weights]
    for group in ([3], [4, 0]):
        some = train_stack([models[i] for i in group], digits, [1], weights=[turned[i] for i in group])
        for index, alone in zip(group, some, strict=True):
            assert_same(alone, together[index])


def test_a_network_that_is_nan_spoils_no_other(digits):
    weights = given_weights(11, 12, 13)
    sound = train_stack([BASE] * 2, digits, [0, 1], weights=weights[::2])
    weights[1]["module_list.0.bias"][0] = float("nan")
    first, broken, last = train_stack([BASE] * 3, digits, [0, 1], weights=weights)
    assert_same(first, sound[0])
    assert_same(last, sound[1])
    assert np.isnan(broken.results[1]["train_loss"])


def test_given_weights_are_not_written_to(digits):
    (state,) = given_weights(11)
    before = {key: value.clone() for key, value in state.items()}
    train_stack([BASE], digits, [1], weights=[state])
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_logits_are_kept_where_asked_for_and_give_the_accuracies(digits):
    labels = digits.split("test")[1]
    for history in train_stack([BASE, {**BASE, "seed": 2}], digits, [0, 2], keep_logits=True):
        assert list(history.logits) == [0, 2]
        for epoch, logits in history.logits.items():
            assert logits.dtype == np.float32 and logits.shape == (len(labels), 10)
            assert (logits.argmax(1) == labels).mean() == pytest.approx(history.results[epoch]["test_acc"])
            loss = functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
            assert loss == pytest.approx(history.results[epoch]["test_loss"], abs=1e-5)
    assert train_stack([BASE], digits, [0])[0].logits == {}


def test_weights_that_do_not_fit_are_refused(digits):
    (state,) = given_weights(11)
    with pytest.raises(ValueError, match="1 networks' weights were given for 2"):
        train_stack([BASE] * 2, digits, [0], weights=[state])
    state["module_list.3.weight"] = state["module_list.3.weight"][:1]
    with pytest.raises(InputError, match=r"module_list\.3\.weight is 10x8x3x3, theirs is 1x8x3x3"):
        train_stack([BASE], digits, [0], weights=[state])
    del state["module_list.3.weight"]
    with pytest.raises(InputError, match=r"module_list\.3\.weight is 10x8x3x3, theirs is none"):
        train_stack([BASE], digits, [0], weights=[state])
