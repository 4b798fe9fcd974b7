"""What a token store is made from, and whether one that is there was made from the same.

Never writes, and never imports Ray.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.store.inspection import digest_if_readable
from sane_ray.tokens.store.progress_bar import progress_bar
from sane_ray.tokens.store.reading import TokenStore, file_digest, json_digest
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.zoo.filters import select
from sane_ray.zoo.readers import Record
from sane_ray.zoo.splits import assign_splits
from sane_ray.zoo.tables import clean_text

_GATES = ("max_architectures", "max_skipped")
"""Config fields that decide whether a store is written, not what is in it."""


_FILES = ("split_file", "symmetry")
"""Config fields that name files."""

_CHOOSING = ("the source", "tokens.where", "tokens.epochs")
"""Differences that explain why the checkpoints are others."""

_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
"""What names the shards of a checkpoint that lie beside it."""

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json")
"""What counts for a checkpoint that is a folder."""


SMALL_CHECKPOINTS, SMALL_BYTES = 2000, 256e6
"""A zoo of no more is prepared in this process, in less time than a cluster takes to start."""


@dataclass(frozen=True)
class Entry:
    """What identifies one checkpoint as an input."""

    path: str
    """Relative to the source."""
    bytes: int
    """Size of the file (of all weight files where it is a folder); -1 if it is missing."""
    mtime_ns: int
    metadata: str
    """Digest of what is known of it."""


@dataclass(frozen=True)
class Inputs:
    """All that decides the contents of a store.

    A file is identified by path, size and modification time, because a second run should not read a zoo of terabytes.
    The time is a hint only: where nothing but times differ (a copied zoo), the weights are read and compared.
    """

    records: list[Record]
    config: TokensConfig
    source: Path
    entries: dict[str, Entry]
    """By id, in the order of the records."""
    unwanted: list[tuple[Record, str]]
    """Checkpoints that ``tokens.epochs`` or ``tokens.where`` leave out, and why."""

    @classmethod
    def of(cls, records: Sequence[Record], config: TokensConfig, source: str | Path) -> Inputs:
        """Looks at every chosen file's size and time.

        Raises:
            InputError: None of the records is wanted, or the config names what the zoo has not.
        """
        source = Path(source).expanduser().absolute()
        wanted, unwanted = _wanted(records, config, source)
        wanted.sort(key=lambda record: (record.model, record.epoch))
        look_once, digest_once = cache(look), cache(_digest_beside)
        entries = {record.id: _entry(record, source, look_once, digest_once) for record in wanted}
        inputs = cls(wanted, config, source, entries, unwanted)
        inputs._check()
        return inputs

    @cached_property
    def sizes(self) -> list[float]:
        """Bytes of each record's weights; a file that holds many is shared out evenly."""
        records_of = Counter(record.path for record in self.records)
        return [max(self.entries[record.id].bytes, 0) / records_of[record.path] for record in self.records]

    @property
    def is_small(self) -> bool:
        """Whether the zoo is prepared in this process, without Ray."""
        return len(self.records) <= SMALL_CHECKPOINTS and sum(self.sizes) <= SMALL_BYTES

    @property
    def settings(self) -> dict[str, Any]:
        """The config fields that decide the contents; files that they name by what is in them."""
        settings = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in _GATES}
        settings["symmetry"] = [_contents(path, "tokens.symmetry") for path in self.config.symmetry]
        settings["split_file"] = _contents(self.config.split_file, "tokens.split_file")
        settings["where"] = self.config.where.strip()
        settings["align_to"] = self.config.align_to if self.config.align == "weights" else ""
        return settings

    @property
    def digest(self) -> str:
        """Of everything, times included."""
        listing = [[name, *dataclasses.astuple(entry)] for name, entry in self.entries.items()]
        return json_digest([self.settings, listing])

    @property
    def readers(self) -> list[str]:
        """Names of the readers that found the records."""
        return sorted({record.reader for record in self.records})

    def _check(self) -> None:
        """Raises ``InputError`` for what the config names and the zoo has not, before any work."""
        for path in self.config.symmetry:
            Symmetry.load(path)
        models = {record.model for record in self.records}
        name = self.config.align_to if self.config.align == "weights" else ""
        if name and name not in models:
            raise InputError(
                f"config field tokens.align_to is {name!r}: no such model in the zoo; take one of "
                f"{', '.join(sorted(models)[:5])}"
            )
        assign_splits(self.records, self.config)


def look(path: str) -> tuple[int, int]:
    """Size and modification time of a checkpoint's file, or of the weight files in its folder; (-1, 0) if missing."""
    try:
        if _INDEX.search(path):
            path = os.path.dirname(path)  # noqa: PTH120
        if not os.path.isdir(path):  # noqa: PTH112
            status = os.stat(path)  # noqa: PTH116 - as fast as it gets for a million files
            return status.st_size, status.st_mtime_ns
        with os.scandir(path) as entries:
            found = [entry.stat() for entry in entries if entry.name.endswith(_WEIGHT_FILES) and entry.is_file()]
    except OSError:
        return -1, 0
    return sum(status.st_size for status in found), max((status.st_mtime_ns for status in found), default=0)


def _wanted(
    records: Sequence[Record], config: TokensConfig, source: Path
) -> tuple[list[Record], list[tuple[Record, str]]]:
    epochs = set(config.epochs)
    chosen = [record for record in records if not epochs or record.epoch in epochs]
    if not chosen:
        found = sorted({record.epoch for record in records})
        raise InputError(
            f"config field tokens.epochs is {config.epochs}: the zoo {source} has no such checkpoints, only epochs "
            f"{found[:20]}"
        )
    unwanted = [(record, "epoch not chosen") for record in records if epochs and record.epoch not in epochs]
    if config.where.strip():
        chosen, others = select(chosen, config.where)
        unwanted += others
        if not chosen:
            raise InputError(
                f"config field tokens.where is {config.where!r}: it leaves out all {len(others):,} checkpoints of "
                f"{source} (for example {others[0][0].id}: {others[0][1]})"
            )
    return chosen, unwanted


def _contents(path: str, name: str) -> str:
    if not path:
        return ""
    try:
        return file_digest(Path(path).expanduser())
    except OSError as error:
        raise InputError(f"config field {name} is {path}: cannot be read ({error.strerror})") from error


def _entry(
    record: Record, source: Path, look_at: Callable[[str], tuple[int, int]], digest: Callable[[str], str]
) -> Entry:
    known: list[Any] = [record.reader, record.member, record.properties, record.config, record.license, record.parents]
    known += [record.split, record.sha256, [digest(path) for path in record.beside]]
    return Entry(clean_text(os.path.relpath(record.path, source)), *look_at(record.path), json_digest(known)[:16])


def _digest_beside(path: str) -> str:
    try:
        return file_digest(Path(path))
    except OSError:  # whoever opens the checkpoint says what is wrong
        return ""


def matching(inputs: Inputs, destination: Path) -> TokenStore | None:
    """The complete store that these inputs would give, if it is already there.

    Raises:
        InputError: The destination holds a store of other inputs (says what differs), an incomplete one, or no store.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    store = TokenStore.open(destination)
    if store.index["inputs"]["digest"] == inputs.digest:
        return store
    differences = _different_settings(store, inputs)
    if not any(difference.startswith(_CHOOSING) for difference in differences):
        differences += _different_checkpoints(store, inputs)
    if differences:
        raise InputError(
            f"--store {destination} was prepared from other inputs: {'; '.join(differences)}. Name another --store, or "
            "delete this one to prepare it again"
        )
    return store


def _different_settings(store: TokenStore, inputs: Inputs) -> list[str]:
    old, new = store.index["inputs"]["tokens"], inputs.settings
    different = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    readers = (", ".join(store.index["inputs"]["readers"]), ", ".join(inputs.readers))
    return [
        *([f"the source was read as {readers[0]} and is now read as {readers[1]}"] if readers[0] != readers[1] else []),
        *(
            f"tokens.{name} is another file, or the same with other contents"
            if name in _FILES
            else f"tokens.{name} was {old.get(name)!r} and is now {new.get(name)!r}"
            for name in different
        ),
    ]


def _different_checkpoints(store: TokenStore, inputs: Inputs) -> list[str]:
    names = ("source", "source_bytes", "source_mtime_ns", "source_metadata")
    old = {row["id"]: Entry(*(row[name] for name in names)) for row in store.considered}
    new = inputs.entries
    touched = [name for name in new if name in old and new[name] != old[name] and _same_but_time(new[name], old[name])]
    changed = [name for name in new if name in old and not _same_but_time(new[name], old[name])]
    if touched:
        changed += _rewritten(store, inputs, touched)
    kinds = {"new": [name for name in new if name not in old], "gone": [name for name in old if name not in new]}
    return [
        f"{len(found):,} checkpoints are {kind} (for example {found[0]})"
        for kind, found in (kinds | {"changed": sorted(changed)}).items()
        if found
    ]


def _same_but_time(one: Entry, other: Entry) -> bool:
    return dataclasses.replace(one, mtime_ns=0) == dataclasses.replace(other, mtime_ns=0)


def _rewritten(store: TokenStore, inputs: Inputs, touched: list[str]) -> list[str]:
    """Which of the checkpoints that have another time also have other weights."""
    digests = {row["id"]: row["sha256"] for row in store.considered}
    records = {record.id: record for record in inputs.records}
    changed = []
    with progress_bar("compare checkpoints", len(touched), unit="checkpoint") as progress:
        for name in touched:
            if digest_if_readable(records[name]) != digests[name]:
                changed.append(name)
            progress.update()
    return changed
