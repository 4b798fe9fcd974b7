"""Noise and erasing of the views, on the device, the same whoever computes them.

What a window's view is multiplied with is a function of (seeds, step, slot, view) alone, so neither the number of
workers nor the size of micro-batches changes it, and a resumed run draws what an uninterrupted one would have drawn.
Random numbers are hashes of counters, computed where the tokens are: no generator has to be kept, and nothing waits
for the device.

Shape suffixes: b rows of this process, n rows of its views one after the other, W tokens of a window, T values
of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sane_ray.config import AugmentationConfig

# splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed numbers: int64 wraps around alike.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FACTOR_1 = 0xBF58476D1CE4E5B9 - 2**64
_FACTOR_2 = 0x94D049BB133111EB - 2**64
_SHIFTS = ((30, _FACTOR_1), (27, _FACTOR_2))

_ERASE_AREA = (0.02, 0.33)
_ERASE_RATIO = (0.3, 3.3)
_ERASE_TRIES = 10
_NOISE, _ERASE = 0, 1
_BELOW_1 = 1 - 2.0**-24


def augmented_views(views_nWT: Tensor, slot_b: Tensor, config: AugmentationConfig, *, seed: int, step: int) -> Tensor:
    """Views with multiplicative noise, which keeps padding zero, and perhaps a rectangle erased from each.

    They are what is encoded and what is to be reconstructed, as in the published code: the noise is no denoising task,
    and what is erased stays zero in the target, so that the embedding says what its view holds. What the contrastive
    loss makes of it is that windows resemble each other whatever was erased.

    Args:
        views_nWT: First views of all rows, then perhaps the second ones in the same order.
        slot_b: Places of the windows in the global batch.
        config: How much noise, how much erasing, and their seed.
        seed: Of the training.
        step: Of the training.

    Returns:
        float32 [n, W, T].
    """
    tokens_nWT = views_nWT.float()
    key, views = (seed, config.seed, step), len(tokens_nWT) // len(slot_b)
    if config.noise > 0:
        noise_nWT = normal(row_keys(slot_b, views, (*key, _NOISE)), tokens_nWT.shape[1:])
        tokens_nWT = tokens_nWT.addcmul(tokens_nWT, noise_nWT, value=config.noise)
    if config.erase > 0:
        erased = rectangles(row_keys(slot_b, views, (*key, _ERASE)), tokens_nWT.shape[1:], config.erase)
        tokens_nWT = tokens_nWT.masked_fill(erased, 0.0)
    return tokens_nWT


def row_keys(slot_b: Tensor, views: int, numbers: tuple[int, ...]) -> Tensor:
    """A random key for each row of the views: int64 [n], a function of its slot, its view and the numbers."""
    key = 0
    for number in numbers:
        key = _mixed((key + number + 1) * _GOLDEN)
    slot_keys = _mix((slot_b + 1) * _GOLDEN + key)
    return torch.cat([_mix(slot_keys + _signed(view * _GOLDEN)) for view in range(1, views + 1)])


def bits(key_n: Tensor, count: int) -> Tensor:
    """Random bits, int64 [n, count], equal only where the keys are."""
    counter = torch.arange(1, count + 1, device=key_n.device).mul_(_GOLDEN)
    return _mix(key_n[:, None] + counter)


def uniform(key_n: Tensor, count: int) -> Tensor:
    """Uniform random numbers in [-1, 1], float32 [n, count], two of each 64 random bits."""
    halves = bits(key_n, math.ceil(count / 2)).view(torch.int32)[:, :count]
    return halves.float().mul_(2.0**-31)


def normal(key_n: Tensor, shape: torch.Size) -> Tensor:
    """Normal random numbers, float32 [n, *shape], none beyond 5.3 standard deviations."""
    numbers = uniform(key_n, math.prod(shape)).clamp_(-_BELOW_1, _BELOW_1).erfinv_().mul_(math.sqrt(2))
    return numbers.view(-1, *shape)


def rectangles(key_n: Tensor, shape: torch.Size, probability: float) -> Tensor:
    """What is erased, bool [n, W, T]: a rectangle of each row with that probability, else nothing.

    Area, ratio and place are drawn as by torchvision's RandomErasing: of ten tries the first that fits.
    """
    height, width = shape
    random_nx = uniform(key_n, 3 + 2 * _ERASE_TRIES) / 2 + 0.5
    chosen, top, left = random_nx[:, :3].unbind(1)
    area, ratio = random_nx[:, 3:].chunk(2, dim=1)
    area = height * width * (_ERASE_AREA[0] + area * (_ERASE_AREA[1] - _ERASE_AREA[0]))
    low, high = (math.log(bound) for bound in _ERASE_RATIO)
    ratio = torch.exp(low + ratio * (high - low))
    rows, columns = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    rows, columns = rows.gather(1, first).squeeze(1), columns.gather(1, first).squeeze(1)
    wanted = (chosen < probability) & fits.any(dim=1)
    inside_rows = _inside(top, rows, height)
    inside_columns = _inside(left, columns, width)
    return inside_rows[:, :, None] & inside_columns[:, None, :] & wanted[:, None, None]


def _inside(place_n: Tensor, length_n: Tensor, size: int) -> Tensor:
    """Which of ``size`` places a stretch of each length covers, bool [n, size], moved by ``place_n`` in [0, 1]."""
    start = (place_n * (size - length_n + 1)).floor().clamp(max=size - length_n)[:, None]
    places = torch.arange(size, device=place_n.device)
    return (places >= start) & (places < start + length_n[:, None])


def _mix(state: Tensor) -> Tensor:
    """The output function of splitmix64, which spreads every bit over all others; changes ``state``."""
    for shift, factor in _SHIFTS:
        state.bitwise_xor_((state >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return state.bitwise_xor_((state >> 31).bitwise_and_(2**33 - 1))


def _mixed(number: int) -> int:
    """``_mix`` of one number."""
    return int(_mix(torch.tensor([_signed(number)]))[0])


def _signed(number: int) -> int:
    """The int64 with the same last 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
