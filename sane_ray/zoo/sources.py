"""From what a user names (a folder, an archive, a file, a hub repository, a public zoo) to records on this machine.

Fetches and unpacks what is not there yet, under the storage root; never opens weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sane_ray.errors import InputError
from sane_ray.zoo import download, hub
from sane_ray.zoo.archives import as_folder, is_archive
from sane_ray.zoo.catalog import discover, join_properties, unclaimed
from sane_ray.zoo.public import find
from sane_ray.zoo.readers import Record


@dataclass(frozen=True)
class Source:
    """What to read: exactly one of a place on this machine, a repository of a hub, and a public zoo."""

    path: Path
    """Folder, archive, file or catalog; where it is to be, for a public zoo."""
    hub: str = ""
    zoo: str = ""
    reader: str = "auto"
    properties: str = ""
    """Table of properties to join, or empty."""

    @property
    def is_packed(self) -> bool:
        """Whether the path is an archive that no reader reads as it is."""
        return not self.hub and self.path.is_file() and is_archive(self.path) and not _is_read(self.path, self.reader)


@dataclass(frozen=True)
class Zoo:
    """What a source holds."""

    records: list[Record]
    root: Path
    """The folder that paths are told relative to."""
    path: Path
    """The folder or file that was read."""

    def unread(self) -> list[str]:
        """Files that look like weights, but that the reader did not list; relative to the root."""
        return unclaimed(self.path, self.records)


def check_one_source(source: str, hub_repository: str, zoo: str) -> None:
    """Raises ``InputError`` if more than one place is named."""
    named = [
        f"--{name} {value}" for name, value in (("source", source), ("hub", hub_repository), ("zoo", zoo)) if value
    ]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} name different checkpoints: give one of them")


def to_fetch(source: Source) -> str:
    """What would have to be downloaded or unpacked before the source can be read, in words; empty if nothing."""
    if source.hub:
        return f"would download the weights of {source.hub} from the hub, unless they are in its cache"
    if source.zoo and not source.path.exists():
        return f"would download {source.zoo} ({find(source.zoo).about}) to {source.path}"
    return f"would unpack {source.path}" if source.is_packed else ""


def read(source: Source, storage: Path) -> Zoo:
    """Fetches, unpacks and lists a source.

    Raises:
        InputError: It cannot be fetched, unpacked or recognised; says why and what to do.
    """
    path, license_name = source.path, None
    if source.hub:
        path = hub.fetch(source.hub)
    elif source.zoo:
        folder = download.fetch(source.zoo, storage / "zoos")
        path, license_name = _unwrapped(folder), download.license_of(folder)
    elif source.is_packed:
        path = _unwrapped(as_folder(path, storage / "zoos"))
    elif path.is_dir() and (license_name := download.license_of(path)) is not None:
        path = _unwrapped(path)
    records = discover(path, source.reader)
    root = path if path.is_dir() else path.parent
    if source.properties:
        records = join_properties(records, source.properties, root)
    return Zoo(_licensed(records, license_name), root, path)


def name_of(repository: str) -> str:
    """A folder's name for a repository of a hub."""
    return repository.partition("@")[0].replace("/", "--")


def _unwrapped(folder: Path) -> Path:
    """The one folder that an archive was made of, so that models have the same names packed and unpacked."""
    inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _licensed(records: Sequence[Record], license_name: str | None) -> list[Record]:
    """With the licence of a downloaded zoo, where a record names none of its own."""
    return [
        record if record.license or license_name is None else replace(record, license=license_name)
        for record in records
    ]


def _is_read(path: Path, reader: str) -> bool:
    try:
        return bool(discover(path, reader))
    except InputError:
        return False
