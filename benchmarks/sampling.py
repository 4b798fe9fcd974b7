"""Networks sampled and evaluated a second, by us and by the published loop.

    python benchmarks/sampling.py --threads 2 --published ../SANE
    python benchmarks/sampling.py --networks 20 --epochs 1 --threads 1

Small networks for images of 8x8 pixels are drawn near 32 random anchors by an untrained autoencoder (what it has
learned does not change its speed), measured as they are on all images of scikit-learn's digits, trained for an epoch
with the optimiser settings and batch size of our zoos, and measured again. Sides are measured in turn, round after
round, each in processes of its own that are there already, on the same images for the same epochs:

* ours: ``Sampler`` and ``Codec`` as jobs/sample.py calls them, with the published density, and ``Evaluation`` as
  jobs/finetune.py calls it on actors: stacks of networks, as many processes as threads, of one thread each;
* published: the body of its ``sample_model_evaluation``, one network after the other, in one process of as many
  threads; see published_sampling.py for what is put around it;
* plain, where there is no published code: a loop of ours of the same structure: decode one network, build its module,
  load it, a data loader, an optimiser of torch.

Both measure train, validation and test images before training; after an epoch the published loop takes the running
accuracy of training for that of the train images, and ours measures them. The accuracies before training of the same
weights must agree. Figures are of each side's best round, which others on the machine disturbed least. The time of
fine-tuning is that of evaluation with training less that without; ``floor`` is the time that the same operations take
in large matrix products, as fast as they run here now. Needs neither a zoo nor a cluster.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without being installed

import numpy as np
import torch
from published_sampling import BATCH, SPLITS, DigitsCNN, PublishedSampling
from published_step import is_checkout
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from train_step import job_of

from sane_ray.autoencoder.model import SANE
from sane_ray.config import SamplingConfig, ZooConfig
from sane_ray.finetuning.evaluation import METRICS, Evaluation, Piece
from sane_ray.hardware import measured_peak
from sane_ray.sampling.densities import PUBLISHED_BANDWIDTH, published_kde
from sane_ray.sampling.generation import Codec, state_dict
from sane_ray.sampling.methods import Sampler
from sane_ray.tokens.layers import LayerTable
from sane_ray.tokens.normalization import LayerStatistics, fit
from sane_ray.tokens.store import Architecture
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.tokens.tokenizer import tokenize
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.images import ImageData, Split, load_images

ROOT = Path(__file__).resolve().parents[1]
ANCHORS = 32
STACK = 25
"""Networks that ours trains side by side, at most: more gain little."""

FEW = 4
"""Networks to warm up with."""

METHOD = "sane_kde_published"
RECIPE: dict[str, Any] = {
    "model::type": "digits_cnn",
    "model::channels_in": 1,
    "model::o_dim": 10,
    "model::nlin": "relu",
    "model::dropout": 0.0,
    "model::init_type": "kaiming_uniform",
    "optim::optimizer": "adam",
    "optim::lr": 1e-3,
    "optim::wd": 1e-3,
    "training::batchsize": ZooConfig().batch_size,
    "seed": 0,
}
"""Params as our zoos have them."""

AGREEMENT = 0.004
"""Of accuracies: one of the 270 test images, whose two best answers may be equal but for rounding."""

TARGET = 10.0

Arrays = dict[str, np.ndarray]
"""Weights by key, [R, *shape]."""


@dataclass(frozen=True)
class Work:
    """What a process is told to do."""

    side: str
    networks: int
    epochs: int
    threads: int
    folder: Path
    code: Path | None = None


@dataclass(frozen=True)
class Cost:
    """Of all networks once, in seconds: on the clock, or of the processor, all threads and processes together."""

    sampling: float
    zero_shot: float
    evaluation: float
    """Measured, trained and measured again."""

    @property
    def fine_tuning(self) -> float:
        """What evaluation takes beyond measuring as they are."""
        return max(0.0, self.evaluation - self.zero_shot)

    @property
    def whole(self) -> float:
        """Sampling and evaluation."""
        return self.sampling + self.evaluation


class Side(Protocol):
    """Samples and evaluates networks."""

    elsewhere: float
    """Processor time of other processes so far, seconds."""

    def sample(self, count: int) -> Arrays:
        """Draws and decodes networks."""

    def evaluate(self, weights: Arrays, epochs: int) -> np.ndarray:
        """Trains and measures; accuracies before training by split, [R, 3]."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    code = options.published if is_checkout(options.published) else None
    rival = "plain" if code is None else "published"
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        works = [
            Work(side, options.networks, options.epochs, options.threads, Path(name), code) for side in ("ours", rival)
        ]
        print(
            f"{options.networks} networks of digits_cnn, {options.epochs} epochs, {options.threads} threads; "
            f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        clock, processor, found = measure(works, options.rounds)
    floors = floors_of(works[0])
    print(table(clock, floors, "seconds on the clock"))
    print(table(processor, None, "seconds of the processor"))
    print(f"load {os.getloadavg()[0]:.1f}")
    difference = float(np.abs(found["ours"] - found[rival]).max())
    times, cheaper = (costs[rival].whole / costs["ours"].whole for costs in (clock, processor))
    met = times >= TARGET and difference <= AGREEMENT
    loop = "published loop" if code else f"plain loop of ours (no published code at {options.published})"
    print(
        f"ours against the {loop}: {times:.1f} times as many networks a second (aim: {TARGET:g}), {cheaper:.1f} in "
        f"processor time; zero-shot accuracies of the same weights differ by {difference:.4f} at most "
        f"(aim: {AGREEMENT:g}): {'met' if met else 'NOT MET'}"
    )
    return 0 if met else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=100, help="to sample and evaluate (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds, after a few networks to warm up (default: %(default)s)"
    )
    parser.add_argument("--published", type=Path, default=ROOT.parent / "SANE", help="a checkout of the published code")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of a side (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def table(costs: Mapping[str, Cost], floors: Cost | None, unit: str) -> str:
    """A line for each part, with the ratio of the two sides."""
    ours, (name, rival) = costs["ours"], next(item for item in costs.items() if item[0] != "ours")
    lines = [f"{unit:26s}{'ours':>10}{name:>12}{'ours x':>10}{'floor' if floors else '':>10}"]
    for part in ("sampling", "zero_shot", "fine_tuning", "whole"):
        mine, theirs = getattr(ours, part), getattr(rival, part)
        floor = f"{getattr(floors, part):10.3f}" if floors else ""
        lines.append(f"  {part.replace('_', '-'):24s}{mine:10.3f}{theirs:12.3f}{theirs / max(mine, 1e-9):10.1f}{floor}")
    return "\n".join(lines)


def floors_of(work: Work) -> Cost:
    """Seconds that the operations of all networks take in large matrix products of float32."""
    setting, images = Setting.made(), load_images("digits", seed=0)
    count, length = len(images.labels_N), setting.table.num_tokens
    half = setting.model.flops_per_token(length) * length / 6  # it counts forwards and backwards, and both halves
    decoding = half * (1 + ANCHORS / work.networks)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        from_params(RECIPE)(torch.from_numpy(images.images_NCHW[:1]))
    flop, peak = counted.get_total_flops(), measured_peak(work.threads, torch.float32) / work.networks
    trained = flop * (3 * len(images.rows["train"]) + count) * work.epochs
    return Cost(decoding / peak, flop * count / peak, (flop * count + trained) / peak)


def measure(works: Sequence[Work], rounds: int) -> tuple[dict[str, Cost], dict[str, Cost], dict[str, np.ndarray]]:
    """Each side's least cost of each part, on the clock and of the processor, and accuracies of the same weights."""
    context = multiprocessing.get_context("spawn")
    pools = {work.side: ProcessPoolExecutor(1, context, _prepare, (work,)) for work in works}
    try:
        anchors = Setting.made().stacked
        found = {side: pool.submit(_accuracies, anchors).result() for side, pool in pools.items()}
        costs: dict[str, list[tuple[Cost, Cost]]] = {side: [] for side in pools}
        for pool in pools.values():
            pool.submit(_time, min(FEW, works[0].networks)).result()
        for _ in range(rounds):
            for side, pool in pools.items():
                costs[side].append(pool.submit(_time, works[0].networks).result())
    finally:
        for pool in pools.values():
            pool.submit(_close).result()
            pool.shutdown()
    clock, processor = ({side: best([pair[kind] for pair in costs[side]]) for side in costs} for kind in (0, 1))
    return clock, processor, found


def best(costs: Sequence[Cost]) -> Cost:
    """The least of each part."""
    return Cost(*(min(getattr(cost, part) for cost in costs) for part in ("sampling", "zero_shot", "evaluation")))


_SIDE: Any
_WORK: Work


def _prepare(work: Work) -> None:
    """In a process of its own: makes the side."""
    global _SIDE, _WORK
    torch.set_num_threads(work.threads)
    _SIDE, _WORK = side_of(work), work


def _accuracies(weights: Arrays) -> np.ndarray:
    accuracies: np.ndarray = _SIDE.evaluate(weights, 0)
    return accuracies


def _close() -> None:
    if isinstance(_SIDE, Ours):
        _SIDE.close()


def _time(networks: int) -> tuple[Cost, Cost]:
    """Seconds on the clock, and of the processor."""
    marks = [_now()]
    weights = _SIDE.sample(networks)
    marks.append(_now())
    for epochs in (0, _WORK.epochs):
        _SIDE.evaluate(weights, epochs)
        marks.append(_now())
    clock, processor = np.diff(np.array(marks), axis=0).T.tolist()
    return Cost(*clock), Cost(*processor)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time() + _SIDE.elsewhere


@dataclass(frozen=True)
class Setting:
    """The autoencoder, the anchors, and how networks become tokens."""

    model: SANE
    architecture: Architecture
    anchors: list[dict[str, Tensor]]

    @classmethod
    @cache
    def made(cls) -> Setting:
        """Random anchors, and an autoencoder that has learned nothing but their normalisation."""
        job, table = job_of("digits", 0)
        anchors = [dict(from_params({**RECIPE, "seed": seed}).state_dict()) for seed in range(ANCHORS)]
        statistics = LayerStatistics()
        for network in anchors:
            statistics.update(tokenize(network, table), table)
        architecture = Architecture("digits_cnn", table, Symmetry({}, {}), fit(statistics, "standardize"))
        model = SANE(job.autoencoder, seed=1).eval()
        model.preprocessing = {"architectures": {"digits_cnn": architecture.to_dict()}}
        return cls(model, architecture, anchors)

    @property
    def table(self) -> LayerTable:
        """Of the networks."""
        return self.architecture.table

    @property
    def stacked(self) -> Arrays:
        """The anchors' weights."""
        return {key: np.stack([network[key].numpy() for network in self.anchors]) for key in self.anchors[0]}

    def config(self, count: int) -> SamplingConfig:
        """Draws ``count`` networks, each decoded whole as the published loop does."""
        return SamplingConfig(
            methods=[METHOD], repetitions=count, candidates=count, window=self.table.num_tokens, halo=0
        )

    def codec(self) -> Codec:
        """Of our autoencoder."""
        return Codec(self.model, self.architecture, self.config(1))


def side_of(work: Work) -> Side:
    """Ours, the published or the plain one."""
    setting, images = Setting.made(), load_images("digits", seed=0)
    if work.side == "ours":
        return Ours(setting, images, work.threads)
    if work.side == "plain":
        return Plain(setting, images)
    assert work.code is not None
    return Published(work.code, work.folder, setting, images)


class Ours:
    """Our sampler, and actors that evaluate stacks of networks."""

    def __init__(self, setting: Setting, images: ImageData, actors: int) -> None:
        self.setting, self.codec, self.actors, self.elsewhere = setting, setting.codec(), actors, 0.0
        self.pool: ProcessPoolExecutor | None = None
        if actors > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(actors, context, _prepare_actor, (images,))
        else:
            _prepare_actor(images)

    def sample(self, count: int) -> Arrays:
        """Encodes the anchors, draws and decodes."""
        sampler = Sampler(self.codec, self.setting.anchors, None, self.setting.config(count))
        return {key: value.numpy() for key, value in self.codec.weights(sampler.kept(METHOD).tokens_RNT).items()}

    def evaluate(self, weights: Arrays, epochs: int) -> np.ndarray:
        """In stacks of equal size, a multiple of the actors of them."""
        pieces = pieces_of(weights, self.actors)
        answers = list((self.pool.map if self.pool else map)(_evaluate, pieces, [epochs] * len(pieces)))
        if self.pool:
            self.elsewhere += sum(seconds for _, seconds in answers)
        return np.concatenate([accuracies for accuracies, _ in answers])

    def close(self) -> None:
        """Ends the actors."""
        if self.pool:
            self.pool.shutdown()


def pieces_of(weights: Arrays, actors: int) -> list[Piece]:
    """Stacks of at most ``STACK`` networks, as many for one actor as for another."""
    count = len(next(iter(weights.values())))
    stacks = min(count, actors * -(-count // (STACK * actors)))
    return [
        Piece([{**RECIPE, "seed": int(seed)} for seed in rows], {key: value[rows] for key, value in weights.items()})
        for rows in np.array_split(np.arange(count), stacks)
    ]


_IMAGES: ImageData


def _prepare_actor(images: ImageData) -> None:
    global _IMAGES
    torch.set_num_threads(1)
    _IMAGES = images


def _evaluate(piece: Piece, epochs: int) -> tuple[np.ndarray, float]:
    """Accuracies before training, and seconds of the processor."""
    begun = time.process_time()
    histories = Evaluation(_IMAGES, epochs, [0, epochs])(piece)
    columns = [METRICS.index(f"{split}_acc") for split in SPLITS]
    return histories.metrics_REM[:, 0, columns], time.process_time() - begun


class Published:
    """The published functions."""

    elsewhere = 0.0

    def __init__(self, code: Path, folder: Path, setting: Setting, images: ImageData) -> None:
        tokens = setting.codec().tokens(setting.anchors)
        architecture = setting.architecture
        self.loop = PublishedSampling(
            code, folder, setting.model, tokens, architecture.table, architecture.normalization, RECIPE, images
        )

    def sample(self, count: int) -> Arrays:
        """Its own."""
        return self.loop.sample(count)

    def evaluate(self, weights: Arrays, epochs: int) -> np.ndarray:
        """Its own, one network after the other."""
        return self.loop.evaluate(weights, epochs)


class Plain:
    """One network after the other, as anyone would write it."""

    elsewhere = 0.0

    def __init__(self, setting: Setting, images: ImageData) -> None:
        self.setting, self.codec = setting, setting.codec()
        batch = int(RECIPE["training::batchsize"])
        sets = {split: TensorDataset(*(torch.tensor(values) for values in images.split(split))) for split in SPLITS}
        self.loaders = {
            split: DataLoader(sets[split], batch if split == "train" else len(sets[split])) for split in SPLITS
        }
        self.training = DataLoader(sets["train"], batch, shuffle=True)

    def sample(self, count: int) -> Arrays:
        """Draws all, decodes one by one."""
        latents = torch.cat([self.codec.encode(some) for some in self.codec.tokens(self.setting.anchors).split(BATCH)])
        drawn = published_kde(latents, count, 0, PUBLISHED_BANDWIDTH).values_RNX
        networks = [state_dict(self.codec.weights(self.codec.decode(one[None])), 0) for one in drawn]
        return {key: np.stack([network[key].numpy() for network in networks]) for key in networks[0]}

    def evaluate(self, weights: Arrays, epochs: int) -> np.ndarray:
        """Measures, trains and measures."""
        found = []
        for index in range(len(next(iter(weights.values())))):
            net = DigitsCNN(1, "relu", 0.0, "kaiming_uniform")
            net.load_state_dict({key: torch.from_numpy(value[index]) for key, value in weights.items()})
            found.append([self._accuracy(net, split) for split in SPLITS])
            optimizer = torch.optim.Adam(net.parameters(), lr=RECIPE["optim::lr"], weight_decay=RECIPE["optim::wd"])
            for _ in range(epochs):
                self._train(net, optimizer)
                for split in SPLITS:
                    self._accuracy(net, split)
        return np.array(found)

    @torch.no_grad()
    def _accuracy(self, net: nn.Module, split: Split) -> float:
        net.eval()
        hits = [int((net(inputs).argmax(1) == labels).sum()) for inputs, labels in self.loaders[split]]
        return sum(hits) / len(self.loaders[split].dataset)  # type: ignore[arg-type]

    def _train(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net.train()
        for inputs, labels in self.training:
            optimizer.zero_grad()
            functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
