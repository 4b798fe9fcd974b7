"""Statistics of embeddings against spectra of the weights along depth, a panel a pair, with correlations in numbers.

After the figure of the published README, which sets spectral features beside embeddings, layer by layer. Shape
suffixes: R networks, K layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.report.style import BLUE, GREY, INK, ORANGE, clean, headline, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Row = Mapping[str, Any]

STATISTICS = {
    "spread": "spread of\ntoken embeddings",
    "norm": "length of the\nmean embedding",
    "error": "error of\nreconstruction",
    "explained_variance": "explained\nvariance",
}
FEATURES = {
    "log_norm": "log norm",
    "log_spectral_norm": "log spectral norm",
    "stable_rank": "stable rank",
    "alpha": "alpha",
    "alpha_weighted": "weighted alpha",
}
"""Names for a reader, in the order of rows and columns."""

FAINT = 0.45

LEAST_LAYERS = 5
"""Of fewer layers any correlation is chance: none is told or drawn."""


def spectra_figure(
    measures_of: Mapping[str, Mapping[str, Array]], correlations: Sequence[Row], title: str = "", note: str = ""
) -> Figure:
    """A row a statistic of embeddings, a column a spectral feature: both along depth, each to its own scale.

    Above each panel is Pearson's correlation over a network's layers, of several networks its mean and deviation, and
    how many layers it is of. A pair without one has no curves but says why, and a row or column of none but those is
    left out. Curves are those of the median network of each architecture.

    Args:
        measures_of: By architecture, measures [R, K].
        correlations: Of ``sane_ray.analysis.tables.correlations``.
        title: Of the figure.
        note: Below it.
    """
    every = {(row["statistic"], row["feature"]): row for row in correlations}
    told = {pair: row for pair, row in every.items() if row["pearson"] is not None}
    shown = [name for name in STATISTICS if any(name == statistic for statistic, _ in told)]
    columns = [name for name in FEATURES if any(name == feature for _, feature in told)]
    rows = max(1, len(shown))
    size = (1.0 + 2.05 * max(2, len(columns)), 1.5 + 1.35 * rows)
    figure, panels = new_figure(rows, max(1, len(columns)), size, squeeze=False, sharex=True)
    for place, statistic in enumerate(shown):
        for axes, feature in zip(panels[place], columns, strict=True):
            row = told.get((statistic, feature))
            _pair(axes, measures_of if row else {}, statistic, feature)
            head = f"{FEATURES[feature]}\n" if place == 0 else ""
            axes.set_title(head + (number_of(row) if row else ""), loc="left", fontsize=9, color=INK)
            if row is None:
                said = why_not(every.get((statistic, feature)))
                axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", fontsize=8, color=GREY)
        panels[place, 0].set_ylabel(STATISTICS[statistic], color=BLUE, fontsize=9)
    _name_depth(panels[-1], measures_of)
    handles = [
        panels[0, 0].plot([], [], "-o", markersize=3, color=BLUE, label="statistic of embeddings")[0],
        panels[0, 0].plot([], [], "-o", markersize=3, color=ORANGE, label="spectral feature of the weights")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    headline(figure, title, note)
    return figure


def number_of(row: Row) -> str:
    """``r = 0.81, n = 7`` layers, with ``± 0.05`` over several networks; empty where it is not defined."""
    if row["pearson"] is None:
        return ""
    deviation, least, most = row["pearson_deviation"], row["layers_least"], row["layers_most"]
    spread = f" ± {deviation:.2f}" if deviation is not None else ""
    return f"r = {row['pearson']:.2f}{spread}, n = {least}" + (f"–{most}" if most > least else "")


def why_not(row: Row | None) -> str:
    """Why a pair has no correlation."""
    most = row["layers_most"] if row else 0
    if most < LEAST_LAYERS:
        return f"{most} layer{'s' * (most != 1)} with both:\ntoo few for r"
    return "one of them is\nconstant: no r"


def _both(of: Mapping[str, Array], statistic: str, feature: str) -> NDArray[np.bool_]:
    if statistic not in of or feature not in of:
        return np.zeros((1, 1), bool)
    known_RK = np.isfinite(of[statistic]) & np.isfinite(of[feature])
    return known_RK & (known_RK.sum(axis=1, keepdims=True) >= LEAST_LAYERS)


def _pair(axes: Axes, measures_of: Mapping[str, Mapping[str, Array]], statistic: str, feature: str) -> None:
    """Curves of the median networks; few layers would lie on each other whatever they say, so only of enough."""
    faint = len(measures_of) > 1
    for of in measures_of.values():
        known_RK = _both(of, statistic, feature)
        if not known_RK.any():
            continue
        depth = np.linspace(0, 1, known_RK.shape[1]) if faint else np.arange(1, known_RK.shape[1] + 1)
        for name, colour in ((feature, ORANGE), (statistic, BLUE)):
            curve_K = _standard(_median(np.where(known_RK, of[name], np.nan)))
            style: dict[str, Any] = {"linewidth": 1.2, "marker": "o", "markersize": 2.2}
            drawn = np.isfinite(curve_K) | (not faint)  # of many architectures, gaps would leave but dots
            axes.plot(depth[drawn], curve_K[drawn], color=colour, alpha=FAINT if faint else 0.9, **style)
    clean(axes)
    axes.set_yticks([])
    axes.margins(y=0.12)


def _median(values_RK: Array) -> Array:
    known_K = np.isfinite(values_RK).any(axis=0)
    found_K = np.full(values_RK.shape[1], np.nan)
    found_K[known_K] = np.nanmedian(values_RK[:, known_K], axis=0)
    return found_K


def _standard(values_K: Array) -> Array:
    """Around zero, with a deviation of one; only around zero where all are alike."""
    known = values_K[np.isfinite(values_K)]
    spread = float(known.std())
    return (values_K - known.mean()) / (spread if spread > 1e-12 else 1.0)


def _name_depth(panels: Sequence[Axes], measures_of: Mapping[str, Mapping[str, Array]]) -> None:
    from matplotlib.ticker import MaxNLocator

    label = "relative depth" if len(measures_of) > 1 else "layer"
    for axes in panels:
        axes.set_xlabel(label, color=INK, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=len(measures_of) < 2))
