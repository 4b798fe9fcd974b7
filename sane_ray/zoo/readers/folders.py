"""One walk through a zoo's folders for every reader: in an order that no file system can change, each folder once.

Never opens a file, never enters a hidden folder, never leaves the zoo upwards, and never fails for a folder that may
not be read.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_LOG = logging.getLogger(__name__)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields ``root`` and every folder below it, parents first, with the names of its folders and files, sorted.

    As ``scan``, but for names: remove one from the list of folders to keep the walk out of it.
    """
    wanted: set[str] = set()
    for folder, entries in scan(root, descend=wanted.__contains__):
        names = [entry.name for entry in entries if entry.name[0] != "." and is_folder(entry)]
        yield Path(folder), names, [entry.name for entry in entries if not is_folder(entry)]
        wanted.clear()
        wanted.update(names)


def scan(
    root: Path, descend: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Folders under ``root`` and what is in them by name: real folders first, then those behind links, each once.

    Hidden folders are passed over; unreadable ones are logged. Links to folders around
    ``root`` are not followed.

    Args:
        root: where to begin; itself among them.
        descend: whether to look into a folder of that name.
    """
    above = [folder.stat() for folder in Path(os.path.realpath(root)).parents]
    seen = {(status.st_dev, status.st_ino) for status in above}
    folders, links = [str(root)], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            _warn_once(folder, error.strerror)
            continue
        yield folder, entries
        deeper = [each for each in entries if each.name[0] != "." and is_folder(each) and descend(each.name)]
        folders += [each.path for each in reversed(deeper) if not each.is_symlink()]
        links += [each.path for each in deeper if each.is_symlink()]


@functools.cache
def _warn_once(folder: str, reason: str) -> None:
    """Every reader walks through the zoo until one knows it."""
    _LOG.warning("%s: cannot be read (%s); passed over", folder, reason)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link that leads nowhere or in circles is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False
