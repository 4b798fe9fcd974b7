"""Trains networks from given weights and measures them before and after every epoch: the work of one actor.

Plain torch and numpy. A network becomes the same whatever is trained beside it, so that a piece of work that is done
again, or in other company, gives the same numbers. Never reads a store, never imports Ray.

Shape suffixes: R networks, I test images, C classes, E epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sane_ray.zoo.images import ImageData
from sane_ray.zoo.stacked import train_stack

METRICS = ("train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc")
"""What is measured after each epoch, on all images of the split, without dropout."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Piece:
    """Networks that are trained side by side."""

    params: Sequence[Mapping[str, Any]]
    """How each is built and trained: flat, with the published keys; alike but for the seed."""
    weights: Arrays | None
    """By key, [R, *shape]; None begins where the params initialise."""


@dataclass(frozen=True)
class Histories:
    """What became of them."""

    metrics_REM: NDArray[np.float64]
    """The ``METRICS`` by epoch, from before training."""
    logits_RTIC: NDArray[np.float16]
    """Answers to the test images, at each of the epochs asked for."""


class Evaluation:
    """Trains and measures pieces on one set of images.

    Args:
        images: what to train on and to measure with.
        epochs: epochs of training; 0 only measures.
        answered: epochs at which the answers to the test images are kept.
    """

    def __init__(self, images: ImageData, epochs: int, answered: Sequence[int]) -> None:
        self.images, self.epochs = images, epochs
        self.answered = [epoch for epoch in answered if epoch <= epochs]

    def __call__(self, piece: Piece) -> Histories:
        """Trains and measures the networks of a piece."""
        weights = None
        if piece.weights is not None:
            tensors = {key: torch.tensor(value) for key, value in piece.weights.items()}
            weights = [{key: value[index] for key, value in tensors.items()} for index in range(len(piece.params))]
        kept = sorted({*self.answered, self.epochs})
        trained = train_stack(piece.params, self.images, kept, weights=weights, keep_logits=True)
        metrics = [[[row[name] for name in METRICS] for row in one.results] for one in trained]
        logits = [[one.logits[epoch] for epoch in self.answered] for one in trained]
        return Histories(np.array(metrics), _as_half(np.array(logits)))


def _as_half(values: NDArray[Any]) -> NDArray[np.float16]:
    """What is too large for half precision becomes its largest number; NaN stays."""
    largest = np.finfo(np.float16).max
    return values.clip(-largest, largest).astype(np.float16)


def ensemble_accuracy(logits_RIC: NDArray[Any], labels_I: NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy of several networks together: by the mean of their logits (published), and of their probabilities.

    A network whose logits are no numbers has no say, unless it is so with all of them.
    """
    logits = torch.from_numpy(np.asarray(logits_RIC, dtype=np.float32))
    sound_R = logits.isfinite().all(-1).all(-1)
    logits = logits[sound_R] if sound_R.any() else logits
    answers = (logits.mean(0), logits.softmax(-1).mean(0))
    by_logits, by_probabilities = (float((answer.argmax(-1).numpy() == labels_I).mean()) for answer in answers)
    return by_logits, by_probabilities
