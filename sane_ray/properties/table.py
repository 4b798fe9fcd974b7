"""Results as text: the table of a run, and the plan of one that has not begun. Never computes a result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sane_ray.config import PropertiesConfig
from sane_ray.properties.features import Zoo

LABELS = {"r2": "R²", "tau": "tau", "mae": "MAE", "accuracy": "accuracy"}
_NOTES = 12

LEAST_SHOWN = -10.0
"""Of R2 and tau no more is said than that they are lower; files have the value."""


def results_table(results: dict[str, Any]) -> Iterator[str]:
    """The lines of the table: for each target and protocol a line a feature set and probe; what is missing, and why.

    Args:
        results: The content of results.json.
    """
    zoo = results["zoos"][0]
    splits = ", ".join(f"{count} {split}" for split, count in zoo["models_by_split"].items())
    yield f"zoo {zoo['name']}: {zoo['checkpoints']:,} checkpoints of {zoo['models']:,} models ({splits})"
    yield "intervals are 95 % of a bootstrap over test models"
    rows = results["rows"]
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [row for row in rows if row["target"] == target]
        yield from _own_split(target, [row for row in of_target if row["protocol"] == "split"])
        yield from _other_parts(target, [row for row in of_target if row["protocol"] != "split"])
    notes = results["notes"]
    yield from (f"note: {note}" for note in notes[:_NOTES])
    if len(notes) > _NOTES:
        yield f"note: {len(notes) - _NOTES} more are in results.json"


def describe(zoos: Sequence[Zoo], config: PropertiesConfig, output: Path, doubts: Sequence[str] = ()) -> str:
    """What a run would do, and what it could not."""
    lines = [
        f"zoo      {zoo.name}: {len(zoo):,} checkpoints of {len(np.unique(zoo.column('model'))):,} models, "
        f"{'with' if zoo.embeddings is not None else 'without'} embeddings, "
        f"{'with' if zoo.store is not None else 'without'} weights"
        for zoo in zoos
    ]
    lines += [
        f"targets  {', '.join(config.targets)}",
        f"features {', '.join(config.features)}",
        f"probes   {', '.join(config.probes)}; {config.seeds} seeds of boosting, {config.bootstrap} draws of models",
        *(f"note     {doubt}" for doubt in doubts),
        f"results  {output}",
    ]
    return "\n".join(lines)


def _own_split(target: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    fitted = [row for row in rows if measured(row)]
    if not fitted:
        yield f"\n{target}: {rows[0]['note'] if rows else 'nothing was fitted'}"
        return
    metrics = [metric for metric in LABELS if any(metric in row for row in fitted)]
    lines = [("features", "probe", *(LABELS[metric] for metric in metrics), "chosen")]
    lines += [(row["features"], row["probe"], *(_cell(row, m) for m in metrics), row["choice"]) for row in fitted]
    yield f"\n{target} ({fitted[0]['n_train']:,} training, {fitted[0]['n_test']:,} test checkpoints)"
    yield from _aligned(lines)
    missing = {row["features"]: row["note"] for row in rows if not measured(row)}
    yield from (f"  {features}: {note}" for features, note in missing.items())


def _other_parts(target: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line a part, a column a feature set: R2 (or accuracy) of each probe."""
    measured = [row for row in rows if any(row.get(metric) is not None for metric in ("r2", "accuracy"))]
    for protocol, probe in dict.fromkeys((row["protocol"], row["probe"]) for row in measured):
        chosen = [row for row in measured if (row["protocol"], row["probe"]) == (protocol, probe)]
        features = list(dict.fromkeys(row["features"] for row in chosen))
        cells = {(row["part"], row["features"]): row.get("r2", row.get("accuracy")) for row in chosen}
        lines = [("", *features)]
        for part in dict.fromkeys(row["part"] for row in chosen):
            lines.append((part, *(shown(cells.get((part, name))) for name in features)))
        yield f"\n{target}, {protocol}, {probe}: {'R2' if 'r2' in chosen[0] else 'accuracy'}"
        yield from _aligned(lines)


def measured(row: Mapping[str, Any]) -> bool:
    """Whether a row has any score."""
    return any(row.get(metric) is not None for metric in LABELS)


def _cell(row: dict[str, Any], metric: str) -> str:
    if row.get(metric) is None:
        return "-"
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    interval = f" [{shown(low)}, {shown(high)}]" if low is not None and high is not None else ""
    return f"{shown(row[metric])}{interval}"


def shown(value: float | None) -> str:
    """A score for a reader."""
    if value is None:
        return "-"
    return f"< {LEAST_SHOWN:g}" if value < LEAST_SHOWN else f"{value:.3f}"


def _aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for line in lines:
        yield "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
