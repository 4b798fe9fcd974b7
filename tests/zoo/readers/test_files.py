import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sane_ray.errors import InputError
from sane_ray.zoo.readers import files


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path) -> list[tuple[str, int]]:
    return [(record.model, record.epoch) for record in files.discover(root)]


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.pt.tar", "a.pth.tar", "a.bin", "a.ckpt", "a.safetensors", "a.PT"])
@pytest.mark.parametrize("as_file", [True, False])
def test_weights_come_back_from_every_suffix(tmp_path: Path, name: str, as_file: bool):
    weights = {"layer.weight": torch.randn(3, 2), "layer.bias": torch.randn(3)}
    if name.endswith(".safetensors"):
        save_file(weights, tmp_path / name)
    else:
        torch.save({"net": weights, "epoch": 3}, tmp_path / name)
    (record,) = files.discover(tmp_path / name if as_file else tmp_path)
    assert (record.id, record.model, record.epoch, record.reader) == ("a/0", "a", 0, "files")
    assert record.path == str(tmp_path / name)
    loaded = files.open_checkpoint(record).state_dict()
    assert list(loaded) == list(weights) and all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_models_are_named_by_their_paths(tmp_path: Path):
    touch(tmp_path, "b.pt", "x/y/a.pth", "x/a.v1.bin", "notes.txt", "weights.npy", "archive.tar")
    assert found(tmp_path) == [("b", 0), ("x/a.v1", 0), ("x/y/a", 0)]


def test_one_name_for_one_model(tmp_path: Path):
    touch(tmp_path, "a.pt", "a.safetensors", "a.pt.bin", "b.pt", "c/epoch_1.pt", "c/epoch_2.pt", "c.pt")
    touch(tmp_path, "d_epoch_1.pt", "d_epoch_2.pt", "d_step_1.pt", "d_step_2.pt", "d.pt")
    names = {model for model, _ in found(tmp_path)}
    assert names == {"a.pt", "a.safetensors", "a.pt~", "b", "c.pt", "c/epoch#.pt", "d"}
    ids = [record.id for record in files.discover(tmp_path)]
    assert len(set(ids)) == len(ids) == 12
    assert {"d/1", "d/1 (d_step_1)", "d/2", "d/2 (d_step_2)", "d/2 (d)"} <= set(ids)


def test_what_trainers_save_beside_the_weights_is_passed_over(tmp_path: Path):
    names = ["optimizer.pt", "optimizer_1.bin", "scheduler.pt", "training_args.bin", "rng_state.pth", "rng_state_3.pth"]
    names += ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "resnet_optimizer.pt", "scaler.pt", "random_states_0.pt"]
    touch(tmp_path, *names, ".hidden.pt", ".git/model.pt", "model.pt", "optimized.pt", "scheduler_net.pt")
    assert found(tmp_path) == [("model", 0), ("optimized", 0), ("scheduler_net", 0)]
    assert found(tmp_path / "optimizer.pt") == [("optimizer", 0)]


def test_what_is_passed_over_without_weights_beside_it_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path, "a/model.pt", "a/optimizer.pt", "b/net.pt")
    assert len(files.discover(tmp_path)) == 2 and caplog.text == ""
    touch(tmp_path, "c/resnet_optim.pt", "c/optimizer.pt/x.pt", "d/notes.txt", "d/scaler.pt")
    assert len(files.discover(tmp_path)) == 3
    assert "2 files are passed over for their names, such as" in caplog.text and "c/resnet_optim.pt" in caplog.text


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["resnet_epoch_1.pt", "resnet_epoch_10.pt", "resnet_epoch_2.pt"], "resnet"),
        (["resnet-ep1.pth.tar", "resnet-ep2.pth.tar", "resnet-ep10.pth.tar"], "resnet"),
        (["net_e_1.pt", "net_e_02.pt", "net_e_010.pt"], "net"),
        (["epoch=1-step=100.ckpt", "epoch=2-step=200.ckpt", "epoch=10-step=1000.ckpt"], "zoo"),
        (["checkpoint-1.bin", "checkpoint-2.bin", "checkpoint-10.bin"], "zoo"),
        (["step1.pt", "step2.pt", "step10.pt"], "zoo"),
        (["ckpt_1_final.pt", "ckpt_2_final.pt", "ckpt_10_final.pt"], "final"),
        (["seed3_Epoch1.pt", "seed3_Epoch2.pt", "seed3_Epoch10.pt"], "seed3"),
        (["a_epoch1_step1.pt", "a_epoch1_step2.pt", "a_epoch1_step10.pt"], "a"),
    ],
)
def test_files_that_differ_in_the_epoch_alone_are_one_model(tmp_path: Path, names: list[str], model: str):
    touch(tmp_path / "zoo", *names)
    assert found(tmp_path / "zoo") == [(model, 1), (model, 2), (model, 10)]


@pytest.mark.parametrize(
    "names",
    [
        ["resnet18.pt", "resnet34.pt"],
        ["seed_1.pt", "seed_2.pt"],
        ["recipe_1.pt", "recipe_2.pt"],
        ["resnet_epoch_5.pt", "vgg_epoch_6.pt"],
        ["x/epoch_5.pt", "y/epoch_6.pt"],
        ["lr_1e-3.pt", "lr_1e-4.pt"],
        ["0.pt", "1.pt", "2.pt"],
        ["0/model.pt", "1/model.pt", "best.pt"],
        ["0.pt", "1.pt", "run/best/model.pt"],
        ["resnet_best.pt", "vgg_best.pt", "vgg.bin"],
        ["seed_1/best.pt", "seed_2/best.pt"],
        ["model.pt", "checkpoint.pt"],
        ["net_acc_0.5.pt", "net_acc_0.7.pt"],
        ["timestep_1.pt", "timestep_2.pt"],
        ["epoch_10.pt"],
        ["run/model_1.pt", "run/model_2.pt"],
        ["0/model.pt", "1/model.pt"],
        ["run/10/model.pt"],
        ["runs/0/model.pt", "runs/1/model.pt"],
        ["r/10/g.pt", "r/10/d.pt", "r/20/g.pt", "r/20/d.pt"],
        ["run/10/a.pt", "run/20/b.pt"],
        ["weights.01.pt"],
        ["a.1.pt", "b.2.pt"],
        ["lr0.1.pt", "lr0.01.pt"],
        ["kaiming_init.pt", "xavier_init.pt"],
        ["restart_1.pt", "restart_2.pt"],
    ],
)
def test_other_names_are_a_model_each(tmp_path: Path, names: list[str]):
    touch(tmp_path, *names)
    assert found(tmp_path) == sorted((name.rpartition(".")[0], 0) for name in names)


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["r/epoch_1/model.pt", "r/epoch_2/model.pt"], ["r/1", "r/2"]),
        (["r/step-500/model.pt", "r/step-1000/model.pt"], ["r/500", "r/1000"]),
        (["r/checkpoint-500/a.bin", "r/checkpoint-1000/a.bin"], ["r/a/500", "r/a/1000"]),
        (["r/checkpoint_0003/m.pt", "r/checkpoint_0004/m.pt"], ["r/m/3", "r/m/4"]),
        (["r/global_step5/w/model.pt", "r/global_step6/w/model.pt"], ["r/w/5", "r/w/6"]),
        (["r/epoch_1/model_epoch_1.pt", "r/epoch_2/model_epoch_2.pt"], ["r/1", "r/2"]),
        (["r/epoch_1/g.pt", "r/epoch_1/d.pt", "r/epoch_2/g.pt", "r/epoch_2/d.pt"], ["r/d/1", "r/d/2", "r/g/1", "r/g/2"]),  # noqa: E501
        (["r/best.pt", "r/last.pt", "r/10.pt", "r/20.pt"], ["r/10", "r/20", "r/20 (best)", "r/20 (last)"]),
        (["r/best.pt", "r/final.pt"], ["r/0 (best)", "r/0 (final)"]),
        (["r/10/model.pt", "r/20/model.pt", "r/best/model.pt"], ["r/10", "r/20", "r/20 (best)"]),
        (["r/model_best.pth.tar", "r/checkpoint.pth.tar"], ["r/0", "r/0 (best)"]),
        (["r/model_best.pth.tar", "r/last.pth.tar", "r/checkpoint-7.pth.tar"], ["r/7", "r/7 (best)", "r/7 (last)"]),
        (["r/net.pt", "r/net_best.pt", "r/net_epoch_4.pt"], ["r/net/4", "r/net/4 (net)", "r/net/4 (best)"]),
        (["r/epoch_3/model.pt", "r/epoch_3/best.pt", "r/epoch_4/model.pt"], ["r/3", "r/3 (best)", "r/4"]),
        (["r/best_epoch_3.pt", "r/epoch_3.pt", "r/epoch_4.pt"], ["r/3", "r/3 (best)", "r/4"]),
        (["r/epoch_1.pt", "r/epoch_01.pt"], ["r/1", "r/1 (epoch_1)"]),
        (["r/best-1.pt", "r/best-2.pt", "r/best.pt"], ["r/best-1/0", "r/best-2/0", "r/best/0"]),
        (["r/last.pt", "r/last-v1.pt", "r/epoch=3.pt"], ["r/3", "r/3 (last)", "r/3 (last-v1)"]),
        (["step1/epoch_1.pt", "step1/epoch_2.pt", "step2/epoch_1.pt", "step2/epoch_2.pt"],
         ["step1/1", "step1/2", "step2/1", "step2/2"]),
        (["r/epoch_1/step_1.pt", "r/epoch_1/step_2.pt", "r/epoch_2/step_1.pt"],
         ["r/1", "r/1 (epoch_1/step_2)", "r/2"]),
        (["r/weights.01.pt", "r/weights.02.pt"], ["r/1", "r/2"]),
        (["r/weights.01.pt", "r/weights.02.pt", "r/weights.best.pt"], ["r/1", "r/2", "r/2 (best)"]),
        (["r/net.01.pt", "r/net.02.pt"], ["r/net/1", "r/net/2"]),
        (["r/init.pt", "r/epoch_3.pt", "r/final.pt"], ["r/0 (init)", "r/3", "r/3 (final)"]),
        (["r/net_initial.pt", "r/net_best.pt"], ["r/net/0 (initial)", "r/net/0 (best)"]),
        (["r/start/model.pt", "r/10/model.pt", "r/20/model.pt"], ["r/0 (start)", "r/10", "r/20"]),
        (["final/a.pt", "final/b.pt"], ["final/a/0", "final/b/0"]),
        (["final/e_1.pt", "final/e_2.pt"], ["final/1", "final/2"]),
    ],
)  # fmt: skip
def test_checkpoints_of_one_run_are_one_model(tmp_path: Path, names: list[str], ids: list[str]):
    touch(tmp_path, *names)
    records = files.discover(tmp_path)
    assert sorted(record.id for record in records) == sorted(ids)
    assert sorted(record.path for record in records) == sorted(str(tmp_path / name) for name in names)
    assert all(record.id.startswith(f"{record.model}/{record.epoch}") for record in records)


PARTS = [
    "epoch_1",
    "epoch_02",
    "step-5",
    "best",
    "last",
    "model",
    "10",
    "net",
    "net_best",
    "run0",
    "acc_0.5",
    "#",
    "init",
    "w.01",
    "20",
]


@given(paths=st.sets(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join), max_size=12))
def test_whatever_the_names_every_file_is_one_record_with_an_id_of_its_own(paths: set[str]):
    with tempfile.TemporaryDirectory() as name:
        touch(Path(name), *(f"{path}.pt" for path in paths))
        records = files.discover(Path(name))
    assert sorted(record.path for record in records) == sorted(f"{name}/{path}.pt" for path in paths)
    assert len({record.id for record in records}) == len(records)
    assert all(record.epoch >= 0 and record.model for record in records)


def test_metrics_in_a_name_are_properties(tmp_path: Path):
    touch(tmp_path, "net-epoch=1-val_loss=0.75.ckpt", "net-epoch=2-val_loss=0.5.ckpt", "best_acc_0.93.pt")
    records = {record.id: record.properties for record in files.discover(tmp_path)}
    assert records == {"best_acc_0.93/0": {"acc": 0.93}, "net/1": {"val_loss": 0.75}, "net/2": {"val_loss": 0.5}}


def test_small_transformer_zoo(tmp_path: Path):
    touch(tmp_path, "run7_75_0.9612.pt", "run7_100_0.97.pt", "run_8_75_0.5.pt")
    records = {record.id: record.properties for record in files.discover(tmp_path)}
    assert records == {"run7/75": {"acc": 0.9612}, "run7/100": {"acc": 0.97}, "run_8/75": {"acc": 0.5}}
    touch(tmp_path, "other.pt")  # now the pattern is not certain
    assert {epoch for _, epoch in found(tmp_path)} == {0}


def test_implicit_representations_have_labels(tmp_path: Path):
    touch(tmp_path, "sirens/randinit_test_3s/net5.pth", "sirens/randinit_test_3s/net12.pth")
    touch(tmp_path, "mnist-inrs/mnist_png_training_7_123/checkpoints/model_final.pth", "other_3s/model.pth")
    records = {record.model: record.properties for record in files.discover(tmp_path)}
    assert records == {
        "sirens/randinit_test_3s/net5": {"label": 3},
        "sirens/randinit_test_3s/net12": {"label": 3},
        "mnist-inrs/mnist_png_training_7_123/checkpoints/model_final": {"label": 7},
        "other_3s/model": {},
    }


def test_shards_without_index_are_one_model_that_is_refused(tmp_path: Path):
    touch(tmp_path, *(f"m/model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)), "whole-00001-of-00001.bin")
    shards, whole = files.discover(tmp_path)
    assert (shards.id, whole.id) == ("m/model/0", "whole-00001-of-00001/0")
    with pytest.raises(InputError, match=r"model-00001-of-00003\.safetensors: is one of 3 shards .*\.index\.json"):
        files.open_checkpoint(shards)


def test_links_are_followed_once(tmp_path: Path):
    zoo, elsewhere = tmp_path / "zoo", tmp_path / "elsewhere"
    touch(zoo, "real/a.pt")
    touch(elsewhere, "b.pt", "c.pt")
    (zoo / "again").symlink_to(zoo / "real")
    (zoo / "linked").symlink_to(elsewhere)
    (zoo / "linked twice").symlink_to(elsewhere)
    (zoo / "best.pt").symlink_to(zoo / "real" / "a.pt")
    (zoo / "c.pt").symlink_to(elsewhere / "c.pt")
    (zoo / "loop").symlink_to(zoo)
    (zoo / "up").symlink_to(tmp_path)
    assert found(zoo) == [("linked/b", 0), ("linked/c", 0), ("real/a", 0)]
    alias = tmp_path / "alias"
    alias.symlink_to(zoo)
    assert found(alias) == found(zoo)


def test_links_that_lead_nowhere_are_counted(tmp_path: Path):
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.pt").symlink_to(tmp_path / "circle.pt")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    records = files.discover(tmp_path)
    assert [record.model for record in records] == ["circle", "gone"]
    for record in records:
        with pytest.raises(InputError, match=rf"{record.model}\.pt: (no such checkpoint file|cannot be read)"):
            files.open_checkpoint(record)


def test_an_unreadable_folder_is_logged(open_folder: Path, unprivileged, caplog: pytest.LogCaptureFixture):
    touch(open_folder, "a.pt", "secret/b.pt")
    (open_folder / "secret").chmod(0)
    with unprivileged():
        assert found(open_folder) == [("a", 0)]
    assert "secret: cannot be read (Permission denied); passed over" in caplog.text


def test_names_that_are_no_text_are_found_too(tmp_path: Path):
    touch(tmp_path, "a.pt", "b\udcff.pt", "ünï/模型.pt")
    assert found(tmp_path) == [("a", 0), ("b\udcff", 0), ("ünï/模型", 0)]


def test_folders_that_are_named_like_files(tmp_path: Path):
    touch(tmp_path, "model.pt/weights.bin")
    assert found(tmp_path) == [("model.pt/weights", 0)]


def test_nothing_of_this_format(tmp_path: Path):
    touch(tmp_path, "notes.txt", "data.csv")
    assert files.discover(tmp_path) == [] and files.discover(tmp_path / "notes.txt") == []
    assert files.discover(tmp_path / "nowhere") == []


def test_a_file_without_suffix_is_taken_when_it_is_named(tmp_path: Path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "checkpoints")
    assert files.discover(tmp_path) == []
    (record,) = files.discover(tmp_path / "checkpoints")
    assert record.id == "checkpoints/0" and files.open_checkpoint(record).meta["weight"].shape == (2,)


def test_a_bad_file_is_a_record_that_is_named_when_it_is_opened(tmp_path: Path):
    (tmp_path / "vocabulary.bin").write_bytes(b"hello" * 100)
    (record,) = files.discover(tmp_path)
    with pytest.raises(InputError, match=r"vocabulary\.bin: truncated, or no checkpoint"):
        files.open_checkpoint(record)
