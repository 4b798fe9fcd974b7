import json
import logging
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.zoo.catalog import discover, open_record, read_catalog, write_catalog
from sane_ray.zoo.readers import cnn_wild_park

PUBLISHED = Path(__file__).parents[2] / "data" / "wild_park" / "checkpoint.pt"
SETTINGS = {"n_layers": 1, "channels": [3, 4], "activation": ["relu"], "residual": [-1]}


def save(path: Path, value: float, iteration: int, config: object = SETTINGS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {"layers.0.weight": torch.full((4, 3, 3, 3), value), "layers.0.bias": torch.full((4,), value)}
    weights |= {"fc.weight": torch.full((10, 4), value), "fc.bias": torch.full((10,), value)}
    optimizer = torch.optim.Adam([torch.nn.Parameter(tensor) for tensor in weights.values()]).state_dict()
    result = {"test/acc": value, "test/loss": 1 - value, "config": {"a": 1}, "pid": 3, "done": False}
    content = {"model": weights, "optimizer": optimizer, "config": config, "last_result": result}
    torch.save(content | {"iteration": iteration}, path)
    return path


def write_folder(root: Path, runs: int = 2, checkpoints: int = 3) -> Path:
    for run in range(runs):
        for number in range(checkpoints):
            folder = root / "cifar10_zooV2" / f"run_{run}" / f"checkpoint_{number:06d}"
            save(folder / "checkpoint.pt", run / 10 + number / 100, 5 * (number + 1))
    return root


def write_zip(root: Path, path: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root).as_posix())
    return path


def splits(**paths: list[str]) -> str:
    columns = {
        split: {
            "path": names,
            "score": [0.5 + i / 100 for i in range(len(names))],
            "step": [7 * (i + 1) for i in range(len(names))],
        }
        for split, names in paths.items()
    }
    return json.dumps(columns)


def paths(run: int) -> list[str]:
    return [f"cifar10_zooV2/run_{run}/checkpoint_{number:06d}/checkpoint.pt" for number in range(3)]


def test_an_extracted_folder(tmp_path: Path):
    records = cnn_wild_park.discover(write_folder(tmp_path))
    assert [record.id for record in records] == [f"cifar10_zooV2/run_{r}/{e}" for r in (0, 1) for e in (5, 10, 15)]
    record = records[4]
    assert record.path == str(tmp_path / "cifar10_zooV2/run_1/checkpoint_000001/checkpoint.pt")
    assert record.properties == pytest.approx({"test_acc": 0.11, "test_loss": 0.89, "step": 10})
    assert record.config == {"n_layers": 1, "channels": "[3, 4]", "activation": '["relu"]', "residual": "[-1]"}
    assert (record.epoch, record.reader, record.member, record.split) == (10, "cnn_wild_park", "", None)
    checkpoint = cnn_wild_park.open_checkpoint(record)
    assert list(checkpoint.meta) == ["layers.0.weight", "layers.0.bias", "fc.weight", "fc.bias"]
    assert checkpoint.tensor("fc.weight").unique().tolist() == pytest.approx([0.11])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("source", ["park/zoo.zip", "park"])
def test_inside_its_zip_without_extracting(tmp_path: Path, compression: int, source: str):
    folder = write_folder(tmp_path / "extracted")
    (tmp_path / "park").mkdir()
    write_zip(folder, tmp_path / "park" / "zoo.zip", compression)
    records = cnn_wild_park.discover(tmp_path / source)
    extracted = cnn_wild_park.discover(folder)
    assert [record.id for record in records] == [record.id for record in extracted]
    assert [record.properties for record in records] == [record.properties for record in extracted]
    assert {record.path for record in records} == {str(tmp_path / "park" / "zoo.zip")}
    assert records[1].member == "cifar10_zooV2/run_0/checkpoint_000001/checkpoint.pt"
    for inside, outside in zip(records, extracted, strict=True):
        values, expected = (cnn_wild_park.open_checkpoint(record).state_dict() for record in (inside, outside))
        assert all(torch.equal(values[key], expected[key]) for key in expected)
    assert [path.name for path in (tmp_path / "park").iterdir()] == ["zoo.zip"]


def test_settings_saved_as_omegaconf_objects_are_read_without_omegaconf(tmp_path: Path):
    folder = tmp_path / "run" / "checkpoint_000003"
    folder.mkdir(parents=True)
    shutil.copy(PUBLISHED, folder)
    (record,) = cnn_wild_park.discover(tmp_path)
    checkpoint = cnn_wild_park.open_checkpoint(record)
    assert list(checkpoint.meta) == [f"{m}.{n}" for m in ("layers.0", "layers.1", "fc") for n in ("weight", "bias")]
    assert checkpoint.meta["layers.1.weight"].shape == (8, 4, 5, 5)
    assert record.properties == {"test_acc": 0.53, "test_loss": 1.2, "step": 7}
    assert record.config == {
        "n_layers": 2,
        "n_classes": 10,
        "channels": "[3, 4, 8]",
        "kernel_size": "[3, 5]",
        "stride": "[1, 2]",
        "padding": "[1, 2]",
        "residual": "[-1, 0]",
        "activation": '["relu", null]',
    }
    code = "import sys, pathlib; from sane_ray.zoo.readers import cnn_wild_park as park; "
    code += f"park.discover(pathlib.Path({str(tmp_path)!r})); assert 'omegaconf' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("place", ["root/cnn_park_splits.json", "cnn_park_splits.json", "inside"])
@pytest.mark.parametrize("zipped", [False, True])
def test_the_published_splits_and_scores(tmp_path: Path, place: str, zipped: bool):
    root = write_folder(tmp_path / "root", runs=3)
    text = splits(train=paths(0), val=[], test=paths(1))
    (root / "cifar10_zooV2/cnn_park_splits.json" if place == "inside" else tmp_path / place).write_text(text)
    source = root
    if zipped:
        if place.startswith("root/"):
            (tmp_path / place).unlink()  # beside the zip, not in it
            (tmp_path / "cnn_park_splits.json").write_text(text)
        source = write_zip(root, tmp_path / "zoo.zip")
    records = cnn_wild_park.discover(source)
    assert [record.split for record in records] == 3 * ["train"] + 3 * ["test"] + 3 * [None]
    assert [record.epoch for record in records] == [7, 14, 21, 7, 14, 21, 5, 10, 15]
    assert records[1].properties == pytest.approx({"score": 0.51, "test_acc": 0.51, "test_loss": 0.99, "step": 14})


def test_of_many_checkpoints_none_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(cnn_wild_park, "FEW", 5)
    for number in range(6):
        folder = tmp_path / "run_0" / f"checkpoint_{number:06d}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_bytes(b"not to be opened")
    with caplog.at_level(logging.WARNING):
        records = cnn_wild_park.discover(tmp_path)
    assert [record.id for record in records] == [f"run_0/{number}" for number in range(6)]
    assert all(record.properties == {} for record in records)
    assert "6 checkpoints without cnn_park_splits.json" in caplog.text
    (tmp_path / "cnn_park_splits.json").write_text(splits(test=paths(0)))
    assert [record.properties.get("test_acc") for record in cnn_wild_park.discover(tmp_path)][:4] == [
        0.5,
        0.51,
        0.52,
        None,
    ]


def test_what_the_file_knows_comes_with_the_opened_checkpoint(tmp_path: Path):
    save(tmp_path / "run/checkpoint_2/checkpoint.pt", 0.25, 9)
    checkpoint = cnn_wild_park.open_checkpoint(cnn_wild_park.discover(tmp_path)[0])
    assert isinstance(checkpoint, cnn_wild_park.WildParkCheckpoint)
    assert checkpoint.properties == {"test_acc": 0.25, "test_loss": 0.75, "step": 9}
    assert checkpoint.config["n_layers"] == 1


def test_a_checkpoint_both_extracted_and_zipped_is_listed_once(tmp_path: Path):
    write_zip(write_folder(tmp_path), tmp_path / "zoo.zip")
    shutil.rmtree(tmp_path / "cifar10_zooV2/run_1")
    records = cnn_wild_park.discover(tmp_path)
    assert len(records) == 6
    assert [bool(record.member) for record in records] == 3 * [False] + 3 * [True]


def test_a_folder_without_its_file_is_listed_and_refused_when_opened(tmp_path: Path):
    write_folder(tmp_path, runs=1)
    (tmp_path / "cifar10_zooV2/run_0/checkpoint_000001/checkpoint.pt").unlink()
    records = cnn_wild_park.discover(tmp_path)
    assert [record.epoch for record in records] == [5, 1, 15]
    with pytest.raises(InputError, match=r"checkpoint_000001/checkpoint\.pt: no such checkpoint file"):
        cnn_wild_park.open_checkpoint(records[1])


def test_nothing_of_this_format(tmp_path: Path):
    assert cnn_wild_park.discover(tmp_path) == []
    path = save(tmp_path / "loose.pt", 0.5, 1)
    assert cnn_wild_park.discover(path) == cnn_wild_park.discover(tmp_path) == []
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("cat.png", b"")
    (tmp_path / "damaged.zip").write_bytes(b"PK\x03\x04")
    assert cnn_wild_park.discover(tmp_path) == cnn_wild_park.discover(tmp_path / "images.zip") == []
    assert cnn_wild_park.discover(tmp_path / "missing") == []


def test_a_damaged_zip_is_refused_by_name(tmp_path: Path):
    path = write_zip(write_folder(tmp_path / "zoo"), tmp_path / "zoo.zip")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"zoo\.zip: truncated, missing, or no zip file"):
        cnn_wild_park.discover(path)


def test_a_damaged_member_costs_only_itself(tmp_path: Path):
    path = write_zip(write_folder(tmp_path / "zoo", runs=1), tmp_path / "zoo.zip", zipfile.ZIP_STORED)
    name = "cifar10_zooV2/run_0/checkpoint_000001/checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(name).header_offset
    content = bytearray(path.read_bytes())
    content[start + 500] ^= 0xFF
    path.write_bytes(content)
    records = cnn_wild_park.discover(path)
    assert len(records) == 3 and records[1].properties == {}
    with pytest.raises(InputError, match=rf"zoo\.zip: the member {name} is damaged \(Bad CRC"):
        cnn_wild_park.open_checkpoint(records[1])
    cnn_wild_park.open_checkpoint(records[2])


def set_flag(path: Path, name: str, offset: int, value: bytes) -> None:
    """Writes into a member's entry in the zip's directory."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    content[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(content)


def test_encrypted_and_oversized_members_are_refused_by_name(tmp_path: Path):
    path = write_zip(write_folder(tmp_path / "zoo", runs=1), tmp_path / "zoo.zip")
    name = "cifar10_zooV2/run_0/checkpoint_000001/checkpoint.pt"
    plain = path.read_bytes()
    set_flag(path, name, 8, b"\x01")
    with pytest.raises(InputError, match=rf"the member {name} is encrypted; unpack the zip with its password"):
        cnn_wild_park.open_checkpoint(cnn_wild_park.discover(path)[1])
    path.write_bytes(plain)
    set_flag(path, name, 24, (1 << 31).to_bytes(4, "little"))
    with pytest.raises(InputError, match=rf"the member {name} says it holds 2,147,483,648 bytes"):
        cnn_wild_park.open_checkpoint(cnn_wild_park.discover(path)[1])


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path):
    name = "run/checkpoint_1/checkpoint.pt"
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(1 << 24))
    set_flag(tmp_path / "bomb.zip", name, 24, (1000).to_bytes(4, "little"))
    with pytest.raises(InputError, match=f"the member {name} is damaged"):
        cnn_wild_park.open_checkpoint(cnn_wild_park.discover(tmp_path / "bomb.zip")[0])


def test_names_that_climb_are_read_and_nothing_is_written(tmp_path: Path):
    file = save(tmp_path / "file.pt", 0.5, 1)
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "zoo.zip", "w") as archive:
        archive.write(file, "../../run/checkpoint_1/checkpoint.pt")
    file.unlink()
    (record,) = cnn_wild_park.discover(inside)
    assert cnn_wild_park.open_checkpoint(record).tensor("fc.bias").tolist() == 10 * [0.5]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "zoo.zip"]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_file_that_wants_to_run_code_is_refused_and_does_not(tmp_path: Path):
    save(tmp_path / "run/checkpoint_1/checkpoint.pt", 0.5, 1, config=Malicious(tmp_path / "ran"))
    (record,) = cnn_wild_park.discover(tmp_path)
    with pytest.raises(InputError, match=r"checkpoint\.pt: needs Python code to be read \(.*(posix|nt)\.mkdir"):
        cnn_wild_park.open_checkpoint(record)
    assert record.properties == {} and not (tmp_path / "ran").exists()


def test_settings_that_hold_themselves_do_no_harm(tmp_path: Path):
    circle: list = []
    circle.append(circle)
    save(tmp_path / "run/checkpoint_1/checkpoint.pt", 0.5, 1, config={"channels": circle, 3: {"deep": [[1]]}})
    assert cnn_wild_park.discover(tmp_path)[0].config == {"channels": "[[null]]", "3": '{"deep": [null]}'}


def test_files_without_a_model_are_refused(tmp_path: Path):
    for number, content in enumerate([{"optimizer": {}}, [1, 2]]):
        (tmp_path / f"run/checkpoint_{number}").mkdir(parents=True)
        torch.save(content, tmp_path / f"run/checkpoint_{number}/checkpoint.pt")
    for record in cnn_wild_park.discover(tmp_path):
        with pytest.raises(InputError, match=r"checkpoint\.pt: (no tensors in it|holds a list)"):
            cnn_wild_park.open_checkpoint(record)
    (tmp_path / "run/checkpoint_0/checkpoint.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoint\.pt: the checkpoint file is empty"):
        cnn_wild_park.open_checkpoint(cnn_wild_park.discover(tmp_path)[0])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"test": {"path": ["a/b/checkpoint_1/c.pt"], "score": [[1]], "step": [1]}}',
        '{"test": {"path": ["a/b/checkpoint_1/c.pt"], "score": [1], "step": ["a"]}}',
        '{"test": {"path": [3], "score": [1], "step": [1]}}',
        "{",
        "[]",
        '{"dev": {"path": [], "score": [], "step": []}}',
        '{"test": {"path": ["a/b/checkpoint_1/c.pt"], "score": [], "step": []}}',
        '{"test": {"path": ["c.pt"], "score": [1], "step": [1]}}',
        '{"test": {"path": []}}',
    ],
)
def test_damaged_splits_are_refused(tmp_path: Path, text: str):
    write_folder(tmp_path, runs=1)
    (tmp_path / "cnn_park_splits.json").write_text(text)
    with pytest.raises(InputError, match=r"cnn_park_splits\.json: not the published splits"):
        cnn_wild_park.discover(tmp_path)


def put(root: Path, folder: str, content: object) -> Path:
    path = root / "run" / folder / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


WEIGHTS = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}


def test_checkpoints_of_one_step_are_told_apart_by_their_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number in (2, 7, 9):
        put(tmp_path, f"checkpoint_{number}", {"model": WEIGHTS, "iteration": 3 + number // 9})
    assert [record.id for record in discover(tmp_path)] == ["run/2", "run/7", "run/9"]
    assert "two checkpoints of run have one step" in caplog.text


def test_a_damaged_file_does_not_take_the_epoch_of_another(tmp_path: Path):
    put(tmp_path, "checkpoint_1", {"model": WEIGHTS, "iteration": 3})
    put(tmp_path, "checkpoint_3", {}).write_bytes(b"damaged")
    save(tmp_path / "other/checkpoint_1/checkpoint.pt", 0.5, 8)
    assert [record.id for record in discover(tmp_path)] == ["other/8", "run/1", "run/3"]


def test_two_spellings_of_one_number_are_two_checkpoints(tmp_path: Path):
    for folder in ("checkpoint_1", "checkpoint_000001"):
        put(tmp_path, folder, {"model": WEIGHTS})
    records = discover(tmp_path)
    assert {(record.id, record.epoch) for record in records} == {("run/1", 1), ("run/checkpoint_1", 1)}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_number_that_is_no_epoch_is_passed_over_aloud(tmp_path: Path, zipped: bool, caplog: pytest.LogCaptureFixture):
    root = tmp_path / "zoo"
    put(root, "checkpoint_" + "9" * 200, {"model": WEIGHTS})
    put(root, "checkpoint_4", {"model": WEIGHTS})
    source = write_zip(root, tmp_path / "zoo.zip") if zipped else root
    assert [record.id for record in discover(source)] == ["run/4"]
    assert "the number of its folder is no epoch" in caplog.text


def test_a_folder_that_may_not_be_read_is_listed_and_refused(open_folder: Path, unprivileged):
    put(open_folder, "checkpoint_1", {"model": WEIGHTS})
    (open_folder / "run/checkpoint_1").chmod(0)
    try:
        with unprivileged():
            (record,) = cnn_wild_park.discover(open_folder)
            with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be read"):
                cnn_wild_park.open_checkpoint(record)
    finally:
        (open_folder / "run/checkpoint_1").chmod(0o755)


def test_a_member_that_was_compressed_twice_is_refused(tmp_path: Path):
    torch.save({"model": {"weight": torch.zeros(20_000_000)}}, tmp_path / "large.pt")
    with zipfile.ZipFile(tmp_path / "large.pt") as large, zipfile.ZipFile(tmp_path / "s", "w", 8) as small:
        for name in large.namelist():
            small.writestr(name, large.read(name))
    with zipfile.ZipFile(tmp_path / "zoo.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "s", "run/checkpoint_1/checkpoint.pt")
        archive.write(tmp_path / "large.pt", "run/checkpoint_2/checkpoint.pt")
    twice, once = cnn_wild_park.discover(tmp_path / "zoo.zip")
    with pytest.raises(InputError, match="says it unpacks to 80,"):
        cnn_wild_park.open_checkpoint(twice)
    with pytest.raises(InputError, match="says it holds 80,"):
        cnn_wild_park.open_checkpoint(once)


def test_a_small_file_does_not_make_large_settings(tmp_path: Path):
    nested: list = ["x" * 1000]
    for _ in range(3):
        nested = [nested] * 1000
    config = {"channels": nested, "text": "y" * 10**6, "last": 3}
    put(tmp_path, "checkpoint_1", {"model": WEIGHTS, "config": {"last": 3} | config})
    (record,) = cnn_wild_park.discover(tmp_path)
    assert record.config["last"] == 3
    assert sum(len(str(value)) for value in record.config.values()) < 10_000


def test_a_file_that_makes_much_of_little_is_refused_here_too(tmp_path: Path):
    path = put(tmp_path, "checkpoint_1", {"model": WEIGHTS, "cache": bytearray(b"abc")})
    with pytest.raises(InputError, match="holds a bytearray"):
        cnn_wild_park.open_checkpoint(cnn_wild_park.discover(tmp_path)[0])
    torch.save({"model": {"weight": torch.ones(1).expand(10**10)}}, path)
    with pytest.raises(InputError, match="tensor 'weight' says it has 10,000,000,000 values"):
        cnn_wild_park.open_checkpoint(cnn_wild_park.discover(tmp_path)[0])


def odd_tensor() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.detach = "no method"  # type: ignore[method-assign,assignment]
    return tensor


def nest(levels: int) -> dict:
    content: dict = {}
    for _ in range(levels):
        content = {"a": content}
    return content


ODD = [
    *(None, True, -1, 0, 2**63 - 1, 2**63, -(10**30), 10**5000, 1e30, float("nan"), float("-inf"), 3 + 4j),
    *("", "x" * 10**5, "\ud800", b"\xff", [], (), {}, set(), [[[]]], nest(100), torch.Size([1]), torch.float16),
    *({("a/b",): 1}, {None: 1}, {2: 3}, {"a/b": 10**5000, "c/d": 1}, {"\ud800/x": "\ud800"}, {10**5000: 1}, {"a": []}),
    *({"a/b": float("nan")}, {"x" * 10**5 + "/": 1}, {"a/b": True, "a_b/": 2, "a/b/": torch.ones(3)}, {"": {"": ""}}),
    *(
        {"k": [10**5000, "\ud800", b"", {3: {4: {5: 6}}}]},
        {"0.weight": torch.eye(3).to_sparse()},
        {"a.b": torch.ones(())},
    ),
    *(torch.ones(3), torch.ones(3).to_sparse(), torch.ones(3, device="meta"), odd_tensor(), {"a.w": odd_tensor()}),
]


@pytest.mark.parametrize("field", ["model", "iteration", "last_result", "config", "optimizer", "more", "all"])
def test_odd_values_end_in_records_or_in_words(tmp_path: Path, field: str):
    """A good neighbour is always read, whatever stands in one checkpoint."""
    put(tmp_path, "checkpoint_1", {"model": WEIGHTS, "iteration": 5, "last_result": {"test/acc": 0.5}})
    for value in ODD:
        odd = put(
            tmp_path, "checkpoint_2", value if field == "all" else {"model": WEIGHTS, "iteration": 9, field: value}
        )
        records = discover(tmp_path)
        assert len(records) == 2 and all(0 <= record.epoch < 2**63 for record in records)
        write_catalog(tmp_path / "catalog.parquet", records, {})
        assert len(read_catalog(tmp_path / "catalog.parquet")) == 2
        for record in records:
            try:
                assert set(open_record(record).state_dict()) == set(WEIGHTS) or record.path == str(odd)
            except InputError as error:
                assert record.path == str(odd) and str(odd) in str(error) and len(str(error)) < 1000
        (tmp_path / "catalog.parquet").unlink()


def test_flipped_bytes_cost_only_their_checkpoint(tmp_path: Path):
    put(tmp_path, "checkpoint_1", {"model": WEIGHTS, "iteration": 5})
    path = put(tmp_path, "checkpoint_2", {"model": WEIGHTS, "iteration": 9, "last_result": {"test/acc": 0.5}})
    content, draw = path.read_bytes(), random.Random(1)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        good, bad = discover(tmp_path)
        assert open_record(good if good.path != str(path) else bad).state_dict().keys() == WEIGHTS.keys()
        try:
            open_record(bad if good.path != str(path) else good).state_dict()
        except InputError as error:
            assert str(path) in str(error)
