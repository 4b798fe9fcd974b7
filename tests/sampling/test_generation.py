"""Codec: weights to tokens to embeddings and back, whatever the windows."""

import pytest
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.config import SamplingConfig
from sane_ray.sampling.anchors import choose
from sane_ray.sampling.generation import Codec, state_dict


@pytest.fixture(scope="module")
def anchors(store):
    return choose(store, SamplingConfig())


def test_tokens_and_weights_undo_each_other(anchors, exact):
    codec = Codec(exact, anchors.architecture, SamplingConfig())
    networks = anchors.networks(anchors.ordinals)
    weights = codec.weights(codec.tokens(networks))
    for index, network in enumerate(networks):
        back = state_dict(weights, index)
        assert list(back) == list(network)
        for key, value in network.items():
            torch.testing.assert_close(back[key], value, atol=1e-5, rtol=1e-5)


def test_values_are_all_weights_and_nothing_else(anchors, exact):
    codec = Codec(exact, anchors.architecture, SamplingConfig())
    networks = anchors.networks(anchors.ordinals[:2])
    values = codec.values(codec.tokens(networks))
    assert values.shape == (2, sum(value.numel() for value in networks[0].values()))


@pytest.mark.parametrize(("window", "halo"), [(0, 0), (0, 3), (7, 2), (52, 0)])
def test_windows_do_not_matter_to_an_exact_autoencoder(anchors, exact, window, halo):
    codec = Codec(exact, anchors.architecture, SamplingConfig(window=window, halo=halo))
    tokens = codec.tokens(anchors.networks(anchors.ordinals))
    torch.testing.assert_close(codec.decode(codec.encode(tokens)), tokens)


def test_it_decodes_as_the_model_itself_does(anchors, untrained):
    model = SANE.from_pretrained(untrained)
    codec = Codec(model, anchors.architecture, SamplingConfig(precision="float32"))
    networks = anchors.networks(anchors.ordinals[:3])
    latents = codec.encode(codec.tokens(networks))
    weights = codec.weights(codec.decode(latents))
    for index, network in enumerate(networks):
        torch.testing.assert_close(latents[index], model.encode_model(network), atol=1e-5, rtol=1e-5)
        expected = model.decode_model(latents[index])
        for key, value in state_dict(weights, index).items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-5)
