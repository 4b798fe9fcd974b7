"""One optimisation step and one validation pass: plain torch, no Ray, the same on one rank or many.

Shapes: B windows a rank, W tokens in a window, T values in a token; both views of a batch are stacked to 2B.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from sane_ray.autoencoder.losses import (
    Losses,
    explained_variance,
    explained_variance_sums,
    gather_over_processes,
    sane_loss,
)
from sane_ray.autoencoder.model import SANE
from sane_ray.config import AugmentationConfig, AutoencoderConfig, LossConfig, PretrainingConfig
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.state import TrainingState

METRICS = ("loss", "loss_contrast", "loss_recon", "gradient_norm", "learning_rate")
"""Names of the first columns of what a step returns; the sums behind the explained variance follow."""

_PARTS = 3  # of METRICS, the loss and its two parts differ between ranks


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
    ) -> None:
        """Builds the same weights on every rank from the seed, then shards them.

        Args:
            autoencoder: resolved shape of the model (token size and position tables set).
            loss: weights and denominators.
            augmentation: noise of the views.
            pretraining: optimiser, schedule, clipping, precision, seed.
            steps: length of the learning-rate cycle.
            device: where to compute.
            rank: this process.
            world_size: processes; above 1 the model is sharded with FSDP2 over all of them.
        """
        self.loss, self.augmentation, self.pretraining = loss, augmentation, pretraining
        self.device, self.rank, self.world_size = device, rank, world_size
        self.precision = choose_precision(pretraining.precision, device)
        with torch.device("meta"):  # no rank ever holds the whole model
            self.model = SANE(autoencoder)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if world_size > 1:
            shard(self.model, device)
        self.model.to_empty(device=device)
        self.model.init_weights(pretraining.seed)
        optimizer = build_optimizer(self.model, pretraining)
        scheduler = build_schedule(optimizer, pretraining, steps)
        self.state = TrainingState(self.model, optimizer, scheduler)

    def step(self, batch: Batch) -> Tensor:
        """One optimiser step; nothing is synchronised with the host.

        Returns:
            float64 [len(METRICS) + 5] of this rank, on the device; see ``METRICS`` and ``global_metrics``.
        """
        self.model.train()
        state = self.state
        torch.manual_seed(_seed_of_step(self.pretraining.seed, state.step, self.rank))  # noise and dropout
        tokens, signal, positions = self._augmented(batch)
        losses, sums = self._losses(tokens, signal, positions)
        losses.total.backward()
        norm = self._clip()
        rate = float(state.scheduler.get_last_lr()[0])
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return _columns(losses, norm, rate, sums)

    @torch.no_grad()
    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Losses and explained variance on fixed batches, without noise, averaged over batches and ranks."""
        self.model.eval()
        rows = []
        for batch in batches:
            batch = batch.to(self.device)
            tokens = torch.cat([batch.view_1, batch.view_2]).float()
            losses, sums = self._losses(tokens, _twice(batch.signal), _twice(batch.positions))
            rows.append(_columns(losses, torch.zeros((), device=self.device), 0.0, sums))
        metrics = global_metrics(torch.stack(rows), self.world_size)
        names = ("loss", "loss_contrast", "loss_recon")
        means = {f"val/{name}": float(metrics[:, METRICS.index(name)].mean()) for name in names}
        variance = explained_variance(metrics[:, len(METRICS) :].sum(dim=0))
        return means | {"val/explained_variance": float(variance)}

    def _augmented(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Both views with multiplicative noise (paper section 3.3), which keeps padding zero; they are the targets."""
        tokens = torch.cat([batch.view_1, batch.view_2]).float()
        if self.augmentation.noise > 0:
            tokens = tokens * (1 + self.augmentation.noise * torch.randn_like(tokens))
        return tokens, _twice(batch.signal), _twice(batch.positions)

    def _losses(self, tokens: Tensor, signal: Tensor, positions: Tensor) -> tuple[Losses, Tensor]:
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            _, reconstructed, projection = self.model(tokens, positions)
        losses = sane_loss(reconstructed, tokens, signal, projection, self.loss, gather_over_processes)
        return losses, explained_variance_sums(reconstructed.detach(), tokens, signal)

    def _clip(self) -> Tensor:
        """Clips the gradients in place; returns their norm before."""
        limit = self.pretraining.gradient_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


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


def shard(model: SANE, device: torch.device) -> None:
    """FSDP2 over all ranks: one unit a transformer block, the rest with the root; weights and gradients in float32.

    What is rounded to bfloat16, autocast rounds where it is used, on one rank as on many: so N ranks compute what one
    does. Gathering the weights already rounded would halve the traffic, but round norms and position tables too.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def build_optimizer(model: nn.Module, config: PretrainingConfig) -> AdamW:
    """AdamW in the published groups: parameters of two or more dimensions decay, the rest do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
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
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    agreed = torch.tensor(int(native), device=device)
    if dist.is_initialized():
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return torch.bfloat16 if agreed else torch.float32


def _seed_of_step(seed: int, step: int, rank: int) -> int:
    """So that a resumed run draws what an uninterrupted one would have drawn."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def _columns(losses: Losses, norm: Tensor, rate: float, sums: Tensor) -> Tensor:
    scalars = torch.stack([*(part.detach() for part in losses), norm.detach()]).double()
    return torch.cat([scalars, scalars.new_full((1,), rate), sums])


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])
