"""The tracking callback in a real Ray Train run whose worker dies once."""

import time
from pathlib import Path

from mlflow import MlflowClient

from sane_ray.tracking import Tracker, default_uri


def train_and_die_once(config: dict) -> None:
    """Reports ten steps two at a time and dies once after step 5, resuming as if its last checkpoint were of step 3."""
    import ray.train

    died = Path(config["folder"]) / "died"
    for step in range(4 if died.exists() else 0, 10, 2):
        points = [{"step": each, "time": time.time(), "loss": 1 / (1 + each)} for each in (step, step + 1)]
        ray.train.report({"history": points} if step != 6 else {"note": "nothing to log"})
        if step == 4 and not died.exists():
            died.touch()
            time.sleep(3)  # the controller looks every two seconds, and should see steps 4 and 5 twice
            raise RuntimeError("the worker dies here, once, as this test wants it")


def test_one_run_with_every_step_once_though_a_worker_dies(ray_session, tmp_path):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from sane_ray.tracking_callback import TrackingCallback

    uri = default_uri(tmp_path)
    tracker = Tracker.start(uri=uri, experiment="e", run_name="r", identity="r-1", params={}, folder=tmp_path / "run")
    TorchTrainer(
        train_and_die_once,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(
            name="r",
            storage_path=str(tmp_path / "ray"),
            callbacks=[TrackingCallback(tracker)],
            failure_config=FailureConfig(max_failures=1),
        ),
    ).fit()
    assert (tmp_path / "died").exists()
    assert tracker.finish()
    client = MlflowClient(tracking_uri=uri)
    assert tracker.run_id is not None
    assert [point.step for point in client.get_metric_history(tracker.run_id, "loss")] == [0, 1, 2, 3, 4, 5, 8, 9]
    assert len(client.search_runs([client.get_experiment_by_name("e").experiment_id])) == 1
