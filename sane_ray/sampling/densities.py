"""Densities fitted to the representations of a few good networks (anchors), and what is drawn from them.

A representation is one vector a token: an embedding of SANE, or the normalised weights themselves. The same densities
serve both, which makes baselines of them: a kernel density in weights is noise added to the anchors, an interpolation
of weights is a partial average. Plain torch and numpy; never decodes, never looks at an image, never imports Ray.

Shape suffixes: K anchors, R draws, N tokens, X values of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PUBLISHED_BANDWIDTH = 0.2
"""Of the published kernel densities, in units of the embedding."""

PUBLISHED_SEED = 42
PUBLISHED_RANDOM = 10.0
"""Standard deviation of the published random embeddings, around 0."""

NEIGHBORS = 5
"""Nearest anchors that an interpolation chooses from."""

MOST_COMPONENTS = 5
"""Of a mixture; each has at least four anchors."""


@dataclass(frozen=True)
class Draws:
    """What was drawn from a density."""

    values_RNX: Tensor
    """float32."""
    parents: list[list[int]]
    """Anchors that each is near: the one whose kernel it is drawn from, those that are mixed; empty for all or none."""


Density = Callable[[Tensor, int, int, float], Draws]
"""Draws from anchors [K, N, X]: how many, from which seed, and how far from them (what that means the density says)."""


def spread(anchors_KNX: Tensor) -> float:
    """Root-mean-square deviation of the anchors' values from their mean over anchors."""
    return float((anchors_KNX - anchors_KNX.mean(0)).square().mean().sqrt())


def anchors_themselves(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """The anchors in order, and again from the first where more are asked for."""
    chosen_R = torch.arange(count) % len(anchors_KNX)
    return Draws(anchors_KNX[chosen_R], [[index] for index in chosen_R.tolist()])


def joint_kde(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """Gaussian kernels over whole networks: one anchor for all tokens, and noise of deviation ``scale`` everywhere.

    With weights for representations this is noise added to anchors.
    """
    rng = _generator(seed)
    chosen_R = torch.randint(len(anchors_KNX), (count,), generator=rng)
    noise_RNX = torch.randn(count, *anchors_KNX.shape[1:], generator=rng)
    return Draws(anchors_KNX[chosen_R] + scale * noise_RNX, [[index] for index in chosen_R.tolist()])


def shared_kde(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """Gaussian kernels with one noise vector for all tokens of a draw: what the published seed comes to, drawn anew.

    With weights for representations it is the baseline of the published draws: noise that all channels share.
    """
    rng = _generator(seed)
    chosen_R = torch.randint(len(anchors_KNX), (count,), generator=rng)
    noise_R1X = torch.randn(count, 1, anchors_KNX.shape[2], generator=rng)
    return Draws(anchors_KNX[chosen_R] + scale * noise_R1X, [[index] for index in chosen_R.tolist()])


def token_kde(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """A Gaussian kernel density for each token (paper, section 3.4), drawn independently, so that anchors are mixed."""
    rng = _generator(seed)
    chosen_RN = torch.randint(len(anchors_KNX), (count, anchors_KNX.shape[1]), generator=rng)
    picked_RNX = anchors_KNX[chosen_RN, torch.arange(anchors_KNX.shape[1])]
    return Draws(picked_RNX + scale * torch.randn(picked_RNX.shape, generator=rng), [[] for _ in range(count)])


def dimension_kde(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """A Gaussian kernel density for each dimension of each token, drawn independently."""
    rng = _generator(seed)
    shape = (count, *anchors_KNX.shape[1:])
    chosen_RNX = torch.randint(len(anchors_KNX), shape, generator=rng)
    picked_RNX = anchors_KNX.gather(0, chosen_RNX)
    return Draws(picked_RNX + scale * torch.randn(shape, generator=rng), [[] for _ in range(count)])


def published_kde(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """What the published code draws in its token mode, bit for bit: see ``shared_seed_kde``."""
    values = shared_seed_kde(anchors_KNX.numpy(), count, "token", scale)
    chosen = _shared_uniform(count, len(anchors_KNX))[0]
    return Draws(torch.from_numpy(values).float(), [[int(index)] for index in chosen])


def shared_seed_kde(
    anchors_KNX: np.ndarray, count: int, mode: str, bandwidth: float = PUBLISHED_BANDWIDTH
) -> np.ndarray:
    """The published draws: a scikit-learn kernel density for each token, each sampled with ``random_state=42``.

    As all use the same seed, all tokens of a draw come from one anchor and get the same noise: that closed form.

    Args:
        anchors_KNX: embeddings of the anchors.
        count: how many to draw.
        mode: ``token`` (one density a token), ``dimension`` (one a value; the published ``individual``), ``joint``.
        bandwidth: of the kernels.

    Returns:
        float64 [R, N, X].
    """
    anchors, tokens, values = anchors_KNX.shape
    size = {"token": (1, values), "dimension": (1, 1), "joint": (tokens, values)}[mode]
    chosen_R, rng = _shared_uniform(count, anchors)
    noise = rng.normal(size=(count, size[0] * size[1])).reshape(count, *size)
    return anchors_KNX[chosen_R].astype(np.float64) + bandwidth * noise


def gaussian(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """A Gaussian over whole networks whose covariance is shrunk to a multiple of the identity (Ledoit and Wolf 2004).

    Drawn from its square root, (1 - d) S + d m I with S of rank K - 1, so that no matrix of N X by N X is made.
    ``scale`` multiplies the deviation from the mean.
    """
    rng = _generator(seed)
    mean_1Y = anchors_KNX.flatten(1).mean(0, keepdim=True)
    centred_KY = anchors_KNX.flatten(1) - mean_1Y
    if len(centred_KY) == 1:
        return anchors_themselves(anchors_KNX, count, seed, scale)
    shrinkage = _ledoit_wolf(centred_KY)
    within_RY = torch.randn(count, len(centred_KY), generator=rng) @ centred_KY / len(centred_KY) ** 0.5
    around_RY = torch.randn(count, centred_KY.shape[1], generator=rng) * centred_KY.square().mean().sqrt()
    drawn_RY = (1 - shrinkage) ** 0.5 * within_RY + shrinkage**0.5 * around_RY
    return Draws((mean_1Y + scale * drawn_RY).unflatten(1, anchors_KNX.shape[1:]), [[] for _ in range(count)])


def _ledoit_wolf(centred_KY: Tensor) -> float:
    """The shrinkage of Ledoit and Wolf (2004), from the products of the samples alone, whatever their length."""
    samples, length = centred_KY.shape
    gram_KK = centred_KY.double() @ centred_KY.double().T
    mean = float(gram_KK.trace()) / (samples * length)
    square = float(gram_KK.square().sum()) / samples**2
    spread_of_all = square / length - mean**2
    spread_of_samples = (float(gram_KK.diagonal().square().sum()) / samples - square) / (samples * length)
    return 0.0 if spread_of_all <= 0 else min(max(spread_of_samples / spread_of_all, 0.0), 1.0)


def mixture(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """A mixture of Gaussians in the subspace that the anchors span, one component for every four of them, up to five.

    ``scale`` multiplies the deviation from the components' means.
    """
    from sklearn.mixture import GaussianMixture

    flat_KY = anchors_KNX.flatten(1)
    if len(flat_KY) == 1:
        return anchors_themselves(anchors_KNX, count, seed, scale)
    mean_1Y = flat_KY.mean(0, keepdim=True)
    axes_PY = torch.linalg.svd(flat_KY - mean_1Y, full_matrices=False).Vh[: len(flat_KY) - 1]
    scores_KP = ((flat_KY - mean_1Y) @ axes_PY.T).double().numpy()
    components = max(1, min(MOST_COMPONENTS, len(flat_KY) // 4))
    fitted = GaussianMixture(components, covariance_type="diag", random_state=seed, reg_covar=1e-6).fit(scores_KP)
    drawn, labels = fitted.sample(count)
    centres = fitted.means_[labels]
    scores_RP = torch.from_numpy(centres + scale * (drawn - centres)).float()
    order = torch.randperm(count, generator=_generator(seed))  # components come one after the other
    return Draws((mean_1Y + scores_RP @ axes_PY)[order].unflatten(1, anchors_KNX.shape[1:]), [[] for _ in range(count)])


def interpolation(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """Points between an anchor and one of its nearest others, at the fraction ``scale`` of the way."""
    rng = _generator(seed)
    flat_KY = anchors_KNX.flatten(1)
    if len(flat_KY) == 1:
        return anchors_themselves(anchors_KNX, count, seed, scale)
    distance_KK = torch.cdist(flat_KY, flat_KY).fill_diagonal_(float("inf"))
    near_KM = distance_KK.argsort(1)[:, : min(NEIGHBORS, len(flat_KY) - 1)]
    first_R = torch.randint(len(flat_KY), (count,), generator=rng)
    second_R = near_KM[first_R, torch.randint(near_KM.shape[1], (count,), generator=rng)]
    values_RNX = torch.lerp(anchors_KNX[first_R], anchors_KNX[second_R], scale)
    return Draws(values_RNX, [list(pair) for pair in zip(first_R.tolist(), second_R.tolist(), strict=True)])


def average(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """Means of ``scale`` anchors chosen at random (of all, where there are fewer)."""
    rng = _generator(seed)
    size = min(max(1, round(scale)), len(anchors_KNX))
    chosen = [torch.randperm(len(anchors_KNX), generator=rng)[:size] for _ in range(count)]
    return Draws(torch.stack([anchors_KNX[some].mean(0) for some in chosen]), [some.tolist() for some in chosen])


def random(anchors_KNX: Tensor, count: int, seed: int, scale: float) -> Draws:
    """Gaussian noise around 0 of deviation ``scale``, whatever the anchors: the published null."""
    noise_RNX = torch.randn(count, *anchors_KNX.shape[1:], generator=_generator(seed))
    return Draws(scale * noise_RNX, [[] for _ in range(count)])


def _shared_uniform(count: int, anchors: int) -> tuple[np.ndarray, np.random.RandomState]:
    rng = np.random.RandomState(PUBLISHED_SEED)
    return (rng.uniform(0, 1, size=count) * anchors).astype(np.int64), rng


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
