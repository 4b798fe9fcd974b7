"""Trains many networks of one architecture at once: each layer is one batched matrix product over all of them.

A step of one small network is nearly all overhead: sixteen in a stack take as long as three alone. What a network
becomes depends on its own params and the images, bit for bit, never on its neighbours in the stack. Four things see to
that: every network has its own random generators; the products of one network never see another's values; batches and
parameter slots are padded to a multiple of ``LANES`` values, so that each network's data meets the processor's vectors
and BLAS at the same alignment wherever it lies in the stack; and one thread does it all, so that no sum is cut in two.

Never reads or writes a file and never imports Ray.

Shape suffixes: M networks, N images, B images of a batch, C channels, H height, W width, F features, k filter side,
K classes, S padded parameters. The batch is the last axis: then a convolution is the weight as stored times patches,
and every loop runs over whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sane_ray.errors import InputError
from sane_ray.zoo.architectures import (
    Activation,
    Conv,
    Dropout,
    Flatten,
    Linear,
    Pool,
    activation_of,
    described,
    from_params,
    generator,
    image_shape_of,
)
from sane_ray.zoo.images import ImageData

LANES = 32
"""Batches and parameter slots are padded to a multiple of this: two AVX-512 vectors of float32."""

EVALUATION_BATCH = 256
"""Images of a forward pass without gradients."""

SGD_MOMENTUM = 0.9
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8

Metrics = dict[str, float]


@dataclass(frozen=True)
class Trained:
    """One network's history."""

    params: Mapping[str, Any]
    checkpoints: dict[int, dict[str, Tensor]]
    """State dict by epoch."""
    results: list[Metrics]
    """One row an epoch, from epoch 0: {train,val,test}_{loss,acc}, all measured after the epoch without dropout."""
    logits: dict[int, np.ndarray]
    """By checkpoint epoch, where asked for: float32 [test images, classes]."""


def stack_key(params: Mapping[str, Any]) -> tuple[Any, ...]:
    """What networks of one stack have in common: the operations that run, whatever their numbers."""
    same = ("model::o_dim", "model::nlin", "training::batchsize")
    return (described(params).name, image_shape_of(params), *(params[name] for name in same))


def train_stack(
    models: Sequence[Mapping[str, Any]],
    images: ImageData,
    checkpoint_epochs: Sequence[int],
    *,
    weights: Sequence[Mapping[str, Tensor]] | None = None,
    keep_logits: bool = False,
) -> list[Trained]:
    """Trains networks side by side with cross-entropy, each with its own seed, optimiser and regularisation.

    Args:
        models: params of each network; all of one ``stack_key``.
        images: what to train on and to measure with.
        checkpoint_epochs: epochs at which weights are kept; 0 is before training.
        weights: a state dict for each network to begin with; without, each begins as its params initialise it.
        keep_logits: also keep what each network answers to the test images at these epochs.

    Returns:
        The networks' histories, in the order given.

    Raises:
        InputError: weights are not those of a network that the params describe.
    """
    if len({stack_key(params) for params in models}) != 1:
        raise ValueError("networks of one stack must share their stack_key")
    if weights is None:
        weights = [from_params(params).state_dict() for params in models]
    if len(weights) != len(models):
        raise ValueError(f"{len(weights)} networks' weights were given for {len(models)} networks")
    with _one_thread():
        return _train_stack(models, weights, images, checkpoint_epochs, keep_logits)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_stack(
    models: Sequence[Mapping[str, Any]],
    weights: Sequence[Mapping[str, Tensor]],
    images: ImageData,
    checkpoint_epochs: Sequence[int],
    keep_logits: bool,
) -> list[Trained]:
    stack = _Stack(models, weights)
    trainer = _Trainer(models, stack, images) if max(checkpoint_epochs) else None
    evaluator = _Evaluator(stack, images)
    histories = [Trained(params, {}, [], {}) for params in models]
    for epoch in range(max(checkpoint_epochs) + 1):
        if epoch > 0 and trainer is not None:
            trainer.train_epoch()
        metrics, logits_MNK = evaluator.evaluate()
        for index, history in enumerate(histories):
            history.results.append(metrics[index])
            if epoch in checkpoint_epochs:
                history.checkpoints[epoch] = stack.state_dict(index)
                if keep_logits:
                    history.logits[epoch] = logits_MNK[index][images.rows["test"]]
    return histories


class _Stack:
    """The parameters of all networks in one matrix, and their common forward pass.

    Row m of ``values`` is network m. Each parameter has a padded slot in it; ``views`` are the slots as [M, *shape].
    """

    def __init__(self, models: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Tensor]]) -> None:
        self.layers = described(models[0]).layers
        self.activation = activation_of(models[0])
        own = from_params(models[0]).state_dict()  # in the order of the layers, which given weights may not have
        self.shapes = {key: tuple(value.shape) for key, value in own.items()}
        slots = [_padded(value.numel()) for value in own.values()]
        self._starts = [sum(slots[:index]) for index in range(len(slots))]
        self.values = torch.zeros(len(models), sum(slots))
        for index, state in enumerate(states):
            self._fill(index, state)
        self.views = [view.requires_grad_() for view in self.views_of(self.values)]

    def _fill(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Copies one network's weights into its row."""
        for (key, shape), view in zip(self.shapes.items(), self.views_of(self.values), strict=True):
            given = tuple(state[key].shape) if key in state else None
            if given != shape:  # a copy would repeat what is too small
                has = "none" if given is None else "x".join(map(str, given))
                raise InputError(
                    f"weights {index} do not fit: the network's {key} is {'x'.join(map(str, shape))}, theirs is {has}"
                )
            view[index] = state[key]

    def views_of(self, matrix_MS: Tensor) -> list[Tensor]:
        """Each parameter's slot of a matrix [M, padded parameters], as a view [M, *shape] of the same memory."""
        views = []
        for shape, start in zip(self.shapes.values(), self._starts, strict=True):
            size = int(np.prod(shape))
            views.append(matrix_MS[:, start : start + size].unflatten(1, shape).detach())
        return views

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """A copy of one network's parameters."""
        return {key: view[index].detach().clone() for key, view in zip(self.shapes, self.views, strict=True)}

    def forward(self, images_MCHWB: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [M, classes, B]; the images of one network alone ([1, C, H, W, B]) go to all."""
        x = images_MCHWB
        parameters = iter(self.views)
        for layer in self.layers:
            match layer:
                case Conv():
                    x = _convolve(x, next(parameters), next(parameters), layer.padding)
                case Pool():
                    x = _MaxPool.apply(x)
                case Activation():
                    x = drop(self.activation(x)) if layer.dropout else self.activation(x)
                case Dropout():
                    x = drop(x)
                case Flatten():
                    x = x.flatten(1, 3)
                case Linear():
                    weight_MFG, bias_MF = next(parameters), next(parameters)
                    x = torch.baddbmm(bias_MF[:, :, None], weight_MFG, x)
        return x


class _Trainer:
    """One epoch after another of minibatch training, each network in its own order."""

    def __init__(self, models: Sequence[Mapping[str, Any]], stack: _Stack, images: ImageData) -> None:
        self.stack = stack
        images_NCHW, labels_N = images.split("train")
        self.images_NCHW = torch.tensor(images_NCHW)
        self.labels_N = torch.tensor(labels_N)
        self.batch_size = int(models[0]["training::batchsize"])
        self.orders = [generator(params, "order") for params in models]
        self.drop = _Drop(models)
        self.gradients_MS = torch.zeros_like(stack.values)
        self.optimizers = [
            kind([params["optim::optimizer"] == name for params in models], models, stack.values, self.gradients_MS)
            for name, kind in OPTIMIZERS.items()
        ]

    def train_epoch(self) -> None:
        """One pass over the training images; the last batch is what is left."""
        order_MN = torch.stack([torch.randperm(len(self.labels_N), generator=order) for order in self.orders])
        for rows_MB in order_MN.split(self.batch_size, dim=1):
            self._step(rows_MB)

    def _step(self, rows_MB: Tensor) -> None:
        count = rows_MB.shape[1]
        rows_MB = functional.pad(rows_MB, (0, _padded(count) - count))  # padding trains on image 0 with weight 0
        weight_B = torch.zeros(rows_MB.shape[1])
        weight_B[:count] = 1 / count
        images_MCHWB = self.images_NCHW[rows_MB].permute(0, 2, 3, 4, 1).contiguous()
        logits_MKB = self.stack.forward(images_MCHWB, self.drop)
        loss_MB = functional.cross_entropy(logits_MKB, self.labels_N[rows_MB], reduction="none")
        gradients = torch.autograd.grad((loss_MB * weight_B).sum(), self.stack.views)
        for slot, gradient in zip(self.stack.views_of(self.gradients_MS), gradients, strict=True):
            slot.copy_(gradient)
        with torch.no_grad():
            for optimizer in self.optimizers:
                optimizer.step()


class _Evaluator:
    """Loss and accuracy of all networks on all images, by split."""

    def __init__(self, stack: _Stack, images: ImageData) -> None:
        self.stack = stack
        self.rows = images.rows
        self.labels_N = images.labels_N
        labels_N = torch.tensor(images.labels_N)
        self.count = len(labels_N)
        rows_N = torch.arange(_padded(self.count)) % self.count  # padded with the first images, left out of the means
        images_NCHW = torch.tensor(images.images_NCHW)[rows_N]
        self.batches = [
            (batch_BCHW.permute(1, 2, 3, 0)[None].contiguous(), labels_B.expand(len(stack.values), -1))
            for batch_BCHW, labels_B in zip(
                images_NCHW.split(EVALUATION_BATCH), labels_N[rows_N].split(EVALUATION_BATCH), strict=True
            )
        ]

    @torch.no_grad()
    def evaluate(self) -> tuple[list[Metrics], np.ndarray]:
        """Each network's mean loss and accuracy on each split, without dropout; and logits, [M, images, classes]."""
        losses, answers = [], []
        for images_1CHWB, labels_MB in self.batches:
            logits_MKB = self.stack.forward(images_1CHWB, lambda x: x)
            losses.append(functional.cross_entropy(logits_MKB, labels_MB, reduction="none"))
            answers.append(logits_MKB)
        loss_MN = torch.cat(losses, 1)[:, : self.count].double().numpy()
        logits_MNK = torch.cat(answers, 2)[:, :, : self.count].mT.contiguous().numpy()
        hit_MN = logits_MNK.argmax(2) == self.labels_N  # torch takes several times as long
        return [self._means(loss_N, hit_N) for loss_N, hit_N in zip(loss_MN, hit_MN, strict=True)], logits_MNK

    def _means(self, loss_N: np.ndarray, hit_N: np.ndarray) -> Metrics:
        metrics: Metrics = {}
        for split, rows in self.rows.items():
            metrics[f"{split}_loss"] = float(loss_N[rows].mean())
            metrics[f"{split}_acc"] = float(hit_N[rows].mean())
        return metrics


class _Drop:
    """Dropout at each network's own rate, from its own generator."""

    def __init__(self, models: Sequence[Mapping[str, Any]]) -> None:
        self.rate_M = torch.tensor([float(params["model::dropout"]) for params in models])
        self.generators = [generator(params, "dropout") for params in models]

    def __call__(self, x: Tensor) -> Tensor:
        dropping = torch.nonzero(self.rate_M).flatten().tolist()
        if not dropping:
            return x
        noise = torch.ones_like(x)
        for index in dropping:
            noise[index].uniform_(generator=self.generators[index])
        rate = self.rate_M.view(-1, *[1] * (x.ndim - 1))
        return x * ((noise >= rate) / (1 - rate))


class _Optimizer:
    """One rule of descent for the networks of a stack that asked for it, each with its own rate and decay.

    Args:
        chosen: which networks these are.
        models: params of all networks of the stack.
        values_MS, gradients_MS: the stack's parameters and their gradients, in place.
    """

    def __init__(
        self, chosen: Sequence[bool], models: Sequence[Mapping[str, Any]], values_MS: Tensor, gradients_MS: Tensor
    ) -> None:
        self.count = sum(chosen)
        every = self.count == len(chosen)  # then rows are views: no copies are made
        self.rows: Any = slice(None) if every else torch.nonzero(torch.tensor(chosen)).flatten()
        self.values_MS, self.gradients_MS = values_MS, gradients_MS
        mine = [params for params, yes in zip(models, chosen, strict=True) if yes]
        self.rate_M1 = torch.tensor([[float(params["optim::lr"])] for params in mine])
        self.decay_M1 = torch.tensor([[float(params["optim::wd"])] for params in mine])
        self.steps = 0

    def step(self) -> None:
        """One step of every network; weight decay is added to the gradient, as ``torch.optim`` does for both rules."""
        if not self.count:
            return
        self.steps += 1
        values = self.values_MS[self.rows]
        gradients = self.gradients_MS[self.rows] + self.decay_M1 * values
        self.values_MS[self.rows] = values - self._change(gradients)

    def _change(self, gradients: Tensor) -> Tensor:
        raise NotImplementedError


class _Adam(_Optimizer):
    """As ``torch.optim.Adam``."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mean = torch.zeros(self.count, self.values_MS.shape[1])
        self.square = torch.zeros_like(self.mean)

    def _change(self, gradients: Tensor) -> Tensor:
        first, second = ADAM_BETAS
        self.mean.lerp_(gradients, 1 - first)
        self.square.mul_(second).addcmul_(gradients, gradients, value=1 - second)
        root = (self.square / (1 - second**self.steps)).sqrt_().add_(ADAM_EPSILON)
        return self.rate_M1 / (1 - first**self.steps) * self.mean / root


class _Sgd(_Optimizer):
    """As ``torch.optim.SGD`` with momentum."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.momentum = torch.zeros(self.count, self.values_MS.shape[1])

    def _change(self, gradients: Tensor) -> Tensor:
        self.momentum.mul_(SGD_MOMENTUM).add_(gradients)
        return self.rate_M1 * self.momentum


OPTIMIZERS: dict[str, type[_Optimizer]] = {"adam": _Adam, "sgd": _Sgd}
"""By the names of ``optim::optimizer``."""


def _convolve(x_MCHWB: Tensor, weight_MFCkk: Tensor, bias_MF: Tensor, padding: int) -> Tensor:
    """A convolution of each network with its own weights: [M, F, H', W', B]."""
    count, features, _, kernel, _ = weight_MFCkk.shape
    if padding:
        x_MCHWB = functional.pad(x_MCHWB, (0, 0, padding, padding, padding, padding))
    height, width, batch = x_MCHWB.shape[2] - kernel + 1, x_MCHWB.shape[3] - kernel + 1, x_MCHWB.shape[4]
    patches = _Patches.apply(x_MCHWB, kernel).expand(count, -1, -1)
    return torch.baddbmm(bias_MF[:, :, None], weight_MFCkk.flatten(2), patches).view(
        count, features, height, width, batch
    )


class _Patches(torch.autograd.Function):
    """[M, C, H, W, B] -> [M, C*k*k, H'*W'*B]: what each pixel's filter sees, ordered as a filter's weights are.

    Its own backward adds k*k shifted slices; autograd's adds one value at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int) -> Tensor:
        ctx.shape, ctx.kernel = x.shape, kernel
        windows = x.unfold(2, kernel, 1).unfold(3, kernel, 1)
        return windows.permute(0, 1, 5, 6, 2, 3, 4).reshape(x.shape[0], x.shape[1] * kernel * kernel, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        count, channels, height, width, batch = ctx.shape
        kernel = ctx.kernel
        rows, columns = height - kernel + 1, width - kernel + 1
        windows = gradient.view(count, channels, kernel, kernel, rows, columns, batch)
        out = gradient.new_zeros(ctx.shape)
        for i in range(kernel):
            for j in range(kernel):
                out[:, :, i : i + rows, j : j + columns] += windows[:, :, i, j]
        return out, None


class _MaxPool(torch.autograd.Function):
    """[M, C, H, W, B] -> [M, C, H//2, W//2, B]: the largest of 2x2 pixels; of equals the first takes the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        x = x[:, :, :height, :width]
        left, right = x[:, :, :, 0::2], x[:, :, :, 1::2]
        rows = torch.maximum(left, right)
        top, bottom = rows[:, :, 0::2], rows[:, :, 1::2]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(right > left, bottom > top)
        return torch.maximum(top, bottom)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        right, bottom = ctx.saved_tensors
        out = gradient.new_zeros(ctx.shape)
        for row, chosen in ((0, ~bottom), (1, bottom)):
            part = gradient * chosen
            mask = right[:, :, row::2]
            height, width = 2 * part.shape[2], 2 * part.shape[3]
            out[:, :, row:height:2, 1:width:2] = part * mask
            out[:, :, row:height:2, 0:width:2] = part * ~mask
        return out


def _padded(count: int) -> int:
    return -(-count // LANES) * LANES
