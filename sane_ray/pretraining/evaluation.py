"""What an autoencoder leaves of held-out networks: their accuracy after encoding and decoding, next to the originals'.

``evaluate`` is a plain function; ``Evaluations`` runs it beside a training, as Ray tasks. Never trains, never draws.

Shapes: R networks, N tokens of a network, T values of a token, W tokens of a window.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sane_ray.autoencoder.halo import Windows
from sane_ray.autoencoder.losses import explained_variance, explained_variance_sums
from sane_ray.autoencoder.model import SANE
from sane_ray.errors import InputError
from sane_ray.pretraining.history import Point
from sane_ray.pretraining.networks import Decoder, Group, answers, groups_of
from sane_ray.tokens.normalization import Normalization
from sane_ray.tokens.store import SPLITS, Architecture, TokenStore
from sane_ray.tokens.store.reading import as_float32
from sane_ray.tokens.tokenizer import LayerTable

NICENESS = 10
"""Of the process that evaluates: training goes first."""

_NETWORKS_AT_ONCE = 32
_IMAGES_AT_ONCE = 512
_WINDOWS_AT_ONCE = 32
_SAMPLED_WINDOWS = 8
"""Windows of a network that cannot be run: what training validates on tells the rest."""
_STREAM = 11  # keeps this random stream apart from others of the same seed

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Networks before and after encoding and decoding; arrays have a value a network, in the order asked for."""

    original: NDArray[np.float64]
    """Accuracy on the test images of their zoo, in [0, 1]."""
    reconstructed: NDArray[np.float64]
    """Accuracy after encoding and decoding."""
    agreement: NDArray[np.float64]
    """Fraction of the test images that both call the same."""
    variance: Tensor
    """float64 [5]: ``explained_variance_sums`` of the normalised tokens."""


def evaluate(model: SANE | Path, store: TokenStore | Path, checkpoints: Sequence[int]) -> dict[str, float]:
    """Encodes and decodes networks, and measures what is left of them; on the CPU.

    Args:
        model: the autoencoder, or its folder.
        store: the token store that it was trained on, or its folder.
        checkpoints: ordinals of the networks.

    Returns:
        Means over the networks: ``eval/accuracy`` on the test images of their zoo, ``eval/accuracy_original`` without
        the autoencoder, ``eval/accuracy_ratio`` of the two, ``eval/agreement`` (fraction of equal predictions); and
        ``eval/explained_variance`` of the normalised weights. Only the last, of a few windows of each network, where a
        store does not say how to run its networks or their images are not at hand, which is told by a warning.

    Raises:
        InputError: the model is damaged, or was not trained on this store.
    """
    metrics, reason = _evaluate(model, store, checkpoints)
    if reason:
        _LOG.warning("%s", reason)
    return metrics


def held_out(store: TokenStore, count: int, seed: int = 0) -> list[int]:
    """Ordinals of networks to evaluate on: always the same for the same seed.

    Half of them are the latest checkpoints of as many models, the other half a spread over the earlier epochs. They
    come from the validation split; from the test split where that is empty, and else, with a warning, from the training
    split.
    """
    splits = np.array(store.models["split"].to_pylist())
    split = next(name for name in ("val", "test", "train") if (splits == name).any())
    if split == "train":
        _LOG.warning("the store has no networks but those of the training split: accuracy is not of held-out ones")
    candidates = np.random.default_rng((seed, _STREAM)).permutation(np.flatnonzero(splits == split))
    epochs = np.array([epoch or 0 for epoch in store.models["epoch"].take(candidates).to_pylist()])
    by_epoch = np.argsort(epochs, kind="stable")
    models = np.array(store.models["model"].take(candidates).to_pylist())[by_epoch]
    candidates = candidates[by_epoch]
    is_latest = np.zeros(len(candidates), dtype=bool)
    is_latest[list({model: place for place, model in enumerate(models.tolist())}.values())] = True
    latest, earlier = candidates[is_latest], candidates[~is_latest]
    first = latest[::-1][: max(-(-count // 2), count - len(earlier))]
    places = np.linspace(0, len(earlier) - 1, min(count - len(first), len(earlier))).round().astype(int)
    return sorted([*first.tolist(), *earlier[places].tolist()])


def compare(model: SANE, store: TokenStore, checkpoints: Sequence[int]) -> Comparison:
    """Runs networks as stored and after encoding and decoding, many at a time.

    Raises:
        InputError: the store does not say how to run one of them, its images are not at hand, or the model was not
            trained on this store.
    """
    before, after, agree = (np.zeros(len(checkpoints)) for _ in range(3))
    row_of = {checkpoint: row for row, checkpoint in enumerate(checkpoints)}
    groups = [(group, group.network(), group.images().split("test")) for group in groups_of(store, checkpoints)]
    variance = torch.zeros(5, dtype=torch.float64)
    for group, network, images in groups:
        for begin in range(0, len(group.checkpoints), _NETWORKS_AT_ONCE):
            some = group.checkpoints[begin : begin + _NETWORKS_AT_ONCE]
            rows = [row_of[checkpoint] for checkpoint in some]
            before[rows], after[rows], agree[rows], sums = _compare(model, group, network, images, some)
            variance += sums
    return Comparison(before, after, agree, variance)


@torch.no_grad()
def _compare(
    model: SANE, group: Group, network: nn.Module, images: tuple[NDArray[Any], NDArray[Any]], checkpoints: Sequence[int]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], Tensor]:
    store, table = group.store, group.architecture.table
    tokens = torch.stack([store.tokens(checkpoint) for checkpoint in checkpoints])
    decoded = reconstruct(model, tokens, group.architecture)
    scales = [scale for checkpoint in checkpoints if (scale := store.model_scale(checkpoint)) is not None]
    scale = torch.stack(scales) if scales else None
    decode = Decoder(group.architecture, torch.device("cpu"))
    pixels, labels = (torch.from_numpy(part) for part in images)
    original, predicted = (_predictions(network, decode(each, scale), pixels) for each in (tokens, decoded))
    signal = torch.from_numpy(table.signal_counts).expand(len(tokens), -1)
    pairs = ((original, labels), (predicted, labels), (original, predicted))
    fractions = [(one == other).double().mean(dim=1).numpy() for one, other in pairs]
    return fractions[0], fractions[1], fractions[2], explained_variance_sums(decoded, tokens, signal)


def _predictions(network: nn.Module, weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Classes [R, images]."""
    return torch.cat([answers(network, weights, some).argmax(-1) for some in pixels.split(_IMAGES_AT_ONCE)], dim=1)


@torch.no_grad()
def reconstruct(model: SANE, tokens_RNT: Tensor, architecture: Architecture) -> Tensor:
    """Encodes and decodes the normalised tokens of whole networks by windows, as ``encode_model`` does, many at once.

    Returns:
        float32 [R, N, T]; what is in the padding has no meaning.

    Raises:
        InputError: the model was not trained on this architecture with this normalisation.
    """
    check_trained_on(model, architecture)
    networks, tokens, _ = tokens_RNT.shape
    windows = Windows(tokens, model.config.window)
    positions = windows.cut(torch.from_numpy(architecture.table.positions)).repeat(networks, 1, 1)
    decoded = _autoencode(model, windows.cut(tokens_RNT).flatten(0, 1), positions)
    return windows.join(decoded.unflatten(0, (networks, -1)))


def _autoencode(model: SANE, windows_BWT: Tensor, positions_BW3: Tensor) -> Tensor:
    batches = zip(windows_BWT.split(_WINDOWS_AT_ONCE), positions_BW3.split(_WINDOWS_AT_ONCE), strict=True)
    return torch.cat([model.decode(model.encode(tokens, places), places).float() for tokens, places in batches])


def check_trained_on(model: SANE, architecture: Architecture) -> None:
    """Raises ``InputError`` unless the model's preprocessing knows an architecture as a store has it."""
    known = model.preprocessing.get("architectures", {}).get(architecture.name)
    if (
        known is None
        or LayerTable.from_dict(known["table"]) != architecture.table
        or Normalization.from_dict(known["normalization"]) != architecture.normalization
    ):
        raise InputError(
            f"the model was not trained on the architecture {architecture.name!r} as this token store has it: name "
            "the store that it was trained on"
        )


def _evaluate(model: SANE | Path, store: TokenStore | Path, checkpoints: Sequence[int]) -> tuple[dict[str, float], str]:
    """The metrics, and why there are no accuracies among them, if there are not."""
    model = model if isinstance(model, SANE) else SANE.from_pretrained(model)
    store = store if isinstance(store, TokenStore) else TokenStore.open(store)
    try:
        check_runnable(store, checkpoints)
    except InputError as error:
        sums = _sampled_variance(model, store, checkpoints)
        return _known({"eval/explained_variance": float(explained_variance(sums))}), (
            f"accuracy is not measured, only how well weights are reconstructed: {error}"
        )
    found = compare(model, store, checkpoints)
    accuracy, original = float(found.reconstructed.mean()), float(found.original.mean())
    return _known(
        {
            "eval/accuracy": accuracy,
            "eval/accuracy_original": original,
            "eval/accuracy_ratio": accuracy / original if original else float("nan"),
            "eval/agreement": float(found.agreement.mean()),
            "eval/explained_variance": float(explained_variance(found.variance)),
        }
    ), ""


def check_runnable(store: TokenStore, checkpoints: Iterable[int]) -> None:
    """Raises ``InputError`` unless the store's networks can be run and the images of their zoo are at hand."""
    for group in groups_of(store, checkpoints):
        group.network()
        group.images()


@torch.no_grad()
def _sampled_variance(model: SANE, store: TokenStore, checkpoints: Sequence[int]) -> Tensor:
    """``explained_variance_sums`` over some windows of each network, read from one of its row groups."""
    wanted, sums = set(checkpoints), torch.zeros(5, dtype=torch.float64)
    for group in (group for split in SPLITS for group in store.row_groups(split)):
        if wanted.isdisjoint(segment.checkpoint for segment in group.segments):
            continue
        for segment, values in store.read_row_group(group):
            if segment.checkpoint not in wanted:
                continue
            wanted.remove(segment.checkpoint)  # of a large network one segment will do
            architecture = store.architecture_of(segment.checkpoint)
            check_trained_on(model, architecture)
            index_SW = Windows(segment.tokens, model.config.window).indices_SL
            chosen = np.linspace(0, len(index_SW) - 1, min(_SAMPLED_WINDOWS, len(index_SW))).round().astype(int)
            index_SW = index_SW[chosen]
            tokens = as_float32(values[index_SW.numpy()], store.dtype)
            stop = segment.first + segment.tokens
            positions = torch.from_numpy(architecture.table.positions_of(segment.first, stop).copy())[index_SW]
            signal = torch.from_numpy(architecture.table.signal_of(segment.first, stop).copy())[index_SW]
            sums += explained_variance_sums(_autoencode(model, tokens, positions), tokens, signal)
    return sums


def _known(metrics: dict[str, float]) -> dict[str, float]:
    """Those that are numbers."""
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


class _Request(NamedTuple):
    step: int
    epoch: float
    time: float
    model: Path


class Evaluations:
    """Evaluations beside a training: one at a time, each a Ray task that takes no CPU from anybody's reservation.

    While one runs, the newest model submitted waits, and replaces one that was waiting: training is never waited for,
    and the last model is always evaluated. What fails is a warning.
    """

    def __init__(self, store: Path, *, networks: int, seed: int = 0) -> None:
        """Chooses the networks to evaluate on.

        Args:
            store: folder of the token store, which every node sees.
            networks: how many at most.
            seed: of the choice.
        """
        self._store = store
        self._checkpoints = held_out(TokenStore.open(store), networks, seed)
        self._running: tuple[Any, _Request] | None = None
        self._waiting: _Request | None = None
        self._points: list[Point] = []
        self._told: set[str] = set()

    def submit(self, step: int, epoch: float, model: Path) -> None:
        """Asks for an evaluation; returns at once.

        Args:
            step: global step of the model.
            epoch: its epoch.
            model: folder of the model, which every node sees. It is taken over, and deleted when it has been evaluated.
        """
        if self._waiting is not None:
            _LOG.warning("step %d is not evaluated: the evaluation before is still running", self._waiting.step)
            shutil.rmtree(self._waiting.model, ignore_errors=True)
        self._waiting = _Request(step, epoch, time.time(), model)
        self._advance(0.0)

    def collect(self) -> list[Point]:
        """What has been found since the last call; waits for nothing.

        Returns:
            In order of the steps: ``step``, ``epoch`` and ``time`` of the model, and metrics as from ``evaluate``.
        """
        self._advance(0.0)
        points, self._points = self._points, []
        return points

    def wait(self, timeout: float) -> None:
        """Waits for what was submitted and gives up what takes more than ``timeout`` seconds; see ``collect``."""
        deadline = time.monotonic() + timeout
        while self._running is not None and time.monotonic() < deadline:
            self._advance(max(0.0, deadline - time.monotonic()))
        self._give_up()

    def _advance(self, timeout: float) -> None:
        """Takes what the running task found, if it has ended within ``timeout`` seconds, and starts what waits."""
        import ray

        if self._running is not None:
            task, request = self._running
            if not ray.wait([task], timeout=timeout)[0]:
                return
            self._take(task, request)
            self._running = None
        if self._waiting is not None:
            request, self._waiting = self._waiting, None
            self._running = (_start(request.model, self._store, self._checkpoints), request)

    def _take(self, task: Any, request: _Request) -> None:
        import ray

        try:
            metrics, reason = ray.get(task)
        except Exception as error:  # a dead worker, a folder out of reach, a defect of ours: training goes on
            cause = getattr(error, "cause", None) or error
            _LOG.warning("the evaluation of step %d failed: %s: %s", request.step, type(cause).__name__, cause)
            return
        finally:
            shutil.rmtree(request.model, ignore_errors=True)
        if reason and reason not in self._told:
            self._told.add(reason)
            _LOG.warning("%s", reason)
        self._points.append({"step": request.step, "epoch": request.epoch, "time": request.time, **metrics})

    def _give_up(self) -> None:
        import ray

        if self._running is not None:
            task, request = self._running
            _LOG.warning("the evaluation of step %d is given up: the run has ended", request.step)
            ray.cancel(task, force=True)
            shutil.rmtree(request.model, ignore_errors=True)
        if self._waiting is not None:
            shutil.rmtree(self._waiting.model, ignore_errors=True)
        self._running = self._waiting = None


def _start(model: Path, store: Path, checkpoints: Sequence[int]) -> Any:
    return _remote(_evaluate_nicely).remote(model, store, checkpoints)


def _remote(function: Callable[..., Any]) -> Any:
    """A task outside the training's placement group, whose process, being nice, does nothing after it."""
    import ray

    return ray.remote(num_cpus=0, max_calls=1, max_retries=0, scheduling_strategy="DEFAULT")(function)


def _evaluate_nicely(model: Path, store: Path, checkpoints: Sequence[int]) -> tuple[dict[str, float], str]:
    os.nice(NICENESS)
    torch.set_num_threads(1)
    return _evaluate(model, store, checkpoints)
