"""The numbers of speed that a training logs, exact, by a clock of our own."""

import io
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from small_training import B, W, make_batches, make_trainer

from sane_ray.pretraining import launcher, progress
from sane_ray.pretraining.checkpoints import MANIFEST
from sane_ray.pretraining.progress import Progress
from sane_ray.pretraining.step import METRICS

FLOPS_PER_TOKEN = 1000.0
ROW = torch.arange(1.0, len(METRICS) + 6, dtype=torch.float64)
"""What a step returns: metrics 1, 2, 3, ..., and five sums."""


class Clock:
    """Seconds that only the test lets pass."""

    def __init__(self):
        self.now = 50.0

    def perf_counter(self):
        return self.now

    def time(self):
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Training:
    """Steps of one of several workers that last as long as the test says."""

    def __init__(self, clock, world_size=1, peak_flops=None):
        model = types.SimpleNamespace(
            config=types.SimpleNamespace(window=W), flops_per_token=lambda window: {W: FLOPS_PER_TOKEN}[window]
        )
        self.clock, self.state = clock, types.SimpleNamespace(step=0)
        trainer = types.SimpleNamespace(
            model=model, state=self.state, world_size=world_size, device=torch.device("cpu")
        )
        self.progress = Progress(trainer, steps_per_epoch=4, tokens_per_step=2 * B * W, peak_flops=peak_flops)

    def step(self, seconds, waiting=0.0, row=ROW):
        with self.progress.waiting():
            self.clock.now += waiting
        self.clock.now += seconds
        self.state.step += 1
        self.progress.add(row)

    def pause(self, seconds):
        self.clock.now += seconds
        self.progress.restart()


def test_the_last_point_tells_the_speed_of_all_steps_since_the_one_before(clock):
    training = Training(clock, peak_flops=1e6)
    for _ in range(4):
        training.step(1.5, waiting=0.5)
    *before, last = training.progress.points()
    assert [point["step"] for point in (*before, last)] == [1, 2, 3, 4]
    assert not any("tokens_per_s" in point for point in before)
    tokens = 2 * B * W * 4  # of both views of the global batches
    assert last["tokens_per_s"] == tokens / 8.0
    assert last["flops_per_s"] == tokens / 8.0 * FLOPS_PER_TOKEN
    assert last["mfu"] == tokens / 8.0 * FLOPS_PER_TOKEN / 1e6
    assert (last["data_wait_fraction"], last["paused_fraction"], last["workers"]) == (0.25, 0.0, 1.0)
    training.step(1.0)
    (alone,) = training.progress.points()
    assert (alone["tokens_per_s"], alone["data_wait_fraction"]) == (2 * B * W, 0.0)


def test_the_speed_is_that_of_all_workers_and_its_peak_too(clock, monkeypatch):
    monkeypatch.setattr(progress, "global_metrics", lambda rows, world_size: rows * world_size)
    training = Training(clock, world_size=4, peak_flops=1e5)
    training.step(2.0)
    (point,) = training.progress.points()
    assert point["tokens_per_s"] == 2 * B * W / 2.0, "a step is one global batch, whoever computes it"
    assert point["mfu"] == point["flops_per_s"] / 4e5
    assert point["workers"] == 4.0
    assert point["train/loss"] == 4 * ROW[METRICS.index("loss")]


def test_pauses_are_told_and_slow_nothing_down(clock):
    training = Training(clock)
    training.step(1.0)
    (first,) = training.progress.points()
    training.pause(3.0)  # validation, say
    training.pause(2.0)
    training.step(4.0, waiting=1.0)
    (second,) = training.progress.points()
    training.step(5.0)
    (third,) = training.progress.points()
    assert [point["paused_fraction"] for point in (first, second, third)] == [0.0, 0.5, 0.0]
    assert (second["tokens_per_s"], second["data_wait_fraction"]) == (2 * B * W / 5.0, 0.2)


def test_what_is_begun_anew_is_a_pause_from_the_last_report_on(clock):
    training = Training(clock)
    training.step(1.0)
    training.progress.points()
    training.step(7.0, waiting=2.0)
    training.pause(0.0)  # the steps are gone, as after going back
    assert training.progress.points() == []
    training.step(1.0)
    (point,) = training.progress.points()
    assert point["paused_fraction"] == 0.9
    assert (point["tokens_per_s"], point["data_wait_fraction"]) == (2 * B * W, 0.0)


def test_a_device_of_unknown_peak_has_no_mfu(clock):
    training = Training(clock)
    training.step(1.0)
    (point,) = training.progress.points()
    assert "mfu" not in point and point["peak_memory_mb"] > 0


def test_every_step_has_its_own_numbers(clock):
    training = Training(clock)
    training.step(1.0)
    training.step(1.0, row=2 * ROW)
    first, second = training.progress.points()
    for place, name in enumerate(METRICS):
        assert (first[f"train/{name}"], second[f"train/{name}"]) == (place + 1, 2 * (place + 1))
    assert (first["epoch"], second["epoch"]) == (0.25, 0.5)
    assert (first["time"], second["time"]) == (1e9 + 51, 1e9 + 52)


def test_steps_without_a_usable_gradient_are_marked_in_their_points(clock):
    trainer = make_trainer()
    measured = Progress(trainer, steps_per_epoch=4, tokens_per_step=2 * B * W, peak_flops=None)
    usable, broken = make_batches(2)
    broken.view_1.fill_(float("inf"))
    for batch in (usable, broken):
        clock.now += 1.0
        measured.add(trainer.step(batch))
    points = measured.points()
    assert [(point["step"], point["train/skipped"]) for point in points] == [(1, 0.0), (2, 1.0)]
    window_flops = trainer.model.flops_per_token(W)
    assert points[-1]["flops_per_s"] == points[-1]["tokens_per_s"] * window_flops > 0


def test_the_bar_goes_back_with_workers_that_start_again(tmp_path, monkeypatch):
    checkpoints = tmp_path / launcher.CHECKPOINT_FOLDER
    for name, is_complete in (("step_000000040", True), ("step_000000060.damaged", True), ("step_000000080", False)):
        (checkpoints / name).mkdir(parents=True)
        if is_complete:
            (checkpoints / name / MANIFEST).touch()
    shown: list[tuple[str, int]] = []
    point = {"step": 50, "train/loss": 1.0}
    monkeypatch.setattr(launcher, "last_point", lambda path: point)
    monkeypatch.setattr(launcher, "tqdm", lambda **kwargs: Bar(shown, **kwargs))
    run = types.SimpleNamespace(folder=tmp_path, history=tmp_path / "history.jsonl", total_steps=100)
    with launcher._progress_bar(run):
        for step in (42, 47, 41, 43):
            point = {"step": step, "train/loss": 1.0}
            deadline = time.monotonic() + 20
            while shown[-1] != ("pretraining", step) and time.monotonic() < deadline:
                time.sleep(0.02)
    assert shown == [("starting workers", 40), *(("pretraining", step) for step in (42, 47, 41, 43))]


class Bar(tqdm):
    """Notes what it shows."""

    def __init__(self, shown, **kwargs):
        self.shown = shown
        super().__init__(**kwargs, file=io.StringIO())

    def refresh(self, *args, **kwargs):
        self.note()
        return super().refresh(*args, **kwargs)

    def update(self, n=1):
        displayed = super().update(n)
        self.note()
        return displayed

    def note(self):
        seen = (self.desc.removesuffix(": "), self.n)
        if seen[0] and self.shown[-1:] != [seen]:
            self.shown.append(seen)
