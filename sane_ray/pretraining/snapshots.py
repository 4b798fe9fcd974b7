"""Models as they are in the midst of a training, written beside it and handed to evaluations; never waits for either.

Every rank has the same and calls the same, since gathering a model takes all of them; rank 0 writes and evaluates.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sane_ray.autoencoder.model import SANE
from sane_ray.pretraining.evaluation import Evaluations
from sane_ray.pretraining.export import Export
from sane_ray.pretraining.history import Point
from sane_ray.pretraining.ranks import from_first, is_first

_LOG = logging.getLogger(__name__)


class _Snapshot(NamedTuple):
    step: int
    epoch: float
    export: Export


class Snapshots:
    """One snapshot at a time on its way to an evaluation."""

    def __init__(
        self, folder: Path, preprocessing: Mapping[str, Any] | None = None, evaluations: Evaluations | None = None
    ) -> None:
        """Deletes what workers that died had not evaluated.

        Args:
            folder: of the snapshots, which every node sees.
            preprocessing: as of ``export``.
            evaluations: on rank 0, where the snapshots go; None on the others.
        """
        self._folder = folder
        self._preprocessing = preprocessing
        self._evaluations = evaluations
        self._last: _Snapshot | None = None
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)

    def take(self, model: SANE, step: int, epoch: float) -> None:
        """Gathers the model and begins to write it, unless the one before is still being written."""
        self._submit()
        if from_first(self._last is not None):
            if is_first():
                _LOG.warning("step %d is not evaluated: the model before is still being written", step)
            return
        self._last = _Snapshot(step, epoch, Export(self._folder / f"step_{step:09d}", self._preprocessing))
        self._last.export.begin(model)

    def collect(self) -> list[Point]:
        """What evaluations have found since the last call, on rank 0."""
        self._submit()
        return self._evaluations.collect() if self._evaluations else []

    def finish(self, timeout: float) -> None:
        """Waits for what is being written, and up to so many seconds for its evaluation; see ``collect``."""
        self._submit(wait=True)
        if self._evaluations:
            self._evaluations.wait(timeout)

    def close(self) -> None:
        """Ends what is being written; the last call."""
        if self._last is not None:
            self._last.export.close()

    def _submit(self, *, wait: bool = False) -> None:
        """Asks for the evaluation of the last snapshot, if it is written."""
        if self._last is None or not (wait or self._last.export.is_finished):
            return
        (step, epoch, snapshot), self._last = self._last, None
        if snapshot.close() and self._evaluations:
            self._evaluations.submit(step, epoch, snapshot.folder)
