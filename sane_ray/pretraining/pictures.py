"""What a finished run looks like: losses, one network's weights before and after, accuracies before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sane_ray import report
from sane_ray.autoencoder.model import SANE
from sane_ray.errors import InputError
from sane_ray.pretraining.history import read_history
from sane_ray.tokens.store import TokenStore
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.images import ImageData, load_images

MOST_NETWORKS = 200
"""Networks at most whose accuracy is measured again."""


def draw(history: Path, store_path: Path, model_path: Path, plots: Path) -> None:
    """Writes ``losses``, ``reconstruction`` and, where the zoo's images are at hand, ``accuracies`` as PNG and SVG.

    Args:
        history: metrics of every step.
        store_path: token store that the model was trained on.
        model_path: folder of the trained model.
        plots: folder to write to; made if missing.
    """
    plots.mkdir(parents=True, exist_ok=True)
    report.plot_losses(read_history(history), plots / "losses.png")
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
    params = [_params(store, checkpoint) for checkpoint in checkpoints]
    images = _images(params)
    if images is None:
        return None
    before, after = [], []
    for checkpoint, settings in zip(checkpoints, params, strict=True):
        network = from_params(settings).eval()
        weights = store.state_dict(checkpoint)
        decoded = model.decode_model(model.encode_model(weights), reference=weights)
        before.append(_accuracy(network, weights, images))
        after.append(_accuracy(network, decoded, images))
    return np.array(before), np.array(after)


def _weights(store: TokenStore, model: SANE, checkpoint: int) -> tuple[dict[str, Any], dict[str, Any]]:
    weights = store.state_dict(checkpoint)
    decoded = model.decode_model(model.encode_model(weights))
    keys = [layer.key for layer in store.architecture_of(checkpoint).table.layers]
    return {key: weights[key].numpy() for key in keys}, {key: decoded[key].numpy() for key in keys}


def _params(store: TokenStore, checkpoint: int) -> dict[str, Any]:
    """What the zoo's params.json said of the checkpoint's model."""
    columns = [name for name in store.models.column_names if name.startswith("config.")]
    return {name.removeprefix("config."): store.models[name][checkpoint].as_py() for name in columns}


def _images(params: list[dict[str, Any]]) -> ImageData | None:
    """The images that all these networks were trained on, if they are the very same."""
    keys = [f"dataset::{key}" for key in ("name", "seed", "fingerprint")]
    trained_on = {tuple(settings.get(key) for key in keys) for settings in params}
    name, seed, fingerprint = trained_on.pop()
    if trained_on or name is None or seed is None:
        return None
    try:
        images = load_images(name, seed=seed)
    except InputError:  # a file of its own, or a package that is not installed
        return None
    return images if images.fingerprint == fingerprint else None


@torch.no_grad()
def _accuracy(network: torch.nn.Module, weights: dict[str, torch.Tensor], images: ImageData) -> float:
    network.load_state_dict(weights)
    pixels, labels = (torch.from_numpy(part) for part in images.split("test"))
    return float((network(pixels).argmax(dim=1) == labels).double().mean())
