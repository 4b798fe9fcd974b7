import numpy as np
import pytest

from sane_ray.embedding import SHAPE, Embeddings
from sane_ray.errors import InputError
from sane_ray.properties import features as features_module
from sane_ray.properties.features import FeatureSource, Unavailable, Zoo
from sane_ray.properties.targets import find_target


def test_weights_are_the_flat_normalised_tokens_without_padding(store):
    (block,) = FeatureSource([Zoo("zoo", store)]).blocks("weights")
    tokens, table = store.tokens(5).numpy(), store.architecture_of(5).table
    signal = np.arange(table.token_size) < table.signal_counts[:, None]
    np.testing.assert_allclose(block.values_RF[5], tokens[signal], atol=1e-6)
    assert block.values_RF.shape == (60, table.parameters)


def test_embeddings_become_features(store, embeddings):
    opened = Embeddings.open(embeddings)
    source = FeatureSource([Zoo("zoo", store, opened)])
    (mean,), (rich, shape) = source.blocks("sane_mean"), source.blocks("sane")
    z, table = store.tokens(8).numpy()[:, :3], store.architecture_of(8).table
    np.testing.assert_allclose(mean.values_RF[8], z.mean(0), atol=1e-6)
    assert rich.values_RF.shape == (60, 7 * 3 + 2 * 2 * 3)
    found = dict(zip(rich.columns, rich.values_RF[8], strict=True))
    second = z[table.layer_starts[1] : table.layer_starts[2]]
    assert found["1.weight/layer mean 2"] == pytest.approx(second[:, 2].mean(), abs=1e-6)
    assert found["1.weight/layer std 0"] == pytest.approx(second[:, 0].std(), abs=1e-6)
    assert found["q75 1"] == pytest.approx(np.quantile(z[:, 1], 0.75), abs=1e-6)
    assert shape.values_RF.shape == (60, 3 * len(SHAPE))
    found = dict(zip(shape.columns, shape.values_RF[8], strict=True))
    lengths = np.linalg.norm(second, axis=1)
    assert found["1.weight/layer norm_mean"] == pytest.approx(np.log10(lengths.mean()), abs=1e-5)
    assert found["norm_q99"] == pytest.approx(np.log10(np.quantile(np.linalg.norm(z, axis=1), 0.99)), abs=1e-5)


def test_a_sum_has_the_blocks_of_its_parts(store, embeddings):
    source = FeatureSource([Zoo("zoo", store, Embeddings.open(embeddings))])
    assert [block.name for block in source.blocks("sane+statistics")] == ["sane_vectors", "sane_shape", "statistics"]
    assert source.blocks("statistics")[0] is source.blocks("sane+statistics")[2]


def test_architectures_that_differ_are_described_over_their_layers(mixed_store):
    source = FeatureSource([Zoo("zoo", mixed_store)])
    (block,) = source.blocks("statistics")
    assert block.values_RF.shape == (32, 2 * 7 * 4) and np.isfinite(block.values_RF).all()
    assert block.note == "architectures differ: mean, std, min and max over layers"
    for row in (0, 31):
        weights = [w.double().numpy() for key, w in mixed_store.state_dict(row).items() if key.endswith("weight")]
        found = dict(zip(block.columns, block.values_RF[row], strict=True))
        means = [weight.mean() for weight in weights]
        assert found["weight mean, mean of layers"] == pytest.approx(np.mean(means), abs=1e-6)
        assert found["weight mean, max of layers"] == pytest.approx(np.max(means), abs=1e-6)
        assert found["weight p100, min of layers"] == pytest.approx(min(w.max() for w in weights), abs=1e-6)
    with pytest.raises(Unavailable, match="different shapes have no common columns"):
        source.blocks("weights")


def test_what_cannot_be_had_says_why(store, embeddings, monkeypatch):
    with pytest.raises(Unavailable, match="needs embeddings of zoo: name them with --embeddings"):
        FeatureSource([Zoo("zoo", store)]).blocks("sane")
    with pytest.raises(Unavailable, match="needs the weights of zoo: name its token store with --store"):
        FeatureSource([Zoo("zoo", None, Embeddings.open(embeddings))]).blocks("statistics")
    monkeypatch.setattr(features_module, "MOST_WEIGHTS", 100)
    with pytest.raises(Unavailable, match=r"2,460 raw weights are more than the 100 .* would take 0\.0 GB"):
        FeatureSource([Zoo("zoo", store)]).blocks("weights")


@pytest.fixture(scope="module")
def other_store(zoos, tmp_path_factory):
    """Other networks of the same architecture, normalised by their own statistics."""
    folder = tmp_path_factory.mktemp("other")
    return zoos.write(folder / "store", zoos.write_zoo(folder / "zoo", models=8, seed=5))


def as_normalized(store, row, normalization):
    """Rows [w | b] of each layer of a network, normalised by the formula, and their padding to tokens."""
    weights, table = store.state_dict(row), store.architecture_of(row).table
    rows, padding = [], []
    for index, layer in enumerate(table.layers):
        values = np.concatenate([weights[layer.key].numpy(), weights[layer.bias_key].numpy()[:, None]], axis=1)
        rows.append(((values - normalization.shift[index]) / normalization.scale[index]).ravel())
        padding.append(np.zeros(layer.num_tokens * table.token_size - values.size))
    return rows, padding


def test_two_zoos_are_normalised_alike(store, other_store):
    zoos = [Zoo("a", store), Zoo("b", other_store)]
    (normalization,) = [one.normalization for one in store.architectures.values()]
    (own,) = [one.normalization for one in other_store.architectures.values()]
    assert normalization != own
    source = FeatureSource(zoos)
    source.prepare(["weights", "statistics_published"])
    (weights,), (statistics,) = source.blocks("weights"), source.blocks("statistics_published")
    rows, padding = as_normalized(other_store, 3, normalization)
    np.testing.assert_allclose(weights.values_RF[63], np.concatenate(rows), atol=1e-5)
    expected = [np.concatenate([values, zeros]) for values, zeros in zip(rows, padding, strict=True)]
    found = statistics.values_RF[63].reshape(2, 7)
    np.testing.assert_allclose(found[:, 0], [values.mean() for values in expected], atol=1e-5)
    np.testing.assert_allclose(found[:, 6], [np.percentile(values, 99) for values in expected], atol=1e-5)
    assert weights.note == "weights of b are normalised as those of a"
    alone = FeatureSource(zoos[:1])
    for block in (weights, statistics):
        assert np.array_equal(block.values_RF[:60], alone.blocks(block.name)[0].values_RF)
    assert source.blocks("statistics")[0].note == ""


@pytest.mark.parametrize("mode", ["l2", "minmax"])
def test_another_mode_of_normalisation_is_undone(zoos, store, other_store, tmp_path, mode):
    other = zoos.write(tmp_path / "store", other_store.path.parent / "zoo", normalization=mode)
    (normalization,) = [one.normalization for one in store.architectures.values()]
    rows, _ = as_normalized(other, 3, normalization)
    (block,) = FeatureSource([Zoo("a", store), Zoo("b", other)]).blocks("weights")
    np.testing.assert_allclose(block.values_RF[63], np.concatenate(rows), atol=1e-5)


def test_zoos_whose_padding_differs_have_no_published_statistics_in_common(store, mixed_store, zoos, tmp_path):
    with pytest.raises(Unavailable, match=r"tokens are sparse of 5 and sparse of 7 values.* one --tokens\.token_size"):
        FeatureSource([Zoo("a", store), Zoo("b", mixed_store)]).blocks("statistics_published")
    wider = zoos.write(tmp_path / "store", store.path.parent / "zoo", token_size=7)
    other = FeatureSource([Zoo("a", wider), Zoo("b", mixed_store)]).blocks("statistics_published")[0]
    assert other.values_RF.shape == (92, 28) and np.isfinite(other.values_RF).all()
    assert other.note.startswith("architectures differ") and "b are normalised as those of a" in other.note


def test_embeddings_of_checkpoints_take_from_the_store_what_they_lack(store, embeddings, zoos, tmp_path):
    seen = Embeddings.open(zoos.as_of_source(zoos.write_embeddings(tmp_path / "seen", store)))
    zoo = Zoo("zoo", store, seen)
    assert zoo.column("split").tolist() == store.models["split"].to_pylist()
    assert zoo.table["property.test_acc"].to_pylist() == store.models["property.test_acc"].to_pylist()
    found, plain = (FeatureSource([one]).blocks("sane") for one in (zoo, Zoo("z", store, Embeddings.open(embeddings))))
    for mine, theirs in zip(found, plain, strict=True):
        assert mine.columns == theirs.columns and np.array_equal(mine.values_RF, theirs.values_RF)
    seen.index["architectures"].clear()
    with pytest.raises(Unavailable, match="no architecture has any layers"):
        FeatureSource([Zoo("zoo", store, seen)]).blocks("sane")


def test_the_published_mean_is_of_the_whole_sequence(store, embeddings):
    opened, tokens = Embeddings.open(embeddings), max(store.models["tokens"].to_pylist())
    for window, noted in ((tokens - 1, True), (tokens, False)):
        opened.index["window"] = window
        source = FeatureSource([Zoo("zoo", store, opened)])
        note = f"windows of {window} tokens: the published protocol reads {tokens} at once (jobs/embed.py --embedding."
        assert (note in source.blocks("sane_mean")[0].note) == noted
        assert all(block.note == "" for block in source.blocks("sane"))


def test_embeddings_of_another_store_are_refused(mixed_store, embeddings):
    with pytest.raises(InputError, match="name the store that was embedded with --store"):
        FeatureSource([Zoo("zoo", mixed_store, Embeddings.open(embeddings))]).blocks("statistics")


def test_targets_are_found_by_short_and_full_names(store, embeddings):
    table = Zoo("zoo", store, Embeddings.open(embeddings)).table
    assert find_target("test_acc", table).column == "property.test_acc"
    assert find_target("property.test_acc", table).column == "property.test_acc"
    nlin = find_target("nlin", table)
    assert nlin.kind == "category" and set(nlin.values_R) == {"relu", "tanh"} and nlin.column == "config.model::nlin"
    assert set(find_target("epoch", table).values_R) == {0.0, 1.0, 2.0}
    gap = find_target("ggap", table.drop_columns([name for name in table.column_names if name.endswith("ggap")]))
    accuracies = [np.array(table[f"property.{name}_acc"]) for name in ("train", "test")]
    np.testing.assert_allclose(gap.values_R, accuracies[0] - accuracies[1])


def test_targets_that_cannot_be_used_say_why(store):
    import pyarrow as pa

    table = store.models
    table = table.append_column("property.same", pa.array([1.0] * 60))
    table = table.append_column("property.half", pa.array([None, float("nan"), *range(58)], pa.float64()))
    table = table.append_column("property.none", pa.nulls(60))
    table = table.append_column("property.name", pa.array([f"n{row}" for row in range(60)]))
    table = table.append_column("property.list", pa.array([[1]] * 60))
    notes = {name: find_target(name, table) for name in ("same", "half", "none", "name", "list", "test_ac")}
    assert notes["same"].note == "property.same is 1 for every checkpoint: nothing to predict"
    assert notes["half"].usable and notes["half"].known_R.sum() == 58
    assert notes["half"].note == "property.half is unknown for 2 of 60 checkpoints, which are left out"
    assert notes["none"].note == "property.none is empty for every checkpoint"
    assert "text with 60 values" in notes["name"].note
    assert "neither a number nor a category" in notes["list"].note
    assert "no checkpoint has 'test_ac': did you mean test_acc" in notes["test_ac"].note
    assert not any(notes[name].usable for name in ("same", "none", "name", "list", "test_ac"))
