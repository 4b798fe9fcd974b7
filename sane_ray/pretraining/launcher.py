"""Starts, resumes and finishes a pretraining run: identity, resources, Ray Train, MLflow, model folder and plots.

Runs in the driver. Never trains anything itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
import time
from contextlib import contextmanager
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sane_ray.cluster import Resources, preflight
from sane_ray.config import AutoencoderConfig, PretrainJob, to_dict
from sane_ray.errors import InputError
from sane_ray.pretraining.progress import Point
from sane_ray.pretraining.stream import plan_of_store, windows_of_split
from sane_ray.pretraining.worker import MODEL_FOLDER, WorkerConfig, train
from sane_ray.tokens.store import TokenStore

EXPERIMENT = "sane_ray pretraining"
"""Name of the MLflow experiment."""

IDENTITY_FILE = "run.json"
HISTORY_FILE = "history.jsonl"


@dataclass(frozen=True)
class Run:
    """A run that has been decided, before anything is started."""

    name: str
    folder: Path
    identity: str
    """Hash of all that changes the result: config and content of the store."""
    settings: dict[str, Any]
    """What the identity is the hash of."""
    worker: WorkerConfig
    output: Path
    steps_per_epoch: int
    windows: dict[str, int]
    """Windows of an epoch, by split."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.worker.pretraining.epochs

    @property
    def history(self) -> Path:
        """JSON lines of every step's metrics."""
        return self.folder / HISTORY_FILE


def plan_run(job: PretrainJob, store: TokenStore, storage: Path, *, threads: int = 1) -> Run:
    """Resolves the config against the store and names the run; reads only the store's index.

    Raises:
        InputError: a token size, window, batch size or position table that does not fit the store, or views that its
            architectures have no symmetry for.
    """
    autoencoder = resolve_autoencoder(job.autoencoder, store)
    _check_symmetry(job, store)
    plan, _ = plan_of_store(
        store,
        "train",
        window=autoencoder.window,
        batch_size=job.pretraining.batch_size,
        pool_mb=job.pretraining.shuffle_mb,
        seed=job.pretraining.seed,
    )
    settings = {
        "store": store.fingerprint,
        **{name: to_dict(getattr(job, name)) for name in ("loss", "augmentation", "pretraining")},
        "autoencoder": to_dict(autoencoder),
    }
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = job.run_name or f"{store.path.name}-{identity}"
    folder = storage / "runs" / name
    return Run(
        name=name,
        folder=folder,
        identity=identity,
        settings=settings,
        worker=WorkerConfig(
            store=store.path,
            autoencoder=autoencoder,
            loss=job.loss,
            augmentation=job.augmentation,
            pretraining=job.pretraining,
            data_cpus=job.cluster.data_cpus,
            threads=threads,
        ),
        output=Path(job.output).expanduser().absolute() if job.output else folder / MODEL_FOLDER,
        steps_per_epoch=plan.steps_per_epoch,
        windows={split: windows_of_split(store, split, autoencoder.window) for split in ("train", "val")},
    )


def resolve_autoencoder(config: AutoencoderConfig, store: TokenStore) -> AutoencoderConfig:
    """Fills in the token size and position tables from the store, or checks that those given fit it.

    Raises:
        InputError: they do not.
    """
    if config.token_size not in (0, store.token_size):
        raise InputError(
            f"config field autoencoder.token_size is {config.token_size}, but the tokens of {store.path} have "
            f"{store.token_size} values: set it to 0 or {store.token_size}, or prepare a store with "
            f"--tokens.token_size {config.token_size}"
        )
    tables = [architecture.table.position_sizes for architecture in store.architectures.values()]
    needed = [max(sizes) for sizes in zip(*tables, strict=True)]
    given = config.max_positions or needed
    if any(have < need for have, need in zip(given, needed, strict=True)):
        raise InputError(
            f"config field autoencoder.max_positions is {given}, but the store needs {needed} (token index, layer, "
            "channel): enlarge it, or leave it empty"
        )
    return dataclasses.replace(config, token_size=store.token_size, max_positions=list(given))


def _check_symmetry(job: PretrainJob, store: TokenStore) -> None:
    views = {"view_1": job.augmentation.view_1, "view_2": job.augmentation.view_2}
    permuted = [name for name, kind in views.items() if kind == "permuted"]
    without = [name for name, architecture in store.architectures.items() if architecture.symmetry.is_trivial]
    if permuted and without:
        raise InputError(
            f"config field augmentation.{permuted[0]} is 'permuted', but no symmetry is known for the architecture "
            f"{without[0]!r} of {store.path}: set --augmentation.{permuted[0]} canonical"
        )


def pretrain(run: Run, job: PretrainJob) -> Path:
    """Trains, or resumes, or finds that all is done; uses the connected Ray.

    Returns:
        The folder of the trained model.

    Raises:
        InputError: the run's name belongs to another config, the cluster is too small, or the loss diverged.
        TrainingFailedError: workers failed more often than ``cluster.max_failures``.
    """
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from sane_ray.pretraining.callbacks import HistoryCallback
    from sane_ray.tracking_callback import TrackingCallback

    resources = preflight(job.cluster)
    claim(run)
    if is_complete(run):
        return run.output
    with _tracked(run, job) as tracker, _progress_bar(run):
        trainer = TorchTrainer(
            train,
            train_loop_config=dataclasses.replace(run.worker, threads=resources.threads),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if resources.gpu else "gloo"),
            scaling_config=_scaling(resources),
            run_config=RunConfig(
                name=run.folder.name,
                storage_path=str(run.folder.parent),
                failure_config=FailureConfig(max_failures=job.cluster.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=job.pretraining.checkpoints_kept),
                callbacks=[HistoryCallback(run.history), TrackingCallback(tracker)],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        result = trainer.fit()
        if "error" in result.return_value:
            raise InputError(result.return_value["error"])
        with result.checkpoint.as_directory() as checkpoint:
            install(Path(checkpoint) / MODEL_FOLDER, run.output)
        finish(run, tracker)
    return run.output
