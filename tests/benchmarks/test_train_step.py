import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import train_step

from sane_ray.pretraining.step import METRICS

CPU = torch.device("cpu")


def small_job(precision="float32", noise=0.0):
    job, table = train_step.job_of("digits", batch_size=3)
    pretraining = replace(job.pretraining, precision=precision)
    autoencoder = replace(job.autoencoder, window=6, d_model=16, layers=1, latent_dim=4)
    augmentation = replace(job.augmentation, noise=noise)
    return replace(job, autoencoder=autoencoder, pretraining=pretraining, augmentation=augmentation), table


def test_plain_loop_trains_exactly_what_we_train():
    job, table = small_job()
    trainer, plain = train_step.build_trainer(job, CPU), train_step.PlainLoop(job, CPU)
    for batch in train_step.synthetic_batches(job, table, CPU):
        ours = trainer.step(batch)
        loss, norm = plain.step(batch)
        assert loss == pytest.approx(float(ours[METRICS.index("loss")]), rel=1e-4)
        assert norm == pytest.approx(float(ours[METRICS.index("gradient_norm")]), rel=1e-3)
    for ours_weight, plain_weight in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours_weight, plain_weight, atol=1e-4, rtol=1e-3)


def test_plain_loop_adds_the_noise_that_we_add():
    job, table = small_job(noise=0.5)
    batch = train_step.synthetic_batches(job, table, CPU)[0]
    quiet_job, _ = small_job()
    noisy, quiet = (train_step.PlainLoop(each, CPU).step(batch)[0] for each in (job, quiet_job))
    ours = float(train_step.build_trainer(job, CPU).step(batch)[METRICS.index("loss")])
    assert noisy > 1.1 * quiet
    assert noisy == pytest.approx(ours, rel=0.1)


@pytest.mark.parametrize("preset", ["digits", "cnn", "resnet18"])
def test_batches_look_like_windows_of_the_preset(preset):
    job, table = train_step.job_of(preset, batch_size=2)
    for batch in train_step.synthetic_batches(job, table, CPU):
        shape = (2, job.autoencoder.window, job.autoencoder.token_size)
        assert batch.view_1.shape == batch.view_2.shape == shape
        assert batch.view_1.dtype == torch.float16
        padding = torch.arange(shape[-1]) >= batch.signal[..., None]
        assert (batch.view_1[padding] == 0).all()
        assert (batch.view_1[~padding] != 0).float().mean() > 0.99
        assert (batch.positions >= 0).all()
        assert (batch.positions < torch.tensor(job.autoencoder.max_positions)).all()
        assert (batch.positions[:, 1:, 0] - batch.positions[:, :-1, 0] == 1).all()


def work(side="ours", precision="float32", code=None):
    return train_step.Work(side, "digits", 2, precision, "cpu", 1, code)


def test_sides_are_measured_in_processes_of_their_own():
    works = [work(), work("plain")]
    ours, plain = train_step.measure(works, steps=1, rounds=2)
    job, _ = train_step.job_of("digits", batch_size=2)
    assert (ours.side, plain.side) == ("ours", "plain")
    assert ours.ours_times == 1
    assert plain.ours_times > 0
    assert ours.flops_per_token == train_step.PlainLoop(job, CPU).model.flops_per_token(job.autoencoder.window)
    assert ours.flops == pytest.approx(ours.tokens_per_s * ours.flops_per_token)
    assert ours.of_peak == pytest.approx(ours.flops / ours.peak)
    assert 0 < plain.of_peak < 1
    assert ours.peak == plain.peak
    assert ours.mfu is None  # a CPU has no peak by name
    assert min(ours.megabytes, plain.megabytes) > 50
    assert not train_step._BURSTS  # nothing was built here


def test_figures_are_medians_of_rounds():
    own = [train_step.Cost(seconds, megabytes) for seconds, megabytes in ((8.0, 1.0), (4.0, 3.0), (99.0, 2.0))]
    ours = [train_step.Cost(seconds, 1.0) for seconds in (2.0, 2.0, 3.0)]
    speed = train_step.speed_of(work("plain"), own, ours, peak=1e9, steps=3)
    assert speed.tokens_per_s == pytest.approx(3 * 2 * 2 * 32 / 8)
    assert speed.ours_times == pytest.approx(4)
    assert speed.megabytes == 3


class Told:
    """A side whose costs are told beforehand."""

    def __init__(self, work, others):
        self.work, self.others, self.runs = work, others, 0

    def run(self, steps):
        self.runs += 1
        return train_step.Cost(self.runs, 1.0, self.others[(self.runs - 1) % len(self.others)])


@pytest.mark.parametrize(
    ("others", "kept", "runs"),
    [([0.0, 0.5, 0.1, 0.0], [1, 3], 3), ([0.5, 0.3, 0.4], [2, 5], 20), ([0.05], [1, 2], 2)],
)
def test_rounds_that_others_disturb_are_done_again(others, kept, runs, monkeypatch):
    monkeypatch.setattr(train_step, "PAUSE", 0)
    side, peaks = Told(work(), others), {}
    rounds = train_step.calm_rounds([side], steps=1, rounds=2, others=0.1, peaks=peaks)
    assert sorted(round_[side.work].seconds for round_ in rounds) == kept
    assert side.runs == runs
    assert peaks["float32"] > 0


def test_others_are_what_the_processors_do_besides(tmp_path, monkeypatch):
    assert train_step.busy_seconds() >= 0
    monkeypatch.setattr(train_step, "PROC_STAT", tmp_path / "stat")
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "stat").write_text("cpu  100 20 30 5000 60 7 8 9 0 0\ncpu0 1 2\n")
    assert train_step.busy_seconds() == pytest.approx(174 / os.sysconf("SC_CLK_TCK"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert train_step.busy_seconds() == 0


@pytest.mark.parametrize(
    ("side", "precision", "compiled", "recomputed", "micro_batch"),
    [
        ("ours", "bfloat16", "auto", False, 0),
        ("ours-float32", "float32", "auto", False, 0),
        ("ours-compiled", "bfloat16", "yes", False, 0),
        ("ours-eager", "bfloat16", "no", False, 0),
        ("ours-recomputed", "bfloat16", "auto", True, 0),
        ("ours-pieces", "bfloat16", "auto", False, 2),
        ("plain", "bfloat16", "auto", False, 0),
    ],
)
def test_sides_set_what_their_names_say(side, precision, compiled, recomputed, micro_batch):
    job, _ = train_step.job_of("digits", batch_size=6)
    told = train_step.Work(side, "digits", 6, "bfloat16", "cpu", 1)
    config = train_step.told(job, told).pretraining
    assert (config.precision, config.compile) == (precision, compiled)
    assert (config.activation_checkpointing, config.micro_batch) == (recomputed, micro_batch)
    assert told.format == precision


def test_published_code_has_a_precision_of_its_own():
    assert work("published", "bfloat16").format == "float32"
    on_gpu = train_step.Work("published", "digits", 2, "bfloat16", "cuda", 1)
    assert on_gpu.format == "float16"
    assert train_step.product_format(on_gpu.format) == torch.bfloat16


@pytest.mark.parametrize("sides", [["ours", "plain"], ["plain", "ours"]])
def test_sides_swap_places_every_round(sides):
    orders = [train_step.swapped(sides, number) for number in range(2)]
    assert orders == [sides, sides[::-1]]


def test_prints_a_table_without_ray_pyarrow_or_mlflow(tmp_path):
    for name in ("ray", "pyarrow", "mlflow", "pandas"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not to be imported')\n")
    arguments = ["--batch-size=2", "--steps=1", "--rounds=1", "--threads=1", "--device=cpu", "--precision=float32"]
    done = subprocess.run(
        [sys.executable, train_step.__file__, *arguments, "--published=nowhere", "--others=1"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
    )
    lines = done.stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if "float32" in line}
    assert list(rows) == ["ours", "plain", "peak"]
    rate, of_peak, times = (float(rows["ours"][column].replace(",", "")) for column in (2, 3, 5))
    assert times == 1
    assert of_peak == pytest.approx(rate / float(rows["peak"][1].replace(",", "")), rel=0.05, abs=0.002)
    assert "no published code at nowhere: own figures only" in lines


def test_help_teaches_and_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_step.parse(["--help"])
    assert "How to read the table" in capsys.readouterr().out
    for wrong in (["--steps", "0"], ["--sides", "plain", "ours"], ["--sides", "ours", "ours"]):
        with pytest.raises(SystemExit, match="2"):
            train_step.parse(wrong)


def test_the_published_side_needs_the_published_code():
    with pytest.raises(SystemExit, match="name a checkout with --published"):
        train_step.main(["--published", "nowhere", "--sides", "ours", "published"])
