"""The loss of SANE, gamma * NT-Xent + (1 - gamma) * masked reconstruction (arXiv 2406.09997, section 3.3).

N processes compute the loss of one process with N times the batch: the mean over processes of what a function returns
is the loss of the global batch, and gradients averaged over processes, as DDP and FSDP do, are its gradients. All that
takes is ``gather``, which collects rows over processes. Each must bring the same number of rows, but some of them may
be filler: ``valid`` tells which are windows, and the others count nothing, neither above nor below a fraction line.
Everything is computed in float32, whatever comes in; only sums of few numbers are float64. This module never updates a
parameter and never waits for the device.

A batch too large to be computed at once gives the same loss in micro-batches: ``error_scale`` and
``contrast_gradient`` look at all rows of this process, then ``micro_loss`` is called for each micro-batch, and the
gradients it leaves add up to those of ``sane_loss``.

Shape suffixes: b rows of this process, B of all, n = 1 b or 2 b rows when views lie one after the other, m rows of a
micro-batch, P values of a projection, W tokens of a window, T of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from sane_ray.config import LossConfig

Normalization = Literal["none", "batch", "token"]
DivideBy = Literal["signal", "elements"]

_EPSILON = 1e-4
"""Added to the standard deviation that errors are divided by, as the published code does."""
_CONSTANT = 1e-10
"""A token whose variance is so small a part of its squared mean varies by rounding alone."""
_IGNORED = -100

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


def nt_xent(
    projection_1_bP: Tensor,
    projection_2_bP: Tensor,
    temperature: float,
    gather: Gather = identity,
    valid: Tensor | None = None,
) -> Tensor:
    """Contrastive loss between two views (NT-Xent): each view shall be closest to the other view of the same window.

    Each process compares its own 2 b rows with the 2 B columns of all.

    Args:
        projection_1_bP: Projections of the first views.
        projection_2_bP: Projections of the second views, in the same order.
        temperature: Divides the cosine similarities.
        gather: ``gather_over_processes`` to compare with the windows of all processes.
        valid: bool, which rows are windows: the others are compared with nothing. None: all are.

    Returns:
        Scalar: cross-entropy of this process's valid rows, divided by the mean number of them over processes; 0 where
        no process has any.
    """
    device = projection_1_bP.device
    own = projection_1_bP.shape[0]
    if valid is None:
        valid = torch.ones(own, dtype=torch.bool, device=device)
    views_b2P = torch.stack([projection_1_bP, projection_2_bP], dim=1).float()
    views_b2P = F.normalize(views_b2P, dim=-1, eps=1e-8)
    gathered = gather(torch.cat([views_b2P.flatten(start_dim=1), valid[:, None].float()], dim=1))
    columns = gathered[:, :-1].reshape(-1, views_b2P.shape[-1])  # window by window, its two views
    valid_rows, valid_columns = valid.repeat_interleave(2), gathered[:, -1].bool().repeat_interleave(2)
    first = 2 * own * dist.get_rank() if columns.shape[0] > 2 * own else 0
    self_column = first + torch.arange(2 * own, device=device)
    with torch.autocast(device.type, enabled=False):
        logits = views_b2P.flatten(end_dim=1) @ columns.T / temperature
    is_self = self_column[:, None] == torch.arange(columns.shape[0], device=device)
    # A filler row keeps all its columns: with none left its logits would be NaN, and NaN * 0 is NaN.
    left_out = (is_self | ~valid_columns) & valid_rows[:, None]
    other_view = (self_column ^ 1).masked_fill(~valid_rows, _IGNORED)
    entropy = F.cross_entropy(
        logits.masked_fill(left_out, float("-inf")), other_view, ignore_index=_IGNORED, reduction="sum"
    )
    processes = gathered.shape[0] // own
    return entropy / (valid_columns.sum().clamp(min=1) / processes)


def signal_mask(signal_counts_bW: Tensor, token_size: int) -> Tensor:
    """Where tokens hold real weights: bool [b, W, T]. Padding is always at a token's end."""
    return torch.arange(token_size, device=signal_counts_bW.device) < signal_counts_bW[..., None]


def valid_signal(signal_counts_nW: Tensor, valid: Tensor | None) -> Tensor:
    """Real weights of each token [n, W], 0 in the rows of each view that ``valid`` [b] says are no windows."""
    if valid is None:
        return signal_counts_nW
    return signal_counts_nW.unflatten(0, (-1, valid.shape[0])).mul(valid[:, None]).flatten(0, 1)


@dataclass(frozen=True)
class ErrorScale:
    """What the squared error of a global batch is divided by."""

    count: Tensor
    """int64 scalar: real weights or elements of the global batch."""
    processes: int
    """Processes that the global batch is spread over: what each returns is averaged over them."""
    normalization: Normalization
    variance: Tensor | None
    """float32 scalar: population variance of the real weights of the global batch; None without normalisation."""


def error_scale(
    target_nWT: Tensor,
    signal_counts_nW: Tensor,
    divide_by: DivideBy = "signal",
    normalization: Normalization = "none",
    gather: Gather = identity,
    valid: Tensor | None = None,
) -> ErrorScale:
    """What the squared errors of the global batch are divided by: call it once, with all rows of this process.

    Args: as ``reconstruction``.
    """
    signal_counts_nW = valid_signal(signal_counts_nW, valid)
    count = signal_counts_nW.sum()
    divisor = count if divide_by == "signal" else _valid_rows(signal_counts_nW, valid) * target_nWT[0].numel()
    if normalization == "none":
        divisors = gather(divisor.view(1, 1))  # one of each process; integers, since float32 ends at 2^24
        return ErrorScale(divisors.sum(), divisors.shape[0], normalization, None)
    mean_nW, variance_nW = (moment.double() for moment in _token_moments(target_nWT, signal_counts_nW))
    squares = (signal_counts_nW * (variance_nW + mean_nW.square())).sum()
    sums = gather(torch.stack([divisor.double(), count.double(), (signal_counts_nW * mean_nW).sum(), squares])[None])
    divisor, count, total, squares = sums.sum(dim=0)
    count = count.clamp(min=1)
    variance = (squares / count - (total / count).square()).clamp(min=0)
    return ErrorScale(divisor.long(), sums.shape[0], normalization, variance.float())


def scaled_error(
    reconstructed_mWT: Tensor,
    target_mWT: Tensor,
    signal_counts_mW: Tensor,
    scale: ErrorScale,
    valid: Tensor | None = None,
) -> Tensor:
    """The part of ``reconstruction`` that some of its rows make up; over all rows the parts add up to it.

    Args:
        reconstructed_mWT: Output of the decoder for some rows.
        target_mWT: Tokens to reconstruct.
        signal_counts_mW: Real weights of each token.
        scale: ``error_scale`` of all rows.
        valid: Which windows of these rows are valid, as in ``reconstruction``.

    Returns:
        Scalar.
    """
    signal_counts_mW = valid_signal(signal_counts_mW, valid)
    squared_mWT = _signal_error(reconstructed_mWT, target_mWT, signal_counts_mW).square()
    if scale.variance is None:
        squared = squared_mWT.sum()
    elif scale.normalization == "batch":
        squared = squared_mWT.sum() / _divisor_of(scale.variance)
    else:
        mean_mW, variance_mW = _token_moments(target_mWT, signal_counts_mW)
        constant_mW = variance_mW <= _CONSTANT * mean_mW.square()
        variance_mW = torch.where(constant_mW, scale.variance, variance_mW)
        squared = (squared_mWT.sum(dim=-1) / _divisor_of(variance_mW)).sum()
    return squared * scale.processes / scale.count.clamp(min=1)


def reconstruction(
    reconstructed_nWT: Tensor,
    target_nWT: Tensor,
    signal_counts_nW: Tensor,
    divide_by: DivideBy = "signal",
    gather: Gather = identity,
    normalization: Normalization = "none",
    valid: Tensor | None = None,
) -> Tensor:
    """Squared error over real weights, divided by their number, or as the published code does by that of all elements.

    With ``normalization`` it is divided by (s + 1e-4)^2 too, where s^2 is the population variance of the real weights
    to reconstruct, so that networks of different scales count alike: masked loss normalisation (arXiv 2504.10141).
    Standardising both sides with the mean and s of the targets before comparing them is the same. ``batch`` takes one
    s from the global batch, ``token`` one from each token. A token that does not vary, such as one of a single weight
    or of zeros, has no scale of its own and takes that of the batch. No gradient flows through s.

    Args:
        reconstructed_nWT: Output of the decoder; what stands in its padding is ignored.
        target_nWT: Tokens to reconstruct.
        signal_counts_nW: Real weights of each token.
        divide_by: ``signal`` counts the real weights of the global batch, ``elements`` padding too.
        gather: ``gather_over_processes`` to divide by the count of all processes.
        normalization: ``none``, ``batch`` or ``token``.
        valid: bool, which windows are no filler; where rows hold several views one after the other, of each view's
            rows. None: all are.

    Returns:
        Scalar; 0 where no process has a valid row.
    """
    scale = error_scale(target_nWT, signal_counts_nW, divide_by, normalization, gather, valid)
    return scaled_error(reconstructed_nWT, target_nWT, signal_counts_nW, scale, valid)


def sane_loss(
    reconstructed_nWT: Tensor,
    target_nWT: Tensor,
    signal_counts_nW: Tensor,
    projection_nP: Tensor | None,
    loss: LossConfig,
    gather: Gather = identity,
    valid: Tensor | None = None,
) -> Losses:
    """The training loss of a batch that holds the first views of all windows, then the second ones in the same order.

    Where ``loss.contrast`` is ``none`` the batch may hold a single view; projections are not looked at, and gamma does
    not count: the total is the reconstruction loss.

    Args:
        reconstructed_nWT: Output of the decoder.
        target_nWT: Tokens to reconstruct: the views themselves.
        signal_counts_nW: Real weights of each token.
        projection_nP: Projections of the views; may be None where ``loss.contrast`` is ``none``.
        loss: Weights, temperature, denominators.
        gather: ``gather_over_processes`` when the global batch is spread over processes.
        valid: bool, which rows of a view are windows; the others count nothing. None: all are.
    """
    contrast = None if loss.contrast == "none" else _contrast(projection_nP, loss, gather, valid)
    error = reconstruction(
        reconstructed_nWT, target_nWT, signal_counts_nW, loss.reconstruction, gather, loss.normalization, valid
    )
    return combine(contrast, error, loss)


def combine(contrast: Tensor | None, error: Tensor, loss: LossConfig) -> Losses:
    """Total of the two parts, weighed by gamma; without a contrastive one (None) it is the reconstruction alone."""
    if contrast is None:
        return Losses(error, torch.zeros_like(error), error)
    return Losses(loss.gamma * contrast + (1 - loss.gamma) * error, contrast, error)


def contrast_gradient(
    projection_nP: Tensor, loss: LossConfig, gather: Gather = identity, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of projections computed without a graph, and its gradient for each of them.

    The first of two passes over micro-batches: what each of them must know of all others is its rows of the gradient
    (gradient caching, arXiv 2101.06983).

    Args:
        projection_nP: Projections of all rows of this process: first views, then second ones in the same order.
        loss: Temperature; ``contrast`` must be ``simclr``.
        gather: As for ``sane_loss``.
        valid: As for ``sane_loss``.

    Returns:
        The loss, a scalar without graph, and its gradient, float32 [n, P], not yet multiplied by gamma.
    """
    with torch.enable_grad():
        leaf_nP = projection_nP.detach().float().requires_grad_()
        contrast = _contrast(leaf_nP, loss, gather, valid)
        (gradient_nP,) = torch.autograd.grad(contrast, leaf_nP)
    return contrast.detach(), gradient_nP


def micro_loss(
    reconstructed_mWT: Tensor,
    target_mWT: Tensor,
    signal_counts_mW: Tensor,
    projection_mP: Tensor | None,
    loss: LossConfig,
    scale: ErrorScale,
    gradient_mP: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What to differentiate for some rows, so that the gradients of all micro-batches add up to those of ``sane_loss``.

    ::

        scale = error_scale(target, signal, loss.reconstruction, loss.normalization, gather, valid)
        contrast, gradient = contrast_gradient(projections_without_graph, loss, gather, valid)
        for rows in micro_batches:  # both views of a few windows
            objective, part = micro_loss(..., projection, loss, scale, gradient[rows])
            objective.backward()
            error = error + part.detach()
        losses = combine(contrast, error, loss)

    The projections must be those of the first pass: same noise, same dropout.

    Args:
        reconstructed_mWT: Output of the decoder.
        target_mWT: Tokens to reconstruct.
        signal_counts_mW: Real weights of each token.
        projection_mP: Projections; may be None where ``loss.contrast`` is ``none``.
        loss: Weights.
        scale: ``error_scale`` of all rows of this process.
        gradient_mP: These rows of what ``contrast_gradient`` gave; None where ``loss.contrast`` is ``none``.
        valid: bool, which windows of these rows are no filler, as for ``sane_loss``.

    Returns:
        The objective, a scalar whose value means nothing, and the part of the reconstruction loss.
    """
    error = scaled_error(reconstructed_mWT, target_mWT, signal_counts_mW, scale, valid)
    if loss.contrast == "none":
        return error, error
    assert projection_mP is not None and gradient_mP is not None, "loss.contrast simclr needs projections"
    return loss.gamma * (projection_mP.float() * gradient_mP).sum() + (1 - loss.gamma) * error, error


@torch.no_grad()
def explained_variance_sums(
    reconstructed_nWT: Tensor, target_nWT: Tensor, signal_counts_nW: Tensor, valid: Tensor | None = None
) -> Tensor:
    """What explained variance is made of; add it up over batches and processes.

    Returns:
        float64 [5]: count, error, squared error, target, squared target, summed over real weights of valid rows.
    """
    signal_counts_nW = valid_signal(signal_counts_nW, valid)
    error = _signal_error(reconstructed_nWT, target_nWT, signal_counts_nW)
    target = target_nWT.float().masked_fill(~signal_mask(signal_counts_nW, target_nWT.shape[-1]), 0.0)
    # float64 from tokens on: from the values on it would take five times as long.
    terms = (error.sum(dim=-1), error.square_().sum(dim=-1), target.sum(dim=-1), target.square_().sum(dim=-1))
    return torch.stack([term.double().sum() for term in (signal_counts_nW, *terms)])


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


def _contrast(projection_nP: Tensor | None, loss: LossConfig, gather: Gather, valid: Tensor | None) -> Tensor:
    assert projection_nP is not None, "loss.contrast simclr needs projections"
    projection_1_bP, projection_2_bP = projection_nP.chunk(2)
    return nt_xent(projection_1_bP, projection_2_bP, loss.temperature, gather, valid)


def _valid_rows(signal_counts_nW: Tensor, valid: Tensor | None) -> Tensor:
    """int64 scalar: rows of all views that are valid."""
    if valid is None:
        return torch.full((), signal_counts_nW.shape[0], device=signal_counts_nW.device)
    return valid.sum() * (signal_counts_nW.shape[0] // valid.shape[0])


def _divisor_of(variance: Tensor) -> Tensor:
    """What squared errors are divided by: the square of the standard deviation, which is kept off zero."""
    return (variance.sqrt() + _EPSILON).square()


@torch.no_grad()
def _token_moments(tokens_nWT: Tensor, signal_counts_nW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance, float32 [n, W] each, of the real weights of each token; 0 where it has none."""
    padding = ~signal_mask(signal_counts_nW, tokens_nWT.shape[-1])
    count_nW = signal_counts_nW.clamp(min=1)
    tokens_nWT = tokens_nWT.float().masked_fill(padding, 0.0)
    mean_nW = tokens_nWT.sum(dim=-1) / count_nW
    deviation_nWT = (tokens_nWT - mean_nW[..., None]).masked_fill_(padding, 0.0)
    return mean_nW, deviation_nWT.square_().sum(dim=-1) / count_nW


def _signal_error(reconstructed_bWT: Tensor, target_bWT: Tensor, signal_counts_bW: Tensor) -> Tensor:
    """Target minus reconstruction, float32, zero in the padding."""
    padding = ~signal_mask(signal_counts_bW, target_bWT.shape[-1])
    return (target_bWT.float() - reconstructed_bWT.float()).masked_fill_(padding, 0.0)
