"""What a folder is that is not the folder of a model, and where models are near it. Only for messages: never fails."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

MODEL_FOLDER = "model"
"""Of a run: where its model is."""

WHERE = (
    f"name the folder of a run (results/runs/<run>), or the folder {MODEL_FOLDER}/ inside it, which holds "
    f"{CONFIG_FILE} and {WEIGHTS_FILE}"
)

_KNOWN = {
    "store.json": "is a token store",
    "embeddings.json": "holds embeddings",
    "run.json": "is a run that has not written its model yet (the command that began it goes on)",
}
"""What a folder is by a file in it."""

_LISTED = 3
_LOOKED_AT = 300
"""Folders that are looked into at most."""
_DEEPEST = 3


def instead_of_model(folder: Path) -> str:
    """What is in the place of a model, where models are to be found, and which are near, as the end of a sentence."""
    if folder.is_dir():
        return f"{_what_is(folder)}; {WHERE}{_listed(_models(folder) or _models(folder.parent))}"
    what = "is a file" if folder.is_file() else "does not exist"
    above = next((above for above in folder.absolute().parents if above.is_dir()), Path("/"))
    models = sorted(_models(above), key=lambda model: -_alike(model, folder))
    return f"{what}; {WHERE}{_listed(models)}"


def _what_is(folder: Path) -> str:
    known = next((words for name, words in _KNOWN.items() if (folder / name).is_file()), None)
    if known is not None:
        return known
    names = [path.name + "/" * path.is_dir() for path in _inside(folder)]
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return f"holds {', '.join(names[:_LISTED])}{more}, and no model" if names else "is empty"


def _models(folder: Path) -> list[Path]:
    """Runs and models below a folder, near ones first."""
    found, level, looked_at = list[Path](), [folder], 0
    for _ in range(_DEEPEST):
        below = [path for each in level for path in _inside(each) if path.is_dir()]
        below = below[: max(0, _LOOKED_AT - looked_at)]
        looked_at += len(below)
        models = [path for path in below if _is_model(path) or _is_model(path / MODEL_FOLDER)]
        found += models
        level = [path for path in below if path not in models]
    return found


def _is_model(folder: Path) -> bool:
    return (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def _inside(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except OSError:
        return


def _listed(models: list[Path]) -> str:
    if not models:
        return ""
    more = f" and {len(models) - _LISTED:,} more" if len(models) > _LISTED else ""
    return f"; near it are {', '.join(map(str, models[:_LISTED]))}{more}"


def _alike(one: Path, other: Path) -> float:
    return difflib.SequenceMatcher(None, one.name, other.name).ratio()
