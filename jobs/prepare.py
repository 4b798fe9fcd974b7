"""Turns checkpoints of any kind into a token store, once: a second run with the same inputs does nothing."""

from __future__ import annotations

from sane_ray.cli import run_job
from sane_ray.config import PrepareJob

EXAMPLES = """\
examples:
  python jobs/prepare.py --source ZOO --audit                      what is there, and what would be left out
  python jobs/prepare.py --source ZOO --store STORE
  python jobs/prepare.py --source ZOO --tokens.where 'test_acc > 0.7 and epoch >= 21' --tokens.align weights
  python jobs/prepare.py --source models/ --tokens.token_size 288 --tokens.max_architectures 20
  python jobs/prepare.py --zoo list                                public zoos that can be downloaded
  python jobs/prepare.py --zoo cifar10-cnn-sample
  python jobs/prepare.py --hub org/name --tokens.token_size 288 --tokens.split '[1.0, 0.0, 0.0]'
  python jobs/prepare.py --inspect STORE
"""


def main(config: PrepareJob, dry_run: bool) -> None:
    """Writes the store or the audit's catalog, or with ``inspect`` or a dry run only says what is there or would be."""
    from sane_ray.tokens.preparing import run  # torch takes seconds to import: not for --help

    run(config, dry_run)


if __name__ == "__main__":
    run_job(PrepareJob, main, examples=EXAMPLES)
