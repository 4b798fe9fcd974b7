"""Estimates the batch-norm running statistics of generated weights from images.

Statistics that were decoded with the weights do not fit the activations that these weights really lead to: a generated
ResNet-18 answers at chance with them, and with estimated ones at 61 % (SANE, arXiv 2406.09997, table of halo and
batch-norm conditioning). Nothing but running statistics ever changes: no parameter, no flag, no momentum. This module
never reads a file and never imports Ray.

Shape suffixes: N images, B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sane_ray.errors import InputError
from sane_ray.zoo.images import ImageData

IMAGES = 2000
"""Most training images that statistics are estimated from."""

BATCH = 100
PUBLISHED_BATCH, PUBLISHED_MOMENTUM = 32, 0.1

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_DRAW_AGAIN = "these weights are of no use: draw others, or from a narrower density"


def training_batches(images: ImageData, how: str) -> list[Tensor]:
    """The training images that statistics are estimated from, float32 [B, C, H, W]; the same at every call.

    Args:
        images: of which only the training split is touched.
        how: ``reset`` for batches of about ``BATCH`` images, all of nearly one size, ``published`` for those of
            ``PUBLISHED_BATCH``, ``keep`` for none.
    """
    if how == "keep":
        return []
    rows_N = np.random.default_rng(0).permutation(images.rows["train"])[:IMAGES]
    size = PUBLISHED_BATCH if how == "published" else BATCH
    chunks = np.array_split(rows_N, max(1, len(rows_N) // size))
    return [torch.from_numpy(images.images_NCHW[rows_B]) for rows_B in chunks]


def condition_as(how: str, network: nn.Module, batches: Iterable[Tensor]) -> bool:
    """Estimates statistics in one of the ways of ``sampling.batch_norm``, in place.

    Args:
        how: ``reset``, ``published`` (something of the statistics stays), or ``keep``.
        network: with the generated weights.
        batches: of ``training_batches``.

    Returns:
        Whether statistics were estimated. Where weights lead to values that are not finite, they stay as they were:
        such a network is of no use with any.
    """
    if how == "keep":
        return False
    published = how == "published"
    try:
        count = condition(network, batches, reset=not published, momentum=PUBLISHED_MOMENTUM if published else None)
    except InputError:
        return False
    return count > 0


def condition(
    network: nn.Module, batches: Iterable[Tensor], *, reset: bool = True, momentum: float | None = None
) -> int:
    """Estimates the running statistics of a network's batch norms from images, in place.

    The batch norms normalise each batch by its own statistics, as in training; all other modules run as in evaluation,
    so that nothing is dropped out. With the defaults the statistics become the mean over the batches of each batch's
    mean and unbiased variance, whatever they were before. The published code (``condition_bn.py``) is ``reset=False,
    momentum=0.1``, where something of the generated statistics stays: 0.9 to the power of the number of batches.

    Args:
        network: With the generated weights, in any mode.
        batches: Images [B, C, H, W], moved to the network's device; batches of one size count alike. It is not touched
            where there is nothing to estimate.
        reset: Whether to forget the statistics that the network has.
        momentum: Weight of a batch against all before it; None weighs all batches alike.

    Returns:
        The number of batch norms whose statistics were estimated: 0 if the network has none that keeps any, and then
        nothing has changed.

    Raises:
        InputError: there is no batch, images do not fit the network, or they lead to values that are not finite. The
            statistics are then those from before the call.
    """
    if momentum is not None and not 0 < momentum <= 1:
        raise InputError(
            f"momentum is {momentum}: it must be more than 0 and at most 1, or None to average all batches"
        )
    norms = _norms_of(network)
    if not norms:
        return 0
    with _conditioning(network, norms, momentum), torch.no_grad():
        if reset:
            for norm in norms.values():
                norm.reset_running_stats()
        count = 0
        for count, batch in enumerate(batches, start=1):
            _pass(network, norms, batch, count)
        if not count:
            raise InputError("there is no batch of images to estimate batch-norm statistics from: give at least one")
    return len(norms)


def _norms_of(network: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that keep running statistics, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@contextmanager
def _conditioning(network: nn.Module, norms: dict[str, _BatchNorm], momentum: float | None) -> Iterator[None]:
    """Batch norms in training, everything else in evaluation; on an error the statistics are put back."""
    modes = {module: module.training for module in network.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    kept = {norm: [getattr(norm, name).clone() for name in _STATISTICS] for norm in norms.values()}
    try:
        network.eval()
        for norm in norms.values():
            norm.training, norm.momentum = True, momentum
        yield
    except BaseException:
        for norm, values in kept.items():
            for name, value in zip(_STATISTICS, values, strict=True):
                getattr(norm, name).copy_(value)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, before in momenta.items():
            norm.momentum = before


def _pass(network: nn.Module, norms: dict[str, _BatchNorm], batch: Tensor, number: int) -> None:
    """One batch through the network."""
    if not isinstance(batch, Tensor):
        raise InputError(f"batch {number} is a {type(batch).__name__}: give tensors of images, without labels")
    statistics = next(iter(norms.values())).running_mean
    assert statistics is not None
    images_BCHW = batch.to(statistics.device)
    if not images_BCHW.isfinite().all():
        raise InputError(f"batch {number} has pixels that are not finite: look at the images and their standardisation")
    try:
        output = network(images_BCHW)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"batch {number}, {images_BCHW.dtype} of shape {list(batch.shape)}, does not go through the network: "
            f"{str(error).splitlines()[0]}"
        ) from error
    _check_finite(norms, output, number)


def _check_finite(norms: dict[str, _BatchNorm], output: object, number: int) -> None:
    """Raises ``InputError`` for the first batch norm whose statistics, or else an output, are not finite."""
    for name, norm in norms.items():
        for value in (norm.running_mean, norm.running_var):
            if value is not None and not value.isfinite().all():
                raise InputError(
                    f"batch norm {name!r} has statistics that are not finite after batch {number}: {_DRAW_AGAIN}"
                )
    if isinstance(output, Tensor) and not output.isfinite().all():
        raise InputError(f"the network's answers to batch {number} are not finite: {_DRAW_AGAIN}")
