"""Tells faults, which a restart mends, from bugs, which would only come again; ends runs that wait in vain.

Ray Train by itself restarts its workers after every exception (``max_failures``), a wrong type as well as a lost node,
and waits forever for workers that cannot start. Where in doubt, an exception is a fault if a process died with it.
Never repeats or repairs anything itself.
"""

from __future__ import annotations

import functools
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError, RayTaskError, UserCodeException
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    RayTrainError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    SchedulingState,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from sane_ray.errors import InputError

Result = TypeVar("Result")

FAULT_MESSAGES = re.compile(
    r"\bconnection (was |is )?(likely )?(closed|reset|refused|aborted|timed out)\b|\bbroken pipe\b|\bpair closure\b"
    r"|\bsocket\b.* (failed|timed out|closed|shut ?down)\b|\bsocket timeout\b|\bconnectFullMesh failed\b"
    r"|\btimed out (after|waiting|connecting|in monitoredBarrier)\b|\boperation timed out\b|\btimeout waiting\b"
    r"|\b(wait|connect|read|write|barrier|collective operation) timeout\b"
    r"|\bNCCL error\b|\bNCCL communicator was aborted\b|\bunhandled system error\b|\bremote process exited\b"
    r"|\buncorrectable (ECC|NVLink) error\b|\bhardware stack error\b|\bunspecified launch failure\b"
    r"|\bCUDA error: unknown error\b|\b(device(\(s\))?|GPU) is(/are)? (lost|busy or unavailable|no longer available)\b"
    r"|\b(fell|fallen) off the bus\b",
    re.IGNORECASE,
)
"""What gloo, NCCL and CUDA say in a plain ``RuntimeError`` when the network, a peer or the device failed.

Whole phrases of theirs: single words, such as peer or timeout, are in sentences about bugs too.
"""

WAITING = (InitializingState, SchedulingState, ReschedulingState, RestartingState, ResizingState)
"""States of Ray Train's controller in which there are no workers."""

_PAUSE_SECONDS = 0.5
_LONGEST_LINE = 300
_RAY_DATA_ADDS = "\nFailed to apply UDF"

_CONTROLLER_LOG = "ray.train.v2._internal.execution.controller.controller"
_CALLBACK_LOG = "ray.train.v2._internal.execution.callback_manager"


class Bug(Exception):
    """An exception of a training worker that would come again; its text is the whole traceback from there."""


def is_fault(error: BaseException) -> bool:
    """Whether a restart from the last checkpoint may mend what a worker raised.

    Faults are dead or unreachable actors, nodes and objects, whatever the operating system refused (storage, network),
    data that stopped coming, failed communication between workers, and broken devices. All else is a bug, running out
    of memory too.

    Every error of the operating system counts, a missing file and a refused permission too: while shared storage is
    away, its mount point is an empty folder, a file, or somebody else's, and only a restart can tell.
    """
    cause = _cause(error)
    if isinstance(cause, CheckpointException):
        return all(is_fault(failure) for failure, _ in cause.failures.values())
    if isinstance(cause, InputError | MemoryError | torch.OutOfMemoryError | RayTaskError | UserCodeException):
        return False
    if isinstance(cause, OSError | DistError | RayError | RayTrainError | ExecutionTimeoutError):
        return True
    return isinstance(cause, RuntimeError) and FAULT_MESSAGES.search(str(cause)) is not None


def is_death(error: BaseException) -> bool:
    """Whether a worker did not raise this, but ended or stopped answering."""
    return isinstance(error, RayTrainError | RayError) and is_fault(error)


def root_bug(worker_exceptions: Mapping[int, BaseException]) -> Exception | None:
    """The bug among what the workers raised, by rank: the one that others may only have suffered from.

    None where a worker died: that makes others raise all sorts of errors, and a true bug comes again without a death.
    """
    if any(is_death(error) for error in worker_exceptions.values()):
        return None
    for rank in sorted(worker_exceptions):
        error = _cause(worker_exceptions[rank])
        if isinstance(error, InputError | Bug):
            return error
        if not is_fault(error):
            return Bug("".join(traceback.format_exception(error)))
    return None


def told(loop: Callable[..., Result]) -> Callable[..., Result]:
    """A training loop whose bugs reach the driver whole: Ray loses their traceback, and some cannot travel at all.

    Inside it Ray Data raises what its tasks raised, as it was; else nobody could tell a fault from a bug there.
    """

    @functools.wraps(loop)
    def telling(*arguments: Any, **named: Any) -> Result:
        from ray.data import DataContext

        DataContext.get_current().raise_original_map_exception = True
        try:
            return loop(*arguments, **named)
        except BaseException as error:
            if isinstance(_cause(error), InputError):
                raise InputError(str(_cause(error)).partition(_RAY_DATA_ADDS)[0]) from None
            if is_fault(error):
                raise
            raise Bug(traceback.format_exc()) from None

    return telling


class StopOnBug(UserCallback):
    """Ends the run at once when a worker met a bug, for ``ray.train.RunConfig(callbacks=[...])``."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller when workers have raised; that error of a callback is never retried.

        Raises:
            ControllerError: around the bug, if there is one.
        """
        bug = root_bug(worker_exceptions)
        if bug is not None:
            raise ControllerError(bug)


class StopWaiting(ControllerCallback):
    """Ends the run when its workers could not be started for too long, for ``ray.train.RunConfig(callbacks=[...])``.

    Counts time, not tries, and begins anew whenever workers have started: a cluster may lose and replace any number of
    nodes in a long run. Workers that die while they start are faults like any other.
    """

    def __init__(self, seconds: float, wanted: str, most_failures: int = 3) -> None:
        """Waits so long.

        Args:
            seconds: how long to wait for workers.
            wanted: what is waited for, for the error's sentence: ``2 workers of 2 CPUs each``.
            most_failures: how often in turn workers may die while they start.
        """
        self._seconds = seconds
        self._wanted = wanted
        self._most_failures = most_failures
        self._failures = 0
        self._since: float | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train's controller, in whose process alone it mends Ray Train."""
        TrainController.worker_group_cls = _Workers
        logging.getLogger(_CONTROLLER_LOG).addFilter(_short)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called by Ray Train's controller at every turn but those of a training that runs.

        Raises:
            InputError: the time is over.
            WorkerGroupStartupFailedError: workers died too often.
        """
        if not isinstance(current_state, WAITING):
            self._since, self._failures = None, 0
            return
        if type(current_state) is type(previous_state):
            # Ray's elastic policy answers "no change" at once while there are too few nodes, and TrainController.run
            # asks again without a pause, or any await that gives way: a whole CPU, and nobody else's turn to lose.
            time.sleep(_PAUSE_SECONDS)
        elif isinstance(current_state, ReschedulingState):
            self._count(_cause(current_state.training_failed_error))
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since > self._seconds:
            _quieten_callbacks()
            raise InputError(
                f"the cluster had no room for {self._wanted} for {self._seconds / 60:g} minutes: add nodes, or lower "
                "cluster.num_workers, and give the same command again: it goes on from the last checkpoint"
            )

    def _count(self, failure: BaseException) -> None:
        if isinstance(failure, WorkerGroupStartupFailedError):
            self._failures += 1
            if self._failures > self._most_failures:
                _quieten_callbacks()
                raise failure


class _Workers(WorkerGroup):
    """Ray Train's workers, which it leaves alone, with all they reserve, when one of them dies just as it is started.

    Nor does it start them again then; the error raised here it takes for what it is.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if self.has_started():
                self.shutdown()
            if is_fault(error) and not isinstance(error, WorkerGroupStartupTimeoutError):
                raise WorkerGroupStartupFailedError(f"workers died while they started: {error}") from error
            raise


def _quieten_callbacks() -> None:
    """Ray would show the sentence that ends a run as a crash of a callback."""
    logging.getLogger(_CALLBACK_LOG).setLevel(logging.CRITICAL)


def _short(record: logging.LogRecord) -> bool:
    """Makes one line of what Ray says, with its whole stack, whenever workers could not be started."""
    failure = record.exc_info[1] if record.exc_info else None
    if isinstance(failure, WorkerGroupStartupTimeoutError):
        record.msg, record.args = "still waiting for %s workers: the cluster lacks room", (failure.num_workers,)
    elif isinstance(failure, WorkerGroupStartupFailedError):
        record.msg, record.args = "%s", (" ".join(str(failure).split())[:_LONGEST_LINE],)
    else:
        return True
    record.levelno, record.levelname, record.exc_info = logging.WARNING, "WARNING", None
    return True


def reason_of(error: TrainingFailedError) -> Exception:
    """What to raise for a training that failed: the input error or the bug behind it, else the error as it is."""
    if isinstance(error, ControllerError):
        failure = error.controller_failure
        return failure if isinstance(failure, InputError | Bug) else error
    if isinstance(error, WorkerGroupError):
        return root_bug(error.worker_failures) or error
    return error


def _cause(error: BaseException) -> BaseException:
    """What is inside Ray's wrappers of exceptions."""
    while True:
        if isinstance(error, WorkerHealthCheckFailedError):
            error = error.health_check_failure
        elif isinstance(error, ControllerError):
            error = error.controller_failure
        elif isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
            error = error.cause
        else:
            return error
