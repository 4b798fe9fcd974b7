import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sane_ray.config import PropertiesConfig
from sane_ray.embedding import Embeddings
from sane_ray.errors import InputError
from sane_ray.properties.features import Zoo
from sane_ray.properties.prediction import ROW_SCHEMA, check_output, compare, identity, predict, read_results
from sane_ray.properties.protocols import Population

QUICK = PropertiesConfig(
    targets=["test_acc", "epoch", "nlin"],
    features=["statistics", "sane", "sane+statistics", "statistics_published"],
    probes=["ridge"],
    bootstrap=50,
)


@pytest.fixture(scope="module")
def zoo(store, embeddings):
    return Zoo("zoo", store, Embeddings.open(embeddings))


@pytest.fixture(scope="module")
def results(zoo, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "out"
    return predict([zoo], QUICK, output), output


def rows_of(content, **wanted):
    return [row for row in content["rows"] if wanted.items() <= row.items()]


def test_what_follows_from_the_weights_is_predicted(results):
    content, _ = results
    (accuracy,) = rows_of(content, target="test_acc", features="statistics", probe="ridge", protocol="split")
    (epoch,) = rows_of(content, target="epoch", features="statistics", probe="ridge", protocol="split")
    assert accuracy["r2"] > 0.8 and accuracy["r2_low"] < accuracy["r2"] < accuracy["r2_high"] and epoch["r2"] > 0.6
    assert accuracy["tau"] > 0.6 and accuracy["n_train"] + accuracy["n_val"] + accuracy["n_test"] == 60
    (published,) = rows_of(content, target="epoch", features="statistics_published", protocol="split")
    assert published["choice"].startswith("published, penalty")
    assert [row["probe"] for row in rows_of(content, target="nlin", protocol="split")] == ["logistic"] * 4


def test_files_have_the_documented_columns(results, zoo):
    content, output = results
    table = pq.read_table(output / "results.parquet")
    assert table.schema.equals(ROW_SCHEMA) and len(table) == len(content["rows"])
    predictions = pq.read_table(output / "predictions.parquet").to_pylist()
    chosen = [
        row
        for row in predictions
        if (row["target"], row["features"], row["protocol"], row["split"]) == ("test_acc", "sane", "split", "test")
    ]
    truth, predicted = (np.array([row[name] for row in chosen]) for name in ("truth", "prediction"))
    (row,) = rows_of(content, target="test_acc", features="sane", probe="ridge", protocol="split")
    assert row["r2"] == pytest.approx(1 - np.mean((truth - predicted) ** 2) / np.var(truth))
    places = {identity: place for place, identity in enumerate(zoo.table["id"].to_pylist())}
    assert truth[0] == zoo.table["property.test_acc"][places[chosen[0]["id"]]].as_py()
    categories = [row for row in predictions if row["target"] == "nlin"]
    assert categories and all(row["truth"] is None and row["truth_category"] in ("relu", "tanh") for row in categories)
    assert json.loads((output / "results.json").read_text())["verdict"] == content["verdict"]


def test_leave_one_epoch_tests_other_models_at_an_epoch_never_trained_on(results, zoo):
    content, _ = results
    parts = list(Population.of([zoo]).leave_one_epoch())
    population = Population.of([zoo])
    assert [part.part for part in parts] == ["epoch 0", "epoch 1", "epoch 2"]
    for epoch, part in enumerate(parts):
        assert set(population.epoch_R[part.test]) == {epoch} and epoch not in population.epoch_R[part.train]
        models = [set(population.model_R[rows]) for rows in part.splits.values()]
        assert not models[0] & models[1] and not models[0] & models[2] and not models[1] & models[2]
    (row,) = rows_of(content, target="epoch", features="sane", part="epoch 1")
    assert "r2" not in row and row["mae"] >= 0 and "the truth is the same for all test rows" in row["note"]


def test_verdict_compares_pairs_of_draws(results):
    content, _ = results
    assert len(content["verdict"]) == 3
    assert content["verdict"][0].startswith("test_acc, ridge: SANE with s(W) is ")
    assert all("difference" in sentence for sentence in content["verdict"])


def test_another_zoo_tests_what_this_one_trained(zoo, zoos, tmp_path):
    other = zoos.write(tmp_path / "store", zoos.write_zoo(tmp_path / "zoo", seed=5))
    config = dataclasses.replace(QUICK, features=["statistics"], targets=["test_acc"], leave_one_epoch=False)
    content = predict([zoo, Zoo("other", other)], config, tmp_path / "out")
    rows = rows_of(content, protocol="out-of-distribution")
    assert [row["part"] for row in rows] == ["zoo -> other", "other -> zoo"]
    assert all(row["r2"] > 0.5 for row in rows)


def test_bad_targets_and_features_are_notes_in_a_whole_table(store, tmp_path):
    known = [None] * 6 + list(np.random.default_rng(0).normal(size=54))
    table = store.models.append_column("property.some", pa.array(known, pa.float64()))
    store = dataclasses.replace(store, models=table.append_column("property.same", pa.array([2] * 60)))
    config = dataclasses.replace(QUICK, targets=["test_acc", "same", "absent", "some"], leave_one_epoch=False)
    content = predict([Zoo("zoo", store)], config, tmp_path / "out")
    (good,) = rows_of(content, target="test_acc", features="statistics")
    (some,) = rows_of(content, target="some", features="statistics")
    assert "r2" in good and "r2" in some and some["n_train"] + some["n_val"] + some["n_test"] == 54
    assert "unknown for 6 of 60" in some["note"]
    notes = {(row["target"], row["features"]): row["note"] for row in content["rows"] if "r2" not in row}
    assert "property.same is 2 for every checkpoint" in notes["same", "statistics"]
    assert "no checkpoint has 'absent'" in notes["absent", "statistics"]
    assert "it needs embeddings" in notes["test_acc", "sane"]
    with pytest.raises(InputError, match=r"nothing to predict: property\.same is 2"):
        predict([Zoo("zoo", store)], dataclasses.replace(QUICK, targets=["same"]), tmp_path / "none")


def test_a_split_with_too_few_models_is_a_note(zoos, tmp_path):
    store = zoos.write(tmp_path / "store", zoos.write_zoo(tmp_path / "zoo", models=4))
    config = dataclasses.replace(QUICK, features=["statistics"], targets=["test_acc"], leave_one_epoch=False)
    (row,) = predict([Zoo("zoo", store)], config, tmp_path / "out")["rows"]
    assert "split has" in row["note"] and "are needed" in row["note"] and "r2" not in row


def test_last_epochs_alone(zoo, tmp_path):
    config = dataclasses.replace(QUICK, features=["statistics"], targets=["test_acc"], epochs="last")
    content = predict([zoo], config, tmp_path / "out")
    (row,) = content["rows"]
    assert row["n_train"] + row["n_val"] + row["n_test"] == 20


def test_results_are_not_overwritten(results, zoo, tmp_path):
    _, output = results
    digest = identity([zoo], QUICK)[0]
    assert check_output(output, digest) and not check_output(tmp_path / "new", digest)
    with pytest.raises(InputError, match="holds results with other settings"):
        check_output(output, "another")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        check_output(tmp_path, digest)
    (output.parent / "bad").mkdir()
    (output.parent / "bad" / "results.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_results(output.parent / "bad")


def test_the_sentence_tells_worse_from_not_told_apart():
    from sane_ray.properties.evaluation import Score
    from sane_ray.properties.prediction import Judged

    def judged(value, draws, choice="penalty 1, weights sane 1, statistics 1"):
        return Judged({"target": "t", "probe": "ridge", "choice": choice}, {"r2": Score(value, np.array(draws))})

    base = judged(0.5, [0.4, 0.5, 0.6])
    assert "is at least as good" in compare(judged(0.6, [0.5, 0.6, 0.7]), base)
    assert "is not told apart" in compare(judged(0.45, [0.3, 0.45, 0.65]), base)
    assert "is worse" in compare(judged(0.3, [0.2, 0.3, 0.4]), base)
    unused = judged(0.5, [0.4, 0.5, 0.6], "penalty 1, weights sane 0, statistics 1")
    assert "gave SANE no weight" in compare(unused, base)
