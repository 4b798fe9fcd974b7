"""Reports, each one HTML file: how well properties are read, with which features, and how sure; what was embedded.

Reads the folders that jobs/predict.py and jobs/embed.py write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sane_ray.embedding import Embeddings
from sane_ray.properties.table import LABELS, measured
from sane_ray.report.names import GAP, counted, label
from sane_ray.report.page import Block, Bold, Code, Folded, Items, Picture, Section, Table, Text, number, write_report
from sane_ray.report.spectra import FEATURES, LEAST_LAYERS, STATISTICS, number_of

CAPTIONS = {
    "map": "Checkpoints by their embeddings: the plane of the two directions in which they differ most. Lines join the "
    "checkpoints of one model. Look for colours that change smoothly: there embeddings know the property.",
    "tsne": "The same checkpoints by t-SNE. Look for neighbours of one colour: those beside each other are alike. "
    "Neither the axes nor far distances nor the sizes of clusters mean anything.",
    "spectra": "Statistics of each layer's embeddings (blue) and spectra of its weights (orange) along depth, each to "
    "its own scale. Look for pairs whose curves rise and fall together (r near 1) or against each other (near -1); of "
    "few layers (n) r is little more than chance.",
    "depth": "Layers from front to back: what embeddings say of them (blue) and spectra of the weights (orange). Look "
    "first for layers of low explained variance: of these, embeddings say little.",
    "family": "Architectures along relative depth, the median checkpoint of each. Look for curves of one shape: what "
    "is common to the architectures; and for architectures of low explained variance, which the model does not know.",
    "network": "The network layer by layer. Look first for layers of low explained variance: there the weights are "
    "reconstructed badly, and the embedding says little.",
    "r2": "R² with 95 % intervals over test models: 1 is perfect, 0 is guessing the mean. Look for intervals that do "
    "not overlap: the others do not tell two feature sets apart.",
    "tau": "Kendall's tau with 95 % intervals: 1 is checkpoints in the right order, 0 any order. Look for intervals "
    "that do not overlap.",
    "accuracy": "Fraction of test checkpoints whose category is right, with 95 % intervals. Look for intervals that do "
    "not overlap.",
    "predictions": "Test checkpoints, each property by the fit that validation models chose, which need not be the "
    "best on test models. Look how near they lie to the dashed line, where predictions are exact.",
    "layers": "What each layer is worth: how much R² falls when its features are exchanged among test checkpoints; "
    "'whole network' are features that are of no single layer. Look at the longest bars, and whether a bar is longer "
    "than its grey line, the deviation over exchanges.",
    "epochs": "R² at an epoch that no checkpoint of training or validation was of; an arrow is a fit worse than -0.5. "
    "Look for lines that stay high at the first and the last epoch: there a probe has to extrapolate.",
    "transfer": "R² with training checkpoints of one zoo (rows) and test checkpoints of another (columns). Look how "
    "much is lost from the diagonal, one zoo's own test models, to the fields beside it.",
}
"""What to look for in each picture, by its file's name."""

SCORES = {
    "r2": "R²: the share of a property's variance that is predicted; 1 is perfect, 0 is guessing the mean.",
    "tau": "tau: Kendall's correlation of ranks, 1 where all checkpoints are in the right order, 0 where in any.",
    "mae": "MAE: mean absolute error, in the property's units (epochs; fractions for accuracies); less is better.",
    "accuracy": "accuracy: the fraction of checkpoints whose category is right.",
}
FEATURE_SETS = {
    "statistics": "statistics, called s(W) too: numbers of each layer's weights, such as their mean and quantiles",
    "statistics_published": "statistics_published: those of SANE's paper, of normalised weights",
    "spectral": "spectral: norms and spectra of each layer's weights",
    "weights": "weights: all of them as they are",
    "sane_mean": "sane_mean: the mean of a checkpoint's token embeddings",
    "sane_vectors": "sane_vectors: mean, deviation and quantiles of token embeddings, of the network and of each layer",
    "sane_shape": "sane_shape: lengths, rank and spectrum of token embeddings",
    "sane": "sane: sane_vectors with sane_shape",
}
"""Of docs/properties.md, in one line."""

MEASURED = (
    "Error is the squared error of the reconstructed weights, in units of normalised weights. Explained variance is 1 "
    "where they are exact and 0 where they are no better than the layer's mean weight; a token is a piece of a channel."
)

MOST_LAYERS = 30
"""Of a table of layers."""

OF_OTHERS = ("r2", "accuracy", "mae")
"""What is told of a protocol: the first that there is."""
RANKS = ("r2", "tau")
"""What a README tells."""


def write_prediction_report(
    results: Mapping[str, Any], pictures: Sequence[Path], path: Path, command: str = ""
) -> Path:
    """Writes the report.

    Args:
        results: Content of results.json.
        pictures: PNG files, in the order in which they are to be seen; ``importances.parquet`` and
            ``correlations.parquet`` among them become tables, and other files are left out.
        path: File to write.
        command: What made the results, for whoever wants them again.
    """
    rows = results["rows"]
    own = [row for row in rows if row["protocol"] == "split"]
    zoos = ", ".join(_zoo(zoo) for zoo in results["zoos"])
    sections = [
        Section("Is SANE worth it?", [Items(results["verdict"])] if results["verdict"] else []),
        Section("How to read this", [Items(words(own))]),
        Section("How well properties are read", list(score_tables(own))),
        Section("Pictures", [Picture(path, CAPTIONS.get(path.stem, "")) for path in pictures if path.suffix == ".png"]),
        Section("What layers add", list(layer_tables(pictures))),
        Section("Embeddings and spectra of the weights", list(spectra_tables(pictures))),
        Section("Other protocols", list(other_tables(rows))),
        Section("What validation chose", choices(own)),
        Section("Notes", [Items(results["notes"])] if results["notes"] else []),
        Section("How it was made", list(_made(results, command))),
    ]
    lead = f"Properties of checkpoints predicted from their weights: {zoos}. No model is in two of the splits."
    return write_report(path, "Reading models", sections, lead)


def words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the words of the tables mean, of those that are in them: scores, feature sets, the generalisation gap."""
    scores = [said for name, said in SCORES.items() if any(row.get(name) is not None for row in rows)]
    names = {name for row in rows for name in row["features"].split("+")}
    sets = [said for name, said in FEATURE_SETS.items() if name in names]
    said = ["A model is a network that was trained; a checkpoint is a model at one epoch.", *scores]
    said.append("In brackets: 95 % of a bootstrap over test models. The best value of a column is bold.")
    said.append(
        "Features are what a probe predicts from (a + joins sets); ridge is a linear probe, boosting are trees."
    )
    said += [f"{one}." for one in sets]
    return [*said, GAP] if any(row["target"] == "ggap" for row in rows) else said


def score_tables(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """One table a property: every feature set and probe with its intervals; the best value of each score is bold."""
    tables: list[Block] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        fitted = [row for row in rows if row["target"] == target and measured(row)]
        if not fitted:
            notes = dict.fromkeys(row.get("note", "") for row in rows if row["target"] == target)
            tables.append(
                Text(f"{_named(target)}: {'; '.join(note for note in notes if note) or 'nothing was fitted'}")
            )
            continue
        metrics = [name for name in LABELS if any(row.get(name) is not None for row in fitted)]
        best = {
            name: (min if name == "mae" else max)(r[name] for r in fitted if r.get(name) is not None)
            for name in metrics
        }
        lines = [[row["features"], row["probe"], *(_cell(row, name, best[name]) for name in metrics)] for row in fitted]
        counts = ", ".join(f"{fitted[0][f'n_{split}']:,} {split}" for split in ("train", "val", "test"))
        caption = f"{_named(target)}; checkpoints: {counts}"
        tables.append(Table(["features", "probe", *(LABELS[name] for name in metrics)], lines, caption))
    return tables


def _named(target: str) -> str:
    """In words, with the name that flags know."""
    said = label(target)
    return said if said == target else f"{said} ({target})"


def choices(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Penalties, weights of blocks and rounds of every fit, folded: few readers want them, and they are long."""
    lines = [[row["target"], row["features"], row["probe"], row["choice"]] for row in rows if row.get("choice")]
    table = Table(["property", "features", "probe", "chosen"], lines)
    return [Folded(f"Penalties, weights and rounds of {len(lines)} fits", [table])] if lines else []


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """R², tau and their intervals of the zoo's own split as a table for a README; the best of a property is bold.

    Args:
        rows: Of results.json.
    """
    lines = ["| property | features | probe | R² | tau |", "|---|---|---|---|---|"]
    own = [row for row in rows if row["protocol"] == "split" and row.get("r2") is not None]
    for target in dict.fromkeys(row["target"] for row in own):
        mine = [row for row in own if row["target"] == target]
        best = {name: max((row[name] for row in mine if row.get(name) is not None), default=None) for name in RANKS}
        for row in mine:
            cells = (_cell(row, name, best[name]) for name in RANKS)
            shown = (f"**{cell.value}**" if isinstance(cell, Bold) else cell for cell in cells)
            lines.append(f"| {target} | {row['features']} | {row['probe']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def other_tables(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The other protocols: a table a protocol and property, a line a part, a column a feature set.

    R² with its interval; accuracy for categories, and the mean absolute error where R² is not defined, as for the
    epoch at one epoch.
    """
    blocks: list[Block] = []
    others = [row for row in rows if row["protocol"] != "split" and _score(row)]
    for protocol, target, probe in dict.fromkeys((row["protocol"], row["target"], row["probe"]) for row in others):
        mine = [row for row in others if (row["protocol"], row["target"], row["probe"]) == (protocol, target, probe)]
        score = next(name for name in OF_OTHERS if any(row.get(name) is not None for row in mine))
        features = list(dict.fromkeys(row["features"] for row in mine))
        cells = {(row["part"], row["features"]): _cell(row, score, None) for row in mine}
        parts = dict.fromkeys(row["part"] for row in mine)
        lines = [[part, *(cells.get((part, name), "–") for name in features)] for part in parts]
        blocks.append(Table(["", *features], lines, f"{protocol}, {label(target)}, {probe}: {LABELS[score]}"))
    return [Folded(f"{len(blocks)} tables", blocks)] if len(blocks) > 2 else blocks


def layer_tables(files: Sequence[Path]) -> list[Block]:
    """What each layer is worth, and what it adds to single predictions: a table a property.

    Args:
        files: Among which ``importances.parquet`` may be.
    """
    rows = _rows(files, "importances")
    tables: list[Block] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        some = [[row["group"], number(row["drop"]), number(row["moved"])] for row in mine[:MOST_LAYERS]]
        more = f", {MOST_LAYERS} of {len(mine)} layers" if len(mine) > MOST_LAYERS else ""
        tables.append(Table(["layer", "loss of R²", "moves a prediction by"], some, f"{label(target)}{more}"))
    said = (
        "Loss of R² is how much R² falls when the layer's features are exchanged among test checkpoints. "
        "What a layer adds to a prediction is the difference that its features make to those of the typical training "
        "checkpoint; the last column is how much that varies over test checkpoints, in the property's units."
    )
    if not tables:
        return []
    return [Text(said), *([Folded(f"{len(tables)} tables", tables)] if len(tables) > 1 else tables)]


def spectra_tables(files: Sequence[Path]) -> list[Block]:
    """Pearson's correlations along depth: a table an architecture, a line a statistic, a column a spectral feature.

    Args:
        files: Among which ``correlations.parquet`` may be.
    """
    rows = _rows(files, "correlations")
    tables: list[Block] = []
    names = list(dict.fromkeys(row["architecture"] for row in rows))
    for name in sorted(names, key=bool):  # all architectures together come first
        mine = [row for row in rows if row["architecture"] == name]
        count = max(row["checkpoints"] for row in mine)
        cells = {(row["statistic"], row["feature"]): _correlation(row) for row in mine}
        lines = [[STATISTICS[one].replace("\n", " "), *(cells.get((one, f), "") for f in FEATURES)]
                 for one in STATISTICS if any(row["statistic"] == one for row in mine)]  # fmt: skip
        caption = f"{name or 'all architectures'} ({counted(count, 'checkpoint')})"
        if count:
            tables.append(Table(["Pearson's r", *FEATURES.values()], lines, caption))
    if len(tables) > 2:
        tables = [tables[0], Folded(f"{len(tables) - 1} architectures", tables[1:])]
    return [Text(_about_correlations(rows)), *tables] if rows else []


def _about_correlations(rows: Sequence[Mapping[str, Any]]) -> str:
    """What r and n are; or why there is none."""
    rule = f"of fewer than {LEAST_LAYERS} layers with both values it would be chance"
    if any(row["pearson"] is not None for row in rows):
        return (
            "r is Pearson's correlation of a statistic with a spectral feature over a checkpoint's layers, of several "
            f"checkpoints its mean ± deviation; n is the number of layers. Where r is missing, {rule}, or one of the "
            "two is the same in all layers."
        )
    most = max(row["layers_most"] for row in rows)
    if most < LEAST_LAYERS:
        return f"No correlation is told: {rule}, and here are {most} at most."
    return "No correlation is told: in each pair one of them is the same in all layers."


def _correlation(row: Mapping[str, Any]) -> str:
    r, comma, layers = number_of(row).removeprefix("r = ").partition(", ")
    return f"{r} ({layers})" if comma else ""


def _rows(files: Sequence[Path], stem: str) -> list[dict[str, Any]]:
    return [row for file in files if file.name == f"{stem}.parquet" for row in pq.read_table(file).to_pylist()]


def _made(results: Mapping[str, Any], command: str) -> list[Block]:
    compute = results["compute"]
    said = f"{compute['seconds']:,.0f} seconds on {compute['cores']} cores for the fits"
    blocks: list[Block] = [Text(f"{said}.")]
    for model in (model for model in compute.get("pretraining", ()) if model):
        blocks.append(Text(_model(model)))
    blocks += [Code(command)] if command else []
    settings = results["settings"]["properties"]
    blocks.append(Folded("Settings", [Code("\n".join(f"{name}: {value}" for name, value in settings.items()))]))
    return blocks


def _zoo(zoo: Mapping[str, Any]) -> str:
    splits = ", ".join(f"{count:,} {split}" for split, count in zoo["models_by_split"].items())
    return f"{zoo['name']} ({zoo['checkpoints']:,} checkpoints of {zoo['models']:,} models: {splits})"


def _score(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) is not None for name in OF_OTHERS)


def _cell(row: Mapping[str, Any], metric: str, best: float | None) -> Any:
    value, low, high = row.get(metric), row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if value is None:
        return "–"
    text = f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")
    return Bold(text) if value == best else text


def write_embedding_report(embeddings: Embeddings, pictures: Sequence[Path], path: Path, command: str = "") -> Path:
    """Writes the report of embedded networks: what they look like, how well they are reconstructed, what is left out.

    Args:
        embeddings: Complete.
        pictures: As ``draw_embeddings`` gives them.
        path: File to write.
        command: What made the embeddings.
    """
    index, count = embeddings.index, len(embeddings.models)
    unknown = [name for name, trained_on in index["trained_on"].items() if not trained_on]
    left_out = [f"{one['id']}: {one['reason']}" for one in embeddings.left_out]
    notes = [f"The model was not trained on {name}: see how well its layers are reconstructed." for name in unknown]
    notes += [GAP] if any(name.endswith((".ggap", ".train_acc")) for name in embeddings.models.column_names) else []
    sections = [
        Section("Pictures", [Picture(path, CAPTIONS.get(path.stem, "")) for path in pictures if path.suffix == ".png"]),
        Section("Layers", [Text(MEASURED), layer_table(embeddings)] if count == 1 else []),
        Section("Embeddings and spectra of the weights", list(spectra_tables(pictures))),
        Section("Notes", [Items([*notes, *index.get("warnings", ())])] if notes or index.get("warnings") else []),
        Section("Left out", [Folded(counted(len(left_out), "checkpoint"), [Items(left_out)])] if left_out else []),
        Section("How it was made", [Text(_model(index["model"])), *([Code(command)] if command else [])]),
    ]
    seen = "it" if count == 1 else "them"
    lead = f"{counted(count, 'checkpoint')} of {index['source']['path']}, as a trained SANE sees {seen}."
    return write_report(path, "Embedded checkpoints", sections, lead)


def layer_table(embeddings: Embeddings) -> Table:
    """The layers of the one network that is embedded, front to back."""
    (architecture,) = embeddings.index["architectures"]
    wanted = ("name", "tokens", "reconstruction_mse", "explained_variance")
    rows = embeddings.layer_columns([name for name in wanted if name in embeddings.layer_names], architecture)
    heads = {"name": "layer", "reconstruction_mse": "error", "explained_variance": "explained variance"}
    lines = [[value if isinstance(value, str) else number(value) for value in row.values()] for row in rows.to_pylist()]
    return Table([heads.get(name, name) for name in rows.column_names], lines)


def _model(model: Mapping[str, Any]) -> str:
    return f"Embeddings are by the model {model.get('path')}, {model.get('fingerprint', '')[:12]}."
