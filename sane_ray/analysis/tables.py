"""What the pictures show, as tables: layers along depth, places on the map, neighbours; and a summary of them as JSON.

Shape suffixes: R networks, K layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sane_ray.analysis.depth import Profiles, along_depth, last_rows
from sane_ray.analysis.maps import Map, nearest, typical_distance

MOST_ASKED = 2000
"""Networks at most whose neighbours are looked up."""

_TEXT = pa.string()
NEIGHBOURS = pa.schema(
    [("id", _TEXT), ("rank", pa.int64()), ("neighbour", _TEXT), ("model", _TEXT), ("distance", pa.float64())]
)

OF_EMBEDDINGS, OF_WEIGHTS = ("spread", "norm", "error"), ("log_spectral_norm", "alpha_weighted", "stable_rank")


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


def correlations(of_one: Profiles) -> list[dict[str, Any]]:
    """How measures of embeddings go with spectra of the weights along depth: a row a pair that any network has.

    Returns:
        ``first`` and ``second`` measure, ``networks``, and the median and quartiles over them of Spearman's rank
        correlation over a network's layers: ``spearman``, ``spearman_q25``, ``spearman_q75``.
    """
    rows = []
    for first in (name for name in OF_EMBEDDINGS if name in of_one.measures):
        for second in (name for name in OF_WEIGHTS if name in of_one.measures):
            values = along_depth(of_one, first, second)
            known = values[np.isfinite(values)]
            if len(known):
                low, middle, high = np.percentile(known, [25, 50, 75]).tolist()
                row = {"first": first, "second": second, "networks": len(known)}
                rows.append(row | {"spearman": middle, "spearman_q25": low, "spearman_q75": high})
    return rows


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
) -> list[Path]:
    """Writes ``depth.parquet`` and, of a zoo, ``map.parquet`` and ``neighbours.parquet``; and ``analysis.json`` of all.

    Args:
        folder: Made if missing.
        models: What is known of the networks.
        found: Their measures along depth, by architecture.
        shown: Their places on the map.
        places_RF: What the map is of.
        properties: Numbers by which neighbours are compared, a value a network.

    Returns:
        The files written.
    """
    tables = {"depth": depth_table(found)}
    summary: dict[str, Any] = {
        "networks": len(models),
        "depth": {name: {"layers": len(one.layers), "correlations": correlations(one)} for name, one in found.items()},
    }
    if shown is not None and places_RF is not None:
        x, y = shown.points_R2.T
        tables["map"] = models.select(["id", "model", "epoch"]).append_column("x", pa.array(x))
        tables["map"] = tables["map"].append_column("y", pa.array(y))
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
