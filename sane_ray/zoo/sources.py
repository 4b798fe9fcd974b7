"""From what a user names (a folder, an archive, a file, a hub repository, a public zoo) to a place on this machine.

Fetches and unpacks what is not there yet, under the storage root; never opens weights.
"""

from __future__ import annotations

from pathlib import Path

from sane_ray.errors import InputError
from sane_ray.zoo import download, hub
from sane_ray.zoo.archives import as_folder, is_archive
from sane_ray.zoo.public import find
from sane_ray.zoo.readers import cnn_wild_park


def check_one_source(source: str, hub_repository: str, zoo: str) -> None:
    """Raises ``InputError`` if more than one place is named."""
    named = [f"--{name} {value}" for name, value in (("source", source), ("hub", hub_repository), ("zoo", zoo)) if value]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} name different checkpoints: give one of them")


def planned(hub_repository: str, zoo: str, storage: Path) -> tuple[Path, str] | None:
    """Where a repository or public zoo would be, and the sentence that says what would be fetched; None if it is here."""
    if hub_repository:
        return storage / "stores" / name_of(hub_repository), f"would download the weights of {hub_repository}"
    if zoo and not (storage / "zoos" / zoo).exists():
        return storage / "zoos" / zoo, f"would download {find(zoo).about}"
    return None


def locate(source: Path, hub_repository: str, zoo: str, storage: Path) -> Path:
    """The folder or file to read: ``source``, or where a hub repository or public zoo has been fetched to.

    Archives are unpacked beside the other zoos, but for those that a reader reads as they are.

    Raises:
        InputError: It cannot be fetched or unpacked; says why and what to do by hand.
    """
    if hub_repository:
        return hub.fetch(hub_repository)
    if zoo:
        source = download.fetch(zoo, storage / "zoos")
    if source.is_file() and is_archive(source) and not cnn_wild_park.discover(source):
        return as_folder(source, storage / "zoos")
    return source


def name_of(hub_repository: str) -> str:
    """A folder's name for a repository."""
    return hub_repository.partition("@")[0].replace("/", "--")
