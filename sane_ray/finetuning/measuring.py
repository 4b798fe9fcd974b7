"""Many pieces of work: what is recorded is not done again, what is little is done here, the rest by actors on Ray."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sane_ray.cluster import connect
from sane_ray.config import ClusterConfig, FanOutConfig
from sane_ray.errors import InputError
from sane_ray.finetuning.evaluation import Evaluation, Histories, Piece
from sane_ray.finetuning.executor import execute
from sane_ray.finetuning.modules import ModuleEvaluation
from sane_ray.finetuning.records import Records
from sane_ray.tokens.store.progress_bar import progress_bar
from sane_ray.zoo.images import ImageData

SMALL_WORK = 2e9
"""Weights times images times passes that a core does in about 10 seconds: in less, Ray and its actors hardly start."""

_QUIET_SECONDS = 2.0  # without a progress bar
_PASSES = 3  # of a training step, in units of a forward pass


@dataclass(frozen=True)
class Failed:
    """A piece that could not be done."""

    reason: str


class Measuring:
    """Trains and measures pieces on one set of images; leaves Ray at the end of its block, if it has joined it.

    Args:
        images: what to train on and to measure with.
        epochs: epochs of training; 0 only measures.
        answered: epochs at which the answers to the test images are kept.
        folder: where histories are kept.
        config: of the actors.
        what: the verb of the progress bar.
        network: builds the networks, where they are of none of our own architectures.
    """

    def __init__(
        self,
        images: ImageData,
        epochs: int,
        answered: Sequence[int],
        folder: Path,
        config: FanOutConfig,
        what: str = "evaluate",
        network: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.network = network
        self.images, self.epochs, self.answered, self.config, self.what = images, epochs, list(answered), config, what
        self.records = Records(folder, images, epochs, self.answered)
        self._connection = contextlib.ExitStack()

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def known(self, pieces: Sequence[Piece]) -> int:
        """How many of the pieces are recorded."""
        return sum(self.records.load(self.records.key(piece)) is not None for piece in pieces)

    def __call__(self, pieces: Sequence[Piece]) -> list[Histories | Failed]:
        """The histories of pieces, in their order; each new one is on disk before the next is waited for."""
        keys = [self.records.key(piece) for piece in pieces]
        found: dict[str, Histories | Failed] = {}
        for key in keys:
            if (kept := self.records.load(key)) is not None:
                found[key] = kept
        missing = {key: piece for key, piece in zip(keys, pieces, strict=True) if key not in found}
        for key, result in self._done(missing):
            if isinstance(result, Histories):
                self.records.keep(key, result)
            found[key] = result
        return [found[key] for key in keys]

    def _done(self, missing: dict[str, Piece]) -> Iterator[tuple[str, Histories | Failed]]:
        if not missing:
            return
        yield from self._here(missing) if self._is_small(missing.values()) else self._on_ray(missing)

    def _here(self, missing: dict[str, Piece]) -> Iterator[tuple[str, Histories | Failed]]:
        work, arguments = self._work
        evaluation = work(*arguments)
        with progress_bar(self.what, len(missing), "piece", delay=_QUIET_SECONDS) as bar:
            for key, piece in missing.items():
                try:
                    result: Histories | Failed = evaluation(piece)
                except Exception as error:  # as in an actor: the others go on
                    result = Failed(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
                bar.update()
                yield key, result

    @property
    def _work(self) -> tuple[Callable[..., Callable[[Piece], Histories]], list[Any]]:
        """What measures pieces, and its arguments."""
        arguments = [self.images, self.epochs, self.answered]
        if self.network is None:
            return Evaluation, arguments
        return ModuleEvaluation, [self.network, *arguments, "cuda" if self.config.gpus else "cpu"]

    def _is_small(self, pieces: Iterable[Piece]) -> bool:
        passes = 1 + self.epochs * (1 + _PASSES)
        work = sum(_weights(piece) for piece in pieces) * len(self.images.labels_N) * passes
        return work <= SMALL_WORK and not self.config.gpus and self.config.actors < 2

    def _on_ray(self, missing: dict[str, Piece]) -> Iterator[tuple[str, Histories | Failed]]:
        self._connection.enter_context(connect(ClusterConfig(address=self.config.address)))  # once: then it is nothing
        work, arguments = self._work
        outcomes = execute(
            work,
            missing.items(),
            arguments=arguments,
            actors=self.config.actors,
            num_cpus=self.config.cpus,
            num_gpus=self.config.gpus,
            timeout=self.config.timeout,
            retries=self.config.retries,
            what=self.what,
            unit="piece",
            total=len(missing),
        )
        with contextlib.closing(outcomes):
            for outcome in outcomes:
                value: Any = outcome.value
                yield outcome.key, Failed(outcome.error or "") if value is None else value


def _weights(piece: Piece) -> float:
    """Weights of all networks of a piece; of those that are still to be initialised, as of a small network."""
    if piece.weights is None:
        return 1e4 * len(piece.params)
    return float(sum(math.prod(value.shape) for value in piece.weights.values()))


def succeeded(results: Sequence[Histories | Failed]) -> list[Histories]:
    """The histories, where all must be there.

    Raises:
        InputError: one is not.
    """
    for result in results:
        if isinstance(result, Failed):
            raise InputError(f"networks could not be measured: {result.reason}")
    return [result for result in results if isinstance(result, Histories)]
