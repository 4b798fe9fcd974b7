"""Small zoos in the published layout, of random weights, and one token store of them that tests only read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sane_ray.config import TokensConfig
from sane_ray.tokens.store import TokenStore, inputs
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover

SHAPES = {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "norm.bias": (4,)}
SHAPES |= {"norm.running_mean": (4,), "norm.running_var": (4,), "norm.num_batches_tracked": ()}
SHAPES |= {"head.weight": (3, 16), "head.bias": (3,)}


class Zoo:
    """Writes a zoo and prepares stores of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def weights(self, seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(seed)
        values = {
            key: torch.from_numpy(rng.normal(0.1, 0.5, shape).astype(np.float32)) for key, shape in shapes.items()
        }
        if "norm.num_batches_tracked" in values:
            values["norm.num_batches_tracked"] = torch.tensor(seed)
        return values

    def add(self, model: str, epoch: int, weights: dict[str, torch.Tensor]) -> Path:
        """Adds a checkpoint, with its line of results and its model's settings."""
        path = self.path / model / f"checkpoint_{epoch:06d}" / "checkpoints"
        path.parent.mkdir(parents=True)
        torch.save(weights, path)
        line = {"training_iteration": epoch, "train_acc": 0.5, "test_acc": 0.25 + epoch / 100}
        with (self.path / model / "result.json").open("a") as file:
            file.write(json.dumps(line) + "\n")
        (self.path / model / "params.json").write_text(json.dumps({"model::type": "CNN", "seed": len(model)}))
        return path

    def fill(self, models: int, epochs: int = 2) -> "Zoo":
        for model in range(models):
            for epoch in range(epochs):
                self.add(f"model_{model:02d}", epoch, self.weights(100 * model + epoch))
        return self

    def prepare(self, store: str | Path, **config: object) -> TokenStore:
        """Writes a store beside the zoo (or at an absolute path)."""
        destination = self.path.parent / store
        return write_store(discover(self.path), destination, TokensConfig(**config), source=self.path)


@pytest.fixture
def new_zoo(tmp_path: Path) -> Callable[..., Zoo]:
    """Makes zoos in the test's own folder."""
    return lambda models=0, epochs=2, name="zoo": Zoo(tmp_path / name).fill(models, epochs)


@pytest.fixture(scope="session")
def shared_zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Ten models of two epochs. Do not change it."""
    return Zoo(tmp_path_factory.mktemp("shared") / "zoo").fill(10)


@pytest.fixture(scope="session")
def shared_store(ray_session: object, shared_zoo: Zoo) -> TokenStore:
    """A store of ``shared_zoo`` with several row groups and files, written on Ray. Do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "SMALL_CHECKPOINTS", 0)
        return shared_zoo.prepare("store", row_group_mb=0.003, file_mb=0.006)


@pytest.fixture(params=["here", "on Ray"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test twice: its stores are written in this process, and on Ray."""
    if request.param == "on Ray":
        request.getfixturevalue("ray_session")
        monkeypatch.setattr(inputs, "SMALL_CHECKPOINTS", 0)
