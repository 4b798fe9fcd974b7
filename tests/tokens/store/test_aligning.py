"""Stores of aligned models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sane_ray.errors import InputError
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.summary import summarize
from sane_ray.tokens.symmetry import derive_symmetry, permute, random_permutations
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.zoo.checkpoint import load_state_dict

SHAPES = {"0.weight": (12, 5), "0.bias": (12,), "2.weight": (9, 12), "2.bias": (9,), "4.weight": (3, 9)}
EXACT = {"dtype": "float32", "normalization": "none"}


@pytest.fixture
def zoo(new_zoo: Callable):
    """Five models that are one network, its channels in another order, and a little noise that grows with training."""
    zoo = new_zoo()
    origin = zoo.weights(0, SHAPES)
    symmetry = derive_symmetry(build_layer_table(origin))
    for model in range(5):
        rng = np.random.default_rng(model)
        permutations = random_permutations(symmetry, rng) if model else {}
        for epoch in range(2):
            noise = {key: torch.randn_like(value) * 0.01 * (1 + epoch) for key, value in origin.items()}
            weights = {key: value + noise[key] for key, value in origin.items()}
            zoo.add(f"model_{model}", epoch, permute(weights, symmetry, permutations) if model else weights)
    return zoo


def row_of(store: TokenStore, name: str) -> dict:
    return next(row for row in store.models.to_pylist() if row["id"] == name)


def weights_of(store: TokenStore, zoo: Path, name: str) -> tuple[dict, dict]:
    """A checkpoint as it was, and as it is stored."""
    row = row_of(store, name)
    return load_state_dict(zoo / row["source"]), store.state_dict(row["checkpoint"])


def test_models_are_brought_together_and_stay_the_same_function(anywhere, zoo):
    store = zoo.prepare("store", align="weights", align_to="model_0", **EXACT)
    (architecture,) = store.architectures.values()
    origin, _ = weights_of(store, zoo.path, "model_0/1")
    before, after = [], []
    for name in store.models["id"].to_pylist():
        model = name.partition("/")[0]
        original, stored = weights_of(store, zoo.path, name)
        permutations = store.alignment(row_of(store, name)["checkpoint"])
        assert set(permutations) == (set() if model == "model_0" else set(architecture.symmetry.sizes))
        before.append(sum((original[key] - origin[key]).square().sum() for key in stored))
        after.append(sum((stored[key] - origin[key]).square().sum() for key in stored))
        if permutations:
            original = permute(original, architecture.symmetry, permutations)
        assert all(torch.equal(original[key], stored[key]) for key in stored)
    assert sum(distance < 0.5 for distance in after) >= 8 and sum(after) < sum(before) / 4  # only noise is left of most
    assert store.index["alignment"]["references"] == {architecture.name: "model_0/1"}
    assert "by weights, to model_0/1" in summarize(store)
    rows = pq.read_table(store.path / "alignment.parquet").to_pylist()
    assert len(rows) == 4 * len(architecture.symmetry.sizes)
    assert all(row["similarity_after"] > row["similarity_before"] for row in rows)


def test_without_alignment_weights_are_stored_as_they_are(zoo):
    store = zoo.prepare("store", **EXACT)
    original, stored = weights_of(store, zoo.path, "model_3/0")
    assert all(torch.equal(original[key], stored[key]) for key in stored)
    assert store.alignment(0) == {} and "none: weights as they were found" in summarize(store)


def test_the_first_training_model_is_the_reference_unless_one_is_named(zoo):
    store = zoo.prepare("store", align="weights", **EXACT)
    train = sorted(row["model"] for row in store.models.to_pylist() if row["split"] == "train")
    assert list(store.index["alignment"]["references"].values()) == [f"{train[0]}/1"]


def test_a_reference_that_is_not_there_is_refused(zoo, tmp_path: Path):
    with pytest.raises(
        InputError, match=r"tokens\.align_to is 'nobody': no such model in the zoo; take one of model_0"
    ):
        zoo.prepare("store", align="weights", align_to="nobody", **EXACT)
    assert not (tmp_path / "store").exists()


def test_networks_without_known_symmetry_stay_as_they_are(new_zoo: Callable):
    store = new_zoo(models=4, epochs=1).prepare("store", align="weights", **EXACT)
    assert store.index["alignment"]["references"] == {} and store.alignment(0) == {}


def test_a_model_that_changes_its_shape_is_aligned_in_each(zoo):
    wide = {key: tuple(2 * size if size in (9, 12) else size for size in shape) for key, shape in SHAPES.items()}
    for model in (1, 2, 3):
        zoo.add(f"model_{model}", 2, zoo.weights(100 + model, wide))
    store = zoo.prepare("store", align="weights", max_architectures=2, split=[1.0, 0.0, 0.0], **EXACT)
    assert len(store.index["alignment"]["references"]) == 2
    for row in store.models.to_pylist():
        permutations = store.alignment(row["checkpoint"])
        original, stored = weights_of(store, zoo.path, row["id"])
        if permutations:
            original = permute(original, store.architecture_of(row["checkpoint"]).symmetry, permutations)
        assert all(torch.equal(original[key], stored[key]) for key in stored), row["id"]
    assert store.alignment(row_of(store, "model_2/2")["checkpoint"]) != {}
    assert store.alignment(row_of(store, "model_2/1")["checkpoint"]) != {}


def test_a_reference_that_was_rewritten_is_read_anew(zoo):
    first = zoo.prepare("first", align="weights", align_to="model_0", **EXACT)
    path = zoo.path / "model_0" / "checkpoint_000001" / "checkpoints"
    torch.save(zoo.weights(12345, SHAPES), path)
    second = zoo.prepare("second", align="weights", align_to="model_0", **EXACT)
    after = [table["similarity_after"].to_pylist() for table in map(alignments_of, (first, second))]
    assert min(after[0]) > max(after[1])  # nothing is like random weights


def test_a_reference_that_was_left_out_is_said(zoo):
    broken = zoo.weights(1, SHAPES)
    for epoch in (2, 3):
        zoo.add("model_8", epoch, broken | {"0.bias": torch.full((12,), torch.nan)})
    with pytest.raises(InputError, match=r"align_to is 'model_8', but that model was left out"):
        zoo.prepare("store", align="weights", align_to="model_8", max_skipped=0.5, **EXACT)


def alignments_of(store: TokenStore):
    return pq.read_table(store.path / "alignment.parquet")
