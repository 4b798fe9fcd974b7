"""How new networks are: distance in weights and in wrong answers to the nearest training network.

Plain torch and numpy. Never draws, never reads a file, never imports Ray.

Shape suffixes: R sampled networks, M training networks, V weights of a network, I images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def weight_distances(sampled_RV: Tensor, training_MV: Tensor) -> NDArray[np.float64]:
    """Root-mean-square differences of normalised weights, [R, M]."""
    distances_RM = torch.cdist(sampled_RV.double(), training_MV.double(), compute_mode="donot_use_mm_for_euclid_dist")
    result: NDArray[np.float64] = (distances_RM / sampled_RV.shape[1] ** 0.5).numpy()
    return result


def wrong_agreement(
    first_RI: NDArray[np.integer], second_MI: NDArray[np.integer], labels_I: NDArray[np.integer]
) -> NDArray[np.float64]:
    """How alike wrong answers are, [R, M]: images both give the same wrong class, over those that either gets wrong.

    The intersection over union of wrong predictions (Zeng et al., CVPR 2026); 0 where both are right everywhere.
    """
    wrong_R, wrong_M = (first_RI != labels_I), (second_MI != labels_I)
    either = wrong_R.sum(1)[:, None] + wrong_M.sum(1)[None]
    both = wrong_R.astype(np.float32) @ wrong_M.astype(np.float32).T
    same = np.zeros(both.shape)
    for label in np.unique(np.concatenate([first_RI[wrong_R], second_MI[wrong_M]])):
        mine = (wrong_R & (first_RI == label)).astype(np.float32)
        same += mine @ (wrong_M & (second_MI == label)).astype(np.float32).T
    union = either - both
    return np.divide(same, union, out=np.zeros_like(same), where=union > 0)


def other_runs(values_MM: NDArray[np.float64], runs: Sequence[str], fill: float) -> NDArray[np.float64]:
    """The same with pairs of one training run set to ``fill``: its checkpoints are near each other by themselves."""
    names = np.array(runs)
    return np.where(names[:, None] == names[None], fill, values_MM)
