import argparse
import datetime
import io
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from sane_ray.errors import InputError
from sane_ray.zoo import checkpoint
from sane_ray.zoo.checkpoint import (
    LoadedCheckpoint,
    SafetensorsCheckpoint,
    StoredCheckpoint,
    find_state_dict,
    load_state_dict,
    open_checkpoint,
)


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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.ckpt", "model.pt.tar"])
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 0", "protocol 4"])
@pytest.mark.parametrize("place", ["state dict", "beside", "deep", "whole"])
def test_no_name_or_place_makes_code_run(tmp_path: Path, name: str, form: str, place: str):
    mark, path = tmp_path / "ran", tmp_path / name
    evil = Malicious(mark)
    content = {
        "state dict": {"state_dict": {"weight": torch.ones(2), "evil": evil}},
        "beside": {"state_dict": {"weight": torch.ones(2)}, "args": evil},
        "deep": {"net": {"weight": torch.ones(2)}, "a": {"b": [OrderedDict(c=(evil,))]}},
        "whole": evil,
    }[place]
    if form.startswith("protocol"):
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match=re.escape(str(path))):
        open_checkpoint(path)
    assert not mark.exists()


class Reducing:
    def __init__(self, function: object, *args: object) -> None:
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def test_a_stand_in_does_not_call_what_it_is_given(tmp_path: Path):
    mark, path = tmp_path / "ran", tmp_path / "checkpoints"
    torch.save({"weight": torch.ones(2), "x": Reducing(argparse.Namespace, Malicious(mark))}, path)
    with pytest.raises(InputError, match="needs Python code"):
        open_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("zip_format", [True, False])
def test_harmless_things_beside_the_weights_do_not_matter(tmp_path: Path, zip_format: bool):
    beside = {
        "best": np.float64(0.5),
        "epoch": np.int64(3),
        "history": np.arange(4.0),
        "objects": np.array([{"a": 1}, None], dtype=object),
        "args": argparse.Namespace(lr=0.1, output=Path("there"), betas=(0.9, 0.99)),
        "day": datetime.datetime(2020, 1, 2),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save({"net": weights(), **beside}, path, _use_new_zipfile_serialization=zip_format)
    assert_same(load_state_dict(path), weights())


def test_what_is_allowed_here_is_not_allowed_elsewhere(tmp_path: Path):
    torch.save({"net": weights(), "best": np.float64(0.5)}, tmp_path / "model.pt")
    load_state_dict(tmp_path / "model.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "model.pt", weights_only=True)


@pytest.mark.parametrize("content", [{"weight": np.ones(3)}, {"weight": np.ones(3), "bias": torch.ones(3)}, np.ones(3)])
def test_numpy_arrays_in_the_place_of_weights_are_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: .*numpy array"):
        open_checkpoint(tmp_path / "model.pt")


# --- Where the weights are in a file


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "net": weights(), "optimizer": OPTIMIZER},
        {"epoch": 3, "net": weights(), "adam": OPTIMIZER},
        {"optim_state": {"exp_avg": torch.zeros(1000)}, "a": {"b": {"c": weights()}}, "loss": torch.tensor(0.5)},
        {"ema": {**weights(), "decay": torch.ones(1)}, "net": weights(), "rng_state": torch.zeros(5000)},
        {"network": weights(), "state_dict": {"nothing": 3}, "model": "resnet"},
        {"model": {"state_dict": weights(), "name": "resnet"}, "larger": {"x": torch.zeros(10000)}},
        {"ema": weights()},
        {"net": weights(), "generator": torch.Generator().get_state()},
        {"epoch": 1} | weights(),
        {"net": weights(), "class_weights": torch.ones(10), "history": {"loss": torch.ones(100)}},
        {"net": weights(), "fixed_noise": torch.ones(64, 100), "metrics": {"train.loss": torch.tensor(0.5)}},
        {"loss": torch.tensor(0.5), "ema": weights()},
        {"best_model": {"old": torch.ones(3)}, "ema_net": weights()},
        OrderedDict((key, torch.nn.Parameter(value)) for key, value in weights().items()),
    ],
)
def test_the_weights_are_found_wherever_they_are(tmp_path: Path, content: dict):
    torch.save(content, tmp_path / "model.pt")
    assert_same(load_state_dict(tmp_path / "model.pt"), weights())


def test_a_mapping_that_holds_itself_ends():
    loop: dict = {"weight": torch.ones(2)}
    loop["a"] = loop["model"] = {"b": loop, "model": loop}
    assert find_state_dict(loop) is loop
    empty: dict = {}
    empty["state_dict"] = empty
    assert find_state_dict(empty) is None


def test_many_references_to_one_mapping_are_one():
    content: dict = {"weight": torch.ones(2)}
    for _ in range(7):
        content = {str(number): content for number in range(20)}
    found = find_state_dict(content)
    assert found is not None and torch.equal(found["weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"encoder": {"0.weight": 1, "0.bias": 2}, "decoder": {"0.weight": 3}, "epoch": 9}, "{0}.0.weight {0}.0.bias"),
        ({"model": {"encoder": {"0.weight": 1, "0.bias": 2}, "decoder": {"0.weight": 3}}}, "{0}.0.weight {0}.0.bias"),
        ({"nets": {"encoder": {"state_dict": {"a": 1, "b": 2}}, "decoder": {"model": {"0.weight": 3}}}}, "{0}.a {0}.b"),
        (
            {"encoder": {"module.0.weight": 1, "module.c": 2}, "decoder": {"_orig_mod.0.weight": 3}},
            "{0}.0.weight {0}.c",
        ),
        ({"0.weight": 1, "0.bias": 2, "decoder": {"0.weight": 3}}, "0.weight 0.bias"),
        ({"weight": 1, "bias": 2, "decoder": {"0.weight": 3}}, "weight bias"),
        ({"decoder": {"0.weight": 3}, "encoder": {"w": 1, "v": 2}, "decoder_ema": {"0.weight": 5}}, "{0}.w {0}.v"),
    ],
)
def test_state_dicts_side_by_side_are_one(tmp_path: Path, content: dict, keys: str):
    def tensors(value: object) -> object:
        return {key: tensors(each) for key, each in value.items()} if isinstance(value, dict) else torch.ones(2, value)

    content = {key: each if key == "epoch" else tensors(each) for key, each in content.items()}
    torch.save(content | {"optimizer": OPTIMIZER, "scaler": {"scale": torch.ones(3, 3)}}, tmp_path / "model.pt")
    loaded = load_state_dict(tmp_path / "model.pt")
    names = [*keys.format("encoder").split(), "decoder.0.weight"]
    assert {key: value.shape[1] for key, value in loaded.items()} == dict(zip(names, (1, 2, 3), strict=True))


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        ({"first": weights(), "first_ema": weights()}, "first_ema"),
        ({"model": weights(), "second": weights(), "second_state": {"loss": torch.ones(3)}}, "second"),
        ({"model": weights(), "third.weight": torch.ones(3)}, "third.weight"),
        ({"ema": weights(), "teacher_four": {"net": {"weight": torch.ones(2)}}}, "teacher_four"),
        ({"net": {"0.weight": torch.ones(3), "five": {"state_dict": weights()}}, "best_five": weights()}, "best_five"),
        ({"a": {"b.weight": torch.ones(3)}, "a.b": {"weight": torch.ones(3)}, "six_ema": weights()}, "six_ema, a.b"),
    ],
)
def test_weights_that_are_left_out_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict, left_out: str
):
    torch.save(content | {"optimizer": OPTIMIZER}, tmp_path / "model.pt")
    for _ in range(2):
        load_state_dict(tmp_path / "model.pt")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'model.pt'}: more than one set of weights: {left_out} is not read"
    ]


def test_nothing_is_said_of_files_with_one_set_of_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    beside = {"optimizer": OPTIMIZER, "loss": torch.tensor(0.5), "callbacks": {"best": {"score": torch.tensor(1.0)}}}
    for wrapper in ("state_dict", "net"):
        torch.save({wrapper: weights(), **beside}, tmp_path / "model.pt")
        load_state_dict(tmp_path / "model.pt")
    assert not caplog.records


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_prefixes_are_undone(tmp_path: Path, prefix: str, kind: str):
    content = {prefix + key: value for key, value in weights().items()}
    torch.save(content, tmp_path / "model") if kind == "torch" else save_file(content, tmp_path / "model")
    assert_same(load_state_dict(tmp_path / "model"), weights())


@pytest.mark.parametrize("of_lightning", [True, False])
def test_the_prefix_of_lightning_is_undone_in_its_own_files_only(tmp_path: Path, of_lightning: bool):
    content = {"state_dict": {f"model.{key}": value for key, value in weights().items()}}
    if of_lightning:
        content["pytorch-lightning_version"] = "2.4.0"
    torch.save(content, tmp_path / "model.ckpt")
    assert list(load_state_dict(tmp_path / "model.ckpt")) == [
        key if of_lightning else f"model.{key}" for key in weights()
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor, not a state dict"),
        ([torch.ones(3)], "holds a list, not a state dict"),
        ({"params": [torch.ones(3), torch.ones(2)]}, "tensors without names, in a list under 'params'"),
        ({0: torch.ones(3)}, "keys that are no names"),
        ({"optimizer": OPTIMIZER}, "no tensors in it"),
        ({"epoch": 3}, "no tensors in it"),
        ({}, "no tensors in it"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: object, message: str):
    torch.save(content, tmp_path / "checkpoints")
    with pytest.raises(InputError, match=message):
        load_state_dict(tmp_path / "checkpoints")


# --- Reading slice by slice


DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool, torch.complex64),
]
NOT_IN_LEGACY = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)  # torch saves these, but cannot load them


def store(state_dict: dict[str, torch.Tensor], path: Path, form: str) -> None:
    if form == "safetensors":
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, dtype) for form in ("safetensors", "zip") for dtype in DTYPES),
        *(("legacy", dtype) for dtype in DTYPES if dtype not in NOT_IN_LEGACY),
    ],
)
def test_slices_of_every_number_format_are_as_stored(tmp_path: Path, form: str, dtype: torch.dtype):
    tensors = {key: (value * 50).to(torch.float32).to(dtype) for key, value in weights().items()}
    path = tmp_path / "model"
    store(tensors, path, form)
    opened = open_checkpoint(path)
    for key, value in tensors.items():
        meta = opened.meta[key]
        assert (meta.shape, meta.dtype, meta.device.type) == (value.shape, dtype, "meta")
        for start, stop in [(0, None), (0, 0), (3, 4), (3, 17), (30, 100), (35, 35), (20, 10)]:
            part = opened.read(key, start, stop)
            expected = value.flatten()[start : None if stop is None else max(start, stop)]
            assert part.dtype == dtype and part.shape == expected.shape
            assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_zero_size_and_zero_dimensional_tensors(tmp_path: Path, form: str):
    tensors = {"a": torch.zeros(0, 3), "b": torch.tensor(2.5), "c": torch.zeros(4, 0), "d": torch.arange(3)}
    store(tensors, tmp_path / "model", form)
    opened = open_checkpoint(tmp_path / "model")
    assert_same(opened.state_dict(), tensors)
    assert all(opened.tensor(key).shape == value.shape for key, value in tensors.items())
    assert opened.read("a").shape == (0,) and opened.read("b").tolist() == [2.5]


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_keys_of_any_length_and_script(tmp_path: Path, form: str):
    keys = ["x" * 300 + ".weight", "Schicht.ä²③.weight", "层.0.权重", "a b/../c\\d.weight", "9" * 5000, "", "."]
    tensors = {key: torch.full((2,), float(index)) for index, key in enumerate(keys)}
    store(tensors, tmp_path / "model", form)
    loaded = load_state_dict(tmp_path / "model")
    assert set(loaded) == set(keys) and all(torch.equal(loaded[key], tensors[key]) for key in keys)


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(60.0).reshape(3, 4, 5)
    return {
        "whole": base,
        "shared": base,
        "part": base[1:],
        "transposed": base.permute(2, 0, 1),
        "last swapped": base.transpose(1, 2),
        "strided": base[:, ::2, 1::2],
        "expanded": torch.arange(3.0)[:, None].expand(3, 4),
        "one": base[2, 3, 4],
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "memory"])
def test_shared_and_non_contiguous_tensors(tmp_path: Path, form: str):
    if form == "memory":
        opened = LoadedCheckpoint("here", views())
    else:
        store(views(), tmp_path / "model", form)
        opened = open_checkpoint(tmp_path / "model")
    assert_same(opened.state_dict(), views())
    for key, value in views().items():
        assert opened.meta[key].is_contiguous()
        for start in range(value.numel()):
            for stop in range(start, value.numel() + 1, 7):
                assert torch.equal(opened.read(key, start, stop), value.flatten()[start:stop])


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_small_tensor_that_is_expanded_is_read(tmp_path: Path, form: str):
    store(
        {"weight": torch.ones(1, 1).expand(900, 900), "bias": torch.tensor(2.0).expand(512)}, tmp_path / "model", form
    )
    opened = open_checkpoint(tmp_path / "model")
    assert opened.read("weight", 10**5, 10**5 + 3).tolist() == [1, 1, 1]
    assert opened.tensor("bias").tolist() == 512 * [2]


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_expanded_tensors_beyond_what_the_file_holds_are_refused_by_name(tmp_path: Path, form: str):
    base = torch.zeros(1)
    for content in (
        {"a": torch.ones(3), "wide": base.expand(10**5, 2 * 10**4)},
        {f"part{number}": base.expand(100_000) for number in range(20)} | {"wide": base.expand(100_001)},
    ):
        store(content, tmp_path / "model", form)
        with pytest.raises(InputError, match=r"model: tensor 'wide' says it has .* but the whole file has"):
            open_checkpoint(tmp_path / "model")


def test_torch_zip_files_are_not_read_before_they_are_asked_for(tmp_path: Path):
    path = tmp_path / "model.pt"
    torch.save({"first": torch.full((1000,), 7.0), "second": torch.ones(3)}, path)
    opened = open_checkpoint(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.full((1000,), 7.0).numpy().tobytes(), b"\0" * 4000))
    assert torch.equal(opened.tensor("first"), torch.zeros(1000))


def test_a_checkpoint_goes_to_another_process(tmp_path: Path):
    save_file(weights(), tmp_path / "a")
    torch.save(weights(), tmp_path / "b")
    for name in "ab":
        copy = pickle.loads(pickle.dumps(open_checkpoint(tmp_path / name)))
        assert isinstance(copy, StoredCheckpoint)
        assert_same(copy.state_dict(), weights())


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    opened = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"model\.safetensors: has become shorter"):
        opened.state_dict()
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        opened.read("layer.2.weight")


def packed_again(source: Path, target: Path, compression: int, **changed: bytes) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in sorted(old.namelist(), reverse=True):
            new.writestr(name, changed.get(name.rpartition("/")[2].replace(".", "_"), old.read(name)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_torch_file_that_was_packed_again(tmp_path: Path, compression: int):
    torch.save(weights(), tmp_path / "saved.pt")
    packed_again(tmp_path / "saved.pt", tmp_path / "model.pt", compression)
    assert_same(load_state_dict(tmp_path / "model.pt"), weights())


def test_what_is_read_only_when_it_is_asked_for(tmp_path: Path):
    lazy = {}
    for form in ("safetensors", "zip", "legacy"):
        store(weights(), tmp_path / form, form)
        lazy[form] = open_checkpoint(tmp_path / form).is_lazy
    packed_again(tmp_path / "zip", tmp_path / "packed", zipfile.ZIP_DEFLATED)
    lazy["packed"] = open_checkpoint(tmp_path / "packed").is_lazy
    assert lazy == {"safetensors": True, "zip": True, "legacy": False, "packed": False}
    assert not LoadedCheckpoint("here", weights()).is_lazy


# --- Several shards


def test_shards_are_one_checkpoint(tmp_path: Path):
    files = {}
    for number, key in enumerate(weights()):
        files[key] = tmp_path / f"shard{number % 2}.safetensors"
    for file in set(files.values()):
        save_file({f"module.{key}": value for key, value in weights().items() if files[key] == file}, file)
    opened = SafetensorsCheckpoint(tmp_path / "index.json", {f"module.{key}": file for key, file in files.items()})
    assert opened.path == str(tmp_path / "index.json")
    assert_same(opened.state_dict(), weights())
    assert torch.equal(opened.read("layer.10.weight", 3, 5), weights()["layer.10.weight"].flatten()[3:5])


def test_a_shard_without_its_tensor_and_a_missing_shard(tmp_path: Path):
    save_file(weights(), tmp_path / "shard.safetensors")
    with pytest.raises(InputError, match=r"index\.json: says that .*shard\.safetensors holds tensor 'other'"):
        SafetensorsCheckpoint(tmp_path / "index.json", {"other": tmp_path / "shard.safetensors"})
    with pytest.raises(InputError, match=r"nowhere: no such checkpoint file"):
        SafetensorsCheckpoint(tmp_path / "index.json", {"other": tmp_path / "nowhere"})
    torch.save(weights(), tmp_path / "torch.safetensors")
    with pytest.raises(InputError, match=r"torch\.safetensors: not a safetensors file"):
        SafetensorsCheckpoint(tmp_path / "torch.safetensors")


# --- Bad files


def test_files_are_known_by_their_content(tmp_path: Path):
    save_file(weights(), tmp_path / "model.pt")
    torch.save(weights(), tmp_path / "zip.safetensors")
    torch.save(weights(), tmp_path / "legacy.safetensors", _use_new_zipfile_serialization=False)
    for name in ("model.pt", "zip.safetensors", "legacy.safetensors"):
        assert_same(load_state_dict(tmp_path / name), weights())


def zip_archive(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def encrypted_zip() -> bytes:
    content = bytearray(zip_archive(data=b"secret"))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def damaged_middle() -> bytes:
    buffer = io.BytesIO()
    torch.save(weights(), buffer)
    content = buffer.getvalue()
    where = content.index(b"PK\x01\x02")
    return content[:where] + b"\xff" * 60 + content[where + 60 :]


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "checkpoints"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is no checkpoint, but a PNG image"),
        (b"\x1f\x8b\x08" + bytes(100), "compressed by gzip; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer.*git lfs pull"),
        (zip_archive(), "an empty zip archive"),
        (zip_archive(text=b"hello"), "a zip archive, but none that torch.save has written"),
        (encrypted_zip(), "is encrypted; decrypt it first"),
        (damaged_middle(), "truncated, or no checkpoint"),
        (bytes(range(255, 0, -1)) * 20, "truncated, or no"),
        (bytes(1000), "truncated, or no"),
        (b"\x80", "truncated, or no"),
        (b"x", "truncated, or no"),
    ],
)
def test_files_of_something_else_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_refused(tmp_path: Path, seed: int):
    path = tmp_path / "model.pt"
    path.write_bytes(np.random.default_rng(seed).bytes(3000))
    with pytest.raises(InputError, match=re.escape(str(path))):
        open_checkpoint(path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_flipped_bytes_end_in_words_or_in_tensors(tmp_path: Path, form: str):
    path, generator = tmp_path / "model", np.random.default_rng(1)
    store(weights(), path, form)
    content = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(content)
        for position in generator.integers(0, len(damaged), 3):
            damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            opened = open_checkpoint(path)
            assert all(len(opened.read(key)) == meta.numel() for key, meta in opened.meta.items())
        except InputError as error:
            assert str(path) in str(error)


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(InputError, match="is a folder, not a checkpoint file"):
        open_checkpoint(tmp_path)


def test_links_that_lead_nowhere_or_in_circles(tmp_path: Path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("nowhere", "circle", "x" * 300):
        with pytest.raises(InputError, match=f"{name}: (no such checkpoint file|cannot be read)"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_that_may_not_be_read(open_folder: Path, unprivileged, form: str):
    path = open_folder / "model"
    store(weights(), path, form)
    path.chmod(0)
    with unprivileged(), pytest.raises(InputError, match=r"model: cannot be read \(Permission denied\)"):
        open_checkpoint(path)


def test_torchscript_archives_are_refused_by_name(tmp_path: Path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(
        InputError, match=r"model\.pt: is a TorchScript archive.*torch\.jit\.load.* FILE FILE\.safetensors$"
    ):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "memory"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3).to_sparse(), r"tensor 'odd' is torch\.sparse_coo; save a dense tensor"),
        (torch.eye(3).to_sparse_csr(), r"tensor 'odd' is torch\.sparse_csr; save a dense tensor"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"tensor 'odd' is quantised; save its deq"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "tensor 'odd' is nested; save a dense tensor"),
        (torch.empty(3, device="meta"), "tensor 'odd' has no values"),
        (torch.ones(3, dtype=torch.complex64).conj(), "tensor 'odd' is a lazy conjugate"),
    ],
    ids=["coo", "csr", "quantised", "nested", "meta", "conjugate"],
)
def test_tensors_without_flat_values_are_refused_by_name(tmp_path: Path, form: str, tensor, message: str):
    path, content = tmp_path / "model.pt", {"weight": torch.ones(2), "odd": tensor}
    if tensor.is_nested and form == "legacy":
        message = "(tensor 'odd' is nested|truncated, or no checkpoint)"  # torch reads its sizes before they are there
    if form == "memory":
        with pytest.raises(InputError, match=message):
            LoadedCheckpoint(path, content)
    else:
        store(content, path, form)
        with pytest.raises(InputError, match=rf"model\.pt: {message}"):
            open_checkpoint(path)


def safetensors_file(header: object, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: tuple[int, ...] = (8,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_file({"a": entry(0, 32), "b": entry(32, 96, (16,))}),  # beyond the file
        safetensors_file({"a": entry(0, 32), "b": entry(16, 48)}),  # overlapping
        safetensors_file({"a": entry(0, 16, (4,)), "b": entry(32, 64)}),  # a gap
        safetensors_file({"a": entry(0, 64)}),  # shape and length disagree
        safetensors_file({"a": entry(-32, 0), "b": entry(0, 64, (16,))}),
        safetensors_file({"a": entry(0, 64, (2**62, 2**62))}),
        safetensors_file({"a": entry(0, 32)}),  # shorter than the file
        safetensors_file({"a": {"dtype": "F32"}}),
        safetensors_file({"a": 3}),
        safetensors_file(b"{}"),
        safetensors_file(b"[1, 2]"),
        safetensors_file(b"{" * 5000),
        safetensors_file(b'{"a": \xff}'),
        safetensors_file({"a": entry(0, 64, (16,))}, length=2**63 - 1),
        safetensors_file({"a": entry(0, 64, (16,))}, length=10**9),
        safetensors_file({"a": entry(0, 64, (16,))}, length=5),
        safetensors_file({}, data=b""),
        b'{"a"',
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: (truncated, or not a safetensors|no tensors)"):
        open_checkpoint(path)


def test_two_tensors_of_one_name_in_a_header(tmp_path: Path):
    one, two = (json.dumps(entry(start, start + 32)) for start in (0, 32))
    (tmp_path / "model.safetensors").write_bytes(safetensors_file(f'{{"a": {one}, "a": {two}}}'.encode()))
    with pytest.raises(InputError, match="truncated, or not a safetensors file"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_number_format_that_torch_does_not_have(tmp_path: Path):
    content = safetensors_file({"a": entry(0, 48, (64,), "F6_E2M3")}, data=bytes(48))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"tensor 'a' has the number format F6_E2M3, which torch cannot hold"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_metadata_of_safetensors_is_no_tensor(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(save(weights(), metadata={"format": "pt"}))
    assert_same(load_state_dict(tmp_path / "model.safetensors"), weights())


def test_a_file_that_puts_itself_into_the_message_is_refused_shortly(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "long.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "x " * 10_000_000)
    with pytest.raises(InputError) as error:
        open_checkpoint(tmp_path / "long.pt")
    assert len(str(error.value)) < 1000


# --- Files that take more memory than they have bytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"0": bytes(70_000_000)}, r"says it unpacks to 70,00\d,\d+, more than 200 times as many"),
        ({"data_pkl": b"}" * 5_000_000}, r"its data\.pkl has [\d,]+ bytes and says it unpacks to 5,000,000"),
        ({"byteorder": b"little" * 1000}, r"its saved/byteorder has 6,000 bytes where torch writes a word"),
        ({"version": b"3" * 6000}, r"its saved/version has 6,000 bytes where torch writes a word"),
    ],
)
def test_compressed_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, changed: dict, message: str):
    torch.save(weights(), tmp_path / "saved.pt")
    packed_again(tmp_path / "saved.pt", tmp_path / "model.pt", zipfile.ZIP_DEFLATED, **changed)
    with pytest.raises(InputError, match=rf"model\.pt: .*{message}"):
        open_checkpoint(tmp_path / "model.pt")


def test_sparse_weights_that_were_compressed_are_no_bomb(tmp_path: Path):
    pruned = {"weight": torch.zeros(1000, 1000)}
    torch.save(pruned, tmp_path / "saved.pt")
    packed_again(tmp_path / "saved.pt", tmp_path / "model.pt", zipfile.ZIP_DEFLATED)
    assert_same(load_state_dict(tmp_path / "model.pt"), pruned)


def called(form: str, function: bytes, *arguments: bytes) -> bytes:
    """A file that holds ``{"a": function(*arguments), "b": 1}``."""
    content = (
        b"\x80\x02}(X\x01\x00\x00\x00ac" + function + b"\n" + b"(" + b"".join(arguments) + b"tRX\x01\0\0\0bK\x01u."
    )
    if form == "zip":
        return zip_archive(**{"archive/data.pkl": content, "archive/byteorder": b"little", "archive/version": b"3\n"})
    start = io.BytesIO()
    torch.save({}, start, _use_new_zipfile_serialization=False)
    content_of_nothing = b"\x80\x02}q\x00."
    return start.getvalue().replace(content_of_nothing, content, 1)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_calls_that_fill_the_memory_are_refused_and_not_made(tmp_path: Path, form: str):
    path = tmp_path / "model.pt"
    path.write_bytes(called(form, b"builtins\nbytearray", b"J\x00\x00\x00\x60"))
    with pytest.raises(InputError, match=r"model\.pt: holds a bytearray, which may be of any size"):
        open_checkpoint(path)
    path.write_bytes(called(form, b"__builtin__\nbytearray", b"J\x00\x00\x00\x60"))
    with pytest.raises(InputError, match=r"model\.pt: holds a bytearray, which may be of any size"):
        open_checkpoint(path)
    text, codec = b"X\x01\x00\x00\x00a", b"X\x03\x00\x00\x00Hex"
    path.write_bytes(called(form, b"_codecs\nencode", text, codec))
    with pytest.raises(InputError, match=r"model\.pt: asks for bytes to be written as Hex"):
        open_checkpoint(path)


def text(length: int) -> bytes:
    return b"X" + length.to_bytes(4, "little") + b"a" * length


def doubled(first: bytes, pair: bytes, times: int) -> bytes:
    """``first``, and then ``times`` over a pair of what was there before; the last one stays on the stack."""
    steps = (pair.replace(b"?", b"h" + bytes([i])) + b"q" + bytes([i + 1]) for i in range(times))
    return first + b"q\x00" + b"".join(steps)


TUPLES = doubled(b")", b"??\x86", 45)
LISTS = doubled(b"]", b"](??e", 45)


@pytest.mark.parametrize("form", ["zip", "legacy", "third of legacy"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"c" + b"a" * 10_000_000 + b"\nb\n", "names a class with more than 300 letters"),
        (b"ca\n" + b"GLOBAL " * 1_000_000 + b"\n", "names a class with more than 300 letters"),
        (b"c" + "é".encode() * 10_000_000 + b"\nb\n", "names a class with more than 300 letters"),
        (text(10_000_000) + b")R", "calls what is no function or class"),
        (text(10_000_000) + b")\x81", "calls what is no function or class"),
        (LISTS + b")R", "calls what is no function or class"),
        (TUPLES + b"}h\x2dK\x01s", "holds the same values in one another again and again"),
        (doubled(b")", b"(??t", 45) + b"}(h\x2dK\x01u", "holds the same values in one another again and again"),
        (b"})" + b"\x85" * 1_000_000 + b"K\x01s", "holds the same values in one another again and again"),
        (LISTS + b"ccollections\nCounter\nh\x2d\x85R", "holds the same values in one another again and again"),
    ],
    ids=["module", "name", "not ascii", "call", "new", "lists", "tuples", "marked", "deep", "argument"],
)
def test_what_would_keep_torch_busy_for_ages_is_refused(tmp_path: Path, form: str, content: bytes, message: str):
    content = b"\x80\x02" + content + b"."
    if form == "zip":
        content = zip_archive(**{"archive/data.pkl": content, "archive/byteorder": b"little", "archive/version": b"3"})
    elif form == "third of legacy":
        content = b"\x80\x02K\x01." * 2 + content
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=rf"model\.pt: {message}.*refused; save model\.state_dict\(\) alone") as error:
        open_checkpoint(tmp_path / "model.pt")
    assert len(str(error.value)) < 1000


def test_names_on_the_stack_of_protocol_4_are_not_read(tmp_path: Path):
    content = b"\x80\x04" + text(10_000_000) * 2 + b"\x93."
    content = zip_archive(**{"archive/data.pkl": content, "archive/byteorder": b"little", "archive/version": b"3"})
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.warns(UserWarning, match="protocol 4"), pytest.raises(InputError, match="Unsupported operand 147"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("zip_format", [True, False])
def test_large_and_much_shared_things_beside_the_weights_are_read(tmp_path: Path, zip_format: bool):
    network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(1000)))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names, pair, nested = [f"class {number}" for number in range(1000)], (0.9, 0.99), ()
    for _ in range(100):
        nested = (nested,)
    beside = {
        "optimizer": optimizer.state_dict(),
        "history": [{"epoch": number, "names": names, "betas": pair, "loss": np.float64(1)} for number in range(2000)],
        "split": tuple((number, number + 1) for number in range(20_000)),
        "nested": nested,
        ("a", (1, 2)): 3,
    }
    state_dict = network.state_dict()
    content = {"net": state_dict, "beside": beside}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zip_format)
    assert_same(load_state_dict(tmp_path / "model.pt"), dict(state_dict))


def test_long_names_of_tensors_do_not_make_long_messages(tmp_path: Path):
    long = "k" * 3_000_000
    header = {long: entry(0, 48, (64,), "F6_E2M3")}
    (tmp_path / "format").write_bytes(safetensors_file(header, data=bytes(48)))
    (tmp_path / "cut").write_bytes(safetensors_file({long: entry(0, 64)}))
    odd = [torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), np.ones(3)]
    odd += [torch.ones(3, dtype=torch.complex64).conj(), [torch.ones(3)], torch.empty(3, device="meta")]
    for index, value in enumerate(odd):
        torch.save({"x.weight": torch.ones(2), long: value}, tmp_path / f"{index}")
        torch.save({long: value}, tmp_path / f"{index} alone")
    refused = 0
    for path in tmp_path.iterdir():
        try:
            open_checkpoint(path)
        except InputError as error:
            refused += 1
            assert len(str(error)) < 1000
    assert refused == 2 * len(odd) + 2 - 1  # a list beside weights is no reason


def test_words_like_those_calls_are_no_reason_to_refuse(tmp_path: Path):
    beside = {"notes": "a\nbytearray\nb\nencode\n", "best": np.float64(0.5), "digest": "hexadecimal"}
    for zip_format in (True, False):
        torch.save({"net": weights(), **beside}, tmp_path / "model.pt", _use_new_zipfile_serialization=zip_format)
        assert_same(load_state_dict(tmp_path / "model.pt"), weights())


def test_a_name_in_two_pieces_of_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_CHUNK", 7)
    (tmp_path / "model.pt").write_bytes(called("legacy", b"builtins\nbytearray", b"J\x00\x00\x00\x60"))
    with pytest.raises(InputError, match="holds a bytearray"):
        open_checkpoint(tmp_path / "model.pt")


def test_attributes_of_a_tensor_do_not_take_the_place_of_its_methods(tmp_path: Path):
    odd = torch.ones(3)
    for name in ("detach", "numel", "dim", "reshape"):
        setattr(odd, name, "mine")
    for zip_format in (True, False):
        torch.save({"a.weight": odd, "b.weight": odd}, tmp_path / "model", _use_new_zipfile_serialization=zip_format)
        assert load_state_dict(tmp_path / "model")["b.weight"].tolist() == [1, 1, 1]
