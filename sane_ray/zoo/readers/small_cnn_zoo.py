"""The Small CNN Zoo (Unterthiner et al., arXiv 2002.11448): one array of weights and one table of results for a zoo.

``<folder>/{weights.npy, metrics.csv.gz, layout.csv}``: a row of ``weights.npy`` is a checkpoint, ``layout.csv`` says
which columns are which TensorFlow variable, and ``metrics.csv.gz`` has a line for each row. Several such folders may
lie below one root. Weights are given torch's names and axes. A ``*_split.csv`` (one row number a line, as published
with NFN) in the folder, or named after it beside it, brings the benchmark's split. Never unpickles, and never loads
the whole array.
"""

from __future__ import annotations

import ast
import csv
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pyarrow import csv as pa_csv
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.zoo.checkpoint import Checkpoint, LoadedCheckpoint
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.readers.folders import walk
from sane_ray.zoo.tables import plain_value

NAME = "small_cnn_zoo"
LOOKS_FOR = "folders with weights.npy and layout.csv (Small CNN Zoo)"

BENCHMARK_STEP = 86
"""The published benchmark compares checkpoints of the last step alone."""

_LOG = logging.getLogger(__name__)
_WEIGHTS, _METRICS, _LAYOUT = "weights.npy", "metrics.csv.gz", "layout.csv"
_SPLIT = "_split.csv"
_CONFIG = "config."
_ALIASES = {
    "test_acc": "test_accuracy",
    "test_loss": "test_loss",
    "train_acc": "train_accuracy",
    "train_loss": "train_loss",
}
_LONGEST_SHAPE = 100  # characters
_REMEDY = "download the data set again"

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Variable:
    """Where one tensor lies in a row of ``weights.npy``.

    Attributes:
        key: Its name in the state dict, ``layers.<index>.weight`` or ``layers.<index>.bias``.
        start: First column.
        stop: One past its last column.
        shape: Its shape in the file, TensorFlow's.
        axes: Order of the file's axes in torch's: output, input, then space.
    """

    key: str
    start: int
    stop: int
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def read(self, row: NDArray[Any]) -> Tensor:
        """The tensor of one row, in torch's axes."""
        values = row[self.start : self.stop].reshape(self.shape).transpose(self.axes)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")))


def discover(root: Path) -> list[Record]:
    """Lists the rows of every such folder at or below ``root``, folders in order of name and rows in the file's order.

    Rows with the same settings share one ``config``. A folder whose files do not fit each other, or cannot be read
    without running code, is logged and passed over.

    Raises:
        InputError: None of the folders can be used: says what is wrong with the first.
    """
    if not root.is_dir():
        return []
    found = []
    for folder, names, files in walk(root):
        if {_WEIGHTS, _LAYOUT} <= set(files):
            found.append(folder)
        names[:] = [name for name in names if not name.startswith("checkpoint_")]  # other zoos have 100,000 of these
    records: list[Record] = []
    refused: list[InputError] = []
    for folder in found:
        try:
            records += _records(root, folder)
        except InputError as error:
            refused.append(error)
    if refused and not records:
        raise refused[0]
    for reason in refused:
        _LOG.warning("%s; its folder is passed over", reason)
    return records


def open_checkpoint(record: Record) -> Checkpoint:
    """Reads one row, and no other.

    Raises:
        InputError: The array or its layout is damaged, or there is no such row.
    """
    path = Path(record.path)
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    weights, layout = _opened(path, stamp)
    row = int(record.member)
    if row >= len(weights):
        raise InputError(f"{path}: has no row {row}, only {len(weights)}; list the zoo again")
    values = np.array(weights[row])
    return LoadedCheckpoint(f"{path} row {row}", {variable.key: variable.read(values) for variable in layout})


@lru_cache(maxsize=8)
def _opened(path: Path, stamp: int) -> tuple[NDArray[Any], list[Variable]]:
    """The mapped array and its layout, once a process; ``stamp`` sees that a file written anew is opened anew."""
    weights = _map(path)
    return weights, read_layout(path.parent / _LAYOUT, weights.shape[1])


def _map(path: Path) -> NDArray[Any]:
    try:
        weights = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header fails in whatever way its text happens to lead to
        reason = str(error)[:200]
        raise InputError(
            f"{path}: truncated, missing, or no array that can be read without running code ({reason}); {_REMEDY}"
        ) from error
    if not isinstance(weights, np.ndarray) or weights.ndim != 2 or weights.dtype not in (np.float32, np.float64):
        what = f"{weights.dtype} {weights.shape}" if isinstance(weights, np.ndarray) else "an archive"
        raise InputError(f"{path}: holds {what}, not float32 or float64 [checkpoints, values]; {_REMEDY}")
    return weights


def read_layout(path: Path, width: int) -> list[Variable]:
    """The tensors of a row, in the order of a state dict: layer by layer, weight before bias.

    Args:
        path: ``layout.csv`` with the columns varname, start_idx, end_idx and shape.
        width: Values of a row; the variables must cover them, each once.

    Raises:
        InputError: A column is missing, a line is no variable, or the variables do not cover the row.
    """
    entries = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                entries.append(
                    (str(line["varname"]), int(line["start_idx"]), int(line["end_idx"]), _shape(line["shape"]))
                )
    except (OSError, KeyError, TypeError, ValueError, SyntaxError, OverflowError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InputError(
            f"{path}: not a table of varname, start_idx, end_idx and shape ({reason}); {_REMEDY}"
        ) from error
    _check_cover(path, entries, width)
    modules = list(dict.fromkeys(name.rpartition("/")[0] for name, *_ in entries))
    variables = [_variable(path, modules, *entry) for entry in entries]
    if len({variable.key for variable in variables}) < len(variables):
        raise InputError(f"{path}: names a variable twice; {_REMEDY}")
    return sorted(variables, key=lambda variable: (int(variable.key.split(".")[1]), variable.key.endswith("bias")))


def _shape(text: str) -> tuple[int, ...]:
    if len(text) > _LONGEST_SHAPE:  # a parser of Python may run out of memory on what is nested deep
        raise ValueError(f"a shape of {len(text)} characters")
    shape = ast.literal_eval(text)
    sizes = tuple(int(size) for size in (shape if isinstance(shape, tuple | list) else (shape,)))
    if min(sizes, default=1) < 1:
        raise ValueError(f"shape {sizes}")
    return sizes


def _check_cover(path: Path, entries: list[tuple[str, int, int, tuple[int, ...]]], width: int) -> None:
    end = 0
    for name, start, stop, shape in sorted(entries, key=lambda entry: entry[1]):
        if start != end:
            what = "overlap" if start < end else "leave a gap"
            raise InputError(
                f"{path}: the columns of {name} ({start} to {stop}) {what} at column {min(start, end)}; {_REMEDY}"
            )
        if stop - start != math.prod(shape) or stop <= start:
            raise InputError(f"{path}: {name} has {stop - start} columns but shape {shape}; {_REMEDY}")
        end = stop
    if end != width:
        raise InputError(
            f"{path.parent / _WEIGHTS}: has {width} values a row, but {path.name} describes {end}; "
            f"they are not of one data set: {_REMEDY}"
        )


def _variable(path: Path, modules: list[str], name: str, start: int, stop: int, shape: tuple[int, ...]) -> Variable:
    module, _, kind = name.rpartition("/")
    index = modules.index(module)
    if kind == "kernel:0" and len(shape) >= 2:
        last = len(shape) - 1
        return Variable(f"layers.{index}.weight", start, stop, shape, (last, last - 1, *range(last - 1)))
    if kind == "bias:0" and len(shape) == 1:
        return Variable(f"layers.{index}.bias", start, stop, shape, (0,))
    raise InputError(
        f"{path}: {name} of shape {shape} is neither a kernel:0 nor a bias:0; remove this zoo from the source"
    )


def _records(root: Path, folder: Path) -> Iterator[Record]:
    weights = _map(folder / _WEIGHTS)
    read_layout(folder / _LAYOUT, weights.shape[1])
    metrics = _metrics(folder / _METRICS, len(weights))
    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    path = str((folder / _WEIGHTS).absolute())
    beside = (str((folder / _LAYOUT).absolute()),)
    steps = metrics["step"].to_pylist()
    splits = _splits(folder, metrics, np.asarray(steps))
    configs, config_of_row = _configs(metrics)
    rows = zip(_models(metrics, steps), steps, _properties(metrics), config_of_row.tolist(), strict=True)
    for row, (name, step, properties, config) in enumerate(rows):
        model = prefix + name
        yield Record(
            id=f"{model}/{step}",
            model=model,
            epoch=step,
            path=path,
            properties=properties,
            config=configs[config],
            reader=NAME,
            member=str(row),
            beside=beside,
            split=splits.get(row),
        )


def _metrics(path: Path, rows: int) -> pa.Table:
    try:
        table = pa_csv.read_csv(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: truncated, missing, or no gzipped CSV table ({error}); {_REMEDY}") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise InputError(f"{path}: has a column twice; {_REMEDY}")
    if len(table) != rows:
        raise InputError(
            f"{path}: has {len(table)} lines, but {_WEIGHTS} beside it has {rows} rows; "
            f"they are not of one data set: {_REMEDY}"
        )
    if "step" not in table.column_names or not pa.types.is_integer(table["step"].type) or table["step"].null_count:
        raise InputError(f"{path}: has no column step of whole numbers; {_REMEDY}")
    return table


def _models(metrics: pa.Table, steps: list[int]) -> list[str]:
    """Each row's model: the shortest end of its ``modeldir`` that tells all of them apart, or a running number."""
    if "modeldir" not in metrics.column_names:
        starts = np.diff(np.array(steps), prepend=steps[0] + 1 if steps else 0) <= 0  # a run's steps grow
        return [f"run_{number:06d}" for number in (np.cumsum(starts) - 1).tolist()]
    encoded = metrics["modeldir"].combine_chunks().dictionary_encode(null_encoding="encode")
    values = ("unnamed" if value is None else str(plain_value(value)) for value in encoded.dictionary.to_pylist())
    parts = [value.strip("/").split("/") for value in values]
    depth = 1
    while len({tuple(path[-depth:]) for path in parts}) < len({tuple(path) for path in parts}):
        depth += 1
    names = ["/".join(path[-depth:]) for path in parts]
    return [names[code] for code in encoded.indices.to_pylist()]


def _configs(metrics: pa.Table) -> tuple[list[dict[str, Value]], Rows]:
    """The distinct settings, and which of them each row has."""
    columns = [name for name in metrics.column_names if name.startswith(_CONFIG)]
    if not columns:
        return [{}], np.zeros(len(metrics), np.int64)
    codes = np.zeros(len(metrics), np.int64)
    for name in columns:  # pairs of (settings so far, value here), numbered anew at each column
        encoded = metrics[name].combine_chunks().dictionary_encode(null_encoding="encode")
        pairs = codes * len(encoded.dictionary) + encoded.indices.to_numpy()
        codes = np.unique(pairs, return_inverse=True)[1]
    first = np.unique(codes, return_index=True)[1]
    table = metrics.select(columns).rename_columns([name.removeprefix(_CONFIG) for name in columns])
    return table.take(pa.array(first)).to_pylist(), codes


def _properties(metrics: pa.Table) -> Iterator[dict[str, Value]]:
    """What was measured, under the names of the file and under those that other zoos use."""
    names = [name for name in metrics.column_names if name not in ("", "modeldir", "step")]
    columns = {name: metrics[name] for name in names if not name.startswith(_CONFIG)}
    columns |= {alias: columns[name] for alias, name in _ALIASES.items() if name in columns}
    accuracies = [columns[name] for name in ("train_acc", "test_acc") if name in columns]
    if len(accuracies) == 2 and all(map(_is_number, accuracies)):
        columns["ggap"] = pc.subtract(*accuracies)
    if not columns:
        return ({} for _ in range(len(metrics)))
    lists = [column.to_pylist() for column in columns.values()]
    return (dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True))


def _is_number(column: pa.ChunkedArray) -> bool:
    return pa.types.is_integer(column.type) or pa.types.is_floating(column.type)


def _splits(folder: Path, metrics: pa.Table, steps: Rows) -> dict[int, str]:
    """Split by row of the published benchmark (NFN, arXiv 2302.14040); rows of other steps have none."""
    path = _split_file(folder, metrics)
    if path is None:
        return {}
    try:
        order = np.array(path.read_text(encoding="utf-8").split(), dtype=np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not one row number a line ({error}); download it again, or remove it") from error
    if not np.array_equal(np.sort(order), np.arange(len(steps))):
        raise InputError(
            f"{path}: does not name each of the {len(steps)} rows of {folder / _WEIGHTS} once; "
            "use the split file of this data set, or remove it"
        )
    final = order[steps[order] == BENCHMARK_STEP].tolist()
    half = int(0.5 * len(final))
    places = list(range(half))
    random.Random(0).shuffle(places)
    cut = int(0.8 * half)
    splits = dict.fromkeys(final[half:], "test")
    splits |= dict.fromkeys((final[place] for place in places[:cut]), "train")
    return splits | dict.fromkeys((final[place] for place in places[cut:]), "val")


def _split_file(folder: Path, metrics: pa.Table) -> Path | None:
    """The split file in the folder, or the one beside it that is named after it or its data set."""
    inside = sorted(folder.glob(f"*{_SPLIT}"))
    if len(inside) > 1:
        raise InputError(
            f"{folder}: holds {len(inside)} split files ({', '.join(path.name for path in inside)}); keep the right one"
        )
    names = {folder.name}
    if f"{_CONFIG}dataset" in metrics.column_names:
        names |= {str(name) for name in pc.unique(metrics[f"{_CONFIG}dataset"]).to_pylist()}
    beside = [
        path
        for path in sorted(folder.parent.glob(f"*{_SPLIT}"))
        if any(name == (of := path.name.removesuffix(_SPLIT)) or name.startswith(f"{of}_") for name in names)
    ]
    return next(iter([*inside, *beside]), None)
