"""One walk through a zoo's folders for every reader: in an order that no file system can change, each folder once.

Never opens a file, never enters a hidden folder, and never fails for a folder that may not be read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

_LOG = logging.getLogger(__name__)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields ``root`` and every folder below it, parents first, with the names of its folders and files, sorted.

    Links are followed, but each folder is visited once, so that a link to a parent ends there. A folder that cannot be
    read is logged and passed over. Remove a name from the list of folders to keep the walk out of it.
    """
    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, followlinks=True, onerror=_unreadable):
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in seen:
            names.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(folder), names, sorted(files)


def _unreadable(error: OSError) -> None:
    _LOG.warning("%s cannot be read (%s) and is passed over", error.filename, error.strerror)
