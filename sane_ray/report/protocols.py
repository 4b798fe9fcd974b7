"""Plots of the protocols that ask for more than the zoo's own split: an epoch never seen, and another zoo."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.report.style import (
    CYCLE,
    GREY,
    INK,
    SEQUENTIAL,
    headline,
    label_axes,
    new_figure,
    new_grid,
    shorten,
    wrap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""One row of results.parquet."""

EPOCHS, TRANSFER, OWN = "leave-one-epoch", "out-of-distribution", "split"

LEAST_SCORE = -0.5
"""Scores below are arrows at the edge."""

PROBE = "ridge"
"""Which alone is tested at epochs that were left out."""

STEP_ASIDE, ASIDE = 0.1, 0.5
"""From one mark of an epoch to the next, and from the first to the last at most, of the distance to the next epoch."""

MOST_TICKS = 14
"""Of an axis of epochs, which are named."""


def has_epochs(rows: Sequence[Row]) -> bool:
    """Whether there is anything for ``epochs_figure``."""
    return bool(_epochs(rows))


def epochs_figure(rows: Sequence[Row]) -> Figure:
    """R² at an epoch that no training network was of, against the epoch: a line a feature set, a panel a property.

    Epochs are evenly spaced, and the marks of the sets stand beside each other at each, so that none hides another.

    Args:
        rows: Of results.parquet.
    """
    shown = _epochs(rows)
    targets = list(dict.fromkeys(row["target"] for row in shown))
    colours, epochs = _colours(shown), sorted({_epoch(row) for row in shown})
    places = {epoch: place for place, epoch in enumerate(epochs)}
    columns = min(2, max(1, len(targets)))
    figure, panels = new_grid(len(targets), columns, (4.6, 2.9), (0.8, 1.3))
    for axes, target in zip(panels, targets, strict=False):
        for beside, (features, style) in zip(_offsets(len(colours)), colours.items(), strict=True):
            mine = [row for row in shown if (row["target"], row["features"]) == (target, features)]
            _line(axes, sorted((places[_epoch(row)] + beside, row["r2"]) for row in mine), style)
        axes.set_xticks(range(len(epochs)), _named(epochs))
        axes.set_xlim(-0.5, len(epochs) - 0.5)
        low = min((row["r2"] for row in shown if row["target"] == target), default=0.0)
        axes.set_ylim(max(LEAST_SCORE, min(low, 0.9)) - 0.06, 1.04)
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=0.9)
        label_axes(axes, wrap(str(target), 36), ylabel="R²", xlabel="epoch that was left out")
    handles = [panels[0].plot([], [], label=shorten(name, 34), **style)[0] for name, style in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, frameon=False, fontsize=9)
    headline(figure, "Epochs that no training network was of (ridge)")
    return figure


def has_transfer(rows: Sequence[Row]) -> bool:
    """Whether there is anything for ``transfer_figure``."""
    return any(row["protocol"] == TRANSFER and row.get("r2") is not None for row in rows)


def transfer_figure(rows: Sequence[Row], zoos: Sequence[str] = ()) -> Figure:
    """R² trained on one zoo and tested on another: a small matrix a property, probe and feature set.

    What was not tried is blank; each zoo's own split is there for comparison.

    Args:
        rows: Of results.parquet.
        zoos: Their names, the first being the one whose own split there is.
    """
    known = [row for row in rows if row.get("r2") is not None]
    moved = [row for row in known if row["protocol"] == TRANSFER]
    names = list(zoos) or list(dict.fromkeys(name for row in moved for name in row["part"].split(" -> ")))
    probes, targets = (dict.fromkeys(row[key] for row in moved) for key in ("probe", "target"))
    tried = {(row["target"], row["probe"]) for row in moved}
    kinds = [kind for kind in itertools.product(targets, probes) if kind in tried]
    features = list(dict.fromkeys(row["features"] for row in moved))
    own = [row for row in known if row["protocol"] == OWN]
    values = {(row["target"], row["probe"], row["features"], row["part"]): row["r2"] for row in moved}
    values |= {(row["target"], row["probe"], row["features"], _part(names[0], names[0])): row["r2"] for row in own}
    size = (1.9 + 2.1 * len(features), 1.5 + 2.1 * len(kinds))
    figure, panels = new_figure(len(kinds), len(features), size, squeeze=False, sharex=True, sharey=True)
    for line, (target, probe) in zip(panels, kinds, strict=True):
        for axes, name in zip(line, features, strict=True):
            found = [[values.get((target, probe, name, _part(one, other)), np.nan) for other in names] for one in names]
            image = _matrix(axes, np.array(found, float))
            title = f"{wrap(f'{target}, {probe}', 24)}\n{shorten(name, 24)}"
            axes.set_title(title, loc="left", fontsize=9, color=INK)
        line[0].set_ylabel("trained on", color=INK)
        line[0].set_yticks(range(len(names)), [shorten(one, 20) for one in names])
    for axes in panels[-1]:
        axes.set_xlabel("tested on", color=INK)
        axes.set_xticks(range(len(names)), [shorten(one, 20) for one in names], rotation=30, ha="right")
    figure.colorbar(image, ax=panels, label="R²", extend="min", shrink=0.8)
    headline(figure, f"From one zoo to another: {' and '.join(probes)}")
    return figure


def _named(epochs: Sequence[float]) -> list[str]:
    """Names of the epochs' ticks; of many, some have none."""
    every = -(-len(epochs) // MOST_TICKS)
    return [f"{epoch:g}" if place % every == 0 else "" for place, epoch in enumerate(epochs)]


def _offsets(count: int) -> list[float]:
    """How far beside an epoch each of so many marks stands."""
    step = min(STEP_ASIDE, ASIDE / max(count - 1, 1))
    return [step * (place - (count - 1) / 2) for place in range(count)]


def _part(trained: str, tested: str) -> str:
    return f"{trained} -> {tested}"


def _epochs(rows: Sequence[Row]) -> list[Row]:
    return [
        row for row in rows if row["protocol"] == EPOCHS and row["probe"] == PROBE and row.get("r2") is not None
    ]  # fmt: skip


def _epoch(row: Row) -> float:
    return float(row["part"].removeprefix("epoch "))


def _colours(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A colour and mark for each feature set; beyond the colours there are, lines are dashed."""
    names, marks = dict.fromkeys(row["features"] for row in rows), "os^DPX*p"
    return {
        name: {"color": CYCLE[place % len(CYCLE)], "marker": marks[place % len(marks)], "markersize": 4,
               "linewidth": 1.4, "linestyle": "--" if place >= len(CYCLE) else "-"}
        for place, name in enumerate(names)
    }  # fmt: skip


def _line(axes: Axes, points: Sequence[tuple[float, float]], style: Mapping[str, Any]) -> None:
    """Joined where they are in sight; a fit far worse than guessing is an arrow at the edge that no line leads to."""
    if not points:
        return
    epochs, scores = np.array(points, float).T
    low = scores < LEAST_SCORE
    axes.plot(epochs, np.where(low, np.nan, scores), **style)
    below = {"color": style["color"], "markersize": 6, "linestyle": "none"}
    axes.plot(epochs[low], np.full(low.sum(), LEAST_SCORE), marker="v", **below)


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}" if abs(value) < 1000 else f"{value:.0e}"


def _matrix(axes: Axes, values: NDArray[np.float64]) -> Any:
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1)
    for (line, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value < 0.6 else INK
            axes.text(column, line, _short(value), ha="center", va="center", fontsize=9, color=colour)
    axes.tick_params(colors=GREY, labelsize=8)
    return image
