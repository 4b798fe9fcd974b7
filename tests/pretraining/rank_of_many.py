"""One of several training processes of test_step.py: trains on its share of the global batches.

Arguments: rank, world size, folder to meet and write in, names of SETTINGS. Rank 0 writes ``<world size>.pt``.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent))
from small_training import SETTINGS, STEPS, make_batches, make_trainer, share, token_distance, whole_weights

from sane_ray.pretraining.step import global_metrics


def train(rank: int, world_size: int, folder: Path, settings: dict) -> dict:
    """Metrics, validation and weights after a few steps, a checkpoint, and what a resumed run and this one do next."""
    common = {"rank": rank, "world_size": world_size, "local_world_size": 2} | settings
    trainer = make_trainer(behavior=token_distance, **common)

    def steps(of, batches):
        rows = [of.step(share(batch, rank, world_size)) for batch in batches]
        return global_metrics(torch.stack(rows), world_size)

    outcome = {"metrics": steps(trainer, make_batches(STEPS))}
    outcome["validation"] = trainer.validate([share(b, rank, world_size) for b in make_batches(2, seed=9)])
    outcome["weights"] = {name: weight.clone() for name, weight in whole_weights(trainer).items()}
    dcp.save(trainer.state.state_dict(), checkpoint_id=folder)
    outcome["record"] = trainer.state.record()
    resumed = make_trainer(behavior=token_distance, **(common | {"seed": 5}))
    resumed.pretraining = trainer.pretraining
    load(resumed, folder, outcome["record"])
    outcome["resumed"] = steps(resumed, make_batches(2, seed=2))
    outcome["uninterrupted"] = steps(trainer, make_batches(2, seed=2))
    return outcome


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
