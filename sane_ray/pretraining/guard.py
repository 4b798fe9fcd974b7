"""Watches the gradient for spikes: single batches that throw a training back.

Looks at points that were reported anyway, so it costs nothing and is the same on every rank and after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

from sane_ray.pretraining.history import Point

WINDOW = 100
"""Steps whose gradient norms say what is usual."""

ENOUGH = 20
"""Steps without which nothing is called unusual."""

MOST_UNUSABLE = 20
"""Consecutive steps without a usable gradient after which a run is given up."""


class Spike(NamedTuple):
    """A step whose gradient norm was far above the usual."""

    step: int
    """Global step, counted from 1 as in the history."""
    norm: float
    usual: float
    """Median of the norms before."""


class SpikeGuard:
    """Knows the recent gradient norms of a run; what it knows travels in checkpoints."""

    def __init__(self, factor: float) -> None:
        """Args:
        factor: A norm so many times the median of the last ``WINDOW`` is a spike.
        """
        self.factor = factor
        self.norms: list[float] = []
        self.unusable = 0
        """Of the runs of steps without a finite gradient that the last look saw grow, the longest, whole."""
        self.skipped = 0
        """All steps without a finite gradient."""
        self._run = 0  # steps without one since the last with one

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"norms": self.norms, "unusable": self._run, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` gave."""
        self.norms, self.skipped = list(state["norms"]), state["skipped"]
        self.unusable = self._run = state["unusable"]

    def look(self, points: Iterable[Point]) -> list[Spike]:
        """Takes in the next steps; returns those that are spikes. A level that stays becomes the usual one."""
        spikes = []
        self.unusable = 0
        for point in points:
            norm = point["train/gradient_norm"]
            if not math.isfinite(norm):  # such a step changed nothing
                self._run += 1
                self.skipped += 1
                self.unusable = max(self.unusable, self._run)
                continue
            self._run = 0
            usual = median(self.norms) if len(self.norms) >= ENOUGH else math.inf
            if norm > self.factor * usual:
                spikes.append(Spike(int(point["step"]), norm, usual))
            self.norms = [*self.norms[1 - WINDOW :], norm]
        return spikes
