"""Evaluations measure what reconstructed networks still can do, and never stop or wait for a training."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig, TokensConfig
from sane_ray.errors import InputError
from sane_ray.pretraining import evaluation
from sane_ray.pretraining.evaluation import Evaluations, compare, evaluate, held_out, reconstruct
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.reading import file_digest
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover


class Exact(SANE):
    """An autoencoder that loses nothing: the embedding of a token is the token."""

    def encode(self, tokens_BWT, positions_BW3):
        return tokens_BWT

    def decode(self, z_BWL, positions_BW3):
        return z_BWL


def make_model(kind, store, window=20):
    sizes = [architecture.table.position_sizes for architecture in store.architectures.values()]
    shape = AutoencoderConfig(
        token_size=store.token_size,
        window=window,
        d_model=16,
        heads=2,
        layers=1,
        latent_dim=8,
        max_positions=[max(size) for size in zip(*sizes, strict=True)],
    )
    model = kind(shape).eval()
    architectures = {name: architecture.to_dict() for name, architecture in store.architectures.items()}
    model.preprocessing = {"token_size": store.token_size, "architectures": architectures}
    return model


def everything(store):
    return list(range(len(store.models)))


def without_params(store):
    names = [name for name in store.models.column_names if not name.startswith("config.")]
    return dataclasses.replace(store, models=store.models.select(names))


def test_nothing_is_lost_by_an_exact_autoencoder_and_accuracies_are_those_the_zoo_recorded(store):
    checkpoints = everything(store)[::-1]
    recorded = np.array(store.models["property.test_acc"].to_pylist())[checkpoints]
    found = compare(make_model(Exact, store), store, checkpoints)
    assert found.original == pytest.approx(recorded, abs=0.02)  # stored in half precision
    assert np.array_equal(found.original, found.reconstructed)
    assert found.agreement.tolist() == [1.0] * len(checkpoints)
    metrics = evaluate(make_model(Exact, store), store, checkpoints)
    assert metrics == {
        "eval/accuracy": pytest.approx(found.original.mean()),
        "eval/accuracy_original": pytest.approx(found.original.mean()),
        "eval/accuracy_ratio": 1.0,
        "eval/agreement": 1.0,
        "eval/explained_variance": 1.0,
    }


def test_an_untrained_autoencoder_destroys_the_networks(store):
    trained = [c for c in everything(store) if store.models["property.test_acc"][c].as_py() > 0.5]
    metrics = evaluate(make_model(SANE, store), store, trained)
    assert metrics["eval/accuracy"] < metrics["eval/accuracy_original"] - 0.2
    assert metrics["eval/agreement"] < 0.5 and metrics["eval/explained_variance"] < 0.2
    ratio = metrics["eval/accuracy"] / metrics["eval/accuracy_original"]
    assert metrics["eval/accuracy_ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize(("normalization", "window"), [("standardize", 20), ("l2", 52), ("none", 60)])
def test_networks_together_are_what_the_model_makes_of_each_alone(zoo, tmp_path, normalization, window):
    tokens = TokensConfig(dtype="float32", normalization=normalization, split=[0.5, 0.25, 0.25])
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    model = make_model(SANE, store, window)
    checkpoints = everything(store)[:3]
    (architecture,) = store.architectures.values()
    together = reconstruct(model, torch.stack([store.tokens(c) for c in checkpoints]), architecture)
    for checkpoint, row in zip(checkpoints, together, strict=True):
        weights = store.state_dict(checkpoint)
        alone = model.decode_model(model.encode_model(weights), reference=weights)
        decoder = evaluation.Decoder(architecture, torch.device("cpu"))
        scale = store.model_scale(checkpoint)
        for key, value in decoder(row[None], None if scale is None else scale[None]).items():
            assert torch.allclose(value[0], alone[key], rtol=1e-4, atol=1e-6)


def test_a_model_and_a_store_are_read_from_their_folders(store, tmp_path):
    make_model(SANE, store).save_pretrained(tmp_path / "model")
    from_folders = evaluate(tmp_path / "model", store.path, [0, 1])
    assert from_folders == pytest.approx(evaluate(make_model(SANE, store), store, [0, 1]))


def test_a_store_that_does_not_say_how_to_run_its_networks_has_reconstruction_figures_alone(store, caplog):
    bare = without_params(store)
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(make_model(Exact, store), bare, [0, 5, 9])
    assert metrics == {"eval/explained_variance": 1.0}
    assert "accuracy is not measured" in caplog.text and "model::type" in caplog.text


def test_figures_of_networks_that_cannot_be_run_come_from_one_segment_of_each(zoo, tmp_path):
    tokens = TokensConfig(dtype="float32", split=[0.5, 0.25, 0.25], segment_mb=0.001, row_group_mb=0.009)
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    assert len(store.segments) > len(store.models)
    model = make_model(SANE, store)
    sums = evaluation._sampled_variance(model, without_params(store), [0, 3])
    firsts = [store.tokens(checkpoint)[:26] for checkpoint in (0, 3)]
    (architecture,) = store.architectures.values()
    signal = int(architecture.table.signal_counts[:26][[*range(20), *range(6, 26)]].sum())
    assert sums[0] == 2 * signal
    target = sum(float(first[:20].sum() + first[6:].sum()) for first in firsts)
    assert float(sums[3]) == pytest.approx(target, rel=1e-5)


def test_a_model_of_another_store_is_refused(store):
    model = make_model(SANE, store)
    (architecture,) = model.preprocessing["architectures"].values()
    architecture["normalization"]["shift"] = [1.0 for _ in architecture["normalization"]["shift"]]
    for checkpoint_of in (store, without_params(store)):
        with pytest.raises(InputError, match="was not trained on the architecture"):
            evaluate(model, checkpoint_of, [0])
    model.preprocessing = {}
    with pytest.raises(InputError, match="was not trained on the architecture"):
        evaluate(model, store, [0])


def index_of(store, splits, models, epochs):
    columns = {"split": splits, "model": models, "epoch": epochs}
    return dataclasses.replace(store, models=pa.table(columns))


def test_held_out_networks_are_the_latest_of_many_models_and_a_spread_of_epochs(store):
    models = [f"model {i}" for i in range(10) for _ in range(6)]
    epochs = [0, 1, 2, 5, 10, 20] * 10
    splits = ["val"] * 48 + ["train"] * 12
    index = index_of(store, splits, models, epochs)
    chosen = held_out(index, 8, seed=1)
    assert len(set(chosen)) == 8 and max(chosen) < 48
    latest = [c for c in chosen if epochs[c] == 20]
    assert len({models[c] for c in latest}) == len(latest) == 4
    assert sorted(epochs[c] for c in chosen if c not in latest) == [0, 1, 5, 10]
    assert held_out(index, 8, seed=1) == chosen != held_out(index, 8, seed=2)
    assert held_out(index, 1000) == list(range(48))
    assert len(held_out(index, 1)) == 1


def test_held_out_networks_are_of_the_test_split_without_a_val_split_and_of_the_training_split_without_both(
    store, caplog
):
    index = index_of(store, ["train", "test", "train"], ["a", "b", "c"], [3, None, 1])
    assert held_out(index, 5) == [1]
    assert not caplog.records
    assert held_out(index_of(store, ["train"] * 3, ["a", "a", "c"], [3, 4, 1]), 5) == [0, 1, 2]
    assert caplog.text.count("accuracy is not of held-out ones") == 1


@pytest.fixture
def folder(store, tmp_path):
    """Makes folders of models."""
    model = make_model(SANE, store)

    def make(name):
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def test_evaluations_run_one_after_the_other_and_the_newest_waits(store, folder, caplog):
    evaluations = Evaluations(store.path, networks=3, seed=0)
    for step in (10, 20, 30):
        evaluations.submit(step, step / 10, folder(f"step {step}"))
    evaluations.wait(120)
    points = evaluations.collect()
    steps = [point["step"] for point in points]
    assert steps in ([10, 30], [10, 20, 30])  # the second waits unless the first was very quick
    expected = evaluate(make_model(SANE, store), store, held_out(store, 3, seed=0))
    for point in points:
        assert point["epoch"] == point["step"] / 10 and abs(point["time"] - time.time()) < 600
        assert {name: value for name, value in point.items() if name.startswith("eval/")} == pytest.approx(expected)
    assert ("step 20 is not evaluated" in caplog.text) == (20 not in steps)
    assert evaluations.collect() == []
    assert not any(path.exists() for path in folder("last").parent.glob("step *"))


def test_a_failed_evaluation_is_a_warning_and_the_next_goes_on(store, folder, tmp_path, caplog):
    evaluations = Evaluations(store.path, networks=2)
    damaged = folder("damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    evaluations.submit(1, 0.1, damaged)
    evaluations.submit(2, 0.2, folder("whole"))
    evaluations.wait(120)
    assert [point["step"] for point in evaluations.collect()] == [2]
    assert "the evaluation of step 1 failed: InputError" in caplog.text and "model.safetensors" in caplog.text


def hang(folder):
    """Makes a model whose reading never ends; returns what its reader waits at."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return folder / "config.json"


def readers(pipe):
    """Other processes that have a pipe open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # of another user's process, or gone
            if link.readlink() == pipe and int(link.parts[2]) != os.getpid():
                yield int(link.parts[2])


def kill_reader(pipe):
    """Kills the process that reads a pipe, once there is one."""
    deadline = time.monotonic() + 120
    while True:
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # no reader yet
            assert time.monotonic() < deadline, "nobody evaluates"
            time.sleep(0.1)
    for pid in set(readers(pipe)):
        os.kill(pid, signal.SIGKILL)
    os.close(writer)


def test_a_worker_that_is_killed_is_a_warning(store, folder, caplog):
    evaluations = Evaluations(store.path, networks=2)
    model = folder("one")
    pipe = hang(model)
    evaluations.submit(1, 0.1, model)
    kill_reader(pipe)
    evaluations.wait(120)
    assert evaluations.collect() == []
    assert "the evaluation of step 1 failed: WorkerCrashedError" in caplog.text


def test_an_evaluation_that_does_not_end_is_given_up_at_the_end(store, folder, caplog):
    evaluations = Evaluations(store.path, networks=2)
    one, two = folder("one"), folder("two")
    hang(one)
    evaluations.submit(1, 0.1, one)
    evaluations.submit(2, 0.2, two)
    evaluations.wait(0.5)
    assert "the evaluation of step 1 is given up" in caplog.text
    assert evaluations.collect() == [] and not one.exists() and not two.exists()
    began = time.monotonic()
    evaluations.wait(60)
    assert time.monotonic() - began < 30  # nothing is left to wait for


def test_why_accuracy_is_not_measured_is_said_once(zoo, store, folder, tmp_path, caplog, ray_session):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    pq.write_table(without_params(store).models, copy / "models.parquet")
    _accept(copy)
    assert TokenStore.open(copy).path == copy
    evaluations = Evaluations(copy, networks=2)
    for step in (1, 2):
        evaluations.submit(step, step, folder(f"step {step}"))
        evaluations.wait(120)
    points = evaluations.collect()
    assert [set(point) - {"step", "epoch", "time"} for point in points] == [{"eval/explained_variance"}] * 2
    assert caplog.text.count("accuracy is not measured") == 1


def _accept(folder):
    """Makes a store's index agree with files that were changed."""
    index = json.loads((folder / "store.json").read_text())
    for file in index["files"]:
        path = folder / file["path"]
        file["bytes"] = path.stat().st_size
        if "sha256" in file:
            file["sha256"] = file_digest(path)
    (folder / "store.json").write_text(json.dumps(index))


def test_an_evaluation_runs_outside_the_placement_group_of_the_worker_that_asks(store, folder, ray_session):
    ray = ray_session
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 1}])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    model = folder("model")
    try:
        worker = ray.remote(num_cpus=1, scheduling_strategy=strategy)(_submit_and_look)
        points, own, of_task = ray.get(worker.remote(store.path, model))
    finally:
        remove_placement_group(group)
    assert [point["step"] for point in points] == [7]
    assert own is not None and of_task is None


def _submit_and_look(store, model):
    import ray

    evaluations = Evaluations(store, networks=1)
    evaluations.submit(7, 0.7, model)
    evaluations.wait(120)
    own, of_task = _placement_group(), ray.get(evaluation._remote(_placement_group).remote())
    return evaluations.collect(), own, of_task


def _placement_group():
    import ray

    return ray.get_runtime_context().get_placement_group_id()
