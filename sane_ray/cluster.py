"""Joins a Ray cluster or starts one on this machine, and says where results go.

Never ends a Ray that it did not start, and never binds anything beyond the loopback address.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sane_ray.config import WorkersConfig
from sane_ray.errors import InputError
from sane_ray.interrupts import handlers, set_handlers

_TOLERANCE = 1e-6  # of sums of fractions of CPUs
_LONGEST_REASON = 300  # of what Ray says

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment, unless the user has set it: Ray's notices stay off the terminal, and nobody is told what runs here."""


def named_address(config: WorkersConfig) -> str:
    """The address of the cluster to join; empty where none is named and Ray starts on this machine."""
    return config.address or os.environ.get("RAY_ADDRESS", "")


@contextmanager
def connect(config: WorkersConfig) -> Iterator[None]:
    """Joins the cluster at ``config.address`` or ``RAY_ADDRESS``, or starts Ray on this machine, for the block inside.

    Inside an already connected process nothing is started or ended. Ray would answer SIGTERM with a stack of its own;
    where the process had an answer before, it keeps that.

    Raises:
        InputError: the address does not answer, or refuses our token.
    """
    quieten()
    import ray

    if ray.is_initialized():
        yield
        return
    address = named_address(config)
    before = {number: answer for number, answer in handlers().items() if callable(answer)}
    if not address:
        with local_ray(max(os.cpu_count() or 1, required_cpus(config))):
            set_handlers(before)
            yield
        return
    _join(address)
    try:
        set_handlers(before)
        yield
    finally:
        ray.shutdown()


def quieten() -> None:
    """Keeps Ray's notices of normal work off the terminal, in this process; warnings and errors stay."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    reports = [
        name for name in logging.root.manager.loggerDict if name.endswith("train/v2/_internal/execution/context.py")
    ]
    for name in ("ray.data", "ray.train", *reports):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they warn of the defaults that we chose


def _join(address: str) -> None:
    import ray

    try:
        _knock(address)
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(
            f"no Ray cluster at cluster.address = {address!r} ({error}): start one with `ray start --head`, "
            "correct the address (or RAY_ADDRESS), or leave both empty to run on this machine; "
            "if it refused the token, copy the cluster's token to ~/.ray/auth_token"
        ) from error


def _knock(address: str) -> None:
    """Raises ``OSError`` at once where nobody listens: Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


@contextmanager
def local_ray(num_cpus: int, temp_dir: str | None = None) -> Iterator[None]:
    """A Ray of our own on this machine for the block's duration: token on, dashboard on a free loopback port.

    Ray Train's housekeeping asks the dashboard which actors live; naming its address keeps it from another Ray's.

    Raises:
        InputError: it does not start; says where its logs are, which Ray itself would print.
    """
    import ray

    port = _free_port()
    ours = {
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next look; Ray's 2 s are for large groups
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        _start(num_cpus, port, temp_dir)
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(num_cpus: int, port: int, temp_dir: str | None) -> None:
    import ray

    began = time.time()
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            log_to_driver=True,
            logging_level=logging.CRITICAL,  # of what fails, the sentence below is told
            _temp_dir=temp_dir,
        )
    except Exception as error:  # Ray raises what comes, with pages of its logs
        folder = Path(temp_dir or os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
        raise InputError(not_started(error, folder, began)) from error
    logging.getLogger("ray").setLevel(logging.WARNING)


def not_started(error: Exception, folder: Path, began: float) -> str:
    """A sentence on a Ray that does not start: its first words, and where its logs are, if it came to writing any."""
    first = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    roots = (folder, folder / "ray")
    sessions = [path for root in roots for path in root.glob("session_2*/logs") if path.stat().st_mtime >= began - 1]
    logs = max(sessions, key=lambda path: path.stat().st_mtime, default=None)
    where = f"its logs are in {logs}" if logs else "it has written no logs"
    return (
        f"Ray does not start on this machine ({first[:_LONGEST_REASON]}): {where}; look for too little memory, disk or "
        "open files (ulimit -n), or name a cluster that runs by --cluster.address"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def required_cpus(config: WorkersConfig) -> int:
    """CPUs that workers take at least, with their data streams where they have any, rounded up.

    An elastic pair counts with its lower end: a laptop begins with what it has.
    """
    return math.ceil(config.min_workers * (config.cpus_per_worker + config.data_cpus) - _TOLERANCE)


def default_storage(storage: str) -> Path:
    """Root of results: as given, else ./results, or ~/sane_ray_results in a Ray job, whose own folder is temporary."""
    if storage:
        return local_path(storage, "storage")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return Path.home() / "sane_ray_results"
    return Path("results").absolute()


def local_path(text: str, field: str) -> Path:
    """The absolute path that a config field names.

    Raises:
        InputError: it is the address of an object store, which would otherwise become a folder of that name.
    """
    if "://" in text:
        raise InputError(
            f"config field {field} is {text!r}: object stores cannot be used directly; name a folder that every node "
            "sees (local disk, NFS, or the mounted store)"
        )
    return Path(os.path.normpath(Path(text).expanduser().absolute()))
