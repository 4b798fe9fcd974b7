"""The order in which training sees windows: a pure function of seed and epoch, the same for any number of workers.

An epoch is cut into pools of row groups that fit in memory together. A pool's windows are dealt out one model after
the other, so that near-duplicates (windows and checkpoints of one model) lie as far apart as the pool allows: within a
batch they would be false negatives of the contrastive loss. Worker r of w takes the r-th of w equal slices of every
global batch.

Never reads tokens and never imports Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sane_ray.errors import InputError

_ORDER_OF_GROUPS, _WINDOWS_OF_POOL = 0, 1  # keep the random streams of an epoch apart


class Pool(NamedTuple):
    """Row groups that are read together, and the place of their first window in the epoch."""

    groups: tuple[int, ...]
    """Indices into the plan's row groups."""
    first: int
    """Place in the epoch of the pool's first window."""


class Windows(NamedTuple):
    """Windows in the order in which training sees them; arrays of equal length."""

    segment: NDArray[np.int64]
    """Number of the segment: a checkpoint, or a part of a large one."""
    start: NDArray[np.int64]
    """First token of the window in the segment."""


@dataclass(frozen=True)
class Plan:
    """Seeded order over the windows of one split of a store.

    Windows are cut from segments: checkpoints, or the parts that large ones are stored in. Every token of every segment
    is covered in every epoch, by windows that all differ. A segment of N tokens gives ceil(N / W) + 1 windows of W
    tokens: the first, the last, and between them a run of others whose phase is drawn anew each epoch (one less where
    N - 1 is a multiple of W, since no phase is left; one if N = W). The windows that do not fill a last global batch
    are left out; which ones differs from epoch to epoch.
    """

    groups: tuple[tuple[int, ...], ...]
    """Segments (numbers) in each row group."""
    tokens: NDArray[np.int64]
    """Tokens of each segment."""
    models: NDArray[np.int64]
    """Number of the model that each segment belongs to."""
    window: int
    """Tokens in a window."""
    batch_size: int
    """Windows in a global batch."""
    pool_tokens: int
    """Tokens read together at least (unless the epoch is smaller)."""
    seed: int

    def __post_init__(self) -> None:
        if not self.groups:
            raise InputError("the token store has no training checkpoints: prepare it with a larger tokens.split[0]")
        members = np.concatenate([np.asarray(group) for group in self.groups])
        shortest = int(self.tokens[members].min())
        if self.window > shortest:
            raise InputError(
                f"config field autoencoder.window is {self.window}, but the shortest model (or segment of one) of the "
                f"store has {shortest} tokens: set it to {shortest} or less"
            )

    @cached_property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.windows_per_epoch // self.batch_size

    @cached_property
    def windows_per_epoch(self) -> int:
        """Windows in an epoch, those included that do not fill a last batch."""
        return int(sum(self._windows_of_group))

    @cached_property
    def _windows_of_group(self) -> NDArray[np.int64]:
        counts = window_counts(self.tokens, self.window)
        return np.array([counts[list(group)].sum() for group in self.groups])

    @cached_property
    def _tokens_of_group(self) -> NDArray[np.int64]:
        return np.array([self.tokens[list(group)].sum() for group in self.groups])

    def pools(self, epoch: int) -> list[Pool]:
        """The epoch's pools in order: row groups shuffled by (seed, epoch), then gathered up to ``pool_tokens``."""
        order = _generator(self.seed, epoch, _ORDER_OF_GROUPS).permutation(len(self.groups))
        pools: list[Pool] = []
        gathered: list[int] = []
        first = size = 0
        for group in order.tolist():
            gathered.append(group)
            size += int(self._tokens_of_group[group])
            if size >= self.pool_tokens or group == order[-1]:
                pools.append(Pool(tuple(gathered), first))
                first += int(self._windows_of_group[gathered].sum())
                gathered, size = [], 0
        return pools

    def windows(self, epoch: int, pool: Pool) -> Windows:
        """All windows of a pool, in order."""
        members = np.concatenate([np.asarray(self.groups[group]) for group in pool.groups])
        rng = _generator(self.seed, epoch, _WINDOWS_OF_POOL, pool.first)
        segment, start = _draw_windows(members, self.tokens[members], self.window, rng)
        order = _deal(self.models[segment], rng)
        return Windows(segment[order], start[order])

    def share(self, epoch: int, pool: Pool, *, rank: int, world_size: int, first_step: int = 0) -> Windows:
        """The windows of a pool that one worker trains on, from ``first_step`` of the epoch on, in order."""
        windows = self.windows(epoch, pool)
        place = pool.first + np.arange(len(windows.start))
        slice_of_batch = place % self.batch_size // (self.batch_size // world_size)
        step = place // self.batch_size
        mine = (slice_of_batch == rank) & (step >= first_step) & (step < self.steps_per_epoch)
        return Windows(windows.segment[mine], windows.start[mine])


def window_counts(tokens: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Windows that segments of so many tokens give in an epoch."""
    return np.where(tokens == window, 1, -(-tokens // window) + (_phases(tokens, window) > 0))


def _phases(tokens: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Starts that the second window may have without the one before the last becoming the last."""
    return (tokens - 1) % window


def _draw_windows(
    segments: NDArray[np.int64], tokens: NDArray[np.int64], window: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first window, the last one, and between them boundaries every ``window`` tokens from a random phase."""
    counts = window_counts(tokens, window)
    phases = _phases(tokens, window)
    phase = np.where(phases > 0, rng.integers(1, np.maximum(phases, 1) + 1), window)
    which = np.repeat(np.arange(len(segments)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.clip(phase[which] + (number - 1) * window, 0, tokens[which] - window)
    return segments[which], start


def _deal(models: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Order that takes one window of each model in turn, models in one random order, each model's windows shuffled."""
    _, model = np.unique(models, return_inverse=True)
    turn_of_model = rng.permutation(int(model.max()) + 1)
    by_model = np.lexsort((rng.random(len(model)), model))
    sizes = np.bincount(model)
    turn = np.empty(len(model), dtype=np.int64)
    turn[by_model] = np.arange(len(model)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.lexsort((turn_of_model[model], turn))


def _generator(*seeds: int) -> np.random.Generator:
    return np.random.default_rng(seeds)


def plan_of(
    row_groups: Sequence[Sequence[int]],
    tokens: Sequence[int],
    models: Sequence[str],
    *,
    window: int,
    batch_size: int,
    pool_tokens: int,
    seed: int,
) -> Plan:
    """A plan from what a store's index says: segments a row group, tokens and model name a segment.

    Raises:
        InputError: no row group, a window longer than the shortest segment, or fewer windows than one global batch.
    """
    _, numbers = np.unique(np.asarray(models), return_inverse=True)
    plan = Plan(
        groups=tuple(tuple(group) for group in row_groups),
        tokens=np.asarray(tokens, dtype=np.int64),
        models=numbers.astype(np.int64),
        window=window,
        batch_size=batch_size,
        pool_tokens=pool_tokens,
        seed=seed,
    )
    if plan.steps_per_epoch == 0:
        raise InputError(
            f"config field pretraining.batch_size is {batch_size}, but an epoch has {plan.windows_per_epoch} windows: "
            f"set it to {plan.windows_per_epoch} or less"
        )
    return plan
