"""The embedding job as a user runs it."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from sane_ray.analysis import depth
from sane_ray.cli import parse
from sane_ray.config import EmbeddingConfig, EmbedJob
from sane_ray.embedding import Embeddings, writing
from sane_ray.embedding import job as embed_job
from sane_ray.embedding.job import EXPERIMENT, LOGGED_FILE
from sane_ray.embedding.networks import units_of_records
from sane_ray.embedding.writing import embed as embed_plan
from sane_ray.embedding.writing import plan_records
from sane_ray.errors import InputError
from sane_ray.properties.spectral import NAMES
from sane_ray.tracking import default_uri
from sane_ray.zoo.catalog import discover

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "embedding"))
from embedding_networks import make_model, make_store, other_network, write_zoo  # noqa: E402

SPEC = importlib.util.spec_from_file_location("embed", ROOT / "jobs" / "embed.py")
assert SPEC is not None and SPEC.loader is not None
embed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(embed)


@pytest.fixture(autouse=True)
def own_mlflow(monkeypatch):
    """No MLflow but that of the storage."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A zoo, its store, and a run with a model."""
    folder = tmp_path_factory.mktemp("made")
    zoo = write_zoo(folder / "zoo")
    store = make_store(zoo, folder / "store")
    make_model(store, max_positions=[99, 9, 99]).save_pretrained(folder / "runs" / "calm" / "model")
    return folder


def test_a_store_is_embedded_once_with_the_model_of_a_run(made, tmp_path, capsys):
    job = EmbedJob(model=str(made / "runs/calm"), store=str(made / "store"), storage=str(tmp_path))
    embed.main(job, True)
    planned = capsys.readouterr().out
    assert "would embed 12 checkpoints" in planned and "nothing was started" in planned and not list(tmp_path.iterdir())
    embed.main(job, False)
    folder = tmp_path / "embeddings" / "store-calm"
    command = f"next: python jobs/predict.py --embeddings {folder}"
    printed = capsys.readouterr().out
    assert f"embeddings {folder}: 12 checkpoints, 60 layers, 6 values each; {command}" in printed
    client = MlflowClient(default_uri(tmp_path))
    assert client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.data.metrics["reconstruction_mse"] > 0 and run.data.metrics["checkpoints"] == 12
    assert run.info.status == "FINISHED"
    plots = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "plots")}
    assert {"map.png", "map.svg", "depth.png", "depth.parquet"} <= plots
    assert "as a trained SANE sees them" in (folder / "report.html").read_text()
    assert "report.html" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    (folder / "plots" / "map.png").unlink()
    embed.main(job, False)
    assert "nothing to do" in capsys.readouterr().out and not (folder / "plots" / "map.png").exists()
    (folder / LOGGED_FILE).unlink()  # as if the first had died while it drew
    embed.main(job, False)
    assert "nothing to do" in capsys.readouterr().out and (folder / "plots" / "map.png").exists()
    assert len(client.search_runs([run.info.experiment_id])) == 1
    assert len(Embeddings.open(folder).models) == 12


def test_one_file_of_an_unknown_architecture_is_embedded_with_a_warning(made, tmp_path, capsys):
    save_file(other_network(), tmp_path / "other.safetensors")
    job = EmbedJob(
        model=str(made / "runs/calm/model"),
        source=str(tmp_path / "other.safetensors"),
        output=str(tmp_path / "out"),
        storage=str(tmp_path),
    )
    embed.main(job, False)
    printed = capsys.readouterr().out
    assert "warning: 1 checkpoint of the architecture network-" in printed and "was not trained on" in printed
    assert str(tmp_path / "out" / "layers.parquet") in printed
    assert f"1 checkpoint, 3 layers, 6 values each; next: look at {tmp_path / 'out/plots/network.png'}\n" in printed
    assert Embeddings.open(tmp_path / "out").models["trained_on"].to_pylist() == [False]


def test_what_was_left_out_is_told_with_the_reason(made, tmp_path, capsys):
    zoo = write_zoo(tmp_path / "zoo", known=2)
    save_file({"fc.weight": torch.zeros(500, 3)}, zoo / "large.safetensors")
    embed.main(
        EmbedJob(model=str(made / "runs/calm"), source=str(zoo), output=str(tmp_path / "out"), storage=str(tmp_path)),
        False,
    )
    printed = capsys.readouterr().out
    assert "left out large/0: it needs 500 positions" in printed and "2 checkpoints, 10 layers" in printed


def test_of_many_checkpoints_of_a_source_the_spectra_of_some_are_computed(made, tmp_path, monkeypatch):
    model, zoo = made / "runs" / "calm" / "model", made / "zoo"
    plan = plan_records(model, discover(zoo), zoo, tmp_path / "out", EmbeddingConfig())
    embeddings, ids = embed_plan(plan), [record.id for record in discover(zoo)]
    assert sorted(embed_job.spectra_of_plan(plan, embeddings)) == ids
    monkeypatch.setattr(depth, "MOST_STORED", 3)
    spectra = embed_job.spectra_of_plan(plan, embeddings)
    assert sorted(spectra) == [ids[0], ids[5], ids[11]] and all(set(one) == set(NAMES) for one in spectra.values())
    monkeypatch.setattr(embed_job, "MOST_SPECTRA_WEIGHTS", 10)
    assert embed_job.spectra_of_plan(plan, embeddings) == {}


def test_a_model_of_aligned_networks_warns_of_others_before_and_after(made, tmp_path, capsys):
    aligned = make_store(made / "zoo", tmp_path / "aligned", align="weights")
    make_model(aligned).save_pretrained(tmp_path / "model")
    job = EmbedJob(model=str(tmp_path / "model"), store=str(made / "store"), storage=str(tmp_path / "results"))
    for dry_run in (True, False):
        embed.main(job, dry_run)
        printed = capsys.readouterr().out
        assert "tokens.align weights, these with none" in printed and "--tokens.align weights" in printed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "--model is missing"),
        ({"model": "m"}, "neither is named: name either a token store"),
        ({"model": "m", "store": "s", "source": "z"}, "--store s and --source z: name either"),
        ({"model": "nowhere", "store": "s"}, "s does not exist|nowhere does not exist"),
        ({"model": "s3://m", "store": "s"}, "object stores cannot be used directly"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        embed.main(EmbedJob(**fields, storage=str(tmp_path)), False)
    assert not list(tmp_path.iterdir())


def test_a_single_network_is_not_advised_to_become_a_store(made, tmp_path, capsys):
    aligned = make_store(made / "zoo", tmp_path / "aligned", align="weights")
    make_model(aligned, max_positions=[99, 9, 99]).save_pretrained(tmp_path / "model")
    save_file(other_network(), tmp_path / "one.safetensors")
    job = EmbedJob(model=str(tmp_path / "model"), source=str(tmp_path / "one.safetensors"), storage=str(tmp_path))
    embed.main(job, True)
    printed = capsys.readouterr().out
    assert "tokens.align weights, this one with none" in printed and "prepare them" not in printed


def test_an_interruption_tells_what_is_kept(made, tmp_path, capsys, monkeypatch):
    plan = plan_records(made / "runs/calm/model", discover(made / "zoo"), made / "zoo", tmp_path, EmbeddingConfig())
    units = units_of_records(discover(made / "zoo"), [40e6] * 12)
    plan = dataclasses.replace(plan, units=units)
    written = writing.Worker.embed

    def embed_one(worker, unit, stop):
        if unit.number == stop:
            raise KeyboardInterrupt
        return written(worker, unit)

    for stop, words in ((0, "no network is embedded yet: the same command begins anew"), (5, "5 of 12 networks are")):
        monkeypatch.setattr(writing.Worker, "embed", functools.partialmethod(embed_one, stop=stop))
        with pytest.raises(KeyboardInterrupt):
            embed_job.embed_telling(plan)
        assert words in capsys.readouterr().err


def test_help_shows_the_cluster_that_embeds(capsys):
    with pytest.raises(SystemExit):
        parse(EmbedJob, argv=["--help"])
    printed = capsys.readouterr().out
    assert "--cluster.num_workers" in printed and "Training workers" not in printed
    assert not any(name in printed for name in ("data_cpus", "resize_seconds", "max_failures"))


def test_the_command_line_ends_with_status_2_on_bad_input(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "jobs/embed.py"), "--model", str(tmp_path), "--source", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
