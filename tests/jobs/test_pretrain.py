"""The pretraining job as a user runs it."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sane_ray.config import AutoencoderConfig, ClusterConfig, PretrainingConfig, PretrainJob, ZooConfig
from sane_ray.pretraining import describe
from sane_ray.tokens.store import TokenStore
from sane_ray.tracking import default_uri

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("pretrain", ROOT / "jobs" / "pretrain.py")
assert SPEC is not None and SPEC.loader is not None
pretrain = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pretrain)


def small(storage):
    return PretrainJob(
        storage=str(storage),
        zoo=ZooConfig(models=5, checkpoint_epochs=[0, 1]),
        autoencoder=AutoencoderConfig(window=52, d_model=8, heads=1, layers=1, latent_dim=4),
        pretraining=PretrainingConfig(epochs=2, batch_size=2, checkpoint_every=2),
    )


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_without_a_store_the_whole_line_is_walked_once(ray_session, tmp_path, capsys, monkeypatch):
    job = small(tmp_path)
    pretrain.main(job, True)
    planned = capsys.readouterr().out
    assert "would train 5 networks on digits" in planned and "nothing was started" in planned
    assert not list(tmp_path.iterdir())

    pretrain.main(job, False)
    printed = capsys.readouterr().out
    assert len(list((tmp_path / "zoos/digits").glob("*/params.json"))) == 5
    assert TokenStore.open(tmp_path / "stores/digits").counts().checkpoints == 10
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"model", "plots", "history.jsonl", "run.json"}
    assert f"model    {folder / 'model'}" in printed and f"pictures {folder / 'plots'}" in printed
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --host 127.0.0.1" in printed

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*.safetensors")}
    pretrain.main(job, False)
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*.safetensors")}

    pretrain.main(job, True)
    planned = capsys.readouterr().out
    assert "6 training windows of 52 tokens" in planned and "2 epochs of 3 steps of 2 windows" in planned
    assert " a worker: " in planned and "H200" not in planned  # nobody trains 0.9 M parameters on 512 of them
    pretrain.main(dataclasses.replace(job, cluster=ClusterConfig(gpu="yes")), True)
    assert "H200" in capsys.readouterr().out
    monkeypatch.setattr(describe, "FOR_GPUS", 1)
    pretrain.main(job, True)
    assert "H200" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "nowhere"], "nowhere"),
        (["--store", "s3://bucket/store"], "config field store is 's3://bucket/store'"),
        (["--preset", "cnn"], "autoencoder.window is 64, but the networks of the built-in zoo have 52 tokens"),
        (["--zoo.dataset", "nowhere.npz"], "nowhere.npz"),
        (["--pretraining.epoch", "3"], "did you mean"),
        (["--cluster.address", "127.0.0.1:1"], "no Ray cluster at cluster.address = '127.0.0.1:1'"),
    ],
)
def test_bad_input_ends_with_status_2_and_leaves_nothing(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_and_sigterm_end_a_training_in_order(ray_session, tmp_path):
    job = small(tmp_path)
    pretrain.main(job, False)
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "--store", str(tmp_path / "stores/digits")]
    command += ["--storage", str(tmp_path), "--autoencoder.window", "52", "--pretraining.batch_size", "2"]
    command += ["--pretraining.epochs", "100000", "--pretraining.log_every", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [*command, "--run-name", number.name], stderr=subprocess.PIPE, text=True, env=environment
        )
        deadline = time.monotonic() + 120
        while not (tmp_path / "runs" / number.name / "history.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 130, errors
        assert errors.index("starting workers:") < errors.index(
            "\ninterrupted: ending the workers; the same command goes"
        )
        assert "Traceback" not in errors and "***" not in errors, errors
        assert errors.count("interrupted") == 1
    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert (runs["SIGINT"], runs["SIGTERM"]) == ("KILLED", "KILLED")


def test_help_needs_no_ray_cluster(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "ray job submit" in done.stdout and "--pretraining.learning_rate" in done.stdout
