"""A small training shared by one process and by several: same config, same global batches."""

from dataclasses import fields

import torch

from sane_ray.config import AugmentationConfig, AutoencoderConfig, LossConfig, PretrainingConfig
from sane_ray.pretraining.batch import FILLER, Batch
from sane_ray.pretraining.state import whole_model
from sane_ray.pretraining.step import Trainer

STEPS = 3
B, W, T = 8, 5, 7

SETTINGS = {
    "plain": {},
    "micro": {"micro_batch": 2, "loss": {"normalization": "token"}},
    "recomputed": {"activation_checkpointing": True, "sharding": "none", "loss": {"behavior": 0.2}},
    "kept": {"reshard": False, "loss": {"contrast": "none"}},
    "bfloat16": {"precision": "bfloat16", "learning_rate": 1e-3},
    "bfloat16_micro": {"precision": "bfloat16", "learning_rate": 1e-3, "micro_batch": 2},
    "node": {"sharding": "node", "micro_batch": 1, "activation_checkpointing": True},
}
"""Configurations that several processes are compared with one in, by name."""


def make_trainer(
    noise=0.3, steps=STEPS + 4, rank=0, world_size=1, loss=None, behavior=None, local_world_size=1, dropout=0.0,
    positions="learned", erase=0.3, **pretraining,
):  # fmt: skip
    settings = {"learning_rate": 1e-2, "precision": "float32", "gradient_clip": 0.5} | pretraining
    return Trainer(
        AutoencoderConfig(
            token_size=T, window=W, d_model=12, heads=3, layers=2, latent_dim=5, max_positions=[20, 4, 9],
            dropout=dropout, positions=positions,
        ),
        LossConfig(**({"gamma": 0.3} | (loss or {}))),
        AugmentationConfig(noise=noise, erase=erase),
        PretrainingConfig(**settings),
        steps=steps,
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        local_world_size=local_world_size,
        behavior=behavior,
    )  # fmt: skip


def make_batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def batch():
        signal = torch.randint(1, T + 1, (B, W), generator=generator, dtype=torch.int32)
        mask = torch.arange(T) < signal[..., None]
        view_1, view_2 = (torch.randn(B, W, T, generator=generator) * mask for _ in range(2))
        positions = torch.stack(
            [torch.randint(0, size, (B, W), generator=generator, dtype=torch.int32) for size in (20, 4, 9)], dim=-1
        )
        return Batch(view_1, view_2, signal, positions, torch.arange(B), torch.arange(B) + 100)

    return [batch() for _ in range(count)]


def filler(count):
    """Rows without windows."""
    tokens, number = torch.zeros(count, W, T), torch.full((count,), FILLER)
    return Batch(
        tokens, tokens, torch.zeros(count, W, dtype=torch.int32), torch.zeros(count, W, 3, dtype=torch.int32),
        number, number,
    )  # fmt: skip


def concatenate(batches):
    """The rows of several batches as one."""
    return Batch(**{f.name: torch.cat([getattr(batch, f.name) for batch in batches]) for f in fields(Batch)})


def share(batch, rank, world_size):
    """What a rank has of a global batch: as many rows as every other, the last ones perhaps filler."""
    rows = -(-len(batch) // world_size)
    own = batch.rows(min(rank * rows, len(batch)), min((rank + 1) * rows, len(batch)))
    return concatenate([own, filler(rows - len(own))])


def token_distance(reconstructed, batch, step):
    """A behavioural distance for tests: squared error of the sum of each window's tokens; 0 for filler."""
    original = torch.cat([batch.view_1, batch.view_2]).float()
    valid = torch.cat([batch.slot, batch.slot]) >= 0
    return (reconstructed.sum((1, 2)) - original.sum((1, 2)) - step).square() * valid


def whole_weights(trainer):
    return whole_model(trainer.model)
