"""Weights and configs of the published SANE code to ours and back.

Only names change, never values. Reads nothing from disk and never unpickles: take the ``model`` entry of a published
``state.pt`` with ``torch.load(path, weights_only=True)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sane_ray.autoencoder.model import SANE, check_names, check_weights
from sane_ray.config import AutoencoderConfig
from sane_ray.errors import InputError

CONFIG_KEYS = {
    "token_size": "ae:i_dim",
    "window": "training::windowsize",
    "d_model": "ae:d_model",
    "heads": "ae:nhead",
    "layers": "ae:num_layers",
    "latent_dim": "ae:lat_dim",
    "max_positions": "ae:max_positions",
}
"""Our field to the published key; a published config must hold all of them."""

PROJECTION_DIM = 30
"""Not in the published config but in the code."""

_MODULES = {
    "token_in": "tokenizer",
    "to_latent": "encoder_comp",
    "from_latent": "decoder_comp",
    "token_out": "detokenizer",
    "positions.token": "pe.pe1",
    "positions.layer": "pe.pe2",
    "positions.channel": "pe.pe3",
    "projection_head.linear_1": "projection_head.head.0",
    "projection_head.norm_1": "projection_head.head.1",
    "projection_head.linear_2": "projection_head.head.3",
    "projection_head.norm_2": "projection_head.head.4",
}
_BLOCK_MODULES = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}


def config_from_published(config: Mapping[str, Any]) -> AutoencoderConfig:
    """The shape of a published model.

    Args:
        config: A published config with its flat keys (``ae:d_model``, ``training::windowsize``); others are ignored.

    Raises:
        InputError: A key is missing, or the model is of a kind that is not supported.
    """
    kind = config.get("ae:transformer_type", "pytorch")  # the published default
    if kind != "gpt2":
        raise InputError(
            f"published config: ae:transformer_type is {kind!r}, only 'gpt2' can be converted: 'pytorch' attends "
            "across the samples of a batch, not the tokens of a window, so an embedding depends on its neighbours"
        )
    missing = [key for key in CONFIG_KEYS.values() if key not in config]
    if missing:
        raise InputError(f"published config lacks {', '.join(missing)}: pass the config the model was trained with")
    if len(config["ae:max_positions"]) != 3:
        raise InputError(
            f"published config: ae:max_positions is {config['ae:max_positions']}, only three sizes (token index, "
            "layer, channel) can be converted"
        )
    fields = {ours: config[published] for ours, published in CONFIG_KEYS.items()}
    fields["max_positions"] = list(fields["max_positions"])
    return AutoencoderConfig(**fields, dropout=config.get("ae:dropout", 0.0), projection_dim=PROJECTION_DIM)


def config_to_published(config: AutoencoderConfig) -> dict[str, Any]:
    """The published config of a model's shape.

    Raises:
        InputError: The published code has no such model.
    """
    _check_learned_positions(config)
    if config.projection_dim != PROJECTION_DIM:
        raise InputError(
            f"config field autoencoder.projection_dim is {config.projection_dim}: the published code only has "
            f"{PROJECTION_DIM}"
        )
    fields = {published: getattr(config, ours) for ours, published in CONFIG_KEYS.items()}
    return {"ae:transformer_type": "gpt2", **fields, "ae:dropout": config.dropout}


def state_dict_from_published(state_dict: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """Published weights under our names; the tensors are shared, not copied.

    Args:
        state_dict: Weights of a published model, compiled or wrapped (``_orig_mod.``, ``module.``) or not.
        config: Shape of the model.

    Raises:
        InputError: Keys are missing or unknown, or a shape differs.
    """
    stripped = {re.sub(r"^(?:_orig_mod\.|module\.)+", "", key): weight for key, weight in state_dict.items()}
    ours_by_name = _empty_weights(config)
    wanted = {published_name(name): weight for name, weight in ours_by_name.items()}
    if "transformer_encoder.layers.0.linear1.weight" in stripped:
        raise InputError(
            "published state dict has transformer_encoder.layers: it is of ae:transformer_type 'pytorch', which "
            "attends across the batch and cannot be converted; only 'gpt2' can"
        )
    check_names(stripped, wanted, "published state dict")
    check_weights(stripped, wanted, "published state dict")
    return {name: stripped[published_name(name)] for name in ours_by_name}


def state_dict_to_published(state_dict: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """Our weights under published names; the tensors are shared, not copied.

    Raises:
        InputError: Keys are missing or unknown, a shape differs, or the published code has no such model.
    """
    _check_learned_positions(config)
    check_weights(state_dict, _empty_weights(config), "state dict")
    return {published_name(name): weight for name, weight in state_dict.items()}


def from_published(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> SANE:
    """A published model as a SANE, in evaluation mode and without preprocessing.

    Raises:
        InputError: As ``config_from_published`` and ``state_dict_from_published``.
    """
    converted = config_from_published(config)
    weights = state_dict_from_published(state_dict, converted)
    with torch.device("meta"):
        model = SANE(converted)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def published_name(name: str) -> str:
    """The published name of one of our parameters."""
    module, _, tensor = name.rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{tensor}"
    stack, index, part = module.split(".", maxsplit=2)
    return f"transformer_{stack}.transformer.{index}.{_BLOCK_MODULES[part]}.{tensor}"


def _check_learned_positions(config: AutoencoderConfig) -> None:
    if config.positions != "learned":
        raise InputError(
            f"config field autoencoder.positions is {config.positions!r}: the published code only has learned ones"
        )


def _empty_weights(config: AutoencoderConfig) -> dict[str, Tensor]:
    """Names and shapes of a model's weights, without memory."""
    with torch.device("meta"):
        return SANE(config).state_dict()
