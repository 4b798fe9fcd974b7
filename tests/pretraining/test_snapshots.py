"""Snapshots of a training model reach an evaluation, and training waits for none."""

import logging
import threading

import pytest

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig
from sane_ray.pretraining import export
from sane_ray.pretraining.snapshots import Snapshots


class Evaluations:
    """Only remembers what it is asked for."""

    def __init__(self):
        self.asked, self.timeout = [], None

    def submit(self, step, epoch, model):
        self.asked.append((step, epoch, model))

    def collect(self):
        return [{"step": step} for step, _, _ in self.asked]

    def wait(self, timeout):
        self.timeout = timeout


@pytest.fixture
def model():
    return SANE(
        AutoencoderConfig(token_size=4, window=2, d_model=8, heads=1, layers=1, latent_dim=2, max_positions=[2, 2, 2])
    )


def test_a_model_that_was_written_is_evaluated(model, tmp_path):
    (tmp_path / "snapshots" / "step_000000001").mkdir(parents=True)  # of workers that died
    evaluations = Evaluations()
    snapshots = Snapshots(tmp_path / "snapshots", {}, evaluations)
    assert not (tmp_path / "snapshots").exists()
    snapshots.take(model, 3, 0.5)
    snapshots.finish(7.0)
    ((step, epoch, folder),) = evaluations.asked
    assert (step, epoch, evaluations.timeout) == (3, 0.5, 7.0)
    assert SANE.from_pretrained(folder).config == model.config
    assert snapshots.collect() == [{"step": 3}]
    snapshots.close()


def test_while_a_model_is_being_written_the_next_is_left_out(model, tmp_path, monkeypatch, caplog):
    storage_answers, write = threading.Event(), export._write

    def slowly(*arguments):
        storage_answers.wait()
        write(*arguments)

    monkeypatch.setattr(export, "_write", slowly)
    evaluations = Evaluations()
    snapshots = Snapshots(tmp_path / "snapshots", {}, evaluations)
    with caplog.at_level(logging.WARNING):
        snapshots.take(model, 1, 0.1)
        snapshots.take(model, 2, 0.2)
    assert "step 2 is not evaluated: the model before is still being written" in caplog.text
    assert snapshots.collect() == []
    storage_answers.set()
    snapshots.finish(1.0)
    assert [step for step, _, _ in evaluations.asked] == [1]


def test_ranks_without_evaluations_take_part_and_find_nothing(model, tmp_path):
    snapshots = Snapshots(tmp_path / "snapshots")
    snapshots.take(model, 1, 0.1)
    snapshots.finish(1.0)
    assert snapshots.collect() == []
