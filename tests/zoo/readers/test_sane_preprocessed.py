import json
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.tokenizer import build_layer_table, tokenize
from sane_ray.zoo.catalog import open_record, read_catalog, write_catalog
from sane_ray.zoo.readers import sane_preprocessed

TOKEN_SIZE = 16
EPOCHS = (21, 22)


def model(seed: int) -> dict[str, Tensor]:
    """Two convolutions with a batch norm between them and a linear layer without bias."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"conv1.weight": (4, 1, 3, 3), "conv1.bias": (4,), "bn1.weight": (4,), "bn1.bias": (4,)}
    shapes |= {"bn1.running_mean": (4,), "bn1.running_var": (4,), "conv2.weight": (5, 4, 2, 2), "conv2.bias": (5,)}
    shapes |= {"fc.weight": (3, 5)}
    return {key: torch.randn(shape, generator=draw) + 0.1 * len(key) for key, shape in shapes.items()}


def tokenized_keys(weights: dict[str, Tensor]) -> list[str]:
    return [key for key in weights if "weight" in key or "running" in key]


def normalise(models: list[dict[str, Tensor]], mode: str | bool | None) -> tuple[list[dict[str, Tensor]], dict]:
    """As the published code does it, with its statistics, its double pass over running statistics, and its file."""
    statistics: dict = {}
    models = [dict(weights) for weights in models]
    for key in tokenized_keys(models[0]):
        bias = key.replace("weight", "bias")  # of running statistics: the key itself
        joined = [
            torch.cat([w[key].reshape(len(w[key]), -1), w[bias][:, None]], dim=1) if bias in w else w[key]
            for w in models
        ]
        if mode is True:
            mean = torch.tensor([values.mean().item() for values in joined]).mean()
            std = (torch.tensor([values.std().item() for values in joined]) ** 2).mean().sqrt()
            statistics[key] = {"mean": mean.item(), "std": std.item()}
            change = lambda values, mean=mean, std=std: (values - mean) / std  # noqa: E731
        elif mode == "minmax" and "weight" in key:
            low, high = min(values.min() for values in joined), max(values.max() for values in joined)
            statistics[key] = {"min": low.item(), "max": high.item()}
            change = lambda values, low=low, high=high: (values - low) / (high - low) * 2 - 1  # noqa: E731
        else:
            continue
        for weights in models:
            weights[key] = change(weights[key])
            if bias in weights:
                weights[bias] = change(weights[bias])
    return models, statistics | {"mode": {True: "standardize", "minmax": "minmax"}.get(mode)}


def write(
    root: Path,
    mode: str | bool | None = True,
    starts: tuple[int, ...] = (0,),
    window: int = 10**9,
    split: str = "train",
    models: int = 2,
    **info: object,
) -> list[dict[str, Tensor]]:
    """A prepared split; a pass over all checkpoints for each of ``starts``, which is where its windows begin."""
    real = [model(seed) for seed in range(models * len(EPOCHS))]
    normalised, statistics = normalise(real, mode)
    table = build_layer_table(real[0], token_size=TOKEN_SIZE)
    window = min(window, table.num_tokens)
    mask = torch.arange(TOKEN_SIZE) < torch.from_numpy(table.signal_counts)[:, None]
    positions = torch.from_numpy(table.positions).to(torch.int16)
    folder = root / f"dataset_torch.{split}"
    folder.mkdir(parents=True)
    for repeat, start in enumerate(starts):
        for index, weights in enumerate(normalised):
            tokens = tokenize(weights, table)
            views = torch.stack([tokens, tokens.flip(0), tokens.roll(1, 0)])  # the others are no view of the model
            here = slice(start, start + window)
            props = torch.tensor([0.01 * index, float(EPOCHS[index % 2]), -0.5])
            sample = {"w": views[:, here].contiguous(), "m": mask[here], "p": positions[here], "props": props}
            torch.save(sample, folder / f"sample_{index + repeat * len(real)}.pt")
    content = {"zoo_path": "/zoos/original", "num_samples": len(real), "supersample": len(starts)}
    content |= {"properties": ["test_acc", "training_iteration", "ggap"], "epoch_list": list(EPOCHS)}
    content |= {"standardize": mode, "max_positions": [table.num_tokens - 1, 5, 4], **info}
    (root / f"dataset_info_{split}.json").write_text(json.dumps(content))
    (root / f"dataset_normalization_{split}.json").write_text(json.dumps(statistics))
    return real


def test_one_record_a_checkpoint(tmp_path: Path):
    write(tmp_path)
    write(tmp_path, split="test", models=1)
    records = sane_preprocessed.discover(tmp_path)
    assert [record.id for record in records] == [
        *("test/model_000000/21", "test/model_000000/22"),
        *("train/model_000000/21", "train/model_000000/22", "train/model_000001/21", "train/model_000001/22"),
    ]
    record = records[3]
    assert (record.split, record.epoch, record.member) == ("train", 22, "sample_1.pt")
    assert (record.reader, record.path) == ("sane_preprocessed", str(tmp_path / "dataset_torch.train"))
    assert record.properties == pytest.approx({"test_acc": 0.01, "training_iteration": 22, "ggap": -0.5})
    assert record.config == {"standardize": True, "zoo_path": "/zoos/original"}
    assert records[0].split == "test"


def test_the_folder_of_a_split_and_folders_below_the_root(tmp_path: Path):
    write(tmp_path / "cifar10")
    write(tmp_path / "mnist")
    names = [record.model for record in sane_preprocessed.discover(tmp_path)][::2]
    assert names == [f"{zoo}/train/model_00000{number}" for zoo in ("cifar10", "mnist") for number in (0, 1)]
    inner = sane_preprocessed.discover(tmp_path / "mnist" / "dataset_torch.train")
    assert [record.model for record in inner][::2] == ["train/model_000000", "train/model_000001"]
    sane_preprocessed.open_checkpoint(inner[0])


@pytest.mark.parametrize("mode", [True, "minmax"])
def test_weights_are_restored_and_the_normalisation_is_undone(tmp_path: Path, mode: str | bool):
    real = write(tmp_path, mode)
    for record, expected in zip(sane_preprocessed.discover(tmp_path), real, strict=True):
        found = sane_preprocessed.open_checkpoint(record).state_dict()
        assert {key: tuple(value.shape) for key, value in found.items()} == {
            "conv1.weight": (4, 10),
            "bn1.weight": (4,),
            "bn1.bias": (4,),
            "bn1.running_mean": (4,),
            "bn1.running_var": (4,),
            "conv2.weight": (5, 17),
            "fc.weight": (3, 5),
        }
        for key in ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "fc.weight"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
        for name in ("conv1", "conv2"):
            rows = torch.cat([expected[f"{name}.weight"].flatten(1), expected[f"{name}.bias"][:, None]], dim=1)
            torch.testing.assert_close(found[f"{name}.weight"], rows, rtol=1e-5, atol=1e-5)


def test_restored_weights_have_the_tokens_of_the_real_ones(tmp_path: Path):
    real = write(tmp_path)
    found = sane_preprocessed.open_checkpoint(sane_preprocessed.discover(tmp_path)[2]).state_dict()
    expected, restored = (
        tokenize(weights, build_layer_table(weights, token_size=TOKEN_SIZE)) for weights in (real[2], found)
    )
    torch.testing.assert_close(restored, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["l2_ind", None])
def test_without_statistics_the_values_stay_and_the_names_are_numbers(
    tmp_path: Path, mode: str | None, caplog: pytest.LogCaptureFixture
):
    real = write(tmp_path, mode)
    with caplog.at_level(logging.WARNING):
        records = sane_preprocessed.discover(tmp_path)
    assert ("the norms were not kept" in caplog.text) == (mode == "l2_ind")
    found = sane_preprocessed.open_checkpoint(records[1]).state_dict()
    assert list(found) == [f"layer_00{index}.weight" for index in range(6)]
    assert torch.equal(found["layer_005.weight"], real[1]["fc.weight"])
    assert torch.equal(found["layer_002.weight"], real[1]["bn1.running_mean"][:, None])


def test_windows_that_hold_all_tokens_together_are_joined(tmp_path: Path):
    """29 tokens in windows of 9: the first, the third and the last two passes hold them all."""
    real = write(tmp_path, starts=(0, 4, 9, 18, 20), window=9)
    records = sane_preprocessed.discover(tmp_path)
    assert len(records) == 4
    assert records[1].member == "sample_1.pt sample_5.pt sample_9.pt sample_13.pt sample_17.pt"
    found = sane_preprocessed.open_checkpoint(records[1]).state_dict()
    torch.testing.assert_close(found["fc.weight"], real[1]["fc.weight"], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_which_tokens_are_missing_is_refused_by_name(tmp_path: Path):
    write(tmp_path, starts=(0, 8), window=9)
    records = sane_preprocessed.discover(tmp_path)
    assert len(records) == 4
    message = (
        r"sample_2\.pt: the 2 random window\(s\) of this checkpoint hold 17 of its 29 tokens, .*\(/zoos/original\)"
    )
    with pytest.raises(InputError, match=message):
        sane_preprocessed.open_checkpoint(records[2])


def test_epochs_that_are_not_the_prepared_ones_make_each_checkpoint_its_own_model(tmp_path: Path):
    write(tmp_path, epoch_list=[21, 22, 23])
    assert [record.id for record in sane_preprocessed.discover(tmp_path)] == [
        f"train/checkpoint_00000{number}/{epoch}" for number, epoch in enumerate((21, 22, 21, 22))
    ]


def test_pickled_data_sets_and_other_files_are_left_alone(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "dataset_train.pt").write_bytes(b"a pickle that must not be opened")
    (tmp_path / "dataset_torch.train" / "notes.txt").touch()
    assert len(sane_preprocessed.discover(tmp_path)) == 4


def test_a_missing_or_damaged_sample_costs_only_its_checkpoint(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "dataset_torch.train/sample_1.pt").unlink()
    (tmp_path / "dataset_torch.train/sample_2.pt").write_bytes(b"PK\x03\x04")
    records = sane_preprocessed.discover(tmp_path)
    assert [bool(record.properties) for record in records] == [True, False, False, True]
    for number in (1, 2):
        with pytest.raises(InputError, match=rf"sample_{number}\.pt: (no such checkpoint file|truncated)"):
            sane_preprocessed.open_checkpoint(records[number])
    sane_preprocessed.open_checkpoint(records[3])


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_sample_that_wants_to_run_code_is_refused_and_does_not(tmp_path: Path):
    write(tmp_path)
    torch.save({"w": Malicious(tmp_path / "ran")}, tmp_path / "dataset_torch.train/sample_0.pt")
    with pytest.raises(InputError, match=r"sample_0\.pt: needs Python code"):
        sane_preprocessed.open_checkpoint(sane_preprocessed.discover(tmp_path)[0])
    assert not (tmp_path / "ran").exists()


def change(folder: Path, **values: Tensor) -> None:
    path = folder / "dataset_torch.train/sample_0.pt"
    torch.save(torch.load(path, weights_only=True) | values, path)


def test_samples_that_contradict_themselves_are_refused(tmp_path: Path):
    write(tmp_path)
    (record, *_) = sane_preprocessed.discover(tmp_path)
    sample = torch.load(tmp_path / "dataset_torch.train/sample_0.pt", weights_only=True)
    change(tmp_path, w=sample["w"][0])
    with pytest.raises(InputError, match=r"sample_0\.pt: w \(29, 16\), m \(29, 16\), p \(29, 3\) are not"):
        sane_preprocessed.open_checkpoint(record)
    change(tmp_path, w=sample["w"], m=sample["m"].flip(1))
    with pytest.raises(InputError, match="positions and mask of layer 0 contradict each other"):
        sane_preprocessed.open_checkpoint(record)
    change(tmp_path, m=sample["m"], p=sample["p"] + 1)
    with pytest.raises(InputError, match=r"sample_0\.pt: has a token at 29, but a model has 29 tokens"):
        sane_preprocessed.open_checkpoint(record)
    change(tmp_path, p=torch.stack([torch.arange(29), 2 * torch.ones(29), torch.arange(29)], dim=1).short())
    with pytest.raises(InputError, match="positions and mask of layer 0 contradict each other"):
        sane_preprocessed.open_checkpoint(record)
    change(tmp_path, m=[1])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sample_0\.pt: lacks one of the tensors"):
        sane_preprocessed.open_checkpoint(record)


def test_without_its_info_a_split_is_listed_and_refused(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "dataset_info_train.json").unlink()
    records = sane_preprocessed.discover(tmp_path)
    assert [record.id for record in records] == [f"train/checkpoint_00000{number}/0" for number in range(4)]
    with pytest.raises(InputError, match=r"dataset_info_train\.json: missing, so how many tokens"):
        sane_preprocessed.open_checkpoint(records[0])


@pytest.mark.parametrize("text", ["{", "[]", '{"num_samples": 4}', '{"num_samples": 0, "properties": ["a"]}'])
def test_a_damaged_info_is_refused(tmp_path: Path, text: str):
    write(tmp_path)
    (tmp_path / "dataset_info_train.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset_info_train\.json: (not JSON|holds a list|lacks what)"):
        sane_preprocessed.discover(tmp_path)


def test_a_normalisation_file_that_does_not_fit_is_refused(tmp_path: Path):
    write(tmp_path)
    (record, *_) = sane_preprocessed.discover(tmp_path)
    path = tmp_path / "dataset_normalization_train.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "fc.weight"}))
    with pytest.raises(InputError, match=r"dataset_normalization_train\.json: describes 5 layers .* has 6 layers"):
        sane_preprocessed.open_checkpoint(record)
    path.write_text(json.dumps(content | {"mode": "log"}))
    with pytest.raises(InputError, match="mode 'log'"):
        sane_preprocessed.open_checkpoint(record)
    path.write_text(json.dumps(content | {"fc.weight": {"mean": 0.5}}))
    with pytest.raises(InputError, match=r"no usable statistics of fc\.weight"):
        sane_preprocessed.open_checkpoint(record)
    path.unlink()
    with pytest.raises(InputError, match="missing, so the normalisation cannot be undone"):
        sane_preprocessed.open_checkpoint(record)


def test_a_batch_norm_by_another_name_that_was_normalised_but_not_tokenised(tmp_path: Path):
    """With ignore_bn the published code still writes the statistics of modules named batchnorm."""
    real = write(tmp_path)
    path = tmp_path / "dataset_normalization_train.json"
    content = json.loads(path.read_text())
    first = {"conv1.weight": content["conv1.weight"], "batchnorm1.weight": {"mean": 9, "std": 9}}
    path.write_text(json.dumps(first | content))
    found = sane_preprocessed.open_checkpoint(sane_preprocessed.discover(tmp_path)[0]).state_dict()
    torch.testing.assert_close(found["fc.weight"], real[0]["fc.weight"], rtol=1e-5, atol=1e-5)


def test_nothing_of_this_format(tmp_path: Path):
    (tmp_path / "dataset_torch.train").mkdir()
    (tmp_path / "sample_0.pt").touch()
    assert sane_preprocessed.discover(tmp_path) == sane_preprocessed.discover(tmp_path / "sample_0.pt") == []


def test_the_files_that_decide_the_weights_are_named(tmp_path: Path):
    write(tmp_path)
    beside = [str(tmp_path / f"dataset_{kind}_train.json") for kind in ("info", "normalization")]
    assert {record.beside for record in sane_preprocessed.discover(tmp_path)} == {tuple(beside)}
    Path(beside[1]).unlink()
    assert {record.beside for record in sane_preprocessed.discover(tmp_path)} == {(beside[0],)}


@pytest.mark.parametrize(
    ("props", "known"),
    [
        (torch.tensor([0.5, 1e30, 0.25]), {"test_acc": 0.5, "training_iteration": pytest.approx(1e30), "ggap": 0.25}),
        (torch.tensor([0.5, -3.0, 0.25]), {"test_acc": 0.5, "training_iteration": -3, "ggap": 0.25}),
        (torch.tensor([0.5, torch.inf, 0.25]), {"test_acc": 0.5, "training_iteration": torch.inf, "ggap": 0.25}),
        (torch.tensor([1, 2, 3]), {"test_acc": 1, "training_iteration": 2, "ggap": 3}),
        (torch.ones(3).to_sparse(), {}),
        (torch.ones(3, dtype=torch.complex64), {}),
        (torch.ones(3, device="meta"), {}),
        (torch.ones(1).expand(10**9), {}),
    ],
)
def test_odd_properties_cost_only_themselves(tmp_path: Path, props: Tensor, known: dict):
    write(tmp_path)
    change(tmp_path, props=props)
    records = sane_preprocessed.discover(tmp_path)
    assert len(records) == 4 and records[0].properties == known
    assert records[0].epoch == (known.get("training_iteration") if known.get("training_iteration") == 2 else 0)
    assert records[1].properties["training_iteration"] == 22
    write_catalog(tmp_path / "catalog.parquet", records, {})


def test_of_a_sample_only_its_first_view_is_read(tmp_path: Path):
    """The rest of it may be what it wants, so long as nobody asks."""
    real = write(tmp_path)
    path = tmp_path / "dataset_torch.train/sample_0.pt"
    views = torch.load(path, weights_only=True)["w"]
    path.write_bytes(path.read_bytes().replace(views[2].numpy().tobytes(), bytes(views[2].nbytes)))
    found = sane_preprocessed.open_checkpoint(sane_preprocessed.discover(tmp_path)[0]).state_dict()
    torch.testing.assert_close(found["fc.weight"], real[0]["fc.weight"], rtol=1e-5, atol=1e-5)


def test_more_tokens_than_there_can_be_take_no_memory(tmp_path: Path):
    write(tmp_path, max_positions=[10**15, 5, 4])
    with pytest.raises(InputError, match=r"hold 29 of its 1000000000000001 tokens"):
        sane_preprocessed.open_checkpoint(sane_preprocessed.discover(tmp_path)[0])
    write(tmp_path / "other", num_samples=10**12)
    with pytest.raises(InputError, match=r"dataset_info_train\.json: lacks what .*num_samples is 1000000000000"):
        sane_preprocessed.discover(tmp_path / "other")


def every_outcome(root: Path) -> None:
    """Lists and opens everything: nothing but records and refusals, and all of it fits a catalog."""
    try:
        records = sane_preprocessed.discover(root)
        write_catalog(root / "catalog.parquet", records, {})
        assert len(read_catalog(root / "catalog.parquet")) == len(records)
    except InputError as error:
        assert str(root) in str(error) and len(str(error)) < 3000
        return
    for record in records:
        try:
            open_record(record).state_dict()
        except InputError as error:
            assert str(root) in str(error) and len(str(error)) < 3000


ODD = [
    *(None, True, -1, 0, 2**63, 10**4000, 1e30, float("nan"), float("inf"), "", "x" * 10**5, "\ud800", "minmax"),
    *([], [[]], {}, {"a": {}}, [None], [10**400], {"result_keys": ["a", "b"]}, ["\ud800"] * 3, {"mean": 10**400}),
    *({"mean": float("nan"), "std": 1}, {"mean": "1", "std": True}, {"min": None, "max": []}),
]
FIELDS = ["num_samples", "max_positions", "properties", "property_keys", "epoch_list", "standardize", "zoo_path"]


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_in_the_info_end_in_records_or_in_words(tmp_path: Path, field: str):
    write(tmp_path, models=1)
    path = tmp_path / "dataset_info_train.json"
    content = json.loads(path.read_text())
    for value in ODD:
        path.write_text(json.dumps(content | {field: value}))
        every_outcome(tmp_path)
    content.pop(field, None)
    path.write_text(json.dumps(content))
    every_outcome(tmp_path)


@pytest.mark.parametrize("field", ["mode", "fc.weight", "bn1.running_mean", "more"])
@pytest.mark.parametrize("mode", [True, "minmax", "l2_ind"])
def test_odd_values_in_the_normalisation_end_in_weights_or_in_words(tmp_path: Path, mode: str | bool, field: str):
    write(tmp_path, mode, models=1)
    path = tmp_path / "dataset_normalization_train.json"
    content = json.loads(path.read_text())
    for value in ODD:
        path.write_text(json.dumps(content | {field: value}))
        every_outcome(tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "\ufeff{}", "1" * 5000, "\x00", ""])
@pytest.mark.parametrize("kind", ["info", "normalization"])
def test_odd_texts_end_in_words(tmp_path: Path, kind: str, text: str):
    write(tmp_path, models=1)
    (tmp_path / f"dataset_{kind}_train.json").write_text(text)
    every_outcome(tmp_path)


@pytest.mark.parametrize("field", ["w", "m", "p", "props", "more"])
def test_odd_tensors_end_in_weights_or_in_words(tmp_path: Path, field: str):
    write(tmp_path, models=1)
    path = tmp_path / "dataset_torch.train/sample_0.pt"
    sample = torch.load(path, weights_only=True)
    shape = sample[field].shape if field in sample else (3,)
    kinds = [torch.float16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    odd = [torch.ones(shape).to(kind) for kind in kinds]
    odd += [torch.full(shape, value) for value in (torch.nan, torch.inf, -1.0, 1e30)]
    odd += [
        torch.ones(()),
        torch.ones(0),
        torch.ones(0, 0, 0),
        torch.ones(1, 29, 0),
        torch.ones(29, 0),
        torch.ones(0, 3),
    ]
    odd += [torch.ones(shape).to_sparse(), torch.ones(shape, device="meta"), torch.ones(()).expand(shape)]
    odd += [torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8), torch.ones(()).expand(10**9, *shape)]
    for value in [*odd, *ODD]:
        torch.save(sample | {field: value}, path)
        every_outcome(tmp_path)
    for value in (
        [],
        {},
        {"model": sample},
        {"w": sample},
        torch.ones(3),
        {0: torch.ones(3)},
        {"model": {"w": odd[0]}},
    ):
        torch.save(value, path)
        every_outcome(tmp_path)
