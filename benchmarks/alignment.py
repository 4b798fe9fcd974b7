"""Seconds to align one network to another, against the published weight matching where its code is at hand.

    python benchmarks/alignment.py
    python benchmarks/alignment.py --published ../SANE --threads 2

Pairs:

* ``resnet18 independent``: two ResNet-18 (CIFAR stem, 64 to 512 channels, 10 classes) of random weights and batch
  norms that have nothing to do with each other. Hard: matches are nowhere clear, and it takes many sweeps.
* ``resnet18 planted``: the second is the first with permuted channels and noise of half the weights' deviation. Easy.
* ``cnn``: pairs of the small networks of the zoos (2,464 parameters); what counts is the work around the arithmetic.

Another pair: ``--pair FIRST SECOND`` (checkpoint files of a ResNet-18). Both sides get the same pairs, alternately, and
each run another seed (the order of the permutations, which changes how many sweeps it takes). Seconds are medians. The
similarity is the cosine of all weights that move, statistics of batch norms included.

The published code (public repository HSG-AIML/SANE) is not part of this project. ``--published`` names a checkout; the
default is a folder SANE beside this one. Without it our own figures are printed. Of it only
``src/SANE/git_re_basin/git_re_basin.py`` is loaded, unchanged.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from sane_ray.tokens.alignment import Matcher
from sane_ray.tokens.symmetry import Symmetry, derive_symmetry, permute, random_permutations
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.zoo.architectures import architecture_for, parameter_shapes
from sane_ray.zoo.checkpoint import load_state_dict

LEAST = 10.0
MATCHING = Path("src", "SANE", "git_re_basin", "git_re_basin.py")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path(__file__).parents[2] / "SANE", help="a checkout of it")
    parser.add_argument(
        "--pair", type=Path, nargs=2, help="two checkpoints of a ResNet-18 in place of the random pairs"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each side with each pair")
    parser.add_argument("--width", type=int, default=64, help="channels of the ResNet's first stage")
    parser.add_argument("--threads", type=int, default=1, help="for matrix products; 1 as in a Ray task of one CPU")
    return parser.parse_args(arguments)


StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """What is aligned in one timed run: networks, each to the same reference."""

    name: str
    spec: str
    """Name of the published function that says how channels hang together."""
    reference: StateDict
    others: list[StateDict]


@dataclass(frozen=True)
class Run:
    """One timed run: seconds a network and mean cosine."""

    seconds: float
    similarity: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each pair."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    published = load_published(options.published)
    print(f"{'pair':22}{'ours ms':>12}{'similarity':>12}{'published ms':>14}{'similarity':>12}{'ratio':>8}")
    for pair in pairs(options):
        ours, theirs = compare(pair, published, options.repetitions)
        line = f"{pair.name:22}{median(ours) * 1e3:12,.2f}{mean_similarity(ours):12.6f}"
        if theirs:
            ratio = median(theirs) / median(ours)
            line += f"{median(theirs) * 1e3:14,.1f}{mean_similarity(theirs):12.6f}{ratio:8.1f}"
        print(line, flush=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{options.threads} threads, {os.cpu_count()} cores, load {load}; aim: resnet18 at least {LEAST:.0f} times")
    if published is None:
        print(f"no published code at {options.published} ({MATCHING}): own figures only")


def compare(pair: Pair, published: Any, repetitions: int) -> tuple[list[Run], list[Run]]:
    """Runs of ours and of the published code, alternating; none of the latter without its code."""
    symmetry = derive_symmetry(build_layer_table(pair.reference))
    ours: list[Run] = []
    theirs: list[Run] = []
    for seed in range(repetitions):
        ours.append(timed(pair, symmetry, partial(align, pair, symmetry, seed)))
        if published is not None:
            theirs.append(timed(pair, symmetry, partial(align_published, pair, symmetry, published, seed)))
    return ours, theirs


def timed(pair: Pair, symmetry: Symmetry, function: Callable[[], list[dict[str, Any]]]) -> Run:
    start = time.perf_counter()
    permutations = function()
    seconds = (time.perf_counter() - start) / len(pair.others)
    aligned = [permute(other, symmetry, orders) for other, orders in zip(pair.others, permutations, strict=True)]
    return Run(seconds, statistics.fmean(cosine(pair.reference, other, symmetry) for other in aligned))


def align(pair: Pair, symmetry: Symmetry, seed: int) -> list[dict[str, Any]]:
    """Ours; the reference is made ready once for all that are aligned to it."""
    matcher = Matcher(pair.reference, symmetry)
    return [matcher.match(other, seed=seed).permutations for other in pair.others]


def align_published(pair: Pair, symmetry: Symmetry, published: Any, seed: int) -> list[dict[str, Any]]:
    """The published code's permutations, under our names."""
    spec = getattr(published, pair.spec)()
    names: dict[str, Any] = {
        theirs: ours
        for key, axes in spec.axes_to_perm.items()
        for theirs, ours in zip(axes, symmetry.axes.get(key, ()), strict=False)
        if theirs is not None
    }
    torch.manual_seed(seed)
    found = [published.weight_matching(spec, pair.reference, other) for other in pair.others]
    return [{names[name]: order.long().numpy() for name, order in orders.items()} for orders in found]


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], symmetry: Symmetry) -> float:
    """Of all tensors that the symmetry moves, in float64."""
    products = np.zeros(3)
    for key in symmetry.axes:
        mine, theirs = one[key].double().flatten(), other[key].double().flatten()
        products += [float(mine @ theirs), float(mine @ mine), float(theirs @ theirs)]
    return float(products[0] / np.sqrt(products[1] * products[2]))


def pairs(options: argparse.Namespace) -> list[Pair]:
    spec = "resnet18_permutation_spec"
    if options.pair:
        first, second = (dict(load_state_dict(path)) for path in options.pair)
        return [Pair("resnet18 given", spec, first, [second])]
    first, second = (resnet18(seed, options.width) for seed in range(2))
    small = [cnn(seed) for seed in range(41)]
    return [
        Pair("resnet18 independent", spec, first, [second]),
        Pair("resnet18 planted", spec, first, [planted(first)]),
        Pair("cnn", "zoo_cnn_permutation_spec", small[0], small[1:]),
    ]


def planted(reference: StateDict, noise: float = 0.5, seed: int = 0) -> StateDict:
    """The same network with permuted channels and noise, in parts of each tensor's deviation."""
    symmetry = derive_symmetry(build_layer_table(reference))
    other = permute(reference, symmetry, random_permutations(symmetry, np.random.default_rng(seed)))
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + noise * value.std() * torch.randn(value.shape, generator=generator) if value.dim() else value
        for key, value in other.items()
    }


def cnn(seed: int) -> StateDict:
    """Random weights of the zoos' small network for grey images."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(architecture_for("cnn_s", (1, 28, 28)), (1, 28, 28), classes=10)
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def resnet18(seed: int, width: int = 64, classes: int = 10) -> StateDict:
    """Random weights and batch norms of a ResNet-18 for small images."""
    generator = torch.Generator().manual_seed(seed)
    state: StateDict = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int) -> None:
        scale = (2 / (inputs * kernel**2)) ** 0.5
        state[f"{name}.weight"] = scale * torch.randn(outputs, inputs, kernel, kernel, generator=generator)

    def norm(name: str, channels: int) -> None:
        draws = torch.randn(4, channels, generator=generator)
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.2 * draws[0], 0.2 * draws[1]
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = 0.3 * draws[2], (0.3 * draws[3]).exp()
        state[f"{name}.num_batches_tracked"] = torch.tensor(1)

    conv("conv1", 3, width, 3)
    norm("bn1", width)
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            conv(f"{name}.conv1", inputs, outputs, 3)
            norm(f"{name}.bn1", outputs)
            conv(f"{name}.conv2", outputs, outputs, 3)
            norm(f"{name}.bn2", outputs)
            if inputs != outputs:
                conv(f"{name}.downsample.0", inputs, outputs, 1)
                norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    state["fc.weight"] = inputs**-0.5 * torch.randn(classes, inputs, generator=generator)
    state["fc.bias"] = 0.1 * torch.randn(classes, generator=generator)
    return state


def load_published(folder: Path) -> Any:
    """The module of the published weight matching, or None if it is not there."""
    path = folder / MATCHING
    spec = importlib.util.spec_from_file_location("published_git_re_basin", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def median(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def mean_similarity(runs: Sequence[Run]) -> float:
    return statistics.fmean(run.similarity for run in runs)


if __name__ == "__main__":
    main()
