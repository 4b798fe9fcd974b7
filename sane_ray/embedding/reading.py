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

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray.embedding.encoder import SHAPE, VECTORS
from sane_ray.errors import InputError

FORMAT = "sane_ray embeddings"
VERSION = 1

INDEX_FILE = "embeddings.json"
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
        layers: layers.parquet, in the same order, layers of a checkpoint one after the other.
    """

    path: Path
    index: dict[str, Any]
    models: pa.Table
    layers: pa.Table

    @classmethod
    def open(cls, folder: str | Path) -> Embeddings:
        """Opens a folder of embeddings.

        Raises:
            InputError: It is none, is incomplete or damaged, or of another format version.
        """
        path = Path(folder).expanduser().absolute()
        index = read_index(path)
        models, layers = (_read(path, name, index) for name in (MODELS_FILE, LAYERS_FILE))
        return cls(path, index, models, layers)

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
        if architecture not in self.index["architectures"]:
            known = ", ".join(sorted(self.index["architectures"]))
            raise InputError(f"{self.path} has no architecture {architecture!r}: take one of {known}")
        ids = self.models.filter(pc.field("architecture") == architecture)["id"]
        rows = self.layers.filter(pc.is_in(self.layers["id"], value_set=ids.combine_chunks()))
        count = len(self.index["architectures"][architecture]["layers"])
        matrix = _matrix(rows, _known(name), self._size(name))
        return ids.to_pylist(), matrix.reshape(len(ids), count, self._size(name))

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
        raise InputError(f"{path} is missing: no complete embeddings are there; make them with {remedy}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete {folder} and run {remedy}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{path}: its format is not {FORMAT!r}; name a folder that jobs/embed.py wrote")
    if index.get("version") != VERSION:
        raise InputError(f"{path}: version is {index.get('version')!r}, this sane_ray reads {VERSION}: make them again")
    return index


def _read(folder: Path, name: str, index: dict[str, Any]) -> pa.Table:
    path = folder / name
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: damaged or missing ({error}); delete {folder} and run jobs/embed.py again"
        ) from error
    if len(table) != index["rows"][name]:
        raise InputError(
            f"{path}: has {len(table)} rows instead of {index['rows'][name]}; delete {folder} and run jobs/embed.py "
            "again"
        )
    return table


def _known(name: str) -> str:
    if name not in (*VECTORS, "shape"):
        raise InputError(f"there are no vectors {name!r}: take one of {', '.join(VECTORS)} or shape")
    return name


def _matrix(table: pa.Table, name: str, size: int) -> NDArray[np.float32]:
    values = table[name].combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), size)
