"""Which checkpoints to take: conditions such as ``test_acc > 0.7 and epoch >= 21``, over all records at once.

A condition is parsed as a Python expression and walked over a short list of what is allowed; never evaluated as Python.

    names        ``test_acc``: a property, else a setting of the training, else id, model, epoch, license, split,
                 reader, path or member of the record. ``property.x`` and ``config.x`` choose one of the two, and
                 ``config["model::nlin"]`` takes names of any spelling
    values       numbers, "text", True, False, None, and sums, differences, products and quotients
    comparisons  < <= > >= == != (also ``0.1 < x < 0.2``), ``in (1, 2)``, ``not in``, ``is None``, ``is not None``
    conditions   ``and``, ``or``, ``not``, parentheses; a property that is True or False is one by itself
    functions    ``quantile(x, 0.7)`` and ``median(x)`` over all records that have a number there;
                 ``missing(x)``, ``isnan(x)``, ``matches(x, "*glob*")``

A comparison with a value that is missing, NaN or of another kind ("n/a" among numbers) is neither true nor false, and
nor is its negation (as in SQL): the checkpoint is left out unless another part of the condition decides.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.errors import InputError
from sane_ray.zoo.readers import Record, Value

FIELDS = ("id", "model", "epoch", "license", "split", "reader", "path", "member")
"""What every record has."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
}
_DEEPEST = 100
"""Levels of an expression, far below what Python's own stack holds."""

_LONGEST = 40  # characters of a value in a reason
_ALLOWED = "names, numbers, text, comparisons, in, and, or, not, + - * /, quantile, median, missing, isnan and matches"


def select(
    records: Sequence[Record], where: str, field: str = "tokens.where"
) -> tuple[list[Record], list[tuple[Record, str]]]:
    """Divides records into those that meet a condition and those that do not.

    Args:
        records: A zoo's checkpoints; quantiles are over all of them.
        where: The condition, as this module's first lines say; empty takes all.
        field: The config field that it is the value of, for what is said of it.

    Returns:
        The records that meet it, and the others, each with the reason; both in the given order.

    Raises:
        InputError: The condition is no such expression, names what no record has, or compares text with numbers alone.
    """
    text = where.replace("\n", " ").strip()
    if not text or not records:
        return list(records), []
    try:
        reasons = _Condition(records, text).reasons(_parse(text))
    except InputError as error:
        raise InputError(f"config field {field} is {text!r}: {error}") from error
    kept = [record for record, reason in zip(records, reasons, strict=True) if reason is None]
    return kept, [(record, reason) for record, reason in zip(records, reasons, strict=True) if reason is not None]


def _parse(text: str) -> ast.expr:
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        problem = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(f"no condition ({problem}); use {_ALLOWED}") from error
    if _depth(tree) > _DEEPEST:
        raise InputError("nested too deeply; use fewer parentheses")
    return tree


def _depth(tree: ast.expr) -> int:
    depth = 0
    level: list[ast.AST] = [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def values_of(records: Sequence[Record], name: str) -> list[Value]:
    """The value that a name stands for, of each record; None where it is missing.

    Args:
        records: A zoo's checkpoints.
        name: ``test_acc``, ``property.test_acc``, ``config.seed`` or a field such as ``license``, as in a condition.

    Raises:
        InputError: No record has it; says which names are like it.
    """
    kind, _, key = name.partition(".")
    if any(name in record.properties for record in records):
        return [record.properties.get(name) for record in records]
    if any(name in record.config for record in records):
        return [record.config.get(name) for record in records]
    if kind == "property" and any(key in record.properties for record in records):
        return [record.properties.get(key) for record in records]
    if kind == "config" and any(key in record.config for record in records):
        return [record.config.get(key) for record in records]
    if name in FIELDS:
        return [getattr(record, name) for record in records]
    raise InputError(
        f"no checkpoint has {name}; {_suggestion(records, key if kind in ('property', 'config') else name)}"
    )


def _suggestion(records: Sequence[Record], name: str) -> str:
    """What could have been meant, spelled as in a condition."""
    spelled = dict(zip(FIELDS, FIELDS, strict=True))
    for record in records:
        spelled |= {key: key if key.isidentifier() else f'config["{key}"]' for key in record.config}
    for record in records:
        spelled |= {key: key if key.isidentifier() else f'property["{key}"]' for key in record.properties}
    parts = [key for key in spelled if name in re.split(r"\W+", key)]  # lr of optim::lr, test of test-acc
    close = dict.fromkeys([*parts, *difflib.get_close_matches(name, spelled, n=3, cutoff=0.5)])
    if close:
        return f"did you mean {' or '.join(spelled[key] for key in list(close)[:3])}?"
    return f"they have {', '.join(list(spelled.values())[-20:])}"


@dataclass(frozen=True)
class _Truth:
    """Of each record (or once for all): whether a condition holds, and whether that cannot be said."""

    true: NDArray[np.bool_]
    unknown: NDArray[np.bool_]

    @property
    def false(self) -> NDArray[np.bool_]:
        return ~(self.true | self.unknown)


@dataclass(frozen=True)
class _Column:
    """One value of each record, or one for all of them."""

    text: str
    """As in the condition."""
    kind: str
    """``number``, ``boolean``, ``text``, ``nothing`` (missing everywhere), or ``mixed``."""
    values: NDArray[Any]
    """int64, float64 or Python objects; anything where missing."""
    missing: NDArray[np.bool_]
    nan: NDArray[np.bool_]

    @classmethod
    def of(cls, text: str, values: Sequence[Value]) -> _Column:
        """The narrowest kind that holds all values."""
        kinds = set(map(type, values))
        missing = np.array([value is None for value in values]) if type(None) in kinds else np.zeros(len(values), bool)
        kinds.discard(type(None))
        if not kinds:
            return cls.numbers(text, np.zeros(len(values)), missing, kind="nothing")
        if kinds <= {int, bool, float}:
            filler = float("nan") if float in kinds else 0
            try:
                numbers = np.array([filler if value is None else value for value in values])
            except OverflowError:  # floats beside an integer that none can hold
                numbers = np.array([], object)
            if numbers.dtype.kind in "bif":
                kind = "boolean" if kinds == {bool} else "number"
                return cls.numbers(text, numbers, missing, kind)
        objects = np.empty(len(values), object)
        objects[:] = ["" if value is None else value for value in values]
        nan = np.zeros(len(values), bool)
        if float in kinds:
            nan = np.array([isinstance(value, float) and math.isnan(value) for value in values])
        return cls(text, "text" if kinds == {str} else "mixed", objects, missing, nan)

    @classmethod
    def numbers(cls, text: str, values: NDArray[Any], missing: NDArray[np.bool_], kind: str = "number") -> _Column:
        return cls(text, kind, values, missing, np.isnan(values) & ~missing)

    @property
    def unknown(self) -> NDArray[np.bool_]:
        return self.missing | self.nan

    @property
    def numeric(self) -> bool:
        return self.kind in ("number", "boolean", "nothing")

    @property
    def is_text(self) -> NDArray[np.bool_]:
        """Where the value is text; anything where missing."""
        if self.kind != "mixed":
            return np.full(len(self.values), self.kind == "text")
        return np.array([isinstance(value, str) for value in self.values])


class _Condition:
    """One condition over one list of records."""

    def __init__(self, records: Sequence[Record], text: str) -> None:
        self._records = records
        self._source = text
        self._columns: dict[str, _Column] = {}
        self._others: list[tuple[_Column, NDArray[np.bool_], str]] = []
        """Of the part at hand: columns, where their values are of another kind than is compared, and that kind."""

    def reasons(self, tree: ast.expr) -> list[str | None]:
        """Why each record does not meet the condition: the first part that it fails, or the value that is missing."""
        parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        reasons = np.full(len(self._records), None, object)
        met = np.ones(len(self._records), bool)
        for part in parts:
            self._others.clear()
            truth = self._truth(part)
            because = [(truth.false, f"does not meet {self._text(part)}")]
            for column in self._columns_in(part):
                because.append((truth.unknown & column.missing, f"{column.text} is missing"))
                because.append((truth.unknown & column.nan, f"{column.text} is NaN"))
            for column, others, kind in self._others:
                for position in np.flatnonzero(met & truth.unknown & others & ~column.unknown).tolist():
                    reasons[position] = f"{column.text} is {_short(column.values[position])}, no {kind}"
                    met[position] = False
            because.append((truth.unknown, f"{self._text(part)} cannot be computed"))
            for failed, reason in because:
                reasons[met & failed] = reason
                met &= ~failed
        return reasons.tolist()

    def _columns_in(self, node: ast.expr) -> list[_Column]:
        """Those that an expression names, in its order."""
        nodes = [part for part in ast.walk(node) if isinstance(part, ast.expr)]
        nodes.sort(key=lambda part: (part.lineno, part.col_offset, -(part.end_col_offset or 0)))
        names = dict.fromkeys(_name(part) for part in nodes)
        return [self._columns[name] for name in names if name in self._columns]

    def _text(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._source, node) or ast.unparse(node)

    # Conditions

    def _truth(self, node: ast.expr) -> _Truth:
        match node:
            case ast.BoolOp(op=ast.And()):
                return reduce(_both, map(self._truth, node.values))
            case ast.BoolOp():
                return _not(reduce(_both, [_not(self._truth(value)) for value in node.values]))
            case ast.UnaryOp(op=ast.Not()):
                return _not(self._truth(node.operand))
            case ast.Compare():
                sides = [node.left, *node.comparators]
                pairs = zip(sides, node.ops, sides[1:], strict=False)
                return reduce(_both, [self._compare(*pair, node) for pair in pairs])
            case ast.Call(func=ast.Name(id="missing" | "isnan" | "matches" as function)):
                return self._test(function, node)
        column = self._only(self._value(node), bool, "yes or no")
        if column.kind not in ("boolean", "nothing"):
            raise InputError(f"{column.text} is neither true nor false; compare it with something")
        return _truth(column.values != 0, column.unknown)

    def _test(self, function: str, node: ast.Call) -> _Truth:
        column, *rest = self._arguments(node, 2 if function == "matches" else 1)
        if function != "matches":
            return _known(column.missing if function == "missing" else column.nan)
        column = self._only(column, str, "text")
        if column.kind not in ("text", "nothing"):
            raise InputError(f"{self._text(node)} needs text, and {column.text} is {self._example(column)}")
        if not (isinstance(rest[0].values[0], str) and len(rest[0].values) == 1):
            raise InputError(f"{self._text(node)} needs a pattern, as in matches({column.text}, '*cnn*')")
        pattern = re.compile(fnmatch.translate(rest[0].values[0]))
        return _truth(np.array([pattern.match(str(value)) is not None for value in column.values]), column.unknown)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr, node: ast.expr) -> _Truth:
        if _is_none(left) or _is_none(right):
            return self._compare_with_nothing(right if _is_none(left) else left, op, node)
        column = self._value(left)
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set) or not right.elts:
                raise InputError(f"{self._text(right)} is no list of values, as in {column.text} in (1, 2)")
            equal = [_not(self._apply(ast.Eq, column, self._value(choice), node)) for choice in right.elts]
            among = _not(reduce(_both, equal))
            return among if isinstance(op, ast.In) else _not(among)
        if type(op) not in _COMPARISONS:
            raise InputError(f"{self._text(node)} is not allowed; compare values with ==, !=, <, <=, > or >=")
        return self._apply(type(op), column, self._value(right), node)

    def _compare_with_nothing(self, other: ast.expr, op: ast.cmpop, node: ast.expr) -> _Truth:
        missing = _known(self._value(other).missing)
        if isinstance(op, ast.Is | ast.Eq):
            return missing
        if isinstance(op, ast.IsNot | ast.NotEq):
            return _not(missing)
        raise InputError(f"{self._text(node)} is not allowed; ask missing({self._text(other)})")

    def _apply(self, op: type[ast.cmpop], left: _Column, right: _Column, node: ast.expr) -> _Truth:
        unknown = left.unknown | right.unknown
        if (left.numeric and right.numeric) or left.kind == right.kind == "text":
            return _truth(np.asarray(_COMPARISONS[op](left.values, right.values), bool), unknown)
        unknown = unknown | self._of_two_kinds(left, right, unknown, node)
        true, positions = np.zeros(len(unknown), bool), np.flatnonzero(~unknown)
        if len(positions):
            chosen = [side.values if len(side.values) == 1 else side.values[positions] for side in (left, right)]
            true[positions] = _COMPARISONS[op](*chosen).astype(bool)
        return _truth(true, unknown)

    def _of_two_kinds(
        self, left: _Column, right: _Column, unknown: NDArray[np.bool_], node: ast.expr
    ) -> NDArray[np.bool_]:
        """Where text would be compared with a number; refuses what does so wherever there is a value."""
        differ = (left.is_text != right.is_text) & ~unknown
        if differ.any() and (differ | unknown).all():
            position = int(np.argmax(differ))
            column = left if len(left.values) > 1 or len(right.values) == 1 else right
            kinds = ["text" if np.resize(side.is_text, len(differ))[position] else "a number" for side in (left, right)]
            raise InputError(
                f"{self._text(node)} compares {kinds[0]} with {kinds[1]}: "
                f"{column.text} is {self._example(column, position)}"
            )
        mixed = [(side, other) for side, other in ((left, right), (right, left)) if side.kind == "mixed"]
        self._others += [(side, differ & ~other.is_text, "number") for side, other in mixed]
        self._others += [(side, differ & other.is_text, "text") for side, other in mixed]
        return differ

    def _only(self, column: _Column, kind: type, name: str) -> _Column:
        """A column of several kinds with the values of one alone, the others missing; itself if it has none of it."""
        if column.kind != "mixed":
            return column
        kinds = (bool, int, float) if kind is float else kind
        others = np.array([not isinstance(value, kinds) for value in column.values]) & ~column.missing
        if (others | column.missing).all():
            return column
        self._others.append((column, others, name))
        left_out = others | column.missing
        return _Column.of(
            column.text, [None if out else value for out, value in zip(left_out, column.values, strict=True)]
        )

    def _example(self, column: _Column, position: int | None = None) -> str:
        """A value of a column and where it is found, in words."""
        if position is None:
            position = int(np.argmin(column.missing))
        if len(column.values) == 1 and len(self._records) > 1:
            return repr(column.values.tolist()[0])
        return f"{column.values.tolist()[position]!r} in {self._records[position].id}"

    # Values

    def _value(self, node: ast.expr) -> _Column:
        name = _name(node)
        if name is not None:
            if name not in self._columns:
                self._columns[name] = _Column.of(self._text(node), values_of(self._records, name))
            return self._columns[name]
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return _Column.of(self._text(node), [value])
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                zero = _Column.of("0", [0])
                return self._arithmetic(ast.Add if isinstance(node.op, ast.UAdd) else ast.Sub, zero, node.operand, node)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return self._arithmetic(type(node.op), self._value(node.left), node.right, node)
            case ast.Call(func=ast.Name(id="quantile" | "median" as function)):
                return self._quantile(function, node)
        raise InputError(f"{self._text(node)} is not allowed; use {_ALLOWED}")

    def _arithmetic(self, op: type[ast.operator], left: _Column, other: ast.expr, node: ast.expr) -> _Column:
        left, right = (self._only(side, float, "number") for side in (left, self._value(other)))
        for column in (left, right):
            if not column.numeric:
                raise InputError(f"{self._text(node)} needs numbers, and {column.text} is {self._example(column)}")
        whole = op is not ast.Div and left.values.dtype.kind != "f" and right.values.dtype.kind != "f"
        small = whole and all(np.abs(side.values.astype(float)).max(initial=0) < 2**31 for side in (left, right))
        kind = np.int64 if small else np.float64  # whole numbers stay so, where they cannot overflow
        with np.errstate(all="ignore"):
            values = _ARITHMETIC[op](left.values.astype(kind), right.values.astype(kind))
        if op is ast.Div:
            values = np.where(right.values == 0, np.nan, values)
        return _Column.numbers(self._text(node), values, left.missing | right.missing)

    def _quantile(self, function: str, node: ast.Call) -> _Column:
        column, *rest = self._arguments(node, 2 if function == "quantile" else 1)
        column = self._only(column, float, "number")
        fraction = rest[0].values[0] if rest else 0.5
        if rest and (not rest[0].numeric or len(rest[0].values) > 1 or not 0 <= fraction <= 1):
            raise InputError(f"{self._text(node)} needs a number from 0 to 1, as in quantile({column.text}, 0.7)")
        if not column.numeric:
            raise InputError(f"{self._text(node)} needs numbers, and {column.text} is {self._example(column)}")
        numbers = column.values[~column.unknown]
        if not len(numbers):
            raise InputError(f"{self._text(node)} cannot be computed: no checkpoint has a number there")
        return _Column.of(self._text(node), [float(np.quantile(numbers, fraction))])

    def _arguments(self, node: ast.Call, count: int) -> list[_Column]:
        if node.keywords or len(node.args) != count:
            raise InputError(f"{self._text(node)} needs {count} value{'s' if count > 1 else ''} in the parentheses")
        return [self._value(argument) for argument in node.args]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _name(node: ast.expr) -> str | None:
    """The name that an expression is, as for ``values_of``."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            base = _name(value)
            return None if base is None else f"{base}.{attribute}"
        case ast.Subscript(value=ast.Name(id="property" | "config" as kind), slice=ast.Constant(value=str() as key)):
            return f"{kind}.{key}"
    return None


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _truth(true: NDArray[np.bool_], unknown: NDArray[np.bool_]) -> _Truth:
    return _Truth(true & ~unknown, unknown)


def _known(true: NDArray[np.bool_]) -> _Truth:
    return _Truth(true, np.zeros_like(true))


def _not(truth: _Truth) -> _Truth:
    return _Truth(truth.false, truth.unknown)


def _both(one: _Truth, other: _Truth) -> _Truth:
    true, false = one.true & other.true, one.false | other.false
    return _Truth(true, ~(true | false))
