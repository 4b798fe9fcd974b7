"""What jobs call at their end: pictures, tables and the report of a folder of embeddings or results."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sane_ray.analysis.attribution import Importance
from sane_ray.analysis.pictures import (
    best_predictions,
    best_row,
    column,
    counted_rows,
    draw_embeddings,
    draw_predictions,
    network_title,
    ordered_architectures,
    unknown,
)
from sane_ray.analysis.reports import CAPTIONS, markdown_table, spectra_tables, words, write_prediction_report
from sane_ray.analysis.tables import CORRELATIONS, epochs_of
from sane_ray.embedding.job import following
from sane_ray.properties.prediction import PREDICTION_SCHEMA, ROW_SCHEMA


def names(files):
    assert all(file.is_file() and file.stat().st_size > 0 for file in files)
    return {file.name for file in files}


def both(*pictures):
    return {f"{name}.{ending}" for name in pictures for ending in ("png", "svg")}


def row(features="sane", probe="ridge", target="test_acc", r2=0.5, protocol="split", part="", **more):
    scores = {"r2": r2, "r2_low": r2 - 0.1, "r2_high": r2 + 0.1, "tau": r2 - 0.2} if r2 is not None else {}
    counts = {"n_train": 1200, "n_val": 2, "n_test": 3, "choice": "penalty 1"}
    known = {"target": target, "features": features, "probe": probe, "protocol": protocol, "part": part}
    return dict.fromkeys(ROW_SCHEMA.names) | known | scores | counts | more


ROWS = [
    row("statistics", r2=0.6, validation=0.7),
    row("sane+statistics", r2=0.8, validation=0.6),
    row("sane+statistics", "boosting", r2=0.75, validation=0.9),
    row("weights", r2=None, choice="", note="<too many> weights"),
    row(target="epoch", r2=-9.0),
    row("sane", protocol="leave-one-epoch", part="epoch 3", r2=0.3),
    row("sane", protocol="out-of-distribution", part="<digits> -> b", r2=0.2),
]


@pytest.fixture
def results(tmp_path):
    """A folder as jobs/predict.py writes it."""
    folder = tmp_path / "results"
    folder.mkdir()
    predictions = [
        {"id": f"m{place}/0", "model": f"m{place}", "epoch": 0, "split": split, "truth": 0.1 * place}
        | {"prediction": place + fit["r2"], **{key: fit[key] for key in ("target", "features", "probe", "protocol")}}
        for fit in ROWS
        if fit["r2"] is not None
        for place, split in enumerate(("val", "test", "test", "test"))
    ]
    pq.write_table(pa.Table.from_pylist(ROWS, ROW_SCHEMA), folder / "results.parquet")
    pq.write_table(pa.Table.from_pylist(predictions, PREDICTION_SCHEMA), folder / "predictions.parquet")
    zoo = {"name": "<digits>", "checkpoints": 2400, "models": 400, "models_by_split": {"train": 300, "test": 100}}
    content = {"rows": [{k: v for k, v in one.items() if v is not None} for one in ROWS], "zoos": [zoo]}
    content |= {"verdict": ["SANE & s(W) are <good>"], "notes": ["<too many> weights"]}
    content |= {"settings": {"properties": {"seed": 1}}, "compute": {"seconds": 12.0, "cores": 2}}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_a_zoo_becomes_a_map_depth_and_tables(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e")
    found = draw_embeddings(embeddings, tmp_path / "plots", {"m0/2": {}})
    assert names(found) == both("map", "tsne", "depth") | {
        "map.parquet",
        "depth.parquet",
        "neighbours.parquet",
        "analysis.json",
    }
    assert found[0].name == "map.png"
    drawn = pq.read_table(tmp_path / "plots" / "map.parquet")
    assert len(drawn) == 18 and all(drawn[name].null_count == 0 for name in ("x", "y", "tsne_x", "tsne_y"))
    assert len(pq.read_table(tmp_path / "plots" / "depth.parquet")) == 18 * 5
    summary = json.loads((tmp_path / "plots" / "analysis.json").read_text())
    assert summary["checkpoints"] == 18 and sum(summary["map"]["explained"]) <= 1.000001
    assert set(summary["neighbours"]) == {"test_acc", "epoch", "ggap"}


def test_what_the_model_knows_comes_first_and_then_what_most_models_have(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=7, epochs=1, families=3, untrained=["net5"])
    assert ordered_architectures(embeddings) == ["net7", "net9", "net5"]  # of 2, 2 and 3 models
    known = write_embeddings(tmp_path / "f", models=7, epochs=1, families=3)
    assert ordered_architectures(known) == ["net5", "net7", "net9"]
    draw_embeddings(embeddings, tmp_path / "plots")
    drawn = (tmp_path / "plots" / "depth.svg").read_text()
    assert "<!-- 2 checkpoints of architecture net7, one of 3 (family.png) -->" in drawn
    assert counted_rows(embeddings.models) == "7 checkpoints"


def test_of_several_architectures_the_family_is_to_be_looked_at_next():
    embeddings = SimpleNamespace(index={"source": {"kind": "path"}})
    drawn = [Path(f"{name}.png") for name in ("depth", "family", "map", "spectra")]
    assert following(embeddings, drawn) == "look at family.png"
    assert following(embeddings, [drawn[0], drawn[2]]) == "look at map.png"


def test_a_loose_file_has_no_epoch(write_embeddings, tmp_path):
    def models(names, epochs, **more):
        return pa.table({"model": names, "epoch": epochs} | more)

    run_and_file = models(["run", "run", "file"], [0, 1, 0])
    assert epochs_of(run_and_file) == column(run_and_file, "epoch") == [0, 1, None]
    assert column(models(["a", "b"], [0, 0]), "epoch") is None
    known = models(["a", "b"], [0, 0], **{"property.test_acc": pa.array([0.5, None])})
    assert epochs_of(known) == [0, None]
    loose = write_embeddings(tmp_path / "e", models=4, epochs=1, properties=False, source="/zoos/mine")
    draw_embeddings(loose, tmp_path / "plots")
    drawn = (tmp_path / "plots" / "map.svg").read_text()
    assert "<!-- Map of mine: 4 checkpoints by their embeddings -->" in drawn
    assert "<!-- epoch -->" not in drawn and "<!-- model -->" in drawn and "<!-- m3 -->" in drawn
    assert pq.read_table(tmp_path / "plots" / "map.parquet")["epoch"].null_count == 4


def test_a_family_is_drawn_by_relative_depth_too(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", families=3)
    assert both("family", "map", "depth") <= names(draw_embeddings(embeddings, tmp_path / "plots"))
    summary = json.loads((tmp_path / "plots" / "analysis.json").read_text())
    assert {name: of["layers"] for name, of in summary["depth"].items()} == {"net5": 5, "net7": 7, "net9": 9}


def test_one_network_becomes_a_card(write_embeddings, tmp_path):
    spectra = {"m0/0": {"log_spectral_norm": [0.1, 0.2, float("nan"), 0.4, 0.5, 0.6, 0.7]}}
    embeddings = write_embeddings(tmp_path / "e", models=1, epochs=1, layers=7)
    found = draw_embeddings(embeddings, tmp_path / "plots", spectra)
    assert names(found) == both("network", "spectra") | {"depth.parquet", "correlations.parquet", "analysis.json"}
    rows = pq.read_table(tmp_path / "plots" / "correlations.parquet").to_pylist()
    told = {(row["statistic"], row["feature"]): row["pearson"] for row in rows}
    assert told["spread", "log_spectral_norm"] == pytest.approx(1)  # of layers 1 and 4 to 7, both being linear
    assert told["explained_variance", "log_spectral_norm"] == pytest.approx(-1)
    assert told["spread", "alpha"] is None
    summary = json.loads((tmp_path / "plots" / "analysis.json").read_text())
    assert summary["depth"]["net7"]["correlations"] == [{k: v for k, v in row.items() if k[0] != "a"} for row in rows]


def test_spectra_of_layers_without_any_correlation_are_not_drawn(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=1, epochs=1)
    four = {"m0/0": {"alpha": [1.0, 2.0, 3.0, float("nan"), 5.0]}}
    files = draw_embeddings(embeddings, tmp_path / "plots", four)
    assert both("spectra").isdisjoint(names(files))
    (said,) = spectra_tables(files)
    assert "fewer than 5 layers" in said.text and "here are 4 at most" in said.text


def test_a_network_is_called_by_what_tells_it_from_others(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=1, epochs=1)
    assert network_title(embeddings, 5) == "m0, test accuracy 0.5, epoch 0, generalisation gap 0.1, 5 layers"
    source = "/zoo/NN_tune_3/checkpoint_000005/checkpoints"
    nameless = write_embeddings(tmp_path / "f", models=1, epochs=1, properties=False, source=source)
    renamed = nameless.models.set_column(1, "model", pa.array(["checkpoints"]))
    nameless = dataclasses.replace(nameless, models=renamed)
    assert network_title(nameless, 1) == "NN_tune_3, 1 layer"


def test_what_the_model_was_not_trained_on_is_said(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=1, epochs=1, untrained=["net5"])
    draw_embeddings(embeddings, tmp_path / "plots")
    assert unknown(embeddings, ["net5"]).startswith("The model was not trained on this architecture")
    assert unknown(embeddings, ["net5", "net7"]).startswith("The model was not trained on net5:")
    assert unknown(write_embeddings(tmp_path / "f", models=1), ["net5"]) == ""


def test_what_is_too_little_for_a_map_is_drawn_all_the_same(write_embeddings, tmp_path):
    few = draw_embeddings(write_embeddings(tmp_path / "two", models=2, epochs=1, properties=False), tmp_path / "p")
    assert names(few) == both("depth") | {"depth.parquet", "analysis.json"}
    without = draw_embeddings(write_embeddings(tmp_path / "none", epochs=1, properties=False), tmp_path / "q")
    assert both("map") <= names(without)


def test_predictions_become_scores_scatter_and_layers(results, tmp_path):
    layers = {"test_acc": [Importance("a.weight", 0.3, 0.1, 0.02)]}
    found = draw_predictions(results, tmp_path / "plots", layers)
    assert names(found) == both("r2", "tau", "predictions", "layers", "epochs", "transfer") | {"importances.parquet"}
    assert names(draw_predictions(results, tmp_path / "p")) == both("r2", "tau", "predictions", "epochs", "transfer")
    (row,) = pq.read_table(tmp_path / "plots" / "importances.parquet").to_pylist()
    assert row == {"target": "test_acc", "group": "a.weight", "drop": 0.3, "deviation": 0.1, "moved": 0.02}


def test_the_fit_that_is_shown_is_chosen_on_validation_models(results):
    assert best_row(ROWS, "test_acc")["probe"] == "boosting"  # not the best of the test rows
    assert best_row(ROWS, "seed") is None
    panels = best_predictions(ROWS[:5], pq.read_table(results / "predictions.parquet"))
    truth, prediction = panels["test_acc: sane+statistics, boosting"]
    assert truth.tolist() == pytest.approx([0.1, 0.2, 0.3]) and prediction.tolist() == [1.75, 2.75, 3.75]


def test_the_report_says_all_and_escapes_it(results, tmp_path):
    layers = {"test_acc": [Importance("<a>.weight", 0.31, 0.1, 0.023)]}
    pictures = draw_predictions(results, tmp_path / "plots", layers)
    pair = {"statistic": "norm", "checkpoints": 2, "layers_least": 6, "layers_most": 7}
    related = [pair | {"architecture": "net", "feature": "alpha", "pearson": 0.8123, "pearson_deviation": 0.05}]
    related.append(pair | {"architecture": "net", "feature": "log_norm"})
    pq.write_table(pa.Table.from_pylist(related, CORRELATIONS), tmp_path / "correlations.parquet")
    pictures.append(tmp_path / "correlations.parquet")
    content = json.loads((results / "results.json").read_text())
    page = write_prediction_report(content, pictures, tmp_path / "report.html", "python jobs/predict.py --store 'A B'")
    text = page.read_text()
    assert text.count("<img ") == 6 and "data:image/svg+xml" in text
    assert "SANE &amp; s(W) are &lt;good&gt;" in text and "&lt;digits&gt;" in text and "<digits>" not in text
    assert "<strong>0.800 [0.700, 0.900]</strong>" in text and text.count("<strong>0.") == 2  # best R² and tau
    assert "test accuracy (test_acc); checkpoints: 1,200 train, 2 val, 3 test" in text
    assert "leave-one-epoch, test accuracy, ridge: R²" in text and "epoch 3" in text
    assert "&lt;a&gt;.weight" in text and "0.310" in text and "0.023" in text
    assert "0.81 ± 0.05 (n = 6–7)" in text and "net (2 checkpoints)" in text and "Pearson&#x27;s correlation" in text
    assert "--store &#x27;A B&#x27;" in text and "penalty 1" in text
    assert not re.search(r"https?://|<script|<link", text)


def test_the_report_explains_its_words_and_what_to_look_for():
    assert all("Look" in caption for caption in CAPTIONS.values())
    said = " ".join(words(ROWS))
    assert "R²:" in said and "tau:" in said and "MAE" not in said and "s(W)" in said and "sane_mean:" not in said
    assert "generalisation gap" in words([row(target="ggap")])[-1] and "generalisation gap" not in said


def test_the_table_for_a_readme_has_the_best_in_bold():
    lines = markdown_table(ROWS).splitlines()
    assert lines[0] == "| property | features | probe | R² | tau |" and len(lines) == 6
    assert lines[3] == "| test_acc | sane+statistics | ridge | **0.800 [0.700, 0.900]** | **0.600** |"
    assert lines[2] == "| test_acc | statistics | ridge | 0.600 [0.500, 0.700] | 0.400 |"


def test_maps_are_coloured_by_what_is_asked_for(write_embeddings, tmp_path):
    embeddings = write_embeddings(tmp_path / "e", models=6, epochs=2)
    colours = {"activation": ["relu", "tanh", None] * 4, "loss": [*np.linspace(0, 1, 11), np.nan]}
    draw_embeddings(embeddings, tmp_path / "plots", colours=colours)
    words = (tmp_path / "plots" / "map.svg").read_text()
    assert all(f"<!-- {word} -->" in words for word in ("activation", "loss", "relu", "tanh", "unknown"))
    assert "<!-- epoch -->" not in words
    summary = json.loads((tmp_path / "plots" / "analysis.json").read_text())
    alike = summary["neighbours"]
    assert list(alike) == ["loss"] and 0 <= alike["loss"]["nearest"] <= 1
