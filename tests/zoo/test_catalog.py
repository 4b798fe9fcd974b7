from pathlib import Path

import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.zoo.catalog import discover


def add(root: Path, model: str, epoch: int) -> None:
    folder = root / model / f"checkpoint_{epoch:06d}"
    folder.mkdir(parents=True)
    torch.save({"weight": torch.ones(2, 2)}, folder / "checkpoints")


def test_order_is_by_model_and_epoch_whatever_came_first(tmp_path: Path):
    for model, epoch in [("b", 10), ("b", 2), ("a", 0), ("c", 1), ("b", 0)]:
        add(tmp_path, model, epoch)
    records = discover(tmp_path)
    assert [record.id for record in records] == ["a/0", "b/0", "b/2", "b/10", "c/1"]
    assert [(record.model, record.epoch) for record in records] == [("a", 0), ("b", 0), ("b", 2), ("b", 10), ("c", 1)]
    assert all(Path(record.path).is_absolute() and Path(record.path).is_file() for record in records)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(InputError, match=r"--source .*zoo does not exist.*build_zoo"):
        discover(tmp_path / "zoo")


def test_file_instead_of_folder(tmp_path: Path):
    (tmp_path / "zoo.zip").touch()
    with pytest.raises(InputError, match=r"zoo\.zip is a file, not a folder"):
        discover(tmp_path / "zoo.zip")


def test_empty_zoo_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no checkpoints: looked for model folders with checkpoint_<epoch>"):
        discover(tmp_path)


def test_folders_without_any_weights_are_an_empty_zoo(tmp_path: Path):
    (tmp_path / "model" / "checkpoint_000001").mkdir(parents=True)
    (tmp_path / "model" / "params.json").write_text("{}")
    with pytest.raises(InputError, match="holds no checkpoints"):
        discover(tmp_path)
