"""Whatever is killed, full or away, a run ends as if nothing had happened: the same losses and the same weights.

On a real cluster of several nodes, by the command that users give. Two training workers, each with a node's 2 CPUs.
"""

import contextlib
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).parent))
from cluster import WAIT_SECONDS, Cluster, MlflowServer, wait_until
from runs import STEPS, Run, assert_close, assert_same, training_workers, write_small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_small_store(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def cluster():
    """A head without room for workers, and three nodes for one worker each."""
    cluster = Cluster()
    try:
        cluster.add_nodes(2, 2, 2)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def server(tmp_path):
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def new_run(cluster, store, storage):
    return lambda name, **settings: Run(cluster, store, storage, name, **settings)


@pytest.fixture(scope="module")
def calm(new_run):
    """A run that nothing happened to."""
    run = new_run("calm").start().finish()
    assert run.restarts() == 0
    return run


def test_a_killed_worker_and_then_a_killed_node_cost_nothing_but_time(calm, new_run, cluster):
    run = new_run("killed").start()
    run.wait_for_checkpoints()
    worker = run.workers()[0]
    os.kill(worker, signal.SIGKILL)
    run.wait_for(lambda: run.restarts() == 1, alive=True)
    node = next(node for node in cluster.nodes if training_workers(node.pids))
    cluster.kill_node(node)
    run.finish()
    assert_same(run, calm)
    assert (run.restarts(), run.computed(step=1)) == (2, 1)


def damage(file):
    """Flips a byte in the middle, as a bad disk would."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def test_after_the_driver_was_killed_the_same_command_goes_on_even_from_a_damaged_checkpoint(calm, new_run):
    run = new_run("damaged").start()
    run.wait_for_checkpoints(2)
    run.kill()
    before, newest = run.checkpoints()[-2:]
    damage(max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size))
    run.start().finish()
    assert f"{newest} is damaged" in run.told() and f"{before.name} is taken instead" in run.told()
    assert f"resuming: the newest checkpoint is of step {int(newest.name.split('_')[1])} of" in run.told()
    assert_same(run, calm)
    assert (run.restarts(), run.computed(step=1)) == (1, 1)


def test_mlflow_away_for_a_part_of_the_run_and_a_killed_driver_lose_no_step(calm, new_run, server):
    run = new_run("tracked")
    run.start(MLFLOW_TRACKING_URI=server.uri)
    run.wait_for_step(1)
    server.kill()
    run.wait_for_checkpoints()
    run.kill()
    run.start(MLFLOW_TRACKING_URI=server.uri)
    run.wait_for(run.restarts, alive=True)
    server.start()
    run.finish()
    assert_same(run, calm)
    client = MlflowClient(tracking_uri=server.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    points = client.get_metric_history(logged.info.run_id, "train/loss")
    assert {point.step: point.value for point in points} == {s: p["train/loss"] for s, p in calm.curve().items()}
    assert len(points) == STEPS


PRESSURE = """
import sys, time
import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

@ray.remote(num_cpus=0)
def fill():
    "Holds twice what the node's object store can, and goes on putting."
    held = []
    while True:
        held = [*held[-9:], ray.put(np.zeros(20_000_000, np.uint8))]
        time.sleep(0.1)

ray.init(logging_level="ERROR")
nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
ray.get([
    fill.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
    for node in nodes
])
"""


def test_full_object_stores_and_storage_that_is_away_cost_nothing_but_time(calm, new_run, cluster, tmp_path):
    pressure = cluster.start(sys.executable, "-c", PRESSURE, log=tmp_path / "pressure.log")
    wait_until(lambda: any(cluster.folder.glob("*/session_*/ray_spilled_objects*/*")))
    run = new_run("stormy").start()
    run.wait_for_checkpoints()
    away = run.folder.with_name("away")
    run.folder.rename(away)
    run.folder.write_text("a file where a folder should be")
    run.wait_for(lambda: "training goes on without it" in run.told(), alive=True)
    run.folder.unlink()
    away.rename(run.folder)
    run.finish()
    assert pressure.poll() is None, (tmp_path / "pressure.log").read_text()
    pressure.kill()
    pressure.wait()
    assert_same(run, calm)


@contextmanager
def slow(process, share):
    """A process that gets this share of its time: a small training that lasts as long as what the test waits for."""
    ended = threading.Event()

    def slow_down():
        with contextlib.suppress(ProcessLookupError):
            while not ended.is_set():
                os.kill(process, signal.SIGSTOP)
                ended.wait(1 - share)
                os.kill(process, signal.SIGCONT)
                ended.wait(share)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_node_that_is_announced_to_go_costs_no_step_that_was_made_before(calm, new_run, cluster):
    cluster.add_node(2)
    run = new_run("announced", pretraining__checkpoint_every="6").start()
    run.wait_for_step(2)
    doomed = next(node for node in cluster.nodes if training_workers(node.pids))
    (worker,) = training_workers(doomed.pids)
    with slow(worker, share=0.2):
        cluster.announce_loss(doomed, seconds=WAIT_SECONDS)
        run.wait_for_checkpoints()
        saved = run.last_checkpoint()
        assert saved < STEPS, "the first checkpoint that is due at its time is the last"
        run.wait_for_step(saved + 2)
    cluster.kill_node(doomed)
    run.finish()
    assert_same(run, calm)
    assert (run.restarts(), run.computed(step=1), run.computed(step=saved)) == (1, 1, 1)


def test_a_run_grows_with_a_node_that_joins_and_shrinks_with_one_that_leaves(calm, new_run, cluster):
    while len(cluster.nodes) > 1:
        cluster.kill_node(cluster.nodes[-1])
    run = new_run("elastic", cluster__num_workers="[1, 2]", cluster__resize_seconds="2").start()
    run.wait_for_checkpoints(world_size=1)
    (alone,) = run.workers()
    with slow(alone, share=0.05):
        node = cluster.add_node(2)
        run.wait_for(lambda: alone not in run.workers(), alive=True)
    run.wait_for_checkpoints(world_size=2)
    cluster.kill_node(node)
    run.finish()
    assert run.checkpoints()[-1] in run.checkpoints(world_size=1)
    assert run.computed(step=1) == 1
    assert_close(run, calm)
