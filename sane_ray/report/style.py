"""The one style of all plots: colours, fresh figures, labelled axes, and saving as PNG and SVG. Never uses pyplot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, GRID = "#222222", "#6b6b6b", "#e4e4e4"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
"""Okabe-Ito colours, which colour-blind readers tell apart."""

CYCLE = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", INK, "#a08a00")
"""Colours of categories, in their order; the last is Okabe-Ito's yellow, darkened to be read on white."""

SEQUENTIAL, DIVERGING = "viridis", "PuOr"
"""Colour maps of numbers, and of numbers around a zero."""

SCATTER_LIMIT = 3000
"""More points than this in one panel are drawn as a density."""

DPI = 150


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure with panels that belongs to no display.

    Args:
        rows: rows of panels.
        columns: panels in a row.
        size: width and height, in inches.
        **options: passed to ``Figure.subplots``.

    Returns:
        The figure, and its panels as ``Figure.subplots`` gives them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path` with its ending replaced by ``.png`` and ``.svg``, in a folder made if missing; the two files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in files:
        figure.savefig(file, dpi=DPI)
    return files


def new_grid(
    count: int, columns: int, panel: tuple[float, float], margin: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels alike, line by line.

    Args:
        count: panels that are used; those that are left over in the last line are hidden.
        columns: panels in a line.
        panel: width and height of each, in inches.
        margin: what the figure is wider and higher than its panels.

    Returns:
        The figure, and all panels, the used ones first.
    """
    lines = max(1, -(-count // columns))
    size = (margin[0] + panel[0] * columns, margin[1] + panel[1] * lines)
    figure, panels = new_figure(lines, columns, size, squeeze=False)
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    return figure, list(panels.flat)


def label_axes(axes: Axes, title: str, *, ylabel: str, xlabel: str = "", legend_columns: int = 1) -> None:
    """Title, names of the axes, grid and, where something has a label, the legend."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    if xlabel:
        axes.set_xlabel(xlabel, color=INK)
    clean(axes)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, ncols=legend_columns, frameon=False, fontsize=8.5)


def headline(figure: Figure, title: str, note: str = "") -> None:
    """A bold title at the top left and, below it, a note in orange; room is made for both."""
    title = wrap(title, int(9.5 * figure.get_figwidth()))
    lines = wrap(note, int(13 * figure.get_figwidth()), sentences=True).split("\n") if note else []
    figure.suptitle(title + "\n" * len(lines), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    below = 1 - (0.08 + 0.2 * len(title.split("\n"))) / figure.get_figheight()
    figure.text(0.01, below, "\n".join(lines), va="top", fontsize=9, color=ORANGE, linespacing=1.2)


def clean(axes: Axes) -> None:
    """A light grid behind the data, and no box around it."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis, labelled in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def shorten(text: str, length: int = 28) -> str:
    """Text of at most `length` characters; what is cut out of its middle becomes one ``…``."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:] if tail else ''}"


def wrap(text: str, width: int, *, sentences: bool = False) -> str:
    """Text in lines of at most `width` characters: a title breaks after its first colon, if it must; all where it can.

    Args:
        text: To break.
        width: Characters of a line; a longer word is shortened.
        sentences: Whether it is prose, whose colons are nothing special.
    """
    head, colon, rest = text.partition(": ")
    if len(text) <= width:
        return text
    parts = [head + colon.strip(), rest] if colon and not sentences else [text]
    lines = [line for part in parts for line in textwrap.wrap(part, width, break_long_words=False)]
    return "\n".join(shorten(line, width) for line in lines)


def short_names(names: Sequence[str], length: int = 28) -> list[str]:
    """Names without the parts between dots that all of them begin and end with, each of at most `length` characters.

    A single name, and one that would be empty, stays as it is.
    """
    parts = [name.split(".") for name in names]
    least = min((len(of_name) for of_name in parts), default=1)
    first = _alike(parts, range(least - 1)) if len(parts) > 1 else 0
    last = _alike(parts, range(-1, first - least, -1)) if len(parts) > 1 else 0
    if first and any(of_name[first].isdigit() for of_name in parts):
        first -= 1  # a bare number says little
    return [shorten(".".join(of_name[first : len(of_name) - last]), length) for of_name in parts]


def _alike(parts: Sequence[Sequence[str]], places: Sequence[int]) -> int:
    """At how many of the places, one after the other, all names have the same part."""
    for count, place in enumerate(places):
        if len({of_name[place] for of_name in parts}) > 1:
            return count
    return len(places)
