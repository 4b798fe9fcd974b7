"""Which exceptions end a training and which are mended by a restart: Ray Train with loops that fail in known ways."""

import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray.data
import ray.train
import torch
import torch.distributed
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, RayTaskError, UserCodeException
from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from torch.distributed.checkpoint.api import CheckpointException

sys.path.insert(0, str(Path(__file__).parent))
from cluster import wait_until

from sane_ray.errors import InputError
from sane_ray.pretraining.faults import Bug, StopOnBug, StopWaiting, is_fault, reason_of, root_bug, told

CLOSED = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17309.")
DEAD = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
SHAPES = RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")


def in_task(error):
    """As a task's exception arrives where its result is asked for."""
    return RayTaskError("read", "traceback of the task", error).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        NodeDiedError("gone"),
        ObjectLostError("ab" * 14, None, ""),
        DEAD,
        OSError(5, "Input/output error"),
        FileNotFoundError("storage that is away"),
        TimeoutError(),
        torch.distributed.DistNetworkError("The client socket has failed to connect"),
        torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited"),
        CLOSED,
        RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
        RuntimeError("Gloo connectFullMesh failed with [../pair.cc:144] no error"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        in_task(OSError(116, "Stale file handle")),
        CheckpointException("save", {0: (OSError(28, "No space left on device"), None), 1: (CLOSED, None)}),
    ],
    ids=repr,
)
def test_what_a_restart_may_mend_is_a_fault(error):
    assert is_fault(error)
    assert root_bug({0: error}) is None


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unsupported operand"),
        ValueError("odd"),
        KeyError("x"),
        InputError("the store is of another kind"),
        SHAPES,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: device-side assert triggered"),
        in_task(ValueError("odd")),
        in_task(UserCodeException("UDF failed to process a data block.")),
        CheckpointException("load", {0: (KeyError("model.weight"), None), 1: (CLOSED, None)}),
    ],
    ids=repr,
)
def test_what_would_come_again_is_a_bug(error):
    assert not is_fault(error)
    assert root_bug({0: CLOSED, 1: error}) is not None


def test_a_death_is_the_root_of_whatever_others_raise():
    assert root_bug({0: SHAPES, 1: DEAD}) is None


def test_a_failure_is_told_as_the_bug_behind_it():
    bug = reason_of(WorkerGroupError("two ranks", {0: CLOSED, 1: SHAPES}))
    assert isinstance(bug, Bug) and "shapes cannot be multiplied" in str(bug)
    lost = WorkerGroupError("two ranks", {0: CLOSED, 1: DEAD})
    assert reason_of(lost) is lost
    refused = InputError("the store is of another kind")
    assert reason_of(ControllerError(refused)) is refused


class Unsendable(Exception):
    """Cannot be unpickled: its arguments are not those of its constructor."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def refuse(batch):
    raise InputError("part-00000.parquet is damaged: prepare the store again")


def loop(config):
    """Leaves a trace of every start, then fails in a known way in rank 1."""
    rank = ray.train.get_context().get_world_rank()
    starts = Path(config["folder"])
    (starts / f"{rank}-{time.time()}").touch()
    first = len(list(starts.glob(f"{rank}-*"))) == 1
    if config["fails"] == "alone":
        raise Unsendable("this", "that")
    if config["fails"] == "data":
        list(ray.data.range(1).map_batches(refuse, num_cpus=0).iter_batches())
    if rank == 1 and config["fails"] == "bug":
        raise TypeError("a bug of rank 1")
    if rank == 1 and (config["fails"] == "always" or (config["fails"] == "death" and first)):
        os._exit(1)
    torch.distributed.all_reduce(torch.ones(3))
    return {"starts": len(list(starts.glob(f"{rank}-*")))}


@pytest.fixture
def fit(ray_session, tmp_path):
    return partial(run, tmp_path)


def run(folder, fails, *, workers=2, wait=60.0, deaths=3):
    """Trains; returns the result, or raises what the launcher would."""
    trainer = TorchTrainer(
        told(loop),
        train_loop_config={"folder": str(folder), "fails": fails},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=2),
            callbacks=[StopOnBug(), StopWaiting(wait, f"{workers} workers", deaths)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise reason_of(error) from None


def test_a_bug_of_one_rank_ends_the_run_though_the_other_waits_for_it(fit, tmp_path):
    with pytest.raises(Bug, match=r"(?s)test_policy\.py.*in loop.*TypeError: a bug of rank 1") as told_as:
        fit("bug")
    assert len(list(tmp_path.glob("1-*"))) == 1, "a bug was tried again"
    assert len(str(told_as.value).splitlines()) < 15


def test_a_bug_that_cannot_travel_is_told_all_the_same(fit, tmp_path):
    with pytest.raises(Bug, match="Unsendable: this and that"):
        fit("alone", workers=1)
    assert len(list(tmp_path.glob("0-*"))) == 1


def test_what_a_data_task_refuses_is_told_as_its_sentence(fit, tmp_path):
    with pytest.raises(InputError, match=r"^part-00000\.parquet is damaged: prepare the store again$"):
        fit("data", workers=1)
    assert len(list(tmp_path.glob("0-*"))) == 1


def test_a_death_is_mended(fit, tmp_path):
    assert fit("death").return_value == {"starts": 2}


def test_workers_that_die_at_once_again_and_again_end_the_run_and_leave_no_reservation(fit, ray_session):
    with pytest.raises(ray.train.TrainingFailedError, match="died"):
        fit("always", deaths=1)
    wait_until(lambda: ray_session.available_resources().get("CPU") == 4)


def test_workers_that_cannot_start_are_not_waited_for_forever(fit, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    with pytest.raises(InputError, match=r"no room for 99 workers for 0\.05 minutes: add nodes.*goes on from the last"):
        fit("never", workers=99, wait=3)
