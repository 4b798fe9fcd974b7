"""How a network becomes tokens for a trained model: as in its training, or as near to that as can be, or not at all.

The model carries the layer tables and normalisations that it was trained with. An architecture that it has not seen is
normalised by the statistics of its layers' kinds, as the token store does for architectures without training models.
Stored tokens that were normalised otherwise are converted: their own normalisation undone, the model's done. What does
not fit is refused with the reason and the remedy. Never reads weights, never imports Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sane_ray.autoencoder.model import SANE
from sane_ray.embedding.encoder import check_fits_model
from sane_ray.errors import InputError
from sane_ray.tokens.kinds import BatchNorm, Parameters
from sane_ray.tokens.layers import LayerTable
from sane_ray.tokens.normalization import Normalization, fit
from sane_ray.tokens.store.layout import by_kind, of_kinds
from sane_ray.tokens.store.reading import SETTINGS, Architecture
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
        self._said = {name: model.preprocessing[name] for name in SETTINGS if name in model.preprocessing}
        tables = [table for table, _ in self._known.values()]
        guessed_batch_norm = "ignore" if any(_left_out(table, "batch_norm") for table in tables) else "keep"
        guessed_parameters = "weights" if any(_left_out(table, "parameters") for table in tables) else "all"
        self._batch_norm: BatchNorm = self._said.get("batch_norm", guessed_batch_norm)
        self._parameters: Parameters = self._said.get("parameters", guessed_parameters)

    @property
    def mode(self) -> str:
        """The mode of normalisation."""
        return self._normalization.mode

    def of_store(self, architecture: Architecture, settings: Mapping[str, str] | None = None) -> Prepared:
        """How the stored tokens of an architecture become the model's.

        Args:
            architecture: As the store has it.
            settings: Options that the store was prepared with, as ``settings_of`` gives them.

        Raises:
            InputError: They cannot; says which option to prepare them with.
        """
        table, normalization = architecture.table, architecture.normalization
        check_fits_model(table, self._config)
        if table.layout != self._layout:
            raise _otherwise("layout", table.layout, self._layout)
        if normalization.mode != self.mode == "l2":  # which divides by norms that the store does not have
            raise _otherwise("normalization", normalization.mode, self.mode)
        for known, trained_with in self._known.values():
            if known.fingerprint == table.fingerprint:
                stored = None if _same(normalization, trained_with) else normalization
                return Prepared(architecture.name, table, trained_with, trained_on=True, stored=stored)
        self._check_tokenised_alike(table, settings or {})
        return Prepared(architecture.name, table, self._of_kinds(table), trained_on=False, stored=normalization)

    def warnings_of(self, align: str, *, alone: bool = False) -> list[str]:
        """What does not keep networks from being embedded, but makes their embeddings others than in training.

        Alignment reorders the channels of a network and leaves its function as it is: its tokens are those of a valid
        network either way, and only their order is unlike that of training.

        Args:
            align: How the networks are aligned, as ``tokens.align`` says it.
            alone: Whether it is a single network, of which no store is made.
        """
        trained = self._said.get("align", align)
        if trained == align:
            return []
        remedy = "" if alone else f"; prepare them with --tokens.align {trained} and embed that store"
        return [
            f"the networks of the model's training were prepared with tokens.align {trained}, "
            f"{'this one' if alone else 'these'} with {align}: channels come in another order than the model has "
            f"learned, and embeddings and errors may be worse for it{remedy}"
        ]

    def _check_tokenised_alike(self, table: LayerTable, settings: Mapping[str, str]) -> None:
        """Raises ``InputError`` if the model's training would have taken other tensors of this architecture."""
        for option in ("batch_norm", "parameters"):
            theirs, ours = settings.get(option), self._said.get(option)
            if theirs and ours and theirs != ours and (_left_out(table, option) or _takes_more(table, option, ours)):
                raise _otherwise(option, theirs, ours)

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
        statistics = {name: normalization.as_statistics() for name, (_, normalization) in self._known.items()}
        return fit(of_kinds(by_kind(statistics, known), table), self._normalization.mode)


_REASONS = {"batch_norm": "batch norm is ignored", "parameters": "named "}
"""How a layer table begins to say that it has left a tensor out because of an option."""


def _left_out(table: LayerTable, option: str) -> bool:
    """Whether tensors were left out because of an option."""
    return any(entry.reason.startswith(_REASONS[option]) for entry in table.untokenized)


def _takes_more(table: LayerTable, option: str, ours: str) -> bool:
    """Whether some of its tensors would be left out with our value of an option."""
    shapes = {layer.key: layer.shape for layer in table.layers}
    shapes |= {layer.bias_key: layer.shape[:1] for layer in table.layers if layer.bias_key}
    meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        built = build_layer_table(meta, token_size=table.token_size, layout=table.layout, **{option: ours})  # type: ignore[arg-type]
    except InputError:  # none is left
        return True
    return _left_out(built, option)


def _otherwise(option: str, theirs: str, ours: str) -> InputError:
    return InputError(
        f"it was prepared with tokens.{option} {theirs}, the networks of the model's training with {ours}: "
        f"prepare it again with --tokens.{option} {ours}"
    )


def _same(found: Normalization, wanted: Normalization) -> bool:
    """Whether two normalisations do the same to each layer.

    In ``l2`` each network is divided by its own norms, so that the means over the training split do not matter.
    """
    return found == wanted or found.mode == wanted.mode == "l2"
