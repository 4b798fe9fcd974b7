"""What fine-tuning came to: rows by network and epoch, the table of methods, ensembles, and sentences about it.

Reads histories, never trains. Deviations are those of the networks of a method (ddof 0, as published); intervals are
95 % by Student's t.

Shape suffixes: R networks of a method, E epochs, I test images, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sane_ray.finetuning.evaluation import METRICS, Histories, ensemble_accuracy
from sane_ray.finetuning.statistics import FEWEST, difference, interval_of_mean
from sane_ray.sampling.methods import is_of_sane

_TEST = METRICS.index("test_acc")


@dataclass(frozen=True)
class Method:
    """The networks of one method."""

    name: str
    repetitions: list[int]
    metrics_REM: NDArray[np.float64]
    logits_RTIC: NDArray[np.float16]

    @property
    def test_RE(self) -> NDArray[np.float64]:
        """Accuracy on test images, by epoch."""
        return self.metrics_REM[:, :, _TEST]


def methods_of(rows: Sequence[Mapping[str, Any]], histories: Mapping[tuple[str, int], Histories]) -> list[Method]:
    """Histories by method, each of one network; those that are missing are left out.

    Args:
        rows: of samples.parquet: ``method`` and ``repetition``.
        histories: by method and repetition.
    """
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        repetitions = [
            row["repetition"] for row in rows if row["method"] == name and (name, row["repetition"]) in histories
        ]
        if repetitions:
            mine = [histories[name, repetition] for repetition in repetitions]
            metrics = np.concatenate([one.metrics_REM for one in mine])
            found.append(Method(name, repetitions, metrics, np.concatenate([one.logits_RTIC for one in mine])))
    return found


def diverged(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Networks of which a loss is no finite number, and the first epoch with one."""
    found = []
    for method in methods:
        for repetition, metrics_EM in zip(method.repetitions, method.metrics_REM, strict=True):
            broken = np.flatnonzero(~np.isfinite(metrics_EM).all(1))
            if len(broken):
                found.append({"method": method.name, "repetition": repetition, "epoch": int(broken[0])})
    return found


def rows_of(methods: Sequence[Method]) -> Iterator[dict[str, Any]]:
    """One row a network and epoch."""
    for method in methods:
        for place, repetition in enumerate(method.repetitions):
            for epoch, values in enumerate(method.metrics_REM[place]):
                named = dict(zip(METRICS, values.tolist(), strict=True))
                yield {"method": method.name, "repetition": repetition, "epoch": epoch, **named}


def table_of(methods: Sequence[Method], epochs: Sequence[int], labels_I: NDArray[np.int64]) -> list[dict[str, Any]]:
    """One row a method and epoch: mean, deviation and interval of test accuracy, and that of ensembles.

    Args:
        methods: with answers kept at the epochs.
        epochs: of the table, those that answers were kept at.
        labels_I: classes of the test images.
    """
    table = []
    for method in methods:
        for place, epoch in enumerate(epochs):
            accuracy_R = method.test_RE[:, epoch]
            low, high = interval_of_mean(accuracy_R)
            logits, probabilities = ensemble_accuracy(method.logits_RTIC[:, place], labels_I)
            table.append(
                {
                    "method": method.name,
                    "epoch": epoch,
                    "networks": len(accuracy_R),
                    "mean": float(accuracy_R.mean()),
                    "std": float(accuracy_R.std()),
                    "low": None if np.isnan(low) else max(low, 0.0),
                    "high": None if np.isnan(high) else min(high, 1.0),
                    "ensemble_logits": logits,
                    "ensemble_probabilities": probabilities,
                }
            )
    return table


def verdict(methods: Sequence[Method], epochs: Sequence[int]) -> list[str]:
    """Sentences: each method of SANE against training from scratch, and the best of them against the best without.

    Which are best is said by validation images, early in training. Each interval is of one comparison: of twenty that
    are told, one will be wrong.
    """
    by_name = {method.name: method for method in methods}
    ours = [method for method in methods if is_of_sane(method.name)]
    others = [method for method in methods if method not in ours and method.name not in ("scratch", "anchors")]
    said = [_against(method, by_name["scratch"], epochs) for method in ours if "scratch" in by_name]
    if ours and others:
        said.append(_against(max(ours, key=_early), max(others, key=_early), epochs))
    if ours and "anchors" in by_name:
        said.append(_against(max(ours, key=_early), by_name["anchors"], epochs))
    return said


def _early(method: Method) -> float:
    return float(method.metrics_REM[:, :2, METRICS.index("val_acc")].mean())


def _against(one: Method, other: Method, epochs: Sequence[int]) -> str:
    if min(len(one.repetitions), len(other.repetitions)) < FEWEST:
        fewest = min((one, other), key=lambda method: len(method.repetitions))
        return (
            f"{one.name} against {other.name}: too few networks to tell them apart ({len(fewest.repetitions)} of "
            f"{fewest.name}; sample with --sampling.repetitions {FEWEST} or more)"
        )
    parts = []
    for epoch in epochs:
        gap, low, high = difference(one.test_RE[:, epoch], other.test_RE[:, epoch])
        word = "ahead" if low > 0 else "behind" if high < 0 else "not told apart"
        parts.append(f"epoch {epoch} {word} ({100 * gap:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}])")
    return f"{one.name} against {other.name}: {'; '.join(parts)}"
