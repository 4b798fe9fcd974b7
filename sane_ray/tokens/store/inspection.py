"""Pass 1 over a zoo: what each checkpoint is, and whether it can be used.

Plain functions of plain data: ``sane_ray.tokens.store.writing`` runs them in Ray tasks. Never imports Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.normalization import LayerStatistics
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table, tokenize
from sane_ray.zoo.catalog import Record
from sane_ray.zoo.checkpoint import load_state_dict

BATCH_CHECKPOINTS, BATCH_BYTES = 64, 64e6
"""What one task inspects. Fixed, so that sums are formed in the same order on every cluster."""


@dataclass
class Found:
    """What pass 1 saw, by position of the checkpoint among the inputs; architectures by fingerprint."""

    records: list[Record]
    keys: list[str | None]
    """Fingerprint of the architecture; None for a checkpoint that is left out."""
    digests: list[str]
    """Of the weights; empty where they could not be read."""
    ranges: list[NDArray[np.float64]]
    """Smallest and largest value of each layer, [2, layers]; empty for a checkpoint that is left out."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why a checkpoint is left out."""
    tables: dict[str, LayerTable] = field(default_factory=dict)
    statistics: dict[tuple[str, str], LayerStatistics] = field(default_factory=dict)
    """By fingerprint and model."""

    @classmethod
    def nothing(cls, records: list[Record]) -> Found:
        """Before the first batch."""
        return cls(records, [None] * len(records), [""] * len(records), [np.empty((2, 0))] * len(records))

    def usable(self) -> list[tuple[int, str]]:
        """Position and fingerprint of every checkpoint that is not left out."""
        return [(position, key) for position, key in enumerate(self.keys) if key is not None]

    def leave_out(self, position: int, reason: str) -> None:
        """Takes a checkpoint from the usable ones."""
        self.keys[position], self.reasons[position] = None, reason

    def add(self, result: dict[str, Any]) -> None:
        """Takes in what ``inspect_batch`` returned."""
        for key, data in result["tables"].items():
            self.tables.setdefault(key, LayerTable.from_dict(data))
        for position, seen in enumerate(result["checkpoints"], start=result["first"]):
            self.digests[position] = seen["sha256"]
            if "reason" in seen:
                self.leave_out(position, seen["reason"])
                continue
            statistics = LayerStatistics.from_dict(seen["statistics"])
            self.keys[position] = seen["key"]
            self.ranges[position] = np.stack([statistics.minimum, statistics.maximum])
            model = (seen["key"], self.records[position].model)
            self.statistics.setdefault(model, LayerStatistics()).merge(statistics)


def batches(paths: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The work of pass 1, cut into what one task does."""
    ranges: list[range] = []
    start, size = 0, 0.0
    for position, added in enumerate(sizes):
        if position > start and (size + added > BATCH_BYTES or position - start >= BATCH_CHECKPOINTS):
            ranges.append(range(start, position))
            start, size = position, 0.0
        size += added
    ranges.append(range(start, len(sizes)))
    return [{"first": batch.start, "paths": [paths[position] for position in batch]} for batch in ranges]


def inspect_batch(batch: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Reads a batch of checkpoints, each once.

    Args:
        batch: One of ``batches``.
        settings: ``token_size`` and ``batch_norm`` of ``build_layer_table``.

    Returns:
        JSON-able: ``first``; for each checkpoint ``sha256`` and either ``reason`` (why it cannot be used) or ``key``
        (its architecture) and ``statistics``; and the layer ``tables`` by key.
    """
    tables: dict[tuple[Any, ...], LayerTable] = {}
    checkpoints = [_inspect(path, tables, settings) for path in batch["paths"]]
    described = {table.fingerprint: table.to_dict() for table in tables.values()}
    return {"first": batch["first"], "checkpoints": checkpoints, "tables": described}


def _inspect(path: str, tables: dict[tuple[Any, ...], LayerTable], settings: dict[str, Any]) -> dict[str, Any]:
    sha256 = ""
    try:
        state_dict = load_state_dict(path)
        sha256 = weights_digest(state_dict)
        _check_finite(state_dict, path)
        shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in state_dict.items())
        if shapes not in tables:
            tables[shapes] = build_layer_table(state_dict, **settings)
        table = tables[shapes]
        statistics = LayerStatistics().update(tokenize(state_dict, table), table)
    except InputError as error:
        return {"sha256": sha256, "reason": str(error).removeprefix(f"{path}: ")}
    return {"sha256": sha256, "key": table.fingerprint, "statistics": statistics.to_dict()}


def _check_finite(state_dict: Mapping[str, Tensor], path: str) -> None:
    for key, value in state_dict.items():
        if value.is_floating_point() and value.layout == torch.strided and value.numel():
            low, high = torch.aminmax(value.float())
            if not (low.isfinite() and high.isfinite()):
                raise InputError(f"{path}: {key} holds NaN or infinite values")


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Hex sha256 of keys, number formats, shapes and values, whatever the file format."""
    digest = hashlib.sha256()
    for key, value in state_dict.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        dense = value.dequantize() if value.is_quantized else value.to_dense()
        values: Any = dense.reshape(-1).contiguous().view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def digest_if_readable(path: str) -> str:
    """The digest of a file's weights; empty if it cannot be read."""
    try:
        return weights_digest(load_state_dict(path))
    except InputError:
        return ""
