"""Measures of layers are what they are called, and go with each other as they should."""

import json

import numpy as np
import pytest
import torch

from sane_ray.analysis.depth import Profiles, along_depth, profiles, spectra_of, spectra_of_store
from sane_ray.analysis.tables import correlation_table, correlations, depth_table
from sane_ray.config import TokensConfig
from sane_ray.properties.protocols import last_rows
from sane_ray.tokens.store.writing import write_store
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.zoo.catalog import discover
from sane_ray.zoo.checkpoint import LoadedCheckpoint


def test_profiles_are_read_off_the_layers(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=2, epochs=2)
    found = profiles(embeddings, "net5")
    assert found.ids == ["m0/0", "m0/1", "m1/0", "m1/1"]
    assert found.layers == [f"net.{layer}.weight" for layer in range(5)]
    assert np.array_equal(found.measures["spread"], [[1, np.nan, 3, 4, 5]] * 4, equal_nan=True)  # of one token: none
    _, mean_RKL = embeddings.layer_vectors("mean", "net5")
    assert np.allclose(found.measures["norm"], np.sqrt((mean_RKL**2).sum(axis=2)))
    assert np.allclose(found.measures["error"], [[0.1, 0.2, 0.3, 0.4, 0.5]] * 4)
    assert np.allclose(found.measures["explained_variance"], [[1, 0.9, 0.8, 0.7, 0.6]] * 4)
    assert set(found.measures) == {"spread", "norm", "error", "explained_variance"}


def test_spectra_of_some_networks_stand_beside(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=2, epochs=1)
    found = profiles(embeddings, "net5", {"m1/0": {"log_spectral_norm": np.arange(5.0)}})
    assert np.isnan(found.measures["log_spectral_norm"][0]).all()
    assert found.measures["log_spectral_norm"][1].tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(found.measures["alpha"]).all()


def test_spectra_are_those_of_the_weights_as_they_are():
    weights = {
        "a.weight": torch.diag(torch.tensor([3.0, 1.0])),
        "b.weight": torch.ones(1, 4),
        "c.weight": torch.zeros(3, 3),
    }
    found = spectra_of(LoadedCheckpoint("x", weights), build_layer_table(weights, token_size=4))
    assert found["log_spectral_norm"][0] == pytest.approx(np.log10(9))
    assert found["stable_rank"][0] == pytest.approx(10 / 9)
    assert np.isnan(found["log_spectral_norm"][1:]).all()  # a row, and zeros


def test_correlations_along_depth_are_pearsons_and_spearmans_where_layers_are_enough():
    rising, falling = np.arange(6.0), -(np.arange(6.0) ** 3)
    holes = np.array([0, np.nan, np.nan, np.nan, 4, np.nan])
    constant = np.full(6, 0.1) + 1e-15 * np.arange(6)
    found = Profiles(list("abcd"), list("uvwxyz"), {"spread": np.stack([rising, rising, holes, constant])})
    found.measures["stable_rank"] = np.stack([rising, falling, rising, rising])
    nothing = [np.nan, np.nan]  # two layers; and one value but for rounding
    assert np.allclose(along_depth(found, "spread", "stable_rank"), [1, -1, *nothing], equal_nan=True)
    straight = np.corrcoef(rising, falling)[0, 1]
    pearson = along_depth(found, "spread", "stable_rank", "pearson")
    assert np.allclose(pearson, [1, straight, *nothing], equal_nan=True)
    (row,) = correlations(found)
    assert (row["statistic"], row["feature"], row["checkpoints"]) == ("spread", "stable_rank", 2)
    assert (row["layers_least"], row["layers_most"]) == (6, 6)
    assert [row["spearman_q25"], row["spearman"], row["spearman_q75"]] == pytest.approx([-0.5, 0, 0.5])
    assert row["pearson"] == pytest.approx((1 + straight) / 2)
    assert row["pearson_deviation"] == pytest.approx((1 - straight) / np.sqrt(2))


def test_five_layers_have_a_correlation_four_have_none_and_it_is_said_how_many_there_are():
    one, other = [1.0, 2, 3, 4, 5], [1.0, 2, 4, 3, 9]
    five = Profiles(["a"], list("vwxyz"), {"norm": np.array([one]), "alpha": np.array([other])})
    assert along_depth(five, "norm", "alpha", "pearson") == pytest.approx(np.corrcoef(one, other)[0, 1])
    four = Profiles(["a"], list("wxyz"), {name: values[:, :4] for name, values in five.measures.items()})
    assert np.isnan(along_depth(four, "norm", "alpha", "pearson")).all()
    (row,) = correlations(four)
    assert (row["pearson"], row["layers_least"], row["layers_most"]) == (None, 4, 4)
    (row,) = correlations(four, five)
    assert (row["checkpoints"], row["layers_least"], row["layers_most"]) == (1, 5, 5)  # of those that have one


def test_a_correlation_that_is_not_defined_is_blank_and_a_family_has_that_of_all_its_networks():
    rising, constant = np.arange(5.0)[None], np.ones((1, 5))
    small = Profiles(["a"], list("vwxyz"), {"norm": rising, "alpha": rising, "log_norm": constant})
    large = Profiles(["b"], list("uvwxyz"), {"norm": np.arange(6.0)[None], "alpha": -np.arange(6.0)[None]})
    rows = correlation_table({"small": small, "large": large}).to_pylist()
    found = {(row["architecture"], row["feature"]): row for row in rows}
    assert set(found) == {
        ("small", "alpha"),
        ("small", "log_norm"),
        ("large", "alpha"),
        ("", "alpha"),
        ("", "log_norm"),
    }
    assert found["small", "log_norm"]["checkpoints"] == 0 and found["small", "log_norm"]["pearson"] is None
    assert found["small", "alpha"]["pearson"] == pytest.approx(1)
    assert found["small", "alpha"]["pearson_deviation"] is None  # one network has none
    assert found["", "alpha"]["pearson"] == pytest.approx(0)
    assert (found["", "alpha"]["layers_least"], found["", "alpha"]["layers_most"]) == (5, 6)
    assert found["", "alpha"]["pearson_deviation"] == pytest.approx(np.sqrt(2))


def test_the_depth_table_has_a_row_a_network_and_layer(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=3, epochs=1, families=2)
    table = depth_table({name: profiles(embeddings, name) for name in ("net5", "net7")})
    assert len(table) == 2 * 5 + 7
    rows = table.to_pylist()
    assert rows[2] == {"id": "m0/0", "architecture": "net5", "layer": 2, "name": "net.2.weight"} | {
        key: rows[2][key] for key in ("spread", "norm", "error", "explained_variance")
    }
    assert rows[2]["spread"] == 3 and rows[10]["id"] == "m1/0"


def test_the_last_checkpoint_of_a_model_is_that_of_its_largest_epoch():
    assert last_rows(["a", "b", "a", "c", "a"], [3, None, 9, 1, 4]) == [2, 1, 3]


def test_spectra_of_a_store_are_of_some_last_checkpoints(tmp_path):
    zoo = tmp_path / "zoo"
    for model in range(5):
        for epoch in range(2):
            folder = zoo / f"NN_tune_trainable_{model}" / f"checkpoint_{epoch}"
            folder.mkdir(parents=True)
            weights = {"a.weight": (10.0 ** (model + epoch)) * torch.eye(3), "b.weight": torch.ones(4, 3)}
            torch.save(weights, folder / "checkpoints")
        lines = [json.dumps({"training_iteration": epoch}) for epoch in range(2)]
        (folder.parent / "result.json").write_text("\n".join(lines) + "\n")
        (folder.parent / "params.json").write_text("{}")
    store = write_store(discover(zoo), tmp_path / "store", TokensConfig(dtype="float32"), source=zoo)
    found = spectra_of_store(store, most=3)
    last = {row["id"]: row["model"] for row in store.models.to_pylist() if row["epoch"] == 1}
    assert len(found) == 3 and set(found) <= set(last)
    for one, metrics in found.items():
        assert metrics["log_spectral_norm"][0] == pytest.approx(2 * (int(last[one][-1]) + 1), abs=1e-3)
    assert len(spectra_of_store(store)) == 5
