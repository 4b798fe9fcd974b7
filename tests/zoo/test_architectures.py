from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from sane_ray.config import ZooConfig
from sane_ray.errors import InputError
from sane_ray.zoo.architectures import (
    ACTIVATIONS,
    ARCHITECTURES,
    BIAS,
    INITIALIZATIONS,
    architecture_for,
    from_params,
    parameter_shapes,
)

PARAMS = {
    "model::type": "CNN",
    "model::channels_in": 1,
    "model::o_dim": 10,
    "model::nlin": "relu",
    "model::dropout": 0.2,
    "model::init_type": "kaiming_uniform",
    "seed": 5,
}


def test_cnn_s_is_the_published_one(parity):
    net = from_params(PARAMS)
    net.load_state_dict(load_file(parity / "cnn_a.safetensors"), strict=True)
    assert sum(value.numel() for value in net.parameters()) == 2464
    assert [key for key in net.state_dict() if key.endswith("weight")] == [
        f"module_list.{index}.weight" for index in (0, 3, 6, 9, 11)
    ]
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_cnn_l_is_the_published_one():
    net = from_params({**PARAMS, "model::type": "CNN3", "model::channels_in": 3})
    assert {key: tuple(value.shape) for key, value in net.state_dict().items() if "weight" in key} == {
        "module_list.0.weight": (16, 3, 3, 3),
        "module_list.4.weight": (32, 16, 3, 3),
        "module_list.8.weight": (15, 32, 3, 3),
        "module_list.13.weight": (20, 60),
        "module_list.16.weight": (10, 20),
    }
    assert sum(value.numel() for value in net.parameters()) == 10853
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_digits_cnn_is_small_in_every_way_that_tokens_count():
    net = from_params({**PARAMS, "model::type": "digits_cnn"})
    weights = [value for key, value in net.state_dict().items() if key.endswith("weight")]
    assert sum(value.numel() for value in net.parameters()) == 2044
    assert sum(len(weight) for weight in weights) == 52
    assert max(weight[0].numel() + 1 for weight in weights) == 73
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def weights_of(name):
    state_dict = from_params({**PARAMS, "model::type": name}).state_dict()
    return {key: tuple(value.shape) for key, value in state_dict.items() if key.endswith("weight")}


def test_digits_cnn_has_a_wide_and_a_deep_relative():
    assert weights_of("digits_cnn_wide") == {
        "module_list.0.weight": (16, 1, 3, 3),
        "module_list.3.weight": (20, 16, 3, 3),
        "module_list.6.weight": (48, 80),
        "module_list.8.weight": (10, 48),
    }
    assert weights_of("digits_cnn_deep") == {
        "module_list.0.weight": (8, 1, 3, 3),
        "module_list.3.weight": (10, 8, 3, 3),
        "module_list.5.weight": (10, 10, 3, 3),
        "module_list.8.weight": (24, 40),
        "module_list.10.weight": (10, 24),
    }
    for name, parameters in (("digits_cnn_wide", 7438), ("digits_cnn_deep", 2954)):
        net = from_params({**PARAMS, "model::type": name})
        assert sum(value.numel() for value in net.parameters()) == parameters
        assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_config_may_name_every_architecture():
    names = get_args(get_type_hints(ZooConfig)["architecture"])
    assert set(names) == {"auto", *ARCHITECTURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_on_paper_are_those_of_the_network(name):
    architecture = ARCHITECTURES[name]
    image = (3, architecture.image_size, architecture.image_size)
    net = from_params({**PARAMS, "model::type": name, "model::channels_in": 3, "model::o_dim": 7})
    assert parameter_shapes(architecture, image, 7) == {
        key: tuple(value.shape) for key, value in net.state_dict().items()
    }


@pytest.mark.parametrize("init_type", INITIALIZATIONS)
def test_initialisation_depends_on_the_seed_alone(init_type):
    params = {**PARAMS, "model::init_type": init_type}
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = from_params(params).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    again, other = from_params(params).state_dict(), from_params({**params, "seed": 6}).state_dict()
    for key, value in first.items():
        assert torch.equal(value, again[key])
        if key.endswith("weight"):
            assert value.std() > 0
            assert not torch.equal(value, other[key])
        else:
            assert torch.equal(value, torch.full_like(value, BIAS))


@pytest.mark.parametrize("nlin", ACTIVATIONS)
def test_activation_and_dropout_are_parameters_that_leave_the_keys_alone(nlin):
    net = from_params({**PARAMS, "model::nlin": nlin, "model::dropout": 0.0})
    dropping = from_params({**PARAMS, "model::nlin": nlin, "model::dropout": 0.5})
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert list(net.state_dict()) == list(dropping.state_dict())
    assert torch.equal(net(images), net(images))
    assert not torch.equal(dropping(images), dropping(images))
    assert torch.equal(dropping.eval()(images), net(images))
    assert any(isinstance(module, ACTIVATIONS[nlin]) for module in net.modules())


def test_images_of_another_size_change_the_first_linear_layer_alone():
    size = {"model::image_height": 30, "model::image_width": 28}
    net = from_params({**PARAMS, **size})
    assert net(torch.zeros(1, 1, 30, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model::type": "resnet"}, "model::type is 'resnet': must be one of digits_cnn, CNN, CNN3"),
        ({"model::nlin": "step"}, "model::nlin is 'step'"),
        ({"model::init_type": "zeros"}, "model::init_type is 'zeros'"),
        ({"model::image_height": 9}, "too small"),
    ],
)
def test_params_that_name_nothing_known_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        from_params({**PARAMS, **change})


def test_missing_key_is_named():
    with pytest.raises(InputError, match="no key 'seed'"):
        from_params({key: value for key, value in PARAMS.items() if key != "seed"})


def test_auto_picks_by_image_size():
    assert [architecture_for("auto", (1, size, size)).name for size in (8, 28, 32)] == ["digits_cnn", "cnn_s", "cnn_l"]
    known = r"knows images of 8x8 \(digits_cnn\), 28x28 \(cnn_s\), 32x32 \(cnn_l\), these are 64x64"
    with pytest.raises(InputError, match=known):
        architecture_for("auto", (3, 64, 64))
    with pytest.raises(InputError, match="must be one of auto, digits_cnn"):
        architecture_for("vit", (3, 64, 64))
    with pytest.raises(InputError, match="too small"):
        architecture_for("cnn_l", (3, 16, 16))
