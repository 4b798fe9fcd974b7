"""What a zoo holds: one record a checkpoint, in an order that no file system can change.

Knows no format itself (``zoo/readers`` does), and never opens the weights.
"""

from __future__ import annotations

from pathlib import Path

from sane_ray.errors import InputError
from sane_ray.zoo.checkpoint import Checkpoint
from sane_ray.zoo.readers import Record, tune

__all__ = ["Record", "discover", "open_record"]

_READERS = (tune,)
_REMEDY = "name the folder of a zoo, or build one with `python jobs/build_zoo.py`"


def discover(source: str | Path) -> list[Record]:
    """Lists the checkpoints of a zoo, models in order of name and then epoch.

    Args:
        source: folder of the zoo, in any format of ``zoo/readers``.

    Returns:
        At least one record; ids are unique.

    Raises:
        InputError: no such folder, or none of its contents is a zoo: says what was looked for.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(
            f"--source {root} {what}: name the folder of a zoo, or build one with `python jobs/build_zoo.py`"
        )
    for reader in _READERS:
        records = reader.discover(root)
        if records:
            return sorted(records, key=lambda record: (record.model, record.epoch))
    looked_for = "; ".join(reader.LOOKS_FOR for reader in _READERS)
    raise InputError(f"--source {root} holds no checkpoints: looked for {looked_for}; {_REMEDY}")


def open_record(record: Record) -> Checkpoint:
    """Opens the weights of a record with the reader that found it.

    Raises:
        InputError: They cannot be read without running code, or the file is damaged.
    """
    reader = next(reader for reader in _READERS if record.reader == reader.NAME)
    return reader.open_checkpoint(record)
