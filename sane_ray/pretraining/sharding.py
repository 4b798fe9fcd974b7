"""How the model is spread over processes, recomputed and compiled: FSDP2 alone, and the names of weights never change.

Matrices are sharded, one unit a transformer block and the rest with the root. Vectors (norms and biases, a thousandth
of the weights) are whole on every rank, so that the matrices of a block can be gathered in bfloat16 as autocast would
round them, while norms stay exact: N ranks compute what one does. This module never computes a loss.
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from sane_ray.autoencoder.model import SANE
from sane_ray.config import PretrainingConfig
from sane_ray.errors import InputError


def prepare(
    model: SANE, config: PretrainingConfig, device: torch.device, precision: torch.dtype, local_world_size: int
) -> None:
    """Recomputation, then compilation, then sharding over all processes: each wraps the one before.

    Args:
        model: still on the meta device, so that no rank ever holds the whole of it.
        config: what of these is wanted.
        device: where it will compute.
        precision: of the matrix products.
        local_world_size: workers on this node.

    Raises:
        InputError: ``pretraining.compile`` is ``yes``, and there is no compiler.
    """
    if config.activation_checkpointing:
        recompute_blocks(model)
    if compiles(config.compile, device):
        for block in model.blocks():
            block.compile(fullgraph=True, dynamic=False)
    if dist.is_initialized() and dist.get_world_size() > 1:
        shard(model, process_mesh(config.sharding, device, local_world_size), precision, reshard=config.reshard)


def recompute_blocks(model: SANE) -> None:
    """Keeps of each block its input alone, and computes the inside again in the backward pass, with the same dropout.

    Neither names nor classes change, as they would if each block were wrapped in another module.
    """
    for block in model.blocks():
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[[Tensor], Tensor], x_BWD: Tensor) -> Tensor:
    """A frame of our own around ``checkpoint``: the compiler leaves torch's own frames alone."""
    output: Tensor = checkpoint(forward, x_BWD, use_reentrant=False)
    return output


def compiles(wanted: Literal["auto", "yes", "no"], device: torch.device) -> bool:
    """Whether blocks are compiled on this device.

    Raises:
        InputError: ``yes`` is wanted, and there is no compiler.
    """
    problem = compiler_problem(device)
    if wanted == "yes" and problem:
        raise InputError(f"config field pretraining.compile is 'yes', but {problem}: install it, or set it to 'no'")
    return wanted == "yes" or (wanted == "auto" and device.type == "cuda" and not problem)


def compiler_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device on this machine; None where it can."""
    from torch.utils._triton import has_triton_package

    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in candidates):
        return f"there is no C++ compiler ({', '.join(candidates)})"
    if device.type == "cuda" and not has_triton_package():
        return "there is no Triton"
    return None


def process_mesh(sharding: Literal["full", "node", "none"], device: torch.device, local_world_size: int) -> DeviceMesh:
    """Over which processes matrices are sharded, and over which they are replicated.

    ``full``: sharded over all. ``node``: a replica on each node, sharded over its workers; over all where that makes no
    sense, on one node alone or with unlike numbers of workers on them. ``none``: a replica on each worker.

    Every process must call it. Ranks of one node follow each other, as Ray Train counts them.
    """
    world_size = dist.get_world_size()
    if sharding == "full":
        return init_device_mesh(device.type, (world_size,))
    workers = 1 if sharding == "none" else _workers_of_each_node(local_world_size, device)
    if workers is None or workers == world_size:
        return init_device_mesh(device.type, (world_size,))
    return init_device_mesh(device.type, (world_size // workers, workers), mesh_dim_names=("replicate", "shard"))


def _workers_of_each_node(local_world_size: int, device: torch.device) -> int | None:
    """The number of workers on every node; None if it is not the same on all."""
    extremes = torch.tensor([local_world_size, -local_world_size], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
    least, most = int(extremes[0]), -int(extremes[1])
    return least if least == most else None


def shard(model: SANE, mesh: DeviceMesh, precision: torch.dtype, *, reshard: bool = True) -> None:
    """Shards matrices over the mesh; gradients are reduced in float32.

    The matrices of blocks are gathered in ``precision``, half the traffic in bfloat16: autocast would round them alike.
    Those of the ends stay float32, for autocast to round where it does.

    Args:
        model: not sharded yet.
        mesh: of ``process_mesh``.
        precision: of the matrix products.
        reshard: give a block's matrices back after its forward pass.
    """
    # Said of the root's outputs, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    whole = {parameter for parameter in model.parameters() if parameter.dim() < 2}
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=whole)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=whole)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trained parameters of two or more dimensions: matrices and embeddings, which are sharded and decay."""
    return [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """Trained parameters of one dimension: norms and biases, which are whole on every rank and do not decay."""
    return [p for p in model.parameters() if p.requires_grad and p.dim() < 2]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Averages the gradients of whole parameters over all processes, in one collective; FSDP does it for the others."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    averages: list[Tensor] = list(flat.split([gradient.numel() for gradient in gradients]))
    torch._foreach_copy_(gradients, [a.view_as(g) for a, g in zip(averages, gradients, strict=True)])
