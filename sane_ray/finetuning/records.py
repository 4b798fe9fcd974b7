"""What has been measured, on disk: one small file a piece of work, found again by what decides the result.

The name of a file is the digest of the weights, the params, the images and the epochs: the same work is done once,
whoever asks for it again. Files appear whole or not at all. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sane_ray.finetuning.evaluation import METRICS, Histories, Piece
from sane_ray.zoo.images import ImageData


class Records:
    """A folder of histories.

    Args:
        folder: made when the first history is kept.
        images: what is trained on and measured with.
        epochs: epochs of training.
        answered: epochs at which answers are kept.
    """

    def __init__(self, folder: Path, images: ImageData, epochs: int, answered: Sequence[int]) -> None:
        self.folder = folder
        split = {name: hashlib.sha256(rows.tobytes()).hexdigest() for name, rows in images.rows.items()}
        self._common = [images.fingerprint, split, epochs, list(answered), METRICS]

    def key(self, piece: Piece) -> str:
        """What decides the result of a piece, 32 hex digits."""
        digest = hashlib.sha256(json.dumps([self._common, list(map(dict, piece.params))], sort_keys=True).encode())
        for name, values in sorted((piece.weights or {}).items()):
            digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:32]

    def load(self, key: str) -> Histories | None:
        """What was kept of a piece; None if nothing, or if its file was cut short or is not one of ours."""
        try:
            with np.load(self._path(key), allow_pickle=False) as arrays:
                return Histories(arrays["metrics"], arrays["logits"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def keep(self, key: str, histories: Histories) -> None:
        """Writes what a piece came to; the last of several that do so at once stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{key}.{uuid.uuid4().hex[:8]}"
        try:
            with aside.open("wb") as file:
                np.savez(file, metrics=histories.metrics_REM, logits=histories.logits_RTIC)
            aside.replace(self._path(key))
        finally:
            aside.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"
