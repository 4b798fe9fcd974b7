"""Tokens a second of the training step, of a plain loop of the same model, and of the published code's step.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --published ../SANE
    python benchmarks/train_step.py --preset cnn --batch-size 8 --steps 1 --rounds 5
    python benchmarks/train_step.py --preset resnet18 --device cuda --published ../SANE

Sides are measured in turn, round after round, each in a process of its own, so that its memory is its own too:

* ours: ``Trainer.step`` of sane_ray/pretraining/step.py, as a training worker calls it, with the preset's settings;
* ours-float32, ours-compiled, ours-eager, ours-recomputed, ours-pieces: the same in float32, with
  ``pretraining.compile`` yes or no, with ``activation_checkpointing``, with ``micro_batch`` a quarter of the batch;
* plain: the same model, losses, noise, clipping and schedule in the most ordinary PyTorch: AdamW as it comes, and the
  loss and the gradient's norm read with ``.item()`` every step. It does not compute explained variance, ours does;
* published: the step of the published code in its own precision and settings, where ``--published`` names a checkout;
  published-off and published-working: with other compilation. published_step.py says what each does. All sides of a
  table have the same sizes, batches and number of parameters;
* peak: the best rate of a few square matrix products in the same number format on the same threads.

Batches are synthetic but have the shapes, number formats and padding of the preset's networks, and lie on the device:
reading data is not measured, nor is a first round, in which things are compiled. Needs torch, numpy and scipy, neither
Ray nor a store.

How to read the table: a figure is the median of the rounds. tokens/s counts the tokens of both views. GFLOP/s is that
times ``SANE.flops_per_token``, which counts matrix products and attention and nothing else, once, whatever a side
computes besides. "of peak" divides it by the measured peak of the side's own number format; on small models the rest
of the step (optimiser, norms, losses, calls) keeps it far below 1. "MFU" divides by the maker's figure for the GPU, in
bfloat16 unless the side computes in float32; CPUs have none. "ours x" says how many times as fast as this side ours
is: the median of the rounds' own ratios, since the load of others comes and goes. "peak MB" is the most memory in use
after the first round: the process's resident memory on the CPU, the allocator's on a GPU. "others" is the share of all
processors' time that other processes took meanwhile (Linux tells it). A round in which they took more than ``--others``
is done again, ten times as many rounds at most, and then the calmest count: two threads that wait for each other lose
more to others than others take. "load" is the machine's load average at the beginning and the end, our own included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without being installed

import torch
from published_step import Compilation, PublishedLoop, data_of, is_checkout
from torch import Tensor, nn
from torch.nn import functional as F

from sane_ray.autoencoder.model import SANE
from sane_ray.config import PRESETS, PretrainJob
from sane_ray.hardware import peak_flops
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.step import Trainer, choose_precision
from sane_ray.tokens.tokenizer import LayerTable, build_layer_table
from sane_ray.zoo.architectures import ARCHITECTURES, parameter_shapes

ROOT = Path(__file__).resolve().parents[1]
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
MATRIX_REPEATS = {"cpu": 1, "cuda": 10}
BATCHES = 4
SCHEDULE_STEPS = 1_000_000  # longer than any measurement: all sides stay at the schedule's beginning
PIECES = 4
PATIENCE, PAUSE = 10, 2.0
PROC_STAT = Path("/proc/stat")

Format = Literal["float32", "bfloat16", "float16"]
Burst = Callable[[int], object]
"""Trains so many steps."""

OURS: dict[str, Callable[[PretrainJob], dict[str, Any]]] = {
    "ours": lambda job: {},
    "ours-float32": lambda job: {"precision": "float32"},
    "ours-compiled": lambda job: {"compile": "yes"},
    "ours-eager": lambda job: {"compile": "no"},
    "ours-recomputed": lambda job: {"activation_checkpointing": True},
    "ours-pieces": lambda job: {"micro_batch": -(-job.pretraining.batch_size // PIECES)},
}
"""What each of our sides sets in ``pretraining``."""

PUBLISHED = {"published": "own", "published-off": "off", "published-working": "working"}
"""How the published code is compiled."""

SIDES = (*OURS, "plain", *PUBLISHED)


@dataclass(frozen=True)
class Work:
    """What a process is told to do."""

    side: str
    preset: str
    batch_size: int
    precision: Literal["float32", "bfloat16"]
    device: str
    threads: int
    code: Path | None = None
    """A checkout of the published code."""

    @property
    def format(self) -> Format:
        """The number format of this side's matrix products."""
        if self.side == "ours-float32":
            return "float32"
        if self.side in PUBLISHED:
            return "float16" if self.device == "cuda" else "float32"
        return self.precision


@dataclass(frozen=True)
class Cost:
    """What some steps cost."""

    seconds: float
    megabytes: float
    others: float = 0.0
    """Share of all processors' time that other processes took meanwhile; 0 where that is unknown."""


@dataclass(frozen=True)
class Speed:
    """What was measured of one side."""

    side: str
    format: Format
    tokens_per_s: float
    flops_per_token: float
    peak: float
    """Floating-point operations a second of the fastest matrix product in that format."""
    nominal: float | None
    """The same by the maker's data sheet."""
    ours_times: float
    """How many times as fast as this side ours is."""
    megabytes: float
    others: float
    """Share of the processors that others took meanwhile."""

    @property
    def flops(self) -> float:
        """Of the model, a second."""
        return self.tokens_per_s * self.flops_per_token

    @property
    def of_peak(self) -> float:
        """Over the measured peak."""
        return self.flops / self.peak

    @property
    def mfu(self) -> float | None:
        """Over the maker's figure."""
        return self.flops / self.nominal if self.nominal else None


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    job, _ = job_of(options.preset, options.batch_size)
    precision = precision_of(options.precision, device)
    code = options.published if is_checkout(options.published) else None
    sides = options.sides or default_sides(precision, code)
    if code is None and set(sides) & PUBLISHED.keys():
        raise SystemExit(f"no published code at {options.published}: name a checkout with --published")
    config = job.autoencoder
    print(
        f"{options.preset}: {job.pretraining.batch_size} windows of {config.window} tokens of {config.token_size} "
        f"values in two views, d_model {config.d_model}, {2 * config.layers} blocks; "
        f"{describe(device)}, {options.threads} threads; torch {torch.__version__}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    works = [
        Work(side, options.preset, options.batch_size, precision, options.device, options.threads, code)
        for side in sides
    ]
    speeds = measure(works, options.steps, options.rounds, one_at_a_time=options.one_at_a_time, others=options.others)
    print_table(speeds)
    if code is None:
        print(f"no published code at {options.published}: own figures only")
    print(f"load {os.getloadavg()[0]:.1f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="digits", help="whose model (default: digits)")
    parser.add_argument("--batch-size", type=int, default=0, help="windows in a step (default: the preset's)")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of our matrix products and the plain loop's (default: as training chooses)",
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="what to measure, the first time ours (default: all)")
    parser.add_argument("--published", type=Path, default=ROOT.parent / "SANE", help="a checkout of the published code")
    parser.add_argument("--steps", type=int, default=4, help="steps of each side in a round (default: 4)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds after one to warm up (default: 8)")
    parser.add_argument(
        "--others",
        type=float,
        default=0.1,
        help="share of the processors that others may take in a round that counts (default: %(default)s)",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="end one side before the next begins, where memory holds no more; the load may change in between",
    )
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
    if options.sides and (options.sides[0] not in OURS or len(set(options.sides)) < len(options.sides)):
        parser.error(f"--sides: the first is what the others are compared to, one of {', '.join(OURS)}; each once")
    return options


def precision_of(
    wanted: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """What training would choose."""
    return "bfloat16" if choose_precision(wanted, device) == torch.bfloat16 else "float32"


def default_sides(precision: str, code: Path | None) -> list[str]:
    """Ours, the same in float32, the plain loop and the published code where it is present."""
    return ["ours", *["ours-float32"] * (precision != "float32"), "plain", *["published"] * (code is not None)]


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
        positions, slot = torch.from_numpy(table.positions[index]), torch.arange(windows)
        batches.append(Batch(view_1, view_2, signal, positions, slot, checkpoint=slot).to(device))
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


def burst_of(work: Work) -> Burst:
    """Builds a side."""
    job, table = job_of(work.preset, work.batch_size)
    job = told(job, work)
    device = torch.device(work.device)
    batches = synthetic_batches(job, table, device)
    if work.side in PUBLISHED:
        return published_burst(work, job, batches)
    loop: Trainer | PlainLoop = PlainLoop(job, device) if work.side == "plain" else build_trainer(job, device)
    endless = cycle(batches)
    return lambda steps: [loop.step(batch) for batch in islice(endless, steps)]


def told(job: PretrainJob, work: Work) -> PretrainJob:
    """The config with what this side sets in it."""
    overrides = {"precision": work.precision} | (OURS[work.side](job) if work.side in OURS else {})
    return replace(job, pretraining=replace(job.pretraining, **overrides))


def published_burst(work: Work, job: PretrainJob, batches: Sequence[Batch]) -> Burst:
    """Builds the published side; it must have as many parameters as ours."""
    assert work.code is not None
    compilation = cast(Compilation, PUBLISHED[work.side])
    loop = PublishedLoop(work.code, job, torch.device(work.device), compilation, SCHEDULE_STEPS)
    with torch.device("meta"):
        ours = sum(parameter.numel() for parameter in SANE(job.autoencoder).parameters())
    if loop.parameters != ours:
        raise RuntimeError(f"the published model has {loop.parameters} parameters, ours {ours}: nothing to compare")
    data = cycle([data_of(batch) for batch in batches])
    return lambda steps: loop.steps(list(islice(data, steps)))


class Side:
    """A side in a process of its own."""

    def __init__(self, work: Work) -> None:
        self.work = work
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=context)

    def run(self, steps: int) -> Cost:
        """Trains so many steps; the first time it builds the model first, untimed."""
        return self._process.submit(burn, self.work, steps).result()

    def close(self) -> None:
        """Ends the process."""
        self._process.shutdown()


_BURSTS: dict[Work, Burst] = {}
"""In a side's process: what it has built."""


def burn(work: Work, steps: int) -> Cost:
    """Trains so many steps and says what they cost; builds the side at the first call."""
    device = torch.device(work.device)
    if work not in _BURSTS:
        torch.set_num_threads(work.threads)
        _BURSTS[work] = burst_of(work)
        _BURSTS[work](steps)
        forget_peak_memory(device)
        return Cost(0.0, 0.0)
    busy, own = busy_seconds(), time.process_time()
    seconds = timed(partial(_BURSTS[work], steps), device)
    others = busy_seconds() - busy - (time.process_time() - own)
    return Cost(seconds, peak_megabytes(device), max(0.0, others / seconds / (os.cpu_count() or 1)))


def measure(
    works: Sequence[Work], steps: int, rounds: int, *, one_at_a_time: bool = False, others: float = 1.0
) -> list[Speed]:
    """All sides and the matrix products in turn, ``rounds`` times after one that is thrown away."""
    groups = [[work] for work in works] if one_at_a_time else [list(works)]
    costs: dict[Work, list[Cost]] = {}
    peaks: dict[Format, float] = {}
    for group in groups:
        sides = [Side(work) for work in group]
        try:
            for side in sides:
                side.run(steps)
            kept = calm_rounds(sides, steps, rounds, others, peaks)
        finally:
            for side in sides:
                side.close()
        costs |= {work: [round_[work] for round_ in kept] for work in group}
    return [speed_of(work, costs[work], costs[works[0]], peaks[work.format], steps) for work in works]


def calm_rounds(
    sides: Sequence[Side], steps: int, rounds: int, others: float, peaks: dict[Format, float]
) -> list[dict[Work, Cost]]:
    """The first rounds that others disturb no more than that; after many tries the least disturbed ones.

    Args:
        sides: built.
        steps: of each in a round.
        rounds: wanted.
        others: most of the processors' time that others may take during any side's steps.
        peaks: where the best rates of matrix products are kept.
    """
    taken: list[dict[Work, Cost]] = []
    while sum(disturbance(round_) <= others for round_ in taken) < rounds and len(taken) < PATIENCE * rounds:
        taken.append({side.work: side.run(steps) for side in swapped(sides, len(taken))})
        for work in taken[-1]:
            rate = fastest_product(work.format, torch.device(work.device))
            peaks[work.format] = max(peaks.get(work.format, 0.0), rate)
        if disturbance(taken[-1]) > others:
            time.sleep(PAUSE)
    return sorted(taken, key=disturbance)[:rounds]


def disturbance(round_: Mapping[Work, Cost]) -> float:
    """The largest share of the processors that others took during any side's steps."""
    return max(cost.others for cost in round_.values())


def swapped(sides: Sequence[Side], number: int) -> list[Side]:
    """In another order every round: the first one follows the big products."""
    first = number % len(sides)
    return [*sides[first:], *sides[:first]]


def speed_of(work: Work, own: Sequence[Cost], ours: Sequence[Cost], peak: float, steps: int) -> Speed:
    """Medians of the rounds."""
    job, _ = job_of(work.preset, work.batch_size)
    tokens = steps * 2 * job.pretraining.batch_size * job.autoencoder.window
    with torch.device("meta"):
        flops_per_token = SANE(job.autoencoder).flops_per_token(job.autoencoder.window)
    return Speed(
        side=work.side,
        format=work.format,
        tokens_per_s=tokens / statistics.median(cost.seconds for cost in own),
        flops_per_token=flops_per_token,
        peak=peak,
        nominal=peak_flops(torch.device(work.device), product_format(work.format)),
        ours_times=statistics.median(a.seconds / b.seconds for a, b in zip(own, ours, strict=True)),
        megabytes=max(cost.megabytes for cost in own),
        others=statistics.median(cost.others for cost in own),
    )


def product_format(name: Format) -> torch.dtype:
    """The format whose peak a side is held against: float16 is as fast as bfloat16."""
    return torch.float32 if name == "float32" else torch.bfloat16


def fastest_product(name: Format, device: torch.device) -> float:
    """FLOP/s of the fastest of a few products of square matrices, multiplied as ``nn.Linear`` does."""
    rates = []
    for size in MATRIX_SIZES[device.type]:
        left, right = (torch.randn(size, size, device=device, dtype=product_format(name)) for _ in range(2))
        repeats = MATRIX_REPEATS[device.type]
        multiply = partial(F.linear, left, right)
        rates.append(2 * repeats * size**3 / timed(partial(_repeat, multiply, repeats), device))
    return max(rates)


def _repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def busy_seconds() -> float:
    """Time that all processors together were not idle since they started, or taken away; 0 where that is unknown."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _, _, *rest = (int(number) for number in PROC_STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def forget_peak_memory(device: torch.device) -> None:
    """Lets ``peak_megabytes`` begin anew, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes(device: torch.device) -> float:
    """Most memory that this process had in use."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return float(status["VmHWM"].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def print_table(speeds: Sequence[Speed]) -> None:
    rates = f"{'tokens/s':>12}{'GFLOP/s':>12}{'of peak':>9}{'MFU':>7}{'ours x':>8}"
    print(f"{'':30}{rates}{'peak MB':>9}{'others':>8}", flush=True)
    for speed in speeds:
        mfu = f"{speed.mfu:7.3f}" if speed.mfu is not None else f"{'-':>7}"
        print(
            f"{speed.side:20}{speed.format:10}{speed.tokens_per_s:12,.0f}{speed.flops / 1e9:12,.1f}"
            f"{speed.of_peak:9.3f}{mfu}{speed.ours_times:8.2f}{speed.megabytes:9,.0f}{speed.others:8.2f}"
        )
    for name, peak in {speed.format: speed.peak for speed in speeds}.items():
        print(f"{'peak':20}{name:10}{'':12}{peak / 1e9:12,.1f}{1:9.3f}")


if __name__ == "__main__":
    main()
