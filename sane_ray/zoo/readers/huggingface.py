"""Hugging Face models: safetensors or ``pytorch_model.bin`` in folders, hub caches, adapters and trainer checkpoints.

A folder is a model if one of ``_WEIGHTS`` is in it. Of several files with the same weights the safetensors are read,
and never both. Configs, model cards and headers of safetensors are read when a zoo is listed, weights never; what is
damaged of the former costs a warning, not the model.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.zoo import checkpoint
from sane_ray.zoo.checkpoint import LONGEST_HEADER, Checkpoint, SafetensorsCheckpoint
from sane_ray.zoo.model_card import ModelCard, number, read_card
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.readers.folders import walk
from sane_ray.zoo.readers.side_files import flat, object_of
from sane_ray.zoo.tables import clean_text, plain_value

NAME = "huggingface"
LOOKS_FOR = (
    "Hugging Face models (model.safetensors, *.safetensors.index.json, pytorch_model.bin, adapter_model.safetensors, "
    "diffusion_pytorch_model.safetensors), loose or in a hub cache"
)

_LOG = logging.getLogger(__name__)

_WEIGHTS = {
    "model": (
        "model.safetensors",
        "model.safetensors.index.json",
        "model.safetensors.index.*.json",  # variants, such as fp16
        "model.*.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model.*.bin",
    ),
    "adapter": (
        "adapter_model.safetensors",
        "adapter_model.safetensors.index.json",
        "adapter_model.bin",
    ),
    "diffusion": (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.*.safetensors",
        "diffusion_pytorch_model.bin",
    ),
}
"""Names of files that are a model, by what they are a model of, best first."""

_OTHER_WEIGHTS = ("*.safetensors.index.json", "*-of-*.safetensors", "*-of-*.bin")
"""Where none of those is there; shards without their index are refused by name when they are opened."""

_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_LONE_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_STEP = re.compile(r"checkpoint[-_](\d{1,18})")
_CACHED = re.compile(r"(?:models|datasets|spaces)--(.+)")
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LONGEST_SETTING = 4096  # characters; what is longer in a header is no hyperparameter but, say, a thumbnail
_LABELS = ("id2label", "label2id")


@dataclass(frozen=True)
class _Found:
    """Weights in a folder, before their neighbours are known."""

    model: str
    step: int | None
    folder: Path
    file: str
    kind: str


def discover(root: Path) -> list[Record]:
    """Lists the models under a folder, or the one of a file, in order of name and then epoch.

    A model is named after its folder, in a hub cache after its repository. Of several revisions of a repository only
    that of ``refs/main`` is listed, else the newest. ``checkpoint-500`` is epoch 500 of the model in the folder above,
    whose own weights are the last of its epochs.
    """
    base = Path(os.path.abspath(root))  # noqa: PTH100 (without following the links of a cache)
    if base.is_file():
        folders: Iterable[tuple[Path, list[str]]] = [(base.parent, [base.name])]
        base = base.parent
    else:
        base = base.parent if base.name == "snapshots" and _CACHED.fullmatch(base.parent.name) else base
        folders = _folders(base)
    found = [_found(base, folder, file, kind) for folder, files in folders for kind, file in _weights(files)]
    last_steps: dict[str, int] = {}
    for one in found:
        last_steps[one.model] = max(one.step or 0, last_steps.get(one.model, 0))
    found.sort(key=lambda one: (one.model, one.step is None, one.step, str(one.folder), one.file))
    cards: dict[Path, ModelCard] = {}
    records: dict[str, Record] = {}
    for one in found:
        record = _record(base, one, last_steps[one.model], cards, records)
        records[record.id] = record
    return sorted(records.values(), key=lambda record: (record.model, record.epoch))


def open_checkpoint(record: Record) -> Checkpoint:
    """Opens the weights of one of the records; of safetensors, reads the headers alone.

    Raises:
        InputError: A file is damaged, missing or needs code to be read; an index does not fit its shards, or leads out
            of its folder.
    """
    path = Path(record.path)
    if _INDEX.search(path.name):
        files = _shards(path)
        if path.name.startswith("pytorch_model"):
            return TorchShards(path, files)
        _warn_of_unnamed(path, files)
        with _naming(path):
            return SafetensorsCheckpoint(path, files)
    if _LONE_SHARD.search(path.name):
        raise InputError(
            f"{path}: one of several shards, without their index; download the index (*.index.json) beside them, and "
            "name their folder"
        )
    return checkpoint.open_checkpoint(path)


class TorchShards(Checkpoint):
    """One checkpoint of several torch files.

    Args:
        index: What names them, for messages.
        files: The file of every key.

    Keys come in the order of the files and in them, which is that of the state dict.

    Raises:
        InputError: A file cannot be read without running code, or lacks a key that it should have.
    """

    def __init__(self, index: Path, files: dict[str, Path]) -> None:
        self.path = str(index)
        with _naming(index):
            shards = {file: checkpoint.open_checkpoint(file) for file in sorted(set(files.values()))}
        for key, file in files.items():
            if key not in shards[file].meta:
                raise InputError(f"{index}: says that {file} holds tensor {key!r}, which is not there; get both again")
        for file, shard in shards.items():
            _warn_of_extra(index, file, [key for key in shard.meta if key not in files])
        self._shard = {key: shard for file, shard in shards.items() for key in shard.meta if files.get(key) == file}
        self.meta = {key: shard.meta[key] for key, shard in self._shard.items()}
        self.is_lazy = all(shard.is_lazy for shard in shards.values())

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See ``Checkpoint.read``."""
        return self._shard[key].read(key, start, stop)


def _shards(index: Path) -> dict[str, Path]:
    """The file of every key, all of them in the index's folder and there."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: no index of shards ({error!r}); download it again, or remove it") from error
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: its weight_map names no tensors; download it again, or remove it")
    for key, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{index}: the shard of tensor {key!r} is {name!r}, no name of a file; download it again")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(
                f"{index}: the shard {name} of tensor {key!r} lies outside of the model's folder, where no shard of a "
                "model has to be; correct the index, or do not use this model"
            )
        if not (index.parent / name).is_file():
            raise InputError(
                f"{index}: the shard {name} of tensor {key!r} is missing; download it, or remove the model"
            )
    return {key: index.parent / name for key, name in names.items()}


@contextmanager
def _naming(index: Path) -> Iterator[None]:
    """Says of an error in a shard which index it belongs to."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(index)):
            raise
        raise InputError(f"{index}: one of its shards cannot be read: {error}") from error


def _warn_of_unnamed(index: Path, files: dict[str, Path]) -> None:
    for file in sorted(set(files.values())):
        _warn_of_extra(index, file, [key for key in _header(file) if key not in files and key != "__metadata__"])


def _warn_of_extra(index: Path, file: Path, keys: list[str]) -> None:
    if keys:
        _LOG.warning("%s: does not name %d tensors of %s, which are left out: %s", index, len(keys), file.name, keys)


def _folders(base: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder with the names of its files; of a repository in a hub cache those of one revision."""
    for folder, names, files in walk(base):
        if _CACHED.fullmatch(folder.name) and "snapshots" in names:
            names.clear()
            yield from _snapshot(folder)
        else:
            yield folder, files


def _snapshot(repository: Path) -> list[tuple[Path, list[str]]]:
    """The folders of the revision of refs/main, else of the newest one, that has weights."""
    try:
        main = repository / "refs" / "main"
        wanted = main.read_text().strip() if main.is_file() else None
        snapshots = [path for path in (repository / "snapshots").iterdir() if path.is_dir()]
        snapshots.sort(key=lambda path: (path.name != wanted, -path.stat().st_mtime_ns, path.name))
    except (OSError, ValueError) as error:
        _LOG.warning("%s cannot be read (%s) and is passed over", repository, error)
        return []
    for snapshot in snapshots:
        folders = list(_folders(snapshot))
        if any(next(_weights(files), None) for _, files in folders):
            how = "that of refs/main" if snapshot.name == wanted else "the newest with weights, refs/main has none"
            level = logging.INFO if snapshot.name == wanted or len(snapshots) == 1 else logging.WARNING
            _LOG.log(level, "%s: reading revision %s of %d: %s", repository, snapshot.name, len(snapshots), how)
            return folders
    return []


def _weights(files: list[str]) -> Iterator[tuple[str, str]]:
    """What is a model among the files of a folder: its kind, and the best file of that kind."""
    best = {kind: _best(patterns, files) for kind, patterns in _WEIGHTS.items()}
    if not any(best.values()):
        best = {"model": _best(_OTHER_WEIGHTS, files)}
    yield from ((kind, file) for kind, file in best.items() if file is not None)


def _best(patterns: tuple[str, ...], files: list[str]) -> str | None:
    """The first file that matches; an index that has lost all its shards only where nothing else does."""
    matches = [name for pattern in patterns for name in files if fnmatchcase(name, pattern)]
    endings = {Path(name).suffix for name in files}
    whole = (name for name in matches if not _INDEX.search(name) or Path(_INDEX.sub("", name)).suffix in endings)
    return next(whole, matches[0] if matches else None)


def _found(base: Path, folder: Path, file: str, kind: str) -> _Found:
    parts = _parts(base, folder)
    steps = [int(match[1]) for part in parts if (match := _STEP.fullmatch(part))]
    names = [part for part in parts if not _STEP.fullmatch(part)]
    return _Found("/".join(names), steps[-1] if steps else None, folder, file, kind)


def _parts(base: Path, folder: Path) -> list[str]:
    """What a model and its epoch are called, from the folder's path: a cached repository by its own name."""
    parts = folder.parts
    for i in range(len(parts) - 3, -1, -1):
        match = _CACHED.fullmatch(parts[i])
        if match and parts[i + 1] == "snapshots":
            return [match[1].replace("--", "/", 1), *parts[i + 3 :]]
    below = folder.relative_to(base).parts
    if any(not _STEP.fullmatch(part) for part in below):
        return list(below)
    return [*(base.parts[-2:] if _STEP.fullmatch(base.name) else [base.name]), *below]


def _record(base: Path, one: _Found, last_step: int, cards: dict[Path, ModelCard], taken: dict[str, Record]) -> Record:
    path = one.folder / one.file
    trainer = object_of(one.folder / "trainer_state.json")
    own_step = trainer.get("global_step")
    if not isinstance(own_step, int) or not 0 <= own_step < 2**63:
        own_step = last_step
    epoch = own_step if one.step is None else one.step
    card, is_own = _card(base, one.folder, cards)
    config = _config(one.folder / "config.json")
    if one.kind == "adapter":
        config |= _config(one.folder / "adapter_config.json")
    bases = (config.get("base_model_name_or_path"), config.get("_name_or_path"))
    named = [name for name in bases if isinstance(name, str) and _is_other_repository(name, one.model)]
    id_ = f"{one.model}/{epoch}"
    return Record(
        id=id_ if id_ not in taken else f"{id_} ({path.relative_to(base).as_posix()})",
        model=one.model,
        epoch=epoch,
        path=str(path),
        properties=card.properties | (card.metrics if is_own else {}) | _measured(trainer, epoch),
        config=config | _header_settings(path) | _training(trainer) | card.config,
        reader=NAME,
        license=card.license,
        parents=tuple(dict.fromkeys([*card.base_models, *named])),
        split=card.split,
    )


def _card(base: Path, folder: Path, cards: dict[Path, ModelCard]) -> tuple[ModelCard, bool]:
    """The card of the folder, and True; else the nearest above it in its repository or zoo, and False."""
    for above in (folder, *folder.parents):
        path = above / "README.md"
        if path.is_file():
            if path not in cards:
                cards[path] = read_card(path)
            return cards[path], above == folder
        if above.parent.name == "snapshots" or (above == base and not _is_in_snapshot(above)):
            break
    return ModelCard(), True


def _is_in_snapshot(folder: Path) -> bool:
    return any(above.name == "snapshots" and _CACHED.fullmatch(above.parent.name) for above in folder.parents)


def _is_other_repository(name: str, model: str) -> bool:
    """Whether a config's ``_name_or_path`` names a repository, and not a local path or the model itself."""
    if not _REPOSITORY.fullmatch(name) or _STEP.search(name):
        return False
    short = name.count("/") == 0 or model.count("/") == 0
    return name.split("/")[-1] != model.split("/")[-1] if short else name != model


def _measured(trainer: dict[str, Any], step: int) -> dict[str, Value]:
    """What a trainer measured at a step."""
    history = trainer.get("log_history")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    values = {key: value for row in rows if row.get("step") == step for key, value in row.items()}
    values = {key: value for key, value in values.items() if key not in ("step", "epoch")}
    if trainer.get("global_step") == step:
        values["trained_epochs"] = trainer.get("epoch")
    return {clean_text(key): plain_value(value) for key, value in values.items() if isinstance(value, int | float)}


def _training(trainer: dict[str, Any]) -> dict[str, Value]:
    keys = ("num_train_epochs", "max_steps", "train_batch_size")
    return {f"trainer::{key}": plain_value(trainer[key]) for key in keys if isinstance(trainer.get(key), int | float)}


def _header_settings(path: Path) -> dict[str, Value]:
    """Settings that some zoos (Model-J) keep in the ``__metadata__`` of a safetensors header."""
    metadata = _header(path).get("__metadata__") if path.suffix == ".safetensors" else None
    settings = metadata.items() if isinstance(metadata, dict) else ()
    return {
        f"metadata::{key}": number(value)
        for key, value in settings
        if key != "format" and isinstance(value, str) and len(value) <= _LONGEST_SETTING
    }


def _header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file; nothing of a damaged one, since whoever opens its weights says what is wrong."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= LONGEST_HEADER else None
    except (OSError, ValueError, struct.error, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _config(path: Path) -> dict[str, Value]:
    return flat(object_of(path), labels=_LABELS)
