"""Pretrain SANE on a token store; with no argument, build the digits zoo and its store first."""

from __future__ import annotations

from pathlib import Path

from sane_ray.cli import run_job
from sane_ray.cluster import connect, default_storage, local_path
from sane_ray.config import PRESETS, PretrainJob
from sane_ray.errors import InputError
from sane_ray.preflight import preflight
from sane_ray.pretraining.history import read_history
from sane_ray.pretraining.launcher import Run, is_complete, plan_run, pretrain
from sane_ray.pretraining.scaling import Placement, gigabytes, scaling_table
from sane_ray.pretraining.worker import BEST_FOLDER
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.layout import table_settings
from sane_ray.tokens.store.writing import matching_store, write_store
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.tracking import default_uri, ui_command
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.builder import build_zoo, check_zoo, plan_zoo
from sane_ray.zoo.catalog import discover

EXAMPLES = """examples:
  python jobs/pretrain.py
      the whole line on built-in images: zoo, token store, training, in minutes on a laptop
  python jobs/pretrain.py --store STORE --preset cnn --cluster.num_workers 4
      your own store (jobs/prepare.py --tokens.token_size 289), the published CNN setting, four workers
  python jobs/pretrain.py --print_config > my.yaml; python jobs/pretrain.py --config my.yaml
      keep a config in a file
  ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/pretrain.py
      the same job on a cluster
"""


def main(job: PretrainJob, dry_run: bool) -> None:
    """Builds what is missing, trains, and says where everything is."""
    storage = default_storage(job.storage)
    store = TokenStore.open(local_path(job.store, "store")) if job.store else find_store(job, storage)
    if dry_run:
        print(describe_plan(plan_run(job, store, storage), job) if store else describe_building(job, storage))
        print("dry run: nothing was started")
        return
    if store and is_complete(run := plan_run(job, store, storage)):
        pretrain(run, job)
        print(ending(run, already=True))
        return
    with connect(job.cluster):
        preflight(job.cluster)
        run = plan_run(job, store or build_store(job, storage), storage)
        print(describe(run))
        pretrain(run, job)
        print(ending(run, already=False))


def find_store(job: PretrainJob, storage: Path) -> TokenStore | None:
    """The built-in store if it is there.

    Raises:
        InputError: what is there is another one, or the config does not fit the zoo that would be built.
    """
    zoo, path = built_in_paths(job, storage)
    plan = plan_zoo(job.zoo)
    check_zoo(plan, zoo)
    network = from_params(next(iter(plan.models.values())))
    table = build_layer_table(network.state_dict(), **table_settings(job.tokens))
    if job.autoencoder.window > table.num_tokens:
        raise InputError(
            f"config field autoencoder.window is {job.autoencoder.window}, but the networks of the built-in zoo have "
            f"{table.num_tokens} tokens: set it to {table.num_tokens} or less, or name your own --store"
        )
    if plan.missing(zoo):
        return None
    return matching_store(discover(zoo), path, job.tokens, source=zoo)


def build_store(job: PretrainJob, storage: Path) -> TokenStore:
    """The built-in zoo and its token store, made unless they are there."""
    zoo, path = built_in_paths(job, storage)
    build_zoo(job.zoo, zoo)
    return write_store(discover(zoo), path, job.tokens, source=zoo)


def built_in_paths(job: PretrainJob, storage: Path) -> tuple[Path, Path]:
    """Where the zoo and the store are that this job builds when none is named."""
    name = Path(job.zoo.dataset).stem
    return storage / "zoos" / name, storage / "stores" / name


def describe_building(job: PretrainJob, storage: Path) -> str:
    """What comes before training when there is no store yet."""
    zoo, path = built_in_paths(job, storage)
    checkpoints = job.zoo.models * len(job.zoo.checkpoint_epochs)
    return (
        f"would train {job.zoo.models} networks on {job.zoo.dataset} into {zoo},\n"
        f"write their {checkpoints} checkpoints as tokens to {path},\n"
        f"then pretrain SANE on them for {job.pretraining.epochs} epochs"
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
    ) + (
        f"\nnote     a batch may hold {run.most_of_a_model} windows of one model, near-duplicates that the contrastive "
        "loss takes for different: a larger zoo or --pretraining.shuffle_mb, or a smaller batch, helps"
        if run.most_of_a_model > 1 and run.worker.loss.contrast != "none"
        else ""
    )


def describe_plan(run: Run, job: PretrainJob) -> str:
    """``describe``, and what the run needs here and on paper on many GPUs."""
    worker, workers = run.worker, job.cluster.max_workers
    need = run.memory.on(Placement(workers, per_node=workers, gpu=job.cluster.gpu == "yes"))
    table = scaling_table(worker.autoencoder, worker.pretraining, worker.loss, workers=workers)
    return f"{describe(run)}\nmemory   {gigabytes(need.device)} a worker: {need}\n{table}"


def ending(run: Run, already: bool) -> str:
    """Where the results are and what to do next."""
    history = read_history(run.history)
    loss = next(point["train/loss"] for point in reversed(history) if "train/loss" in point)
    validated = [point for point in history if "val/loss" in point]
    seen = f"; validation explained variance {validated[-1]['val/explained_variance']:.3f}" if validated else ""
    lines = [
        f"{'already complete' if already else 'done'}: training loss {loss:.4f}{seen}",
        f"model    {run.output}   (SANE.from_pretrained reads it with torch alone)",
    ]
    best = min(validated, key=lambda point: point["val/loss"], default=None)
    if best is not None and best["step"] < run.total_steps:
        lines.append(f"best     {run.folder / BEST_FOLDER}   (validation loss was lower at step {best['step']})")
    lines += [f"pictures {run.folder / 'plots'}", f"MLflow   {ui_command(default_uri(run.storage))}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(PretrainJob, main, presets=PRESETS, examples=EXAMPLES)
