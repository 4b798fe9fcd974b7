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
    with pytest.raises(Unavailable, match="2,460 raw weights are more than the 100"):
        FeatureSource([Zoo("zoo", store)]).blocks("weights")


def test_two_zoos_share_their_columns(store, mixed_store):
    same = FeatureSource([Zoo("a", store), Zoo("b", store)]).blocks("statistics_published")[0]
    assert np.array_equal(same.values_RF[:60], same.values_RF[60:])
    other = FeatureSource([Zoo("a", store), Zoo("b", mixed_store)]).blocks("statistics_published")[0]
    assert other.values_RF.shape == (92, 28) and np.isfinite(other.values_RF).all()


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
