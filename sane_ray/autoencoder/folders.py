"""What a folder is that is not the folder of a model, and where models are near it. Only for messages: never fails."""

from __future__ import annotations

from pathlib import Path

from sane_ray.nearby import LISTED, inside, is_zoo, near

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


def instead_of_model(folder: Path) -> str:
    """What is in the place of a model, where models are to be found, and which are near, as the end of a sentence."""
    if is_zoo(folder):
        return (
            "is a zoo of checkpoints, and --model names a trained SANE: name the zoo by --source to embed it with one; "
            f"to train one on it, `python jobs/prepare.py --source {folder} --store STORE` and `python "
            f"jobs/pretrain.py --store STORE`{near(folder, _holds_model)}"
        )
    what = _what_is(folder) if folder.is_dir() else "is a file" if folder.is_file() else "does not exist"
    return f"{what}; {WHERE}{near(folder, _holds_model)}"


def is_model(folder: Path) -> bool:
    """Whether a folder has the files of a trained model."""
    return (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def _holds_model(folder: Path) -> bool:
    return is_model(folder) or is_model(folder / MODEL_FOLDER)


def _what_is(folder: Path) -> str:
    known = next((words for name, words in _KNOWN.items() if (folder / name).is_file()), None)
    if known is not None:
        return known
    names = [path.name + "/" * path.is_dir() for path in inside(folder)]
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return f"holds {', '.join(names[:LISTED])}{more}, and no model" if names else "is empty"
