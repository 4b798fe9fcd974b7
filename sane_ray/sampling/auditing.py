"""The audit of a run of sampling: what ``sane_ray.sampling.audit`` measures, for the networks that were drawn.

Each sampled network is compared with every training checkpoint of its kind, in aligned weights and in wrong answers,
and each source of SANE with noise, interpolation and averages at equal novelty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sane_ray.sampling.audit import (
    LEAST_MODELS,
    Points,
    Reference,
    aligned_distances,
    compare_accuracy,
    said_of,
    verdict,
    weight_distances,
    wrong_agreement,
)
from sane_ray.sampling.generation import Codec
from sane_ray.sampling.methods import Pool, is_of_sane
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.tokens.tokenizer import detokenize, tokenize

MATCHED = 3
"""Nearest training networks whose channels are matched to each sample's own."""

MOST_TRAINING = 500
"""Training networks that tell the usual distance of two runs; of more so many at random."""

BASELINES = ("noise", "shared_noise", "interpolation", "average")
"""Swept sources without SANE, which those of SANE are compared with at equal novelty."""


@dataclass(frozen=True)
class Training:
    """The training networks that samples may be copies of."""

    networks: Sequence[Mapping[str, Tensor]]
    """Aligned as the samples' anchors are."""
    ids: Sequence[str]
    runs: Sequence[str]
    """The trained network that each is a checkpoint of."""
    epochs: Sequence[int]
    predictions_MI: NDArray[np.int16] | None
    """Their answers to the test images; None where they do not answer them."""
    labels_I: NDArray[np.int64] | None
    """Classes of the test images."""


class Auditor:
    """Compares sampled networks with the training networks of their kind.

    Args:
        codec: of their architecture.
        training: what they may be copies of.
        symmetry: of the architecture; where it is trivial, channels are not matched.
    """

    def __init__(self, codec: Codec, training: Training, symmetry: Symmetry) -> None:
        self._codec, self._training, self._symmetry = codec, training, symmetry
        self._tokens_MNT = codec.tokens(training.networks)
        self._values_MV = codec.values(self._tokens_MNT).numpy()
        self.reference = self._reference()

    def rows(self, pool: Pool) -> Iterator[dict[str, Any]]:
        """What is known of each network of a pool."""
        if not len(pool):
            return
        distances_R, nearest_R = self._distances(pool.tokens_RNT)
        agreements_R = self._agreements(pool)
        for row, (distance, nearest) in enumerate(zip(distances_R.tolist(), nearest_R.tolist(), strict=True)):
            known: dict[str, Any] = {"distance": distance, "nearest": self._training.ids[nearest]}
            known["novelty"] = None if self.reference is None else distance / self.reference.median_distance
            if pool.measured is not None:
                measured = pool.measured
                known |= {name: float(getattr(measured, name)[row]) for name in ("val_acc", "val_loss", "test_acc")}
            known["wrong_agreement"] = None if agreements_R is None else float(agreements_R[row])
            yield known

    def verdict(self, rows: Sequence[Mapping[str, Any]], candidates: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Plain sentences, a list a method: first the sources of SANE, as drawn, then what selection keeps of them.

        Args:
            rows: kept networks of all methods.
            candidates: drawn networks of all sources at all scales.
        """
        if self.reference is None:
            return [["Nothing is said of novelty: the store holds networks of one training run alone."]]
        baselines = {
            name.replace("_", " "): points_of([row for row in candidates if row["source"] == name], swept=True)
            for name in BASELINES
            if any(row["source"] == name for row in candidates)
        }
        said = list(self._said_first(candidates, bool(baselines)))
        anchors = [row for row in candidates if row["source"] == "anchors"]
        of_anchors = points_of(anchors) if anchors else None
        for source in dict.fromkeys(row["source"] for row in candidates if is_of_sane(row["source"])):
            mine = [row for row in candidates if row["source"] == source and row["as_method"]]
            said.append(verdict(source, points_of(mine), self.reference, baselines, of_anchors))
        for method in dict.fromkeys(
            row["method"] for row in rows if ":" in row["method"] and is_of_sane(row["method"])
        ):
            said.append(self._selected(method, rows))
        return said

    def _said_first(self, candidates: Sequence[Mapping[str, Any]], with_baselines: bool) -> Iterator[list[str]]:
        """What all that follows rests on."""
        reconstructed = [row["novelty"] for row in candidates if row["source"] == "reconstruction"]
        if reconstructed:
            yield [
                f"Encoding and decoding alone brings anchors to novelty {np.median(reconstructed):.2f}: so much of the "
                "novelty of what is drawn from embeddings is error of the autoencoder."
            ]
        if not with_baselines:
            yield ["Nothing is said of noise, interpolation and averages: no such method was asked for."]
        if self._symmetry.is_trivial:
            yield ["Channels were not matched, as no symmetry of the architecture is known: copies may look new."]

    def _selected(self, method: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Of the kept networks of a method: against those that were selected in the same way, and the anchors."""
        assert self.reference is not None

        def points(name: str) -> Points:
            return points_of([row for row in rows if row["method"] == name])

        sentences = verdict(method, points(method), self.reference, {})
        selection = method.partition(":")[2]
        for rival in dict.fromkeys(row["method"] for row in rows):
            alike = rival == "anchors" or (rival.endswith(f":{selection}") and not is_of_sane(rival))
            if alike and len(points(method).known) >= LEAST_MODELS:
                novelty = float(np.nanmedian(points(rival).novelty_n))
                found = compare_accuracy(points(method), points(rival))
                sentences.append(said_of(found, f"{rival} (novelty {novelty:.2f})"))
        return sentences

    def _distances(
        self, tokens_RNT: Tensor, runs_R: Sequence[str] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distance to the nearest training network, and which; of another run where runs are given."""
        values_RV = self._codec.values(tokens_RNT).numpy()
        runs_M = None if runs_R is None else self._training.runs
        if self._symmetry.is_trivial:
            return weight_distances(values_RV, self._values_MV, runs_R, runs_M)
        return aligned_distances(
            values_RV,
            self._values_MV,
            _States(self._codec, tokens_RNT),
            _States(self._codec, self._tokens_MNT),
            self._symmetry,
            self._flat,
            nearest=MATCHED,
            runs_R=runs_R,
            runs_M=runs_M,
        )

    def _flat(self, state: Mapping[str, Tensor]) -> NDArray[Any]:
        values: NDArray[Any] = self._codec.values(tokenize(state, self._codec.table)[None])[0].numpy()
        return values

    def _agreements(self, pool: Pool) -> NDArray[np.float64] | None:
        training = self._training
        if training.predictions_MI is None or training.labels_I is None or pool.measured is None:
            return None
        return wrong_agreement(pool.measured.predictions_RI, training.predictions_MI, training.labels_I)[0]

    def _reference(self) -> Reference | None:
        """How near the last checkpoints of training runs are to any of another run; None where there is one run.

        Untrained networks do not count: those that answer one class to everything err alike.
        """
        training = self._training
        if len(set(training.runs)) < 2:
            return None
        last: dict[str, int] = {}
        for place in np.argsort(training.epochs, kind="stable").tolist():
            last[training.runs[place]] = place
        chosen = np.sort(np.random.default_rng(0).permutation(sorted(last.values()))[:MOST_TRAINING])
        runs = [training.runs[place] for place in chosen]
        distances, _ = self._distances(self._tokens_MNT[torch.from_numpy(chosen)], runs)
        agreements = np.full(len(chosen), np.nan)
        if training.predictions_MI is not None and training.labels_I is not None:
            predictions = training.predictions_MI
            agreements, _ = wrong_agreement(predictions[chosen], predictions, training.labels_I, runs, training.runs)
        return Reference(distances, agreements)


class _States(Sequence[Mapping[str, Tensor]]):
    """Normalised state dicts of networks given as normalised tokens."""

    def __init__(self, codec: Codec, tokens_RNT: Tensor) -> None:
        self._table, self._tokens_RNT = codec.table, tokens_RNT

    def __len__(self) -> int:
        return len(self._tokens_RNT)

    def __getitem__(self, index: Any) -> Any:
        return detokenize(self._tokens_RNT[index], self._table)


def points_of(rows: Sequence[Mapping[str, Any]], *, swept: bool = False) -> Points:
    """The rows of one method as the audit takes them."""

    def column(name: str) -> NDArray[np.float64]:
        return np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=np.float64)

    agreements = column("wrong_agreement")
    return Points(
        column("novelty"),
        column("test_acc"),
        None if np.isnan(agreements).all() else agreements,
        column("scale") if swept else None,
    )
