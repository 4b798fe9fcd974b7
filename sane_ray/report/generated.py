"""Pictures and reports of sampled networks, and of what they become with training.

Reads rows as they are in the Parquet files; never samples, trains or judges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sane_ray.report.page import Code, Folded, Items, Picture, Section, Table, Text, write_report
from sane_ray.report.sampling import plot_behavior, plot_curves, plot_novelty

Row = Mapping[str, Any]

CAPTIONS = {
    "novelty": "Accuracy before any training against novelty: the distance to the nearest training network, where 1 is "
    "as far as two training runs are apart. Lines are sources at rising scales, with 95 % intervals; marks are "
    "networks. What is higher at the same novelty is better; at the left are copies.",
    "behavior": "Novelty in weights against how alike wrong answers are to those of one training network. Beyond the "
    "dashed line are networks that err more alike to one training network than 95 % of the training runs do.",
    "curves": "Accuracy on test images while the networks are trained, mean and 95 % interval over networks; at the "
    "right, after the last epoch.",
    "early": "Accuracy after one epoch of training against novelty before it, a mark a network.",
}
"""What to look for in each picture, by its file's name."""


def draw_samples(rows: Sequence[Row], candidates: Sequence[Row], index: Row, folder: Path) -> list[Path]:
    """Draws all pictures of samples; none where nothing was measured.

    Args:
        rows: of samples.parquet.
        candidates: of candidates.parquet.
        index: content of samples.json.
        folder: to write to.

    Returns:
        The files written.
    """
    if index["images"] is None:
        return []
    swept = [{**row, "method": row["source"], "accuracy": row["test_acc"]} for row in candidates]
    kept = [{**row, "accuracy": row["test_acc"], "scale": None} for row in rows if ":" in row["method"]]
    pictures = plot_novelty(swept + kept, folder / "novelty", 1 / index["images"]["classes"])
    if any(row["wrong_agreement"] is not None for row in rows):
        pictures += plot_behavior(rows, folder / "behavior", (index["reference"] or {}).get("agreement"))
    return pictures


def write_sampling_report(rows: Sequence[Row], index: Row, pictures: Sequence[Path], path: Path, made_by: str) -> Path:
    """Writes the report of samples: verdict, table, pictures, what was chosen, how it was made."""
    exploded = [f"{count} of {method}" for method, count in index["exploded"].items() if count]
    left_out = f"Left out, as their weights exploded: {', '.join(exploded)}." if exploded else "No network exploded."
    sections = [
        Section("Are they more than copies?", _verdict(index)),
        Section("Networks", [_sample_table(rows), Text(left_out)]),
        Section("Pictures", _pictures(pictures)),
        Section("How it was made", [*_made(index), Code(made_by)]),
    ]
    lead = f"Networks drawn near {index['anchors']['words']}, without any training."
    return write_report(path, "Sampled networks", sections, lead)


def _verdict(index: Row) -> list[Any]:
    return [Items([" ".join(sentences) for sentences in index["verdict"]])] if index["verdict"] else []


def _sample_table(rows: Sequence[Row]) -> Table:
    heads = {"val_acc": "validation", "test_acc": "test", "novelty": "novelty", "wrong_agreement": "wrong alike"}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [_mean_and_deviation([row[name] for row in mine if row.get(name) is not None]) for name in heads]
        lines.append([method, len(mine), *cells])
    caption = "mean ± deviation over networks: accuracy before any training, and how new they are"
    return Table(["method", "networks", *heads.values()], lines, caption)


def _mean_and_deviation(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else "–"


def _pictures(files: Sequence[Path]) -> list[Any]:
    return [Picture(file, CAPTIONS.get(file.stem, "")) for file in files if file.suffix == ".png"]


def _made(index: Row) -> list[Any]:
    recipe = ", ".join(f"{name.split('::')[-1]} {value}" for name, value in index["recipe"].items())
    settings = [f"{name}: {value}" for name, value in index["settings"]["settings"].items()]
    return [
        Text(
            f"Bandwidth {_number(index['bandwidth'])} in embeddings; noise {_number(index['noise'])} of layer spread; "
            f"distance of two training runs {_unit(index)}. {index['compute']['seconds']:,.0f} seconds."
        ),
        Folded("Anchors", [Items(index["anchors"]["ids"])]),
        Folded("Recipe", [Text(recipe)]),
        Folded("Settings", [Code("\n".join(settings))]),
    ]


def _number(value: float | None) -> str:
    return "unused" if value is None else f"{value:.3g}"


def _unit(index: Row) -> str:
    return "unknown" if index["reference"] is None else f"{index['reference']['distance']:.3g}"


def draw_finetuning(history: Sequence[Row], samples: Sequence[Row], folder: Path) -> list[Path]:
    """Draws all pictures of fine-tuning.

    Args:
        history: of results.parquet.
        samples: of samples.parquet.
        folder: to write to.

    Returns:
        The files written.
    """
    pictures = plot_curves([{**row, "accuracy": row["test_acc"]} for row in history], folder / "curves")
    novelty = {(row["method"], row["repetition"]): row["novelty"] for row in samples}
    early_epoch = min(1, max(row["epoch"] for row in history))
    early = [
        {**row, "novelty": novelty[row["method"], row["repetition"]], "accuracy": row["test_acc"]}
        for row in history
        if row["epoch"] == early_epoch
    ]
    return pictures + plot_novelty([row for row in early if row["novelty"] is not None], folder / "early")


def write_finetuning_report(results: Row, samples: Row, pictures: Sequence[Path], path: Path, made_by: str) -> Path:
    """Writes the report of fine-tuning: verdict, table, ensembles, pictures, what failed, how it was made."""
    failed = [f"{one['method']} {one['repetition']}: {one['reason']}" for one in results["failed"]]
    failed += [
        f"{one['method']} {one['repetition']}: its weights are no numbers any more" for one in results["diverged"]
    ]
    sections = [
        Section("Does sampling help?", [Items(results["verdict"])] if results["verdict"] else []),
        Section("Accuracy", [epoch_table(results["table"]), _ensemble_table(results["table"])]),
        Section("Pictures", _pictures(pictures)),
        Section("Are they more than copies?", _verdict(samples)),
        Section("Left out", [Items(failed)] if failed else []),
        Section("How it was made", [Text(f"{results['compute']['seconds']:,.0f} seconds."), Code(made_by)]),
    ]
    lead = f"Networks of {results['samples']}, trained on {results['images']['name']}."
    return write_report(path, "Fine-tuned samples", sections, lead)


def epoch_table(rows: Sequence[Row]) -> Table:
    """The table of the paper's form: a line a method, a column an epoch; mean and deviation in %."""
    epochs = sorted({row["epoch"] for row in rows})
    cells = {(row["method"], row["epoch"]): f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" for row in rows}
    counts = {row["method"]: row["networks"] for row in rows}
    lines = [[method, count, *(cells[method, epoch] for epoch in epochs)] for method, count in counts.items()]
    caption = "accuracy on test images in %, mean ± deviation over networks"
    return Table(["method", "networks", *(f"epoch {epoch}" for epoch in epochs)], lines, caption)


def _ensemble_table(rows: Sequence[Row]) -> Table:
    epochs = sorted({row["epoch"] for row in rows})
    cells = {(row["method"], row["epoch"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [cells[method, epoch] for epoch in epochs]
        lines.append(
            [method, *(f"{100 * r['ensemble_logits']:.1f} / {100 * r['ensemble_probabilities']:.1f}" for r in mine)]
        )
    caption = "all networks of a method together, in %: by the mean of logits / of probabilities"
    return Table(["method", *(f"epoch {epoch}" for epoch in epochs)], lines, caption)
