"""What every training worker runs: build, resume, loop over the stream, validate, report, save, export.

The same code on one worker or many, CPU or GPU. Never talks to MLflow and never decides an order.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.cluster import quieten
from sane_ray.config import AugmentationConfig, AutoencoderConfig, LossConfig, PretrainingConfig
from sane_ray.errors import InputError
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.progress import Point, Progress
from sane_ray.pretraining.state import TrainingState, whole_model
from sane_ray.pretraining.step import Trainer
from sane_ray.pretraining.stream import WindowReader, fixed_batches, plan_of_store, stream, windows_of_split
from sane_ray.tokens.store import TokenStore

MODEL_FOLDER = "model"
"""Where the last checkpoint holds the finished model, inside its folder."""

VALIDATION_SEED = 0
"""Seed of the fixed validation windows and of their permutations."""


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker needs, decided by the launcher; travels to the workers as it is."""

    store: Path
    autoencoder: AutoencoderConfig
    loss: LossConfig
    augmentation: AugmentationConfig
    pretraining: PretrainingConfig
    data_cpus: float
    threads: int


def train(settings: dict[str, WorkerConfig]) -> dict[str, Any]:
    """A Ray Train worker's loop, with its config under ``"worker"``; returns what rank 0 has to say at the end.

    A loss that is not finite ends every worker alike and is returned as ``{"error": sentence}``: restarting from the
    last checkpoint, as after a fault, would only meet it again.
    """
    import ray.train
    import ray.train.torch

    config = settings["worker"]
    quieten()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.threads)
    device = ray.train.torch.get_device()
    store = TokenStore.open(config.store)
    reader = _reader(
        config,
        store,
        "train",
        batch_size=config.pretraining.batch_size,
        seed=config.pretraining.seed,
        rank=rank,
        world_size=world_size,
    )
    validation = _validation(config, store, rank, world_size)
    steps = config.pretraining.epochs * reader.plan.steps_per_epoch
    trainer = Trainer(
        config.autoencoder,
        config.loss,
        config.augmentation,
        config.pretraining,
        steps=steps,
        device=device,
        rank=rank,
        world_size=world_size,
    )
    _resume(trainer.state)
    loop = _Loop(config, trainer, reader, validation)
    try:
        loop.run()
    except NotFinite as error:
        return {"error": str(error)}
    return {"steps": steps, "parameters": trainer.parameters}


class NotFinite(InputError):
    """The loss, on training or validation windows, or the gradient became NaN or infinite."""


class _Loop:
    """The epochs of one worker."""

    def __init__(self, config: WorkerConfig, trainer: Trainer, reader: WindowReader, validation: list[Batch]) -> None:
        self.config = config.pretraining
        self.data_cpus = config.data_cpus
        self.preprocessing = preprocessing_of(TokenStore.open(config.store))
        self.trainer = trainer
        self.reader = reader
        self.validation = validation
        self.steps_per_epoch = reader.plan.steps_per_epoch
        self.total = self.config.epochs * self.steps_per_epoch

    def run(self) -> None:
        """From the state's step to the last, reporting, validating and saving on the way."""
        import ray.train

        state = self.trainer.state
        batches = stream(self.reader, epochs=self.config.epochs, first_step=state.step, data_cpus=self.data_cpus)
        window, batch_size = self.reader.plan.window, self.reader.plan.batch_size
        progress = Progress(self.trainer, steps_per_epoch=self.steps_per_epoch, tokens_per_step=2 * batch_size * window)
        with contextlib.closing(batches):
            while state.step < self.total:
                with progress.waiting():
                    batch = next(batches).to(self.trainer.device)
                progress.add(self.trainer.step(batch))
                if self._epoch_due(self.config.checkpoint_every):
                    self._save(self._points(progress))
                    progress.restart()
                elif self._due(self.config.log_every) or self._epoch_due(self.config.validate_every):
                    ray.train.report({"history": self._points(progress)})
                    progress.restart()

    def _due(self, every: int) -> bool:
        return self.trainer.state.step % every == 0

    def _epoch_due(self, every: int) -> bool:
        """At the last step of every ``every``-th epoch, and of the very last."""
        step = self.trainer.state.step
        return step == self.total or step % (every * self.steps_per_epoch) == 0

    def _points(self, progress: Progress) -> list[Point]:
        """The steps since the last report, the last with the validation if one is due.

        Raises:
            NotFinite: a loss or a gradient is not; nothing after it is saved.
        """
        points = progress.points()
        if self._epoch_due(self.config.validate_every) and self.validation:
            points[-1] |= self.trainer.validate(self.validation)
        for point in points:
            self._check_finite(point)
        return points

    def _check_finite(self, point: Point) -> None:
        for name in ("train/loss", "train/gradient_norm", "val/loss"):
            if not math.isfinite(point.get(name, 0.0)):
                raise NotFinite(
                    f"{name} is {point[name]} at step {point['step']:g}: lower pretraining.learning_rate "
                    f"({self.config.learning_rate:g}), or set pretraining.gradient_clip "
                    f"({self.config.gradient_clip:g}) to 1 or less"
                )

    def _save(self, points: list[Point]) -> None:
        """Reports a checkpoint of the state, at the end with the finished model in it."""
        import ray.train

        state = self.trainer.state
        with _temporary_folder() as folder:
            state.save(folder)
            if state.step == self.total:
                self._export(folder / MODEL_FOLDER)
            metrics = {"step": state.step, "history": points}
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _export(self, folder: Path) -> None:
        """Rank 0 writes the finished model, with the preprocessing it was trained with, into the checkpoint."""
        weights = whole_model(self.trainer.model)
        if self.trainer.rank == 0:
            with torch.device("meta"):
                model = SANE(self.trainer.model.config)
            model.load_state_dict(weights, assign=True)
            model.save_pretrained(folder, preprocessing=self.preprocessing)


def preprocessing_of(store: TokenStore) -> dict[str, Any]:
    """How the store's weights became tokens: what a trained model carries along and enforces."""
    architectures = {name: architecture.to_dict() for name, architecture in store.architectures.items()}
    return {"token_size": store.token_size, "architectures": architectures}


def _reader(
    config: WorkerConfig, store: TokenStore, split: str, *, batch_size: int, seed: int, rank: int, world_size: int
) -> WindowReader:
    plan, groups = plan_of_store(
        store,
        split,
        window=config.autoencoder.window,
        batch_size=batch_size,
        pool_mb=config.pretraining.shuffle_mb,
        seed=seed,
    )
    return WindowReader(store.path, plan, groups, config.augmentation, rank, world_size)


def _validation(config: WorkerConfig, store: TokenStore, rank: int, world_size: int) -> list[Batch]:
    """This worker's part of the fixed validation batches; none without a val split.

    Their seed is fixed too, so that runs of any training seed are compared on the same windows.
    """
    windows = min(config.pretraining.validation_windows, windows_of_split(store, "val", config.autoencoder.window))
    batch_size = min(config.pretraining.batch_size, windows - windows % world_size)
    if batch_size == 0:
        return []
    reader = _reader(
        config, store, "val", batch_size=batch_size, seed=VALIDATION_SEED, rank=rank, world_size=world_size
    )
    return fixed_batches(reader, windows // batch_size)


def _resume(state: TrainingState) -> None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state.load(Path(folder))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sane_ray_checkpoint_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
