import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sane_ray.autoencoder.model import SANE
from sane_ray.autoencoder.published import (
    config_from_published,
    config_to_published,
    from_published,
    state_dict_from_published,
    state_dict_to_published,
)
from sane_ray.config import AutoencoderConfig
from sane_ray.errors import InputError


@pytest.fixture
def published_config(parity):
    return json.loads((parity / "meta.json").read_text())["autoencoder_config"]


@pytest.fixture
def weights(parity):
    return load_file(parity / "autoencoder.safetensors")


@pytest.mark.parametrize(("tokens", "names"), [("x", ("z", "y", "zp")), ("x2", ("z2", "y2", "zp2"))])
def test_a_published_model_computes_the_published_numbers(parity, published_config, weights, tokens, names):
    data = {key: torch.from_numpy(value) for key, value in np.load(parity / "autoencoder_io.npz").items()}
    with torch.no_grad():
        outputs = from_published(weights, published_config)(data[tokens], data["pos"])
    for output, name in zip(outputs, names, strict=True):
        torch.testing.assert_close(output, data[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_of_published_models_are_looked_through(published_config, weights, prefix):
    wrapped = {prefix + key: value for key, value in weights.items()}
    expected, found = from_published(weights, published_config), from_published(wrapped, published_config)
    assert all(torch.equal(expected.state_dict()[name], value) for name, value in found.state_dict().items())


def test_weights_and_config_survive_the_way_there_and_back(published_config, weights):
    config = config_from_published(published_config)
    assert config == AutoencoderConfig(
        token_size=24, window=12, d_model=32, heads=4, layers=2, latent_dim=8, max_positions=[64, 8, 16]
    )
    assert config_from_published({**published_config, "ae:dropout": 0.2, "seed": 32}).dropout == 0.2
    assert config_to_published(config) == {**published_config, "ae:dropout": 0.0}
    returned = state_dict_to_published(state_dict_from_published(weights, config), config)
    assert returned.keys() == weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in returned.items())


def test_our_model_goes_to_published_names_and_back():
    config = AutoencoderConfig(token_size=7, window=3, d_model=8, heads=2, layers=3, max_positions=[5, 4, 3])
    ours = SANE(config, seed=5).state_dict()
    published = state_dict_to_published(ours, config)
    assert "transformer_decoder.transformer.2.mlp.c_proj.weight" in published
    returned = from_published(published, config_to_published(config)).state_dict()
    assert list(returned) == list(ours)
    assert all(torch.equal(ours[name], value) for name, value in returned.items())


@pytest.mark.parametrize("kind", [{"ae:transformer_type": "pytorch"}, {}])
def test_models_that_attend_across_the_batch_are_refused(published_config, kind):
    del published_config["ae:transformer_type"]
    with pytest.raises(InputError, match=r"'pytorch', only 'gpt2'.*across the samples of a batch"):
        config_from_published({**published_config, **kind})


def test_weights_of_models_that_attend_across_the_batch_are_refused(published_config, weights):
    weights["transformer_encoder.layers.0.linear1.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"'pytorch', which attends across the batch"):
        from_published(weights, published_config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ae:d_model": None}, "lacks ae:d_model"),
        ({"ae:max_positions": [48, 256]}, r"ae:max_positions is \[48, 256\], only three"),
    ],
)
def test_an_unusable_published_config_is_named(published_config, changes, message):
    config = {key: value for key, value in {**published_config, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        config_from_published(config)


def test_unfitting_published_weights_are_named(published_config, weights):
    with pytest.raises(InputError, match=r"published state dict lacks tokenizer.bias"):
        from_published({key: value for key, value in weights.items() if key != "tokenizer.bias"}, published_config)
    with pytest.raises(InputError, match=r"published state dict has unknown extra.weight"):
        from_published({**weights, "extra.weight": torch.zeros(1)}, published_config)
    with pytest.raises(InputError, match=r"pe.pe1.weight has shape \[64, 16\], but the config makes it \[65, 16\]"):
        from_published(weights, {**published_config, "ae:max_positions": [65, 8, 16]})


def test_what_the_published_code_cannot_build_is_refused(published_config, weights):
    config = config_from_published(published_config)
    with pytest.raises(InputError, match=r"projection_dim is 20"):
        config_to_published(dataclasses.replace(config, projection_dim=20))
    with pytest.raises(InputError, match=r"state dict lacks"):
        state_dict_to_published(weights, config)
