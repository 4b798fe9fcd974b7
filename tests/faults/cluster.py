"""A real Ray cluster of several nodes on one machine, whose nodes can be killed as a power cut would.

Each node is a `ray start --block` of our own, on its own loopback address, ports and token. Every process of ours is
known by a mark in its environment, which its children inherit: so a node is killed whole, and nothing else is ever
touched (no `ray stop`). A guard beside us kills the rest when the test's process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[2]

RAY = str(Path(sys.executable).parent / "ray")

CLUSTER_MARK, NODE_MARK = "SANE_RAY_TEST_CLUSTER", "SANE_RAY_TEST_NODE"

HEAD_IP = "127.0.0.2"  # for 127.0.0.1 Ray takes an address that others can reach

WAIT_SECONDS = 300
"""Longest wait for anything: a loaded machine is slow, a broken one is told."""


Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Node:
    """A node: its address on the loopback network and its mark."""

    ip: str
    mark: str

    @property
    def pids(self) -> list[int]:
        """Its processes: raylet, agents and workers."""
        return pids_of(NODE_MARK, self.mark)


class Cluster:
    """A head, on which drivers and controllers run and no training worker fits, and the nodes that are added."""

    def __init__(self, object_store_mb: int = 100) -> None:
        """Starts the head; on failure nothing is left."""
        self.object_store_mb = object_store_mb
        self.mark = secrets.token_hex(8)
        self.nodes: list[Node] = []
        self.folder = Path(tempfile.mkdtemp(prefix="srf"))  # short: Ray's socket paths are limited to 107 characters
        self._added = 0
        self._token = self.folder / "token"
        self._token.write_text(secrets.token_hex(32))
        self._guard = subprocess.Popen(
            [sys.executable, __file__, self.mark, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        port, self._dashboard = free_port(), free_port()
        self.address = f"{HEAD_IP}:{port}"
        try:
            self.head = self._start_node(
                HEAD_IP,
                *("--head", "--port", str(port), "--num-cpus", "0"),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self._dashboard)),
                *("--ray-client-server-port", str(free_port())),
            )
        except BaseException:
            self.stop()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """For a process that joins the cluster; it ends with the cluster."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        return inherited | {
            CLUSTER_MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": self.address,
            # Ray's own look for it would find other clusters on this machine too
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self._dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            # a dead node is noticed in seconds, where Ray allows it half a minute
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "5000",
            "RAY_health_check_failure_threshold": "4",
        }

    def add_node(self, cpus: int) -> Node:
        """Starts a node and waits until it has joined."""
        return self.add_nodes(cpus)[0]

    def add_nodes(self, *cpus: int) -> list[Node]:
        """Starts several at once."""
        arguments = [("--address", self.address, "--num-cpus", str(count)) for count in cpus]
        first = self._added + 1
        self._added += len(cpus)
        with ThreadPoolExecutor() as threads:
            started = [threads.submit(self._start_node, f"127.0.1.{first + i}", *a) for i, a in enumerate(arguments)]
        added = [node.result() for node in started]
        self.nodes += added
        return added

    def kill_node(self, node: Node) -> None:
        """Ends all processes of a node at once, without a word to the cluster."""
        self.nodes.remove(node)
        kill_all(lambda: node.pids)

    def announce_loss(self, node: Node, seconds: int) -> None:
        """Tells the cluster that a node will be taken away, as a cloud does of a spot machine; it goes on meanwhile."""
        commands = " ".join(command_of(pid) for pid in node.pids)
        (node_id,) = set(re.findall("--node_id=([0-9a-f]+)", commands))
        command = [RAY, "drain-node", "--address", self.address, "--node-id", node_id, "--reason-message", "a test"]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=WAIT_SECONDS)

    def start(self, *command: str, log: Path, environment: Mapping[str, str] = MappingProxyType({})) -> Process:
        """Starts a process that joins the cluster (a driver), its output in ``log``."""
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=self.environment | dict(environment),
                cwd=ROOT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends the cluster and all that joined it."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait(WAIT_SECONDS)

    def _start_node(self, ip: str, *arguments: str, tries: int = 3) -> Node:
        """Starts a node; again if Ray gave up, which it does when a busy machine takes half a minute."""
        node = Node(ip, secrets.token_hex(8))
        command = [RAY, "start", "--block", "--node-ip-address", ip, *arguments, "--disable-usage-stats"]
        command += ["--object-store-memory", str(self.object_store_mb * 10**6), "--temp-dir", str(self.folder / ip)]
        log = self.folder / f"{ip}.log"
        environment = self.environment | {NODE_MARK: node.mark}
        del environment["RAY_ADDRESS"]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        wait_until(lambda: process.poll() is not None or "Ray runtime started" in log.read_text())
        if process.poll() is None:
            return node
        kill_all(lambda: node.pids)
        if tries == 1:
            raise RuntimeError(f"a node did not start: {log.read_text()}")
        return self._start_node(ip, *arguments, tries=tries - 1)


class MlflowServer:
    """A real `mlflow server` on a free loopback port, with its own database."""

    def __init__(self, folder: Path) -> None:
        """Starts nothing yet."""
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: Process | None = None

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", f"{self.folder}/artifacts"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = self.folder / "server.log"
        with log.open("a") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        wait_until(self._answers)

    def kill(self) -> None:
        """Ends it with its own children, without a word to clients."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except OSError:
            return False


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Returns when the condition holds; fails if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds} s"
        time.sleep(0.05)


def pids_of(name: str, value: str) -> list[int]:
    """Processes that have a variable of this value in their environment."""
    wanted = f"{name}={value}".encode()
    return [pid for pid, environment in _environments() if wanted in environment.split(b"\0")]


def _environments() -> Iterator[tuple[int, bytes]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                yield int(folder.name), (folder / "environ").read_bytes()


def command_of(pid: int) -> str:
    """How a process calls itself; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def kill_all(pids: Callable[[], list[int]]) -> None:
    """Kills until none is left: what was just being started too."""

    def killed() -> bool:
        for pid in (left := pids()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_until(killed)


def _guard(mark: str, folder: str) -> None:
    """Waits until the test's process closes the pipe or dies, then ends what it had started."""
    sys.stdin.read()
    kill_all(lambda: pids_of(CLUSTER_MARK, mark))
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _guard(*sys.argv[1:])
