"""Compares what a run asks for with what the cluster has or may grow to, and refuses at once what it can never give.

Never starts or ends a Ray, and never changes one.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sane_ray.config import WorkersConfig
from sane_ray.errors import InputError

if TYPE_CHECKING:
    from sane_ray.hardware import Device
    from sane_ray.pretraining.scaling import MemoryNeed

_LOG = logging.getLogger(__name__)

_TOLERANCE = 1e-6  # of sums of fractions of CPUs
_HEAD_SECONDS, _STORAGE_SECONDS = 5.0, 4.0  # for the head's answer, and for all nodes'; together less than ten
_LOOKS, _LOOK_PAUSE = 11, 0.2  # of a node for a file; less than it has time for
_MANY = 1_000_000  # nodes, where an autoscaler knows no limit
_HEAD_RESOURCE = "node:__internal_head__"
_KUBERNETES_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Resources:
    """What a training run will ask of the cluster: decided before anything starts."""

    min_workers: int
    """Fewest training workers."""
    max_workers: int
    """Most training workers."""
    gpu: bool
    """Whether each worker takes a GPU."""
    cpus_per_worker: float
    """CPUs for a worker's matrix products."""
    data_cpus: float
    """CPUs for its data stream, whose tasks run on its node and ask the cluster for none."""

    @property
    def threads(self) -> int:
        """Threads of a worker's matrix products: what is meant for them, since more would wait for each other."""
        return max(1, int(self.cpus_per_worker))

    @property
    def bundle(self) -> dict[str, float]:
        """What a worker reserves on its node, its data stream's share with it, so that workers never take that."""
        return {"CPU": self.cpus_per_worker + self.data_cpus} | ({"GPU": 1} if self.gpu else {})


@dataclass(frozen=True)
class Limits:
    """How far an autoscaler may grow a cluster."""

    node_types: Mapping[str, tuple[Mapping[str, float], int]]
    """Resources of a node of each type, and most worker nodes of it."""
    max_nodes: int
    """Most worker nodes of all types together."""


def preflight(config: WorkersConfig, need: MemoryNeed | None = None, storage: Path | None = None) -> Resources:
    """Compares what a run asks for with what the connected cluster has or may grow to; answers within ten seconds.

    Args:
        config: what is asked for.
        need: memory of a worker; None leaves memory out.
        storage: folder that every node must see; None leaves it out. Made if it is missing.

    Raises:
        InputError: too few CPUs or GPUs, or too little memory (Ray itself would wait forever, or workers die one by
            one), or nodes that do not see the storage; one sentence with the nearest config that fits.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    limits = autoscaling_limits(alive)
    resources = fit(config, alive, limits)
    nodes = reachable(alive, limits, resources.bundle, config.max_workers)
    if need is not None:
        check_memory(need, resources, nodes)
    if storage is not None:
        check_storage(storage, alive)
    return resources


def fit(config: WorkersConfig, alive: Sequence[Mapping[str, Any]], limits: Limits | None) -> Resources:
    """What a run gets of nodes as ``ray.nodes`` tells them, and of those that an autoscaler may add.

    Raises:
        InputError: it is too little; names the nearest config that fits.
    """
    wanted = config.min_workers
    gpus = int(sum(node.get("GPU", 0.0) for node in reachable(alive, limits, {"GPU": 1}, wanted)))
    if config.gpu != "no" and gpus < wanted and (gpus > 0 or config.gpu == "yes"):
        fewer = f", or {_fewer(gpus, config.num_workers)}" if gpus else ""
        raise InputError(
            f"cluster.num_workers is {config.num_workers} with cluster.gpu {config.gpu!r}, but the cluster has {gpus} "
            f"GPUs{_grown(limits)}: set cluster.gpu to 'no'{fewer}, or add GPU nodes"
        )
    resources = Resources(
        min_workers=wanted,
        max_workers=config.max_workers,
        gpu=config.gpu != "no" and gpus > 0,
        cpus_per_worker=config.cpus_per_worker,
        data_cpus=config.data_cpus,
    )
    nodes = reachable(alive, limits, resources.bundle, wanted)
    places = sum(_places(node, resources.bundle) for node in nodes)
    if places < wanted:
        raise InputError(_too_small(config, resources, nodes, places, limits))
    return resources


def _too_small(
    config: WorkersConfig,
    resources: Resources,
    nodes: Sequence[Mapping[str, float]],
    places: int,
    limits: Limits | None,
) -> str:
    """Why the workers do not fit, and what does."""
    wanted, each = resources.min_workers, resources.bundle["CPU"]
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    free = math.floor(largest - resources.data_cpus + _TOLERANCE)
    if places:
        remedy = f"set {_fewer(places, config.num_workers)}"
    elif free >= 1 and free < resources.cpus_per_worker:
        remedy = f"lower cluster.cpus_per_worker to {free}"
    else:
        both = "cluster.cpus_per_worker and cluster.data_cpus to {} together"
        remedy = f"lower {(both if resources.data_cpus else 'cluster.cpus_per_worker to {}').format(f'{largest:g}')}"
    stream = f" and {resources.data_cpus:g} for its data stream" if resources.data_cpus else ""
    return (
        f"{_workers(wanted)} {wanted * each:g} CPUs ({resources.cpus_per_worker:g} each{stream}"
        f"{', and a GPU' if resources.gpu else ''}), but the cluster has {cpus:g}"
        f"{_grown(limits)}, with room for {places} on {len(nodes)} nodes: {remedy}, or add nodes"
    )


def _workers(count: int) -> str:
    return f"{count} worker{' needs' if count == 1 else 's need'}"


def _fewer(places: int, asked: int | tuple[int, int]) -> str:
    """The field as it fits: a pair keeps its upper end."""
    return f"cluster.num_workers to {places if isinstance(asked, int) else [places, asked[1]]}"


def _grown(limits: Limits | None) -> str:
    return " at its autoscaler's limits" if limits else ""


def reachable(
    alive: Sequence[Mapping[str, Any]], limits: Limits | None, bundle: Mapping[str, float], workers: int
) -> list[Mapping[str, float]]:
    """Resources of the nodes that there are, or with an autoscaler can be, best for ``workers`` bundles.

    Nodes of an autoscaler's types come and go and count with its limits; all others stay as they are.

    Args:
        alive: of ``ray.nodes``.
        limits: of the autoscaler; None without one.
        bundle: what is to be placed.
        workers: bundles; no type of node is counted more often.
    """
    if limits is None:
        return [node["Resources"] for node in alive]
    steady = [node for node in alive if _is_head(node) or _node_type(node) not in limits.node_types]
    grown = [
        resources
        for resources, most in limits.node_types.values()
        for _ in range(min(most, limits.max_nodes, workers))
        if _places(resources, bundle)
    ]
    grown.sort(key=lambda resources: _places(resources, bundle), reverse=True)
    unknown = sum(not _is_head(node) and not _node_type(node) for node in steady)  # a launcher that tells no types
    return [node["Resources"] for node in steady] + grown[: max(0, limits.max_nodes - unknown)]


def room(bundle: Mapping[str, float], what: str) -> int:
    """How often the nodes of the connected cluster have what is asked for, whatever runs there; 1 if only new ones do.

    Args:
        bundle: "CPU" and "GPU", of one node.
        what: asks for it, for the message.

    Raises:
        InputError: no node has as much, nor may an autoscaler add one that does: Ray itself would wait forever.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    places = sum(_places(node["Resources"], bundle) for node in alive)
    if places:
        return places
    limits = autoscaling_limits(alive)
    new = [resources for resources, most in limits.node_types.values() if most] if limits else []
    nodes = [node["Resources"] for node in alive] + new
    if any(_places(node, bundle) for node in nodes):
        return 1
    asked = " and ".join(f"{amount:g} {kind}s" for kind, amount in bundle.items() if amount)
    most = " and ".join(f"{max((node.get(kind, 0.0) for node in nodes), default=0.0):g} {kind}s" for kind in bundle)
    raise InputError(
        f"{what} needs {asked} of one node, but the nodes of the cluster have at most {most}{_grown(limits)}: "
        "ask for fewer, or add such a node"
    )


def _is_head(node: Mapping[str, Any]) -> bool:
    return _HEAD_RESOURCE in node["Resources"]


def _node_type(node: Mapping[str, Any]) -> str:
    """The autoscaler's name for the kind of node; empty for a node that was started by hand."""
    return str(node.get("Labels", {}).get("ray.io/node-group", ""))


def _places(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Bundles that fit on a node: none is ever spread over two."""
    return min(int(node.get(kind, 0.0) / amount + _TOLERANCE) for kind, amount in bundle.items() if amount > 0)


def autoscaling_limits(alive: Sequence[Mapping[str, Any]]) -> Limits | None:
    """How far the connected cluster may grow; None if it has no autoscaler, or none whose config can be read.

    Ray has no public call for it. Hosted clusters tell the control store; `ray up` leaves the config in a file on the
    head, and KubeRay in the Kubernetes API, which only the head may ask.
    """
    import ray

    told = _limits_in_control_store()
    if told is not None:
        return told
    head = next((node["NodeID"] for node in alive if _is_head(node)), None)
    context = ray.get_runtime_context()
    try:
        if head == context.get_node_id():
            return limits_of_config(read_autoscaling_config(context.gcs_address))
        return limits_of_config(ask_head(head, context.gcs_address)) if head else None
    except (OSError, ValueError, LookupError, ray.exceptions.RayError) as error:
        _LOG.warning("the autoscaler's limits could not be read (%s): only nodes that run are counted", error)
        return None


def ask_head(head: str, gcs_address: str) -> dict[str, Any] | None:
    """``read_autoscaling_config`` in a task on the node ``head``.

    Raises:
        RayError: it cannot, or does not in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(read_autoscaling_config)
    found = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False)).remote(gcs_address)
    try:
        config: dict[str, Any] | None = ray.get(found, timeout=_HEAD_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(found, force=True)
        raise
    return config


def read_autoscaling_config(gcs_address: str) -> dict[str, Any] | None:
    """On the head: the config of the autoscaler that serves this cluster, as its YAML has it; None without one."""
    for arguments in _command_lines():
        named = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
        path = named.get("--autoscaling-config")
        if path and named.get("--gcs-address") == gcs_address:
            import yaml

            config: dict[str, Any] = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
            return config
    name = os.environ.get("RAY_CLUSTER_NAME")
    if name and "KUBERNETES_SERVICE_HOST" in os.environ:
        return _kuberay_config(name)
    return None


def _kuberay_config(cluster_name: str) -> dict[str, Any] | None:
    """What KubeRay's operator was told of this cluster, asked once, by parts of Ray that are not public."""
    os.environ.setdefault("KUBERAY_REQUEST_TIMEOUT_S", f"{_HEAD_SECONDS:.0f}")  # Ray would wait a minute
    try:
        from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
        from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
    except ImportError:
        return None
    namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or _KUBERNETES_NAMESPACE.read_text(encoding="utf-8").strip()
    resource = KubernetesHttpApiClient(namespace).get(f"rayclusters/{cluster_name}")
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)
    return config if resource["spec"].get("enableInTreeAutoscaling") else None


def _command_lines() -> Iterator[list[str]]:
    """Arguments of every process of this machine that tells them."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile
            continue


def limits_of_config(config: Mapping[str, Any] | None) -> Limits | None:
    """The limits in an autoscaler's config; None where no node can be added."""
    types = {
        name: (kind.get("resources") or {}, int(kind.get("max_workers", 0)))
        for name, kind in ((config or {}).get("available_node_types") or {}).items()
    }
    if not any(most for _, most in types.values()):
        return None
    total = sum(most for _, most in types.values())
    return Limits(types, min(total, int((config or {}).get("max_workers", total))))


def _limits_in_control_store() -> Limits | None:
    """What the cluster's host told Ray's control store, in a part of Ray that is not public."""
    try:
        from ray._private.state import state

        config = state.get_cluster_config()
        groups = config.node_group_configs if config else ()
        types = {
            group.name: (dict(group.resources), _MANY if group.max_count < 0 else group.max_count) for group in groups
        }
    except (ImportError, AttributeError):
        return None
    return Limits(types, sum(most for _, most in types.values())) if types else None


def check_memory(need: MemoryNeed, resources: Resources, nodes: Sequence[Mapping[str, float]]) -> None:
    """Compares what a worker needs with its GPU and its node, at the fewest and at the most workers.

    Raises:
        InputError: it has less; names both and the nearest config that fits.
    """
    from sane_ray.pretraining.scaling import nearest_that_fits

    places = sum(_places(node, resources.bundle) for node in nodes)
    most = max(resources.min_workers, min(resources.max_workers, places))
    for workers in sorted({resources.min_workers, most}):
        problem = _memory_problem(need, workers, resources, nodes)
        if problem:
            changes = nearest_that_fits(
                need, workers, places, lambda other, count: not _memory_problem(other, count, resources, nodes)
            )
            fewer = (n for n in range(workers - 1, 0, -1) if not _memory_problem(need, n, resources, nodes))
            remedy = "lower autoencoder.d_model or autoencoder.layers"
            if changes:
                remedy = f"set {' and '.join(changes)}"
            elif most_that_fit := next(fewer, 0):
                remedy = f"set cluster.num_workers to {most_that_fit} or less"
            raise InputError(f"{problem}: {remedy}, or add {'GPUs' if resources.gpu else 'nodes'} with more memory")


def _memory_problem(
    need: MemoryNeed, workers: int, resources: Resources, nodes: Sequence[Mapping[str, float]]
) -> str | None:
    """Why so many workers lack memory, or None. What is not known of a node is not held against it."""
    from sane_ray.pretraining.scaling import Placement, gigabytes

    shares = _spread(workers, resources, nodes)
    per_node = max(count for _, count in shares)
    for node, count in shares:
        device = _device_of_node(node) if resources.gpu else None
        bfloat16 = resources.gpu and not (device and device.bfloat16 is None)
        placement = Placement(workers, per_node, gpu=resources.gpu, bfloat16=bfloat16)
        bytes_of = need.on(placement)
        on_node = bytes_of.in_host + (0 if resources.gpu else bytes_of.device)
        if device and bytes_of.device > device.memory:
            return (
                f"{_workers(workers)} {gigabytes(bytes_of.device)} of GPU memory each ({bytes_of}), but a "
                f"{device.name} has {gigabytes(device.memory)}"
            )
        memory = node.get("memory", float("inf"))
        if count * on_node > memory:
            return (
                f"{_workers(workers)} {gigabytes(count * on_node)} of memory on a node with {count} of them "
                f"({gigabytes(on_node)} each: process and data {gigabytes(bytes_of.host)}, checkpoint copy "
                f"{gigabytes(bytes_of.staging)}, {bytes_of}), but it has "
                f"{gigabytes(memory)} beside its object store"
            )
    return None


def _spread(
    workers: int, resources: Resources, nodes: Sequence[Mapping[str, float]]
) -> list[tuple[Mapping[str, float], int]]:
    """Nodes and how many workers each gets, filled one after the other, as Ray packs them; the roomiest first."""
    shares, left = [], workers
    for node in sorted(nodes, key=lambda node: _places(node, resources.bundle), reverse=True):
        count = min(left, _places(node, resources.bundle))
        if count:
            shares.append((node, count))
            left -= count
    return shares


def _device_of_node(node: Mapping[str, float]) -> Device | None:
    """The accelerators of a node; of several that Ray has one name for, the one with most memory."""
    from sane_ray.hardware import devices_of_ray_type  # imports torch, which a look at a node does not need

    prefix = "accelerator_type:"
    kinds = [name.removeprefix(prefix) for name in node if name.startswith(prefix)]
    known = [found for kind in kinds if (found := devices_of_ray_type(kind))]
    fewest = min(known, key=len, default=[])  # a label such as A100-40G stands beside A100, and says more
    return max(fewest, key=lambda device: device.memory, default=None)


def check_storage(storage: Path, alive: Sequence[Mapping[str, Any]]) -> None:
    """Lets every node look for a file that is written here, unless there is but one node.

    A node that does not answer in time is warned of, not refused: it may be busy.

    Raises:
        InputError: the storage cannot be written, or nodes do not see it; names them.
    """
    if len(alive) < 2:
        return
    users = [node for node in alive if node["Resources"].get("CPU", 0) > 0]  # a bare head runs none of our tasks
    marker = storage / f".sane_ray_{uuid.uuid4().hex}"
    try:
        storage.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise InputError(
            f"config field storage is {storage}, which cannot be written ({error}): name a folder that all nodes share"
        ) from error
    try:
        blind = nodes_without(marker, users)
    finally:
        marker.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"config field storage is {storage}, but {', '.join(blind)} {'does' if len(blind) == 1 else 'do'} not see "
            "what is written there: name a folder that all nodes share (NFS or a mounted object store)"
        )


def nodes_without(marker: Path, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Addresses of the nodes on which no process finds ``marker``; those that do not answer are warned of."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_appears)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(marker): (
            f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        )
        for node in nodes
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_STORAGE_SECONDS)
    for reference in silent:
        ray.cancel(reference, force=True)
    blind = []
    for reference in answered:
        try:
            if not ray.get(reference, timeout=_STORAGE_SECONDS):
                blind.append(asked[reference])
        except ray.exceptions.RayError:  # the node has gone, or cannot start a process
            silent.append(reference)
    if silent:
        names = ", ".join(asked[reference] for reference in silent)
        _LOG.warning("%s did not tell within %g s whether the storage is there", names, _STORAGE_SECONDS)
    return blind


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes: network file systems may take a moment. Looks for its name alone."""
    for _ in range(_LOOKS):
        if path.exists():
            return True
        time.sleep(_LOOK_PAUSE)
    return False
