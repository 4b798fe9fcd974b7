"""Tokens a second of the training step, against a plain loop of the same model and against the matrix-product peak.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --preset cnn --batch-size 8 --steps 3 --precision bfloat16
    python benchmarks/train_step.py --preset resnet18 --device cuda

Three things are measured in turn, round after round, in one process; a figure is the median of the rounds:

* ours: ``Trainer.step`` of sane_ray/pretraining/step.py, as a training worker calls it;
* plain: the same model, losses, noise, clipping and schedule in the most ordinary PyTorch: AdamW as it comes, and the
  loss and the gradient's norm read with ``.item()`` every step. It does not compute explained variance, ours does;
* peak: the best rate of a few square matrix products in the same number format on the same threads.

Batches are synthetic but have the shapes, number formats and padding of the preset's networks, and lie on the device:
reading data is not measured. Needs torch and numpy, neither Ray nor a store.

How to read the table: tokens/s counts the tokens of both views. GFLOP/s is that times ``SANE.flops_per_token``, which
counts matrix products and attention and nothing else. "of peak" divides it by the measured peak; on small models the
rest of the step (optimiser, norms, losses, calls) keeps it far below 1. "x plain" above 1 means that ours is faster.
"peak MB" is the memory in use at the worst moment so far, both models included: the process's resident memory on the
CPU, the allocator's on a GPU. On a shared machine compare ratios, not rates, and run twice.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without being installed

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sane_ray.autoencoder.model import SANE
from sane_ray.config import PRESETS, PretrainJob
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.step import Trainer, choose_precision
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table
from sane_ray.zoo.architectures import ARCHITECTURES, parameter_shapes

MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
MATRIX_REPEATS = {"cpu": 1, "cuda": 10}
Precision = Literal["float32", "bfloat16"]
BATCHES = 4
SCHEDULE_STEPS = 1_000_000  # longer than any measurement: both sides stay at the schedule's beginning


@dataclass(frozen=True)
class Speed:
    """Median speeds in one number format."""

    precision: str
    ours: float
    """Tokens a second."""
    plain: float
    """Tokens a second."""
    peak: float
    """Floating-point operations a second of the fastest matrix product."""
    flops_per_token: float
    megabytes_ours: float
    megabytes_plain: float

    @property
    def ratio(self) -> float:
        """Ours over plain."""
        return self.ours / self.plain

    def fraction_of_peak(self, tokens_per_s: float) -> float:
        """Of the matrix-product peak, at that speed."""
        return tokens_per_s * self.flops_per_token / self.peak


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    job, table = job_of(options.preset, options.batch_size)
    config = job.autoencoder
    print(
        f"{options.preset}: {job.pretraining.batch_size} windows of {config.window} tokens of {config.token_size} "
        f"values in two views, d_model {config.d_model}, {2 * config.layers} blocks; "
        f"{describe(device)}, {options.threads} threads; torch {torch.__version__}"
    )
    precisions: list[Precision] = [options.precision] if options.precision != "both" else ["float32", "bfloat16"]
    if options.precision == "both" and choose_precision("auto", device) != torch.bfloat16:
        precisions.remove("bfloat16")
        print(
            "bfloat16 left out: the processor does not multiply it natively (--precision bfloat16 measures it anyway)"
        )
    print_table([measure(job, table, name, device, options.steps, options.rounds) for name in precisions])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="digits", help="whose model (default: digits)")
    parser.add_argument("--batch-size", type=int, default=0, help="windows in a step (default: the preset's)")
    parser.add_argument(
        "--precision",
        choices=("both", "float32", "bfloat16"),
        default="both",
        help="of matrix products (default: both)",
    )
    parser.add_argument("--steps", type=int, default=4, help="steps of each side in a round (default: 4)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds after one to warm up (default: 8)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: the GPU if there is one)",
    )
    options = parser.parse_args(arguments)
    if min(options.steps, options.rounds, options.threads) < 1 or options.batch_size < 0:
        parser.error("--steps, --rounds, --threads and --batch-size must be positive")
    return options


def job_of(preset: str, batch_size: int) -> tuple[PretrainJob, LayerTable]:
    """The preset's config, resolved for its networks, and their layer table."""
    job = PRESETS[preset]()
    weights = {key: torch.zeros(shape) for key, shape in SHAPES[preset]().items()}
    table = build_layer_table(weights, token_size=job.tokens.token_size)
    autoencoder = replace(
        job.autoencoder, token_size=table.token_size, max_positions=[int(size) for size in table.position_sizes]
    )
    pretraining = replace(job.pretraining, batch_size=batch_size or job.pretraining.batch_size)
    return replace(job, autoencoder=autoencoder, pretraining=pretraining), table


def resnet18_shapes() -> dict[str, tuple[int, ...]]:
    """Weights of a ResNet-18 for 100 classes of 32x32 images, without batch norm."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 3, 3)}
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            shapes[f"layer{stage}.{block}.conv1.weight"] = (width, before, 3, 3)
            shapes[f"layer{stage}.{block}.conv2.weight"] = (width, width, 3, 3)
            if before != width:
                shapes[f"layer{stage}.{block}.downsample.0.weight"] = (width, before, 1, 1)
            before = width
    return shapes | {"fc.weight": (100, 512), "fc.bias": (100,)}


SHAPES: dict[str, Callable[[], dict[str, tuple[int, ...]]]] = {
    "digits": lambda: parameter_shapes(ARCHITECTURES["digits_cnn"], (1, 8, 8), classes=10),
    "cnn": lambda: parameter_shapes(ARCHITECTURES["cnn_l"], (3, 32, 32), classes=10),
    "resnet18": resnet18_shapes,
}
"""The networks whose weights each preset is trained on."""


def synthetic_batches(job: PretrainJob, table: LayerTable, device: torch.device) -> list[Batch]:
    """Random weights in windows of the preset's networks, as the stream yields them: float16, zero in the padding."""
    generator = torch.Generator().manual_seed(0)
    windows, window = job.pretraining.batch_size, job.autoencoder.window
    batches = []
    for _ in range(BATCHES):
        start = torch.randint(0, table.num_tokens - window + 1, (windows, 1), generator=generator)
        index = (start + torch.arange(window)).numpy()
        signal = torch.from_numpy(table.signal_counts[index])
        mask = torch.arange(table.token_size) < signal[..., None]
        views = (torch.randn(mask.shape, generator=generator) * mask for _ in range(2))
        view_1, view_2 = (view.to(torch.float16) for view in views)
        batches.append(Batch(view_1, view_2, signal, torch.from_numpy(table.positions[index])).to(device))
    return batches


class PlainLoop:
    """The same training as an ordinary script has it: nothing fused, everything looked at."""

    def __init__(self, job: PretrainJob, device: torch.device) -> None:
        self.job, self.device = job, device
        self.model = SANE(job.autoencoder, seed=job.pretraining.seed).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=job.pretraining.learning_rate, weight_decay=job.pretraining.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=job.pretraining.learning_rate,
            total_steps=SCHEDULE_STEPS,
            pct_start=job.pretraining.warmup,
        )
        self.noise = job.augmentation.noise
        self.bfloat16 = job.pretraining.precision == "bfloat16"

    def step(self, batch: Batch) -> tuple[float, float]:
        """One step; the loss, and the gradient's norm before clipping."""
        self.model.train()
        mask = torch.arange(batch.view_1.shape[-1], device=self.device) < batch.signal[..., None]
        mask = torch.cat([mask, mask])
        view_1 = batch.view_1.float() * (1 + self.noise * torch.randn(batch.view_1.shape, device=self.device))
        view_2 = batch.view_2.float() * (1 + self.noise * torch.randn(batch.view_2.shape, device=self.device))
        tokens = torch.cat([view_1, view_2])
        positions = torch.cat([batch.positions, batch.positions])
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            _, reconstructed, projection = self.model(tokens, positions)
        error = (((reconstructed.float() - tokens) * mask) ** 2).sum() / mask.sum()
        gamma = self.job.loss.gamma
        contrast = self.contrast(projection.float())
        loss = gamma * contrast + (1 - gamma) * error
        loss.backward()
        limit = self.job.pretraining.gradient_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.scheduler.step()
        return loss.item(), norm.item()

    def contrast(self, projection: Tensor) -> Tensor:
        """NT-Xent of both views one below the other."""
        count = len(projection)
        unit = F.normalize(projection, dim=1)
        similarity = unit @ unit.T / self.job.loss.temperature
        similarity = similarity.masked_fill(torch.eye(count, dtype=torch.bool, device=self.device), float("-inf"))
        return F.cross_entropy(similarity, (torch.arange(count, device=self.device) + count // 2) % count)


def build_trainer(job: PretrainJob, device: torch.device) -> Trainer:
    """Our side."""
    return Trainer(job.autoencoder, job.loss, job.augmentation, job.pretraining, steps=SCHEDULE_STEPS, device=device)


def measure(
    job: PretrainJob, table: LayerTable, precision: Precision, device: torch.device, steps: int, rounds: int
) -> Speed:
    """Both loops and the matrix products in turn, ``rounds`` times after one that is thrown away."""
    job = replace(job, pretraining=replace(job.pretraining, precision=precision))
    batches = cycle(synthetic_batches(job, table, device))
    trainer, plain = build_trainer(job, device), PlainLoop(job, device)
    bursts: list[Callable[[], object]] = [
        lambda: [trainer.step(next(batches)) for _ in range(steps)],
        lambda: [plain.step(next(batches)) for _ in range(steps)],
        *(matrix_product(size, precision, device) for size in MATRIX_SIZES[device.type]),
    ]
    timings = [one_round(bursts, number, device) for number in range(rounds + 1)][1:]
    ours, theirs, *products = (
        statistics.median(seconds for seconds, _ in column) for column in zip(*timings, strict=True)
    )
    memory = [max(megabytes for _, megabytes in column) for column in zip(*timings, strict=True)]
    tokens = steps * 2 * job.pretraining.batch_size * job.autoencoder.window
    repeats = MATRIX_REPEATS[device.type]
    rates = [2 * repeats * size**3 / seconds for size, seconds in zip(MATRIX_SIZES[device.type], products, strict=True)]
    flops = trainer.model.flops_per_token(job.autoencoder.window)
    return Speed(precision, tokens / ours, tokens / theirs, max(rates), flops, memory[0], memory[1])


def one_round(bursts: Sequence[Callable[[], object]], number: int, device: torch.device) -> list[tuple[float, float]]:
    """What ``timed`` says of each; the two loops swap places every round, as the first one follows the big products."""
    first, second = (0, 1) if number % 2 else (1, 0)
    results = {place: timed(bursts[place], device) for place in (first, second, *range(2, len(bursts)))}
    return [results[place] for place in range(len(bursts))]


def matrix_product(size: int, precision: str, device: torch.device) -> Callable[[], object]:
    """Multiplies two square matrices as ``nn.Linear`` does, several times where once is too short to time."""
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    return partial(_repeat, partial(F.linear, left, right), MATRIX_REPEATS[device.type])


def _repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until the device is done, and the memory at the worst moment in MB (on the CPU: so far)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def print_table(speeds: Sequence[Speed]) -> None:
    print(f"{'':18}{'tokens/s':>12}{'GFLOP/s':>12}{'of peak':>9}{'x plain':>9}{'peak MB':>9}")
    for speed in speeds:
        sides = (("ours", speed.ours, speed.megabytes_ours), ("plain", speed.plain, speed.megabytes_plain))
        for name, tokens_per_s, megabytes in sides:
            rate = tokens_per_s * speed.flops_per_token / 1e9
            print(
                f"{speed.precision:10}{name:8}{tokens_per_s:12,.0f}{rate:12,.1f}"
                f"{speed.fraction_of_peak(tokens_per_s):9.3f}{tokens_per_s / speed.plain:9.2f}{megabytes:9,.0f}"
            )
        print(f"{speed.precision:10}{'peak':8}{'':12}{speed.peak / 1e9:12,.1f}{1:9.3f}")
    if len(speeds) == 2:
        print(f"ours in bfloat16 is {speeds[1].ours / speeds[0].ours:.2f} x ours in float32")


if __name__ == "__main__":
    main()
