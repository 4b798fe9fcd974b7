"""The loss of SANE, gamma * NT-Xent + (1 - gamma) * masked reconstruction (arXiv 2406.09997, section 3.3).

N processes compute the loss of one process with N times the batch: the mean over processes of what a function returns
is the loss of the global batch, and gradients averaged over processes, as DDP and FSDP do, are its gradients. All that
takes is ``gather``, which collects rows over processes; each must bring the same number of windows. Everything is
computed in float32, whatever comes in. This module never updates a parameter and never waits for the device.

Shape suffixes: b windows of this process, B of all, P values of a projection, W tokens of a window, T of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from sane_ray.config import LossConfig

Gather = Callable[[Tensor], Tensor]
"""Rows of this process [b, X] to rows of all processes [B, X] in rank order, with gradients flowing back to each."""


class Losses(NamedTuple):
    """Scalars of this process; their mean over processes is that of the global batch."""

    total: Tensor
    contrast: Tensor
    reconstruction: Tensor


def identity(rows_bX: Tensor) -> Tensor:
    """The gather of a single process."""
    return rows_bX


def gather_over_processes(rows_bX: Tensor) -> Tensor:
    """The gather over all processes of ``torch.distributed``; the identity where there is one, or none is set up."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows_bX
    gathered_BX: Tensor = _GatherRows.apply(rows_bX)
    return gathered_BX


class _GatherRows(torch.autograd.Function):
    """All-gather whose gradient is, for each process, the sum over processes of what they want of its rows."""

    @staticmethod
    def forward(ctx: Any, rows_bX: Tensor) -> Tensor:
        rows_BX = rows_bX.new_empty(dist.get_world_size() * rows_bX.shape[0], *rows_bX.shape[1:])
        # One collective under two names: torch 2.13 deprecates the second.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(rows_BX, rows_bX.contiguous())
        return rows_BX

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient_BX = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient_BX)
        return gradient_BX.chunk(dist.get_world_size())[dist.get_rank()]


def nt_xent(projection_1_bP: Tensor, projection_2_bP: Tensor, temperature: float, gather: Gather = identity) -> Tensor:
    """Contrastive loss between two views (NT-Xent): each view shall be closest to the other view of the same window.

    Each process compares its own 2 b rows with the 2 B columns of all.

    Args:
        projection_1_bP: Projections of the first views.
        projection_2_bP: Projections of the second views, in the same order.
        temperature: Divides the cosine similarities.
        gather: ``gather_over_processes`` to compare with the windows of all processes.

    Returns:
        Scalar: mean cross-entropy over this process's rows.
    """
    device = projection_1_bP.device
    own = projection_1_bP.shape[0]
    views_b2P = torch.stack([projection_1_bP, projection_2_bP], dim=1).float()
    views_b2P = F.normalize(views_b2P, dim=-1, eps=1e-8)
    columns = gather(views_b2P.flatten(start_dim=1)).view(-1, views_b2P.shape[-1])  # window by window, its two views
    first = 2 * own * dist.get_rank() if columns.shape[0] > 2 * own else 0
    self_column = first + torch.arange(2 * own, device=device)
    with torch.autocast(device.type, enabled=False):
        logits = views_b2P.flatten(end_dim=1) @ columns.T / temperature
    is_self = self_column[:, None] == torch.arange(columns.shape[0], device=device)
    other_view = self_column ^ 1
    return F.cross_entropy(logits.masked_fill(is_self, float("-inf")), other_view)


def signal_mask(signal_counts_bW: Tensor, token_size: int) -> Tensor:
    """Where tokens hold real weights: bool [b, W, T]. Padding is always at a token's end."""
    return torch.arange(token_size, device=signal_counts_bW.device) < signal_counts_bW[..., None]


def reconstruction(
    reconstructed_bWT: Tensor,
    target_bWT: Tensor,
    signal_counts_bW: Tensor,
    divide_by: Literal["signal", "elements"] = "signal",
    gather: Gather = identity,
) -> Tensor:
    """Squared error over real weights, divided by their number, or as the published code does by that of all elements.

    Args:
        reconstructed_bWT: Output of the decoder; what stands in its padding is ignored.
        target_bWT: Tokens to reconstruct, zero in their padding.
        signal_counts_bW: Real weights of each token.
        divide_by: ``signal`` counts the real weights of the global batch, ``elements`` padding too.
        gather: ``gather_over_processes`` to divide by the count of all processes.

    Returns:
        Scalar.
    """
    if divide_by == "elements":
        padding = ~signal_mask(signal_counts_bW, target_bWT.shape[-1])
        return F.mse_loss(reconstructed_bWT.float().masked_fill(padding, 0.0), target_bWT.float())
    squared_error = _signal_error(reconstructed_bWT, target_bWT, signal_counts_bW).square().sum()
    counts = gather(signal_counts_bW.sum().view(1, 1))  # one of each process; integers, since float32 ends at 2^24
    return squared_error * counts.shape[0] / counts.sum()


def sane_loss(
    reconstructed_bWT: Tensor,
    target_bWT: Tensor,
    signal_counts_bW: Tensor,
    projection_bP: Tensor,
    loss: LossConfig,
    gather: Gather = identity,
) -> Losses:
    """The training loss of a batch that holds the first views of all windows, then the second ones in the same order.

    Args:
        reconstructed_bWT: Output of the decoder.
        target_bWT: Tokens to reconstruct: the views themselves.
        signal_counts_bW: Real weights of each token.
        projection_bP: Projections of the views.
        loss: Weights and temperature.
        gather: ``gather_over_processes`` when the global batch is spread over processes.
    """
    projection_1_bP, projection_2_bP = projection_bP.chunk(2)
    contrast = nt_xent(projection_1_bP, projection_2_bP, loss.temperature, gather)
    error = reconstruction(reconstructed_bWT, target_bWT, signal_counts_bW, loss.reconstruction, gather)
    return Losses(loss.gamma * contrast + (1 - loss.gamma) * error, contrast, error)


def explained_variance_sums(reconstructed_bWT: Tensor, target_bWT: Tensor, signal_counts_bW: Tensor) -> Tensor:
    """What explained variance is made of; add it up over batches and processes.

    Returns:
        float64 [5]: count, error, squared error, target, squared target, summed over real weights.
    """
    error = _signal_error(reconstructed_bWT, target_bWT, signal_counts_bW)
    target = target_bWT.float().masked_fill(~signal_mask(signal_counts_bW, target_bWT.shape[-1]), 0.0)
    terms = (signal_counts_bW, error, error.square(), target, target.square())
    return torch.stack([term.double().sum() for term in terms])  # on the CPU ten times faster than sum(dtype=...)


def explained_variance(sums: Tensor) -> Tensor:
    """1 - Var(error) / Var(target) over real weights, from added-up ``explained_variance_sums``.

    Returns:
        float64 scalar, at most 1; NaN where the target does not vary.
    """
    count, error, squared_error, target, squared_target = sums.unbind()
    error_variance = squared_error / count - (error / count).square()
    target_variance = squared_target / count - (target / count).square()
    return torch.where(target_variance > 0, 1 - error_variance / target_variance, float("nan"))


def published_explained_variance(reconstructed_bWT: Tensor, target_bWT: Tensor, mask_bWT: Tensor) -> Tensor:
    """The number that the published code calls rsq: explained variance over the batch of each element, then averaged.

    An element whose target does not vary counts 1 if its error does not vary either, as in padding, and 0 otherwise.

    Args:
        reconstructed_bWT: Output of the decoder.
        target_bWT: Tokens to reconstruct.
        mask_bWT: ``signal_mask`` of the tokens.

    Returns:
        float32 scalar.
    """
    error = target_bWT.float() - reconstructed_bWT.float().masked_fill(~mask_bWT, 0.0)
    error_variance, target_variance = error.var(0, correction=0), target_bWT.float().var(0, correction=0)
    constant = target_variance == 0
    score = 1 - error_variance / target_variance.masked_fill(constant, 1.0)
    return torch.where(constant, (error_variance == 0).float(), score).mean()


def _signal_error(reconstructed_bWT: Tensor, target_bWT: Tensor, signal_counts_bW: Tensor) -> Tensor:
    """Target minus reconstruction, float32, zero in the padding."""
    padding = ~signal_mask(signal_counts_bW, target_bWT.shape[-1])
    return (target_bWT.float() - reconstructed_bWT.float()).masked_fill(padding, 0.0)
