"""The networks that a store's checkpoints are: tokens to weights, how to run them, and the images they were trained on.

Only the architectures of our own zoos can be run. Never trains, never writes, and never imports Ray.

Shapes: R networks of one group, W tokens of a network, T values of a token, L layers, Q queries, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from sane_ray.errors import InputError
from sane_ray.tokens.store import Architecture, TokenStore
from sane_ray.tokens.tokenizer import detokenize
from sane_ray.zoo.architectures import from_params, image_shape_of
from sane_ray.zoo.images import ImageData, load_images

_IMAGES = ("dataset::name", "dataset::seed", "dataset::fingerprint")
_NETWORK = ("type", "channels_in", "image_height", "image_width", "o_dim", "nlin")
_KEYS = (*(f"model::{key}" for key in _NETWORK), *_IMAGES)
_UNTRAINED = {"model::init_type": "uniform", "model::dropout": 0.0, "seed": 0}
"""What is told of a network whose weights come from elsewhere."""


@dataclass(frozen=True, eq=False)
class Group:
    """Checkpoints whose networks differ in nothing but their weights: they are run together."""

    store: TokenStore
    architecture: Architecture
    params: Mapping[str, Any]
    """What their params.json say alike: architecture, activation function, images."""
    checkpoints: tuple[int, ...]
    """Ordinals in the store."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the networks take."""
        return image_shape_of(self.params)

    def network(self) -> nn.Module:
        """The network, with any weights, on the CPU, without dropout.

        Raises:
            InputError: the store does not say how to run it, or has not all of its weights.
        """
        store = f"the networks of architecture {self.architecture.name!r} of {self.store.path} cannot be run"
        try:
            network = from_params({**self.params, **_UNTRAINED}).eval().requires_grad_(False)
        except InputError as error:
            raise InputError(f"{store}: {error}") from error
        needed = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        stored = {key: tuple(value.shape) for key, value in _places(self.architecture).items()}
        if needed != stored:
            key = next(key for key in (needed | stored) if needed.get(key) != stored.get(key))
            raise InputError(
                f"{store}: {key} is {_shape(stored.get(key))} in the store and {_shape(needed.get(key))} in a network "
                f"of type {self.params['model::type']!r}"
            )
        return network

    def images(self) -> ImageData:
        """The images that the networks were trained on.

        Raises:
            InputError: they are not at hand, not the same, or of another shape.
        """
        name, seed, fingerprint = (self.params.get(key) for key in _IMAGES)
        if name is None or seed is None:
            raise InputError(f"the models of {self.store.path} do not say which images they were trained on")
        images = _load(str(name), int(seed))
        if images.fingerprint != fingerprint:
            raise InputError(
                f"images {name!r} are not those that the models of {self.store.path} were trained on (fingerprint "
                f"{images.fingerprint} instead of {fingerprint})"
            )
        if images.shape != self.image_shape:
            raise InputError(
                f"images {name!r} have shape {list(images.shape)}, and the networks take {list(self.image_shape)}"
            )
        return images


def groups_of(store: TokenStore, checkpoints: Iterable[int]) -> list[Group]:
    """The checkpoints of a store in groups that are run together; reads only the store's index."""
    ordinals = list(checkpoints)
    models = store.models.take(ordinals)
    names = [f"config.{key}" for key in _KEYS]
    known = [models[name].to_pylist() if name in models.column_names else [None] * len(ordinals) for name in names]
    members: dict[tuple[Any, ...], list[int]] = {}
    for ordinal, key in zip(ordinals, zip(models["architecture"].to_pylist(), *known, strict=True), strict=True):
        members.setdefault(key, []).append(ordinal)
    return [
        Group(
            store,
            store.architectures[architecture],
            {key: value for key, value in zip(_KEYS, values, strict=True) if value is not None},
            tuple(ordinals),
        )
        for (architecture, *values), ordinals in members.items()
    ]


class Decoder:
    """Normalised tokens of whole networks to their weights: ``denormalize`` and ``detokenize`` for many at once.

    Differentiable in the tokens. Where each weight stands is looked up once, by detokenising its places.
    """

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        table, normalization = architecture.table, architecture.normalization
        self._parts = []
        for key, places in _places(architecture).items():
            layer = int(table.layer_of_token[int(places.flatten()[0]) // table.token_size])
            shift, scale = float(normalization.shift[layer]), float(normalization.scale[layer])
            self._parts.append((key, places.to(device), layer, shift, scale))

    def __call__(self, tokens_RWT: Tensor, scale_RL: Tensor | None = None) -> dict[str, Tensor]:
        """Weights by key, [R, *shape] each.

        Args:
            tokens_RWT: Normalised tokens, float32.
            scale_RL: For ``l2`` normalisation, each network's own norms; without them the training models' mean norms.
        """
        flat_RX = tokens_RWT.flatten(start_dim=1)
        weights = {}
        for key, places, layer, shift, scale in self._parts:
            values_RX = flat_RX.index_select(1, places.flatten())
            factor = scale if scale_RL is None else scale_RL[:, layer, None]
            weights[key] = (values_RX * factor + shift).unflatten(1, places.shape)
        return weights


def answers(network: nn.Module, weights: Mapping[str, Tensor], queries_QCHW: Tensor) -> Tensor:
    """Logits [R, Q, K] of networks with the given weights ([R, *shape] each); differentiable in the weights.

    Each network's answers depend on its own weights alone. On a CPU they are asked one after the other: its grouped
    convolutions take two to three times as long.
    """
    ask = _one_by_one if queries_QCHW.device.type == "cpu" else _together
    return ask(network, weights, queries_QCHW)


def _one_by_one(network: nn.Module, weights: Mapping[str, Tensor], queries_QCHW: Tensor) -> Tensor:
    rows = zip(*(value.unbind() for value in weights.values()), strict=True)
    return torch.stack([functional_call(network, dict(zip(weights, row, strict=True)), queries_QCHW) for row in rows])


def _together(network: nn.Module, weights: Mapping[str, Tensor], queries_QCHW: Tensor) -> Tensor:
    return vmap(lambda row: functional_call(network, row, queries_QCHW))(dict(weights))


def _places(architecture: Architecture) -> dict[str, Tensor]:
    """Where each weight stands among the values of a network's tokens: int64 of the weight's shape, by key."""
    table = architecture.table
    return detokenize(torch.arange(table.num_tokens * table.token_size).view(-1, table.token_size), table)


@lru_cache(maxsize=4)
def _load(name: str, seed: int) -> ImageData:
    return load_images(name, seed=seed)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
