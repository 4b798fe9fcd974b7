"""Small networks of two architectures, their stores, and models that were trained on one of them; no Ray."""

import torch
from safetensors.torch import save_file
from torch import nn

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig, TokensConfig
from sane_ray.tokens.store.reading import settings_of
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover

SIZE = 24


def known_network(seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(30, 5))
    return {key: value * scale if value.is_floating_point() else value for key, value in net.state_dict().items()}


def other_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 9, 3), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, 3)).state_dict()


def write_zoo(folder, known=12, other=0, scale=1.0):
    folder.mkdir(parents=True)
    for number in range(known):
        save_file(known_network(number, scale), folder / f"known{chr(97 + number)}.safetensors")
    for number in range(other):
        save_file(other_network(number), folder / f"other{chr(97 + number)}.safetensors")
    return folder


def tokens_config(**settings):
    defaults = {"token_size": SIZE, "split": [0.6, 0.2, 0.2], "dtype": "float32", "max_architectures": 2}
    return TokensConfig(**defaults | settings)


def make_store(zoo, path, **settings):
    return write_store(discover(zoo), path, tokens_config(**settings), source=zoo)


def make_model(store, window=10, names=None, **settings):
    """Untrained, but as if it were trained on these architectures of the store."""
    entries = {name: one.to_dict() for name, one in store.architectures.items() if names is None or name in names}
    sizes = [one.table.position_sizes for one in store.architectures.values()]
    defaults = {
        "token_size": store.token_size, "window": window, "d_model": 16, "heads": 2, "layers": 2, "latent_dim": 6,
        "max_positions": [max(size) for size in zip(*sizes, strict=True)],
    }  # fmt: skip
    model = SANE(AutoencoderConfig(**defaults | settings), seed=3).eval()
    model.preprocessing = {"token_size": store.token_size, **settings_of(store), "architectures": entries}
    model.provenance = {"run": "test"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that embeddings differ by more than rounding
    return model


def first_architecture(store, zoo_name="known"):
    """Name of the architecture of the checkpoints whose names begin like this."""
    rows = zip(store.models["model"].to_pylist(), store.models["architecture"].to_pylist(), strict=True)
    return next(architecture for model, architecture in rows if model.rpartition("/")[2].startswith(zoo_name))
