"""Trains and measures networks of any ``torch.nn.Module``: the work of one actor, as ``Evaluation`` is for our own.

Many networks are run at once on a GPU, and on a CPU where they are small: their weights are stacked, and ``torch.func``
runs the module over the stack. Whether that comes to the same as one network alone, gradients and running statistics
too, is tried once, on the module as it is built; where it does not, or cannot be (dropout, which draws; operations that
look at values; too little memory), networks are trained one after the other. What a network becomes depends on its own
params, weights and images alone, never on its neighbours, but for the rounding of sums. Never reads a file, never
imports Ray.

Shape suffixes: R networks, N images, B images of a batch, C classes, T epochs of answers, E epochs, M metrics.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from sane_ray.errors import InputError
from sane_ray.finetuning.evaluation import METRICS, Histories, Piece
from sane_ray.finetuning.recipe import BATCH, DECAY, MOMENTUM, OPTIMIZER, RATE, optimizer_of
from sane_ray.sampling.batch_norm import condition_as, training_batches
from sane_ray.zoo.architectures import generator
from sane_ray.zoo.images import ImageData

BATCH_NORM = "sampling::batch_norm"
"""Key of params: how running statistics of given weights are estimated before anything is measured."""

EVALUATION_BATCH = 256
"""Images of a forward pass without gradients."""

SMALL = 2e6
"""Weights times pixels up to which a CPU trains networks at once. Eight residual networks on one core, at once against
one after the other: 1.6 times as fast with 2,554 weights and 8x8 pixels, 1.1 times with 24,010, and 0.7 times with
7,690 and 32x32. Grouped convolutions cost more than single ones: worth it where a step is nearly all overhead."""

_RECIPE = (OPTIMIZER, RATE, DECAY, MOMENTUM, BATCH)
_TRIED = 4
"""Images that running at once is tried with."""
_TOLERANCE = 1e-3
"""Of what is tried; a wrong result differs by far more."""


class ModuleEvaluation:
    """Trains and measures pieces on one set of images.

    Args:
        network: builds a network; its weights are replaced. Sent to actors, so that it must travel.
        images: what to train on and to measure with.
        epochs: epochs of training; 0 only measures.
        answered: epochs at which the answers to the test images are kept.
        device: ``cpu``, or ``cuda`` for the GPU that this process has.

    Raises:
        InputError: the network cannot be built, or there is no GPU.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        images: ImageData,
        epochs: int,
        answered: Sequence[int],
        device: str = "cpu",
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("config field fan_out.gpus asks for GPUs, but PyTorch finds none here: set it to 0")
        self.network, self.images, self.epochs = network, images, epochs
        self.answered = [epoch for epoch in answered if epoch <= epochs]
        self.device = torch.device(device)
        self._images_NCHW = torch.tensor(images.images_NCHW, device=self.device)
        self._labels_N = torch.tensor(images.labels_N, device=self.device)
        self._rows = {split: torch.tensor(rows, device=self.device) for split, rows in images.rows.items()}

    def __call__(self, piece: Piece) -> Histories:
        """Trains and measures the networks of a piece.

        Raises:
            InputError: the weights are not those of the network.
        """
        modules = [self._module(piece, index) for index in range(len(piece.params))]
        if self._at_once(modules, piece.params):
            with contextlib.suppress(torch.OutOfMemoryError):  # the stack is a copy: the modules are as they were
                return self._history(_Stacked(modules), piece.params)
        alone = [self._history(_Alone(module), [params]) for module, params in zip(modules, piece.params, strict=True)]
        return Histories(
            np.concatenate([one.metrics_REM for one in alone]), np.concatenate([one.logits_RTIC for one in alone])
        )

    def _module(self, piece: Piece, index: int) -> nn.Module:
        """One network with its weights, conditioned if its params ask for it."""
        params = piece.params[index]
        with _seeded(generator(params, "initialization"), self.device):
            module = self.network()
        if piece.weights is not None:
            state = {key: torch.tensor(value[index]) for key, value in piece.weights.items()}
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise InputError(f"weights do not fit the network: {' '.join(str(error).split())}") from error
        module.to(self.device)
        how = str(params.get(BATCH_NORM, "keep"))
        condition_as(how, module, self._batches(how))
        return module

    def _batches(self, how: str) -> list[Tensor]:
        if how not in self._conditioning:
            self._conditioning[how] = training_batches(self.images, how)
        return self._conditioning[how]

    @cached_property
    def _conditioning(self) -> dict[str, list[Tensor]]:
        return {}

    def _at_once(self, modules: Sequence[nn.Module], params: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these networks are run at once."""
        if len(modules) < 2 or any(one.get(key) != params[0].get(key) for one in params for key in _RECIPE):
            return False
        weights, pixels = sum(each.numel() for each in modules[0].parameters()), self._images_NCHW[0, 0].numel()
        worth_it = self.device.type != "cpu" or (self.epochs and weights * pixels <= SMALL)
        return bool(worth_it) and self.can_stack

    @cached_property
    def can_stack(self) -> bool:
        """Whether networks at once come to the same as each alone, with gradients and statistics; tried once."""
        modules = []
        for seed in range(2):
            with _seeded(torch.Generator().manual_seed(seed), self.device):
                modules.append(self.network().to(self.device))
        images_BCHW, labels_B = self._images_NCHW[:_TRIED], self._labels_N[:_TRIED]
        try:
            stacked = _tried(_Stacked(copy.deepcopy(modules)), images_BCHW, labels_B)
            alone = [_tried(_Alone(module), images_BCHW, labels_B) for module in modules]
        except Exception:  # a module that cannot be stacked may raise anything
            return False
        together = {key: torch.cat([one[key] for one in alone]) for key in alone[0]}
        return all(
            torch.allclose(value, together[key], rtol=_TOLERANCE, atol=_TOLERANCE) for key, value in stacked.items()
        )

    def _history(self, networks: _Networks, params: Sequence[Mapping[str, Any]]) -> Histories:
        """Of networks that are run together, or of one."""
        metrics, answers = [], []
        with _seeded(generator(params[0], "dropout"), self.device):  # a stack of several draws nothing
            training = self._training(networks, params) if self.epochs else iter(())
            for epoch in range(self.epochs + 1):
                if epoch:
                    next(training)
                metrics_RM, logits_RIC = self._measured(networks)
                metrics.append(metrics_RM)
                if epoch in self.answered:
                    answers.append(logits_RIC)
        logits_TRIC = np.stack(answers) if answers else np.empty((0, *logits_RIC.shape), np.float16)
        return Histories(np.stack(metrics, axis=1), logits_TRIC.swapaxes(0, 1))

    def _training(self, networks: _Networks, params: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Yields after each epoch: a pass over the training images in each network's own order."""
        optimizer = optimizer_of(params[0], networks.parameters)
        orders, rows_N = [generator(one, "order") for one in params], self._rows["train"]
        fewest = 2 if networks.has_batch_norm else 1  # a batch norm takes no single value a channel
        while True:
            order_RN = torch.stack([torch.randperm(len(rows_N), generator=order) for order in orders])
            for places_RB in order_RN.split(int(params[0][BATCH]), dim=1):
                if places_RB.shape[1] < fewest:
                    continue
                rows_RB = rows_N[places_RB.to(self.device)]
                optimizer.zero_grad()
                networks.losses(self._images_NCHW[rows_RB], self._labels_N[rows_RB]).sum().backward()
                optimizer.step()
            yield

    @torch.no_grad()
    def _measured(self, networks: _Networks) -> tuple[np.ndarray, np.ndarray]:
        """Metrics [R, M] on all images, without dropout, and answers to the test images, float16 [R, I, C]."""
        found, answers = {}, []
        for split, rows_N in self._rows.items():
            losses, hits = [], []
            for rows_B in rows_N.split(EVALUATION_BATCH):
                logits_RBC = networks.answers(self._images_NCHW[rows_B]).float()
                labels_RB = self._labels_N[rows_B].expand(len(logits_RBC), -1)
                losses.append(functional.cross_entropy(logits_RBC.mT, labels_RB, reduction="none").double())
                hits.append((logits_RBC.argmax(-1) == labels_RB).double())
                if split == "test":
                    answers.append(logits_RBC.half().cpu())
            found[f"{split}_loss"] = torch.cat(losses, 1).mean(1).cpu().numpy()
            found[f"{split}_acc"] = torch.cat(hits, 1).mean(1).cpu().numpy()
        return np.stack([found[name] for name in METRICS], axis=1), torch.cat(answers, 1).numpy()


class _Networks(Protocol):
    """Networks of one architecture that are run together."""

    parameters: list[Tensor]
    has_batch_norm: bool

    def losses(self, images_RBCHW: Tensor, labels_RB: Tensor) -> Tensor:
        """Cross-entropy of each on its own batch in training mode, [R]."""
        ...

    def answers(self, images_BCHW: Tensor) -> Tensor:
        """Logits of each to the same images in evaluation mode, [R, B, C]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Gradients and buffers, [R, *shape] each."""
        ...


class _Alone:
    """One network: the module itself."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters: list[Tensor] = [each for each in module.parameters() if each.requires_grad]
        self.has_batch_norm = _has_batch_norm(module)

    def losses(self, images_RBCHW: Tensor, labels_RB: Tensor) -> Tensor:
        """As ``_Networks``."""
        self.module.train()
        return functional.cross_entropy(self.module(images_RBCHW[0]), labels_RB[0])[None]

    def answers(self, images_BCHW: Tensor) -> Tensor:
        """As ``_Networks``."""
        answers: Tensor = self.module.eval()(images_BCHW)
        return answers[None]

    def tensors(self) -> dict[str, Tensor]:
        """As ``_Networks``."""
        return {
            key: value[None] for key, value in _tensors(self.module.named_parameters(), self.module.named_buffers())
        }


class _Stacked:
    """Several networks, each parameter and buffer stacked to [R, *shape]; buffers change in place, as in a module."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.module, self.count = modules[0], len(modules)
        self.weights, self.buffers = stack_module_state(list(modules))
        self.parameters: list[Tensor] = [each for each in self.weights.values() if each.requires_grad]
        self.has_batch_norm = _has_batch_norm(self.module)

    def losses(self, images_RBCHW: Tensor, labels_RB: Tensor) -> Tensor:
        """As ``_Networks``."""
        self.module.train()
        losses: Tensor = vmap(self._loss)(self.weights, self.buffers, images_RBCHW, labels_RB)
        return losses

    def answers(self, images_BCHW: Tensor) -> Tensor:
        """As ``_Networks``; on a CPU one after the other, which is faster where a batch is large."""
        self.module.eval()
        if images_BCHW.device.type == "cpu":
            return torch.stack([self._call(*self._row(index), images_BCHW) for index in range(self.count)])
        answers: Tensor = vmap(self._call, in_dims=(0, 0, None))(self.weights, self.buffers, images_BCHW)
        return answers

    def tensors(self) -> dict[str, Tensor]:
        """As ``_Networks``."""
        return dict(_tensors(self.weights.items(), self.buffers.items()))

    def _row(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights = {key: value[index] for key, value in self.weights.items()}
        return weights, {key: value[index] for key, value in self.buffers.items()}

    def _call(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], images_BCHW: Tensor) -> Any:
        return functional_call(self.module, (weights, buffers), (images_BCHW,))

    def _loss(
        self, weights: dict[str, Tensor], buffers: dict[str, Tensor], images_BCHW: Tensor, labels_B: Tensor
    ) -> Tensor:
        return functional.cross_entropy(self._call(weights, buffers, images_BCHW), labels_B)


def _tried(networks: _Networks, images_BCHW: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """All that a step and an answer of two networks, or of one, come to."""
    count = networks.count if isinstance(networks, _Stacked) else 1
    losses_R = networks.losses(images_BCHW.expand(count, *images_BCHW.shape), labels_B.expand(count, -1))
    losses_R.sum().backward()
    with torch.no_grad():
        return {"losses": losses_R, "answers": networks.answers(images_BCHW), **networks.tensors()}


def _tensors(weights: Any, buffers: Any) -> Iterator[tuple[str, Tensor]]:
    """Gradients and buffers as numbers."""
    for key, value in weights:
        if value.grad is not None:
            yield f"gradient of {key}", value.grad
    for key, value in buffers:
        yield key, value.float()


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(each, _BatchNorm) for each in module.modules())


@contextlib.contextmanager
def _seeded(source: torch.Generator, device: torch.device) -> Iterator[None]:
    """Torch's own random state begins anew in this block, and is as before behind it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(source.initial_seed())
        yield
