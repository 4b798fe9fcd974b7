"""A batch of windows in two views: what the stream yields and the training step takes. Plain torch.

Shapes: B windows, W tokens in a window, T values in a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

FILLER = -1
"""Segment, slot and checkpoint of a row without a window: it makes all ranks' batches equally long; counts nothing."""


@dataclass(frozen=True)
class Batch:
    """One rank's windows of a global batch, in two views, on one device.

    Where a global batch has fewer windows than places, the last rows are filler: slot and checkpoint -1, the rest zero.
    """

    view_1: torch.Tensor
    """[B, W, T] tokens in the store's number format."""
    view_2: torch.Tensor
    """[B, W, T] the same windows of the same models, perhaps permuted; the same tensor where both views are alike."""
    signal: torch.Tensor
    """int32 [B, W] values that are real weights; the rest of a token is padding."""
    positions: torch.Tensor
    """int32 [B, W, 3] token index, layer and channel."""
    slot: torch.Tensor
    """int64 [B] place of the window in the global batch, whoever computes it: what noise is seeded with."""
    checkpoint: torch.Tensor
    """int64 [B] ordinal in the store of the checkpoint that the window is cut from."""

    def __len__(self) -> int:
        """Rows of the batch, filler included."""
        return self.view_1.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, copied asynchronously where the memory allows."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, begin: int, end: int) -> Batch:
        """Rows ``begin`` to ``end`` of the batch."""
        return self._map(lambda tensor: tensor[begin:end])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        mapped = {field.name: function(getattr(self, field.name)) for field in fields(self) if field.name != "view_2"}
        return Batch(**mapped, view_2=mapped["view_1"] if self.view_2 is self.view_1 else function(self.view_2))
