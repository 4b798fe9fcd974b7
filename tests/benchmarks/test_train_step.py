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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_figures_follow_from_each_other(precision):
    job, table = small_job()
    speed = train_step.measure(job, table, precision, CPU, steps=1, rounds=1)
    assert speed.precision == precision
    assert speed.ratio == pytest.approx(speed.ours / speed.plain)
    assert speed.flops_per_token == train_step.PlainLoop(job, CPU).model.flops_per_token(6)
    assert speed.fraction_of_peak(speed.ours) == pytest.approx(speed.ours * speed.flops_per_token / speed.peak)
    assert 0 < speed.fraction_of_peak(speed.plain) < 1
    assert min(speed.megabytes_ours, speed.megabytes_plain) > 10


def test_prints_a_table_without_ray_pyarrow_or_mlflow():
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['ray', 'pyarrow', 'mlflow', 'pandas'])); "
        f"sys.path.insert(0, {str(Path(train_step.__file__).parent)!r}); "
        "import train_step; train_step.main(sys.argv[1:])"
    )
    arguments = ["--batch-size=2", "--steps=1", "--rounds=1", "--threads=1", "--device=cpu", "--precision=float32"]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    rows = {line.split()[1]: line.split()[2:] for line in done.stdout.splitlines() if line.startswith("float32")}
    ours, plain = ([float(value.replace(",", "")) for value in rows[side]] for side in ("ours", "plain"))
    assert ours[3] == pytest.approx(ours[0] / plain[0], rel=0.05)
    assert plain[3] == 1
    peak = float(rows["peak"][0].replace(",", ""))
    assert ours[2] == pytest.approx(ours[1] / peak, rel=0.05, abs=0.002)


def test_help_teaches_and_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_step.parse(["--help"])
    assert "How to read the table" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        train_step.parse(["--steps", "0"])


def test_the_loops_swap_places_every_round():
    calls = []
    bursts = [lambda name=name: calls.append(name) for name in ("ours", "plain", "product")]
    for number in range(2):
        assert len(train_step.one_round(bursts, number, CPU)) == 3
    assert calls == ["plain", "ours", "product", "ours", "plain", "product"]
