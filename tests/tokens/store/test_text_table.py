import math

import pyarrow as pa
import pytest

from sane_ray.tokens.store.text_table import table, value_range


def test_numbers_stand_to_the_right_and_text_to_the_left():
    assert table([("name", "count"), ("a", "1,000"), ("long name", "7")]) == [
        "name       count",
        "a          1,000",
        "long name      7",
    ]


def test_heading_alone():
    assert table([("name", "count")]) == ["name  count"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([3, None, 1], "1 to 3"),
        ([0.5, math.nan, 0.25], "0.25 to 0.5"),
        ([math.nan], "none"),
        ([None], "none"),
        ([], "none"),
        (["b", "a", None, "b"], "a, b"),
        ([True, False], "False, True"),
        (list("hgfedcba"), "a, b, c, d, e, f, … (8 values)"),
        (["x" * 50], "x" * 39 + "…"),
    ],
)
def test_value_range(values: list[object], text: str):
    assert value_range(pa.chunked_array([pa.array(values)])) == text
    assert value_range(pa.array(values)) == text
