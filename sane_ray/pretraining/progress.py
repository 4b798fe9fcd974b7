"""Turns what steps return into points to log: global losses, and how fast, how idle and how large the work was."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sane_ray.autoencoder.losses import explained_variance
from sane_ray.pretraining.history import Point
from sane_ray.pretraining.step import METRICS, Trainer, global_metrics


class Progress:
    """Collects the steps since the last report; every rank must ask for ``points`` at the same step."""

    def __init__(
        self, trainer: Trainer, *, steps_per_epoch: int, tokens_per_step: float, peak_flops: float | None
    ) -> None:
        """Begins to measure time.

        Args:
            trainer: whose steps are collected.
            steps_per_epoch: to tell the epoch of a step.
            tokens_per_step: tokens of both views of a global batch, on average.
            peak_flops: floating-point operations a second that a worker's device could reach; None if unknown.
        """
        self.trainer = trainer
        self.steps_per_epoch = steps_per_epoch
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = trainer.model.flops_per_token(trainer.model.config.window)
        self.peak_flops = peak_flops
        self.restart()
        self.told = self.began

    def restart(self) -> None:
        """Begins to measure time anew, after something that is not training: the time since the last report paused."""
        self.rows: list[Tensor] = []
        self.steps: list[int] = []
        self.times: list[float] = []
        self.waited = 0.0
        self.began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, row: Tensor) -> None:
        """Takes what a step returned, after the step."""
        self.rows.append(row)
        self.steps.append(self.trainer.state.step)
        self.times.append(time.time())

    def points(self) -> list[Point]:
        """A point for each step since the last call; the last one tells the speed of all of them."""
        if not self.rows:
            return []
        metrics = global_metrics(torch.stack(self.rows), self.trainer.world_size).cpu()
        now = time.perf_counter()
        points = [self._point(*of_step) for of_step in zip(self.steps, metrics, self.times, strict=True)]
        points[-1] |= self._speed(len(points), now - self.began) | self._pauses(now)
        self.restart()
        self.told = now
        return points

    def _speed(self, steps: int, elapsed: float) -> Point:
        tokens_per_s = steps * self.tokens_per_step / elapsed
        flops_per_s = tokens_per_s * self.flops_per_token
        speed = {
            "tokens_per_s": tokens_per_s,
            "flops_per_s": flops_per_s,
            "data_wait_fraction": self.waited / elapsed,
            "peak_memory_mb": peak_memory(self.trainer.device) / 1e6,
            "workers": float(self.trainer.world_size),
        }
        if self.peak_flops:
            speed["mfu"] = flops_per_s / (self.peak_flops * self.trainer.world_size)
        return speed

    def _pauses(self, now: float) -> Point:
        """The share of the time since the last report that is not measured: before the last ``restart``."""
        return {"paused_fraction": (self.began - self.told) / (now - self.told)}

    def _point(self, step: int, row: Tensor, at: float) -> Point:
        losses = {f"train/{name}": float(value) for name, value in zip(METRICS, row, strict=False)}
        variance = {"train/explained_variance": float(explained_variance(row[len(METRICS) :]))}
        return {"step": step, "epoch": step / self.steps_per_epoch, "time": at} | losses | variance


def peak_memory(device: torch.device) -> int:
    """Bytes in use at the worst moment so far: of the allocator on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
