"""One checkpoint file to one state dict: safetensors or torch files, on the CPU, memory-mapped where the format allows.

Never runs code from a file: torch files are read with ``weights_only=True``, and one that needs more is refused.
"""

from __future__ import annotations

import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
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
    """A state dict that is in memory, or a view of a memory-mapped file."""

    def __init__(self, path: str | Path, state_dict: Mapping[str, Tensor]) -> None:
        self.path = str(path)
        self._tensors = dict(state_dict)
        self.meta = {key: torch.empty_like(value, device="meta") for key, value in state_dict.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See ``Checkpoint.read``."""
        return self._tensors[key].reshape(-1)[start:stop]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens one checkpoint file, of any of the formats that ``load_state_dict`` reads, without reading its values.

    Raises:
        InputError: As ``load_state_dict``.
    """
    return LoadedCheckpoint(path, load_state_dict(path))


_TENSOR_ORDER = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_ZIP_MAGIC = b"PK\x03\x04"


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of one checkpoint.

    A state dict nested under one of ``WRAPPERS`` is unwrapped, ``PREFIXES`` are stripped when every key has them, and
    entries that are no tensors are left out. Keys keep the file's order; safetensors files keep none, so theirs are put
    in the order of ``natural_order``.

    Args:
        path: a ``.safetensors`` file, or a file written by ``torch.save`` (any name; zip or legacy format).

    Returns:
        CPU tensors by key. They may be views of the memory-mapped file: do not write to them.

    Raises:
        InputError: the file is missing, empty, truncated, no checkpoint, or needs Python code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file; check the path, or prepare again from a complete zoo")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the checkpoint file is empty; copy it again, or remove it from the zoo")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state_dict = _strip(_unwrap(content, path))
    if not state_dict:
        raise InputError(f"{path}: no tensors in it; save model.state_dict() there")
    return state_dict


def natural_order(key: str) -> tuple[list[list[str | int]], int, str]:
    """Sort key for keys of a state dict: ``layers.9`` before ``layers.10``, weight before bias as torch has them.

    For files that do not keep the order of the state dict, such as safetensors. It is the order of a network whose
    modules are numbered; where they are named (``conv1, bn1, conv2``) the original order cannot be known from the
    names, but this one is always the same.
    """
    module, _, name = key.rpartition(".")
    parts = [[int(part) if part.isdigit() else part for part in re.split(r"(\d+)", step)] for step in module.split(".")]
    return parts, _TENSOR_ORDER.index(name) if name in _TENSOR_ORDER else len(_TENSOR_ORDER), name


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys(), key=natural_order)}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: truncated, or not a safetensors file ({error}); copy or download it again, or remove it"
        ) from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC  # only zip files can be memory-mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
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
    text = str(error)
    found = re.search(r"WeightsUnpickler error:\s*(.*)|(.*\bGLOBAL\b.*)", text) or re.search(r"(\S.*)", text)
    words = next((group for group in found.groups() if group), "") if found else type(error).__name__
    return re.split(r"(?<=\S)\. ", words.strip())[0][:160].rstrip(". ")


def _unwrap(content: Any, path: Path) -> Mapping[str, Any]:
    for _ in range(2):  # a training script's dict, perhaps with a framework's inside
        if isinstance(content, Mapping):
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict() there, "
            "or remove it from the zoo"
        )
    return content


def _strip(content: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    while tensors:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
