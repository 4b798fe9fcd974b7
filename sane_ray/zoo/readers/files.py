"""Loose checkpoint files: one file, or all of a folder with the suffixes that people give them.

A file is a model, but for files of one folder whose names differ only in the epoch: those are one model's checkpoints.
Passes over hidden files and folders, and over what trainers save beside the weights (``optimizer.pt``), by name. Never
opens a file to find out what it is: one that is no checkpoint is named when it is opened.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sane_ray.errors import InputError
from sane_ray.zoo import checkpoint
from sane_ray.zoo.checkpoint import Checkpoint
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.readers.folders import is_folder, scan

NAME = "files"
SUFFIXES = (".pt", ".pth", ".pt.tar", ".pth.tar", ".bin", ".ckpt", ".safetensors")
LOOKS_FOR = f"checkpoint files ({' '.join(SUFFIXES)})"

_LOG = logging.getLogger(__name__)

_SUFFIX = re.compile("|".join(re.escape(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True)) + "$", re.I)
_NO_WEIGHTS = re.compile(
    r"(optim(izer)?|(lr_)?scheduler|(grad_)?scaler|training_args|rng_states?|random_states?)([._-]?\d+)*"
    r"|.+[._-](optim(izer)?|optim_states|(lr_)?scheduler)",
    re.IGNORECASE,
)
"""Names, without suffix, of what trainers save beside the weights."""

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
_NUMBER = re.compile(r"(?<![a-z])(epochs?|ep|e(?=[_=-])|steps?|iter|checkpoint|ckpt)[_=-]?(\d{1,15})(?![\d.])", re.I)
_EPOCH_WORDS = ("epoch", "epochs", "ep", "e")
_METRIC = re.compile(r"(?<![a-z])((?:(?:train|val|test)[_-])?(?:acc|accuracy|loss))[_=-](\d+\.\d+)(?!\d)", re.I)
"""``epoch=3-val_loss=0.25``: what the checkpoints of one model differ in."""

_TRANSFORMER_ZOO = re.compile(r"(.+)_(\d{1,5})_(\d+\.\d+)")
"""Small Transformer Zoo: run, epoch, accuracy."""
_SIREN_FOLDER, _SIREN = re.compile(r".+_(\d+)s"), re.compile(r"net\d+")
"""Implicit representations of the Neural Functional Networks: ``<prefix>_<label>s/net<index>.pth``."""
_INR_FOLDER = re.compile(r"\w+_png_(?:\w+_)?(\d+)_\d+")
"""Those of DWSNets: ``mnist_png_training_<label>_<index>/<folder>/<file>.pth``."""


@dataclass(frozen=True)
class _File:
    path: Path
    folder: PurePosixPath
    """Inside the root."""
    stem: str
    suffix: str


@dataclass(frozen=True)
class _Place:
    """What a file's name says: the epoch, and the model it belongs to, under a short name and a longer one."""

    short: PurePosixPath
    long: PurePosixPath
    epoch: int = 0
    properties: dict[str, Value] = field(default_factory=dict)
    refused: str = ""


def discover(root: Path) -> list[Record]:
    """Lists the checkpoint files under a folder, or the one file, in order of model and epoch.

    The name of a model is its file's path inside the root without suffix, or with it where two would have the same.
    Links are followed; a link to a file that is listed anyway is not.
    """
    by_folder: dict[PurePosixPath, list[_File]] = defaultdict(list)
    for path in _paths(root):
        match = _SUFFIX.search(path.name)
        suffix = match[0] if match else ""
        folder = PurePosixPath(path.parent.relative_to(root if root.is_dir() else root.parent).as_posix())
        by_folder[folder].append(_File(path, folder, path.name.removesuffix(suffix), suffix))
    places = [pair for files in by_folder.values() for pair in _places(files)]
    names = _names([place for _, place in places], root)
    records = [_record(file, place, names[place.long, place.short]) for file, place in places]
    return sorted(records, key=lambda record: (record.model, record.epoch))


def open_checkpoint(record: Record) -> Checkpoint:
    """Opens one of the files.

    Raises:
        InputError: It is damaged, no checkpoint, or cannot be read without running code; or a model in shards.
    """
    if record.member:
        raise InputError(
            f"{record.path}: is {record.member}, which only an index puts together; get the index "
            "(model.safetensors.index.json) into their folder, and read it with --reader huggingface"
        )
    return checkpoint.open_checkpoint(record.path)


def _paths(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if _SUFFIX.search(root.name) or "." not in root.name else []
    files, links, passed_over = list[str](), list[str](), 0
    for _, entries in scan(root) if root.is_dir() else ():
        for entry in entries:
            match = _SUFFIX.search(entry.name)
            if match is None or entry.name[0] == "." or is_folder(entry):
                continue
            if _NO_WEIGHTS.fullmatch(entry.name[: match.start()]):
                passed_over += 1
            else:
                (links if entry.is_symlink() else files).append(entry.path)
    if passed_over:
        _LOG.info("%s: %d files of optimisers and the like passed over by name", root, passed_over)
    targets = {os.path.realpath(path): path for path in files} if links else {}
    for path in sorted(links):
        targets.setdefault(os.path.realpath(path), path)
    return [Path(path) for path in sorted(targets.values() if links else files)]


def _places(files: list[_File]) -> Iterator[tuple[_File, _Place]]:
    """Models and epochs of the files of one folder."""
    shards: dict[tuple[str, str, str], list[_File]] = defaultdict(list)
    others = []
    for file in files:
        match = _SHARD.fullmatch(file.stem)
        if match and int(match[2]) > 1:
            shards[match[1], match[2], file.suffix].append(file)
        else:
            others.append(file)
    for (stem, total, suffix), members in shards.items():
        long = members[0].folder / f"{stem}-of-{total}{suffix}"
        refused = f"one of {int(total)} shards of one model ({len(members)} of them are here)"
        yield members[0], _Place(members[0].folder / stem, long, refused=refused)
    runs = [_TRANSFORMER_ZOO.fullmatch(file.stem) for file in others]
    if len(runs) > 1 and all(runs):
        for file, run in zip(others, runs, strict=True):
            assert run is not None
            model = file.folder / run[1]
            yield file, _Place(model, model, int(run[2]), {"acc": float(run[3])})
    else:
        yield from _epochs(others)


def _epochs(files: list[_File]) -> Iterator[tuple[_File, _Place]]:
    """Files whose names differ only in epoch, step and metrics are one model's; the others a model each."""
    groups: dict[str, list[_File]] = defaultdict(list)
    for file in files:
        groups[_NUMBER.sub(r"\1#", _METRIC.sub(r"\1#", file.stem)) + file.suffix].append(file)
    for pattern, members in groups.items():
        epochs = _distinct_numbers(members) if len(members) > 1 else None
        for index, file in enumerate(members):
            named: dict[str, Value] = {
                name.lower().replace("-", "_"): float(value) for name, value in _METRIC.findall(file.stem)
            }
            if epochs is None:
                short, long = file.folder / file.stem, file.folder / f"{file.stem}{file.suffix}"
                yield file, _Place(short, long, 0, _label(file) | named)
            else:
                name = re.sub(r"([_=. -])[_=. -]+", r"\1", _NUMBER.sub("", _METRIC.sub("", file.stem))).strip("_=. -")
                yield file, _Place(file.folder / name, file.folder / pattern, epochs[index], _label(file) | named)


def _distinct_numbers(files: list[_File]) -> list[int] | None:
    """The epoch of each file: the number after an epoch's word, or else after another; None if it tells none apart."""
    found = [_NUMBER.findall(file.stem) for file in files]
    columns = list(zip(*found, strict=True))
    for column in sorted(columns, key=lambda column: column[0][0].lower() not in _EPOCH_WORDS):
        numbers = [int(number) for _, number in column]
        if len(set(numbers)) == len(numbers):
            return numbers
    return None


def _label(file: _File) -> dict[str, Value]:
    """What an implicit representation shows, where its path says so."""
    match = _SIREN_FOLDER.fullmatch(file.path.parent.name) if _SIREN.fullmatch(file.stem) else None
    match = match or _INR_FOLDER.fullmatch(file.path.parent.parent.name)
    return {"label": int(match[1])} if match else {}


def _names(places: list[_Place], root: Path) -> dict[tuple[PurePosixPath, PurePosixPath], str]:
    """A name of its own for every model, by its long and short one."""
    models = sorted({(place.long, place.short) for place in places})
    claims = Counter(short for _, short in models)
    names: dict[tuple[PurePosixPath, PurePosixPath], str] = {}
    taken: set[str] = set()
    for long, short in models:
        name = (short if claims[short] == 1 else long).as_posix()
        name = root.absolute().name if name == "." else name
        while name in taken:
            name += "~"
        taken.add(name)
        names[long, short] = name
    return names


def _record(file: _File, place: _Place, model: str) -> Record:
    return Record(
        id=f"{model}/{place.epoch}",
        model=model,
        epoch=place.epoch,
        path=str(file.path.absolute()),
        properties=place.properties,
        reader=NAME,
        member=place.refused,
    )
