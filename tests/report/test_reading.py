"""Plots of embeddings and predictions hold what they were given, from one layer and network to hundreds."""

import subprocess
import sys

import numpy as np
import pytest

from sane_ray.report.names import label
from sane_ray.report.reading import (
    depth_figure,
    family_figure,
    importances_figure,
    map_figure,
    network_figure,
    predictions_figure,
    scores_figure,
)
from sane_ray.report.style import SCATTER_LIMIT, save, short_names


def measures(networks, layers, seed=0):
    generator = np.random.default_rng(seed)
    names = ("spread", "norm", "error", "log_spectral_norm", "alpha_weighted", "stable_rank")
    return {name: generator.uniform(1, 2, size=(networks, layers)) for name in names}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible() and axes.get_title(loc="left")]


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def row(target="test_acc", features="sane", probe="ridge", **scores):
    empty = dict.fromkeys(f"{metric}{end}" for metric in ("r2", "tau") for end in ("", "_low", "_high"))
    return {"target": target, "features": features, "probe": probe} | empty | scores


def test_depth_has_a_panel_a_measure_a_line_a_network_and_their_median():
    values = measures(4, 6)
    values["alpha_weighted"][:] = np.nan
    figure = depth_figure([f"net.{layer}.weight" for layer in range(6)], values, "four")
    assert titles(figure) == [
        "spread of token embeddings",
        "length of the mean embedding",
        "error of reconstruction",
        "log10 spectral norm²",
        "stable rank",
    ]
    lines = figure.axes[0].get_lines()
    assert len(lines) == 5 and np.allclose(lines[-1].get_ydata(), np.median(values["spread"], axis=0))
    assert texts(figure.axes[0].get_legend()) == ["one checkpoint", "median"]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == [f"net.{layer}" for layer in range(6)]
    assert figure.get_suptitle() == "four"


def test_depth_of_many_networks_is_quartiles_and_of_many_layers_numbered():
    values = measures(100, 150)
    figure = depth_figure([f"blocks.{layer}.weight" for layer in range(150)], values)
    assert texts(figure.axes[0].get_legend()) == ["middle half of the checkpoints", "median"]
    assert len(figure.axes[0].get_lines()) == 1
    assert figure.axes[-1].get_xlabel() == "layer, from 1 (blocks.0) to 150 (blocks.149)"


def test_a_layer_without_a_value_is_a_gap_in_no_line_and_one_layer_is_visible():
    values = measures(3, 5)
    values["spread"][:, 2] = np.nan
    lines = depth_figure(list("abcde"), values).axes[0].get_lines()
    assert all(list(line.get_xdata()) == [1, 2, 4, 5] for line in lines)
    single = depth_figure(["fc"], measures(3, 1)).axes[0]
    assert all(line.get_marker() in (".", "o") for line in single.get_lines())


def test_amounts_that_span_decades_are_logarithmic_but_not_for_a_few_odd_networks():
    values = measures(100, 4)
    values["error"] = np.tile([1e-4, 1e-2, 1, 10], (100, 1))
    values["spread"][0] = 1e6
    spread, _, error = depth_figure(list("abcd"), values).axes[:3]
    assert (spread.get_yscale(), error.get_yscale()) == ("linear", "log")


def test_a_network_is_its_embeddings_and_all_its_measures():
    mean_KL = np.random.default_rng(0).normal(size=(5, 16))
    figure = network_figure(list("abcde"), mean_KL, {name: values[0] for name, values in measures(1, 5).items()}, "net")
    strip = figure.axes[0].get_images()[0]
    order = np.argsort(mean_KL.mean(axis=0))
    assert np.allclose(strip.get_array(), mean_KL[:, order].T)
    assert strip.norm.vmin == -strip.norm.vmax
    assert len(titles(figure)) == 7 and titles(figure)[0] == "mean embedding of each layer"
    assert len(figure.axes[1].patches) == 5  # a bar a layer
    assert figure.get_suptitle() == "net"


def test_a_network_shows_what_is_explained_and_says_what_the_model_does_not_know():
    explained = {"explained_variance": np.array([0.9, -0.5, -40.0, np.nan])}
    figure = network_figure(list("abcd"), np.zeros((4, 2)), explained, "net", "not trained on it")
    axes = figure.axes[1]
    assert titles(figure)[1] == "explained variance of the weights"
    assert [patch.get_height() for patch in axes.patches] == pytest.approx([0.9, -0.5, -1])
    marks = {line.get_label(): line for line in axes.get_lines()}
    assert list(marks["_below"].get_xdata()) == [3] and list(marks["_none"].get_xdata()) == [4]
    assert axes.get_ylim()[0] < -1 < 1 < axes.get_ylim()[1]
    assert "no value" in axes.get_xlabel() and "below -1" in axes.get_xlabel()
    assert [text.get_text() for text in figure.texts if "trained" in text.get_text()] == ["not trained on it"]


def test_a_line_of_a_network_has_gaps_and_a_layer_without_an_amount_has_no_bar():
    values = {"alpha_weighted": np.array([1.0, np.nan, 3, 4]), "stable_rank": np.array([1.0, 2, np.nan, 4])}
    alpha, rank = network_figure(list("abcd"), np.zeros((4, 2)), values).axes[1:3]
    assert np.array_equal(alpha.get_lines()[0].get_ydata(), values["alpha_weighted"], equal_nan=True)
    assert [round(patch.get_x() + patch.get_width() / 2) for patch in rank.patches] == [1, 2, 4]
    assert [list(line.get_xdata()) for line in rank.get_lines() if line.get_label() == "_none"] == [[3]]


@pytest.mark.parametrize("layers", [1, 150])
def test_the_smallest_and_a_very_deep_network_are_drawn(layers, tmp_path):
    values = {name: found[0] for name, found in measures(1, layers).items()}
    values["stable_rank"] = np.full(layers, np.nan)
    names = [f"model.layers.{layer}.attention.query_key_value.weight" for layer in range(layers)]
    figure = network_figure(names, np.zeros((layers, 8)), values)
    assert "stable rank" not in titles(figure)
    assert np.ptp(figure.axes[0].get_xlim()) >= 3  # one layer is not as wide as the page
    assert all(file.stat().st_size > 5000 for file in save(figure, tmp_path / "net"))


def test_a_family_has_a_line_an_architecture_over_relative_depth():
    figure = family_figure({"small": measures(3, 4), "large": measures(1, 9), "single": measures(2, 1)})
    lines = [line for line in figure.axes[1].get_lines() if len(line.get_xdata())]
    assert [list(line.get_xdata())[-1] for line in lines] == [1, 1, 0.5]
    assert [len(line.get_xdata()) for line in lines] == [4, 9, 1]
    assert texts(figure.legends[0]) == ["small", "large", "single"]
    assert family_figure({}).axes


def test_a_map_has_a_panel_a_property_a_mark_a_network_and_lines_of_models():
    points = np.random.default_rng(0).normal(size=(12, 2))
    colours = {"test_acc": [None, float("nan"), *np.linspace(0, 1, 10)], "nlin": ["relu", "tanh", None] * 4}
    figure = map_figure(points, colours, (0.5, 0.25), [f"m{row // 3}" for row in range(12)])
    accuracy, kinds = figure.axes[:2]
    assert titles(figure)[:2] == ["test accuracy", "nlin"]
    trajectories, unknown, known = accuracy.collections
    assert len(trajectories.get_segments()) == 4 and np.allclose(trajectories.get_segments()[0], points[:3])
    assert (len(unknown.get_offsets()), len(known.get_offsets())) == (2, 10)
    place = {tuple(point): value for point, value in zip(points.tolist(), colours["test_acc"], strict=True)}
    assert all(place[tuple(p)] == v for p, v in zip(known.get_offsets().tolist(), known.get_array(), strict=True))
    assert set(texts(kinds.get_legend())) == {"relu", "tanh", "unknown"}
    assert len(kinds.collections[1].get_offsets()) == 12
    assert accuracy.get_xlabel() == "first component (50%)" and accuracy.get_ylabel() == "second component (25%)"


def test_a_map_without_properties_or_of_thousands_is_readable(tmp_path):
    points = np.random.default_rng(0).normal(size=(SCATTER_LIMIT + 1, 2))
    plain = map_figure(points[:3], {"": [0.0] * 3}, (1, 0), list("abc"), title="three")
    assert plain.get_suptitle() == "three"
    assert len(plain.axes) == 1  # no colour bar of a constant
    many = map_figure(points, {"epoch": list(range(len(points)))}, (1, 0), ["m"] * len(points))
    assert save(many, tmp_path / "map")[1].stat().st_size < 1_000_000
    rare = map_figure(points[:40], {"seed": [f"s{row}" for row in range(40)]}, (1, 0))
    assert len(texts(rare.axes[0].get_legend())) == 9 and texts(rare.axes[0].get_legend())[-1] == "others"


def test_scores_are_dots_with_intervals_a_panel_a_target():
    rows = [
        row(features="statistics", r2=0.5, r2_low=0.4, r2_high=0.6),
        row(features="statistics", probe="boosting", r2=0.55),
        row(r2=0.7, r2_low=0.65, r2_high=0.75),
        row(target="epoch", r2=0.9, r2_low=0.8, r2_high=0.95),
        row(target="ggap", features="weights"),  # not measured
    ]
    figure = scores_figure(rows, "r2", "R²")
    accuracy, epoch = figure.axes
    assert titles(figure) == ["test accuracy", "epoch"] and accuracy.get_xlabel() == "R²"
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["statistics", "sane"]
    dots = {line.get_label(): line for line in accuracy.get_lines() if line.get_marker() == "o"}
    assert list(dots["ridge"].get_xdata()) == [0.5, 0.7] and list(dots["boosting"].get_xdata()) == [0.55]
    bars = [list(line.get_xdata()) for line in accuracy.get_lines() if line.get_marker() in ("None", None, "")]
    assert [0.4, 0.6] in bars and [0.65, 0.75] in bars
    assert texts(figure.legends[0]) == ["ridge", "boosting"]
    assert len([line for line in epoch.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]) == 1


def test_a_fit_that_failed_is_told_at_the_edge_and_hides_no_other():
    figure = scores_figure([row(r2=-40.0, r2_low=-90.0, r2_high=-2.0), row(features="statistics", r2=0.8)], "r2", "R²")
    (axes,) = figure.axes
    assert axes.get_xlim()[0] > -0.6 and axes.get_xlim()[1] > 1
    assert [text.get_text().strip() for text in axes.texts] == ["-40"]
    assert [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "<"] == [[-0.5]]
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[0.8]]  # the arrow stands for the other
    assert scores_figure([], "r2", "R²").axes[0].get_title(loc="left") == "nothing was measured"


def test_predictions_lie_around_a_diagonal():
    truth = np.array([0.1, 0.5, 0.9])
    figure = predictions_figure({"test_acc: sane, ridge": (truth, truth + 0.1)})
    (axes,) = figure.axes
    assert np.allclose(axes.collections[0].get_offsets(), np.stack([truth, truth + 0.1], axis=1))
    assert list(axes.get_lines()[0].get_xdata()) == list(axes.get_lines()[0].get_ydata())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("true", "predicted")
    assert titles(figure) == ["test accuracy: sane, ridge"] and "validation chose the fit" in figure.get_suptitle()
    many = np.linspace(0, 1, SCATTER_LIMIT + 1)
    density = predictions_figure({"many": (many, many)}).axes[0].collections[0]
    assert density.get_array().sum() == SCATTER_LIMIT + 1


@pytest.mark.parametrize("title", ["generalisation_gap: statistics_published+spectral, boosting", "x" * 80])
def test_titles_of_predictions_fit_their_panels(title):
    figure = predictions_figure({f"{title}{place}": (np.ones(3), np.ones(3)) for place in range(3)})
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes._left_title.get_window_extent()
        assert box.x1 < axes.get_window_extent().x1 + 20 and box.y1 <= figure.bbox.y1


def test_layers_without_importance_have_no_bar_and_are_counted():
    bars = [("a", 0.5, 0.1), ("b", 0.0, 0.0), *[(f"c{place}", 0.1, 0.01) for place in range(22)]]
    (axes,) = importances_figure({"epoch": bars}).axes
    assert len(axes.patches) == 20 and "b" not in [label.get_text() for label in axes.get_yticklabels()]
    assert axes.get_xlabel() == "loss of R²\nno bar: 1 layer of no effect, 3 layers of less effect"
    assert importances_figure({"epoch": bars[:1]}).axes[0].get_xlabel() == "loss of R²"


def test_layers_are_bars_of_what_they_are_worth():
    bars = [(f"net.{layer}.weight", 1 / (layer + 1), 0.1) for layer in range(30)]
    figure = importances_figure({"test_acc": bars, "epoch": bars[:1], "ggap": []})
    first, second = figure.axes
    assert [patch.get_width() for patch in first.patches] == pytest.approx([1 / (layer + 1) for layer in range(20)])
    assert [label.get_text() for label in first.get_yticklabels()][:2] == ["net.0", "net.1"]
    assert second.patches[0].get_height() < 0.2 * np.ptp(second.get_ylim())  # one bar does not fill the panel
    assert importances_figure({}).axes


def test_figures_are_as_large_as_layers_are_many():
    few, many = ([(f"net.{layer}.weight", 1.0, 0.1) for layer in range(count)] for count in (3, 20))
    figure = importances_figure({"test_acc by sane, ridge": few})
    (axes,) = figure.axes
    assert titles(figure) == ["test accuracy by sane, ridge"]
    assert axes.get_ylim() == (2.6, -0.6)  # no room for bars that are not there
    assert figure.get_figheight() < importances_figure({"epoch": many}).get_figheight()
    narrow, wide = (depth_figure([f"net.{k}" for k in range(count)], measures(2, count)) for count in (4, 20))
    assert narrow.axes[0].get_xlim() == (0.5, 4.5) and narrow.get_figwidth() < wide.get_figwidth()


def test_a_measure_of_some_checkpoints_says_of_how_many():
    values = measures(3, 5)
    values["stable_rank"][1:] = np.nan
    found = titles(depth_figure(list("abcde"), values))
    assert found[0] == "spread of token embeddings" and found[-1] == "stable rank (1 checkpoint)"


def test_properties_are_called_in_words_where_a_text_begins_with_them():
    assert label("ggap") == "generalisation gap" and label("property.test_acc") == "test accuracy"
    assert label("training_iteration by sane, ridge") == "epoch by sane, ridge"
    assert label("nlin") == "nlin" and label("ggap_of_mine") == "ggap_of_mine" and label("") == ""
    assert label("property.own") == "property.own"


def test_names_are_short_where_they_are_alike_and_whole_where_they_are_not():
    assert short_names(["model.a.weight", "model.b.weight"]) == ["a", "b"]
    assert short_names(["layers.0.weight", "layers.1.weight"]) == ["layers.0", "layers.1"]
    assert short_names(["fc.weight"]) == ["fc.weight"] and short_names([]) == []
    assert short_names(["a.weight", "a.weight"]) == ["weight", "weight"]  # of one name each, none is empty
    assert short_names(["a", "a.b"]) == ["a", "a.b"]
    assert len(short_names(["x" * 50, "y" * 50])[0]) == 28


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys, numpy; from sane_ray.report.reading import predictions_figure\n"
        "predictions_figure({'a': (numpy.ones(2), numpy.ones(2))}); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
