"""The folder of samples: networks as safetensors, what is known of each as Parquet, and what they are in samples.json.

samples.json                     identity, anchors, recipe, what builds the networks, verdict; last, to say it is whole
samples.parquet                  one row a kept network: method, repetition, accuracy, novelty, file
candidates.parquet               one row a drawn network of every source at every scale
networks/<method>/<i>.safetensors
measured/                        what was measured, so that a run that was cut off measures nothing twice
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from sane_ray.errors import InputError

INDEX_FILE, ROWS_FILE, CANDIDATES_FILE = "samples.json", "samples.parquet", "candidates.parquet"
IDENTITY_FILE = ".identity"
"""Digest of the run that the folder was begun by."""

NETWORKS_FOLDER, MEASURED_FOLDER = "networks", "measured"
FORMAT, VERSION = "sane_ray.samples", 1


@dataclass(frozen=True)
class Samples:
    """A complete folder of samples; open one with ``Samples.open``."""

    path: Path
    index: dict[str, Any]
    rows: list[dict[str, Any]]
    """Of samples.parquet."""

    @classmethod
    def open(cls, folder: Path) -> Samples:
        """Opens a folder.

        Raises:
            InputError: it is no complete folder of samples, or of another version.
        """
        index = read_index(folder)
        if index is None:
            what = (
                "does not exist" if not folder.exists() else f"has no {INDEX_FILE}: it is incomplete, or something else"
            )
            raise InputError(f"samples {folder} {what}; name a folder that jobs/sample.py has finished")
        try:
            rows = pq.read_table(folder / ROWS_FILE).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{folder / ROWS_FILE} cannot be read ({error}): copy the folder again") from error
        return cls(folder, index, rows)

    def of_method(self, method: str) -> list[dict[str, Any]]:
        """The kept networks of a method, in order of repetition."""
        return [row for row in self.rows if row["method"] == method]

    def network(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights of one network, as its file has them.

        Raises:
            InputError: the file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / row["file"]
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}): sample again into a new folder") from error


def read_index(folder: Path) -> dict[str, Any] | None:
    """What samples.json says; None if there is none.

    Raises:
        InputError: it is damaged or of another version.
    """
    path = folder / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete the folder and sample again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise InputError(f"{path} is not what jobs/sample.py of this version writes: name another folder")
    return content


def check_output(folder: Path, digest: str) -> bool:
    """Whether the folder already holds the samples of this identity.

    Raises:
        InputError: it holds others, or something else.
    """
    index = read_index(folder)
    begun = folder / IDENTITY_FILE
    if index is None and begun.is_file() and begun.read_text(encoding="utf-8").strip() != digest:
        raise InputError(
            f"{folder} holds unfinished samples with other settings: name another --output or --run-name, or delete it"
        )
    if index is not None:
        if index["identity"] == digest:
            return True
        raise InputError(
            f"{folder} holds samples with other settings: name another --output or --run-name, or delete it"
        )
    ours = {NETWORKS_FOLDER, MEASURED_FOLDER, ROWS_FILE, CANDIDATES_FILE, "plots", "report.html"}
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours) if folder.exists() else []
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise InputError(f"{folder} holds other files ({', '.join(others[:3])}): name a new folder for the samples")
    return False


def write_identity(folder: Path, digest: str) -> None:
    """Says whose the folder is before anything else is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IDENTITY_FILE).write_text(f"{digest}\n", encoding="utf-8")


def network_file(method: str, repetition: int) -> str:
    """Path of a network in the folder."""
    return f"{NETWORKS_FOLDER}/{method.replace(':', '-')}/{repetition:03d}.safetensors"


def write_network(folder: Path, file: str, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one network; the file appears whole."""
    from safetensors.torch import save_file

    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    save_file({key: value.contiguous() for key, value in weights.items()}, aside, dict(metadata))
    aside.replace(path)


def write_rows(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as Parquet; the file appears whole."""
    aside = folder / f".{name}.{uuid.uuid4().hex[:8]}"
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), aside)
    aside.replace(folder / name)


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes samples.json, which makes the folder complete."""
    aside = folder / f".{INDEX_FILE}.{uuid.uuid4().hex[:8]}"
    aside.write_text(json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1) + "\n", encoding="utf-8")
    aside.replace(folder / INDEX_FILE)
