"""Fitting weights to other networks; every preserved function is that of a network trained on real digits."""

import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from sane_ray.errors import InputError
from sane_ray.sampling.batch_norm import condition
from sane_ray.sampling.targets import Target
from sane_ray.zoo.architectures import ARCHITECTURES, BIAS, from_params, parameter_shapes
from sane_ray.zoo.images import load_images
from sane_ray.zoo.stacked import train_stack

PARAMS = {
    "model::type": "digits_cnn", "model::channels_in": 1, "model::o_dim": 10, "model::nlin": "relu",
    "model::dropout": 0.0, "model::init_type": "kaiming_uniform", "optim::optimizer": "adam", "optim::lr": 3e-3,
    "optim::wd": 0.0, "training::batchsize": 32, "seed": 1,
}  # fmt: skip
ACTIVATIONS = ("relu", "tanh", "gelu")


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", seed=0)


@pytest.fixture(scope="module")
def images(digits):
    return torch.tensor(digits.split("test")[0])


@pytest.fixture(scope="module")
def trained(digits):
    """Two networks of each activation function, [R, *shape]."""

    def train(nlin):
        models = [{**PARAMS, "model::nlin": nlin, "seed": seed} for seed in (1, 2)]
        return stack([each.checkpoints[3] for each in train_stack(models, digits, [3])])

    return {nlin: train(nlin) for nlin in ACTIVATIONS}


def stack(states):
    return {key: torch.stack([state[key] for state in states]) for key in states[0]}


def shapes_of(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def digits_shapes(kind="digits_cnn", classes=10):
    return parameter_shapes(ARCHITECTURES[kind], (1, 8, 8), classes)


def answers(weights, images, kind="digits_cnn", nlin="relu", classes=10):
    """Logits [R, N, classes]."""
    net = from_params({**PARAMS, "model::type": kind, "model::nlin": nlin, "model::o_dim": classes}).eval()
    rows = [{key: value[index] for key, value in weights.items()} for index in range(len(weights[next(iter(weights))]))]
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(net, row, images) for row in rows])


def assert_same_function(found, expected):
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("nlin", ACTIVATIONS)
def test_a_wider_network_answers_the_same(trained, images, nlin):
    weights = trained[nlin]
    target = Target(digits_shapes(), digits_shapes("digits_cnn_wide"))
    assert target.copies == 2
    fitted = target.apply(weights, 0)
    assert list(fitted) == list(digits_shapes("digits_cnn_wide"))
    expected = answers(weights, images, nlin=nlin)
    assert_same_function(answers(fitted, images, "digits_cnn_wide", nlin), expected)
    equal = {key: value[:, None].repeat(1, 2, *[1] * (value.ndim - 1)) for key, value in weights.items()}
    for key, value in target.apply(equal, 0).items():
        torch.testing.assert_close(value, fitted[key])


def widened(*channels):
    """Shapes of a digits_cnn with other channels: two convolutions and the hidden features."""
    first, second, features = channels
    shapes = [(first, 1, 3, 3), (second, first, 3, 3), (features, 4 * second), (10, features)]
    return {
        key: shape
        for index, weight in zip((0, 3, 6, 8), shapes, strict=True)
        for key, shape in ((f"module_list.{index}.weight", weight), (f"module_list.{index}.bias", weight[:1]))
    }


def loaded(weights, index=0):
    """A network of any width with one of the weights."""
    state = {key.removeprefix("module_list."): value[index] for key, value in weights.items()}
    (first, *_), (second, *_), features, head = (state[f"{place}.weight"].shape for place in (0, 3, 6, 8))
    net = nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(first, second, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(*features[::-1]), nn.ReLU(), nn.Linear(*head[::-1]),
    )  # fmt: skip
    net.load_state_dict(state)
    return net.requires_grad_(False)


@pytest.mark.parametrize("channels", [(11, 10, 24), (8, 13, 24), (8, 10, 37), (21, 25, 50), (9, 30, 25)])
def test_any_width_will_do(trained, images, channels):
    weights = trained["relu"]
    fitted = Target(digits_shapes(), widened(*channels)).apply(weights, 0)
    assert shapes_of({key: value[0] for key, value in fitted.items()}) == widened(*channels)
    expected = answers(weights, images)
    for index in (0, 1):
        assert_same_function(loaded(fitted, index)(images), expected[index])


def test_draws_make_copies_of_a_channel_differ(trained):
    weights = trained["relu"]
    draws = {key: value[None] for key, value in weights.items()}  # one network, whose draws are both of these
    fitted = Target(digits_shapes(), digits_shapes("digits_cnn_wide")).apply(draws, 0)
    first, second = (weights["module_list.3.weight"][index] for index in (0, 1))
    wide = fitted["module_list.3.weight"][0]
    for rows, draw in ((wide[:10], first), (wide[10:], second)):
        assert torch.equal(rows, torch.cat([draw, draw], 1) / 2)
    assert torch.equal(fitted["module_list.3.bias"][0], weights["module_list.3.bias"].flatten())
    head = weights["module_list.8.weight"]
    assert torch.equal(fitted["module_list.8.weight"][0], torch.cat([head[0], head[1]], 1) / 2)
    assert torch.equal(fitted["module_list.8.bias"][0], weights["module_list.8.bias"].mean(0))


def test_flattened_maps_follow_their_channels(trained):
    weights = trained["relu"]
    fitted = Target(digits_shapes(), widened(8, 13, 24)).apply(weights, 0)
    blocks = fitted["module_list.6.weight"].unflatten(2, (13, 4))
    source = weights["module_list.6.weight"].unflatten(2, (10, 4))
    for channel in range(13):
        times = 2 if channel % 10 < 3 else 1
        assert torch.equal(blocks[:, :, channel], source[:, :, channel % 10] / times)


def test_a_deeper_network_answers_the_same_behind_relu(trained, images):
    target = Target(digits_shapes(), digits_shapes("digits_cnn_deep"))
    assert target.copies == 1
    fitted = target.apply(trained["relu"], 0)
    assert list(fitted) == list(digits_shapes("digits_cnn_deep"))
    assert_same_function(answers(fitted, images, "digits_cnn_deep"), answers(trained["relu"], images))


def test_a_deeper_network_is_nearly_as_good_behind_gelu(trained, images, digits):
    labels = torch.tensor(digits.split("test")[1])
    fitted = Target(digits_shapes(), digits_shapes("digits_cnn_deep")).apply(trained["gelu"], 0)
    logits = answers(fitted, images, "digits_cnn_deep", "gelu")
    assert (logits.argmax(-1) == labels).float().mean() > 0.5


def test_wider_and_deeper_at_once(trained, images):
    wide = digits_shapes("digits_cnn_deep") | {
        "module_list.3.weight": (20, 8, 3, 3), "module_list.3.bias": (20,),
        "module_list.5.weight": (20, 20, 3, 3), "module_list.5.bias": (20,), "module_list.8.weight": (24, 80),
    }  # fmt: skip
    fitted = Target(digits_shapes(), wide).apply(trained["relu"], 0)
    net = from_params({**PARAMS, "model::type": "digits_cnn_deep"}).eval()
    for place, key in ((3, "module_list.3"), (5, "module_list.5"), (8, "module_list.8")):
        out, channels = wide[f"{key}.weight"][:2]
        conv = nn.Conv2d(channels, out, 3, padding=int(place == 5))
        net.module_list[place] = nn.Linear(channels, out) if place == 8 else conv
    net.load_state_dict({key: value[1] for key, value in fitted.items()})
    with torch.no_grad():
        assert_same_function(net(images), answers(trained["relu"], images)[1])


@pytest.mark.parametrize("kind", ["digits_cnn", "digits_cnn_wide", "digits_cnn_deep"])
def test_other_classes_get_a_new_head(trained, kind):
    target = Target(digits_shapes(), digits_shapes(kind, 7), initialization="kaiming_uniform")
    head, before = list(digits_shapes(kind))[-2:], list(digits_shapes(kind))[:-2]
    first, again, other = (target.apply(trained["relu"], seed) for seed in (0, 0, 1))
    plain = Target(digits_shapes(), digits_shapes(kind)).apply(trained["relu"], 0)
    assert all(torch.equal(first[key], plain[key]) and torch.equal(first[key], other[key]) for key in before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    weight, bias = (first[key] for key in head)
    assert weight.shape[:2] == (2, 7) and torch.equal(bias, torch.full((2, 7), BIAS))
    assert not torch.equal(weight, other[head[0]]) and not torch.equal(weight[0], weight[1])
    assert weight.abs().max() <= (6 / weight.shape[2]) ** 0.5
    alone = {key: value[:1] for key, value in trained["relu"].items()}
    assert torch.equal(target.apply(alone, 0)[head[0]][0], weight[0])


def test_the_target_shares_no_memory_and_keeps_the_dtype(trained):
    weights = {key: value.double() for key, value in trained["relu"].items()}
    before = {key: value.clone() for key, value in weights.items()}
    for shapes in (digits_shapes(), digits_shapes("digits_cnn_wide", 3), digits_shapes("digits_cnn_deep")):
        for value in Target(digits_shapes(), shapes).apply(weights, 0).values():
            assert value.dtype == torch.float64
            value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in weights.items())


class Residual(nn.Module):
    """A residual network with batch norms, whose widths are free."""

    def __init__(self, stream=4, inner=3, last=6, classes=5):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, stream, 3, padding=1, bias=False), nn.BatchNorm2d(stream)
        self.conv2, self.bn2 = nn.Conv2d(stream, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, last, 3, padding=1, bias=False), nn.BatchNorm2d(last)
        self.shortcut, self.bn4 = nn.Conv2d(stream, last, 1, bias=False), nn.BatchNorm2d(last)
        self.fc = nn.Linear(last, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(x)).relu()
        x = (self.bn3(self.conv3(y)) + self.bn4(self.shortcut(x))).relu()
        return self.fc(x.mean((2, 3)))


def with_statistics(net, images):
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    condition(net, images.split(90))
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("counted", [True, False])
def test_residual_networks_with_batch_norm_become_wider(images, counted):
    source = with_statistics(Residual(), images)
    weights = {key: value[None] for key, value in source.state_dict().items()}
    shapes = shapes_of(source.state_dict())
    if not counted:
        weights, shapes = ({k: v for k, v in each.items() if "num_batches" not in k} for each in (weights, shapes))
    wide = Residual(stream=9, inner=7, last=12).eval()
    fitted = Target(shapes, shapes_of(wide.state_dict())).apply(weights, 0)
    wide.load_state_dict({key: value[0] for key, value in fitted.items()})
    expected = source(images)
    assert (wide(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert wide.bn2.num_batches_tracked == (3 if counted else 0)


def chain_with_norms(convolutions, channels=4):
    layers = [nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
    for _ in range(convolutions - 1):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36 * channels, 5))


def test_a_deeper_chain_with_batch_norm_is_almost_the_same(images):
    source, deep = with_statistics(chain_with_norms(2), images), chain_with_norms(4).eval()
    target = Target(shapes_of(source.state_dict()), shapes_of(deep.state_dict()))
    new = [line.split(":")[0] for line in target.describe() if "new" in line]
    assert len(new) == 2 and "0" not in new
    fitted = target.apply({key: value[None] for key, value in source.state_dict().items()}, 0)
    deep.load_state_dict({key: value[0] for key, value in fitted.items()})
    torch.testing.assert_close(deep(images), source(images), rtol=1e-3, atol=1e-3)  # norms have an epsilon


def random_chain(widths, kernels, norms, features):
    """A chain for images of 4x4, in double precision."""
    layers, before = [], 1
    for width, kernel in zip(widths, kernels, strict=True):
        norm = [nn.BatchNorm2d(width, eps=1e-12)] if norms else []
        layers += [nn.Conv2d(before, width, kernel, padding=kernel // 2), *norm, nn.ReLU()]
        before = width
    layers, before = [*layers, nn.Flatten()], before * 16
    for width in features:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    net = nn.Sequential(*layers[:-1]).double().eval().requires_grad_(False)
    for norm in (each for each in net if isinstance(each, nn.BatchNorm2d)):
        for value in (norm.weight, norm.running_var):
            nn.init.uniform_(value, 0.5, 2)
        for value in (norm.bias, norm.running_mean):
            nn.init.normal_(value)
    return net


@pytest.mark.parametrize("seed", range(30))
def test_random_chains_keep_their_function_wider_and_deeper(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    count = rng.randint(1, 4)
    widths, kernels = [rng.randint(1, 6) for _ in range(count)], [rng.choice([1, 3]) for _ in range(count)]
    features, norms = [rng.randint(2, 6) for _ in range(rng.randint(1, 3))], rng.random() < 0.5
    source = random_chain(widths, kernels, norms, features)
    widths = [width + rng.randint(0, 9) for width in widths]
    features = [width + rng.randint(0, 7) for width in features[:-1]] + features[-1:]
    for _ in range(rng.randint(0, 2)):
        place = rng.randrange(len(widths))
        widths.insert(place + 1, widths[place])
        kernels.insert(place + 1, rng.choice([1, 3]))
    deep = random_chain(widths, kernels, norms, features)
    target = Target(shapes_of(source.state_dict()), shapes_of(deep.state_dict()))
    fitted = target.apply({key: value[None] for key, value in source.state_dict().items()}, 0)
    deep.load_state_dict({key: value[0] for key, value in fitted.items()})
    images = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(deep(images), source(images), rtol=1e-9, atol=1e-9)


def test_describe_says_what_becomes_of_each_layer():
    assert Target(digits_shapes(), digits_shapes("digits_cnn_wide", 7)).describe() == [
        "module_list.0: 8 -> 16 channels, from module_list.0",
        "module_list.3: 10 -> 20 channels, 8 -> 16 inputs, from module_list.3",
        "module_list.6: 24 -> 48 channels, 40 -> 80 inputs, from module_list.6",
        "module_list.8: 10 -> 7 classes, initialised anew (uniform)",
    ]
    assert Target(digits_shapes(), digits_shapes("digits_cnn_deep")).describe() == [
        "module_list.0: 8 channels, from module_list.0",
        "module_list.3: 10 channels, from module_list.3",
        "module_list.5: 10 channels, new, starts as the identity",
        "module_list.8: 24 channels, from module_list.6",
        "module_list.10: 10 channels, from module_list.8",
    ]


CHAIN = {"0.weight": (4, 1, 3, 3), "2.weight": (6, 4, 3, 3), "4.weight": (5, 24)}
ATTENTION = {"e.in_proj_weight": (12, 4), "e.in_proj_bias": (12,), "fc.weight": (3, 4), "fc.bias": (3,)}
NORMED = {"0.weight": (4, 3), "1.weight": (4,), "1.bias": (4,), "2.weight": (2, 4)}


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        (CHAIN, {"2.weight": (6, 4, 5, 5)}, r"2.weight is 6x4x5x5 in the target, and 2.weight is 6x4x3x3 .*same size"),
        (CHAIN, {"2.weight": (5, 4, 3, 3), "4.weight": (5, 20)}, "2.weight is 5x4x3x3 .* narrower"),
        (CHAIN, {"0.weight": (4, 3, 3, 3)}, "0.weight is 4x3x3x3 .*images of as many channels"),
        (CHAIN, {"0.weight": (8, 1, 3, 3)}, "2.weight .*no layer before grows like its inputs"),
        (CHAIN, {"4.weight": (5, 54)}, "4.weight is 5x54 .*images|4.weight is 5x54 .*as many places"),
        (CHAIN, {"2.weight": (12, 4, 3, 3), "4.weight": (5, 72)}, "6 -> 12 channels, and as many places"),
        (CHAIN, {"2.weight": (6, 16)}, "2.weight is 6x16 .*only convolutions, linear layers"),
        (CHAIN, {"2.bias": (6,)}, "2.weight .*must have a bias and norms or both must not"),
        (CHAIN, {"5.weight": (7, 5), "2.weight": (3, 4, 3, 3)}, "source's 3 layers .* cannot be found in order"),
        (ATTENTION, {"e.in_proj_weight": (12, 8), "fc.weight": (3, 8)}, "e.in_proj_weight .*only convolutions"),
        (ATTENTION, {"g.weight": (4, 4), "g.bias": (4,)}, "e.in_proj_weight of the source, 12x4, is no layer"),
        (NORMED, {"0.weight": (8, 3), "1.weight": (8,), "1.bias": (8,), "2.weight": (2, 8)}, "of norms only batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(source, change, words):
    with pytest.raises(InputError, match=words):
        Target(source, source | change)


def test_shallower_targets_and_unknown_initialisations_are_refused():
    with pytest.raises(InputError, match="target has 4 layers and the source 5"):
        Target(digits_shapes("digits_cnn_deep"), digits_shapes())
    with pytest.raises(InputError, match="initialization is 'zeros'"):
        Target(digits_shapes(), digits_shapes(), initialization="zeros")
    with pytest.raises(InputError, match="source has no convolution or linear layer"):
        Target({"a.weight": (3,), "a.bias": (3,)}, digits_shapes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"module_list.3.bias": None}, "lack module_list.3.bias"),
        ({"module_list.3.bias": torch.zeros(2, 11)}, r"module_list.3.bias has shape \[2, 11\]: it must be"),
        ({"module_list.3.bias": torch.zeros(10)}, "module_list.3.bias has shape"),
        ({"module_list.5.bias": torch.zeros(2, 10)}, "have module_list.5.bias, which the source has not"),
        ({"module_list.3.bias": torch.zeros(2, 3, 10)}, r"\[R, 10\], or \[R, 2, 10\] with 2 draws"),
        (
            {"module_list.3.bias": torch.zeros(3, 10)},
            r"module_list.3.bias has 3 networks of 1 draws, and module_list.0.weight 2 of 1: give all",
        ),
    ],
)
def test_weights_of_another_network_are_refused(trained, change, words):
    weights = {key: value for key, value in (trained["relu"] | change).items() if value is not None}
    with pytest.raises(InputError, match=words):
        Target(digits_shapes(), digits_shapes("digits_cnn_wide")).apply(weights, 0)


def test_sampling_needs_no_ray():
    code = "import sys, sane_ray.sampling.targets, sane_ray.sampling.batch_norm; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
