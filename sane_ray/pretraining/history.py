"""Every step's metrics of a run, as JSON lines: Ray Train's controller writes them, plots and progress read them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

Point = dict[str, float]
"""Metrics of one step by name, with ``step``, ``epoch`` and ``time`` (seconds since 1970)."""

_TAIL_BYTES = 1 << 16


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
