"""What the layers of networks look like along depth: statistics of their embeddings beside spectra of their weights.

The published README and section 4.2 of the paper (arXiv 2406.09997) set the spread of a layer's token embeddings beside
its log spectral norm and its weighted alpha. Shape suffixes: R networks of one architecture, K layers, L latent values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from sane_ray.embedding import Embeddings
from sane_ray.properties.protocols import last_rows
from sane_ray.properties.spectral import NAMES, spectral_metrics
from sane_ray.report.spectra import LEAST_LAYERS
from sane_ray.tokens.layers import LayerTable
from sane_ray.tokens.store import TokenStore
from sane_ray.zoo.checkpoint import Checkpoint, LoadedCheckpoint

Array = NDArray[np.float64]

LARGEST_MATRIX = 4096 * 4096
"""Singular values of larger matrices take minutes, and are left out."""

LEAST_VARIATION = 1e-9
"""Relative to the largest value: what varies less is constant but for rounding."""

MOST_STORED, MOST_STORED_WEIGHTS = 48, 500_000_000
"""Networks of a store, and weights of them in all, whose singular values are computed."""


@dataclass(frozen=True, eq=False)
class Profiles:
    """Numbers of every layer of networks of one architecture.

    Attributes:
        ids: Of the networks.
        layers: Names of the layers, front to back.
        measures: By name, each [R, K]; NaN where a layer has none.
    """

    ids: list[str]
    layers: list[str]
    measures: dict[str, Array]


def profiles(
    embeddings: Embeddings, architecture: str, spectra: Mapping[str, Mapping[str, Array]] | None = None
) -> Profiles:
    """Reads off the layers of one architecture's networks.

    * ``spread``: mean over the latent values of their standard deviation over the layer's tokens (the paper's z_l);
      NaN for a layer of one token;
    * ``norm``: length of the mean embedding;
    * ``error``: squared error of the reconstructed weights, as normalised;
    * ``explained_variance``: 1 - that error / the variance of those weights, where the embeddings have it;
    * with ``spectra``, those of ``NAMES`` that are given.

    Args:
        embeddings: Of the networks.
        architecture: One of theirs.
        spectra: By network id and metric, a value a layer ([K]).
    """
    ids, std_RKL = embeddings.layer_vectors("std", architecture)
    _, mean_RKL = embeddings.layer_vectors("mean", architecture)
    wanted = ("name", "tokens", "reconstruction_mse", "explained_variance")
    rows = embeddings.layer_columns([name for name in wanted if name in embeddings.layer_names], architecture)
    layers = rows["name"].to_pylist()[: std_RKL.shape[1]]
    single_RK = _floats(rows["tokens"]).reshape(len(ids), -1) < 2
    measures = {
        "spread": np.where(single_RK, np.nan, std_RKL.mean(axis=2)).astype(np.float64),
        "norm": np.linalg.norm(mean_RKL, axis=2).astype(np.float64),
        "error": _floats(rows["reconstruction_mse"]).reshape(len(ids), -1),
    }
    if "explained_variance" in rows.column_names:
        measures["explained_variance"] = _floats(rows["explained_variance"]).reshape(len(ids), -1)
    known, empty = spectra or {}, np.full(len(layers), np.nan)
    for metric in NAMES if known else ():
        measures[metric] = np.stack([known[one].get(metric, empty) if one in known else empty for one in ids])
    return Profiles(ids, layers, measures)


def spectra_of(checkpoint: Checkpoint, table: LayerTable) -> dict[str, Array]:
    """Spectral metrics of a network's weight matrices, by name, a value a layer; see ``spectral_metrics``.

    Args:
        checkpoint: Its weights, read tensor by tensor.
        table: Its layers.
    """
    found = {name: np.full(len(table.layers), np.nan) for name in NAMES}
    for place, layer in enumerate(table.layers):
        if min(layer.channels, layer.fan_in) < 2 or layer.channels * layer.fan_in > LARGEST_MATRIX:
            continue
        matrix_CF = checkpoint.tensor(layer.key).to(torch.float32).reshape(layer.channels, -1).numpy()
        for name, value in zip(NAMES, spectral_metrics(matrix_CF[None])[0], strict=True):
            found[name][place] = value
    return found


def evenly_chosen(models: pa.Table, most: int) -> list[int]:
    """Rows whose spectra are computed: last checkpoints of models, evenly chosen; fewer where they are large.

    Args:
        models: Of checkpoints: ``model``, ``epoch`` and ``parameters``.
        most: Rows at most.
    """
    names, epochs, weights = (models[name].to_pylist() for name in ("model", "epoch", "parameters"))
    rows, largest = last_rows(names, epochs), max(weights, default=1)
    count = min(len(rows), most, max(1, int(MOST_STORED_WEIGHTS / largest)))
    return [rows[place * (len(rows) - 1) // max(count - 1, 1)] for place in range(count)]


def spectra_of_store(store: TokenStore, most: int = MOST_STORED) -> dict[str, dict[str, Array]]:
    """``spectra_of`` some networks of a store, by id: last checkpoints of models, evenly chosen.

    Args:
        store: Where the weights are.
        most: Networks at most; fewer where they are large.
    """
    found = {}
    for row in evenly_chosen(store.models, most):
        checkpoint = LoadedCheckpoint(store.path, store.state_dict(row))
        found[store.models["id"][row].as_py()] = spectra_of(checkpoint, store.architecture_of(row).table)
    return found


def along_depth(profiles: Profiles, first: str, second: str, kind: str = "spearman") -> Array:
    """Correlation of two measures over each network's layers, [R].

    NaN where fewer than ``LEAST_LAYERS`` layers have both, or one of them is the same for all of these.

    Args:
        profiles: Of networks of one architecture.
        first: A measure.
        second: Another.
        kind: ``spearman`` (of ranks) or ``pearson``.
    """
    from scipy.stats import rankdata

    ranked, found = {"spearman": True, "pearson": False}[kind], np.full(len(profiles.ids), np.nan)
    one_RK, other_RK = profiles.measures[first], profiles.measures[second]
    known_RK = np.isfinite(one_RK) & np.isfinite(other_RK)
    for row in np.flatnonzero(known_RK.sum(axis=1) >= LEAST_LAYERS):
        one, other = one_RK[row, known_RK[row]], other_RK[row, known_RK[row]]
        if _varies(one) and _varies(other):
            pair = (rankdata(one), rankdata(other)) if ranked else (one, other)
            found[row] = float(np.corrcoef(*pair)[0, 1])
    return found


def shared_layers(profiles: Profiles, first: str, second: str) -> NDArray[np.int64]:
    """How many layers of each network have both measures, [R].

    Args:
        profiles: Of networks of one architecture.
        first: A measure.
        second: Another.
    """
    known_RK = np.isfinite(profiles.measures[first]) & np.isfinite(profiles.measures[second])
    return known_RK.sum(axis=1)


def _varies(values: Array) -> bool:
    return bool(np.ptp(values) > LEAST_VARIATION * np.abs(values).max())


def _floats(column: object) -> Array:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], np.float64)  # type: ignore[attr-defined]
