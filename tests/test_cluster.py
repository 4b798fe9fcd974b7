import os
from pathlib import Path

import pytest

from sane_ray.cluster import _places, connect, default_storage, preflight, required_cpus
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


def test_what_fits_is_granted(ray_session):
    resources = preflight(ClusterConfig(num_workers=2))
    assert (resources.num_workers, resources.gpu, resources.cpus_per_worker) == (2, False, 1.0)
    assert resources.threads == 1
    assert preflight(ClusterConfig(cpus_per_worker=2.5)).threads == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClusterConfig(num_workers=3), r"3 workers need 6 CPUs.*the cluster has 4.*cluster\.num_workers to 2"),
        (ClusterConfig(cpus_per_worker=8), r"1 workers need 9 CPUs.*lower cluster\.cpus_per_worker"),
        (ClusterConfig(num_workers=2, cpus_per_worker=3, data_cpus=0.1), r"2 workers need 6\.2 CPUs"),
        (ClusterConfig(gpu="yes"), r"cluster\.gpu 'yes', but the cluster has 0 GPUs: set cluster\.gpu to 'no'"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused(ray_session, config, message):
    with pytest.raises(InputError, match=message):
        preflight(config)


def test_a_worker_is_never_spread_over_nodes():
    assert _places({"CPU": 2.0}, 4, gpu=False) == 0
    assert _places({"CPU": 8.0, "GPU": 1.0}, 2, gpu=False) == 4
    assert _places({"CPU": 8.0, "GPU": 1.0}, 2, gpu=True) == 1
    assert _places({"CPU": 0.6}, 0.2, gpu=False) == 3


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
