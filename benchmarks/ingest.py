"""Windows a second that reach a training worker, against plain pyarrow; and how long a real run waits for them.

    python benchmarks/ingest.py
    python benchmarks/ingest.py --preset resnet18 --seconds 10
    python benchmarks/ingest.py --train 200

A zoo of random networks of the preset's shapes is tokenised first. Then are measured, with canonical and with permuted
second views:

* plain: pyarrow's ``ParquetFile.read_row_group`` of the values of the same row groups, and as many slices of them, of
  the same length, copied into arrays of a batch: what an ordinary script does, without any order, signal or positions;
* reader: ``WindowReader`` alone, in this process: the plan's order, both views, signal and positions;
* stream: the whole way through Ray Data, from the task that reads to tensors in this process. Its clock starts with the
  first batch; how long that one takes is printed apart (an execution serves all epochs of a run).

Plain and reader take turns; a figure is the median of their rounds. The page cache is warm for all. MB/s counts the
values of all views that are sent (canonical views are the same windows, sent once; permuted ones twice the bytes).

``--train STEPS`` also trains on the store with ``jobs/pretrain.py``, and reads from the run's history which part of the
time the steps waited for data: in all, and after the first report, which includes the start of the stream. The aim is
under 2 %. On a shared machine compare ratios, not rates, and run twice.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without being installed

import numpy as np
import pyarrow.parquet as pq
import torch
from train_step import SHAPES

from sane_ray.cluster import connect, quieten
from sane_ray.config import PRESETS, AugmentationConfig, ClusterConfig, PretrainJob, TokensConfig
from sane_ray.pretraining.history import Point, read_history
from sane_ray.pretraining.stream import Columns, Part, WindowReader, plan_of_store, stream
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.reading import RAW_DTYPES
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover

MOST_WAITING = 0.02
ENDLESS = 1000
"""Epochs of a stream that is ended before."""
NETWORKS = {"digits": 600, "cnn": 200, "resnet18": 8}
VIEWS = {
    "canonical": AugmentationConfig(view_1="canonical", view_2="canonical"),
    "permuted": AugmentationConfig(view_1="canonical", view_2="permuted"),
}


@dataclass(frozen=True)
class Rate:
    """How fast windows came."""

    windows: float
    """A second."""
    megabytes: float
    """Of their values, a second."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    quieten()
    job = PRESETS[options.preset]()
    with tempfile.TemporaryDirectory() as folder:
        with connect(ClusterConfig()):
            store = make_store(job, options.preset, options.networks or NETWORKS[options.preset], Path(folder))
            for views, augmentation in VIEWS.items():
                reader = make_reader(store, job, augmentation)
                plain, ours = in_turns(reader, store, options.rounds)
                streamed, first = rate_of_stream(reader, store, options.seconds)
                print_rates(views, plain, ours, streamed, first)
        if options.train:
            print_waiting(train(options.preset, store, Path(folder), options.train))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cnn", help="whose networks (default: cnn)")
    parser.add_argument("--networks", type=int, default=0, help="networks of the zoo (default: some hundred MB)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one to warm up (default: 5)")
    parser.add_argument("--seconds", type=float, default=5, help="that each stream is measured for (default: 5)")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="also train so many steps")
    options = parser.parse_args(arguments)
    if min(options.networks, options.train) < 0 or options.rounds < 1 or options.seconds <= 0:
        parser.error("--networks, --rounds, --seconds and --train must be positive")
    return options


def shapes_of(preset: str) -> dict[str, tuple[int, ...]]:
    """Tensors of the preset's networks; a ResNet's with its batch norms, without which nobody knows its symmetry."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in SHAPES[preset]().items():
        shapes[key] = shape
        if preset == "resnet18" and len(shape) == 4:
            name = key.removesuffix(".weight")
            norm = name.removesuffix("0") + "1" if "downsample" in name else name.replace("conv", "bn")
            shapes |= {f"{norm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def make_store(job: PretrainJob, preset: str, networks: int, folder: Path) -> TokenStore:
    """A token store of random networks, nearly all of them in the training split."""
    generator = torch.Generator().manual_seed(0)
    for number in range(networks):
        path = folder / "zoo" / f"model_{number:05d}" / "checkpoint_000001" / "checkpoints"
        path.parent.mkdir(parents=True)
        torch.save({key: torch.randn(shape, generator=generator) for key, shape in shapes_of(preset).items()}, path)
    tokens = TokensConfig(token_size=job.tokens.token_size, split=[0.9, 0.05, 0.05])
    store = write_store(discover(folder / "zoo"), folder / "store", tokens, source=folder / "zoo")
    (architecture,) = store.architectures.values()
    counts = store.counts("train")
    print(
        f"{preset}: {counts.checkpoints} networks of {architecture.table.num_tokens} tokens of {store.token_size} "
        f"{store.dtype} values, {len(architecture.symmetry.sizes)} permutations; windows of {job.autoencoder.window}"
    )
    return store


def make_reader(store: TokenStore, job: PretrainJob, augmentation: AugmentationConfig) -> WindowReader:
    """For the only worker."""
    pretraining = job.pretraining
    plan, groups = plan_of_store(
        store,
        "train",
        window=job.autoencoder.window,
        batch_size=pretraining.batch_size,
        pool_mb=pretraining.shuffle_mb,
        seed=pretraining.seed,
    )
    return WindowReader(store.path, plan, groups, augmentation, rank=0, world_size=1)


def in_turns(reader: WindowReader, store: TokenStore, rounds: int) -> tuple[Rate, Rate]:
    """An epoch of plain reading and one of the reader, one after the other, ``rounds`` times after one to warm up."""
    epochs: list[Callable[[int], int]] = [
        lambda _: read_plainly(reader, store),
        lambda epoch: sum(int((block["slot"] >= 0).sum()) for block in read_all(reader, store, epoch)),
    ]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for times, epoch in zip(seconds, epochs, strict=True):
            began = time.perf_counter()
            windows = epoch(number)
            times.append(time.perf_counter() - began)
            if windows != reader.plan.windows_per_epoch:
                raise RuntimeError(f"{windows} windows instead of {reader.plan.windows_per_epoch}")
    plain, ours = (reader.plan.windows_per_epoch / statistics.median(times[1:]) for times in seconds)
    return (
        Rate(plain, plain * megabytes_a_window(reader, store, views=1)),
        Rate(ours, ours * megabytes_a_window(reader, store)),
    )


def read_all(reader: WindowReader, store: TokenStore, epoch: int) -> Iterator[Columns]:
    """An epoch's blocks."""
    return reader.read(store, Part(epoch, 0, reader.plan.num_pools))


def read_plainly(reader: WindowReader, store: TokenStore) -> int:
    """All row groups of the split with pyarrow, and from each as many windows as the plan cuts in it."""
    window, batch_size, size = reader.plan.window, reader.plan.batch_size, store.token_size
    slices: list[np.ndarray] = []
    batches, cut = [], 0
    per_token = reader.plan.windows_per_epoch / sum(s.tokens for group in reader.groups for s in group.segments)
    tokens = 0
    for group in reader.groups:
        file = pq.ParquetFile(store.path / group.file, memory_map=True)
        column = file.read_row_group(group.index, columns=["values"]).column(0).combine_chunks()
        values = np.frombuffer(column.buffers()[1], RAW_DTYPES[store.dtype]).reshape(-1, size)
        tokens += len(values)
        count = round(tokens * per_token) - cut
        slices += [values[start : start + window] for start in np.linspace(0, len(values) - window, count, dtype=int)]
        cut += count
        while len(slices) >= batch_size:
            batches = [np.stack(slices[:batch_size])]
            slices = slices[batch_size:]
    if slices:
        batches = [np.stack(slices)]
    return cut if batches else 0


def rate_of_stream(reader: WindowReader, store: TokenStore, seconds: float) -> tuple[Rate, float]:
    """How fast batches come through Ray Data, and the seconds to the first of them."""
    began = time.perf_counter()
    with closing(stream(reader, epochs=ENDLESS, first_step=0)) as batches:
        next(batches)
        first, windows = time.perf_counter(), 0
        for batch in batches:
            windows += int((batch.slot >= 0).sum())
            if (elapsed := time.perf_counter() - first) > seconds:
                break
    rate = windows / elapsed
    return Rate(rate, rate * megabytes_a_window(reader, store)), first - began


def megabytes_a_window(reader: WindowReader, store: TokenStore, views: int = 0) -> float:
    """Of the values of a window, in so many views, or as many as are sent."""
    views = views or 1 + ("permuted" in (reader.augmentation.view_1, reader.augmentation.view_2))
    return views * reader.plan.window * store.token_size * RAW_DTYPES[store.dtype].itemsize / 1e6


def print_rates(views: str, plain: Rate, ours: Rate, streamed: Rate, first: float) -> None:
    print(f"{views:10}{'windows/s':>12}{'MB/s':>8}{'x plain':>9}{'x reader':>10}")
    print(f"  {'plain':8}{plain.windows:12,.0f}{plain.megabytes:8,.0f}")
    print(f"  {'reader':8}{ours.windows:12,.0f}{ours.megabytes:8,.0f}{ours.windows / plain.windows:9.2f}")
    print(
        f"  {'stream':8}{streamed.windows:12,.0f}{streamed.megabytes:8,.0f}{streamed.windows / plain.windows:9.2f}"
        f"{streamed.windows / ours.windows:10.2f}   first batch after {first:.1f} s"
    )


def train(preset: str, store: TokenStore, folder: Path, steps: int) -> list[Point]:
    """The history of a run of about so many steps, in processes of its own, as anybody starts one."""
    job = PRESETS[preset]()
    epochs = -(-steps // make_reader(store, job, job.augmentation).plan.steps_per_epoch)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "jobs/pretrain.py"), f"--preset={preset}", f"--store={store.path}"]
    command += [f"--storage={folder / 'results'}", "--run-name=ingest", f"--pretraining.epochs={epochs}"]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    return read_history(folder / "results" / "runs" / "ingest" / "history.jsonl")


def waiting(points: Sequence[Point]) -> float:
    """Part of the time that steps waited for data; each report speaks for the steps since the one before."""
    waited = elapsed = 0.0
    since: list[Point] = []
    for point in points:
        since.append(point)
        if "data_wait_fraction" in point:
            seconds = len(since) / point["tokens_per_s"]  # in units of a step's tokens
            waited, elapsed, since = waited + point["data_wait_fraction"] * seconds, elapsed + seconds, []
    return waited / elapsed


def print_waiting(points: Sequence[Point]) -> None:
    first = next(number for number, point in enumerate(points) if "data_wait_fraction" in point)
    print(f"run of {len(points)} steps: waits for data {waiting(points):.2%} of its time, start of the stream included")
    later = waiting(points[first + 1 :])
    verdict = "ok" if later < MOST_WAITING else "TOO LONG"
    print(f"after step {points[first]['step']:g}: {later:.2%} (aim: under {MOST_WAITING:.0%}): {verdict}")


if __name__ == "__main__":
    main()
