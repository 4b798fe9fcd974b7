"""What a zoo holds: one record a checkpoint, in an order that no file system can change, and one Parquet of them all.

Knows no format of weights itself (``zoo/readers`` does), and never opens the weights.

A catalog is plain Parquet, one row a checkpoint: ``id``, ``model``, ``epoch``, ``path``, ``reader``, ``member``,
``license``, ``parents``, ``split``, a column ``property.<name>`` or ``config.<name>`` for all that is known, ``status``
and ``reason``, and ``sha256``, which is of the tensors (not of the file) and binds a row to the weights that it
describes. Any program may edit it; as a source it stands for the zoo. Paths in or below the catalog's own folder are
relative to it, so that the two move together; others are absolute, so that the catalog may move while the zoo stays.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from sane_ray.errors import InputError
from sane_ray.nearby import is_zoo, near
from sane_ray.zoo import foreign
from sane_ray.zoo.checkpoint import Checkpoint
from sane_ray.zoo.readers import (
    Record,
    Value,
    cnn_wild_park,
    files,
    huggingface,
    sane_preprocessed,
    small_cnn_zoo,
    tune,
)
from sane_ray.zoo.readers.folders import is_folder, scan
from sane_ray.zoo.tables import (
    clean_text,
    plain_columns,
    plain_rows,
    plain_value,
    read_table,
    text_column,
    value_column,
    value_columns,
)

__all__ = [
    "SPLIT_NAMES",
    "Record",
    "catalog_source",
    "discover",
    "join_properties",
    "open_record",
    "passed_over",
    "read_catalog",
    "reader_names",
    "unclaimed",
    "value_columns",
    "write_catalog",
]


class _Reader(Protocol):
    NAME: str
    LOOKS_FOR: str

    def discover(self, root: Path) -> list[Record]: ...

    def open_checkpoint(self, record: Record) -> Checkpoint: ...


CATALOG = "catalog"
"""Name of a catalog file among the readers."""

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""How zoos spell the three splits."""

LEFT_OUT = "left out"
"""``status`` of a row that is no longer part of the zoo that a catalog stands for."""

_READERS: dict[str, _Reader] = {
    module.NAME: module for module in (sane_preprocessed, small_cnn_zoo, cnn_wild_park, tune, huggingface, files)
}
"""The first that finds something reads the source, so the most particular come first."""

_SOURCE, _WRITTEN = b"sane_ray.source", b"sane_ray.written_ns"
_EXAMPLES = 5
_MOST_NEAR = 3
_LAST_EPOCH = 2**62
"""Far beyond any training, and a number that every table and every float can hold."""

_WEIGHTS = re.compile(
    rf"({'|'.join(map(re.escape, (*files.SUFFIXES, *foreign.SUFFIXES)))}"
    r"|\.np[yz]|\.zip|\.tar(\.\w+)?|\.t[gx]z|\.tbz2)$|^checkpoints$",
    re.IGNORECASE,
)
"""Names of files that some reader may read, perhaps after they are unpacked; and of formats that none reads."""

_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_SHARD = re.compile(r"-\d{5}(-of-\d{5}\.)")
_REQUIRED = ("id", "model", "path", "reader")
_OPTIONAL = ("epoch", "member", "license", "split", "status", "sha256")
_LISTS = ("parents", "beside")
_LOOKS_FOR = f"a catalog (Parquet with columns {', '.join(_REQUIRED)})"
_REMEDY = "name the folder of a zoo or a checkpoint file, or build one with `python jobs/build_zoo.py`"
_LOG = logging.getLogger(__name__)


def reader_names() -> list[str]:
    """What ``--reader`` may be, beside ``auto``."""
    return [CATALOG, *_READERS]


def discover(source: str | Path, reader: str = "auto") -> list[Record]:
    """Lists the checkpoints of a zoo, models in order of name and then epoch.

    Args:
        source: Folder, archive or file of the zoo, in any format of ``zoo/readers``, or a catalog of it.
        reader: Name of the format; ``auto`` takes the first that finds something.

    Returns:
        At least one record; ids are unique.

    Raises:
        InputError: No such file or folder, no such reader, two checkpoints of one id, or nothing found: says what
            every reader looked for.
    """
    root = Path(source).expanduser().absolute()
    _check_source(root)
    if reader not in ("auto", *reader_names()):
        raise InputError(f"--reader is {reader!r}: choose auto, {', '.join(reader_names())}")
    if root.is_file() and (program := foreign.of_file(root)) is not None:
        raise InputError(program.refusal(root))
    if reader == CATALOG or (reader == "auto" and _is_catalog(root)):
        return _in_order(read_catalog(root))
    chosen = _READERS.values() if reader == "auto" else [_READERS[reader]]
    for module in chosen:
        records = module.discover(root)
        if records:
            records = list(_final(records))
            _check_unique(records, f"--source {root}")
            return _in_order(records)
    looked_for = [module.LOOKS_FOR for module in chosen] + ([_LOOKS_FOR] if reader == "auto" else [])
    remedy = _REMEDY if reader == "auto" else f"{_REMEDY}; or leave --reader at auto"
    if instead := foreign.by_format(unclaimed(root, [])):
        refused = "; ".join(known.refusal(root / paths[0]) for known, paths in instead[:_EXAMPLES])
        raise InputError(f"--source {root} holds no checkpoints, but files that are not read: {refused}")
    raise InputError(
        f"--source {root} holds no checkpoints: looked for {'; '.join(looked_for)}; {remedy}{near(root, is_zoo)}"
    )


def open_record(record: Record) -> Checkpoint:
    """Opens the weights of a record with the reader that found it.

    Raises:
        InputError: They cannot be read without running code, the file is damaged, or the record names no reader.
    """
    reader = _READERS.get(record.reader)
    if reader is None:
        raise InputError(f"{record.path}: its reader is {record.reader!r}; put one of {', '.join(_READERS)} there")
    return reader.open_checkpoint(record)


def unclaimed(source: str | Path, records: Sequence[Record]) -> list[str]:
    """Files of a source that look like weights, or archives of them, but that none of its records stands for.

    Files with a name that any reader would look at, archives, and files called ``checkpoints``; but for those of
    ``passed_over``. Opens no file.

    Returns:
        Their paths relative to the source, in order; empty for a source that is a file.
    """
    return _left_over(source, records)[0]


def passed_over(source: str | Path, records: Sequence[Record]) -> list[str]:
    """Files of a source that by name are an optimiser's, scheduler's or generator's, and lie beside a record's weights.

    Beside: in the same folder, or in one right below it.

    Returns:
        Their paths relative to the source, in order; empty for a source that is a file.
    """
    return _left_over(source, records)[1]


def _left_over(source: str | Path, records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """What ``unclaimed`` and ``passed_over`` tell."""
    root = Path(source).expanduser().absolute()
    if not root.is_dir():
        return [], []
    claims = _Claims.of(records)
    unread: dict[str, str] = {}  # by where links lead, so that each file is named once
    state: dict[str, str] = {}
    links: list[tuple[str, str, dict[str, str]]] = []
    for folder, entries in scan(root):
        at = os.path.realpath(folder)
        with_weights = at in claims.folders or os.path.dirname(at) in claims.folders  # noqa: PTH120
        for entry in entries:
            if entry.name[0] == "." or not _WEIGHTS.search(entry.name) or is_folder(entry):
                continue
            found = state if with_weights and files.is_training_state(entry.name) else unread
            if entry.is_symlink():
                links.append((os.path.realpath(entry.path), entry.path, found))
            elif not claims.hold(real := f"{at}{os.sep}{entry.name}"):
                found[real] = entry.path
    for real, path, found in links:
        if not claims.hold(real):
            found.setdefault(real, path)
    return (
        sorted(os.path.relpath(path, root) for path in unread.values()),
        sorted(os.path.relpath(path, root) for path in state.values()),
    )


@dataclass(frozen=True)
class _Claims:
    """The files that records stand for, by where links lead."""

    paths: set[str]
    folders: set[str]
    """Where they lie."""
    shards: set[str]
    """Folders of an index, whose shards are all its own; and shards without their numbers."""

    @classmethod
    def of(cls, records: Iterable[Record]) -> _Claims:
        named = {path for record in records for path in (record.path, *record.beside)}
        paths = {os.path.realpath(path) for path in named}
        folders = {os.path.realpath(os.path.dirname(path)) for path in named}  # noqa: PTH120
        indexed = {os.path.dirname(path) for path in paths if _INDEX.search(path)}  # noqa: PTH120
        return cls(paths, folders, indexed | {_SHARD.sub(r"#\1", path) for path in paths if _SHARD.search(path)})

    def hold(self, path: str) -> bool:
        """Whether a file, or a folder around it, is a record's; or a shard of a model in shards."""
        if _SHARD.search(path) and {os.path.dirname(path), _SHARD.sub(r"#\1", path)} & self.shards:  # noqa: PTH120
            return True
        while path not in self.paths:
            path, before = os.path.dirname(path), path  # noqa: PTH120 - pathlib takes ten times as long
            if path == before:
                return False
        return True


def _check_source(root: Path) -> None:
    try:
        there = root.exists()
    except OSError as error:
        raise InputError(f"--source {root} cannot be looked at ({error}); check its permissions") from error
    if not there:
        raise InputError(f"--source {root} does not exist{_beside(root)}: {_REMEDY}{near(root, is_zoo)}")


def _beside(missing: Path) -> str:
    """What lies beside a path that does not exist and is called much like it, in words; or what of it is there."""
    folder = next(above for above in missing.parents if above.exists())
    if folder != missing.parent:
        return f", nor does {missing.parent} (only {folder})"
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
    except OSError:
        return ""
    alike = difflib.get_close_matches(missing.name, names, n=_MOST_NEAR)
    stem = missing.name.partition(".")[0]
    alike += [name for name in names if name.partition(".")[0] == stem and name not in alike]
    return f" (beside it: {', '.join(alike[:_MOST_NEAR])})" if alike else ""


def _in_order(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record.model, record.epoch, record.id))


def _final(records: Iterable[Record]) -> Iterator[Record]:
    """The same, as any table can hold them: text that is UTF-8, plain values, epochs of 64 bits.

    ``path``, ``member`` and ``beside`` stay as they are, since the weights are opened by them. An epoch that is none is
    taken as 0, under the id that it has, so that no checkpoint is lost.
    """
    odd: list[Record] = []
    shared: dict[int, tuple[dict[str, Value], dict[str, Value]]] = {}  # what is kept here keeps its id
    for record in records:
        if id(record.config) not in shared:
            shared[id(record.config)] = (record.config, _clean_values(record.config))
        changed: dict[str, Any] = {
            "id": clean_text(record.id),
            "model": clean_text(record.model),
            "properties": _clean_values(record.properties),
            "config": shared[id(record.config)][1],
            "license": None if record.license is None else clean_text(str(record.license)),
            "parents": tuple(clean_text(str(name)) for name in record.parents),
            "epoch": int(record.epoch) if _is_epoch(record.epoch) else 0,
        }
        changed = {name: value for name, value in changed.items() if value is not getattr(record, name)}
        if not _is_epoch(record.epoch):
            odd.append(record)
        yield replace(record, **changed) if changed else record
    if odd:
        names = ", ".join(f"{record.path} ({record.epoch!r:.40})" for record in odd[:_EXAMPLES])
        _LOG.warning("the epoch of %d checkpoints is no whole number of 64 bits, and taken as 0: %s", len(odd), names)


def _clean_values(values: dict[str, Value]) -> dict[str, Value]:
    if all(type(key) is str and key.isascii() and _is_clean(value) for key, value in values.items()):
        return values
    return {clean_text(str(key)): value if _is_clean(value) else plain_value(value) for key, value in values.items()}


def _is_clean(value: Any) -> bool:
    kind = type(value)
    if kind is int:
        return -(2**63) <= value < 2**63
    return kind is float or value is None or kind is bool or (kind is str and value.isascii())


def _is_epoch(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LAST_EPOCH and value == int(value)


def _check_unique(records: Sequence[Record], where: str) -> None:
    name, count = Counter(record.id for record in records).most_common(1)[0]
    if count > 1:
        paths = [record.path for record in records if record.id == name]
        raise InputError(
            f"{where}: {count} checkpoints have the id {name!r} (for example {paths[0]} and {paths[1]}); "
            "give each model its own name, and each of its checkpoints its own epoch"
        )


# ---------------------------------------------------------------- properties from a table


@dataclass(frozen=True)
class _Rows:
    """A table of properties, by what its rows call their checkpoint."""

    path: Path
    base: str
    """The folder that paths are relative to."""
    keys: tuple[str, ...]
    """The columns that say which checkpoint a row is about."""
    by_name: dict[tuple[Any, ...], dict[str, Any]]


def join_properties(records: Sequence[Record], path: str | Path, source: str | Path) -> list[Record]:
    """Adds what a table knows of the checkpoints to their records.

    A row is about the file that its column ``path`` names, relative to the source, or about all checkpoints in the
    folder or archive of that name, but for those that have a row of their own; a file in an archive is its name there,
    with or without ``<archive>/`` before it. Without such a column, a row is about the checkpoint that ``id`` names,
    or about those that ``model`` (and ``epoch``, if there is one) name. The columns ``model``, ``epoch``, ``license``
    and ``split`` set these fields of a record, ``config.<name>`` a setting, every other one a property; an empty cell
    changes nothing that is known already. Dates become text, as in 2024-12-31.

    Args:
        records: The zoo's checkpoints.
        path: CSV (perhaps compressed) or Parquet.
        source: What the records were discovered in.

    Returns:
        The records, in order of their model and epoch; how many rows and records stayed without the other is logged.

    Raises:
        InputError: The table cannot be read, has two rows for one name, or names no checkpoint that is there.
    """
    source = Path(source).expanduser().absolute()
    table = _rows(Path(path).expanduser(), str(source if source.is_dir() else source.parent))
    used: set[tuple[Any, ...]] = set()
    joined = []
    for record in records:
        name = next((name for name in _names(record, table) if name in table.by_name), None)
        if name is not None:
            used.add(name)
            record = _set(record, table.by_name[name], table)
        joined.append(record)
    _report_joined(records, joined, used, table)
    _check_unique(joined, str(table.path))
    return _in_order(joined)


def _rows(path: Path, base: str) -> _Rows:
    content = read_table(path)
    names = set(content.column_names)
    options = [("path",), ("id",), ("model", "epoch"), ("model",)]
    keys = next((option for option in options if names.issuperset(option)), None)
    if keys is None:
        raise InputError(
            f"{path}: has no column path, id or model, only {', '.join(content.column_names[:20])}; add a column path "
            "with the place of each checkpoint relative to --source"
        )
    by_name: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, row in enumerate(plain_rows(content), start=1):
        name = tuple(row.pop(key) for key in keys)
        if None in name:
            raise InputError(f"{path}: row {number} has no {keys[name.index(None)]}; fill it in, or remove the row")
        if keys == ("path",):
            name = (_relative(str(name[0]), base),)
        if name in by_name:
            raise InputError(f"{path}: has two rows for {' '.join(map(str, name))}; keep one of them")
        by_name[name] = row
    return _Rows(path, base, keys, by_name)


def _names(record: Record, table: _Rows) -> Iterator[tuple[Any, ...]]:
    """What a row may call this checkpoint, the most particular first."""
    if table.keys != ("path",):
        yield tuple(getattr(record, key) for key in table.keys)
        return
    path = _relative(record.path, table.base)
    if record.member:
        yield (record.member,)
        path = f"{path}/{record.member}"
    while path:
        yield (path,)
        path = path.rpartition("/")[0]


def _relative(path: str, base: str) -> str:
    whole = os.path.normpath(os.path.join(base, path))  # noqa: PTH118 - pathlib takes ten times as long
    inside = whole.removeprefix(f"{base}{os.sep}")
    return (inside if inside != whole else os.path.relpath(whole, base)).replace(os.sep, "/")


def _set(record: Record, row: Mapping[str, Any], table: _Rows) -> Record:
    """The record with what a row says of it."""
    fields: dict[str, Any] = {}
    properties, config = dict[str, Value](), dict[str, Value]()
    for name, value in row.items():
        if name in ("model", "epoch", "license", "split"):
            if value is not None:
                fields[name] = _field(name, value, f"{table.path}: {record.id}")
        elif name.startswith("config."):
            config[name.removeprefix("config.")] = value
        else:
            properties[name.removeprefix("property.")] = value
    if {"model", "epoch"} & fields.keys():
        named = {"model": record.model, "epoch": record.epoch} | fields
        if (named["model"], named["epoch"]) != (record.model, record.epoch):
            fields["id"] = f"{named['model']}/{named['epoch']}"
    fields["properties"] = _learnt(record.properties, properties)
    fields["config"] = _learnt(record.config, config) if config else record.config  # many records may share one
    return replace(record, **fields)


def _learnt(known: dict[str, Value], new: dict[str, Value]) -> dict[str, Value]:
    """What was known, and what is new; nothing new replaces nothing."""
    return known | {name: value for name, value in new.items() if value is not None or name not in known}


def _field(name: str, value: Any, where: str) -> Any:
    if name == "epoch":
        if not _is_epoch(value):
            raise InputError(f"{where}: its epoch is {value!r}; make it a whole number from 0 to {_LAST_EPOCH}")
        return int(value)
    if name == "split":
        if str(value).lower() not in SPLIT_NAMES:
            raise InputError(f"{where}: its split is {value!r}; make it train, val or test, or leave it empty")
        return SPLIT_NAMES[str(value).lower()]
    return str(value)


def _report_joined(
    records: Sequence[Record], joined: Sequence[Record], used: set[tuple[Any, ...]], table: _Rows
) -> None:
    unused = [" ".join(map(str, name)) for name in table.by_name if name not in used]
    without = [old for old, new in zip(records, joined, strict=True) if old is new]
    if not used:
        example = _relative(records[0].path, table.base) if table.keys == ("path",) else records[0].id
        raise InputError(
            f"{table.path}: none of its {len(unused):,} rows is about a checkpoint of the zoo: {table.keys[0]} is "
            f"{unused[0] if unused else 'nothing'!r} where the first checkpoint is {example!r}"
        )
    if unused:
        _LOG.warning("%s: %d rows match no checkpoint, for example %s", table.path, len(unused), unused[0])
    if without:
        _LOG.warning("%s: no row for %d checkpoints, for example %s", table.path, len(without), without[0].id)


# ---------------------------------------------------------------- the catalog file


def write_catalog(
    path: str | Path, records: Sequence[Record], columns: Mapping[str, Sequence[Any]], source: str = ""
) -> None:
    """Writes one Parquet of records; it is there whole or not at all.

    Args:
        path: The file; its folder is made.
        records: One row each, in this order.
        columns: What else is known of each, by name of the column; ``status`` is ``kept`` or ``left out``.
        source: What it is the catalog of; ``catalog_source`` tells.

    Raises:
        InputError: The file cannot be written.
    """
    path = Path(path).expanduser().absolute()
    table: dict[str, pa.Array] = {
        "id": text_column([record.id for record in records]),
        "model": text_column([record.model for record in records]),
        "epoch": pa.array([record.epoch for record in records], pa.int64()),
        "path": text_column(_written_paths(records, path.parent)),
        "reader": text_column([record.reader for record in records]),
        "member": text_column([record.member for record in records]),
        "license": text_column([record.license for record in records]),
        "parents": _list_column([record.parents for record in records]),
        "beside": _list_column([record.beside for record in records]),
        "split": text_column([record.split for record in records]),
    }
    table |= {name: value_column(list(values)) for name, values in columns.items()}
    table |= value_columns("property", [record.properties for record in records])
    table |= value_columns("config", [record.config for record in records])
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            written = int(time.time()) * 10**9
            metadata = {_SOURCE: clean_text(source).encode(), _WRITTEN: str(written).encode()} if source else None
            pq.write_table(pa.table(table, metadata=metadata), partial, compression="zstd")
            os.utime(partial, ns=(written, written))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); free some space, or name another place") from error


def catalog_source(path: str | Path) -> str | None:
    """What a catalog was written of; None where nobody said so, or where the file has been changed since.

    The time of writing stands in the file, and is the file's own; any program that writes it anew, or copies it
    without its time, makes it the user's. Never fails: what cannot be read is no catalog of ours.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        unchanged = metadata.get(_WRITTEN) == str(Path(path).stat().st_mtime_ns).encode()
    except (pa.ArrowException, OSError):
        return None
    return metadata[_SOURCE].decode("utf-8", "replace") if unchanged and _SOURCE in metadata else None


def read_catalog(path: str | Path) -> list[Record]:
    """Reads the records of a catalog, but for rows whose ``status`` is ``left out``.

    Rows may have been removed, sorted and edited with any program, and columns but for ``id``, ``model``, ``path`` and
    ``reader`` may be gone; an empty cell of a property means that the checkpoint lacks it.

    Raises:
        InputError: Not a catalog, ids that are not unique, or no row that is kept.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"{path}: no such catalog; write one with `python jobs/prepare.py --audit`")
    table = read_table(path)
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: no catalog, since it has no column {', '.join(missing)}; looked for {_LOOKS_FOR}")
    records = list(_records(table, path))
    if not records:
        raise InputError(
            f"{path}: none of its {len(table):,} rows is kept; change their status, or name another source"
        )
    _check_unique(records, str(path))
    return records


def _list_column(values: Sequence[Sequence[str]]) -> pa.Array:
    return pa.array([[clean_text(text) for text in texts] for texts in values], pa.list_(pa.string()))


def _written_paths(records: Sequence[Record], folder: Path) -> list[str]:
    inside = f"{folder}{os.sep}"
    return [record.path.removeprefix(inside) for record in records]


def _is_catalog(path: Path) -> bool:
    if path.suffix != ".parquet" or not path.is_file():
        return False
    try:
        return set(pq.read_schema(path).names).issuperset(_REQUIRED)
    except (pa.ArrowException, OSError):
        return False


def _records(table: pa.Table, path: Path) -> Iterator[Record]:
    """Of the rows that are kept. Column by column, for catalogs of many; equal settings become one dictionary."""
    lists = [name for name in _LISTS if name in table.column_names]
    columns = plain_columns(table.drop_columns(lists)) | {name: table[name].to_pylist() for name in lists}
    names = (*_REQUIRED, *_OPTIONAL, *_LISTS)
    rows = zip(*(columns.get(name, [None] * len(table)) for name in names), strict=True)
    properties, configs = _known(columns, "property.", len(table)), _known(columns, "config.", len(table))
    shared: dict[tuple[Any, ...], dict[str, Value]] = {}
    folder = str(path.parent)
    for row, known, settings in zip(rows, properties, configs, strict=True):
        record = dict(zip(names, row, strict=True))
        if record.pop("status") != LEFT_OUT:
            config = shared.setdefault(tuple(settings.items()), settings)
            yield _record(record, path, folder, known, config)


def _known(columns: Mapping[str, Sequence[Any]], prefix: str, count: int) -> Iterator[dict[str, Value]]:
    """What the columns of a prefix say of each row."""
    names = [name for name in columns if name.startswith(prefix)]
    keys = [name.removeprefix(prefix) for name in names]
    if not names:
        yield from ({} for _ in range(count))
    for values in zip(*(columns[name] for name in names), strict=True):
        yield {key: value for key, value in zip(keys, values, strict=True) if value is not None}


def _record(
    row: Mapping[str, Any], path: Path, folder: str, properties: dict[str, Value], config: dict[str, Value]
) -> Record:
    for name in _REQUIRED:
        if row[name] is None:
            raise InputError(
                f"{path}: the row of {row['id'] or row['path']} has no {name}; fill it in, or remove the row"
            )
    epoch, split, where = row["epoch"], row["split"], f"{path}: {row['id']}"
    return Record(
        id=str(row["id"]),
        model=str(row["model"]),
        epoch=0 if epoch is None or _is_nan(epoch) else _field("epoch", epoch, where),
        path=os.path.normpath(os.path.join(folder, str(row["path"]))),  # noqa: PTH118 - as fast as it gets
        properties=properties,
        config=config,
        reader=str(row["reader"]),
        member=str(row["member"] or ""),
        license=None if row["license"] is None else str(row["license"]),
        parents=_texts(row["parents"]),
        beside=_texts(row["beside"]),
        sha256=None if row["sha256"] is None else str(row["sha256"]),
        split=None if split is None else _field("split", split, where),
    )


def _texts(value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    return (value,) if isinstance(value, str) else tuple(str(name) for name in value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
