import os
from pathlib import Path

import pytest

from sane_ray.cluster import connect, default_storage, required_cpus
from sane_ray.config import ClusterConfig
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
