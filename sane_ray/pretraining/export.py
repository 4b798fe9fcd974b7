"""Turns the model in training into a model folder that needs nothing but torch; never touches the training state."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sane_ray.autoencoder.model import SANE
from sane_ray.errors import InputError
from sane_ray.pretraining.ranks import is_first
from sane_ray.pretraining.state import whole_model

_LONGEST_PAUSE_S = 30.0

_LOG = logging.getLogger(__name__)


def export(
    model: SANE, folder: Path, preprocessing: Mapping[str, Any] | None = None, *, patience_s: float = 300.0
) -> None:
    """Gathers the whole model on rank 0, which writes it; every rank must call it.

    Args:
        model: plain or sharded.
        folder: of the model; one that is there is replaced.
        preprocessing: how weights became tokens, JSON-able.
        patience_s: how long rank 0 tries again when storage fails, in seconds.

    Raises:
        InputError: on rank 0: ``folder`` holds other files, or storage failed for ``patience_s`` seconds.
    """
    weights = whole_model(model)
    if not is_first():
        return None
    deadline, pause = time.monotonic() + patience_s, min(1.0, patience_s / 4)
    while True:
        try:
            return _write(model, weights, folder, preprocessing, model.provenance)
        except OSError as error:
            if time.monotonic() + pause >= deadline:
                raise InputError(
                    f"the model could not be written to {folder} for {patience_s:g} s ({error}): mend the storage and "
                    "start the same command again"
                ) from error
            _LOG.warning("the model could not be written to %s (%s): trying again in %.0f s", folder, error, pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class Export:
    """Exports to one folder beside training, such as the best model so far."""

    def __init__(self, folder: Path, preprocessing: Mapping[str, Any] | None = None) -> None:
        """Touches no storage; arguments as of ``export``."""
        self.folder = folder
        self.preprocessing = preprocessing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._writing: Future[bool] | None = None

    def begin(self, model: SANE) -> None:
        """Gathers the weights, on every rank, and writes them on rank 0 in the background, after the write before.

        If storage fails, a warning is logged and the folder keeps the model before.

        Raises:
            InputError: on rank 0, from the write before: the folder holds other files.
        """
        self.finish()
        weights = whole_model(model)
        if is_first():
            copies = apart_from(model, weights)
            self._writing = self._thread.submit(self._attempt, model, copies, dict(model.provenance))

    @property
    def is_finished(self) -> bool:
        """Whether nothing is being written any more."""
        return self._writing is None or self._writing.done()

    def finish(self) -> bool:
        """Waits for what is being written; storage that is away is only warned of.

        Returns:
            Whether this rank has written a model since the last call.
        """
        writing, self._writing = self._writing, None
        return writing is not None and writing.result()

    def close(self) -> bool:
        """As ``finish``; the last call."""
        try:
            return self.finish()
        finally:
            self._thread.shutdown()

    def _attempt(self, model: SANE, weights: dict[str, Tensor], provenance: dict[str, Any]) -> bool:
        try:
            _write(model, weights, self.folder, self.preprocessing, provenance)
        except OSError as error:
            _LOG.warning("the model could not be written to %s (%s): training goes on", self.folder, error)
            return False
        return True


def apart_from(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that training the model does not change: copies of those that lie in its own memory, the others as is.

    Plain weights on the CPU are the live ones; what was gathered, or came from a GPU, is a copy already.
    """
    locals_ = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in model.state_dict().values())
    live = {tensor.untyped_storage().data_ptr() for tensor in locals_}
    return {name: w.clone() if w.untyped_storage().data_ptr() in live else w for name, w in weights.items()}


def _write(
    model: SANE,
    weights: Mapping[str, Tensor],
    folder: Path,
    preprocessing: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> None:
    with torch.device("meta"):
        whole = SANE(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.save_pretrained(folder, preprocessing=preprocessing, provenance=provenance)
