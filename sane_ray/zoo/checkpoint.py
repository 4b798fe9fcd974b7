"""One checkpoint file to its tensors: safetensors or torch files, recognised by their content, read slice by slice.

Tensors of safetensors files and of torch's zip files stay on disk until they are asked for, and are then read with
plain file reads: pages of a memory map count as resident memory. Never runs code from a file: torch files are read
with ``weights_only=True``, and one that needs more is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sane_ray.errors import InputError

WRAPPERS = ("model_state_dict", "state_dict", "model", "model_state")
"""Keys under which training scripts put the state dict beside optimiser and epoch."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""


class Checkpoint(ABC):
    """The tensors of one checkpoint: names, shapes and dtypes at once, values when asked for.

    Attributes:
        path: File or folder, for messages.
        meta: Every tensor on torch's meta device, by key in the order of the state dict.
    """

    path: str
    meta: dict[str, Tensor]

    @abstractmethod
    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Flat values ``start`` to ``stop`` (in row-major order) of one tensor, as stored, 1-D, on the CPU.

        Reads no more of the file than that where the format allows. Do not write to the result.

        Raises:
            InputError: The file is damaged there.
        """

    def tensor(self, key: str) -> Tensor:
        """One whole tensor in its own shape."""
        return self.read(key).reshape(self.meta[key].shape)

    def state_dict(self) -> dict[str, Tensor]:
        """All of them."""
        return {key: self.tensor(key) for key in self.meta}


class LoadedCheckpoint(Checkpoint):
    """A state dict that is in memory, or a view of a memory-mapped file.

    Raises:
        InputError: A tensor is sparse, quantised, nested or without values: it has no flat values as stored.
    """

    def __init__(self, path: str | Path, state_dict: Mapping[str, Tensor]) -> None:
        self.path = str(path)
        self._tensors = {key: _plain(path, key, value) for key, value in state_dict.items()}
        for key, value in self._tensors.items():
            if value.is_meta:
                raise InputError(f"{path}: tensor {key!r} has no values (device meta); save it from a loaded model")
        self.meta = {key: _meta(value.shape, value.dtype) for key, value in self._tensors.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See ``Checkpoint.read``."""
        part, start, stop = _window(self._tensors[key], start, stop)
        return part.reshape(-1)[start:stop]


@dataclass(frozen=True)
class StoredTensor:
    """Where the values of a tensor lie in a file."""

    file: Path
    offset: int
    """Bytes from the file's start to the start of the tensor's storage."""
    view: Tensor
    """On the meta device: its shape, dtype, and offset and strides in that storage."""


class StoredCheckpoint(Checkpoint):
    """Tensors that lie uncompressed in one or more files, and are read from there when asked for.

    Holds no file open between reads, and can be sent to another process that sees the same files.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = str(path)
        self._tensors = dict(tensors)
        self.meta = {key: _meta(each.view.shape, each.view.dtype) for key, each in self._tensors.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See ``Checkpoint.read``. Of a tensor that is no contiguous block, reads the span of the rows asked for."""
        stored = self._tensors[key]
        with _opened(stored.file) as file:
            return _read_stored(file, stored, start, stop)

    def state_dict(self) -> dict[str, Tensor]:
        """All of them; opens each file once."""
        values: dict[str, Tensor] = {}
        for path in {each.file: None for each in self._tensors.values()}:
            with _opened(path) as file:
                for key, stored in self._tensors.items():
                    if stored.file == path:
                        values[key] = _read_stored(file, stored).reshape(stored.view.shape)
        return {key: values[key] for key in self._tensors}


class SafetensorsCheckpoint(StoredCheckpoint):
    """One checkpoint of one or several safetensors files.

    Args:
        path: The file; or, for several, what names them (such as their index), for messages.
        files: The file of every key, for a checkpoint in shards; None takes all tensors of the file ``path``.

    Keys come in ``natural_order``, and lose ``PREFIXES`` that all of them have.

    Raises:
        InputError: A file is missing, truncated, or no valid safetensors file, or lacks a key that it should have.
    """

    def __init__(self, path: str | Path, files: Mapping[str, Path] | None = None) -> None:
        if files is None:
            tensors = _safetensors_header(Path(path))
        else:
            headers = {file: _safetensors_header(file) for file in sorted(set(files.values()))}
            for key, file in files.items():
                if key not in headers[file]:
                    raise InputError(
                        f"{path}: says that {file} holds tensor {key!r}, which is not there; get both again"
                    )
            tensors = {key: headers[file][key] for key, file in files.items()}
        if not tensors:
            raise InputError(f"{path}: no tensors in it; save model.state_dict() there")
        ordered = {key: tensors[key] for key in sorted(tensors, key=natural_order)}
        super().__init__(path, _without_prefixes(ordered, PREFIXES))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens one checkpoint file without reading its values (those of torch's legacy format excepted).

    The format is recognised by the file's content, whatever its name. The state dict is found where it is nested in
    the file (see ``find_state_dict``), ``PREFIXES`` are undone, and entries that are no tensors are left out. Keys keep
    the file's order; safetensors files keep none, so theirs are put in the order of ``natural_order``.

    Args:
        path: a safetensors file, or a file written by ``torch.save`` (zip or legacy format).

    Raises:
        InputError: the file is missing, empty, truncated, encrypted, no checkpoint, or needs Python code to be read.
    """
    path = Path(path)
    match _recognise(path):
        case "safetensors":
            return SafetensorsCheckpoint(path)
        case "zip":
            return _open_zip(path)
        case _:
            return LoadedCheckpoint(path, _weights(_torch_load(path, "cpu"), path))


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads all the weights of one checkpoint: see ``open_checkpoint``.

    Returns:
        CPU tensors by key. Some may share memory, as they did when they were saved: do not write to them.

    Raises:
        InputError: as ``open_checkpoint``.
    """
    return open_checkpoint(path).state_dict()


_TENSOR_ORDER = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def natural_order(key: str) -> tuple[list[list[str | int]], int, str]:
    """Sort key for keys of a state dict: ``layers.9`` before ``layers.10``, weight before bias as torch has them.

    For files that do not keep the order of the state dict, such as safetensors. It is the order of a network whose
    modules are numbered; where they are named (``conv1, bn1, conv2``) the original order cannot be known from the
    names, but this one is always the same.
    """
    module, _, name = key.rpartition(".")
    parts: list[list[str | int]] = [  # Python refuses to read numbers of thousands of digits
        [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,18})", step)]
        for step in module.split(".")
    ]
    return parts, _TENSOR_ORDER.index(name) if name in _TENSOR_ORDER else len(_TENSOR_ORDER), name


# --- Finding the weights among what a file holds ----------------------------------------------------------------------

_NO_WEIGHTS = re.compile(r"optim|sched|scaler|exp_avg|momentum_buffer|(^|_)(rng|amp)($|_)", re.IGNORECASE)
"""Entries of a training script's dict that hold tensors, but none of a model."""

_SECOND_CHOICE = re.compile(r"(^|_)(ema|teacher|target|momentum|swa|averaged?)($|_)", re.IGNORECASE)
"""Second copies of the weights, taken where nothing else is there."""

_DEEPEST = 8
_LIGHTNING = "pytorch-lightning_version"


def find_state_dict(content: Any) -> Mapping[str, Any] | None:
    """The state dict in what a training script saved, wherever it is nested.

    Goes into ``WRAPPERS`` first; else takes the mapping with the most values in tensors, never one of an optimiser,
    and of equals the first; an averaged copy (``ema``) only where nothing else is there. Its keys are names.

    Returns:
        The mapping, or None if nothing in ``content`` is a state dict.
    """
    return _find(content, set())


def _find(content: Any, seen: set[int]) -> Mapping[str, Any] | None:
    if not isinstance(content, Mapping) or id(content) in seen or len(seen) > _DEEPEST:
        return None
    seen.add(id(content))
    for key in WRAPPERS:
        found = _find(content.get(key), seen)
        if found is not None:
            return found
    candidates = list(_mappings(content, set()))
    return max(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def _mappings(
    content: Mapping[Any, Any], seen: set[int], first_choice: bool = True, depth: int = 0
) -> Iterator[tuple[tuple[bool, int, int], Mapping[str, Any]]]:
    """Everything that looks like a state dict, and its rank: a first choice, its number of real values, of values."""
    seen.add(id(content))  # a file may hold a mapping in itself
    if not all(isinstance(key, str) for key in content):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    weights = [value for key, value in tensors.items() if "." in key or not _NO_WEIGHTS.search(key)]
    if weights:
        real = sum(value.numel() for value in weights if value.is_floating_point())
        yield (first_choice, real, sum(value.numel() for value in weights)), content
    if depth == _DEEPEST or "param_groups" in content:
        return
    for key, value in content.items():
        if isinstance(value, Mapping) and id(value) not in seen and not _NO_WEIGHTS.search(key):
            yield from _mappings(value, seen, first_choice and not _SECOND_CHOICE.search(key), depth + 1)


def _weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of the state dict in a torch file's content, prefixes undone."""
    state_dict = find_state_dict(content)
    if state_dict is None:
        raise InputError(f"{path}: {_what_instead(content)}; save model.state_dict() there, or remove it from the zoo")
    for key, value in state_dict.items():
        if isinstance(value, _Array):
            raise InputError(f"{path}: {key!r} is a numpy array, not a tensor; save it with torch.from_numpy")
    tensors = {key: _plain(path, key, value) for key, value in state_dict.items() if isinstance(value, Tensor)}
    of_lightning = isinstance(content, Mapping) and _LIGHTNING in content
    return _without_prefixes(tensors, (*PREFIXES, "model.") if of_lightning else PREFIXES)


def _what_instead(content: Any) -> str:
    if not isinstance(content, Mapping):
        kind = "numpy array" if isinstance(content, _Array) else type(content).__name__
        return f"holds a {kind}, not a state dict"
    for key, value in content.items():
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
            return f"holds tensors without names, in a list under {key!r}, not a state dict"
        if isinstance(value, _Array):
            return f"{key!r} is a numpy array, not a tensor"
    if any(isinstance(value, Tensor) for value in content.values()):
        return "holds tensors under keys that are no names, not a state dict"
    return "no tensors in it that are a model's weights"


def _without_prefixes(tensors: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The same tensors; a prefix is part of the model where not every key has it."""
    stripped = dict(tensors)
    while stripped:
        prefix = next((prefix for prefix in prefixes if all(key.startswith(prefix) for key in stripped)), None)
        if prefix is None:
            break
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return stripped


def _plain(path: str | Path, key: str, tensor: Tensor) -> Tensor:
    """The tensor, if its values lie in memory as numbers one after the other."""
    if tensor.is_quantized:
        raise InputError(f"{path}: tensor {key!r} is quantised; save its dequantize() in its place")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise InputError(
            f"{path}: tensor {key!r} is {kind}; save a dense tensor (to_dense, to_padded_tensor) in its place"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise InputError(f"{path}: tensor {key!r} is a lazy conjugate; save its resolve_conj().resolve_neg()")
    return tensor.detach()


# --- Reading values where they lie ------------------------------------------------------------------------------------


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _window(tensor: Tensor, start: int, stop: int | None) -> tuple[Tensor, int, int]:
    """The smallest run of rows that holds flat values start to stop, and where in it they are.

    So that a slice of a tensor that is no contiguous block (transposed, expanded) is copied without the rest of it.
    """
    start, stop, _ = slice(start, stop).indices(tensor.numel())
    stop = max(start, stop)
    while tensor.dim() and start < stop and not tensor.is_contiguous():
        row = tensor[0].numel()
        first, last = start // row, -(-stop // row)
        start, stop = start - first * row, stop - first * row
        if tensor.dim() == 1 or last - first > 1:
            return tensor[first:last], start, stop
        tensor = tensor[first]
    return tensor, start, stop


def _read_stored(file: BufferedReader, stored: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    part, start, stop = _window(stored.view, start, stop)
    begin = stored.offset + int(part.storage_offset()) * part.element_size()
    if start == stop:
        return torch.empty(0, dtype=part.dtype)
    if part.is_contiguous():
        return _read_values(file, begin + start * part.element_size(), stop - start, part.dtype)
    values = _read_values(file, begin, _span(part), part.dtype)
    return values.as_strided(part.shape, part.stride()).reshape(-1)[start:stop]


def _span(tensor: Tensor) -> int:
    """Values of its storage from the first to the last that belongs to it."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _read_values(file: BufferedReader, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    file.seek(offset)
    if file.readinto(buffer.numpy().data) != len(buffer):
        raise InputError(f"{file.name}: has become shorter since it was opened; copy it again, and prepare again")
    return buffer.view(dtype)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


# --- Formats ----------------------------------------------------------------------------------------------------------

_ZIP_MAGIC = b"PK\x03\x04"
_OTHER_FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file (Keras); convert its weights to safetensors",
    b"GGUF": "a GGUF file; convert its weights to safetensors",
    b"\x93NUMPY": "a numpy file; save a state dict of tensors",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"PK\x05\x06": "an empty zip archive",
}
"""First bytes of files that are often taken for checkpoints, and what they are."""


def _recognise(path: Path) -> str:
    """``safetensors``, ``zip`` or ``legacy``, from the first bytes."""
    try:
        if path.is_dir():
            raise InputError(
                f"{path}: is a folder, not a checkpoint file; name a file in it, or the folder as --source"
            )
        if not path.is_file():
            raise InputError(f"{path}: no such checkpoint file; check the path, or prepare again from a complete zoo")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    if size == 0:
        raise InputError(f"{path}: the checkpoint file is empty; copy it again, or remove it from the zoo")
    with _opened(path) as file:
        head = file.read(32)
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise InputError(f"{path}: is no checkpoint, but {what}, or remove it from the zoo")
    if head.startswith(_ZIP_MAGIC):
        return "zip"
    # torch's legacy files and plain pickles begin with the protocol's byte, and none is a header of this length
    is_header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER
    return "safetensors" if is_header or (path.suffix == ".safetensors" and head[:1] != b"\x80") else "legacy"


_LONGEST_HEADER = 100_000_000
"""Bytes; what the safetensors library accepts."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""By their names in a safetensors header."""


def _safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Where every tensor of a safetensors file lies, once the library has found the header to be right."""
    if _recognise(path) != "safetensors":
        raise InputError(f"{path}: not a safetensors file; give it the name of its own format")
    try:
        with safe_open(path, framework="pt"):  # checks lengths, overlaps and gaps; reads no values
            pass
        with _opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        return {
            key: StoredTensor(
                path, 8 + length + entry["data_offsets"][0], _meta(entry["shape"], _dtype(path, key, entry))
            )
            for key, entry in header.items()
            if key != "__metadata__"
        }
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{path}: truncated, or not a safetensors file ({error}); copy or download it again, or remove it"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("two entries of its header have the same name")
    return content


def _dtype(path: Path, key: str, entry: Mapping[str, Any]) -> torch.dtype:
    if entry["dtype"] not in _DTYPES:
        raise InputError(
            f"{path}: tensor {key!r} has the number format {entry['dtype']}, which torch cannot hold; "
            f"save it as one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[entry["dtype"]]


def _open_zip(path: Path) -> Checkpoint:
    """A file of torch's zip format: its tensors are read where they lie, if they lie there as they are."""
    records = _records(path)
    if records is not None and (content := _without_values(path)) is not None:
        stored = {key: StoredTensor(path, _place(value), value) for key, value in _weights(content, path).items()}
        if all(each.offset in records for each in stored.values()):
            for key, each in stored.items():
                if (int(each.view.storage_offset()) + _span(each.view)) * each.view.itemsize > records[each.offset]:
                    raise InputError(f"{path}: damaged: tensor {key!r} is larger than its record; copy it again")
            return StoredCheckpoint(path, stored)
    return LoadedCheckpoint(path, _weights(_torch_load(path, "cpu"), path))


def _without_values(path: Path) -> Any:
    """What a torch file holds, tensors on the meta device; None where it has a kind of tensor that cannot be there."""
    try:
        return _torch_load(path, "meta")
    except InputError:
        return None  # whatever it is, reading it with its values says it


def _place(tensor: Tensor) -> int:
    """Where torch says that the storage of a tensor begins in its file; -1 where this version of torch does not."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1


def _records(path: Path) -> dict[int, int] | None:
    """Sizes of the storages in a zip file by where they begin, in bytes.

    None if they must be converted when they are read: they were compressed, or have another order of bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive, _opened(path) as file:
            entries = archive.infolist()
            _refuse_other_archives(path, entries)
            order = next((each for each in entries if each.filename.endswith("/byteorder")), None)
            if order is not None and archive.read(order) != b"little":
                return None
            storages = [each for each in entries if "/data/" in each.filename and not each.is_dir()]
            if any(each.compress_type != zipfile.ZIP_STORED for each in storages):
                return None
            return {_begin(file, each): each.file_size for each in storages}
    except InputError:
        raise
    except Exception as error:  # a damaged archive fails in whatever way its bytes happen to lead to
        raise InputError(
            f"{path}: truncated, or no checkpoint ({error}); copy or download it again, or remove it from the zoo"
        ) from error


def _refuse_other_archives(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = {each.filename.partition("/")[2] for each in entries}
    if any(each.flag_bits & 1 for each in entries):
        raise InputError(f"{path}: is encrypted; decrypt it first, or remove it from the zoo")
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise InputError(
            f"{path}: is a TorchScript archive, which is a program, so it is refused; where you trust its author, save "
            "torch.jit.load(path).state_dict() with torch.save or safetensors"
        )
    if "data.pkl" not in names:
        raise InputError(
            f"{path}: is a zip archive, but none that torch.save has written; unpack it, or remove it from the zoo"
        )


def _begin(file: BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where the content of an archive's entry begins: after a header of 30 bytes, a name and a filler."""
    file.seek(entry.header_offset)
    header = file.read(30)
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _Inert:
    """Stands for a value beside the weights that is of no use here: takes whatever a file says it was made from."""

    __slots__ = ()

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Array(_Inert):
    """Stands for a numpy array, so that one in the place of a tensor is noticed."""

    __slots__ = ()


STAND_INS: list[Any] = [
    *((_Inert, f"{module}.scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *((_Array, f"{module}._reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *(
        (_Inert, name)
        for name in (
            "numpy.dtype",
            "numpy.ndarray",
            "argparse.Namespace",
            "datetime.datetime",
            "datetime.timedelta",
            "pathlib.PosixPath",
            "pathlib.WindowsPath",
            "pathlib._local.PosixPath",
            "pathlib._local.WindowsPath",
        )
    ),
]
"""What training scripts often save beside the weights. None of it is made, not even numpy's own reading of an array:
an object without content takes its place."""

STAND_INS_LOCK = threading.Lock()  # torch keeps the list of what is allowed in a global


_TOLD = 2000
"""Letters of an error that are looked at: a hostile file may put all of itself into the message."""


def _torch_load(path: Path, device: str) -> Any:
    try:
        with _opened(path) as file, STAND_INS_LOCK, torch.serialization.safe_globals(STAND_INS):
            return torch.load(
                file, map_location=device, weights_only=True
            )  # by its name, torch may take another format
    except InputError:
        raise
    except Exception as error:  # a damaged file fails in whatever way its bytes happen to lead to
        reason = _reason(error)
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in reason:
            raise InputError(
                f"{path}: needs Python code to be read ({reason}), which may do anything, so it is refused; "
                "where you trust its author, load it with the program that wrote it and save model.state_dict() alone, "
                "with torch.save or safetensors"
            ) from error
        raise InputError(
            f"{path}: truncated, or no checkpoint that can be read without running code ({reason}); "
            "copy or download it again, or remove it from the zoo"
        ) from error


def _reason(error: Exception) -> str:
    """The telling line of torch's message, without its advice to read the file unsafely."""
    words, text = type(error).__name__, str(error)[:_TOLD]
    for pattern in (r"WeightsUnpickler error:\s*(.+)", r"(.*\bGLOBAL\b.*)", r"(\S.*)"):
        found = re.search(pattern, text)
        if found:
            words = found[1]
            break
    return re.split(r"(?<=\S)\. ", words.strip())[0][:160].rstrip(". ")
