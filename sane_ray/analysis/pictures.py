"""Draws what was embedded and what was predicted; called at the end of jobs/embed.py and jobs/predict.py.

Reads the folders that those jobs write; never starts Ray. What there is too little of to be drawn is left out.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray.analysis.attribution import Importance
from sane_ray.analysis.depth import Profiles, profiles
from sane_ray.analysis.maps import close_map, places, principal_map
from sane_ray.analysis.tables import correlations, write_tables
from sane_ray.embedding import Embeddings
from sane_ray.properties.prediction import by_validation
from sane_ray.properties.table import counted
from sane_ray.report.protocols import epochs_figure, has_epochs, has_transfer, transfer_figure
from sane_ray.report.reading import (
    depth_figure,
    family_figure,
    importances_figure,
    map_figure,
    network_figure,
    predictions_figure,
    scores_figure,
)
from sane_ray.report.spectra import spectra_figure
from sane_ray.report.style import save, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Spectra = Mapping[str, Mapping[str, NDArray[np.float64]]]
Colours = Mapping[str, Sequence[Any]]

MOST_MAPPED = 20_000
"""A map of more networks is of a sample."""

MOST_ARCHITECTURES = 8
"""Of a family, the commonest ones."""

PROPERTIES = ("test_acc", "epoch", "ggap")
MOST_COLOURS = 6
"""Maps of one zoo side by side."""
NAMELESS = re.compile(
    r"(checkpoints?|model|pytorch_model|state_dict|weights|last|best|final|latest)?[-_.\d]*(\.(safetensors|pt|pth|bin|ckpt))?"
)
"""Names of files and folders that say nothing of the network in them."""

METRICS = {
    "r2": "R² on test networks",
    "tau": "Kendall's tau on test networks",
    "accuracy": "accuracy on test networks",
}


IMPORTANCES = pa.schema(
    [("target", pa.string()), ("group", pa.string())]
    + [(name, pa.float64()) for name in ("drop", "deviation", "moved")]
)


def draw_embeddings(
    embeddings: Embeddings, folder: Path, spectra: Spectra | None = None, colours: Colours | None = None
) -> list[Path]:
    """Draws a network at a glance; or a zoo as a map, and its layers along depth. Writes what is drawn as tables too.

    Depth is that of the commonest architecture, and where there are more, a family by relative depth.

    Args:
        embeddings: Complete.
        folder: For the pictures; made if missing.
        spectra: Spectral metrics of the networks' layers by id, where their weights are at hand.
        colours: By property, the value of each checkpoint, which colours the maps: numbers or texts, None where it is
            unknown. By default those of ``PROPERTIES`` that the embeddings have.

    Returns:
        The files written; the first is the one to look at first.
    """
    models = embeddings.models
    if len(models) == 0:
        return []
    counts = Counter(models["architecture"].to_pylist())
    found = {name: profiles(embeddings, name, spectra) for name, _ in counts.most_common(MOST_ARCHITECTURES)}
    commonest, of_commonest = next(iter(found.items()))
    note = unknown(embeddings, found)
    if len(models) == 1:
        _, mean_RKL = embeddings.layer_vectors("mean", commonest)
        measures = {name: values[0] for name, values in of_commonest.measures.items()}
        title = network_title(embeddings, len(of_commonest.layers))
        drawn = save(network_figure(of_commonest.layers, mean_RKL[0], measures, title, note), folder / "network.png")
        drawn += _draw_spectra(folder, found, note)
        return drawn + write_tables(folder, models, found)
    drawn = _draw_zoo(embeddings, folder, found, colours)
    title = f"{counted(len(of_commonest.ids), 'network')} of architecture {shorten(commonest, 50)}"
    note_here = unknown(embeddings, [commonest])
    drawn += save(depth_figure(of_commonest.layers, of_commonest.measures, title, note_here), folder / "depth.png")
    if len(found) > 1:
        drawn += save(family_figure({name: one.measures for name, one in found.items()}, note), folder / "family.png")
    return drawn + _draw_spectra(folder, found, note)


def network_title(embeddings: Embeddings, layers: int) -> str:
    """The only network's name, its known properties, and how many layers it has.

    A checkpoint is often a file whose name says nothing (``checkpoint_000005/checkpoints``); then the folders above it
    tell more than its id.

    Args:
        embeddings: Of one network.
        layers: How many.
    """
    row, source = embeddings.models.to_pylist()[0], embeddings.index.get("source", {})
    identifier = str(row["model"] or row["id"])
    names = [part for part in identifier.split("/") if not NAMELESS.fullmatch(part)]
    if not names and source.get("path"):
        path = Path(source["path"])
        names = [part for part in (*path.parts[1:-1], path.stem) if not NAMELESS.fullmatch(part)][-1:]
    known = {name: values[0] for name in PROPERTIES if (values := column(embeddings.models, name)) is not None}
    told = {name: value for name, value in known.items() if value is not None}
    told = {} if told == {"epoch": 0} else told  # what a file without an epoch has
    said = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in told.items()]
    count = f"{layers} layer" + "s" * (layers != 1)
    return ", ".join([shorten("/".join(names[-2:]) or identifier, 48), *said, count])


def unknown(embeddings: Embeddings, architectures: Collection[str]) -> str:
    """A sentence on the architectures that the model was not trained on; none if it knows all of them.

    Args:
        embeddings: Whose index says so.
        architectures: Of what is drawn.
    """
    trained = embeddings.index.get("trained_on", {})
    unknown = [name for name in architectures if trained.get(name) is False]
    if not unknown:
        return ""
    which = "this architecture"
    if len(architectures) > 1:
        which = "any of these" if len(unknown) == len(architectures) else ", ".join(shorten(n, 24) for n in unknown)
    return f"The model was not trained on {which}: embeddings say no more than the explained variance allows."


def _draw_spectra(folder: Path, found: Mapping[str, Profiles], note: str) -> list[Path]:
    """Statistics of embeddings against spectra, where weights were at hand and any correlation is defined."""
    rows = correlations(*found.values())
    count = max((row["networks"] for row in rows), default=0)
    if not count:
        return []
    title = "Embeddings and spectra of the weights along depth"
    if count > 1:
        title += f": mean ± deviation of r over {count:,} networks"
    measures = {name: one.measures for name, one in found.items()}
    return save(spectra_figure(measures, rows, title, note), folder / "spectra.png")


def _draw_zoo(
    embeddings: Embeddings, folder: Path, found: Mapping[str, Profiles], colours: Colours | None
) -> list[Path]:
    """The map, if there are networks enough that differ; and the tables."""
    rows = np.arange(len(embeddings.models))
    if len(rows) > MOST_MAPPED:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_MAPPED, replace=False))
    where = places(embeddings)[rows]
    if len(rows) < 3 or where.shape[1] == 0:
        return write_tables(folder, embeddings.models, found)
    shown, table = principal_map(where), embeddings.models.take(pa.array(rows))
    if colours is None:
        known = {name: values for name in PROPERTIES if (values := column(table, name)) is not None}
    else:
        known = {name: [values[row] for row in rows.tolist()] for name, values in list(colours.items())[:MOST_COLOURS]}
    colours, models = known or {"networks": [0.0] * len(rows)}, table["model"].to_pylist()
    drawn = save(map_figure(shown.points_R2, colours, shown.explained, models), folder / "map.png")
    close_R2 = close_map(where)
    if close_R2 is not None:
        drawn += save(_close_figure(close_R2, colours, models), folder / "tsne.png")
    return drawn + write_tables(folder, table, found, shown, where, known, close_R2)


def _close_figure(close_R2: NDArray[np.float64], colours: Mapping[str, Sequence[Any]], models: Sequence[Any]) -> Figure:
    """The map by t-SNE of those networks that are on it."""
    rows = np.flatnonzero(np.isfinite(close_R2[:, 0])).tolist()
    some = {name: [values[row] for row in rows] for name, values in colours.items()}
    note = f"a sample: {len(rows):,} of {len(close_R2):,} checkpoints" if len(rows) < len(close_R2) else ""
    title = "t-SNE: near networks are alike, far distances mean nothing"
    return map_figure(close_R2[rows], some, None, [models[row] for row in rows], title=title, note=note)


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
    """Draws scores with their intervals, predictions against the truth, what layers are worth, and other protocols.

    Writes ``importances.parquet`` beside, where importances are given.

    Args:
        results: Folder that jobs/predict.py wrote.
        folder: For the pictures; made if missing.
        importances: By property and fit.

    Returns:
        The files written.
    """
    every = pq.read_table(results / "results.parquet").to_pylist()
    rows = [row for row in every if row["protocol"] == "split"]
    written: list[Path] = []
    for metric, label in METRICS.items():
        if any(row[metric] is not None for row in rows):
            written += save(scores_figure(rows, metric, label), folder / f"{metric}.png")
    panels = best_predictions(rows, pq.read_table(results / "predictions.parquet"))
    if panels:
        written += save(predictions_figure(panels), folder / "predictions.png")
    if importances:
        written += save(importances_figure(importances), folder / "layers.png")
        pq.write_table(importance_table(importances), folder / "importances.parquet")
        written.append(folder / "importances.parquet")
    if has_epochs(every):
        written += save(epochs_figure(every), folder / "epochs.png")
    if has_transfer(every):
        written += save(transfer_figure(every, _zoos(results)), folder / "transfer.png")
    return written


def importance_table(importances: Mapping[str, Sequence[Importance]]) -> pa.Table:
    """A row a property and layer: loss of R², its deviation, and how far the layer moves predictions.

    Args:
        importances: By property and fit, the most important first.
    """
    rows = [{"target": target} | one._asdict() for target, found in importances.items() for one in found]
    return pa.Table.from_pylist(rows, IMPORTANCES)


def _zoos(results: Path) -> list[str]:
    path = results / "results.json"
    zoos = json.loads(path.read_text(encoding="utf-8"))["zoos"] if path.is_file() else []
    return [zoo["name"] for zoo in zoos]


def best_row(rows: Sequence[Mapping[str, Any]], target: str) -> Mapping[str, Any] | None:
    """The fit of a property that did best on validation models; of those without any, the first; None if none did."""
    known = [row for row in rows if row["target"] == target and row.get("r2") is not None]
    return max(known, key=by_validation, default=None)


def best_predictions(
    rows: Sequence[Mapping[str, Any]], predictions: pa.Table
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Truth and prediction of test checkpoints by the fit of each property that validation liked best, by a title."""
    panels = {}
    for target in dict.fromkeys(row["target"] for row in rows):
        best = best_row(rows, target)
        if best is None:
            continue
        keys = {"split": "test"} | {key: best[key] for key in ("target", "features", "probe", "protocol")}
        mine = predictions.filter(functools.reduce(operator.and_, (pc.field(k) == v for k, v in keys.items())))
        if len(mine):
            panels[f"{target}: {best['features']}, {best['probe']}"] = (
                mine["truth"].to_numpy(),
                mine["prediction"].to_numpy(),
            )
    return panels
