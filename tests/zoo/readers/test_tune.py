import csv
import json
from pathlib import Path

import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.zoo.checkpoint import load_state_dict
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


def test_two_folders_of_one_epoch_are_one_record_that_is_refused(tmp_path: Path):
    add_model(tmp_path, "model", ["checkpoint_5", "checkpoint_000005", "checkpoint_6"])
    first, second = tune.discover(tmp_path)
    assert (first.id, second.id) == ("model/5", "model/6")
    with pytest.raises(
        InputError, match=r"checkpoint_000005/checkpoints: checkpoint_5 beside it claims the same epoch"
    ):
        tune.open_checkpoint(first)


def test_of_two_folders_of_one_epoch_the_one_with_weights_counts(tmp_path: Path):
    model = add_model(tmp_path, "model", ["checkpoint_05"])
    (model / "checkpoint_000005").mkdir()
    torch.save({"weight": torch.ones(2)}, model / "checkpoint_05" / "checkpoints")
    (record,) = tune.discover(tmp_path)
    assert tune.open_checkpoint(record).meta["weight"].shape == (2,)


DAMAGED = ["{'seed': 1}", "", "[" * 100_000, "1" * 5000, '"text"', "\x00\ufffd", "[1, 2]"]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("file", ["params.json", "result.json", "config.json", "progress.csv"])
def test_a_damaged_file_of_one_model_costs_that_model_its_properties_only(tmp_path: Path, file: str, text: str):
    add_model(tmp_path, "good", ["checkpoint_5"], [row(5)], params={"seed": 1})
    (add_model(tmp_path, "bad", ["checkpoint_5"]) / file).write_text(text)
    bad, good = tune.discover(tmp_path)
    assert (bad.id, bad.properties, bad.config) == ("bad/5", {}, {})
    assert good.properties["training_iteration"] == 5 and good.config == {"seed": 1}


def test_a_damaged_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (add_model(tmp_path, "model", ["checkpoint_5"]) / "params.json").write_text("{'seed': 1}")
    tune.discover(tmp_path)
    assert "model/params.json: not JSON" in caplog.text


def test_where_params_cannot_be_read_the_other_file_is(tmp_path: Path):
    (add_model(tmp_path, "model", ["checkpoint_5"], config={"seed": 2}) / "params.json").write_text("{")
    assert tune.discover(tmp_path)[0].config == {"seed": 2}


def test_a_file_or_folder_that_may_not_be_read(open_folder: Path, unprivileged, caplog: pytest.LogCaptureFixture):
    model = add_model(open_folder, "model", ["checkpoint_5"], [row(5)], params={"seed": 1})
    add_model(open_folder, "secret", ["checkpoint_5"]).chmod(0)
    (model / "params.json").chmod(0)
    with unprivileged():
        (record,) = tune.discover(open_folder)
    assert record.config == {} and record.properties["training_iteration"] == 5
    assert "params.json: cannot be read" in caplog.text and "secret: cannot be read" in caplog.text


def test_nothing_of_this_format(tmp_path: Path):
    (tmp_path / "weights.npy").touch()
    assert tune.discover(tmp_path) == []
    assert tune.discover(tmp_path / "weights.npy") == [] and tune.discover(tmp_path / "nowhere") == []


def test_checkpoint_folders_of_another_format_are_left_to_its_reader(tmp_path: Path):
    folder = tmp_path / "model" / "checkpoint_000005"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    assert tune.discover(tmp_path) == []


@pytest.mark.parametrize("spelling", ["checkpoint_{}", "checkpoint_{:02d}", "checkpoint_{:04d}", "checkpoint_{:06d}"])
@pytest.mark.parametrize("wrap", [None, "model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_come_back_from_every_spelling(tmp_path: Path, spelling: str, wrap: str | None, prefix: str):
    weights = {
        epoch: {"layer.weight": torch.full((2, 3), float(epoch)), "layer.bias": torch.ones(2)} for epoch in (0, 7)
    }
    model = add_model(tmp_path, "model", [spelling.format(epoch) for epoch in weights], [row(7)])
    for epoch, state_dict in weights.items():
        content = {prefix + key: value for key, value in state_dict.items()}
        content = content if wrap is None else {"epoch": epoch, wrap: content, "optimizer": {"state": {}}}
        torch.save(content, model / spelling.format(epoch) / "checkpoints")
    records = tune.discover(tmp_path)
    assert [record.epoch for record in records] == [0, 7]
    for record in records:
        loaded = tune.open_checkpoint(record).state_dict()
        assert list(loaded) == ["layer.weight", "layer.bias"]
        assert all(torch.equal(loaded[key], value) for key, value in weights[record.epoch].items())


def test_lines_without_numbers_and_lines_of_another_attempt(tmp_path: Path):
    rows = [row(3, test_acc=0.1), {"test_acc": 0.9}, {"training_iteration": True}, {"training_iteration": None}]
    add_model(tmp_path, "model", ["checkpoint_1", "checkpoint_3"], [*rows, row(3.0, test_acc=0.2)])
    first, last = tune.discover(tmp_path)
    assert first.properties == {} and last.properties["test_acc"] == 0.2


def test_generalisation_gap_from_validation_where_there_is_no_test(tmp_path: Path):
    rows = [
        {"training_iteration": 1, "train_acc": 0.9, "val_acc": 0.6},
        {"training_iteration": 2, "train_acc": 0.9, "val_acc": 0.6, "test_acc": 0.5},
        {"training_iteration": 3, "train_acc": 0.9},
        {"training_iteration": 4, "train_acc": 0.9, "val_acc": 0.6, "test_acc": None},
    ]
    add_model(tmp_path, "model", [f"checkpoint_{epoch}" for epoch in range(1, 5)], rows)
    gaps = [record.properties.get("ggap") for record in tune.discover(tmp_path)]
    assert gaps == [pytest.approx(0.3), pytest.approx(0.4), None, pytest.approx(0.3)]


def test_nested_measurements_are_flat(tmp_path: Path):
    add_model(tmp_path, "model", ["checkpoint_1"], [row(1, landscape={"hessian": {"trace": 3.5}, "lines": [1, 2]})])
    properties = tune.discover(tmp_path)[0].properties
    assert properties["landscape::hessian::trace"] == 3.5 and properties["landscape::lines"] == "[1, 2]"


def test_the_table_where_the_lines_are_missing(tmp_path: Path):
    model = add_model(tmp_path, "model", ["checkpoint_000001", "checkpoint_000002"], run_config={"seed": 4})
    columns = ["train_acc", "test_acc", "training_iteration", "hostname", "config/seed", "head/loss", "kind", "empty"]
    with (model / "progress.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, [0.5, 0.25, 1, "node", 4, 1e-3, "a,b", ""], [0.75, 0.25, 2, "node", 4]])
    first, second = tune.discover(tmp_path)
    numbers = {"train_acc": 0.5, "test_acc": 0.25, "training_iteration": 1, "ggap": 0.25}
    assert first.properties == numbers | {"head::loss": 1e-3, "kind": "a,b", "empty": None}
    assert second.properties["ggap"] == 0.5 and first.config == {"seed": 4}


@pytest.mark.parametrize("top", ["", "dataset/"])
def test_fine_tuned_networks_name_their_base(tmp_path: Path, top: str):
    add_model(tmp_path, f"{top}pretraining/vit_1", ["checkpoint_000009"])
    add_model(tmp_path, f"{top}finetuning/vit_1/lr_3", ["checkpoint_000002"])
    add_model(tmp_path, f"{top}finetuning/elsewhere/lr_3", ["checkpoint_000002"])
    assert {record.model: record.parents for record in tune.discover(tmp_path)} == {
        f"{top}pretraining/vit_1": (),
        f"{top}finetuning/vit_1/lr_3": (f"{top}pretraining/vit_1",),
        f"{top}finetuning/elsewhere/lr_3": ("elsewhere",),
    }
    assert tune.discover(tmp_path / top / "finetuning" / "vit_1")[0].parents == ("vit_1",)


def test_several_zoos_in_one_folder_each_with_its_licence(tmp_path: Path):
    for zoo, name in (("tune_zoo_a_cnn3", "MIT"), ("tune_zoo_b_cnn3", "CC0-1.0"), ("tune_zoo_c_cnn3", None)):
        add_model(tmp_path, f"{zoo}/NN_1", ["checkpoint_1"])
        (tmp_path / zoo / "config.json").write_text(json.dumps({"license": name} if name else {"seed": [1, 2]}))
    (tmp_path / "config.json").write_text(json.dumps({"license": "CC-BY-4.0"}))
    found = [(record.model, record.license) for record in tune.discover(tmp_path)]
    assert found == [
        ("tune_zoo_a_cnn3/NN_1", "MIT"),
        ("tune_zoo_b_cnn3/NN_1", "CC0-1.0"),
        ("tune_zoo_c_cnn3/NN_1", "CC-BY-4.0"),
    ]


def test_no_licence_is_taken_from_outside_the_zoo(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"license": "MIT"}))
    add_model(tmp_path, "zoo/model", ["checkpoint_1"])
    assert tune.discover(tmp_path / "zoo")[0].license is None
    assert tune.discover(tmp_path / "zoo" / "model")[0].license is None


def test_a_checkpoint_behind_a_broken_link_is_counted(tmp_path: Path):
    model = add_model(tmp_path, "model", ["checkpoint_1"])
    (model / "checkpoint_2").symlink_to(tmp_path / "gone")
    _, missing = tune.discover(tmp_path)
    with pytest.raises(InputError, match="no such checkpoint file"):
        tune.open_checkpoint(missing)


def test_code_in_one_checkpoint_is_refused_by_name(tmp_path: Path):
    model = add_model(tmp_path, "model", ["checkpoint_1"])
    torch.save({"weight": torch.ones(2), "x": torch.nn.Linear(1, 1)}, model / "checkpoint_1" / "checkpoints")
    with pytest.raises(InputError, match=r"checkpoint_1/checkpoints: needs Python code"):
        tune.open_checkpoint(tune.discover(tmp_path)[0])


def test_the_path_is_that_of_the_weights(tmp_path: Path):
    model = add_model(tmp_path, "model", ["checkpoint_1"])
    torch.save({"weight": torch.ones(2)}, model / "checkpoint_1" / "checkpoints")
    assert torch.equal(load_state_dict(tune.discover(tmp_path)[0].path)["weight"], torch.ones(2))


def test_numbers_that_no_float_holds(tmp_path: Path):
    rows = [
        row(1, train_acc=10**400),
        row(2, train_acc=10**400, test_acc=float("inf")),
        {"training_iteration": 10**400},
    ]
    add_model(tmp_path, "model", ["checkpoint_1", "checkpoint_2"], rows, params={"seed": 10**400})
    first, second = tune.discover(tmp_path)
    assert first.properties["ggap"] == float("inf") and second.properties["ggap"] != second.properties["ggap"]
    assert first.config == {"seed": float("inf")}


@pytest.mark.parametrize("depth", [500, 900, 990])
def test_results_and_settings_nested_as_deep_as_python_reads(tmp_path: Path, depth: int):
    nested = '{"a":' * depth + "1" + "}" * depth
    model = add_model(tmp_path, "model", ["checkpoint_1"])
    (model / "params.json").write_text(nested)
    (model / "result.json").write_text(f'{{"training_iteration": 1, "b": {nested}}}')
    (record,) = tune.discover(tmp_path)
    assert record.id == "model/1"
