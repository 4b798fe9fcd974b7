import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AugmentationConfig, AutoencoderConfig, LossConfig, PretrainingConfig
from sane_ray.hardware import device_of
from sane_ray.pretraining.batch import Batch
from sane_ray.pretraining.behavior import _ROWS_AT_ONCE
from sane_ray.pretraining.scaling import (
    NETWORKS_AT_ONCE,
    MemoryNeed,
    ModelSize,
    Placement,
    gathered_bytes,
    gigabytes,
    model_size,
    nearest_that_fits,
    scaling_table,
    step_on_paper,
)
from sane_ray.pretraining.step import Trainer

SMALL = AutoencoderConfig(
    token_size=96, window=64, d_model=128, heads=2, layers=2, latent_dim=16, max_positions=[500, 20, 100]
)
RESNET18 = AutoencoderConfig(
    token_size=288, window=256, d_model=2048, heads=16, layers=8, latent_dim=128, max_positions=[50_000, 60, 512]
)
ONE = Placement(1, 1, gpu=False)
H200 = device_of("NVIDIA H200")


def need_of(autoencoder=SMALL, *, contrast="simclr", behavior=0.0, **pretraining):
    return MemoryNeed(autoencoder, PretrainingConfig(**pretraining), LossConfig(contrast=contrast, behavior=behavior))


@pytest.mark.parametrize("autoencoder", [SMALL, dataclasses.replace(SMALL, positions="sinusoidal", max_positions=[])])
def test_the_counted_model_is_the_one_that_is_trained(autoencoder):
    model, size = SANE(autoencoder), model_size(autoencoder)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.block == 12 * autoencoder.d_model**2 + 2 * autoencoder.d_model
    assert size.blocks == 2 * autoencoder.layers
    outside = [p for name, p in model.named_parameters() if not name.startswith(("encoder.", "decoder."))]
    assert size.root == sum(parameter.numel() for parameter in outside)
    assert size.flops_per_token == model.flops_per_token(autoencoder.window)


def test_counting_a_model_takes_no_memory():
    huge = dataclasses.replace(RESNET18, d_model=16384, heads=128, layers=48)
    assert model_size(huge).parameters > 300e9


def batch_of(autoencoder, windows):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(windows, autoencoder.window, autoencoder.token_size, generator=generator).half()
    return Batch(
        view_1=tokens,
        view_2=tokens.clone(),
        signal=torch.full(tokens.shape[:2], autoencoder.token_size, dtype=torch.int32),
        positions=torch.zeros(*tokens.shape[:2], 3, dtype=torch.int32),
        slot=torch.arange(windows),
        checkpoint=torch.arange(windows),
    )


def allocated_by_a_step(need):
    """Most bytes that a step holds at once beside weights, moments and batch."""
    trainer = Trainer(
        need.autoencoder, need.loss, AugmentationConfig(), need.pretraining, steps=10, device=torch.device("cpu")
    )
    batch = batch_of(need.autoencoder, need.pretraining.batch_size)
    trainer.step(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step(batch)
    records = profiled.profiler.kineto_results.events()
    changes = sorted((record.start_ns(), record.nbytes()) for record in records if record.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 16},
        {"batch_size": 1},
        {"batch_size": 16, "micro_batch": 4},
        {"batch_size": 16, "activation_checkpointing": True},
    ],
)
def test_memory_by_formula_is_what_a_step_takes(precision, options):
    need = need_of(precision=precision, **options)
    bytes_of = need.on(ONE)
    formula = bytes_of.device - bytes_of.parameters - bytes_of.optimizer
    measured = allocated_by_a_step(need)
    assert 0.8 * measured < formula < 1.3 * measured


def test_what_is_kept_of_a_parameter():
    bytes_of, parameters = need_of().on(ONE), model_size(SMALL).parameters
    assert bytes_of.parameters == 4 * parameters
    assert bytes_of.gradients == 4 * parameters
    assert bytes_of.optimizer == 8 * parameters
    assert bytes_of.staging == 12 * parameters


@pytest.mark.parametrize(("sharding", "shards"), [("full", 16), ("node", 4), ("none", 1)])
def test_shards_are_counted_over_workers_over_those_of_a_node_or_not_at_all(sharding, shards):
    bytes_of = need_of(sharding=sharding, batch_size=64).on(Placement(16, 4, gpu=True))
    assert bytes_of.optimizer == 8 * model_size(SMALL).parameters / shards


def test_whole_weights_of_two_blocks_are_held_or_of_all():
    size = ModelSize(parameters=1000, block=90, blocks=10, flops_per_token=0.0)
    assert size.root == 100
    options = {"bfloat16": True, "accumulating": False}
    assert gathered_bytes(size, 1, reshard=True, **options) == 0
    assert gathered_bytes(size, 8, reshard=True, **options) == 2 * 180 + 4 * 100 + 4 * 190
    assert gathered_bytes(size, 8, reshard=False, **options) == 2 * 900 + 4 * 100 + 4 * 190
    assert gathered_bytes(size, 8, reshard=True, bfloat16=False, accumulating=True) == 4 * 180 + 4 * 100 + 4 * 1000


def test_attention_weights_are_kept_where_there_is_no_fused_kernel():
    need = need_of(precision="bfloat16")
    there = need.on(Placement(1, 1, gpu=True)).activations
    here = need.on(ONE).activations
    tokens, blocks = 2 * 32 * 64, 4
    assert here - there == tokens * blocks * (2 * 64 - 4) * 2


def test_one_view_needs_half_of_two():
    assert need_of(contrast="none").views == 1
    two = need_of(precision="float32").on(ONE).activations
    assert need_of(precision="float32", contrast="none").on(ONE).activations == two / 2


@pytest.mark.parametrize("contrast", ["simclr", "none"])
@pytest.mark.parametrize("behavior", [0.0, 0.1])
def test_memory_is_counted_for_the_views_that_are_trained(contrast, behavior):
    need = need_of(contrast=contrast, behavior=behavior)
    trainer = Trainer(
        SMALL, need.loss, AugmentationConfig(), need.pretraining, steps=10, device=torch.device("cpu"),
        behavior=lambda reconstructed, batch, step: reconstructed.sum((1, 2)),
    )  # fmt: skip
    assert need.views == trainer.views


def test_the_behavioural_loss_takes_memory_but_sends_nothing():
    without, asked = (need_of(contrast=contrast, behavior=b) for contrast, b in [("simclr", 0.0), ("none", 0.1)])
    assert NETWORKS_AT_ONCE == _ROWS_AT_ONCE
    assert asked.on(ONE).activations == without.on(ONE).activations
    assert asked.on(ONE).working > without.on(ONE).working + 16 * 256 * 2e5
    step = step_on_paper(asked, H200, 8, windows=4)
    assert step.contrast == 0
    assert step.flops == step_on_paper(without, H200, 8, windows=4).flops


def test_host_memory_holds_checkpoint_export_process_and_stream():
    need, parameters = need_of(shuffle_mb=100.0, sharding="none"), model_size(SMALL).parameters
    alone, of_four = need.on(ONE), need.on(Placement(8, 4, gpu=True))
    assert alone.in_host == 12 * parameters + 4 * parameters + 0.7e9 + 200e6
    assert 4 * of_four.exported == alone.exported  # rank 0 alone writes the model


def test_the_defaults_fit_a_laptop():
    need = need_of(AutoencoderConfig(token_size=96, max_positions=[500, 20, 100]))
    bytes_of = need.on(ONE)
    assert bytes_of.device + bytes_of.in_host < 3e9


def test_precision_follows_the_device_where_it_is_automatic():
    without = Placement(1, 1, gpu=True, bfloat16=False)
    assert need_of().on(without) == need_of(precision="float32").on(without)
    assert need_of(precision="bfloat16").on(without).activations < need_of().on(without).activations


def test_the_nearest_config_that_fits_changes_as_little_as_it_can():
    big = need_of(RESNET18, batch_size=256, sharding="none")

    def fits_in(limit):
        return lambda need, workers: need.on(Placement(workers, 8, gpu=True)).device <= limit

    alone = big.on(Placement(2, 8, gpu=True)).device
    assert nearest_that_fits(big, 2, 8, fits_in(0.9 * alone)) == ["cluster.num_workers to 4"]
    assert nearest_that_fits(big, 2, 2, fits_in(0.97 * alone)) == ["pretraining.sharding to full"]
    full = dataclasses.replace(big, pretraining=dataclasses.replace(big.pretraining, sharding="full"))
    assert nearest_that_fits(full, 2, 2, fits_in(60e9)) == ["pretraining.activation_checkpointing to true"]
    pieces = dataclasses.replace(full.pretraining, activation_checkpointing=True, micro_batch=32)
    enough = dataclasses.replace(full, pretraining=pieces).on(Placement(2, 8, gpu=True)).device
    assert nearest_that_fits(big, 2, 2, fits_in(enough)) == [
        "pretraining.sharding to full",
        "pretraining.activation_checkpointing to true",
        "pretraining.micro_batch to 32",
    ]
    assert nearest_that_fits(big, 2, 8, fits_in(1e9)) is None
    recomputed = dataclasses.replace(full.pretraining, activation_checkpointing=True, batch_size=8)
    small = dataclasses.replace(full, pretraining=recomputed)
    assert nearest_that_fits(small, 1, 1, lambda need, _: need.pretraining.micro_batch == 1) == [
        "pretraining.micro_batch to 1"
    ]


def test_bytes_on_the_wire_of_full_sharding():
    size = model_size(RESNET18)
    step = step_on_paper(need_of(RESNET18), H200, 64, windows=4)
    weights = 2 * 2 * size.blocks * size.block + 4 * size.root
    assert step.gathered == pytest.approx(63 / 64 * weights)
    assert step.reduced == pytest.approx(63 / 64 * 4 * size.parameters)
    assert step.link * H200.link == pytest.approx(step.gathered + step.reduced + step.contrast)
    crossing = 7 / 8 * (weights + 4 * size.parameters) / 8
    assert step.network * H200.network == pytest.approx(crossing + step.contrast)
    assert step.contrast == pytest.approx(3 * 63 / 64 * 2 * 4 * 64 * 30 * 4)
    assert step.checkpoint == 12 * size.parameters / 64
    assert step.data == 4 * 256 * 288 * 2


def test_hybrid_sharding_sends_gradients_alone_between_nodes():
    size = model_size(RESNET18)
    step = step_on_paper(need_of(RESNET18, sharding="node", contrast="none"), H200, 64, windows=4)
    assert step.network * H200.network == pytest.approx(2 * 7 / 8 * 4 * size.parameters / 8)
    assert step.gathered == pytest.approx(7 / 8 * (2 * 2 * size.blocks * size.block + 4 * size.root))
    assert step.contrast == 0


def test_one_node_sends_nothing_between_nodes_and_replicas_gather_nothing():
    step = step_on_paper(need_of(RESNET18, sharding="none", contrast="none"), H200, 8, windows=4)
    assert step.network == 0
    assert step.gathered == 0
    assert step.link * H200.link == pytest.approx(2 * 7 / 8 * 4 * model_size(RESNET18).parameters)


def test_flops_and_recomputation():
    plain = step_on_paper(need_of(RESNET18), H200, 8, windows=4)
    assert plain.flops == 2 * 4 * 256 * model_size(RESNET18).flops_per_token
    assert plain.compute == pytest.approx(plain.flops / (0.45 * 989.4e12))
    again = step_on_paper(need_of(RESNET18, activation_checkpointing=True), H200, 8, windows=4)
    assert again.compute == pytest.approx(4 / 3 * plain.compute)
    pieces = step_on_paper(need_of(RESNET18, micro_batch=2), H200, 8, windows=4)
    assert pieces.compute == pytest.approx(7 / 6 * plain.compute)
    assert pieces.gathered > 2 * plain.gathered


def test_what_bounds_a_step():
    assert step_on_paper(need_of(RESNET18), H200, 512, windows=32).bound == "compute"
    assert step_on_paper(need_of(RESNET18), H200, 512, windows=1).bound == "network"
    assert step_on_paper(need_of(RESNET18), H200, 8, windows=1).bound == "NVLink"
    assert step_on_paper(need_of(RESNET18), device_of("Tesla T4"), 8, windows=64).bound == "memory: does not fit"


def test_the_table_has_a_column_for_each_size_and_keeps_the_batch_of_a_gpu():
    text = scaling_table(RESNET18, PretrainingConfig(batch_size=64), LossConfig(), workers=2)
    lines = text.splitlines()
    assert "32 windows a GPU" in lines[0]
    assert lines[1].split() == ["GPUs", "8", "64", "512"]
    assert lines[2].split()[-3:] == ["256", "2048", "16384"]
    assert lines[-1].split()[-1] == "compute"
    assert all(len(line) <= 120 for line in lines[1:])
    with pytest.raises(ValueError, match="Radeon"):
        scaling_table(SMALL, PretrainingConfig(), LossConfig(), device="Radeon")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (20e6, "20 MB"), (1.5e9, "1.5 GB"), (2e12, "2 TB")]
)
def test_sizes_for_people(size, text):
    assert gigabytes(size) == text
