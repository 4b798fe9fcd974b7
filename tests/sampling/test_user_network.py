"""A zoo of residual networks with batch norms, which none of our own architectures is: sampled and trained on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig, FinetuneJob, FinetuningConfig, SampleJob, SamplingConfig, TokensConfig
from sane_ray.errors import InputError
from sane_ray.finetuning import job as finetune_job
from sane_ray.sampling import job as sample_job
from sane_ray.sampling.batch_norm import training_batches
from sane_ray.sampling.files import Samples
from sane_ray.sampling.finishing import finished, fitted
from sane_ray.sampling.plan import describe, plan_of
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.images import load_images
from sane_ray.zoo.user_network import UserNetwork

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "zoo"))

FUNCTION = "user_networks:residual"
NETWORK = UserNetwork(FUNCTION, 10)
PARAMS = {"optim::optimizer": "sgd", "optim::lr": 0.05, "optim::wd": 1e-4, "training::batchsize": 64}
METHODS = ["scratch", "anchors", "reconstruction", "sane_kde", "sane_kde:best", "noise:bootstrap"]


@pytest.fixture(autouse=True)
def own_mlflow(monkeypatch):
    """No MLflow but that of the storage."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def images():
    return load_images("digits", seed=0)


def accuracy(state, images, split="test"):
    net = NETWORK.build().eval()
    net.load_state_dict(state)
    x, y = map(torch.tensor, images.split(split))
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def train(folder, seed, images):
    """One network of the published layout, trained for two epochs by a plain loop."""
    net = NETWORK.build(seed)
    x, y = map(torch.tensor, images.split("train"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, weight_decay=1e-4, momentum=0.9)
    folder.mkdir(parents=True)
    lines = []
    for epoch in range(1, 3):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(100 * seed + epoch))
        net.train()
        for rows in order.split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        state = {key: value.clone() for key, value in net.state_dict().items()}
        (folder / f"checkpoint_{epoch:06d}").mkdir()
        torch.save(state, folder / f"checkpoint_{epoch:06d}" / "checkpoints")
        accuracies = {f"{split}_acc": accuracy(state, images, split) for split in ("train", "val", "test")}
        lines.append({"training_iteration": epoch, **accuracies})
    (folder / "params.json").write_text(json.dumps(PARAMS | {"seed": seed}))
    (folder / "result.json").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("residual") / "zoo"
    for seed in range(10):
        train(folder / f"model_{seed:02d}", seed, images)
    return folder


def store_of(zoo, path, **settings):
    config = TokensConfig(split=[0.8, 0.1, 0.1], dtype="float32", **settings)
    return write_store(discover(zoo), path, config, source=zoo)


def model_of(store, folder):
    (architecture,) = store.architectures.values()
    config = AutoencoderConfig(
        token_size=store.token_size, window=16, d_model=16, heads=2, layers=1, latent_dim=8,
        max_positions=list(architecture.table.position_sizes),
    )  # fmt: skip
    model = SANE(config, seed=0).eval()
    entries = {name: each.to_dict() for name, each in store.architectures.items()}
    model.preprocessing = {"token_size": store.token_size, "architectures": entries}
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(zoo):
    return store_of(zoo, zoo.parent / "store")


@pytest.fixture(scope="module")
def model(store, zoo):
    """An untrained autoencoder."""
    return model_of(store, zoo.parent / "model")


def job_of(store, model, storage, network=FUNCTION, images="digits", target="", **settings):
    defaults = {
        "methods": METHODS,
        "repetitions": 2,
        "candidates": 3,
        "rounds": 2,
        "bandwidths": [0.1],
        "noises": [0.2],
    }
    config = SamplingConfig(**defaults | settings)
    return SampleJob(
        model=str(model), store=str(store.path), images=images, target=target, network=network, storage=str(storage),
        run_name="residual", sampling=config,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sampled(store, model, tmp_path_factory):
    storage = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        sample_job.run(job_of(store, model, storage), dry_run=False)
    return storage


def test_samples_are_files_that_load_and_say_who_builds_them(sampled, images):
    samples = Samples.open(sampled / "samples" / "residual")
    assert samples.index["network"] == FUNCTION and samples.index["recipe"]["network::function"] == FUNCTION
    assert {row["method"] for row in samples.rows} == set(METHODS)
    for row in samples.rows:
        state = load_file(samples.path / row["file"])
        assert {key: tuple(value.shape) for key, value in state.items()} == NETWORK.shapes
        assert state["norm.num_batches_tracked"].dtype == torch.int64
        assert accuracy(state, images) == pytest.approx(row["test_acc"], abs=0.01)  # what is written was measured
    assert min(row["test_acc"] for row in samples.of_method("anchors")) > 0.6
    assert all(row["wrong_agreement"] is not None for row in samples.of_method("sane_kde"))


def test_scratch_is_as_the_function_initialises(sampled):
    samples = Samples.open(sampled / "samples" / "residual")
    first, second = (samples.network(row) for row in samples.of_method("scratch"))
    assert not torch.equal(first["stem.weight"], second["stem.weight"])
    assert not first["norm.running_mean"].any() and not first["norm.num_batches_tracked"].any()


def test_conditioning_makes_statistics_right_and_networks_better(store, model, tmp_path, images):
    plans = {how: plan_of(job_of(store, model, tmp_path, batch_norm=how)) for how in ("reset", "published", "keep")}
    (state,) = plans["keep"].anchors.networks(plans["keep"].anchors.ordinals[:1])
    decoded = {key: 0.9 * value[None] for key, value in state.items()}  # smaller weights: statistics no longer fit
    decoded["norm.running_mean"] += 1
    found = {how: {key: value[0] for key, value in finished(plan, decoded).items()} for how, plan in plans.items()}
    assert accuracy(found["reset"], images) > accuracy(found["keep"], images) + 0.05
    assert accuracy(found["published"], images) > accuracy(found["keep"], images)
    assert torch.equal(found["keep"]["norm.running_mean"], decoded["norm.running_mean"][0])
    assert torch.equal(found["reset"]["head.weight"], decoded["head.weight"][0]), "only statistics change"
    batches = torch.cat(training_batches(images, "reset"))
    maps = functional.conv2d(batches, decoded["stem.weight"][0], decoded["stem.bias"][0], padding=1)
    torch.testing.assert_close(found["reset"]["norm.running_mean"], maps.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    assert int(found["reset"]["norm.num_batches_tracked"]) == len(training_batches(images, "reset"))


def test_only_training_images_condition(images):
    x, _ = images.split("train")
    allowed = {image.tobytes() for image in x}
    for how, size in (("reset", 100), ("published", 32)):
        batches = training_batches(images, how)
        assert all(image.numpy().tobytes() in allowed for batch in batches for image in batch)
        assert {abs(len(batch) - size) < 10 for batch in batches} == {True}
    assert training_batches(images, "keep") == []


def test_an_exploded_network_keeps_what_it_had(store, model, tmp_path):
    plan = plan_of(job_of(store, model, tmp_path))
    (state,) = plan.anchors.networks(plan.anchors.ordinals[:1])
    bad = {key: value[None].repeat(2, *[1] * value.ndim) for key, value in state.items()}
    bad["stem.weight"][0] = float("inf")
    done, before = finished(plan, bad), fitted(plan, bad)
    assert torch.equal(done["norm.running_mean"][0], before["norm.running_mean"][0])
    assert not torch.equal(done["norm.running_mean"][1], before["norm.running_mean"][1])


def test_a_store_without_batch_norms_gets_them_from_the_network_and_the_images(zoo, tmp_path, images):
    store = store_of(zoo, tmp_path / "store", batch_norm="ignore")
    plan = plan_of(job_of(store, model_of(store, tmp_path / "model"), tmp_path))
    assert "not in the store, as the network is built: norm.weight, norm.bias" in describe(plan)
    raw = plan.anchors.networks(plan.anchors.ordinals[:2])
    done = finished(plan, {key: torch.stack([network[key] for network in raw]) for key in raw[0]})
    assert {key: tuple(value.shape[1:]) for key, value in done.items()} == NETWORK.shapes
    assert accuracy({key: value[0] for key, value in done.items()}, images) > 0.3


def test_fewer_classes_begin_with_a_new_head(store, model, tmp_path, images):
    some = images.labels_N < 4
    np.savez(tmp_path / "four.npz", images=images.images_NCHW[some], labels=images.labels_N[some])
    plan = plan_of(job_of(store, model, tmp_path, images=str(tmp_path / "four.npz")))
    raw = plan.anchors.networks(plan.anchors.ordinals[:2])
    done = finished(plan, {key: torch.stack([network[key] for network in raw]) for key in raw[0]})
    assert {key: tuple(value.shape[1:]) for key, value in done.items()} == UserNetwork(FUNCTION, 4).shapes
    torch.testing.assert_close(done["stem.weight"][0], raw[0]["stem.weight"])
    assert "initialised anew" in describe(plan)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": ""}, "--network user_networks:residual needs --images"),
        ({"target": "digits_cnn"}, "--target names one of our own"),
        ({"network": "no_such_module:f"}, "cannot be imported"),
        (
            {"network": "user_networks:wider"},
            r"stem.weight is \[12, 1, 3, 3\] in the network and \[8, 1, 3, 3\] in the n",
        ),
        ({"network": "user_networks:plain"}, "0.weight is .* in the network and missing in the networks of"),
        ({"network": ""}, "--network package.module:function names what builds networks of your own"),
    ],
)
def test_what_does_not_fit_is_one_sentence(store, model, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        plan_of(job_of(store, model, tmp_path, **fields))
    assert not list(tmp_path.iterdir())


def test_the_dry_run_tells_the_network_and_the_recipe(store, model, sampled, tmp_path, capsys):
    sample_job.run(job_of(store, model, tmp_path), dry_run=True)
    printed = capsys.readouterr().out
    assert "user_networks:residual(), trained as the best anchor was: optimizer sgd, lr 0.05" in printed
    assert "statistics of 3 batch norms: estimated from 1258 training images" in printed
    samples = str(sampled / "samples" / "residual")
    config = FinetuningConfig(batch_size=50)
    job = FinetuneJob(samples=samples, storage=str(tmp_path), finetuning=config, network=FUNCTION)
    finetune_job.run(job, dry_run=True)
    printed = capsys.readouterr().out
    assert "network    user_networks:residual()" in printed
    assert "optimizer sgd (of the best anchor), constant learning rate 0.05 (of the best anchor)" in printed
    assert "momentum 0.9 (default)" in printed and "batches of 50 (as chosen)" in printed


def test_samples_are_trained_on(sampled, tmp_path, capsys):
    samples = str(sampled / "samples" / "residual")
    config = FinetuningConfig(epochs=1, table_epochs=[0, 1])
    job = FinetuneJob(samples=samples, storage=str(tmp_path), finetuning=config, run_name="tuned", network=FUNCTION)
    finetune_job.run(job, dry_run=False)
    assert "warning" not in capsys.readouterr().out
    results = finetune_job.read_results(tmp_path / "finetuning" / "tuned")
    means = {(row["method"], row["epoch"]): row["mean"] for row in results["table"]}
    assert results["failed"] == [] and len(means) == 2 * len(METHODS)
    rows = Samples.open(Path(samples)).of_method("anchors")
    assert means["anchors", 0] == pytest.approx(sum(row["test_acc"] for row in rows) / len(rows), abs=0.01)
    assert means["scratch", 1] > means["scratch", 0] + 0.2 and means["anchors", 1] > means["scratch", 0]


def test_the_function_must_be_named_and_may_be_another_that_fits(sampled, tmp_path):
    job = {"samples": str(sampled / "samples" / "residual"), "storage": str(tmp_path)}
    with pytest.raises(InputError, match=r"built by user_networks:residual, .* name it by --network user_networks:"):
        finetune_job.plan_of(FinetuneJob(**job))
    assert finetune_job.plan_of(FinetuneJob(**job, network="user_networks:Residual")).network.path.endswith("Residual")
    with pytest.raises(InputError, match=r"stem.weight is \[12, 1, 3, 3\] in the network .* networks of .*residual"):
        finetune_job.plan_of(FinetuneJob(**job, network="user_networks:wider"))


def test_actors_on_ray_import_the_function_as_the_command_line_does(sampled, tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "zoo")])
    command = [
        sys.executable, str(ROOT / "jobs" / "finetune.py"), "--samples", str(sampled / "samples" / "residual"),
        "--network", FUNCTION, "--storage", str(tmp_path),
        "--finetuning.epochs", "0", "--finetuning.table_epochs", "[0]",
        "--finetuning.networks_at_once", "6", "--fan_out.actors", "2", "--fan_out.cpus", "0.5",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "anchors" in done.stdout and "warning" not in done.stdout


def test_adamw_is_for_networks_of_the_users_alone(sampled):
    samples = Samples.open(sampled / "samples" / "residual")
    config = FinetuningConfig(optimizer="adamw")
    assert finetune_job._recipe(samples, config, NETWORK)["optim::optimizer"] == "adamw"
    with pytest.raises(InputError, match="'adamw', which trains only networks of --network: choose adam or sgd"):
        finetune_job._recipe(samples, config, None)
