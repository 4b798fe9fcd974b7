import json
from pathlib import Path

import pytest

from sane_ray.errors import InputError
from sane_ray.zoo.readers import tune


def add_model(root: Path, name: str, folders: list[str], rows: list[dict] | None = None, **files: object) -> Path:
    """A model in the published layout; the weights are empty files, which a reader must not open."""
    model = root / name
    for folder in folders:
        (model / folder).mkdir(parents=True)
        (model / folder / "checkpoints").touch()
    if rows is not None:
        (model / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, content in files.items():
        (model / f"{file}.json").write_text(json.dumps(content))
    return model


def row(epoch: int, **values: object) -> dict:
    return {"train_acc": 0.1 * epoch, "test_acc": 0.05 * epoch, "training_iteration": epoch, **values}


def test_short_and_padded_folder_names_and_other_folders(tmp_path: Path):
    add_model(tmp_path, "short", ["checkpoint_3", "checkpoint_10", "checkpoint_tmp", "logs"])
    add_model(tmp_path, "padded", ["checkpoint_000000", "checkpoint_000010"])
    assert [record.id for record in tune.discover(tmp_path)] == ["padded/0", "padded/10", "short/3", "short/10"]


@pytest.mark.parametrize("first", [0, 1])
def test_results_are_matched_by_number_whether_or_not_the_untrained_network_has_one(tmp_path: Path, first: int):
    add_model(tmp_path, "model", [f"checkpoint_{e:06d}" for e in range(4)], [row(e) for e in range(first, 4)])
    records = tune.discover(tmp_path)
    assert [record.properties.get("training_iteration") for record in records] == ([0] if first == 0 else [None]) + [
        1,
        2,
        3,
    ]
    assert records[3].properties["train_acc"] == pytest.approx(0.3)
    assert records[3].properties["ggap"] == pytest.approx(0.15)
    assert (records[0].properties == {}) == (first == 1)


def test_results_as_one_list_with_the_key_epoch(tmp_path: Path):
    model = add_model(tmp_path, "model", ["checkpoint_7"])
    (model / "result.json").write_text(json.dumps([{"epoch": 7, "test_acc": 0.5}]))
    assert tune.discover(tmp_path)[0].properties == {"epoch": 7, "test_acc": 0.5}


def test_what_ray_writes_of_itself_and_its_machine_is_left_out(tmp_path: Path):
    line = row(1, hostname="node7", node_ip="10.0.0.7", pid=5, date="2021", config={"seed": 3}, custom="yes", flag=None)
    add_model(tmp_path, "model", ["checkpoint_1"], [line])
    properties = tune.discover(tmp_path)[0].properties
    assert set(properties) == {"train_acc", "test_acc", "training_iteration", "ggap", "custom", "flag"}


def test_a_model_without_results_or_config_is_still_listed(tmp_path: Path):
    add_model(tmp_path, "model", ["checkpoint_1"])
    record = tune.discover(tmp_path)[0]
    assert record.properties == {} and record.config == {}


def test_a_damaged_line_costs_only_its_own_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = add_model(tmp_path, "model", ["checkpoint_1", "checkpoint_2"], [row(1)])
    with (model / "result.json").open("a") as file:
        file.write('{"training_iteration": 2, "test_')
    records = tune.discover(tmp_path)
    assert records[0].properties["test_acc"] == 0.05 and records[1].properties == {}
    assert "1 damaged lines" in caplog.text


@pytest.mark.parametrize("name", ["params", "config"])
def test_config_from_either_file_flat_or_nested(tmp_path: Path, name: str):
    content = {"model::type": "CNN", "seed": 3, "optim": {"lr": 0.1, "schedule": {"kind": None}}, "sizes": [1, 2]}
    add_model(tmp_path, "model", ["checkpoint_1"], **{name: content})
    expected = {"model::type": "CNN", "seed": 3, "optim::lr": 0.1, "optim::schedule::kind": None, "sizes": "[1, 2]"}
    assert tune.discover(tmp_path)[0].config == expected


def test_the_zoos_licence_goes_to_every_model_that_names_none(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"license": "CC-BY-4.0", "grid": [1, 2]}))
    add_model(tmp_path, "a", ["checkpoint_1"], params={"seed": 1})
    add_model(tmp_path, "b", ["checkpoint_1"], params={"license": "MIT"})
    assert [record.license for record in tune.discover(tmp_path)] == ["CC-BY-4.0", "MIT"]


def test_models_in_deeper_folders_and_behind_links(tmp_path: Path):
    zoo = tmp_path / "zoo"
    add_model(zoo, "finetuning/base/model", ["checkpoint_000001"])
    add_model(zoo, ".partial/model", ["checkpoint_000001"])
    add_model(tmp_path, "elsewhere", ["checkpoint_000002"])
    (zoo / "linked").symlink_to(tmp_path / "elsewhere")
    (zoo / "loop").symlink_to(zoo)
    assert [record.id for record in tune.discover(zoo)] == ["finetuning/base/model/1", "linked/2"]


def test_a_single_model_is_a_zoo(tmp_path: Path):
    add_model(tmp_path, "only", ["checkpoint_4"], [row(4)], params={"seed": 1})
    (record,) = tune.discover(tmp_path / "only")
    assert record.id == "only/4" and record.config == {"seed": 1} and record.properties["training_iteration"] == 4


def test_a_checkpoint_folder_without_weights_is_listed_so_that_it_can_be_counted(tmp_path: Path):
    model = add_model(tmp_path, "model", ["checkpoint_1"])
    (model / "checkpoint_2").mkdir()
    assert [record.epoch for record in tune.discover(tmp_path)] == [1, 2]


def test_two_folders_of_one_epoch_are_refused(tmp_path: Path):
    add_model(tmp_path, "model", ["checkpoint_5", "checkpoint_000005"])
    with pytest.raises(InputError, match=r"model: checkpoint_000005 and checkpoint_5 both claim epoch 5; remove one"):
        tune.discover(tmp_path)


def test_params_that_are_no_json_are_refused(tmp_path: Path):
    (add_model(tmp_path, "model", ["checkpoint_5"]) / "params.json").write_text("{'seed': 1}")
    with pytest.raises(InputError, match=r"params\.json: not JSON .*repair it, or remove it"):
        tune.discover(tmp_path)


def test_nothing_of_this_format(tmp_path: Path):
    (tmp_path / "weights.npy").touch()
    assert tune.discover(tmp_path) == []
