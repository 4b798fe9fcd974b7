"""Every step's metrics of a run, as JSON lines: Ray Train's controller writes them, plots and progress read them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from sane_ray.pretraining.progress import Point

_TAIL_BYTES = 1 << 16

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


def append(path: Path, points: Iterable[Point]) -> None:
    """Adds points to a history, on lines of their own even after a line that a killed process left unfinished."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.writelines(json.dumps(point).encode() + b"\n" for point in points)


def read_history(path: Path) -> list[Point]:
    """The points of a history in order of their steps.

    Of a step that was repeated after a restart, the last; what else was said of it, such as an evaluation that came
    later, is added to it.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    points: dict[int, Point] = {}
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:  # a line that a killed controller left unfinished
            continue
        if isinstance(point, dict) and "step" in point:
            points[point["step"]] = points.get(point["step"], {}) | point
    return [points[step] for step in sorted(points)]


def last_point(path: Path) -> Point | None:
    """The last whole point of training in a history, without reading all of it."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and "train/loss" in point:
            return point
    return None
