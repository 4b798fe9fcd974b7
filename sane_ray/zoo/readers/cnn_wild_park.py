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
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from sane_ray.errors import InputError
from sane_ray.zoo.checkpoint import LIMITS, Checkpoint, LoadedCheckpoint, load_safely, state_dict_in
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.readers.folders import walk
from sane_ray.zoo.tables import clean_text

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
_MEMBER = re.compile(r"(.+)/checkpoint_(\d+)/checkpoint\.pt", re.DOTALL)
_DIGITS = 18  # of a folder's number: one with more is no epoch, which are below 2**63
_FILE = "checkpoint.pt"
_DEEPEST = 3  # settings, a list of them, its entries; a file may hold a list in itself
_MOST_SETTINGS = 10_000  # values; a file may hold a list a thousand times in a list that it holds a thousand times
_LONGEST_SETTING = 4096  # characters
_LONGEST_REASON = 200  # characters of an error, which may repeat what the file says
_AGAIN = "copy or download it again, or remove it from the zoo"


class WildParkCheckpoint(LoadedCheckpoint):
    """A checkpoint with what its file knows beside the weights.

    Args:
        path: The file, for messages.
        content: What it holds.
        size: Its bytes.

    Attributes:
        properties: Its last results, under the names of other zoos: ``test_acc``, ``test_loss``, and ``step``.
        config: The model's settings; lists are JSON text.

    Raises:
        InputError: No weights are in it, or such as ``state_dict_in`` refuses.
    """

    def __init__(self, path: str, content: Any, size: int) -> None:
        super().__init__(path, state_dict_in(content, path, size))
        self.properties, self.config = _known(path, content)


@dataclass(frozen=True)
class _Place:
    """A checkpoint that was found: its run, the number of its folder, and where it lies."""

    run: str
    number: int
    path: str
    member: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.path}:{self.member}" if self.member else self.path

    @property
    def folder(self) -> str:
        """Name of its own folder."""
        return (self.member or self.path).rpartition("/")[0].rpartition("/")[2]


@dataclass(frozen=True)
class _Published:
    """What ``SPLITS`` says of a checkpoint."""

    split: str
    properties: dict[str, Value]


def discover(root: Path) -> list[Record]:
    """Lists the checkpoints of a zip, or of a folder and the zips right in it, runs in order of name.

    A checkpoint's epoch is its step where that is known, else the number of its folder; that of all checkpoints of a
    run in which two would have one epoch. One that lies both in a zip and extracted is listed once, extracted.

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
    name = f"{record.path}:{record.member}" if record.member else record.path
    return WildParkCheckpoint(name, *_content(record.path, record.member))


def _records(places: list[_Place], published: Mapping[tuple[str, int], _Published]) -> Iterator[Record]:
    few = len(places) <= FEW
    if not few and not published:
        _LOG.warning(
            "%s: %d checkpoints without %s beside them are listed without properties; it comes with the zoo",
            places[0].path,
            len(places),
            SPLITS,
        )
    for run, of_run in groupby(places, key=lambda place: place.run):
        yield from _of_run(run, list(of_run), published, few)


def _of_run(
    run: str, places: list[_Place], published: Mapping[tuple[str, int], _Published], few: bool
) -> Iterator[Record]:
    known = [_inside(place) if few else ({}, {}) for place in places]
    public = [published.get((run.rpartition("/")[2], place.number)) for place in places]
    properties = [mine | (each.properties if each else {}) for (mine, _), each in zip(known, public, strict=True)]
    epochs = [_epoch(place, values) for place, values in zip(places, properties, strict=True)]
    if len(set(epochs)) < len(epochs):
        _LOG.warning(
            "%s: two checkpoints of %s have one step, so its epochs are the folders' numbers", places[0].path, run
        )
        epochs = [place.number for place in places]
    for index, (place, epoch) in enumerate(zip(places, epochs, strict=True)):
        split = public[index]
        yield Record(
            id=f"{run}/{epoch if epoch not in epochs[:index] else place.folder}",  # checkpoint_01 beside checkpoint_1
            model=run,
            epoch=epoch,
            path=place.path,
            properties=properties[index],
            config=known[index][1],
            reader=NAME,
            member=place.member,
            split=split.split if split else None,
        )


def _epoch(place: _Place, properties: Mapping[str, Value]) -> int:
    step = properties.get("step")
    return step if type(step) is int and step >= 0 else place.number


def _inside(place: _Place) -> tuple[dict[str, Value], dict[str, Value]]:
    """Properties and settings of a checkpoint; none where it cannot be read: whoever opens it will be told why."""
    try:
        content, _ = _content(place.path, place.member, device="meta")
    except InputError:
        return {}, {}
    return _known(place.name, content)


def _folder_places(root: Path) -> tuple[list[_Place], list[Path]]:
    """Every run folder with at least one checkpoint, and where the file of splits may be."""
    places: list[_Place] = []
    splits_files = [root.parent / SPLITS]
    for folder, names, files in walk(root):
        numbers = {name: match[1] for name in names if (match := _FOLDER.fullmatch(name))}
        if SPLITS in files:
            splits_files.insert(0, folder / SPLITS)
        if any(_may_be_there(folder / name / _FILE) for name in numbers):
            run = root.name if folder == root else folder.relative_to(root).as_posix()
            paths = ((str((folder / name / _FILE).absolute()), number) for name, number in numbers.items())
            places += [_Place(run, int(number), path) for path, number in paths if _is_epoch(number, path)]
        names[:] = [name for name in names if name not in numbers]
    return places, splits_files


def _may_be_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return True  # in a folder that may not be read, which is said when it is opened


def _is_epoch(number: str, path: str) -> bool:
    if len(number) > _DIGITS:
        _LOG.warning("%s: passed over, since the number of its folder is no epoch; rename the folder", path[-1000:])
    return len(number) <= _DIGITS


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
    return [
        _Place(match[1], int(match[2]), str(path.absolute()), name)
        for name, match in matches
        if _is_epoch(match[2], f"{path}:{name}")
    ]


def _archive(path: str) -> zipfile.ZipFile:
    """The zip, kept open: its directory of 100,000 names is read once a process."""
    try:
        stat = Path(path).stat()
        return _opened(path, stat.st_mtime_ns, stat.st_size)
    except Exception as error:  # a damaged directory fails in whatever way its bytes happen to lead to
        reason = str(error)[:_LONGEST_REASON]
        raise InputError(f"{path}: truncated, missing, or no zip file ({reason}); {_AGAIN}") from error


@lru_cache(maxsize=4)
def _opened(path: str, changed: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _member(path: str, name: str) -> tuple[bytes, int]:
    """One unpacked member, and how many bytes it takes in the zip."""
    archive = _archive(path)
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise InputError(f"{path}: has no member {name}; list the zoo again") from None
    if info.flag_bits & 1:
        raise InputError(f"{path}: the member {name} is encrypted; unpack the zip with its password and use the folder")
    most = min(LARGEST_MEMBER, max(LIMITS.small, int(LIMITS.ratio * info.compress_size)))
    if info.file_size > most:
        raise InputError(
            f"{path}: the member {name} says it holds {info.file_size:,} bytes, more than {most:,}, "
            "which no model of this zoo has; remove it from the zip"
        )
    try:
        return archive.read(info), info.compress_size
    except Exception as error:  # every compression fails in its own way
        raise InputError(f"{path}: the member {name} is damaged ({str(error)[:_LONGEST_REASON]}); {_AGAIN}") from error


def _published(candidates: Iterable[Path], zips: Iterable[Path]) -> dict[tuple[str, int], _Published]:
    """What the first file of splits says, by run and number of the checkpoint's folder."""
    for path in candidates:
        if _may_be_there(path):
            try:
                return _parse(str(path), path.read_bytes())
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    for path in zips:
        try:
            names = _archive(str(path)).namelist()
        except InputError:
            continue  # it was logged when its members were listed
        for name in names:
            if name.rpartition("/")[2] == SPLITS:
                return _parse(f"{path}:{name}", _member(str(path), name)[0])
    return {}


def _parse(name: str, data: bytes) -> dict[tuple[str, int], _Published]:
    found: dict[tuple[str, int], _Published] = {}
    try:
        for split, columns in json.loads(data).items():
            if split not in ("train", "val", "test"):
                raise ValueError(f"unknown split {split!r}")
            for path, score, step in zip(columns["path"], columns["score"], columns["step"], strict=True):
                run, folder = path.replace("\\", "/").split("/")[-3:-1]
                if _number(score) is None or _number(step) is None:
                    raise ValueError(f"no score and step of {folder}")
                known: dict[str, Value] = {"score": score, "test_acc": score, "step": step}
                found[run, int(folder.removeprefix("checkpoint_"))] = _Published(split, known)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{name}: not the published splits, with path, score and step for train, val and test "
            f"({type(error).__name__}: {str(error)[:_LONGEST_REASON]}); download it again, or remove it"
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


def _content(path: str, member: str, device: str = "cpu") -> tuple[Any, int]:
    """What a checkpoint's file holds, and how many bytes it takes on the disk."""
    if not member:
        return load_safely(path, device=device, stand_ins=_OMEGACONF), Path(path).stat().st_size
    data, packed = _member(path, member)
    content = load_safely(f"{path}:{member}", BytesIO(data), device=device, stand_ins=_OMEGACONF, packed=packed)
    return content, packed


def _known(name: str, content: Any) -> tuple[dict[str, Value], dict[str, Value]]:
    """Properties and settings that stand in a file; none where they are so odd that they cannot be read."""
    if not isinstance(content, Mapping):
        return {}, {}
    try:
        return _properties(content), _config(content)
    except Exception as error:  # what a stranger put there must not cost the weights
        _LOG.warning("%s: its results and settings cannot be read (%s)", name, type(error).__name__)
        return {}, {}


def _properties(content: Mapping[str, Any]) -> dict[str, Value]:
    results = content.get("last_result")
    values: dict[str, Value] = {}
    for key, value in islice(results.items(), _MOST_SETTINGS) if isinstance(results, Mapping) else ():
        if isinstance(key, str) and "/" in key and len(key) <= _LONGEST_SETTING and _number(value) is not None:
            values[clean_text(key.replace("/", "_"))] = _number(value)
    iteration = content.get("iteration")
    if type(iteration) is int and _number(iteration) == iteration:
        values["step"] = iteration
    return values


def _number(value: Any) -> int | float | None:
    """A number that a table can hold; None for what is none."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        return None
    return value if type(value) in (bool, int, float) else None


def _config(content: Mapping[str, Any]) -> dict[str, Value]:
    settings = _plain(content.get("config"), iter(range(_MOST_SETTINGS)))
    if not isinstance(settings, dict):
        return {}
    found: dict[str, Value] = {}
    for key, value in settings.items():
        text = json.dumps(value) if isinstance(value, list | dict) else value
        found[key] = None if isinstance(text, str) and len(text) > _LONGEST_SETTING else text
    return found


def _plain(value: Any, left: Iterator[int], depth: int = 0) -> Any:
    """Settings as dicts, lists, numbers and strings, no more than are ``left``; what is none of them is None."""
    if next(left, None) is None:
        return None
    if isinstance(value, _Node):
        state = value.state if isinstance(value.state, dict) else {}
        value = state.get("_content", state.get("_val"))
    if depth < _DEEPEST and isinstance(value, dict):
        named = ((_name(key), each) for key, each in islice(value.items(), _MOST_SETTINGS))
        return {key: _plain(each, left, depth + 1) for key, each in named if key is not None}
    if depth < _DEEPEST and isinstance(value, list | tuple):
        return [_plain(each, left, depth + 1) for each in islice(value, _MOST_SETTINGS)]
    if type(value) is str:
        return clean_text(value) if len(value) <= _LONGEST_SETTING else None
    return _number(value)


def _name(key: Any) -> str | None:
    """Name of a setting; None for a key that is none."""
    if type(key) is str:
        return clean_text(key) if len(key) <= _LONGEST_SETTING else None
    return None if _number(key) is None else str(key)
