"""Fine-tunes sampled networks and their baselines side by side, and compares their accuracy epoch by epoch."""

from __future__ import annotations

from sane_ray.cli import run_job
from sane_ray.config import FinetuneJob

EXAMPLES = """examples:
  python jobs/finetune.py --samples results/samples/NAME
      accuracy at epochs 0, 1, 5, 10 and 25 of every method: table, curves, report.html
  python jobs/finetune.py --samples SAMPLES --finetuning.epochs 5 --finetuning.table_epochs '[0, 1, 5]'
      shorter
  PYTHONPATH=src python jobs/finetune.py --samples SAMPLES --finetuning.optimizer sgd --finetuning.learning_rate 0.1
      networks of your own (jobs/sample.py --network), with another recipe than that of their zoo
  python jobs/finetune.py --samples SAMPLES --fan_out.actors 8 --fan_out.gpus 0.25
      networks of your own, on GPUs that four actors share
  python jobs/finetune.py --samples SAMPLES --fan_out.actors 64
      on a cluster: as many actors as it has room for, 64 at most
"""


def main(config: FinetuneJob, dry_run: bool) -> None:
    """Fine-tunes, unless the results are there; prints the table, the verdict, and where everything is."""
    from sane_ray.finetuning.job import run  # torch and Ray take seconds to import: not for --help

    run(config, dry_run)


if __name__ == "__main__":
    run_job(FinetuneJob, main, examples=EXAMPLES)
