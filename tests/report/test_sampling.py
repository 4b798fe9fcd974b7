"""Plots of generated models hold the measures they were given, in the colours of their methods."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex

from sane_ray.report.sampling import (
    behavior_figure,
    curves_figure,
    novelty_figure,
    plot_behavior,
    plot_curves,
    plot_novelty,
)
from sane_ray.report.style import BLUE, ORANGE

NAN = float("nan")


def model(method, novelty, accuracy, agreement=0.5, scale=None):
    return {"method": method, "novelty": novelty, "accuracy": accuracy, "wrong_agreement": agreement, "scale": scale}


def rows():
    swept = [model("noise", 0.2 * scale + 0.01 * n, 0.8 - 0.1 * scale + 0.01 * n, scale=scale)
             for scale in (2.0, 1.0, 3.0) for n in range(3)]  # fmt: skip
    best = [model("sane_kde:best", 0.6, 0.7, 0.3), model("sane_kde:best", 0.7, 0.6, 0.2)]
    plain = [model("sane_kde", 0.8, 0.5, 0.1, 1.0), model("sane_kde", NAN, 0.5), model("sane_kde", 0.8, None)]
    anchors = [model("anchors", 1.0, value) for value in (0.7, 0.8, 0.95)]
    return swept + best + plain + anchors


def points(axes) -> dict[str, list]:
    """Labelled models, by label."""
    found = {marks.get_label(): np.asarray(marks.get_offsets()).tolist() for marks in axes.collections}
    return {label: offsets for label, offsets in found.items() if not label.startswith("_")}


def curves(axes) -> dict[str, tuple[list, list]]:
    found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    return {label: data for label, data in found.items() if not label.startswith("_")}


def levels(axes) -> list[float]:
    """Heights of horizontal lines over the whole panel."""
    return [line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1]]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def is_drawn(png, svg) -> bool:
    return png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text() and png.stat().st_size > 5000


def test_models_are_points_and_a_sweep_is_a_curve_through_its_scales(tmp_path):
    figure = novelty_figure(rows(), chance=0.1)
    (axes,) = figure.axes
    assert points(axes) == {"SANE, KDE": [[0.8, 50]], "SANE, KDE: best": [[0.6, 70], [0.7, pytest.approx(60)]]}
    novelty, accuracy = curves(axes)["noise"]
    assert novelty == pytest.approx([0.21, 0.41, 0.61]) and accuracy == pytest.approx([71, 61, 51])
    assert levels(axes) == pytest.approx([80, 10])
    assert "median of the anchors" in texts(axes) and "chance" in texts(axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SANE, KDE", "SANE, KDE: best", "noise"]
    assert "%" in axes.get_ylabel() and "novelty" in axes.get_xlabel() and axes.get_legend() is None
    assert is_drawn(*plot_novelty(rows(), tmp_path / "new" / "novelty", 0.1))


def test_every_model_of_a_sweep_is_a_small_point_too_and_the_band_is_its_interval():
    (axes,) = novelty_figure(rows()).axes
    small = [marks for marks in axes.collections if marks.get_label().startswith("_") and len(marks.get_offsets()) == 9]
    assert len(small) == 1
    band = next(marks for marks in axes.collections if type(marks).__name__ == "FillBetweenPolyCollection")
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(50) and heights.max() == pytest.approx(72)


def test_a_method_has_one_colour_in_all_plots_and_its_selection_another_mark():
    def colours(axes):
        found = {marks.get_label(): to_hex(marks.get_facecolor()[0]) for marks in axes.collections}
        return found | {line.get_label(): to_hex(line.get_color()) for line in axes.get_lines()}

    first, second = novelty_figure(rows()).axes[0], behavior_figure(rows()).axes[0]
    third = curves_figure([{**row, "epoch": 0} for row in rows()]).axes[0]
    for axes in (first, second, third):
        named = colours(axes)
        assert named["SANE, KDE"] == named["SANE, KDE: best"] == BLUE and named["noise"] == ORANGE
    markers = {line.get_label(): line.get_marker() for line in third.get_lines()}
    assert markers["SANE, KDE"] == markers["noise"] != markers["SANE, KDE: best"]


def test_other_methods_get_colours_of_their_own():
    (axes,) = novelty_figure([model(name, 0.5, 0.5) for name in ("sane_kde", "sane_flow", "my_method")]).axes
    colours = {marks.get_label(): to_hex(marks.get_facecolor()[0]) for marks in axes.collections}
    assert len({colours[name] for name in ("SANE, KDE", "sane flow", "my method")}) == 3


def test_models_far_from_everything_are_told_not_shown():
    figure = novelty_figure([*rows(), model("noise", 40.0, 0.1, scale=9.0)])
    assert figure.axes[0].get_xlim()[1] <= 2.5
    assert any("1 model is farther than 2.5" in text.get_text() for text in figure.texts)
    assert not any("farther" in text.get_text() for text in novelty_figure(rows()).texts)


def test_behaviour_is_novelty_against_wrong_agreement(tmp_path):
    (axes,) = behavior_figure(rows(), quantile=0.4).axes
    found = points(axes)
    assert found["SANE, KDE: best"] == [[0.6, 0.3], [0.7, 0.2]] and len(found["noise"]) == 9
    assert found["anchors"] == [[1, 0.5]] * 3
    assert levels(axes) == [0.4] and "95 % quantile among training runs" in texts(axes)
    assert levels(behavior_figure(rows()).axes[0]) == levels(behavior_figure(rows(), NAN).axes[0]) == []
    assert is_drawn(*plot_behavior(rows(), tmp_path / "behavior", 0.4))


def tuned(method, values, epochs=(0, 1, 5, 25)):
    """A row an epoch and repetition."""
    return [{"method": method, "epoch": epoch, "repetition": repetition, "accuracy": value + 0.01 * epoch}
            for repetition, value in enumerate(values) for epoch in epochs]  # fmt: skip


def test_curves_are_means_over_repetitions_with_their_interval(tmp_path):
    history = tuned("sane_kde", (0.5, 0.6)) + tuned("scratch", (0.1, 0.1), (0, 5))
    axes, ends = curves_figure(history).axes
    epochs, means = curves(axes)["SANE, KDE"]
    assert epochs == [0, 1, 5, 25] and means == pytest.approx([55, 56, 60, 80])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(50) and heights.max() == pytest.approx(85)
    assert axes.get_xticks().tolist() == [0, 1, 2, 5, 10, 25] and axes.get_xlabel() == "epoch of fine-tuning"
    assert [label.get_text() for label in ends.get_yticklabels()] == ["from scratch (epoch 5)", "SANE, KDE"]
    dots = [line.get_xdata() for line in ends.get_lines() if len(line.get_xdata()) == 1]
    assert [dot[0] for dot in dots] == pytest.approx([15, 80])
    bars = [list(line.get_xdata()) for line in ends.get_lines() if len(line.get_xdata()) == 2]
    assert bars[1] == pytest.approx([75, 85]) and ends.get_xlabel() == "after epoch 25 (%)"
    assert is_drawn(*plot_curves(history, tmp_path / "curves"))


def test_models_of_one_repetition_are_one_draw():
    history = [{"method": "noise", "epoch": 0, "repetition": draw, "accuracy": value}
               for draw, value in ((0, 0.0), (0, 1.0), (1, 0.4), (1, 0.6))]  # fmt: skip
    axes, _ = curves_figure(history).axes
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == heights.max() == 50
    alone = [{key: value for key, value in row.items() if key != "repetition"} for row in history]
    heights = curves_figure(alone).axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() - heights.min() > 40


def test_the_last_epoch_is_named_whatever_it_is():
    assert curves_figure(tuned("noise", (0.5,), (0, 7))).axes[0].get_xticks().tolist() == [0, 1, 2, 5, 7]
    assert curves_figure(tuned("noise", (0.5,), (0,))).axes[0].get_xticks().tolist() == [0]


def test_nothing_or_little_is_drawn_too(tmp_path):
    for found in ([], [model("noise", NAN, NAN)], [model("anchors", 1.0, 0.5)], [model("noise", 0.1, 0.2, None, 1.0)]):
        assert is_drawn(*plot_novelty(found, tmp_path / "novelty"))
        assert is_drawn(*plot_behavior(found, tmp_path / "behavior"))
    assert is_drawn(*plot_curves([], tmp_path / "curves"))
    assert is_drawn(*plot_curves([{"method": "noise", "epoch": 0, "accuracy": NAN}], tmp_path / "curves"))


def test_drawing_leaves_pyplot_and_ray_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sane_ray.report.sampling import plot_curves\n"
        f"plot_curves([], Path({str(tmp_path)!r}) / 'curves')\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
