"""One of several training processes of test_step.py: trains on its share of the global batches.

Arguments: rank, world size, folder to meet and write in, names of SETTINGS. Rank 0 writes ``<world size>.pt``.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from small_training import SETTINGS, STEPS, make_batches, make_trainer, share, token_distance, whole_weights

from sane_ray.pretraining.sharding import matrices
from sane_ray.pretraining.step import global_metrics


def train(rank: int, world_size: int, folder: Path, settings: dict) -> dict:
    """Metrics, validation and weights after a few steps, a checkpoint, and what a resumed run and this one do next."""
    common = {"rank": rank, "world_size": world_size, "local_world_size": 2} | settings
    trainer = make_trainer(behavior=token_distance, **common)

    def steps(of, batches):
        rows = [of.step(share(batch, rank, world_size)) for batch in batches]
        return global_metrics(torch.stack(rows), world_size)

    outcome = {"layout": layout(trainer)}
    outcome["metrics"] = steps(trainer, make_batches(STEPS))
    outcome["validation"] = trainer.validate([share(b, rank, world_size) for b in make_batches(2, seed=9)])
    outcome["weights"] = {name: weight.clone() for name, weight in whole_weights(trainer).items()}
    dcp.save(trainer.state.state_dict(), checkpoint_id=folder)
    outcome["record"] = trainer.state.record()
    resumed = make_trainer(behavior=token_distance, **(common | {"seed": 5}))
    resumed.pretraining = trainer.pretraining
    load(resumed, folder, outcome["record"])
    outcome["resumed"] = steps(resumed, make_batches(2, seed=2))
    outcome["uninterrupted"] = steps(trainer, make_batches(2, seed=2))
    outcome["gathered"] = gathered_by_forward(resumed, share(make_batches(1)[0], rank, world_size))
    return outcome


def layout(trainer) -> dict:
    """Over which ranks each matrix is spread and how, its rows, and how many of them this one has."""
    return {
        name: (p.device_mesh.mesh.tolist(), [str(placement) for placement in p.placements], len(p), len(p.to_local()))
        for name, p in trainer.model.named_parameters()
        if p.dim() >= 2
    }


def gathered_by_forward(trainer, batch) -> list[bool]:
    """Of the matrices of blocks, whether each is whole between the forward pass and the backward."""
    trainer.model.train()
    blocks = list(trainer.model.blocks())
    assert all(isinstance(p, DTensor) for block in blocks for p in matrices(block))
    trainer._forward(trainer._views(batch, noisy=False))
    return [not isinstance(p, DTensor) for block in blocks for p in matrices(block)]


def load(trainer, folder: Path, record: dict) -> None:
    """Takes over what any number of ranks saved, as Checkpoints does it."""
    tensors = {name: tensor for name, tensor in trainer.state.state_dict().items() if not name.startswith("rng.")}
    dcp.load(tensors, checkpoint_id=folder)
    trainer.state.restore(record)
    trainer.state.load_state_dict(tensors)


def main(rank: int, world_size: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting_{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    outcomes = {name: train(rank, world_size, folder / f"{world_size}_{name}", SETTINGS[name]) for name in names}
    if rank == 0:
        torch.save(outcomes, folder / f"{world_size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
