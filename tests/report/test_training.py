"""Plots hold the data they were given, label it, and become files."""

import math
import subprocess
import sys

import numpy as np
import pytest

from sane_ray.report import (
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


def history(steps: int, validate_every: int = 4) -> list[dict]:
    points = []
    for step in range(steps):
        point = {
            "step": step,
            "epoch": step // 10,
            "train/learning_rate": 1e-3,
            "train/explained_variance": step / steps,
        }
        point |= {"train/loss": 3.0 / (step + 1), "train/loss_recon": 1.0 / (step + 1), "train/loss_contrast": 2.0}
        if validate_every and step % validate_every == validate_every - 1:
            point |= {"val/loss": 4.0 / (step + 1), "val/loss_recon": 1.0, "val/loss_contrast": 3.0}
            point |= {"val/explained_variance": 0.5}
        points.append(point)
    return points


def lines(axes) -> dict[str, tuple[list, list]]:
    """Labelled lines of a panel, by label."""
    found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    return {label: data for label, data in found.items() if not label.startswith("_")}


def is_png(file) -> bool:
    return file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000


def is_svg(file) -> bool:
    return "<svg" in file.read_text() and file.stat().st_size > 5000


def test_losses_hold_training_validation_variance_and_rate():
    points = history(40)
    losses, variance, rate = losses_figure(points).axes
    assert set(lines(losses)) == {
        f"{name}, {split}"
        for name in ("total", "reconstruction", "contrastive")
        for split in ("training", "validation")
    }
    assert lines(losses)["total, validation"] == (list(range(3, 40, 4)), [4.0 / (step + 1) for step in range(3, 40, 4)])
    raw = next(line for line in losses.get_lines() if line.get_label().startswith("_"))
    assert list(raw.get_ydata()) == [point["train/loss"] for point in points]
    assert lines(variance)["validation"] == (list(range(3, 40, 4)), [0.5] * 10)
    assert set(rate.get_lines()[0].get_ydata()) == {1e-3}
    assert losses.get_yscale() == "log"  # 3 down to 0.025
    assert [axes.get_ylabel() for axes in (losses, variance, rate)] == ["loss", "explained variance", "learning rate"]
    assert rate.get_xlabel() == "training step"


@pytest.mark.parametrize("points", [history(0), history(1), history(30, validate_every=0), [{"step": 0, "epoch": 0}]])
def test_short_or_unvalidated_histories_are_drawn_too(points, tmp_path):
    png, svg = plot_losses(points, tmp_path / "new" / "losses")
    assert is_png(png)
    assert is_svg(svg)
    assert not any("validation" in label for axes in losses_figure(points).axes for label in lines(axes))


def test_the_only_step_is_visible():
    losses, _, rate = losses_figure(history(1)).axes
    assert all(line.get_marker() == "." for line in losses.get_lines() if not line.get_label().startswith("_"))
    assert rate.get_lines()[0].get_marker() == "."


def test_a_run_that_diverged_is_drawn(tmp_path):
    points = history(20)
    points[10]["train/loss"] = math.nan
    points[11]["train/loss"] = math.inf
    points[12]["train/explained_variance"] = -1e9
    assert all(is_png(file) for file in plot_losses(points, tmp_path / "losses")[:1])
    assert losses_figure(points).axes[1].get_ylim()[0] == -0.5


def test_smoothing_is_the_mean_of_finite_neighbours():
    values = np.arange(10.0)
    values[4] = np.nan
    assert smooth(values).tolist() == [0.5, 1, 2, 2.5, 4, 5.5, 6, 7, 8, 8.5]
    assert smooth(np.array([])).tolist() == []
    assert smooth(np.full(1000, 3.0)).tolist() == [3.0] * 1000


def test_reconstruction_has_a_panel_a_layer_with_its_variance(tmp_path):
    generator = np.random.default_rng(0)
    original = {"conv": generator.normal(size=(4, 3, 2, 2)), "fc": generator.normal(size=(100, 50)), "flat": np.ones(3)}
    reconstructed = {"conv": original["conv"].copy(), "fc": np.zeros((100, 50)), "flat": np.ones(3)}
    figure = reconstruction_figure(original, reconstructed, "Weights of a model")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert figure.get_suptitle() == "Weights of a model"
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles[0] == "conv\nR² = 1.000, 48 weights"
    assert titles[1].startswith("fc\nR² = -0.00")
    assert titles[1].endswith("5,000 weights (darker: more)")
    assert titles[2].startswith("flat\nR² = nan")
    points = panels[0].collections[0].get_offsets()
    assert np.array_equal(np.asarray(points), np.stack([original["conv"].ravel()] * 2, axis=1))
    assert panels[1].collections[0].get_array().sum() == 5000  # every weight is in the density
    png, svg = plot_reconstruction(original, reconstructed, tmp_path / "weights.png")
    assert is_png(png)
    assert is_svg(svg)


def test_reconstruction_shows_weights_far_off_and_survives_nan():
    original = {"a": np.array([0.0, 1.0, 0.5])}
    axes = reconstruction_figure(original, {"a": np.array([0.0, 9.0, np.nan])}).axes[0]
    assert axes.get_ylim()[1] > 9
    assert len(axes.collections[0].get_offsets()) == 2
    assert reconstruction_figure(original, {"a": np.full(3, np.nan)}).axes[0].get_visible()


@pytest.mark.parametrize("other", [{"b": np.zeros(3)}, {"a": np.zeros(4)}, {}])
def test_reconstruction_of_other_layers_or_shapes_is_refused(other):
    with pytest.raises(ValueError, match="layer"):
        reconstruction_figure({"a": np.zeros(3)}, other)


def test_accuracies_are_points_in_percent_around_a_diagonal(tmp_path):
    before, after = np.array([0.9, 0.5, 0.1]), np.array([0.8, 0.4, 0.1])
    axes = accuracies_figure(before, after).axes[0]
    offsets = np.asarray(axes.collections[0].get_offsets())
    assert np.allclose(offsets, [[90, 80], [50, 40], [10, 10]])
    assert list(axes.get_lines()[0].get_xdata()) == list(axes.get_lines()[0].get_ydata()) == [0, 100]
    assert "one of 3 checkpoints (mean change -6.7 points)" in [
        text.get_text() for text in axes.get_legend().get_texts()
    ]
    png, svg = plot_accuracies(before, after, tmp_path / "accuracies")
    assert is_png(png)
    assert is_svg(svg)
    assert accuracies_figure(np.array([]), np.array([])).axes
    with pytest.raises(ValueError, match="shapes"):
        accuracies_figure(before, after[:2])


def test_evaluations_are_lines_in_percent_over_the_steps_that_had_one(tmp_path):
    points = history(20)
    for step, accuracy in ((4, 0.2), (9, 0.5), (19, 0.8)):
        points[step] |= {"eval/accuracy": accuracy, "eval/accuracy_original": 0.9, "eval/agreement": accuracy - 0.1}
    (axes,) = evaluations_figure(points).axes
    assert lines(axes) == {
        "accuracy of the originals": ([4, 9, 19], [90, 90, 90]),
        "accuracy of the reconstructed": ([4, 9, 19], pytest.approx([20, 50, 80])),
        "same answer as the original": ([4, 9, 19], pytest.approx([10, 40, 70])),
    }
    assert axes.get_xlabel() == "training step" and "%" in axes.get_ylabel()
    png, svg = plot_evaluations(points, tmp_path / "evaluations.png")
    assert is_png(png)
    assert is_svg(svg)


def test_a_single_evaluation_is_visible_and_none_is_drawn_too():
    point = {"step": 3, "eval/accuracy": 0.2, "eval/accuracy_original": 0.9, "eval/agreement": 0.3}
    assert all(line.get_marker() in ("o", ".") for line in evaluations_figure([point]).axes[0].get_lines())
    assert not any(len(line.get_xdata()) for line in evaluations_figure(history(5)).axes[0].get_lines())


def test_explained_variance_is_r_squared():
    original = np.array([1.0, 2.0, 3.0])
    assert explained_variance(original, original) == 1
    assert explained_variance(original, np.full(3, 2.0)) == 0
    assert explained_variance(original, np.array([1.0, 2.0, 4.0])) == 0.5
    assert math.isnan(explained_variance(np.ones(3), original))


def test_drawing_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sane_ray.report import plot_losses\n"
        f"plot_losses([], Path({str(tmp_path)!r}) / 'losses'); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
