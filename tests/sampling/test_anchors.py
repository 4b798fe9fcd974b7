"""Anchors: training networks alone, of one kind, the best of them, in one order of channels."""

import dataclasses

import numpy as np
import pytest
import torch

from sane_ray.config import SamplingConfig
from sane_ray.errors import InputError
from sane_ray.sampling.anchors import aligned, choose, params_of
from sane_ray.tokens.symmetry import permute, random_permutations
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.images import load_images


def column(store, name, ordinals):
    return store.models[name].take(list(ordinals)).to_pylist()


def test_anchors_are_the_best_last_checkpoints_of_training_networks_of_one_kind(store):
    anchors = choose(store, SamplingConfig(best_fraction=0.5))
    accuracies = column(store, "property.val_acc", anchors.ordinals)
    assert set(column(store, "split", anchors.ordinals)) == {"train"}
    assert set(column(store, "epoch", anchors.ordinals)) == {2}
    assert len(set(column(store, "config.model::nlin", anchors.ordinals))) == 1
    assert accuracies == sorted(accuracies, reverse=True)
    activation = column(store, "config.model::nlin", anchors.ordinals)[0]
    rows = store.models.to_pylist()
    same = [row for row in rows if row["split"] == "train" and row["config.model::nlin"] == activation]
    last = sorted((row["property.val_acc"] for row in same if row["epoch"] == 2), reverse=True)
    assert accuracies == last[: round(len(last) / 2)]
    assert sorted([*anchors.ordinals, *anchors.others]) == sorted(row["checkpoint"] for row in same)
    assert f"{len(accuracies)} of {len(last)} training networks" in anchors.words
    assert activation in anchors.words


def test_a_condition_and_all_choose_other_anchors(store):
    config = SamplingConfig(anchors="all", anchor_epochs="all", where='nlin == "tanh" and epoch == 0')
    anchors = choose(store, config)
    assert set(column(store, "config.model::nlin", anchors.ordinals)) == {"tanh"}
    assert set(column(store, "epoch", anchors.ordinals)) == {0}
    rows = store.models.to_pylist()
    wanted = [r for r in rows if r["split"] == "train" and r["config.model::nlin"] == "tanh" and r["epoch"] == 0]
    assert len(anchors.ordinals) == len(wanted)


def test_a_loss_is_better_when_lower(store):
    anchors = choose(store, SamplingConfig(best_by="val_loss", anchors="all"))
    losses = column(store, "property.val_loss", anchors.ordinals)
    assert losses == sorted(losses)


def test_checkpoints_can_be_named_by_id_and_by_path(store, zoo):
    rows = [row for row in store.models.to_pylist() if row["config.model::nlin"] == "gelu"][:2]
    names = [rows[0]["id"], str(zoo / rows[1]["source"])]
    anchors = choose(store, SamplingConfig(checkpoints=names))
    assert anchors.ids == [row["id"] for row in rows]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"best_by": "beauty"}, "sampling.best_by is 'beauty'.*val_acc"),
        ({"where": "val_acc > 2"}, "none of the .* training networks"),
        ({"where": "beauty > 2"}, "beauty"),
        ({"checkpoints": ["nobody/1"]}, "names 'nobody/1', but no checkpoint"),
    ],
)
def test_what_chooses_nothing_is_refused(store, settings, words):
    with pytest.raises(InputError, match=words):
        choose(store, SamplingConfig(**settings))


def test_named_checkpoints_of_two_kinds_are_refused(store):
    rows = store.models.to_pylist()
    names = [next(row["id"] for row in rows if row["config.model::nlin"] == kind) for kind in ("gelu", "tanh")]
    with pytest.raises(InputError, match=r"of different kinds .*(gelu.*tanh|tanh.*gelu)"):
        choose(store, SamplingConfig(checkpoints=names))


def test_aligned_networks_compute_the_same_and_undo_a_permutation(store):
    anchors = choose(store, SamplingConfig())
    networks = anchors.networks(anchors.ordinals[:3])
    symmetry = anchors.architecture.symmetry
    shuffled = permute(networks[0], symmetry, random_permutations(symmetry, np.random.default_rng(1)))
    back, other = aligned([shuffled, networks[1]], symmetry, networks[0])
    for key, value in networks[0].items():
        torch.testing.assert_close(back[key], value)
    images = torch.from_numpy(load_images("digits", seed=0).split("test")[0][:20])
    network = from_params(anchors.params).eval()
    network.load_state_dict(networks[1])
    before = network(images)
    network.load_state_dict(other)
    torch.testing.assert_close(network(images), before, atol=1e-4, rtol=1e-4)


def test_the_recipe_is_the_best_anchors(store):
    anchors = choose(store, SamplingConfig())
    assert anchors.params == params_of(store, anchors.ordinals[0])
    network = from_params(anchors.params)
    network.load_state_dict(anchors.networks(anchors.ordinals[:1])[0])
    assert anchors.params["optim::optimizer"] == "adam"


def test_an_empty_training_split_is_refused(store):
    empty = dataclasses.replace(store, models=store.models.set_column(
        store.models.column_names.index("split"), "split", [["val"] * len(store.models)]
    ))  # fmt: skip
    with pytest.raises(InputError, match="no networks in its training split"):
        choose(empty, SamplingConfig())


@pytest.mark.parametrize("settings", [{"best_by": "test_acc"}, {"where": "test_acc > 0.5"}, {"best_by": "ggap"}])
def test_test_images_choose_nothing(store, settings):
    with pytest.raises(InputError, match="test images must decide nothing"):
        choose(store, SamplingConfig(**settings))


def test_named_anchors_outside_the_training_split_are_told(store):
    row = next(row for row in store.models.to_pylist() if row["split"] == "test")
    assert "1 of them not of the training split" in choose(store, SamplingConfig(checkpoints=[row["id"]])).words
