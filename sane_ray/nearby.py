"""Folders of some kind near a path that is none, for messages that tell what may have been meant. Never fails."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

LISTED = 3
_LOOKED_AT = 300
"""Folders that are looked into at most."""
_DEEPEST = 3

_CHECKPOINTS = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".h5", ".keras")
"""How files of weights are called."""


def near(path: Path, is_one: Callable[[Path], bool]) -> str:
    """The end of a sentence that names some folders of a kind; empty if there are none.

    Args:
        path: What was named. Below it and then beside it is looked if it is a folder, else below the first folder
            above that there is, for what is called most like it.
        is_one: Whether a folder is of the kind.
    """
    if path.is_dir():
        return _listed(below(path, is_one) or below(path.parent, is_one))
    above = next((above for above in path.absolute().parents if above.is_dir()), Path("/"))
    return _listed(sorted(below(above, is_one), key=lambda found: -_alike(found, path)))


def below(folder: Path, is_one: Callable[[Path], bool]) -> list[Path]:
    """Folders of a kind below a folder, near ones first; none is looked for in one of them."""
    found, level, looked_at = list[Path](), [folder], 0
    for _ in range(_DEEPEST):
        inner = [path for each in level for path in inside(each) if path.is_dir()]
        inner = inner[: max(0, _LOOKED_AT - looked_at)]
        looked_at += len(inner)
        ours = [path for path in inner if is_one(path)]
        found += ours
        level = [path for path in inner if path not in ours]
    return found


def inside(folder: Path) -> Iterator[Path]:
    """What is in a folder, but for hidden files, in order of name; nothing if it cannot be read."""
    try:
        yield from sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except OSError:
        return


def is_zoo(folder: Path) -> bool:
    """Whether a folder looks like many checkpoints: folders of models, or several files of weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict) and {"zoo", "images"} <= config.keys():  # of jobs/build_zoo.py
        return True
    found = list(inside(folder))
    models = sum((path / "params.json").is_file() and (path / "result.json").is_file() for path in found)
    return models > 1 or sum(_is_weights(path.name) for path in found) > 1


def _is_weights(name: str) -> bool:
    return name.endswith(_CHECKPOINTS) and "-of-" not in name  # which is a piece of one model


def _listed(found: list[Path]) -> str:
    if not found:
        return ""
    more = f" and {len(found) - LISTED:,} more" if len(found) > LISTED else ""
    return f"; near it are {', '.join(map(str, found[:LISTED]))}{more}"


def _alike(one: Path, other: Path) -> float:
    return difflib.SequenceMatcher(None, one.name, other.name).ratio()
