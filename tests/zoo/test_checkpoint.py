import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sane_ray.errors import InputError
from sane_ray.zoo.checkpoint import load_state_dict, natural_order


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    keys = ["layer.2.weight", "layer.2.bias", "layer.10.weight"]
    return {key: torch.randn(5, 7, generator=generator) for key in keys}


def assert_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(loaded) == list(expected)
    for key, value in expected.items():
        assert torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype


@pytest.mark.parametrize("zip_format", [True, False])
def test_torch_files_keep_the_order_of_their_keys(tmp_path: Path, zip_format: bool):
    state_dict = dict(reversed(weights().items()))
    torch.save(state_dict, tmp_path / "checkpoints", _use_new_zipfile_serialization=zip_format)
    assert_same(load_state_dict(tmp_path / "checkpoints"), state_dict)


def test_safetensors_keys_come_in_natural_order(tmp_path: Path):
    save_file(weights() | {"layer.2.running_var": torch.ones(5)}, tmp_path / "model.safetensors")
    loaded = load_state_dict(tmp_path / "model.safetensors")
    assert list(loaded) == ["layer.2.weight", "layer.2.bias", "layer.2.running_var", "layer.10.weight"]
    assert torch.equal(loaded["layer.10.weight"], weights()["layer.10.weight"])


def test_natural_order_is_that_of_numbered_modules():
    entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [f"layers.{index}.{name}" for index in range(12) for name in entries]
    assert sorted(sorted(names), key=natural_order) == names
    mixed = ["weight", "block2.weight", "block10.weight", "block10.0.weight", "block10.0.gamma"]
    assert sorted(sorted(mixed), key=natural_order) == mixed


def test_published_checkpoint_in_published_order(parity: Path):
    keys = list(load_state_dict(parity / "cnn_a.safetensors"))
    assert keys == [f"module_list.{i}.{name}" for i in (0, 3, 6, 9, 11) for name in ("weight", "bias")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats_survive(tmp_path: Path, dtype: torch.dtype):
    state_dict = {"weight": torch.arange(6, dtype=dtype).reshape(2, 3)}
    torch.save(state_dict, tmp_path / "checkpoints")
    assert_same(load_state_dict(tmp_path / "checkpoints"), state_dict)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", "model_state"])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, key: str):
    wrapped = {f"module._orig_mod.{name}": value for name, value in weights().items()}
    torch.save({"epoch": 3, key: wrapped, "optimizer": {"lr": 0.1}}, tmp_path / "checkpoint.pt")
    assert_same(load_state_dict(tmp_path / "checkpoint.pt"), weights())


def test_a_prefix_that_not_every_key_has_belongs_to_the_model(tmp_path: Path):
    state_dict = {"module.weight": torch.ones(2, 2), "head.weight": torch.ones(2, 2)}
    torch.save(state_dict, tmp_path / "checkpoints")
    assert_same(load_state_dict(tmp_path / "checkpoints"), state_dict)


def test_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere.*no such checkpoint file; check the path"):
        load_state_dict(tmp_path / "nowhere")


def test_empty_file(tmp_path: Path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(InputError, match=r"checkpoints: the checkpoint file is empty; copy it again"):
        load_state_dict(tmp_path / "checkpoints")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.95])
def test_truncated_file(tmp_path: Path, kind: str, fraction: float):
    path = tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: truncated.*copy or download it again"):
        load_state_dict(path)


def test_a_file_of_something_else(tmp_path: Path):
    (tmp_path / "notes.pt").write_text("hello\n" * 100)
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        load_state_dict(tmp_path / "notes.pt")


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path, zip_format: bool):
    mark, path = tmp_path / "ran", tmp_path / "checkpoints"
    torch.save({"weight": torch.ones(2), "x": Malicious(mark)}, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(InputError, match=r"needs Python code.*posix\.system.*save model\.state_dict\(\) alone"):
        load_state_dict(path)
    assert not mark.exists()


def test_a_plain_pickle_does_not_run(tmp_path: Path):
    mark, path = tmp_path / "ran", tmp_path / "checkpoints.pkl"
    path.write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    with pytest.raises(InputError, match="needs Python code"):
        load_state_dict(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(torch.ones(3), "holds a Tensor, not a state dict"), ({"epoch": 3}, "no tensors in it"), ({}, "no tensors in it")],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: object, message: str):
    torch.save(content, tmp_path / "checkpoints")
    with pytest.raises(InputError, match=message):
        load_state_dict(tmp_path / "checkpoints")
