"""Networks in formats that are not read are refused by name, with a way out that works."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from sane_ray.errors import InputError
from sane_ray.zoo import foreign
from sane_ray.zoo.archives import is_archive
from sane_ray.zoo.catalog import discover, unclaimed
from sane_ray.zoo.checkpoint import load_state_dict, open_checkpoint
from sane_ray.zoo.sources import Source, read, to_fetch


class Network(nn.Module):
    """More tensors than the first names of its archive show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies all."""
        return self.layers(x)


def save_script(network: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.trace(network, torch.ones(1, 2)), path)


def save_exported(network: nn.Module, path: Path) -> None:
    with path.open("wb") as file:  # whatever its name
        torch.export.save(torch.export.export(network, (torch.ones(1, 2),)), file)


PROGRAMS = [(save_script, "is a TorchScript archive"), (save_exported, "is an exported program")]


@pytest.mark.parametrize(("save", "words"), PROGRAMS)
@pytest.mark.parametrize("name", ["net.jit", "net.pt", "net.pt2", "net", "net.zip"])
def test_a_program_is_refused_and_never_unpacked(tmp_path: Path, save, words: str, name: str):
    save(Network(), tmp_path / name)
    source = Source(tmp_path / name)
    assert not is_archive(tmp_path / name) and to_fetch(source) == ""
    with pytest.raises(InputError, match=rf"{re.escape(name)}: {words}.*, which is not read: it is a program"):
        read(source, tmp_path / "storage")
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(("save", "words"), PROGRAMS)
def test_a_program_in_a_folder_is_refused_when_it_is_opened(tmp_path: Path, save, words: str):
    save(Network(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=rf"net\.pt: {words}"):
        open_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("save", [save_script, save_exported])
def test_the_recipe_gives_the_weights(tmp_path: Path, save):
    network, path = Network(), tmp_path / "my net.jit"
    save(network, path)
    found = foreign.of_file(path)
    assert found is not None
    program, *arguments = shlex.split(found.remedy_for(path).partition(": ")[2])
    assert program.endswith("python")
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    weights = load_state_dict(tmp_path / "my net.safetensors")
    assert list(weights) == list(network.state_dict())
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())


def test_names_in_a_recipe_are_quoted(tmp_path: Path):
    path = tmp_path / "$(touch x)`y`'\".jit"
    words = shlex.split(foreign.TORCHSCRIPT.remedy_for(path))
    assert words[-2:] == [str(path), str(path.with_suffix(".safetensors"))]
    assert shlex.quote(str(path)) in foreign.TORCHSCRIPT.remedy_for(path)


@pytest.mark.parametrize("suffix", [".onnx", ".ONNX", ".keras", ".h5", ".gguf", ".tflite", ".msgpack"])
def test_a_file_of_another_format_is_refused_by_its_name(tmp_path: Path, suffix: str):
    (tmp_path / f"net{suffix}").write_bytes(b"\x08\x07\x12\x07pytorch")
    with pytest.raises(InputError, match=rf"net{suffix}: is an? .*, which is not read: .*safetensors"):
        read(Source(tmp_path / f"net{suffix}"), tmp_path / "storage")


def test_a_folder_of_nothing_else_says_what_is_there(tmp_path: Path):
    (tmp_path / "net.onnx").write_bytes(b"\x08\x07")
    (tmp_path / "other.jit").write_bytes(b"\x08\x07")
    with pytest.raises(InputError, match=r"holds no checkpoints, but files.*net\.onnx: is an ONNX.*other\.jit: is a T"):
        discover(tmp_path)


def test_files_beside_a_zoo_are_among_those_not_read(tmp_path: Path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pt")
    for name in ("net.onnx", "net.jit", "net.txt"):
        (tmp_path / name).write_bytes(b"\x08\x07")
    assert unclaimed(tmp_path, discover(tmp_path)) == ["net.jit", "net.onnx"]


def test_other_zip_files_are_archives_still(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "zoo.zip", "w") as archive:
        for name in ("zoo/a/code/train.py", "zoo/a/net.pt", "zoo/constants.pkl", "zoo/archive_format"):
            archive.writestr(name, "")
    assert is_archive(tmp_path / "zoo.zip") and foreign.of_file(tmp_path / "zoo.zip") is None


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("net_2.safetensors", r"net_2\.safetensors does not exist \(beside it: net_1\.safetensors\): name"),
        ("net_1.pt", r"net_1\.pt does not exist \(beside it: net_1\.safetensors\): name"),
        ("zz.pt", r"zz\.pt does not exist: name"),
        ("no/such/net.pt", r"net\.pt does not exist, nor does .*no/such \(only .*\): name"),
    ],
)
def test_a_missing_file_is_told_with_what_lies_beside_it(tmp_path: Path, named: str, words: str):
    (tmp_path / "net_1.safetensors").touch()
    (tmp_path / ".net_2.safetensors").touch()
    with pytest.raises(InputError, match=words):
        discover(tmp_path / named)
