"""jobs/sample.py: from a model and a store to networks on disk that load, are measured and audited, once."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from sane_ray.config import SampleJob, SamplingConfig, TokensConfig
from sane_ray.errors import InputError
from sane_ray.sampling import job
from sane_ray.sampling.files import Samples
from sane_ray.sampling.plan import plan_of
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.images import load_images

SETTINGS = {
    "best_fraction": 0.6,
    "methods": ["scratch", "anchors", "reconstruction", "sane_kde:best", "noise:best", "interpolation"],
    "repetitions": 3,
    "candidates": 6,
    "bandwidths": [0.1, 0.5],
    "noises": [0.1, 0.5],
    "fractions": [0.2, 0.5],
}


def make(store, untrained, folder, **changes):
    sampling = SamplingConfig(**(SETTINGS | changes.pop("sampling", {})))
    return SampleJob(
        model=str(untrained), store=str(store.path), storage=str(folder), run_name="try", sampling=sampling, **changes
    )


@pytest.fixture(scope="module")
def sampled(store, untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    config = make(store, untrained, folder)
    job.run(config, dry_run=False)
    return config, folder / "samples" / "try"


def test_every_network_loads_and_has_the_accuracy_that_its_row_says(sampled):
    samples = Samples.open(sampled[1])
    images = load_images("digits", seed=0)
    pixels, labels = images.split("test")
    assert len(samples.rows) == 6 * 3
    for row in samples.rows:
        network = from_params({**samples.index["recipe"], "seed": 0}).eval()
        network.load_state_dict(load_file(sampled[1] / row["file"]))
        with torch.inference_mode():
            accuracy = (network(torch.from_numpy(pixels)).argmax(1).numpy() == labels).mean()
        assert row["test_acc"] == pytest.approx(accuracy, abs=1.5 / len(labels))


def test_methods_are_what_they_say(sampled):
    samples = Samples.open(sampled[1])
    assert [row["novelty"] for row in samples.of_method("anchors")] == pytest.approx([0] * 3, abs=1e-4)
    ids = samples.index["anchors"]["ids"]
    parents = [row["parents"] for row in samples.of_method("anchors")]
    assert parents == [[ids[place % len(ids)]] for place in range(3)]
    best = [row["val_acc"] for row in samples.of_method("noise:best")]
    assert best == sorted(best, reverse=True)
    assert all(row["novelty"] is None for row in samples.of_method("scratch"))
    scratch = samples.network(samples.of_method("scratch")[0])
    assert set(scratch) == set(samples.network(samples.of_method("anchors")[0]))


def test_candidates_hold_every_source_at_every_scale(sampled):
    rows = pq.read_table(sampled[1] / "candidates.parquet").to_pylist()
    counts = {}
    for row in rows:
        counts.setdefault(row["source"], set()).add(row["scale"])
    assert set(counts) == {"anchors", "reconstruction", "sane_kde", "noise", "interpolation"}
    assert len(counts["noise"]) == 3  # matched, and two swept
    assert len(counts["interpolation"]) == 2  # half way is swept too
    assert sum(row["as_method"] for row in rows if row["source"] == "noise") == 6


def test_the_report_and_the_pictures_are_there(sampled):
    page = (sampled[1] / "report.html").read_text()
    assert "Are they more than copies?" in page
    assert page.count("<img") == 2
    for name in ("novelty", "behavior"):
        assert (sampled[1] / "plots" / f"{name}.svg").stat().st_size > 1000
    json.loads((sampled[1] / "samples.json").read_text(), parse_constant=pytest.fail)


def test_a_repeated_run_does_nothing_and_another_is_refused(sampled, store, untrained, capsys):
    config, output = sampled
    before = (output / "samples.json").read_bytes()
    job.run(config, dry_run=False)
    assert "nothing to do" in capsys.readouterr().out
    assert (output / "samples.json").read_bytes() == before
    with pytest.raises(InputError, match="samples with other settings"):
        job.run(make(store, untrained, config.storage, sampling={"seed": 1}), dry_run=False)


def test_a_run_that_was_cut_off_measures_nothing_twice(sampled, store, untrained, tmp_path, monkeypatch):
    from sane_ray.finetuning.records import Records

    kept = []
    keep = Records.keep

    def keep_some(self, key, histories):
        if len(kept) == 4:
            raise KeyboardInterrupt
        kept.append(key)
        keep(self, key, histories)

    config = make(store, untrained, tmp_path)
    monkeypatch.setattr(Records, "keep", keep_some)
    with pytest.raises(KeyboardInterrupt):
        job.run(config, dry_run=False)
    again = []
    monkeypatch.setattr(Records, "keep", lambda self, key, histories: (again.append(key), keep(self, key, histories)))
    job.run(config, dry_run=False)
    assert not set(again) & set(kept)
    first, second = (Samples.open(path).rows for path in (sampled[1], tmp_path / "samples" / "try"))
    assert first == second


def test_a_dry_run_starts_nothing(store, untrained, tmp_path, capsys):
    job.run(make(store, untrained, tmp_path), dry_run=True)
    said = capsys.readouterr().out
    assert "anchors " in said
    assert "dry run: nothing was started" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def other_images(tmp_path):
    """Images of five classes in the shape of digits."""
    rng = np.random.default_rng(0)
    path = tmp_path / "other.npz"
    np.savez(path, images=rng.random((80, 8, 8), dtype=np.float32), labels=np.arange(80) % 5)
    return path


def test_other_classes_begin_with_another_last_layer(store, untrained, tmp_path, other_images):
    config = make(store, untrained, tmp_path, images=str(other_images), sampling={"methods": ["anchors", "scratch"]})
    job.run(config, dry_run=False)
    samples = Samples.open(tmp_path / "samples" / "try")
    network = samples.network(samples.of_method("anchors")[0])
    assert network["module_list.8.weight"].shape == (5, 24)
    assert samples.index["recipe"]["model::o_dim"] == 5
    original = store.state_dict(plan_of(config).anchors.ordinals[0])
    torch.testing.assert_close(network["module_list.0.weight"], original["module_list.0.weight"])


def test_a_wider_target_keeps_the_anchors_accuracy(store, untrained, tmp_path, sampled):
    config = make(store, untrained, tmp_path, target="digits_cnn_wide", sampling={"methods": ["anchors"]})
    job.run(config, dry_run=False)
    samples = Samples.open(tmp_path / "samples" / "try")
    wide = [row["test_acc"] for row in samples.rows]
    narrow = [row["test_acc"] for row in Samples.open(sampled[1]).of_method("anchors")]
    assert wide == pytest.approx(narrow, abs=0.05)
    assert samples.network(samples.rows[0])["module_list.0.weight"].shape == (16, 1, 3, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ""}, "no model is named"),
        ({"store": ""}, "no token store is named"),
        ({"images": "nowhere.npz"}, "no such file"),
        ({"images": "mnist5k"}, r"have shape \[1, 28, 28\], but the networks of .* take \[1, 8, 8\]"),
        ({"target": "cnn_s"}, "too small for"),
        ({"target": "resnet"}, "must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(store, untrained, tmp_path, changes, words):
    names = {"model": str(untrained), "store": str(store.path)} | changes
    with pytest.raises(InputError, match=words):
        plan_of(SampleJob(storage=str(tmp_path), **names))


def test_a_folder_of_something_else_is_refused(store, untrained, tmp_path):
    (tmp_path / "samples" / "try").mkdir(parents=True)
    (tmp_path / "samples" / "try" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt\)"):
        job.run(make(store, untrained, tmp_path), dry_run=False)


def test_an_unfinished_folder_of_other_settings_is_refused(store, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_write", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.run(make(store, untrained, tmp_path), dry_run=False)
    with pytest.raises(InputError, match="unfinished samples with other settings"):
        job.run(make(store, untrained, tmp_path, sampling={"seed": 1}), dry_run=False)


def test_one_anchor_needs_methods_for_one(store, untrained, tmp_path):
    name = store.models["id"][0].as_py()
    with pytest.raises(InputError, match="'interpolation', which needs several anchors, and there is one"):
        plan_of(make(store, untrained, tmp_path, sampling={"checkpoints": [name]}))
    with pytest.raises(InputError, match="one anchor has no spread"):
        plan_of(make(store, untrained, tmp_path, sampling={"checkpoints": [name], "methods": ["sane_kde"]}))
    plan_of(
        make(store, untrained, tmp_path, sampling={"checkpoints": [name], "methods": ["sane_kde"], "bandwidth": 0.1})
    )


def test_a_new_last_layer_cannot_choose_the_bandwidth(store, untrained, tmp_path, other_images):
    with pytest.raises(InputError, match="the last layer begins anew for 5 classes"):
        plan_of(make(store, untrained, tmp_path, images=str(other_images)))


def test_other_normalisations_are_refused(zoo, untrained, tmp_path):
    config = TokensConfig(split=[0.8, 0.1, 0.1], normalization="minmax")
    other = write_store(discover(zoo), tmp_path / "store", config, source=zoo)
    with pytest.raises(InputError, match="has minmax normalisation"):
        plan_of(make(other, untrained, tmp_path))


def test_damaged_samples_are_told(sampled, tmp_path):
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Samples.open(tmp_path)
    with pytest.raises(InputError, match=r"has no samples.json"):
        Samples.open(sampled[1] / "networks")
    samples = Samples.open(sampled[1])
    with pytest.raises(InputError, match="cannot be read"):
        samples.network({"file": "networks/nobody.safetensors"})
