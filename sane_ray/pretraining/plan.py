"""The order in which training sees windows: a pure function of seed and epoch, the same for any number of workers.

An epoch is a random sequence of row groups, cut into pools of whole global batches; what a pool needs is in memory
together. Near-duplicates (windows and checkpoints of one model) would be false negatives of the contrastive loss, so a
model's row groups lie far apart in the sequence, and a pool's windows are dealt out to its batches one model after the
other: no batch holds two windows of a model that has no more of them in the pool than the pool has batches.

Within a batch, windows are in order of their row groups, and worker r of w takes the r-th of w equal slices: about one
w-th of a pool's row groups is all that it has to read (somewhat more where row groups share models: by the noise of
random batches, about 1 / sqrt(batch_size) of the pool).

Never reads tokens and never imports Ray.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sane_ray.errors import InputError
from sane_ray.pretraining.batch import FILLER

VERSION = 1
"""Of the order: a plan of another version has another signature."""

LARGEST_POOL = 8
"""A pool holds at most about so many times ``pool_tokens`` (or one batch), whatever batches then repeat models."""

POOLS_LOOKED_AT = 100
"""Pools that show whether batches repeat models."""

_GROUPS, _TIMES, _MODELS, _PHASES, _WINDOWS, _STEPS = range(6)  # keep the random streams of an epoch apart

Ints = NDArray[np.int64]


class Pool(NamedTuple):
    """Row groups that are read together, and the steps that are trained on them."""

    groups: tuple[int, ...]
    """Numbers of the row groups; the first and the last may also belong to the neighbouring pools, which then take
    other windows of them."""
    first_step: int
    """First step within the epoch."""
    steps: int
    """Number of steps."""


class Windows(NamedTuple):
    """Windows in the order in which training sees them; arrays of equal length."""

    segment: Ints
    """Number of the segment (a checkpoint, or a part of a large one), counted through the row groups; -1 is filler."""
    start: Ints
    """First token of the window in the segment; 0 for filler."""
    step: Ints
    """Step within the epoch."""
    slot: Ints
    """Place in the global batch, whoever computes it; -1 is filler."""


class _Sequence(NamedTuple):
    """Row groups of an epoch in order."""

    groups: Ints
    first: Ints
    """Place in the epoch of each one's first window, and at last the number of windows."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Seeded order over the windows of one split of a store.

    Windows are cut from segments: checkpoints, or the parts that large ones are stored in. Every token of every segment
    is covered in every epoch, by windows that all differ. A segment of N tokens gives ceil(N / W) + 1 windows of W
    tokens: the first, the last, and between them a run of others whose phase is drawn anew each epoch (one less where
    N - 1 is a multiple of W, since no phase is left; one if N = W).

    Every window is seen once an epoch. All batches hold ``batch_size`` windows, but for those of the last pool, which
    share evenly what is left.
    """

    starts: Ints
    """First segment of each row group, and at last the number of segments."""
    tokens: NDArray[np.int32]
    """Tokens of each segment."""
    models: NDArray[np.int32]
    """Number of the model that each segment belongs to, from 0 on without gaps."""
    window: int
    """Tokens in a window."""
    batch_size: int
    """Windows in a global batch."""
    num_pools: int
    """Pools in an epoch."""
    seed: int

    def __getstate__(self) -> dict[str, Any]:
        """What travels to other processes: the fields, not what was derived from them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def windows_per_epoch(self) -> int:
        """Windows in an epoch."""
        return int(self._windows_of_group.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return -(-self.windows_per_epoch // self.batch_size)

    @cached_property
    def signature(self) -> str:
        """Hash of all that decides the order: plans of one signature see the same windows in the same steps."""
        numbers = (VERSION, self.window, self.batch_size, self.num_pools, self.seed)
        digest = hashlib.sha256(repr(numbers).encode())
        for column, dtype in ((self.starts, "<i8"), (self.tokens, "<i4"), (self.models, "<i4")):
            digest.update(np.ascontiguousarray(column, dtype=dtype).data)
        return digest.hexdigest()

    @cached_property
    def most_of_a_model(self) -> int:
        """Bound on the windows of one model in a global batch, in the epochs that were looked at.

        1 means that no batch has two windows of a model. Looked at are the first epochs, as many as have
        ``POOLS_LOOKED_AT`` pools (one, where all epochs have the same pool); later epochs are drawn alike.
        """
        return max(int(self._repeats(epoch)[1].max()) for epoch in self._epochs_looked_at())

    def ledger(self, global_step: int) -> dict[str, int | str]:
        """What a run has seen after so many steps: kept in checkpoints, and compared when it resumes."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        return {
            "epoch": epoch,
            "step_of_epoch": step,
            "windows": epoch * self.windows_per_epoch + self._windows_before(step),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "signature": self.signature,
        }

    def segments_of(self, group: int) -> range:
        """Numbers of the segments of a row group, in stored order."""
        return range(int(self.starts[group]), int(self.starts[group + 1]))

    def groups_of(self, windows: Windows) -> list[int]:
        """The row groups that these windows are cut from, each once."""
        segments = windows.segment[windows.segment != FILLER]
        return np.unique(np.searchsorted(self.starts, segments, side="right") - 1).tolist()

    def pools(self, epoch: int) -> list[Pool]:
        """The epoch's pools in order. Their steps are the same in every epoch, their row groups are not."""
        pools = self._pools.get(epoch)
        if pools is None:
            sequence, bounds = self._sequence(epoch), self._bounds
            first = np.searchsorted(sequence.first, bounds[:-1] * self.batch_size, side="right") - 1
            last = np.searchsorted(sequence.first, np.minimum(bounds[1:] * self.batch_size, self.windows_per_epoch))
            groups = sequence.groups.tolist()
            pools = [
                Pool(tuple(groups[begin:end]), first_step, steps)
                for begin, end, first_step, steps in zip(
                    first.tolist(), last.tolist(), bounds[:-1].tolist(), np.diff(bounds).tolist(), strict=True
                )
            ]
            self._pools.clear()  # training does not go back to an earlier epoch
            self._pools[epoch] = pools
        return pools

    def windows(self, epoch: int, pool: Pool) -> Windows:
        """All windows of a pool, by step and slot."""
        segment, start, group, chance = self._windows_of_pool(epoch, pool)
        # Local numbers of models in random order: their hashes are as different as their numbers.
        _, model = np.unique(self._hash(epoch, _MODELS, self.models[segment]), return_inverse=True)
        place = _places_of_groups(model, group)[group]
        order = _one_model_after_the_other(model, place, chance, pool.steps)
        step = np.empty(len(order), dtype=np.int64)
        step[order] = self._steps(epoch, pool)[np.arange(len(order)) % pool.steps]
        order = np.lexsort((place, step))
        step = step[order]
        slot = np.arange(len(step)) - np.searchsorted(step, step)
        return Windows(segment[order], start[order], pool.first_step + step, slot)

    def share(self, epoch: int, pool: Pool, *, rank: int, world_size: int, first_step: int = 0) -> Windows:
        """One worker's rows of a pool's batches from ``first_step`` of the epoch on, step by step.

        Every step has ceil(batch_size / world_size) rows; those beyond the worker's windows are filler.
        """
        whole = self.windows(epoch, pool)
        rows = -(-self.batch_size // world_size)
        steps = np.arange(max(pool.first_step, first_step), pool.first_step + pool.steps)
        begin, end = np.searchsorted(whole.step, steps), np.searchsorted(whole.step, steps, side="right")
        mine, next_one = (begin + r * (end - begin) // world_size for r in (rank, rank + 1))
        row = mine[:, None] + np.arange(rows)
        real = (row < next_one[:, None]).ravel()
        row = np.minimum(row, len(whole.step) - 1).ravel()
        return Windows(
            segment=np.where(real, whole.segment[row], FILLER),
            start=np.where(real, whole.start[row], 0),
            step=np.repeat(steps, rows),
            slot=np.where(real, whole.slot[row], FILLER),
        )

    @cached_property
    def _pools(self) -> dict[int, list[Pool]]:
        return {}

    @cached_property
    def _sequences(self) -> dict[int, _Sequence]:
        return {}

    @cached_property
    def _windows_of_group(self) -> Ints:
        return np.add.reduceat(window_counts(self.tokens, self.window), self.starts[:-1], dtype=np.int64)

    @cached_property
    def _home(self) -> Ints:
        """Model that each row group counts as: the one of its models with most windows."""
        counts = window_counts(self.tokens, self.window)
        size = np.bincount(self.models, weights=counts).astype(np.int64)[self.models]
        largest = np.maximum.reduceat(size * len(size) + np.arange(len(size)), self.starts[:-1]) % len(size)
        return self.models[largest].astype(np.int64)

    @cached_property
    def _bounds(self) -> Ints:
        """First step of each pool, and at last the number of steps: pools are as equal as they can be."""
        return np.arange(self.num_pools + 1) * self.steps_per_epoch // self.num_pools

    def _windows_before(self, step: int) -> int:
        """Windows of an epoch's first ``step`` steps."""
        last = int(self._bounds[-2])
        even, more = divmod(self.windows_per_epoch - last * self.batch_size, self.steps_per_epoch - last)
        beyond = max(0, step - last)
        return min(step, last) * self.batch_size + beyond * even + min(beyond, more)

    def _sequence(self, epoch: int) -> _Sequence:
        """Row groups by random time in the epoch, those of one model at equal distances.

        A row group of several models counts as that one's which has most windows in the epoch.
        """
        sequence = self._sequences.get(epoch)
        if sequence is None:
            home = self._home
            order = np.argsort(self._hash(epoch, _GROUPS, np.arange(len(home))))
            order = order[np.argsort(home[order], kind="stable")]
            home = home[order]
            begin = np.searchsorted(home, home)
            count = np.searchsorted(home, home, side="right") - begin
            time = self._hash(epoch, _TIMES, home) / 2.0**64 + (np.arange(len(home)) - begin) / count
            groups = order[np.argsort(time % 1, kind="stable")]
            sequence = _Sequence(groups, np.append(0, np.cumsum(self._windows_of_group[groups])))
            self._sequences.clear()
            self._sequences[epoch] = sequence
        return sequence

    def _windows_of_pool(self, epoch: int, pool: Pool) -> tuple[Ints, Ints, Ints, NDArray[np.uint64]]:
        """Segment, start, row group (its place in the pool's list) and a random number of each window of a pool.

        A row group's windows are in random order, so that pools which share it take other ones each epoch.
        """
        groups = np.array(pool.groups)
        sizes = self.starts[groups + 1] - self.starts[groups]
        segments = np.repeat(self.starts[groups], sizes) + _counted(sizes)
        segment, start = self._draw_windows(epoch, segments)
        group = np.repeat(np.arange(len(groups)), self._windows_of_group[groups])
        chance = self._hash(epoch, _WINDOWS, segment, start)
        first = self._sequence(epoch).first
        begin = pool.first_step * self.batch_size
        skipped = begin - int(first[np.searchsorted(first, begin, side="right") - 1])
        order = np.lexsort((chance, group))[skipped : skipped + pool.steps * self.batch_size]
        return segment[order], start[order], group[order], chance[order]

    def _draw_windows(self, epoch: int, segments: Ints) -> tuple[Ints, Ints]:
        """The first window, the last one, and between them boundaries every ``window`` tokens from a random phase."""
        tokens = self.tokens[segments].astype(np.int64)
        counts = window_counts(tokens, self.window)
        phases = _phases(tokens, self.window)
        drawn = self._hash(epoch, _PHASES, segments) % np.maximum(phases, 1).astype(np.uint64)
        phase = np.where(phases > 0, drawn.astype(np.int64) + 1, self.window)
        which = np.repeat(np.arange(len(segments)), counts)
        start = np.clip(phase[which] + (_counted(counts) - 1) * self.window, 0, tokens[which] - self.window)
        return segments[which], start

    def _steps(self, epoch: int, pool: Pool) -> Ints:
        """Order of a pool's batches, the fuller ones (of a last pool) first."""
        left = self.windows_per_epoch - pool.first_step * self.batch_size
        fuller = min(left, pool.steps * self.batch_size) % pool.steps
        chance = self._hash(epoch, _STEPS, pool.first_step + np.arange(pool.steps))
        return np.concatenate([np.argsort(chance[:fuller]), fuller + np.argsort(chance[fuller:])])

    def _hash(self, epoch: int, stream: int, *numbers: NDArray[Any]) -> NDArray[np.uint64]:
        """Random 64-bit numbers that depend on nothing but seed, epoch, stream and the numbers themselves.

        Numpy's generators may change with its version; an order must not. Different last numbers give different results
        (splitmix64 is a bijection; Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
        """
        state: NDArray[np.uint64]
        state = np.random.SeedSequence((self.seed, epoch, stream)).generate_state(1, np.uint64)  # type: ignore[assignment]
        for number in numbers:
            state = (state ^ number.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
        return state

    def _repeats_no_more_than(self, least: Ints) -> bool:
        """Whether no batch of the epochs looked at holds more windows of a model than ``least`` says."""
        repeats = (self._repeats(epoch) for epoch in self._epochs_looked_at())
        return all(bool(np.all(bounds <= least[model])) for model, bounds in repeats)

    def _epochs_looked_at(self) -> range:
        return range(1 if self.num_pools == 1 else -(-POOLS_LOOKED_AT // self.num_pools))

    def _repeats(self, epoch: int) -> tuple[Ints, Ints]:
        """Models of each pool of an epoch, and bounds on their windows in one of its batches.

        Row groups that pools share count wholly in each of them.
        """
        sequence = self._sequence(epoch)
        first, last = np.empty((2, len(sequence.groups)), dtype=np.int64)
        for pool, place in ((first, sequence.first[:-1]), (last, sequence.first[1:] - 1)):
            pool[sequence.groups] = np.searchsorted(self._bounds, place // self.batch_size, side="right") - 1
        sizes = np.diff(self.starts)
        times = np.repeat(last - first + 1, sizes)
        pool = np.repeat(np.repeat(first, sizes), times) + _counted(times)
        counts = window_counts(self.tokens, self.window)
        models, most = int(self.models.max()) + 1, int(counts.max()) + 1
        # One number that sorts by pool and model and says the windows: far faster than to sort three columns.
        packed = np.sort((pool * models + np.repeat(self.models, times)) * most + np.repeat(counts, times))
        key, counts = np.divmod(packed, most)
        runs = np.flatnonzero(np.diff(key, prepend=-1))
        pool, model = np.divmod(key[runs], models)
        repeats = -(-np.add.reduceat(counts, runs) // np.diff(self._bounds)[pool])
        return model, np.minimum(repeats, self.batch_size)


def window_counts(tokens: NDArray[Any], window: int) -> Ints:
    """Windows that segments of so many tokens give in an epoch."""
    return np.where(tokens == window, 1, -(-tokens // window) + (_phases(tokens, window) > 0)).astype(np.int64)


def _phases(tokens: NDArray[Any], window: int) -> NDArray[Any]:
    """Starts that the second window may have without the one before the last becoming the last."""
    return (tokens - 1) % window


def _counted(sizes: Ints) -> Ints:
    """0, 1, ... for each size, one after the other."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _numbered(models: NDArray[Any]) -> NDArray[np.int32]:
    """Models as numbers from 0 on without gaps, in the order of their names or numbers."""
    if models.dtype.kind in "iu" and models.min() == 0 and models.max() < len(models) and np.bincount(models).min() > 0:
        return models.astype(np.int32)
    return np.unique(models, return_inverse=True)[1].astype(np.int32)


def _places_of_groups(model: Ints, group: Ints) -> Ints:
    """Order of a pool's row groups in which those of one model lie together: by the smallest number of their models."""
    begin = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    place = np.empty(len(begin), dtype=np.int64)
    place[np.argsort(np.minimum.reduceat(model, begin), kind="stable")] = np.arange(len(begin))
    return place


def _one_model_after_the_other(model: Ints, place: Ints, chance: NDArray[np.uint64], steps: int) -> Ints:
    """Order of a pool's windows, every ``steps``-th of which make a batch: models by the mean place of their groups."""
    mean = np.bincount(model, weights=place) / np.bincount(model)
    return np.lexsort((chance, model, mean[model]))


def plan_of(
    group_sizes: Sequence[int],
    tokens: ArrayLike,
    models: ArrayLike,
    *,
    window: int,
    batch_size: int,
    pool_tokens: int,
    seed: int,
) -> Plan:
    """A plan from what a store's index says.

    The number of pools is such that one holds about ``pool_tokens``, or up to ``LARGEST_POOL`` times as much where
    batches would otherwise hold more windows of a model than they must: one, if it has no more windows than the epoch
    has batches.

    Args:
        group_sizes: Segments in each row group.
        tokens: Tokens of each segment, counted through the row groups.
        models: Name or number of the model of each segment; numbers are much faster where there are millions.
        window: Tokens in a window.
        batch_size: Windows in a global batch.
        pool_tokens: Tokens to hold in memory together.
        seed: Of the order.

    Raises:
        InputError: no row group, a window longer than the shortest segment, or fewer windows than one global batch.
    """
    lengths = np.asarray(tokens, dtype=np.int32)
    if len(lengths) == 0:
        raise InputError("the token store has no training checkpoints: prepare it with a larger tokens.split[0]")
    if window > (shortest := int(lengths.min())):
        raise InputError(
            f"config field autoencoder.window is {window}, but the shortest model (or segment of one) of the "
            f"store has {shortest} tokens: set it to {shortest} or less"
        )
    counts = window_counts(lengths, window)
    if batch_size > (windows := int(counts.sum())):
        raise InputError(
            f"config field pretraining.batch_size is {batch_size}, but an epoch has {windows} windows: "
            f"set it to {windows} or less"
        )
    numbers = _numbered(np.asarray(models))
    starts = np.append(0, np.cumsum(group_sizes)).astype(np.int64)
    plan = Plan(starts, lengths, numbers, window=window, batch_size=batch_size, num_pools=1, seed=seed)
    least = -(-np.bincount(numbers, weights=counts).astype(np.int64) // plan.steps_per_epoch)
    wanted = -(-int(lengths.sum(dtype=np.int64)) // pool_tokens)
    for factor in (1, 2, 4, LARGEST_POOL):
        plan = replace(plan, num_pools=min(math.ceil(wanted / factor), plan.steps_per_epoch))
        if plan._repeats_no_more_than(least):
            break
    return plan
