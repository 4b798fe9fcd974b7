"""Sampling and fine-tuning by the published code (public repository HSG-AIML/SANE), as sampling.py measures it.

It is called, never copied: ``--published`` of sampling.py names a checkout, which stays as it is. What is asked of it
is the body of its ``sample_model_evaluation``: ``get_anchor_embeddings``, ``sample_models``,
``de_normalize_checkpoint``, and ``evaluate_single_model`` for one network after the other.

What is put around it, in its favour or neutral:

* packages it imports that are not installed: small modules of what it uses of them, of which only ``einops.repeat`` is
  called; its Ray trainables and torchvision's networks are imported and not called;
* the network for images of 8x8 pixels, which it does not know, takes the place of its class ``CNN``, built as that is;
* ``torch.load`` reads whole objects, as it did when the code was written (here: only files that this run has written);
* the autoencoder is its ``AE`` with our weights and the few names that are asked of its module, as it is trained;
* CUDA's autocast is asked for and does nothing on a CPU: it computes in float32;
* of its two data loaders the one that it takes where a config names none (``tensor``), which is the faster by far.

It changes modules of its process for good: use it in a process of its own.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from published_step import add_missing_modules
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sane_ray.autoencoder.model import SANE
from sane_ray.autoencoder.published import config_to_published, state_dict_to_published
from sane_ray.tokens.layers import LayerTable
from sane_ray.tokens.normalization import Normalization
from sane_ray.zoo.images import ImageData, Split

BATCH = 32
"""Networks that it encodes and decodes at a time, as in its script."""

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class DigitsCNN(nn.Module):
    """``digits_cnn`` of our zoos, without dropout, in the manner of the published networks."""

    def __init__(self, channels_in: int, nlin: str, dropout: float, init_type: str) -> None:
        super().__init__()
        assert (nlin, dropout, init_type) == ("relu", 0, "kaiming_uniform")
        layers: list[nn.Module] = [nn.Conv2d(channels_in, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        layers += [nn.Conv2d(8, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 10)]
        self.module_list = nn.ModuleList(layers)
        for layer in self.module_list:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(layer.weight)
                layer.get_parameter("bias").data.fill_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for layer in self.module_list:
            x = layer(x)
        return x


class AnchorDataset:
    """What its ``get_anchor_embeddings`` asks of a data set of anchors."""

    def __init__(self, tokens_KNT: Tensor, positions_N3: Tensor) -> None:
        self.tokens_KNT, self.positions = tokens_KNT, positions_N3.to(torch.int)

    def __get_weights__(self) -> tuple[Tensor, Tensor]:
        return self.tokens_KNT, torch.ones_like(self.tokens_KNT, dtype=torch.bool)


class PublishedSampling:
    """Its functions in the order of its loop.

    Args:
        code: a checkout.
        folder: for what it reads from files: anchors and images.
        model: our autoencoder.
        tokens_KNT: normalised tokens of the anchors.
        table, normalization: of the networks.
        recipe: params of the networks.
        images: to train on and to measure with.
    """

    def __init__(
        self,
        code: Path,
        folder: Path,
        model: SANE,
        tokens_KNT: Tensor,
        table: LayerTable,
        normalization: Normalization,
        recipe: Mapping[str, Any],
        images: ImageData,
    ) -> None:
        modules = import_published(code)
        self.modules = modules
        self.model = its_model(modules.AE, model)
        self.norms = {
            layer.key: {"mean": float(shift), "std": float(scale)}
            for layer, shift, scale in zip(table.layers, normalization.shift, normalization.scale, strict=True)
        }
        self.anchors, self.dump = folder / "anchors.pt", folder / "images.pt"
        torch.save(AnchorDataset(tokens_KNT, torch.from_numpy(table.positions)), self.anchors)
        data = {split: TensorDataset(*(torch.tensor(values) for values in images.split(split))) for split in SPLITS}
        torch.save({f"{split}set": data[split] for split in SPLITS}, self.dump)
        self.config = {**recipe, "model::type": "CNN", "dataset::dump": str(self.dump)}

    def sample(self, count: int) -> dict[str, np.ndarray]:
        """Weights by key, [R, *shape]: kernels for each token, decoded and normalised back."""
        z, positions, shape = self.modules.get_anchor_embeddings(str(self.anchors), self.model, BATCH)
        reference = self.modules.NNmodule({**self.config, "device": "cpu"}, cuda=False).model.state_dict()
        checkpoints = self.modules.sample_models(
            self.model, reference, count, z, positions, shape, mode="token", batch_size=BATCH, return_new_anchor=False
        )
        checkpoints = [self.modules.de_normalize(one, self.norms, mode="standardize") for one in checkpoints]
        return {key: np.stack([one[key].numpy() for one in checkpoints]) for key in checkpoints[0]}

    def evaluate(self, weights: Mapping[str, np.ndarray], epochs: int) -> np.ndarray:
        """Accuracies of networks before training, [R, splits]."""
        found = []
        for index in range(len(next(iter(weights.values())))):
            checkpoint = {key: torch.from_numpy(value[index]) for key, value in weights.items()}
            results = self.modules.evaluate_single_model(copy.copy(self.config), checkpoint, epochs)
            found.append([results[f"acc_{split}"][0] for split in SPLITS])
        return np.array(found)


def import_published(code: Path) -> SimpleNamespace:
    """What is called of it."""
    warnings.simplefilter("ignore")  # it calls what later versions of torch have deprecated
    sys.path.insert(0, str(code.absolute() / "src"))
    add_missing_modules(MORE_MISSING)
    torch.load = functools.partial(torch.load, weights_only=False)
    nets = importlib.import_module("SANE.models.def_net")
    nets.CNN = DigitsCNN  # type: ignore[attr-defined]
    load = importlib.import_module
    _silence("SANE.sampling.get_anchor_embeddings", "SANE.sampling.load_dataset")
    return SimpleNamespace(
        AE=load("SANE.models.def_AE").AE,
        NNmodule=nets.NNmodule,
        get_anchor_embeddings=load("SANE.sampling.get_anchor_embeddings").get_anchor_embeddings,
        sample_models=load("SANE.sampling.sample_models").sample_models,
        de_normalize=load("SANE.sampling.de_normalize").de_normalize_checkpoint,
        evaluate_single_model=load("SANE.sampling.evaluate_single_model").evaluate_single_model,
    )


def its_model(kind: Any, model: SANE) -> SimpleNamespace:
    """Its autoencoder with our weights, and what its module has of it."""
    theirs = kind(config_to_published(model.config))
    theirs.load_state_dict(state_dict_to_published(model.state_dict(), model.config))
    theirs.eval()
    encode, decode = theirs.forward_encoder, theirs.forward_decoder
    return SimpleNamespace(model=theirs, device=torch.device("cpu"), forward_encoder=encode, forward_decoder=decode)


def _silence(*names: str) -> None:
    """Modules without what they print."""
    for name in names:
        vars(importlib.import_module(name))["print"] = lambda *_, **__: None


def _repeat(values: Tensor, pattern: str, b: int) -> Tensor:
    """``einops.repeat`` as it is called."""
    assert pattern == "n d -> b n d"
    return values.expand(b, *values.shape)


MORE_MISSING: dict[str, dict[str, Any]] = {
    "einops": {"repeat": _repeat},
    "torchvision.models": {},
    "torchvision.models.resnet": {"BasicBlock": object, "Bottleneck": object, "ResNet": object},
}
"""Beside those of the training step."""
