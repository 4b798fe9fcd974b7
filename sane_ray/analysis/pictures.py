"""Draws what was embedded and what was predicted; called at the end of jobs/embed.py and jobs/predict.py.

Reads the folders that those jobs write; never starts Ray. What there is too little of to be drawn is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray.analysis.attribution import Importance
from sane_ray.analysis.depth import Profiles, profiles
from sane_ray.analysis.maps import places, principal_map
from sane_ray.analysis.tables import write_tables
from sane_ray.embedding import Embeddings
from sane_ray.report.reading import (
    depth_figure,
    family_figure,
    importances_figure,
    map_figure,
    network_figure,
    predictions_figure,
    scores_figure,
)
from sane_ray.report.style import save, shorten

Spectra = Mapping[str, Mapping[str, NDArray[np.float64]]]

MOST_MAPPED = 20_000
"""A map of more networks is of a sample."""

MOST_ARCHITECTURES = 8
"""Of a family, the commonest ones."""

PROPERTIES = ("test_acc", "epoch", "ggap")
METRICS = {
    "r2": "R² on test networks",
    "tau": "Kendall's tau on test networks",
    "accuracy": "accuracy on test networks",
}


def draw_embeddings(embeddings: Embeddings, folder: Path, spectra: Spectra | None = None) -> list[Path]:
    """Draws a network at a glance; or a zoo as a map, and its layers along depth. Writes what is drawn as tables too.

    Depth is that of the commonest architecture, and where there are more, a family by relative depth.

    Args:
        embeddings: Complete.
        folder: For the pictures; made if missing.
        spectra: Spectral metrics of the networks' layers by id, where their weights are at hand.

    Returns:
        The files written; the first is the one to look at first.
    """
    models = embeddings.models
    if len(models) == 0:
        return []
    counts = Counter(models["architecture"].to_pylist())
    found = {name: profiles(embeddings, name, spectra) for name, _ in counts.most_common(MOST_ARCHITECTURES)}
    commonest, of_commonest = next(iter(found.items()))
    if len(models) == 1:
        _, mean_RKL = embeddings.layer_vectors("mean", commonest)
        measures = {name: values[0] for name, values in of_commonest.measures.items()}
        title = f"{shorten(of_commonest.ids[0], 70)}, {len(of_commonest.layers)} layers"
        title = title.removesuffix("s") if len(of_commonest.layers) == 1 else title
        written = save(network_figure(of_commonest.layers, mean_RKL[0], measures, title), folder / "network.png")
        return written + write_tables(folder, models, found)
    drawn = _draw_zoo(embeddings, folder, found)
    title = f"{len(of_commonest.ids):,} networks of architecture {shorten(commonest, 50)}"
    drawn += save(depth_figure(of_commonest.layers, of_commonest.measures, title), folder / "depth.png")
    if len(found) > 1:
        drawn += save(family_figure({name: one.measures for name, one in found.items()}), folder / "family.png")
    return drawn


def _draw_zoo(embeddings: Embeddings, folder: Path, found: Mapping[str, Profiles]) -> list[Path]:
    """The map, if there are networks enough that differ; and the tables."""
    rows = np.arange(len(embeddings.models))
    if len(rows) > MOST_MAPPED:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_MAPPED, replace=False))
    where = places(embeddings)[rows]
    if len(rows) < 3 or where.shape[1] == 0:
        return write_tables(folder, embeddings.models, found)
    shown, table = principal_map(where), embeddings.models.take(pa.array(rows))
    colours = {name: values for name in PROPERTIES if (values := column(table, name)) is not None}
    models = table["model"].to_pylist()
    figure = map_figure(shown.points_R2, colours or {"networks": [0.0] * len(rows)}, shown.explained, models)
    return save(figure, folder / "map.png") + write_tables(folder, table, found, shown, where, colours)


def column(table: pa.Table, name: str) -> list[Any] | None:
    """A property by its own name or as the store calls it, the gap computed if need be; None where it is unknown."""
    for known in (name, f"property.{name}"):
        if known in table.column_names and table[known].null_count < len(table):
            return table[known].to_pylist()
    if name == "ggap":
        train, test = column(table, "train_acc"), column(table, "test_acc")
        if train and test:
            return [None if a is None or b is None else a - b for a, b in zip(train, test, strict=True)]
    return None


def draw_predictions(
    results: Path, folder: Path, importances: Mapping[str, Sequence[Importance]] | None = None
) -> list[Path]:
    """Draws scores with their intervals, predictions against the truth, and what layers are worth.

    Args:
        results: Folder that jobs/predict.py wrote.
        folder: For the pictures; made if missing.
        importances: By property, of the best fit.

    Returns:
        The files written.
    """
    rows = [row for row in pq.read_table(results / "results.parquet").to_pylist() if row["protocol"] == "split"]
    written: list[Path] = []
    for metric, label in METRICS.items():
        if any(row[metric] is not None for row in rows):
            written += save(scores_figure(rows, metric, label), folder / f"{metric}.png")
    panels = best_predictions(rows, pq.read_table(results / "predictions.parquet"))
    if panels:
        written += save(predictions_figure(panels), folder / "predictions.png")
    if importances:
        written += save(importances_figure(importances), folder / "layers.png")
    return written


def best_row(rows: Sequence[Mapping[str, Any]], target: str) -> Mapping[str, Any] | None:
    """The fit of a property that did best on validation models; of those without any, the first; None if none did."""
    known = [row for row in rows if row["target"] == target and row["r2"] is not None]
    return max(known, key=lambda row: -np.inf if row["validation"] is None else row["validation"], default=None)


def best_predictions(
    rows: Sequence[Mapping[str, Any]], predictions: pa.Table
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Truth and prediction of test checkpoints by the fit of each property that validation liked best, by a title."""
    panels, table = {}, predictions.to_pylist()
    for target in dict.fromkeys(row["target"] for row in rows):
        best = best_row(rows, target)
        if best is None:
            continue
        mine = [
            entry
            for entry in table
            if entry["split"] == "test"
            and all(entry[key] == best[key] for key in ("target", "features", "probe", "protocol"))
        ]
        if mine:
            pairs = np.array([(entry["truth"], entry["prediction"]) for entry in mine], float)
            panels[f"{target}: {best['features']}, {best['probe']}"] = (pairs[:, 0], pairs[:, 1])
    return panels
