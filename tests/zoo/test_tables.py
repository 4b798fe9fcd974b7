import datetime
import gzip
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sane_ray.errors import InputError
from sane_ray.zoo.tables import (
    clean_text,
    plain_columns,
    plain_rows,
    plain_value,
    read_table,
    value_column,
    value_columns,
)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, None, False], "bool"),
        ([1, None, -(2**63)], "int64"),
        ([1, 0.5, None], "double"),
        ([np.float32(0.5), np.int64(3)], "double"),
        ([np.bool_(True)], "bool"),
        ([2**63], "string"),
        ([10**400, 0.5], "string"),
        ([True, 1], "string"),
        ([1, "one"], "string"),
        ([None, None], "string"),
    ],
)
def test_type_of_a_column(values: list[object], kind: str):
    column = value_column(values)
    assert str(column.type) == kind
    assert column.null_count == values.count(None)


def test_columns_of_rows_that_differ():
    columns = value_columns("property", [{"a": 1}, {}, {"b": "x", "a": math.inf}])
    assert {name: column.to_pylist() for name, column in columns.items()} == {
        "property.a": [1.0, None, math.inf],
        "property.b": [None, None, "x"],
    }


@pytest.mark.parametrize(
    ("column", "plain"),
    [
        (pa.array([1, None, 3], pa.uint8()), [1, None, 3]),
        (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
        (pa.array([True, None]), [True, None]),
        (pa.array([None, None]), [None, None]),
        (pa.array(np.array([0.5], np.float16)), [0.5]),
        (pa.array(["a", None, "a"], pa.large_string()), ["a", None, "a"]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([datetime.date(2024, 12, 31)]), ["2024-12-31"]),
        (pa.array([datetime.datetime(2024, 12, 31)], pa.timestamp("ns")), ["2024-12-31"]),
        (pa.array([1], pa.timestamp("ns")), ["1970-01-01"]),
        (pa.array([datetime.datetime(2024, 12, 31, 1, 2, 3)]), ["2024-12-31T01:02:03"]),
        (pa.array(["0.25"]).cast(pa.decimal128(5, 2)), [0.25]),
        (pa.array([[1, 2], None]), ["[1, 2]", None]),
        (pa.array([b"\xff"]), ["\\xff"]),
    ],
)
def test_plain_values_of_any_column(column: pa.Array, plain: list[object]):
    values = plain_columns(pa.table({"x": column}))["x"]
    assert values == plain
    assert [type(value) for value in values] == [type(value) for value in plain]
    sliced = plain_rows(pa.table({"x": pa.concat_arrays([column, column])}).slice(len(column)))
    assert [row["x"] for row in sliced] == plain


def test_csv_with_names_that_look_like_numbers_and_nothing_in_many_spellings(tmp_path: Path):
    with gzip.open(tmp_path / "x.csv.gz", "wt") as file:
        file.write("model,a,b,c\n007,1,x,nan\n008,NA,None,0.5\n")
    first, second = plain_rows(read_table(tmp_path / "x.csv.gz"))
    assert math.isnan(first.pop("c"))
    assert (first, second) == ({"model": "007", "a": 1, "b": "x"}, {"model": "008", "a": None, "b": None, "c": 0.5})


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01"])
def test_files_that_are_no_tables(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: not a readable CSV or Parquet file"):
        read_table(tmp_path / name)


def test_names_that_are_no_utf8_become_escapes():
    assert clean_text("caf\udce9 ü") == "caf\\udce9 ü"
    assert value_columns("config", [{"\udce9": "\udce9"}])["config.\\udce9"].to_pylist() == ["\\udce9"]


class Odd:
    def __str__(self) -> str:
        return "odd \ud800"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2**63 - 1, 2**63 - 1),
        (10**30, 1e30),
        (10**400, math.inf),
        (-(10**400), -math.inf),
        (True, True),
        (np.float64(0.5), 0.5),
        (np.int64(5), 5),
        ("a\ud800", "a\\ud800"),
        (b"\xff", "\\xff"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        ([1, "\ud800"], '[1, "\\ud800"]'),
        ((1, 2), "(1, 2)"),
        (Odd(), "odd \\ud800"),
        (None, None),
    ],
)
def test_one_plain_value(value: object, expected: object):
    assert plain_value(value) == expected and type(plain_value(value)) is type(expected)


def test_text_of_a_parquet_file_that_is_no_utf8(tmp_path: Path):
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"path": text}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet: not a readable CSV or Parquet file"):
        read_table(tmp_path / "t.parquet")


def test_names_of_columns_that_are_no_text_are_told(tmp_path: Path):
    (tmp_path / "known.csv").write_bytes(b"id,\x8bacc\na,1\n")
    with pytest.raises(InputError, match=r"known\.csv: not a readable CSV or Parquet file"):
        read_table(tmp_path / "known.csv")
