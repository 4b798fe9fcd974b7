"""What is predicted: a property of every checkpoint as numbers or as categories, found by its name.

Never fits anything. A target that cannot be used says why and stops nothing else.

Shape suffix: R checkpoints.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

MOST_CATEGORIES = 50
"""A text property with more values is a name, not a category."""

_PREFIXES = ("", "property.", "config.")


@dataclass(frozen=True, eq=False)
class Target:
    """A property of every checkpoint.

    Attributes:
        name: As the user calls it.
        column: Where it was found, or how it was computed.
        kind: Whether its values are numbers or categories.
        values_R: float64 with NaN where it is unknown, or texts with None.
        note: What of it cannot be used; or why nothing can.
        usable: Whether anything can.
    """

    name: str
    column: str
    kind: Literal["number", "category"]
    values_R: NDArray[Any]
    note: str = ""
    usable: bool = True

    @property
    def known_R(self) -> NDArray[np.bool_]:
        """Which checkpoints have a value."""
        if self.kind == "number":
            return np.isfinite(self.values_R)
        return np.array([value is not None for value in self.values_R], bool)


def find_target(name: str, table: pa.Table) -> Target:
    """The target of that name.

    Args:
        name: A column as it is called (``property.test_acc``), without its prefix (``test_acc``), or the last part of a
            column of the training configuration (``nlin`` for ``config.model::nlin``); ``epoch``; ``ggap``, which is
            train_acc - test_acc where no column of that name is there.
        table: One row a checkpoint.
    """
    column = _find_column(name, table)
    if column is not None:
        return _of_column(name, column, table[column])
    parts = [_find_column(part, table) for part in ("train_acc", "test_acc")] if name == "ggap" else [None]
    if all(part is not None for part in parts):
        train, test = (_of_column(name, str(part), table[part]) for part in parts)
        if train.kind == test.kind == "number":
            return _number(name, f"{train.column} - {test.column}", train.values_R - test.values_R)
    return _unusable(name, len(table), f"no checkpoint has {name!r}: {_alternatives(name, table)}")


def _find_column(name: str, table: pa.Table) -> str | None:
    for prefix in _PREFIXES:
        if prefix + name in table.column_names:
            return prefix + name
    ends = [column for column in table.column_names if column.startswith("config.") and _short(column) == name]
    return ends[0] if len(ends) == 1 else None


def _short(column: str) -> str:
    return column.rpartition("::")[2].rpartition(".")[2]


def _of_column(name: str, column: str, values: pa.ChunkedArray) -> Target:
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        return _number(name, column, np.asarray(pc.cast(values, pa.float64()).to_numpy(), float))
    if pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _category(name, column, [None if value is None else str(value) for value in values.to_pylist()])
    return _unusable(name, len(values), f"{column} holds {kind}, which is neither a number nor a category", column)


def _number(name: str, column: str, values_R: NDArray[np.float64]) -> Target:
    values_R = np.where(np.isfinite(values_R), values_R, np.nan)
    known = values_R[np.isfinite(values_R)]
    if len(known) == 0:
        return _unusable(name, len(values_R), f"{column} is empty for every checkpoint", column)
    if np.ptp(known) == 0:
        return _unusable(
            name, len(values_R), f"{column} is {known[0]:g} for every checkpoint: nothing to predict", column
        )
    return Target(name, column, "number", values_R, _missing(column, len(values_R) - len(known), len(values_R)))


def _category(name: str, column: str, values: list[str | None]) -> Target:
    known = [value for value in values if value is not None]
    classes = sorted(set(known))
    if len(classes) < 2:
        what = (
            f"is {classes[0]!r} for every checkpoint: nothing to predict"
            if classes
            else "is empty for every checkpoint"
        )
        return _unusable(name, len(values), f"{column} {what}", column)
    if len(classes) > MOST_CATEGORIES:
        reason = (
            f"{column} is text with {len(classes)} values: more than the {MOST_CATEGORIES} that a category may have"
        )
        return _unusable(name, len(values), reason, column)
    texts = np.array(values, dtype=object)
    return Target(name, column, "category", texts, _missing(column, len(values) - len(known), len(values)))


def _missing(column: str, missing: int, rows: int) -> str:
    return f"{column} is unknown for {missing} of {rows} checkpoints, which are left out" if missing else ""


def _unusable(name: str, rows: int, reason: str, column: str = "") -> Target:
    return Target(name, column, "number", np.full(rows, np.nan), reason, usable=False)


def _alternatives(name: str, table: pa.Table) -> str:
    """The nearest names that exist, else all."""
    names = {_short(column) for column in table.column_names if column.startswith(("property.", "config."))}
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(names)) or 'no properties'}"
