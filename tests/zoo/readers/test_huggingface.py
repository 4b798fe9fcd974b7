import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sane_ray.errors import InputError
from sane_ray.zoo.readers import huggingface
from sane_ray.zoo.readers.huggingface import discover, open_checkpoint

COMMIT, OLDER, OLDEST = "c" * 40, "b" * 40, "a" * 40


def state_dict(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"embed.weight": (7, 4), "layers.0.weight": (4, 4), "layers.0.bias": (4,), "layers.10.scale": ()}
    return {key: torch.randn(shape).to(dtype) for key, shape in shapes.items()}


def write(
    folder: Path, weights: dict[str, torch.Tensor] | None = None, file: str = "model.safetensors", **more
) -> Path:
    """A model's folder; ``config={...}`` becomes config.json, and so on for other files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict() if weights is None else weights, folder / file, metadata=more.pop("metadata", None))
    for name, content in more.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_shards(
    folder: Path, weights: dict[str, torch.Tensor], stem: str = "model", ending: str = "safetensors"
) -> Path:
    """Two shards and their index; every other tensor goes into the second."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-0000{n}-of-00002.{ending}" for n in (1, 2)]
    for n, name in enumerate(names):
        part = {key: value for i, (key, value) in enumerate(weights.items()) if i % 2 == n}
        save_file(part, folder / name) if ending == "safetensors" else torch.save(part, folder / name)
    weight_map = {key: names[i % 2] for i, key in enumerate(weights)}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, **weight_map) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= weight_map
    path.write_text(json.dumps(content))


def assert_same(record, weights: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(record)
    found = checkpoint.state_dict()
    assert set(found) == set(weights)
    for key, value in weights.items():
        assert checkpoint.meta[key].shape == value.shape
        assert found[key].dtype == checkpoint.meta[key].dtype == value.dtype
        assert torch.equal(found[key], value)
        assert torch.equal(checkpoint.read(key, 1, 3), value.reshape(-1)[1:3])


def only(root: Path):
    [record] = discover(root)
    return record


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_single_file_comes_back_bit_for_bit(tmp_path, dtype):
    weights = state_dict(dtype=dtype)
    record = only(write(tmp_path / "net", weights, config={"hidden_size": 4}))
    assert (record.id, record.model, record.epoch, record.reader) == ("net/0", "net", 0, "huggingface")
    assert record.config == {"hidden_size": 4}
    assert_same(record, weights)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_come_back_bit_for_bit_in_the_order_of_the_network(tmp_path, ending):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    record = only(write_shards(tmp_path / "net", state_dict(), stem, ending))
    assert record.path.endswith(f"{stem}.{ending}.index.json")
    assert_same(record, state_dict())
    order = list(open_checkpoint(record).meta)
    if ending == "safetensors":
        assert order == ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.10.scale"]
    else:  # those of the first file, then those of the second
        assert order == ["embed.weight", "layers.0.bias", "layers.0.weight", "layers.10.scale"]


def test_shards_are_read_only_where_they_are_asked(tmp_path):
    weights = state_dict()
    folder = write_shards(tmp_path / "net", weights)
    checkpoint = open_checkpoint(only(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert torch.equal(checkpoint.tensor("embed.weight"), weights["embed.weight"])
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors"):
        checkpoint.tensor("layers.0.weight")


def test_torch_shards_are_read_lazily_if_all_of_them_can_be(tmp_path):
    record = only(write_shards(tmp_path / "net", state_dict(), "pytorch_model", "bin"))
    assert open_checkpoint(record).is_lazy
    shard = tmp_path / "net" / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(shard, weights_only=True), shard, _use_new_zipfile_serialization=False)
    assert not open_checkpoint(record).is_lazy
    assert_same(record, state_dict())


def test_torch_file_with_tied_weights(tmp_path):
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    net["head"].weight = net["embed"].weight
    folder = tmp_path / "net"
    folder.mkdir()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    assert_same(only(folder), net.state_dict())


def test_safetensors_of_tied_weights_hold_them_once(tmp_path):
    weights = state_dict()
    record = only(write(tmp_path / "net", weights, config={"tie_word_embeddings": True}))
    assert record.config["tie_word_embeddings"] is True
    assert_same(record, weights)


@pytest.mark.parametrize(
    "files", [("pytorch_model.bin",), ("model.fp16.safetensors", "model-00001-of-00002.safetensors")]
)
def test_of_several_files_the_whole_safetensors_are_read(tmp_path, files):
    folder = write(tmp_path / "net")
    for file in files:
        (folder / file).write_bytes(b"not read")
    assert_same(only(folder), state_dict())


def test_an_index_without_any_shard_gives_way_to_a_torch_file(tmp_path):
    folder = write_shards(tmp_path / "net", state_dict())
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert "the shard model-00001-of-00002.safetensors of tensor 'embed.weight' is missing" in refusal(folder)
    torch.save(state_dict(1), folder / "pytorch_model.bin")
    assert_same(only(folder), state_dict(1))


def test_variants_and_unusual_names_of_an_index(tmp_path):
    write(tmp_path / "zoo/a", file="model.fp16.safetensors")
    write_shards(tmp_path / "zoo/b", state_dict(), "consolidated")
    assert [Path(record.path).name for record in discover(tmp_path / "zoo")] == [
        "model.fp16.safetensors",
        "consolidated.safetensors.index.json",
    ]


def test_a_file_as_root(tmp_path):
    write_shards(tmp_path / "a", state_dict())
    write(tmp_path / "b", config={"x": 1})
    assert_same(only(tmp_path / "a/model.safetensors.index.json"), state_dict())
    record = only(tmp_path / "b/model.safetensors")
    assert (record.model, record.config) == ("b", {"x": 1})
    assert discover(tmp_path / "b/config.json") == []


# --- What is no use ---------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(only(folder))
    return str(caught.value)


def test_a_missing_shard_names_index_key_and_shard(tmp_path):
    folder = write_shards(tmp_path / "net", state_dict())
    (folder / "model-00002-of-00002.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    assert refusal(folder).startswith(
        f"{index}: the shard model-00002-of-00002.safetensors of tensor 'layers.0.weight' is missing"
    )


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_key_that_its_shard_does_not_hold_is_named(tmp_path, ending):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    folder = write_shards(tmp_path / "net", state_dict(), stem, ending)
    index = folder / f"{stem}.{ending}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = f"{stem}-00001-of-00002.{ending}"
    index.write_text(json.dumps(content))
    sentence = refusal(folder)
    assert sentence.startswith(f"{index}: ")
    assert f"{stem}-00001-of-00002.{ending}" in sentence
    assert "'ghost.weight'" in sentence


@pytest.mark.parametrize("path", ["../../x.safetensors", "sub/../../x.safetensors", "{absolute}"])
def test_an_index_may_not_lead_out_of_its_folder(tmp_path, path):
    folder = write_shards(tmp_path / "a/net", state_dict())
    outside = write(tmp_path, {"secret": torch.ones(1)}, "x.safetensors") / "x.safetensors"
    edit_index(folder, secret=path.format(absolute=outside))
    sentence = refusal(folder)
    assert "'secret' lies outside of the model's folder" in sentence
    assert sentence.startswith(str(folder / "model.safetensors.index.json"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no index of shards"),
        ("[]", "no index of shards"),
        ('{"metadata": {}}', "no index of shards"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": 3}}', "the shard of tensor 'a' is 3"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content, words):
    folder = write_shards(tmp_path / "net", state_dict())
    (folder / "model.safetensors.index.json").write_text(content)
    assert words in refusal(folder)


def test_a_truncated_shard_names_its_index(tmp_path):
    folder = write_shards(tmp_path / "net", state_dict())
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    sentence = refusal(folder)
    assert sentence.startswith(str(folder / "model.safetensors.index.json"))
    assert f"{shard}: truncated" in sentence


def test_tensors_that_the_index_does_not_name_are_said_to_be_left_out(tmp_path, caplog):
    folder = write_shards(tmp_path / "net", state_dict())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["layers.0.bias"]
    index.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert "layers.0.bias" not in open_checkpoint(only(folder)).meta
    assert (
        "does not name 1 tensors of model-00001-of-00002.safetensors, which are left out: ['layers.0.bias']"
        in caplog.text
    )


def test_shards_without_their_index_are_refused(tmp_path):
    folder = write_shards(tmp_path / "net", state_dict())
    (folder / "model.safetensors.index.json").unlink()
    assert "one of several shards, without their index" in refusal(folder)


def test_a_pickle_that_runs_code_does_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Malicious()}))
    assert "pytorch_model.bin" in refusal(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"]
)
def test_damaged_weights_are_records_that_are_refused_by_name(tmp_path, content):
    write(tmp_path / "zoo/whole")
    folder = write(tmp_path / "zoo/damaged")
    (folder / "model.safetensors").write_bytes(content)
    damaged, whole = discover(tmp_path / "zoo")
    assert_same(whole, state_dict())
    with pytest.raises(InputError, match=r"damaged/model\.safetensors"):
        open_checkpoint(damaged)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_folders_of_any_depth_in_order_and_nothing_else(tmp_path):
    for name in ("b/deep/er", "a", "b/c", ".hidden"):
        write(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.safetensors.txt").write_text("x")
    assert [(record.model, record.epoch) for record in discover(tmp_path)] == [("a", 0), ("b/c", 0), ("b/deep/er", 0)]
    assert discover(tmp_path / "empty") == []


def test_link_loops_end(tmp_path):
    write(tmp_path / "net")
    (tmp_path / "net/again").symlink_to(tmp_path)
    assert [record.model for record in discover(tmp_path)] == ["net"]


def test_pipeline_components_are_models_with_the_licence_of_the_pipeline(tmp_path):
    write(tmp_path / "pipe/unet", state_dict(1), "diffusion_pytorch_model.safetensors", config={"_class_name": "UNet"})
    write(tmp_path / "pipe/text_encoder", state_dict(2))
    text = "license: openrail\nmodel-index: [{results: [{metrics: [{type: fid, value: 3}]}]}]"
    (tmp_path / "pipe/README.md").write_text(f"---\n{text}\n---\n")
    text_encoder, unet = discover(tmp_path)
    assert (text_encoder.model, unet.model) == ("pipe/text_encoder", "pipe/unet")
    assert text_encoder.license == unet.license == "openrail"
    assert unet.properties == {}  # those of the pipeline are none of the component
    assert unet.config == {"_class_name": "UNet"}
    assert_same(unet, state_dict(1))


def test_an_adapter_knows_its_base_model(tmp_path):
    adapter_config = {"base_model_name_or_path": "meta/llama", "r": 8, "target_modules": ["q", "v"]}
    weights = {
        "base_model.model.q.lora_A.weight": torch.randn(8, 4),
        "base_model.model.q.lora_B.weight": torch.randn(4, 8),
    }
    record = only(write(tmp_path / "lora", weights, "adapter_model.safetensors", adapter_config=adapter_config))
    assert record.parents == ("meta/llama",)
    assert record.config == {"base_model_name_or_path": "meta/llama", "r": 8, "target_modules": '["q", "v"]'}
    assert_same(record, weights)


def test_an_adapter_beside_a_model_is_a_record_of_its_own(tmp_path):
    write(tmp_path / "net")
    write(tmp_path / "net", state_dict(3), "adapter_model.safetensors")
    records = discover(tmp_path)
    assert len({record.id for record in records}) == 2
    assert sorted(Path(record.path).name for record in records) == ["adapter_model.safetensors", "model.safetensors"]


# --- Checkpoints of a trainer -----------------------------------------------------------------------------------------


def history(step: int) -> dict:
    rows = [{"step": s, "epoch": s / 500, "loss": 1 / s} for s in (500, 1000)] + [{"step": 1000, "eval_accuracy": 0.9}]
    return {"global_step": step, "epoch": step / 500, "num_train_epochs": 2, "log_history": rows, "best_metric": None}


def test_checkpoints_of_a_run_are_epochs_of_one_model(tmp_path):
    for step in (500, 1000):
        write(tmp_path / f"zoo/run/checkpoint-{step}", state_dict(step), trainer_state=history(step))
    write(tmp_path / "zoo/run", state_dict(1000))
    (tmp_path / "zoo/run/README.md").write_text("---\nlicense: mit\nbase_model: them/base\n---\n")
    first, last, final = discover(tmp_path / "zoo")
    assert [record.id for record in (first, last, final)] == ["run/500", "run/1000", "run/1000 (run/model.safetensors)"]
    assert [record.epoch for record in (first, last, final)] == [500, 1000, 1000]
    assert {record.model for record in (first, last, final)} == {"run"}
    assert first.properties == {"loss": 1 / 500, "trained_epochs": 1.0}
    assert last.properties == {"loss": 1 / 1000, "eval_accuracy": 0.9, "trained_epochs": 2.0}
    assert first.config == {"trainer::num_train_epochs": 2}
    assert first.license == "mit"
    assert first.parents == ("them/base",)
    assert_same(first, state_dict(500))


def test_a_run_as_root_and_one_checkpoint_as_root(tmp_path):
    write(tmp_path / "run/checkpoint-7")
    write(tmp_path / "run/checkpoint-20/unet", file="diffusion_pytorch_model.safetensors")
    assert [(r.model, r.epoch) for r in discover(tmp_path / "run")] == [("run", 7), ("unet", 20)]
    assert [(r.model, r.epoch) for r in discover(tmp_path / "run/checkpoint-7")] == [("run", 7)]


def test_the_step_of_a_lone_model_is_its_epoch(tmp_path):
    assert only(write(tmp_path / "net", trainer_state=history(1000))).epoch == 1000
    assert only(write(tmp_path / "net", trainer_state={"global_step": "many", "log_history": 3})).epoch == 0


# --- Hub caches -------------------------------------------------------------------------------------------------------


def cache(folder: Path, name: str, revisions: dict[str, int], main: str | None = None) -> Path:
    """A repository as the hub's library keeps it: files are links into blobs. Later revisions are newer."""
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    for age, (revision, seed) in enumerate(revisions.items()):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        save_file(state_dict(seed), repository / "blobs" / revision)
        (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / revision)
        os.utime(snapshot, (1000 + age, 1000 + age))
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(main)
    return repository


def test_a_cache_gives_the_main_revision_of_each_repository(tmp_path):
    cache(tmp_path / "hub", "org/net", {OLDER: 1, COMMIT: 2}, main=OLDER)
    cache(tmp_path / "hub", "gpt2", {COMMIT: 3}, main=COMMIT)
    plain, org = discover(tmp_path)
    assert (plain.id, org.id) == ("gpt2/0", "org/net/0")
    assert_same(org, state_dict(1))
    assert_same(plain, state_dict(3))


@pytest.mark.parametrize("main", [None, "d" * 40])
def test_a_cache_without_main_gives_the_newest_revision_and_says_so(tmp_path, caplog, main):
    repository = cache(tmp_path, "org/net", {OLDEST: 0, COMMIT: 2, OLDER: 1}, main)
    with caplog.at_level(logging.WARNING):
        record = only(tmp_path)
    assert_same(record, state_dict(1))
    assert f"{repository}: reading revision {OLDER} of 3: the newest with weights, refs/main has none" in caplog.text


def test_a_cache_with_one_revision_leaves_no_doubt(tmp_path, caplog):
    cache(tmp_path, "org/net", {COMMIT: 2})  # as a download by commit leaves it
    with caplog.at_level(logging.WARNING):
        assert_same(only(tmp_path), state_dict(2))
    assert caplog.text == ""


def test_a_main_revision_without_weights_gives_way_to_one_with_them(tmp_path):
    repository = cache(tmp_path, "org/net", {OLDER: 1}, main=COMMIT)
    (repository / "snapshots" / COMMIT).mkdir()
    (repository / "snapshots" / COMMIT / "config.json").write_text("{}")
    assert_same(only(tmp_path), state_dict(1))


@pytest.mark.parametrize("inside", ["", "snapshots", f"snapshots/{COMMIT}"])
def test_every_folder_of_a_cached_repository_may_be_the_root(tmp_path, inside):
    record = only(cache(tmp_path, "org/net", {COMMIT: 2}, main=COMMIT) / inside)
    assert record.model == "org/net"
    assert_same(record, state_dict(2))


def test_a_named_revision_as_root_is_the_one_that_is_read(tmp_path):
    repository = cache(tmp_path, "org/net", {OLDER: 1, COMMIT: 2}, main=COMMIT)
    assert_same(only(repository / "snapshots" / OLDER), state_dict(1))


def test_components_and_cards_of_a_cached_repository(tmp_path):
    snapshot = cache(tmp_path, "org/pipe", {COMMIT: 2}, main=COMMIT) / "snapshots" / COMMIT
    write(snapshot / "unet", file="diffusion_pytorch_model.safetensors")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    assert [(r.model, r.license) for r in discover(tmp_path)] == [("org/pipe", "mit"), ("org/pipe/unet", "mit")]
    assert [(r.model, r.license) for r in discover(snapshot / "unet")] == [("org/pipe/unet", "mit")]


def test_a_link_to_a_blob_that_is_gone_is_refused_by_name(tmp_path):
    repository = cache(tmp_path, "org/net", {COMMIT: 2}, main=COMMIT)
    (repository / "blobs" / COMMIT).unlink()
    assert f"{COMMIT}/model.safetensors: no such checkpoint file" in refusal(tmp_path)


def test_shards_of_a_cache_are_links_too(tmp_path):
    snapshot = cache(tmp_path, "org/net", {COMMIT: 2}, main=COMMIT) / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    write_shards(snapshot, state_dict(4))
    for n, shard in enumerate(snapshot.glob("*.safetensors")):
        shard.rename(snapshot.parents[1] / f"blobs/{n}")
        shard.symlink_to(Path(f"../../blobs/{n}"))
    assert_same(only(tmp_path), state_dict(4))


# --- What is known of a model -----------------------------------------------------------------------------------------


def test_the_config_is_flat(tmp_path):
    config = {
        "architectures": ["ViT"],
        "vision": {"hidden_size": 8, "act": "gelu"},
        "dropout": 0.1,
        "none": None,
        "id2label": {"0": "cat", "1": "dog"},
        "label2id": {"cat": 0, "dog": 1},
        "endless": 10**30,
        "half": "\ud800",
    }
    assert only(write(tmp_path / "net", config=config)).config == {
        "architectures": '["ViT"]',
        "vision::hidden_size": 8,
        "vision::act": "gelu",
        "dropout": 0.1,
        "none": None,
        "num_labels": 2,
        "endless": 1e30,
        "half": "\\ud800",
    }


def test_the_card_of_the_folder(tmp_path):
    folder = write(tmp_path / "net", config={"_name_or_path": "them/base"})
    text = "license: mit\nbase_model: [them/base, us/other]\ntags: [a, b]"
    metrics = "model-index: [{results: [{dataset: {name: C10}, metrics: [{type: accuracy, value: 0.9}]}]}]"
    (folder / "README.md").write_text(f"---\n{text}\n{metrics}\n---\n")
    record = only(folder)
    assert (record.license, record.parents) == ("mit", ("them/base", "us/other"))
    assert record.properties == {"tags": "a, b", "c10.accuracy": 0.9}


@pytest.mark.parametrize(
    ("name", "parents"),
    [
        ("google/vit", ("google/vit",)),
        ("bert-base-uncased", ("bert-base-uncased",)),
        ("net", ()),
        ("me/net", ()),
        ("/home/me/model", ()),
        ("./results", ()),
        ("runs/checkpoint-500", ()),
        ("", ()),
        (3, ()),
    ],
)
def test_where_a_config_says_that_the_model_comes_from(tmp_path, name, parents):
    assert only(write(tmp_path / "net", config={"_name_or_path": name})).parents == parents


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.json", "\ud800".encode("utf-8", "surrogatepass")),
        ("config.json", '{"a":' * 5000 + "1" + "}" * 5000),
        ("config.json", "[" * 100_000),
        ("trainer_state.json", "nope"),
        ("README.md", "---\n[\n---\n"),
    ],
)
def test_damaged_neighbours_of_the_weights_are_a_warning(tmp_path, caplog, file, content):
    folder = write(tmp_path / "net")
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        record = only(folder)
    assert f"net/{file}" in caplog.text
    assert record.config == {}
    assert_same(record, state_dict())


def test_settings_in_the_header_of_a_model_of_model_j(tmp_path):
    settings = {
        "format": "pt",
        "learning_rate": "1e-4",
        "seed": "7",
        "dataset_chosen_targets": "['a']",
        "image": "x" * 5000,
    }
    folder = write(tmp_path / "net", metadata=settings, config={"hidden_size": 4})
    (folder / "README.md").write_text("---\ntags: [model-j]\n---\n|A|B|\n|-|-|\n|**Split**|test|\n|Subset|MAE|\n")
    record = only(folder)
    assert record.split == "test"
    assert record.config == {
        "hidden_size": 4,
        "metadata::learning_rate": 1e-4,
        "metadata::seed": 7,
        "metadata::dataset_chosen_targets": "['a']",
        "card::subset": "MAE",
    }


def test_long_and_foreign_keys(tmp_path):
    weights = {"k" * 300 + ".weight": torch.ones(2), "мир.重み": torch.zeros(0, 3), "x" + "9" * 30: torch.tensor(1.0)}
    assert_same(only(write_shards(tmp_path / "net", weights)), weights)


def test_name_and_description_for_the_catalog():
    assert huggingface.NAME == "huggingface"
    assert "model.safetensors" in huggingface.LOOKS_FOR
