"""In which order the tensors of a safetensors file come, where the library wrote it and where others did."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sane_ray.zoo.checkpoint import SafetensorsCheckpoint, load_state_dict, open_checkpoint
from sane_ray.zoo.key_order import natural_order

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}


def write_in_order(tensors: Mapping[str, Tensor], path: Path, header_order: Sequence[str] | None = None) -> None:
    """A safetensors file whose values lie in the order of the mapping, as some writers other than the library do."""
    entries, values = {}, b""
    for key, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        offsets = [len(values), len(values) + len(raw)]
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        values += raw
    header = json.dumps({key: entries[key] for key in header_order or entries}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)


def named_network() -> dict[str, Tensor]:
    """Modules in an order that no names tell."""
    modules = {"stem": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2), "body": nn.Linear(2, 2), "a_head": nn.Linear(2, 1)}
    torch.manual_seed(0)
    network = nn.Sequential()
    for name, module in modules.items():
        network.add_module(name, module)
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_what_another_writer_laid_down_keeps_its_order(tmp_path: Path):
    network = named_network()
    write_in_order(network, tmp_path / "model.safetensors", header_order=sorted(network))
    loaded = load_state_dict(tmp_path / "model.safetensors")
    assert list(loaded) == list(network)
    assert all(torch.equal(loaded[key], network[key]) for key in network)


def test_what_the_library_sorted_comes_by_name_with_numbers_as_numbers(tmp_path: Path):
    layers = {
        f"layers.{index}": nn.Linear(2, 2, dtype=[torch.float32, torch.float16][index % 2]) for index in range(12)
    }
    network = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    network |= {f"scales.{index}": torch.ones(1) for index in range(12)}  # a ParameterList
    network |= {"table.steps": torch.ones(3, dtype=torch.int64)}
    save_file(network, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path / "model.safetensors").meta) == list(network)


def test_a_file_sorted_by_name_alone_comes_by_name_too(tmp_path: Path):
    network = {
        f"layers.{index}.weight": torch.ones(1, dtype=[torch.float32, torch.int64][index % 2]) for index in range(12)
    }
    write_in_order({key: network[key] for key in sorted(network)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path / "model.safetensors").meta) == list(network)


@pytest.mark.parametrize(
    "scattered",
    [
        ["layers.0.weight", "layers.2.bias", "layers.0.bias", "layers.2.weight"],  # modules torn apart
        ["layers.2.weight", "layers.2.bias", "layers.0.weight", "layers.0.bias"],  # a list that descends
    ],
)
def test_an_order_that_no_state_dict_has_says_nothing(tmp_path: Path, scattered: list[str]):
    write_in_order({key: torch.ones(2) for key in scattered}, tmp_path / "model.safetensors")
    keys = ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    assert list(open_checkpoint(tmp_path / "model.safetensors").meta) == keys


def test_tensors_without_values_do_not_hide_an_order(tmp_path: Path):
    network = {"z.weight": torch.ones(2), "z.none": torch.ones(0), "a.none": torch.ones(0), "a.weight": torch.ones(2)}
    write_in_order(network, tmp_path / "model.safetensors")
    modules = [key.partition(".")[0] for key in open_checkpoint(tmp_path / "model.safetensors").meta]
    assert modules.index("z") < modules.index("a")


def test_shards_keep_the_order_of_their_writer(tmp_path: Path):
    network = named_network()
    keys = list(network)
    files = {key: tmp_path / f"model-0000{1 + (place > 3)}-of-00002.safetensors" for place, key in enumerate(keys)}
    for file in set(files.values()):
        write_in_order({key: network[key] for key in keys if files[key] == file}, file)
    assert list(SafetensorsCheckpoint(tmp_path / "index.json", {key: files[key] for key in sorted(keys)}).meta) == keys
    for file in set(files.values()):
        save_file({key: network[key] for key in keys if files[key] == file}, file)
    meta = SafetensorsCheckpoint(tmp_path / "index.json", files).meta
    assert list(meta) == sorted(keys, key=natural_order)


def test_natural_order_is_that_of_numbered_modules():
    entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [f"layers.{index}.{name}" for index in range(12) for name in entries]
    assert sorted(sorted(names), key=natural_order) == names
    mixed = ["weight", "block2.weight", "block10.weight", "block10.0.weight", "block10.0.gamma"]
    assert sorted(sorted(mixed), key=natural_order) == mixed
    flat = [f"w{index}" for index in range(12)]
    assert sorted(sorted(flat), key=natural_order) == flat
