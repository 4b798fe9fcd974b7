"""A token store, read: a folder of the tokens of a zoo's checkpoints and all that turns them back into weights.

==========================  =======================================================================================
``store.json``              layout of the tokens, architectures, normalisation, provenance
``models.parquet``          a row a checkpoint
``segments.parquet``        a row a segment: where the tokens lie (a segment is all of a checkpoint but for large ones)
``catalog.parquet``         a row for everything that the zoo held, also for what was left out
``alignment.parquet``       a row a model and permutation, where models were aligned
``tokens/…/part-*.parquet`` a row a token
==========================  =======================================================================================

``sane_ray.tokens.store.writing`` writes it; this module never writes, never imports Ray, and refuses a store that is
incomplete, damaged or of another format.

Shape suffixes: N tokens of a checkpoint, T token size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.nearby import near
from sane_ray.tokens.normalization import Normalization
from sane_ray.tokens.symmetry import Indices, Symmetry
from sane_ray.tokens.tokenizer import LayerTable, detokenize
from sane_ray.zoo.splits import SPLITS

Dtype = Literal["float16", "bfloat16", "float32"]

FORMAT = "sane_ray token store"
VERSION = 2
"""Raised whenever a reader of the old layout would misread the new one."""

INDEX_FILE = "store.json"
MODELS_FILE = "models.parquet"
SEGMENTS_FILE = "segments.parquet"
CATALOG_FILE = "catalog.parquet"
ALIGNMENT_FILE = "alignment.parquet"

SETTINGS = ("batch_norm", "parameters", "align")
"""Options of preparation that a trained model carries beside its layer tables, and enforces."""

RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}


@dataclass(frozen=True)
class Architecture:
    """What the checkpoints of one architecture have in common."""

    name: str
    table: LayerTable
    symmetry: Symmetry
    normalization: Normalization

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "name": self.name,
            "table": self.table.to_dict(),
            "symmetry": self.symmetry.to_dict(),
            "normalization": self.normalization.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """What ``to_dict`` described, also after a trip through JSON."""
        return cls(
            data["name"],
            LayerTable.from_dict(data["table"]),
            Symmetry.from_dict(data["symmetry"]),
            Normalization.from_dict(data["normalization"]),
        )


class Segment(NamedTuple):
    """A run of tokens of one checkpoint that is stored together: all of them, unless the checkpoint is large."""

    checkpoint: int
    """Ordinal of the checkpoint."""
    first: int
    """Its first token in the checkpoint."""
    tokens: int
    """Number of tokens."""


@dataclass(frozen=True)
class RowGroup:
    """The unit that is read at once: whole checkpoints, or one segment of a large one."""

    file: str
    """Token file, relative to the store."""
    index: int
    """Which of the file's row groups."""
    segments: tuple[Segment, ...]
    """In stored order, their tokens one after the other."""


@dataclass(frozen=True)
class Counts:
    """How much a store, or one split of it, holds."""

    models: int
    checkpoints: int
    tokens: int
    parameters: int
    row_groups: int


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A complete token store; open one with ``TokenStore.open``.

    Attributes:
        path: Its folder.
        index: Content of store.json.
        models: models.parquet: one row a checkpoint, in order of its ordinal.
        segments: segments.parquet: one row a segment, in stored order.
        architectures: By name.
    """

    path: Path
    index: dict[str, Any]
    models: pa.Table
    segments: pa.Table
    architectures: dict[str, Architecture]

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Opens a store, after a look at every file's size.

        Raises:
            InputError: No store, an incomplete or damaged one, or one of another format version.
        """
        folder = Path(path).expanduser().absolute()
        index = _read_index(folder)
        _check_files(folder, index["files"])
        models, segments = (pq.read_table(folder / name, memory_map=True) for name in (MODELS_FILE, SEGMENTS_FILE))
        architectures = [Architecture.from_dict(data) for data in index["architectures"]]
        return cls(folder, index, models, segments, {architecture.name: architecture for architecture in architectures})

    @property
    def token_size(self) -> int:
        """Values in a token, T."""
        return self.index["token_size"]

    @property
    def dtype(self) -> Dtype:
        """Number format of the stored values."""
        return self.index["dtype"]

    @property
    def fingerprint(self) -> str:
        """Identifies the contents: the same weights, splits and settings give the same, wherever they came from."""
        return self.index["fingerprint"]

    @cached_property
    def catalog(self) -> pa.Table:
        """catalog.parquet: one row for each checkpoint that the zoo held, with its ``status`` and ``reason``."""
        return pq.read_table(self.path / CATALOG_FILE)

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Checkpoints and files of the zoo that are not in the store: ``id``, ``source`` (path in it), ``reason``."""
        return self.catalog.filter(pc.field("status") == "left out").select(["id", "source", "reason"]).to_pylist()

    @property
    def considered(self) -> list[dict[str, Any]]:
        """Checkpoints of the zoo whose files were read: what identifies each of them as an input."""
        columns = ["id", "sha256", "source", "source_bytes", "source_mtime_ns", "source_metadata"]
        return self.catalog.filter(pc.field("source_bytes").is_valid()).select(columns).to_pylist()

    def alignment(self, checkpoint: int) -> dict[str, Indices]:
        """The permutations that a checkpoint's weights were reordered by before they became tokens; empty if none."""
        return self._alignments.get((self._column("model")[checkpoint], self._column("architecture")[checkpoint]), {})

    @property
    def num_bytes(self) -> int:
        """Size on disk of the tokens and of models.parquet."""
        return sum(file["bytes"] for file in self.index["files"])

    def counts(self, split: str | None = None) -> Counts:
        """What one split holds, or the whole store."""
        chosen = np.ones(len(self.models), bool) if split is None else self._column("split") == _known(split)
        groups = len(self.row_groups(split)) if split else sum(len(self.row_groups(name)) for name in SPLITS)
        return Counts(
            models=len(np.unique(self._column("model")[chosen])),
            checkpoints=int(chosen.sum()),
            tokens=int(self._column("tokens")[chosen].sum()),
            parameters=int(self._column("parameters")[chosen].sum()),
            row_groups=groups,
        )

    def row_groups(self, split: str) -> list[RowGroup]:
        """The row groups of a split, in stored order."""
        return self._row_groups[_known(split)]

    def read_row_group(self, group: RowGroup) -> list[tuple[Segment, NDArray[Any]]]:
        """Reads one row group: each segment with its values, in stored order.

        Returns:
            Values as stored, [tokens, T], read-only views of one buffer: float16, float32, or bits of bfloat16 as
            uint16.

        Raises:
            InputError: The file is damaged.
        """
        values = self._read_values(group.file, group.index)
        stops = np.cumsum([segment.tokens for segment in group.segments])
        if len(values) != stops[-1]:
            raise self._damaged(group.file, f"row group {group.index} has {len(values)} tokens instead of {stops[-1]}")
        return list(zip(group.segments, np.split(values, stops[:-1]), strict=True))

    def tokens(self, checkpoint: int) -> Tensor:
        """Normalised tokens of one checkpoint, float32 [N, T]. Reads whole row groups: for a look, not to train."""
        parts = []
        for place in np.flatnonzero(self._places("checkpoint") == checkpoint):
            file, index = self._places("file")[place], int(self._places("row_group")[place])
            start, tokens = int(self._places("row_offset")[place]), int(self._places("tokens")[place])
            parts.append(as_float32(self._read_values(file, index)[start : start + tokens], self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state_dict(self, checkpoint: int) -> dict[str, Tensor]:
        """Weights of one checkpoint, float32, to the precision they were stored with; only what was tokenised."""
        architecture = self.architecture_of(checkpoint)
        scale = self.model_scale(checkpoint)
        tokens_NT = architecture.normalization.denormalize(self.tokens(checkpoint), architecture.table, scale)
        return detokenize(tokens_NT, architecture.table)

    def model_scale(self, checkpoint: int) -> Tensor | None:
        """The checkpoint's own norms, float32 [layers], that l2 normalisation divided by; None in other modes."""
        if "model_scale" not in self.models.column_names:
            return None
        return torch.tensor(self.models["model_scale"][checkpoint].as_py(), dtype=torch.float32)

    def architecture_of(self, checkpoint: int) -> Architecture:
        """The architecture of one checkpoint."""
        return self.architectures[self._column("architecture")[checkpoint]]

    def _column(self, name: str, table: Literal["models", "segments"] = "models") -> NDArray[Any]:
        if (table, name) not in self._columns:
            self._columns[table, name] = getattr(self, table)[name].to_numpy()
        return self._columns[table, name]

    def _places(self, name: str) -> NDArray[Any]:
        """One column of the segments."""
        return self._column(name, "segments")

    @cached_property
    def _columns(self) -> dict[tuple[str, str], NDArray[Any]]:
        return {}

    @cached_property
    def _alignments(self) -> dict[tuple[str, str], dict[str, Indices]]:
        path = self.path / ALIGNMENT_FILE
        return read_alignments(path) if path.exists() else {}

    @cached_property
    def _metadata(self) -> dict[str, pq.FileMetaData]:
        return {}

    @cached_property
    def _row_groups(self) -> dict[str, list[RowGroup]]:
        names = ("file", "row_group", "checkpoint", "first", "tokens")
        members: dict[tuple[str, int], list[Segment]] = {}
        for file, index, *segment in zip(*(self._places(name).tolist() for name in names), strict=True):
            members.setdefault((file, index), []).append(Segment(*segment))
        groups: dict[str, list[RowGroup]] = {split: [] for split in SPLITS}
        for (file, index), segments in members.items():
            split = self._column("split")[segments[0].checkpoint]
            groups[split].append(RowGroup(file, index, tuple(segments)))
        return groups

    def _read_values(self, file: str, index: int) -> NDArray[Any]:
        """All values of a row group, [tokens, T], without a copy of what Parquet gives."""
        path = self.path / file
        try:
            reader = pq.ParquetFile(path, memory_map=True, metadata=self._metadata.get(file))
            self._metadata[file] = reader.metadata
            column = reader.read_row_group(index, columns=["values"]).column(0)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(file, str(error)) from error
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        dtype = RAW_DTYPES[self.dtype]
        if array.type.byte_width != self.token_size * dtype.itemsize:
            raise self._damaged(file, f"tokens of {array.type.byte_width} bytes")
        start = array.offset * array.type.byte_width
        values = np.frombuffer(array.buffers()[1], dtype, count=len(array) * self.token_size, offset=start)
        return values.reshape(len(array), self.token_size)

    def _damaged(self, file: str, reason: str) -> InputError:
        return InputError(f"{self.path / file}: damaged ({reason}); delete {self.path} and run jobs/prepare.py again")


def to_stored(tokens_NT: Tensor, dtype: Dtype) -> NDArray[Any]:
    """Float tokens as they are stored: little-endian float16, float32, or the bits of bfloat16 as uint16."""
    if dtype == "bfloat16":
        return tokens_NT.to(torch.bfloat16).view(torch.uint16).numpy().astype(RAW_DTYPES[dtype], copy=False)
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which whoever stores it looks for
        return tokens_NT.numpy().astype(RAW_DTYPES[dtype], copy=False)


def as_float32(values_NT: NDArray[Any], dtype: Dtype) -> Tensor:
    """Stored values as float32 in new memory."""
    if dtype == "bfloat16":
        return torch.from_numpy(values_NT.astype(np.int32) << 16).view(torch.float32)
    return torch.from_numpy(values_NT.astype(np.float32))


def read_alignments(path: Path, models: Sequence[str] | None = None) -> dict[tuple[str, str], dict[str, Indices]]:
    """The permutations in alignment.parquet, by model and architecture; all of them, or of some models."""
    wanted = None if models is None else pc.field("model").isin(list(models))
    found: dict[tuple[str, str], dict[str, Indices]] = {}
    table = pq.read_table(path, columns=["model", "architecture", "permutation", "order"], filters=wanted)
    for row in table.to_pylist():
        permutations = found.setdefault((row["model"], row["architecture"]), {})
        permutations[row["permutation"]] = np.array(row["order"], np.int64)
    return found


def json_digest(value: Any) -> str:
    """Hex sha256 of JSON-able values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_of(store: TokenStore) -> dict[str, str]:
    """The options of ``SETTINGS`` that a store was prepared with."""
    said = {"align": store.index["alignment"]["method"]} | store.index.get("inputs", {}).get("tokens", {})
    return {name: said[name] for name in SETTINGS if name in said}


def _known(split: str) -> str:
    if split not in SPLITS:
        raise InputError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}")
    return split


def is_store(folder: Path) -> bool:
    """Whether a folder has the index of a token store."""
    return (folder / INDEX_FILE).is_file()


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    remedy = f"python jobs/prepare.py --source ZOO --store {folder}"
    if not folder.exists():
        raise InputError(f"--store {folder} does not exist: write it with `{remedy}`{near(folder, is_store)}")
    if not path.is_file():
        what = f"--store {folder} is not a complete token store (it has no {INDEX_FILE})"
        if (folder / MODELS_FILE).is_file():  # what is left of one; anything else may be dear to its owner
            raise InputError(f"{what}: name another, or delete it and run `{remedy}`")
        raise InputError(
            f"{what}: name another, or, if it holds checkpoints, prepare them into a new folder: "
            f"`python jobs/prepare.py --source {folder} --store STORE`{near(folder, is_store)}"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete {folder} and run `{remedy}`") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{path}: not the index of a {FORMAT}; name another --store, or delete {folder}")
    if index.get("version") != VERSION:
        raise InputError(
            f"{path}: the store has format version {index.get('version')!r}, this sane_ray reads version {VERSION}: "
            f"delete {folder} and run `{remedy}`, or use the sane_ray that wrote it ({index.get('written_by')})"
        )
    return index


def _check_files(folder: Path, files: list[dict[str, Any]]) -> None:
    for file in files:
        path = folder / file["path"]
        found = path.stat().st_size if path.is_file() else None
        wrong = "is missing" if found is None else f"has {found} bytes instead of {file['bytes']}"
        if found == file["bytes"]:
            if "sha256" not in file or file_digest(path) == file["sha256"]:
                continue
            wrong = "has changed since it was written"
        raise InputError(f"{path} {wrong}: the store is damaged; delete {folder} and run jobs/prepare.py again")
