"""Pictures and reports of sampled networks: accuracy against novelty, wrong answers, accuracy in training.

Reads rows as they are in the Parquet files; never samples, trains or judges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sane_ray.report.page import Code, Folded, Items, Picture, Section, Table, Text, write_report
from sane_ray.report.style import CYCLE, GREY, INK, headline, label_axes, log_scale, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

WITHOUT_SANE = ("scratch", "anchors", "noise", "shared_noise", "average", "interpolation")
"""Sources that do not pass through embeddings: drawn in greys and dashed."""

DRAWS = 1000

CAPTIONS = {
    "novelty": "Accuracy before any training against novelty: the distance to the nearest training network, where 1 is "
    "as far as two training runs are apart. Lines are sources at rising scales, with 95 % intervals of the mean; dots "
    "are the networks that were kept. What is higher at the same novelty is better; at the left are copies.",
    "behavior": "Novelty in weights against how alike wrong answers are to those of the likest training network. Above "
    "the dashed line are networks that err more alike to one training network than 95 % of the training runs do.",
    "curves": "Accuracy on test images while the networks are trained, mean and 95 % interval over networks.",
    "early": "Accuracy after one epoch of training against novelty, each dot a network.",
}
"""What to look for in each picture, by its file's name."""


def draw_novelty(rows: Sequence[Row], candidates: Sequence[Row], chance: float, path: Path) -> list[Path]:
    """Draws ``novelty``: see ``CAPTIONS``.

    Args:
        rows: kept networks: ``method``, ``novelty``, ``test_acc``.
        candidates: drawn networks: ``source``, ``scale``, ``novelty``, ``test_acc``.
        chance: accuracy of guessing.
        path: file to write; its ending is replaced by ``.png`` and ``.svg``.
    """
    figure, axes = new_figure(1, 1, (9, 5.6))
    colours = _colours([*(row["source"] for row in candidates), *(row["method"] for row in rows)])
    for source in dict.fromkeys(row["source"] for row in candidates):
        _curve(axes, source, [row for row in candidates if row["source"] == source], colours[source])
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method and row["novelty"] is not None]
        if mine and ":" in method:
            marker = "o" if method.endswith(":best") else "^"
            x, y = ([row[name] for row in mine] for name in ("novelty", "test_acc"))
            axes.plot(
                x, y, marker, color=colours[method], markersize=6, alpha=0.85, label=method, markeredgecolor="white"
            )
    axes.axhline(chance, color=GREY, linewidth=1, linestyle=":", label="chance")
    axes.set_ylim(0, 1.02)
    label_axes(axes, "", ylabel="accuracy on test images, untrained", xlabel="novelty")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    headline(figure, "What sampling is worth, at equal novelty")
    return save(figure, path)


def _curve(axes: Axes, source: str, rows: Sequence[Row], colour: str) -> None:
    """Mean accuracy over mean novelty, a point a scale, with the interval of the mean."""
    points = []
    for scale in sorted({row["scale"] for row in rows}):
        mine = [row for row in rows if row["scale"] == scale]
        accuracy = np.array([row["test_acc"] for row in mine], dtype=float)
        points.append((float(np.mean([row["novelty"] for row in mine])), float(accuracy.mean()), *interval(accuracy)))
    x, y, low, high = np.array(sorted(points)).T
    style = "--" if source in WITHOUT_SANE else "-"
    if len(x) > 1:
        axes.plot(x, y, style, color=colour, linewidth=1.8, label=source)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    else:
        axes.errorbar(x, y, yerr=[y - low, high - y], fmt="s", color=colour, markersize=5, label=source)


def draw_behavior(rows: Sequence[Row], usual: float | None, path: Path) -> list[Path]:
    """Draws ``behavior``: see ``CAPTIONS``.

    Args:
        rows: kept networks: ``method``, ``novelty``, ``wrong_agreement``.
        usual: agreement of wrong answers that 95 % of the training networks are below.
        path: file to write; its ending is replaced by ``.png`` and ``.svg``.
    """
    figure, axes = new_figure(1, 1, (9, 5))
    shown = [row for row in rows if row["novelty"] is not None and row["wrong_agreement"] is not None]
    colours = _colours([row["method"] for row in shown])
    for method in dict.fromkeys(row["method"] for row in shown):
        mine = [row for row in shown if row["method"] == method]
        x, y = ([row[name] for row in mine] for name in ("novelty", "wrong_agreement"))
        marker = "x" if method.split(":")[0] in WITHOUT_SANE else "o"
        axes.plot(x, y, marker, color=colours[method], markersize=7, label=method)
    if usual is not None:
        axes.axhline(usual, color=INK, linewidth=1, linestyle="--", label="95 % of training runs")
    label_axes(axes, "", ylabel="wrong answers alike (IoU)", xlabel="novelty in weights")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    headline(figure, "Do sampled networks err like a training network?")
    return save(figure, path)


def draw_curves(rows: Sequence[Row], path: Path) -> list[Path]:
    """Draws ``curves``: see ``CAPTIONS``.

    Args:
        rows: ``method``, ``repetition``, ``epoch``, ``test_acc``.
        path: file to write; its ending is replaced by ``.png`` and ``.svg``.
    """
    figure, (accuracy, error) = new_figure(1, 2, (13, 5.6))
    colours = _colours([row["method"] for row in rows])
    epochs = sorted({row["epoch"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        columns = [np.array([r["test_acc"] for r in rows if r["method"] == method and r["epoch"] == e]) for e in epochs]
        low, high = np.array([interval(column) for column in columns]).T
        mean = np.array([column.mean() for column in columns])
        marks: dict[str, Any] = {"color": colours[method], "label": method, "linewidth": 1.6, **_line(method)}
        accuracy.plot(epochs, mean, **marks)
        accuracy.fill_between(epochs, low, high, color=colours[method], alpha=0.08, linewidth=0)
        error.plot(epochs, np.maximum(1 - mean, _LEAST_ERROR), **marks)
    for axes in (accuracy, error):
        _epochs(axes, epochs[-1])
    label_axes(accuracy, "accuracy", ylabel="accuracy on test images", xlabel="epochs of training")
    log_scale(error)
    label_axes(error, "the same as error, to a logarithmic scale", ylabel="error on test images", xlabel="epochs")
    accuracy.get_legend().remove()
    error.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    headline(figure, "What sampled networks become with training")
    return save(figure, path)


_LEAST_ERROR = 1e-3


def _line(method: str) -> dict[str, Any]:
    """Dashes without SANE; a mark for each selection."""
    source, _, selection = method.partition(":")
    marks = {"": "", "best": "o", "bootstrap": "^"}
    return {"linestyle": "--" if source in WITHOUT_SANE else "-", "marker": marks[selection], "markersize": 3.5}


def _epochs(axes: Axes, last: int) -> None:
    """An axis of epochs with room for the first ones."""
    ticks = [epoch for epoch in (0, 1, 2, 5, 10, 25, 50, 100) if epoch <= last]
    if last > 2:
        axes.set_xscale("symlog", linthresh=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, max(last, 1))


def draw_early(rows: Sequence[Row], epoch: int, path: Path) -> list[Path]:
    """Draws ``early``: see ``CAPTIONS``.

    Args:
        rows: ``method``, ``novelty``, and ``test_acc`` after ``epoch``.
        epoch: of the accuracy.
        path: file to write; its ending is replaced by ``.png`` and ``.svg``.
    """
    figure, axes = new_figure(1, 1, (9, 5))
    shown = [row for row in rows if row["novelty"] is not None]
    colours = _colours([row["method"] for row in shown])
    for method in dict.fromkeys(row["method"] for row in shown):
        mine = [row for row in shown if row["method"] == method]
        marker = "x" if method.split(":")[0] in WITHOUT_SANE else "o"
        x, y = ([row[name] for row in mine] for name in ("novelty", "test_acc"))
        axes.plot(x, y, marker, color=colours[method], markersize=7, label=method)
    scratch = [row["test_acc"] for row in rows if row["method"] == "scratch"]
    if scratch:
        axes.axhline(float(np.mean(scratch)), color=GREY, linestyle=":", label="scratch")
    label_axes(axes, "", ylabel=f"accuracy after epoch {epoch}", xlabel="novelty before training")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    headline(figure, "Novelty and what an epoch of training makes of it")
    return save(figure, path)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of a bootstrap of the mean."""
    draws = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


_OF_SOURCE = {
    "scratch": GREY,
    "anchors": INK,
    "reconstruction": CYCLE[3],
    "sane_kde": CYCLE[0],
    "sane_kde_published": CYCLE[2],
    "sane_interpolation": CYCLE[5],
    "noise": CYCLE[1],
    "shared_noise": CYCLE[4],
    "interpolation": CYCLE[7],
    "average": "#8c564b",
}
"""The same colour for a source in every picture; others take what is left."""


def _colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each source; a method has that of its source."""
    sources = list(dict.fromkeys(name.split(":")[0] for name in names))
    others = [source for source in sources if source not in _OF_SOURCE]
    of_source = _OF_SOURCE | {source: _OTHERS[place % len(_OTHERS)] for place, source in enumerate(others)}
    return {name: of_source[name.split(":")[0]] for name in names}


_OTHERS = ("#7f7fff", "#bcbd22", "#17becf", "#e377c2")


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
    chance = 1 / index["images"]["classes"]
    pictures = draw_novelty(rows, candidates, chance, folder / "novelty")
    if any(row["wrong_agreement"] is not None for row in rows):
        pictures += draw_behavior(rows, index["usual_agreement"], folder / "behavior")
    return pictures


def write_sampling_report(rows: Sequence[Row], index: Row, pictures: Sequence[Path], path: Path, made_by: str) -> Path:
    """Writes the report of samples: verdict, table, pictures, what was chosen, how it was made."""
    exploded = [f"{count} of {method}" for method, count in index["exploded"].items() if count]
    left_out = f"Left out, as their weights exploded: {', '.join(exploded)}." if exploded else "No network exploded."
    sections = [
        Section("Are they more than copies?", [Items(index["verdict"])] if index["verdict"] else []),
        Section("Networks", [_sample_table(rows), Text(left_out)]),
        Section("Pictures", _pictures(pictures)),
        Section("How it was made", [*_made(index), Code(made_by)]),
    ]
    lead = f"Networks drawn near {index['anchors']['words']}, without any training."
    return write_report(path, "Sampled networks", sections, lead)


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
            f"Bandwidth {index['bandwidth']:.4g} in embeddings; noise {index['noise']:.3g} of a layer's spread; "
            f"distance of two training runs {index['unit']:.3g}. {index['compute']['seconds']:,.0f} seconds."
        ),
        Folded("Anchors", [Items(index["anchors"]["ids"])]),
        Folded("Recipe", [Text(recipe)]),
        Folded("Settings", [Code("\n".join(settings))]),
    ]


def draw_finetuning(history: Sequence[Row], samples: Sequence[Row], folder: Path) -> list[Path]:
    """Draws all pictures of fine-tuning.

    Args:
        history: of results.parquet.
        samples: of samples.parquet.
        folder: to write to.

    Returns:
        The files written.
    """
    pictures = draw_curves(history, folder / "curves")
    novelty = {(row["method"], row["repetition"]): row["novelty"] for row in samples}
    early = [
        {**row, "novelty": novelty[row["method"], row["repetition"]]}
        for row in history
        if row["epoch"] == min(1, max(row["epoch"] for row in history))
    ]
    return pictures + draw_early(early, early[0]["epoch"], folder / "early")


def write_finetuning_report(results: Row, samples: Row, pictures: Sequence[Path], path: Path, made_by: str) -> Path:
    """Writes the report of fine-tuning: verdict, table, ensembles, pictures, what failed, how it was made."""
    failed = [f"{one['method']} {one['repetition']}: {one['reason']}" for one in results["failed"]]
    sections = [
        Section("Does sampling help?", [Items(results["verdict"])] if results["verdict"] else []),
        Section("Accuracy", [epoch_table(results["table"]), _ensemble_table(results["table"])]),
        Section("Pictures", _pictures(pictures)),
        Section("Are they more than copies?", [Items(samples["verdict"])] if samples["verdict"] else []),
        Section("Not trained", [Items(failed)] if failed else []),
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


def markdown_table(rows: Sequence[Row]) -> str:
    """``epoch_table`` for a README."""
    table = epoch_table(rows)
    lines = [
        list(map(str, table.columns)),
        ["---"] * len(table.columns),
        *(list(map(str, line)) for line in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
