"""Small zoos for the tests of properties: stores of random networks whose properties follow from their weights."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sane_ray.config import TokensConfig
from sane_ray.embedding import SHAPE
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.writing import write_store
from sane_ray.zoo.catalog import discover

LATENT = 3


def write_zoo(folder: Path, models: int = 20, epochs: int = 3, shapes=((4, 3), (5, 4)), seed: int = 0) -> Path:
    """Networks in the published layout; ``test_acc`` is the deviation of the first layer, noise apart."""
    generator = torch.Generator().manual_seed(seed)
    for model in range(models):
        path = folder / f"NN_tune_trainable_{model:03d}"
        lines = []
        for epoch in range(epochs):
            (path / f"checkpoint_{epoch}").mkdir(parents=True)
            spread = 0.2 + float(torch.rand(1, generator=generator))
            weights = {}
            for index, shape in enumerate(shapes):
                weights[f"{index}.weight"] = spread * torch.randn(shape, generator=generator)
                weights[f"{index}.bias"] = torch.randn(shape[0], generator=generator) + epoch
            torch.save(weights, path / f"checkpoint_{epoch}" / "checkpoints")
            deviation = float(weights["0.weight"].std())
            lines.append({"training_iteration": epoch, "test_acc": deviation, "train_acc": deviation + 0.1 * spread})
        (path / "result.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (path / "params.json").write_text(json.dumps({"seed": model, "model::nlin": ["relu", "tanh"][model % 2]}))
    return folder


def write(folder: Path, source: Path, **tokens) -> TokenStore:
    config = TokensConfig(dtype="float32", max_architectures=4, **tokens)
    return write_store(discover(source), folder, config, source=source)


def as_of_source(folder: Path) -> Path:
    """Makes embeddings of a store look like those of its checkpoints: no splits, and other names of architectures."""
    models, index = pq.read_table(folder / "models.parquet"), json.loads((folder / "embeddings.json").read_text())
    names = pa.array([f"seen-{name}" for name in models["architecture"].to_pylist()])
    for name, values in (("split", pa.nulls(len(models), pa.string())), ("architecture", names)):
        models = models.set_column(models.column_names.index(name), name, values)
    pq.write_table(models, folder / "models.parquet")
    index |= {"source": {"kind": "path", "path": "ZOO", "fingerprint": "f"}}
    index["architectures"] = {f"seen-{name}": table for name, table in index["architectures"].items()}
    (folder / "embeddings.json").write_text(json.dumps(index))
    return folder


def shape_of(z):
    """Lengths and variances of tokens, by plain formulas; numbers of SHAPE."""
    lengths, centred = np.linalg.norm(z, axis=1), z - z.mean(0)
    variances = np.sort(np.linalg.eigvalsh(centred.T @ centred / len(z)).clip(0))[::-1]
    shares = variances[variances > 0] / variances.sum()
    first = [lengths.mean(), lengths.std(), *np.quantile(lengths, [0.01, 0.25, 0.5, 0.75, 0.99])]
    rank = np.exp(-(shares * np.log(shares)).sum())
    return [float(v) for v in (*first, np.linalg.norm(z.mean(0)), rank, *variances[:4], *[0.0] * (4 - len(variances)))]


def write_embeddings(folder: Path, store: TokenStore, fingerprint: str = "model") -> Path:
    """Embeddings in the format of jobs/embed.py: a token's is its first values, so that tests know them."""
    folder.mkdir(parents=True)
    summaries = {"mean": lambda z: z.mean(0), "std": lambda z: z.std(0)}
    for q in (1, 25, 50, 75, 99):
        summaries[f"q{q:02d}"] = lambda z, q=q: np.quantile(z, q / 100, axis=0)
    models, layers, shapes = {name: [] for name in summaries}, [], []
    for row in range(len(store.models)):
        z, table = store.tokens(row).numpy()[:, :LATENT], store.architecture_of(row).table
        for name, summary in summaries.items():
            models[name].append(summary(z).astype(np.float32))
        for index, (start, stop) in enumerate(zip(table.layer_starts, table.layer_starts[1:], strict=False)):
            vectors = {name: summary(z[start:stop]).astype(np.float32).tolist() for name, summary in summaries.items()}
            vectors["shape"] = shape_of(z[start:stop])
            known = {"id": store.models["id"][row].as_py(), "layer": index, "name": table.layers[index].key}
            known |= {"tokens": int(stop - start), "reconstruction_mse": 0.1}
            layers.append({**known, **vectors})
        shapes.append(shape_of(z))
    kept = [name for name in store.models.column_names if not name.startswith("config.")]
    kind = pa.list_(pa.float32(), LATENT)
    table = store.models.select(kept)
    for name, vectors in models.items():
        table = table.append_column(name, pa.array([vector.tolist() for vector in vectors], kind))
    table = table.append_column("shape", pa.array(shapes, pa.list_(pa.float32(), len(SHAPE))))
    pq.write_table(table, folder / "models.parquet")
    known_of = [("id", pa.string()), ("layer", pa.int64()), ("name", pa.string()), ("tokens", pa.int64())]
    schema = pa.schema([*known_of, ("reconstruction_mse", pa.float64()), *((name, kind) for name in summaries)])
    schema = schema.append(pa.field("shape", pa.list_(pa.float32(), len(SHAPE))))
    pq.write_table(pa.Table.from_pylist(layers, schema), folder / "layers.parquet")
    index = {
        "format": "sane_ray embeddings",
        "version": 1,
        "latent_dim": LATENT,
        "model": {"path": "MODEL", "fingerprint": fingerprint},
        "source": {"kind": "store", "path": str(store.path), "fingerprint": store.fingerprint},
        "architectures": {name: architecture.table.to_dict() for name, architecture in store.architectures.items()},
        "rows": {"models.parquet": len(table), "layers.parquet": len(layers)},
        "left_out": [],
    }
    (folder / "embeddings.json").write_text(json.dumps(index))
    return folder
