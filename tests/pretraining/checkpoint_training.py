"""A tiny training whose state is saved and loaded, and real processes to do it in.

The processes are forked from a server that has imported torch already, so that they start at once.
"""

import copy
import json
import multiprocessing
import resource
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from sane_ray.autoencoder.model import SANE
from sane_ray.config import AutoencoderConfig
from sane_ray.errors import InputError
from sane_ray.pretraining.checkpoints import MANIFEST, Checkpoints
from sane_ray.pretraining.export import Export, export
from sane_ray.pretraining.state import TrainingState

EXTRA = {"ledger": {"epoch": 1, "signature": "ab"}, "best": float("inf"), "norms": [0.1, 1e-17]}

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["sane_ray.pretraining.checkpoints", "torch.distributed.fsdp"])


def make_state(seed=0, width=7):
    """A model of sizes that no number of ranks divides, sharded if there are several."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.Dropout(0.3), nn.Linear(width, 5))
    if dist.is_initialized() and dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], fused=True)
    return TrainingState(model, optimizer, OneCycleLR(optimizer, 0.1, total_steps=1000), seed=seed)


def make_autoencoder():
    """A small model of the real kind, the same in every process; not sharded."""
    torch.manual_seed(1)
    sizes = {"token_size": 7, "window": 5, "d_model": 12, "heads": 3, "layers": 2, "latent_dim": 5}
    return SANE(AutoencoderConfig(**sizes, max_positions=[20, 4, 9]))


def train(state, steps=1):
    """So many steps on inputs that depend on the step alone, with dropout from the rank's generator."""
    for _ in range(steps):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(state.step))
        state.model(inputs).square().mean().backward()
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
    return state


def trained(steps, seed=0):
    state = train(make_state(seed), steps)
    state.skipped, state.extra = [1, 4], copy.deepcopy(EXTRA)
    return state


def whole(state):
    """Copies of all tensors, unsharded."""
    tensors = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.state_dict().items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def checkpoints_in(run, **settings):
    """Of this process's rank."""
    if dist.is_initialized():
        settings = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} | settings
    return Checkpoints(run / "checkpoints", **({"patience_s": 2.0} | settings))


def in_ranks(world_size, work, run, *arguments):
    """What ``work(run, *arguments)`` returned in each of so many processes (tensors, numbers, strings)."""
    folder = run / f"ranks-{time.time_ns()}"
    folder.mkdir()
    processes = [
        _PROCESSES.Process(target=_rank, args=(rank, world_size, folder, work, run, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 240
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()  # those that hang; the others have ended
    assert [process.exitcode for process in processes] == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def start(work, *arguments):
    """A process that runs ``work(*arguments)`` until it is killed."""
    process = _PROCESSES.Process(target=_alone, args=(work, arguments), daemon=True)
    process.start()
    return process


def _rank(rank, world_size, folder, work, run, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save(work(run, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _alone(work, arguments):
    torch.set_num_threads(1)
    work(*arguments)


# what the processes do


def save(run, steps):
    """Trains and saves; the whole state as it was saved."""
    state = trained(steps)
    checkpoints_in(run).save(state)
    return whole(state)


def load(run):
    """Loads the newest checkpoint into a fresh state."""
    state = make_state(seed=9)
    step = checkpoints_in(run).load_latest(state)
    return {"step": step, "tensors": whole(state), "record": state.record()}


def resume(run):
    """Saves beside training, goes on, and does the same again from the checkpoint: both ends."""
    state = trained(3)
    checkpoints = checkpoints_in(run)
    checkpoints.begin(state)
    train(state, 2)
    checkpoints.finish()
    resumed = make_state(seed=9)
    step = checkpoints_in(run).load_latest(resumed)
    return {"step": step, "uninterrupted": whole(state), "resumed": whole(train(resumed, 2))}


def newest(run):
    """Step of the newest complete checkpoint in the folder."""
    return max(json.loads(file.read_text())["step"] for file in (run / "checkpoints").glob(f"step_*/{MANIFEST}"))


def fail_on_the_last_rank(run):
    """The last rank cannot write what it must, first in the background, then for good, then it can."""
    state = trained(2)
    checkpoints = checkpoints_in(run, patience_s=0.5)
    checkpoints.save(state)
    limited = dist.get_rank() == dist.get_world_size() - 1
    if limited:
        limit_file_size(1000)
    checkpoints.begin(train(state))
    checkpoints.finish()
    steps = [newest(run)]
    error = message(lambda: checkpoints.save(train(state)))
    steps.append(newest(run))
    if limited:
        limit_file_size(resource.RLIM_INFINITY)
    checkpoints.save(train(state))
    return {"error": error, "steps": [*steps, newest(run)]}


def export_sharded(run):
    """Both ways of exporting a sharded model."""
    model = make_autoencoder()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    export(model, run / "model")
    best = Export(run / "best")
    best.begin(model)
    best.finish()
    return dist.get_rank()


def start_on_own_folders(run):
    """Each rank has a run folder of its own."""
    own = run / str(dist.get_rank())
    own.mkdir()
    return message(lambda: checkpoints_in(own).load_latest(make_state()))


def message(work):
    """Of the InputError that ``work`` raises; empty if none."""
    try:
        work()
    except InputError as error:
        return str(error)
    return ""


def limit_file_size(size):
    """Writes beyond it fail in this process, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def save_for_ever(run: Path):
    """Checkpoint after checkpoint, as fast as it goes."""
    state = make_state()
    checkpoints = checkpoints_in(run)
    checkpoints.load_latest(state)
    while True:
        checkpoints.begin(train(state))
