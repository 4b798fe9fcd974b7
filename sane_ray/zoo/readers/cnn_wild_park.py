"""The CNN Wild Park (Kofinas et al., arXiv 2403.12143): CNNs of many architectures, extracted or inside their zip.

``…/<run>/checkpoint_<number>/checkpoint.pt`` holds the weights beside the optimiser's state, the model's settings and
its last results. A zip is read in place, member by member, and never extracted. What the checkpoints reached and how
the benchmark splits them stands in ``cnn_park_splits.json``, if that lies in the zip, beside it, or in the folder.
Never runs code: the settings are OmegaConf objects, and stand-ins of ours take their place.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from sane_ray.errors import InputError
from sane_ray.zoo.checkpoint import STAND_INS, STAND_INS_LOCK, Checkpoint, LoadedCheckpoint, find_state_dict
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.readers.folders import walk

NAME = "cnn_wild_park"
LOOKS_FOR = "run folders with checkpoint_<number>/checkpoint.pt in them, or a zip of them (CNN Wild Park)"

SPLITS = "cnn_park_splits.json"
"""``{train | val | test: {path: [], score: [], step: []}}``: the published split, by run, with the test accuracies."""

FEW = 1000
"""Up to so many checkpoints are opened to list what stands in them; of more, only ``SPLITS`` tells the properties."""

LARGEST_MEMBER = 1 << 28
"""Bytes of the largest zip member that is unpacked, in memory; the zoo's are a thousand times smaller."""

_LOG = logging.getLogger(__name__)
_FOLDER = re.compile(r"checkpoint_(\d+)")
_MEMBER = re.compile(r"(.+)/checkpoint_(\d+)/checkpoint\.pt")
_FILE = "checkpoint.pt"
_DEEPEST = 3  # settings, a list of them, its entries; a file may hold a list in itself
_AGAIN = "copy or download it again, or remove it from the zoo"


class WildParkCheckpoint(LoadedCheckpoint):
    """A checkpoint with what its file knows beside the weights.

    Attributes:
        properties: Its last results, under the names of other zoos: ``test_acc``, ``test_loss``, and ``step``.
        config: The model's settings; lists are JSON text.
    """

    def __init__(self, path: str, content: Mapping[str, Any]) -> None:
        state_dict = find_state_dict(content)
        if state_dict is None:
            raise InputError(f"{path}: no weights under the key model; {_AGAIN}")
        super().__init__(path, {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)})
        self.properties = _properties(content)
        self.config = _config(content)


@dataclass(frozen=True)
class _Place:
    """A checkpoint that was found: its run, the number of its folder, and where it lies."""

    run: str
    number: int
    path: str
    member: str = ""


@dataclass(frozen=True)
class _Published:
    """What ``SPLITS`` says of a checkpoint."""

    split: str
    properties: dict[str, Value]


def discover(root: Path) -> list[Record]:
    """Lists the checkpoints of a zip, or of a folder and the zips right in it, runs in order of name.

    A checkpoint's epoch is its step where that is known, else the number of its folder. One that lies both in a zip
    and extracted is listed once, extracted.

    Raises:
        InputError: ``root`` is a zip that cannot be read, or the file of splits is damaged.
    """
    if root.is_file():
        if root.suffix.lower() != ".zip":
            return []
        places, splits_files = _zip_places(root), [root.parent / SPLITS]
        zips = [root]
    else:
        places, splits_files = _folder_places(root)
        zips = [path for path in sorted(root.glob("*.zip")) if path.is_file()]
        taken = {(place.run, place.number) for place in places}
        for path in zips:
            places += [place for place in _readable_places(path) if (place.run, place.number) not in taken]
    if not places:
        return []
    places.sort(key=lambda place: (place.run, place.number, place.path, place.member))
    return list(_records(places, _published(splits_files, zips)))


def open_checkpoint(record: Record) -> Checkpoint:
    """Reads one checkpoint, from its zip if it lies in one.

    Returns:
        A ``WildParkCheckpoint``: it also carries the properties and settings that stand in the file.

    Raises:
        InputError: It is encrypted, damaged, missing, too large, or cannot be read without running code.
    """
    return _read(record.path, record.member)


def _records(places: list[_Place], published: Mapping[tuple[str, int], _Published]) -> Iterator[Record]:
    few = len(places) <= FEW
    if not few and not published:
        _LOG.warning(
            "%s: %d checkpoints without %s beside them are listed without properties; it comes with the zoo",
            places[0].path,
            len(places),
            SPLITS,
        )
    for place in places:
        opened = _inside(place) if few else None
        public = published.get((place.run.rpartition("/")[2], place.number))
        properties = (opened.properties if opened else {}) | (public.properties if public else {})
        step = properties.get("step")
        epoch = step if isinstance(step, int) else place.number
        yield Record(
            id=f"{place.run}/{epoch}",
            model=place.run,
            epoch=epoch,
            path=place.path,
            properties=properties,
            config=opened.config if opened else {},
            reader=NAME,
            member=place.member,
            split=public.split if public else None,
        )


def _inside(place: _Place) -> WildParkCheckpoint | None:
    """The checkpoint, or None if it cannot be read: whoever opens it will be told why."""
    try:
        return _read(place.path, place.member)
    except InputError:
        return None


def _folder_places(root: Path) -> tuple[list[_Place], list[Path]]:
    """Every run folder with at least one checkpoint, and where the file of splits may be."""
    places: list[_Place] = []
    splits_files = [root.parent / SPLITS]
    for folder, names, files in walk(root):
        numbers = {name: int(match[1]) for name in names if (match := _FOLDER.fullmatch(name))}
        if SPLITS in files:
            splits_files.insert(0, folder / SPLITS)
        if any((folder / name / _FILE).is_file() for name in numbers):
            run = root.name if folder == root else folder.relative_to(root).as_posix()
            places += [_Place(run, number, str((folder / name / _FILE).absolute())) for name, number in numbers.items()]
        names[:] = [name for name in names if name not in numbers]
    return places, splits_files


def _readable_places(path: Path) -> list[_Place]:
    """Of a zip that only happens to lie in the folder: none, if it cannot be read."""
    try:
        return _zip_places(path)
    except InputError as error:
        _LOG.warning("%s; it is passed over", error)
        return []


def _zip_places(path: Path) -> list[_Place]:
    names = sorted(set(_archive(str(path.absolute())).namelist()))
    matches = ((name, match) for name in names if (match := _MEMBER.fullmatch(name)))
    return [_Place(match[1], int(match[2]), str(path.absolute()), name) for name, match in matches]


def _archive(path: str) -> zipfile.ZipFile:
    """The zip, kept open: its directory of 100,000 names is read once a process."""
    try:
        stat = Path(path).stat()
        return _opened(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise InputError(f"{path}: truncated, missing, or no zip file ({error}); {_AGAIN}") from error


@lru_cache(maxsize=4)
def _opened(path: str, changed: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _member(path: str, name: str) -> bytes:
    """One unpacked member."""
    archive = _archive(path)
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise InputError(f"{path}: has no member {name}; list the zoo again") from None
    if info.flag_bits & 1:
        raise InputError(f"{path}: the member {name} is encrypted; unpack the zip with its password and use the folder")
    if info.file_size > LARGEST_MEMBER:
        raise InputError(
            f"{path}: the member {name} says it holds {info.file_size:,} bytes, more than {LARGEST_MEMBER:,}, "
            "which no model of this zoo has; remove it from the zip"
        )
    try:
        return archive.read(info)
    except Exception as error:  # every compression fails in its own way
        raise InputError(f"{path}: the member {name} is damaged ({error}); {_AGAIN}") from error


def _published(candidates: Iterable[Path], zips: Iterable[Path]) -> dict[tuple[str, int], _Published]:
    """What the first file of splits says, by run and number of the checkpoint's folder."""
    for path in candidates:
        if path.is_file():
            return _parse(str(path), path.read_bytes())
    for path in zips:
        try:
            names = _archive(str(path)).namelist()
        except InputError:
            continue  # it was logged when its members were listed
        for name in names:
            if name.rpartition("/")[2] == SPLITS:
                return _parse(f"{path}:{name}", _member(str(path), name))
    return {}


def _parse(name: str, data: bytes) -> dict[tuple[str, int], _Published]:
    found: dict[tuple[str, int], _Published] = {}
    try:
        for split, columns in json.loads(data).items():
            if split not in ("train", "val", "test"):
                raise ValueError(f"unknown split {split!r}")
            for path, score, step in zip(columns["path"], columns["score"], columns["step"], strict=True):
                run, folder = path.replace("\\", "/").split("/")[-3:-1]
                known: dict[str, Value] = {"score": score, "test_acc": score, "step": step}
                found[run, int(folder.removeprefix("checkpoint_"))] = _Published(split, known)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name}: not the published splits, with path, score and step for train, val and test "
            f"({type(error).__name__}: {error}); download it again, or remove it"
        ) from error
    return found


class _Node:
    """Stands for an OmegaConf object or a Python type that a file names: keeps what the file says, and does nothing."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _no_cache(*_: Any) -> dict[Any, Any]:
    """Stands for a defaultdict, in which OmegaConf keeps a cache."""
    return {}


_NODES = ("AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode", "IntegerNode", "PathNode", "StringNode")
_OMEGACONF: list[Any] = [
    (_Node, "omegaconf.dictconfig.DictConfig"),
    (_Node, "omegaconf.listconfig.ListConfig"),
    (_Node, "omegaconf.base.ContainerMetadata"),
    (_Node, "omegaconf.base.Metadata"),
    *((_Node, f"omegaconf.nodes.{name}") for name in _NODES),
    (_Node, "typing.Any"),
    *((_Node, f"builtins.{name}") for name in ("bool", "dict", "float", "int", "list", "long", "str")),
    (_no_cache, "collections.defaultdict"),
]
"""The settings are OmegaConf objects, which name these. None of them is made: ours keep what the file says of each."""


def _read(path: str, member: str) -> WildParkCheckpoint:
    name = f"{path}:{member}" if member else path
    if not member and not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file; {_AGAIN}")
    source = BytesIO(_member(path, member)) if member else path
    try:
        with STAND_INS_LOCK, torch.serialization.safe_globals([*STAND_INS, *_OMEGACONF]):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whatever way its bytes happen to lead to
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs is not None:
            raise InputError(
                f"{name}: needs Python code to be read ({needs[1]}), which may do anything, so it is refused; "
                "remove it from the zoo, or save its weights alone with the program that wrote it"
            ) from error
        raise InputError(f"{name}: damaged, or no checkpoint ({type(error).__name__}); {_AGAIN}") from error
    return WildParkCheckpoint(name, content)


def _properties(content: Mapping[str, Any]) -> dict[str, Value]:
    results = content.get("last_result")
    measured = results.items() if isinstance(results, Mapping) else ()
    values: dict[str, Value] = {
        key.replace("/", "_"): value for key, value in measured if "/" in str(key) and isinstance(value, int | float)
    }
    if isinstance(content.get("iteration"), int):
        values["step"] = content["iteration"]
    return values


def _config(content: Mapping[str, Any]) -> dict[str, Value]:
    settings = _plain(content.get("config"))
    if not isinstance(settings, dict):
        return {}
    return {
        str(key): value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in settings.items()
    }


def _plain(value: Any, depth: int = 0) -> Any:
    """Settings as dicts, lists, numbers and strings; what is none of them is None."""
    if isinstance(value, _Node):
        state = value.state if isinstance(value.state, dict) else {}
        value = state.get("_content", state.get("_val"))
    if depth < _DEEPEST and isinstance(value, dict):
        return {str(key): _plain(each, depth + 1) for key, each in value.items()}
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(each, depth + 1) for each in value]
    return value if isinstance(value, bool | int | float | str) else None
