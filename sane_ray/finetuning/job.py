"""Fine-tunes sampled networks, compares and reports them: what `jobs/finetune.py` does, and what it says of it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from sane_ray.cluster import default_storage, local_path
from sane_ray.config import FinetuneJob, FinetuningConfig, to_dict
from sane_ray.errors import InputError
from sane_ray.finetuning.evaluation import METRICS, Histories, Piece
from sane_ray.finetuning.measuring import Failed, Measuring
from sane_ray.finetuning.recipe import describe as described_recipe
from sane_ray.finetuning.recipe import recipe_of
from sane_ray.finetuning.results import Method, diverged, methods_of, rows_of, table_of, verdict
from sane_ray.report.generated import draw_finetuning, write_finetuning_report
from sane_ray.sampling.files import Samples, write_rows
from sane_ray.shell import this_command
from sane_ray.tokens.store.reading import json_digest
from sane_ray.tokens.store.text_table import table
from sane_ray.tracking import UNSENT_FOLDER, Tracker, default_uri, tracked, ui_command
from sane_ray.zoo.images import ImageData, load_images
from sane_ray.zoo.stacked import OPTIMIZERS
from sane_ray.zoo.user_network import UserNetwork, check_same

EXPERIMENT = "sane_ray finetuning"
"""Name of the MLflow experiment."""

RESULTS_FILE, ROWS_FILE, RECORDS_FOLDER = "results.json", "results.parquet", "records"
PICTURES, REPORT_FILE, LOGGED_FILE = "plots", "report.html", ".logged"
FORMAT, VERSION = "sane_ray.finetuning", 1


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, and where the results go."""

    samples: Samples
    images: ImageData
    config: FinetuningConfig
    output: Path
    name: str
    identity: dict[str, Any]
    recipe: dict[str, Any]
    """How networks are trained: as the best anchor was, or as the config says."""
    network: UserNetwork | None
    """What builds networks that are of none of our own architectures."""

    @property
    def digest(self) -> str:
        """Of the identity, 8 hex digits."""
        return json_digest(self.identity)[:8]

    @property
    def epochs(self) -> list[int]:
        """Of the table: those asked for that are trained, else the last."""
        last = self.config.epochs
        return [epoch for epoch in self.config.table_epochs if epoch <= last] or [last]


def plan_of(job: FinetuneJob) -> Plan:
    """Decides everything; trains nothing.

    Raises:
        InputError: samples or images are missing or do not fit; names the flag and the remedy.
    """
    if not job.samples:
        raise InputError("no samples are named: --samples FOLDER, the one that jobs/sample.py wrote")
    samples = Samples.open(local_path(job.samples, "samples"))
    if not samples.rows:
        raise InputError(f"samples {samples.path} hold no network: sample again, with other methods or less noise")
    images = _images(samples, job.images)
    identity = {
        "version": VERSION,
        "samples": samples.index["identity"],
        "images": images.fingerprint,
        "settings": _settings(job.finetuning),
    }
    network = _network(samples, job.network, images)
    if network is not None:
        identity["network"] = [network.path, network.source]
    recipe = _recipe(samples, job.finetuning, network)
    name = job.run_name or f"{samples.index['name']}-{json_digest(identity)[:8]}"
    storage = default_storage(job.storage)
    output = local_path(job.output, "output") if job.output else storage / "finetuning" / name
    return Plan(samples, images, job.finetuning, output, name, identity, recipe, network)


def _network(samples: Samples, named: str, images: ImageData) -> UserNetwork | None:
    known = samples.index.get("network", "")
    if known and not named:
        raise InputError(
            f"the networks of {samples.path} were built by {known}, which is code that is run here: if you trust it, "
            f"name it by --network {known}"
        )
    path = named
    if not path:
        return None
    network = UserNetwork(path, images.classes)
    found = {key: tuple(value.shape) for key, value in samples.network(samples.rows[0]).items()}
    check_same(network.shapes, found, path, f"the networks of {samples.path}")
    network.check_answers(torch.from_numpy(images.images_NCHW[:2]))
    return network


def _recipe(samples: Samples, config: FinetuningConfig, network: UserNetwork | None) -> dict[str, Any]:
    recipe = recipe_of(samples.index["recipe"], config)
    if network is not None:
        return recipe | {"network::function": network.path, "network::source": network.source}
    if recipe["optim::optimizer"] not in OPTIMIZERS:
        raise InputError(
            f"config field finetuning.optimizer is {recipe['optim::optimizer']!r}, which trains only networks of "
            f"--network: choose {' or '.join(OPTIMIZERS)}"
        )
    return recipe


def _settings(config: FinetuningConfig) -> dict[str, Any]:
    """Those that change the results: how many networks are trained side by side does not."""
    return {name: value for name, value in to_dict(config).items() if name != "networks_at_once"}


def _images(samples: Samples, named: str) -> ImageData:
    wanted = samples.index["images"]
    if wanted is None:
        raise InputError(f"the networks of {samples.path} were sampled without images and cannot be run here")
    name = named or wanted["path"] or wanted["name"]
    images = load_images(name, seed=int(samples.index["recipe"].get("dataset::seed", 0)))
    if images.fingerprint != wanted["fingerprint"]:
        raise InputError(
            f"images {name!r} are not those that {samples.path} was sampled for (fingerprint {images.fingerprint} "
            f"instead of {wanted['fingerprint']}): name the right ones with --images, or sample for these"
        )
    return images


def run(config: FinetuneJob, dry_run: bool) -> None:
    """Fine-tunes, unless the results are there; prints the table, the verdict, and where everything is."""
    storage = default_storage(config.storage)
    plan = plan_of(config)
    already = check_output(plan)
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
                finetune(plan, config)
            results = read_results(plan.output)
            report(plan, results)
            log(plan, results, tracker, storage)
            (plan.output / LOGGED_FILE).touch()
    if already:
        print(f"nothing to do: {plan.output} holds the results of these samples and this config")
    print(ending(read_results(plan.output), plan.output, storage))


def finetune(plan: Plan, job: FinetuneJob) -> None:
    """Trains what is not trained yet, and writes the results."""
    start = time.monotonic()
    folder = plan.output / RECORDS_FOLDER
    members, pieces = zip(*pieces_of(plan), strict=True)
    epochs, images = plan.config.epochs, plan.images
    with Measuring(images, epochs, plan.epochs, folder, job.fan_out, "fine-tune", plan.network) as measuring:
        if known := measuring.known(pieces):
            print(f"going on   {known} of {len(pieces)} pieces are done already", flush=True)
        done = measuring(pieces)
    histories: dict[tuple[str, int], Histories] = {}
    failed: list[dict[str, Any]] = []
    for some, result in zip(members, done, strict=True):
        for place, (method, repetition) in enumerate(some):
            if isinstance(result, Failed):
                failed.append({"method": method, "repetition": repetition, "reason": result.reason})
            else:
                one = slice(place, place + 1)
                histories[method, repetition] = Histories(result.metrics_REM[one], result.logits_RTIC[one])
    if not histories:
        raise RuntimeError(f"none of the {len(failed)} networks could be trained: {failed[0]['reason']}")
    methods = methods_of(plan.samples.rows, histories)
    labels = plan.images.split("test")[1]
    write_rows(plan.output, ROWS_FILE, list(rows_of(methods)))
    _write_results(plan, methods, table_of(methods, plan.epochs, labels), failed, time.monotonic() - start)


def pieces_of(plan: Plan) -> Iterator[tuple[list[tuple[str, int]], Piece]]:
    """Networks that are trained together, and what is trained; those of one repetition have the same seed."""
    rows, size = plan.samples.rows, plan.config.networks_at_once
    for begin in range(0, len(rows), size):
        some = rows[begin : begin + size]
        networks = [plan.samples.network(row) for row in some]
        weights = {key: torch.stack([network[key] for network in networks]).numpy() for key in networks[0]}
        params = [{**plan.recipe, "seed": _seed(plan.config.seed, row["repetition"])} for row in some]
        yield [(row["method"], row["repetition"]) for row in some], Piece(params, weights)


def _seed(seed: int, repetition: int) -> int:
    return int(np.random.SeedSequence([seed, repetition]).generate_state(1)[0])


def _write_results(
    plan: Plan, methods: Sequence[Method], rows: list[dict[str, Any]], failed: list[dict[str, Any]], seconds: float
) -> None:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "identity": plan.digest,
        "name": plan.name,
        "samples": str(plan.samples.path),
        "settings": plan.identity,
        "images": {"name": plan.images.name, "classes": plan.images.classes},
        "table": rows,
        "failed": failed,
        "diverged": diverged(methods),
        "verdict": verdict(methods, sorted({0, min(1, plan.config.epochs), plan.config.epochs})),
        "compute": {"seconds": seconds, "cores": torch.get_num_threads()},
        "finished": time.time(),
    }
    aside = plan.output / f".{RESULTS_FILE}.{uuid.uuid4().hex[:8]}"
    aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(plan.output / RESULTS_FILE)


def read_results(output: Path) -> dict[str, Any]:
    """The content of results.json.

    Raises:
        InputError: it is missing or damaged, or of another version.
    """
    path = output / RESULTS_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it and run jobs/finetune.py again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise InputError(f"{path} is not what jobs/finetune.py of this version writes: name another folder")
    return content


def check_output(plan: Plan) -> bool:
    """Whether the folder already holds the results of this identity, of all networks.

    Raises:
        InputError: it holds others, or something else.
    """
    output = plan.output
    if (output / RESULTS_FILE).exists():
        results = read_results(output)
        if results["identity"] == plan.digest:
            return not results["failed"]
        raise InputError(
            f"{output} holds results with other settings: name another --output or --run-name, or delete it"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: name a new folder for the results")
    ours = {RECORDS_FOLDER, ROWS_FILE, PICTURES, REPORT_FILE}
    others = sorted(entry.name for entry in output.iterdir()) if output.exists() else []
    others = [name for name in others if name not in ours and not name.startswith(".")]
    if others:
        raise InputError(f"{output} holds other files ({', '.join(others[:3])}): name a new folder for the results")
    return False


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    rows, images = plan.samples.rows, plan.images
    methods = list(dict.fromkeys(row["method"] for row in rows))
    epochs, at_once = plan.config.epochs, plan.config.networks_at_once
    pieces = -(-len(rows) // at_once)
    counts = ", ".join(f"{len(part):,} {split}" for split, part in images.rows.items())
    return "\n".join(
        [
            f"samples    {plan.samples.path}: {len(rows)} networks of {len(methods)} methods",
            f"images     {images.name}: {'x'.join(map(str, images.shape))}, {images.classes} classes ({counts})",
            *([f"network    {plan.network.path}()"] if plan.network is not None else []),
            f"training   {epochs} epoch{'s' * (epochs != 1)}; table at {', '.join(map(str, plan.epochs))}",
            f"recipe     {described_recipe(plan.recipe, plan.samples.index['recipe'], plan.config)}",
            f"work       {pieces} piece{'s' * (pieces > 1)} of up to {at_once} network{'s' * (at_once > 1)} each",
            f"results    {plan.output}",
        ]
    )


def report(plan: Plan, results: Mapping[str, Any]) -> None:
    """Draws the pictures and writes the report beside the results."""
    history = pq.read_table(plan.output / ROWS_FILE).to_pylist()
    pictures = draw_finetuning(history, plan.samples.rows, plan.output / PICTURES)
    write_finetuning_report(results, plan.samples.index, pictures, plan.output / REPORT_FILE, this_command())


def log(plan: Plan, results: Mapping[str, Any], tracker: Tracker, storage: Path) -> None:
    """Hands everything to MLflow: results to the run, and the curve of each method to a run nested in it."""
    rows = pq.read_table(plan.output / ROWS_FILE).to_pylist()
    for method in dict.fromkeys(row["method"] for row in rows):
        with tracked(
            uri=default_uri(storage),
            experiment=EXPERIMENT,
            run_name=f"{plan.name} {method}",
            identity=f"{plan.name}-{plan.digest}-{method}",
            params={"method": method, **plan.identity},
            folder=storage / UNSENT_FOLDER,
            parent=tracker,
        ) as nested:
            nested.log(_curve([row for row in rows if row["method"] == method], results["finished"]))
    point: dict[str, object] = {"step": 0, "time": results["finished"]}
    for row in results["table"]:
        point[f"test_acc/epoch_{row['epoch']}/{row['method'].replace(':', '-')}"] = row["mean"]
    tracker.log([point])
    for name in (RESULTS_FILE, ROWS_FILE, REPORT_FILE):
        tracker.log_artifact(plan.output / name)
    tracker.log_folder(plan.output / PICTURES)


def _curve(rows: Sequence[Mapping[str, Any]], seconds: float) -> Iterator[dict[str, object]]:
    """Mean and deviation over networks, of those with finite numbers, a point an epoch.

    All have the time of the results: MLflow keeps one of two points that are equal, so that they may be sent again.
    """
    for epoch in sorted({row["epoch"] for row in rows}):
        point: dict[str, object] = {"step": epoch, "time": seconds, "epoch": epoch}
        for name in METRICS:
            values = np.array([row[name] for row in rows if row["epoch"] == epoch], dtype=float)
            finite = values[np.isfinite(values)]
            if len(finite):
                point[name], point[f"{name}_std"] = float(finite.mean()), float(finite.std())
        yield point


def _warnings(results: Mapping[str, Any]) -> Iterator[str]:
    failed, broken = results["failed"], results["diverged"]
    if failed:
        yield f"warning: {_networks(failed)} could not be trained: {failed[0]['reason']} (run again to try once more)"
    if broken:
        yield f"warning: {_networks(broken)} diverged (the loss is no number), and ensembles are without them"


def _networks(some: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(f"{one['method']} {one['repetition']}" for one in some[:3])
    return f"{len(some)} network{'s' * (len(some) > 1)} ({names}{', …' * (len(some) > 3)})"


def ending(results: Mapping[str, Any], output: Path, storage: Path) -> str:
    """The table, the verdict, where the results are and what to do next."""
    epochs = sorted({row["epoch"] for row in results["table"]})
    lines = [["method", *(f"epoch {epoch}" for epoch in epochs), "ensemble"]]
    for method in dict.fromkeys(row["method"] for row in results["table"]):
        mine = {row["epoch"]: row for row in results["table"] if row["method"] == method}
        cells = [f"{100 * mine[epoch]['mean']:.1f} ± {100 * mine[epoch]['std']:.1f}" for epoch in epochs]
        lines.append([method, *cells, f"{100 * mine[epochs[-1]]['ensemble_probabilities']:.1f}"])
    return "\n".join(
        [
            "",
            "accuracy on test images in %, mean ± deviation over networks; ensemble: all of them together, at the end",
            *table(lines),
            "",
            *results["verdict"],
            *_warnings(results),
            f"MLflow   {ui_command(default_uri(storage))}",
            f"results  {output} ({RESULTS_FILE}, {ROWS_FILE}, {PICTURES}); next: open {output / REPORT_FILE}",
        ]
    )
