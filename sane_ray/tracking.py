"""The one MLflow writer of every job: one run per identity, which a server that is away neither stops nor thins out.

Everything is first written to a file beside the results (the *spool*, JSON lines) and leaves it once MLflow has it, so
an outage, a killed process and a server that was never up are one case. What is pending can be sent at any later time
with ``python -m sane_ray.tracking SPOOL_FILE``. Sending a line twice does no harm: of two metrics that are equal in
name, step, time and value, MLflow's database keeps one.

Never touches MLflow's process-wide state (active run, tracking URI), imports Ray, or raises because of a server.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import operator
import os
import re
import shlex
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from sane_ray.errors import InputError
from sane_ray.shell import command

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_LENGTH = 6000
NAME_LENGTH = 250
"""MLflow's limits: metrics and parameters of one request, characters of a parameter's value and of a name."""

REQUEST_SECONDS = 10
UPLOAD_SECONDS = 600
"""How long one request may take, and one whose server may be passing a large file on."""

SEND_SECONDS = 2.0
"""How long one call of `Tracker.log` goes on sending what had been kept; the rest waits for the next call."""

FIRST_WAIT, LONGEST_WAIT, WAIT_RATIO = 5.0, 60.0, 50.0
"""Seconds between tries in an outage: doubling from the first to the longest, and at least 50 times what a try took, so
that a server which hangs costs a training 2 % of its time."""

PARENT_TAG = "mlflow.parentRunId"
"""MLflow's own: shows a run as nested in another."""

IDENTITY_TAG = "sane_ray.identity"
STEP_TAG = "sane_ray.last_step"

_log = logging.getLogger(__name__)

Record = dict[str, Any]
"""One line of a spool: a point (step, time, metrics), a status, or an artifact."""


UNSENT_FOLDER = ".mlflow-unsent"
"""Under the storage root: what jobs without a run's folder of their own could not send yet."""


def default_uri(storage: Path) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else an SQLite database in `storage`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.absolute().as_posix()}/mlflow.db"


def ui_command(uri: str) -> str:
    """What a user types or opens to look at the runs: a command for a local database, the address of a server."""
    if uri.startswith("sqlite:"):
        return f"{command('mlflow')} ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1 --port 5000"
    return _redacted(uri)


class Tracker:
    """One MLflow run, written from one place at a time.

    Pickles as the run's description, its id and the spool's path, so it can travel to Ray Train's controller while the
    driver keeps its own copy: both append to the same spool under a file lock.
    """

    def __init__(self, run: _Run, spool: Path, run_id: str | None = None, last_step: int = -1) -> None:
        self._run = run
        self._spool = _Spool(spool, run)
        self._run_id = run_id
        self._last_step = last_step
        self._forget_outage()

    @classmethod
    def start(
        cls,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        identity: str,
        params: Mapping[str, object],
        folder: Path,
        tags: Mapping[str, str] | None = None,
    ) -> Tracker:
        """Creates the MLflow run of `identity`, or opens the one that has it, and sets it to running.

        A server that cannot be reached does not matter: the run is then created as soon as it answers.

        Args:
            uri: an MLflow server (``http://...``) or an SQLite database (``sqlite:///...``); see `default_uri`.
            experiment: name of the MLflow experiment, created if missing.
            run_name: name of the run in MLflow.
            identity: what makes it the same run after a restart, such as its name and the hash of its config.
            params: the run's config, nested; MLflow's parameters cannot change, so the first value of a name stays.
            folder: the run's folder, where what could not be sent is kept; created if missing.
            tags: further tags of the run.

        Raises:
            InputError: `uri` is something else, or a name cannot be used.
        """
        if "'" in identity:
            raise InputError(f"tracking identity {identity!r} holds an apostrophe: leave it out of the run's name")
        run = _Run(
            uri=_usable(uri),
            experiment=experiment,
            run_name=run_name,
            identity=identity,
            params=flatten(params),
            tags={**(tags or {}), IDENTITY_TAG: identity},
        )
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256("\0".join((run.uri, experiment, identity)).encode()).hexdigest()[:8]
        tracker = cls(run, folder.absolute() / f"mlflow-unsent-{digest}.jsonl")
        tracker._last_step = max((record.get("step", -1) for record in tracker._spool.read()), default=-1)
        tracker._keep([{"status": "RUNNING", "time": _milliseconds()}])
        tracker._send(SEND_SECONDS)
        return tracker

    @classmethod
    def from_spool(cls, path: Path, uri: str | None = None) -> Tracker:
        """The tracker that left a spool behind, to send it; `uri` if MLflow is at another address by now.

        Raises:
            InputError: no such file, or not a spool.
        """
        run = _Run.from_spool(path)
        return cls(dataclasses.replace(run, uri=_usable(uri or run.uri)), path.absolute())

    @property
    def uri(self) -> str:
        """Where MLflow is."""
        return self._run.uri

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while the server has not been reached yet."""
        return self._run_id

    @property
    def spool(self) -> Path:
        """File that holds what is not sent yet; absent when everything is."""
        return self._spool.path

    def log(self, points: Iterable[Mapping[str, object]], *, new_steps_only: bool = False) -> None:
        """Logs metrics; takes a few milliseconds, or none in an outage.

        Args:
            points: ``{"step": int, "time": seconds since 1970, name: number, ...}``; the default time is now, and None
                is no value. Characters that MLflow refuses in a name become underscores.
            new_steps_only: leave out the steps up to the last one logged before this call, also by a process before
                this one: a training that resumes from a checkpoint repeats a few.

        Raises:
            InputError: a point without step, a value that is not a number, or two names that become one.
        """
        records = [record for point in points for record in _point_records(point)]
        if new_steps_only:
            records = [record for record in records if record["step"] > self._last_step]
        if not records:
            return
        self._keep(records)
        self._last_step = max(self._last_step, *(record["step"] for record in records))
        if time.monotonic() >= self._next_try:
            self._send(SEND_SECONDS)

    def rewind(self, step: int) -> None:
        """Counts steps after this one as new again; MLflow then has both values of a step, the later one last."""
        self._last_step = min(self._last_step, step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads one file into `folder` of the run's artifacts; in an outage as soon as it is over.

        Raises:
            InputError: no such file.
        """
        if not path.is_file():
            raise InputError(f"artifact {path} is not a file")
        self._log_path(path, folder)

    def log_folder(self, path: Path, folder: str | None = None) -> None:
        """Uploads what is in a folder into `folder` (by default its own name) of the run's artifacts.

        Raises:
            InputError: no such folder.
        """
        if not path.is_dir():
            raise InputError(f"artifact {path} is not a folder")
        self._log_path(path, path.name if folder is None else folder)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> bool:
        """Ends the run and sends everything; what cannot be sent stays in the spool, and a warning says how to send it.

        Returns:
            Whether MLflow has everything.
        """
        self._keep([{"status": status, "time": _milliseconds()}])
        return self.flush()

    def flush(self) -> bool:
        """Sends what is kept, in up to three tries over four seconds; True if nothing is left."""
        for pause in (0, 1, 3):
            time.sleep(pause)
            if self._send(float("inf"), quiet=True):
                return True
        _log.warning(
            "%d records of run %s could not be sent to MLflow at %s (%s). They are kept in %s; "
            "when it answers, send them with:\n    python -m sane_ray.tracking %s",
            len(self._spool.read()),
            self._run.run_name,
            _redacted(self.uri),
            self._reason,
            self.spool,
            shlex.quote(str(self.spool)),
        )
        return False

    def __getstate__(self) -> dict[str, object]:
        """What travels to another process: not the state of an outage."""
        return {"run": self._run, "spool": self.spool, "run_id": self._run_id, "last_step": self._last_step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` gave."""
        self.__init__(**state)  # type: ignore[misc]

    def _forget_outage(self) -> None:
        self._away, self._failures, self._next_try, self._reason = False, 0, 0.0, ""

    def _log_path(self, path: Path, folder: str | None) -> None:
        self._keep([{"artifact": str(path.absolute()), "folder": folder or None}])
        if time.monotonic() >= self._next_try:
            self._send(SEND_SECONDS)

    def _keep(self, records: Sequence[Record]) -> None:
        with self._spool.locked():
            self._spool.append(records)

    def _send(self, seconds: float, quiet: bool = False) -> bool:
        """Sends the spool for about that long, oldest first; True if nothing is left. Sets when to try again."""
        began = time.monotonic()
        with self._spool.locked():
            pending = sorted(
                self._spool.read(), key=lambda record: "artifact" in record
            )  # a refused file blocks no metric
            sent, failed = 0, False
            try:
                client = _client(self.uri)
                began = time.monotonic()  # without the seconds it may take to import MLflow or to create a database
                run_id = self._open(client)
                for batch in _batches(pending):
                    _send_batch(client, run_id, batch)
                    sent += len(batch)
                    if time.monotonic() - began > seconds:
                        break
            except Exception as error:  # of MLflow, requests, SQLAlchemy or the disk: none of them may stop a training
                failed, self._reason = True, _short(error)
            left = pending[sent:]
            if sent or not failed:
                self._spool.replace(left)
        cost = time.monotonic() - began
        if failed:
            self._failed(cost, quiet)
        else:
            self._succeeded(cost, sent)
        return not left

    def _failed(self, cost: float, quiet: bool) -> None:
        wait = min(FIRST_WAIT * 2**self._failures, LONGEST_WAIT)
        self._failures += 1
        self._next_try = time.monotonic() + max(wait, WAIT_RATIO * cost)
        if not self._away and not quiet:
            _log.warning(
                "MLflow at %s cannot be written (%s). Work goes on: what belongs there is kept in %s and sent later.",
                _redacted(self.uri),
                self._reason,
                self.spool,
            )
            self._away = True

    def _succeeded(self, cost: float, sent: int) -> None:
        if self._away:
            _log.warning("MLflow at %s can be written again: %d kept records were sent.", _redacted(self.uri), sent)
        self._forget_outage()
        if cost > SEND_SECONDS / 2:  # a slow server gets larger batches, less often
            self._next_try = time.monotonic() + WAIT_RATIO * cost

    def _open(self, client: MlflowClient) -> str:
        """The id of the run, found or created."""
        if self._run_id is None:
            with _limits(REQUEST_SECONDS):
                self._run_id, last_step = _find_or_create(client, self._run)
            self._last_step = max(self._last_step, last_step)
        return self._run_id


@contextmanager
def tracked(
    *,
    uri: str,
    experiment: str,
    run_name: str,
    identity: str,
    params: Mapping[str, object],
    folder: Path,
    parent: Tracker | None = None,
) -> Iterator[Tracker]:
    """An MLflow run for the block's duration, ended as what really happened: ``Tracker.start`` has the arguments.

    It is nested in the run of ``parent``, if that is known by now: while the server is away it is not, and the run
    stands by itself.
    """
    tags = {PARENT_TAG: parent.run_id} if parent is not None and parent.run_id else {}
    tracker = Tracker.start(
        uri=uri, experiment=experiment, run_name=run_name, identity=identity, params=params, folder=folder, tags=tags
    )
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish("FINISHED")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What it takes to find or create a run; the first line of its spool."""

    uri: str
    experiment: str
    run_name: str
    identity: str
    params: dict[str, str]
    tags: dict[str, str]

    @classmethod
    def from_spool(cls, path: Path) -> _Run:
        """Reads the first line of a spool."""
        try:
            with path.open(encoding="utf-8") as file:
                return cls(**json.loads(file.readline()))
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist: a run that has sent everything leaves no such file") from error
        except (ValueError, TypeError, OSError) as error:
            raise InputError(
                f"{path} is not a file of unsent tracking records ({error}): give a run's mlflow-unsent-*.jsonl"
            ) from error


class _Spool:
    """File of what MLflow does not have yet: the run in its first line, then one record a line; absent when empty."""

    def __init__(self, path: Path, run: _Run) -> None:
        self.path = path
        self._run = run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the driver and the controller, which may both write, from each other."""
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        with suppress(Timeout, NotImplementedError):  # a disk without locks must not stop a training
            lock.acquire(timeout=60)
        try:
            yield
        finally:
            lock.release()

    def read(self) -> list[Record]:
        """All records, oldest first; a line that a killed process left unfinished is not one."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines()[1:]:
            with suppress(ValueError):
                records.append(json.loads(line))
        return records

    def append(self, records: Iterable[Record]) -> None:
        """Adds records at the end."""
        self.path.touch(mode=0o600)  # for its owner alone: an address may hold a password
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) == 0:
                file.write(_line(dataclasses.asdict(self._run)))
            else:
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.writelines(map(_line, records))

    def replace(self, records: Sequence[Record]) -> None:
        """Leaves only these records, in one step."""
        if not records:
            self.path.unlink(missing_ok=True)
            return
        fresh = self.path.with_suffix(".new")
        fresh.touch(mode=0o600)
        with fresh.open("wb") as file:
            file.writelines(map(_line, [dataclasses.asdict(self._run), *records]))
        fresh.replace(self.path)


def flatten(params: Mapping[str, object]) -> dict[str, str]:
    """Nested params as text by dotted path: ``{"a": {"b": 1}}`` is ``{"a.b": "1"}``; long values are cut.

    Raises:
        InputError: two names become one.
    """
    flat: dict[str, str] = {}
    for name, value in _leaves(params, ""):
        _put(flat, name, (value if isinstance(value, str) else _text(value))[:PARAM_LENGTH])
    return flat


def _leaves(params: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: object) -> str:
    return json.dumps(value, default=str) if isinstance(value, list | tuple | Mapping) else str(value)


def _put(target: dict[str, Any], name: str, value: object) -> None:
    """Sets `name` as MLflow can store it: letters of any script, digits and ``_-./: ``, no empty part of the path."""
    parts = re.sub(r"[^/\w.\-: ]", "_", name).split("/")
    legal = "/".join(part for part in parts if part not in ("", ".", ".."))[:NAME_LENGTH]
    if not legal:
        raise InputError(f"tracking name {name!r} holds nothing that MLflow can store: use letters, digits and _-./: ")
    if legal in target:
        raise InputError(f"tracking name {name!r} is stored by MLflow as {legal!r}, which is taken: rename one of them")
    target[legal] = value


def _point_records(point: Mapping[str, object]) -> list[Record]:
    """A point as records of at most one batch each."""
    try:
        step = operator.index(point["step"])  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise InputError(f"tracking point {dict(point)} needs a whole number as its step") from error
    seconds = point.get("time")
    stamp = _milliseconds() if seconds is None else round(float(seconds) * 1000)  # type: ignore[arg-type]
    metrics: dict[str, float] = {}
    for name, value in point.items():
        if name not in ("step", "time") and value is not None:
            _put(metrics, name, _number(name, value))
    items = list(metrics.items())
    return [
        {"step": step, "time": stamp, "metrics": dict(items[start : start + METRICS_PER_BATCH])}
        for start in range(0, len(items), METRICS_PER_BATCH)
    ]


def _number(name: str, value: object) -> float:
    try:
        if not isinstance(value, str):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        pass
    raise InputError(f"metric {name!r} is {value!r}, not a number: log text as a param or a tag")


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Records in requests: neighbouring points together as far as the limit allows, everything else alone."""
    batch: list[Record] = []
    size = 0
    for record in records:
        count = len(record.get("metrics", ()))
        if batch and (not count or size == 0 or size + count > METRICS_PER_BATCH):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += count
    if batch:
        yield batch


def _send_batch(client: MlflowClient, run_id: str, batch: Sequence[Record]) -> None:
    """Sends what `_batches` put together."""
    first = batch[0]
    with _limits(REQUEST_SECONDS):
        if "metrics" in first:
            _send_points(client, run_id, batch)
        elif "status" in first:
            _send_status(client, run_id, first)
        else:
            client.get_run(run_id)  # fails fast where the upload, with its longer limit, would not
    if "artifact" in first:
        with _limits(UPLOAD_SECONDS):
            _send_artifact(client, run_id, first)


def _send_points(client: MlflowClient, run_id: str, points: Sequence[Record]) -> None:
    from mlflow.entities import Metric, RunTag

    metrics = [
        Metric(name, value, point["time"], point["step"])
        for point in points
        for name, value in point["metrics"].items()
    ]
    last_step = max(point["step"] for point in points)
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(STEP_TAG, str(last_step))])


def _send_status(client: MlflowClient, run_id: str, record: Record) -> None:
    if record["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, record["status"], record["time"])


def _send_artifact(client: MlflowClient, run_id: str, record: Record) -> None:
    path = Path(record["artifact"])
    if path.is_dir():
        client.log_artifacts(run_id, str(path), record["folder"])
    elif path.is_file():
        client.log_artifact(run_id, str(path), record["folder"])
    else:
        _log.warning("artifact %s is gone, so MLflow will not have it", path)


def _client(uri: str) -> MlflowClient:
    """A client; a missing SQLite database is created in about a second, by one process at a time (MLflow locks)."""
    if uri.startswith("sqlite:"):
        path = _sqlite_path(uri)
        if not path.exists():
            print(f"creating the MLflow database {path} (a few seconds, once)", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=2)) as database:
            database.execute("select 1 from sqlite_master")  # MLflow would retry a bad file for minutes
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it would say the same in more words
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _find_or_create(client: MlflowClient, run: _Run) -> tuple[str, int]:
    """Id of the run with this identity, created if there is none, with all params; and the last step it has."""
    from mlflow.entities import Param, RunTag

    experiment = _experiment(client, run)
    found = client.search_runs(
        [experiment], f"tags.`{IDENTITY_TAG}` = '{run.identity}'", order_by=["attributes.start_time ASC"], max_results=1
    )
    opened = found[0] if found else client.create_run(experiment, run_name=run.run_name, tags=run.tags)
    run_id = opened.info.run_id
    tags = [RunTag(name, value) for name, value in run.tags.items() if opened.data.tags.get(name) != value]
    params = [Param(name, value) for name, value in run.params.items() if name not in opened.data.params]
    for start in range(0, max(len(tags), len(params)), PARAMS_PER_BATCH):
        part = slice(start, start + PARAMS_PER_BATCH)
        client.log_batch(run_id, params=params[part], tags=tags[part])
    return run_id, int(opened.data.tags.get(STEP_TAG, -1))


def _experiment(client: MlflowClient, run: _Run) -> str:
    """Id of the experiment; one in SQLite keeps its artifacts beside the database, not in the working directory."""
    from mlflow import MlflowException

    found = client.get_experiment_by_name(run.experiment)
    if found is not None:
        return found.experiment_id
    local = run.uri.startswith("sqlite:")
    location = (_sqlite_path(run.uri).parent / "mlartifacts").as_uri() if local else None
    try:
        return client.create_experiment(run.experiment, artifact_location=location)
    except MlflowException:
        found = client.get_experiment_by_name(run.experiment)  # another process may just have created it
        if found is None:
            raise
        return found.experiment_id


@contextmanager
def _limits(seconds: int) -> Iterator[None]:
    """Bounds MLflow's requests inside, unless the user's environment does. One try each: the spool is the retry."""
    limits = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    ours = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _usable(uri: str) -> str:
    """The address, absolute where it is a file, if it is one that can be written within bounded time."""
    if re.match(r"https?://.", uri):
        return uri.rstrip("/")
    if re.match(r"sqlite:///[^:]", uri):
        return f"sqlite:///{_sqlite_path(uri).absolute().as_posix()}"
    raise InputError(
        f"MLflow address {_redacted(uri)!r} (MLFLOW_TRACKING_URI) is neither a server's http:// or https:// address "
        "nor sqlite:///FILE: for another database run `mlflow server --backend-store-uri ...` and give the server's "
        "address, or unset MLFLOW_TRACKING_URI to keep an SQLite database beside the results"
    )


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


def _redacted(text: str) -> str:
    """The text without the user and password of any address in it."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _short(error: Exception) -> str:
    """The error's first words, on one line."""
    words = " ".join(str(error).split())
    return _redacted(f"{type(error).__name__}: {words}")[:300]


def _line(record: Mapping[str, object]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _milliseconds() -> int:
    return int(time.time() * 1000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sends a spool; returns 0 when all is sent, 1 when MLflow could not be written, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m sane_ray.tracking",
        description="Sends to MLflow what a run could not send while it ran, in order and without doubles.",
        epilog="example: python -m sane_ray.tracking results/runs/digits/mlflow-unsent-1a2b3c4d.jsonl",
    )
    parser.add_argument("spool", type=Path, help="mlflow-unsent-*.jsonl in the run's folder")
    parser.add_argument("--uri", help="where MLflow is, if no longer where the run found it")
    options = parser.parse_args(arguments)
    try:
        tracker = Tracker.from_spool(options.spool, options.uri)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not tracker.flush():
        return 1
    print(f"sent to run {tracker.run_id}; look at it with: {ui_command(tracker.uri)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
