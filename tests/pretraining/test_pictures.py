import dataclasses
import json

import numpy as np
import pytest

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig
from sane_ray.pretraining.pictures import draw, reconstructed_accuracies, unseen_checkpoints
from sane_ray.pretraining.run import resolve_autoencoder
from sane_ray.pretraining.worker import preprocessing_of


def make_model(store):
    shape = AutoencoderConfig(window=20, d_model=16, heads=2, layers=1, latent_dim=8)
    model = SANE(resolve_autoencoder(shape, store))
    model.preprocessing = preprocessing_of(store)
    return model


def without_params(store):
    names = [name for name in store.models.column_names if not name.startswith("config.")]
    return dataclasses.replace(store, models=store.models.select(names))


def test_accuracies_are_of_the_networks_as_stored_and_reconstructed(store):
    before, after = reconstructed_accuracies(store, make_model(store), list(range(len(store.models))))
    recorded = np.array(store.models["property.test_acc"].to_pylist())
    assert before == pytest.approx(recorded, abs=0.02)  # stored in half precision
    trained = recorded > 0.5
    assert trained.any() and after[trained].mean() < before[trained].mean() - 0.2  # the autoencoder is untrained


def test_a_zoo_that_does_not_say_how_to_run_its_networks_has_no_accuracies(store):
    bare = without_params(store)
    assert reconstructed_accuracies(bare, make_model(bare), unseen_checkpoints(bare)) is None


def test_a_run_has_pictures_of_its_losses_weights_and_accuracies_and_of_evaluations_if_there_were_any(store, tmp_path):
    make_model(store).save_pretrained(tmp_path / "model")
    points = [{"step": step, "epoch": step, "time": 0.0, "train/loss": 1.0 / step} for step in range(1, 9)]
    history = tmp_path / "history.jsonl"

    def drawn(folder):
        history.write_text("".join(json.dumps(point) + "\n" for point in points))
        draw(history, store.path, tmp_path / "model", tmp_path / folder)
        return {path.name for path in (tmp_path / folder).iterdir()}

    always = {f"{name}.{kind}" for name in ("losses", "reconstruction", "accuracies") for kind in ("png", "svg")}
    assert drawn("without") == always
    points[3] |= {"eval/accuracy": 0.4, "eval/accuracy_original": 0.9}
    assert drawn("with") == always | {"evaluations.png", "evaluations.svg"}
