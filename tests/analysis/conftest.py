"""Embeddings in the format of jobs/embed.py, of known values."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sane_ray.embedding import VECTORS, Embeddings
from sane_ray.tokens.tokenizer import build_layer_table

LATENT = 4


def _write(folder, models=6, epochs=3, layers=5, families=1, properties=True, seed=0, untrained=(), source=""):
    """Networks whose mean embedding's first value is their accuracy, ten times; layer 1 has one token.

    ``untrained`` names the architectures that the model does not know; weights of layer k are explained to 1 - k/10.
    """
    generator = np.random.default_rng(seed)
    index_rows, layer_rows, architectures = [], [], {}
    kind = pa.list_(pa.float32(), LATENT)
    for model in range(models):
        count = layers + 2 * (model % families)
        name = f"net{count}"
        architectures[name] = _table(count)
        for epoch in range(epochs):
            accuracy = (model + 1) / (models + 1) * (epoch + 1) / epochs
            of_layers = generator.normal(size=(count, LATENT))
            vectors = {vector: generator.normal(size=LATENT) * 0.01 for vector in VECTORS}
            vectors["mean"][0] = 10 * accuracy
            row = {"id": f"m{model}/{epoch}", "model": f"m{model}", "epoch": epoch, "split": "train"}
            known = {"property.test_acc": accuracy, "property.train_acc": accuracy + 0.1} if properties else {}
            index_rows.append(row | {"architecture": name, "parameters": 10} | known | vectors)
            for layer in range(count):
                one = {"id": row["id"], "layer": layer, "name": f"net.{layer}.weight", "tokens": 1 if layer == 1 else 8}
                one |= {"reconstruction_mse": 0.1 * (layer + 1), "explained_variance": 1 - layer / 10}
                one |= {**dict.fromkeys(VECTORS, of_layers[layer])}
                layer_rows.append(one | {"std": np.full(LATENT, layer + 1.0)})
    folder.mkdir(parents=True)
    for file, rows in (("models.parquet", index_rows), ("layers.parquet", layer_rows)):
        plain = {key: [row[key] for row in rows] for key in rows[0] if key not in VECTORS}
        arrays = {vector: pa.array([row[vector].tolist() for row in rows], kind) for vector in VECTORS}
        pq.write_table(pa.table(plain | arrays), folder / file)
    index = {"format": "sane_ray embeddings", "version": 1, "latent_dim": LATENT, "architectures": architectures}
    index |= {"rows": {"models.parquet": len(index_rows), "layers.parquet": len(layer_rows)}, "left_out": []}
    index |= {"trained_on": {name: name not in untrained for name in architectures}, "source": {"path": source}}
    (folder / "embeddings.json").write_text(json.dumps(index))
    return Embeddings.open(folder)


def _table(layers):
    """Of a network with so many layers of 8 channels, the second of one."""
    shapes = {f"net.{layer}.weight": (1 if layer == 1 else 8, 2) for layer in range(layers)}
    return build_layer_table({name: torch.empty(shape) for name, shape in shapes.items()}).to_dict()


@pytest.fixture
def write_embeddings():
    """Writes embeddings of some networks to a folder and opens them."""
    return _write
