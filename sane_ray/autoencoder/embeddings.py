"""What tells whether embeddings collapse: their mean norm, and how many dimensions they really use.

Both come from sums that add up over batches and processes, so that nothing but the sums is kept or sent. Meant for
validation: sums are float64, and eigenvalues wait for the device. This module never trains.

Shape suffixes: n rows, W tokens of a window, L values of an embedding, M = n W tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sane_ray.autoencoder.losses import valid_signal

_ROUNDING = 1e-12


@torch.no_grad()
def embedding_statistics(z_nWL: Tensor, signal_counts_nW: Tensor, valid: Tensor | None = None) -> Tensor:
    """What norm and effective rank are made of; add it up over batches and processes.

    Args:
        z_nWL: Embeddings.
        signal_counts_nW: Real weights of each token; tokens without any do not count.
        valid: bool, which windows are no filler; where rows hold several views one after the other, of each view's
            rows. None: all are.

    Returns:
        float64 [2 + L + L^2]: number of embeddings, sum of their norms, sum of them, sum of their outer products.
    """
    real_M1 = (valid_signal(signal_counts_nW, valid) > 0).flatten()[:, None]
    z_ML = z_nWL.flatten(end_dim=1).double().masked_fill(~real_M1, 0.0)
    counts = torch.stack([real_M1.sum().double(), z_ML.norm(dim=1).sum()])
    return torch.cat([counts, z_ML.sum(dim=0), (z_ML.T @ z_ML).flatten()])


def embedding_norm(sums: Tensor) -> Tensor:
    """Mean Euclidean norm of the embeddings of added-up ``embedding_statistics``: float64 scalar, NaN of none."""
    return sums[1] / sums[0]


def effective_rank(sums: Tensor) -> Tensor:
    """How many dimensions the embeddings of added-up ``embedding_statistics`` spread over.

    The exponential of the entropy of the eigenvalues of their covariance, which are first divided by their sum: the
    effective rank of the covariance (Roy & Vetterli, EUSIPCO 2007). RankMe (arXiv 2210.02885) takes it of the matrix of
    embeddings as they are; without its mean, a direction that all embeddings share counts as none here.

    Returns:
        float64 scalar in [1, L]; 0 where the embeddings do not vary, NaN where there are none or one is not finite.
    """
    size = (math.isqrt(4 * sums.numel() - 7) - 1) // 2  # of numel = 2 + L + L^2
    count, mean_L = sums[0], sums[2 : 2 + size] / sums[0]
    second_LL = sums[2 + size :].view(size, size) / count
    known = second_LL.isfinite().all()
    covariance_LL = torch.where(known, second_LL - mean_L.outer(mean_L), 0.0)  # eigvalsh of NaN is an error
    variances_L = torch.linalg.eigvalsh(covariance_LL).clamp(min=0)
    total = variances_L.sum()
    shares_L = variances_L / total
    rank = torch.special.entr(shares_L).sum().exp()
    varies = total > _ROUNDING * second_LL.trace()
    return torch.where(known, torch.where(varies, rank, 0.0), float("nan"))
