"""Tokenises one checkpoint of billions of parameters, and prints the peak memory of any process and the speed.

A safetensors file with the shapes of a 7-billion-parameter language model (bfloat16, random values) is made for the
purpose, about 15 GB, and a token store of it, as large again; both are removed at the end. ``--layers 2`` is a quick
look. The memory is the kernel's own high-water mark of each process of this run, sampled until the process ends.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sane_ray.cluster import connect
from sane_ray.config import ClusterConfig, TokensConfig
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover, open_record

MOST_MB = 1000
WIDTH, KEYS, HIDDEN, WORDS = 4096, 1024, 14336, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="transformer blocks; 32 are 7.2 billion parameters")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; default: the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, destination = Path(folder, "model"), Path(folder, "store")
        parameters = make_model(source, arguments.layers)
        size = (source / "model.safetensors").stat().st_size / 1e6
        print(f"{parameters / 1e9:.2f} billion parameters, {size:,.0f} MB of bfloat16")
        config = TokensConfig(token_size=288, split=[1.0, 0.0, 0.0])
        with connect(ClusterConfig()), Peaks() as peaks:
            start = time.perf_counter()
            store = write_store(discover(source), destination, config, source=source)
            seconds = time.perf_counter() - start
        tokens = store.counts().tokens
        print(f"{tokens:,} tokens, {store.num_bytes / 1e6:,.0f} MB, in {len(store.segments):,} segments")
        print(f"{seconds:,.0f} s (both passes): {size / seconds:,.0f} MB/s of the checkpoint")
        check(store, source)
        for name, megabytes in peaks.highest():
            print(f"  {megabytes:7,.0f} MB  {name}")
        worst = peaks.highest()[0][1]
    print(f"peak {worst:,.0f} MB (at most {MOST_MB}): {'ok' if worst <= MOST_MB else 'TOO MUCH'}")


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of a language model of the usual kind."""
    yield "model.embed_tokens.weight", (WORDS, WIDTH)
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (KEYS, WIDTH),
            "self_attn.v_proj": (KEYS, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (WORDS, WIDTH)


def make_model(folder: Path, layers: int) -> int:
    """Writes the file piece by piece, and returns the number of parameters."""
    folder.mkdir()
    header, offset = {}, 0
    for key, shape in shapes(layers):
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    block = (torch.randn(2**24) * 0.02).bfloat16().view(torch.uint8).numpy()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, len(block)):
            file.write(block[: offset - start].data)
    return offset // 2


def check(store: TokenStore, source: Path) -> None:
    """Compares some tokens with the weights that they were made from."""
    (record,) = discover(source)
    checkpoint = open_record(record)
    (architecture,) = store.architectures.values()
    table, normalization = architecture.table, architecture.normalization
    groups = store.row_groups("train")
    for group in (groups[0], groups[len(groups) // 2], groups[-1]):
        ((segment, values_NT),) = store.read_row_group(group)
        layer_index = int(table.layers_of(segment.first, segment.first + 1)[0])
        layer, first = table.layers[layer_index], segment.first - int(table.layer_starts[layer_index])
        channel, chunk = divmod(first, layer.tokens_per_channel)
        begin = channel * layer.width + chunk * table.token_size
        count = min(table.token_size, layer.width - chunk * table.token_size)
        weights = checkpoint.read(layer.key, begin, begin + count).float().numpy()
        stored = values_NT[0, :count].astype(np.float32)
        restored = stored * normalization.scale[layer_index] + normalization.shift[layer_index]
        assert np.allclose(restored, weights, atol=0.004 * normalization.scale[layer_index]), layer.key
    print("tokens at the beginning, in the middle and at the end are the weights that were written")


class Peaks:
    """Samples the kernel's high-water mark of resident memory of this process and of those that it started."""

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, str], float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        Path("/proc/self/clear_refs").write_text("5")  # what was needed to make the file does not count
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def highest(self, count: int = 6) -> list[tuple[str, float]]:
        """The processes with the highest peaks, in MB (10^6 bytes)."""
        ordered = sorted(self._peaks.items(), key=lambda pair: -pair[1])
        return [(name, kilobytes * 1024 / 1e6) for (_, name), kilobytes in ordered[:count]]

    def _watch(self) -> None:
        while not self._end.wait(0.2):
            parents = {process: _status(process) for process in _processes()}
            for process, status in parents.items():
                if "VmHWM" in status and self._is_ours(process, parents):
                    key = (process, status["Name"])
                    self._peaks[key] = max(self._peaks.get(key, 0.0), float(status["VmHWM"].split()[0]))

    @staticmethod
    def _is_ours(process: int, statuses: dict[int, dict[str, str]]) -> bool:
        while process in statuses and process != os.getpid():
            process = int(statuses[process].get("PPid", 0))
        return process == os.getpid()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _status(process: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


if __name__ == "__main__":
    main()
