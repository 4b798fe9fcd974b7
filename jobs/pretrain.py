"""Pretrain SANE on a token store; with no argument, build the digits zoo and its store first.

Modules that take seconds to import, as torch and Ray do, are imported where they are needed: not for ``--help``.
"""

from __future__ import annotations

from sane_ray.cli import run_job
from sane_ray.cluster import connect, default_storage, local_path
from sane_ray.config import PRESETS, PretrainJob
from sane_ray.preflight import preflight

EXAMPLES = """examples:
  python jobs/pretrain.py
      the whole line on built-in images: zoo, token store, training, in minutes on a laptop
  python jobs/pretrain.py --store STORE --preset cnn --cluster.num_workers 4
      your own store (jobs/prepare.py --tokens.token_size 289), the published CNN setting, four workers
  python jobs/pretrain.py --print-config > my.yaml; python jobs/pretrain.py --config my.yaml
      keep a config in a file
  ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/pretrain.py
      the same job on a cluster
"""


def main(job: PretrainJob, dry_run: bool) -> None:
    """Builds what is missing, trains, and says where everything is."""
    from sane_ray.pretraining.built_in import build_store, describe_building, find_store
    from sane_ray.pretraining.describe import describe, describe_plan, ending
    from sane_ray.pretraining.run import claim, is_complete, plan_run
    from sane_ray.tokens.store import TokenStore

    storage = default_storage(job.storage)
    store = TokenStore.open(local_path(job.store, "store")) if job.store else find_store(job, storage)
    if dry_run:
        print(describe_plan(plan_run(job, store, storage), job) if store else describe_building(job, storage))
        print("dry run: nothing was started")
        return
    if store and is_complete(run := plan_run(job, store, storage)):
        claim(run)
        print(ending(run, already=True))
        return
    with connect(job.cluster):
        from sane_ray.pretraining.launcher import pretrain  # imports Ray

        preflight(job.cluster)
        run = plan_run(job, store or build_store(job, storage), storage)
        print(describe(run))
        pretrain(run, job)
        print(ending(run, already=False))


if __name__ == "__main__":
    run_job(PretrainJob, main, presets=PRESETS, examples=EXAMPLES)
