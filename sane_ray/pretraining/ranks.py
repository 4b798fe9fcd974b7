"""What the workers of a training have to tell each other beside its tensors; one alone has torch.distributed or not."""

from __future__ import annotations

import torch
import torch.distributed as dist


def is_first() -> bool:
    """Whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: float) -> float:
    """What rank 0 has, on all ranks; every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()
