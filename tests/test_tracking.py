"""Tracking against real MLflow: SQLite, a server that dies and comes back, one that hangs, and none at all."""

import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from sane_ray import tracking
from sane_ray.errors import InputError
from sane_ray.tracking import PARENT_TAG, Tracker, default_uri, flatten, tracked, ui_command


@pytest.fixture(autouse=True)
def quiet_mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """One folder of results, with a space in its name, whose database is created once."""
    return tmp_path_factory.mktemp("my results")


@pytest.fixture
def eager(monkeypatch):
    """Tries again at every call, so that a test need not wait for the next try."""
    monkeypatch.setattr(tracking, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(tracking, "LONGEST_WAIT", 0.0)
    monkeypatch.setattr(tracking, "WAIT_RATIO", 0.0)


class Server:
    """A real `mlflow server` on a free loopback port, with its own database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", f"{self.folder}/artifacts"]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        deadline = time.monotonic() + 60
        while not self.healthy():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not come up in a minute"
            time.sleep(0.2)

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the server's own session: its command and its worker
            self.process.wait()
            self.process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


def start(uri: str, folder: Path, **changes) -> Tracker:
    settings = {"experiment": "pretraining", "run_name": "a", "identity": "a-1234", "params": {}} | changes
    return Tracker.start(uri=uri, folder=folder, **settings)


def point(step: int, **metrics: float) -> dict:
    return {"step": step, "time": 1_700_000_000 + step / 8, **(metrics or {"loss": 1.0 / (step + 1)})}


def history(uri: str, run_id: str | None, name: str = "loss") -> list[tuple[int, int, float]]:
    """Step, time in milliseconds and value of everything MLflow has, in the order it was logged."""
    assert run_id is not None
    metrics = MlflowClient(tracking_uri=uri).get_metric_history(run_id, name)
    return [(metric.step, metric.timestamp, metric.value) for metric in metrics]


def logged(*steps: int) -> list[tuple[int, int, float]]:
    return [(step, 1_700_000_000_000 + step * 125, 1.0 / (step + 1)) for step in steps]


# --- names, params, addresses


def test_params_are_flat_by_dotted_path_and_cut():
    flat = flatten(
        {"model": {"d": 8, "deep": {"x": None, "empty": {}}}, "list": [1, "b"], "on": True, "long": "y" * 9000}
    )
    assert flat == {
        "model.d": "8",
        "model.deep.x": "None",
        "model.deep.empty": "{}",
        "list": '[1, "b"]',
        "on": "True",
        "long": "y" * 6000,
    }


def test_a_database_lies_beside_the_results_unless_a_server_is_named(tmp_path, monkeypatch):
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path("results")) == f"sqlite:///{tmp_path}/results/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_uri(tmp_path) == "http://tracking:5000"


def test_the_ui_command_can_be_pasted_and_shows_no_password():
    assert ui_command("sqlite:////a b/mlflow.db") == (
        "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db' --host 127.0.0.1 --port 5000"
    )
    assert ui_command("https://me:secret@tracking.org") == "https://***@tracking.org"


@pytest.mark.parametrize(
    "uri", ["mlruns", "file:///tmp/mlruns", "postgresql://me:secret@host/db", "sqlite:///:memory:"]
)
def test_an_address_that_cannot_be_written_in_bounded_time_is_refused(tmp_path, uri):
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as refusal:
        start(uri, tmp_path)
    assert "secret" not in str(refusal.value)


def test_an_identity_with_an_apostrophe_is_refused(tmp_path):
    with pytest.raises(InputError, match="apostrophe"):
        start(default_uri(tmp_path), tmp_path, identity="it's")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"loss": 1.0}, "step"),
        ({"step": 1.5, "loss": 1.0}, "step"),
        ({"step": 1, "loss": "low"}, "'loss' is 'low'"),
        ({"step": 1, "loss": np.ones(2)}, "not a number"),
        ({"step": 1, "a{": 1.0, "a}": 2.0}, "taken"),
        ({"step": 1, "//": 1.0}, "nothing that MLflow can store"),
    ],
)
def test_a_point_that_cannot_be_stored_is_refused_in_words(storage, tmp_path, bad, words):
    tracker = start(default_uri(storage), tmp_path, identity="refusals")
    with pytest.raises(InputError, match=words):
        tracker.log([bad])
    assert tracker.finish()


# --- SQLite


def test_metrics_params_tags_and_artifacts_arrive(storage, tmp_path):
    uri = default_uri(storage)
    params = {"model": {"d": 8, "name": ""}, **{f"p{number}": number for number in range(150)}}
    tracker = start(uri, tmp_path, identity="arrive", params=params, tags={"preset": "digits"})
    (tmp_path / "curve.svg").write_text("<svg/>")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    tracker.log([point(0, **{"train/loss": np.float32(0.5), "val/loss": None}), point(1, **{"train/loss": 0.25})])
    tracker.log([{"step": 2, "ré{x}": 3}])
    tracker.log_artifact(tmp_path / "curve.svg", "plots")
    tracker.log_folder(tmp_path / "model")
    assert tracker.finish()
    assert not tracker.spool.exists()

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.data.tags["preset"] == "digits"
    assert run.data.params["model.d"] == "8"
    assert run.data.params["model.name"] == ""
    assert len(run.data.params) == 152
    assert run.data.metrics == {"train/loss": 0.25, "ré_x_": 3.0}
    assert history(uri, tracker.run_id, "train/loss") == [(0, 1_700_000_000_000, 0.5), (1, 1_700_000_000_125, 0.25)]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "plots")] == ["plots/curve.svg"]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "model")] == ["model/config.json"]
    assert list((storage / "mlartifacts").rglob("config.json"))


def test_the_same_identity_is_the_same_run_and_another_is_another(storage, tmp_path):
    uri = default_uri(storage)
    first = start(uri, tmp_path, identity="again", params={"rate": 0.1})
    first.log([point(0), point(1)])
    first.finish("FAILED")
    second = start(uri, tmp_path, identity="again", params={"rate": 0.2, "new": 1})
    client = MlflowClient(tracking_uri=uri)
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    assert client.get_run(first.run_id).data.params == {"rate": "0.1", "new": "1"}
    repeated = [point(step) | {"time": 1_800_000_000} for step in range(2)]  # at another time, so no double to MLflow
    second.log([*repeated, point(2), point(3)], new_steps_only=True)
    second.finish()
    assert history(uri, first.run_id) == logged(0, 1, 2, 3)
    assert start(uri, tmp_path, identity="other").run_id != first.run_id


def test_nan_and_infinity_are_kept_and_sent_twice_without_doubles(storage, tmp_path):
    uri = default_uri(storage)
    tracker = start(uri, tmp_path, identity="twice")
    values = [math.nan, math.inf, -math.inf, 0.5, 0.5]
    tracker._keep(
        [record for step, loss in enumerate(values) for record in tracking._point_records(point(step, loss=loss))]
    )
    kept = tracker.spool.read_bytes()
    assert tracker.flush()
    tracker.spool.write_bytes(kept)  # as if the process had been killed after sending, before forgetting
    assert tracker.finish()
    steps, _, stored = zip(*history(uri, tracker.run_id), strict=True)
    assert steps == (0, 1, 2, 3, 4)
    assert math.isnan(stored[0])
    assert stored[1] > 1e308
    assert stored[2] < -1e308
    assert stored[3:] == (0.5, 0.5)


def test_more_metrics_than_one_request_takes(storage, tmp_path):
    uri = default_uri(storage)
    tracker = start(uri, tmp_path, identity="many")
    tracker.log([{"step": step, **{f"m{number}": number for number in range(700)}} for step in range(3)])
    tracker.log([{"step": 3, **{f"m{number}": number for number in range(1700)}}])
    assert tracker.finish()
    assert [step for step, _, _ in history(uri, tracker.run_id, "m699")] == [0, 1, 2, 3]
    assert len(MlflowClient(tracking_uri=uri).get_run(tracker.run_id).data.metrics) == 1700


def test_neighbouring_points_share_a_request_up_to_its_limit():
    points = [{"step": step, "metrics": dict.fromkeys(map(str, range(400)), 0.0)} for step in range(4)]
    records = [{"status": "RUNNING"}, *points, {"status": "FINISHED"}]
    assert [len(batch) for batch in tracking._batches(records)] == [1, 2, 2, 1]


def test_two_processes_share_one_new_database_one_experiment_and_one_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sane_ray.tracking import Tracker, default_uri\n"
        "root = Path(sys.argv[1])\n"
        "settings = dict(uri=default_uri(root), experiment='e', run_name='r', params={'a': 1})\n"
        "print(Tracker.start(identity='same', folder=root / 'same', **settings).run_id,\n"
        "      Tracker.start(identity=sys.argv[2], folder=root / sys.argv[2], **settings).run_id)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("left", "right")]
    (same, left), (same_again, right) = (process.communicate(timeout=120)[0].split() for process in processes)
    assert same == same_again
    assert len({same, left, right}) == 3
    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    experiment = client.get_experiment_by_name("e")
    assert len(client.search_runs([experiment.experiment_id])) == 3


def test_a_file_that_is_no_database_does_not_stop_the_job(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_text("this is not SQLite, and longer than its header of a hundred bytes " * 4)
    tracker = start(default_uri(tmp_path), tmp_path)
    tracker.log([point(0)])
    assert tracker.run_id is None
    assert "not a database" in caplog.text


# --- runs of a block, nested or not


def block(uri: str, folder: Path, identity: str, parent: Tracker | None = None):
    settings = {"experiment": "blocks", "run_name": identity, "params": {}}
    return tracked(uri=uri, identity=identity, folder=folder, parent=parent, **settings)


def test_a_nested_run_has_its_parent_and_each_ends_by_itself(storage, tmp_path):
    uri = default_uri(storage)
    for _ in range(2):  # the second time finds the same runs
        with block(uri, tmp_path, "outer") as outer:
            with block(uri, tmp_path, "inner", outer) as inner:
                inner.log([point(step) for step in range(3)])
            with pytest.raises(ZeroDivisionError), block(uri, tmp_path, "broken", outer) as broken:
                broken.log([point(0)])
                raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), block(uri, tmp_path, "stopped") as stopped:
        raise KeyboardInterrupt
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("blocks").experiment_id])
    status = {run.info.run_name: (run.info.status, run.data.tags.get(PARENT_TAG)) for run in runs}
    assert len(runs) == 4
    assert status == {
        "outer": ("FINISHED", None),
        "inner": ("FINISHED", outer.run_id),
        "broken": ("FAILED", outer.run_id),
        "stopped": ("KILLED", None),
    }
    assert history(uri, inner.run_id) == logged(0, 1, 2)
    assert stopped.run_id != outer.run_id
    assert not list(tmp_path.glob("*.jsonl"))


def test_without_its_parent_a_run_stands_by_itself_until_it_is_known(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    away, uri = f"http://127.0.0.1:{free_port()}", default_uri(storage)
    with block(away, tmp_path, "away") as outer:
        assert outer.run_id is None
        with block(uri, tmp_path, "alone", outer) as inner:
            pass
    client = MlflowClient(tracking_uri=uri)
    assert PARENT_TAG not in client.get_run(inner.run_id).data.tags
    with block(uri, tmp_path, "away") as outer, block(uri, tmp_path, "alone", outer) as inner:
        assert client.get_run(inner.run_id).data.tags[PARENT_TAG] == outer.run_id


# --- servers


def test_a_killed_server_loses_nothing_and_doubles_nothing(server, tmp_path, eager, caplog):
    tracker = start(server.uri, tmp_path, identity="outage", params={"empty": "", "rate": 0.1})
    run_id = tracker.run_id
    tracker.log([point(0), point(1)])
    assert not tracker.spool.exists()

    server.kill()
    for step in range(2, 6):
        tracker.log([point(step)])
    in_controller = pickle.loads(pickle.dumps(tracker))
    in_controller.log([point(step) for step in range(4, 9)], new_steps_only=True)
    (tmp_path / "curve.svg").write_text("<svg/>")
    tracker.log_artifact(tmp_path / "curve.svg")
    assert caplog.text.count("cannot be written") == 2  # once in each copy, not once a call
    assert sum("metrics" in json.loads(line) for line in tracker.spool.read_text().splitlines()) == 7

    server.start()
    in_controller.log([point(9)], new_steps_only=True)
    assert "can be written again" in caplog.text
    assert tracker.finish()
    assert not tracker.spool.exists()
    client = MlflowClient(tracking_uri=server.uri)
    assert history(server.uri, run_id) == logged(*range(10))
    assert [file.path for file in client.list_artifacts(run_id)] == ["curve.svg"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.params == {"empty": "", "rate": "0.1"}
    assert start(server.uri, tmp_path, identity="outage").run_id == run_id


def test_a_run_that_starts_without_a_server_is_sent_later(server, tmp_path, monkeypatch, caplog, capsys):
    away = f"http://127.0.0.1:{free_port()}"
    tracker = start(away, tmp_path, identity="later", params={"rate": 0.1})
    tracker.log([point(0), point(1)])
    assert tracker.run_id is None
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert not tracker.finish()
    assert f"python -m sane_ray.tracking {tracker.spool}" in caplog.text
    assert tracker.spool.stat().st_mode & 0o077 == 0

    assert tracking.main([str(tracker.spool)]) == 1
    assert tracking.main([str(tracker.spool), "--uri", server.uri]) == 0
    assert server.uri in capsys.readouterr().out
    assert not tracker.spool.exists()
    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("pretraining")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`sane_ray.identity` = 'later'")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rate": "0.1"}
    assert history(server.uri, run.info.run_id) == logged(0, 1)


def test_a_server_that_hangs_is_asked_once_and_then_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracker = start(f"http://127.0.0.1:{deaf.getsockname()[1]}", tmp_path)
        for step in range(50):
            tracker.log([point(step)])
        deaf.setblocking(False)
        asked = 0
        try:
            while deaf.accept():
                asked += 1
        except BlockingIOError:
            pass
    assert asked == 1
    assert caplog.text.count("cannot be written") == 1
    assert len(tracker.spool.read_text().splitlines()) == 52  # the run, its status and 50 points
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


# --- the spool


def test_a_line_cut_by_a_killed_process_costs_only_itself(storage, tmp_path):
    tracker = start(default_uri(storage), tmp_path, identity="cut")
    tracker._keep(tracking._point_records(point(0)))
    with tracker.spool.open("a") as file:
        file.write('{"step": 1, "ti')
    tracker.log([point(2)])
    assert tracker.finish()
    assert history(default_uri(storage), tracker.run_id) == logged(0, 2)


def test_an_artifact_that_is_gone_holds_nothing_up(storage, tmp_path, caplog):
    tracker = start(default_uri(storage), tmp_path, identity="gone")
    tracker._keep([{"artifact": str(tmp_path / "gone.svg"), "folder": None}, *tracking._point_records(point(0))])
    assert tracker.finish()
    assert "gone.svg is gone" in caplog.text
    assert history(default_uri(storage), tracker.run_id) == logged(0)
    with pytest.raises(InputError, match="not a file"):
        tracker.log_artifact(tmp_path / "gone.svg")
    with pytest.raises(InputError, match="not a folder"):
        tracker.log_folder(tmp_path / "gone")


def test_sending_something_else_is_bad_input(tmp_path, capsys):
    assert tracking.main([str(tmp_path / "absent.jsonl")]) == 2
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    assert tracking.main([str(tmp_path / "other.jsonl")]) == 2
    errors = capsys.readouterr().err
    assert "absent.jsonl does not exist" in errors
    assert "other.jsonl is not a file of unsent tracking records" in errors


def test_tracking_needs_no_ray():
    code = "import sys, sane_ray.tracking; sys.exit('ray' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
