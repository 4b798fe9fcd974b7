import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from sane_ray.config import ZooConfig
from sane_ray.errors import InputError
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.builder import ZooBuildError, build_zoo, check_zoo, describe, grid, plan_zoo

CONFIG = ZooConfig(models=6, checkpoint_epochs=[0, 2], seed=3)


@pytest.fixture(scope="module")
def zoo(ray_session, tmp_path_factory):
    return build_zoo(CONFIG, tmp_path_factory.mktemp("zoo") / "digits")


@pytest.fixture
def copy(zoo, tmp_path):
    return shutil.copytree(zoo, tmp_path / "copy")


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_model(first, second):
    for name in ("params.json", "result.json"):
        assert (first / name).read_text() == (second / name).read_text()
    for epoch in CONFIG.checkpoint_epochs:
        path = f"checkpoint_{epoch:06d}/checkpoints"
        one, two = load(first / path), load(second / path)
        assert list(one) == list(two)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_layout_is_the_published_one(zoo):
    assert (zoo / "config.json").is_file()
    folders = sorted(path for path in zoo.iterdir() if path.is_dir())
    assert len(folders) == 6
    for folder in folders:
        assert folder.name.startswith("NN_tune_trainable_")
        assert sorted(path.name for path in folder.iterdir()) == [
            "checkpoint_000000",
            "checkpoint_000002",
            "params.json",
            "result.json",
        ]
        params = json.loads((folder / "params.json").read_text())
        assert all("::" in key for key in params if key != "seed")
        rows = [json.loads(line) for line in (folder / "result.json").read_text().splitlines()]
        assert [row["training_iteration"] for row in rows] == [0, 1, 2]
        for row in rows:
            for split in ("train", "val", "test"):
                assert 0 <= row[f"{split}_acc"] <= 1
                assert row[f"{split}_loss"] > 0


def test_checkpoints_are_those_of_the_params(zoo):
    for folder in zoo.glob("NN_*"):
        net = from_params(json.loads((folder / "params.json").read_text()))
        untrained, trained = (load(folder / f"checkpoint_{epoch:06d}/checkpoints") for epoch in (0, 2))
        for key, value in net.state_dict().items():
            assert torch.equal(value, untrained[key])
            assert not torch.equal(value, trained[key])
        net.load_state_dict(trained, strict=True)


def test_deleted_model_comes_back_the_same_and_the_others_are_not_touched(zoo, copy):
    names = sorted(path.name for path in copy.glob("NN_*"))
    times = {name: (copy / name / "result.json").stat().st_mtime_ns for name in names}
    shutil.rmtree(copy / names[1])
    (copy / names[4] / "checkpoint_000002" / "checkpoints").unlink()  # lost one of its files
    build_zoo(CONFIG, copy)
    for name in names:
        assert_same_model(zoo / name, copy / name)
        rebuilt = (copy / name / "result.json").stat().st_mtime_ns != times[name]
        assert rebuilt == (name in (names[1], names[4]))
    assert sorted(path.name for path in copy.iterdir()) == sorted(["config.json", *names])


def test_a_model_does_not_depend_on_how_many_there_are(zoo, tmp_path, ray_session):
    fewer = build_zoo(replace(CONFIG, models=2), tmp_path / "fewer")
    names = sorted(path.name for path in fewer.glob("NN_*"))
    assert names == sorted(path.name for path in zoo.glob("NN_*"))[:2]
    for name in names:
        assert_same_model(zoo / name, fewer / name)


def test_what_an_interruption_left_aside_is_not_taken_for_a_model(zoo, copy):
    name = sorted(path.name for path in copy.glob("NN_*"))[0]
    aside = copy / ".building" / f"{name}.abc"
    aside.parent.mkdir()
    (copy / name).rename(aside)
    (aside / "result.json").unlink()
    build_zoo(CONFIG, copy)
    assert_same_model(zoo / name, copy / name)
    assert not (copy / ".building").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 64}, "zoo.batch_size is 32 there, but 64 is asked for"),
        ({"models": 7}, "zoo.models is 6 there, but 7"),
        ({"checkpoint_epochs": [0, 3]}, "zoo.checkpoint_epochs"),
    ],
)
def test_another_zoo_in_the_folder_is_refused_by_the_field_that_differs(copy, change, words):
    before = sorted(copy.rglob("*"))
    with pytest.raises(InputError, match=words):
        build_zoo(replace(CONFIG, **change), copy)
    assert sorted(copy.rglob("*")) == before


def test_changed_images_under_the_same_name_are_refused(tmp_path):
    path = tmp_path / "mine.npz"
    images = np.random.default_rng(0).normal(size=(40, 8, 8))
    np.savez(path, images=images, labels=np.arange(40) % 4)
    config = ZooConfig(dataset=str(path), models=1, checkpoint_epochs=[0])
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "config.json").write_text(json.dumps(plan_zoo(config).identity))
    check_zoo(plan_zoo(config), zoo)
    np.savez(path, images=images + 1, labels=np.arange(40) % 4)
    with pytest.raises(InputError, match=r"images\.fingerprint"):
        check_zoo(plan_zoo(config), zoo)


def test_folders_that_are_no_zoo_are_refused(tmp_path):
    plan = plan_zoo(CONFIG)
    check_zoo(plan, tmp_path / "absent")
    check_zoo(plan, tmp_path)
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"is a file.*--output of jobs/build_zoo\.py, --storage of jobs/pretrain\.py"):
        check_zoo(plan, file)
    with pytest.raises(InputError, match=r"not empty, but holds no config\.json"):
        check_zoo(plan, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        check_zoo(plan, tmp_path)


def test_a_failing_task_names_its_models_and_the_rest_is_built(copy):
    names = sorted(path.name for path in copy.glob("NN_*"))
    for name in names:
        shutil.rmtree(copy / name)
    (copy / names[0]).write_text("a file where the model's folder should be")
    with pytest.raises(ZooBuildError, match=names[0]) as caught:
        build_zoo(CONFIG, copy)
    assert "NotADirectoryError" in str(caught.value)
    built = {path.name for path in copy.glob("NN_*") if path.is_dir()}
    assert built == {name for name in names if name not in str(caught.value)}
    assert built


def test_random_draw_stays_in_its_ranges_and_depends_on_the_seed():
    plan = plan_zoo(ZooConfig(models=40, learning_rates=[1e-4, 1e-2]))
    models = list(plan.models.values())
    for params in models:
        scale = 10 if params["optim::optimizer"] == "sgd" else 1
        assert 1e-4 * scale <= params["optim::lr"] <= 1e-2 * scale
    assert {params["model::nlin"] for params in models} == {"relu", "tanh", "gelu", "silu"}
    assert len({params["seed"] for params in models}) == 40
    again, other = (plan_zoo(ZooConfig(models=40, learning_rates=[1e-4, 1e-2], seed=seed)) for seed in (0, 1))
    assert again.models == plan.models
    assert list(other.models.values()) != models


def test_grid_is_walked_in_order_and_round_again_with_other_seeds():
    config = ZooConfig(
        search="grid",
        models=5,
        activations=["relu", "tanh"],
        initializations=["uniform"],
        optimizers=["sgd"],
        learning_rates=[1e-3, 2e-3],
        weight_decays=[0.0],
        dropouts=[0.0],
    )
    assert len(grid(config)) == 4
    models = list(plan_zoo(config).models.values())
    assert [(params["model::nlin"], params["optim::lr"]) for params in models] == [
        ("relu", 1e-2),
        ("relu", 2e-2),
        ("tanh", 1e-2),
        ("tanh", 2e-2),
        ("relu", 1e-2),
    ]
    assert models[0]["seed"] != models[4]["seed"]


def test_plan_says_what_is_left_to_train(copy):
    plan = plan_zoo(CONFIG)
    shutil.rmtree(next(copy.glob("NN_*")))
    text = describe(plan, copy)
    assert "6 digits_cnn of 2,044 parameters; 1 to train" in text
    assert "12 (epochs 0, 2)" in text
    assert str(copy) in text
