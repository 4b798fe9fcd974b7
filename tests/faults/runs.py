"""Pretraining runs as users start them, on a cluster of our own, and what they leave in their folders."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cluster import ROOT, Cluster, command_of, wait_until
from safetensors.torch import load_file

from sane_ray.config import TokensConfig, ZooConfig
from sane_ray.pretraining.history import read_history
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.builder import plan_zoo
from sane_ray.zoo.catalog import discover

SETTINGS = {
    "autoencoder.window": "26",
    "autoencoder.d_model": "192",
    "autoencoder.heads": "3",
    "autoencoder.layers": "3",
    "autoencoder.latent_dim": "16",
    "pretraining.epochs": "6",
    "pretraining.batch_size": "8",
    "pretraining.learning_rate": "1e-3",
    "pretraining.precision": "float32",
    "pretraining.log_every": "2",
    "pretraining.validate_every": "2",
    "pretraining.checkpoint_every": "0.4",
    "cluster.num_workers": "2",
    "cluster.max_failures": "5",
}
"""Of every run: 84 steps of about a tenth of a second, 14 an epoch, and a checkpoint every 6, so that faults hit
mid-epoch."""

STEPS = 84


def write_small_store(folder: Path) -> Path:
    """A token store of 24 untrained networks, 18 of them to train on."""
    for number, (name, params) in enumerate(plan_zoo(ZooConfig(models=24)).models.items()):
        for epoch in (0, 1):
            checkpoint = folder / "zoo" / name / f"checkpoint_{epoch:06d}" / "checkpoints"
            checkpoint.parent.mkdir(parents=True)
            torch.save(from_params(params | {"seed": 100 * number + epoch}).state_dict(), checkpoint)
        (folder / "zoo" / name / "params.json").write_text(json.dumps(params))
        lines = [json.dumps({"training_iteration": epoch, "test_acc": 0.1}) for epoch in (0, 1)]
        (folder / "zoo" / name / "result.json").write_text("\n".join(lines) + "\n")
    split = folder / "split.csv"
    names = sorted(path.name for path in (folder / "zoo").iterdir())
    rows = [f"{name},{'train' if number < 18 else 'val'}" for number, name in enumerate(names)]
    split.write_text("\n".join(["model,split", *rows]) + "\n")
    config = TokensConfig(split_file=str(split))
    return write_store(discover(folder / "zoo"), folder / "store", config, source=folder / "zoo").path


class Run:
    """One run of `jobs/pretrain.py`, started any number of times by the same command."""

    def __init__(self, cluster: Cluster, store: Path, storage: Path, name: str, **settings: str) -> None:
        """Starts nothing yet; ``settings`` are config fields with ``__`` for their dots."""
        self.cluster = cluster
        self.folder = storage / "runs" / name
        self.log = storage / f"{name}.log"
        flags = {"store": str(store), "storage": str(storage), "run_name": name} | SETTINGS
        flags |= {key.replace("__", "."): value for key, value in settings.items()}
        self.command = [sys.executable, str(ROOT / "jobs" / "pretrain.py")]
        self.command += [part for key, value in flags.items() for part in (f"--{key}", value)]
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> Run:
        """Starts the driver."""
        self.driver = self.cluster.start(*self.command, log=self.log, environment=environment)
        return self

    def finish(self) -> Run:
        """Waits for its end, which must be a good one."""
        assert self.driver is not None
        self.wait_for(lambda: self.driver.poll() is not None)
        assert self.driver.returncode == 0, self.told()
        return self

    def kill(self) -> None:
        """Kills the driver as the kernel would, and waits until Ray has ended what it had started."""
        assert self.driver is not None
        os.kill(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        wait_until(lambda: not self.workers())

    def told(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], alive: bool = False) -> None:
        """Waits; with ``alive``, the driver must not have ended meanwhile."""

        def holds() -> object:
            assert not alive or self.driver.poll() is None, self.told()
            return condition()

        try:
            wait_until(holds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def workers(self) -> list[int]:
        """Training workers on all nodes: at most one run trains at a time."""
        return [pid for node in self.cluster.nodes for pid in training_workers(node.pids)]

    def wait_for_step(self, step: int) -> None:
        """Waits until the history knows this step."""
        self.wait_for(lambda: any(point["step"] >= step for point in read_history(self.folder / "history.jsonl")), True)

    def wait_for_checkpoints(self, count: int = 1, **content: int) -> None:
        """Waits for so many complete checkpoints with this in their manifests, among those kept."""
        self.wait_for(lambda: len(self.checkpoints(**content)) >= count, True)

    def checkpoints(self, **content: int) -> list[Path]:
        """Complete checkpoints with this in their manifests, oldest first."""
        found = []
        for path in sorted(self.folder.glob("checkpoints/step_*/complete.json")):
            try:
                manifest = json.loads(path.read_text())
            except FileNotFoundError:  # removed meanwhile
                continue
            if content.items() <= manifest.items():
                found.append(path.parent)
        return found

    def last_checkpoint(self) -> int:
        """Step of the newest complete checkpoint."""
        return int(self.checkpoints()[-1].name.split("_")[1])

    def curve(self) -> dict[int, dict[str, float]]:
        """Losses of every step, in training and validation."""
        points = read_history(self.folder / "history.jsonl")
        return {
            int(point["step"]): {name: value for name, value in point.items() if name.startswith(("train/", "val/"))}
            for point in points
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the finished model."""
        return load_file(self.folder / "model" / "model.safetensors")

    def restarts(self) -> int:
        """How often training went on from a checkpoint: the history then goes back to what that knew of it."""
        return sum(after["step"] <= before["step"] for before, after in itertools.pairwise(self._lines()))

    def computed(self, step: int) -> int:
        """How often a step was computed, and not only told again."""
        return len({line["time"] for line in self._lines() if line["step"] == step})

    def _lines(self) -> list[dict[str, float]]:
        path = self.folder / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def training_workers(pids: list[int]) -> list[int]:
    """Those of these processes that are Ray Train's workers."""
    return [pid for pid in pids if command_of(pid).startswith("ray::RayTrainWorker")]


def assert_same(run: Run, calm: Run) -> None:
    """Every step's losses and the model's weights are equal, bit for bit."""
    curve, expected = run.curve(), calm.curve()
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert curve == expected
    weights, wanted = run.weights(), calm.weights()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def assert_close(run: Run, calm: Run) -> None:
    """As `assert_same`, but for the order in which numbers are added up, which the number of workers decides.

    Three elastic runs of float32 differed from the calm one by 3e-8 of the loss at first and 5e-6 at most, by 4e-5 of
    its contrastive part, and by 1.2e-4 of the gradient's norm, which magnifies differences most.
    """
    curve, expected = run.curve(), calm.curve()
    assert sorted(curve) == list(range(1, STEPS + 1))
    for step, point in expected.items():
        losses, norm = dict(curve[step]), "train/gradient_norm"
        assert losses.pop(norm) == pytest.approx(point[norm], rel=1e-3), step
        assert losses == pytest.approx(
            {name: value for name, value in point.items() if name != norm}, rel=1e-4, abs=1e-6
        )
    weights, expected_weights = run.weights(), calm.weights()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
