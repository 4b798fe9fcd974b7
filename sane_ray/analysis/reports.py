"""Reports, each one HTML file: how well properties are read, with which features, and how sure; what was embedded.

Reads the folders that jobs/predict.py and jobs/embed.py write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sane_ray.embedding import Embeddings
from sane_ray.properties.table import measured
from sane_ray.report.page import Block, Bold, Code, Folded, Items, Picture, Section, Table, Text, number, write_report
from sane_ray.report.spectra import FEATURES, STATISTICS, number_of

CAPTIONS = {
    "map": "Networks by their embeddings: the plane of the two directions in which they differ most. Lines join the "
    "checkpoints of one model. Colours that change smoothly mean that embeddings know the property.",
    "tsne": "The same networks by t-SNE: those beside each other are alike. Neither the axes nor far distances nor the "
    "sizes of clusters mean anything.",
    "spectra": "Statistics of each layer's embeddings (blue) and spectra of its weights (orange) along depth, each to "
    "its own scale. r is Pearson's correlation over the layers; a blank one is not defined.",
    "depth": "Layers from front to back: what embeddings say of them (blue) and spectra of the weights (orange).",
    "family": "Architectures along relative depth, the median network of each: what is common to all of them, and not.",
    "network": "The network layer by layer: its embeddings, and how well its weights are reconstructed.",
    "r2": "R² with 95 % intervals over test models: 1 is perfect, 0 is guessing the mean. Intervals that overlap "
    "widely do not tell two feature sets apart.",
    "tau": "Kendall's tau with 95 % intervals: whether networks are put in the right order.",
    "accuracy": "Fraction of test networks whose category is right, with 95 % intervals.",
    "predictions": "Test networks by the fit that validation liked best: on the dashed line, predictions are exact.",
    "layers": "What each layer is worth: how much R² falls when its features are exchanged among test networks.",
    "epochs": "R² at an epoch that no network of training or validation was of. An arrow is a fit worse than -0.5.",
    "transfer": "R² with training networks of one zoo (rows) and test networks of another (columns).",
}
"""What to look for in each picture, by its file's name."""

MOST_LAYERS = 30
"""Of a table of layers."""

LABELS = {"r2": "R²", "tau": "tau", "mae": "MAE", "accuracy": "accuracy"}
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
        Section("How well properties are read", list(score_tables(own))),
        Section("Pictures", [Picture(path, CAPTIONS.get(path.stem, "")) for path in pictures if path.suffix == ".png"]),
        Section("What layers add", list(layer_tables(pictures))),
        Section("Embeddings and spectra of the weights", list(spectra_tables(pictures))),
        Section("Other protocols", list(other_tables(rows))),
        Section("What validation chose", choices(own)),
        Section("Notes", [Items(results["notes"])] if results["notes"] else []),
        Section("How it was made", list(_made(results, command))),
    ]
    lead = f"Properties of networks predicted from their weights: {zoos}. No model is in two of the splits."
    return write_report(path, "Reading models", sections, lead)


def score_tables(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """One table a property: every feature set and probe with its intervals; the best value of each score is bold."""
    tables: list[Block] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        fitted = [row for row in rows if row["target"] == target and measured(row)]
        if not fitted:
            notes = dict.fromkeys(row.get("note", "") for row in rows if row["target"] == target)
            tables.append(Text(f"{target}: {'; '.join(note for note in notes if note) or 'nothing was fitted'}"))
            continue
        metrics = [name for name in LABELS if any(row.get(name) is not None for row in fitted)]
        best = {
            name: (min if name == "mae" else max)(r[name] for r in fitted if r.get(name) is not None)
            for name in metrics
        }
        lines = [[row["features"], row["probe"], *(_cell(row, name, best[name]) for name in metrics)] for row in fitted]
        counts = ", ".join(f"{fitted[0][f'n_{split}']:,} {split}" for split in ("train", "val", "test"))
        caption = f"{target} (checkpoints: {counts})"
        tables.append(Table(["features", "probe", *(LABELS[name] for name in metrics)], lines, caption))
    return tables


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
        blocks.append(Table(["", *features], lines, f"{protocol}, {target}, {probe}: {LABELS[score]}"))
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
        tables.append(Table(["layer", "loss of R²", "moves a prediction by"], some, f"{target}{more}"))
    said = (
        "What a layer adds to a prediction is the difference that its features make to those of the typical "
        "training network. The last column is how much that varies over test networks, in the property's units."
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
        count = max(row["networks"] for row in mine)
        cells = {(row["statistic"], row["feature"]): _correlation(row) for row in mine}
        lines = [[STATISTICS[one].replace("\n", " "), *(cells.get((one, f), "") for f in FEATURES)]
                 for one in STATISTICS if any(row["statistic"] == one for row in mine)]  # fmt: skip
        caption = f"{name or 'all architectures'} ({count:,} network{'s' * (count != 1)})"
        if count:
            tables.append(Table(["Pearson's r", *FEATURES.values()], lines, caption))
    if len(tables) < 3:
        return tables
    return [tables[0], Folded(f"{len(tables) - 1} architectures", tables[1:])]


def _correlation(row: Mapping[str, Any]) -> str:
    return number_of(row).removeprefix("r = ")


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
    sections = [
        Section("Pictures", [Picture(path, CAPTIONS.get(path.stem, "")) for path in pictures if path.suffix == ".png"]),
        Section("Layers", [layer_table(embeddings)] if count == 1 else []),
        Section("Embeddings and spectra of the weights", list(spectra_tables(pictures))),
        Section("Notes", [Items([*notes, *index.get("warnings", ())])] if notes or index.get("warnings") else []),
        Section("Left out", [Folded(f"{len(left_out):,} networks", [Items(left_out)])] if left_out else []),
        Section("How it was made", [Text(_model(index["model"])), *([Code(command)] if command else [])]),
    ]
    lead = f"{count:,} network{'s' * (count != 1)} of {index['source']['path']}, as a trained SANE sees them."
    return write_report(path, "Embedded networks", sections, lead)


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
