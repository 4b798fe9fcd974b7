"""A batch of windows in two views: what the stream yields and the training step takes. Plain torch.

Shapes: B windows, W tokens in a window, T values in a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Windows of tokens in two views, on one device."""

    view_1: torch.Tensor
    """[B, W, T] tokens in the store's number format."""
    view_2: torch.Tensor
    """[B, W, T] the same windows of the same models, perhaps permuted."""
    signal: torch.Tensor
    """[B, W] values that are real weights; the rest of a token is padding."""
    positions: torch.Tensor
    """[B, W, 3] token index, layer and channel."""

    def __len__(self) -> int:
        """Windows in the batch."""
        return self.view_1.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, copied asynchronously where the memory allows."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, begin: int, end: int) -> Batch:
        """Windows ``begin`` to ``end`` of the batch."""
        return self._map(lambda tensor: tensor[begin:end])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(function(self.view_1), function(self.view_2), function(self.signal), function(self.positions))
