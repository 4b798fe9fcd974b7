import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sane_ray.config import PropertiesConfig
from sane_ray.embedding import Embeddings
from sane_ray.errors import InputError
from sane_ray.properties import prediction
from sane_ray.properties.features import Zoo
from sane_ray.properties.prediction import (
    ROW_SCHEMA,
    Judged,
    Prediction,
    check_output,
    compare,
    identity,
    predict,
    read_results,
)
from sane_ray.properties.protocols import Population, last_rows
from sane_ray.properties.table import WIDEST, digits, results_table

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
    assert "r2" not in row and row["mae"] >= 0 and row["note"] == ""  # of one epoch all have that epoch


def test_verdict_compares_pairs_of_draws(results):
    content, _ = results
    assert len(content["verdict"]) == 3
    rows = pq.read_table(results[1] / "predictions.parquet").to_pylist()
    chosen = {
        features: [
            row for row in rows if (row["target"], row["features"], row["protocol"]) == ("test_acc", features, "split")
        ]
        for features in ("sane+statistics", "statistics")
    }
    chosen = {name: [row for row in of if row["split"] == "test"] for name, of in chosen.items()}
    truth, models = (np.array([row[key] for row in chosen["statistics"]]) for key in ("truth", "model"))
    names, index = np.unique(models, return_inverse=True)
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
    gaps = []
    for drawn in counts:
        rows = np.repeat(np.arange(len(truth)), drawn[index])
        predicted = [np.array([row["prediction"] for row in of])[rows] for of in chosen.values()]
        gaps.append(np.subtract(*(1 - np.mean((truth[rows] - p) ** 2) / np.var(truth[rows]) for p in predicted)))
    low, high = np.percentile(gaps, [2.5, 97.5])
    few = f"only {len(names)} test models, too few to tell SANE with s(W) from s(W) alone: R² "
    assert content["verdict"][0].startswith(f"test_acc, ridge: {few}")
    assert content["verdict"][0].endswith(f"[{low:+.3f}, {high:+.3f}]")


def test_another_zoo_tests_what_this_one_trained(zoo, zoos, tmp_path):
    other = zoos.write(tmp_path / "store", zoos.write_zoo(tmp_path / "zoo", seed=5))
    zoos.write_embeddings(tmp_path / "embeddings", other)
    names = ["statistics", "sane+statistics"]
    config = dataclasses.replace(QUICK, features=names, targets=["test_acc"], leave_one_epoch=False)
    both = [zoo, Zoo("other", other, Embeddings.open(tmp_path / "embeddings"))]
    content = predict(both, config, tmp_path / "out")
    rows = rows_of(content, protocol="out-of-distribution", features="statistics")
    assert other.models["id"] == zoo.table["id"] and other.models["sha256"] != zoo.table["sha256"]
    assert [row["part"] for row in rows] == ["zoo -> other", "other -> zoo", "other -> other"]
    assert all(row["r2"] > 0.5 and "left out" not in row["note"] for row in rows)
    assert all(row["n_test_models"] * 3 == row["n_test"] for row in rows)
    (alone,) = rows_of(predict(both[1:], config, tmp_path / "alone"), features="statistics")
    assert alone["r2"] == rows[2]["r2"]  # the other zoo's own score
    parts = ["test_acc, ridge: ", *(f"test_acc, ridge, {row['part']}: " for row in rows)]
    assert all(one.startswith(part) for one, part in zip(content["verdict"], parts, strict=True))
    table = "\n".join(results_table(content))
    assert "test_acc, zoo (" in table and "zoo -> zoo" in table and "other -> other" in table
    (line,) = [line for line in table.splitlines() if line.startswith("  statistics  ") and line.count("[") == 4]
    assert f"{rows[0]['r2']:.3f} [{rows[0]['r2_low']:.3f}, {rows[0]['r2_high']:.3f}]" in line


def test_each_set_with_sane_is_compared_with_the_same_without(zoo, tmp_path):
    names = ["spectral", "sane+spectral", "statistics+spectral", "statistics+sane_mean+spectral", "sane+statistics"]
    config = dataclasses.replace(QUICK, features=names, targets=["test_acc"], leave_one_epoch=False)
    verdict = predict([zoo], config, tmp_path / "out")["verdict"]
    assert ["SANE with spectral from spectral alone:" in verdict[0], len(verdict)] == [True, 2]
    assert " sane_mean with s(W) and spectral from s(W) and spectral alone: " in verdict[1]


def test_out_of_distribution_tests_no_model_that_was_trained_on(store, tmp_path):
    splits = store.models["split"].to_pylist()
    models = store.models.set_column(
        store.models.column_names.index("split"), "split", pa.array(splits[9:] + splits[:9])
    )
    renamed = models.set_column(models.column_names.index("id"), "id", pa.array([f"other/{row}" for row in range(60)]))
    config = dataclasses.replace(QUICK, features=["statistics"], targets=["test_acc"], leave_one_epoch=False)
    for known, words in ((renamed, "trains on them"), (models.drop_columns("sha256"), "by their ids")):
        zoos = [Zoo("a", store), Zoo("b", dataclasses.replace(store, models=known))]
        population = Population.of(zoos)
        for part in population.out_of_distribution():
            trained, tested = (
                {name.partition(":")[2] for rows in some for name in population.model_R[rows]}
                for some in ((part.train, part.val), (part.test,))
            )
            assert not trained & tested
            assert part.part == "b -> b" or (words in part.note and " test models of " in part.note)
    content = predict(zoos, config, tmp_path / "out")
    rows = rows_of(content, protocol="out-of-distribution")
    assert ["left out" in row["note"] for row in rows] == [True, True, False]


def test_one_fit_that_fails_is_a_note(zoo, tmp_path, monkeypatch):
    class Fails:
        def __init__(self, blocks, models_R, refit):
            pass

        def __call__(self, *given):
            raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(prediction, "BlockRidge", Fails)
    config = dataclasses.replace(QUICK, targets=["test_acc"], leave_one_epoch=False)
    content = predict([zoo], config, tmp_path / "out")
    notes = {row["features"]: (row["note"], "r2" in row) for row in content["rows"]}
    assert notes["statistics"] == ("it could not be fitted: SVD did not converge", False)
    assert notes["statistics_published"] == ("", True)


def test_validation_is_judged_by_fits_without_it(zoo, tmp_path):
    config = dataclasses.replace(QUICK, features=["statistics"], targets=["test_acc"], leave_one_epoch=False)
    (once,), (again,) = (
        predict([zoo], dataclasses.replace(config, refit=refit), tmp_path / refit)["rows"]
        for refit in ("train", "train_val")
    )
    assert again["validation"] == once["validation"] and again["r2"] != once["r2"]
    kept = {refit: pq.read_table(tmp_path / refit / "predictions.parquet") for refit in ("train", "train_val")}
    val = [table.filter(pc.field("split") == "val")["prediction"] for table in kept.values()]
    assert len(val[0]) and val[0] == val[1]


def test_networks_without_splits_are_refused_before_anything_is_fitted(store, zoos, tmp_path):
    seen = Embeddings.open(zoos.as_of_source(zoos.write_embeddings(tmp_path / "seen", store)))
    config = dataclasses.replace(QUICK, features=["sane"], targets=["test_acc"], leave_one_epoch=False)
    with pytest.raises(
        InputError, match=r"zoo is in a split.* prepare a store .*jobs/prepare\.py, and name it by --store"
    ):
        predict([Zoo("zoo", None, seen)], config, tmp_path / "out")
    content = predict([Zoo("zoo", store, seen)], config, tmp_path / "out")
    assert "r2" in content["rows"][0] and sum(content["zoos"][0]["models_by_split"].values()) == 20
    splits = pa.array([None] * 3 + store.models["split"].to_pylist()[3:])
    some = seen.models.set_column(seen.models.column_names.index("split"), "split", splits)
    content = predict([Zoo("zoo", None, dataclasses.replace(seen, models=some))], config, tmp_path / "some")
    assert "3 of 60 checkpoints of zoo are in no split, and left out" in content["notes"]


def test_the_last_checkpoint_may_have_no_epoch():
    assert last_rows(["a", "a", "b", "b", "c"], [2, None, None, 1, None]) == [0, 3, 4]
    assert last_rows(np.array(["a", "a"]), np.array([np.nan, 0.0])) == [1]


def test_last_checkpoints_of_models_without_epochs_count(store):
    unknown = pa.array([None] * 60, pa.int64())
    models = store.models.set_column(store.models.column_names.index("epoch"), "epoch", unknown)
    population = Population.of([Zoo("zoo", dataclasses.replace(store, models=models))], last_epoch_only=True)
    assert population.counted_R.sum() == 20


def test_notes_say_whose_they_are(zoo, store):
    run = Prediction([zoo], QUICK)
    for features in QUICK.features:
        for part in ("epoch 0", "epoch 1"):
            row = {"target": "test_acc", "features": features, "part": part}
            run.judged.append(Judged(row, notes=["odd", *(["odder"] if features == "sane" else [])]))
    assert run.notes == ["test_acc, epoch 0, epoch 1: odd", "test_acc, sane, epoch 0, epoch 1: odder"]
    same = pa.array(np.where(np.array(store.models["split"]) == "test", 0.5, np.arange(60) / 60))
    store = dataclasses.replace(store, models=store.models.append_column("property.some", same))
    run = Prediction([Zoo("zoo", store)], dataclasses.replace(QUICK, targets=["some"], features=["statistics"]))
    run.run()
    assert any("the truth is the same for all test rows: neither R² nor tau is defined" in note for note in run.notes)


def test_a_run_has_its_features_and_the_probe_that_validation_chose(zoo):
    run = Prediction([zoo], dataclasses.replace(QUICK, targets=["test_acc"], leave_one_epoch=False))
    run.run()
    best = run.best("test_acc")
    assert best.row["validation"] == max(judged.row["validation"] for judged in run.judged)
    assert run.best("absent") is None
    values = {block.name: block.values_RF for block in run.source.blocks(best.row["features"])}
    part = run.population.split()
    truth = zoo.table["property.test_acc"].to_numpy()
    fit = run.build(best.row["features"], best.row["probe"])(values)(truth, part.train, part.val, 0)
    assert fit.choice == best.row["choice"]


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


def test_useless_fits_are_short_in_the_table_and_whole_in_the_files(results):
    content, _ = results
    rows = [dict(row) for row in rows_of(content, target="test_acc")]
    rows[0] |= {"r2": -209.3, "r2_low": -400.0, "r2_high": 0.25}
    text = "\n".join(results_table(content | {"rows": rows}))
    assert "< -10 [< -10, 0.250]" in text and "-209" not in text


def test_tables_fit_a_terminal_and_choices_stay_in_the_files(results):
    content, _ = results
    wide = [
        row | {"features": f"{row['features']}+{'x' * 20}", "choice": "penalty 1, " * 30} for row in content["rows"]
    ]
    lines = list(results_table(content | {"rows": wide, "notes": []}))
    assert max(map(len, lines)) <= WIDEST and not any("penalty" in line for line in lines)
    assert sum("epoch 1" in line for line in lines) == 2  # the columns of four sets stand in two blocks


@pytest.mark.parametrize(
    ("value", "words"),
    [(-362.471, "-362"), (1234.5, "1,234"), (20.62, "20.6"), (2.345, "2.35"), (0.81234, "0.812"), (0, "0.000")],
)
def test_three_digits_count(value, words):
    assert digits(value) == words


def test_small_errors_keep_their_digits():
    assert digits(0.00012345, 6) == "0.000123" and digits(0.00012345) == "0.000" and digits(12.0, sign="+") == "+12.0"


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

    def judged(value, draws, choice="penalty 1, weights sane 1, statistics 1"):
        row = {"target": "t", "probe": "ridge", "part": "", "features": "sane+statistics", "choice": choice}
        return Judged(row, {"r2": Score(value, np.array(draws))})

    base = judged(0.5, [0.4, 0.5, 0.6])
    assert "SANE with s(W) is better than s(W) alone: R² 0.600" in compare(judged(0.6, [0.5, 0.6, 0.7]), base)
    assert "is not told apart" in compare(judged(0.45, [0.3, 0.45, 0.65]), base)
    assert "is not told apart" in compare(judged(0.55, [0.39, 0.55, 0.65]), base)
    assert "is worse" in compare(judged(0.3, [0.2, 0.3, 0.4]), base)
    assert compare(judged(np.nan, [0.4, 0.5, 0.6]), base) == compare(judged(0.5, [np.nan] * 3), base) == ""
    useless = judged(-209.0, [-210.0, -209.0, -208.0])
    assert ": neither SANE with s(W) nor s(W) alone reads it: R² < -10 [< -10, < -10]" in compare(useless, useless)
    few, many = (judged(0.6, [0.5, 0.6, 0.7]) for _ in range(2))
    few.row["n_test_models"], many.row["n_test_models"] = 19, 20
    only = "t, ridge: only 19 test models, too few to tell SANE with s(W) from s(W) alone: R² 0.600"
    assert compare(few, base).startswith(only) and "better" not in compare(few, base)
    assert "only" not in compare(many, base)
    ranked = [Judged(j.row, {"r2": Score(0.1, np.zeros(3)), "tau": j.scores["r2"]}) for j in (many, base)]
    assert "is better than s(W) alone: tau 0.600" in compare(*ranked, "tau")
    assert "is not told apart from s(W) alone: R² 0.100" in compare(*ranked)
    unused = judged(0.5, [0.4, 0.5, 0.6], "penalty 1, weights sane 0, statistics 1")
    assert "gave SANE no weight" in compare(unused, base)
    for choice, said in (("C 1 of statistics", True), ("C 1 of all", False), ("C 1 of sane_shape", False)):
        fit = judged(0.5, [0.4, 0.5, 0.6], choice)
        assert ("gave SANE no weight" in compare(fit, base)) == said
