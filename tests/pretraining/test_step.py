import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

sys.path.insert(0, str(Path(__file__).parent))
from rank_of_many import load
from small_training import (
    SETTINGS,
    STEPS,
    B,
    concatenate,
    filler,
    make_batches,
    make_trainer,
    token_distance,
    whole_weights,
)

from sane_ray.autoencoder.losses import explained_variance
from sane_ray.errors import InputError
from sane_ray.pretraining.sharding import compiles
from sane_ray.pretraining.step import METRICS, choose_precision

LOSS = METRICS.index("loss")
NORM = METRICS.index("gradient_norm")
SKIPPED = METRICS.index("skipped")

WORLDS = {
    2: ["plain", "micro", "recomputed", "kept", "bfloat16", "bfloat16_micro"],
    3: ["plain", "bfloat16"],
    4: ["plain", "node", "recomputed"],
}
"""How many processes are compared with one, and in which of SETTINGS: 8 windows are 3, 3 and 2 of three."""

CASES = [(world_size, name) for world_size, names in WORLDS.items() for name in names]


def run_steps(trainer, batches):
    return torch.stack([trainer.step(batch) for batch in batches])


@pytest.fixture(scope="module")
def many_ranks(tmp_path_factory):
    """What several processes made of the same global batches, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("many_ranks")
    script = Path(__file__).parent / "rank_of_many.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    outcomes = {}
    for world_size, names in WORLDS.items():
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(world_size), str(folder), *names], env=environment
            )
            for rank in range(world_size)
        ]
        assert [process.wait(timeout=300) for process in processes] == [0] * world_size
        outcomes[world_size] = torch.load(folder / f"{world_size}.pt", weights_only=True)
    return folder, outcomes


def one_rank(name):
    return make_trainer(behavior=token_distance, **SETTINGS[name])


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_many_ranks_train_as_one_on_the_same_global_batches(many_ranks, world_size, name):
    outcome = many_ranks[1][world_size][name]
    trainer = one_rank(name)
    metrics = run_steps(trainer, make_batches(STEPS))
    # In bfloat16 the gradient of a weight is rounded once for each rank, to 2^-9; AdamW makes more of small ones.
    tolerance, of_weights = (2e-2, 1e-3) if name.startswith("bfloat16") else (2e-5, 2e-5)
    torch.testing.assert_close(outcome["metrics"], metrics, atol=tolerance, rtol=tolerance)
    assert (metrics[:, SKIPPED] == 0).all()
    for weight_name, weight in whole_weights(trainer).items():
        torch.testing.assert_close(outcome["weights"][weight_name], weight, atol=of_weights, rtol=of_weights)
    expected = trainer.validate(make_batches(2, seed=9))
    assert outcome["validation"] == pytest.approx(expected, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_first_loss_in_bfloat16_is_that_of_one_rank(many_ranks, world_size):
    """The same weights are rounded alike, whether they are gathered in bfloat16 or rounded by autocast."""
    first = many_ranks[1][world_size]["bfloat16"]["metrics"][0]
    expected = one_rank("bfloat16").step(make_batches(1)[0])
    torch.testing.assert_close(first[:NORM], expected[:NORM], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(first[NORM], expected[NORM], atol=0, rtol=2**-8)


@pytest.mark.parametrize(
    ("name", "mesh", "placements", "parts"),
    [
        ("plain", [0, 1, 2, 3], ["S(0)"], 4),
        ("node", [[0, 1], [2, 3]], ["R", "S(0)"], 2),
        ("recomputed", [[0], [1], [2], [3]], ["R", "S(0)"], 1),
    ],
)
def test_matrices_of_two_nodes_of_two_are_spread_as_asked(many_ranks, name, mesh, placements, parts):
    """``full``, ``node`` and ``none``."""
    layout = many_ranks[1][4][name]["layout"]
    assert layout
    for rows, own in [found[2:] for found in layout.values()]:
        assert own == math.ceil(rows / parts)
    assert all(found[:2] == (mesh, placements) for found in layout.values())


@pytest.mark.parametrize(("name", "whole"), [("plain", False), ("kept", True)])
def test_weights_of_blocks_are_given_back_after_the_forward_pass_unless_they_are_to_be_kept(many_ranks, name, whole):
    gathered = many_ranks[1][2][name]["gathered"]
    assert gathered and set(gathered) == {whole}


@pytest.mark.parametrize(("world_size", "name"), [(2, "plain"), (4, "node")])
def test_one_rank_continues_what_many_saved(many_ranks, world_size, name):
    folder, outcomes = many_ranks
    resumed, uninterrupted = one_rank("plain"), one_rank("plain")
    load(resumed, folder / f"{world_size}_{name}", outcomes[world_size][name]["record"])
    assert resumed.state.step == STEPS
    run_steps(uninterrupted, make_batches(STEPS))
    further = make_batches(2, seed=2)
    torch.testing.assert_close(run_steps(resumed, further), run_steps(uninterrupted, further), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_many_ranks_continue_what_they_saved_bit_by_bit(many_ranks, world_size, name):
    outcome = many_ranks[1][world_size][name]
    assert torch.equal(outcome["resumed"], outcome["uninterrupted"])


@pytest.mark.parametrize("changed", [{"micro_batch": 1}, {"micro_batch": 3}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("loss", [{}, {"contrast": "none"}, {"behavior": 0.3, "reconstruction": "elements"}])
def test_how_it_is_computed_changes_nothing(changed, loss):
    batches = [concatenate([batch.rows(0, 7), filler(1)]) for batch in make_batches(STEPS)]
    whole, pieces = (make_trainer(loss=loss, behavior=token_distance, **how) for how in ({}, changed))
    torch.testing.assert_close(run_steps(pieces, batches), run_steps(whole, batches), atol=1e-5, rtol=1e-5)
    for name, weight in whole_weights(whole).items():
        torch.testing.assert_close(whole_weights(pieces)[name], weight, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_pieces_have_the_loss_of_the_whole():
    whole, pieces = (one_rank(name).step(make_batches(1)[0]) for name in ("bfloat16", "bfloat16_micro"))
    torch.testing.assert_close(pieces[:NORM], whole[:NORM], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pieces[NORM], whole[NORM], atol=0, rtol=2**-8)


def test_compiled_blocks_compute_the_same_and_keep_their_names(monkeypatch):
    monkeypatch.setattr(inductor, "compile_threads", 1)  # no processes of its own for one small block
    settings = {"activation_checkpointing": True}
    compiled, plain = make_trainer(compile="yes", **settings), make_trainer(compile="no", **settings)
    batches = make_batches(1)
    torch.testing.assert_close(run_steps(compiled, batches), run_steps(plain, batches), atol=1e-5, rtol=1e-5)
    assert compiled.state.state_dict().keys() == plain.state.state_dict().keys()


def test_a_missing_compiler_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"pretraining\.compile is 'yes', but there is no C\+\+ compiler"):
        make_trainer(compile="yes")
    assert not compiles("auto", torch.device("cuda"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_passes_over_micro_batches_drop_the_same(precision):
    trainer = make_trainer(dropout=0.5, micro_batch=2, precision=precision)
    views = trainer._views(make_batches(1)[0], noisy=True)
    trainer.model.train()
    first_pass = trainer._projections(views, trainer._ranges(B)).unflatten(0, (2, B))
    for number, (begin, end) in enumerate(trainer._ranges(B)):
        projection = trainer._forward(views.rows(begin, end), number)[2].unflatten(0, (2, -1))
        assert torch.equal(projection, first_pass[:, begin:end])


def test_filler_counts_nothing():
    batches = make_batches(STEPS)
    without, with_filler = (make_trainer(behavior=token_distance, loss={"behavior": 0.2}) for _ in range(2))
    filled = [concatenate([batch, filler(3)]) for batch in batches]
    torch.testing.assert_close(run_steps(with_filler, filled), run_steps(without, batches), atol=1e-5, rtol=1e-5)
    assert with_filler.validate(filled) == pytest.approx(without.validate(batches), abs=1e-5)


def test_the_behavioural_part_has_its_weight():
    trainer = make_trainer(behavior=token_distance, loss={"behavior": 0.25, "gamma": 0.3})
    row = dict(zip(METRICS, trainer.step(make_batches(1)[0]), strict=False))
    structural = 0.3 * row["loss_contrast"] + 0.7 * row["loss_recon"]
    assert row["loss_behavior"] > 0
    assert float(row["loss"]) == pytest.approx(float(0.75 * structural + 0.25 * row["loss_behavior"]), rel=1e-5)


def test_without_contrast_only_the_first_view_counts():
    trainer = make_trainer(loss={"contrast": "none"}, noise=0.0, erase=0.0)
    batch = make_batches(1)[0]
    other = replace(batch, view_2=torch.full_like(batch.view_2, float("nan")))
    row = trainer.step(other)
    assert row[LOSS] == row[METRICS.index("loss_recon")] > 0
    assert torch.isfinite(row).all()


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count():
    batch = make_batches(1)[0]
    broken = replace(batch, view_1=torch.full_like(batch.view_1, float("inf")))
    trainer = make_trainer()
    trainer.step(batch)
    before = {name: tensor.clone() for name, tensor in trainer.state.state_dict().items()}
    rate = trainer.state.scheduler.get_last_lr()
    assert trainer.step(broken)[SKIPPED] == 1
    after = trainer.state.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("rng."))
    assert trainer.state.step == 2 and trainer.state.scheduler.get_last_lr() != rate
    assert trainer.step(batch)[SKIPPED] == 0


def test_a_step_left_out_moves_the_schedule_alone():
    trainer, other = make_trainer(), make_trainer()
    batches = make_batches(2)
    run_steps(trainer, batches[:1])
    run_steps(other, batches[:1])
    weights = whole_weights(other)
    other.skip()
    assert other.state.step == 2
    assert all(torch.equal(weights[name], weight) for name, weight in whole_weights(other).items())
    trainer.step(batches[1])
    rate = METRICS.index("learning_rate")
    assert trainer.step(batches[0])[rate] == other.step(batches[0])[rate]


def test_validation_tells_how_embeddings_spread():
    measured = make_trainer().validate(make_batches(2))
    assert measured["val/embedding_norm"] > 0
    assert 1 <= measured["val/effective_rank"] <= 5


def test_sinusoidal_positions_train_too():
    trainer = make_trainer(positions="sinusoidal", steps=30)
    rows = run_steps(trainer, make_batches(1) * 30)
    assert rows[-1, LOSS] < rows[0, LOSS]


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.1), (20, 0.05), (5, 0.2), (4, 0.25), (2, 0.5), (1, 0.3)])
def test_a_cycle_of_any_length_can_be_walked(steps, warmup):
    trainer = make_trainer(steps=steps, warmup=warmup)
    rates = run_steps(trainer, make_batches(1) * steps)[:, METRICS.index("learning_rate")]
    assert torch.isfinite(rates).all() and (rates > 0).all()


def test_the_loss_falls_and_the_explained_variance_rises():
    trainer = make_trainer(steps=150, noise=0.0, erase=0.0)
    batch = make_batches(1)[0]
    metrics = run_steps(trainer, [batch] * 150)
    assert metrics[-1, LOSS] < 0.5 * metrics[0, LOSS]
    assert explained_variance(metrics[-1, len(METRICS) :]) > explained_variance(metrics[0, len(METRICS) :]) + 0.3


def test_gradients_are_clipped_and_their_norm_before_is_told():
    batches = make_batches(1)
    free, clipped = make_trainer(gradient_clip=0.0), make_trainer(gradient_clip=1e-3)
    beta = clipped.state.optimizer.param_groups[0]["betas"][0]  # of this step; the schedule changes it
    assert run_steps(free, batches)[0, NORM] == run_steps(clipped, batches)[0, NORM]
    moments = [state["exp_avg"].flatten() / (1 - beta) for state in clipped.state.optimizer.state.values()]
    assert float(torch.cat(moments).norm()) == pytest.approx(1e-3, rel=1e-3)


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
    exact, rounded = (
        run_steps(make_trainer(precision=p, noise=0.0, erase=0.0), batches)[0, LOSS] for p in ("float32", "bfloat16")
    )
    assert exact != rounded
    assert float(rounded) == pytest.approx(float(exact), rel=0.02)


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_precision_is_as_asked_or_what_the_processor_multiplies(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == (torch.bfloat16 if avx512 or amx else torch.float32)
    assert [choose_precision(asked, cpu) for asked in ("bfloat16", "float32")] == [torch.bfloat16, torch.float32]
