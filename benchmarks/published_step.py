"""The training step of the published code (public repository HSG-AIML/SANE), as train_step.py measures it.

It is called, never copied: ``--published`` of train_step.py names a checkout, which stays as it is. It is asked for its
``AEModule.train_epoch`` on a few batches, with the settings of its own pretraining scripts (``experiments/cnn-cifar10``
and ``experiments/resnet18-cifar100``) and the sizes of our preset. What it does in a step:

* cuts a window (ours are as long as that already), picks two permuted views of a stack of two (its scripts keep six)
  and multiplies each with noise;
* two forward passes, one for each view; the losses; its explained variance, norm and variance of the projections;
* one backward pass, AdamW (not the fused one: a ``torch.device`` never equals the string it is compared with), one
  step of the OneCycle schedule, no clipping;
* reads each metric with ``.item()``.

Its precision is ``amp``: float16 on a GPU. On a CPU its autocast, which is of CUDA alone, does nothing, and it computes
in float32. Its scripts compile the model, but its module calls ``forward_encoder``, ``projection_head`` and
``forward_decoder`` of the compiled model, which are those of the model inside: nothing is ever compiled. So there are
three variants of it:

* ``own``: ``model::compile`` as in its scripts;
* ``off``: without;
* ``working``: without, and those three compiled by us: what its authors meant to run.

What is put around it, in its favour or neutral:

* packages it imports that are not installed: small modules of what it uses of them. For its numbers that is
  ``explained_variance`` alone; the others (Ray, Lightning, torchvision's RandomErasing) are imported and not called;
* ``OneCycleLR`` no longer takes ``verbose``, which it passes: dropped;
* batches lie on the device already; it would copy them there, and wait.

It changes modules of its process for good: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sane_ray.config import PretrainJob
from sane_ray.pretraining.batch import Batch

Compilation = Literal["own", "off", "working"]
ENTRIES = ("forward_encoder", "projection_head", "forward_decoder")
"""What its module calls of its model."""


class PublishedLoop:
    """Its module with its transforms, ready to train."""

    def __init__(
        self, code: Path, job: PretrainJob, device: torch.device, compilation: Compilation, steps: int
    ) -> None:
        """Imports the published code.

        Args:
            code: a checkout.
            job: our config, resolved: sizes, batch, learning rate, losses, noise.
            device: where to compute.
            compilation: see the module.
            steps: of the learning-rate cycle.
        """
        warnings.simplefilter("ignore")  # it calls what later versions of torch have deprecated
        sys.path.insert(0, str(code.absolute() / "src"))
        add_missing_modules()
        drop_verbose()
        module = importlib.import_module("SANE.models.def_AE_module")
        config = settings(job, device, steps) | {"model::compile": compilation == "own"}
        with contextlib.redirect_stdout(io.StringIO()):
            self.module = module.AEModule(config)
        self.module.set_transforms(transforms(job))
        if compilation == "working":
            for name in ENTRIES:
                setattr(self.module.model, name, torch.compile(getattr(self.module.model, name)))
        self.parameters = sum(parameter.numel() for parameter in self.module.parameters())

    def steps(self, data: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
        """One step for each of what ``data_of`` made; the means of its metrics."""
        return self.module.train_epoch(data)


def settings(job: PretrainJob, device: torch.device, steps: int) -> dict[str, Any]:
    """The config of its scripts with the numbers of ours."""
    model, training = job.autoencoder, job.pretraining
    return {
        "seed": training.seed,
        "device": str(device),
        "training::precision": "amp",
        "trainset::batchsize": training.batch_size,
        "ae:transformer_type": "gpt2",
        "ae:i_dim": model.token_size,
        "ae:lat_dim": model.latent_dim,
        "ae:max_positions": list(model.max_positions),
        "ae:d_model": model.d_model,
        "ae:nhead": model.heads,
        "ae:num_layers": model.layers,
        "ae:dropout": model.dropout,
        "training::windowsize": model.window,
        "optim::optimizer": "adamw",
        "optim::lr": training.learning_rate,
        "optim::wd": training.weight_decay,
        "optim::scheduler": "OneCycleLR",
        "training::epochs_train": 1,
        "training::steps_per_epoch": steps,
        "training::temperature": job.loss.temperature,
        "training::gamma": job.loss.gamma,
        "training::reduction": "mean",
        "training::contrast": "simclr",
    }


def transforms(job: PretrainJob) -> Callable[..., Any]:
    """Its augmentations, as its trainer puts them together."""
    parts = importlib.import_module("SANE.datasets.augmentations")
    noise = [[parts.NoiseAugmentation(job.augmentation.noise)] if job.augmentation.noise else [] for _ in range(2)]
    views = parts.TwoViewSplit(*noise, mode="permutation", view_1_canon=True, view_2_canon=False)
    return parts.AugmentationPipeline([parts.WindowCutter(windowsize=job.autoencoder.window), views])


def data_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What its loader yields: views float32 [B, 2, W, T], mask bool [B, W, T], positions int32 [B, W, 3]."""
    views = torch.stack([batch.view_1, batch.view_2], dim=1).float()
    mask = torch.arange(views.shape[-1], device=views.device) < batch.signal[..., None]
    return views, mask, batch.positions


def drop_verbose() -> None:
    """Lets OneCycleLR be called as in older versions of torch."""
    current = torch.optim.lr_scheduler.OneCycleLR

    class OneCycleLR(current):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, verbose: bool = False, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)

    torch.optim.lr_scheduler.OneCycleLR = OneCycleLR  # type: ignore[misc]


def explained_variance(preds: Tensor, target: Tensor, multioutput: str) -> Tensor:
    """1 - Var(error) / Var(target) of each element over the batch, averaged; 1 or 0 where the target is constant."""
    assert multioutput == "uniform_average"
    error_variance = (target - preds).var(0, correction=0)
    variance = target.var(0, correction=0)
    score = torch.where(variance == 0, (error_variance == 0).to(variance), 1 - error_variance / variance)
    return score.mean()


def _not_called(*_: Any, **__: Any) -> Any:
    raise AssertionError("a training step of the published code was not known to call this")


def _remote(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """``ray.remote`` with options or without: what it decorates is not called."""
    return _remote if function is None else _not_called


MISSING: dict[str, dict[str, Any]] = {
    "einops": {"repeat": _not_called},
    "lightning": {},
    "lightning.fabric": {"Fabric": object, "seed_everything": torch.manual_seed},
    "ray": {"remote": _remote},
    "ray.actor": {"ActorHandle": object},
    "torchmetrics": {},
    "torchmetrics.functional": {"explained_variance": explained_variance, "r2_score": _not_called},
    "torchvision": {},
    "torchvision.transforms": {"RandomErasing": object},
    "tqdm": {"tqdm": lambda values, **_: values},
}
"""What it imports and need not be installed, and what it imports of them."""


def missing_packages() -> list[str]:
    """Those that are not installed."""
    return [name for name in MISSING if "." not in name and importlib.util.find_spec(name) is None]


def add_missing_modules(more: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Puts modules of the same names in the place of packages that are not installed.

    Args:
        more: what else is imported of them, or other content; as ``MISSING``.
    """
    wanted, missing = MISSING | dict(more or {}), missing_packages()
    for name in wanted:
        if name.partition(".")[0] not in missing:
            importlib.import_module(name)  # before the others are put in place: it may look for them
    for name, content in wanted.items():
        parent, _, own = name.rpartition(".")
        if name.partition(".")[0] in missing:
            module = types.ModuleType(name)
            vars(module).update(content)
            sys.modules[name] = module
            if parent:
                setattr(sys.modules[parent], own, module)


def is_checkout(folder: Path) -> bool:
    """Whether the published code lies there."""
    return (folder / "src" / "SANE" / "models" / "def_AE_module.py").is_file()
