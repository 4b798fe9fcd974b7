"""Also run as a script by its own test of two processes: ``test_losses.py RANK WORLD_SIZE FOLDER``."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sane_ray.autoencoder.losses import (
    combine,
    contrast_gradient,
    error_scale,
    explained_variance,
    explained_variance_sums,
    gather_over_processes,
    identity,
    micro_loss,
    nt_xent,
    published_explained_variance,
    reconstruction,
    sane_loss,
    signal_mask,
)
from sane_ray.autoencoder.model import SANE
from sane_ray.autoencoder.published import from_published
from sane_ray.config import AutoencoderConfig, LossConfig

ROOT = Path(__file__).parents[2]

# Sizes that do not divide by two, so that shards are uneven.
CONFIG = AutoencoderConfig(
    token_size=33, window=5, d_model=36, heads=3, layers=2, latent_dim=7, max_positions=[19, 5, 7], projection_dim=5
)
WINDOWS, STEPS, SEED = 6, 3, 11
LOSSES = {
    "signal": LossConfig(gamma=0.3, reconstruction="signal"),
    "elements": LossConfig(gamma=0.7, temperature=0.5, reconstruction="elements"),
    "batch": LossConfig(gamma=0.5, normalization="batch"),
    "token": LossConfig(gamma=0.2, normalization="token", reconstruction="elements"),
    "alone": LossConfig(contrast="none", normalization="token"),
}
SHARDED = {"signal": CONFIG, "elements": CONFIG, "batch": dataclasses.replace(CONFIG, positions="sinusoidal")}
"""Losses that models are trained with, sharded over two processes."""
VALID = {"uneven": [[True, False, True], [False, True, False]], "one empty": [[True, True, False], [False] * 3]}
"""Which rows of each of two processes are windows."""


def batch(step):
    """Two views, positions and signal counts of a global batch; the second half of it holds far less signal."""
    generator = torch.Generator().manual_seed(step)
    counts = torch.randint(1, 34, (WINDOWS, 5), generator=generator)
    counts[WINDOWS // 2 :] = counts[WINDOWS // 2 :].clamp(max=6)
    columns = [torch.randint(size, (WINDOWS, 5), generator=generator) for size in CONFIG.max_positions]
    views = torch.randn(2, WINDOWS, 5, 33, generator=generator) * signal_mask(counts, 33)
    return views, torch.stack(columns, dim=-1), counts


def train(model, loss, gather, rows):
    """Losses and gradients of the first step and weights after three, on some windows of each global batch."""
    # With the usual tiny eps a step of AdamW is lr * sign(gradient): rounding, where the gradient is all but zero.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-4)
    results = {}
    for step in range(STEPS):
        views, positions, counts = batch(step)
        tokens = views[:, rows].flatten(0, 1)
        _, y, projection = model(tokens, positions[rows].repeat(2, 1, 1))
        losses = sane_loss(y, tokens, counts[rows].repeat(2, 1), projection, loss, gather)
        losses.total.backward()
        for name, value in losses._asdict().items():
            results[f"loss.{step}.{name}"] = value.detach()
        if step == 0:
            results |= {f"gradient.{name}": whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return results | {f"weight.{name}": whole(p.detach()) for name, p in model.named_parameters()}


def filled(rows, valid):
    """As many rows as ``valid`` has places, those of windows in order, with what must not count between them."""
    result = torch.full((len(valid), *rows.shape[1:]), 3, dtype=rows.dtype)
    result[torch.tensor(valid)] = rows
    return result


def gradients_of(loss, gather, valid, rows, micro_batch):
    """Losses and gradients of a model on some windows of a batch, all at once or ``micro_batch`` rows at a time."""
    model = SANE(CONFIG, seed=SEED)
    views, positions, counts = (part[..., rows, :, :] if part.dim() > 2 else part[rows] for part in batch(0))
    tokens = torch.stack([filled(view, valid) for view in views])
    positions, counts, valid = filled(positions, valid), filled(counts, valid), torch.tensor(valid)

    def run(begin, end):
        share = tokens[:, begin:end].flatten(0, 1), counts[begin:end].repeat(2, 1), valid[begin:end]
        _, y, projection = model(share[0], positions[begin:end].repeat(2, 1, 1))
        return y, *share, projection

    if micro_batch == 0:
        y, target, signal, _, projection = run(0, len(valid))
        losses = sane_loss(y, target, signal, None if loss.contrast == "none" else projection, loss, gather, valid)
        losses.total.backward()
    else:
        losses = accumulated(run, tokens.flatten(0, 1), counts.repeat(2, 1), loss, gather, valid, micro_batch)
    results = {f"loss.{name}": value.detach().clone() for name, value in losses._asdict().items()}
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {f"gradient.{name}": value for name, value in (zeros | gradients).items()}


def accumulated(run, target, signal, loss, gather, valid, micro_batch):
    """The same by micro-batches, as a training step does it."""
    pieces = [(begin, min(begin + micro_batch, len(valid))) for begin in range(0, len(valid), micro_batch)]
    scale = error_scale(target, signal, loss.reconstruction, loss.normalization, gather, valid)
    contrast = gradient = None
    if loss.contrast != "none":
        with torch.no_grad():
            halves = zip(*(run(*piece)[-1].chunk(2) for piece in pieces), strict=True)
            contrast, gradient = contrast_gradient(torch.cat([torch.cat(h) for h in halves]), loss, gather, valid)
    error = torch.zeros(())
    for begin, end in pieces:
        y, tokens, counts, real, projection = run(begin, end)
        known = None if gradient is None else torch.cat([half[begin:end] for half in gradient.chunk(2)])
        objective, part = micro_loss(y, tokens, counts, projection, loss, scale, known, real)
        objective.backward()
        error = error + part.detach()
    return combine(contrast, error, loss)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(rank, world_size, folder):
    """One of the processes: its share of each batch, through a model built on no device, sharded, then initialised."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    share = WINDOWS // world_size
    for name, loss in LOSSES.items():
        for case, valid in VALID.items():
            before = sum(sum(of_rank) for of_rank in valid[:rank])
            rows = slice(before, before + sum(valid[rank]))
            for micro_batch in (0, 2):
                results = gradients_of(loss, gather_over_processes, valid[rank], rows, micro_batch)
                save_file(results, f"{folder}/{name}.{case}.{micro_batch}.{rank}.safetensors")
    for name, config in SHARDED.items():
        with torch.device("meta"):
            model = SANE(config)
        for module in [*model.blocks(), model]:
            fully_shard(module)
        model.to_empty(device="cpu")
        model.init_weights(SEED)
        results = train(model, LOSSES[name], gather_over_processes, slice(rank * share, (rank + 1) * share))
        save_file({key: value.contiguous() for key, value in results.items()}, f"{folder}/{name}.{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), "2", str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module", params=list(SHARDED))
def one_and_two(request, two_processes):
    """Results of one process with the whole batch, and of each of two with half of it; and the model's config."""
    config = SHARDED[request.param]
    alone = train(SANE(config, seed=SEED), LOSSES[request.param], identity, slice(None))
    return alone, [load_file(two_processes / f"{request.param}.{rank}.safetensors") for rank in range(2)], config


def test_the_mean_loss_of_two_processes_is_that_of_one(one_and_two):
    alone, ranks, _ = one_and_two
    names = [name for name in alone if name.startswith("loss.")]
    assert len(names) == 3 * STEPS
    for name in names:
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, alone[name], rtol=1e-5, atol=1e-5)
    assert abs(ranks[0]["loss.0.reconstruction"] - ranks[1]["loss.0.reconstruction"]) > 0.01


def test_the_gradients_of_two_processes_are_those_of_one(one_and_two):
    alone, ranks, config = one_and_two
    names = [name for name in alone if name.startswith("gradient.")]
    assert len(names) == len(list(SANE(config).parameters()))
    for name in names:
        assert alone[name].norm() > 0
        for results in ranks:
            assert (results[name] - alone[name]).norm() <= 1e-5 * max(1, alone[name].norm())


def test_three_optimizer_steps_of_two_processes_are_those_of_one(one_and_two):
    alone, ranks, config = one_and_two
    for name, start in SANE(config, seed=SEED).state_dict().items():
        weight = alone[f"weight.{name}"]
        assert (weight - start).abs().max() > 5e-5  # five times the tolerance
        for results in ranks:
            torch.testing.assert_close(results[f"weight.{name}"], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("case", list(VALID))
@pytest.mark.parametrize("name", list(LOSSES))
def test_rows_without_windows_change_nothing_whichever_process_has_them(two_processes, name, case, micro_batch):
    windows = sum(sum(of_rank) for of_rank in VALID[case])
    alone = gradients_of(LOSSES[name], identity, [True] * windows, slice(0, windows), 0)
    files = [two_processes / f"{name}.{case}.{micro_batch}.{rank}.safetensors" for rank in range(2)]
    first, second = (load_file(file) for file in files)
    for key, expected in alone.items():
        mean = (first[key] + second[key]) / 2
        assert (mean - expected).norm() <= 1e-5 * max(1, expected.norm()), key
        used = key not in ("loss.contrast",) and "projection_head" not in key if name == "alone" else True
        assert (expected.norm() > 0) == used, key


@pytest.mark.parametrize("name", list(LOSSES))
def test_rows_without_windows_get_no_gradient_and_may_hold_anything(name):
    generator = torch.Generator().manual_seed(0)
    y, target = torch.randn(2, 8, 5, 12, generator=generator)
    projection, counts = torch.rand(8, 4, generator=generator), torch.randint(1, 13, (8, 5), generator=generator)
    valid = torch.tensor([True, False, True, False])
    y[1], target[3], counts[5] = math.inf, math.nan, 12
    leaves = y.requires_grad_(), projection.requires_grad_()
    losses = sane_loss(y, target, counts, projection, LOSSES[name], valid=valid)
    losses.total.backward()
    rows = torch.tensor([0, 2, 4, 6])
    expected = sane_loss(y[rows], target[rows], counts[rows], projection[rows], LOSSES[name])
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-6, atol=0)
    for leaf in leaves if LOSSES[name].contrast == "simclr" else leaves[:1]:
        changed = leaf.grad.flatten(start_dim=1).abs().sum(dim=1) > 0
        assert changed.tolist() == [True, False, True, False] * 2


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_batch_without_any_window_has_loss_zero_and_no_gradient(name):
    y, projection = torch.randn(4, 5, 12, requires_grad=True), torch.rand(4, 6, requires_grad=True)
    nothing = torch.zeros(4, 5, 12), torch.zeros(4, 5, dtype=torch.int32)
    losses = sane_loss(y, *nothing, projection, LOSSES[name], valid=torch.zeros(2, dtype=torch.bool))
    losses.total.backward()
    assert torch.stack(losses).tolist() == [0, 0, 0]
    assert not y.grad.any()
    assert projection.grad is None or not projection.grad.any()


@pytest.mark.parametrize("windows", [1, 3, 32])
def test_without_filler_losses_are_the_plain_means_to_the_bit(windows):
    generator = torch.Generator().manual_seed(windows)
    y, target = torch.randn(2, 2 * windows, 5, 33, generator=generator)
    counts = torch.randint(1, 34, (2 * windows, 5), generator=generator)
    target = target * signal_mask(counts, 33)
    projection = torch.randn(2 * windows, 7, generator=generator)
    rows = F.normalize(torch.stack(projection.chunk(2), dim=1).flatten(0, 1), dim=-1, eps=1e-8)
    logits = (rows @ rows.T / 0.1).masked_fill(torch.eye(2 * windows, dtype=torch.bool), -math.inf)
    contrast = F.cross_entropy(logits, torch.arange(2 * windows) ^ 1)
    masked = y.masked_fill(~signal_mask(counts, 33), 0.0)
    errors = {"signal": (target - masked).square().sum() / counts.sum(), "elements": F.mse_loss(masked, target)}
    for divide_by, error in errors.items():
        for valid in (None, torch.ones(windows, dtype=torch.bool)):
            loss = LossConfig(gamma=0.25, reconstruction=divide_by)
            losses = sane_loss(y, target, counts, projection, loss, valid=valid)
            assert (losses.contrast, losses.reconstruction) == (contrast, error)
            assert losses.total == 0.25 * contrast + 0.75 * error


def heterogeneous():
    """Reconstructed tokens, targets of very different scales and offsets, counts and mask."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(2, 13, (6, 5), generator=generator)
    mask = signal_mask(counts, 12)
    scale, offset = 10 ** (3 * torch.rand(2, 6, 5, 1, generator=generator) - 2)
    target = (offset + scale * torch.randn(6, 5, 12, generator=generator)) * mask
    return target + 0.1 * scale * torch.randn(6, 5, 12, generator=generator), target, counts, mask


def test_batch_normalisation_is_the_published_formula():
    y, target, counts, mask = heterogeneous()
    real, output = target[mask].double(), y[mask].double()
    sigma = real.var(correction=0).sqrt() + 1e-4
    expected = F.mse_loss((output - real.mean()) / sigma, (real - real.mean()) / sigma)
    assert reconstruction(y, target, counts, normalization="batch").item() == pytest.approx(expected.item(), rel=1e-6)


def test_token_normalisation_divides_each_token_by_its_own_deviation():
    y, target, counts, mask = heterogeneous()
    total = 0.0
    for output, real, signal in zip(y.flatten(0, 1), target.flatten(0, 1), mask.flatten(0, 1), strict=True):
        output, real = output[signal].double(), real[signal].double()
        total += ((output - real) / (real.std(correction=0) + 1e-4)).square().sum().item()
    expected = total / counts.sum().item()
    assert reconstruction(y, target, counts, normalization="token").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalization", ["batch", "token"])
def test_normalised_errors_hardly_depend_on_the_scale_and_nothing_flows_through_it(normalization):
    y, target, counts, _ = heterogeneous()
    errors = [reconstruction(y * s, target * s, counts, normalization=normalization).item() for s in (10.0, 1000.0)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    target.requires_grad_()
    loss = reconstruction(y, target, counts, normalization=normalization)
    (gradient,) = torch.autograd.grad(loss, target)
    y.requires_grad_()
    (opposite,) = torch.autograd.grad(reconstruction(y, target.detach(), counts, normalization=normalization), y)
    assert torch.equal(gradient, -opposite)


@pytest.mark.parametrize("normalization", ["none", "batch", "token"])
def test_elements_and_signal_differ_by_the_fraction_of_padding_alone(normalization):
    y, target, counts, mask = heterogeneous()
    signal, elements = (
        reconstruction(y, target, counts, divide_by, normalization=normalization)
        for divide_by in ("signal", "elements")
    )
    assert (elements / signal).item() == pytest.approx(mask.float().mean().item(), rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.0])
def test_tokens_that_do_not_vary_are_measured_by_the_batch(constant):
    target = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))
    counts = torch.full((3, 4), 12)
    target[0, 0], counts[1, 1], target[1, 1, 1:] = constant, 1, 0.0
    mask = signal_mask(counts, 12)
    y = target.clone()
    y[0, 0, :2] += 1
    y[1, 1, 0] += 1
    sigma = target[mask].double().std(correction=0) + 1e-4
    expected = 3 / sigma**2 / counts.sum()
    loss = reconstruction(y.requires_grad_(), target, counts, normalization="token")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("normalization", ["batch", "token"])
def test_batches_that_do_not_vary_at_all_have_finite_losses(normalization):
    target, counts = torch.full((2, 3, 4), 0.5), torch.full((2, 3), 4)
    loss = reconstruction(target + 1e-4, target, counts, normalization=normalization)
    assert loss.item() == pytest.approx(1, rel=1e-2)


def test_deviations_far_from_zero_are_not_lost_to_rounding():
    noise = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0))
    counts, far = torch.full((4, 5), 64), noise + 2048  # float32 keeps 2^-12 there
    expected = reconstruction(far + 1, far, counts).double() / (far.double().std(correction=0) + 1e-4) ** 2
    found = reconstruction(far + 1, far, counts, normalization="batch")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_contrast_the_reconstruction_is_all_and_gamma_does_not_count():
    y, target, counts, _ = heterogeneous()
    losses = sane_loss(y, target, counts, None, LossConfig(contrast="none", gamma=0.9))
    assert losses.total == losses.reconstruction == reconstruction(y, target, counts)
    assert losses.contrast == 0
    one_view = sane_loss(y[:3], target[:3], counts[:3], None, LossConfig(contrast="none"))
    assert one_view.total == reconstruction(y[:3], target[:3], counts[:3])


def published_case(parity):
    """The published model and its batch, views one after the other, with signal before padding in each token.

    The published mask is arbitrary there, so the values of each token are put in an order in which padding comes last.
    """
    meta = json.loads((parity / "meta.json").read_text())
    data = {key: torch.from_numpy(value) for key, value in np.load(parity / "autoencoder_io.npz").items()}
    model = from_published(load_file(parity / "autoencoder.safetensors"), meta["autoencoder_config"])
    tokens, mask = torch.cat([data["x"], data["x2"]]), data["mask"].repeat(2, 1, 1)
    _, y, projection = model(tokens, data["pos"].repeat(2, 1, 1))
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    loss = LossConfig(**meta["loss"], reconstruction="elements")
    losses = sane_loss(y.gather(-1, order), tokens.gather(-1, order), mask.sum(dim=-1), projection, loss)
    return model, data, losses, (y, tokens, mask)


def test_losses_are_the_published_ones(parity):
    _, data, losses, _ = published_case(parity)
    assert losses.total.item() == pytest.approx(data["loss"].item(), abs=1e-6)
    assert losses.contrast.item() == pytest.approx(data["loss_contrast"].item(), abs=1e-6)
    assert losses.reconstruction.item() == pytest.approx(data["loss_recon"].item(), abs=1e-6)


def test_the_gradient_norm_is_the_published_one(parity):
    model, data, losses, _ = published_case(parity)
    losses.total.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert norm.item() == pytest.approx(data["grad_norm"].item(), rel=1e-5, abs=1e-6)


def test_rsq_is_the_published_one(parity):
    _, data, _, (y, tokens, mask) = published_case(parity)
    assert published_explained_variance(y, tokens, mask).item() == pytest.approx(data["rsq"].item(), abs=1e-6)


def test_rsq_of_constant_elements_is_one_if_their_error_is_constant_too():
    target = torch.zeros(4, 1, 3)
    target[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    output, mask = torch.zeros(4, 1, 3), torch.ones(4, 1, 3, dtype=torch.bool)
    output[:, 0, 2] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert published_explained_variance(output, target, mask).item() == pytest.approx((0 + 1 + 0) / 3)


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_nt_xent_is_its_definition(windows):
    first, second = torch.randn(2, windows, 6, generator=torch.Generator().manual_seed(windows))
    rows = torch.cat([first, second]).double()
    similarity = F.cosine_similarity(rows[:, None], rows[None], dim=2) / 0.2
    expected = 0.0
    for i in range(2 * windows):
        others = [similarity[i, j] for j in range(2 * windows) if j != i]
        expected += torch.logsumexp(torch.stack(others), dim=0) - similarity[i, (i + windows) % (2 * windows)]
    assert nt_xent(first, second, 0.2).item() == pytest.approx(float(expected) / (2 * windows), abs=1e-6)


def test_nt_xent_is_least_when_views_agree():
    first = torch.eye(4)
    assert nt_xent(first, first, 0.1) < 1e-3
    assert nt_xent(first, first.roll(1, dims=0), 0.1) > 9


def test_projections_of_zero_give_finite_losses_and_gradients():
    first, second = torch.zeros(3, 6, requires_grad=True), torch.rand(3, 6)
    loss = nt_xent(first, second, 0.1)
    loss.backward()
    assert loss.isfinite()
    assert first.grad.isfinite().all()


def test_low_precision_is_lost_before_the_losses_not_in_them():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 8, 30, generator=generator).bfloat16()
    y, target = torch.randn(2, 8, 5, 12, generator=generator).bfloat16()
    counts = torch.full((8, 5), 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        contrast, error = nt_xent(first, second, 0.1), reconstruction(y, target, counts)
    assert contrast.dtype == error.dtype == torch.float32
    assert contrast == nt_xent(first.float(), second.float(), 0.1)
    assert error == reconstruction(y.float(), target.float(), counts)
    assert torch.equal(
        explained_variance_sums(y, target, counts), explained_variance_sums(y.float(), target.float(), counts)
    )


def test_reconstruction_ignores_what_is_decoded_into_padding():
    target, counts = torch.zeros(1, 2, 4), torch.tensor([[3, 1]])
    y = torch.tensor([[[1.0, 2.0, 3.0, math.nan], [4.0, 1e30, -1e30, 7.0]]], requires_grad=True)
    for divide_by, size in (("signal", 4), ("elements", 8)):
        loss = reconstruction(y, target, counts, divide_by)
        assert loss.item() == pytest.approx((1 + 4 + 9 + 16) / size)
        (gradient,) = torch.autograd.grad(loss, y)
        assert torch.equal(gradient != 0, signal_mask(counts, 4))


def test_the_signal_mask_is_true_for_the_first_values():
    mask = signal_mask(torch.tensor([[0, 2, 3]]), 3)
    assert mask.tolist() == [[[False, False, False], [True, True, False], [True, True, True]]]


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_gamma_weighs_the_two_losses(gamma):
    generator = torch.Generator().manual_seed(0)
    y, target = torch.randn(2, 6, 5, 12, generator=generator)
    projection, counts = torch.rand(6, 4, generator=generator), torch.full((6, 5), 7)
    losses = sane_loss(y, target, counts, projection, LossConfig(gamma=gamma, temperature=0.3))
    assert losses.contrast == nt_xent(projection[:3], projection[3:], 0.3)
    assert losses.reconstruction == reconstruction(y, target, counts)
    assert losses.total == pytest.approx((gamma * losses.contrast + (1 - gamma) * losses.reconstruction).item())


def test_explained_variance_of_batches_is_that_of_all_their_signal():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 5, 12, generator=generator) + 3
    y = 0.7 * target + torch.randn(6, 5, 12, generator=generator) + 1
    counts = torch.randint(0, 13, (6, 5), generator=generator)
    sums = sum(explained_variance_sums(y[i : i + 2], target[i : i + 2], counts[i : i + 2]) for i in (0, 2, 4))
    signal = signal_mask(counts, 12)
    expected = 1 - np.var((target - y)[signal].double().numpy()) / np.var(target[signal].double().numpy())
    assert sums[0] == counts.sum()
    valid = torch.tensor([True, False, True])
    some = explained_variance_sums(y, target, counts, valid)
    rows = torch.tensor([0, 2, 3, 5])
    assert torch.equal(some, explained_variance_sums(y[rows], target[rows], counts[rows]))
    assert explained_variance(sums).item() == pytest.approx(expected, abs=1e-6)


def test_explained_variance_of_perfect_and_of_useless_reconstructions():
    target, counts = torch.arange(24.0).view(2, 3, 4), torch.full((2, 3), 4)
    assert explained_variance(explained_variance_sums(target + 5, target, counts)) == 1
    assert explained_variance(explained_variance_sums(torch.zeros(2, 3, 4), target, counts)) == 0
    constant = explained_variance_sums(target, torch.ones(2, 3, 4), counts)
    assert explained_variance(constant).isnan()


def test_without_processes_gathering_changes_nothing():
    rows = torch.randn(3, 4)
    assert gather_over_processes(rows) is rows


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
