"""Samples networks, audits and writes them: what `jobs/sample.py` does, and what it says of it."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.cluster import default_storage
from sane_ray.config import SampleJob
from sane_ray.finetuning.evaluation import METRICS, Piece
from sane_ray.finetuning.measuring import Measuring, succeeded
from sane_ray.sampling.anchors import aligned
from sane_ray.sampling.audit_rows import Auditor
from sane_ray.sampling.files import (
    CANDIDATES_FILE,
    MEASURED_FOLDER,
    ROWS_FILE,
    Samples,
    check_output,
    network_file,
    write_index,
    write_network,
    write_rows,
)
from sane_ray.sampling.generation import Codec, Weights, state_dict
from sane_ray.sampling.methods import Measured, Pool, Sampler
from sane_ray.sampling.plan import SamplePlan, describe, plan_of
from sane_ray.shell import this_command
from sane_ray.tracking import UNSENT_FOLDER, default_uri, tracked

EXPERIMENT = "sane_ray sampling"
"""Name of the MLflow experiment."""

PICTURES, REPORT_FILE, LOGGED_FILE = "plots", "report.html", ".logged"

_TOGETHER = 16
"""Networks that are measured side by side."""

_LOG = logging.getLogger(__name__)


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
    anchors, settings = plan.anchors, plan.config
    codec = Codec(SANE.from_pretrained(plan.model), anchors.architecture, settings)
    raw = anchors.networks([*anchors.ordinals, *anchors.others])
    training = aligned(raw, anchors.architecture.symmetry, raw[0]) if settings.align else raw
    finish = Finish(plan)
    if plan.images is None:
        _write(plan, finish, Sampler(codec, training[: len(anchors.ordinals)], None, settings), None, start)
        return
    folder = plan.output / MEASURED_FOLDER
    with Measuring(plan.images, 0, [0], folder, config.fan_out, "measure") as measuring:

        def measure(weights: Weights) -> Measured:
            return measured(measuring, finish(weights), plan)

        sampler = Sampler(codec, training[: len(anchors.ordinals)], measure, settings)
        auditor = Auditor(plan, codec, training, measure)
        _write(plan, finish, sampler, auditor, start)


def measured(measuring: Measuring, weights: Weights, plan: SamplePlan) -> Measured:
    """Accuracy and answers of networks, as they are."""
    arrays = {key: value.contiguous().numpy() for key, value in weights.items()}
    count = len(next(iter(arrays.values())))
    params = {**plan.recipe, "seed": 0}
    pieces = [
        Piece([params] * min(_TOGETHER, count - begin), {k: v[begin : begin + _TOGETHER] for k, v in arrays.items()})
        for begin in range(0, count, _TOGETHER)
    ]
    histories = succeeded(measuring(pieces))
    metrics_RM = np.concatenate([history.metrics_REM[:, 0] for history in histories])
    logits_RIC = np.concatenate([history.logits_RTIC[:, 0] for history in histories])
    column = {name: metrics_RM[:, place] for place, name in enumerate(METRICS)}
    return Measured(column["val_acc"], column["val_loss"], column["test_acc"], logits_RIC.argmax(-1).astype(np.int16))


@dataclass(frozen=True)
class Finish:
    """From weights of the anchors' architecture to those of the networks that come out.

    A last layer that begins anew is drawn from the network's own weights as its seed: so a network that is measured and
    later written has the same.
    """

    plan: SamplePlan

    def __call__(self, weights: Weights) -> Weights:
        """[R, *shape] each, of either architecture."""
        if self.plan.target is None:
            return weights
        count = len(next(iter(weights.values())))
        finished = [self._one(state_dict(weights, index)) for index in range(count)]
        return {key: torch.stack([network[key] for network in finished]) for key in finished[0]}

    def _one(self, network: Weights) -> Weights:
        assert self.plan.target is not None
        seed = zlib.crc32(b"".join(value.contiguous().numpy().tobytes() for value in network.values()))
        grown = self.plan.target.apply({key: value[None] for key, value in network.items()}, seed)
        return state_dict(grown, 0)


def _write(plan: SamplePlan, finish: Finish, sampler: Sampler, auditor: Auditor | None, start: float) -> None:
    """Everything in the folder; the index comes last."""
    rows, exploded = [], {}
    for method in plan.config.methods:
        if method == "scratch":
            rows += list(_scratch(plan, auditor))
            continue
        pool = sampler.kept(method)
        exploded[method] = pool.exploded
        rows += list(_kept(plan, finish, auditor, method, pool))
        _LOG.info("%s: %d networks", method, len(pool))
    candidates = [] if auditor is None else list(_candidates(plan, sampler, auditor))
    write_rows(plan.output, ROWS_FILE, rows)
    if candidates:
        write_rows(plan.output, CANDIDATES_FILE, candidates)
    write_index(
        plan.output,
        {
            "identity": plan.digest,
            "name": plan.name,
            "settings": plan.identity,
            "model": str(plan.model),
            "store": str(plan.anchors.store.path),
            "images": {"name": plan.images.name, "path": plan.images_path, "fingerprint": plan.images.fingerprint}
            if plan.images is not None
            else None,
            "anchors": {"words": plan.anchors.words, "ids": plan.anchors.ids},
            "recipe": plan.recipe,
            "bandwidth": sampler.bandwidth,
            "noise": sampler.matched_noise,
            "exploded": exploded,
            "reference": None if auditor is None else auditor.reference_row,
            "verdict": [] if auditor is None else auditor.verdict(rows, candidates),
            "compute": {"seconds": time.monotonic() - start, "cores": torch.get_num_threads()},
        },
    )


def _kept(
    plan: SamplePlan, finish: Finish, auditor: Auditor | None, method: str, pool: Pool
) -> Iterator[dict[str, Any]]:
    """Writes the networks of a method; a row each."""
    weights = finish(sampler_weights(pool, finish, plan))
    audited = auditor.rows(pool) if auditor is not None else [{} for _ in range(len(pool))]
    for repetition, audit in enumerate(audited):
        file = network_file(method, repetition)
        parents = [plan.anchors.ids[index] for index in pool.parents[repetition] if index < len(plan.anchors.ids)]
        network = state_dict(weights, repetition)
        write_network(plan.output, file, network, {"method": method, "parents": ", ".join(parents)})
        yield {"method": method, "repetition": repetition, "file": file, "parents": parents, **audit}


def _scratch(plan: SamplePlan, auditor: Auditor | None) -> Iterator[dict[str, Any]]:
    raise NotImplementedError
