"""Plots of generated models: accuracy against novelty, fine-tuning, and what they share with training models.

Rows may come from a Parquet file. A method has one colour in all plots; what was selected of it (``noise:best`` of
``noise``) has the same with another mark. See ``sane_ray.sampling.audit`` for what the measures are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    headline,
    label_axes,
    new_figure,
    save,
    shorten,
)
from sane_ray.sampling.audit import REPLICA_NOVELTY, REPLICA_QUANTILE, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Row = Mapping[str, Any]
"""One model (and epoch): ``method``, and what was measured."""

ANCHORS = "anchors"
"""The method whose models are training models; a line, since they are what the others start from."""

COLOURS = {
    "sane_kde": BLUE, "noise": ORANGE, "average": GREEN, "interpolation": "#cc79a7", "reconstruction": "#56b4e9",
    "scratch": GREY, ANCHORS: INK, "sane_kde_published": "#a08a00", "sane_interpolation": "#7b3fb5",
    "shared_noise": "#e69f00",
}  # fmt: skip
"""Of the methods that are often there."""

OTHERS = ("#b22222", "#17a2b8", "#8c564b", "#6b8e23", "#e377c2")
"""Of all others, in their order."""

NAMES = {
    "sane_kde": "SANE, KDE", "noise": "noise", "average": "average", "interpolation": "interpolation",
    "reconstruction": "reconstruction", "scratch": "from scratch", ANCHORS: "anchors",
    "sane_kde_published": "SANE, published KDE", "sane_interpolation": "SANE, interpolation",
    "sane_gaussian": "SANE, Gaussian", "sane_mixture": "SANE, mixture", "sane_random": "SANE, random",
    "sane_kde_token": "SANE, KDE by token", "sane_kde_dimension": "SANE, KDE by value", "shared_noise": "shared noise",
}  # fmt: skip
"""For a reader."""

MOST_NOVELTY = 2.5
"""Models farther away are told, not shown: they are far from everything."""

TICKS = (0, 1, 2, 5, 10, 25, 50, 100, 200, 500, 1000)
"""Epochs that are named."""

TINT = "#f1f1f1"
"""Where replicas are."""


def plot_novelty(rows: Sequence[Row], path: Path, chance: float | None = None) -> list[Path]:
    """Draws accuracy against novelty; see `novelty_figure`.

    Args:
        rows: models.
        path: file to write; its ending is replaced by ``.png`` and ``.svg``.
        chance: accuracy of guessing, in [0, 1].

    Returns:
        The files written.
    """
    return save(novelty_figure(rows, chance), path)


def plot_curves(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws accuracy over epochs of fine-tuning; see `curves_figure` and `plot_novelty`."""
    return save(curves_figure(rows), path)


def plot_behavior(rows: Sequence[Row], path: Path, quantile: float | None = None) -> list[Path]:
    """Draws wrong answers in common against novelty; see `behavior_figure` and `plot_novelty`."""
    return save(behavior_figure(rows, quantile), path)


def novelty_figure(rows: Sequence[Row], chance: float | None = None) -> Figure:
    """Accuracy against novelty: a point a model; a method that was swept is a curve through its scales.

    Args:
        rows: models with ``method``, ``novelty`` and ``accuracy`` (in [0, 1]), and ``scale`` where a method was swept
            over noise, bandwidth or the like: its mean accuracy at the median novelty of each scale, with the 95 %
            interval. Of the method ``anchors`` the median accuracy is a line. Models without values are left out.
        chance: accuracy of guessing, in [0, 1]; another line.
    """
    shown, farther = _in_sight(_known(rows, "novelty", "accuracy"))
    figure, axes = new_figure(1, 1, (8.6, 5.4))
    _shade_replicas(axes, _methods(rows))
    for method, style in _styles(shown).items():
        of_method = [row for row in shown if row["method"] == method]
        if _is_swept(of_method):
            _swept(axes, of_method, style, _name(method))
        else:
            _scatter(axes, of_method, ("novelty", "accuracy"), (1, 100), style, _name(method))
    _level(axes, _median_of(rows, ANCHORS), "median of the anchors", INK, "--")
    _level(axes, chance, "chance", GREY, ":")
    label_axes(axes, "", xlabel="novelty: distance to the nearest training model (1: as far as training runs "
               "are from each other)", ylabel="test accuracy without fine-tuning (%)")  # fmt: skip
    _finish(figure, axes, "What generated models can do, and how new they are", farther)
    return figure


def curves_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy over epochs of fine-tuning: a line a method, its mean with the 95 % interval over repetitions.

    A second panel shows where each method ends, best first, at a scale of its own; its names are the legend of both.

    Args:
        rows: models and epochs, with ``method``, ``epoch``, ``accuracy`` (on test images, in [0, 1]) and, where several
            models are one draw of a method, ``repetition``: only repetitions are independent.
    """
    shown = _known(rows, "epoch", "accuracy")
    styles = _styles(shown, anchors=True)
    curves = {method: _curve([row for row in shown if row["method"] == method]) for method in styles}
    last = max((float(epochs[-1]) for epochs, _ in curves.values()), default=1.0)
    figure, (axes, ends) = new_figure(1, 2, (10.4, 5.2), width_ratios=(2.3, 1))
    for method, (epochs, (middle, low, high)) in curves.items():
        line, named = _line(method), [place for place, epoch in enumerate(epochs) if epoch in (*TICKS, last)]
        axes.fill_between(epochs, low, high, color=styles[method]["color"], alpha=0.15, linewidth=0)
        axes.plot(epochs, middle, linestyle=line, linewidth=1.7, markersize=5, markevery=named, label=_name(method),
                  **styles[method])  # fmt: skip
    _epoch_axis(axes, last)
    label_axes(axes, "", xlabel="epoch of fine-tuning", ylabel="mean test accuracy (%)")
    _drop_legend(axes)
    _draw_ends(ends, curves, styles, last)
    headline(figure, "Fine-tuning of generated models")
    return figure


def behavior_figure(rows: Sequence[Row], quantile: float | None = None) -> Figure:
    """Novelty in weights against novelty in errors: a point a model; replicas are in the tinted parts.

    Args:
        rows: models with ``method``, ``novelty`` and ``wrong_agreement``; those without are left out.
        quantile: wrong agreement that 95 % of the training models stay below towards other runs; a line.
    """
    shown, farther = _in_sight(_known(rows, "novelty", "wrong_agreement"))
    figure, axes = new_figure(1, 1, (8.6, 5.4))
    _shade_replicas(axes, _methods(rows))
    for method, style in _styles(shown, anchors=True).items():
        of_method = [row for row in shown if row["method"] == method]
        _scatter(axes, of_method, ("novelty", "wrong_agreement"), (1, 1), style, _name(method))
    axes.set_ylim(-0.02, 1.02)
    if quantile is not None and np.isfinite(quantile):
        axes.axhspan(quantile, 1.02, color=TINT, zorder=0)
        text = f"{100 * REPLICA_QUANTILE:.0f} % quantile among training runs"
        _level(axes, quantile, text, GREY, "--", unit=1)
    label_axes(axes, "", xlabel="novelty: distance to the nearest training model (1: as far as training runs "
               "are from each other)", ylabel="wrong answers shared with a training model\n"
               "(intersection over union)")  # fmt: skip
    _finish(figure, axes, "What generated models share with training models", farther)
    return figure


def _methods(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["method"]) for row in rows))


def _known(rows: Sequence[Row], *fields: str) -> list[Row]:
    """Rows with a finite number in each field."""
    return [row for row in rows if all(row.get(field) is not None and np.isfinite(row[field]) for field in fields)]


def _in_sight(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows that are not too far away to be shown, and how many are."""
    near = [row for row in rows if row["novelty"] <= MOST_NOVELTY]
    return near, len(rows) - len(near)


def _column(rows: Sequence[Row], field: str) -> Array:
    return np.array([row[field] for row in rows], float)


def _styles(rows: Sequence[Row], *, anchors: bool = False) -> dict[str, dict[str, Any]]:
    """Colour and mark of each method, in one order: selections of a method differ from it by their mark alone."""
    methods = [method for method in _methods(rows) if anchors or method != ANCHORS]
    known = {base: place for place, base in enumerate(COLOURS)}
    methods.sort(key=lambda method: (known.get(method.partition(":")[0], len(known)), method))
    bases = dict.fromkeys(method.partition(":")[0] for method in methods)
    others = [base for base in bases if base not in COLOURS]
    colours = COLOURS | {base: OTHERS[place % len(OTHERS)] for place, base in enumerate(others)}
    selections = dict.fromkeys(method.partition(":")[2] for method in methods)
    marks = {"": "o"} | dict(zip((name for name in selections if name), "D^svP" * len(selections), strict=False))
    return {
        method: {"color": colours[method.partition(":")[0]], "marker": marks[method.partition(":")[2]]}
        for method in methods
    }


def _name(method: str) -> str:
    base, _, selection = method.partition(":")
    name = NAMES.get(base, base.replace("_", " "))
    return shorten(f"{name}: {selection}" if selection else name, 32)


def _is_swept(rows: Sequence[Row]) -> bool:
    return len({row["scale"] for row in _known(rows, "scale")}) > 1


def _swept(axes: Axes, rows: Sequence[Row], style: Mapping[str, Any], label: str) -> None:
    """Models of a sweep as small points, and the curve through their scales with its interval."""
    swept = _known(rows, "scale")
    groups = [[row for row in swept if row["scale"] == scale] for scale in sorted({row["scale"] for row in swept})]
    novelty = np.array([np.median(_column(group, "novelty")) for group in groups])
    middle, low, high = 100 * np.array([interval(_column(group, "accuracy")) for group in groups]).T
    axes.scatter(_column(rows, "novelty"), 100 * _column(rows, "accuracy"), s=9, alpha=0.3, linewidths=0, **style)
    axes.fill_between(novelty, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(novelty, middle, linewidth=1.8, markersize=5, markeredgecolor="white", label=label, zorder=3, **style)


def _scatter(
    axes: Axes, rows: Sequence[Row], fields: tuple[str, str], units: tuple[float, float], style: Mapping[str, Any],
    label: str,
) -> None:  # fmt: skip
    x, y = (unit * _column(rows, field) for field, unit in zip(fields, units, strict=True))
    marks: dict[str, Any] = {"s": 34, "alpha": 0.75, "linewidths": 0.6, "edgecolors": "white", "zorder": 2.5}
    if style["marker"] != "o":
        marks |= {"edgecolors": INK, "alpha": 0.95, "zorder": 3.5}
    axes.scatter(x, y, label=label, **marks, **style)


def _shade_replicas(axes: Axes, methods: Sequence[str]) -> None:
    """Tints where weights are replicas, and marks how far training runs are from each other."""
    if not methods:
        axes.text(0.5, 0.5, "no model yet", transform=axes.transAxes, ha="center", color=GREY)
    axes.axvspan(0, REPLICA_NOVELTY, color=TINT, zorder=0)
    axes.axvline(1, color="#b0b0b0", linewidth=1, zorder=0.9)
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "bottom", "fontsize": 8.5, "color": GREY}
    axes.text(REPLICA_NOVELTY / 2, 1.01, "replicas", ha="center", **place)
    axes.text(1, 1.01, "other training runs", ha="center", **place)


def _level(axes: Axes, value: float | None, label: str, colour: str, line: str, unit: float = 100) -> None:
    """A named horizontal line; none where there is no value."""
    if value is not None and np.isfinite(value):
        axes.axhline(unit * value, color=colour, linewidth=1.1, linestyle=line, zorder=1.5)
        axes.annotate(label, (1, unit * value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                      textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=colour)  # fmt: skip


def _median_of(rows: Sequence[Row], method: str) -> float | None:
    found = _known([row for row in rows if row["method"] == method], "accuracy")
    return float(np.median(_column(found, "accuracy"))) if found else None


def _finish(figure: Figure, axes: Axes, title: str, farther: int) -> None:
    """Range of novelty, the legend below, and the title."""
    axes.set_xlim(0, min(MOST_NOVELTY, max(1.25, 1.06 * float(axes.dataLim.x1))))
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        _drop_legend(axes)
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    models = "1 model is" if farther == 1 else f"{farther} models are"
    headline(figure, title, f"{models} farther than {MOST_NOVELTY} and not shown." if farther else "")


def _drop_legend(axes: Axes) -> None:
    """Where the names stand elsewhere."""
    legend = axes.get_legend()
    if legend is not None:
        legend.remove()


def _curve(rows: Sequence[Row]) -> tuple[Array, Array]:
    """Epochs in their order; and mean, lower and upper end over repetitions in percent, [3, epochs]."""
    epochs = sorted({row["epoch"] for row in rows})
    found = [interval(_repetitions([row for row in rows if row["epoch"] == epoch])) for epoch in epochs]
    return np.array(epochs, float), 100 * np.array(found).T


def _repetitions(rows: Sequence[Row]) -> Array:
    """Mean accuracy of each repetition; a row without one is its own."""
    found: dict[Any, list[float]] = {}
    for place, row in enumerate(rows):
        repetition = row.get("repetition")
        found.setdefault(("row", place) if repetition is None else repetition, []).append(row["accuracy"])
    return np.array([np.mean(values) for values in found.values()])


def _line(method: str) -> Any:
    """Dashed for what was selected of a method."""
    return (0, (4, 1.5)) if ":" in method else "-"


def _epoch_axis(axes: Axes, last: float) -> None:
    """A scale that gives the first epochs room, in plain numbers."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    ticks = [tick for tick in TICKS if tick <= last]
    axes.set_xticks(ticks if last <= 1.15 * ticks[-1] else [*ticks, last])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(-0.06, np.expm1(1.02 * np.log1p(max(last, 1))))


def _draw_ends(
    axes: Axes, curves: Mapping[str, tuple[Array, Array]], styles: Mapping[str, Mapping[str, Any]], last: float
) -> None:
    """Where each method ends, with its interval, best on top; its name in its colour."""
    ordered = sorted(curves, key=lambda method: curves[method][1][0, -1])
    for height, method in enumerate(ordered):
        middle, low, high = curves[method][1][:, -1]
        axes.plot([low, high], [height] * 2, color=styles[method]["color"], linewidth=1.8)
        axes.plot([middle], [height], markersize=6, linestyle="none", **styles[method])
    ended = {method: curves[method][0][-1] for method in ordered}
    names = [_name(method) + (f" (epoch {ended[method]:g})" if ended[method] < last else "") for method in ordered]
    label_axes(axes, "", ylabel="", xlabel=f"after epoch {last:g} (%)" if curves else "")
    axes.set_yticks(range(len(ordered)), names)
    axes.yaxis.tick_right()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.7, max(len(ordered), 5) - 0.3)
    for label, method in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_color(styles[method]["color"])
