"""Predicts properties of networks, reports and tracks that: what `jobs/predict.py` does, and what it says of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from sane_ray.cluster import default_storage, local_path
from sane_ray.config import EmbedJob, PredictJob
from sane_ray.embedding import Embeddings
from sane_ray.embedding.job import embed_telling, plan_of
from sane_ray.embedding.writing import Plan, is_complete
from sane_ray.errors import InputError
from sane_ray.properties.features import EmbeddingTables, Zoo, embedded_as
from sane_ray.properties.prediction import Prediction, check_output, facts_of, identity, predict, read_results
from sane_ray.properties.table import describe, results_table, zoo_line
from sane_ray.shell import this_command
from sane_ray.tokens.store import TokenStore
from sane_ray.tracking import UNSENT_FOLDER, Tracker, default_uri, tracked, ui_command

PICTURES, REPORT_FILE = "plots", "report.html"

LOGGED_FILE = ".logged"
"""In the folder of the results when they are reported and MLflow has been told."""

_SHOWN = 12
"""Digits of a fingerprint that a sentence tells."""

EXPERIMENT = "sane_ray properties"
"""Name of the MLflow experiment."""


def run(config: PredictJob, dry_run: bool) -> None:
    """Predicts, unless the results are there; prints the table, the verdict, and where everything is."""
    storage = default_storage(config.storage)
    if config.model and config.embeddings:
        raise InputError("--model embeds a store, and --embeddings are there already: name only one of them")
    if config.model:
        plan = embedding_plan(config, storage)
        if dry_run and not is_complete(plan):
            print(f"would embed {config.store} with {config.model} into {plan.output}, and then predict")
            return
        config = dataclasses.replace(config, embeddings=str(embed_telling(plan).path))
    zoos = open_zoos(config)
    digest, settings = identity(zoos, config.properties)
    name = config.run_name or "-".join([*(zoo.name for zoo in zoos), digest])
    output = local_path(config.output, "output") if config.output else storage / "properties" / name
    already = check_output(output, digest)
    prediction = Prediction(zoos, config.properties)
    if not already:
        prediction.check()
    if dry_run:
        print(describe(zoos, config.properties, output, prediction.doubts))
        print("dry run: nothing was started")
        return
    if already:
        print(f"nothing to do: {output} holds the results of these checkpoints and this config")
    for zoo in zoos:
        print(zoo_line(facts_of(zoo)), flush=True)
    if not (already and (output / LOGGED_FILE).exists()):
        with tracked(
            uri=default_uri(storage),
            experiment=EXPERIMENT,
            run_name=name,
            identity=f"{name}-{digest}",
            params=settings,
            folder=storage / UNSENT_FOLDER,
        ) as tracker:
            results = read_results(output) if already else predict_telling(prediction, output)
            report(results, prediction, output)
            log(results, output, tracker)
            (output / LOGGED_FILE).touch()
    print(ending(read_results(output), output, storage))


def predict_telling(prediction: Prediction, output: Path) -> dict[str, Any]:
    """Predicts; who interrupts that is told what is kept of it."""
    try:
        return predict(prediction.zoos, prediction.config, output, prediction)
    except KeyboardInterrupt:
        print("no results were written yet: the same command fits everything anew", file=sys.stderr)
        raise


def embedding_plan(config: PredictJob, storage: Path) -> Plan:
    """What ``jobs/embed.py --model MODEL --store STORE`` would do, into its default folder.

    Raises:
        InputError: No store is named, or it and the model do not fit.
    """
    if not config.store:
        raise InputError("--store is missing: name the token store that --model embeds")
    return plan_of(EmbedJob(model=config.model, store=config.store), storage)


def open_zoos(config: PredictJob) -> list[Zoo]:
    """The zoo, and the other one where there is one.

    Raises:
        InputError: Neither embeddings nor a store are named, or what is named does not fit together.
    """
    if not config.embeddings and not config.store:
        raise InputError("nothing to predict from: name --embeddings EMBEDDINGS, --store STORE, or both")
    zoos = [open_zoo(config.embeddings, config.store, "")]
    if config.other_embeddings or config.other_store:
        zoos.append(open_zoo(config.other_embeddings, config.other_store, "other-"))
        check_differ(*zoos)
        check_other(zoos)
    return zoos


def open_zoo(embeddings: str, store: str, prefix: str) -> Zoo:
    """A zoo by the values of its two flags; a store that only the embeddings name may be gone."""
    fields = prefix.replace("-", "_")
    embedded = open_embeddings(embeddings, f"{fields}embeddings") if embeddings else None
    if store:
        opened: TokenStore | None = TokenStore.open(local_path(store, f"{fields}store"))
    else:
        opened = named_store(embedded)
    if embedded is not None and opened is not None:
        source = embedded.index.get("source", {})
        if source.get("kind") == "store" and source.get("fingerprint") not in (None, opened.fingerprint):
            raise InputError(
                f"--{prefix}embeddings {embeddings} are of the store {source.get('path')} as it was with fingerprint "
                f"{source['fingerprint'][:_SHOWN]}, but {opened.path} has {opened.fingerprint[:_SHOWN]}: embed this "
                "one, or name that one"
            )
    where = opened.path if opened is not None else local_path(embeddings, f"{fields}embeddings")
    return Zoo(where.name, opened, embedded)


def open_embeddings(folder: str, field: str) -> Embeddings:
    """What ``jobs/embed.py`` wrote."""
    return Embeddings.open(local_path(folder, field))


def named_store(embeddings: EmbeddingTables | None) -> TokenStore | None:
    """The store that embeddings were made from, if it is still there."""
    source: dict[str, Any] = {} if embeddings is None else embeddings.index.get("source", {})
    if source.get("kind") != "store" or not Path(source["path"]).exists():
        return None
    return TokenStore.open(source["path"])


def check_differ(first: Zoo, other: Zoo) -> None:
    """Raises ``InputError`` if two zoos are one: the same embeddings, or of the same networks."""
    folders = [zoo.embeddings.path for zoo in (first, other) if isinstance(zoo.embeddings, Embeddings)]
    same_folder = len(folders) == 2 and folders[0].samefile(folders[1])
    if same_folder or _networks(first) & _networks(other):
        what = folders[1] if folders[1:] else other.store.path if other.store is not None else other.name
        raise InputError(
            f"{what} is the zoo that is predicted already, not another one: name another zoo by --other-embeddings "
            "or --other-store, or leave both out"
        )


def _networks(zoo: Zoo) -> set[str]:
    """Fingerprints of what the networks of a zoo were read from."""
    source = {} if zoo.embeddings is None else zoo.embeddings.index.get("source", {})
    return {known for known in (source.get("fingerprint"), zoo.store and zoo.store.fingerprint) if known}


def check_other(zoos: list[Zoo]) -> None:
    """Raises ``InputError`` where the embeddings of the two zoos are not by one model in one way, so not comparable."""
    indices = [zoo.embeddings.index for zoo in zoos if zoo.embeddings is not None]
    models = [index.get("model", {}) for index in indices]
    if len(models) == 2 and models[0].get("fingerprint") != models[1].get("fingerprint"):
        raise InputError(
            f"--embeddings are by the model {models[0].get('path')} and --other-embeddings by {models[1].get('path')}: "
            "embed both zoos with one model"
        )
    if len(indices) == 2:
        _check_alike(*map(embedded_as, indices))
    if zoos[0].name == zoos[1].name:
        zoos[1] = Zoo(f"{zoos[1].name}-other", zoos[1].store, zoos[1].embeddings)


def _check_alike(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, value in first.items():
        if None not in (value, second[name]) and value != second[name]:
            raise InputError(
                f"--embeddings were made with {name} {value}, --other-embeddings with {name} {second[name]}: embed "
                f"both zoos with one --embedding.{name}"
            )


def report(results: dict[str, Any], prediction: Prediction, output: Path) -> None:
    """Draws the pictures and writes the report beside the results."""
    from sane_ray.analysis.attribution import layers_behind  # scipy and matplotlib take seconds to import
    from sane_ray.analysis.depth import spectra_of_store
    from sane_ray.analysis.pictures import best_row, draw_embeddings, draw_predictions
    from sane_ray.analysis.reports import write_prediction_report

    zoo = prediction.zoos[0]
    rows = [row for row in results["rows"] if row["protocol"] == "split"]
    best = {target.name: best_row(rows, target.name) for target in prediction.targets}
    fits = {name: (row["features"], row["probe"]) for name, row in best.items() if row is not None}
    pictures = draw_predictions(output, output / PICTURES, layers_behind(prediction, fits))
    if isinstance(zoo.embeddings, Embeddings):
        spectra = spectra_of_store(zoo.store) if zoo.store is not None else None
        colours = {one.name: one.values_R[: len(zoo)].tolist() for one in prediction.targets if one.usable}
        pictures += draw_embeddings(zoo.embeddings, output / PICTURES, spectra, colours)
    write_prediction_report(results, pictures, output / REPORT_FILE, this_command())


def log(results: dict[str, Any], output: Path, tracker: Tracker) -> None:
    """Hands the metrics of the zoo's own split and the result files to MLflow."""
    point: dict[str, object] = {"step": 0}
    for row in results["rows"]:
        if row["protocol"] == "split":
            for metric in ("r2", "tau", "mae", "accuracy"):
                if metric in row:
                    point[f"{metric}/{row['target']}/{row['features']}/{row['probe']}"] = row[metric]
    tracker.log([point])
    for file in sorted(output.iterdir()):
        if file.is_file():
            tracker.log_artifact(file)
    tracker.log_folder(output / PICTURES)


def ending(results: dict[str, Any], output: Path, storage: Path) -> str:
    """The tables, the verdict, where the results are and what to do next."""
    seconds, mlflow = results["compute"]["seconds"], ui_command(default_uri(storage))
    return "\n".join(
        [
            *results_table(results),
            "",
            *results["verdict"],
            f"took     {seconds:,.0f} s; MLflow: {mlflow}",
            f"results  {output} (results.json, results.parquet, predictions.parquet, {PICTURES}); "
            f"next: open {output / REPORT_FILE}",
        ]
    )
