"""Plots and reports, as files: what a training run did, what embeddings show, how well properties are predicted.

Each ``*_figure`` gives a figure, for notebooks; each ``plot_*`` writes it as a PNG and an SVG of the same name. Never
uses pyplot, so nothing here depends on a display or changes a notebook's figures, and never reads a run itself.
"""

from sane_ray.report.training import (
    accuracies_figure,
    evaluations_figure,
    explained_variance,
    losses_figure,
    plot_accuracies,
    plot_evaluations,
    plot_losses,
    plot_reconstruction,
    reconstruction_figure,
    smooth,
)

__all__ = [
    "accuracies_figure",
    "evaluations_figure",
    "explained_variance",
    "losses_figure",
    "plot_accuracies",
    "plot_evaluations",
    "plot_losses",
    "plot_reconstruction",
    "reconstruction_figure",
    "smooth",
]
