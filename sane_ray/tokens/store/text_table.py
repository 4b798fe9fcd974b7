"""Columns of text for a terminal, and a column of Parquet in a few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_SHOWN, _WIDEST = 6, 40


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first row its heading: columns as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [all(row[column].replace(",", "").isdigit() for row in rows[1:]) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def value_range(column: pa.Array | pa.ChunkedArray) -> str:
    """Smallest and largest number of a column, or its first values in order; NaN and null do not count."""
    values = column.drop_null()
    if pa.types.is_floating(values.type):
        values = values.filter(pc.invert(pc.is_nan(values)))
    if not len(values):
        return "none"
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        ends: Any = pc.min_max(values).as_py()
        low, high = f"{ends['min']:.6g}", f"{ends['max']:.6g}"
        return low if low == high else f"{low} to {high}"
    names = sorted(str(value) for value in pc.unique(values).to_pylist())
    shown = ", ".join(name if len(name) <= _WIDEST else f"{name[: _WIDEST - 1]}…" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, … ({len(names):,} values)"
