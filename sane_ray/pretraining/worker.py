"""What every training worker runs: build, resume, loop over the stream, validate, report, save, export.

The same code on one worker or many, CPU or GPU. Every rank takes the same decisions at the same steps. Never talks to
MLflow and never decides an order.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Generator
from typing import Any, Literal

import torch

from sane_ray.autoencoder.model import CONFIG_FILE
from sane_ray.cluster import quieten
from sane_ray.errors import InputError
from sane_ray.hardware import measured_peak, peak_flops
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.behavior import Behavior
from sane_ray.pretraining.checkpoints import Checkpoints
from sane_ray.pretraining.evaluation import Evaluations
from sane_ray.pretraining.export import Export, export
from sane_ray.pretraining.guard import MOST_UNUSABLE, Spike, SpikeGuard
from sane_ray.pretraining.history import Point
from sane_ray.pretraining.progress import Progress
from sane_ray.pretraining.ranks import from_first
from sane_ray.pretraining.run import BEST_FOLDER, MODEL_FOLDER, WorkerConfig
from sane_ray.pretraining.snapshots import Snapshots
from sane_ray.pretraining.state import TrainingState
from sane_ray.pretraining.step import Trainer
from sane_ray.pretraining.stream import WindowReader, fixed_batches, plan_of_store, stream, windows_of_split
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.reading import settings_of

CHECKPOINT_FOLDER = "checkpoints"
EVALUATION_FOLDER = "evaluations"

VALIDATION_SEED = 0
"""Seed of the fixed validation windows and of their permutations."""

LOOK_SECONDS = 2.0
"""About how often a run looks whether a node is to be taken away, and reports: Ray Train looks for reports about so
often, and a second one waits."""

LAST_EVALUATION_SECONDS = 120.0
"""How long the end of a run waits for an evaluation that is still under way."""

MOST_ROLLBACKS = 10
"""Spikes that a run goes back for; further ones are recorded."""

_LOG = logging.getLogger(__name__)


class NotFinite(InputError):
    """The loss, on training or validation windows, or the gradient became and stayed NaN or infinite."""


def train(settings: dict[str, WorkerConfig]) -> dict[str, Any]:
    """A Ray Train worker's loop, with its config under ``"worker"``; returns what rank 0 has to say at the end.

    A loss that is not finite ends every worker alike and is returned as ``{"error": sentence}``: there is nothing in it
    that a restart could mend.
    """
    config = settings["worker"]
    quieten()
    torch.set_num_threads(config.threads)
    try:
        with contextlib.closing(_Loop(config)) as loop:
            return loop.run()
    except NotFinite as error:
        return {"error": str(error)}


class _Loop:
    """The epochs of one worker."""

    def __init__(self, config: WorkerConfig) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.folder, self.config = config.folder, config.pretraining
        device = ray.train.torch.get_device()
        store = TokenStore.open(config.store)
        self.preprocessing = preprocessing_of(store)
        self.best_model = Export(self.folder / BEST_FOLDER, self.preprocessing)
        self.reader = self._reader(config, store, "train", config.pretraining.batch_size, config.pretraining.seed)
        self.steps_per_epoch = self.reader.plan.steps_per_epoch
        self.total = self.config.epochs * self.steps_per_epoch
        self.validation = self._validation(config, store)
        window = config.autoencoder.window
        self.trainer = Trainer(
            config.autoencoder,
            config.loss,
            config.augmentation,
            config.pretraining,
            steps=self.total,
            device=device,
            rank=self.rank,
            world_size=self.world_size,
            local_world_size=context.get_local_world_size(),
            behavior=Behavior(store, config.loss, window=window, device=device, seed=config.pretraining.seed)
            if config.loss.behavior
            else None,
        )
        self.progress = Progress(
            self.trainer,
            steps_per_epoch=self.steps_per_epoch,
            tokens_per_step=self.trainer.views * window * self.reader.plan.windows_per_epoch / self.steps_per_epoch,
            peak_flops=measured_peak(config.threads, self.trainer.precision)
            if device.type == "cpu"
            else peak_flops(device, self.trainer.precision),
        )
        self.checkpoints = Checkpoints(
            self.folder / CHECKPOINT_FOLDER,
            keep=self.config.checkpoints_kept,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.guard = SpikeGuard(self.config.spike_factor)
        self.best = self._best_on_storage()
        """Lowest validation loss of a model in ``BEST_FOLDER``."""
        self.validated: Point = {}
        """The last validation; with ``validate_every``, the end has its own."""
        self.validated_at = 0
        """Its step."""
        self.candidate: float | None = None
        """Validation loss of a better one on its way there."""
        self.spikes = self.rollbacks = 0
        self.preempted = False
        self.snapshots = Snapshots(
            self.folder / EVALUATION_FOLDER,
            self.preprocessing,
            Evaluations(config.store, networks=self.config.evaluate_networks, seed=self.config.seed)
            if self.config.evaluate_every and self.rank == 0
            else None,
        )
        self.points: list[Point] = []
        """Of steps that are not reported yet."""
        self.reported: deque[list[Point]] = deque(maxlen=3)
        """The last reports: a controller that dies may not have written them, so checkpoints carry them."""
        self.rewound_to: int | None = None
        """Step that the next report tells to have gone back to."""
        self.looked, self.next_look = (time.monotonic(), 0), 0
        self.report_is_due = False
        self.batches: Generator[Batch, None, None] | None = None

    def close(self) -> None:
        """Ends the data stream and what is being written."""
        with contextlib.ExitStack() as last:
            last.callback(self.snapshots.close)
            last.callback(self.best_model.close)
            last.callback(self.checkpoints.close)
            last.callback(self._end_stream)

    def run(self) -> dict[str, Any]:
        """From the last checkpoint to the last step; what the driver wants to know at the end."""
        self._resume()
        state = self.trainer.state
        while state.step < self.total:
            if state.step in state.skipped:
                self.trainer.skip()
            else:
                self._step()
            self._after_step()
        self._finish()
        return {"steps": self.total, "parameters": self.trainer.parameters}

    def _step(self) -> None:
        if self.batches is None:
            state = self.trainer.state
            self.batches = stream(
                self.reader,
                epochs=self.config.epochs,
                first_step=state.step,
                skip=frozenset(state.skipped),
                device=self.trainer.device,
            )
        with self.progress.waiting():
            batch = next(self.batches)
        self.progress.add(self.trainer.step(batch))

    def _after_step(self) -> None:
        """Looks, reports and saves when it is time for it."""
        step = self.trainer.state.step
        notice = self._look()
        validating, saving = self._due(self.config.validate_every), self._due(self.config.checkpoint_every)
        evaluating = bool(self.config.evaluate_every) and self._due(self.config.evaluate_every)
        if not (step % self.config.log_every == 0 or validating or saving or evaluating or notice):
            return
        points = self.progress.points()
        spikes = self._judge(points)
        if spikes and self._roll_back(spikes):
            return
        self.points += points
        if validating:
            self._validate()
        if evaluating:
            self.snapshots.take(self.trainer.model, step, step / self.steps_per_epoch)
        if saving or notice or self.report_is_due:
            self._report()
        if step == self.total:
            self.checkpoints.save(self._state())
        elif saving or notice:
            self.checkpoints.begin(self._state())
        if notice == "first":
            self.checkpoints.finish()
        self.progress.restart()

    def _look(self) -> Literal["", "first", "again"]:
        """Whether a node of this run is about to be taken away, told every ``LOOK_SECONDS`` or so.

        Looking takes all ranks, so they agree on the step at which they look next, by the clock of rank 0.
        """
        import ray.train

        step = self.trainer.state.step
        if step < self.next_look:
            return ""
        (then, before), now = self.looked, time.monotonic()
        ahead = int(LOOK_SECONDS * (step - before) / max(now - then, 1e-3)) if step > before else 1
        self.looked, self.next_look = (now, step), step + max(1, int(from_first(ahead)))
        self.report_is_due = True
        if ray.train.get_preemption_info() is None:
            return ""
        known, self.preempted = self.preempted, True
        return "again" if known else "first"

    def _due(self, every: float) -> bool:
        """Every so many epochs, and at the very end."""
        step = self.trainer.state.step
        return step == self.total or step % max(1, round(every * self.steps_per_epoch)) == 0

    def _judge(self, points: list[Point]) -> list[Spike]:
        """What was unusual in the last steps.

        Raises:
            NotFinite: no step has had a usable gradient for long.
        """
        spikes = self.guard.look(points)
        self.spikes += len(spikes)
        if self.guard.unusable >= MOST_UNUSABLE:
            self.points += points
            self._end_not_finite("train/gradient_norm")
        for spike in spikes if self.rank == 0 else ():
            _LOG.warning(
                "step %d: the gradient's norm is %.3g, %.0f times the usual %.3g",
                spike.step,
                spike.norm,
                spike.norm / spike.usual,
                spike.usual,
            )
        if points:
            left_out = len(self.trainer.state.skipped) + self.guard.skipped
            points[-1] |= {"spikes": float(self.spikes), "skipped_steps": float(left_out)}
        return spikes

    def _roll_back(self, spikes: list[Spike]) -> bool:
        """Goes back to the last checkpoint, to leave out the batch of the first of these spikes; False if it does not.

        The others may have come of it. No loop: each time a batch more is left out, and after ``MOST_ROLLBACKS``
        spikes are only recorded.
        """
        state = self.trainer.state
        if self.config.on_spike != "rollback" or self.rollbacks >= MOST_ROLLBACKS:
            return False
        self.checkpoints.finish()
        known, counts, first = state.skipped, (self.spikes, self.rollbacks + 1), spikes[0].step
        if self._load() is None:
            if self.rank == 0:
                _LOG.warning("there is no checkpoint yet to go back to: the spike of step %d is only recorded", first)
            return False
        state.skipped = sorted({*state.skipped, *known, first - 1})
        self.spikes, self.rollbacks = counts
        self.rewound_to = state.step
        self._end_stream()
        if self.rank == 0:
            _LOG.warning("going back to step %d; the batch of step %d is left out from now on", state.step, first)
        self.progress.restart()
        return True

    def _end_stream(self) -> None:
        if self.batches is not None:
            self.batches.close()
        self.batches = None

    def _validate(self) -> None:
        """Adds the validation to the last point, and keeps the model if it is the best so far."""
        if not self.validation:
            return
        self.validated, self.validated_at = self.trainer.validate(self.validation), self.trainer.state.step
        self._last_point().update(self.validated)
        if not math.isfinite(self.validated["val/loss"]):
            self._end_not_finite("val/loss")
        self._settle_best()
        self._keep_if_best()

    def _keep_if_best(self) -> None:
        """Begins to write the model just validated, if it is the best so far."""
        if self.validated["val/loss"] < self.best:
            self.candidate = self.validated["val/loss"]
            self._describe_model()
            self.best_model.begin(self.trainer.model)

    def _settle_best(self) -> None:
        """The better model is the best one when storage has it."""
        if self.candidate is not None and from_first(self.best_model.finish()):
            self.best = self.candidate
        self.candidate = None

    def _best_on_storage(self) -> float:
        """Validation loss of the best model that this run has written so far; what is there is the truth."""
        known = math.inf
        if self.rank == 0:
            with contextlib.suppress(OSError, ValueError, KeyError):
                config = json.loads((self.folder / BEST_FOLDER / CONFIG_FILE).read_text(encoding="utf-8"))
                known = config["provenance"]["val/loss"]
        return from_first(known)

    def _describe_model(self) -> None:
        """Says in the model where it comes from."""
        step = self.trainer.state.step
        provenance = {"run": self.folder.name, "step": step, "epoch": step / self.steps_per_epoch}
        self.trainer.model.provenance = provenance | self.validated

    def _last_point(self) -> Point:
        """The point of the step just made; a step that was left out has had none."""
        step = self.trainer.state.step
        if not self.points or self.points[-1]["step"] != step:
            self.points.append({"step": step, "epoch": step / self.steps_per_epoch, "time": time.time()})
        return self.points[-1]

    def _report(self) -> None:
        """Sends what was not reported yet to the controller."""
        import ray.train

        evaluations = self.snapshots.collect()
        ray.train.report({"history": self.points, "evaluations": evaluations, "rewound_to": self.rewound_to})
        self.reported.append(self.points)
        self.points, self.rewound_to, self.report_is_due = [], None, False

    def _state(self) -> TrainingState:
        """The state to save, with all that a resumed run must know."""
        state = self.trainer.state
        state.extra = {
            "ledger": self.reader.plan.ledger(state.step),
            "precision": str(self.trainer.precision),
            "guard": self.guard.state(),
            "validated": self.validated,
            "validated_at": self.validated_at,
            "spikes": self.spikes,
            "rollbacks": self.rollbacks,
            "history": [point for report in self.reported for point in report],
        }
        return state

    def _resume(self) -> None:
        """Goes on from the newest checkpoint, and does again what was under way beside it and may have been lost.

        That is the last reports, the best model, if it was that of this step, and the evaluation of the last model.
        """
        step = self._load()
        if step is None:
            return
        self.points = self.trainer.state.extra["history"]
        self._report()
        if self.validated and self.validated_at == step:
            self._keep_if_best()
        self.progress.restart()
        if self.config.evaluate_every and step == self.total:
            self.snapshots.take(self.trainer.model, step, step / self.steps_per_epoch)

    def _load(self) -> int | None:
        """The step of the newest usable checkpoint, with the state and all that travels in it restored."""
        step = self.checkpoints.load_latest(self.trainer.state)
        if step is None:
            return None
        extra = self.trainer.state.extra
        ours, theirs = self.reader.plan.ledger(step), extra["ledger"]
        if ours != theirs:
            raise InputError(
                f"the checkpoints in {self.folder} were trained in another order of windows ({theirs}) than this run's "
                f"({ours}): delete {self.folder}, or choose another --run-name"
            )
        if extra["precision"] != str(self.trainer.precision) and self.rank == 0:
            _LOG.warning("the run began in %s and goes on in %s", extra["precision"], self.trainer.precision)
        self.guard.restore(extra["guard"])
        self.validated, self.validated_at = extra["validated"], extra["validated_at"]
        self.spikes, self.rollbacks = extra["spikes"], extra["rollbacks"]
        self.points = []
        self.looked, self.next_look = (time.monotonic(), step), step
        return step

    def _finish(self) -> None:
        """Writes the finished model, and waits a while for an evaluation that is still under way."""
        self._settle_best()
        self._describe_model()
        export(self.trainer.model, self.folder / MODEL_FOLDER, self.preprocessing)
        self.snapshots.finish(LAST_EVALUATION_SECONDS)
        self._report()

    def _end_not_finite(self, name: str) -> None:
        """Reports the steps that led there, and ends the run.

        Raises:
            NotFinite: always.
        """
        self._last_point()
        point = next(point for point in reversed(self.points) if not math.isfinite(point.get(name, 0.0)))
        clip = self.config.gradient_clip
        self._report()
        clipping = "" if 0 < clip <= 1 else f", or set pretraining.gradient_clip ({clip:g}) to 1"
        raise NotFinite(
            f"{name} is {point[name]} at step {point['step']:g}: lower pretraining.learning_rate "
            f"({self.config.learning_rate:g}){clipping}"
        )

    def _reader(self, config: WorkerConfig, store: TokenStore, split: str, batch_size: int, seed: int) -> WindowReader:
        plan, groups = plan_of_store(
            store,
            split,
            window=config.autoencoder.window,
            batch_size=batch_size,
            pool_mb=config.pretraining.shuffle_mb,
            seed=seed,
        )
        return WindowReader(
            store.path, plan, groups, config.augmentation, self.rank, self.world_size, views=config.loss.views
        )

    def _validation(self, config: WorkerConfig, store: TokenStore) -> list[Batch]:
        """This worker's part of the fixed validation batches; none without a val split.

        Their seed is fixed too, so that runs of any training seed are compared on the same windows.
        """
        windows = min(config.pretraining.validation_windows, windows_of_split(store, "val", config.autoencoder.window))
        if windows == 0:
            return []
        batch_size = min(config.pretraining.batch_size, windows)
        reader = self._reader(config, store, "val", batch_size, VALIDATION_SEED)
        return fixed_batches(reader, windows // batch_size)


def preprocessing_of(store: TokenStore) -> dict[str, Any]:
    """How the store's weights became tokens: what a trained model carries along and enforces."""
    architectures = {name: architecture.to_dict() for name, architecture in store.architectures.items()}
    return {"token_size": store.token_size, **settings_of(store), "architectures": architectures}
