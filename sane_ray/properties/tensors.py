"""The weights of many checkpoints of one architecture at once, read off a token store.

Every row group is read once, and only as many checkpoints are held as fit into a batch (at least one, however large).
Never fits a normalisation, never writes, never imports Ray.

Shape suffixes: B checkpoints of a batch, N tokens of a checkpoint, T token size, C channels, F fan-in, K layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sane_ray.tokens.layers import Layer, LayerTable
from sane_ray.tokens.normalization import Normalization, fit
from sane_ray.tokens.store import Architecture, TokenStore
from sane_ray.tokens.store.layout import by_kind, of_kinds
from sane_ray.tokens.store.reading import as_float32
from sane_ray.zoo.splits import SPLITS

Array = NDArray[np.float32]

BATCH_BYTES = 64e6


@dataclass(frozen=True, eq=False)
class Batch:
    """Checkpoints of one architecture.

    Attributes:
        architecture: Theirs.
        checkpoints: Their ordinals in the store, [B].
        tokens_BNT: Normalised tokens, as pretraining sees them.
        scale_BK: Their own norms, where l2 normalisation divided by them.
    """

    architecture: Architecture
    checkpoints: list[int]
    tokens_BNT: Array
    scale_BK: Array | None

    def rows(self, index: int) -> Array:
        """Normalised values ``[w | b]`` of a layer without padding, [B, C, width]."""
        table = self.architecture.table
        layer, start = table.layers[index], int(table.layer_starts[index])
        stride = layer.stride(table.token_size)
        flat_BV = self.tokens_BNT[:, start : start + layer.num_tokens].reshape(len(self.checkpoints), -1)
        rows_BCS = flat_BV[:, : layer.channels * stride].reshape(-1, layer.channels, stride)
        return rows_BCS[:, :, : layer.width]

    def tensors(self) -> Iterator[tuple[Layer, Array, Array | None]]:
        """Each layer with its weights as they were before normalisation, [B, C, F], and its bias, [B, C]."""
        normalization = self.architecture.normalization
        for index, layer in enumerate(self.architecture.table.layers):
            rows = self.rows(index)
            if normalization.mode != "none":
                scale = normalization.scale[index] if self.scale_BK is None else self.scale_BK[:, index, None, None]
                rows = rows * np.float32(scale) + np.float32(normalization.shift[index])
            yield layer, rows[:, :, : layer.fan_in], rows[:, :, layer.fan_in] if layer.bias_key else None


def batches(store: TokenStore, batch_bytes: float = BATCH_BYTES) -> Iterator[Batch]:
    """All checkpoints of a store, in stored order but for what comes from several row groups.

    Args:
        store: Where the tokens are.
        batch_bytes: Size of the float32 tokens of a batch; a single checkpoint may exceed it.
    """
    waiting: dict[str, list[tuple[int, Array]]] = {}
    for checkpoint, tokens_NT in _checkpoints(store):
        name = store.architecture_of(checkpoint).name
        held = waiting.setdefault(name, [])
        held.append((checkpoint, tokens_NT))
        if (len(held) + 1) * tokens_NT.nbytes > batch_bytes:
            yield _batch(store, waiting.pop(name))
    for held in waiting.values():
        yield _batch(store, held)


def renormalized(batch: Batch, normalization: Normalization) -> Batch:
    """The same weights, normalised otherwise."""
    table, stored = batch.architecture.table, batch.architecture.normalization
    tokens, scales = [], []
    for place, values_NT in enumerate(batch.tokens_BNT):
        scale = None if batch.scale_BK is None else torch.from_numpy(batch.scale_BK[place])
        weights_NT = stored.denormalize(torch.from_numpy(values_NT), table, scale)
        tokens_NT, scale = normalization.normalize(weights_NT, table)
        tokens.append(tokens_NT.numpy())
        scales += [] if scale is None else [scale.numpy()]
    architecture = replace(batch.architecture, normalization=normalization)
    return Batch(architecture, batch.checkpoints, np.stack(tokens), np.stack(scales) if scales else None)


def normalizations_of(first: TokenStore, other: TokenStore) -> dict[str, Normalization]:
    """How the architectures of one store are normalised as those of another, by name; only those that are not already.

    An architecture of the same layers has its normalisation there. Any other has the statistics of its layers' kinds,
    as when a trained model embeds what it was not trained on.
    """
    known = {_layers(architecture.table): architecture.normalization for architecture in first.architectures.values()}
    mode = next(iter(first.architectures.values())).normalization.mode
    tables = {name: architecture.table for name, architecture in first.architectures.items()}
    pooled = by_kind({name: one.normalization.as_statistics() for name, one in first.architectures.items()}, tables)
    found = {}
    for name, architecture in other.architectures.items():
        wanted = known.get(_layers(architecture.table)) or fit(of_kinds(pooled, architecture.table), mode)
        own_only = architecture.normalization.mode == wanted.mode and wanted.mode in ("l2", "none")
        if not own_only and architecture.normalization != wanted:
            found[name] = wanted
    return found


def _layers(table: LayerTable) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
    return tuple((layer.kind, layer.shape, layer.bias_key is not None) for layer in table.layers)


def _checkpoints(store: TokenStore) -> Iterator[tuple[int, Array]]:
    """Each checkpoint with its tokens, once all of its segments have been read."""
    counts = store.models["tokens"].to_pylist()
    parts: dict[int, dict[int, Array]] = {}
    for group in (group for split in SPLITS for group in store.row_groups(split)):
        for segment, values_nT in store.read_row_group(group):
            of_checkpoint = parts.setdefault(segment.checkpoint, {})
            of_checkpoint[segment.first] = as_float32(values_nT, store.dtype).numpy()
            if sum(map(len, of_checkpoint.values())) == counts[segment.checkpoint]:
                del parts[segment.checkpoint]
                yield segment.checkpoint, np.concatenate([part for _, part in sorted(of_checkpoint.items())])


def _batch(store: TokenStore, held: list[tuple[int, Array]]) -> Batch:
    checkpoints = [checkpoint for checkpoint, _ in held]
    scales = [scale.numpy() for checkpoint in checkpoints if (scale := store.model_scale(checkpoint)) is not None]
    tokens_BNT = np.stack([tokens for _, tokens in held])
    return Batch(store.architecture_of(checkpoints[0]), checkpoints, tokens_BNT, np.stack(scales) if scales else None)
