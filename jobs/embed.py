"""Embed networks with a pretrained SANE: any checkpoints, or a token store, to tables of models and layers."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sane_ray.autoencoder.model import CONFIG_FILE
from sane_ray.cli import run_job
from sane_ray.cluster import default_storage, local_path
from sane_ray.config import EmbedJob
from sane_ray.embedding import Embeddings
from sane_ray.embedding.writing import Plan, embed, is_complete, plan_records, plan_store
from sane_ray.errors import InputError
from sane_ray.tokens.store import TokenStore
from sane_ray.zoo.catalog import catalog_source
from sane_ray.zoo.sources import Source, read, to_fetch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXAMPLES = """examples:
  python jobs/embed.py --model results/runs/RUN --store results/stores/digits
  python jobs/embed.py --model MODEL --source network.safetensors          one network, preprocessed as in training
  python jobs/embed.py --model MODEL --source ZOO --embedding.tokens       every token as well
  python jobs/embed.py --model MODEL --store STORE --cluster.num_workers 4 --cluster.gpu yes
"""

PICTURES = "plots"
"""Folder of the pictures, inside that of the embeddings."""

MOST_SPECTRA_BYTES = 2e9
"""Of checkpoints whose singular values are computed for the pictures: more would take minutes."""

_LISTED = 20
_MODEL_FOLDER = "model"
"""Of a run: what pretraining calls it, which is not imported for its name alone."""


def main(job: EmbedJob, dry_run: bool) -> None:
    """Embeds what is not embedded yet, and says where it is."""
    storage = default_storage(job.storage)
    if dry_run and job.source and (fetched := to_fetch(_source(job))):
        print(f"{fetched}\nand then embed it: run without --dry-run")
        return
    plan = plan_of(job, storage)
    already = is_complete(plan)
    if dry_run and not already:
        print(describe(plan))
        print("dry run: nothing was started")
        return
    embeddings = Embeddings.open(plan.output) if already else embed(plan, job.cluster)
    pictures = draw(plan, embeddings)
    print(report(embeddings, pictures, already=already))


def plan_of(job: EmbedJob, storage: Path) -> Plan:
    """What the job embeds, with what, and where to.

    Raises:
        InputError: No model is named, not exactly one of store and source, or they cannot be used.
    """
    if not job.model:
        raise InputError("config field model is '': name the folder of a trained model (--model), or of its run")
    if bool(job.store) == bool(job.source):
        raise InputError(
            f"config field store is {job.store!r} and source is {job.source!r}: name one of them, a token store "
            "(--store) or checkpoints (--source)"
        )
    model = model_folder(local_path(job.model, "model"))
    networks = local_path(job.store, "store") if job.store else _source(job).path
    default = storage / "embeddings" / f"{networks.name.split('.')[0]}-{model_name(model)}"
    output = local_path(job.output, "output") if job.output else default
    if job.store:
        return plan_store(model, TokenStore.open(networks), output, job.embedding)
    zoo = read(_source(job), storage)
    catalog = networks.suffix == ".parquet" and catalog_source(networks) is not None
    return plan_records(model, zoo.records, networks, output, job.embedding, catalog=catalog)


def model_folder(path: Path) -> Path:
    """The model's own folder, also where that of its run is named."""
    inside = path / _MODEL_FOLDER
    return inside if not (path / CONFIG_FILE).exists() and inside.is_dir() else path


def model_name(model: Path) -> str:
    """What tells a model from others: the name of its run, where that is the folder above it."""
    return model.parent.name if model.name == _MODEL_FOLDER else model.name


def describe(plan: Plan) -> str:
    """What would be done."""
    lines = [
        f"would embed {plan.checkpoints:,} checkpoints of {plan.source['path']} ({plan.size / 1e6:,.1f} MB)",
        f"with        {plan.model}",
        f"to          {plan.output}, {'in this process' if plan.is_small else 'by actors on Ray'}",
        *(f"left out    {reason}" for reason in plan.refused.values()),
    ]
    return "\n".join(lines)


def draw(plan: Plan, embeddings: Embeddings) -> list[Path]:
    """The pictures, with spectra of the weights where these are few and small."""
    from sane_ray.analysis.pictures import draw_embeddings  # matplotlib and scipy take seconds to import

    return draw_embeddings(embeddings, embeddings.path / PICTURES, spectra_of_plan(plan, embeddings))


def spectra_of_plan(plan: Plan, embeddings: Embeddings) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Spectral metrics of the layers of checkpoints that were embedded as they are, by id; of a store, some."""
    from sane_ray.analysis.depth import spectra_of, spectra_of_store
    from sane_ray.tokens.layers import LayerTable
    from sane_ray.zoo.catalog import open_record

    if plan.source["kind"] == "store":
        return spectra_of_store(TokenStore.open(plan.source["path"]))
    records = [record for unit in plan.units for record in unit.records]
    if not records or plan.size > MOST_SPECTRA_BYTES:
        return {}
    models = embeddings.models
    architectures = dict(zip(models["id"].to_pylist(), models["architecture"].to_pylist(), strict=True))
    tables = {name: LayerTable.from_dict(table) for name, table in embeddings.index["architectures"].items()}
    return {
        record.id: spectra_of(open_record(record), tables[architectures[record.id]])
        for record in records
        if record.id in architectures
    }


def report(embeddings: Embeddings, pictures: Sequence[Path], *, already: bool) -> str:
    """What was left out, which architectures the model does not know, where everything is, and what comes next."""
    source = embeddings.index["source"]
    store = source["path"] if source["kind"] == "store" else "STORE"
    done = (
        f"{'nothing to do: ' if already else ''}embeddings {embeddings.path}: {len(embeddings.models):,} checkpoints, "
        f"{len(embeddings.layers):,} layers, {embeddings.latent_dim} values each; next: python jobs/predict.py "
        f"--embeddings {shlex.quote(str(embeddings.path))} --store {shlex.quote(store)}"
    )
    seen = [f"picture  {path}" for path in pictures if path.suffix == ".png"]
    return "\n".join([*left_out(embeddings), *unknown(embeddings), *seen, done])


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
                f"warning: {counts[name]:,} checkpoints have the architecture {name}, which the model was not trained "
                "on: their layers are normalised like those of the same kind in its training, and their embeddings are "
                "no better than the reconstruction error says (column explained_variance)"
            )


def _source(job: EmbedJob) -> Source:
    return Source(local_path(job.source, "source"), reader=job.reader, properties=job.properties)


if __name__ == "__main__":
    run_job(EmbedJob, main, examples=EXAMPLES)
