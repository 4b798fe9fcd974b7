"""Results as text: the table of a run, and the plan of one that has not begun. Never computes a result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sane_ray.config import PropertiesConfig
from sane_ray.properties.features import Zoo
from sane_ray.properties.protocols import moved
from sane_ray.report.names import counted

LABELS = {"r2": "R²", "tau": "tau", "mae": "MAE", "accuracy": "accuracy"}
_NOTES = 12

LEAST_SHOWN = -10.0
"""Of R² and tau no more is said than that they are lower; files have the value."""

WIDEST = 120
"""Columns of a terminal that a table takes; one of more columns goes on below."""

MOST_DECIMALS, MOST_OF_ERRORS = 3, 6
"""Of scores, whose size is known, and of errors in units of the property, which may be small: 3 digits count."""


def results_table(results: dict[str, Any]) -> Iterator[str]:
    """The lines of the table: for each target and protocol a line a feature set and probe; what is missing, and why.

    Args:
        results: The content of results.json.
    """
    rows, names = results["rows"], [zoo["name"] for zoo in results["zoos"]]
    yield "intervals are 95 % of a bootstrap over test models"
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [row for row in rows if row["target"] == target]
        own = [row for row in of_target if row["protocol"] == "split"]
        yield from _own_split(f"{target}, {names[0]}" if len(names) > 1 else target, own)
        yield from _epochs(target, [row for row in of_target if row["protocol"] == "leave-one-epoch"])
        own_part = moved(names[0], names[0])
        transfer = [row for row in of_target if row["protocol"] == "out-of-distribution"]
        yield from _transfer(target, [row | {"part": own_part} for row in own] + transfer if transfer else [])
    notes = results["notes"]
    yield from (f"note: {note}" for note in notes[:_NOTES])
    if len(notes) > _NOTES:
        yield f"note: {len(notes) - _NOTES} more are in results.json"


def zoo_line(facts: Mapping[str, Any]) -> str:
    """One line on a zoo, by its entry in results.json."""
    splits = ", ".join(f"{count:,} {split}" for split, count in facts["models_by_split"].items())
    counts = f"{counted(facts['checkpoints'], 'checkpoint')} of {counted(facts['models'], 'model')}"
    return f"zoo {facts['name']}: {counts} ({splits})"


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
    lines = [("features", "probe", *(LABELS[metric] for metric in metrics))]
    lines += [(row["features"], row["probe"], *(_cell(row, m) for m in metrics)) for row in fitted]
    yield f"\n{target} ({fitted[0]['n_train']:,} training, {fitted[0]['n_test']:,} test checkpoints)"
    yield from _aligned(lines)
    missing = {row["features"]: row["note"] for row in rows if not measured(row)}
    yield from (f"  {features}: {note}" for features, note in missing.items())


def _epochs(target: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line an epoch that was left out, a column a feature set, for each probe."""
    for probe, metric, chosen in _by_probe(rows):
        features = list(dict.fromkeys(row["features"] for row in chosen))
        cells = {(row["part"], row["features"]): shown(row.get(metric)) for row in chosen}
        lines = [("", *features)]
        for part in dict.fromkeys(row["part"] for row in chosen):
            lines.append((part, *(cells.get((part, name), "-") for name in features)))
        yield f"\n{target}, leave-one-epoch, {probe}: {LABELS[metric]}"
        yield from _aligned(lines)


def _transfer(target: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line a feature set, a column for each zoo that is trained on and each that is tested on, for each probe."""
    for probe, metric, chosen in _by_probe(rows):
        parts = list(dict.fromkeys(row["part"] for row in chosen))
        cells = {(row["part"], row["features"]): _cell(row, metric) for row in chosen}
        lines = [("trained on -> tested on", *parts)]
        for name in dict.fromkeys(row["features"] for row in chosen):
            lines.append((name, *(cells.get((part, name), "-") for part in parts)))
        yield f"\n{target}, out-of-distribution, {probe}: {LABELS[metric]}"
        yield from _aligned(lines)


def _by_probe(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Each probe, the metric that it is told by, and its rows that have it."""
    for probe in dict.fromkeys(row["probe"] for row in rows):
        for metric in ("r2", "accuracy"):
            chosen = [row for row in rows if row["probe"] == probe and row.get(metric) is not None]
            if chosen:
                yield probe, metric, chosen


def measured(row: Mapping[str, Any]) -> bool:
    """Whether a row has any score."""
    return any(row.get(metric) is not None for metric in LABELS)


def _cell(row: dict[str, Any], metric: str) -> str:
    if row.get(metric) is None:
        return "-"
    most = MOST_OF_ERRORS if metric == "mae" else MOST_DECIMALS
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    interval = f" [{shown(low, most)}, {shown(high, most)}]" if low is not None and high is not None else ""
    return f"{shown(row[metric], most)}{interval}"


def shown(value: float | None, most_decimals: int = MOST_DECIMALS) -> str:
    """A score or an error for a reader."""
    if value is None:
        return "-"
    return f"< {LEAST_SHOWN:g}" if value < LEAST_SHOWN else digits(value, most_decimals)


def digits(value: float, most_decimals: int = MOST_DECIMALS, sign: str = "") -> str:
    """A number of three digits that count, as far as decimals go; ``sign`` as in a format."""
    size = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    return f"{value:{sign},.{min(most_decimals, max(0, 2 - size)) if value else MOST_DECIMALS}f}"


def _aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines with their columns below each other; columns that are too many go on below, the first again."""
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for places in _blocks(widths):
        for line in lines:
            yield "  " + "  ".join(f"{line[place]:<{widths[place]}}" for place in (0, *places)).rstrip()


def _blocks(widths: Sequence[int]) -> Iterator[list[int]]:
    """Places of the columns that stand side by side with the first one, as many as a terminal has room for."""
    places: list[int] = []
    for place in range(1, len(widths)):
        if places and 2 + sum(widths[each] + 2 for each in (0, *places, place)) - 2 > WIDEST:
            yield places
            places = []
        places.append(place)
    yield places
