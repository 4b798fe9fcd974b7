"""Plots of what embeddings and predictions show: layers along depth, maps of a zoo, how well properties are read.

Shape suffixes: R networks, K layers, L latent values, n test checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.report.names import counted, label
from sane_ray.report.spectra import STATISTICS
from sane_ray.report.style import (
    BLUE,
    CYCLE,
    DIVERGING,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SCATTER_LIMIT,
    SEQUENTIAL,
    headline,
    label_axes,
    log_scale,
    new_figure,
    new_grid,
    short_names,
    shorten,
    wrap,
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
    "explained_variance": "explained variance of the weights",
    "log_spectral_norm": "log10 spectral norm²",
    "alpha_weighted": "weighted alpha",
    "stable_rank": "stable rank",
}
"""Names of depth measures for a reader, in the order of their panels."""

POSITIVE = ("spread", "norm", "error", "stable_rank")
"""Measures that are not negative, and are read as amounts."""

LEAST_SLOTS = 3
"""Room for as many layers, so that one or two are not drawn huge."""

MOST_LINES = 60
"""More networks than this are drawn as quartiles."""

MOST_NAMES = 24
"""More layers than this are numbered, not named."""

MOST_CATEGORIES = 8

MOST_BARS = 20
"""Layers that matter less are left out."""

UNKNOWN = "#cccccc"
"""Colour of what has no value, or a rare one."""

LEAST_VARIANCE = -1.0
"""Explained variance below is an arrow at the edge: no better than to guess, and how bad says little."""

LEAST_SCORE = -0.5
"""Scores below are told, not shown at their place."""

PROBES = {"ridge": BLUE, "boosting": ORANGE, "logistic": GREEN}


def depth_figure(
    layers: Sequence[str], measures: Mapping[str, Array], title: str = "Layers along depth", note: str = ""
) -> Figure:
    """One panel a measure over the layers: a thin line a network (or quartiles of many), a thick one for their median.

    Args:
        layers: Names, front to back.
        measures: By a name in ``MEASURES``, [R, K]; those without a finite value are left out.
        title: Of the figure.
        note: Below it: what the reader must know first.
    """
    shown = {name: values for name, values in measures.items() if name in MEASURES and np.isfinite(values).any()}
    ordered = [name for name in MEASURES if name in shown]
    size = (_width(len(layers), 8.5), 1.2 + 1.7 * len(ordered))
    figure, panels = new_figure(len(ordered), 1, size, sharex=True, squeeze=False)
    for axes, name in zip(panels[:, 0], ordered, strict=True):
        _lines(axes, shown[name], _colour(name), named=axes is panels[0, 0])
        _log_if_wide(axes, name, shown[name])
        _bound(axes, name)
        label_axes(axes, MEASURES[name] + _fewer(shown[name]), ylabel="")
    _name_layers(panels[-1, 0], layers)
    headline(figure, title, note)
    return figure


def family_figure(measures_of: Mapping[str, Mapping[str, Array]], note: str = "") -> Figure:
    """Architectures of different depth side by side: one panel a measure, a line an architecture (its median network).

    Args:
        measures_of: By architecture (as many as there are colours, 8), measures by a name in ``MEASURES``, [R, K].
        note: Below the title.
    """
    medians = {
        key: {
            name: _quantile(of[key], 50) for name, of in measures_of.items() if np.isfinite(of.get(key, np.nan)).any()
        }
        for key in MEASURES
    }
    shown = [key for key, lines in medians.items() if lines]
    figure, panels = new_figure(max(1, len(shown)), 1, (8.5, 1.8 + 1.7 * len(shown)), sharex=True, squeeze=False)
    colours = dict(zip(measures_of, CYCLE, strict=False))
    for axes, key in zip(panels[:, 0], shown, strict=False):
        for name, median in medians[key].items():
            depth = np.linspace(0, 1, len(median)) if len(median) > 1 else np.array([0.5])
            known = np.isfinite(median)
            axes.plot(depth[known], median[known], color=colours[name], linewidth=1.6, marker="o", markersize=3)
        _log_if_wide(axes, key, np.concatenate(list(medians[key].values()))[None])
        _bound(axes, key)
        label_axes(axes, MEASURES[key], ylabel="")
    panels[-1, 0].set_xlabel("relative depth: 0 is the first layer, 1 the last", color=INK)
    handles = [
        panels[0, 0].plot([], [], "-o", color=colour, markersize=3, label=shorten(name, 40))[0]
        for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    headline(figure, f"{len(colours)} architectures along depth, the median checkpoint of each", note)
    return figure


def network_figure(
    layers: Sequence[str], mean_KL: Array, measures: Mapping[str, Array], title: str = "One network", note: str = ""
) -> Figure:
    """One network at a glance: the mean embedding of each layer as a column of colour, above what its layers are like.

    A layer without a value has a small grey cross in that panel, and lines do not cross it.

    Args:
        layers: Names, front to back.
        mean_KL: Mean embedding of each layer.
        measures: By a name in ``MEASURES``, [K].
        title: Of the figure.
        note: Below it: what the reader must know first.
    """
    shown = [name for name in MEASURES if name in measures and np.isfinite(measures[name]).any()]
    heights = [2.4, *[0.8] * len(shown)]
    size = (_width(len(layers), 12.0), 2.2 + 0.9 * sum(heights))
    figure, panels = new_figure(len(heights), 1, size, sharex=True, squeeze=False, height_ratios=heights)
    _strip(figure, panels[0, 0], mean_KL)
    depth = np.arange(1, len(layers) + 1)
    for axes, name in zip(panels[1:, 0], shown, strict=True):
        _amounts(axes, name, depth, np.asarray(measures[name], float))
        label_axes(axes, MEASURES[name], ylabel="")
    _name_layers(panels[-1, 0], layers)
    _explain_marks(panels[-1, 0], {name: np.asarray(measures[name], float) for name in shown})
    headline(figure, title, note)
    return figure


def map_figure(
    points_R2: Array,
    colours: Mapping[str, Sequence[Any]],
    explained: tuple[float, float] | None = None,
    models: Sequence[Any] = (),
    *,
    title: str = "",
    note: str = "",
) -> Figure:
    """The networks of a zoo in a plane, a panel for each property that colours them.

    Args:
        points_R2: Of ``principal_map``, or of ``close_map``.
        colours: By the property's name, a value a network: numbers (None or NaN where unknown) or texts.
        explained: Share of the variance along each axis of principal components; None for a plane without a scale.
        models: Whose checkpoint each network is: thin lines join checkpoints of one model in the order of the rows.
        title: Of the figure.
        note: Below it.
    """
    names = ("", "") if explained is None else _components(explained)
    columns = 2 if len(colours) in (2, 4) else min(3, max(1, len(colours)))
    figure, panels = new_grid(len(colours), columns, (4.1, 3.6), (1.2, 0.9 if title else 0.6))
    for axes, (name, values) in zip(panels, colours.items(), strict=False):
        _trajectories(axes, points_R2, models)
        _coloured(figure, axes, points_R2, list(values))
        label_axes(axes, wrap(label(name), 32), xlabel=names[0], ylabel=names[1])
        if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
        if explained is None:
            axes.tick_params(labelbottom=False, labelleft=False, length=0)
    if title or note:
        headline(figure, title, note)
    return figure


def _components(explained: tuple[float, float]) -> tuple[str, str]:
    return f"first component ({explained[0]:.0%})", f"second component ({explained[1]:.0%})"


def scores_figure(rows: Sequence[Row], metric: str, scale: str) -> Figure:
    """How well each property is read: a dot with its 95 % interval for each feature set and probe, a panel a property.

    Args:
        rows: Of results.parquet, of one protocol.
        metric: ``r2``, ``tau``, ``mae`` or ``accuracy``.
        scale: Its name for a reader.
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
        label_axes(axes, wrap(label(str(target)), 28), ylabel="", xlabel=scale)
        if axes.get_legend():
            axes.get_legend().remove()
        _zoom(axes, metric)
    if len(probes) > 1:
        handles = [axes.plot([], [], "o", color=PROBES.get(probe, INK), label=probe)[0] for probe in probes]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(probes), frameon=False, fontsize=9)
    panels[0, 0].set_yticks(range(len(features)), [shorten(name, 34) for name in features])
    panels[0, 0].set_ylim(len(features) - 0.4, -0.6)
    return figure


def predictions_figure(panels_of: Mapping[str, tuple[Array, Array]]) -> Figure:
    """True against predicted values of test checkpoints, on the diagonal where a prediction is right; a panel a title.

    Args:
        panels_of: By title, truth and prediction, [n] each.
    """
    figure, panels = new_grid(len(panels_of), min(3, max(1, len(panels_of))), (3.8, 3.6), (0.8, 0.9))
    for axes, (title, (truth, prediction)) in zip(panels, panels_of.items(), strict=False):
        low, high = float(min(truth.min(), prediction.min())), float(max(truth.max(), prediction.max()))
        axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--")
        if len(truth) > SCATTER_LIMIT:
            axes.hexbin(truth, prediction, gridsize=40, cmap="Blues", bins="log", mincnt=1)
        else:
            axes.scatter(truth, prediction, s=12, color=BLUE, alpha=0.5, linewidths=0)
        label_axes(axes, wrap(label(title), 32), ylabel="predicted", xlabel="true")
        axes.locator_params(nbins=6)
    headline(figure, "Test checkpoints; validation chose the fit")
    return figure


def importances_figure(drops: Mapping[str, Sequence[Sequence[Any]]]) -> Figure:
    """What each layer is worth to a prediction, as bars of lost R²; a panel a property.

    Layers whose exchange changes nothing have no bar, and are counted below; so are those beyond ``MOST_BARS``. As high
    as the bars are many.

    Args:
        drops: By property: layer, mean loss of R² when its features are exchanged, its deviation.
    """
    drops = {title: list(bars) for title, bars in drops.items() if bars}
    shown = {title: [bar for bar in bars if bar[1] or bar[2]][:MOST_BARS] for title, bars in drops.items()}
    tallest = max((2, *map(len, shown.values())))
    size = (1.0 + 4.0 * max(1, len(shown)), 2.0 + 0.3 * tallest)
    figure, panels = new_figure(1, max(1, len(shown)), size, squeeze=False)
    for axes, (title, bars) in zip(panels[0], shown.items(), strict=False):
        losses, deviations = [bar[1] for bar in bars], [bar[2] for bar in bars]
        axes.barh(range(len(bars)), losses, height=0.75, xerr=deviations, color=BLUE, ecolor=GREY)
        axes.set_yticks(range(len(bars)), short_names([bar[0] for bar in bars], 30))
        axes.set_ylim(tallest - 0.4, -0.6)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.locator_params(axis="x", nbins=4)
        label_axes(axes, wrap(label(title), 28), ylabel="", xlabel=f"loss of R²{_unseen(drops[title], len(bars))}")
    headline(figure, "What each layer is worth: how much R² falls when its features are exchanged")
    return figure


def _unseen(bars: Sequence[Sequence[Any]], shown: int) -> str:
    """A line on the layers that have no bar."""
    without = sum(1 for bar in bars if not bar[1] and not bar[2])
    less = len(bars) - without - shown
    said = [f"{counted(without, 'layer')} of no effect"] * bool(without)
    said += [f"{counted(less, 'layer')} of less effect"] * bool(less)
    return f"\nno bar: {', '.join(said)}" if said else ""


def _width(layers: int, most: float) -> float:
    """Of a figure of so many layers, in inches: few are not drawn apart, and their names have room."""
    return min(most, max(5.5, 4.0 + 0.3 * layers))


def _fewer(values_RK: Array) -> str:
    """Of how many checkpoints a measure is, where some have none: singular values are computed of some only."""
    count = int(np.isfinite(values_RK).any(axis=1).sum())
    return f" ({counted(count, 'checkpoint')})" if count < len(values_RK) else ""


def _colour(measure: str) -> str:
    """Blue for what embeddings say, orange for spectra of the weights."""
    return BLUE if measure in STATISTICS else ORANGE


def _amounts(axes: Axes, name: str, depth: NDArray[np.int64], values_K: Array) -> None:
    """A network's values of one measure: bars of amounts, else dots that are joined where layers follow each other."""
    known, colour = np.isfinite(values_K), _colour(name)
    if name in POSITIVE or name == "explained_variance":
        shown = np.maximum(values_K, LEAST_VARIANCE) if name == "explained_variance" else values_K
        axes.bar(depth[known], shown[known], width=0.75, color=colour)
    else:
        axes.plot(depth, values_K, color=colour, marker="o", markersize=3.5, linewidth=1.2, clip_on=False)
        axes.margins(y=0.15)
    if not known.all():
        edge = axes.get_xaxis_transform()
        none = np.zeros((~known).sum())
        axes.plot(
            depth[~known], none, "x", color=GREY, markersize=3.5, transform=edge, label="_none", zorder=3, clip_on=False
        )
    low = depth[values_K < LEAST_VARIANCE] if name == "explained_variance" else depth[:0]
    axes.plot(low, np.full(len(low), LEAST_VARIANCE), "v", color=INK, markersize=5, label="_below", zorder=3)
    _bound(axes, name)


def _explain_marks(axes: Axes, shown: Mapping[str, Array]) -> None:
    """What crosses and arrows mean, below the name of the axis, where there are any."""
    said = ["×: no value"] if any(not np.isfinite(values).all() for values in shown.values()) else []
    if (shown.get("explained_variance", np.zeros(1)) < LEAST_VARIANCE).any():
        said.append(f"▼: below {LEAST_VARIANCE:g}")
    if said:
        axes.set_xlabel(f"{axes.get_xlabel()}   ({', '.join(said)})", color=INK)


def _bound(axes: Axes, name: str) -> None:
    """Explained variance has its goal, 1, and zero in sight, and no more than -1 below."""
    if name == "explained_variance":
        low = axes.dataLim.y0 if np.isfinite(axes.dataLim.y0) else 0.0
        axes.set_ylim(max(min(low, 0.0), LEAST_VARIANCE) - 0.08, 1.08)
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=0.9)
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=0.9)


def _strip(figure: Figure, axes: Axes, mean_KL: Array) -> None:
    """Embeddings as columns of colour, white at zero; one in twenty is as dark as can be, lest a layer hide others."""
    size = np.abs(mean_KL[np.isfinite(mean_KL)])
    limit = float(np.percentile(size, 95)) if size.size else 1.0
    order = np.argsort(np.nan_to_num(mean_KL).mean(axis=0), kind="stable")
    strip = axes.imshow(
        mean_KL[:, order].T, aspect="auto", cmap=DIVERGING, vmin=-limit or -1, vmax=limit or 1, interpolation="nearest",
        extent=(0.5, len(mean_KL) + 0.5, 0, mean_KL.shape[1]), origin="lower",
    )  # fmt: skip
    figure.colorbar(strip, ax=axes, pad=0.01, label="value", extend="both")
    label_axes(axes, "mean embedding of each layer", ylabel="latent values, sorted")
    axes.grid(False)


def _lines(axes: Axes, values_RK: Array, colour: str, *, named: bool) -> None:
    depth, median = np.arange(1, values_RK.shape[1] + 1), _quantile(values_RK, 50)
    if len(values_RK) > MOST_LINES:
        low, high = _quantile(values_RK, 25), _quantile(values_RK, 75)
        label = "middle half of the checkpoints" if named else None
        axes.fill_between(depth, low, high, color=colour, alpha=0.25, linewidth=0, label=label)
    else:
        marker = "." if len(depth) == 1 else None  # a line of one point is invisible
        for index, values in enumerate(values_RK if len(values_RK) > 1 else ()):
            known, label = np.isfinite(values), "one checkpoint" if named and index == 0 else None
            axes.plot(depth[known], values[known], color=colour, alpha=0.35, linewidth=0.8, marker=marker, label=label)
    known = np.isfinite(median)
    label = "median" if len(values_RK) > 1 and named else None
    axes.plot(depth[known], median[known], color=colour, linewidth=1.8, marker="o", markersize=3, label=label)


def _log_if_wide(axes: Axes, measure: str, values_RK: Array) -> None:
    """A logarithmic axis, in plain numbers, for amounts that span more than a factor of 20 where they are drawn."""
    many = len(values_RK) > MOST_LINES
    drawn = np.stack([_quantile(values_RK, percent) for percent in (25, 75)]) if many else values_RK
    known = drawn[np.isfinite(drawn)]
    if measure in POSITIVE and known.min() > 0 and known.max() > 20 * known.min():
        log_scale(axes)


def _quantile(values_RK: Array, percent: float) -> Array:
    known = np.isfinite(values_RK).any(axis=0)
    found = np.full(values_RK.shape[1], np.nan)
    found[known] = np.nanpercentile(values_RK[:, known], percent, axis=0)
    return found


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    room = max(0, LEAST_SLOTS - len(layers)) / 2
    axes.set_xlim(0.5 - room, len(layers) + 0.5 + room)
    names = short_names(layers)
    if len(layers) > MOST_NAMES:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"layer, from 1 ({names[0]}) to {len(layers)} ({names[-1]})", color=INK)
        return
    axes.set_xticks(range(1, len(layers) + 1), names, rotation=40, ha="right", rotation_mode="anchor")
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
    """Marks in a drawn order, so that none of the colours lies on top; many marks are pixels also in an SVG."""
    order = np.random.default_rng(0).permutation(len(values))
    points_R2, values = points_R2[order], [values[row] for row in order]
    style: dict[str, Any] = {"linewidths": 0, "alpha": 0.85, "zorder": 2, "rasterized": len(values) > SCATTER_LIMIT}
    if any(isinstance(value, str) for value in values):
        _categories(axes, points_R2, ["unknown" if value is None else str(value) for value in values], style)
        return
    numbers = np.array([np.nan if value is None else float(value) for value in values])
    known = np.isfinite(numbers)
    axes.scatter(points_R2[~known, 0], points_R2[~known, 1], s=10, color=UNKNOWN, **style)
    if len(set(numbers[known])) < 2:
        axes.scatter(points_R2[known, 0], points_R2[known, 1], s=14, color=BLUE, **style)
        return
    low, high = np.percentile(numbers[known], [1, 99])
    bounds: dict[str, Any] = {"vmin": low, "vmax": high} if high > low else {}
    x, y = points_R2[known].T
    marks = axes.scatter(x, y, c=numbers[known], s=14, cmap=SEQUENTIAL, **bounds, **style)
    figure.colorbar(marks, ax=axes, pad=0.02)


def _categories(axes: Axes, points_R2: Array, values: list[str], style: Mapping[str, Any]) -> None:
    names, counts = np.unique(values, return_counts=True)
    kept = [str(name) for name in names[np.argsort(-counts, kind="stable")][:MOST_CATEGORIES]]
    colours = dict(zip(kept, CYCLE, strict=False))
    axes.scatter(points_R2[:, 0], points_R2[:, 1], s=12, c=[colours.get(value, UNKNOWN) for value in values], **style)
    others = {"others": UNKNOWN} if len(names) > len(kept) else {}
    for name, colour in (colours | others).items():
        axes.scatter([], [], s=20, color=colour, label=shorten(name))


def _dots(axes: Axes, rows: Sequence[Row], metric: str, heights: Sequence[float], probe: str) -> None:
    for row, height in zip(rows, heights, strict=True):
        low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
        colour = PROBES.get(probe, INK)
        if low is not None and high is not None:
            axes.plot([low, high], [height, height], color=colour, linewidth=1.6, alpha=0.6, solid_capstyle="butt")
        if _is_low(row, metric):
            axes.plot([LEAST_SCORE], [height], "<", color=colour, markersize=6)
            axes.annotate(f" {row[metric]:.3g}", (LEAST_SCORE, height), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=8, color=colour)  # fmt: skip
    at = [(row[metric], height) for row, height in zip(rows, heights, strict=True) if not _is_low(row, metric)]
    axes.plot(*np.reshape(at, (-1, 2)).T, "o", color=PROBES.get(probe, INK), markersize=5, label=probe)


def _is_low(row: Row, metric: str) -> bool:
    return metric != "mae" and row[metric] < LEAST_SCORE


def _zoom(axes: Axes, metric: str) -> None:
    """Keeps one bad fit from hiding the others: scores far below zero are arrows at the edge, with their value."""
    if metric in ("r2", "tau", "accuracy"):
        low = axes.dataLim.x0 if np.isfinite(axes.dataLim.x0) else 0.0
        axes.set_xlim(max(LEAST_SCORE, min(low, 0.9)) - 0.04, 1.02)
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0.9)
        axes.set_xlim(axes.get_xlim())
