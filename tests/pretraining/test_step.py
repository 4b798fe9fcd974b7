import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_training import STEPS, make_batches, make_trainer, whole_weights

from sane_ray.autoencoder.losses import explained_variance
from sane_ray.pretraining.step import METRICS, choose_precision

LOSS = METRICS.index("loss")
NORM = METRICS.index("gradient_norm")


def run_steps(trainer, batches):
    return torch.stack([trainer.step(batch) for batch in batches])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes made of the same global batches."""
    folder = tmp_path_factory.mktemp("two_ranks")
    script = Path(__file__).parent / "rank_of_two.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=180) for process in processes] == [0, 0]
    return folder, torch.load(folder / "two.pt", weights_only=True)


def test_two_ranks_train_as_one_on_the_same_global_batches(two_ranks):
    trainer = make_trainer()
    metrics = run_steps(trainer, make_batches(STEPS))
    _, two = two_ranks
    torch.testing.assert_close(two["metrics"], metrics, atol=1e-5, rtol=1e-5)
    for name, weight in whole_weights(trainer).items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-5, rtol=1e-5)


def test_two_ranks_validate_as_one(two_ranks):
    trainer = make_trainer()
    run_steps(trainer, make_batches(STEPS))
    _, two = two_ranks
    assert two["validation"] == pytest.approx(trainer.validate(make_batches(2, seed=9)), abs=1e-5)


def test_one_rank_continues_what_two_saved(two_ranks):
    folder, _ = two_ranks
    resumed, uninterrupted = make_trainer(seed=5), make_trainer()
    resumed.state.load(folder / "checkpoint")
    assert resumed.state.step == STEPS
    run_steps(uninterrupted, make_batches(STEPS))
    further = make_batches(2, seed=2)
    torch.testing.assert_close(run_steps(resumed, further), run_steps(uninterrupted, further), atol=1e-5, rtol=1e-5)


def test_two_ranks_continue_what_two_saved_bit_by_bit(two_ranks):
    _, two = two_ranks
    assert torch.equal(two["resumed"], two["uninterrupted"])


def test_two_ranks_in_bfloat16_stay_close_to_one_in_bfloat16(two_ranks):
    _, two = two_ranks
    one = run_steps(make_trainer(precision="bfloat16"), make_batches(2, seed=2))
    torch.testing.assert_close(two["bfloat16"][:, :NORM], one[:, :NORM], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(two["bfloat16"][:, NORM], one[:, NORM], atol=0, rtol=2e-2)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.1), (20, 0.05), (5, 0.2), (4, 0.25), (2, 0.5), (1, 0.3)])
def test_a_cycle_of_any_length_can_be_walked(steps, warmup):
    trainer = make_trainer(steps=steps, warmup=warmup)
    rates = run_steps(trainer, make_batches(1) * steps)[:, METRICS.index("learning_rate")]
    assert torch.isfinite(rates).all() and (rates > 0).all()


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path):
    batches = make_batches(6)
    uninterrupted, stopped, resumed = (make_trainer(noise=0.1, seed=seed) for seed in (0, 0, 7))
    expected = run_steps(uninterrupted, batches)
    run_steps(stopped, batches[:3])
    stopped.state.save(tmp_path)
    resumed.pretraining = stopped.pretraining
    resumed.state.load(tmp_path)
    torch.testing.assert_close(run_steps(resumed, batches[3:]), expected[3:], atol=0, rtol=0)
    for name, weight in whole_weights(uninterrupted).items():
        assert torch.equal(whole_weights(resumed)[name], weight)


def test_the_loss_falls_and_the_explained_variance_rises():
    trainer = make_trainer(steps=150)
    batch = make_batches(1)[0]
    metrics = run_steps(trainer, [batch] * 150)
    assert metrics[-1, LOSS] < 0.5 * metrics[0, LOSS]
    assert explained_variance(metrics[-1, len(METRICS) :]) > explained_variance(metrics[0, len(METRICS) :]) + 0.3


def test_gradients_are_clipped_and_their_norm_before_is_told():
    batches = make_batches(1)
    free, clipped = make_trainer(gradient_clip=0.0), make_trainer(gradient_clip=1e-3)
    assert run_steps(free, batches)[0, NORM] == run_steps(clipped, batches)[0, NORM]
    tight = make_trainer(gradient_clip=1e-3)
    norms = []
    tight.state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: norms.append(torch.cat([p.grad.flatten() for p in tight.model.parameters()]).norm())
    )
    tight.step(batches[0])
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3)


def test_noise_leaves_padding_zero_and_differs_from_step_to_step():
    trainer = make_trainer(noise=0.5)
    batch = make_batches(1)[0]
    torch.manual_seed(0)
    tokens, signal, _ = trainer._augmented(batch)
    padding = torch.arange(tokens.shape[-1]) >= signal[..., None]
    assert (tokens[padding] == 0).all()
    assert not torch.equal(tokens, trainer._augmented(batch)[0])


def test_only_matrices_and_embeddings_decay():
    decayed, rest = make_trainer(weight_decay=0.1).state.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}


def test_validation_changes_nothing():
    trainer = make_trainer(noise=0.5)
    batches = make_batches(2)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    assert trainer.validate(batches) == trainer.validate(batches)
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())


def test_bfloat16_stays_close_to_float32():
    batches = make_batches(1)
    exact, rounded = (run_steps(make_trainer(precision=p), batches)[0, LOSS] for p in ("float32", "bfloat16"))
    assert exact != rounded
    assert float(rounded) == pytest.approx(float(exact), rel=0.02)


def test_precision_is_as_asked_or_what_the_processor_multiplies():
    assert choose_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert choose_precision("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
