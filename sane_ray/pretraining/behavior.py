"""Behavioural loss: how differently a decoded network and the original answer queries (arXiv 2503.17138).

Plain torch. Never updates a parameter, and never changes with the number of workers: queries depend on seed and step.

Shapes: b windows of a worker, both views of them 2b; W tokens of a network, T values of a token; R rows of one group,
Q queries, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sane_ray.config import LossConfig
from sane_ray.errors import InputError
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.networks import Decoder, Group, answers, groups_of
from sane_ray.tokens.store import TokenStore

TEMPERATURE = 2.0
"""Of the KL divergence, as published."""

_ROWS_AT_ONCE = 16
"""Networks whose inner values are in memory together: 256 queries of 32x32 pixels take a gigabyte."""
_QUERIES = 7  # keeps this random stream apart from others of the same seed


class Behavior:
    """Distances between the answers of reconstructed and original networks.

    The original is the network as stored, without the noise and the erasing that the autoencoder saw; a permuted view
    is the same function. All queries go to both networks, without dropout, in float32. Networks of one architecture,
    activation function and set of images are run together; the rows' ordinals travel to the host for that, once a step.

    The published loss divides each of its parts by its value in the first batch. That is left out here: it would hang
    on the order of the data, and a resumed run would have to keep it.
    """

    def __init__(
        self, store: TokenStore, loss: LossConfig, *, window: int, device: torch.device, seed: int = 0
    ) -> None:
        """Makes ready one network of each group; reads no tokens.

        Args:
            store: what is trained on.
            loss: which queries, how many, and how answers are compared.
            window: tokens of a training window.
            device: where to compute.
            seed: of the queries.

        Raises:
            InputError: as ``check_behavior``.
        """
        self.loss, self.device, self.seed = loss, device, seed
        groups = _checked_groups(store, loss, window)
        self._group_of = np.zeros(len(store.models), dtype=np.int64)
        for number, group in enumerate(groups):
            self._group_of[list(group.checkpoints)] = number
        self._groups = [_Networks(group, loss, device) for group in groups]
        self._scales = _model_scales(store)

    def __call__(self, reconstructed: Tensor, batch: Batch, step: int) -> Tensor:
        """Distance of each row's network to its original.

        Args:
            reconstructed: [2b, W, T] decoded tokens of the first views, then of the second views.
            batch: the b windows as they come from the store; some of its rows will do as well.
            step: global step, which the queries are drawn for.

        Returns:
            float32 [2b], not negative, differentiable in ``reconstructed``. 0 for filler, and where an answer is not
            finite (as published); such a row has no gradient. 0 where reconstructed and original are equal, but with
            ``cross_entropy``, whose least value is the entropy of the original's answers.
        """
        original = torch.cat([batch.view_1, batch.view_2]).float()
        checkpoint = torch.cat([batch.checkpoint, batch.checkpoint]).cpu().numpy()
        group_of_row = np.where(checkpoint < 0, -1, self._group_of[checkpoint])
        wanted = torch.is_grad_enabled() and reconstructed.requires_grad
        distances, gradient = torch.zeros(len(original), device=self.device), torch.zeros_like(original)
        for number in np.unique(group_of_row[group_of_row >= 0]):
            networks = self._groups[number]
            queries = networks.queries(np.random.default_rng((self.seed, _QUERIES, step)))
            members = torch.from_numpy(np.flatnonzero(group_of_row == number))
            for some in members.split(_ROWS_AT_ONCE):
                rows, scale = some.to(self.device), self._scale_of(checkpoint[some])
                decoded = reconstructed.detach()[rows].float()
                distances[rows], gradient[rows] = networks.compare(decoded, original[rows], scale, queries, wanted)
        if not wanted:
            return distances
        measured: Tensor = _Measured.apply(reconstructed, distances, gradient)
        return measured

    def _scale_of(self, checkpoints: NDArray[np.int64]) -> Tensor | None:
        return None if self._scales is None else self._scales[torch.from_numpy(checkpoints)].to(self.device)


def check_behavior(store: TokenStore, loss: LossConfig, window: int) -> None:
    """Looks whether the behavioural loss can be computed, if it has a weight; reads no tokens.

    Raises:
        InputError: windows do not hold whole networks, or the store's networks cannot be run, or its images are not at
            hand, or norms are missing from the store; names the config field and the remedy.
    """
    if loss.behavior > 0:
        _checked_groups(store, loss, window)


class _Networks:
    """One group's networks on the device, and their queries."""

    def __init__(self, group: Group, loss: LossConfig, device: torch.device) -> None:
        self.device = device
        self.decode = Decoder(group.architecture, device)
        self.distance = DISTANCES[loss.behavior_distance]
        self.network = group.network().to(device)
        self.shape = group.image_shape
        self.images = {"noise": 0, "images": loss.query_count, "both": loss.query_count // 2}[loss.queries]
        self.noise = loss.query_count - self.images
        self.pool = group.images().split("train")[0] if self.images else np.empty((0, *self.shape), np.float32)

    def queries(self, rng: np.random.Generator) -> Tensor:
        """float32 [Q, C, H, W]: training images, standardised, without repetition where there are enough; N(0, 1)."""
        images = self.pool[:0]
        if self.images:
            images = self.pool[rng.choice(len(self.pool), self.images, replace=self.images > len(self.pool))]
        noise = rng.standard_normal((self.noise, *self.shape), dtype=np.float32)
        return torch.from_numpy(np.concatenate([images, noise])).to(self.device)

    def compare(
        self, decoded: Tensor, original: Tensor, scale: Tensor | None, queries: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Distances [R] between networks given as tokens [R, W, T], and their gradients in the decoded tokens.

        Both are 0 where a distance is not finite; without ``with_gradient`` all gradients are 0.
        """
        decoded.requires_grad_(with_gradient)
        with torch.autocast(self.device.type, enabled=False), torch.set_grad_enabled(with_gradient):
            with torch.no_grad():
                expected = answers(self.network, self.decode(original, scale), queries)
            distances = self.distance(answers(self.network, self.decode(decoded, scale), queries), expected)
            gradient = torch.autograd.grad(distances.sum(), decoded)[0] if with_gradient else torch.zeros_like(decoded)
        finite = distances.detach().isfinite()
        zero = torch.zeros((), device=self.device)
        return torch.where(finite, distances.detach(), zero), torch.where(finite[:, None, None], gradient, zero)


class _Measured(torch.autograd.Function):
    """Distances whose gradient is already known.

    It is computed with them: so a few networks' inner values are in memory at a time, and none until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, reconstructed: Tensor, distances: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = reconstructed.dtype
        return distances

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradients[0][:, None, None] * gradient).to(ctx.dtype), None, None


def squared_difference(logits: Tensor, expected: Tensor) -> Tensor:
    """Squared difference of the probabilities, summed over classes, averaged over queries: [R, Q, K] to [R]."""
    return (logits.softmax(-1) - expected.softmax(-1)).square().sum(-1).mean(-1)


def cross_entropy(logits: Tensor, expected: Tensor) -> Tensor:
    """Cross-entropy of the answers with the original's probabilities, averaged over queries: [R, Q, K] to [R]."""
    return -(expected.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(-1)


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL divergence of the answers from the original's, both at ``TEMPERATURE``, times its square: [R, Q, K] to [R]."""
    wanted, found = (F.log_softmax(each / TEMPERATURE, dim=-1) for each in (expected, logits))
    return TEMPERATURE**2 * (wanted.exp() * (wanted - found)).sum(-1).mean(-1)


DISTANCES: dict[Literal["l2", "cross_entropy", "kl"], Callable[[Tensor, Tensor], Tensor]] = {
    "l2": squared_difference,
    "cross_entropy": cross_entropy,
    "kl": divergence,
}
"""By the names of ``loss.behavior_distance``."""


def _checked_groups(store: TokenStore, loss: LossConfig, window: int) -> list[Group]:
    """The groups of a store's networks, each of them fit to be asked."""
    _check_window(store, loss, window)
    if store.index["normalization"] == "l2" and "model_scale" not in store.models.column_names:
        raise InputError(
            f"config field loss.behavior is {loss.behavior:g}, but {store.path} has l2 normalisation without its "
            "networks' norms (column model_scale): prepare it again, or set --loss.behavior 0"
        )
    groups = groups_of(store, range(len(store.models)))
    for group in groups:
        try:
            group.network()
        except InputError as error:
            raise InputError(
                f"config field loss.behavior is {loss.behavior:g}, but {error}: set --loss.behavior 0, or prepare a "
                "store of a zoo that sane_ray built or that is published in the same layout, with its params.json"
            ) from error
        if loss.queries != "noise":
            _check_images(group, loss)
    return groups


def _check_images(group: Group, loss: LossConfig) -> None:
    try:
        group.images()
    except InputError as error:
        raise InputError(f"config field loss.queries is {loss.queries!r}, but {error}: set it to noise") from error


def _check_window(store: TokenStore, loss: LossConfig, window: int) -> None:
    sizes = {name: architecture.table.num_tokens for name, architecture in store.architectures.items()}
    if set(sizes.values()) == {window}:
        return
    listed = ", ".join(f"{tokens} ({name})" for name, tokens in list(sizes.items())[:5])
    remedy = (
        f"set --autoencoder.window {next(iter(sizes.values()))}"
        if len(set(sizes.values())) == 1
        else "prepare a store of networks of one length"
    )
    raise InputError(
        f"config field autoencoder.window is {window}, but loss.behavior = {loss.behavior:g} needs windows that hold "
        f"whole networks, and those of {store.path} have {listed} tokens: {remedy}, or set --loss.behavior 0"
    )


def _model_scales(store: TokenStore) -> Tensor | None:
    """Each checkpoint's own norms [checkpoints, most layers], for l2 normalisation."""
    if store.index["normalization"] != "l2":
        return None
    rows = [torch.tensor(row, dtype=torch.float32) for row in store.models["model_scale"].to_pylist()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
