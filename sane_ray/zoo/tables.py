"""Tables of what is known of checkpoints: CSV and Parquet to plain values, and plain values to columns.

Plain values are numbers, booleans, text and None. Never decides on a column's type from a part of it.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from sane_ray.errors import InputError
from sane_ray.zoo.readers import Value

_TEXT = dict.fromkeys(("path", "id", "model", "license", "split", "reader", "member"), pa.string())
"""Columns of a CSV that stay text even where all their values look like numbers."""

_NULLS = ["", "NA", "N/A", "n/a", "#N/A", "null", "NULL", "None", "none"]
"""Spellings of nothing in a CSV; nan is a number that came out wrong, not nothing."""


def read_table(path: str | Path) -> pa.Table:
    """Reads a CSV (perhaps compressed) or Parquet file.

    Raises:
        InputError: It is missing or damaged, or has a column twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a CSV or Parquet file")
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, partitioning=None)
            table.validate(full=True)  # text may still be no UTF-8
        else:
            options = pacsv.ConvertOptions(column_types=_TEXT, null_values=_NULLS, strings_can_be_null=True)
            table = pacsv.read_csv(path, convert_options=options)
        names = table.column_names  # perhaps no UTF-8 either
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{path}: not a readable CSV or Parquet file ({reason}); repair or export it again") from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{path}: has {len(twice)} columns twice ({', '.join(twice[:5])}); rename them")
    return table


def plain_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table as plain values, as ``plain_columns``."""
    columns = plain_columns(table)
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def plain_columns(table: pa.Table) -> dict[str, list[Any]]:
    """The columns of a table as plain values: dates as text (2024-12-31), decimals as floats, lists as JSON text."""
    return {name: _plain_column(table[name].combine_chunks()) for name in table.column_names}


def value_columns(prefix: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """One column ``<prefix>.<key>`` for each key that any row has; null where a row lacks it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {clean_text(f"{prefix}.{key}"): value_column([row.get(key) for row in rows]) for key in keys}


def value_column(values: Sequence[Any]) -> pa.Array:
    """Booleans, integers or floats where all values are such (integers among floats become floats), else strings."""
    kinds = set(map(type, values)) - {type(None)}
    if any(issubclass(kind, np.generic) for kind in kinds):
        return value_column([value.item() if isinstance(value, np.generic) else value for value in values])
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds and kinds <= {int, float} and all(-(2**63) <= value < 2**63 for value in values if type(value) is int):
        if kinds == {int}:
            return pa.array(values, pa.int64())
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return text_column([None if value is None else str(value) for value in values])


def text_column(values: Sequence[str | None]) -> pa.Array:
    """A column of text; see ``clean_text``."""
    return pa.array([None if value is None else clean_text(value) for value in values], pa.string())


def clean_text(text: str) -> str:
    """The text with escapes for bytes of a file name that are no UTF-8, which no column of text can hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain_value(value: Any) -> Value:
    """One value as a number of 64 bits, boolean, text that is UTF-8, or None.

    Dates become text (2024-12-31), decimals and larger integers floats, lists JSON text, and what is none of these its
    name in Python.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return _as_float(value)
    if isinstance(value, str):
        return clean_text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, list | dict):
        return clean_text(json.dumps(value, sort_keys=True, default=str))
    return clean_text(str(value))


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _plain_column(column: pa.Array) -> list[Any]:
    """Numbers by way of numpy, and equal texts as one object: ten times as fast as one value after the other."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        numbers: list[Any] = column.fill_null(False if pa.types.is_boolean(kind) else 0).to_numpy(False).tolist()
        for position in np.flatnonzero(column.is_null().to_numpy(False)).tolist():
            numbers[position] = None
        return numbers
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        column = column.cast(pa.timestamp("us", kind.tz), safe=False)  # finer than Python's own dates
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        encoded = column.dictionary_encode()
        texts = [*encoded.dictionary.to_pylist(), None]
        return [texts[index] for index in encoded.indices.fill_null(-1).to_numpy(False).tolist()]
    return [plain_value(value) for value in column.to_pylist()]
