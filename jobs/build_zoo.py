"""Train a zoo of small networks on real images, in the published layout, as tasks of a Ray cluster.

Only parses, calls ``sane_ray.zoo.builder`` and says where the zoo is.
"""

from __future__ import annotations

from sane_ray.cli import run_job
from sane_ray.cluster import connect, default_storage, local_path
from sane_ray.config import BuildZooJob
from sane_ray.shell import command

EXAMPLES = """\
examples:
  python jobs/build_zoo.py                                  120 networks on scikit-learn's digits
  python jobs/build_zoo.py --dry-run                        what that would train, how large, and where
  python jobs/build_zoo.py --zoo.dataset mnist5k            MNIST-5k and the published CNN (needs 'sane_ray[vision]')
  python jobs/build_zoo.py --zoo.dataset mine.npz --zoo.models 1000 --zoo.checkpoint_epochs "[0, 10, 25, 50]"
  python jobs/build_zoo.py --zoo.search grid --zoo.learning_rates "[1e-4, 1e-3]" --zoo.activations "[tanh]"
The same command goes on after an interruption; a finished network is not trained again."""


def main(config: BuildZooJob, dry_run: bool) -> None:
    """Builds what is missing of the zoo, or prints its plan."""
    from sane_ray.zoo.builder import build_zoo, check_zoo, describe, plan_zoo  # imports torch: not for --help

    plan = plan_zoo(config.zoo)
    default = default_storage(config.storage) / "zoos" / plan.images.name
    zoo = local_path(config.output, "output") if config.output else default
    check_zoo(plan, zoo)
    if dry_run:
        print(describe(plan, zoo))
        return
    missing = plan.missing(zoo)
    if missing:
        with connect(config.cluster):
            build_zoo(config.zoo, zoo)
    already = "" if missing else "nothing to do: "
    print(f"{already}{len(plan.models):,} models in {zoo}; next: {command('python')} jobs/prepare.py --source {zoo}")


if __name__ == "__main__":
    run_job(BuildZooJob, main, examples=EXAMPLES)
