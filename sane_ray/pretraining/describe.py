"""What a pretraining run says of itself: its plan before, and where everything is after."""

from __future__ import annotations

from sane_ray.config import PretrainJob
from sane_ray.pretraining.history import read_history
from sane_ray.pretraining.run import BEST_FOLDER, Run
from sane_ray.pretraining.scaling import Placement, gigabytes, scaling_table
from sane_ray.shell import command
from sane_ray.tracking import default_uri, ui_command

FOR_GPUS = 10_000_000
"""Parameters from which a model is taken for one to train on GPUs."""


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
    """``describe``, and what the run needs here, and on paper on many GPUs if it is one for GPUs."""
    worker, workers, on_gpus = run.worker, job.cluster.max_workers, job.cluster.gpu == "yes"
    need = run.memory.on(Placement(workers, per_node=workers, gpu=on_gpus))
    text = f"{describe(run)}\nmemory   {gigabytes(need.device)} a worker: {need}"
    if not on_gpus and run.parameters < FOR_GPUS:
        return text
    return f"{text}\n{scaling_table(worker.autoencoder, worker.pretraining, worker.loss, workers=workers)}"


def ending(run: Run, already: bool) -> str:
    """Where the results are and what to do next."""
    history = read_history(run.history)
    losses = [point["train/loss"] for point in history if "train/loss" in point]
    validated = [point for point in history if "val/loss" in point]
    reached = f"training loss {losses[-1]:.4f}" if losses else f"no losses in {run.history}"
    seen = f"; validation explained variance {validated[-1]['val/explained_variance']:.3f}" if validated else ""
    lines = [
        f"{'already complete' if already else 'done'}: {reached}{seen}",
        f"model    {run.output}   (SANE.from_pretrained reads it with torch alone)",
    ]
    best = min(validated, key=lambda point: point["val/loss"], default=None)
    if best is not None and best["step"] < run.total_steps:
        lines.append(f"best     {run.folder / BEST_FOLDER}   (validation loss was lower at step {best['step']})")
    lines += [
        f"pictures {run.folder / 'plots'}",
        f"MLflow   {ui_command(default_uri(run.storage))}",
        f"next     {command('python')} jobs/predict.py --model {run.folder} --store {run.worker.store}",
    ]
    return "\n".join(lines)
