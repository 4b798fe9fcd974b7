"""From checkpoints to training data, end to end, against the published preprocessing where its code is at hand.

    python benchmarks/published_preprocessing.py
    python benchmarks/published_preprocessing.py --published ../SANE --models 100

Makes a zoo in the published layout (the small network for grey images: 2,464 parameters, random weights, three epochs
a model) and turns it into training data twice, each time as a process of its own, timed from its start to its end. The
start of Python and Ray is in it; it takes most of our time, so that a larger zoo gives a larger ratio.

* ours: ``jobs/prepare.py --tokens.align weights``: read, align every model to a reference, standardise, write. Each
  checkpoint is stored once; its permuted views are made while training.
* published: ``prepare_multiple_datasets`` with the settings of its own script for such networks: read, align,
  standardise, and write each training checkpoint with 200 permuted views beside it (10 for validation and test),
  float32, a file each.

The published code (public repository HSG-AIML/SANE) is not part of this project. ``--published`` names a checkout; the
default is a folder SANE beside this one. Without it our own figures are printed. It runs unmodified, but not in the
environment that it was written for. What is put around it, always in its favour or neutral:

* ``rebasin`` and ``torchvision`` are imported by it but not used here: if missing, empty classes of the names that it
  imports;
* ``ray.init`` gets the machine's number of cores in place of its constant 12, a temporary folder of its own and no
  dashboard;
* each checkpoint is taken once (its script takes three windows of each, but these networks are shorter than one).

Its random choices are its own: it reads folders in the order of the file system.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sane_ray.zoo.architectures import architecture_for, parameter_shapes

ROOT = Path(__file__).parents[1]
LEAST_SPEED, LEAST_SIZE = 10.0, 100.0
EPOCHS = [21, 22, 23]
VIEWS_TRAIN, VIEWS_TEST = 200, 10
SPLIT = [0.7, 0.15, 0.15]
SPLITS = ("train", "val", "test")

EMPTY_MODULES = {
    "rebasin": "class PermutationCoordinateDescent: ...\n",
    "torchvision": "",
    "torchvision.transforms": "class RandomErasing: ...\n",
    "torchvision.models": "",
    "torchvision.models.resnet": "class BasicBlock: ...\nclass Bottleneck: ...\nclass ResNet: ...\n",
}
"""What the published code imports and this run does not use."""

RUNNER = """\
import json, sys
from functools import partial
import ray
job = json.load(open(sys.argv[1]))
begin = ray.init
ray.init = lambda num_cpus: begin(
    address="local", num_cpus=min(num_cpus, job["cores"]), include_dashboard=False, _temp_dir=job["temp"]
)
from SANE.datasets.dataset_preprocessing import prepare_multiple_datasets
from SANE.git_re_basin.git_re_basin import zoo_cnn_permutation_spec
prepare_multiple_datasets(
    [{**job["config"], "splits": [split], "permutation_spec": zoo_cnn_permutation_spec} for split in job["splits"]]
)
"""


@dataclass(frozen=True)
class Result:
    """One side's run."""

    seconds: float
    bytes: int
    checkpoints: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each side, and the ratios."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        folder = Path(name)
        make_zoo(folder / "zoo", options.models)
        checkpoints = options.models * len(EPOCHS)
        size = folder_bytes(folder / "zoo") / 1e6
        print(f"zoo of {options.models} models, {checkpoints} checkpoints, {size:.1f} MB of files", flush=True)
        ours = run_ours(folder, checkpoints)
        report("ours", ours)
        if (options.published / "src" / "SANE").is_dir():
            theirs = run_published(options.published, folder, checkpoints)
            report("published", theirs)
            compare(ours, theirs)
        else:
            print(f"no published code at {options.published}: own figures only")
    print(f"{os.cpu_count()} cores, load {', '.join(f'{value:.1f}' for value in os.getloadavg())}")


def compare(ours: Result, theirs: Result) -> None:
    """Prints the ratios."""
    print(f"{theirs.seconds / ours.seconds:,.1f} times the models a second (aim: {LEAST_SPEED:.0f})")
    print(
        f"1/{theirs.bytes / ours.bytes:,.0f} of the bytes (aim: 1/{LEAST_SIZE:.0f}): each checkpoint once in float16, "
        f"where it writes {VIEWS_TRAIN + 1} views (validation and test: {VIEWS_TEST + 1}) in float32"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=ROOT.parent / "SANE", help="a checkout of the published code")
    parser.add_argument("--models", type=int, default=100, help="models of the zoo; at least 7: no split is empty")
    return parser.parse_args(arguments)


def make_zoo(folder: Path, models: int) -> None:
    """A zoo in the published layout; the epochs of a model are close to each other, models are unrelated."""
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(architecture_for("cnn_s", (1, 28, 28)), (1, 28, 28), classes=10)
    for number in range(models):
        model = folder / f"NN_tune_trainable_{number:05d}"
        weights = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        params = {"model::type": "CNN", "model::channels_in": 1, "model::o_dim": 10, "seed": number}
        model.mkdir(parents=True)
        (model / "params.json").write_text(json.dumps(params))
        lines = []
        for epoch in range(max(EPOCHS) + 1):
            result = {"training_iteration": epoch, "config": params}
            result |= {f"{split}_{kind}": 0.5 + epoch / 100 for split in SPLITS for kind in ("acc", "loss")}
            lines.append(json.dumps(result))
        (model / "result.json").write_text("\n".join(lines) + "\n")
        for epoch in EPOCHS:
            path = model / f"checkpoint_{epoch:06d}" / "checkpoints"
            path.parent.mkdir()
            torch.save({key: value + 0.01 * epoch * torch.sign(value) for key, value in weights.items()}, path)


def run_ours(folder: Path, checkpoints: int) -> Result:
    store = folder / "store"
    command = [
        sys.executable,
        str(ROOT / "jobs" / "prepare.py"),
        "--source",
        str(folder / "zoo"),
        "--store",
        str(store),
    ]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": python_path, "RAY_TMPDIR": str(folder / "r")}
    (folder / "r").mkdir()
    seconds = timed([*command, "--tokens.align", "weights"], folder, environment)
    return Result(seconds, folder_bytes(store), checkpoints)


def run_published(code: Path, folder: Path, checkpoints: int) -> Result:
    """Its preprocessing, in a scratch folder and with a Ray of its own."""
    shims, target = folder / "shims", folder / "published"
    write_empty_modules(shims)
    settings = {
        "dataset_target_path": str(target),
        "zoo_path": [str(folder / "zoo")],
        "epoch_list": EPOCHS,
        "map_to_canonical": True,
        "standardize": True,
        "ds_split": SPLIT,
        "max_samples": 10**6,
        "weight_threshold": 100,
        "property_keys": {"result_keys": ["test_acc", "training_iteration", "ggap"], "config_keys": ["model::type"]},
        "windowsize": 64,
        "supersample": 1,
        "precision": "32",
        "ignore_bn": True,
        "tokensize": 0,
        "permutation_number_train": VIEWS_TRAIN,
        "permutation_number_test": VIEWS_TEST,
    }
    job = {"config": settings, "splits": SPLITS, "temp": str(folder / "p"), "cores": os.cpu_count()}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "run_published.py").write_text(RUNNER)
    python_path = os.pathsep.join([str(code.absolute() / "src"), str(shims)])
    seconds = timed([sys.executable, "run_published.py", "job.json"], folder, {"PYTHONPATH": python_path})
    written = sum(len(list((target / f"dataset_torch.{split}").glob("sample_*.pt"))) for split in SPLITS)
    if written != checkpoints:
        raise SystemExit(f"the published code wrote {written} samples of {checkpoints} checkpoints: nothing to compare")
    return Result(seconds, folder_bytes(target), written)


def write_empty_modules(folder: Path) -> None:
    """Modules that the published code imports in vain, where they are not installed."""
    for name, source in EMPTY_MODULES.items():
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            path = folder.joinpath(*name.split("."), "__init__.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)


def timed(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> float:
    """Seconds that a process takes; its output is shown if it fails."""
    quiet = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **quiet, **environment}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return seconds


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(side: str, result: Result) -> None:
    rate, size = result.checkpoints / result.seconds, result.bytes / result.checkpoints
    print(f"{side:10}{result.seconds:8.1f} s {rate:10.2f} checkpoints/s {size / 1e3:12,.1f} kB/checkpoint", flush=True)


if __name__ == "__main__":
    main()
