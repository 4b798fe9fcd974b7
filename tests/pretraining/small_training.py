"""A small training shared by one process and by two: same config, same global batches."""

import torch

from sane_ray.config import AugmentationConfig, AutoencoderConfig, LossConfig, PretrainingConfig
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.state import whole_model
from sane_ray.pretraining.step import Trainer

STEPS = 3
B, W, T = 6, 5, 7


def make_trainer(noise=0.0, steps=STEPS + 4, rank=0, world_size=1, **pretraining):
    settings = {"learning_rate": 1e-2, "precision": "float32", "gradient_clip": 0.5} | pretraining
    return Trainer(
        AutoencoderConfig(
            token_size=T, window=W, d_model=12, heads=3, layers=2, latent_dim=5, max_positions=[20, 4, 9]
        ),
        LossConfig(gamma=0.3),
        AugmentationConfig(noise=noise),
        PretrainingConfig(**settings),
        steps=steps,
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
    )


def make_batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def batch():
        signal = torch.randint(1, T + 1, (B, W), generator=generator, dtype=torch.int32)
        mask = torch.arange(T) < signal[..., None]
        view_1, view_2 = (torch.randn(B, W, T, generator=generator) * mask for _ in range(2))
        positions = torch.stack(
            [torch.randint(0, size, (B, W), generator=generator, dtype=torch.int32) for size in (20, 4, 9)], dim=-1
        )
        return Batch(view_1, view_2, signal, positions)

    return [batch() for _ in range(count)]


def whole_weights(trainer):
    return whole_model(trainer.model)
