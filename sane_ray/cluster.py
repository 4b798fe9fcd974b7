"""Join a Ray cluster or start one on this machine, and refuse at once what the cluster can never give.

Never ends a Ray that it did not start, and never binds anything beyond the loopback address.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sane_ray.config import ClusterConfig
from sane_ray.errors import InputError

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment, unless the user has set it: Ray's notices stay off the terminal, and nobody is told what runs here."""


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Joins the cluster at ``config.address`` or ``RAY_ADDRESS``, or starts Ray on this machine, for the block inside.

    Inside an already connected process nothing is started or ended.

    Raises:
        InputError: the address does not answer, or refuses our token.
    """
    quieten()
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        with local_ray(max(os.cpu_count() or 1, required_cpus(config))):
            yield
        return
    _join(address)
    try:
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
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            log_to_driver=True,
            logging_level=logging.WARNING,
            _temp_dir=temp_dir,
        )
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def required_cpus(config: ClusterConfig) -> int:
    """CPUs that training takes, its workers and their data streams together, rounded up."""
    needed = config.max_workers * (config.cpus_per_worker + config.data_cpus)
    return int(-(-needed // 1))


@dataclass(frozen=True)
class Resources:
    """What a training run will ask of the cluster: decided before anything starts."""

    num_workers: int
    """Training workers."""
    gpu: bool
    """Whether each worker takes a GPU."""
    cpus_per_worker: float
    """CPUs reserved by a worker."""

    @property
    def threads(self) -> int:
        """Threads of a worker's matrix products: what it reserved, since more would wait for each other."""
        return max(1, int(self.cpus_per_worker))


def preflight(config: ClusterConfig) -> Resources:
    """Compares what a run asks for with what the connected cluster has.

    Raises:
        InputError: the cluster has too few CPUs or GPUs (Ray itself would wait forever); names the nearest config
            that fits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    too_few = gpus < config.max_workers and (gpus > 0 or config.gpu == "yes")
    if config.gpu != "no" and too_few:
        raise InputError(
            f"cluster.num_workers is {config.max_workers} with cluster.gpu {config.gpu!r}, but the cluster has "
            f"{gpus:g} GPUs: set cluster.gpu to 'no'"
            + (f", or cluster.num_workers to {int(gpus)} or less" if gpus >= 1 else "")
            + ", or add GPU nodes"
        )
    gpu = config.gpu != "no" and gpus > 0
    per_worker = config.cpus_per_worker + config.data_cpus
    if config.max_workers * per_worker > cpus:
        fits = int(cpus // per_worker)
        raise InputError(
            f"{config.max_workers} workers need {config.max_workers * per_worker:g} CPUs ({config.cpus_per_worker:g} "
            f"each and {config.data_cpus:g} for its data stream), but the cluster has {cpus:g}: "
            + (f"set cluster.num_workers to {fits}" if fits else "lower cluster.cpus_per_worker or cluster.data_cpus")
            + ", or add nodes"
        )
    places = sum(_places(node, config.cpus_per_worker, gpu) for node in nodes)
    if places < config.max_workers:
        raise InputError(
            f"{config.max_workers} workers of {config.cpus_per_worker:g} CPUs{' and a GPU' if gpu else ''} each do not "
            f"fit on the cluster's {len(nodes)} nodes, which have room for {places}: set cluster.num_workers to "
            f"{places} or less, lower cluster.cpus_per_worker, or add larger nodes"
        )
    return Resources(config.max_workers, gpu, config.cpus_per_worker)


def _places(node: Mapping[str, float], cpus_per_worker: float, gpu: bool) -> int:
    """Workers that fit on a node: none is ever spread over two."""
    by_cpu = int(node.get("CPU", 0.0) / cpus_per_worker + 1e-9)
    return min(by_cpu, int(node.get("GPU", 0.0))) if gpu else by_cpu


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
