"""Where a token stands in its network, as a vector that is added to it: from learned tables, or computed.

Both kinds are called alike and know nothing of the model around them. This module never reads a position's value on
the host, so it never waits for the device.

Shape suffixes: B windows of a batch, W tokens of a window, D width of the transformer, F frequencies; the 3 of a
position are token index, layer and channel.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

POSITION_NAMES = ("token index", "layer", "channel")

LONGEST_PERIODS = (2.0**24, 2.0**12, 2.0**20)
"""Of the sinusoids of token index, layer and channel. It is no limit: beyond it the slowest begins anew."""

_SHORTEST_PERIOD = 4.0
_TURN_BITS = 32
_INITIAL_SIZE = 0.02
"""Root mean square at the beginning: that of the learned tables."""


class PositionEmbedding(nn.Module):
    """Learned embedding of where a token stands: half of the width for token index plus layer, half for the channel."""

    def __init__(self, max_positions: list[int], width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(max_positions[0], width // 2)
        self.layer = nn.Embedding(max_positions[1], width // 2)
        self.channel = nn.Embedding(max_positions[2], width // 2)

    def forward(self, positions_BW3: Tensor) -> Tensor:
        """Positions, int32 or int64 [B, W, 3], to embeddings [B, W, D]."""
        token, layer, channel = positions_BW3.unbind(dim=-1)
        return torch.cat([self.token(token) + self.layer(layer), self.channel(channel)], dim=-1)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of where a token stands (arXiv 1706.03762, section 3.5), which have no largest position.

    A quarter of the width for the token index, a quarter for the layer, half for the channel; periods are geometric
    from 4 to ``LONGEST_PERIODS``. Unlike rows of tables, sines of token index and layer may not be added up: token 5
    of layer 3 would be token 3 of layer 5.

    All that is learned is a factor for each value. They start as large as the learned tables do, a tenth of the tokens:
    on the digits zoo they then reconstruct as well as tables (0.220 both), and ten times as large worse (0.270).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.sizes = (half - half // 2, half // 2, half)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, positions_BW3: Tensor) -> Tensor:
        """Positions, int32 or int64 [B, W, 3], to embeddings [B, W, D]."""
        parts = [
            sinusoids(positions_BW3[..., i], size, longest)
            for i, (size, longest) in enumerate(zip(self.sizes, LONGEST_PERIODS, strict=True))
        ]
        return torch.cat(parts, dim=-1).to(self.scale) * (self.scale * _INITIAL_SIZE * math.sqrt(2))


def sinusoids(position_BW: Tensor, size: int, longest_period: float) -> Tensor:
    """Sines, then cosines, of integers: float32 [B, W, size], as exact for 10^18 as for 1.

    A float32 angle of a million radians is off by a sixteenth of one, so fractions of a turn are computed in integers:
    a position advances each frequency by so many 2^-32 of a turn, and of their product the lowest 32 bits count.
    """
    steps_F = _steps_of_a_turn((size + 1) // 2, longest_period, position_BW.device)
    turn_BWF = (position_BW[..., None].long() * steps_F) & (2**_TURN_BITS - 1)
    angle_BWF = turn_BWF.float() * (2 * math.pi / 2**_TURN_BITS)
    return torch.cat([angle_BWF.sin(), angle_BWF.cos()], dim=-1)[..., :size]


@lru_cache(maxsize=64)
def _steps_of_a_turn(frequencies: int, longest_period: float, device: torch.device) -> Tensor:
    """How many 2^-32 of a turn each frequency advances a position: int64 [F], fastest first.

    Kept, so that only the first call copies to the device. No buffer: a model built on no device would lose it.
    """
    growth = (longest_period / _SHORTEST_PERIOD) ** (1 / max(frequencies - 1, 1))
    periods = [_SHORTEST_PERIOD * growth**i for i in range(frequencies)]
    return torch.tensor([round(2**_TURN_BITS / period) for period in periods], dtype=torch.int64, device=device)
