"""Statistics of weights as features: the published s(W), and that of each tensor by itself.

Pure functions of arrays. Never read a store, never normalise features, never import Ray.

Shape suffixes: B checkpoints, K layers, V values of a tensor, F features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sane_ray.properties.tensors import Batch

Features = NDArray[np.float64]

PUBLISHED_PERCENTILES = (1, 25, 50, 75, 99)
PUBLISHED_NAMES = ("mean", "variance", *(f"p{q:02d}" for q in PUBLISHED_PERCENTILES))

PERCENTILES = (0, 25, 50, 75, 100)
NAMES = ("mean", "variance", *(f"p{q:02d}" for q in PERCENTILES))


def published_statistics(batch: Batch) -> tuple[list[str], Features]:
    """The published s(W): 7 numbers a layer, of its normalised tokens with their padding (``LayerQuintiles``).

    Zeros of the padding count, and weight and bias are one: SANE (arXiv 2406.09997, section 4.1), as its code has it.

    Returns:
        Names ``<weight>/<statistic>`` and values [B, 7 K].
    """
    names, columns = [], []
    table = batch.architecture.table
    for layer, start in zip(table.layers, table.layer_starts.tolist(), strict=False):
        values_BV = batch.tokens_BNT[:, start : start + layer.num_tokens].reshape(len(batch.checkpoints), -1)
        names += [f"{layer.key}/{name}" for name in PUBLISHED_NAMES]
        columns.append(describe(values_BV, PUBLISHED_PERCENTILES))
    return names, np.concatenate(columns, axis=1)


def tensor_statistics(batch: Batch) -> tuple[list[str], Features]:
    """Mean, variance and five percentiles of each tensor, weight and bias apart, as they are in the network.

    Unterthiner et al., "Predicting Neural Network Accuracy from Weights" (arXiv 2002.11448), section 3: percentiles 0,
    25, 50, 75 and 100.

    Returns:
        Names ``<weight>/<weight or bias> <statistic>`` and values [B, 7 tensors].
    """
    names, columns = [], []
    for layer, weight_BCF, bias_BC in batch.tensors():
        for role, values in (("weight", weight_BCF), ("bias", bias_BC)):
            if values is not None:
                names += [f"{layer.key}/{role} {name}" for name in NAMES]
                columns.append(describe(values.reshape(len(values), -1), PERCENTILES))
    return names, np.concatenate(columns, axis=1)


def describe(values_BV: NDArray[np.floating], percentiles: tuple[int, ...]) -> Features:
    """Mean, biased variance and percentiles (linear interpolation) of each row, [B, 2 + percentiles]."""
    mean_B = values_BV.mean(axis=1, dtype=np.float64)
    variance_B = values_BV.var(axis=1, dtype=np.float64)
    quantiles = np.percentile(values_BV.astype(np.float64), percentiles, axis=1)
    return np.concatenate([mean_B[:, None], variance_B[:, None], quantiles.T], axis=1)
