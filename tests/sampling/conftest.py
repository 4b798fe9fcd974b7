"""A zoo of real networks of two activations, its store, and autoencoders for it; tests only read them."""

import pytest
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig, TokensConfig, ZooConfig
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo import builder
from sane_ray.zoo.catalog import discover

ZOO = ZooConfig(
    models=16, checkpoint_epochs=[0, 2], activations=["gelu", "tanh"], optimizers=["adam"], learning_rates=[2e-3, 8e-3]
)


class Exact(SANE):
    """An autoencoder that loses nothing: the embedding of a token is the token."""

    def encode(self, tokens_BWT, positions_BW3):
        return tokens_BWT

    def decode(self, z_BWL, positions_BW3):
        return z_BWL


def make_model(kind, store, **shape):
    sizes = [architecture.table.position_sizes for architecture in store.architectures.values()]
    config = AutoencoderConfig(
        **{
            "token_size": store.token_size,
            "window": 20,
            "d_model": 16,
            "heads": 2,
            "layers": 1,
            "latent_dim": 8,
            "max_positions": [max(size) for size in zip(*sizes, strict=True)],
        }
        | shape
    )
    model = kind(config).eval()
    architectures = {name: architecture.to_dict() for name, architecture in store.architectures.items()}
    model.preprocessing = {"token_size": store.token_size, "architectures": architectures}
    return model


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """The zoo, built in this process: in less time than Ray takes to start."""
    folder, plan = tmp_path_factory.mktemp("zoos") / "digits", builder.plan_zoo(ZOO)
    builder._write_identity(plan, folder)
    for names in builder._stacks(plan.models):
        stack = {name: plan.models[name] for name in names}
        builder._build_stack(stack, plan.images, ZOO.checkpoint_epochs, str(folder))
    return folder


@pytest.fixture(scope="session")
def store(zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "digits"
    return write_store(discover(zoo), folder, TokensConfig(split=[0.8, 0.1, 0.1], dtype="float32"), source=zoo)


@pytest.fixture(scope="session")
def exact(store):
    """An autoencoder without loss."""
    return make_model(Exact, store, latent_dim=store.token_size)


@pytest.fixture(scope="session")
def untrained(store, tmp_path_factory):
    """The folder of a real model that has learned nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "model"
    make_model(SANE, store).save_pretrained(folder)
    return folder
