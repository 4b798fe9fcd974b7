"""Samples new networks from a pretrained SANE, selects them on validation images, and audits their novelty."""

from __future__ import annotations

from sane_ray.cli import run_job
from sane_ray.config import SampleJob

EXAMPLES = """examples:
  python jobs/sample.py --model RUN --store STORE
      new networks near the best of the zoo, next to noise, averages and training from scratch
  python jobs/sample.py --model RUN --store STORE --sampling.methods '[sane_kde:best, noise:best]' \\
      --sampling.repetitions 10 --sampling.candidates 200
      two methods alone, with more draws
  python jobs/sample.py --model RUN --store STORE --images other.npz
      for another task: images of the same shape; the last layer begins anew where classes differ
  python jobs/sample.py --model RUN --store STORE --target digits_cnn_wide
      for a wider or deeper network
  PYTHONPATH=src python jobs/sample.py --model RUN --store STORE --network my_networks:resnet18 --images cifar.npz
      networks of your own, such as `def resnet18(classes): ...` in src/my_networks.py returns; running statistics of
      their batch norms are estimated from training images (--sampling.batch_norm)
  python jobs/sample.py --model RUN --store STORE --sampling.where 'nlin == "gelu"' --dry-run
      say which networks would be anchors
"""


def main(config: SampleJob, dry_run: bool) -> None:
    """Samples, unless the samples are there; prints the table, the verdict, and where everything is."""
    from sane_ray.sampling.job import run  # torch and scikit-learn take seconds to import: not for --help

    run(config, dry_run)


if __name__ == "__main__":
    run_job(SampleJob, main, examples=EXAMPLES)
