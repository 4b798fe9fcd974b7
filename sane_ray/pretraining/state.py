"""What a run must keep to continue: model, optimiser, schedule, step and what belongs to them.

The state has two parts. Its tensors are sharded like the model and go into torch's distributed checkpoints, each rank
its own shards; any number of ranks can read them. Everything else is plain JSON (``record``), so that nothing of a
checkpoint needs to be unpickled. Order, windows, permutations, noise and dropout are functions of seed and step, not
state; the random generators are kept all the same, for code beside the trainer that draws from them.
Never gathers a whole model on one rank, except to export one.
"""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sane_ray.errors import InputError

RNG = "rng."
"""How the keys of random number generators start; they alone differ from rank to rank."""

_IMPLEMENTATION = {"params", "fused", "foreach", "capturable", "differentiable"}
"""What an optimiser's group holds that is no number of the schedule: how this process computes it."""


class TrainingState(Stateful):
    """Everything that training changes.

    Attributes:
        step: optimiser steps taken.
        skipped: global steps whose batches were left out.
        extra: whatever else shall survive, JSON-able, the same on all ranks (rank 0's is kept): ledger, best loss, ...
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, *, seed: int = 0) -> None:
        """Holds references; copies nothing.

        Args:
            model: plain, or sharded with FSDP2.
            optimizer: of the model's parameters.
            scheduler: of the optimiser, its state JSON-able.
            seed: of the run; seeds the generators of ranks that a checkpoint does not know.
        """
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.seed = seed
        self.step = 0
        self.skipped: list[int] = []
        self.extra: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The tensors, flat, by name: those of model and optimiser are the live ones (sharded as they are)."""
        fresh = not self.optimizer.state
        model, optimizer = get_state_dict(self.model, self.optimizer)
        if fresh:  # torch filled the optimiser's state by a step without gradients: only its count of steps shows
            for moments in self.optimizer.state.values():
                for value in moments.values():
                    value.zero_()
        moments = cast(dict[str, dict[str, Tensor]], optimizer["state"])
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        tensors |= {f"optimizer.{name}.{key}": value for name, of in moments.items() for key, value in of.items()}
        return tensors | self._generators()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies tensors into the live ones, and sets the random number generators if theirs are there."""
        live = self.state_dict()
        with torch.no_grad():
            for name in live.keys() & state_dict.keys():
                if name.startswith(RNG):
                    self._set_generator(name, state_dict[name])
                elif live[name] is not state_dict[name]:
                    _local(live[name]).copy_(_local(state_dict[name]))

    def record(self) -> dict[str, Any]:
        """All that is no tensor, as a copy that JSON can hold."""
        groups = [
            {key: value for key, value in group.items() if key not in _IMPLEMENTATION}
            for group in self.optimizer.param_groups
        ]
        record = {
            "step": self.step,
            "skipped": self.skipped,
            "scheduler": self.scheduler.state_dict(),
            "param_groups": groups,
            "extra": self.extra,
        }
        return cast(dict[str, Any], json.loads(json.dumps(record)))

    def restore(self, record: dict[str, Any]) -> None:
        """Takes over a ``record`` and seeds the generators from (seed, step, rank); ``load_state_dict`` may set them.

        Raises:
            InputError: the optimiser of the record has another number of parameter groups.
        """
        groups = record["param_groups"]
        if len(groups) != len(self.optimizer.param_groups):
            raise InputError(
                f"the checkpoint's optimiser has {len(groups)} parameter groups, but this run's has "
                f"{len(self.optimizer.param_groups)}: resume with the config it was made with, or choose another "
                "--run-name"
            )
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            group |= {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        self.scheduler.load_state_dict(record["scheduler"])
        self.step = record["step"]
        self.skipped = list(record["skipped"])
        self.extra = dict(record["extra"])
        torch.manual_seed(seed_of(self.seed, self.step, _rank()))

    def _generators(self) -> dict[str, Tensor]:
        tensors = {f"{RNG}{_rank()}.cpu": torch.get_rng_state()}
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            tensors[f"{RNG}{_rank()}.cuda"] = torch.cuda.get_rng_state(device)
        return tensors

    def _set_generator(self, name: str, state: Tensor) -> None:
        if name.endswith(".cuda"):
            torch.cuda.set_rng_state(state, next(self.model.parameters()).device)
        else:
            torch.set_rng_state(state)


def seed_of(seed: int, step: int, rank: int, *piece: int) -> int:
    """One seed for each (seed, step, rank), and piece of its rows: what is drawn there, resumed or not."""
    return int(np.random.SeedSequence((seed, step, rank, *piece)).generate_state(1, np.uint64)[0] >> 1)


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded weights on the CPU of rank 0 (empty on the others); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
