import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sane_ray.errors import InputError
from sane_ray.zoo.sources import Source, check_one_source, name_of, read, to_fetch


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        save_file({"weight": torch.ones(2, 3)}, tmp_path / "zoo" / name / "model.safetensors")
    return tmp_path / "zoo"


def test_a_folder_is_read_where_it_is(zoo: Path, tmp_path: Path):
    found = read(Source(zoo), tmp_path / "storage")
    assert [record.model for record in found.records] == ["a", "b"] and found.root == found.path == zoo
    torch.save({"weight": torch.ones(2, 3)}, zoo / "loose.pt")
    assert found.unread() == ["loose.pt"]
    assert to_fetch(Source(zoo)) == "" and not (tmp_path / "storage").exists()


def test_a_file_is_told_relative_to_its_folder(zoo: Path, tmp_path: Path):
    found = read(Source(zoo / "a" / "model.safetensors"), tmp_path)
    assert len(found.records) == 1 and found.root == zoo / "a" and found.unread() == []


def test_an_archive_is_unpacked_once_under_the_storage(zoo: Path, tmp_path: Path):
    archive = tmp_path / "models.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(zoo, "models")
    assert to_fetch(Source(archive)) == f"would unpack {archive}"
    found = read(Source(archive), tmp_path / "storage")
    records = found.records
    assert [record.model for record in records] == ["a", "b"]  # as in the folder that was packed
    assert found.root.is_relative_to(tmp_path / "storage" / "zoos")
    times = [Path(record.path).stat().st_mtime_ns for record in records]
    again = read(Source(archive), tmp_path / "storage").records
    assert again == records and times == [Path(record.path).stat().st_mtime_ns for record in again]


def test_a_checkpoint_that_is_a_zip_file_is_not_unpacked(tmp_path: Path):
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "model.pt")
    assert zipfile.is_zipfile(tmp_path / "model.pt") and to_fetch(Source(tmp_path / "model.pt")) == ""
    records = read(Source(tmp_path / "model.pt"), tmp_path / "storage").records
    assert [record.reader for record in records] == ["files"]


def test_a_downloaded_zoo_lends_its_licence_to_models_that_name_none(zoo: Path, tmp_path: Path):
    (zoo / ".download.json").write_text(json.dumps({"license": "CC-BY-4.0"}))
    (zoo / "b" / "config.json").write_text("{}")
    (zoo / "b" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert [record.license for record in read(Source(zoo), tmp_path).records] == ["CC-BY-4.0", "mit"]


def test_properties_are_joined(zoo: Path, tmp_path: Path):
    (tmp_path / "table.csv").write_text("path,accuracy\na/model.safetensors,0.5\nb/model.safetensors,0.75\n")
    records = read(Source(zoo, properties=str(tmp_path / "table.csv")), tmp_path).records
    assert [record.properties["accuracy"] for record in records] == [0.5, 0.75]


def test_what_would_be_fetched_is_told(tmp_path: Path):
    assert to_fetch(Source(tmp_path, hub="org/name")).startswith("would download the weights of org/name")
    text = to_fetch(Source(tmp_path / "cifar10-cnn-sample", zoo="cifar10-cnn-sample"))
    assert "would download cifar10-cnn-sample" in text and str(tmp_path) in text
    with pytest.raises(InputError, match="cifar10-cnn-sample"):
        to_fetch(Source(tmp_path / "cifar10-cn-sample", zoo="cifar10-cn-sample"))


def test_only_one_place_may_be_named():
    check_one_source("", "org/name", "")
    with pytest.raises(
        InputError, match="--source zoo and --zoo mnist-cnn name different checkpoints: give one of them"
    ):
        check_one_source("zoo", "", "mnist-cnn")


def test_a_repository_gives_a_folder_name():
    assert name_of("org/name@v1.0") == "org--name"
