"""The predict job as a user runs it."""

import dataclasses
import importlib.util
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sane_ray.cli import parse
from sane_ray.config import PREDICTIONS, PredictJob, PropertiesConfig
from sane_ray.embedding import Embeddings
from sane_ray.errors import InputError
from sane_ray.properties import Zoo, predict
from sane_ray.properties.job import EXPERIMENT, LOGGED_FILE, check_other, open_zoo

ROOT = Path(__file__).parents[2]


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


job = load("predict", ROOT / "jobs" / "predict.py")
zoos = load("property_zoos", ROOT / "tests" / "properties" / "zoos.py")

QUICK = PropertiesConfig(
    targets=["test_acc", "epoch"], features=["statistics", "sane+statistics"], probes=["ridge"], bootstrap=20
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    store = zoos.write(folder / "digits", zoos.write_zoo(folder / "zoo"))
    zoos.write_embeddings(folder / "embeddings", store)
    return folder


def test_predicts_once_tracks_and_says_where(folder: Path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wanted = PredictJob(embeddings=str(folder / "embeddings"), storage=str(folder), run_name="one", properties=QUICK)
    job.main(wanted, False)
    first = capsys.readouterr().out
    assert "zoo digits: 60 checkpoints of 20 models" in first
    assert "too few to tell SANE with s(W) from s(W) alone" in first and "leave-one-epoch" in first
    assert f"results  {folder / 'properties' / 'one'}" in first.splitlines()[-1] and "next:" in first
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id])
    client.delete_run(run.info.run_id)
    for name in ("report.html", LOGGED_FILE):  # as if the first had died before it was drawn and told
        (folder / "properties" / "one" / name).unlink()
    job.main(wanted, False)
    assert capsys.readouterr().out.startswith("nothing to do: ")
    assert (folder / "properties" / "one" / "report.html").exists()
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["r2/test_acc/statistics/ridge"] > 0.5 and run.info.status == "FINISHED"
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"results.json", "results.parquet", "predictions.parquet", "report.html", "plots"}
    plots = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "plots")}
    assert {"r2.png", "r2.svg", "map.png", "depth.png", "depth.parquet", "analysis.json", "layers.png"} <= plots
    report = (folder / "properties" / "one" / "report.html").read_text()
    assert "SANE with s(W)" in report and "data:image/" in report


def test_other_settings_under_one_name_are_refused(folder: Path, tmp_path: Path):
    first = PredictJob(
        store=str(folder / "digits"), output=str(tmp_path / "out"), storage=str(tmp_path), properties=QUICK
    )
    job.main(first, False)
    other = dataclasses.replace(first, properties=dataclasses.replace(QUICK, seed=1))
    with pytest.raises(InputError, match="holds results with other settings"):
        job.main(other, False)


def test_a_dry_run_starts_nothing(folder: Path, tmp_path: Path, capsys):
    job.main(PredictJob(store=str(folder / "digits"), storage=str(tmp_path), properties=QUICK), True)
    out = capsys.readouterr().out
    assert "without embeddings, with weights" in out and out.endswith("dry run: nothing was started\n")
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_predicted_is_told_before_anything_starts(folder: Path, tmp_path: Path, capsys):
    partly = dataclasses.replace(QUICK, targets=["test_acc", "tset_acc"])
    job.main(PredictJob(store=str(folder / "digits"), storage=str(tmp_path), properties=partly), True)
    assert "note     no checkpoint has 'tset_acc': did you mean test_acc" in capsys.readouterr().out
    nothing = PredictJob(
        store=str(folder / "digits"),
        storage=str(tmp_path),
        properties=dataclasses.replace(QUICK, targets=["tset_acc"]),
    )
    for dry_run in (True, False):
        with pytest.raises(InputError, match="nothing to predict: no checkpoint has 'tset_acc'"):
            job.main(nothing, dry_run)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "name --embeddings EMBEDDINGS, --store STORE, or both"),
        ({"model": "m", "embeddings": "e"}, "name only one of them"),
        ({"model": "m"}, "^--store is missing: name the token store that --model embeds"),
        ({"embeddings": "nowhere"}, "nowhere does not exist: make embeddings with"),
    ],
)
def test_bad_flags_are_told(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        job.main(PredictJob(storage=str(tmp_path), **flags), False)


def test_embeddings_of_another_store_or_model_are_refused(folder: Path, tmp_path: Path):
    other = zoos.write(tmp_path / "other", zoos.write_zoo(tmp_path / "zoo", seed=9))
    zoos.write_embeddings(tmp_path / "embeddings", other, fingerprint="another model")
    mine = {"embeddings": str(folder / "embeddings"), "storage": str(tmp_path)}
    with pytest.raises(InputError, match=r"fingerprint \w{12}, but \S+ has \w{12}: embed this one, or name that one"):
        job.main(PredictJob(store=str(tmp_path / "other"), **mine), False)
    with pytest.raises(InputError, match="embed both zoos with one model"):
        job.main(PredictJob(other_embeddings=str(tmp_path / "embeddings"), **mine), False)


def test_the_same_zoo_is_not_another_one(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "embeddings", tmp_path / "copy")
    shutil.copytree(folder / "digits", tmp_path / "store")
    mine = {"embeddings": str(folder / "embeddings"), "storage": str(tmp_path)}
    for other in (
        {"other_embeddings": str(folder / "embeddings")},
        {"other_embeddings": str(tmp_path / "copy")},
        {"other_store": str(tmp_path / "store")},
    ):
        with pytest.raises(InputError, match="is the zoo that is predicted already, not another one: name another"):
            job.main(PredictJob(**mine, **other), False)


def test_another_zoo_is_named_where_results_are(folder: Path, tmp_path: Path, capsys):
    other = zoos.write(tmp_path / "svhn", zoos.write_zoo(tmp_path / "zoo", models=12, seed=9))
    settings = dataclasses.replace(QUICK, features=["statistics"], targets=["test_acc"], leave_one_epoch=False)
    wanted = PredictJob(
        store=str(folder / "digits"), other_store=str(other.path), storage=str(tmp_path), properties=settings
    )
    job.main(wanted, False)
    printed = capsys.readouterr()
    assert printed.out.startswith("zoo digits: 60 checkpoints of 20 models (14 train, 3 val, 3 test)\nzoo svhn: 36 ch")
    assert "svhn -> svhn" in printed.out and "digits -> svhn" in printed.out
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "properties").iterdir()] == ["digits-svhn"]
    assert "fit probes: 100%" in printed.err and "| 4/4 [" in printed.err


def test_the_zoo_is_told_before_anything_is_fitted(folder: Path, tmp_path: Path):
    """Interrupted as soon as it says what it reads: nothing is done, and that is what it says."""
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--store", str(folder / "digits")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    assert process.stdout.readline().startswith("zoo digits: 60 checkpoints of 20 models (14 train")
    process.stderr.readline()  # of the bar, or of MLflow
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "interrupted (a second Ctrl-C ends at once)" in errors
    assert "goes on from what is done" not in errors and "Traceback" not in errors


def test_one_network_is_not_advised_to_become_a_store(folder: Path, tmp_path: Path):
    alone = zoos.write(tmp_path / "alone", zoos.write_zoo(tmp_path / "zoo", models=1, epochs=1), split=[1.0, 0.0, 0.0])
    zoos.as_of_source(zoos.write_embeddings(tmp_path / "embeddings", alone))
    with pytest.raises(InputError, match="embeddings is a single network, and a property is predicted by fitting on"):
        job.main(PredictJob(embeddings=str(tmp_path / "embeddings"), storage=str(tmp_path)), False)


@pytest.mark.parametrize(
    ("name", "values"), [("window", (32, 64)), ("halo", (0, 8)), ("precision", ("float32", "bfloat16"))]
)
def test_embeddings_made_in_another_way_are_refused(folder: Path, name: str, values):
    zoos_of = [Zoo(place, None, Embeddings.open(folder / "embeddings")) for place in ("a", "b")]
    check_other(zoos_of)
    for zoo, value in zip(zoos_of, values, strict=True):
        index = zoo.embeddings.index
        (index.setdefault("settings", {}) if name == "precision" else index)[name] = value
    with pytest.raises(InputError, match=f"made with {name} {values[0]}, --other-embeddings with {name} {values[1]}"):
        check_other(zoos_of)


def test_automatic_precision_is_no_difference(folder: Path):
    first, second = (Embeddings.open(folder / "embeddings") for _ in range(2))
    first.index["settings"], second.index["settings"] = {"precision": "auto"}, {"precision": "float32"}
    check_other([Zoo("a", None, first), Zoo("b", None, second)])


def test_presets_are_the_published_protocols():
    sane, _ = parse(PredictJob, presets=PREDICTIONS, argv=["--preset", "sane"])
    assert sane.properties.features == ["weights", "statistics_published", "sane_mean"]
    assert sane.properties.ridge == "published"
    benchmark, _ = parse(PredictJob, presets=PREDICTIONS, argv=["--preset", "small-cnn-zoo"])
    assert benchmark.properties.epochs == "last" and benchmark.properties.targets == ["test_acc"]
    assert benchmark.properties.metric == "tau"
    with pytest.raises(InputError, match=r"properties\.features is 'magic'"):
        parse(PredictJob, presets=PREDICTIONS, argv=["--properties.features", "[magic]"])
    with pytest.raises(InputError, match=r"properties\.seeds"):
        PropertiesConfig(seeds=0)


def test_presets_run_as_they_say(folder: Path, tmp_path: Path):
    zoo = open_zoo(str(folder / "embeddings"), "", "")
    tables, benchmark = (
        predict([zoo], dataclasses.replace(PREDICTIONS[name]().properties, bootstrap=20, seeds=1), tmp_path / name)
        for name in ("sane", "small-cnn-zoo")
    )
    rows = {
        (row["target"], row["features"]) for row in tables["rows"] if row["choice"].startswith("published, penalty")
    }
    features = ("weights", "statistics_published", "sane_mean")
    assert rows == {(target, name) for target in ("test_acc", "epoch", "ggap") for name in features}
    assert len(tables["rows"]) == 9 and {row["protocol"] for row in tables["rows"]} == {"split"}
    assert all(row["n_train"] + row["n_val"] + row["n_test"] == 20 for row in benchmark["rows"])
    assert {row["probe"] for row in benchmark["rows"]} == {"ridge", "boosting"}
    (sentence,) = benchmark["verdict"]  # trees on so few networks say the same of all, which has no tau
    assert sentence.startswith("test_acc, ridge: ") and ": tau " in sentence


def test_bad_input_is_one_sentence_and_status_2(tmp_path: Path):
    command = [sys.executable, str(ROOT / "jobs" / "predict.py"), "--store", str(tmp_path / "no")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert found.returncode == 2 and found.stderr.startswith("error: --store ") and found.stderr.count("\n") == 1
