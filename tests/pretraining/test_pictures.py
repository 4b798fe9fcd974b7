import dataclasses

import numpy as np
import pytest
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig
from sane_ray.pretraining.launcher import resolve_autoencoder
from sane_ray.pretraining.pictures import reconstructed_accuracies, unseen_checkpoints
from sane_ray.pretraining.worker import preprocessing_of


class Exact(SANE):
    """An autoencoder that loses nothing: what it encodes is the weights themselves."""

    def encode_model(self, state_dict):
        self.last = state_dict
        return torch.zeros(1)

    def decode_model(self, z_NL, reference=None):
        return self.last


def make_model(kind, store):
    shape = AutoencoderConfig(window=20, d_model=16, heads=2, layers=1, latent_dim=8)
    model = kind(resolve_autoencoder(shape, store))
    model.preprocessing = preprocessing_of(store)
    return model


def test_the_original_accuracies_are_those_the_zoo_recorded(store):
    checkpoints = unseen_checkpoints(store)
    before, after = reconstructed_accuracies(store, make_model(Exact, store), checkpoints)
    recorded = [store.models["property.test_acc"][checkpoint].as_py() for checkpoint in checkpoints]
    assert before == pytest.approx(recorded, abs=0.02)  # stored in half precision
    assert np.array_equal(before, after)


def test_an_untrained_autoencoder_destroys_the_networks(store):
    trained = [c for c in range(store.models.num_rows) if store.models["property.test_acc"][c].as_py() > 0.5]
    assert trained
    before, after = reconstructed_accuracies(store, make_model(SANE, store), trained)
    assert after.mean() < before.mean() - 0.2


def test_a_zoo_that_does_not_say_how_to_run_its_networks_has_no_accuracies(store):
    names = [name for name in store.models.column_names if not name.startswith("config.")]
    bare = dataclasses.replace(store, models=store.models.select(names))
    assert reconstructed_accuracies(bare, make_model(SANE, bare), unseen_checkpoints(bare)) is None
