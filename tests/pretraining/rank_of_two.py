"""One of two training processes of test_step.py: trains on its half of the global batches and writes what came out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from small_training import STEPS, make_batches, make_trainer, whole_weights

from sane_ray.pretraining.step import global_metrics


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trainer = make_trainer(rank=rank, world_size=2)
    rows = []
    for batch in make_batches(STEPS):
        half = len(batch) // 2
        rows.append(trainer.step(batch.rows(rank * half, (rank + 1) * half)))
    metrics = global_metrics(torch.stack(rows), 2)
    validation = trainer.validate([b.rows(rank * 3, rank * 3 + 3) for b in make_batches(2, seed=9)])
    weights = whole_weights(trainer)
    trainer.state.save(folder / "checkpoint")
    further = make_batches(2, seed=2)
    halves = [batch.rows(rank * 3, rank * 3 + 3) for batch in further]
    resumed = make_trainer(rank=rank, world_size=2, seed=5)
    resumed.state.load(folder / "checkpoint")
    outcome = {"resumed": torch.stack([resumed.step(half) for half in halves])}
    outcome |= {"uninterrupted": torch.stack([trainer.step(half) for half in halves])}
    rounded = make_trainer(rank=rank, world_size=2, precision="bfloat16")
    rounded_rows = torch.stack([rounded.step(half) for half in halves])
    outcome |= {"bfloat16": global_metrics(rounded_rows, 2)}
    if rank == 0:
        outcome |= {"metrics": metrics, "weights": weights, "validation": validation}
        torch.save(outcome, folder / "two.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
