"""Layers that decide are found to, exactly so for linear probes, and at the cost of one fit."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from sane_ray.analysis import attribution
from sane_ray.analysis.attribution import WHOLE, contributions, groups_of, importances, layers_behind
from sane_ray.config import PropertiesConfig
from sane_ray.properties.features import Block, Zoo
from sane_ray.properties.prediction import Prediction
from sane_ray.properties.probes import BlockRidge, Boosting, PublishedRidge

ROWS = 120
SPLITS = (np.arange(0, 60), np.arange(60, 80), np.arange(80, ROWS))
MODELS = np.array([f"m{row // 2}" for row in range(ROWS)])


def zoo(seed=0):
    """Two blocks; only ``b`` matters, by a column of each block, and a little the column of no layer."""
    generator = np.random.default_rng(seed)
    first = Block("one", ["a/mean", "b/mean", "b/std"], generator.normal(size=(ROWS, 3)))
    second = Block("two", ["b/alpha", "c/alpha", "all"], generator.normal(size=(ROWS, 3)) + 5)
    target = 3 * first.values_RF[:, 1] + 2 * second.values_RF[:, 0] + 0.5 * second.values_RF[:, 2]
    return [first, second], target


def probe_of(kind):
    return lambda values: kind(values, MODELS)


def test_columns_belong_to_the_layer_before_the_last_slash_in_whatever_block():
    blocks, _ = zoo()
    found = {group: {name: at.tolist() for name, at in of.items()} for group, of in groups_of(blocks).items()}
    assert found == {"a": {"one": [0]}, "b": {"one": [1, 2], "two": [0]}, "c": {"two": [1]}, WHOLE: {"two": [2]}}
    assert list(groups_of([Block("flax", ["encoder/0/kernel/mean"], np.zeros((1, 1)))])) == ["encoder/0/kernel"]


@pytest.mark.parametrize("kind", [BlockRidge, PublishedRidge, Boosting])
def test_the_layer_that_decides_is_worth_most(kind):
    blocks, target = zoo()
    found = importances(probe_of(kind), blocks, target, SPLITS)
    assert found[0].group == "b" and found[0].drop > 0.5
    assert all(abs(one.drop) < 0.1 for one in found[1:])
    assert found == sorted(found, key=lambda one: -one.drop)


def test_a_seed_gives_the_same_exchanges_again_and_another_others():
    blocks, target = zoo()
    found = [importances(probe_of(BlockRidge), blocks, target, SPLITS, seed=seed) for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("values_at_once", [1, 500, 20_000_000])
def test_as_many_variants_share_a_fit_as_there_is_memory_for(values_at_once, monkeypatch):
    blocks, target = zoo()
    expected = importances(probe_of(BlockRidge), blocks, target, SPLITS)
    fits = []
    monkeypatch.setattr(attribution, "MOST_VALUES", values_at_once)

    def build(values):
        fits.append(len(values["one"]))
        return BlockRidge(values, MODELS)

    found = importances(build, blocks, target, SPLITS)
    assert [one.group for one in found] == [one.group for one in expected]
    assert np.allclose([one.drop for one in found], [one.drop for one in expected])
    assert len(fits) == {1: 21, 500: 11, 20_000_000: 1}[values_at_once]  # 4 groups, 5 times, and as it is


@pytest.mark.parametrize("kind", [BlockRidge, PublishedRidge])
def test_contributions_of_a_linear_probe_add_up_to_its_predictions(kind):
    blocks, target = zoo()
    found = contributions(probe_of(kind), blocks, target, SPLITS)
    whole = kind({block.name: block.values_RF for block in blocks}, MODELS)(target, *SPLITS[:2], 0).prediction_R
    assert found.groups == ["a", "b", "c", WHOLE]
    assert np.allclose(found.base + found.moved_nG.sum(axis=1), whole[SPLITS[2]])


def test_contributions_are_coefficient_times_centred_feature():
    blocks, target = zoo()
    found = contributions(probe_of(BlockRidge), blocks, target, SPLITS)
    train, _, test = SPLITS
    centred = [block.values_RF[test] - block.values_RF[train].mean(axis=0) for block in blocks]
    expected = {
        "a": 0 * centred[0][:, 0],
        "b": 3 * centred[0][:, 1] + 2 * centred[1][:, 0],
        WHOLE: 0.5 * centred[1][:, 2],
    }
    for group, values in expected.items():
        assert np.allclose(found.moved_nG[:, found.groups.index(group)], values, atol=0.05)
    assert found.base == pytest.approx(target[train].mean(), abs=0.02)


def test_features_that_are_missing_contribute_too():
    blocks, target = zoo()
    blocks[0].values_RF[::7, 0] = np.nan
    blocks[0].values_RF[:, 2] = np.nan  # of no row
    found = contributions(probe_of(BlockRidge), blocks, target, SPLITS)
    assert np.isfinite(found.moved_nG).all() and np.isfinite(found.base)


def test_what_a_zoos_layers_are_worth_comes_with_how_far_they_move_predictions(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=150, epochs=2)
    splits = [
        ("train", "train", "val", "test", "test")[int(model[1:]) % 5]
        for model in embeddings.models["model"].to_pylist()
    ]
    models = embeddings.models.set_column(embeddings.models.column_names.index("split"), "split", pa.array(splits))
    zoo = Zoo("zoo", None, dataclasses.replace(embeddings, models=models))
    prediction = Prediction([zoo], PropertiesConfig(targets=["test_acc", "epoch"], features=["sane_vectors"]))
    told = layers_behind(prediction, {"test_acc": ("sane_vectors", "ridge"), "epoch": ("sane_mean", "ridge")})
    assert list(told) == ["test_acc by sane_vectors, ridge"]  # in the mean embedding no layer is alone
    found = told["test_acc by sane_vectors, ridge"]
    deviation = np.std([v for v, s in zip(models["property.test_acc"].to_pylist(), splits, strict=True) if s == "test"])
    assert found[0].group == WHOLE and found[0].moved == pytest.approx(deviation, rel=0.2)  # alone knows the accuracy
    assert len(found) > 1 and all(one.moved < 0.3 * found[0].moved for one in found[1:])
