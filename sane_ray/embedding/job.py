"""Embeds networks, draws them and tracks that: what `jobs/embed.py` does, and what it says of it."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sane_ray.autoencoder.folders import CONFIG_FILE, MODEL_FOLDER
from sane_ray.cluster import default_storage, local_path
from sane_ray.config import EmbedJob, WorkersConfig, to_dict
from sane_ray.embedding import Embeddings
from sane_ray.embedding.reading import INDEX_FILE, LAYERS_FILE
from sane_ray.embedding.writing import Plan, embed, is_complete, plan_records, plan_store
from sane_ray.errors import InputError
from sane_ray.report.names import counted
from sane_ray.shell import command, this_command
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.reading import json_digest
from sane_ray.tracking import UNSENT_FOLDER, Tracker, default_uri, tracked, ui_command
from sane_ray.zoo.catalog import catalog_source
from sane_ray.zoo.sources import Source, read, to_fetch

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXPERIMENT = "sane_ray embeddings"
"""Name of the MLflow experiment."""

PICTURES, REPORT_FILE = "plots", "report.html"
"""Folder of the pictures, inside that of the embeddings."""

MOST_SPECTRA_WEIGHTS = 1e9
"""Of a network whose singular values are computed for the pictures: more would take minutes."""

LOGGED_FILE = ".logged"
"""In the folder of the embeddings when they are drawn and MLflow has been told."""

_LISTED = 20


def run(config: EmbedJob, dry_run: bool) -> None:
    """Embeds what is not embedded yet, draws and tracks it, and says where it is."""
    storage = default_storage(config.storage)
    if dry_run and config.source and (fetched := to_fetch(_source(config))):
        print(f"{fetched}\nand then embed it: run without --dry-run")
        return
    plan = plan_of(config, storage)
    already = is_complete(plan)
    if dry_run and not already:
        print(describe(plan, config.cluster))
        print("dry run: nothing was started")
        return
    if not (already and (plan.output / LOGGED_FILE).exists()):
        with tracked(
            uri=default_uri(storage),
            experiment=EXPERIMENT,
            run_name=plan.output.name,
            identity=f"{plan.output.name}-{json_digest(plan.identity())}",
            params={"embedding": to_dict(config.embedding), "model": str(plan.model), "source": plan.source},
            folder=storage / UNSENT_FOLDER,
        ) as tracker:
            embeddings = embed_telling(plan, config.cluster)
            draw(plan, embeddings)
            log(embeddings, tracker)
            (plan.output / LOGGED_FILE).touch()
    print(report(Embeddings.open(plan.output), default_uri(storage), already=already))


def embed_telling(plan: Plan, cluster: WorkersConfig | None = None) -> Embeddings:
    """Embeds; who interrupts that is told what is kept of it."""
    try:
        return embed(plan, cluster)
    except KeyboardInterrupt:
        done = plan.checkpoints_done
        kept = f"{done:,} of {plan.checkpoints:,} networks are embedded, and kept: the same command embeds the rest"
        print(kept if done else "no network is embedded yet: the same command begins anew", file=sys.stderr)
        raise


def plan_of(config: EmbedJob, storage: Path) -> Plan:
    """What the job embeds, with what, and where to.

    Raises:
        InputError: No model is named, not exactly one of store and source, or they cannot be used.
    """
    if not config.model:
        raise InputError("--model is missing: name the folder of a trained model, or of its run")
    if bool(config.store) == bool(config.source):
        named = f"--store {config.store} and --source {config.source}" if config.store else "neither is named"
        raise InputError(f"{named}: name either a token store (--store) or checkpoints (--source)")
    model = model_folder(local_path(config.model, "model"))
    networks = local_path(config.store, "store") if config.store else _source(config).path
    default = storage / "embeddings" / f"{networks.name.split('.')[0]}-{model_name(model)}"
    output = local_path(config.output, "output") if config.output else default
    if config.store:
        return plan_store(model, TokenStore.open(networks), output, config.embedding)
    zoo = read(_source(config), storage)
    catalog = networks.suffix == ".parquet" and catalog_source(networks) is not None
    return plan_records(model, zoo.records, networks, output, config.embedding, catalog=catalog)


def model_folder(path: Path) -> Path:
    """The model's own folder, also where that of its run is named."""
    inside = path / MODEL_FOLDER
    return inside if not (path / CONFIG_FILE).exists() and inside.is_dir() else path


def model_name(model: Path) -> str:
    """What tells a model from others: the name of its run, where that is the folder above it."""
    return model.parent.name if model.name == MODEL_FOLDER else model.name


def describe(plan: Plan, cluster: WorkersConfig) -> str:
    """What would be done."""
    lines = [
        f"would embed {counted(plan.checkpoints, 'checkpoint')} of {plan.source['path']} ({plan.size / 1e6:,.1f} MB)",
        f"with        {plan.model}",
        f"to          {plan.output}, {plan.place(cluster)}",
        *(f"left out    {reason}" for reason in plan.refused.values()),
        *(f"warning:    {warning}" for warning in plan.warnings),
    ]
    return "\n".join(lines)


def draw(plan: Plan, embeddings: Embeddings) -> None:
    """The pictures, with spectra of the weights where these are few and small, and the report."""
    from sane_ray.analysis.pictures import draw_embeddings  # matplotlib and scipy take seconds to import
    from sane_ray.analysis.reports import write_embedding_report

    pictures = draw_embeddings(embeddings, embeddings.path / PICTURES, spectra_of_plan(plan, embeddings))
    write_embedding_report(embeddings, pictures, embeddings.path / REPORT_FILE, this_command())


def spectra_of_plan(plan: Plan, embeddings: Embeddings) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Spectral metrics of the layers of some of the checkpoints, by id: last ones of models, evenly chosen."""
    from sane_ray.analysis.depth import spectra_of, spectra_of_store
    from sane_ray.tokens.layers import LayerTable
    from sane_ray.zoo.catalog import open_record

    if plan.source["kind"] == "store":
        return spectra_of_store(TokenStore.open(plan.source["path"]))
    records = {record.id: record for unit in plan.units for record in unit.records}
    models = embeddings.models.select(["id", "architecture"]).take(pa.array(_sampled(embeddings), pa.int64()))
    tables = {name: LayerTable.from_dict(table) for name, table in embeddings.index["architectures"].items()}
    return {
        one["id"]: spectra_of(open_record(records[one["id"]]), tables[one["architecture"]])
        for one in models.to_pylist()
    }


def _sampled(embeddings: Embeddings) -> list[int]:
    """Rows of the checkpoints of a source whose weights are looked at: as many as of a store, none that is huge."""
    from sane_ray.analysis.depth import MOST_STORED, evenly_chosen

    rows = np.flatnonzero(embeddings.models["parameters"].to_numpy() <= MOST_SPECTRA_WEIGHTS)
    return rows[evenly_chosen(embeddings.models.take(pa.array(rows)), MOST_STORED)].tolist()


def log(embeddings: Embeddings, tracker: Tracker) -> None:
    """Hands MLflow how well the networks are reconstructed, and the pictures."""
    point: dict[str, object] = {"step": 0, "checkpoints": len(embeddings.models), "layers": embeddings.num_layers}
    for name in ("reconstruction_mse", "explained_variance"):
        point[name] = pc.mean(embeddings.models[name]).as_py() if name in embeddings.models.column_names else None
    tracker.log([point])
    for name in (INDEX_FILE, REPORT_FILE):
        tracker.log_artifact(embeddings.path / name)
    tracker.log_folder(embeddings.path / PICTURES)


def report(embeddings: Embeddings, uri: str, *, already: bool) -> str:
    """What was left out, which architectures the model does not know, where everything is, and what comes next."""
    pictures = sorted((embeddings.path / PICTURES).glob("*.png"))
    done = (
        f"{'nothing to do: ' if already else ''}embeddings {embeddings.path}: "
        f"{counted(len(embeddings.models), 'checkpoint')}, {counted(embeddings.num_layers, 'layer')}, "
        f"{embeddings.latent_dim} values each; next: {following(embeddings, pictures)}"
    )
    seen = [*(f"picture  {path}" for path in pictures), f"report   {embeddings.path / REPORT_FILE}"]
    warned = [f"warning: {warning}" for warning in embeddings.index.get("warnings", [])]
    return "\n".join([*left_out(embeddings), *unknown(embeddings), *warned, *seen, f"MLflow   {ui_command(uri)}", done])


def following(embeddings: Embeddings, pictures: Sequence[Path]) -> str:
    """What to do next: predict, where a store gives splits to do it by; else look."""
    if embeddings.index["source"]["kind"] == "store" or not pictures:
        return f"{command('python')} jobs/predict.py --embeddings {shlex.quote(str(embeddings.path))}"
    first = next((path for path in pictures if path.stem in ("network", "family", "map")), pictures[0])
    return f"look at {first}"


def left_out(embeddings: Embeddings) -> Iterator[str]:
    """Each checkpoint by itself where they are few, else each reason with an example."""
    alike: dict[str, list[str]] = {}
    for one in embeddings.left_out:
        alike.setdefault(one["reason"], []).append(one["id"])
    for reason, ids in sorted(alike.items(), key=lambda pair: -len(pair[1]))[:_LISTED]:
        more = f" and {len(ids) - 1:,} more" if len(ids) > 1 else ""
        yield f"left out {ids[0]}{more}: {reason}"
    if len(alike) > _LISTED:
        yield f"all {len(embeddings.left_out):,} that were left out are in {embeddings.path / 'embeddings.json'}"


def unknown(embeddings: Embeddings) -> Iterator[str]:
    """Architectures that the model was not trained on."""
    counts = Counter(embeddings.models["architecture"].to_pylist())
    for name, trained_on in embeddings.index["trained_on"].items():
        if not trained_on:
            yield (
                f"warning: {counted(counts[name], 'checkpoint')} of the architecture {name}, which the model was not "
                "trained on: their layers are normalised like those of the same kind in its training, and their "
                "embeddings are no better than their reconstruction is (explained_variance in "
                f"{embeddings.path / LAYERS_FILE})"
            )


def _source(config: EmbedJob) -> Source:
    return Source(local_path(config.source, "source"), reader=config.reader, properties=config.properties)
