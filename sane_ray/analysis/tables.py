"""What the pictures show, as tables: layers along depth, places on the map, neighbours; and a summary of them as JSON.

Shape suffixes: R networks, K layers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray.analysis.depth import Profiles, along_depth, shared_layers
from sane_ray.analysis.maps import Map, nearest, typical_distance
from sane_ray.properties.protocols import last_rows
from sane_ray.properties.spectral import NAMES
from sane_ray.report.spectra import STATISTICS

MOST_ASKED = 2000
"""Networks at most whose neighbours are looked up."""

_TEXT = pa.string()
NEIGHBOURS = pa.schema(
    [("id", _TEXT), ("rank", pa.int64()), ("neighbour", _TEXT), ("model", _TEXT), ("distance", pa.float64())]
)

OF_EMBEDDINGS, OF_WEIGHTS = tuple(STATISTICS), NAMES
"""Statistics of a layer's embeddings, and spectral features of its weights."""

_NUMBER = pa.float64()
_CORRELATED = ("pearson", "pearson_deviation", "spearman", "spearman_q25", "spearman_q75")
CORRELATIONS = pa.schema(
    [("architecture", _TEXT), ("statistic", _TEXT), ("feature", _TEXT)]
    + [(name, pa.int64()) for name in ("checkpoints", "layers_least", "layers_most")]
    + [(name, _NUMBER) for name in _CORRELATED]
)


def depth_table(found: Mapping[str, Profiles]) -> pa.Table:
    """A row a network and layer: its measures along depth.

    Args:
        found: By architecture.
    """
    tables = []
    for architecture, of_one in found.items():
        count = len(of_one.layers)
        columns: dict[str, Any] = {
            "id": pa.array(np.repeat(of_one.ids, count), pa.string()),
            "architecture": pa.array([architecture] * len(of_one.ids) * count, pa.string()),
            "layer": pa.array(np.tile(np.arange(count), len(of_one.ids)), pa.int64()),
            "name": pa.array(of_one.layers * len(of_one.ids), pa.string()),
        }
        columns |= {name: pa.array(values.ravel(), pa.float64()) for name, values in of_one.measures.items()}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})


def correlations(*profiles: Profiles) -> list[dict[str, Any]]:
    """How statistics of embeddings go with spectra of the weights along depth: a row a pair that can be compared.

    Args:
        *profiles: Of one architecture, or of several whose networks count alike.

    Returns:
        ``statistic`` and ``feature``; ``checkpoints`` that have a correlation over their layers (``along_depth``); over
        these, the layers that it is of (``layers_least`` and ``layers_most``; of all where none has a correlation),
        ``pearson``'s mean and ``pearson_deviation`` (of two or more), and median and quartiles of Spearman's:
        ``spearman``, ``spearman_q25``, ``spearman_q75``. None, never 0, where no checkpoint has one.
    """
    rows = []
    for statistic in OF_EMBEDDINGS:
        for feature in OF_WEIGHTS:
            having = [one for one in profiles if statistic in one.measures and feature in one.measures]
            if not having:
                continue
            row: dict[str, Any] = {"statistic": statistic, "feature": feature} | dict.fromkeys(_CORRELATED)
            pearson, spearman = (
                np.concatenate([along_depth(one, statistic, feature, kind) for one in having])
                for kind in ("pearson", "spearman")
            )
            layers, told = _shared(having, statistic, feature), np.isfinite(pearson)
            layers = layers[told] if told.any() else layers
            row |= {"layers_least": int(layers.min()), "layers_most": int(layers.max())}
            pearson, spearman = pearson[told], spearman[np.isfinite(spearman)]
            row["checkpoints"] = len(pearson)
            if len(pearson):
                quartiles = np.percentile(spearman, [25, 50, 75]).tolist()
                row |= dict(zip(("spearman_q25", "spearman", "spearman_q75"), quartiles, strict=True))
                row["pearson"] = float(pearson.mean())
            if len(pearson) > 1:
                row["pearson_deviation"] = float(pearson.std(ddof=1))
            rows.append(row)
    return rows


def _shared(profiles: Sequence[Profiles], statistic: str, feature: str) -> NDArray[np.int64]:
    return np.concatenate([shared_layers(one, statistic, feature) for one in profiles])


def correlation_table(found: Mapping[str, Profiles]) -> pa.Table:
    """``correlations`` of each architecture; of several, those of all their networks too, ``architecture`` being empty.

    Args:
        found: By architecture.
    """
    rows = [{"architecture": name} | row for name, one in found.items() for row in correlations(one)]
    if len(found) > 1:
        rows += [{"architecture": ""} | row for row in correlations(*found.values())]
    return pa.Table.from_pylist(rows, CORRELATIONS)


def neighbour_table(models: pa.Table, places_RF: NDArray[np.float64], count: int = 5) -> pa.Table:
    """The nearest networks of other models to the last checkpoint of each model.

    Args:
        models: What is known of the networks: ``id``, ``model`` and ``epoch``.
        places_RF: Of ``maps.places``, in the same order.
        count: How many for each.

    Returns:
        A row a pair: ``id``, ``rank`` (1 is the nearest), ``neighbour``, ``model`` (the neighbour's), and ``distance``
        in units of the typical one.
    """
    ids, names, unit = models["id"].to_pylist(), models["model"].to_pylist(), typical_distance(places_RF)
    rows = []
    for row in last_rows(names, models["epoch"].to_pylist())[:MOST_ASKED]:
        for rank, (other, distance) in enumerate(nearest(places_RF, row, count, names, unit), start=1):
            found = {"id": ids[row], "rank": rank, "neighbour": ids[other], "model": names[other]}
            rows.append(found | {"distance": distance})
    return pa.Table.from_pylist(rows, NEIGHBOURS)


def epochs_of(models: pa.Table) -> list[int | None]:
    """The epoch of each checkpoint; None for that of a loose file whose epoch nobody knows, which is entered as 0.

    Such a file is the only checkpoint of its model, of epoch 0, and no property of it is known.

    Args:
        models: What is known of the checkpoints: ``model``, ``epoch`` and properties.
    """
    names, epochs = models["model"].to_pylist(), models["epoch"].to_pylist()
    counts, known = Counter(names), np.zeros(len(models), bool)
    for name in models.column_names:
        if name.startswith("property."):
            known |= models[name].is_valid().to_numpy()
    loose = [epoch == 0 and counts[model] == 1 for epoch, model in zip(epochs, names, strict=True)]
    return [None if one and not has else epoch for epoch, one, has in zip(epochs, loose, known.tolist(), strict=True)]


def agreement(models: pa.Table, neighbours: pa.Table, values: Sequence[float | None]) -> dict[str, float] | None:
    """Whether neighbours are alike: how far a property differs from the nearest network's, and from any network's.

    Args:
        models: What is known of the networks.
        neighbours: Of ``neighbour_table``.
        values: The property, a value a network.

    Returns:
        Median absolute differences ``nearest`` and ``others`` over networks; None where none are known.
    """
    known = {one: value for one, value in zip(models["id"].to_pylist(), values, strict=True) if _is_number(value)}
    pairs = [
        (known[row["id"]], known[row["neighbour"]])
        for row in neighbours.to_pylist()
        if row["rank"] == 1 and row["id"] in known and row["neighbour"] in known
    ]
    if len(pairs) < 2:
        return None
    own, near = np.array(pairs, float).T
    others = np.abs(own[:, None] - np.array(list(known.values()), float)[None])
    return {"nearest": float(np.median(np.abs(own - near))), "others": float(np.median(others))}


def write_tables(
    folder: Path,
    models: pa.Table,
    found: Mapping[str, Profiles],
    shown: Map | None = None,
    places_RF: NDArray[np.float64] | None = None,
    properties: Mapping[str, Sequence[float | None]] | None = None,
    close_R2: NDArray[np.float64] | None = None,
) -> list[Path]:
    """Writes what the pictures show, and ``analysis.json``, a summary of all.

    ``depth.parquet``, ``correlations.parquet`` where weights were at hand, and of a zoo ``map.parquet`` and
    ``neighbours.parquet``.

    Args:
        folder: Made if missing.
        models: What is known of the networks.
        found: Their measures along depth, by architecture.
        shown: Their places on the map.
        places_RF: What the map is of.
        properties: Numbers by which neighbours are compared, a value a network.
        close_R2: Their places on the map by t-SNE; NaN for those that are not on it.

    Returns:
        The files written.
    """
    tables = {"depth": depth_table(found)}
    summary: dict[str, Any] = {
        "checkpoints": len(models),
        "depth": {name: {"layers": len(one.layers), "correlations": correlations(one)} for name, one in found.items()},
    }
    related = correlation_table(found)
    if any(related["layers_most"].to_pylist()):
        tables["correlations"] = related
        if len(found) > 1:
            summary["correlations"] = correlations(*found.values())
    if shown is not None and places_RF is not None:
        x, y = shown.points_R2.T
        known = {"epoch": pa.array(epochs_of(models), pa.int64()), "x": pa.array(x), "y": pa.array(y)}
        tables["map"] = pa.table({"id": models["id"], "model": models["model"]} | known)
        if close_R2 is not None:
            for name, values in zip(("tsne_x", "tsne_y"), close_R2.T, strict=True):
                tables["map"] = tables["map"].append_column(name, pa.array(values, mask=np.isnan(values)))
        tables["neighbours"] = neighbour_table(models, places_RF)
        summary["map"] = {"explained": list(shown.explained)}
        alike = {name: agreement(models, tables["neighbours"], v) for name, v in (properties or {}).items()}
        summary["neighbours"] = {name: found for name, found in alike.items() if found}
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    (folder / "analysis.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return [*(folder / f"{name}.parquet" for name in tables), folder / "analysis.json"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
