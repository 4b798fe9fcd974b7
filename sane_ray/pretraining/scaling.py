"""Memory and traffic of a training step by formula: what a worker needs, and how a run scales on paper.

Arithmetic on configs alone: the model is built without memory (``meta``), nothing runs, and Ray is not imported.

Symbols: N parameters, of which n in a block; A blocks; D width, H heads, W tokens of a window, T values of a token;
S workers that share one set of weights, G workers in all; b windows of a worker, in ``views`` views each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig, LossConfig, PretrainingConfig
from sane_ray.hardware import Device, device_of

FLOAT32, BFLOAT16 = 4, 2
STATE_BYTES = 3 * FLOAT32
"""Of each parameter in a checkpoint: itself and AdamW's two moments."""

PROCESS_BYTES = 0.7e9
"""Resident memory of a worker before it trains: Python, torch, Ray and pyarrow."""

BEHAVIOR_BYTES = 2.5e5
"""Inner values of a network for one query of the behavioural loss, gradients included: of the small CNNs that it is
for, on 32 x 32 pixels. A guess: preflight does not know the zoo's networks."""

NETWORKS_AT_ONCE = 16
"""That the behavioural loss runs together; see pretraining/behavior.py."""

UPDATE_BYTES = 7 * FLOAT32
"""Memory traffic of AdamW for each parameter: weight, gradient and two moments read, all but the gradient written."""

ASSUMED_MFU = 0.45
"""Model FLOP/s over the device's peak that the compute time on paper assumes."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides memory and traffic."""

    parameters: int
    """N."""
    block: int
    """n, of one transformer block: the unit that is gathered at a time."""
    blocks: int
    """A, of encoder and decoder."""
    flops_per_token: float
    """Forward and backward, of one view; see ``SANE.flops_per_token``."""

    @property
    def root(self) -> int:
        """Parameters outside of the blocks: position tables, maps in and out, projection head."""
        return self.parameters - self.blocks * self.block


def model_size(autoencoder: AutoencoderConfig) -> ModelSize:
    """Counts the model that ``autoencoder`` describes, built without memory.

    Args:
        autoencoder: resolved, with its token size and position tables.
    """
    return _model_size(replace(autoencoder, max_positions=tuple(autoencoder.max_positions)))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=16)  # preflight tries many configs of one model
def _model_size(autoencoder: AutoencoderConfig) -> ModelSize:
    with torch.device("meta"):
        model = SANE(autoencoder)
    blocks = model.blocks()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        block=sum(parameter.numel() for parameter in blocks[0].parameters()),
        blocks=len(blocks),
        flops_per_token=model.flops_per_token(autoencoder.window),
    )


@dataclass(frozen=True)
class Placement:
    """Where workers run."""

    workers: int
    """G."""
    per_node: int
    """Most workers on one node."""
    gpu: bool
    """Whether each has a GPU."""
    bfloat16: bool = True
    """Whether its device multiplies bfloat16; counts where the precision is ``auto``."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one worker at the worst moment of a step, by what they are for."""

    parameters: float
    """Its shard of the weights, float32."""
    optimizer: float
    """AdamW's two moments of that shard, float32."""
    gradients: float
    """Of that shard, float32."""
    gathered: float
    """See ``gathered_bytes``."""
    activations: float
    """What the forward pass of one micro-batch keeps for the backward; unsharded, also autocast's copy of weights."""
    working: float
    """Batch, targets and intermediate results of losses or of one block's backward."""
    accumulating: bool
    """Whether gradients of one micro-batch wait while the next is computed."""
    staging: float
    """Copy of weights and moments in host memory, from which checkpoints are written beside training."""
    exported: float
    """Copy of the whole weights that rank 0 writes as a model folder, in host memory, shared out over its node."""
    host: float
    """Process and data stream, in host memory."""

    @property
    def device(self) -> float:
        """On the device.

        Gradients are made while activations are freed, so that only the larger counts, unless they are accumulated.
        """
        passing = (self.gradients, self.activations)
        backward = sum(passing) if self.accumulating else max(passing)
        return self.parameters + self.optimizer + self.gathered + backward + self.working

    @property
    def in_host(self) -> float:
        """Beside the device, in the memory of the node."""
        return self.staging + self.exported + self.host

    def __str__(self) -> str:
        """The large ones first, such as `activations 12.0 GB, optimizer 7.0 GB`."""
        parts = {name: getattr(self, name) for name in _PARTS}
        ordered = sorted(((size, name) for name, size in parts.items() if size > 0), reverse=True)
        return ", ".join(f"{name} {gigabytes(size)}" for size, name in ordered)


_PARTS = ("parameters", "optimizer", "gradients", "gathered", "activations", "working")


@dataclass(frozen=True)
class MemoryNeed:
    """What decides how much memory a worker needs, but where it runs."""

    autoencoder: AutoencoderConfig
    """Resolved."""
    pretraining: PretrainingConfig
    loss: LossConfig

    @property
    def views(self) -> int:
        """Views of each window that are computed."""
        return self.loss.views

    def on(self, placement: Placement) -> StateBytes:
        """Bytes of a worker there.

        Per parameter of a shard: 4 for itself, 4 for its gradient, 8 for the moments. Several workers gather what
        ``gathered_bytes`` says; on one, autocast keeps a bfloat16 copy of all weights with the activations.

        The stream is counted with two pools of ``pretraining.shuffle_mb``: as stored, and as one view permutes it. The
        worst case, eight times as much, is left out: the plan makes pools that large only where batches would else hold
        several windows of one network, which the store decides. Of several workers each holds its part of a pool.
        """
        training, size = self.pretraining, model_size(self.autoencoder)
        shards = shards_of(training, placement.workers, placement.per_node)
        shard = size.parameters / shards
        rows = -(-training.batch_size // placement.workers)
        micro = min(training.micro_batch or rows, rows)
        bfloat16 = computes_in_bfloat16(training, placement)
        return StateBytes(
            parameters=FLOAT32 * shard,
            optimizer=2 * FLOAT32 * shard,
            gradients=FLOAT32 * shard,
            gathered=gathered_bytes(
                size, placement.workers, reshard=training.reshard, bfloat16=bfloat16, accumulating=micro < rows
            ),
            activations=self._activations(micro, placement, bfloat16),
            working=self._working(rows, micro, placement, bfloat16),
            accumulating=micro < rows,
            staging=STATE_BYTES * shard,
            exported=FLOAT32 * size.parameters / min(placement.workers, placement.per_node),
            host=PROCESS_BYTES + 2 * training.shuffle_mb * 1e6,
        )

    def _activations(self, windows: int, placement: Placement, bfloat16: bool) -> float:
        config = self.autoencoder
        tokens, blocks = self.views * windows * config.window, 2 * config.layers
        block = tokens * block_bytes_per_token(config, bfloat16=bfloat16, gpu=placement.gpu)
        outside = tokens * config.d_model * (12 if bfloat16 else 8)  # positions, which both halves add, and the ends
        if self.pretraining.activation_checkpointing:
            return outside + blocks * tokens * FLOAT32 * config.d_model  # what enters each
        weights = BFLOAT16 * model_size(config).parameters if placement.workers == 1 and bfloat16 else 0
        return outside + blocks * block + weights

    def _working(self, rows: int, micro: int, placement: Placement, bfloat16: bool) -> float:
        """The batch in both formats and the targets of all rows; of a micro-batch, what losses or a block need.

        Losses hold outputs, errors, squares and the sums of the explained variance, 24 bytes for each value; the
        contrastive one compares all rows of the worker with all of the global batch; the behavioural one holds the
        tokens' originals and gradients, and what ``BEHAVIOR_BYTES`` guesses. The backward pass of a block holds
        gradients around its widest part, and with activation checkpointing all that its forward pass kept.
        """
        config = self.autoencoder
        row_tokens = self.views * config.window
        batch = rows * row_tokens * config.token_size * 14
        losses: float = micro * row_tokens * config.token_size * 24
        if self.loss.contrast != "none":
            losses += 4 * FLOAT32 * (2 * rows) * (2 * rows * placement.workers)
        if self.loss.behavior:
            networks = min(NETWORKS_AT_ONCE, self.views * micro)
            losses += micro * row_tokens * config.token_size * 8 + networks * self.loss.query_count * BEHAVIOR_BYTES
        block: float = config.d_model * (4 * (BFLOAT16 if bfloat16 else FLOAT32) + 2 * FLOAT32)
        if self.pretraining.activation_checkpointing:
            block += block_bytes_per_token(config, bfloat16=bfloat16, gpu=placement.gpu)
        return batch + max(losses, micro * row_tokens * block)


def block_bytes_per_token(config: AutoencoderConfig, *, bfloat16: bool, gpu: bool) -> float:
    """What one block keeps of one token for its backward pass.

    In units of D values. float32: inputs of both norms 2, their outputs 2, queries, keys and values 3, mixed values 1,
    before and after the GELU 4 + 4, all of 4 bytes: 64 D. With autocast to bfloat16 the inputs of the norms stay in
    float32 (the sums of the residual stream), and the rest has 2 bytes: 36 D. Fused attention adds one number a head;
    without it (bfloat16 on the CPU, see ``autoencoder.model.attend``) its weights are kept, 2 bytes for each pair of
    tokens and head. Dropout keeps two masks of a byte. A compiled block may keep less.
    """
    width = config.d_model
    kept = (2 * FLOAT32 + 14 * BFLOAT16) * width if bfloat16 else 16 * FLOAT32 * width
    attention = FLOAT32 * config.heads if gpu or not bfloat16 else BFLOAT16 * config.heads * config.window
    return kept + attention + (2 * width if config.dropout else 0)


def gathered_bytes(size: ModelSize, workers: int, *, reshard: bool, bfloat16: bool, accumulating: bool) -> float:
    """Whole weights that a worker holds beside its shard, and whole gradients of what is being reduced.

    Weights of two blocks (one computed, the next on its way), or with ``reshard`` off of all, in the format of the
    matrix products; what is outside of blocks stays whole, in float32. Gradients are whole until they are reduced: of a
    block and of what is outside, or over micro-batches of all. See ``pretraining.sharding.shard``.
    """
    if workers == 1:
        return 0.0
    blocks = min(2, size.blocks) if reshard else size.blocks
    weights = (BFLOAT16 if bfloat16 else FLOAT32) * blocks * size.block + FLOAT32 * size.root
    return weights + FLOAT32 * (size.parameters if accumulating else size.block + size.root)


def shards_of(training: PretrainingConfig, workers: int, per_node: int) -> int:
    """Workers that share one set of weights."""
    return {"full": workers, "node": min(workers, per_node), "none": 1}[training.sharding]


def computes_in_bfloat16(training: PretrainingConfig, placement: Placement) -> bool:
    """Whether matrix products are in bfloat16."""
    return placement.bfloat16 if training.precision == "auto" else training.precision == "bfloat16"


def nearest_that_fits(
    need: MemoryNeed, workers: int, most: int, fits: Callable[[MemoryNeed, int], bool]
) -> list[str] | None:
    """The smallest change of the config with which training fits.

    Tried in this order, first alone and then on top of one another: more workers, full sharding, activation
    checkpointing, smaller micro-batches.

    Args:
        need: as it is.
        workers: as they are.
        most: workers that the cluster has room for.
        fits: whether a need on so many workers fits.

    Returns:
        Fields and values to set, such as ``["pretraining.sharding to full"]``; None if nothing helps.
    """
    for changed, count, changes in _alternatives(need, workers, most):
        if fits(changed, count):
            return changes
    return None


def _alternatives(need: MemoryNeed, workers: int, most: int) -> Iterator[tuple[MemoryNeed, int, list[str]]]:
    training = need.pretraining
    more = [count for count in (2**i for i in range(1, most.bit_length())) if workers < count < most]
    more = [*more, most] if most > workers else []
    share = -(-training.batch_size // workers)
    largest = min(training.micro_batch or share, share)
    micro_batches = [largest >> i for i in range(1, largest.bit_length()) if largest >> i]
    for count in more:
        yield need, count, [f"cluster.num_workers to {count}"]
    steps: list[tuple[dict[str, object], str]] = []
    if training.sharding != "full" and workers > 1:
        steps.append(({"sharding": "full"}, "pretraining.sharding to full"))
    if not training.activation_checkpointing:
        steps.append(({"activation_checkpointing": True}, "pretraining.activation_checkpointing to true"))
    for fields, change in steps:
        yield _with(need, **fields), workers, [change]
    for micro in micro_batches:
        yield _with(need, micro_batch=micro), workers, [f"pretraining.micro_batch to {micro}"]
    together = {key: value for fields, _ in steps for key, value in fields.items()}
    changes = [change for _, change in steps]
    for count in [workers, *more]:
        grown = [f"cluster.num_workers to {count}"] if count > workers else []
        yield _with(need, **together), count, grown + changes
        for micro in micro_batches:
            small = f"pretraining.micro_batch to {micro}"
            yield _with(need, **together, micro_batch=micro), count, [*grown, *changes, small]


def _with(need: MemoryNeed, **fields: object) -> MemoryNeed:
    return replace(need, pretraining=replace(need.pretraining, **fields))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Step:
    """One optimiser step of one GPU, on paper."""

    gpus: int
    batch: int
    """Windows of the global batch."""
    flops: float
    compute: float
    """Seconds of matrix products at ``ASSUMED_MFU``, recomputation included."""
    update: float
    """Seconds of the optimiser, which memory bandwidth bounds."""
    gathered: float
    """Bytes of weights received."""
    reduced: float
    """Bytes of gradients sent."""
    contrast: float
    """Bytes of projections and their gradients that the contrastive loss exchanges."""
    link: float
    """Seconds of that within the node."""
    network: float
    """Seconds of that between nodes."""
    memory: float
    """Bytes of the device that are needed."""
    capacity: float
    """Bytes that it has."""
    data: float
    """Bytes of tokens read."""
    checkpoint: float
    """Bytes of its part of a checkpoint."""

    @property
    def bound(self) -> str:
        """What ends it; communication runs beside computing, so the longest counts."""
        if self.memory > self.capacity:
            return "memory: does not fit"
        times = {"compute": self.compute + self.update, "NVLink": self.link, "network": self.network}
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        """From one step to the next."""
        return max(self.compute + self.update, self.link, self.network)


def step_on_paper(
    need: MemoryNeed, device: Device, gpus: int, *, windows: int, per_node: int = 8, token_bytes: int = BFLOAT16
) -> Step:
    """Bytes, FLOPs and times of a step with ``windows`` windows a GPU.

    FSDP (Zhao et al., arXiv 2304.11277) gathers N weights, in each micro-batch once for the forward and, those of
    blocks with ``reshard``, once more for the backward pass, and reduces N gradients in float32 once: of each, a rank
    moves (S - 1) / S. Hybrid sharding does so within the node and then all-reduces the N / S gradients of each rank
    between R = G / S nodes, 2 (R - 1) / R of their bytes, as does plain data parallelism with S = 1 (ring all-reduce,
    Patarasuk and Yuan 2009). Micro-batches of the contrastive loss encode everything once more. What crosses nodes
    arrives once in each node and comes in over all its network cards: a GPU carries 1 / per_node of it. Latencies and
    kernel launches are left out: small models on many GPUs are slower.

    Args:
        need: model, training and loss.
        device: of every GPU.
        gpus: G.
        windows: b; a constant, so that the global batch grows with G (weak scaling).
        per_node: GPUs of a node.
        token_bytes: of a token's value in the store.
    """
    config, size = need.autoencoder, model_size(need.autoencoder)
    training = replace(need.pretraining, batch_size=windows * gpus)
    placement = Placement(gpus, min(per_node, gpus), gpu=True, bfloat16=device.bfloat16 is not None)
    bfloat16 = computes_in_bfloat16(training, placement)
    memory = MemoryNeed(config, training, need.loss).on(placement)
    shards, nodes = shards_of(training, gpus, placement.per_node), -(-gpus // per_node)
    pieces = -(-windows // min(training.micro_batch or windows, windows))
    contrasting = need.loss.contrast != "none"
    again = pieces > 1 and contrasting  # micro-batches: the contrastive loss needs all projections beforehand
    passes = (2 if training.reshard else 1) + (0.5 if again else 0)
    blocks = (BFLOAT16 if bfloat16 else FLOAT32) * size.blocks * size.block * passes
    weights = pieces * (blocks + FLOAT32 * size.root)
    gradients = FLOAT32 * size.parameters
    replicas = gpus // shards
    across = 2 * (replicas - 1) / replicas * gradients / shards
    contrast = 0.0
    if contrasting:
        contrast = 3 * (gpus - 1) / gpus * 2 * windows * gpus * config.projection_dim * FLOAT32
    crossing = _crossing(nodes, placement.per_node, shards, weights + gradients, across)
    flops = need.views * windows * config.window * size.flops_per_token
    work = flops * (1 + (1 / 3 if training.activation_checkpointing else 0) + (1 / 6 if again else 0))
    peak = device.flops(torch.bfloat16 if bfloat16 else torch.float32) or device.float32
    return Step(
        gpus=gpus,
        batch=windows * gpus,
        flops=flops,
        compute=work / (ASSUMED_MFU * peak),
        update=UPDATE_BYTES * size.parameters / shards / device.bandwidth,
        gathered=(shards - 1) / shards * weights,
        reduced=(shards - 1) / shards * gradients + across,
        contrast=contrast,
        link=(_within(placement.per_node, shards, weights, gradients) + contrast) / device.link,
        network=(crossing + (contrast if nodes > 1 else 0.0)) / device.network,
        memory=memory.device,
        capacity=device.memory,
        data=windows * config.window * config.token_size * token_bytes,
        checkpoint=STATE_BYTES * size.parameters / gpus,
    )


def _within(per_node: int, shards: int, weights: float, gradients: float) -> float:
    """Bytes inside the node that one GPU carries."""
    if shards > 1:
        return (shards - 1) / shards * (weights + gradients)
    return 2 * (per_node - 1) / per_node * gradients


def _crossing(nodes: int, per_node: int, shards: int, sharded: float, across: float) -> float:
    """Bytes between nodes that one GPU carries."""
    if nodes == 1:
        return 0.0
    spread = sharded * (nodes - 1) / nodes / per_node if shards > per_node else 0.0
    alone = across / per_node if shards == 1 else across  # hierarchical: reduced in the node before it crosses
    return spread + alone


def scaling_table(
    autoencoder: AutoencoderConfig,
    pretraining: PretrainingConfig,
    loss: LossConfig,
    *,
    workers: int = 1,
    device: str = "NVIDIA H200",
    gpus: Sequence[int] = (8, 64, 512),
    per_node: int = 8,
) -> str:
    """How the run scales on paper: a step on 8, 64 and 512 GPUs, as text.

    Args:
        autoencoder: resolved.
        pretraining: its ``batch_size`` over ``workers`` stays the batch of a GPU, so the global batch grows.
        loss: decides the views.
        workers: that ``batch_size`` is meant for.
        device: torch's name of the GPUs.
        gpus: how many.
        per_node: of them in a node.
    """
    known = device_of(device)
    if known is None:
        raise ValueError(f"{device!r} is not in the table of sane_ray/hardware.py")
    need = MemoryNeed(autoencoder, pretraining, loss)
    windows = math.ceil(pretraining.batch_size / workers)
    steps = [step_on_paper(need, known, count, windows=windows, per_node=per_node) for count in gpus]
    size = model_size(autoencoder)
    head = (
        f"on paper: {size.parameters / 1e6:.1f} M parameters, {windows} windows a GPU, sharding "
        f"{pretraining.sharding}, {known.name} at {ASSUMED_MFU:.0%} MFU, {per_node} a node, {known.link / 1e9:g} GB/s "
        f"in it and {known.network / 1e9:g} GB/s a GPU between nodes"
    )
    width = max(len(name) for name, _ in _ROWS)
    lines = [f"  {name:<{width}}" + "".join(f"{show(step):>12}" for step in steps) for name, show in _ROWS]
    return "\n".join([head, *lines])


_ROWS: tuple[tuple[str, Callable[[Step], str]], ...] = (
    ("GPUs", lambda step: f"{step.gpus}"),
    ("windows of the global batch", lambda step: f"{step.batch}"),
    ("TFLOP a step and GPU", lambda step: f"{step.flops / 1e12:.3g}"),
    ("compute, ms", lambda step: f"{step.compute * 1e3:.3g}"),
    ("optimiser, ms", lambda step: f"{step.update * 1e3:.3g}"),
    ("weights gathered a GPU", lambda step: gigabytes(step.gathered)),
    ("gradients reduced a GPU", lambda step: gigabytes(step.reduced)),
    ("contrastive loss a GPU", lambda step: gigabytes(step.contrast)),
    ("in the node, ms", lambda step: f"{step.link * 1e3:.3g}"),
    ("between nodes, ms", lambda step: f"{step.network * 1e3:.3g}"),
    ("memory a GPU", lambda step: gigabytes(step.memory)),
    ("  of what it has", lambda step: f"{step.memory / step.capacity:.0%}"),
    ("tokens read, all GPUs, a second", lambda step: gigabytes(step.data * step.gpus / step.seconds)),
    ("checkpoint a GPU", lambda step: gigabytes(step.checkpoint)),
    ("bound by", lambda step: step.bound),
)


def gigabytes(size: float) -> str:
    """Bytes for people: `1.5 GB`, `20 MB`, `3 kB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"
