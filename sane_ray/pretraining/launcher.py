"""Starts, resumes and finishes a pretraining run: identity, resources, Ray Train, MLflow, model folder and plots.

Runs in the driver. Never trains anything itself.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from tqdm import tqdm

from sane_ray.autoencoder.model import SANE
from sane_ray.config import PretrainJob
from sane_ray.errors import InputError
from sane_ray.interrupts import interruptible
from sane_ray.preflight import Resources, preflight
from sane_ray.pretraining.checkpoints import newest_step
from sane_ray.pretraining.faults import StopOnBug, StopWaiting, reason_of, told
from sane_ray.pretraining.history import last_point
from sane_ray.pretraining.history_callback import HistoryCallback
from sane_ray.pretraining.run import BEST_FOLDER, MODEL_FOLDER, Run, claim, is_complete, write_identity
from sane_ray.pretraining.worker import CHECKPOINT_FOLDER, train
from sane_ray.tracking import Tracker, default_uri, tracked
from sane_ray.tracking_callback import TrackingCallback

EXPERIMENT = "sane_ray pretraining"
"""Name of the MLflow experiment."""

MOST_WAITING_S = 600.0
"""How long a run waits for workers that the cluster has no room for, as after the loss of a node, before it ends."""

MOST_ENDING_S = 30.0
"""How long an interrupted run waits for its workers to end."""

ENDING = (
    "interrupted: ending the workers; the same command goes on from the last checkpoint (a second Ctrl-C ends at once)"
)


def pretrain(run: Run, job: PretrainJob) -> Path:
    """Trains, or resumes, or finds that all is done; uses the connected Ray.

    Returns:
        The folder of the trained model.

    Raises:
        InputError: the run's name belongs to another config, the cluster is too small, or the loss diverged.
        TrainingFailedError: workers failed more often than ``cluster.max_failures``.
    """
    if is_complete(run):
        claim(run)
        return run.output
    resources = preflight(job.cluster, run.memory, storage=run.storage)
    claim(run)
    with tracked(
        uri=default_uri(run.storage),
        experiment=EXPERIMENT,
        run_name=run.name,
        identity=f"{run.name}-{run.identity}",
        params=run.settings,
        folder=run.folder,
    ) as tracker:
        _fit(run, job, resources, tracker)
        report_run(run, tracker)
        write_identity(run, "complete")
    return run.output


class _Trainer(TorchTrainer):
    """Ray Train's trainer, whose own answer to Ctrl-C says nothing and ends with status 0."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """Ends workers and controller; waits for it, but not forever."""
        with suppress(RayError):  # the controller ends as it answers
            if self._controller is not None:
                ray.get(self._controller.abort.remote(), timeout=MOST_ENDING_S)


def _fit(run: Run, job: PretrainJob, resources: Resources, tracker: Tracker) -> None:
    trainer = _Trainer(
        told(train),
        train_loop_config={"worker": dataclasses.replace(run.worker, threads=resources.threads)},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if resources.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=_num_workers(resources),
            use_gpu=resources.gpu,
            resources_per_worker=resources.bundle,
            elastic_resize_monitor_interval_s=job.cluster.resize_seconds,
        ),
        run_config=RunConfig(
            name=run.folder.name,
            storage_path=str(run.folder.parent),
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
            callbacks=[
                HistoryCallback(run.history),
                TrackingCallback(tracker),
                StopOnBug(),
                StopWaiting(MOST_WAITING_S, _wanted(resources)),
            ],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    with _progress_bar(run), interruptible(ENDING, trainer.abort):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            reason = reason_of(error)
            raise reason from (error if reason is not error else None)
    outcome = result.return_value or {}
    if "error" in outcome:
        raise InputError(outcome["error"])
    trained = run.folder / MODEL_FOLDER
    if run.output != trained:
        SANE.from_pretrained(trained).save_pretrained(run.output)


def _num_workers(resources: Resources) -> int | tuple[int, int]:
    least, most = resources.min_workers, resources.max_workers
    return most if least == most else (least, most)


def _wanted(resources: Resources) -> str:
    each = " and ".join(f"{count:g} {kind}s" for kind, count in resources.bundle.items())
    return f"{resources.min_workers} workers of {each} each"


def report_run(run: Run, tracker: Tracker) -> None:
    """Draws the run's pictures and hands them and the model to MLflow."""
    from sane_ray.pretraining.pictures import draw  # matplotlib takes a second to import

    plots = run.folder / "plots"
    draw(run.history, run.worker.store, run.output, plots)
    tracker.log_folder(plots)
    tracker.log_folder(run.output, MODEL_FOLDER)
    if (run.folder / BEST_FOLDER).exists():
        tracker.log_folder(run.folder / BEST_FOLDER, BEST_FOLDER)


def _move_back(bar: tqdm, step: int) -> None:
    """Lets a bar begin anew at an earlier step, so that its rate and the time left are those of from then on."""
    bar.initial = bar.n = bar.last_print_n = step
    bar.start_t = time.time()


@contextmanager
def _progress_bar(run: Run) -> Iterator[None]:
    """Shows steps, loss and time left, read from the history that the controller writes."""
    stop = threading.Event()
    pause = 1.0 if sys.stderr.isatty() else 15.0  # a log file should not fill with bars
    known, begin = last_point(run.history), newest_step(run.folder / CHECKPOINT_FOLDER)
    if begin:
        print(f"resuming: the newest checkpoint is of step {begin:,} of {run.total_steps:,}", flush=True)
    bar = tqdm(total=run.total_steps, initial=begin, desc="starting workers", unit="step", mininterval=pause)

    def follow() -> None:
        while not stop.wait(1.0):
            show()

    def show() -> None:
        point = last_point(run.history)
        if not point or point == known:
            return
        step = int(point["step"])
        bar.set_description("pretraining", refresh=False)
        bar.set_postfix(loss=f"{point['train/loss']:.3f}", refresh=False)
        if step < bar.n:  # workers started again from an earlier step
            _move_back(bar, step)
        bar.update(step - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        show()
        bar.close()
