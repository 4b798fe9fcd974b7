"""Ray Train's side of the history: rank 0's reports are written from the controller, which outlives every worker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from sane_ray.pretraining.history import Point, append

_LOG = logging.getLogger(__name__)


class HistoryCallback(UserCallback):
    """Appends rank 0's points to a file, from the controller, which runs on the driver's node and outlives workers.

    While the file cannot be written, points are kept and written later: storage that is away ends no training.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: list[Point] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train when every worker has reported; ``metrics`` has one report a worker, by rank."""
        away = bool(self._kept)
        self._kept += [*metrics[0].get("evaluations", ()), *metrics[0].get("history", ())]
        try:
            append(self._path, self._kept)
            self._kept = []
        except OSError as error:
            if not away:
                _LOG.warning("%s cannot be written (%s): its points are kept and written later", self._path, error)
