import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sane_ray.cluster import connect, default_storage, not_started, required_cpus
from sane_ray.config import ClusterConfig, WorkersConfig
from sane_ray.errors import InputError


def test_inside_a_connected_process_nothing_is_started_or_ended(ray_session):
    before = ray_session.get_runtime_context().gcs_address
    with connect(ClusterConfig()):
        assert ray_session.get_runtime_context().gcs_address == before
    assert ray_session.is_initialized()


def test_our_own_ray_asks_for_a_token_and_listens_on_loopback(ray_session):
    import urllib.error
    import urllib.request

    address = os.environ["RAY_API_SERVER_ADDRESS"]
    assert address.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=10)
    assert refused.value.code == 401


def test_workers_and_their_data_streams_are_counted_together():
    assert required_cpus(ClusterConfig(num_workers=2, cpus_per_worker=1.5, data_cpus=0.5)) == 4
    assert required_cpus(ClusterConfig(num_workers=3, cpus_per_worker=0.5, data_cpus=0.3)) == 3
    assert required_cpus(ClusterConfig(num_workers=3, cpus_per_worker=0.9, data_cpus=0.1)) == 3
    assert required_cpus(ClusterConfig(num_workers=(2, 50))) == 4
    assert required_cpus(WorkersConfig(num_workers=3, cpus_per_worker=1.5)) == 5


def test_a_ray_that_does_not_start_is_one_sentence(tmp_path):
    """Paths of sockets have a limit, which a long folder exceeds: Ray raises pages of its own."""
    job = Path(__file__).parents[1] / "jobs" / "build_zoo.py"
    environment = os.environ | {"PYTHONPATH": str(job.parents[1]), "RAY_TMPDIR": str(tmp_path / ("x" * 100))}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(job), "--zoo.models", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: Ray does not start on this machine (") and "its logs are in" in done.stderr


def test_a_failed_start_tells_rays_first_words_and_its_own_logs(tmp_path):
    for name in ("session_2026_old", "session_2026_new"):
        (tmp_path / "ray" / name / "logs").mkdir(parents=True)
    os.utime(tmp_path / "ray" / "session_2026_old" / "logs", (1, 1))
    pages = RuntimeError("\nFailed to start GCS. \n" + "line of a log\n" * 50)
    told = not_started(pages, tmp_path, time.time())
    logs = tmp_path / "ray" / "session_2026_new" / "logs"
    assert told.startswith(f"Ray does not start on this machine (Failed to start GCS.): its logs are in {logs}; look")
    assert "it has written no logs" in not_started(pages, tmp_path / "elsewhere", time.time())


@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://bucket"])
def test_an_object_store_does_not_become_a_folder(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"config field storage is .*every node"):
        default_storage(address)


def test_results_go_where_they_are_wanted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert default_storage("") == tmp_path / "results"
    assert default_storage("elsewhere") == tmp_path / "elsewhere"
    assert default_storage("~/here") == Path.home() / "here"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert default_storage("") == Path.home() / "sane_ray_results"
