"""Embeds networks with a pretrained SANE: any checkpoints, or a token store, to tables of models and layers."""

from __future__ import annotations

from sane_ray.cli import run_job
from sane_ray.config import EmbedJob

EXAMPLES = """examples:
  python jobs/embed.py --model results/runs/RUN --store results/stores/digits
  python jobs/embed.py --model MODEL --source network.safetensors          one network, preprocessed as in training
  python jobs/embed.py --model MODEL --source ZOO --embedding.tokens       every token as well
  python jobs/embed.py --model MODEL --store STORE --cluster.num_workers 4 --cluster.gpu yes
"""


def main(config: EmbedJob, dry_run: bool) -> None:
    """Embeds what is not embedded yet, and says where it is."""
    from sane_ray.embedding.job import run  # torch takes seconds to import: not for --help

    run(config, dry_run)


if __name__ == "__main__":
    run_job(EmbedJob, main, examples=EXAMPLES)
