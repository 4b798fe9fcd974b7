"""Embeddings, read: a folder of tables that ``sane_ray.embedding.writing`` wrote.

=========================  ============================================================================================
``embeddings.json``        what they are of and were made with; written last, so that the folder is complete with it
``models.parquet``         a row a checkpoint: what is known of it, reconstruction error, vectors over its tokens
``layers.parquet``         a row a checkpoint and layer: reconstruction error, vectors over the layer's tokens
``tokens/part-*.parquet``  a row a token, where they were asked for
=========================  ============================================================================================

Never writes, never imports Ray. Shape suffixes: R checkpoints, L values of an embedding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray.embedding.encoder import SHAPE, VECTORS
from sane_ray.errors import InputError
from sane_ray.nearby import near
from sane_ray.tokens.store import is_store

FORMAT = "sane_ray embeddings"
VERSION = 1

INDEX_FILE = "embeddings.json"
IDENTITY_FILE = "identity.json"
"""What a run is making, until it is made."""
MODELS_FILE = "models.parquet"
LAYERS_FILE = "layers.parquet"
TOKENS_FOLDER = "tokens"


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Complete embeddings; open them with ``Embeddings.open``.

    Attributes:
        path: Their folder.
        index: Content of embeddings.json.
        models: models.parquet, in the order of the store or source.
    """

    path: Path
    index: dict[str, Any]
    models: pa.Table

    @classmethod
    def open(cls, folder: str | Path) -> Embeddings:
        """Opens a folder of embeddings.

        Raises:
            InputError: It is none, is incomplete or damaged, or of another format version.
        """
        path = Path(folder).expanduser().absolute()
        index = read_index(path)
        _check_rows(path, LAYERS_FILE, index)
        _check_rows(path, MODELS_FILE, index)
        with _whole(path, MODELS_FILE):
            return cls(path, index, pq.read_table(path / MODELS_FILE, partitioning=None))

    @cached_property
    def layers(self) -> pa.Table:
        """layers.parquet, in the order of ``models``, layers of a checkpoint one after the other.

        Read when it is first asked for, and kept: gigabytes for a large zoo, of which ``layer_columns`` and
        ``layer_vectors`` read what is needed.
        """
        with _whole(self.path, LAYERS_FILE):
            return pq.read_table(self.path / LAYERS_FILE, partitioning=None)

    @property
    def num_layers(self) -> int:
        """Rows of layers.parquet, of which nothing is read."""
        return self.index["rows"][LAYERS_FILE]

    @property
    def latent_dim(self) -> int:
        """Values of an embedding, L."""
        return self.index["latent_dim"]

    def vectors(self, name: str) -> NDArray[np.float32]:
        """A vector of each checkpoint, [R, L], in the order of ``models``.

        Args:
            name: ``mean``, ``std``, ``q01``, ``q25``, ``q50``, ``q75`` or ``q99`` (over its tokens), or ``shape`` (the
                numbers of ``SHAPE`` in place of L).

        Raises:
            InputError: There is no vector of that name.
        """
        return _matrix(self.models, _known(name), self._size(name))

    def layer_vectors(self, name: str, architecture: str) -> tuple[list[str], NDArray[np.float32]]:
        """A vector of each layer of each checkpoint of one architecture.

        Args:
            name: As for ``vectors``, over the layer's tokens.
            architecture: One of those in ``index``.

        Returns:
            Ids of the checkpoints in the order of ``models``, and [R, layers, L].

        Raises:
            InputError: There is no vector or architecture of that name.
        """
        ids, count, size = self._ids_of(architecture), len(self._layers_of(architecture)), self._size(_known(name))
        values_FL, filled = np.empty((len(ids) * count, size), np.float32), 0
        for batch in self._layer_batches([name], architecture):
            some_FL = batch[name].flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
            values_FL[filled : filled + len(some_FL)] = some_FL[: len(values_FL) - filled]
            filled += len(some_FL)
        if filled != len(values_FL):
            raise _damaged(self.path, LAYERS_FILE, f"{filled} layers of {architecture} instead of {len(values_FL)}")
        return ids.to_pylist(), values_FL.reshape(len(ids), count, size)

    @property
    def layer_names(self) -> list[str]:
        """Names of the columns of layers.parquet."""
        return pq.read_schema(self.path / LAYERS_FILE).names

    def layer_columns(self, names: Sequence[str], architecture: str) -> pa.Table:
        """Some columns of layers.parquet, for the checkpoints of one architecture; no others are read.

        Raises:
            InputError: There is no architecture of that name, or the file is damaged.
        """
        self._layers_of(architecture)
        schema = pa.schema([pq.read_schema(self.path / LAYERS_FILE).field(name) for name in names])
        return pa.Table.from_batches(
            [batch.select(list(names)) for batch in self._layer_batches(names, architecture)], schema
        )

    def _layer_batches(self, names: Sequence[str], architecture: str) -> Iterator[pa.RecordBatch]:
        """Rows of the checkpoints of an architecture in their order, some at a time."""
        alone = len(self.index["architectures"]) == 1
        wanted = None if alone else self._ids_of(architecture)
        with _whole(self.path, LAYERS_FILE), pq.ParquetFile(self.path / LAYERS_FILE, memory_map=True) as file:
            for batch in file.iter_batches(columns=list(dict.fromkeys([*names, *([] if alone else ["id"])]))):
                yield batch if wanted is None else batch.filter(pc.is_in(batch["id"], value_set=wanted))

    def _ids_of(self, architecture: str) -> pa.Array:
        return self.models["id"].filter(pc.equal(self.models["architecture"], architecture)).combine_chunks()

    def _layers_of(self, architecture: str) -> list[dict[str, Any]]:
        if architecture not in self.index["architectures"]:
            known = ", ".join(sorted(self.index["architectures"]))
            raise InputError(f"{self.path} has no architecture {architecture!r}: take one of {known}")
        return self.index["architectures"][architecture]["layers"]

    def _size(self, name: str) -> int:
        return len(SHAPE) if name == "shape" else self.latent_dim

    @property
    def left_out(self) -> list[dict[str, str]]:
        """Checkpoints that could not be embedded: ``id`` and ``reason``."""
        return self.index["left_out"]


def read_index(folder: Path) -> dict[str, Any]:
    """The content of embeddings.json.

    Raises:
        InputError: It is missing, or is none.
    """
    path = folder / INDEX_FILE
    remedy = f"python jobs/embed.py --model MODEL --store STORE --output {folder}"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} {_instead(folder)}{near(folder, is_embeddings)}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete {folder} and run {remedy}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{path}: its format is not {FORMAT!r}; name a folder that jobs/embed.py wrote")
    if index.get("version") != VERSION:
        raise InputError(f"{path}: version is {index.get('version')!r}, this sane_ray reads {VERSION}: make them again")
    return index


def is_embeddings(folder: Path) -> bool:
    """Whether a folder has the index of embeddings."""
    return (folder / INDEX_FILE).is_file()


def _instead(folder: Path) -> str:
    """What is in the place of embeddings, and how to make some; nothing is proposed to be written into what is dear."""
    if is_store(folder):
        return f"is a token store, no embeddings: embed it with `python jobs/embed.py --model MODEL --store {folder}`"
    begun = (folder / IDENTITY_FILE).is_file()
    if begun or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        what = f"holds no complete embeddings ({INDEX_FILE} is missing)" if folder.exists() else "does not exist"
        return f"{what}: make embeddings with `python jobs/embed.py --model MODEL --store STORE --output {folder}`"
    return f"holds no embeddings ({INDEX_FILE} is missing): name a folder that jobs/embed.py wrote"


def _check_rows(folder: Path, name: str, index: dict[str, Any]) -> None:
    """Raises ``InputError`` unless a table has the rows that the index says, by its footer alone."""
    with _whole(folder, name):
        rows = pq.read_metadata(folder / name).num_rows
    if rows != index["rows"][name]:
        raise InputError(
            f"{folder / name}: has {rows} rows instead of {index['rows'][name]}; delete {folder} and run jobs/embed.py "
            "again"
        )


@contextlib.contextmanager
def _whole(folder: Path, name: str) -> Iterator[None]:
    """Says what cannot be read inside, and what to do."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise _damaged(folder, name, str(error)) from error


def _damaged(folder: Path, name: str, reason: str) -> InputError:
    return InputError(f"{folder / name}: damaged or missing ({reason}); delete {folder} and run jobs/embed.py again")


def _known(name: str) -> str:
    if name not in (*VECTORS, "shape"):
        raise InputError(f"there are no vectors {name!r}: take one of {', '.join(VECTORS)} or shape")
    return name


def _matrix(table: pa.Table, name: str, size: int) -> NDArray[np.float32]:
    values = table[name].combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), size)
