"""One optimisation step and one validation pass: plain torch, no Ray, the same on one rank or many.

N ranks compute what one does with all their rows: a global batch's losses, gradients and updates do not depend on how
many share it, how they are sharded, or in how many pieces each computes its rows. Only dropout does: what is dropped
depends on the rank and on the piece that a row is computed in.

Shape suffixes: b rows of this rank (windows, perhaps followed by filler), n = b or 2 b rows when views lie one after
the other, m rows of a piece, W tokens of a window, T values of a token, P values of a projection, L of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from sane_ray.autoencoder.embeddings import effective_rank, embedding_norm, embedding_statistics
from sane_ray.autoencoder.losses import (
    Losses,
    combine,
    contrast_gradient,
    error_scale,
    explained_variance,
    explained_variance_sums,
    gather_over_processes,
    micro_loss,
    sane_loss,
)
from sane_ray.autoencoder.model import SANE
from sane_ray.config import AugmentationConfig, AutoencoderConfig, LossConfig, PretrainingConfig
from sane_ray.hardware import has_bfloat16
from sane_ray.pretraining.augment import augmented_views
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.sharding import average_gradients, matrices, prepare, vectors
from sane_ray.pretraining.state import TrainingState, seed_of

METRICS = ("loss", "loss_contrast", "loss_recon", "loss_behavior", "gradient_norm", "learning_rate", "skipped")
"""Names of the first columns of what a step returns; the sums behind the explained variance follow."""

_PARTS = 4  # of METRICS, the loss and its parts differ between ranks

VALIDATION_STEP = 0
"""What the queries of the behavioural loss are drawn for in every validation, to compare them."""


class BehaviorDistance(Protocol):
    """How differently decoded and original networks behave; ``Behavior`` of pretraining/behavior.py."""

    def __call__(self, reconstructed: Tensor, batch: Batch, step: int) -> Tensor:
        """Distances float32 [2 b] of rows that hold first views, then second ones; 0 for filler."""


class TrainedSANE(SANE):
    """A SANE with the one more way in that micro-batches need; the weights and their names are the same."""

    def project_windows(self, tokens_BWT: Tensor, positions_BW3: Tensor) -> Tensor:
        """The projections [B, P] of ``forward``, without decoding."""
        return self.project(self._encode(tokens_BWT, self.positions(positions_BW3)))


@dataclass(frozen=True)
class Views:
    """Rows of a batch, one view after the other: what is computed at once."""

    batch: Batch
    """The rows, once."""
    target_nWT: Tensor
    """What is encoded and to be reconstructed: the views, perhaps with noise."""
    signal_nW: Tensor
    positions_nW3: Tensor
    valid_b: Tensor
    """bool, which rows are windows."""

    def rows(self, begin: int, end: int) -> Views:
        """Rows ``begin`` to ``end`` of the batch, in every view."""
        count = len(self.batch)
        of_views = (self.target_nWT, self.signal_nW, self.positions_nW3)
        target, signal, positions = (rows_of_views(tensor, count, begin, end) for tensor in of_views)
        return Views(self.batch.rows(begin, end), target, signal, positions, self.valid_b[begin:end])


class Trainer:
    """The model, its optimiser and its schedule, and the two things done with them: a step and a validation."""

    def __init__(
        self,
        autoencoder: AutoencoderConfig,
        loss: LossConfig,
        augmentation: AugmentationConfig,
        pretraining: PretrainingConfig,
        *,
        steps: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int = 1,
        behavior: BehaviorDistance | None = None,
    ) -> None:
        """Builds the same weights on every rank from the seed, each rank its part of them.

        Args:
            autoencoder: resolved shape of the model (token size and position tables set).
            loss: weights and denominators, and how many views of each window are computed.
            augmentation: noise of the views.
            pretraining: optimiser, schedule, clipping, precision, seed, and how it is computed.
            steps: length of the learning-rate cycle.
            device: where to compute.
            rank: this process.
            world_size: processes; above 1 the model is sharded as ``pretraining.sharding`` says.
            local_world_size: those of this node.
            behavior: distances for the behavioural part of the loss, whose weight is ``loss.behavior``.

        Raises:
            InputError: ``pretraining.compile`` is ``yes``, and there is no compiler.
        """
        self.loss, self.augmentation, self.pretraining = loss, augmentation, pretraining
        self.device, self.rank, self.world_size = device, rank, world_size
        self.behavior = behavior if loss.behavior > 0 else None
        self.views = loss.views
        """Views of a window that are computed."""
        self.precision = choose_precision(pretraining.precision, device)
        with torch.device("meta"):  # no rank ever holds the whole model
            self.model = TrainedSANE(autoencoder)
        self.model.projection_head.requires_grad_(loss.contrast != "none")
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        prepare(self.model, pretraining, device, self.precision, local_world_size)
        register_fsdp_forward_method(self.model, "project_windows")
        self.model.to_empty(device=device)
        self.model.init_weights(pretraining.seed)
        optimizer = build_optimizer(self.model, pretraining)
        scheduler = build_schedule(optimizer, pretraining, steps)
        self.state = TrainingState(self.model, optimizer, scheduler, seed=pretraining.seed)

    def step(self, batch: Batch) -> Tensor:
        """One optimiser step; nothing is synchronised with the host.

        A gradient whose norm is not finite changes nothing but the count of steps: neither weights nor moments.

        Returns:
            float64 [len(METRICS) + 5] of this rank, on the device; see ``METRICS`` and ``global_metrics``.
        """
        self.model.train()
        optimizer = self.state.optimizer
        losses, behavior, sums = self._differentiate(self._views(batch, noisy=True))
        if self.world_size > 1:
            average_gradients(vectors(self.model))
        norm = gradient_norm(self.model)
        skipped = (~norm.isfinite()).float()
        rate = float(self.state.scheduler.get_last_lr()[0])
        # What torch's GradScaler tells a fused optimiser: what to divide gradients by, and whether to do nothing.
        optimizer.grad_scale = self._clip_divisor(norm)  # type: ignore[attr-defined]
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
        self._advance()
        return _columns(losses, behavior, norm, rate, skipped, sums)

    def skip(self) -> None:
        """A step whose batch is left out: the schedule goes on, the weights stay."""
        self._advance()

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Losses, explained variance and spread of the embeddings on fixed batches of all ranks, without noise.

        Returns:
            ``val/<name>`` of the loss and its parts, averaged over batches, ``val/explained_variance``,
            ``val/embedding_norm`` and ``val/effective_rank``.
        """
        self.model.eval()
        rows, embeddings = [], torch.zeros((), device=self.device)
        for batch in batches:
            views = self._views(batch.to(self.device), noisy=False)
            target, signal = views.target_nWT, views.signal_nW
            z, reconstructed, projection = self._forward(views)
            losses = sane_loss(
                reconstructed, target, signal, projection, self.loss, gather_over_processes, views.valid_b
            )
            behavior = self._behavior(reconstructed, views, self._windows_of_all(views), VALIDATION_STEP)
            losses = losses._replace(total=self._total(losses.total, behavior))
            zero = torch.zeros((), device=self.device)
            sums = explained_variance_sums(reconstructed, target, signal)
            embeddings = embeddings + embedding_statistics(z, signal, views.valid_b)
            rows.append(_columns(losses, behavior, zero, 0.0, zero, sums))
        metrics = global_metrics(torch.stack(rows), self.world_size)
        means = {f"val/{name}": float(metrics[:, METRICS.index(name)].mean()) for name in METRICS[:_PARTS]}
        if self.world_size > 1:
            dist.all_reduce(embeddings)
        return means | {
            "val/explained_variance": float(explained_variance(metrics[:, len(METRICS) :].sum(dim=0))),
            "val/embedding_norm": float(embedding_norm(embeddings)),
            "val/effective_rank": float(effective_rank(embeddings)),
        }

    def _advance(self) -> None:
        self.state.scheduler.step()
        self.state.step += 1

    def _views(self, batch: Batch, *, noisy: bool) -> Views:
        """The rows of the views that are computed, augmented if ``noisy``."""
        target = torch.cat([batch.view_1, batch.view_2][: self.views]).float()
        if noisy:
            target = augmented_views(
                target, batch.slot, self.augmentation, seed=self.pretraining.seed, step=self.state.step
            )
        signal, positions = batch.signal.repeat(self.views, 1), batch.positions.repeat(self.views, 1, 1)
        return Views(batch, target, signal, positions, batch.slot >= 0)

    def _differentiate(self, views: Views) -> tuple[Losses, Tensor, Tensor]:
        """Leaves in the parameters the gradients of the global batch's loss, piece by piece.

        Between pieces sharded weights keep their gradients whole, so that they are reduced once: with micro-batches
        each worker needs room for the gradients of the whole model.

        Returns:
            The losses, the behavioural part, and the sums of the explained variance, without graph.
        """
        loss, ranges = self.loss, self._ranges(len(views.batch))
        scale = error_scale(
            views.target_nWT,
            views.signal_nW,
            loss.reconstruction,
            loss.normalization,
            gather_over_processes,
            views.valid_b,
        )
        count = self._windows_of_all(views)
        contrast, gradient_nP = None, None
        if loss.contrast != "none" and len(ranges) > 1:
            projection_nP = self._projections(views, ranges)
            contrast, gradient_nP = contrast_gradient(projection_nP, loss, gather_over_processes, views.valid_b)
        error, behavior, sums = (torch.zeros((), device=self.device) for _ in range(3))
        for number, (begin, end) in enumerate(ranges):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(end == len(views.batch))
            piece = views.rows(begin, end)
            _, reconstructed, projection = self._forward(piece, number)
            if loss.contrast != "none" and gradient_nP is None:  # the only piece
                contrast, gradient_nP = contrast_gradient(projection, loss, gather_over_processes, views.valid_b)
            objective, error_part = micro_loss(
                reconstructed,
                piece.target_nWT,
                piece.signal_nW,
                projection,
                loss,
                scale,
                None if gradient_nP is None else rows_of_views(gradient_nP, len(views.batch), begin, end),
                piece.valid_b,
            )
            behavior_part = self._behavior(reconstructed, piece, count, self.state.step)
            self._total(objective, behavior_part).backward()
            error, behavior = error + error_part.detach(), behavior + behavior_part.detach()
            sums = sums + explained_variance_sums(reconstructed.detach(), piece.target_nWT, piece.signal_nW)
        losses = combine(contrast, error, loss)
        return losses._replace(total=self._total(losses.total, behavior)), behavior, sums

    def _ranges(self, rows: int) -> list[tuple[int, int]]:
        """Begin and end of the pieces that this rank's rows are computed in."""
        size = self.pretraining.micro_batch or rows
        return [(begin, min(begin + size, rows)) for begin in range(0, rows, size)]

    def _forward(self, views: Views, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, reconstructed tokens and projections of a piece."""
        self._seed_dropout(number)
        with self._autocast():
            z, reconstructed, projection = self.model(views.target_nWT, views.positions_nW3)
        return z, reconstructed, projection

    @torch.no_grad()
    def _projections(self, views: Views, ranges: list[tuple[int, int]]) -> Tensor:
        """Projections [n, P] of all rows, computed in pieces, without graph and with the dropout of ``_forward``."""
        parts = []
        for number, (begin, end) in enumerate(ranges):
            self._seed_dropout(number)
            piece = views.rows(begin, end)
            with self._autocast():
                projection = self.model.project_windows(piece.target_nWT, piece.positions_nW3)
            parts.append(projection.unflatten(0, (self.views, -1)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def _seed_dropout(self, number: int) -> None:
        """So that a resumed run drops what an uninterrupted one would have; it depends on the rank and the piece."""
        torch.manual_seed(seed_of(self.pretraining.seed, self.state.step, self.rank, number))

    def _windows_of_all(self, views: Views) -> Tensor:
        """Windows of the global batch, at least 1; known without asking where nobody needs them."""
        if self.behavior is None:
            return torch.ones((), device=self.device)
        return gather_over_processes(views.valid_b.sum().view(1, 1)).sum().clamp(min=1)

    def _behavior(self, reconstructed: Tensor, views: Views, count: Tensor, step: int) -> Tensor:
        """The part of the behavioural loss that these rows make up; its mean over ranks is that of the global batch."""
        if self.behavior is None:
            return torch.zeros((), device=self.device)
        distances = self.behavior(reconstructed.float(), views.batch, step)
        return distances.sum() * self.world_size / (count * self.views)

    def _total(self, structural: Tensor, behavior: Tensor) -> Tensor:
        if self.behavior is None:
            return structural
        return (1 - self.loss.behavior) * structural + self.loss.behavior * behavior

    def _clip_divisor(self, norm: Tensor) -> Tensor:
        """What to divide gradients of that norm by, at least 1."""
        limit = self.pretraining.gradient_clip
        return (norm / limit).clamp(min=1) if limit else torch.ones_like(norm)


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients of the global batch, float32 scalar, the same on all ranks."""
    norms = []
    for parameters in (matrices(model), vectors(model)):
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.stack(norms).norm()


def rows_of_views(tensor_nX: Tensor, rows: int, begin: int, end: int) -> Tensor:
    """Rows ``begin`` to ``end`` of each of the views that lie one after the other, ``rows`` of each."""
    return tensor_nX.unflatten(0, (-1, rows))[:, begin:end].flatten(0, 1)


def global_metrics(rows: Tensor, world_size: int) -> Tensor:
    """[steps, columns] of this rank to those of the global batch: losses averaged over ranks, sums added up."""
    if world_size == 1:
        return rows
    total = rows.clone()
    dist.all_reduce(total)
    rows = rows.clone()
    rows[:, :_PARTS] = total[:, :_PARTS] / world_size
    rows[:, len(METRICS) :] = total[:, len(METRICS) :]
    return rows


def build_optimizer(model: nn.Module, config: PretrainingConfig) -> AdamW:
    """AdamW in the published groups: parameters of two or more dimensions decay, the rest do not."""
    groups = [
        {"params": matrices(model), "weight_decay": config.weight_decay},
        {"params": vectors(model), "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.learning_rate, fused=True)


def build_schedule(optimizer: AdamW, config: PretrainingConfig, steps: int) -> OneCycleLR:
    """One cycle over all steps: up for ``warmup`` of them, then down, both along a cosine."""
    warmup = config.warmup
    if warmup * steps == 1:  # torch would divide by the zero steps between the first and the peak
        warmup += 1e-6
    return OneCycleLR(optimizer, max_lr=config.learning_rate, total_steps=steps, pct_start=warmup)


def choose_precision(wanted: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The number format of the matrix products, the same on all ranks.

    ``auto`` is bfloat16 where every rank's processor multiplies it natively.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    agreed = torch.tensor(int(has_bfloat16(device)), device=device)
    if dist.is_initialized():
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if agreed else torch.float32


def _columns(losses: Losses, behavior: Tensor, norm: Tensor, rate: float, skipped: Tensor, sums: Tensor) -> Tensor:
    parts = torch.stack([*(part.detach() for part in losses), behavior.detach(), norm.detach()]).double()
    return torch.cat([parts, parts.new_full((1,), rate), skipped.view(1), sums])
