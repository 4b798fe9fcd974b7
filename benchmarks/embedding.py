"""Networks embedded a second, by us and by the published encoder.

    python benchmarks/embedding.py --published ../SANE
    python benchmarks/embedding.py --preset cnn --networks 16 --published ../SANE

Sides are measured in turn, round after round, each in a process of its own, with the same weights of the autoencoder,
the same tokens (random, in the shapes of the preset's networks, in memory) and the same threads:

* ours: ``Embedder.embed`` as jobs/embed.py calls it, in the number format that it chooses, in one window as the
  published loop has it: mean, standard deviation and five quantiles of the whole network and of each layer;
* ours-float32: the same in float32;
* ours-windows: the same as ours in windows as long as those of training, which is the job's default;
* ours-reconstruction: the same as ours, and decoded, with the reconstruction error of each layer: the job's default;
* published: the plain loop over the published encoder in float32, ``forward_embeddings`` of its model, one network
  after the other: the mean over tokens, no more;
* published-100: the same with 100 networks at a time, as its ``map_embeddings`` has it.

The mean embeddings of ours-float32 and published must agree to 1e-5. Figures are of each side's best round, which
others on the machine disturbed least, and "ours x" says how many times as fast ours is. On a CPU the same is told in
the processor's time, which others take less from, and that decides; and how many networks a second its matrix products
allow at most, by the operations of the encoder and the speed of large products measured here. Where that is less than
the aim, no code can reach it in this number format. Needs torch alone, neither Ray nor a store.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without being installed

import torch
from published_step import add_missing_modules, is_checkout
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_step import job_of

from sane_ray.autoencoder.model import SANE
from sane_ray.autoencoder.published import config_to_published, state_dict_to_published
from sane_ray.config import PRESETS, EmbeddingConfig
from sane_ray.embedding import Embedder
from sane_ray.embedding.encoder import choose_format, in_memory
from sane_ray.hardware import measured_peak

ROOT = Path(__file__).resolve().parents[1]
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-float32": {"precision": "float32"},
    "ours-windows": {"window": 0},
    "ours-reconstruction": {"reconstruction": True},
}
"""What each of our sides sets."""
PUBLISHED = {"published": 1, "published-100": 100}
"""Networks at a time."""
AGREEMENT = 1e-5
TARGET = 3.0


@dataclass(frozen=True)
class Work:
    """What a process is told to do."""

    side: str
    preset: str
    networks: int
    device: str
    threads: int
    code: Path | None = None


@dataclass(frozen=True)
class Cost:
    """Of embedding all networks once."""

    seconds: float
    processor: float
    """Seconds of processor time, all threads together."""


Side = Callable[[], Tensor]
"""Embeds all networks; their mean embeddings, float32 [networks, L] on the CPU."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    code = options.published if is_checkout(options.published) else None
    sides = [*OURS, *(PUBLISHED if code else ())]
    works = [Work(side, options.preset, options.networks, options.device, options.threads, code) for side in sides]
    job, table = job_of(options.preset, 0)
    shape = job.autoencoder
    print(
        f"{options.preset}: {options.networks} networks of {table.num_tokens} tokens of {table.token_size} values, "
        f"d_model {shape.d_model}, {shape.layers} blocks; {options.device}, {options.threads} threads; "
        f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    costs, found = measure(works, options.rounds)
    exact = found["ours-float32"]
    for side in sides:
        rate = options.networks / min(cost.seconds for cost in costs[side])
        difference = float((found[side] - exact).abs().max() / exact.abs().max())
        print(
            f"{side:20s} {rate:9.1f} networks/s   ours x {ratio(costs, side, 'seconds'):5.2f}   "
            f"in processor time {ratio(costs, side, 'processor'):5.2f}   "
            f"mean embedding differs from ours-float32 by {difference:.1e} of the largest"
        )
    print(f"load {os.getloadavg()[0]:.1f}")
    if options.device == "cpu":
        reference = "published" if code else "ours"
        print(bound(works[0], reference, options.networks / min(cost.seconds for cost in costs[reference])))
    if code is None:
        print(f"no published code at {options.published}: own figures only")
        return 0
    difference = float((found["published"] - exact).abs().max())
    times = ratio(costs, "published", "seconds" if options.device == "cuda" else "processor")
    met = times >= TARGET and difference <= AGREEMENT
    print(
        f"ours against the published loop: {times:.1f} times as many networks a second (aim: {TARGET:g}); in float32, "
        f"embeddings differ by {difference:.1e} at most (aim: {AGREEMENT:g}): {'met' if met else 'NOT MET'}"
    )
    return 0 if met else 1


def bound(work: Work, side: str, rate: float) -> str:
    """What the processor's matrix products allow, in words.

    Args:
        work: Ours.
        side: What to compare with.
        rate: Its networks a second.
    """
    model, tokens, positions = workload(dataclasses.replace(work, networks=1))
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        model.encode(tokens, positions[None])
    dtype = choose_format("auto", torch.device("cpu"))
    flop = counted.get_total_flops()
    most = measured_peak(work.threads, dtype) / flop
    return (
        f"bound: {flop / 1e6:,.0f} MFLOP a network, so at most {most:,.1f} networks/s in {dtype} here, "
        f"{most / rate:.1f} times the {rate:,.1f} of {side}"
    )


def ratio(costs: dict[str, list[Cost]], side: str, of: str) -> float:
    """How many times as fast as a side ours is."""
    theirs, ours = (min(getattr(cost, of) for cost in costs[name]) for name in (side, "ours"))
    return theirs / ours


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="digits", help="whose model (default: digits)")
    parser.add_argument("--networks", type=int, default=512, help="in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds after one to warm up (default: %(default)s)")
    parser.add_argument("--published", type=Path, default=ROOT.parent / "SANE", help="a checkout of the published code")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: the GPU if there is one)",
    )
    return parser.parse_args(arguments)


def measure(works: Sequence[Work], rounds: int) -> tuple[dict[str, list[Cost]], dict[str, Tensor]]:
    """What each side costs in each round, and what it found."""
    context = multiprocessing.get_context("spawn")
    pools = {work.side: ProcessPoolExecutor(1, context, _prepare, (work,)) for work in works}
    try:
        found = {side: pool.submit(_result).result() for side, pool in pools.items()}  # also warms up
        costs: dict[str, list[Cost]] = {side: [] for side in pools}
        for _ in range(rounds):
            for side, pool in pools.items():
                costs[side].append(pool.submit(_time).result())
        return costs, found
    finally:
        for pool in pools.values():
            pool.shutdown()


_SIDE: Side


def _prepare(work: Work) -> None:
    """In a process of its own: makes the side."""
    global _SIDE
    torch.set_num_threads(work.threads)
    model, tokens, positions = workload(work)
    if work.side in OURS:
        _SIDE = ours(work, model, tokens)
    else:
        assert work.code is not None
        _SIDE = published(work.code, model, tokens, positions, PUBLISHED[work.side])


def _result() -> Tensor:
    return _SIDE()


def _time() -> Cost:
    start, begun = time.perf_counter(), time.process_time()
    _SIDE()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Cost(time.perf_counter() - start, time.process_time() - begun)


def workload(work: Work) -> tuple[SANE, Tensor, Tensor]:
    """The model, tokens float32 [networks, N, T] with zeros in the padding, and positions [N, 3]."""
    job, table = job_of(work.preset, 0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(work.networks, table.num_tokens, table.token_size, generator=generator)
    tokens *= torch.arange(table.token_size) < torch.from_numpy(table.signal_counts)[:, None]
    return SANE(job.autoencoder, seed=1).to(work.device).eval(), tokens, torch.from_numpy(table.positions)


def ours(work: Work, model: SANE, tokens: Tensor) -> Side:
    """The embedder over batches of networks."""
    _, table = job_of(work.preset, 0)
    settings: dict[str, Any] = {"window": table.num_tokens, "reconstruction": False}
    embedder = Embedder(model, EmbeddingConfig(**(settings | OURS[work.side])), work.device)
    at_once = embedder.networks_at_once(table)

    def side() -> Tensor:
        means = []
        for some in tokens.split(at_once):
            summary = embedder.embed(in_memory(some), table, len(some))
            means.append(torch.from_numpy(summary.vectors["mean"][:, 0]))
        return torch.cat(means)

    return side


def published(code: Path, model: SANE, tokens: Tensor, positions: Tensor, at_once: int) -> Side:
    """The published model with our weights, over networks some at a time."""
    warnings.simplefilter("ignore")  # it calls what later versions of torch have deprecated
    sys.path.insert(0, str(code.absolute() / "src"))
    add_missing_modules()
    config = config_to_published(model.config)
    theirs = importlib.import_module("SANE.models.def_AE").AE(config)
    theirs.load_state_dict(state_dict_to_published(model.state_dict(), model.config))
    device = model.token_in.weight.device
    theirs.to(device).eval()

    @torch.no_grad()
    def side() -> Tensor:
        means = []
        for some in tokens.split(at_once):
            places = positions.to(torch.int).expand(len(some), -1, -1)
            means.append(theirs.forward_embeddings(some.to(device), places.to(device)).cpu())
        return torch.cat(means)

    return side


if __name__ == "__main__":
    sys.exit(main())
