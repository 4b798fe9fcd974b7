"""Every step's metrics of a run, as JSON lines: Ray Train's controller writes them, plots and progress read them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from sane_ray.pretraining.progress import Point

_TAIL_BYTES = 1 << 16


class HistoryCallback(UserCallback):
    """Appends rank 0's points to a file, from the controller, which runs on the driver's node and outlives workers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train when every worker has reported; ``metrics`` has one report a worker, by rank."""
        points = metrics[0].get("history", ())
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(point) + "\n" for point in points)


def read_history(path: Path) -> list[Point]:
    """The points of a history in order of their steps; of a step that was repeated after a restart, the last."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    points: dict[int, Point] = {}
    for line in lines:
        try:
            point = json.loads(line)
        except ValueError:  # a line that a killed controller left unfinished
            continue
        points[point["step"]] = point
    return [points[step] for step in sorted(points)]


def last_point(path: Path) -> Point | None:
    """The last whole point of a history, without reading all of it."""
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
        if isinstance(point, dict):
            return point
    return None
