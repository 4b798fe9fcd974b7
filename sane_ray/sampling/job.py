"""Samples networks, audits and writes them: what `jobs/sample.py` does, and what it says of it."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.cluster import default_storage
from sane_ray.config import SampleJob
from sane_ray.finetuning.evaluation import METRICS, Piece
from sane_ray.finetuning.measuring import Measuring, succeeded
from sane_ray.finetuning.modules import BATCH_NORM
from sane_ray.report.generated import draw_samples, write_sampling_report
from sane_ray.sampling.anchors import Anchors, aligned
from sane_ray.sampling.auditing import Auditor, Training
from sane_ray.sampling.files import (
    CANDIDATES_FILE,
    INDEX_FILE,
    MEASURED_FOLDER,
    NETWORKS_FOLDER,
    ROWS_FILE,
    Samples,
    check_output,
    network_file,
    write_identity,
    write_index,
    write_network,
    write_rows,
)
from sane_ray.sampling.finishing import finished, fitted
from sane_ray.sampling.generation import Codec, Weights, state_dict
from sane_ray.sampling.methods import SOURCES, SWEPT, Measured, Pool, Sampler
from sane_ray.sampling.plan import SamplePlan, describe, plan_of
from sane_ray.shell import command, this_command
from sane_ray.tokens.store.progress_bar import progress_bar
from sane_ray.tokens.store.text_table import table
from sane_ray.tracking import UNSENT_FOLDER, Tracker, default_uri, tracked, ui_command
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.images import ImageData

MOST_BYTES = 1e9
"""Of the weights of training networks that samples are compared with; of more, so many at random."""

Item = TypeVar("Item")

EXPERIMENT = "sane_ray sampling"
"""Name of the MLflow experiment."""

PICTURES, REPORT_FILE, LOGGED_FILE = "plots", "report.html", ".logged"

_LOG = logging.getLogger(__name__)

_TOGETHER = 16
"""Networks that are measured side by side."""


def run(config: SampleJob, dry_run: bool) -> None:
    """Samples, unless the samples are there; prints the table, the verdict, and where everything is."""
    storage = default_storage(config.storage)
    plan = plan_of(config)
    already = check_output(plan.output, plan.digest)
    if dry_run:
        print(describe(plan))
        print("dry run: nothing was started")
        return
    if not (already and (plan.output / LOGGED_FILE).exists()):
        with tracked(
            uri=default_uri(storage),
            experiment=EXPERIMENT,
            run_name=plan.name,
            identity=f"{plan.name}-{plan.digest}",
            params=plan.identity,
            folder=storage / UNSENT_FOLDER,
        ) as tracker:
            if not already:
                print(describe(plan), flush=True)
                sample(plan, config)
            samples = Samples.open(plan.output)
            report(samples, this_command())
            log(samples, tracker)
            (plan.output / LOGGED_FILE).touch()
    if already:
        print(f"nothing to do: {plan.output} holds the samples of this model, these anchors and this config")
    print(ending(Samples.open(plan.output), storage))


def sample(plan: SamplePlan, config: SampleJob) -> None:
    """Draws, selects, audits and writes."""
    start = time.monotonic()
    plan.output.mkdir(parents=True, exist_ok=True)
    write_identity(plan.output, plan.digest)
    if plan.images is None:
        _write(Drawing.begun(plan), None, start)
        return
    folder, network = plan.output / MEASURED_FOLDER, plan.network
    images = held_out(plan.images) if network is None else plan.images  # batch norms need training images
    with Measuring(images, 0, [0], folder, config.fan_out, "measure", network=network) as measuring:
        drawing = Drawing.begun(plan, measuring)
        _write(drawing, measuring, start)


def held_out(images: ImageData) -> ImageData:
    """Validation and test images alone: what selects and what measures; those of training take two thirds of the time.

    For the training images stand those of validation, whose accuracy nothing asks for twice.
    """
    val, test = images.rows["val"], images.rows["test"]
    rows = np.concatenate([val, test])
    places = {"train": np.arange(len(val)), "val": np.arange(len(val)), "test": len(val) + np.arange(len(test))}
    return dataclasses.replace(
        images,
        images_NCHW=images.images_NCHW[rows],
        labels_N=images.labels_N[rows],
        rows={"train": places["train"], "val": places["val"], "test": places["test"]},
    )


@dataclass(frozen=True)
class Drawing:
    """What takes part in sampling."""

    plan: SamplePlan
    codec: Codec
    sampler: Sampler
    auditor: Auditor

    @classmethod
    def begun(cls, plan: SamplePlan, measuring: Measuring | None = None) -> Drawing:
        """Reads the training networks, aligns, embeds and measures them."""
        anchors, settings = plan.anchors, plan.config
        codec = Codec(SANE.from_pretrained(plan.model), anchors.architecture, settings)
        ordinals = [*anchors.ordinals, *_in_memory(anchors)]
        raw = anchors.networks(ordinals)
        symmetry = anchors.architecture.symmetry
        training = raw if anchors.are_aligned or not settings.align else aligned(raw, symmetry, raw[0])
        measure = None if measuring is None else Measure(plan, measuring)
        predictions = labels = None
        if measuring is not None and plan.target is None:
            stacked = {key: torch.stack([network[key] for network in training]) for key in training[0]}
            found = measured(measuring, fitted(plan, stacked), plan)
            predictions, labels = found.predictions_RI, measuring.images.split("test")[1]
        ids = [str(name) for name in anchors.store.models["id"].take(ordinals).to_pylist()]
        epochs = [epoch or 0 for epoch in anchors.store.models["epoch"].take(ordinals).to_pylist()]
        others = Training(training, ids, anchors.runs(ordinals), epochs, predictions, labels)
        auditor = Auditor(codec, others, symmetry)
        return cls(plan, codec, Sampler(codec, training[: len(anchors.ordinals)], measure, settings), auditor)


@dataclass(frozen=True)
class Measure:
    """Measures networks given in the anchors' architecture, as they come out."""

    plan: SamplePlan
    measuring: Measuring

    def __call__(self, weights: Weights) -> Measured:
        """[R, *shape] each."""
        return measured(self.measuring, fitted(self.plan, weights), self.plan)


def measured(measuring: Measuring, weights: Weights, plan: SamplePlan, *, as_is: bool = False) -> Measured:
    """Accuracy and answers of networks, once their batch norms are conditioned as in ``finished``; or as they are."""
    arrays = {key: value.contiguous().numpy() for key, value in weights.items()}
    count, params = len(next(iter(arrays.values()))), {**plan.recipe, "seed": 0}
    if plan.network is not None:
        params[BATCH_NORM] = "keep" if as_is else plan.config.batch_norm
    pieces = [
        Piece([params] * min(_TOGETHER, count - begin), {k: v[begin : begin + _TOGETHER] for k, v in arrays.items()})
        for begin in range(0, count, _TOGETHER)
    ]
    histories = succeeded(measuring(pieces))
    metrics_RM = np.concatenate([history.metrics_REM[:, 0] for history in histories])
    logits_RIC = np.concatenate([history.logits_RTIC[:, 0] for history in histories])
    column = {name: metrics_RM[:, place] for place, name in enumerate(METRICS)}
    predictions_RI = logits_RIC.argmax(-1).astype(np.int16)
    return Measured(column["val_acc"], column["val_loss"], column["test_acc"], predictions_RI)


def _write(drawing: Drawing, measuring: Measuring | None, start: float) -> None:
    """Everything in the folder; the index comes last."""
    plan, sampler, auditor = drawing.plan, drawing.sampler, drawing.auditor
    rows: list[dict[str, Any]] = []
    exploded: dict[str, int] = {}
    for method in _told("sample", plan.config.methods, "method"):
        if method == "scratch":
            rows += _scratch(plan, measuring)
        else:
            pool = sampler.kept(method)
            exploded[method] = pool.exploded
            rows += _kept(drawing, method, pool)
    pools = [(source, pool) for source in _sources(plan) for pool in _scales(sampler, source)]
    candidates = [row for source, pool in _told("audit", pools, "set") for row in _candidates(drawing, source, pool)]
    write_rows(plan.output, ROWS_FILE, rows)
    write_rows(plan.output, CANDIDATES_FILE, candidates)
    used = {SOURCES[source].scale for source in _sources(plan)}
    content = {
        "identity": plan.digest,
        "name": plan.name,
        "settings": plan.identity,
        "model": str(plan.model),
        "store": str(plan.anchors.store.path),
        "images": _images(plan),
        "anchors": {"words": plan.anchors.words, "ids": plan.anchors.ids},
        "recipe": plan.recipe,
        "network": plan.network.path if plan.network is not None else "",
        "bandwidth": sampler.scale("sane_kde") if "bandwidth" in used else None,
        "noise": sampler.scale("noise") if "matched" in used else None,
        "warnings": plan.warnings,
        "exploded": exploded,
        "reference": _reference(auditor),
        "verdict": auditor.verdict(rows, candidates) if measuring is not None else [],
        "compute": {"seconds": time.monotonic() - start, "cores": torch.get_num_threads()},
    }
    write_index(plan.output, content)


def _in_memory(anchors: Anchors) -> list[int]:
    """Training networks besides the anchors that samples are compared with: all, unless that takes too much memory."""
    table = anchors.architecture.table
    most = max(1, int(MOST_BYTES / (4 * table.num_tokens * table.token_size)))
    if len(anchors.others) <= most:
        return anchors.others
    _LOG.warning("samples are compared with %d of %d other training networks, at random", most, len(anchors.others))
    return sorted(np.random.default_rng(0).permutation(anchors.others)[:most].tolist())


def _reference(auditor: Auditor) -> dict[str, float | None] | None:
    """What novelty is measured in: of training networks of different runs."""
    reference = auditor.reference
    if reference is None:
        return None
    agreement = reference.agreement_quantile()
    return {"distance": reference.median_distance, "agreement": agreement if np.isfinite(agreement) else None}


def _images(plan: SamplePlan) -> dict[str, Any] | None:
    if plan.images is None:
        return None
    images = plan.images
    return {"name": images.name, "path": plan.images_path, "fingerprint": images.fingerprint, "classes": images.classes}


def _kept(drawing: Drawing, method: str, pool: Pool) -> Iterator[dict[str, Any]]:
    """Writes the networks of a method; a row each."""
    if not len(pool):
        return
    weights = finished(drawing.plan, drawing.codec.weights(pool.tokens_RNT))
    ids = drawing.plan.anchors.ids
    bootstrapped = method.endswith(":bootstrap")  # then parents are among the networks of the round before
    for repetition, audit in enumerate(drawing.auditor.rows(pool)):
        file = network_file(method, repetition)
        parents = [] if bootstrapped else [ids[index] for index in pool.parents[repetition]]
        write_network(drawing.plan.output, file, state_dict(weights, repetition), {"method": method})
        yield {"method": method, "repetition": repetition, "file": file, "parents": parents, **audit}


def _scratch(plan: SamplePlan, measuring: Measuring | None) -> Iterator[dict[str, Any]]:
    """Networks as they are initialised; a row each."""
    params = [{**plan.recipe, "seed": _scratch_seed(plan, index)} for index in range(plan.config.repetitions)]
    networks = [
        plan.network.state_dict(one["seed"]) if plan.network is not None else from_params(one).state_dict()
        for one in params
    ]
    stacked = {key: torch.stack([network[key] for network in networks]) for key in networks[0]}
    found = None if measuring is None else measured(measuring, stacked, plan, as_is=True)
    for repetition, network in enumerate(networks):
        file = network_file("scratch", repetition)
        write_network(plan.output, file, network, {"method": "scratch"})
        row: dict[str, Any] = {"method": "scratch", "repetition": repetition, "file": file, "parents": []}
        if found is not None:
            row |= {name: float(getattr(found, name)[repetition]) for name in ("val_acc", "val_loss", "test_acc")}
        yield {**_UNKNOWN, **row}


_UNKNOWN: dict[str, Any] = {"distance": None, "novelty": None, "nearest": None, "wrong_agreement": None}


def _scratch_seed(plan: SamplePlan, index: int) -> int:
    return int(np.random.SeedSequence([plan.config.seed, index]).generate_state(1)[0])


def _told(what: str, items: Sequence[Item], unit: str) -> Iterator[Item]:
    """The items, with a bar that says how far they are."""
    with progress_bar(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()


def _sources(plan: SamplePlan) -> list[str]:
    return list(dict.fromkeys(method.split(":")[0] for method in plan.config.methods if method != "scratch"))


def _scales(sampler: Sampler, source: str) -> list[Pool]:
    """Candidates of a source as a method, and of a swept one at each scale."""
    own = sampler.pool(source)
    scales = [own] if source not in SWEPT or sampler.measure is None else [own, *sampler.sweep(source)]
    return list({pool.scale: pool for pool in scales}.values())


def _candidates(drawing: Drawing, source: str, pool: Pool) -> Iterator[dict[str, Any]]:
    """A row for everything that was drawn."""
    own = pool.scale == drawing.sampler.scale(source)
    for index, audit in enumerate(drawing.auditor.rows(pool)):
        yield {"source": source, "scale": pool.scale, "as_method": own, "index": index, **audit}


def report(samples: Samples, made_by: str) -> None:
    """Draws the pictures and writes the report beside the samples."""
    candidates = pq.read_table(samples.path / CANDIDATES_FILE).to_pylist()
    pictures = draw_samples(samples.rows, candidates, samples.index, samples.path / PICTURES)
    write_sampling_report(samples.rows, samples.index, pictures, samples.path / REPORT_FILE, made_by)


def log(samples: Samples, tracker: Tracker) -> None:
    """Hands means of every method, the files and the networks themselves to MLflow."""
    point: dict[str, object] = {"step": 0}
    for method in dict.fromkeys(row["method"] for row in samples.rows):
        for name in ("val_acc", "test_acc", "novelty", "wrong_agreement"):
            values = [row[name] for row in samples.of_method(method) if row.get(name) is not None]
            if values:
                point[f"{name}/{method.replace(':', '-')}"] = float(np.mean(values))
    tracker.log([point])
    for name in (INDEX_FILE, ROWS_FILE, CANDIDATES_FILE, REPORT_FILE):
        tracker.log_artifact(samples.path / name)
    for folder in (PICTURES, NETWORKS_FOLDER):
        tracker.log_folder(samples.path / folder, folder)


def ending(samples: Samples, storage: Path) -> str:
    """The table, the verdict, where the samples are and what to do next."""
    lines = [["method", "networks", "val", "test", "novelty", "wrong alike", "exploded"]]
    for method in samples.index["settings"]["settings"]["methods"]:
        rows = samples.of_method(method)
        cells = [_mean(rows, name, factor) for name, factor in _COLUMNS.items()]
        lines.append([method, str(len(rows)), *cells, str(samples.index["exploded"].get(method, 0) or "")])
    next_command = f"{command('python')} jobs/finetune.py --samples {shlex.quote(str(samples.path))}"
    return "\n".join(
        [
            "accuracy in % before training, means over networks; novelty 1 is as far as two training runs are apart",
            *table(lines),
            "",
            *(" ".join(_short(sentences)) for sentences in samples.index["verdict"]),
            *(f"warning: {warning}" for warning in samples.index["warnings"]),
            f"report   {samples.path / REPORT_FILE}",
            f"MLflow   {ui_command(default_uri(storage))}",
            f"samples  {samples.path}: {len(samples.rows)} networks (safetensors); next: {next_command}",
        ]
    )


def _short(sentences: Sequence[str]) -> Iterator[str]:
    """Without what it rests on, which the table shows and the report has."""
    return (sentence for sentence in sentences if not sentence.startswith(("In weights", "In errors")))


_COLUMNS = {"val_acc": 100.0, "test_acc": 100.0, "novelty": 1.0, "wrong_agreement": 1.0}


def _mean(rows: Sequence[Mapping[str, Any]], name: str, factor: float) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    digits = 1 if factor > 1 else 2
    return f"{factor * float(np.mean(values)):.{digits}f}" if values else "-"
