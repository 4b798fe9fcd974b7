import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from sane_ray.config import AutoencoderConfig, ClusterConfig, LossConfig, PretrainingConfig, WorkersConfig
from sane_ray.errors import InputError
from sane_ray.preflight import (
    Limits,
    Resources,
    ask_head,
    autoscaling_limits,
    check_memory,
    check_storage,
    fit,
    limits_of_config,
    nodes_without,
    preflight,
    reachable,
    read_autoscaling_config,
    room,
)
from sane_ray.pretraining.scaling import MemoryNeed, Placement, gigabytes

ROOT = Path(__file__).parents[1]


def node(resources, *, node_type="", head=False):
    """A node as ``ray.nodes`` tells it."""
    marked = resources | ({"node:__internal_head__": 1.0} if head else {})
    return {"Resources": marked, "Labels": {"ray.io/node-group": node_type} if node_type else {}}


def test_a_worker_reserves_what_its_data_stream_uses():
    resources = Resources(min_workers=1, max_workers=2, gpu=True, cpus_per_worker=2.5, data_cpus=0.5)
    assert resources.bundle == {"CPU": 3.0, "GPU": 1}
    assert resources.threads == 2
    assert Resources(1, 1, False, 0.5, 0.5).bundle == {"CPU": 1.0}
    assert Resources(1, 1, False, 0.5, 0.5).threads == 1


def test_what_fits_is_granted(ray_session):
    resources = preflight(ClusterConfig(num_workers=2))
    assert resources == Resources(min_workers=2, max_workers=2, gpu=False, cpus_per_worker=1.0, data_cpus=1.0)
    assert preflight(ClusterConfig(num_workers=(2, 9))).max_workers == 9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClusterConfig(num_workers=3), r"^3 workers need 6 CPUs.*the cluster has 4.*cluster\.num_workers to 2, or"),
        (ClusterConfig(num_workers=(3, 9)), r"cluster\.num_workers to \[2, 9\]"),
        (ClusterConfig(cpus_per_worker=8), r"^1 worker needs 9 CPUs.*lower cluster\.cpus_per_worker to 3,"),
        (ClusterConfig(cpus_per_worker=4, data_cpus=4), r"cluster\.cpus_per_worker and cluster\.data_cpus to 4 togeth"),
        (WorkersConfig(num_workers=5), r"^5 workers need 5 CPUs \(1 each\), but .*cluster\.num_workers to 4, or add"),
        (WorkersConfig(cpus_per_worker=4.5), r"^1 worker needs 4\.5 CPUs .*: lower cluster\.cpus_per_worker to 4, or"),
        (ClusterConfig(num_workers=2, cpus_per_worker=3, data_cpus=0.1), r"2 workers need 6\.2 CPUs"),
        (ClusterConfig(gpu="yes"), r"cluster\.gpu 'yes', but the cluster has 0 GPUs: set cluster\.gpu to 'no'"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused(ray_session, config, message):
    with pytest.raises(InputError, match=message):
        preflight(config)


def test_a_worker_with_its_data_is_never_spread_over_nodes():
    nodes = [node({"CPU": 3.0}), node({"CPU": 3.0})]
    assert fit(ClusterConfig(num_workers=2), nodes, None).max_workers == 2
    with pytest.raises(InputError, match=r"3 workers need 6 CPUs.*has 6, with room for 2 on 2 nodes: set .* to 2"):
        fit(ClusterConfig(num_workers=3), nodes, None)
    assert fit(ClusterConfig(num_workers=10, cpus_per_worker=0.2, data_cpus=0.1), [node({"CPU": 3.0})], None)


def test_room_is_what_nodes_hold_or_may_after_an_autoscaler_has_grown_the_cluster(monkeypatch):
    nodes = [node({"CPU": 8.0, "GPU": 2.0}, head=True), node({"CPU": 3.0})]
    limits = Limits({"large": ({"CPU": 32.0}, 4)}, 4)
    monkeypatch.setattr("ray.nodes", lambda: [each | {"Alive": True} for each in nodes])
    monkeypatch.setattr("sane_ray.preflight.autoscaling_limits", lambda alive: limits)
    assert room({"CPU": 1.0, "GPU": 0.0}, "an actor") == 11
    assert room({"CPU": 1.0, "GPU": 0.25}, "an actor") == 8
    assert room({"CPU": 16.0, "GPU": 0.0}, "an actor") == 1
    with pytest.raises(
        InputError, match=r"an actor needs 16 CPUs and 0\.5 GPUs of one node, .* 32 CPUs and 2 GPUs at its"
    ):
        room({"CPU": 16.0, "GPU": 0.5}, "an actor")


def test_gpus_are_taken_where_there_are_enough():
    nodes = [node({"CPU": 8.0, "GPU": 2.0}), node({"CPU": 8.0})]
    assert fit(ClusterConfig(num_workers=2), nodes, None).gpu
    assert fit(ClusterConfig(num_workers=(2, 8)), nodes, None).gpu
    assert not fit(ClusterConfig(num_workers=8, gpu="no"), nodes, None).gpu
    assert not fit(ClusterConfig(num_workers=2), nodes[1:], None).gpu
    with pytest.raises(InputError, match=r"has 2 GPUs: set cluster\.gpu to 'no', or cluster\.num_workers to 2, or add"):
        fit(ClusterConfig(num_workers=3), nodes, None)
    with pytest.raises(InputError, match=r"2 workers need 10 CPUs.*and a GPU.*room for 1 on 2 nodes"):
        fit(ClusterConfig(num_workers=2, cpus_per_worker=4), nodes, None)


LIMITS = Limits({"head": ({"CPU": 0}, 0), "small": ({"CPU": 4}, 3), "large": ({"CPU": 16, "GPU": 4}, 2)}, 4)
EMPTY = [node({}, node_type="head", head=True)]


def test_nodes_that_an_autoscaler_may_add_are_counted():
    assert fit(ClusterConfig(num_workers=20, gpu="no"), EMPTY, LIMITS)  # two large nodes and two of the small ones
    with pytest.raises(InputError, match=r"has 40 at its autoscaler's limits, with room for 20.*num_workers to 20"):
        fit(ClusterConfig(num_workers=21, gpu="no"), EMPTY, LIMITS)
    assert fit(ClusterConfig(num_workers=8, gpu="yes"), EMPTY, LIMITS).gpu
    with pytest.raises(InputError, match=r"8 GPUs at its autoscaler's limits"):
        fit(ClusterConfig(num_workers=9, gpu="yes"), EMPTY, LIMITS)


def test_a_node_that_runs_is_not_counted_twice():
    running = [*EMPTY, node({"CPU": 16.0, "GPU": 4.0}, node_type="large")]
    assert reachable(running, LIMITS, {"CPU": 2}, 99) == reachable(EMPTY, LIMITS, {"CPU": 2}, 99)


def test_a_node_started_by_hand_stays_and_takes_one_of_the_autoscalers_places():
    by_hand = [*EMPTY, node({"CPU": 2.0})]
    cpus = sorted(resources.get("CPU", 0) for resources in reachable(by_hand, LIMITS, {"CPU": 2}, 99))
    assert cpus == [0, 2.0, 4, 16, 16]


def test_nodes_too_small_for_a_worker_do_not_take_a_place_of_the_limit():
    limits = Limits({"small": ({"CPU": 1}, 9), "large": ({"CPU": 8}, 2)}, 2)
    assert sum(resources.get("CPU", 0) for resources in reachable(EMPTY, limits, {"CPU": 2}, 99)) == 16


def test_limits_are_read_from_an_autoscalers_config():
    config = {
        "max_workers": 5,
        "available_node_types": {
            "head": {"resources": {"CPU": 2}, "max_workers": 0},
            "worker": {"resources": {"CPU": 8}, "max_workers": 9},
            "unknown": {"max_workers": 1},
        },
    }
    found = limits_of_config(config)
    assert found == Limits({"head": ({"CPU": 2}, 0), "worker": ({"CPU": 8}, 9), "unknown": ({}, 1)}, 5)
    del config["max_workers"]
    assert limits_of_config(config).max_nodes == 10
    assert limits_of_config(None) is None
    assert limits_of_config({}) is None
    assert limits_of_config({"available_node_types": {"head": {"resources": {"CPU": 2}}}}) is None


def test_limits_are_read_from_what_kuberay_derives_of_a_cluster():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    def pod(**limits):
        return {"spec": {"containers": [{"resources": {"limits": limits}}]}}

    resource = {
        "metadata": {"name": "cluster", "namespace": "default"},
        "spec": {
            "enableInTreeAutoscaling": True,
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod(cpu="2", memory="4G")},
            "workerGroupSpecs": [
                {
                    "groupName": "gpu",
                    "replicas": 0,
                    "minReplicas": 0,
                    "maxReplicas": 4,
                    "rayStartParams": {},
                    "template": pod(cpu="8", memory="64G", **{"nvidia.com/gpu": "1"}),
                }
            ],
        },
    }
    limits = limits_of_config(_derive_autoscaling_config_from_ray_cr(resource))
    assert limits.max_nodes == 4
    assert limits.node_types["gpu"] == ({"CPU": 8, "GPU": 1, "memory": 64 * 10**9}, 4)
    assert fit(ClusterConfig(num_workers=4), EMPTY, limits).gpu


def test_a_cluster_without_an_autoscaler_has_no_limits(ray_session):
    alive = ray_session.nodes()
    assert autoscaling_limits(alive) is None
    assert ask_head(alive[0]["NodeID"], ray_session.get_runtime_context().gcs_address) is None


def test_the_config_is_read_from_the_autoscaler_that_serves_this_cluster(tmp_path):
    config = tmp_path / "autoscaler.yaml"
    config.write_text(yaml.safe_dump({"available_node_types": {"worker": {"resources": {"CPU": 2}, "max_workers": 3}}}))
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "--gcs-address=127.0.0.9:1"]
    autoscaler = subprocess.Popen([*command, f"--autoscaling-config={config}"], stdin=subprocess.PIPE)
    try:
        assert limits_of_config(read_autoscaling_config("127.0.0.9:1")) == Limits({"worker": ({"CPU": 2}, 3)}, 3)
        assert read_autoscaling_config("127.0.0.9:2") is None
    finally:
        autoscaler.communicate()


def test_limits_that_a_host_tells_rays_control_store_are_found(ray_session):
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import ClusterConfig as Told

    told = Told()
    told.node_group_configs.add(name="some", resources={"CPU": 8}, max_count=2)
    told.node_group_configs.add(name="any", resources={"CPU": 4, "GPU": 1}, max_count=-1)
    global_worker.gcs_client.report_cluster_config(told.SerializeToString())
    try:
        limits = autoscaling_limits(ray_session.nodes())
    finally:
        global_worker.gcs_client.report_cluster_config(Told().SerializeToString())
    assert limits.node_types["some"] == ({"CPU": 8}, 2)
    assert fit(ClusterConfig(num_workers=5000), EMPTY, limits).gpu
    assert autoscaling_limits(ray_session.nodes()) is None


BIG = MemoryNeed(
    AutoencoderConfig(
        token_size=288, window=256, d_model=2048, heads=16, layers=8, latent_dim=128, max_positions=[50_000, 60, 512]
    ),
    PretrainingConfig(batch_size=64, sharding="none"),
    LossConfig(),
)


def granted(workers, *, gpu=True, most=0):
    return Resources(workers, most or workers, gpu, cpus_per_worker=1.0, data_cpus=1.0)


def test_memory_of_gpus_is_compared_by_their_type():
    h200 = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H200": 1.0}
    check_memory(BIG, granted(8), [h200])
    t4 = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:T4": 1.0}
    need = gigabytes(BIG.on(Placement(8, 8, gpu=True, bfloat16=False)).device)
    with pytest.raises(InputError, match=rf"^8 workers need {need} of GPU memory each .*T4 has 16 GB: set .*shard"):
        check_memory(BIG, granted(8), [t4])
    check_memory(BIG, granted(8), [{"CPU": 64.0, "GPU": 8.0, "accelerator_type:Unheard-Of": 1.0}])


def test_the_memory_of_a_type_with_several_sizes_is_the_largest_unless_a_label_says():
    node_of = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0}
    need = MemoryNeed(BIG.autoencoder, PretrainingConfig(batch_size=128, sharding="full"), LossConfig())
    assert 40e9 < need.on(Placement(2, 2, gpu=True)).device < 80e9
    check_memory(need, granted(2), [node_of])
    with pytest.raises(InputError, match=r"A100 40GB.* has 40 GB"):
        check_memory(need, granted(2), [node_of | {"accelerator_type:A100-40G": 1.0}])


def test_memory_of_a_node_is_shared_by_its_workers():
    nodes = [{"CPU": 8.0, "memory": 45e9}, {"CPU": 8.0, "memory": 45e9}]
    need = MemoryNeed(BIG.autoencoder, PretrainingConfig(batch_size=2, sharding="none"), LossConfig())
    check_memory(need, granted(1, gpu=False), nodes)
    with pytest.raises(
        InputError, match=r"memory on a node with 2 of them .*has 45 GB beside .*: set pretraining\.shard"
    ):
        check_memory(need, granted(2, gpu=False), nodes)
    with pytest.raises(InputError, match=r"^2 workers need"):  # at the most that the nodes hold
        check_memory(need, granted(1, gpu=False, most=2), nodes)


def test_checkpoints_of_gpu_workers_are_staged_in_the_memory_of_their_node():
    nodes = [{"CPU": 64.0, "GPU": 8.0, "accelerator_type:H200": 1.0, "memory": 20e9}]
    with pytest.raises(InputError, match=r"checkpoint copy 10\.\d GB"):
        check_memory(BIG, granted(8), nodes)


def test_what_nothing_helps_is_refused_without_false_advice():
    nodes = [{"CPU": 2.0, "memory": 5e8}]
    with pytest.raises(InputError, match=r"lower autoencoder\.d_model or autoencoder\.layers, or add nodes"):
        check_memory(BIG, granted(1, gpu=False), nodes)


def test_preflight_refuses_what_a_machine_has_no_memory_for(ray_session):
    huge = AutoencoderConfig(
        token_size=288, window=256, d_model=16384, heads=128, layers=48, latent_dim=128, max_positions=[100, 10, 10]
    )
    with pytest.raises(InputError, match=r"1 worker needs .* TB of memory on a node"):
        preflight(ClusterConfig(), MemoryNeed(huge, PretrainingConfig(), LossConfig()))


def test_a_node_that_does_not_see_the_storage_is_named(ray_session, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    marker.touch()
    assert nodes_without(marker, ray_session.nodes()) == []
    monkeypatch.chdir(tmp_path)
    apart = Path("/proc/self/cwd/marker")  # another folder in each process, as an unshared disk is on each node
    assert apart.exists()
    [blind] = nodes_without(apart, ray_session.nodes())
    assert blind.startswith(ray_session.nodes()[0]["NodeManagerAddress"])


def test_storage_is_refused_when_nodes_do_not_share_it(ray_session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twice = ray_session.nodes() * 2
    check_storage(tmp_path / "shared", twice)
    with pytest.raises(InputError, match=r"storage is /proc/self/cwd/own, but .* not see what is written there"):
        check_storage(Path("/proc/self/cwd/own"), twice)
    check_storage(Path("/proc/self/cwd/own"), ray_session.nodes())  # one node shares with itself
    assert [path.name for path in tmp_path.rglob("*")] in (["shared", "own"], ["own", "shared"])


def test_storage_that_cannot_be_written_is_refused(ray_session, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        check_storage(tmp_path / "file" / "storage", ray_session.nodes() * 2)


HEAD_ID = "f" * 51 + "00000"  # what Ray's own fake provider calls its head
DRIVER = """
import json, sys
import ray
from sane_ray.cluster import connect
from sane_ray.config import ClusterConfig
from sane_ray.errors import InputError
from sane_ray.preflight import ask_head, limits_of_config, preflight

def outcome(**asked):
    try:
        granted = preflight(ClusterConfig(**asked))
    except InputError as error:
        return str(error)
    return [granted.max_workers, granted.gpu]

with connect(ClusterConfig()):
    ray.get(ray.remote(num_cpus=0)(lambda: 0).remote())  # its first process may be slow to start
    asked = limits_of_config(ask_head(ray.nodes()[0]["NodeID"], ray.get_runtime_context().gcs_address))
    found = {
        "cpus": ray.cluster_resources().get("CPU", 0),
        "limits": [asked.node_types["worker"], asked.max_nodes],
        "fits": outcome(num_workers=3, cpus_per_worker=3),
        "too many": outcome(num_workers=4, cpus_per_worker=3),
    }
print(json.dumps(found))
"""


def test_a_real_cluster_without_a_single_worker_node_grants_what_it_may_grow_to(tmp_path):
    with autoscaled_head({"worker": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 5}}, 3) as environment:
        driver = subprocess.run([sys.executable, "-c", DRIVER], env=environment, cwd=tmp_path, capture_output=True)
    assert driver.returncode == 0, driver.stderr.decode()
    found = json.loads(driver.stdout.decode().splitlines()[-1])
    assert found["cpus"] == 0
    assert found["limits"] == [[{"CPU": 4}, 5], 3]
    assert found["fits"] == [3, False]
    assert "4 workers need 16 CPUs" in found["too many"]
    assert "has 12 at its autoscaler's limits" in found["too many"]


@contextlib.contextmanager
def autoscaled_head(node_types, max_workers):
    """A Ray head without CPUs whose autoscaler may add nodes; yields the environment of a driver that joins it.

    All its processes carry a mark in their environment, by which they, and only they, are ended.
    """
    folder = Path(tempfile.mkdtemp(prefix="sra"))  # short: Ray's socket paths are limited to 107 characters
    port = free_port()
    mark = {"SANE_RAY_TEST_AUTOSCALER": str(folder)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment = inherited | mark | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    config = folder / "autoscaler.yaml"
    config.write_text(yaml.safe_dump(autoscaler_config(port, node_types, max_workers)))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "0"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--ray-client-server-port", str(free_port())]
    command += ["--autoscaling-config", str(config), "--include-dashboard", "false", "--disable-usage-stats"]
    command += ["--temp-dir", str(folder), "--object-store-memory", str(10**8)]
    of_head = environment | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(command, env=of_head, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        while pids := marked(mark):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            time.sleep(0.1)
            head.poll()
        shutil.rmtree(folder, ignore_errors=True)


def autoscaler_config(port, node_types, max_workers):
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    lists = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
    lists += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return {name: [] for name in lists} | {
        "cluster_name": "test",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 60,
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": node_types
        | {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}},
    }


def marked(mark):
    """Processes that carry the mark and live."""
    [(name, value)] = mark.items()
    wanted, found = f"{name}={value}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
