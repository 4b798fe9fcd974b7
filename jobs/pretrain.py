"""Pretrain SANE on a token store; with no argument, build the digits zoo and its store first."""

from __future__ import annotations

from pathlib import Path

from sane_ray.cli import run_job
from sane_ray.cluster import connect, default_storage
from sane_ray.config import PRESETS, PretrainJob
from sane_ray.pretraining.history import read_history
from sane_ray.pretraining.launcher import Run, is_complete, plan_run, pretrain
from sane_ray.tokens.shards import write_store
from sane_ray.tokens.store import TokenStore
from sane_ray.tracking import default_uri, ui_command
from sane_ray.zoo.builder import build_zoo
from sane_ray.zoo.catalog import discover

EXAMPLES = """examples:
  python jobs/pretrain.py
      the whole line on built-in images: zoo, token store, training, in minutes on a laptop
  python jobs/pretrain.py --store STORE --preset cnn --cluster.num_workers 4
      your own store (see jobs/prepare.py), the published CNN setting, four workers
  python jobs/pretrain.py --print_config > my.yaml; python jobs/pretrain.py --config my.yaml
      keep a config in a file
  ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/pretrain.py
      the same job on a cluster
"""


def main(job: PretrainJob, dry_run: bool) -> None:
    """Builds what is missing, trains, and says where everything is."""
    storage = default_storage(job.storage)
    if dry_run:
        print(plan_text(job, storage))
        return
    with connect(job.cluster):
        store = TokenStore.open(job.store) if job.store else build_store(job, storage)
        run = plan_run(job, store, storage)
        print(describe(run))
        already = is_complete(run)
        pretrain(run, job)
        print(ending(run, storage, already))


def build_store(job: PretrainJob, storage: Path) -> TokenStore:
    """The built-in zoo and its token store, made unless they are there."""
    zoo, path = built_in_paths(job, storage)
    build_zoo(job.zoo, zoo)
    return write_store(discover(zoo), path, job.tokens, source=zoo)


def built_in_paths(job: PretrainJob, storage: Path) -> tuple[Path, Path]:
    """Where the zoo and the store are that this job builds when none is named."""
    name = Path(job.zoo.dataset).stem
    return storage / "zoos" / name, storage / "stores" / name


def plan_text(job: PretrainJob, storage: Path) -> str:
    """What the job would do, found out without Ray."""
    zoo, path = built_in_paths(job, storage)
    if job.store or path.exists():
        return describe(plan_run(job, TokenStore.open(job.store or path), storage)) + "\ndry run: nothing was started"
    checkpoints = job.zoo.models * len(job.zoo.checkpoint_epochs)
    return (
        f"would train {job.zoo.models} networks on {job.zoo.dataset} into {zoo},\n"
        f"write their {checkpoints} checkpoints as tokens to {path}, then pretrain SANE on them "
        f"for {job.pretraining.epochs} epochs\ndry run: nothing was started"
    )


def describe(run: Run) -> str:
    """The run in a few lines: model, data, steps, where."""
    shape, training = run.worker.autoencoder, run.worker.pretraining
    return (
        f"run      {run.name} in {run.folder}\n"
        f"store    {run.worker.store}: {run.windows['train']} training windows of {shape.window} tokens an epoch, "
        f"{run.windows['val']} for validation\n"
        f"model    {run.parameters / 1e6:.1f} M parameters: {shape.layers}+{shape.layers} blocks of width "
        f"{shape.d_model}, {shape.token_size} values a token -> {shape.latent_dim}\n"
        f"training {training.epochs} epochs of {run.steps_per_epoch} steps of {training.batch_size} windows, "
        f"{run.flops / 1e12:.3g} TFLOP in all"
    )


def ending(run: Run, storage: Path, already: bool) -> str:
    """Where the results are and what to do next."""
    last = read_history(run.history)[-1]
    seen = f"; validation explained variance {last['val/explained_variance']:.3f}" if "val/loss" in last else ""
    return (
        f"{'already complete' if already else 'done'}: training loss {last['train/loss']:.4f}{seen}\n"
        f"model    {run.output}   (SANE.from_pretrained reads it with torch alone)\n"
        f"pictures {run.folder / 'plots'}\n"
        f"MLflow   {ui_command(default_uri(storage))}"
    )


if __name__ == "__main__":
    run_job(PretrainJob, main, presets=PRESETS, examples=EXAMPLES)
