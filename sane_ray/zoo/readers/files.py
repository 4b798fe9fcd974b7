"""Loose checkpoint files: one file, or all of a folder with the suffixes that people give them.

A file is a model, but for files whose paths differ only in what tells the checkpoints of one run apart. Names decide:

- an epoch: a number after a word such as epoch, step or checkpoint, in the name of the file or of a folder around it
  (``run/epoch_3.pt``, ``run/step-500/model.pt``);
- ``best``, ``last``, ``latest`` and ``final``, in the same places; their epoch is the largest that is known of the run;
- ``init``, ``initial`` and ``start``, likewise; their epoch is 0;
- a number after a dot (``run/weights.01.pt``), where there are two of them at least;
- where there is one of these: a bare number (``run/20.pt``), and a name without any of it (``run/model.pt`` beside
  ``run/model_best.pt``, where ``model``, ``checkpoint`` and ``weights`` mean no more than the folder does).

So ``run3/{best,last,10,20}.pt`` is one model, ``zoo/{10,20}.pt`` two, and ``resnet_best.pt`` is none with
``vgg_best.pt``, nor are files of two suffixes.

Names may mislead. ``run/{model_1,model_2}.pt`` and ``run/{10,20}/model.pt`` are two models each, since such numbers
mostly count runs; where they are epochs of one run, a split may put one into training and the other into testing. Then
a catalog file (or a table of properties with a column ``model``) says what belongs together.

Passes over hidden files and folders, and over what trainers save beside the weights (``optimizer.pt``), by name. Never
opens a file to find out what it is: one that is no checkpoint is named when it is opened.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
_NUMBER = re.compile(
    r"(?<![a-z])(epochs?|ep|(?<![\d.])e(?=[_=-])|(?:global_?)?steps?|iter|checkpoint|ckpt)[_=-]?(\d{1,15})(?![\d.])",
    re.I,
)
_EPOCH_WORDS = ("epoch", "epochs", "ep", "e")
_WORD = re.compile(r"(?<![a-z])(best|last|latest|final|init|initial|start)(?![a-z])", re.I)
_FIRST_WORDS = ("init", "initial", "start")
_AGAIN = re.compile(r"(^|[_.-])v\d+$")
"""What a trainer adds to the name of a checkpoint that is there already."""
_BARE = re.compile(r"\d{1,15}")
_DOTTED = re.compile(r"(.*[^\d.])\.(\d{1,15})")
"""``weights.01``, but not ``lr0.1``."""
_PLAIN = frozenset(("", "model", "checkpoint", "ckpt", "weights", "state_dict", "params"))
"""Names that say no more of a network than that it is one."""
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
    note: str = ""
    """What tells it from another checkpoint of this epoch."""


def discover(root: Path) -> list[Record]:
    """Lists the checkpoint files under a folder, or the one file, in order of model and epoch.

    The name of a model is its file's path inside the root without suffix, or with it where two would have the same.
    Links are followed; a link to a file that is listed anyway is not.
    """
    base = root if root.is_dir() else root.parent
    by_folder: dict[PurePosixPath, list[_File]] = defaultdict(list)
    for path in _paths(root):
        match = _SUFFIX.search(path.name)
        suffix = match[0] if match else ""
        folder = PurePosixPath(path.parent.relative_to(base).as_posix())
        by_folder[folder].append(_File(path, folder, path.name.removesuffix(suffix), suffix))
    places: list[tuple[_File, _Place]] = []
    others: list[_File] = []
    for group in by_folder.values():
        certain = list(_certain_places(group))
        places += certain
        others += [] if certain and not certain[0][1].refused else [file for file in group if not _is_shard(file)]
    for run in _runs(others):
        places += _places_of_run(run)
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


def is_training_state(name: str) -> bool:
    """Whether a file of that name holds the state of an optimiser, a scheduler or a random generator, not weights."""
    match = _SUFFIX.search(name)
    return match is not None and _NO_WEIGHTS.fullmatch(name[: match.start()]) is not None


def _paths(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if _SUFFIX.search(root.name) or "." not in root.name else []
    files, links, alone, passed_over = list[str](), list[str](), list[str](), 0
    for _, entries in scan(root) if root.is_dir() else ():
        named = [entry for entry in entries if entry.name[0] != "." and _SUFFIX.search(entry.name)]
        weights = [entry for entry in named if not is_training_state(entry.name) and not is_folder(entry)]
        files += [entry.path for entry in weights if not entry.is_symlink()]
        links += [entry.path for entry in weights if entry.is_symlink()]
        if len(weights) < len(named):
            others = [entry.path for entry in named if is_training_state(entry.name) and not is_folder(entry)]
            if not weights:
                alone += others
            passed_over += len(others)
    if passed_over:
        _LOG.info("%s: %d files of optimisers and the like passed over by name", root, passed_over)
    if alone:
        _LOG.warning(
            "%s: %d files are passed over for their names, such as %s, though no weights lie beside them; to have one "
            "read, rename it",
            root,
            len(alone),
            alone[0],
        )
    targets = {os.path.realpath(path): path for path in files} if links else {}
    for path in sorted(links):
        targets.setdefault(os.path.realpath(path), path)
    return [Path(path) for path in sorted(targets.values() if links else files)]


def _certain_places(files: list[_File]) -> Iterator[tuple[_File, _Place]]:
    """Of the files of one folder the shards; or all of it, if it is a Small Transformer Zoo."""
    shards: dict[tuple[str, str, str], list[_File]] = defaultdict(list)
    for file in files:
        match = _SHARD.fullmatch(file.stem)
        if match and _is_shard(file):
            shards[match[1], match[2], file.suffix].append(file)
    for (stem, total, suffix), members in shards.items():
        long = members[0].folder / f"{stem}-of-{total}{suffix}"
        refused = f"one of {int(total)} shards of one model ({len(members)} of them are here)"
        yield members[0], _Place(members[0].folder / stem, long, refused=refused)
    runs = [_TRANSFORMER_ZOO.fullmatch(file.stem) for file in files]
    if len(runs) > 1 and all(runs):
        for file, run in zip(files, runs, strict=True):
            assert run is not None
            model = file.folder / run[1]
            yield file, _Place(model, model, int(run[2]), {"acc": float(run[3])})


def _is_shard(file: _File) -> bool:
    match = _SHARD.fullmatch(file.stem)
    return match is not None and int(match[2]) > 1


@dataclass(frozen=True)
class _Name:
    """What one part of a path says."""

    numbers: tuple[tuple[str, int], ...]
    """Words for an epoch, and what stands after them."""
    words: tuple[str, ...]
    """best, last, init, ..."""
    rest: str
    """What is left of it; empty if that says nothing of a network."""

    @property
    def differs(self) -> bool:
        """Whether it may tell checkpoints of one run apart."""
        return bool(self.numbers or self.words)


@lru_cache(maxsize=1 << 16)
def _name(text: str) -> _Name:
    text = _METRIC.sub("", text)
    numbers = tuple((word.lower(), int(number)) for word, number in _NUMBER.findall(text))
    text = _NUMBER.sub("", text)
    words = tuple(word.lower() for word in _WORD.findall(text))
    rest = _joined(_WORD.sub("", text))
    if numbers or words:
        rest = _AGAIN.sub("", rest)
    return _Name(numbers, words, "" if rest.lower() in _PLAIN else rest)


def _joined(text: str) -> str:
    """The text where nothing stands any more between some separators."""
    return re.sub(r"([_=. -])[_=. -]+", r"\1", text).strip("_=. -")


def _names_in(file: _File, literal: int) -> list[_Name]:
    """Parts of the path that may tell checkpoints apart, but for the first folders."""
    return [name for part in (*file.folder.parts[literal:], file.stem) if (name := _name(part)).differs]


def _runs(files: list[_File], literal: int = 0) -> Iterator[list[_File]]:
    """The files of each model, where the names of the first ``literal`` folders are no epochs."""
    runs: dict[tuple[str, ...], list[_File]] = defaultdict(list)
    others = []
    for file in files:
        if _names_in(file, literal):
            runs[_key(file, literal)].append(file)
        else:
            others.append(file)
    beside = {place for members in runs.values() for file in members for place in _varying(file)}
    numbered = {file: key for file in others if (key := _numbered_key(file, literal)) is not None}
    known = runs.keys() | {key for key, count in Counter(numbered.values()).items() if count > 1}
    for file in others:
        keys = [_key(file, literal)]
        if any(place in beside for place in _varying(file, bare=True)):
            keys.append(_key(file, literal, bare=True))
        if file in numbered:
            keys.append(numbered[file])
        runs[next((key for key in keys if key in known), (str(file.path),))].append(file)
    for members in runs.values():
        outer = _outer_number(members, literal)
        if outer is None:
            yield members
        else:
            yield from _runs(members, outer + 1)


def _varying(file: _File, bare: bool = False) -> Iterator[tuple[PurePosixPath, int]]:
    """The places in the tree where this file's name, or its folder's, may tell checkpoints apart."""
    for depth, path in enumerate((file.folder / file.stem, file.folder)):
        if _BARE.fullmatch(path.name) if bare else _name(path.name).differs:
            yield path.parent, depth


def _key(file: _File, literal: int, bare: bool = False) -> tuple[str, ...]:
    """What the paths of one model's files have in common; as it would be if a bare number were an epoch."""
    folders = [*file.folder.parts[:literal]]
    for part in file.folder.parts[literal:]:
        name = _name(part)
        folders.append(name.rest if name.differs else part)
    stem = _name(file.stem).rest
    if bare and _BARE.fullmatch(file.stem):
        stem = ""
    elif bare and len(folders) > literal and _BARE.fullmatch(folders[-1]):
        folders.pop()
    return (*(folder for folder in folders if folder), f"/{stem}", file.suffix.lower())


def _numbered_key(file: _File, literal: int) -> tuple[str, ...] | None:
    """The same, where the name has a number after a dot, which is an epoch if there is another one."""
    folders = _key(file, literal)[:-2]
    match = _DOTTED.fullmatch(file.stem)
    if match:
        return (*folders, f"/{_name(match[1]).rest}", file.suffix.lower())
    return None


def _outer_number(files: list[_File], literal: int) -> int | None:
    """The folder whose number is rather a run's: of ``step1/epoch_1`` and ``step2/epoch_1``, none tells all apart."""
    rows = [_numbers(file, literal) for file in files]
    numbered = [row for row in rows if len(row) > 1]
    first = next((i for i, part in enumerate(files[0].folder.parts) if i >= literal and _name(part).numbers), None)
    if first is None or not numbered or _column(numbered) is not None or len(set(numbered)) < len(numbered):
        return None
    return None if _name(files[0].folder.parts[first]).numbers[0][0] in _EPOCH_WORDS else first


def _numbers(file: _File, literal: int = 0) -> tuple[tuple[str, int], ...]:
    return tuple(number for name in _names_in(file, literal) for number in name.numbers)


def _column(rows: Sequence[tuple[tuple[str, int], ...]]) -> int | None:
    """Which of the numbers is another one in every row, those after a word for an epoch first."""
    if len({tuple(word for word, _ in row) for row in rows}) != 1:
        return None
    for column in sorted(range(len(rows[0])), key=lambda column: rows[0][column][0] not in _EPOCH_WORDS):
        if len({row[column] for row in rows}) == len(rows):
            return column
    return None


def _places_of_run(files: list[_File]) -> Iterator[tuple[_File, _Place]]:
    """The places of a model's files, in order of what is known of their epochs."""
    if len(files) == 1:
        (file,) = files
        short, long = file.folder / file.stem, file.folder / f"{file.stem}{file.suffix}"
        yield file, _Place(short, long, 0, _label(file) | _metrics(file))
        return
    above = len(PurePosixPath(os.path.commonpath([f"/{file.folder}" for file in files])).parts) - 1
    words = {file: tuple(word for name in _names_in(file, above) for word in name.words) for file in files}
    if len(set(words.values())) == 1:  # then they tell nothing apart
        words = dict.fromkeys(files, ())
        dotted = [_DOTTED.fullmatch(file.stem) for file in files]
        stem = next((match[1] for match in dotted if match and len({file.stem for file in files}) > 1), files[0].stem)
        stem = _joined(_NUMBER.sub("", _METRIC.sub("", stem)))
        stem = "" if stem.lower() in _PLAIN else stem
    else:
        stem = _name(files[0].stem).rest
    epochs = _epochs(files, above)
    below = [_name(part).rest if _name(part).differs else part for part in files[0].folder.parts[above:]]
    below = [part for part in below if not _BARE.fullmatch(part)]
    short = PurePosixPath(*files[0].folder.parts[:above], *below, "" if _BARE.fullmatch(stem) else stem)
    pattern = _NUMBER.sub(r"\1#", _METRIC.sub(r"\1#", files[0].stem))
    long = files[0].folder / f"{pattern}{files[0].suffix}"
    last = max(epochs.values(), default=0)
    taken: set[tuple[int, str]] = set()
    for file in sorted(files, key=lambda file: (bool(words[file]), file not in epochs, file.folder, file.stem)):
        epoch = epochs.get(file, 0 if set(words[file]) & set(_FIRST_WORDS) else last)
        path = PurePosixPath(*file.folder.parts[above:], file.stem).as_posix()
        notes = [*([words[file][0]] if words[file] else [""]), path]
        note = next(note for note in (*notes, f"./{path}") if (epoch, note) not in taken)
        taken.add((epoch, note))
        yield file, _Place(short, long, epoch, _label(file) | _metrics(file), note=note)


def _epochs(files: list[_File], above: int) -> dict[_File, int]:
    """The epoch of each file that says one."""
    rows = {file: row for file in files if (row := _numbers(file, above))}
    column = _column(list(rows.values())) if rows else None
    epochs: dict[_File, int] = {}
    for file, row in rows.items():
        by_word = [number for word, number in row if word in _EPOCH_WORDS]
        epochs[file] = row[column][1] if column is not None else (by_word or [row[-1][1]])[0]
    for file in files:
        part = next((part for part in (file.stem, *reversed(file.folder.parts[above:])) if _BARE.fullmatch(part)), None)
        if file not in epochs and part is not None and not _name(file.stem).differs:
            epochs[file] = int(part)
        match = _DOTTED.fullmatch(file.stem)
        if file not in epochs and match is not None and not _name(file.stem).differs:
            epochs[file] = int(match[2])
    return epochs


def _metrics(file: _File) -> dict[str, Value]:
    return {name.lower().replace("-", "_"): float(value) for name, value in _METRIC.findall(file.stem)}


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
        id=f"{model}/{place.epoch} ({place.note})" if place.note else f"{model}/{place.epoch}",
        model=model,
        epoch=place.epoch,
        path=str(file.path.absolute()),
        properties=place.properties,
        reader=NAME,
        member=place.refused,
    )
