"""Epochs that were left out and other zoos: lines and matrices hold what results say, and nothing where it is none."""

import numpy as np

from sane_ray.report.protocols import epochs_figure, has_epochs, has_transfer, transfer_figure


def row(part, r2, protocol="leave-one-epoch", target="test_acc", features="sane", probe="ridge"):
    known = {"target": target, "features": features, "probe": probe, "protocol": protocol}
    return known | {"part": part, "r2": r2}


def test_a_line_a_feature_set_over_the_epochs_in_their_order():
    rows = [row("epoch 10", 0.9), row("epoch 2", 0.5), row("epoch 5", None)]
    rows += [row("epoch 2", 0.4, features="statistics"), row("epoch 2", 0.1, probe="boosting"), row("", 1, "split")]
    assert has_epochs(rows) and not has_epochs(rows[4:])
    figure = epochs_figure(rows)
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() in ("o", "s") and len(line.get_xdata())]
    (sane, statistics) = ((list(line.get_xdata()), list(line.get_ydata())) for line in lines)
    assert (sane[1], statistics[1]) == ([0.5, 0.9], [0.4])
    assert 0 > sane[0][0] > -0.5 and 0 < statistics[0][0] < 0.5 and sane[0][1] == sane[0][0] + 1  # beside each other
    assert list(figure.axes[0].get_xticks()) == [0, 1]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["2", "10"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sane", "statistics"]


def test_an_epoch_whose_fit_failed_is_an_arrow_that_no_line_leads_to():
    axes = epochs_figure([row("epoch 0", -40.0), row("epoch 1", 0.5), row("epoch 2", 0.6)]).axes[0]
    line = next(line for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata()))
    assert np.isnan(line.get_ydata()[0]) and list(line.get_ydata()[1:]) == [0.5, 0.6]
    arrow = next(line for line in axes.get_lines() if line.get_marker() == "v" and len(line.get_xdata()))
    assert (list(arrow.get_xdata()), list(arrow.get_ydata())) == ([0], [-0.5])
    assert axes.get_ylim()[0] > -0.6


def test_a_matrix_has_rows_of_training_columns_of_test_zoos_and_blanks():
    rows = [
        row("a -> b", 0.2, "out-of-distribution"),
        row("b -> a", -3.0, "out-of-distribution"),
        row("", 0.9, "split"),
    ]
    assert has_transfer(rows) and not has_transfer(rows[2:])
    (axes, _) = transfer_figure(rows, ["a", "b"]).axes
    shown = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    assert np.array_equal(shown, [[0.9, 0.2], [-3, np.nan]], equal_nan=True)
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.20", "-3.00"]
    assert axes.get_title(loc="left") == "test_acc, ridge\nsane"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_every_probe_has_its_matrices():
    probes = ("ridge", "boosting")
    rows = [row("a -> b", 0.2 + place, "out-of-distribution", probe=name) for place, name in enumerate(probes)]
    rows += [row("b -> b", -362.47, "out-of-distribution"), row("", 0.9, "split", probe="boosting")]
    ridge, boosting, _ = transfer_figure(rows, ["a", "b"]).axes
    assert [text.get_text() for text in ridge.texts] == ["0.20", "-362"]
    assert [text.get_text() for text in boosting.texts] == ["0.90", "1.20"]
    assert boosting.get_title(loc="left") == "test_acc, boosting\nsane"


def test_many_epochs_are_named_now_and_then_and_nine_sets_have_marks_of_their_own():
    rows = [row(f"epoch {epoch}", 0.5, features=f"set {place}") for epoch in range(30) for place in range(9)]
    axes = epochs_figure(rows).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()][:4] == ["0", "", "", "3"]
    drawn = [line for line in axes.get_lines() if len(line.get_xdata()) == 30]
    assert len({(line.get_marker(), line.get_color(), line.get_linestyle()) for line in drawn}) == 9
    assert len({float(line.get_xdata()[0]) for line in drawn}) == 9


def test_zoos_are_read_off_the_parts_where_none_are_given_and_feature_sets_have_a_matrix_each():
    rows = [row("a -> b", 0.2, "out-of-distribution", features=name) for name in ("sane", "statistics")]
    figure = transfer_figure(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == [
        "test_acc, ridge\nsane",
        "test_acc, ridge\nstatistics",
    ]
