"""What a run must keep to continue: model, optimiser, schedule and step, saved with torch's distributed checkpoints.

Order, windows, permutations and noise are functions of (seed, step) and need no state. Each rank writes its own shards;
any number of ranks can read them. Never gathers a whole model on one rank, except to export the finished one.

A distributed checkpoint's metadata is a pickle: load only what your own runs wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class TrainingState(Stateful):
    """Everything that training changes."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.step = 0
        """Optimiser steps taken."""

    def state_dict(self) -> dict[str, Any]:
        """Sharded state, as torch.distributed.checkpoint wants it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a loaded state, resharded to this run's ranks."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.step = state_dict["step"]

    def save(self, folder: Path) -> None:
        """Writes this rank's shards into ``folder``."""
        dcp.save({"training": self}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Reads what any number of ranks saved."""
        dcp.load({"training": self}, checkpoint_id=folder)


def whole_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """The unsharded weights on the CPU of rank 0 (empty on the others); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))
