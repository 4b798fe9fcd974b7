"""Plots of what embeddings and predictions show: layers along depth, maps of a zoo, how well properties are read.

Shape suffixes: R networks, K layers, L latent values, n test checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.report.style import (
    BLUE,
    CYCLE,
    DIVERGING,
    GREY,
    INK,
    ORANGE,
    SCATTER_LIMIT,
    SEQUENTIAL,
    clean,
    label_axes,
    new_figure,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Row = Mapping[str, Any]
"""One row of results.parquet."""

MEASURES = {
    "spread": "spread of token embeddings",
    "norm": "length of the mean embedding",
    "error": "error of reconstruction",
    "log_spectral_norm": "log10 spectral norm²",
    "alpha_weighted": "weighted alpha",
    "stable_rank": "stable rank",
}
"""Names of depth measures for a reader, in the order of their panels."""

MOST_LINES = 60
"""More networks than this are drawn as quartiles."""

MOST_NAMES = 24
"""More layers than this are numbered, not named."""

MOST_CATEGORIES = 8

PROBES = {"ridge": BLUE, "boosting": ORANGE, "logistic": "#009e73"}


def depth_figure(layers: Sequence[str], measures: Mapping[str, Array], title: str = "Layers along depth") -> Figure:
    """One panel a measure over the layers: a thin line a network (or quartiles of many), a thick one for their median.

    Args:
        layers: Names, front to back.
        measures: By a name in ``MEASURES``, [R, K]; those without a finite value are left out.
        title: Of the figure.
    """
    shown = {name: values for name, values in measures.items() if name in MEASURES and np.isfinite(values).any()}
    ordered = [name for name in MEASURES if name in shown]
    figure, panels = new_figure(len(ordered), 1, (8.5, 1.2 + 1.7 * len(ordered)), sharex=True, squeeze=False)
    depth = np.arange(1, len(layers) + 1)
    for axes, name in zip(panels[:, 0], ordered, strict=True):
        _lines(
            axes,
            depth,
            shown[name],
            BLUE if name in ("spread", "norm", "error") else ORANGE,
            named=axes is panels[0, 0],
        )
        if name == "error" and np.nanmin(shown[name]) > 0 and np.nanmax(shown[name]) > 20 * np.nanmin(shown[name]):
            axes.set_yscale("log")
        label_axes(axes, MEASURES[name], ylabel="")
    _name_layers(panels[-1, 0], layers)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def network_figure(
    layers: Sequence[str], mean_KL: Array, measures: Mapping[str, Array], title: str = "One network"
) -> Figure:
    """One network at a glance: the mean embedding of each layer as a column of colour, above what its layers are like.

    Args:
        layers: Names, front to back.
        mean_KL: Mean embedding of each layer.
        measures: By a name in ``MEASURES``, [K].
        title: Of the figure.
    """
    shown = [name for name in MEASURES if name in measures and np.isfinite(measures[name]).any()][:4]
    heights = [2.4, *[1.0] * len(shown)]
    size = (max(7.5, min(16.0, 4 + 0.16 * len(layers))), 2.2 + 1.5 * sum(heights) / 2)
    figure, panels = new_figure(len(heights), 1, size, sharex=True, squeeze=False, height_ratios=heights)
    depth, limit = np.arange(1, len(layers) + 1), float(np.nanpercentile(np.abs(mean_KL), 99)) or 1.0
    order = np.argsort(np.nanmean(mean_KL, axis=0))
    strip = panels[0, 0].imshow(
        mean_KL[:, order].T, aspect="auto", cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest",
        extent=(0.5, len(layers) + 0.5, 0, mean_KL.shape[1]), origin="lower",
    )  # fmt: skip
    figure.colorbar(strip, ax=panels[0, 0], pad=0.01, label="value")
    label_axes(panels[0, 0], "mean embedding of each layer", ylabel="latent values, sorted")
    panels[0, 0].grid(False)
    for axes, name in zip(panels[1:, 0], shown, strict=True):
        values = np.asarray(measures[name], float)
        colour = BLUE if name in ("spread", "norm", "error") else ORANGE
        if name in ("spread", "error", "norm", "stable_rank"):
            axes.bar(depth, values, width=0.75, color=colour)
        else:
            axes.plot(depth, values, color=colour, marker="o", markersize=3.5, linewidth=1.2)
        label_axes(axes, MEASURES[name], ylabel="")
    _name_layers(panels[-1, 0], layers)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def map_figure(
    points_R2: Array, colours: Mapping[str, Sequence[Any]], explained: tuple[float, float], models: Sequence[Any] = ()
) -> Figure:
    """The networks of a zoo in the plane of two principal components, a panel for each property that colours them.

    Args:
        points_R2: Of ``principal_map``.
        colours: By the property's name, a value a network: numbers (None or NaN where unknown) or texts.
        explained: Share of the variance along each axis.
        models: Whose checkpoint each network is: thin lines join checkpoints of one model in the order of the rows.
    """
    columns = min(3, max(1, len(colours)))
    rows = max(1, -(-len(colours) // columns))
    figure, panels = new_figure(rows, columns, (1.2 + 4.1 * columns, 0.6 + 3.6 * rows), squeeze=False)
    for axes, (name, values) in zip(panels.flat, colours.items(), strict=False):
        _trajectories(axes, points_R2, models)
        _coloured(figure, axes, points_R2, list(values))
        label_axes(axes, shorten(name, 40), ylabel=f"second component ({explained[1]:.0%})")
        axes.set_xlabel(f"first component ({explained[0]:.0%})", color=INK)
        if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    for axes in list(panels.flat)[len(colours) :]:
        axes.set_visible(False)
    return figure


def scores_figure(rows: Sequence[Row], metric: str, label: str) -> Figure:
    """How well each property is read: a dot with its 95 % interval for each feature set and probe, a panel a property.

    Args:
        rows: Of results.parquet, of one protocol.
        metric: ``r2``, ``tau``, ``mae`` or ``accuracy``.
        label: Its name for a reader.
    """
    shown = [row for row in rows if row.get(metric) is not None]
    targets = list(dict.fromkeys(row["target"] for row in shown)) or ["nothing was measured"]
    features = list(dict.fromkeys(row["features"] for row in shown))
    size = (1.8 + 3.6 * len(targets), 1.4 + 0.42 * max(1, len(features)))
    figure, panels = new_figure(1, len(targets), size, sharey=True, squeeze=False)
    probes = list(dict.fromkeys(row["probe"] for row in shown))
    for axes, target in zip(panels[0], targets, strict=True):
        for index, probe in enumerate(probes):
            mine = [row for row in shown if row["target"] == target and row["probe"] == probe]
            offset = (index - (len(probes) - 1) / 2) * 0.26
            _dots(axes, mine, metric, [features.index(row["features"]) + offset for row in mine], probe)
        label_axes(axes, shorten(str(target), 30), ylabel="", xlabel=label)
        _zoom(axes, [row[metric] for row in shown if row["target"] == target], metric)
        if axes is not panels[0, -1] and axes.get_legend():
            axes.get_legend().remove()
    panels[0, 0].set_yticks(range(len(features)), [shorten(name, 34) for name in features])
    panels[0, 0].set_ylim(len(features) - 0.4, -0.6)
    return figure


def predictions_figure(panels_of: Mapping[str, tuple[Array, Array]]) -> Figure:
    """True against predicted values of test checkpoints, on the diagonal where a prediction is right; a panel a title.

    Args:
        panels_of: By title, truth and prediction, [n] each.
    """
    columns = min(3, max(1, len(panels_of)))
    rows = max(1, -(-len(panels_of) // columns))
    figure, panels = new_figure(rows, columns, (0.8 + 3.8 * columns, 0.5 + 3.6 * rows), squeeze=False)
    for axes, (title, (truth, prediction)) in zip(panels.flat, panels_of.items(), strict=False):
        low, high = float(min(truth.min(), prediction.min())), float(max(truth.max(), prediction.max()))
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--")
        if len(truth) > SCATTER_LIMIT:
            axes.hexbin(truth, prediction, gridsize=40, cmap="Blues", bins="log", mincnt=1)
        else:
            axes.scatter(truth, prediction, s=12, color=BLUE, alpha=0.5, linewidths=0)
        label_axes(axes, shorten(title, 46), ylabel="predicted", xlabel="true")
    for axes in list(panels.flat)[len(panels_of) :]:
        axes.set_visible(False)
    return figure


def importances_figure(drops: Mapping[str, Sequence[tuple[str, float, float]]]) -> Figure:
    """What each layer is worth to a prediction, as bars of lost R²; a panel a property.

    Args:
        drops: By property: layer, mean loss of R² when its features are exchanged, its deviation.
    """
    tallest = max((len(bars) for bars in drops.values()), default=1)
    size = (1.0 + 4.0 * max(1, len(drops)), 1.2 + 0.32 * max(3, min(20, tallest)))
    figure, panels = new_figure(1, max(1, len(drops)), size, squeeze=False)
    for axes, (title, bars) in zip(panels[0], drops.items(), strict=False):
        shown = list(bars)[:20]
        axes.barh(range(len(shown)), [bar[1] for bar in shown], xerr=[bar[2] for bar in shown], color=BLUE, ecolor=GREY)
        axes.set_yticks(range(len(shown)), [shorten(bar[0], 26) for bar in shown])
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=0.8)
        label_axes(axes, shorten(title, 40), ylabel="", xlabel="loss of R²")
    return figure


def _lines(axes: Axes, depth: NDArray[Any], values_RK: Array, colour: str, *, named: bool) -> None:
    median = _quantile(values_RK, 50)
    if len(values_RK) > MOST_LINES:
        low, high = _quantile(values_RK, 25), _quantile(values_RK, 75)
        label = "middle half of the networks" if named else None
        axes.fill_between(depth, low, high, color=colour, alpha=0.25, linewidth=0, label=label)
    else:
        for values in values_RK if len(values_RK) > 1 else ():
            axes.plot(depth, values, color=colour, alpha=0.25, linewidth=0.8)
    known = np.isfinite(median)
    label = "median" if len(values_RK) > 1 and named else None
    axes.plot(depth[known], median[known], color=colour, linewidth=1.8, marker="o", markersize=3, label=label)


def _quantile(values_RK: Array, percent: float) -> Array:
    known = np.isfinite(values_RK).any(axis=0)
    found = np.full(values_RK.shape[1], np.nan)
    found[known] = np.nanpercentile(values_RK[:, known], percent, axis=0)
    return found


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(layers) > MOST_NAMES:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"layer, from {shorten(layers[0])} to {shorten(layers[-1])}", color=INK)
        return
    axes.set_xticks(range(1, len(layers) + 1), [shorten(name) for name in layers], rotation=40, ha="right")
    axes.set_xlabel("layer", color=INK)


def _trajectories(axes: Axes, points_R2: Array, models: Sequence[Any]) -> None:
    if len(set(models)) == len(models) or len(models) > SCATTER_LIMIT:
        return
    from matplotlib.collections import LineCollection

    rows: dict[Any, list[int]] = {}
    for row, model in enumerate(models):
        rows.setdefault(model, []).append(row)
    paths = [points_R2[of_model] for of_model in rows.values() if len(of_model) > 1]
    axes.add_collection(LineCollection(paths, colors=GREY, linewidths=0.4, alpha=0.35, zorder=1))


def _coloured(figure: Figure, axes: Axes, points_R2: Array, values: list[Any]) -> None:
    if any(isinstance(value, str) for value in values):
        _categories(axes, points_R2, ["unknown" if value is None else str(value) for value in values])
        return
    numbers = np.array([np.nan if value is None else float(value) for value in values])
    known = np.isfinite(numbers)
    axes.scatter(points_R2[~known, 0], points_R2[~known, 1], s=10, color="#cccccc", linewidths=0, zorder=2)
    marks = axes.scatter(
        points_R2[known, 0],
        points_R2[known, 1],
        c=numbers[known],
        s=14,
        cmap=SEQUENTIAL,
        linewidths=0,
        alpha=0.85,
        zorder=2,
    )
    figure.colorbar(marks, ax=axes, pad=0.02)


def _categories(axes: Axes, points_R2: Array, values: list[str]) -> None:
    names, counts = np.unique(values, return_counts=True)
    kept = [str(name) for name in names[np.argsort(-counts, kind="stable")][:MOST_CATEGORIES]]
    for name, colour in zip(kept, CYCLE, strict=False):
        of_name = np.array([value == name for value in values])
        where = points_R2[of_name]
        label = shorten(name)
        axes.scatter(where[:, 0], where[:, 1], s=12, color=colour, linewidths=0, alpha=0.8, label=label, zorder=2)
    others = np.array([value not in kept for value in values])
    if others.any():
        where = points_R2[others]
        axes.scatter(where[:, 0], where[:, 1], s=8, color="#cccccc", linewidths=0, label="others", zorder=1.5)


def _dots(axes: Axes, rows: Sequence[Row], metric: str, heights: Sequence[float], probe: str) -> None:
    for row, height in zip(rows, heights, strict=True):
        low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
        colour = PROBES.get(probe, INK)
        if low is not None and high is not None:
            axes.plot([low, high], [height, height], color=colour, linewidth=1.6, alpha=0.6, solid_capstyle="butt")
    axes.plot([row[metric] for row in rows], heights, "o", color=PROBES.get(probe, INK), markersize=5, label=probe)


def _zoom(axes: Axes, values: Sequence[float], metric: str) -> None:
    """Keeps one bad fit from hiding the others: scores far below zero are drawn at the edge."""
    clean(axes)
    if metric in ("r2", "tau", "accuracy") and values:
        axes.set_xlim(max(-0.6, min(0.0, min(values)) - 0.05), 1.02)
        axes.axvline(0, color=GREY, linewidth=0.8)
