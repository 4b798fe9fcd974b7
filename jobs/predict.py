"""Predicts properties of networks from weight statistics and SANE embeddings, and says how well that works."""

from __future__ import annotations

from sane_ray.cli import run_job
from sane_ray.config import PREDICTIONS, PredictJob

EXAMPLES = """examples:
  python jobs/predict.py --embeddings EMBEDDINGS
      accuracy, epoch and generalisation gap from statistics, SANE and both
  python jobs/predict.py --store STORE --properties.targets '[test_acc, nlin]' --properties.features '[statistics]'
      without a trained model; texts such as activations are classified
  python jobs/predict.py --embeddings EMBEDDINGS --preset sane
      the tables of the paper: W, s(W) and mean embeddings under the published probe
  python jobs/predict.py --embeddings MNIST --other-embeddings SVHN
      also train on each zoo and test on the other
  python jobs/predict.py --embeddings EMBEDDINGS --preset small-cnn-zoo
      Kendall's tau on the benchmark's split (prepare the store with --tokens.split_by published)
"""


def main(config: PredictJob, dry_run: bool) -> None:
    """Predicts, unless the results are there; prints the table, the verdict, and where everything is."""
    from sane_ray.properties.job import run  # torch and scikit-learn take seconds to import: not for --help

    run(config, dry_run)


if __name__ == "__main__":
    run_job(PredictJob, main, presets=PREDICTIONS, examples=EXAMPLES)
