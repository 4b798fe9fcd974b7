"""How networks are trained on: as the best anchor was, as far as the store says, and what the config says instead.

Params are flat, with the published keys. Never trains, never imports Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sane_ray.config import FinetuningConfig
from sane_ray.errors import InputError

OPTIMIZER, RATE, DECAY = "optim::optimizer", "optim::lr", "optim::wd"
MOMENTUM, BATCH = "optim::momentum", "training::batchsize"

RATES = {"adam": 1e-3, "adamw": 1e-3, "sgd": 1e-2}
"""Optimisers, and their learning rates where nothing says one."""

DEFAULTS: dict[str, Any] = {OPTIMIZER: "adam", DECAY: 0.0, MOMENTUM: 0.9, BATCH: 32}
"""Where nothing says another; the momentum is that of the published zoos."""

T = TypeVar("T")


def recipe_of(params: Mapping[str, Any], config: FinetuningConfig) -> dict[str, Any]:
    """Params with all that training needs: the config's, else their own, else defaults.

    With another optimiser than theirs, their learning rate is not taken: it would mean another step. Schedules of the
    learning rate are not taken either.

    Raises:
        InputError: their optimiser is none that is known here, or a value is no number.
    """
    own = str(_known(params, OPTIMIZER) or "").lower()
    name = config.optimizer or own or DEFAULTS[OPTIMIZER]
    if name not in RATES:
        raise InputError(
            f"the networks of the store were trained with {OPTIMIZER} {params[OPTIMIZER]!r}, which is none of "
            f"{', '.join(RATES)}: choose one with --finetuning.optimizer"
        )
    rate = config.learning_rate or (_number(params, RATE, float) if name == own else None)
    decay = config.weight_decay if config.weight_decay >= 0 else _number(params, DECAY, float)
    momentum = _number(params, MOMENTUM, float) if name == own else None
    return {
        **params,
        OPTIMIZER: name,
        RATE: RATES[name] if rate is None else rate,
        DECAY: DEFAULTS[DECAY] if decay is None else decay,
        MOMENTUM: DEFAULTS[MOMENTUM] if momentum is None else momentum,
        BATCH: config.batch_size or _number(params, BATCH, int) or DEFAULTS[BATCH],
    }


def describe(recipe: Mapping[str, Any], params: Mapping[str, Any], config: FinetuningConfig) -> str:
    """The recipe in words, with where each value comes from.

    Args:
        recipe: as ``recipe_of`` made it.
        params: what it was made of.
        config: what it was made with.
    """
    chosen = {
        OPTIMIZER: bool(config.optimizer),
        RATE: bool(config.learning_rate),
        DECAY: config.weight_decay >= 0,
        BATCH: bool(config.batch_size),
    }
    names = {OPTIMIZER: "optimizer", RATE: "constant learning rate", DECAY: "weight decay", BATCH: "batches of"}
    if recipe[OPTIMIZER] == "sgd":
        names[MOMENTUM] = "momentum"
    own = _known(params, OPTIMIZER) is not None and str(params[OPTIMIZER]).lower() == recipe[OPTIMIZER]

    def origin(key: str) -> str:
        if chosen.get(key):
            return "as chosen"
        told = _known(params, key) is not None and (own or key in (DECAY, BATCH))
        return "of the best anchor" if told else "default"

    return ", ".join(f"{name} {recipe[key]} ({origin(key)})" for key, name in names.items())


def optimizer_of(recipe: Mapping[str, Any], parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimiser of a recipe. All that it does is done value by value: stacked networks are trained as alone."""
    rate, decay = float(recipe[RATE]), float(recipe[DECAY])
    match recipe[OPTIMIZER]:
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=float(recipe[MOMENTUM]))
    raise InputError(f"params key {OPTIMIZER} is {recipe[OPTIMIZER]!r}: must be one of {', '.join(RATES)}")


def _known(params: Mapping[str, Any], key: str) -> Any:
    """A value that is there; None for one that is missing or no number (as tables have it)."""
    value = params.get(key)
    return None if value is None or value != value else value


def _number(params: Mapping[str, Any], key: str, kind: Callable[[Any], T]) -> T | None:
    value = _known(params, key)
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the store says {key} {value!r} of the best anchor, which is no number: choose one with --finetuning"
        ) from error
