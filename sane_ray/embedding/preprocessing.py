"""How a network becomes tokens for a trained model: as in its training, or as near to that as can be, or not at all.

The model carries the layer tables and normalisations that it was trained with. An architecture that it has not seen is
normalised by the statistics of its layers' kinds, as the token store does for architectures without training models.
What does not fit is refused with the reason and the remedy. Never reads weights, never imports Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sane_ray.autoencoder.model import SANE
from sane_ray.embedding.encoder import check_fits_model
from sane_ray.errors import InputError
from sane_ray.tokens.kinds import BatchNorm, Parameters
from sane_ray.tokens.layers import LayerTable
from sane_ray.tokens.normalization import LayerStatistics, Normalization, fit
from sane_ray.tokens.store.layout import by_kind, of_kinds
from sane_ray.tokens.store.reading import Architecture
from sane_ray.tokens.tokenizer import build_layer_table, check_fits


@dataclass(frozen=True)
class Prepared:
    """How the networks of one architecture become tokens for the model."""

    name: str
    table: LayerTable
    normalization: Normalization
    trained_on: bool
    """Whether the model has seen the architecture in its training."""
    stored: Normalization | None = None
    """How a store has normalised them, where that is otherwise and must be undone first."""


class Preprocessing:
    """What a trained model says of how weights become tokens.

    Raises:
        InputError: It says nothing.
    """

    def __init__(self, model: SANE) -> None:
        if not model.preprocessing.get("architectures"):
            raise InputError(
                "the model does not say how weights became tokens in its training (`preprocessing` of its config.json "
                "is empty): save it again with save_pretrained(folder, preprocessing)"
            )
        self._config = model.config
        self._known = {
            name: (LayerTable.from_dict(entry["table"]), Normalization.from_dict(entry["normalization"]))
            for name, entry in model.preprocessing["architectures"].items()
        }
        first, self._normalization = next(iter(self._known.values()))
        self._layout = first.layout
        reasons = {entry.reason for table, _ in self._known.values() for entry in table.untokenized}
        self._batch_norm: BatchNorm = "ignore" if "batch norm is ignored" in reasons else "keep"
        self._parameters: Parameters = "weights" if any(reason.startswith("named ") for reason in reasons) else "all"

    @property
    def mode(self) -> str:
        """The mode of normalisation."""
        return self._normalization.mode

    def of_store(self, architecture: Architecture, source: str = "ZOO") -> Prepared:
        """How the stored tokens of an architecture become the model's.

        Args:
            architecture: As the store has it.
            source: Where its checkpoints lie, for the message.

        Raises:
            InputError: They cannot, or were normalised otherwise than in training; says what to do.
        """
        table, normalization = architecture.table, architecture.normalization
        check_fits_model(table, self._config)
        for option, theirs, ours in (
            ("layout", table.layout, self._layout),
            ("normalization", normalization.mode, self.mode),
        ):
            if theirs != ours:
                raise InputError(
                    f"it was prepared with tokens.{option} {theirs}, the networks of the model's training with {ours}: "
                    f"prepare it again with --tokens.{option} {ours}"
                )
        for known, trained_with in self._known.values():
            if known.fingerprint == table.fingerprint:
                _check_same(normalization, trained_with, table, source)
                return Prepared(architecture.name, table, trained_with, trained_on=True)
        return Prepared(architecture.name, table, self._of_kinds(table), trained_on=False, stored=normalization)

    def of_weights(self, meta: Mapping[str, Tensor]) -> Prepared:
        """How the weights of a checkpoint become the model's tokens.

        Args:
            meta: Its state dict; meta tensors will do, and any order of keys where the architecture is known.

        Raises:
            InputError: They cannot; says what to do.
        """
        for name, (table, normalization) in self._known.items():
            try:
                check_fits(meta, table)
            except InputError:
                continue
            return Prepared(name, table, normalization, trained_on=True)
        table = build_layer_table(
            meta,
            token_size=self._config.token_size,
            layout=self._layout,
            batch_norm=self._batch_norm,
            parameters=self._parameters,
        )
        check_fits_model(table, self._config)
        return Prepared(f"network-{table.fingerprint[:8]}", table, self._of_kinds(table), trained_on=False)

    def _of_kinds(self, table: LayerTable) -> Normalization:
        """By the mean statistics of layers of the same kind in training, or of all layers for a kind it had not."""
        known = {name: table for name, (table, _) in self._known.items()}
        statistics = {name: _statistics(normalization) for name, (_, normalization) in self._known.items()}
        return fit(of_kinds(by_kind(statistics, known), table), self._normalization.mode)


def _statistics(normalization: Normalization) -> LayerStatistics:
    """Statistics that give a normalisation, whatever its mode."""
    shift, scale = normalization.shift, normalization.scale
    return LayerStatistics(1, shift, scale**2, scale, shift - scale, shift + scale)


def _check_same(found: Normalization, wanted: Normalization, table: LayerTable, source: str) -> None:
    """Raises ``InputError`` unless two normalisations of a mode do the same to each layer.

    In ``l2`` each network is divided by its own norms, so that the means over the training split do not matter.
    """
    if found.mode == "l2":
        return
    differs = (found.shift != wanted.shift) | (found.scale != wanted.scale)
    if differs.any():
        layer = int(np.argmax(differs))
        raise InputError(
            f"{table.layers[layer].key} was normalised with shift {found.shift[layer]:.6g} and scale "
            f"{found.scale[layer]:.6g}, in the model's training with {wanted.shift[layer]:.6g} and "
            f"{wanted.scale[layer]:.6g}: embed the checkpoints themselves, which are then normalised as in training "
            f"(--source {source} in place of --store), or the store that the model was trained on"
        )
