"""The files of a checkpoint's tensors: torch's distributed checkpoint format, summed when written, read without trust.

``.metadata`` is a pickle: its reader knows the few plain classes it is made of and refuses all others. Tensors are read
with ``weights_only``. Nothing here knows which checkpoint is complete.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sane_ray.pretraining.state import RNG

METADATA_FILE = ".metadata"

_CHUNK = 1 << 24

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class SummedWriter(FileSystemWriter):
    """Writes this rank's tensors into an existing folder and keeps size and crc32 of every file it wrote.

    Sums are taken of the bytes on their way to the file: what storage makes of them is checked against what was meant.
    Files are synced. A failure of storage surfaces as the OSError it was.
    """

    def __init__(self, folder: Path) -> None:
        # per_thread_copy_ahead would wait for this device's stream: the tensors are in main memory already
        super().__init__(folder, per_thread_copy_ahead=0)
        self.fs = _SummingFiles()

    @property
    def files(self) -> dict[str, dict[str, int]]:
        """``{name: {"bytes": ..., "crc32": ...}}`` of this rank's files."""
        return cast(_SummingFiles, self.fs).files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes; torch's archive, interrupted by an OSError, would end as an error of its own."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause = _os_error_behind(error)
            if cause is None or cause is error:
                raise
            raise OSError(cause.errno, cause.strerror or str(cause), cause.filename) from error


class StrictReader(FileSystemReader):
    """Reads what ``SummedWriter`` wrote.

    Raises:
        pickle.UnpicklingError: the metadata holds something else than metadata.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata read at the start."""
        return self.metadata


class TensorsOnly(DefaultLoadPlanner):
    """Loads tensors and refuses pickled values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called for what we wrote.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


def read_metadata(folder: Path) -> Metadata:
    """The index of a checkpoint's tensors.

    Raises:
        OSError: storage fails.
        pickle.UnpicklingError: the file holds something else.
    """
    with (folder / METADATA_FILE).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    return metadata


def misfit(metadata: Metadata, tensors: dict[str, Tensor]) -> str | None:
    """The first disagreement of a checkpoint with the tensors that shall take it over; None if they agree.

    Random number generators do not count: each rank has its own.
    """
    stored = metadata.state_dict_metadata
    for name in sorted(name for name in stored.keys() | tensors.keys() if not name.startswith(RNG)):
        if name not in stored:
            return f"{name} is not in it"
        if name not in tensors:
            return f"{name} is not in this model"
        entry = stored[name]
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensors[name].shape:
            return f"{name} has {getattr(entry, 'size', 'no shape')} there and {tensors[name].shape} here"
    return None


def storage_failure(error: CheckpointException) -> OSError | None:
    """The failure of storage that ended a collective save or load; None if anything else did, on any rank."""
    failures = {rank: wrapped[0] for rank, wrapped in error.failures.items()}
    if not all(isinstance(failure, OSError) for failure in failures.values()):
        return None
    return OSError("; ".join(f"worker {rank}: {failure}" for rank, failure in failures.items()))


def crc32_of(path: Path) -> int:
    """crc32 of a file's bytes, read in pieces."""
    total = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            total = zlib.crc32(piece, total)
    return total


class _SummingFiles(FileSystem):
    """Plain files whose written bytes are summed."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as raw:
            stream = _Summing(cast(io.BufferedWriter, raw))
            yield stream
        self.files[Path(path).name] = {"bytes": stream.size, "crc32": stream.crc32}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Nothing: making the folder's parents would put a checkpoint where a mount used to be."""


class _Summing(io.RawIOBase):
    """Passes writes on and sums them."""

    def __init__(self, raw: io.BufferedWriter) -> None:
        self._raw = raw
        self.size = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        self._raw.write(data)
        size = memoryview(data).nbytes
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += size
        return size

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._raw.flush()

    def fileno(self) -> int:
        return self._raw.fileno()

    def writable(self) -> bool:
        return True


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what metadata is made of, and nothing that could do anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _os_error_behind(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
