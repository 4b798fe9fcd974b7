"""Windows of a token store as a stream of batches: Ray Data reads what the plan orders, one execution for all epochs.

Each training worker runs its own stream over its share of the plan and gets its rows in exactly that order. Never
decides an order itself, and never holds more than a pool of row groups.

Shapes: B windows, W tokens in a window, T values in a token.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from sane_ray.config import AugmentationConfig
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.plan import Plan, Windows, plan_of, window_counts
from sane_ray.tokens.store import Segment, TokenStore
from sane_ray.tokens.symmetry import gather_indices, random_permutations

ROWS_A_BLOCK = 512
"""Windows that the reading stage hands on at once."""

MOST_BLOCKS = 1024
"""Blocks of pool numbers that an execution starts from, however many pools its epochs have."""

Columns = dict[str, NDArray[Any]]
"""A block of windows, a row each: view_1 [B, W, T], perhaps view_2, signal [B, W], positions [B, W, 3]."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def plan_of_store(
    store: TokenStore, split: str, *, window: int, batch_size: int, pool_mb: float, seed: int
) -> tuple[Plan, list[Any]]:
    """The plan over one split of a store, and the row groups that its indices mean."""
    groups = store.row_groups(split)
    models = store.models["model"].to_pylist()
    segments = [segment for group in groups for segment in group.segments]
    numbers = iter(range(len(segments)))
    bytes_a_token = store.token_size * _DTYPES[store.dtype].itemsize
    plan = plan_of(
        [[next(numbers) for _ in group.segments] for group in groups],
        [segment.tokens for segment in segments],
        [models[segment.checkpoint] for segment in segments],
        window=window,
        batch_size=batch_size,
        pool_tokens=max(1, int(pool_mb * 1e6 / bytes_a_token)),
        seed=seed,
    )
    return plan, groups


def windows_of_split(store: TokenStore, split: str, window: int) -> int:
    """Windows that an epoch over a split has; 0 where the split is empty."""
    tokens = [segment.tokens for group in store.row_groups(split) for segment in group.segments]
    return int(window_counts(np.array(tokens), window).sum()) if tokens else 0


@dataclass(frozen=True)
class WindowReader:
    """Reads pools of row groups and cuts the windows that one worker trains on, both views of each."""

    store: Path
    plan: Plan
    groups: list[Any]
    augmentation: AugmentationConfig
    rank: int
    world_size: int

    def blocks(self, pools: Mapping[str, NDArray[np.int64]]) -> Iterator[Columns]:
        """Ray Data stage: a batch of pool numbers in, blocks of windows out, in the plan's order."""
        store = _opened(self.store)
        for epoch, number, first_step in zip(pools["epoch"], pools["pool"], pools["first_step"], strict=True):
            yield from self.read(store, int(epoch), int(number), int(first_step))

    def read(self, store: TokenStore, epoch: int, number: int, first_step: int) -> Iterator[Columns]:
        """Blocks of this worker's windows of one pool of one epoch."""
        pool = self.plan.pools(epoch)[number]
        share = self.plan.share(epoch, pool, rank=self.rank, world_size=self.world_size, first_step=first_step)
        if len(share.start) == 0:
            return
        wanted = set(share.segment.tolist())
        parts: dict[int, _Part] = {}
        for group in pool.groups:
            stored = zip(self.plan.groups[group], store.read_row_group(self.groups[group]), strict=True)
            parts |= {number: _Part(*part) for number, part in stored if number in wanted}
        for begin in range(0, len(share.start), ROWS_A_BLOCK):
            yield self._cut(store, parts, Windows(*(column[begin : begin + ROWS_A_BLOCK] for column in share)), epoch)

    def _cut(self, store: TokenStore, parts: dict[int, _Part], windows: Windows, epoch: int) -> Columns:
        W = self.plan.window
        pairs = [(parts[n], s) for n, s in zip(windows.segment.tolist(), windows.start.tolist(), strict=True)]
        kinds = {"view_1": self.augmentation.view_1, "view_2": self.augmentation.view_2}
        if kinds["view_2"] == "canonical" == kinds["view_1"]:
            del kinds["view_2"]  # the same windows: not sent twice
        columns = {}
        for number, (view, kind) in enumerate(kinds.items(), start=1):
            cuts = [
                self._permuted(store, part, start, (epoch, number))
                if kind == "permuted" and _is_whole(store, part.segment)
                else part.values[start : start + W]
                for part, start in pairs
            ]
            columns[view] = _as_bits(np.stack(cuts))
        places = [(store.architecture_of(p.segment.checkpoint).table, p.segment.first + s) for p, s in pairs]
        columns["signal"] = np.stack([table.signal_of(s, s + W) for table, s in places])
        columns["positions"] = np.stack([table.positions_of(s, s + W) for table, s in places])
        return columns

    def _permuted(self, store: TokenStore, part: _Part, start: int, stream: tuple[int, int]) -> NDArray[Any]:
        """A window of the network after a random symmetry, drawn from (seed, epoch, view, checkpoint, start).

        Normalisation is affine per layer and so commutes with the permutation of channels.
        """
        checkpoint = part.segment.checkpoint
        architecture = store.architecture_of(checkpoint)
        rng = np.random.default_rng((self.plan.seed, *stream, checkpoint, start))
        permutations = random_permutations(architecture.symmetry, rng)
        stop = start + self.plan.window
        indices = gather_indices(architecture.table, architecture.symmetry, permutations, start=start, stop=stop)
        return part.values.reshape(-1).take(indices).reshape(self.plan.window, -1)


class _Part(NamedTuple):
    """A segment and its stored values [tokens, T]."""

    segment: Segment
    values: NDArray[Any]


def _is_whole(store: TokenStore, segment: Segment) -> bool:
    """Whether a segment is a whole checkpoint: a part of one has not all the channels that would change places."""
    return segment.tokens == store.architecture_of(segment.checkpoint).table.num_tokens


@functools.lru_cache(maxsize=2)
def _opened(path: Path) -> TokenStore:
    """The store, whose index a process reads once; a store never changes."""
    return TokenStore.open(path)


def stream(
    reader: WindowReader, *, epochs: int, first_step: int, data_cpus: float, prefetch_batches: int = 2
) -> Generator[Batch, None, None]:
    """This worker's batches from global step ``first_step`` to the end of the last epoch, in the plan's order.

    One Ray Data execution reads all epochs, so its start-up is paid once. Closing the iterator ends the execution.
    """
    import ray.data

    steps = reader.plan.steps_per_epoch
    items = [
        {"epoch": epoch, "pool": pool, "first_step": first_step % steps if epoch == first_step // steps else 0}
        for epoch in range(first_step // steps, epochs)
        for pool in range(len(reader.plan.pools(epoch)))
    ]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS)).map_batches(
        reader.blocks,
        batch_size=1,
        batch_format="numpy",
        num_cpus=data_cpus,
        # A task that waits for its reader keeps its CPUs: with more than one a worker could starve the others' streams,
        # and all of them would wait for each other in the next collective.
        compute=ray.data.TaskPoolStrategy(size=1),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    rows = reader.plan.batch_size // reader.world_size
    dtype = _DTYPES[TokenStore.open(reader.store).dtype]
    batches = dataset.iter_batches(
        batch_size=rows, batch_format="numpy", prefetch_batches=prefetch_batches, drop_last=True
    )
    for columns in batches:
        yield to_batch(cast(Columns, columns), dtype)


def fixed_batches(reader: WindowReader, batches: int) -> list[Batch]:
    """This worker's part of the first ``batches`` global batches of the plan's epoch 0, read at once into memory."""
    store = TokenStore.open(reader.store)
    rows = reader.plan.batch_size // reader.world_size
    blocks: list[Columns] = []
    for number in range(len(reader.plan.pools(0))):
        blocks += reader.read(store, 0, number, 0)
        if sum(len(block["signal"]) for block in blocks) >= batches * rows:
            break
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    whole = to_batch(columns, _DTYPES[store.dtype])
    return [whole.rows(i * rows, (i + 1) * rows) for i in range(batches)]


def to_batch(columns: Columns, dtype: torch.dtype) -> Batch:
    """Columns of a block as tensors; a missing second view is the first."""
    view_1 = _from_bits(columns["view_1"], dtype)
    view_2 = _from_bits(columns["view_2"], dtype) if "view_2" in columns else view_1
    signal, positions = (_from_bits(columns[name], torch.int32) for name in ("signal", "positions"))
    return Batch(view_1, view_2, signal, positions)


def _as_bits(column: NDArray[Any]) -> NDArray[Any]:
    """Half-precision values as their bits: Arrow tensors then need no type that some reader lacks."""
    return column.view(np.uint16) if column.dtype == np.float16 else column


def _from_bits(column: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(np.require(column, requirements=["C", "W"]))  # Ray's blocks may be read-only
    return tensor.view(dtype) if tensor.dtype == torch.uint16 else tensor
