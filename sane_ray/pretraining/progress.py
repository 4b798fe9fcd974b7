"""Turns what steps return into points to log: global losses, and how fast and how idle the time between reports was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sane_ray.autoencoder.losses import explained_variance
from sane_ray.pretraining.step import METRICS, Trainer, global_metrics

Point = dict[str, float]
"""Metrics of one step by name, with ``step``, ``epoch`` and ``time`` (seconds since 1970)."""


class Progress:
    """Collects the steps since the last report; every rank must ask for ``points`` at the same step."""

    def __init__(self, trainer: Trainer, *, steps_per_epoch: int, tokens_per_step: int) -> None:
        """Starts at the trainer's step.

        Args:
            trainer: whose steps are collected.
            steps_per_epoch: to tell the epoch of a step.
            tokens_per_step: tokens of both views of a global batch.
        """
        self.trainer = trainer
        self.steps_per_epoch = steps_per_epoch
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = trainer.model.flops_per_token(trainer.model.config.window)
        self.restart()

    def restart(self) -> None:
        """Begins to measure time anew, after something that is not training."""
        self.rows: list[Tensor] = []
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
        """Takes what a step returned."""
        self.rows.append(row)
        self.times.append(time.time())

    def points(self) -> list[Point]:
        """A point for each step since the last call; the last one tells speed and waiting over all of them."""
        metrics = global_metrics(torch.stack(self.rows), self.trainer.world_size).cpu()
        elapsed = time.perf_counter() - self.began
        first = self.trainer.state.step - len(self.rows)
        points = [self._point(first + i + 1, *pair) for i, pair in enumerate(zip(metrics, self.times, strict=True))]
        tokens_per_s = len(points) * self.tokens_per_step / elapsed
        points[-1] |= {
            "tokens_per_s": tokens_per_s,
            "flops_per_s": tokens_per_s * self.flops_per_token,
            "data_wait_fraction": self.waited / elapsed,
        }
        self.restart()
        return points

    def _point(self, step: int, row: Tensor, at: float) -> Point:
        losses = {f"train/{name}": float(value) for name, value in zip(METRICS, row, strict=False)}
        variance = {"train/explained_variance": float(explained_variance(row[len(METRICS) :]))}
        return {"step": step, "epoch": step / self.steps_per_epoch, "time": at} | losses | variance
