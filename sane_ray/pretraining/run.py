"""What a pretraining run is, decided before anything is started: its config, its data, its identity and its folder.

Reads only the store's index. Never starts Ray, and never trains.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sane_ray.autoencoder.folders import MODEL_FOLDER
from sane_ray.autoencoder.model import SANE, check_replaceable
from sane_ray.cluster import local_path
from sane_ray.config import (
    AugmentationConfig,
    AutoencoderConfig,
    LossConfig,
    PretrainingConfig,
    PretrainJob,
    to_dict,
)
from sane_ray.errors import InputError
from sane_ray.pretraining.behavior import check_behavior
from sane_ray.pretraining.scaling import MemoryNeed
from sane_ray.pretraining.stream import plan_of_store, windows_of_split
from sane_ray.tokens.store import TokenStore
from sane_ray.tracking import flatten

"""The model as it is at the end, inside the run's folder."""

BEST_FOLDER = "model_best"
"""The model as it was when its validation loss was lowest."""

FREE = (
    *("log_every", "validate_every", "checkpoint_every", "checkpoints_kept"),
    *("evaluate_every", "evaluate_networks"),
    *("micro_batch", "compile", "activation_checkpointing", "sharding", "reshard"),
)
"""Fields of the config's section `pretraining` that a run may be resumed with other values of: they do not change the
model, but for the order in which numbers are added up."""

IDENTITY_FILE = "run.json"
HISTORY_FILE = "history.jsonl"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker needs, decided by the launcher; travels to the workers as it is."""

    folder: Path
    """Of the run, on storage that all nodes share."""
    store: Path
    autoencoder: AutoencoderConfig
    loss: LossConfig
    augmentation: AugmentationConfig
    pretraining: PretrainingConfig
    threads: int


@dataclass(frozen=True)
class Run:
    """A run that has been decided, before anything is started."""

    name: str
    storage: Path
    """Root of all results."""
    identity: str
    """Hash of all that changes the result: config and content of the store."""
    settings: dict[str, Any]
    """What the identity is the hash of."""
    worker: WorkerConfig
    output: Path
    steps_per_epoch: int
    windows: dict[str, int]
    """Windows of an epoch, by split."""
    most_of_a_model: int
    """Windows of one model that a global batch may hold; 1 where the zoo has models enough."""

    @property
    def folder(self) -> Path:
        """Everything of this run."""
        return self.worker.folder

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.worker.pretraining.epochs

    @property
    def memory(self) -> MemoryNeed:
        """What decides how much memory a worker needs."""
        return MemoryNeed(self.worker.autoencoder, self.worker.pretraining, self.worker.loss)

    @property
    def parameters(self) -> int:
        """Trainable parameters of the model."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run: all views of every window, forward and backward."""
        windows = self.windows["train"] * self.worker.pretraining.epochs
        return (
            self.memory.views
            * windows
            * self.worker.autoencoder.window
            * self._model.flops_per_token(self.worker.autoencoder.window)
        )

    @property
    def _model(self) -> SANE:
        with torch.device("meta"):
            return SANE(self.worker.autoencoder)

    @property
    def history(self) -> Path:
        """JSON lines of every step's metrics."""
        return self.folder / HISTORY_FILE


def plan_run(job: PretrainJob, store: TokenStore, storage: Path) -> Run:
    """Resolves the config against the store and names the run; reads only the store's index.

    Raises:
        InputError: a token size, window, batch size or position table that does not fit the store, views that its
            architectures have no symmetry for, or an output folder that holds something else.
    """
    if job.tokens.token_size not in (0, store.token_size):
        raise InputError(
            f"config field tokens.token_size is {job.tokens.token_size}, but the tokens of {store.path} have "
            f"{store.token_size} values: set --tokens.token_size 0 to take the store's, or prepare a store of that size"
        )
    autoencoder = resolve_autoencoder(job.autoencoder, store)
    _check_symmetry(job, store)
    if job.loss.behavior:
        check_behavior(store, job.loss, autoencoder.window)
    windows = {split: windows_of_split(store, split, autoencoder.window) for split in ("train", "val")}
    plans = {
        split: plan_of_store(
            store,
            split,
            window=autoencoder.window,
            batch_size=job.pretraining.batch_size if split == "train" else 1,
            pool_mb=job.pretraining.shuffle_mb,
            seed=job.pretraining.seed,
        )[0]
        for split, count in windows.items()
        if split == "train" or count > 0
    }
    settings = _settings(job, autoencoder, store)
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = job.run_name or f"{store.path.name}-{identity}"
    output = local_path(job.output, "output") if job.output else storage / "runs" / name / MODEL_FOLDER
    check_replaceable(output)
    return Run(
        name=name,
        storage=storage,
        identity=identity,
        settings=settings,
        worker=WorkerConfig(
            folder=storage / "runs" / name,
            store=store.path,
            autoencoder=autoencoder,
            loss=job.loss,
            augmentation=job.augmentation,
            pretraining=job.pretraining,
            threads=1,
        ),
        output=output,
        steps_per_epoch=plans["train"].steps_per_epoch,
        windows=windows,
        most_of_a_model=plans["train"].most_of_a_model,
    )


def _settings(job: PretrainJob, autoencoder: AutoencoderConfig, store: TokenStore) -> dict[str, Any]:
    """All that changes the trained model; not how often a run looks at itself, nor where and how it is computed."""
    free = set(FREE)
    if job.pretraining.on_spike == "rollback":  # what a spike costs depends on when it is looked for
        free -= {"log_every", "validate_every", "checkpoint_every", "evaluate_every"}
    if autoencoder.dropout > 0:
        free -= {"micro_batch"}
    pretraining = {name: value for name, value in to_dict(job.pretraining).items() if name not in free}
    return {
        "store": {"fingerprint": store.fingerprint},
        "autoencoder": to_dict(autoencoder),
        "loss": to_dict(job.loss),
        "augmentation": to_dict(job.augmentation),
        "pretraining": pretraining,
    }


def resolve_autoencoder(config: AutoencoderConfig, store: TokenStore) -> AutoencoderConfig:
    """Fills in the token size and position tables from the store, or checks that those given fit it.

    Sinusoidal positions have no tables.

    Raises:
        InputError: they do not.
    """
    if config.token_size not in (0, store.token_size):
        raise InputError(
            f"config field autoencoder.token_size is {config.token_size}, but the tokens of {store.path} have "
            f"{store.token_size} values: set it to 0 or {store.token_size}, or prepare a store with "
            f"--tokens.token_size {config.token_size}"
        )
    if config.positions == "sinusoidal" and config.max_positions:
        raise InputError(
            f"config field autoencoder.max_positions is {config.max_positions}, but autoencoder.positions is "
            "'sinusoidal', which has no tables: leave it empty"
        )
    if config.positions == "sinusoidal":
        return dataclasses.replace(config, token_size=store.token_size, max_positions=[])
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
    views = {"view_1": job.augmentation.view_1}
    if job.loss.views == 2:
        views["view_2"] = job.augmentation.view_2
    permuted = [name for name, kind in views.items() if kind == "permuted"]
    without = [name for name, architecture in store.architectures.items() if architecture.symmetry.is_trivial]
    if not permuted or not without:
        return
    if len(without) == len(store.architectures):
        raise InputError(
            f"config field augmentation.{permuted[0]} is 'permuted', but no symmetry is known for the architecture "
            f"{without[0]!r} of {store.path}: set --augmentation.{permuted[0]} canonical, or trace its symmetry and "
            "prepare again with --tokens.symmetry (docs/zoos.md)"
        )
    _LOG.warning(
        "no symmetry is known for %d of %d architectures (for example %s): both views of their networks keep the order "
        "of the channels",
        len(without),
        len(store.architectures),
        without[0],
    )


def claim(run: Run) -> None:
    """Makes the run's folder, or takes it over to resume.

    Raises:
        InputError: the folder holds a run of another identity.
    """
    known = _read_identity(run)
    if known is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_identity(run, "running")
    elif known["identity"] != run.identity:
        raise InputError(
            f"--run-name {run.name} is a run with other settings ({_differences(known['settings'], run.settings)}) in "
            f"{run.folder}: choose another --run-name, or delete that folder"
        )


def is_complete(run: Run) -> bool:
    """Whether the run has been trained to its end and its model is in place."""
    known = _read_identity(run)
    return known is not None and known["status"] == "complete" and (run.output / "model.safetensors").exists()


def _read_identity(run: Run) -> dict[str, Any] | None:
    path = run.folder / IDENTITY_FILE
    if not path.exists():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: known[key] for key in ("identity", "settings", "status")}
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete the folder {run.folder}, or choose another --run-name"
        ) from error


def write_identity(run: Run, status: str) -> None:
    """Says who the run is and how far: ``running`` or ``complete``."""
    path = run.folder / IDENTITY_FILE
    staged = path.with_suffix(".partial")
    content = {"identity": run.identity, "status": status, "settings": run.settings}
    staged.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    staged.replace(path)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two nested settings disagree on, as `field: old -> new`."""
    before, after = flatten(old), flatten(new)
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    return "; ".join(f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed)
