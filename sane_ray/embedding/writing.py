"""Embeds the networks of a token store or of a source into a folder, with Ray Data, and goes on where a run ended.

The input is cut into units that depend on it alone. Each is embedded by an actor (or, where there is little to do, in
this process) and written as a part, complete or not there. When all parts are there, the tables are made of them and
``embeddings.json`` is written: the folder is complete. A run with another model, other networks or other settings in
the same folder is refused. The number format that ``embedding.precision auto`` comes to is chosen when a folder is
begun, recorded, and kept by whoever goes on with it, so that no table mixes two. Reading is
``sane_ray.embedding.reading``, and needs no Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from sane_ray import __version__
from sane_ray.autoencoder.model import CONFIG_FILE, SANE, WEIGHTS_FILE
from sane_ray.cluster import connect, named_address
from sane_ray.config import EmbeddingConfig, WorkersConfig
from sane_ray.embedding.encoder import QUANTILES, Embedder, choose_format, window_and_halo
from sane_ray.embedding.networks import (
    CheckpointNetworks,
    LeftOut,
    Networks,
    StoredNetworks,
    Unit,
    Unreadable,
    prepared_of_store,
    units_of_records,
    units_of_store,
)
from sane_ray.embedding.parts import PARTS_FOLDER, Gathered, Part, gather, part_folder
from sane_ray.embedding.preprocessing import Preprocessing
from sane_ray.embedding.reading import FORMAT, IDENTITY_FILE, INDEX_FILE, VERSION, Embeddings, read_index
from sane_ray.errors import InputError
from sane_ray.preflight import Resources, preflight
from sane_ray.tokens.store.inputs import SMALL_BYTES, look
from sane_ray.tokens.store.progress_bar import progress_bar
from sane_ray.tokens.store.reading import TokenStore, file_digest, json_digest, settings_of
from sane_ray.zoo.readers import Record, bare
from sane_ray.zoo.tables import text_column, value_columns

SMALL_CHECKPOINTS = 20_000
"""So many, if they are small too, are embedded in this process in less time than Ray takes to start."""

_LOCK = ".lock"
_NO_MATTER = ("tokens_at_once",)
"""Settings that change how the work is done, not what comes out (but for the rounding of float sums)."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is to be embedded, with what, and where to."""

    model: Path
    config: EmbeddingConfig
    output: Path
    source: dict[str, Any]
    """Of the networks: ``kind`` (store, catalog or path), ``path``, ``fingerprint``."""
    units: list[Unit]
    known: Callable[[NDArray[np.int64]], dict[str, Any]]
    """What the input says of some of its checkpoints: columns."""
    ids: Callable[[int], str]
    size: float
    """Bytes of the tokens or weights."""
    refused: dict[str, str]
    """Architectures of a store that the model cannot read, and why."""
    warnings: list[str] = field(default_factory=list)
    """What may make the embeddings worse than those of training."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the model: ``model_fingerprint``."""
        return model_fingerprint(self.model)

    @property
    def checkpoints(self) -> int:
        """How many there are to embed."""
        return sum(len(unit.rows) for unit in self.units)

    @property
    def checkpoints_done(self) -> int:
        """How many of them are embedded already, in parts that are whole."""
        return self.checkpoints - sum(len(unit.rows) for unit in _missing(self))

    @property
    def is_small(self) -> bool:
        """Whether they are few and small: embedded in less time than Ray takes to start."""
        return self.checkpoints <= SMALL_CHECKPOINTS and self.size <= SMALL_BYTES

    def runs_here(self, cluster: WorkersConfig) -> bool:
        """Whether they are embedded in this process, without Ray.

        What is small is, unless GPUs are asked for that are not here, or several workers that there is work for. A
        large checkpoint is one unit, which a second worker cannot help with: it is embedded here too, unless a cluster
        is named that may have the GPU that is not here.
        """
        gpu_here = torch.cuda.is_available()
        if cluster.gpu == "yes" and not gpu_here:
            return False
        if len(self.units) > 1:
            return self.is_small and cluster.max_workers == 1
        return self.is_small or gpu_here or cluster.gpu == "no" or not named_address(cluster)

    def place(self, cluster: WorkersConfig) -> str:
        """Where they are embedded, in words."""
        if not self.runs_here(cluster):
            return "by actors on Ray"
        if cluster.max_workers == 1:
            return "in this process"
        return (
            f"in this process although cluster.num_workers is {cluster.num_workers}: they are one unit of work, which "
            "a second worker cannot help with"
        )

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings: another run in the same folder must have the same.

        But for ``precision`` where it is ``auto``: the folder has what that came to, and any run goes on with it.
        """
        settings = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in _NO_MATTER}
        return {
            "version": VERSION,
            "model": self.fingerprint,
            "networks": self.source["fingerprint"],
            "settings": settings,
        }


def plan_store(model: Path, store: TokenStore, output: Path, config: EmbeddingConfig) -> Plan:
    """Looks at a model and a token store, and reads no tokens.

    Raises:
        InputError: The model cannot be used, or reads none of the store's architectures.
    """
    opened = SANE.from_pretrained(model)
    window_and_halo(opened.config, config)
    preprocessing = Preprocessing(opened)
    prepared = prepared_of_store(store, preprocessing)
    refused = {name: one for name, one in prepared.items() if isinstance(one, str)}
    if len(refused) == len(prepared):
        raise InputError(f"token store {store.path}: {_first(list(refused.values()))}")
    kept = ["id", "model", "epoch", "split"]
    kept += [name for name in store.models.column_names if name.startswith("property.")]

    def known(rows: NDArray[np.int64]) -> dict[str, Any]:
        return {name: store.models[name].take(rows) for name in kept}

    source = {"kind": "store", "path": str(store.path), "fingerprint": store.fingerprint}
    ids = store.models["id"]
    return Plan(
        model, config, output, source, units_of_store(store), known, lambda row: ids[row].as_py(),
        float(store.num_bytes), refused, preprocessing.warnings_of(settings_of(store).get("align", "none")),
    )  # fmt: skip


def plan_records(
    model: Path, records: Sequence[Record], path: Path, output: Path, config: EmbeddingConfig, *, catalog: bool = False
) -> Plan:
    """Looks at a model and at the sizes of checkpoints, and reads no weights.

    Args:
        model: Folder of the model.
        records: The checkpoints.
        path: What the user named them by.
        output: Folder of the embeddings.
        config: How to embed.
        catalog: Whether the path is a catalog.

    Raises:
        InputError: The model cannot be used.
    """
    opened = SANE.from_pretrained(model)
    window_and_halo(opened.config, config)
    warnings = Preprocessing(opened).warnings_of("none", alone=len(records) == 1)
    shared = Counter(record.path for record in records)
    looks = {place: look(place) for place in shared}
    sizes = [max(looks[record.path][0], 0) / shared[record.path] for record in records]
    listing = [[record.id, record.member, *looks[record.path]] for record in records]

    def known(rows: NDArray[np.int64]) -> dict[str, Any]:
        some = [records[row] for row in rows]
        return {
            "id": text_column([record.id for record in some]),
            "model": text_column([record.model for record in some]),
            "epoch": pa.array([record.epoch for record in some], pa.int64()),
            "split": pa.array([record.split for record in some], pa.string()),
        } | value_columns("property", [record.properties for record in some])

    source = {"kind": "catalog" if catalog else "path", "path": str(path), "fingerprint": json_digest(listing)}
    units = units_of_records([bare(record) for record in records], sizes)
    return Plan(model, config, output, source, units, known, lambda row: records[row].id, sum(sizes), {}, warnings)


def is_complete(plan: Plan) -> bool:
    """Whether these embeddings are already there.

    Raises:
        InputError: The folder holds other embeddings (says what differs), or something else.
    """
    output = plan.output
    if not output.exists() or not any(output.iterdir()):
        return False
    complete, begun = (output / INDEX_FILE).exists(), (output / IDENTITY_FILE).exists()
    if not complete and not begun:
        found = sorted(entry.name for entry in output.iterdir() if entry.name not in (_LOCK, f".{IDENTITY_FILE}"))
        if not found:
            return False
        raise InputError(
            f"--output {output} holds other files ({', '.join(found[:3])}): name a new folder for the embeddings"
        )
    made = read_index(output)["identity"] if complete else _read_identity(output)
    if differences := _differences(made, plan.identity()):
        raise InputError(
            f"--output {output} holds embeddings that {'; '.join(differences)}: name another --output, or delete it"
        )
    return complete


def embed(plan: Plan, cluster: WorkersConfig | None = None) -> Embeddings:
    """Embeds what is not embedded yet, on the Ray that ``cluster`` names, or in this process where that is little.

    Raises:
        InputError: Nothing could be embedded, another run is writing the folder, or it holds something else.
    """
    cluster = cluster or WorkersConfig()
    with _held(plan.output):
        if not is_complete(plan):
            plan = _as_begun(plan)
            if missing := _missing(plan):
                with _workers(plan, cluster) as workers:
                    plan = _begin(plan, workers)
                    _make_parts(plan, missing, workers)
            _finish(plan)
    return Embeddings.open(plan.output)


Workers = Resources | torch.device
"""Who embeds: actors of these resources, or this process on this device."""


@contextlib.contextmanager
def _workers(plan: Plan, cluster: WorkersConfig) -> Iterator[Workers]:
    """This process, or a connected Ray that has what is asked for."""
    if plan.runs_here(cluster):
        if cluster.max_workers > 1:
            _LOG.warning("the networks are embedded %s", plan.place(cluster))
        yield torch.device("cuda" if cluster.gpu != "no" and torch.cuda.is_available() else "cpu")
        return
    with connect(cluster):
        yield preflight(cluster, storage=plan.output)


def _as_begun(plan: Plan) -> Plan:
    """The plan with the number format of the parts that are there, if it leaves that open."""
    if plan.config.precision != "auto" or not (plan.output / IDENTITY_FILE).exists():
        return plan
    precision = _read_identity(plan.output)["settings"]["precision"]
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, precision=precision))


def _begin(plan: Plan, workers: Workers) -> Plan:
    """Writes down what is made here, and in which number format: of the plan as it comes back."""
    if plan.config.precision == "auto":
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, precision=precision_of(workers)))
    try:
        _write_json(plan.output / IDENTITY_FILE, plan.identity())
        (plan.output / PARTS_FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(_cannot_be_written(plan.output, error)) from error
    return plan


def precision_of(workers: Workers) -> Literal["float32", "bfloat16"]:
    """What ``embedding.precision auto`` comes to: bfloat16 for actors with GPUs, whatever this process runs on.

    Actors without are taken to have CPUs like this one. All workers are told the same, and can do either: one that
    cannot multiply bfloat16 natively does so more slowly.
    """
    if isinstance(workers, Resources) and workers.gpu:
        return "bfloat16"
    device = torch.device("cpu") if isinstance(workers, Resources) else workers
    return "bfloat16" if choose_format("auto", device) == torch.bfloat16 else "float32"


def _missing(plan: Plan) -> list[Unit]:
    """Units whose parts are not there."""
    return [unit for unit in plan.units if not part_folder(plan.output, unit.number).exists()]


def _make_parts(plan: Plan, missing: Sequence[Unit], workers: Workers) -> None:
    """Every part that is not there."""
    for left in (plan.output / PARTS_FOLDER).glob(".*"):
        shutil.rmtree(left, ignore_errors=True)
    with progress_bar("embed networks", plan.checkpoints, unit="network") as progress:
        progress.update(plan.checkpoints_done)
        for unit, error in _embedded(plan, missing, workers):
            if error:
                raise InputError(error)
            if not part_folder(plan.output, unit.number).exists():
                raise InputError(
                    f"{part_folder(plan.output, unit.number)} was written by another node and is not here: --output "
                    "must be on a file system that all nodes share"
                )
            progress.update(len(unit.rows))


def _embedded(plan: Plan, units: Sequence[Unit], workers: Workers) -> Iterator[tuple[Unit, str]]:
    """Each unit when its part is written, and an error or nothing."""
    settings = Settings(
        str(plan.model), plan.source["path"] if plan.source["kind"] == "store" else "", str(plan.output), plan.config
    )
    if isinstance(workers, Resources):
        yield from _on_ray(settings, units, workers)
        return
    worker = Worker(settings, workers)
    yield from ((unit, worker.embed(unit)) for unit in units)


def _on_ray(settings: Settings, units: Sequence[Unit], resources: Resources) -> Iterator[tuple[Unit, str]]:
    """By a pool of actors, each with the model. The part of an actor that dies is made by another.

    Ray tells once that the actors have arguments in its object store. Those are Ray Data's own, put there by the
    operator of this process, which keeps them as long as it runs: actors can be started again.
    """
    import ray.data

    by_number = {unit.number: unit for unit in units}
    most = min(resources.max_workers, len(units))
    dataset = ray.data.from_items(
        [{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=len(units)
    ).map_batches(
        _Actor,
        fn_constructor_kwargs={"settings": settings, "resources": resources},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(resources.min_workers, most), max_size=most, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=resources.cpus_per_worker,
        num_gpus=1 if resources.gpu else 0,
    )
    for row in dataset.iter_rows():
        yield by_number[int(row["number"])], str(row["error"])


@dataclass(frozen=True)
class Settings:
    """What every worker is told."""

    model: str
    store: str
    """Token store; empty where units bring their records."""
    output: str
    config: EmbeddingConfig


class Worker:
    """Embeds units; the model is read once."""

    def __init__(self, settings: Settings, device: str | torch.device) -> None:
        self._output, self._config = Path(settings.output), settings.config
        model = SANE.from_pretrained(settings.model)
        preprocessing = Preprocessing(model)
        self._embedder = Embedder(model, settings.config, device)
        self._networks: Networks = (
            StoredNetworks(TokenStore.open(settings.store), preprocessing)
            if settings.store
            else CheckpointNetworks(preprocessing)
        )

    def embed(self, unit: Unit) -> str:
        """Writes the part of a unit; an error in words, or nothing."""
        folder = part_folder(self._output, unit.number)
        try:
            part = Part(folder, self._embedder.model.config.latent_dim, self._config.token_dtype)
            try:
                self._fill(part, unit)
                part.write()
            finally:
                part.drop()
        except OSError as error:
            return _cannot_be_written(folder, error)
        except InputError as error:
            return str(error)
        return ""

    def _fill(self, part: Part, unit: Unit) -> None:
        for batch in self._networks.batches(unit, self._embedder.networks_at_once):
            if isinstance(batch, LeftOut):
                part.left_out.append(batch)
                continue
            keep = part.keeper(batch) if self._config.tokens else None
            try:
                summary = self._embedder.embed(batch.read, batch.prepared.table, len(batch.rows), keep)
            except Unreadable as error:
                part.discard(batch, str(error))
            else:
                part.add(batch, summary)


class _Actor:
    """``Worker`` as Ray Data calls it."""

    def __init__(self, settings: Settings, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self._worker = Worker(settings, "cuda" if resources.gpu else "cpu")

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        units = [pickle.loads(unit) for unit in batch["unit"]]
        errors = [self._worker.embed(unit) for unit in units]
        return {"number": np.array([unit.number for unit in units]), "error": np.array(errors, dtype=object)}


def _finish(plan: Plan) -> None:
    """Tables from the parts, and then embeddings.json, which makes them complete; parts go last."""
    gathered = gather(plan.output, [unit.number for unit in plan.units], plan.known)
    left_out = [{"id": plan.ids(row), "reason": reason} for row, reason in sorted(gathered.left_out.items())]
    if not len(gathered.rows):
        shutil.rmtree(plan.output / PARTS_FOLDER, ignore_errors=True)
        (plan.output / IDENTITY_FILE).unlink(missing_ok=True)
        reasons = [f"{one['id']}: {one['reason']}" for one in left_out]
        raise InputError(
            f"none of {len(left_out):,} checkpoints of {plan.source['path']} can be embedded: {_first(reasons)}"
        )
    _write_json(plan.output / INDEX_FILE, _index(plan, gathered, left_out))
    shutil.rmtree(plan.output / PARTS_FOLDER)
    (plan.output / IDENTITY_FILE).unlink()


def _index(plan: Plan, gathered: Gathered, left_out: list[dict[str, str]]) -> dict[str, Any]:
    model = SANE.from_pretrained(plan.model)
    window, halo = window_and_halo(model.config, plan.config)
    return {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"sane_ray {__version__}",
        "model": {
            "path": str(plan.model),
            "fingerprint": plan.fingerprint,
            "provenance": model.provenance,
        },
        "source": plan.source,
        "latent_dim": model.config.latent_dim,
        "token_size": model.config.token_size,
        "window": window,
        "halo": halo,
        "quantiles": list(QUANTILES),
        "architectures": gathered.architectures,
        "trained_on": gathered.trained_on,
        "left_out": left_out,
        "warnings": plan.warnings,
        "rows": {"models.parquet": len(gathered.rows), "layers.parquet": gathered.layers},
        "settings": dataclasses.asdict(plan.config),
        "identity": plan.identity(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: what was there before stays until it is written."""
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _read_identity(output: Path) -> dict[str, Any]:
    """What a run that has not ended was making.

    Raises:
        InputError: It cannot be read.
    """
    path = output / IDENTITY_FILE
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}), so nobody knows what was being embedded there: delete {output} and run "
            "the job again, or name another --output"
        ) from error
    if not isinstance(made, dict) or not isinstance(made.get("settings"), dict):
        raise InputError(f"{path} does not say what was being embedded there: delete {output} and run the job again")
    return made


def _cannot_be_written(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot be written ({error}); free some space, or name another --output"


def model_fingerprint(model: Path) -> str:
    """Identifies what a model does: weights, shape and preprocessing, whatever its provenance."""
    config = json.loads((model / CONFIG_FILE).read_text(encoding="utf-8"))
    return json_digest([file_digest(model / WEIGHTS_FILE), config["autoencoder"], config["preprocessing"]])


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What of the identity is another, in words that follow "embeddings that"."""
    if made.get("version") != wanted["version"]:
        return ["another version of sane_ray has made"]
    words = {"model": "another model has made", "networks": "are of other networks, or of the same as they were before"}
    differences = [text for name, text in words.items() if made.get(name) != wanted[name]]
    old, new = made["settings"], wanted["settings"]
    return differences + [
        f"were made with embedding.{name} {old.get(name)!r}, which is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and (name, new.get(name)) != ("precision", "auto")
    ]


@contextlib.contextmanager
def _held(output: Path) -> Iterator[None]:
    """The folder, made if it is missing, and nobody else writing it; removed again if nothing came into it.

    The lock's file goes while it is still held: afterwards it may already be another's. Who waits on a file that went
    takes a new one (``filelock`` looks at its links).

    Raises:
        InputError: Another run holds it, or it cannot be made.
    """
    lock = FileLock(output / _LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"--output {output}: another run is writing it; wait for its end, or name another") from error
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error}): name another") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (output / _LOCK).unlink()
            if not any(output.iterdir()):
                output.rmdir()
        lock.release()


def _first(reasons: Sequence[str]) -> str:
    more = f" (and {len(reasons) - 1:,} more)" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}"
