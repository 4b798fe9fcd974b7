"""The order of a network's tensors where a file keeps no state dict: as its writer gave it, else by their names.

The order decides which layer stands where along the depth of a network. Knows no file format: it is told where the
values of each tensor lie.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TENSOR_ORDER = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Place:
    """Where the values of a tensor lie."""

    file: str
    offset: int
    size: int
    """Values; a tensor without any lies nowhere, and says nothing of the order."""
    dtype: Any


def order_of(places: Mapping[str, Place]) -> list[str]:
    """Keys in the order in which their writer laid down the values, where that says something; else by name.

    The safetensors library sorts tensors by number format and then by name, so that the order of the state dict is
    lost; other writers keep it (their header may have any order all the same, the values have not). An order says
    something if

    - it is not the alphabetical one, overall or within each number format, in every file;
    - and a state dict can have it: the tensors of a module stand together, and numbered modules (``layers.2``,
      ``layers.10``) ascend. What MLX writes comes in the order of a hash table, and does neither.

    Args:
        places: Of every tensor, by key, in the order of the header, which counts where nothing else does. Files come
            in the order of their names.

    Returns:
        All keys: as they lie, or in ``natural_order``.
    """
    lying = sorted(places, key=lambda key: (places[key].file, places[key].offset, places[key].size > 0))
    telling = [key for key in lying if places[key].size]
    files = itertools.groupby(telling, key=lambda key: places[key].file)
    if all(_is_alphabetical(list(keys), places) for _, keys in files) or not _is_of_modules(telling):
        return sorted(places, key=natural_order)
    return lying


def natural_order(key: str) -> tuple[list[list[str | int]], int, list[str | int]]:
    """Sort key for keys of a state dict: ``layers.9`` before ``layers.10``, weight before bias as torch has them.

    It is the order of a network whose modules are numbered; where they are named (``conv1, bn1, conv2``) the original
    order cannot be known from the names, but this one is always the same.
    """
    module, _, name = key.rpartition(".")
    rank = _TENSOR_ORDER.index(name) if name in _TENSOR_ORDER else len(_TENSOR_ORDER)
    return [_numbered(step) for step in module.split(".")], rank, _numbered(name)


def _numbered(text: str) -> list[str | int]:
    """Its numbers apart from its words; Python refuses to read numbers of thousands of digits."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,18})", text)]


def _is_alphabetical(keys: Sequence[str], places: Mapping[str, Place]) -> bool:
    """Whether keys of one file are sorted by name, or are so within each number format, and formats stand together."""
    if list(keys) == sorted(keys):
        return True
    blocks = [(dtype, list(block)) for dtype, block in itertools.groupby(keys, key=lambda key: places[key].dtype)]
    formats = [dtype for dtype, _ in blocks]
    return len(set(formats)) == len(formats) and all(block == sorted(block) for _, block in blocks)


def _is_of_modules(keys: Sequence[str]) -> bool:
    """Whether a walk through nested modules can give the keys in this order."""
    last_number: dict[tuple[str, ...], int] = {}
    seen: set[tuple[str, ...]] = set()
    before: tuple[str, ...] = ()
    for key in keys:
        module = tuple(key.split(".")[:-1])
        for depth in range(1, len(module) + 1):
            part = module[:depth]
            if part == before[:depth]:
                continue
            if part in seen:
                return False
            seen.add(part)
            if re.fullmatch(r"\d{1,18}", part[-1]):
                if int(part[-1]) < last_number.get(part[:-1], -1):
                    return False
                last_number[part[:-1]] = int(part[-1])
        before = module
    return True
