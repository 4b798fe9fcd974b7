"""Embeddings against spectra: a panel a pair, its correlation in numbers, blank where it is not defined."""

import numpy as np

from sane_ray.analysis.depth import Profiles
from sane_ray.analysis.tables import correlations
from sane_ray.report.spectra import number_of, spectra_figure, why_not


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_a_pair_has_both_curves_and_their_correlation_and_what_is_not_defined_is_blank():
    rising = np.arange(5.0)[None]
    few = np.array([[1.0, 2, np.nan, np.nan, np.nan]])
    measures = {"spread": rising, "norm": np.ones((1, 5)), "log_norm": 7 - 2 * rising, "alpha": few}
    found = Profiles(["a"], list("vwxyz"), measures)
    figure = spectra_figure({"net": measures}, correlations(found), "one", "a note")
    assert titles(figure) == ["log norm\nr = -1.00, n = 5"]  # no row of a constant, no column of two values
    curves = [line.get_ydata() for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert np.allclose(curves[0], -curves[1]) and np.isclose(np.std(curves[0]), 1)
    assert "a note" in [text.get_text() for text in figure.texts]


def test_a_pair_of_too_few_layers_says_so_and_has_neither_a_number_nor_curves():
    spread = np.array([[1.0, 2, 4, 5, 7, np.nan]])
    measures = {"spread": spread, "norm": np.arange(6.0)[None]}
    measures |= {"log_norm": np.arange(6.0)[None] ** 2, "alpha": np.array([[np.nan, 2, 3, 9, 7, 1]])}
    figure = spectra_figure({"net": measures}, correlations(Profiles(["a"], list("uvwxyz"), measures)))
    assert titles(figure)[1].strip() == "alpha"
    assert not figure.axes[1].get_lines()
    assert [text.get_text() for text in figure.axes[1].texts] == ["4 layers with both:\ntoo few for r"]
    assert all(axes.get_lines() and not axes.texts for axes in (figure.axes[0], *figure.axes[2:]))
    assert why_not(None).startswith("0 layers") and "constant" in why_not({"layers_most": 5})


def test_a_family_has_no_curve_of_an_architecture_with_too_few_layers():
    small, large = np.arange(4.0)[None], np.array([[0, 1, np.nan, 3, 4, 5.0]])
    one, other = {"norm": small, "log_norm": small}, {"norm": large, "log_norm": large}
    rows = correlations(Profiles(["a"], list("wxyz"), one), Profiles(["b"], list("uvwxyz"), other))
    figure = spectra_figure({"small": one, "large": other}, rows)
    curves = [line.get_xdata() for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert len(curves) == 2 and np.allclose(curves[0], [0, 0.2, 0.6, 0.8, 1])  # the layer without values is skipped


def test_a_family_has_the_mean_over_networks_with_its_deviation():
    small, large = np.arange(5.0), np.arange(9.0)
    one = {"norm": np.stack([small, small]), "log_norm": np.stack([small, small])}
    other = {"norm": large[None], "log_norm": -large[None]}
    rows = correlations(Profiles(["a", "b"], list("vwxyz"), one), Profiles(["c"], list("rstuvwxyz"), other))
    figure = spectra_figure({"small": one, "large": other}, rows)
    assert titles(figure) == ["log norm\nr = 0.33 ± 1.15, n = 5–9"]
    ends = [(line.get_xdata()[0], line.get_xdata()[-1]) for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert ends == [(0, 1)] * 4


def test_a_number_is_blank_or_has_a_deviation_or_none():
    layers = {"layers_least": 5, "layers_most": 5}
    assert number_of(layers | {"pearson": None, "pearson_deviation": None}) == ""
    assert number_of(layers | {"pearson": 0.0, "pearson_deviation": None}) == "r = 0.00, n = 5"
    wide = {"layers_least": 5, "layers_most": 8}
    assert number_of(wide | {"pearson": 0.456, "pearson_deviation": 0.1}) == "r = 0.46 ± 0.10, n = 5–8"


def test_a_long_title_stays_on_a_narrow_figure():
    measures = {"norm": np.arange(5.0)[None], "log_norm": np.arange(5.0)[None]}
    title = "Embeddings and spectra of the weights along depth: mean ± deviation of r over 1,000 networks"
    rows = correlations(Profiles(["a"], list("vwxyz"), measures))
    figure = spectra_figure({"net": measures}, rows, title, "a note")
    figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1
