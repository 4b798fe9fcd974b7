"""Spectra of weight matrices as features, in the manner of WeightWatcher, for many matrices of one shape at once.

A convolution is the matrix [C_out, C_in x kernel] (WeightWatcher takes one matrix a kernel position); whatever has more
axes is [first axis, the rest]. Eigenvalues are those of W W^T: squared singular values. Pure functions of arrays; never
read a store or import Ray.

Shape suffixes: B matrices, C rows, F columns, E eigenvalues.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sane_ray.properties.tensors import Batch

Array = NDArray[np.float64]

NAMES = ("log_norm", "log_spectral_norm", "stable_rank", "alpha", "alpha_weighted", "log_alpha_norm")

MIN_EIGENVALUES = 10
"""Matrices with fewer have no alpha: a power law cannot be told from anything else."""

MIN_TAIL = 5
"""Fewest eigenvalues that a power law is fitted to."""

RANK_TOLERANCE = 1e-12
"""Eigenvalues below this part of the largest are rounding of zero."""


def spectral_features(batch: Batch) -> tuple[list[str], Array]:
    """Six numbers of each weight matrix: ``NAMES``, as ``spectral_metrics`` defines them.

    Returns:
        Names ``<weight>/<metric>`` and values [B, 6 matrices]; NaN where a number is not defined. No columns where the
        architecture has no matrix of at least 2 x 2.
    """
    names, columns = [], []
    for layer, weight_BCF, _ in batch.tensors():
        if min(weight_BCF.shape[1:]) >= 2:
            names += [f"{layer.key}/{name}" for name in NAMES]
            columns.append(spectral_metrics(weight_BCF))
    return names, np.concatenate(columns, axis=1) if columns else np.empty((len(batch.checkpoints), 0))


def spectral_metrics(matrices_BCF: NDArray[np.floating]) -> Array:
    """What WeightWatcher calls the quality metrics of a layer (Martin, Peng & Mahoney, arXiv 2002.06716, section 3).

    * ``log_norm``: log10 of the squared Frobenius norm, the sum of the eigenvalues;
    * ``log_spectral_norm``: log10 of the largest eigenvalue;
    * ``stable_rank``: their ratio;
    * ``alpha``: exponent of a power law in the tail of the eigenvalues (``fit_power_law``);
    * ``alpha_weighted``: alpha times log_spectral_norm;
    * ``log_alpha_norm``: log10 of the sum of the eigenvalues to the power of alpha.

    Returns:
        [B, 6]. All NaN for a matrix of zeros; the alphas NaN for one with few eigenvalues.
    """
    eigenvalues_BE = np.linalg.svd(matrices_BCF.astype(np.float64), compute_uv=False)[:, ::-1] ** 2
    largest_B = np.where(eigenvalues_BE[:, -1] > 0, eigenvalues_BE[:, -1], np.nan)
    total_B = eigenvalues_BE.sum(axis=1)
    log_norm, log_spectral = (
        np.log10(value, where=value > 0, out=np.full(len(value), np.nan)) for value in (total_B, largest_B)
    )
    alpha_B = fit_power_law(eigenvalues_BE)[0]
    log_alpha = _log_alpha_norm(eigenvalues_BE, alpha_B)
    return np.stack([log_norm, log_spectral, total_B / largest_B, alpha_B, alpha_B * log_spectral, log_alpha], axis=1)


def _log_alpha_norm(eigenvalues_BE: Array, alpha_B: Array) -> Array:
    """log10(sum(eigenvalues^alpha)), summed by logarithms: powers of large eigenvalues would overflow."""
    with np.errstate(divide="ignore", invalid="ignore"):  # the logarithm of zero to a power is minus infinity
        powers_BE = alpha_B[:, None] * np.log(eigenvalues_BE)
        return np.asarray(np.logaddexp.reduce(powers_BE, axis=1) / np.log(10))


def fit_power_law(values_BE: Array) -> tuple[Array, Array, Array]:
    """Exponents of power laws p(x) ~ x^-alpha for x >= xmin, by maximum likelihood (Clauset, Shalizi & Newman 2009).

    For every candidate xmin, one of the values, alpha = 1 + n / sum(ln(x / xmin)) over the n values from it on (their
    equation 3.1); the candidate counts whose fit has the smallest Kolmogorov-Smirnov distance (3.9).

    Args:
        values_BE: Each row ascending and not negative.

    Returns:
        alpha, xmin and distance, each [B]; NaN where a row has fewer than ``MIN_EIGENVALUES`` values above zero, or no
        spread.
    """
    rows, count = values_BE.shape
    alpha, xmin, distance = np.full((3, rows), np.nan)
    positive_BE = values_BE > RANK_TOLERANCE * values_BE[:, -1:]
    enough = positive_BE.sum(axis=1) >= MIN_EIGENVALUES
    logs_BE = np.log(values_BE, where=positive_BE, out=np.zeros_like(values_BE))
    sums_BE = logs_BE[:, ::-1].cumsum(axis=1)[:, ::-1]
    for first in range(count - MIN_TAIL + 1):
        tail = count - first
        spread_B = sums_BE[:, first] - tail * logs_BE[:, first]
        usable = enough & positive_BE[:, first] & (spread_B > 0)
        exponent_B = tail / np.where(usable, spread_B, np.nan)
        gap_B = _distance(logs_BE[:, first:] - logs_BE[:, first, None], exponent_B)
        better = usable & ~(gap_B >= distance)
        alpha, distance = np.where(better, 1 + exponent_B, alpha), np.where(better, gap_B, distance)
        xmin = np.where(better, values_BE[:, first], xmin)
    return alpha, xmin, distance


def _distance(logs_BE: Array, exponent_B: Array) -> Array:
    """Largest gap between the steps of the values' distribution and that of the fit, [B]; logs are of x / xmin."""
    fitted_BE = 1 - np.exp(-exponent_B[:, None] * logs_BE)
    steps = np.arange(logs_BE.shape[1] + 1) / logs_BE.shape[1]
    return np.maximum(np.abs(steps[1:] - fitted_BE), np.abs(fitted_BE - steps[:-1])).max(axis=1)
