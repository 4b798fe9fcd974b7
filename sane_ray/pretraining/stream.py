"""Windows of a token store as a stream of batches: Ray Data reads what the plan orders, one execution for all epochs.

Each training worker runs its own stream over its share of the plan and gets its rows in exactly that order. Never
decides an order itself, and never holds more than a pool of row groups.

The windows are cut and permuted in one task beside the worker, on the worker's node. It asks the cluster for no CPU:
the worker reserves those of its stream with its own, so neither can wait for the other, nor for another worker's.

Shapes: B windows, W tokens in a window, T values in a token.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from sane_ray.config import AugmentationConfig
from sane_ray.errors import InputError
from sane_ray.pretraining.batch import FILLER, Batch
from sane_ray.pretraining.plan import Plan, Windows, plan_of, window_counts
from sane_ray.pretraining.views import Mover, Permuted
from sane_ray.tokens.store import Segment, TokenStore
from sane_ray.tokens.store.reading import RAW_DTYPES, RowGroup
from sane_ray.tokens.tokenizer import LayerTable

BLOCK_BYTES = 32e6
"""Size of the blocks of windows that the reading task hands on, to whole steps. Each waits some 50 ms on its way;
arrays beyond 32 MiB get new pages from the system each time."""

BUFFER_BYTES = 512e6
"""Blocks that wait for the worker, in the shared memory of its node. Without a limit Ray Data takes a share of the
memory of all nodes for each stream."""

MOST_ITEMS = 1024
"""Work items that an execution of many epochs starts from, however many pools these have."""

RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64)
"""Waits between attempts to read while the storage is away."""

Columns = dict[str, NDArray[Any]]
"""A block of windows of whole steps, a row each: view_1 [B, W, T], perhaps view_2, signal [B, W], positions [B, W, 3],
slot [B], checkpoint [B]."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def plan_of_store(
    store: TokenStore, split: str, *, window: int, batch_size: int, pool_mb: float, seed: int
) -> tuple[Plan, list[RowGroup]]:
    """The plan over one split of a store, and the row groups that its indices mean."""
    groups = store.row_groups(split)
    segments = [segment for group in groups for segment in group.segments]
    names = pc.dictionary_encode(store.models["model"].combine_chunks()).indices.to_numpy()
    plan = plan_of(
        [len(group.segments) for group in groups],
        [segment.tokens for segment in segments],
        names[[segment.checkpoint for segment in segments]],
        window=window,
        batch_size=batch_size,
        pool_tokens=max(1, int(pool_mb * 1e6 / (store.token_size * RAW_DTYPES[store.dtype].itemsize))),
        seed=seed,
    )
    return plan, groups


def windows_of_split(store: TokenStore, split: str, window: int) -> int:
    """Windows that an epoch over a split has; 0 where the split is empty."""
    tokens = [segment.tokens for group in store.row_groups(split) for segment in group.segments]
    return int(window_counts(np.array(tokens), window).sum()) if tokens else 0


class Part(NamedTuple):
    """Pools ``begin`` to ``end`` of an epoch."""

    epoch: int
    begin: int
    end: int


def parts_of(plan: Plan, epochs: int, first_step: int) -> list[Part]:
    """The work of all epochs from that of global step ``first_step`` on, in order, in about ``MOST_ITEMS`` at most."""
    left = range(first_step // plan.steps_per_epoch, epochs)
    size = -(-plan.num_pools * len(left) // MOST_ITEMS)
    pools = range(0, plan.num_pools, size) if left else ()
    return [Part(epoch, begin, min(begin + size, plan.num_pools)) for epoch in left for begin in pools]


@dataclass(frozen=True)
class WindowReader:
    """Reads pools of row groups and cuts the windows that one worker trains on, in one view or both."""

    store: Path
    plan: Plan
    groups: list[RowGroup]
    augmentation: AugmentationConfig
    rank: int
    world_size: int
    views: int = 2
    """How many views of a window are computed; of 1, the second is not sent, and a batch's is the first."""

    @property
    def rows(self) -> int:
        """Rows of this worker's batches, filler included."""
        return -(-self.plan.batch_size // self.world_size)

    def bytes_a_row(self, store: TokenStore) -> int:
        """Of a row of a block."""
        views = 1 + (self._kinds[1] is not None)
        return self.plan.window * (views * store.token_size * RAW_DTYPES[store.dtype].itemsize + 16) + 16

    def steps_a_block(self, store: TokenStore) -> int:
        """Steps of which the windows are handed on together."""
        return max(1, int(BLOCK_BYTES / (self.rows * self.bytes_a_row(store))))

    def blocks(
        self, parts: Mapping[str, NDArray[np.int64]], first_step: int = 0, skip: frozenset[int] = frozenset()
    ) -> Iterator[Columns]:
        """Ray Data stage: a batch of parts in, blocks of windows out, in the plan's order."""
        store = patiently(functools.partial(_opened, self.store), self.store)
        for part in zip(*(parts[name] for name in Part._fields), strict=True):
            yield from self.read(store, Part(*map(int, part)), first_step, skip)

    def read(
        self, store: TokenStore, part: Part, first_step: int = 0, skip: frozenset[int] = frozenset()
    ) -> Iterator[Columns]:
        """Blocks of this worker's windows of some pools, without global steps before ``first_step`` or in ``skip``."""
        begin = part.epoch * self.plan.steps_per_epoch
        first_step = max(0, first_step - begin)
        for pool in self.plan.pools(part.epoch)[part.begin : part.end]:
            if pool.first_step + pool.steps > first_step:
                share = self.plan.share(
                    part.epoch, pool, rank=self.rank, world_size=self.world_size, first_step=first_step
                )
                yield from self.cut(store, part.epoch, _where(~np.isin(share.step + begin, list(skip)), share))

    def cut(self, store: TokenStore, epoch: int, share: Windows) -> Iterator[Columns]:
        """Blocks of these windows of a pool: reads the row groups that they are cut from, and no other."""
        wanted = set(share.segment.tolist())
        found: dict[int, _Tokens] = {}
        for group in self.plan.groups_of(share):
            stored = patiently(functools.partial(store.read_row_group, self.groups[group]), self.store)
            numbered = zip(self.plan.segments_of(group), stored, strict=True)
            found |= {number: self._tokens(store, epoch, *one) for number, one in numbered if number in wanted}
        size = self.steps_a_block(store) * self.rows
        for begin in range(0, len(share.step), size):
            yield self._block(store, found, Windows(*(column[begin : begin + size] for column in share)))

    @property
    def _kinds(self) -> tuple[str, str | None]:
        """Of the two views; the second is None where it is the same as the first, or nobody computes it."""
        view_1, view_2 = self.augmentation.view_1, self.augmentation.view_2
        return view_1, None if self.views == 1 or view_1 == view_2 == "canonical" else view_2

    def _tokens(self, store: TokenStore, epoch: int, segment: Segment, values_NT: NDArray[Any]) -> _Tokens:
        """A segment as both views show it. A part of a checkpoint has not all the channels that would change places."""
        architecture = store.architecture_of(segment.checkpoint)
        moves = segment.tokens == architecture.table.num_tokens and not architecture.symmetry.is_trivial
        mover = _mover(store, architecture.name) if moves and "permuted" in self._kinds else None
        movers = tuple(mover if kind == "permuted" else None for kind in self._kinds)
        return _Tokens(segment, architecture.table, values_NT, movers, (self.plan.seed, self.augmentation.seed, epoch))

    def _block(self, store: TokenStore, found: Mapping[int, _Tokens], windows: Windows) -> Columns:
        """One block: contiguous arrays, each value written once."""
        B, W = len(windows.slot), self.plan.window
        views = ["view_1"] + ["view_2"] * (self._kinds[1] is not None)
        bits = _carried(RAW_DTYPES[store.dtype])
        columns: Columns = {name: np.empty((B, W, store.token_size), bits) for name in views}
        columns |= {"signal": np.empty((B, W), np.int32), "positions": np.empty((B, W, 3), np.int32)}
        columns |= {"slot": windows.slot, "checkpoint": np.full(B, FILLER)}
        for name in (*views, "signal", "positions"):
            columns[name][windows.segment == FILLER] = 0
        for row in np.flatnonzero(windows.segment != FILLER).tolist():
            tokens, start = found[int(windows.segment[row])], int(windows.start[row])
            for view, name in enumerate(views):
                tokens.cut(view, start, columns[name][row])
            first = tokens.segment.first + start
            columns["signal"][row] = tokens.table.signal_of(first, first + W)
            columns["positions"][row] = tokens.table.positions_of(first, first + W)
            columns["checkpoint"][row] = tokens.segment.checkpoint
        return columns


@dataclass
class _Tokens:
    """A segment with all that is needed to cut windows of it."""

    segment: Segment
    table: LayerTable
    """Of its architecture."""
    values_NT: NDArray[Any]
    """As stored."""
    movers: tuple[Mover | None, ...]
    """What permutes it in each view, if anything."""
    seeds: tuple[int, int, int]
    """Of the plan, of the augmentation, and the epoch."""
    permuted: dict[int, Permuted] = field(default_factory=dict)
    """By view; drawn when the first window is cut."""

    def cut(self, view: int, start: int, out_WT: NDArray[Any]) -> None:
        """Writes the bits of a window of a view, 0 or 1, into ``out_WT``."""
        out_WT = out_WT.view(self.values_NT.dtype)
        mover = self.movers[view]
        if mover is None:
            out_WT[:] = self.values_NT[start : start + len(out_WT)]
            return
        if view not in self.permuted:
            rng = np.random.default_rng((*self.seeds, view + 1, self.segment.checkpoint))
            self.permuted[view] = Permuted(self.values_NT, mover, rng)
        self.permuted[view].cut(start, out_WT)


@functools.lru_cache(maxsize=64)
def _mover(store: TokenStore, architecture: str) -> Mover:
    """What permutes networks of one of the store's architectures; made once a process."""
    found = store.architectures[architecture]
    return Mover(found.table, found.symmetry)


@functools.lru_cache(maxsize=2)
def _opened(path: Path) -> TokenStore:
    """The store, whose index a process reads once; a store never changes."""
    return TokenStore.open(path)


def patiently(read: Callable[[], _T], store: Path, waits: Sequence[float] = RETRY_SECONDS) -> _T:
    """Calls ``read`` again, after each of ``waits`` seconds, as long as the storage seems to be away.

    Raises:
        InputError: what ``read`` raised at last, or at once where the storage is there and the file is damaged.
    """
    for wait in waits:
        try:
            return read()
        except (OSError, InputError) as error:
            if not _is_away(error, store):
                raise
            _log.warning("the token store cannot be read (%s): trying again in %g s", error, wait)
            time.sleep(wait)
    return read()


def _is_away(error: BaseException, store: Path) -> bool:
    """Whether the system refused to read: damaged contents are errors of pyarrow, which have no number."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return (isinstance(cause, OSError) and cause.errno is not None) or not store.is_dir()


def stream(
    reader: WindowReader,
    *,
    epochs: int,
    first_step: int,
    skip: frozenset[int] = frozenset(),
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """This worker's batches from global step ``first_step`` to the end of the last epoch, in the plan's order.

    One Ray Data execution reads all epochs, so its start-up is paid once. Closing the iterator ends the execution.

    Args:
        reader: What to read, and for which worker.
        epochs: Epochs of the whole run.
        first_step: Steps that are left out at the beginning.
        skip: Global steps whose batches are left out as well.
        device: Where the batches are wanted; on a GPU they are copied while the one before is worked on.
    """
    device = device or torch.device("cpu")
    with contextlib.closing(_batches(reader, epochs, first_step, skip, pin=device.type == "cuda")) as batches:
        yield from batches if device.type != "cuda" else _ahead(batches, device)


def _batches(
    reader: WindowReader, epochs: int, first_step: int, skip: frozenset[int], pin: bool
) -> Generator[Batch, None, None]:
    parts = parts_of(reader.plan, epochs, first_step)
    if not parts:
        return
    store = TokenStore.open(reader.store)
    dtype = _DTYPES[store.dtype]
    for columns in whole_steps(_execution(reader, store, parts, first_step, skip), reader.rows):
        yield to_batch(columns, dtype, pin)


def whole_steps(blocks: Iterable[Columns], rows: int) -> Iterator[Columns]:
    """Steps of so many rows, from blocks that Ray Data may have joined or cut on the way."""
    rest: Columns = {}
    for block in blocks:
        columns = {name: np.concatenate([rest[name], column]) for name, column in block.items()} if rest else block
        count = len(columns["slot"])
        for begin in range(0, count - rows + 1, rows):
            yield _rows(columns, begin, begin + rows)
        rest = _rows(columns, count - count % rows, count) if count % rows else {}


def _rows(columns: Columns, begin: int, end: int) -> Columns:
    return {name: column[begin:end] for name, column in columns.items()}


def _execution(
    reader: WindowReader, store: TokenStore, parts: list[Part], first_step: int, skip: frozenset[int]
) -> Iterable[Columns]:
    """Blocks of whole steps, read and cut by Ray Data a little ahead of whoever iterates."""
    import ray
    import ray.data

    # As many tasks as there are blocks to fill, so that short epochs do not cost a task each.
    steps = len({part.epoch for part in parts}) * reader.plan.steps_per_epoch
    tasks = max(1, min(len(parts), MOST_ITEMS, steps // reader.steps_a_block(store)))
    blocks = ray.data.from_items([part._asdict() for part in parts], override_num_blocks=tasks).map_batches(
        reader.blocks,
        fn_kwargs={"first_step": first_step, "skip": skip},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.TaskPoolStrategy(size=1),
        # No CPU: the worker reserves it. On the worker's node, or where that one takes no tasks any more, anywhere.
        num_cpus=0,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        fallback_strategy=[{"label_selector": {}}],
    )
    context = blocks.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=BUFFER_BYTES
    )
    # Ray Data hands a block on once it is larger than this, and cuts it in two at one and a half times as much.
    context.target_max_block_size = int(0.9 * reader.steps_a_block(store) * reader.rows * reader.bytes_a_row(store))
    context.enable_progress_bars = False
    # Else Ray Data fails after half an hour in which the worker took nothing, as slow steps or hung storage make it.
    context.execution_no_progress_timeout_s = -1
    return cast(Iterable[Columns], blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a GPU, the next one read and copied by a thread and a stream of its own meanwhile."""
    copies = torch.cuda.Stream(device)

    def copied() -> tuple[Batch, torch.cuda.Event] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(copies):
            return batch.to(device), copies.record_event()

    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(copied)
        while (arrived := coming.result()) is not None:
            coming = thread.submit(copied)
            batch, event = arrived
            here = torch.cuda.current_stream(device)
            here.wait_event(event)
            for each in fields(batch):
                getattr(batch, each.name).record_stream(here)  # its memory is not used again before here is done
            yield batch


def fixed_batches(reader: WindowReader, batches: int) -> list[Batch]:
    """This worker's part of the first ``batches`` global batches of the plan's epoch 0, read at once into memory.

    Only the row groups that they are cut from are read, by every worker at every start.
    """
    store = TokenStore.open(reader.store)
    dtype, plan = _DTYPES[store.dtype], reader.plan
    found: list[Batch] = []
    for pool in (pool for pool in plan.pools(0) if pool.first_step < batches):
        share = plan.share(0, pool, rank=reader.rank, world_size=reader.world_size)
        for columns in reader.cut(store, 0, _where(share.step < batches, share)):
            whole = to_batch(columns, dtype)
            found += [whole.rows(begin, begin + reader.rows) for begin in range(0, len(whole), reader.rows)]
    return found


def _where(kept: NDArray[np.bool_], windows: Windows) -> Windows:
    return Windows(*(column[kept] for column in windows))


def to_batch(columns: Columns, dtype: torch.dtype, pin: bool = False) -> Batch:
    """Columns of a block as tensors of their own memory, pinned if wanted; a missing second view is the first."""
    tensors = {name: _own(column, pin) for name, column in columns.items()}
    for name in {"view_1", "view_2"} & set(tensors):
        tensors[name] = tensors[name].view(dtype)
    return Batch(**{"view_2": tensors["view_1"]} | tensors)


def _own(column: NDArray[Any], pin: bool) -> torch.Tensor:
    """A copy: Ray's blocks are read-only memory that other processes share."""
    tensor = torch.empty(column.shape, dtype=getattr(torch, column.dtype.name), pin_memory=pin)
    tensor.numpy()[...] = column
    return tensor


def _carried(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Number format of values on their way: half precision as its bits, since Arrow has no bfloat16."""
    return np.dtype(np.uint16) if dtype.itemsize == 2 else dtype
