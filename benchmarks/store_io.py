"""Write and scan speed of a token store, against plain pyarrow on the same table.

    python benchmarks/store_io.py

Makes a zoo of random weights whose tokens (float16, 288 values) take about 150 MB, prepares a store of it on Ray, and
then measures in this process, alternating, median of several repetitions:

* write: from stored values of each checkpoint to Parquet files, against ``pyarrow.parquet.write_table`` of the same
  rows, put together beforehand, with the same encoding;
* scan: ``TokenStore.read_row_group`` over all row groups, against ``ParquetFile.read_row_group`` of the same column of
  the same files. Both then look at a few values of each row group.

The page cache is warm for both sides: what is measured is the code, not the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sane_ray.cluster import connect
from sane_ray.config import ClusterConfig, TokensConfig
from sane_ray.tokens.store import SPLITS, RowGroup, TokenStore
from sane_ray.tokens.store.token_files import write_token_file
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover

LEAST_WRITE, LEAST_SCAN = 0.5, 0.7
CHANNELS, WIDTH, LAYERS = 512, 32 * 9, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=150, help="size of the token values")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store, seconds = prepare(root, arguments.megabytes)
        megabytes = store.counts().tokens * store.token_size * 2 / 1e6
        print(f"{store.counts().tokens:,} tokens of {store.token_size} float16: {megabytes:.0f} MB of values")
        print(f"prepare (both passes, start of Ray workers included): {seconds:.1f} s, {megabytes / seconds:.0f} MB/s")
        write = compare("write", *writers(store, root), megabytes, arguments.repetitions)
        scan = compare("scan", *scanners(store), megabytes, arguments.repetitions)
    print(f"write {write:.2f}x plain pyarrow (at least {LEAST_WRITE}): {'ok' if write >= LEAST_WRITE else 'TOO SLOW'}")
    print(f"scan  {scan:.2f}x plain pyarrow (at least {LEAST_SCAN}): {'ok' if scan >= LEAST_SCAN else 'TOO SLOW'}")


def prepare(root: Path, megabytes: float) -> tuple[TokenStore, float]:
    """A store of random models, and the seconds it took."""
    count = round(megabytes * 1e6 / (LAYERS * CHANNELS * WIDTH * 2))
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        path = root / "zoo" / f"model_{number:03d}" / "checkpoint_1" / "checkpoints"
        path.parent.mkdir(parents=True)
        layers = (torch.randn(CHANNELS, 32, 3, 3, generator=generator) for _ in range(LAYERS))
        torch.save({f"layers.{layer}.weight": values for layer, values in enumerate(layers)}, path)
    records = discover(root / "zoo")
    with connect(ClusterConfig()):
        start = time.perf_counter()
        store = write_store(records, root / "store", TokensConfig(), source=root / "zoo")
        return store, time.perf_counter() - start


def writers(store: TokenStore, root: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Writes the same rows with our code and with plain pyarrow."""
    groups = [store.read_row_group(group) for group in all_groups(store)]
    table = pa.concat_tables(
        pq.read_table(store.path / file, partitioning=None) for file in dict.fromkeys(g.file for g in all_groups(store))
    ).combine_chunks()
    rows = max(sum(len(values) for _, values in group) for group in groups)
    plain = [name for name in table.column_names if name != "values"]

    def ours() -> None:
        described = (
            [(segment, store.architecture_of(segment.checkpoint).table, values) for segment, values in g]
            for g in groups
        )
        write_token_file(root / "ours.parquet", described)

    def pyarrow() -> None:
        path = root / "plain.parquet"
        pq.write_table(
            table, path, row_group_size=rows, compression="none", use_dictionary=plain, write_statistics=plain
        )

    return ours, pyarrow


def scanners(store: TokenStore) -> tuple[Callable[[], float], Callable[[], float]]:
    """Reads the values of the same files with our code and with plain pyarrow."""

    def ours() -> float:
        total = 0.0
        for group in all_groups(store):
            total += sum(float(values[0, :8].sum()) for _, values in store.read_row_group(group))
        return total

    def pyarrow() -> float:
        total = 0.0
        for file in sorted(path for path in store.path.rglob("part-*.parquet")):
            reader = pq.ParquetFile(file, memory_map=True)
            for number in range(reader.num_row_groups):
                column = reader.read_row_group(number, columns=["values"]).column(0)
                total += float(np.frombuffer(column[0].as_py(), np.float16)[:8].sum())
        return total

    return ours, pyarrow


def all_groups(store: TokenStore) -> list[RowGroup]:
    return [group for split in SPLITS for group in store.row_groups(split)]


def compare(what: str, ours: Callable[[], Any], plain: Callable[[], Any], megabytes: float, repetitions: int) -> float:
    """Prints both speeds, alternately measured, and returns the median of ours over the median of the plain one."""
    seconds: Sequence[list[float]] = ([], [])
    for repetition in range(repetitions + 1):
        for times, function in zip(seconds, (ours, plain), strict=True):
            start = time.perf_counter()
            function()
            if repetition:  # the first fills caches
                times.append(time.perf_counter() - start)
    mine, theirs = (megabytes / statistics.median(times) for times in seconds)
    print(f"{what:5} ours {mine:,.0f} MB/s, plain pyarrow {theirs:,.0f} MB/s")
    return mine / theirs


if __name__ == "__main__":
    main()
