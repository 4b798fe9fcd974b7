"""Plots of a training run: losses, reconstructed weights, and what reconstructed models still can do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sane_ray.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SCATTER_LIMIT,
    clean,
    label_axes,
    log_scale,
    new_figure,
    new_grid,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Mapping[str, Any]
"""One step of a run's history: ``step``, ``train/loss``, ``val/loss`` ... by the names that MLflow shows."""

LOSSES = (("loss", "total", BLUE), ("loss_recon", "reconstruction", ORANGE), ("loss_contrast", "contrastive", GREEN))
"""Field of a point, its name for a reader, its colour."""

EVALUATIONS = (
    ("accuracy_original", "accuracy of the originals", INK),
    ("accuracy", "accuracy of the reconstructed", BLUE),
    ("agreement", "same answer as the original", ORANGE),
)
"""Field of an evaluated point, its name for a reader, its colour."""

SMOOTHING = 50
"""The smoothed curve averages over about this share of the steps (1/50)."""


def plot_losses(history: Sequence[Point], path: Path) -> list[Path]:
    """Draws losses, explained variance and learning rate over the steps of a run; see `losses_figure`.

    Args:
        history: points in order of their steps; validation fields only where validation ran.
        path: file to write; its ending is replaced by ``.png`` and ``.svg``.

    Returns:
        The files written.
    """
    return save(losses_figure(history), path)


def plot_reconstruction(
    original: Mapping[str, np.ndarray],
    reconstructed: Mapping[str, np.ndarray],
    path: Path,
    title: str = "Reconstructed weights",
) -> list[Path]:
    """Draws true against reconstructed weights, a panel a layer; see `reconstruction_figure` and `plot_losses`."""
    return save(reconstruction_figure(original, reconstructed, title), path)


def plot_accuracies(original: np.ndarray, reconstructed: np.ndarray, path: Path) -> list[Path]:
    """Draws the accuracy of checkpoints against that of reconstructions; see `accuracies_figure` and `plot_losses`."""
    return save(accuracies_figure(original, reconstructed), path)


def plot_evaluations(history: Sequence[Point], path: Path) -> list[Path]:
    """Draws what reconstructed networks still can do, over a run's steps; see `evaluations_figure`, `plot_losses`."""
    return save(evaluations_figure(history), path)


def losses_figure(history: Sequence[Point]) -> Figure:
    """Three panels over steps: losses (raw and smoothed, validation as markers), explained variance, learning rate."""
    from matplotlib.ticker import MaxNLocator

    figure, (losses, variance, rate) = new_figure(3, 1, (8, 9), sharex=True, height_ratios=(2.2, 1.2, 0.8))
    for field, label, colour in LOSSES:
        _curve(losses, *_series(history, f"train/{field}"), colour, f"{label}, training")
    for field, label, colour in LOSSES:
        _markers(losses, *_series(history, f"val/{field}"), colour, f"{label}, validation")
    _log_if_wide(losses, history)
    label_axes(losses, "Losses", ylabel="loss", legend_columns=2)
    _curve(variance, *_series(history, "train/explained_variance"), BLUE, "training")
    _markers(variance, *_series(history, "val/explained_variance"), BLUE, "validation")
    _unit_floor(variance)
    label_axes(variance, "Explained variance of the weights", ylabel="explained variance")
    steps, values = _series(history, "train/learning_rate")
    rate.plot(steps, values, color=INK, linewidth=1.4, marker=_marker(steps))
    rate.yaxis.set_major_formatter("{x:g}")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(rate, "Learning rate", ylabel="learning rate", xlabel="training step")
    if not history:
        losses.text(0.5, 0.5, "no step yet", transform=losses.transAxes, ha="center", color=GREY)
    return figure


def evaluations_figure(history: Sequence[Point]) -> Figure:
    """Accuracy of held-out networks after encoding and decoding, their own as the goal, and how often the two agree.

    Args:
        history: points in order of their steps; ``eval/...`` fields, as fractions in [0, 1], where networks were
            evaluated.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(1, 1, (8, 4.2))
    for field, label, colour in EVALUATIONS:
        steps, values = _series(history, f"eval/{field}")
        goal = field == "accuracy_original"
        style, marker = ("--", _marker(steps)) if goal else ("-", "o")
        axes.plot(steps, 100 * values, style, color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)
    axes.set_ylim(-2, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, "Held-out networks after reconstruction", ylabel="test images (%)", xlabel="training step")
    return figure


def reconstruction_figure(
    original: Mapping[str, np.ndarray], reconstructed: Mapping[str, np.ndarray], title: str = "Reconstructed weights"
) -> Figure:
    """One panel a layer: a point (or, of many, a density) for each weight, on the diagonal where it is exact.

    Args:
        original: weights by layer, any shapes.
        reconstructed: of the same layers and shapes.
        title: of the figure.

    Raises:
        ValueError: layers or shapes differ.
    """
    if list(original) != list(reconstructed) or not original:
        raise ValueError(f"layers differ or are none: {list(original)} and {list(reconstructed)}")
    columns = min(4, math.ceil(math.sqrt(len(original))))
    figure, panels = new_grid(len(original), columns, (3.1, 3.2), (0.6, 0.7))
    for axes, name in zip(panels, original, strict=False):
        _weights(axes, name, np.asarray(original[name]).ravel(), np.asarray(reconstructed[name]).ravel())
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold")
    figure.supxlabel("original weight", color=INK, fontsize=10)
    figure.supylabel("reconstructed weight", color=INK, fontsize=10)
    return figure


def accuracies_figure(original: np.ndarray, reconstructed: np.ndarray) -> Figure:
    """A scatter of checkpoints: accuracy before against accuracy after reconstruction, both as fractions in [0, 1].

    Raises:
        ValueError: the two do not hold one accuracy for each of the same checkpoints.
    """
    before, after = np.asarray(original, dtype=float), np.asarray(reconstructed, dtype=float)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"accuracies need one value a checkpoint in both: shapes {before.shape} and {after.shape}")
    figure, axes = new_figure(1, 1, (5.6, 5.4))
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle="--", label="equal accuracy", zorder=1)
    label = f"one of {len(before)} checkpoints"
    if len(before):
        label += f" (mean change {100 * np.mean(after - before):+.1f} points)"
    axes.scatter(100 * before, 100 * after, s=26, color=BLUE, alpha=0.65, linewidths=0, label=label, zorder=2)
    axes.set(xlim=(-2, 102), ylim=(-2, 102), aspect="equal")
    label_axes(
        axes,
        "Accuracy after reconstruction",
        xlabel="accuracy of the original checkpoint (%)",
        ylabel="accuracy of its reconstruction (%)",
    )
    return figure


def explained_variance(original: np.ndarray, reconstructed: np.ndarray) -> float:
    """1 - squared error / squared deviation from the mean (R2); NaN where the original does not vary."""
    deviation = float(np.sum((original - np.mean(original)) ** 2))
    return 1 - float(np.sum((original - reconstructed) ** 2)) / deviation if deviation > 0 else math.nan


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average that shrinks at both ends, over finite values only; same length."""
    reach = max(1, len(values) // (2 * SMOOTHING))
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    middle = np.arange(len(values))
    first, last = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    counted = count[last] - count[first]
    return np.where(counted > 0, (total[last] - total[first]) / np.maximum(counted, 1), np.nan)


def _series(history: Sequence[Point], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the points that have a value for `name`."""
    points = [(point["step"], point[name]) for point in history if point.get(name) is not None]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Thin raw curve with its smoothed one on top; a dot when there is only one point."""
    if len(steps):
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smooth(values), color=colour, linewidth=1.6, marker=_marker(steps), label=label)


def _marker(steps: np.ndarray) -> str | None:
    """A curve of one point is invisible without one."""
    return "." if len(steps) == 1 else None


def _markers(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    if len(steps):
        axes.plot(steps, values, "o", color=colour, markersize=5, markeredgecolor="white", label=label, zorder=3)


def _log_if_wide(axes: Axes, history: Sequence[Point]) -> None:
    """A logarithmic axis, labelled in plain numbers, if the losses span more than a factor of 30."""
    values = np.concatenate([_series(history, f"train/{field}")[1] for field, _, _ in LOSSES])
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and positive.max() > 30 * positive.min():
        log_scale(axes)


def _unit_floor(axes: Axes) -> None:
    """Shows 0 and 1 as bounds of explained variance, but not the first steps' far negative values."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(min(low, -0.05), -0.5), max(high, 1.05))
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")


def _weights(axes: Axes, name: str, original: np.ndarray, reconstructed: np.ndarray) -> None:
    """One layer's weights, with equal ranges on both axes."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    if original.shape != reconstructed.shape:
        raise ValueError(f"layer {name}: {original.size} original and {reconstructed.size} reconstructed weights")
    shown = np.isfinite(original) & np.isfinite(reconstructed)
    both = np.concatenate([original[shown], reconstructed[shown]]) if shown.any() else np.zeros(1)
    margin = 0.05 * float(np.ptp(both)) or 0.1
    bounds = (float(both.min()) - margin, float(both.max()) + margin)
    if original.size > SCATTER_LIMIT:
        extent, norm = (*bounds, *bounds), LogNorm(vmin=0.2)  # a hexagon of one weight is to be seen on white
        axes.hexbin(
            original[shown], reconstructed[shown], gridsize=55, norm=norm, mincnt=1, cmap="Blues", extent=extent
        )
    else:
        axes.scatter(original[shown], reconstructed[shown], s=8, color=BLUE, alpha=0.5, linewidths=0)
    axes.plot(bounds, bounds, color=INK, linewidth=1, linestyle="--", zorder=3)
    axes.set(xlim=bounds, ylim=bounds, aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    value = explained_variance(original, reconstructed)
    density = " (darker: more)" if original.size > SCATTER_LIMIT else ""
    axes.set_title(f"{name}\nR² = {value:.3f}, {original.size:,} weights{density}", fontsize=9, color=INK, loc="left")
    clean(axes)
