"""Embeddings against spectra: a panel a pair, its correlation in numbers, blank where it is not defined."""

import numpy as np

from sane_ray.analysis.depth import Profiles
from sane_ray.analysis.tables import correlations
from sane_ray.report.spectra import number_of, spectra_figure


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_a_pair_has_both_curves_and_their_correlation_and_what_is_not_defined_is_blank():
    rising = np.arange(5.0)[None]
    few = np.array([[1.0, 2, np.nan, np.nan, np.nan]])
    measures = {"spread": rising, "norm": np.ones((1, 5)), "log_norm": 7 - 2 * rising, "alpha": few}
    found = Profiles(["a"], list("vwxyz"), measures)
    figure = spectra_figure({"net": measures}, correlations(found), "one", "a note")
    assert titles(figure) == ["log norm\nr = -1.00"]  # no row of a constant, no column of two values
    curves = [line.get_ydata() for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert np.allclose(curves[0], -curves[1]) and np.isclose(np.std(curves[0]), 1)
    assert "a note" in [text.get_text() for text in figure.texts]


def test_one_pair_that_is_not_defined_is_a_blank_panel():
    spread = np.array([[1.0, 2, 4, np.nan, np.nan]])
    measures = {"spread": spread, "norm": np.arange(5.0)[None]}
    measures |= {"log_norm": np.arange(5.0)[None] ** 2, "alpha": np.array([[np.nan, 2, 3, 9, 7]])}
    figure = spectra_figure({"net": measures}, correlations(Profiles(["a"], list("vwxyz"), measures)))
    assert titles(figure)[1].strip() == "alpha"
    assert not figure.axes[1].get_lines()
    assert all(axes.get_lines() for axes in (figure.axes[0], *figure.axes[2:]))


def test_a_family_has_the_mean_over_networks_with_its_deviation():
    small, large = np.arange(4.0), np.arange(9.0)
    one = {"norm": np.stack([small, small]), "log_norm": np.stack([small, small])}
    other = {"norm": large[None], "log_norm": -large[None]}
    rows = correlations(Profiles(["a", "b"], list("wxyz"), one), Profiles(["c"], list("rstuvwxyz"), other))
    figure = spectra_figure({"small": one, "large": other}, rows)
    assert titles(figure) == ["log norm\nr = 0.33 ± 1.15"]
    ends = [(line.get_xdata()[0], line.get_xdata()[-1]) for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    assert ends == [(0, 1)] * 4


def test_a_number_is_blank_or_has_a_deviation_or_none():
    assert number_of({"pearson": None, "pearson_deviation": None}) == ""
    assert number_of({"pearson": 0.0, "pearson_deviation": None}) == "r = 0.00"
    assert number_of({"pearson": 0.456, "pearson_deviation": 0.1}) == "r = 0.46 ± 0.10"


def test_a_long_title_stays_on_a_narrow_figure():
    measures = {"norm": np.arange(5.0)[None], "log_norm": np.arange(5.0)[None]}
    title = "Embeddings and spectra of the weights along depth: mean ± deviation of r over 1,000 networks"
    rows = correlations(Profiles(["a"], list("vwxyz"), measures))
    figure = spectra_figure({"net": measures}, rows, title, "a note")
    figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1
