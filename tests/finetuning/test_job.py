"""Fine-tuning as a user runs it, on tiny folders of samples."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from sane_ray.config import FinetuneJob, FinetuningConfig
from sane_ray.errors import InputError
from sane_ray.finetuning import job
from sane_ray.finetuning.evaluation import METRICS, Evaluation
from sane_ray.finetuning.job import EXPERIMENT, run

ROOT = Path(__file__).parents[2]
SHORT = FinetuningConfig(epochs=1, table_epochs=[0, 1, 5], networks_at_once=3)


@pytest.fixture(autouse=True)
def local_mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finetuning")


@pytest.fixture(scope="module")
def samples(storage, write_samples) -> Path:
    return write_samples(storage / "samples", methods=("scratch", "sane_kde:best"), repetitions=2)


@pytest.fixture
def wanted(samples, storage, tmp_path) -> FinetuneJob:
    """A job of its own folder; MLflow's database is created once."""
    return FinetuneJob(
        samples=str(samples),
        storage=str(storage),
        output=str(tmp_path / "out"),
        run_name=tmp_path.name,
        finetuning=SHORT,
    )


def histories(client, run_id, names):
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def test_trains_once_tracks_and_says_where(wanted, storage, strictly, capsys):
    run(wanted, False)
    first = capsys.readouterr().out
    assert "4 networks of 2 methods" in first and "2 pieces of up to 3 networks each" in first
    assert "training   1 epoch; table at 0, 1\n" in first
    assert "sane_kde:best against scratch: too few networks" in first
    assert "warning" not in first
    assert first.splitlines()[-1].endswith(f"next: open {wanted.output}/report.html")
    output = Path(wanted.output)
    results = strictly(output / "results.json")
    assert results["failed"] == results["diverged"] == []
    rows = pq.read_table(output / "results.parquet").to_pylist()
    assert len(rows) == 8 and set(METRICS) <= set(rows[0])
    for line in results["table"]:
        mine = [r["test_acc"] for r in rows if (r["method"], r["epoch"]) == (line["method"], line["epoch"])]
        assert line["mean"] == pytest.approx(np.mean(mine)) and line["networks"] == 2
    assert (output / "report.html").stat().st_size > 10_000 and (output / "plots" / "curves.png").exists()
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    check_tracked(client, wanted, rows)

    (output / job.LOGGED_FILE).unlink()  # as if the first had died before all was told
    run(wanted, False)
    run(wanted, False)
    again = capsys.readouterr().out
    assert again.startswith(f"nothing to do: {output} holds the results of these samples and this config\n")
    assert again.count("accuracy on test images in %") == 2 and "fine-tune" not in again
    check_tracked(client, wanted, rows)


def check_tracked(client, wanted, rows):
    """One run, one nested in it for each method, finished, and each point once."""
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    ours = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name.startswith(wanted.run_name)]
    assert len(ours) == 3 and {one.info.status for one in ours} == {"FINISHED"}
    (parent,) = (one for one in ours if one.info.run_name == wanted.run_name)
    names = [f"test_acc/epoch_{epoch}/{method}" for epoch in (0, 1) for method in ("scratch", "sane_kde-best")]
    assert set(parent.data.metrics) == set(names)
    assert all(len(points) == 1 for points in histories(client, parent.info.run_id, names).values())
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} == {
        "results.json",
        "results.parquet",
        "report.html",
        "plots",
    }
    for nested in (one for one in ours if one is not parent):
        assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
        method = nested.data.params["method"]
        assert nested.info.run_name == f"{wanted.run_name} {method}"
        for name, points in histories(client, nested.info.run_id, METRICS).items():
            means = [np.mean([r[name] for r in rows if (r["method"], r["epoch"]) == (method, e)]) for e in (0, 1)]
            assert points == [(0, pytest.approx(means[0])), (1, pytest.approx(means[1]))]


def test_a_broken_network_is_told_and_spoils_nothing(wanted, write_samples, storage, strictly, capsys, tmp_path):
    broken = [("scratch", 1)]
    folder = write_samples(tmp_path / "broken", methods=("scratch", "sane_kde:best"), broken=broken)
    run(dataclasses.replace(wanted, samples=str(folder)), False)
    results = strictly(Path(wanted.output) / "results.json")
    assert results["diverged"] == [{"method": "scratch", "repetition": 1, "epoch": 0}] and results["failed"] == []
    rows = pq.read_table(Path(wanted.output) / "results.parquet").to_pylist()
    assert {(r["method"], r["repetition"]) for r in rows if np.isnan(r["train_loss"])} == {("scratch", 1)}
    assert "warning: 1 network (scratch 1) diverged" in capsys.readouterr().out
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    name = f"{wanted.run_name} scratch"
    (nested,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert np.isfinite(nested.data.metrics["train_loss"])


def test_failed_networks_are_told_and_tried_again(wanted, strictly, monkeypatch, capsys):
    plain = Evaluation.__call__

    def failing(self, piece):
        if len(piece.params) == 3:
            raise MemoryError("no room")
        return plain(self, piece)

    monkeypatch.setattr(Evaluation, "__call__", failing)
    run(wanted, False)
    results = strictly(Path(wanted.output) / "results.json")
    assert [(one["method"], one["repetition"]) for one in results["failed"]] == [
        ("scratch", 0),
        ("scratch", 1),
        ("sane_kde:best", 0),
    ]
    assert [(row["method"], row["networks"]) for row in results["table"]] == [("sane_kde:best", 1)] * 2
    out = capsys.readouterr().out
    assert (
        "warning: 3 networks (scratch 0, scratch 1, sane_kde:best 0) could not be trained: MemoryError: no room" in out
    )
    monkeypatch.setattr(Evaluation, "__call__", plain)
    run(wanted, False)
    out = capsys.readouterr().out
    assert "going on   1 of 2 pieces are done already" in out and "warning" not in out
    assert strictly(Path(wanted.output) / "results.json")["failed"] == []


def test_a_run_whose_networks_all_fail_says_why(wanted, monkeypatch):
    def failing(self, piece):
        raise MemoryError("no room")

    monkeypatch.setattr(Evaluation, "__call__", failing)
    with pytest.raises(RuntimeError, match="none of the 4 networks could be trained: MemoryError: no room"):
        run(wanted, False)
    assert not (Path(wanted.output) / "results.json").exists()


def test_folders_of_others_are_refused(wanted):
    output = Path(wanted.output)
    output.mkdir()
    (output / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds other files \(thesis.tex\): name a new folder"):
        run(wanted, True)
    shutil.rmtree(output)
    output.touch()
    with pytest.raises(InputError, match="is a file: name a new folder"):
        run(wanted, True)
    output.unlink()
    output.mkdir()
    for text in ("[1]", '{"format": "x"}'):
        (output / "results.json").write_text(text)
        with pytest.raises(InputError, match=r"not what jobs/finetune.py of this version writes"):
            run(wanted, True)
    (output / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results.json cannot be read .* delete it and run"):
        run(wanted, True)
    (output / "results.json").unlink()
    for name in ("report.html", "results.parquet", ".logged"):  # what is left then does not stand in the way
        (output / name).touch()
    run(wanted, True)


def test_other_settings_are_refused_but_not_another_number_side_by_side(wanted, capsys):
    short = dataclasses.replace(wanted, finetuning=dataclasses.replace(SHORT, epochs=0))
    run(short, False)
    with pytest.raises(InputError, match="holds results with other settings: name another --output or --run-name"):
        run(wanted, False)
    capsys.readouterr()
    run(dataclasses.replace(short, finetuning=dataclasses.replace(short.finetuning, networks_at_once=1)), False)
    assert capsys.readouterr().out.startswith("nothing to do")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": {"name": "digits", "path": "", "fingerprint": "0" * 16, "classes": 10}}, "are not those that"),
        ({"images": None}, "were sampled without images"),
        ({"version": 99}, "not what jobs/sample.py of this version writes"),
    ],
)
def test_samples_that_do_not_fit_are_refused(wanted, write_samples, tmp_path, changes, words):
    folder = write_samples(tmp_path / "odd", repetitions=1, **changes)
    with pytest.raises(InputError, match=words):
        run(dataclasses.replace(wanted, samples=str(folder)), False)


def test_wrong_samples_and_images_are_refused(wanted, write_samples, tmp_path):
    def refused(words, **changes):
        with pytest.raises(InputError, match=words):
            run(dataclasses.replace(wanted, **changes), False)

    refused("no samples are named: --samples FOLDER", samples="")
    refused("does not exist", samples=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    refused(r"has no samples.json", samples=str(tmp_path / "empty"))
    refused("hold no network", samples=str(write_samples(tmp_path / "none", methods=())))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "other.npz", images=rng.normal(size=(60, 8, 8)), labels=np.arange(60) % 10)
    refused("name the right ones with --images", images=str(tmp_path / "other.npz"))
    damaged = write_samples(tmp_path / "damaged")
    (damaged / "networks" / "scratch" / "000.safetensors").write_bytes(b"short")
    refused(r"000.safetensors cannot be read .* sample again", samples=str(damaged))
    assert not list(tmp_path.rglob("results.json"))


def test_a_table_of_no_epoch_is_of_the_last(samples):
    wanted = FinetuneJob(samples=str(samples), finetuning=FinetuningConfig(epochs=2, table_epochs=[5, 25]))
    assert job.plan_of(wanted).epochs == [2]


def test_a_dry_run_starts_nothing(wanted, capsys):
    run(wanted, True)
    assert capsys.readouterr().out.endswith("dry run: nothing was started\n")
    assert not Path(wanted.output).exists()


def test_a_killed_run_goes_on_with_equal_results(wanted, tmp_path, capsys):
    settings = FinetuningConfig(epochs=8, table_epochs=[0, 8], networks_at_once=1)
    wanted = dataclasses.replace(wanted, finetuning=settings)
    flags = {
        "samples": wanted.samples,
        "output": tmp_path / "cut",
        "storage": wanted.storage,
        "run-name": f"{wanted.run_name}-cut",
        "finetuning.epochs": 8,
        "finetuning.table_epochs": "[0, 8]",
        "finetuning.networks_at_once": 1,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not list((tmp_path / "cut" / "records").glob("*.npz")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "results.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "of 4 pieces are done already" in done.stdout
    run(wanted, False)
    assert "already" not in capsys.readouterr().out
    first, second = (pq.read_table(folder / "results.parquet") for folder in (tmp_path / "cut", Path(wanted.output)))
    assert first.equals(second)
