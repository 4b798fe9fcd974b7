import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from sane_ray.autoencoder.model import SANE
from sane_ray.config import (
    AugmentationConfig,
    AutoencoderConfig,
    ClusterConfig,
    PretrainingConfig,
    PretrainJob,
)
from sane_ray.errors import InputError
from sane_ray.pretraining.history import read_history
from sane_ray.pretraining.launcher import pretrain
from sane_ray.pretraining.run import is_complete, plan_run
from sane_ray.tracking import default_uri

ROOT = Path(__file__).parents[2]

SMALL = PretrainJob(
    run_name="small",
    autoencoder=AutoencoderConfig(window=20, d_model=16, heads=2, layers=1, latent_dim=8),
    pretraining=PretrainingConfig(
        epochs=4, batch_size=8, learning_rate=1e-2, log_every=3, validate_every=2, checkpoint_every=1
    ),
)


def changed(job, **sections):
    """The job with fields of its sections replaced: ``pretraining={"epochs": 2}``."""
    replaced = {
        name: dataclasses.replace(getattr(job, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(job, **replaced)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A complete run with two workers."""
    storage = tmp_path_factory.mktemp("two_workers")
    job = changed(SMALL, pretraining={"evaluate_every": 2, "evaluate_networks": 4}, cluster={"num_workers": 2})
    run = plan_run(job, store, storage)
    pretrain(run, job)
    return run, job, storage


def test_every_step_is_in_the_history_and_the_loss_falls(finished):
    run, _, _ = finished
    history = read_history(run.history)
    assert [point["step"] for point in history] == list(range(1, run.total_steps + 1))
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    validated = [int(point["step"]) for point in history if "val/loss" in point]
    assert validated == [2 * run.steps_per_epoch, 4 * run.steps_per_epoch]
    timed = [point for point in history if "tokens_per_s" in point]
    assert all(point["tokens_per_s"] > 0 and 0 <= point["data_wait_fraction"] <= 1 for point in timed)
    assert all(0 < point["mfu"] < 1 and point["peak_memory_mb"] > 100 and point["workers"] == 2 for point in timed)
    assert all(point["spikes"] == point["skipped_steps"] == 0 for point in timed)
    assert all(1 <= history[step - 1]["val/effective_rank"] <= 8 for step in validated)
    assert all(
        point["flops_per_s"] / point["tokens_per_s"]
        == pytest.approx(timed[0]["flops_per_s"] / timed[0]["tokens_per_s"])
        for point in timed
    )


def test_mlflow_has_one_finished_run_with_parameters_metrics_and_artifacts(finished):
    run, _, storage = finished
    client = MlflowClient(tracking_uri=default_uri(storage))
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == ("small", "FINISHED")
    assert logged.data.params["pretraining.learning_rate"] == "0.01"
    assert logged.data.params["autoencoder.token_size"] == "73"
    steps = [point.step for point in client.get_metric_history(logged.info.run_id, "train/loss")]
    assert steps == list(range(1, run.total_steps + 1))
    measured = set(logged.data.metrics)
    wanted = "train/gradient_norm train/learning_rate train/explained_variance val/loss tokens_per_s flops_per_s"
    assert {*wanted.split(), "data_wait_fraction", "train/loss_contrast", "train/loss_recon"} <= measured
    artifacts = {
        item.path for folder in ("model", "plots") for item in client.list_artifacts(logged.info.run_id, folder)
    }
    assert {"model/config.json", "model/model.safetensors", "plots/losses.png", "plots/reconstruction.png"} <= artifacts
    assert "plots/accuracies.png" in artifacts


def test_the_best_model_is_kept_beside_the_last_one(finished):
    run, _, _ = finished
    lowest = min((point for point in read_history(run.history) if "val/loss" in point), key=lambda p: p["val/loss"])
    best, last = (load_file(run.folder / name / "model.safetensors") for name in ("model_best", "model"))
    assert best.keys() == last.keys()
    same = all(torch.equal(best[name], last[name]) for name in last)
    assert same == (lowest["step"] == run.total_steps)


def test_models_say_where_they_come_from(finished):
    run, _, _ = finished
    history = {point["step"]: point for point in read_history(run.history)}
    for name in ("model", "model_best"):
        provenance = SANE.from_pretrained(run.folder / name).provenance
        assert provenance["run"] == "small"
        assert provenance["val/loss"] == history[provenance["step"]]["val/loss"]
    assert SANE.from_pretrained(run.folder / "model").provenance["step"] == run.total_steps


def test_held_out_networks_are_evaluated_beside_training(finished):
    run, _, storage = finished
    evaluated = [point for point in read_history(run.history) if "eval/accuracy" in point]
    assert evaluated[-1]["step"] == run.total_steps
    assert all("train/loss" in point and 0 <= point["eval/accuracy"] <= 1 for point in evaluated)
    assert evaluated[-1]["eval/accuracy_original"] > 0
    client = MlflowClient(tracking_uri=default_uri(storage))
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (logged,) = client.search_runs([experiment.experiment_id])
    logged_steps = [metric.step for metric in client.get_metric_history(logged.info.run_id, "eval/accuracy")]
    assert sorted(logged_steps) == [point["step"] for point in evaluated]
    assert not list((run.folder / "evaluations").iterdir())


def test_two_checkpoints_stay_with_their_place_in_the_data(finished):
    run, _, _ = finished
    manifests = sorted(run.folder.glob("checkpoints/step_*/complete.json"))
    contents = [json.loads(path.read_text()) for path in manifests]
    assert [content["step"] for content in contents] == [3 * run.steps_per_epoch, 4 * run.steps_per_epoch]
    ledgers = [content["state"]["extra"]["ledger"] for content in contents]
    assert [ledger["epoch"] for ledger in ledgers] == [3, 4]


def test_a_second_launch_finds_all_done(finished):
    run, job, _ = finished
    assert is_complete(run)
    before = (run.output / "model.safetensors").stat().st_mtime_ns
    assert pretrain(run, job) == run.output
    assert (run.output / "model.safetensors").stat().st_mtime_ns == before


def test_the_name_of_a_run_with_other_settings_is_refused(finished, store):
    _, job, storage = finished
    other = changed(job, pretraining={"learning_rate": 2e-2})
    with pytest.raises(InputError, match=r"small.*pretraining\.learning_rate: 0\.01 -> 0\.02.*--run-name"):
        pretrain(plan_run(other, store, storage), other)


def test_how_often_a_run_looks_at_itself_does_not_change_its_identity(store, tmp_path):
    often = changed(
        SMALL,
        pretraining={
            "log_every": 1,
            "validate_every": 0.5,
            "checkpoint_every": 2,
            "micro_batch": 2,
            "sharding": "none",
        },
    )
    assert plan_run(often, store, tmp_path).identity == plan_run(SMALL, store, tmp_path).identity
    longer = changed(SMALL, pretraining={"epochs": 5})
    assert plan_run(longer, store, tmp_path).identity != plan_run(SMALL, store, tmp_path).identity


def test_the_model_encodes_and_decodes_a_network_with_torch_alone(finished, zoo):
    run, _, _ = finished
    (checkpoint, *_) = sorted(zoo.glob("*/checkpoint_000001/checkpoints"))
    script = f"""
import sys
for name in ("ray", "mlflow", "pyarrow", "pandas", "optuna", "sklearn"):
    sys.modules[name] = None
import torch
from sane_ray import SANE
model = SANE.from_pretrained({str(run.output)!r})
weights = torch.load({str(checkpoint)!r}, weights_only=True)
embedding = model.encode_model(weights)
assert embedding.shape == (52, 8), embedding.shape
decoded = model.decode_model(embedding)
assert {{key: value.shape for key, value in decoded.items()}} == {{key: value.shape for key, value in weights.items()}}
assert all(torch.isfinite(value).all() for value in decoded.values())
assert not any(name.split(".")[0] == "ray" and module is not None for name, module in sys.modules.items())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def kill_worker_after_a_checkpoint(folder, killed):
    """Waits until a checkpoint is complete, then kills the run's training worker as the kernel would."""
    from ray.util.state import list_actors

    while not list(folder.glob("checkpoints/step_*/complete.json")):
        time.sleep(0.05)
    filters = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    for actor in list_actors(filters=filters, detail=True):
        os.kill(actor.pid, signal.SIGKILL)
        killed.append(actor.pid)


def test_a_killed_worker_costs_nothing_but_time(store, tmp_path):
    job = changed(SMALL, pretraining={"epochs": 6})
    whole = changed(job, run_name="whole")
    pretrain(plan_run(whole, store, tmp_path), whole)

    run, killed = plan_run(job, store, tmp_path), []
    thread = threading.Thread(target=kill_worker_after_a_checkpoint, args=(run.folder, killed), daemon=True)
    thread.start()
    pretrain(run, job)
    thread.join(timeout=30)
    assert killed, "no worker was killed"

    history, expected = read_history(run.history), read_history(plan_run(whole, store, tmp_path).history)
    assert [point["step"] for point in history] == [point["step"] for point in expected]
    assert [point["train/loss"] for point in history] == [point["train/loss"] for point in expected]
    weights, uninterrupted = (load_file(tmp_path / "runs" / n / "model/model.safetensors") for n in ("small", "whole"))
    assert all(torch.equal(weights[name], uninterrupted[name]) for name in uninterrupted)
    first = {line for line in run.history.read_text().splitlines() if json.loads(line)["step"] == 1}
    assert len(first) == 1, "training began anew instead of from its last checkpoint"


def test_one_worker_goes_on_in_the_middle_of_an_epoch_where_two_began(store, tmp_path):
    """The same batches for any number of workers: losses agree to rounding, and no step is lost or doubled."""
    exact = changed(SMALL, pretraining={"precision": "float32", "epochs": 2, "checkpoint_every": 0.3})
    calm = changed(exact, run_name="calm")
    pretrain(plan_run(calm, store, tmp_path), calm)
    frequent = changed(exact, cluster={"num_workers": 2})
    run = plan_run(frequent, store, tmp_path)
    pretrain(run, frequent)
    (middle,) = [run.folder / "checkpoints" / f"step_{run.total_steps - 1:09d}"]
    assert middle.exists(), sorted(run.folder.glob("checkpoints/*"))
    shutil.rmtree(run.folder / "checkpoints" / f"step_{run.total_steps:09d}")
    shutil.rmtree(run.output)
    alone = changed(frequent, cluster={"num_workers": 1})
    pretrain(plan_run(alone, store, tmp_path), alone)
    history, expected = read_history(run.history), read_history(plan_run(calm, store, tmp_path).history)
    assert [point["step"] for point in history] == [point["step"] for point in expected]
    losses, calm_losses = ([point["train/loss"] for point in points] for points in (history, expected))
    assert losses == pytest.approx(calm_losses, rel=1e-4)
    assert history[-1]["workers"] == 1


def test_a_spike_is_gone_back_for_and_its_batch_left_out(store, tmp_path):
    """A factor this small calls quite ordinary steps spikes."""
    sections = {"epochs": 10, "checkpoint_every": 1, "spike_factor": 1.1, "on_spike": "rollback", "log_every": 2}
    job = changed(SMALL, pretraining=sections)
    run = plan_run(job, store, tmp_path)
    pretrain(run, job)
    manifest = json.loads(max(run.folder.glob("checkpoints/*/complete.json")).read_text())
    skipped, extra = manifest["state"]["skipped"], manifest["state"]["extra"]
    assert 1 <= extra["rollbacks"] == len(skipped) <= extra["spikes"], "each time back leaves one batch out"
    steps = [json.loads(line)["step"] for line in run.history.read_text().splitlines()]
    assert max(steps.count(step) for step in range(1, run.total_steps)) > 1, "training did not go back"
    counted = [point["skipped_steps"] for point in read_history(run.history) if "skipped_steps" in point]
    assert 1 <= max(counted) <= len(skipped)


def test_what_was_being_written_when_a_run_died_at_its_end_is_written_by_the_next(store, tmp_path):
    job = changed(SMALL, pretraining={"epochs": 2, "validate_every": 2})  # once, at the end
    run = plan_run(job, store, tmp_path)
    pretrain(run, job)
    best = json.loads((run.folder / "model_best" / "config.json").read_text())["provenance"]
    assert best["step"] == run.total_steps
    shutil.rmtree(run.folder / "model_best")
    shutil.rmtree(run.output)
    pretrain(run, job)
    again = json.loads((run.folder / "model_best" / "config.json").read_text())["provenance"]
    assert again == best


def test_cadences_belong_to_a_run_that_goes_back_for_spikes(store, tmp_path):
    job = changed(SMALL, pretraining={"on_spike": "rollback"})
    often = changed(job, pretraining={"log_every": 1})
    assert plan_run(often, store, tmp_path).identity != plan_run(job, store, tmp_path).identity


def test_micro_batches_belong_to_a_run_with_dropout(store, tmp_path):
    job = changed(SMALL, autoencoder={"dropout": 0.1})
    pieces = changed(job, pretraining={"micro_batch": 2})
    assert plan_run(pieces, store, tmp_path).identity != plan_run(job, store, tmp_path).identity


def test_a_diverging_loss_is_told_and_not_retried(store, tmp_path):
    job = changed(SMALL, pretraining={"learning_rate": 1e30, "gradient_clip": 0.0, "weight_decay": 0.0})
    run = plan_run(job, store, tmp_path)
    with pytest.raises(InputError, match=r"is (nan|inf) at step \d+: lower pretraining\.learning_rate"):
        pretrain(run, job)
    assert not run.output.exists()
    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FAILED"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"autoencoder": {"window": 64}}, r"autoencoder\.window is 64.*52 tokens"),
        ({"tokens": {"token_size": 289}}, r"tokens\.token_size is 289.*73 values.*--tokens\.token_size 0"),
        ({"autoencoder": {"token_size": 289}}, r"autoencoder\.token_size is 289.*73 values.*--tokens\.token_size 289"),
        ({"autoencoder": {"positions": "sinusoidal", "max_positions": [9, 9, 9]}}, r"max_positions.*leave it empty"),
        ({"autoencoder": {"max_positions": [10, 4, 24]}}, r"autoencoder\.max_positions.*needs \[52, 4, 24\]"),
        ({"pretraining": {"batch_size": 1000}}, r"pretraining\.batch_size is 1000.*32 windows"),
        ({"loss": {"behavior": 0.5}}, r"loss\.behavior.*window"),
    ],
)
def test_a_config_that_does_not_fit_the_store_is_refused(store, tmp_path, sections, message):
    with pytest.raises(InputError, match=message):
        plan_run(changed(SMALL, **sections), store, tmp_path)
    assert not list(tmp_path.iterdir())


def test_sinusoidal_positions_need_no_tables(store, tmp_path):
    run = plan_run(changed(SMALL, autoencoder={"positions": "sinusoidal"}), store, tmp_path)
    assert run.worker.autoencoder.max_positions == []
    assert run.parameters < plan_run(SMALL, store, tmp_path).parameters


def test_an_output_that_holds_something_else_is_refused_before_any_work(store, tmp_path):
    precious = tmp_path / "thesis" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("three years")
    with pytest.raises(InputError, match=r"thesis holds other files \(precious\.txt\)"):
        plan_run(dataclasses.replace(SMALL, output=str(precious.parent)), store, tmp_path)
    assert precious.read_text() == "three years"


def test_a_permuted_view_needs_a_known_symmetry(store, tmp_path):
    name, architecture = next(iter(store.architectures.items()))
    bare = dataclasses.replace(architecture, symmetry=type(architecture.symmetry)({}, {}))
    unknown = dataclasses.replace(store, architectures={name: bare})
    with pytest.raises(InputError, match=r"augmentation\.view_2 is 'permuted'.*--augmentation\.view_2 canonical"):
        plan_run(SMALL, unknown, tmp_path)
    canonical = dataclasses.replace(SMALL, augmentation=AugmentationConfig(view_2="canonical"))
    assert plan_run(canonical, unknown, tmp_path).total_steps > 0
    alone = changed(SMALL, loss={"contrast": "none"})  # computes the first view only
    assert plan_run(alone, unknown, tmp_path).total_steps > 0


def test_more_workers_than_the_cluster_can_hold_are_refused_at_once(store, tmp_path):
    job = changed(SMALL, cluster=ClusterConfig(num_workers=8))
    run = plan_run(job, store, tmp_path)
    with pytest.raises(InputError, match=r"8 workers need 16 CPUs.*the cluster has 4.*num_workers to 2"):
        pretrain(run, job)
    assert not run.folder.exists()
