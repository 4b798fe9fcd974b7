"""What a finished run looks like: losses, one network's weights before and after, accuracies before and after."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sane_ray import report
from sane_ray.autoencoder.model import SANE
from sane_ray.errors import InputError
from sane_ray.pretraining.evaluation import check_runnable, compare
from sane_ray.pretraining.history import read_history
from sane_ray.tokens.store import TokenStore

MOST_NETWORKS = 200
"""Networks at most whose accuracy is measured again."""

_LOG = logging.getLogger(__name__)


def draw(history: Path, store_path: Path, model_path: Path, plots: Path) -> None:
    """Writes ``losses``, ``reconstruction`` and, where the zoo's images are at hand, ``accuracies`` as PNG and SVG.

    Where networks were evaluated while training, ``evaluations`` too.

    Args:
        history: metrics of every step.
        store_path: token store that the model was trained on.
        model_path: folder of the trained model.
        plots: folder to write to; made if missing.
    """
    plots.mkdir(parents=True, exist_ok=True)
    points = read_history(history)
    report.plot_losses(points, plots / "losses.png")
    if any("eval/accuracy" in point for point in points):
        report.plot_evaluations(points, plots / "evaluations.png")
    store, model = TokenStore.open(store_path), SANE.from_pretrained(model_path)
    checkpoints = unseen_checkpoints(store)
    latest = max(checkpoints, key=lambda c: (store.models["epoch"][c].as_py() or 0, -c))
    original, reconstructed = _weights(store, model, latest)
    split, name = (store.models[column][latest].as_py() for column in ("split", "id"))
    report.plot_reconstruction(
        original, reconstructed, plots / "reconstruction.png", title=f"Network {name} ({split} split)"
    )
    accuracies = reconstructed_accuracies(store, model, checkpoints[:MOST_NETWORKS])
    if accuracies is not None:
        report.plot_accuracies(*accuracies, plots / "accuracies.png")


def unseen_checkpoints(store: TokenStore) -> list[int]:
    """Checkpoints of the test split; of the validation or training split where a store has no other."""
    splits = store.models["split"].to_pylist()
    split = next(name for name in ("test", "val", "train") if name in splits)
    return [checkpoint for checkpoint, name in enumerate(splits) if name == split]


def reconstructed_accuracies(
    store: TokenStore, model: SANE, checkpoints: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Test accuracy of networks of our own zoos, as stored and after encoding and decoding.

    Returns:
        Two arrays in [0, 1], one value a checkpoint; None where a zoo does not say how to run its networks, or its
        images are not at hand.
    """
    try:
        check_runnable(store, checkpoints)
    except InputError as error:
        _LOG.info("no picture of accuracies: %s", error)
        return None
    found = compare(model, store, checkpoints)
    return found.original, found.reconstructed


def _weights(
    store: TokenStore, model: SANE, checkpoint: int
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    weights = store.state_dict(checkpoint)
    with torch.no_grad():
        decoded = model.decode_model(model.encode_model(weights), reference=weights)
    keys = [layer.key for layer in store.architecture_of(checkpoint).table.layers]
    return {key: weights[key].numpy() for key in keys}, {key: decoded[key].numpy() for key in keys}
