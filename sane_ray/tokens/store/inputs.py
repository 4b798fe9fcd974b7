"""What a token store is made from, and whether one that is there was made from the same.

Never writes, and never imports Ray.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.store.inspection import digest_if_readable
from sane_ray.tokens.store.progress_bar import checkpoint_bar
from sane_ray.tokens.store.reading import TokenStore, json_digest
from sane_ray.zoo.catalog import Record

_GATES = ("max_architectures", "max_skipped")
"""Config fields that decide whether a store is written, not what is in it."""


@dataclass(frozen=True)
class Entry:
    """What identifies one checkpoint as an input."""

    path: str
    """Relative to the source."""
    bytes: int
    """Size of the file; -1 if it is missing."""
    mtime_ns: int
    metadata: str
    """Digest of its properties and config."""


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

    @classmethod
    def of(cls, records: Sequence[Record], config: TokensConfig, source: str | Path) -> Inputs:
        """Looks at every file's size and time.

        Raises:
            InputError: None of the records is of ``tokens.epochs``.
        """
        source = Path(source).expanduser().absolute()
        chosen = [record for record in records if not config.epochs or record.epoch in config.epochs]
        if not chosen:
            found = sorted({record.epoch for record in records})
            raise InputError(
                f"config field tokens.epochs is {config.epochs}: the zoo {source} has no such checkpoints, only epochs "
                f"{found[:20]}"
            )
        chosen.sort(key=lambda record: (record.model, record.epoch))
        return cls(chosen, config, source, {record.id: _entry(record, source) for record in chosen})

    @property
    def settings(self) -> dict[str, Any]:
        """The config fields that decide the contents."""
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name not in _GATES}

    @property
    def digest(self) -> str:
        """Of everything, times included."""
        listing = [[name, *dataclasses.astuple(entry)] for name, entry in self.entries.items()]
        return json_digest([self.settings, listing])


def _entry(record: Record, source: Path) -> Entry:
    try:
        status = os.stat(record.path)  # noqa: PTH116 - as fast as it gets for a million files
        size, mtime = status.st_size, status.st_mtime_ns
    except OSError:
        size, mtime = -1, 0
    return Entry(
        os.path.relpath(record.path, source), size, mtime, json_digest([record.properties, record.config])[:16]
    )


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
    differences = [*_different_settings(store, inputs), *_different_checkpoints(store, inputs)]
    if differences:
        raise InputError(
            f"--store {destination} was prepared from other inputs: {'; '.join(differences)}. Name another --store, or "
            "delete this one to prepare it again"
        )
    return store


def _different_settings(store: TokenStore, inputs: Inputs) -> list[str]:
    old, new = store.index["inputs"]["tokens"], inputs.settings
    return [
        f"tokens.{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _different_checkpoints(store: TokenStore, inputs: Inputs) -> list[str]:
    names = ("id", "source", "source_bytes", "source_mtime_ns", "source_metadata")
    rows = zip(*(store.models[name].to_pylist() for name in names), strict=True)
    old = {row[0]: Entry(*row[1:]) for row in rows}
    old |= {row["id"]: Entry(*(row[name] for name in names[1:])) for row in store.skipped}
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
    digests = dict(zip(store.models["id"].to_pylist(), store.models["sha256"].to_pylist(), strict=True))
    digests |= {row["id"]: row["sha256"] for row in store.skipped}
    paths = {record.id: record.path for record in inputs.records}
    changed = []
    with checkpoint_bar("compare checkpoints", len(touched)) as progress:
        for name in touched:
            if digest_if_readable(paths[name]) != digests[name]:
                changed.append(name)
            progress.update()
    return changed
