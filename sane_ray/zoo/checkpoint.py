"""One checkpoint file to its tensors: safetensors or torch files, recognised by their content, read slice by slice.

Tensors of safetensors files and of torch's zip files stay on disk until they are asked for, and are then read with
plain file reads: pages of a memory map count as resident memory. Never runs code from a file: torch files are read
with ``weights_only=True``, and one that needs more is refused. Never takes much more memory than a file is large: one
that says otherwise is refused before it is read.
"""

from __future__ import annotations

import json
import logging
import pickle
import pickletools
import re
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.zoo import foreign
from sane_ray.zoo.archives import Limits
from sane_ray.zoo.key_order import Place, order_of

WRAPPERS = ("model_state_dict", "state_dict", "model", "model_state")
"""Keys under which training scripts put the state dict beside optimiser and epoch."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""

LIMITS = Limits()
"""When a compressed torch file is taken for a bomb, and refused."""

LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header; what the safetensors library accepts."""

_LOG = logging.getLogger(__name__)


class Checkpoint(ABC):
    """The tensors of one checkpoint: names, shapes and dtypes at once, values when asked for.

    Attributes:
        path: File or folder, for messages.
        meta: Every tensor on torch's meta device, by key in the order of the state dict. Each costs about 450 bytes of
            memory besides its name, whatever its size: 0.15 MB for a ResNet-50, so whoever looks at many checkpoints
            keeps what it needs of their ``meta``, and not the checkpoints.
        is_lazy: Whether ``read`` reads no more than it is asked for (safetensors, torch's zip files as torch writes
            them). Otherwise opening has read all values into memory (legacy and compressed files), and opening the
            checkpoint once for each part of it reads all of it each time.
    """

    path: str
    meta: dict[str, Tensor]
    is_lazy: bool = False

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
                raise InputError(
                    f"{path}: tensor {key[:100]!r} has no values (device meta); save it from a loaded model"
                )
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

    @property
    def place(self) -> Place:
        """What its order among others is told from."""
        return Place(str(self.file), self.offset, self.view.numel(), self.view.dtype)


class StoredCheckpoint(Checkpoint):
    """Tensors that lie uncompressed in one or more files, and are read from there when asked for.

    Holds no file open between reads, and can be sent to another process that sees the same files.
    """

    is_lazy = True

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

    Keys come in the order that ``order_of`` tells, and lose ``PREFIXES`` that all of them have.

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
                        f"{path}: says that {file} holds tensor {key[:100]!r}, which is not there; get both again"
                    )
            tensors = {key: headers[file][key] for key, file in files.items()}
        if not tensors:
            raise InputError(f"{path}: no tensors in it; save model.state_dict() there")
        ordered = {key: tensors[key] for key in order_of({key: each.place for key, each in tensors.items()})}
        super().__init__(path, _without_prefixes(ordered, PREFIXES))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens one checkpoint file without reading its values (those of torch's legacy format excepted).

    The format is recognised by the file's content, whatever its name. The state dict is found where it is nested in
    the file (see ``find_state_dict``), ``PREFIXES`` are undone, and entries that are no tensors are left out. Keys keep
    the file's order; those of safetensors files come in the order in which their values lie where that is their
    writer's, and by name where the writer sorted them (see ``key_order``).

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
            return _loaded(path)


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads all the weights of one checkpoint: see ``open_checkpoint``.

    Returns:
        CPU tensors by key. Some may share memory, as they did when they were saved: do not write to them.

    Raises:
        InputError: as ``open_checkpoint``.
    """
    return open_checkpoint(path).state_dict()


# --- Finding the weights among what a file holds ----------------------------------------------------------------------

_NO_WEIGHTS = re.compile(r"optim|sched|scaler|exp_avg|momentum_buffer|(^|_)(rng|amp)($|_)", re.IGNORECASE)
"""Entries of a training script's dict that hold tensors, but none of a model."""

_SECOND_CHOICE = re.compile(
    r"(^|_)(ema|teacher|target|momentum|swa|averaged?|best|initial|previous|prev|old|backup|copy)($|_)", re.IGNORECASE
)
"""Second copies of the weights, taken where nothing else is there."""

_LIKE_WEIGHTS = re.compile(r"\.|^(weight|bias|running_mean|running_var)$")
"""Names of a module's tensors, unlike those of a loss or a history that training scripts put beside them."""

_DEEPEST = 8
_LIGHTNING = "pytorch-lightning_version"


def find_state_dict(content: Any, path: str | Path = "") -> Mapping[str, Any] | None:
    """The state dict in what a training script saved, wherever it is nested.

    At every level of nesting it is the first of these that is there:

    1. What lies under one of ``WRAPPERS``.
    2. All state dicts side by side, joined under their names: ``{"encoder": {…}, "decoder": {…}}`` becomes
       ``encoder.0.weight`` and so on. Tensors of the level itself keep their names, if these are names of weights. One
       that is alone keeps its names, too.
    3. A second copy (``ema``, ``best``): the one with the most values.
    4. What only may be weights, since neither its names nor a matrix say so: the one with the most values.

    Of an optimiser, a scheduler or a random state, nothing. What looks like weights and was left out is named in a
    warning, once for each combination, so that the equal files of a zoo do not all repeat it.

    Args:
        content: As ``load_safely`` returns it.
        path: Names the file in the warning.

    Returns:
        A mapping with names as keys, or None if nothing in ``content`` is a state dict.
    """
    search = _Search()
    found = search.find(content)
    if found is not None and search.left_out:
        _warn_of(search.left_out, path)
    return found


class _Search:
    """One search for a state dict. Enters each mapping once: a file may hold one twice, or in itself."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._seen: set[int] = set()

    def find(self, content: Any, place: str = "", depth: int = 0) -> Mapping[str, Any] | None:
        """The state dict in a mapping that lies at ``place`` (empty, or a dotted name with a dot at its end)."""
        if not isinstance(content, Mapping) or id(content) in self._seen or depth > _DEEPEST:
            return None
        self._seen.add(id(content))
        for key in WRAPPERS:
            found = self.find(content.get(key), f"{place}{key}.", depth + 1)
            if found is not None:
                self._note_beside(content, key, place, depth)
                return found
        if "param_groups" in content or not all(isinstance(key, str) for key in content):
            return None
        return self._side_by_side(content, self._parts(content, place, depth), place)

    def _parts(self, content: Mapping[Any, Any], place: str, depth: int) -> dict[str, Mapping[str, Any]]:
        """State dicts by the key under which they lie, second choices last."""
        keys = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)]
        keys = [key for key in keys if not _NO_WEIGHTS.search(key)]
        found = {
            key: self.find(content[key], f"{place}{key}.", depth + 1)
            for key in sorted(keys, key=lambda key: _SECOND_CHOICE.search(key) is not None)
        }
        return {key: part for key, part in found.items() if part is not None}

    def _side_by_side(
        self, content: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], place: str
    ) -> Mapping[str, Any] | None:
        own = _tensors(content)
        if all("." not in key and _NO_WEIGHTS.search(key) for key in own):
            own = {}
        first = {key: part for key, part in parts.items() if not _SECOND_CHOICE.search(key)}
        chosen = {key: part for key, part in first.items() if _looks_like_weights(part)}
        with_own = any(_LIKE_WEIGHTS.search(key) for key in own)
        if not chosen and not with_own:
            rest = [*([("", own)] if own else []), *first.items()]
            second = [(key, part) for key, part in parts.items() if key not in first]
            likely = ([each for each in pool if _looks_like_weights(each[1])] for pool in (rest, second))
            candidates = next((pool for pool in (*likely, rest, second) if pool), None)
            if candidates is None:
                return None
            name, part = max(candidates, key=lambda each: _values(each[1]))
            with_own = part is own
            chosen = {} if with_own else {name: part}
        self.left_out += [place + key for key in parts if key not in chosen and _looks_like_weights(parts[key])]
        if len(chosen) + with_own == 1:
            return content if with_own else next(iter(chosen.values()))
        return self._joined(content if with_own else {}, chosen, place)

    def _joined(self, own: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]], place: str) -> Mapping[str, Any]:
        """One state dict of several, each under its name; one whose keys are taken already is left out."""
        joined = {key: value for key, value in own.items() if isinstance(value, Tensor | _Array)}
        for name, part in parts.items():
            values = {key: value for key, value in part.items() if isinstance(value, Tensor | _Array)}
            named = {f"{name}.{key}": value for key, value in _without_prefixes(values, PREFIXES).items()}
            if named.keys() & joined.keys():
                self.left_out.append(place + name)
            else:
                joined |= named
        return joined

    def _note_beside(self, content: Mapping[Any, Any], wrapper: str, place: str, depth: int) -> None:
        """Notes what would have been weights without the wrapper."""
        before = len(self.left_out)  # what is left out of what is left out is not worth a word
        parts = self._parts(content, place, depth)
        del self.left_out[before:]
        self.left_out += [place + key for key, part in parts.items() if _looks_like_weights(part)]
        self.left_out += [place + key for key in _tensors(content) if _LIKE_WEIGHTS.search(key)]


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _looks_like_weights(part: Mapping[str, Any]) -> bool:
    return any(
        Tensor.dim(value) > (0 if _LIKE_WEIGHTS.search(key) else 1)
        for key, value in _tensors(part).items()
        if value.dtype.is_floating_point or "." in key
    )


def _values(part: Mapping[str, Any]) -> tuple[int, int]:
    """How many real values a mapping has in tensors, and how many at all."""
    tensors = _tensors(part).values()
    real = sum(Tensor.numel(value) for value in tensors if value.dtype.is_floating_point)
    return real, sum(map(Tensor.numel, tensors))


_WARNED: set[tuple[str, ...]] = set()


def _warn_of(left_out: list[str], path: str | Path) -> None:
    names = tuple(name[:100] for name in left_out[:5])
    if names not in _WARNED and len(_WARNED) < 1000:
        _WARNED.add(names)
        more = f" and {len(left_out) - len(names)} more" if len(left_out) > len(names) else ""
        _LOG.warning("%s: more than one set of weights: %s%s is not read", path, ", ".join(names), more)


def state_dict_in(content: Any, path: str | Path, size: int) -> dict[str, Tensor]:
    """The tensors of the state dict in a torch file's content (see ``find_state_dict``), ``PREFIXES`` undone.

    Args:
        content: As ``load_safely`` returns it.
        path: Names the file in messages.
        size: Bytes of the file.

    Raises:
        InputError: No state dict is in it, or one with a tensor that has no flat values as stored, or that says it has
            many more values than the file holds.
    """
    state_dict = find_state_dict(content, path)
    if state_dict is None:
        raise InputError(f"{path}: {_what_instead(content)}; save model.state_dict() there, or remove it from the zoo")
    for key, value in state_dict.items():
        if isinstance(value, _Array):
            raise InputError(f"{path}: {key[:100]!r} is a numpy array, not a tensor; save it with torch.from_numpy")
    tensors = {key: _plain(path, key, value) for key, value in state_dict.items() if isinstance(value, Tensor)}
    _refuse_blown_up(path, tensors, size)
    of_lightning = isinstance(content, Mapping) and _LIGHTNING in content
    return _without_prefixes(tensors, (*PREFIXES, "model.") if of_lightning else PREFIXES)


_VALUES_A_BYTE = 100
_SMALL = 1 << 20
"""Values that any file may repeat, so that a small one may broadcast a bias."""


def _refuse_blown_up(path: str | Path, tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuses views that repeat what little the file holds: a model of them would have to be written out in full."""
    total = sum(value.numel() for value in tensors.values())
    if total > max(_SMALL, _VALUES_A_BYTE * size):
        key = max(tensors, key=lambda key: tensors[key].numel())
        raise InputError(
            f"{path}: tensor {key[:100]!r} says it has {tensors[key].numel():,} values, but the whole file has "
            f"{size:,} bytes, so it repeats a few; save its clone() if that is meant, or remove it from the zoo"
        )


def _what_instead(content: Any) -> str:
    if not isinstance(content, Mapping):
        kind = "numpy array" if isinstance(content, _Array) else type(content).__name__
        return f"holds a {kind}, not a state dict"
    for key, value in content.items():
        if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
            return f"holds tensors without names, in a list under {str(key)[:100]!r}, not a state dict"
        if isinstance(value, _Array):
            return f"{str(key)[:100]!r} is a numpy array, not a tensor"
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
    tensor = Tensor.detach(tensor)  # without attributes that a file may put over its methods
    if tensor.is_quantized:
        raise InputError(f"{path}: tensor {key[:100]!r} is quantised; save its dequantize() in its place")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise InputError(
            f"{path}: tensor {key[:100]!r} is {kind}; save a dense tensor (to_dense, to_padded_tensor) in its place"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise InputError(f"{path}: tensor {key[:100]!r} is a lazy conjugate; save its resolve_conj().resolve_neg()")
    return tensor


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
    is_header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER
    return "safetensors" if is_header or (path.suffix == ".safetensors" and head[:1] != b"\x80") else "legacy"


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
            f"{path}: truncated, or not a safetensors file ({str(error)[:300]}); copy or download it again, or remove "
            "it"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("two entries of its header have the same name")
    return content


def _dtype(path: Path, key: str, entry: Mapping[str, Any]) -> torch.dtype:
    if entry["dtype"] not in _DTYPES:
        raise InputError(
            f"{path}: tensor {key[:100]!r} has the number format {str(entry['dtype'])[:100]}, which torch cannot hold; "
            f"save it as one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[entry["dtype"]]


def _open_zip(path: Path) -> Checkpoint:
    """A file of torch's zip format: its tensors are read where they lie, if they lie there as they are."""
    records = _records(path)
    if records is not None and (content := _without_values(path)) is not None:
        found = state_dict_in(content, path, path.stat().st_size)
        stored = {key: StoredTensor(path, _place(value), value) for key, value in found.items()}
        if all(each.offset in records for each in stored.values()):
            for key, each in stored.items():
                if (int(each.view.storage_offset()) + _span(each.view)) * each.view.itemsize > records[each.offset]:
                    raise InputError(f"{path}: damaged: tensor {key[:100]!r} is larger than its record; copy it again")
            return StoredCheckpoint(path, stored)
    return _loaded(path)


def _loaded(path: Path) -> LoadedCheckpoint:
    return LoadedCheckpoint(path, state_dict_in(load_safely(path), path, path.stat().st_size))


def _without_values(path: Path) -> Any:
    """What a torch file holds, tensors on the meta device; None where it has a kind of tensor that cannot be there."""
    try:
        return load_safely(path, device="meta")
    except InputError:
        return None  # whatever it is, reading it with its values says it


def _place(tensor: Tensor) -> int:
    """Where torch says that the storage of a tensor begins in its file; -1 where this version of torch does not."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1


def _records(path: Path) -> dict[int, int] | None:
    """Sizes of the storages in a zip file by where they begin, in bytes.

    None if they must be converted when they are read: they were compressed, or have another order of bytes.
    """
    with _opened(path) as file, _archive(file, path) as archive:
        entries = archive.infolist()
        order = next((each for each in entries if each.filename.endswith("/byteorder")), None)
        if order is not None and archive.read(order) != b"little":
            return None
        storages = [each for each in entries if "/data/" in each.filename and not each.is_dir()]
        if any(each.compress_type != zipfile.ZIP_STORED for each in storages):
            return None
        return {_begin(file, each): each.file_size for each in storages}


@contextmanager
def _archive(file: IO[bytes], name: str | Path, packed: int | None = None) -> Iterator[zipfile.ZipFile]:
    """A torch file as the zip archive that it is, once its directory promises no bomb."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _refuse_other_archives(name, entries)
            _refuse_bombs(name, entries, file.seek(0, 2) if packed is None else packed)
            yield archive
    except InputError:
        raise
    except Exception as error:  # a damaged archive fails in whatever way its bytes happen to lead to
        raise InputError(
            f"{name}: truncated, or no checkpoint ({_reason(error)}); copy or download it again, or remove it from the "
            "zoo"
        ) from error


_SHORT = 1000
_SHORT_MEMBERS = ("byteorder", "version")
_SMALL_PICKLE = 1 << 20
"""Bytes; every one of a pickle may become an object of 70."""


def _is_pickle(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.partition("/")[2].lower() == "data.pkl"  # torch finds its members in any case


def _refuse_bombs(name: str | Path, entries: Iterable[zipfile.ZipInfo], packed: int) -> None:
    """Refuses an archive by what its directory says, before anything is unpacked."""
    total = 0
    for each in entries:
        total += each.file_size
        if each.file_size > _SHORT and each.filename.rpartition("/")[2].lower() in _SHORT_MEMBERS:
            raise InputError(
                f"{name}: its {each.filename[-50:]} has {each.file_size:,} bytes where torch writes a word; remove it "
                "from the zoo"
            )
        if _is_pickle(each) and each.file_size > max(_SMALL_PICKLE, LIMITS.ratio * each.compress_size):
            raise InputError(
                f"{name}: its data.pkl has {each.compress_size:,} bytes and says it unpacks to {each.file_size:,}; "
                "save it again with torch.save, or remove it from the zoo"
            )
    if total > max(LIMITS.small, LIMITS.ratio * packed):
        raise InputError(
            f"{name}: has {packed:,} bytes and says it unpacks to {total:,}, more than {LIMITS.ratio:g} times as many, "
            "which no trained weights do; save it again with torch.save, or remove it from the zoo"
        )


def _refuse_other_archives(path: str | Path, entries: list[zipfile.ZipInfo]) -> None:
    names = {each.filename.partition("/")[2] for each in entries}
    if any(each.flag_bits & 1 for each in entries):
        raise InputError(f"{path}: is encrypted; decrypt it first, or remove it from the zoo")
    if (program := foreign.of_zip([each.filename for each in entries])) is not None:
        raise InputError(f"{path}: {program.is_not_read}; {program.remedy_for()}")  # the same of each file of a zoo
    if "data.pkl" not in names:
        raise InputError(
            f"{path}: is a zip archive, but none that torch.save has written; unpack it, or remove it from the zoo"
        )


def _begin(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
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


def load_safely(
    name: str | Path,
    file: IO[bytes] | None = None,
    *,
    device: str = "cpu",
    stand_ins: Sequence[Any] = (),
    packed: int | None = None,
) -> Any:
    """What a file that ``torch.save`` wrote holds, without running anything that it asks for.

    Every torch file of a zoo is read here, so that what is refused here is refused everywhere.

    Args:
        name: Its path; or, of an open file, what it is called in messages.
        file: Open, and seekable. None opens ``name``.
        device: ``meta`` leaves the values of its tensors where they are.
        stand_ins: Beside ``STAND_INS``: what takes the place of a class that the file names, each with that name.
        packed: Bytes that it takes on the disk, where it comes compressed out of an archive.

    Raises:
        InputError: It is missing, damaged, asks for code, is encrypted, or would take much more memory than it has
            bytes.
    """
    if file is None:
        _recognise(Path(name))
        with _opened(Path(name)) as opened:  # of its name, torch might take another format
            return load_safely(name, opened, device=device, stand_ins=stand_ins, packed=packed)
    try:
        _refuse_growth(file, name, packed)
        file.seek(0)
        with STAND_INS_LOCK, torch.serialization.safe_globals([*STAND_INS, *stand_ins]):
            return torch.load(file, map_location=device, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file fails in whatever way its bytes happen to lead to
        reason = _reason(error)
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in reason:
            raise InputError(
                f"{name}: needs Python code to be read ({reason}), which may do anything, so it is refused; "
                "where you trust its author, load it with the program that wrote it and save model.state_dict() alone, "
                "with torch.save or safetensors"
            ) from error
        raise InputError(
            f"{name}: truncated, or no checkpoint that can be read without running code ({reason}); "
            "copy or download it again, or remove it from the zoo"
        ) from error


_CHUNK = 1 << 24
_PICKLES = 5
"""Of a legacy file, at its start; a zip's member has one."""
_GROWING = re.compile(rb"\n(?:bytearray|encode)\n")
_GROWING_CODECS = re.compile(r"(hex|base.?64|quopri|quoted.?printable|uu)(.codec)?", re.IGNORECASE)


def _refuse_growth(file: IO[bytes], name: str | Path, packed: int | None) -> None:
    """Refuses a file that makes much of little: by compression, or by what torch lets a pickle call.

    These are ``bytearray(10**9)``, and ``_codecs.encode`` to codecs that write bytes as more bytes, again and again.
    No stand-in can take their place, as torch has its own. What makes much time of little is refused too (``_Walk``).
    Nothing is executed to find them.
    """
    file.seek(0)
    if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
        _refuse_pickles(file, name)
        return
    with _archive(file, name, packed) as archive:
        for entry in archive.infolist():
            if _is_pickle(entry):
                _refuse_pickles(BytesIO(archive.read(entry)), name)


def _refuse_pickles(file: IO[bytes], name: str | Path) -> None:
    file.seek(0)
    if _names_growing(file):
        file.seek(0)
        _refuse_growing_calls(file, name)
    file.seek(0)
    walk = _Walk(file, name)
    for _ in range(_PICKLES):
        if not walk.one_pickle():
            return


def _names_growing(file: IO[bytes]) -> bool:
    """Whether the bytes name one of them at all, which is quick to see: hardly any file does."""
    end = b""
    while chunk := file.read(_CHUNK):
        if _GROWING.search(end + chunk):
            return True
        end = chunk[-20:]
    return False


def _refuse_growing_calls(file: IO[bytes], name: str | Path) -> None:
    encodes, codec = False, ""
    for operation, argument in _operations(file):
        if operation == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise InputError(
                f"{name}: holds a bytearray, which may be of any size, so it is refused; save model.state_dict() alone"
            )
        encodes |= operation == "GLOBAL" and str(argument).endswith(" encode")
        text = argument.decode("latin-1") if isinstance(argument, bytes) else argument
        if isinstance(text, str) and _GROWING_CODECS.fullmatch(text):
            codec = text
        if encodes and codec:
            raise InputError(
                f"{name}: asks for bytes to be written as {codec}, which may fill the memory, so it is refused; "
                "save model.state_dict() alone"
            )


def _operations(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Operations of the pickles at the start of a file."""
    for _ in range(_PICKLES):
        try:
            for operation, argument, _place in pickletools.genops(file):
                yield operation.name, argument
        except ValueError:
            return  # here, or where torch finds it too, the pickles end


_LONGEST_NAME = 300
_FREE_WORK = 1_000_000
_WORK_AN_OPERATION = 100

_SKIPPED = {b"M": 2, b"J": 4, b"G": 8, b"K": 1, b"N": 0, b"\x88": 0, b"\x89": 0}
"""Numbers and the like: bytes of the argument."""
_COUNTED = {b"X": 4, b"U": 1, b"\x8a": 1}
"""Texts and long integers: bytes of the length before them."""
_PUTS = {b"q": 1, b"r": 4}
_GETS = {b"h": 1, b"j": 4}
_TUPLES = {b")": 0, b"\x85": 1, b"\x86": 2, b"\x87": 3}


class _Walk:
    """The pickles of a file, followed as torch follows them, with counts in the place of objects.

    Refuses what would keep torch busy for longer than the file is large, before torch sees it: long names of classes,
    which torch puts into a message that it searches in quadratic time; tuples of tuples that hold one another again
    and again, whose hash takes time exponential in their depth (or, deep enough, more stack than there is); calls with
    the same long list again and again; and calls of what is no function, whose text torch would put into a message.

    In the place of an object is a number: itself and all that it holds, counted as often as it is held; in a list of
    its own where it can grow, in a tuple where it cannot. Ends without a word where the file ends or where there is an
    operation that torch does not know: torch ends there, too.
    """

    _ATOM = (1,)
    _CLASS = (1, 0)

    def __init__(self, file: IO[bytes], name: str | Path) -> None:
        self._file, self._name = file, name
        self._operations = self._work = 0

    def one_pickle(self) -> bool:
        """Whether it came to an end as one."""
        self._stack: list[Sequence[int]] = []
        self._outer: list[list[Sequence[int]]] = []
        self._memo: dict[int, Sequence[int]] = {}
        read = self._file.read
        try:
            while (code := read(1)) and code != b".":
                self._operations += 1
                if code in _SKIPPED:
                    read(_SKIPPED[code])
                    self._stack.append(self._ATOM)
                elif code in _COUNTED:
                    self._file.seek(self._number(_COUNTED[code]), 1)
                    self._stack.append(self._ATOM)
                elif code in _PUTS:
                    self._memo[self._number(_PUTS[code])] = self._stack[-1]
                elif code in _GETS:
                    self._stack.append(self._memo[self._number(_GETS[code])])
                    if isinstance(self._stack[-1], tuple):  # what grows has no hash, and costs nothing until it is used
                        self._charge(self._stack[-1])
                elif code in _TUPLES:
                    self._build_tuple([self._stack.pop() for _ in range(_TUPLES[code])])
                elif not self._other(code):
                    return False
        except (IndexError, KeyError):  # of a damaged file: torch fails there with the same
            return False
        return code == b"."

    def _number(self, length: int) -> int:
        return int.from_bytes(self._file.read(length), "little")

    def _other(self, code: bytes) -> bool:
        """One of the rarer operations; False if torch does not know it."""
        match code:
            case b"(":
                self._outer.append(self._stack)
                self._stack = []
            case b"t":
                self._build_tuple(self._pop_mark())
            case b"]" | b"}" | b"\x8f":
                self._stack.append([1])
            case b"a":
                self._put_in([self._stack.pop()])
            case b"s":
                self._put_in([self._stack.pop(), self._stack.pop()])
            case b"e" | b"u":
                self._put_in(self._pop_mark())
            case b"c":
                self._read_name()
            case b"R" | b"\x81" | b"b":
                self._call(self._stack.pop(), is_build=code == b"b")
            case b"Q":
                self._stack[-1] = self._ATOM
            case b"\x80":
                self._file.read(1)
            case _:
                return False
        return True

    def _pop_mark(self) -> list[Sequence[int]]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _build_tuple(self, items: list[Sequence[int]]) -> None:
        self._stack.append((1 + sum(item[0] for item in items),))
        self._charge(self._stack[-1])

    def _put_in(self, items: list[Sequence[int]]) -> None:
        into = self._stack[-1]
        if not isinstance(into, list):
            raise IndexError  # torch refuses it, too
        into[0] = min(into[0] + sum(item[0] for item in items), 1 << 60)  # lists may double without being used

    def _read_name(self) -> None:
        for _ in range(2):
            if len(self._file.readline(_LONGEST_NAME + 1)) > _LONGEST_NAME:
                raise InputError(
                    f"{self._name}: names a class with more than {_LONGEST_NAME} letters, so it is refused; save "
                    "model.state_dict() alone, or remove it from the zoo"
                )
        self._stack.append(self._CLASS)

    def _call(self, arguments: Sequence[int], is_build: bool) -> None:
        self._charge(arguments)
        if is_build:
            return
        if self._stack[-1] is not self._CLASS:
            raise InputError(
                f"{self._name}: calls what is no function or class, so it is refused; save model.state_dict() alone, "
                "or remove it from the zoo"
            )
        self._stack[-1] = [arguments[0]]

    def _charge(self, used: Sequence[int]) -> None:
        self._work += used[0] - 1
        if self._work > _FREE_WORK + _WORK_AN_OPERATION * self._operations:
            raise InputError(
                f"{self._name}: holds the same values in one another again and again, which would take very long to "
                "read, so it is refused; save model.state_dict() alone, or remove it from the zoo"
            )


def _reason(error: Exception) -> str:
    """The telling line of torch's message, without its advice to read the file unsafely."""
    words, text = type(error).__name__, str(error)[:_TOLD]
    for pattern in (r"WeightsUnpickler error:\s*(.+)", r"(.*\bGLOBAL\b.*)", r"(\S.*)"):
        found = re.search(pattern, text)
        if found:
            words = found[1]
            break
    return re.split(r"(?<=\S)\. ", words.strip())[0][:160].rstrip(". ")
