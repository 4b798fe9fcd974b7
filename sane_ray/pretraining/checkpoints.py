"""Checkpoints of a run: written beside training, kept by number, checked when read; the newest sound one counts.

``<folder>/step_000000123/`` holds each rank's shards (``__0_0.distcp``), their index (``.metadata``) and, written last,
``complete.json``: a folder without it is no checkpoint. A second checkpoint of one step is ``step_000000123_2``. The
folder must lie on storage that all ranks share, inside the run's folder; if that is missing, storage counts as away.

What a crash costs: ``begin`` waits for the write before it, so that the newest complete checkpoint is never older than
the last but one ``begin``. At most two intervals of training are lost, one if the write was over; a write that storage
refuses is dropped with a warning and costs one more. ``save`` returns only when its checkpoint is complete.

All ranks call the same methods in the same order. They talk over a gloo group of their own, so that a write in the
background never meets the collectives of training. Nothing but folders named ``step_*`` is ever renamed or deleted.
Storage that neither answers nor fails (a hard mount) makes the next ``begin`` wait as long.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
import time
import uuid
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from sane_ray.errors import InputError
from sane_ray.pretraining.checkpoint_files import (
    METADATA_FILE,
    StrictReader,
    SummedWriter,
    TensorsOnly,
    crc32_of,
    misfit,
    storage_failure,
)
from sane_ray.pretraining.state import TrainingState

MANIFEST = "complete.json"
"""A checkpoint is complete when this file is there."""

FORMAT = "sane_ray checkpoint"
FORMAT_VERSION = 1

_NAME = re.compile(r"step_(\d{9,})(?:_(\d+))?(\.damaged)?")
_LONGEST_PAUSE_S = 30.0
_READS = 3
"""Attempts to read a file before its checkpoint counts as damaged, while the folder itself can be read."""
_LOOKS, _LOOK_S = 40, 0.25
"""How often, and how many seconds apart, a rank looks for what another wrote."""

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class StorageAway(OSError):
    """Storage failed on at least one rank; every rank raises it."""


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(
        self, folder: Path, *, keep: int = 2, rank: int = 0, world_size: int = 1, patience_s: float = 300.0
    ) -> None:
        """Touches no storage; with torch.distributed initialised, a collective call.

        Args:
            folder: ``<run folder>/checkpoints``, on storage that all ranks share; made when the run folder is there.
            keep: complete checkpoints to keep, at least 2.
            rank: this process.
            world_size: processes.
            patience_s: how long ``save`` and ``load_latest`` try again when storage fails, in seconds.
        """
        if keep < 2:
            raise ValueError(f"keep is {keep}: with fewer than 2 checkpoints, a damaged one has none before it")
        self.folder = folder
        self.keep = keep
        self.patience_s = patience_s
        self._ranks = _Ranks(rank, world_size)
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, state: TrainingState) -> None:
        """Copies the state to main memory and writes it beside training; first waits for the write before.

        The copy takes as much main memory as the rank's part of the state and is reused from one call to the next. If
        storage fails, a warning is logged, the checkpoint is dropped, and the next ``begin`` tries anew.
        """
        self.finish()
        self._writing = self._thread.submit(self._attempt, *self._staged(state))

    def save(self, state: TrainingState) -> None:
        """Writes the state and returns when it is complete.

        Raises:
            InputError: storage failed for ``patience_s`` seconds.
        """
        self.finish()
        tensors, record = self._staged(state)
        self._patiently("written", lambda: self._write(tensors, record))

    def finish(self) -> None:
        """Waits for what is being written; storage that is away is only warned of."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for what is being written, raises nothing, and frees the copy of the state; the last call."""
        try:
            self.finish()
        except Exception as error:
            _LOG.warning("the last checkpoint in %s was not completed (%s)", self.folder, error)
        self._thread.shutdown()
        self._stager.close()

    def load_latest(self, state: TrainingState) -> int | None:
        """Loads the newest complete, undamaged checkpoint into ``state``, whatever number of ranks wrote it.

        Folders without manifest (interrupted, or being written) are passed over. Damaged checkpoints are renamed to
        ``*.damaged`` with a warning, and the one before is taken. The state is changed only after all was read.

        Args:
            state: of the same model and optimiser.

        Returns:
            The step, or None if there is no checkpoint.

        Raises:
            InputError: storage failed for ``patience_s`` seconds, is not shared by the ranks, or the checkpoint is of
                another format version or another model.
        """
        self.finish()
        damaged: dict[str, str] = {}
        return self._patiently("read", lambda: self._load_latest(state, damaged))

    # writing

    def _staged(self, state: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = cast(dict[str, Tensor], self._stager.stage(state.state_dict()))
        return tensors, state.record()

    def _attempt(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """One write in the background; storage that is away costs this checkpoint, nothing else."""
        try:
            self._write(tensors, record)
        except StorageAway as error:
            if self._ranks.rank == 0:
                _LOG.warning(
                    "the checkpoint of step %d could not be written to %s (%s): training goes on without it",
                    record["step"],
                    self.folder,
                    error,
                )

    def _write(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Writes one checkpoint and removes what it makes superfluous; all ranks succeed, or none.

        Raises:
            StorageAway: on all ranks, if storage failed on one.
        """
        folder = self.folder / self._ranks.first(lambda: _new_folder(self.folder, record["step"]))
        writer = SummedWriter(folder)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self._ranks.group)
        except CheckpointException as error:
            away = storage_failure(error)
            if away is None:
                raise RuntimeError(f"the checkpoint {folder} could not be written: {error}") from error
            raise StorageAway(str(away)) from error
        files = {name: sums for of_rank in self._ranks.all(lambda: writer.files) for name, sums in of_rank.items()}
        self._ranks.first(lambda: _complete(folder, _manifest(record, self._ranks.world_size, files)))
        if self._ranks.rank == 0:
            _remove_old(self.folder, folder.name, self.keep)

    # reading

    def _load_latest(self, state: TrainingState, damaged: dict[str, str]) -> int | None:
        self._check_shared()
        for name in self._ranks.first(lambda: _names(self.folder)):
            content = self._verified(name)
            if content is None:
                continue
            problem = content if isinstance(content, str) else self._load(state, name, content)
            if problem is None:
                self._tell(damaged, taken=f"{name} is taken instead")
                return state.step
            damaged[name] = problem
            self._ranks.first(partial(_set_aside, self.folder / name))
        self._tell(damaged, taken="there is none before it, so training starts anew")
        return None

    def _tell(self, damaged: dict[str, str], taken: str) -> None:
        if self._ranks.rank == 0:
            for name, problem in damaged.items():
                _LOG.warning(
                    "the checkpoint %s is damaged (%s): renamed to %s.damaged; %s",
                    self.folder / name,
                    problem,
                    name,
                    taken,
                )

    def _check_shared(self) -> None:
        """Every rank must see what rank 0 writes.

        Raises:
            InputError: one does not.
        """
        if self._ranks.world_size == 1:
            return
        name = self._ranks.first(lambda: _touched(self.folder))
        try:
            seen = self._ranks.all(lambda: _appears(self.folder / name))
        finally:
            if self._ranks.rank == 0:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
        if not all(seen):
            raise InputError(
                f"{self.folder} is another folder on worker {seen.index(False)} than on worker 0: --storage must be a "
                "folder that all nodes share"
            )

    def _verified(self, name: str) -> _Content | str | None:
        """The manifest of a checkpoint whose files are as it says, what is wrong, or None of an incomplete one."""
        content = self._ranks.first(lambda: _read_manifest(self.folder / name))
        if not isinstance(content, _Content):
            return content
        largest_first = sorted(content.files, key=lambda file: -content.files[file]["bytes"])
        mine = largest_first[self._ranks.rank :: self._ranks.world_size]
        problems = self._ranks.all(
            lambda: [_file_problem(self.folder / name / file, **content.files[file]) for file in mine]
        )
        found = [problem for of_rank in problems for problem in of_rank if problem]
        return "; ".join(found) or content

    def _load(self, state: TrainingState, name: str, content: _Content) -> str | None:
        """Loads a verified checkpoint; what is wrong with it if that fails.

        Raises:
            InputError: it is of another model.
            StorageAway: storage failed meanwhile.
        """
        readers: list[StrictReader] = []
        problems = self._ranks.all(lambda: _open(self.folder / name, readers))
        if any(problems):
            return "; ".join(problem for problem in problems if problem)
        metadata = readers[0].metadata
        live = state.state_dict()
        difference = misfit(metadata, live)
        if difference:
            raise InputError(
                f"the checkpoint {self.folder / name} is of another model or optimiser ({difference}): resume with the "
                "config it was made with, or choose another --run-name"
            )
        # into the copy in main memory: a failure half-way must not leave half a state
        wanted = {key: tensor for key, tensor in live.items() if key in metadata.state_dict_metadata}
        staged = cast(dict[str, Tensor], self._stager.stage(wanted))
        try:
            dcp.load(staged, storage_reader=readers[0], planner=TensorsOnly(), process_group=self._ranks.group)
        except CheckpointException as error:
            away = storage_failure(error)
            if away is not None:
                raise StorageAway(str(away)) from error
            return "; ".join(f"worker {rank}: {wrapped[0]!r}" for rank, wrapped in error.failures.items())
        state.restore(content.record)
        state.load_state_dict(staged)
        return None

    # both

    def _patiently(self, done: str, work: Callable[[], T]) -> T:
        """``work()``, again and again while storage is away."""
        deadline = time.monotonic() + self.patience_s
        pause = min(1.0, self.patience_s / 4)
        while True:
            try:
                return work()
            except StorageAway as error:
                in_time = time.monotonic() + pause < deadline
                if not self._ranks.all(partial(bool, in_time))[0]:  # rank 0's clock decides
                    raise InputError(
                        f"checkpoints in {self.folder} could not be {done} for {self.patience_s:g} s ({error}): mend "
                        "the storage and start the same command again"
                    ) from error
                if self._ranks.rank == 0:
                    _LOG.warning("%s is away (%s): trying again in %.0f s", self.folder, error, pause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class _Ranks:
    """The workers' word to each other, apart from that of training."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        elif world_size > 1:
            raise ValueError(f"{world_size} ranks need torch.distributed")
        else:  # torch warns of every save that there is but one process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def all(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` returned on each rank; where it fails on one, it fails on all, and alike.

        Raises:
            StorageAway: OSErrors were all that failed.
            InputError: one rank raised it.
            RuntimeError: anything else; on the rank where it happened, that itself.
        """
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        outcomes = self._exchange((result, _described(error)))
        failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure is not None}
        if not failures:
            return [cast(T, result) for result, _ in outcomes]
        if error is not None and not isinstance(error, OSError):
            raise error
        text = "; ".join(f"worker {rank}: {text}" for rank, (_, text) in failures.items())
        for kind, raised in (("other", RuntimeError), ("input", InputError), ("storage", StorageAway)):
            if kind in {found for found, _ in failures.values()}:
                raise raised(text) from error
        raise AssertionError(text)

    def first(self, work: Callable[[], T]) -> T:
        """What ``work``, run on rank 0 alone, returned there."""
        return cast(T, self.all(lambda: work() if self.rank == 0 else None)[0])

    def _exchange(self, mine: Any) -> list[Any]:
        if self.group is None:
            return [mine]
        outcomes = [None] * self.world_size
        dist.all_gather_object(outcomes, mine, group=self.group)
        return outcomes


def _described(error: Exception | None) -> tuple[str, str] | None:
    if error is None:
        return None
    kind = "storage" if isinstance(error, OSError) else "input" if isinstance(error, InputError) else "other"
    return kind, str(error) if kind != "other" else repr(error)


@dataclass(frozen=True)
class _Content:
    """What a manifest says."""

    record: dict[str, Any]
    files: dict[str, dict[str, int]]


def _manifest(record: dict[str, Any], world_size: int, files: dict[str, dict[str, int]]) -> str:
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": record["step"],
        "world_size": world_size,
        "files": files,
        "state": record,
    }
    return json.dumps(content | {"crc32": _crc32_of_json(content)}, indent=1) + "\n"


def _crc32_of_json(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _complete(folder: Path, manifest: str) -> None:
    """Makes a checkpoint count: its manifest appears whole, after all else has reached the storage."""
    staged = folder / f"{MANIFEST}.partial"
    with staged.open("w", encoding="utf-8") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)
    staged.replace(folder / MANIFEST)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Makes names durable, where the file system can be asked to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> _Content | str | None:
    """The manifest, what is wrong with it, or None if the checkpoint is not complete.

    Raises:
        InputError: it is of another format version.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        folder.stat()  # fails if nothing is there, because storage is away
        return None
    except ValueError as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return f"{MANIFEST}: not of a checkpoint"
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST} has format_version {content.get('format_version')}, this sane_ray reads "
            f"{FORMAT_VERSION}: resume with the version that wrote it, or choose another --run-name"
        )
    if content.pop("crc32", None) != _crc32_of_json(content):
        return f"{MANIFEST}: its checksum is wrong"
    return _Content(content["state"], content["files"])


def _file_problem(path: Path, bytes: int, crc32: int) -> str | None:
    """What is wrong with a file.

    Raises:
        OSError: the storage as a whole is away.
    """
    for attempt in range(_READS):
        try:
            size = path.stat().st_size
            if size != bytes:
                return f"{path.name} has {size} bytes instead of {bytes}"
            return None if crc32_of(path) == crc32 else f"{path.name}: its checksum is wrong"
        except OSError as error:
            if path not in path.parent.iterdir():
                return f"{path.name} is missing"
            problem = f"{path.name} cannot be read: {error}"
        time.sleep(attempt)
    return problem


def _open(folder: Path, readers: list[StrictReader]) -> str | None:
    """Adds a reader of the checkpoint's tensors; what is wrong with their index, if anything is."""
    try:
        readers.append(StrictReader(folder))
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle may raise
        return f"{METADATA_FILE}: {error!r}"
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint in a run's folder of checkpoints; 0 if none is there or in reach."""
    try:
        names = [entry.name for entry in folder.iterdir() if (entry / MANIFEST).exists()]
        return max((_order(name)[0] for name in names if _NAME.fullmatch(name) and "damaged" not in name), default=0)
    except OSError:
        return 0


def _order(name: str) -> tuple[int, int]:
    """(step, attempt) of a folder's name."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def _ours(folder: Path) -> list[str]:
    """Names of all that is ours in the folder, newest first.

    Raises:
        OSError: storage, or the run's folder, is away.
    """
    folder.mkdir(exist_ok=True)
    entries = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)]
    names = [entry.name for entry in entries if entry.is_dir() and not entry.is_symlink()]
    return sorted(names, key=_order, reverse=True)


def _names(folder: Path) -> list[str]:
    """Names of what may be a checkpoint, newest first."""
    return [name for name in _ours(folder) if "." not in name]


def _new_folder(folder: Path, step: int) -> str:
    """Makes a folder that nobody else writes to, not even a worker of this run that is believed dead."""
    folder.mkdir(exist_ok=True)
    for attempt in itertools.count(1):
        name = f"step_{step:09d}" + (f"_{attempt}" if attempt > 1 else "")
        with contextlib.suppress(FileExistsError):
            (folder / name).mkdir()
            return name
    raise AssertionError


def _remove_old(folder: Path, newest: str, keep: int) -> None:
    """Deletes what the complete checkpoint ``newest`` makes superfluous; storage that is away is warned of.

    That is all that is older than the ``keep`` newest complete checkpoints, and incomplete ones older than ``newest``.
    """
    try:
        names = [name for name in _ours(folder) if _order(name) < _order(newest)]
        complete = [name for name in names if "." not in name and (folder / name / MANIFEST).exists()]
        oldest = _order(complete[keep - 2]) if len(complete) >= keep - 1 else (0, 0)
        for name in names:
            if _order(name) < oldest or not ("." in name or name in complete):
                _delete(folder / name)
    except OSError as error:
        _LOG.warning("old checkpoints in %s could not be deleted (%s)", folder, error)


def _delete(folder: Path) -> None:
    """Manifest first: what is left of an interrupted deletion is incomplete, not damaged."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _set_aside(damaged: Path) -> None:
    """Keeps a damaged checkpoint for people to look at, until sound ones have outlived it."""
    target = damaged.with_name(f"{damaged.name}.damaged")
    if target.exists():
        shutil.rmtree(target)
    damaged.rename(target)


def _touched(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    name = f".shared-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def _appears(path: Path) -> bool:
    """Whether a file is there; a network file system may take a moment to show it."""
    for _ in range(_LOOKS):
        if path.exists():
            return True
        time.sleep(_LOOK_S)
    return False
