"""Model cards (``README.md`` with YAML front matter) to facts: licence, base models, metrics, tags.

A card is a stranger's text: YAML is read with ``safe_load``, what has an unexpected shape is left out, and a card that
cannot be read costs a warning, never the model.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sane_ray.zoo.readers import Value
from sane_ray.zoo.tables import plain_value

_LOG = logging.getLogger(__name__)

_TEXTS = ("tags", "datasets", "language", "pipeline_tag", "library_name")
_MEASURED = re.compile(r"(^|_)(acc|accuracy|loss|f1|auc)(_|$)")
_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class ModelCard:
    """What a model card says of its model."""

    license: str | None = None
    base_models: tuple[str, ...] = ()
    properties: dict[str, Value] = field(default_factory=dict)
    """``tags``, ``datasets``, ``language`` (several are joined with ``, ``), ``pipeline_tag`` and ``library_name``."""
    metrics: dict[str, Value] = field(default_factory=dict)
    """``<dataset>.<metric>`` of the ``model-index``, as in ``imagenet_1k.accuracy``."""
    config: dict[str, Value] = field(default_factory=dict)
    """Rows of the tables of a Model-J card, as ``card::learning_rate``."""
    split: str | None = None
    """``train``, ``val`` or ``test`` where a Model-J card names it."""


def read_card(path: Path) -> ModelCard:
    """Reads a model card; an empty one if there is no such file, no front matter, or none that is YAML."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return ModelCard()
    except OSError as error:
        _LOG.warning("%s: cannot be read (%s); the model is read without its card", path, error.strerror)
        return ModelCard()
    match = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return ModelCard()
    try:
        facts = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        _LOG.warning("%s: its front matter is no YAML (%s); the model is read without its card", path, reason)
        return ModelCard()
    if not isinstance(facts, dict):
        return ModelCard()
    return _card(facts, text[match.end() :])


def slug(text: str) -> str:
    """``ImageNet-1k (val)`` as ``imagenet_1k_val``: letters of any script, digits and underscores."""
    return re.sub(r"\W+", "_", text.lower()).strip("_")


def number(text: str) -> Value:
    """A number where the text is one, percent signs aside; otherwise the text."""
    digits = text.strip().removesuffix("%")
    for kind in (int, float):
        try:
            return plain_value(kind(digits))
        except ValueError:
            pass
    return plain_value(text)


def _card(facts: dict[Any, Any], body: str) -> ModelCard:
    texts = {key: _texts(facts.get(key)) for key in _TEXTS}
    rows = _rows(body) if "model-j" in texts["tags"] else {}
    base_models = _texts(facts.get("base_model")) or _texts(rows.get("base_model"))
    measured = {key: value for key, value in rows.items() if _MEASURED.search(key)}
    settings = {key: value for key, value in rows.items() if key not in (*measured, "split", "base_model")}
    return ModelCard(
        license=_license(facts),
        base_models=tuple(base_models),
        properties={key: ", ".join(value) for key, value in texts.items() if value},
        metrics=_metrics(facts.get("model-index")) | measured,
        config={f"card::{key}": value for key, value in settings.items()},
        split=_SPLITS.get(str(rows.get("split")).lower()),
    )


def _license(facts: dict[Any, Any]) -> str | None:
    names = _texts(facts.get("license"))
    if names == ["other"]:  # then the card names it elsewhere
        names = _texts(facts.get("license_name")) or names
    return ", ".join(names) or None


def _texts(value: Any) -> list[str]:
    """A text, or a list of them. YAML reads the language ``no`` (Norwegian) as false."""
    values = value if isinstance(value, list) else [value]
    return ["no" if text is False else str(text).strip() for text in values if isinstance(text, str) or text is False]


def _metrics(index: Any) -> dict[str, Value]:
    found = []
    for result in _dicts(index, "results"):
        dataset = _dict(result.get("dataset"))
        about = [slug(str(dataset[key])) for key in ("name", "type", "config", "split") if dataset.get(key)]
        for metric in _dicts([result], "metrics"):
            value = metric.get("value")
            names = [slug(str(metric[key])) for key in ("type", "name") if metric.get(key)]
            if names and isinstance(value, int | float | str) and not isinstance(value, bool):
                found.append((about, names, number(value) if isinstance(value, str) else plain_value(value)))
    how_many = Counter((*about[:1], names[0]) for about, names, _ in found)
    metrics: dict[str, Value] = {}
    for about, names, value in found:
        if how_many[(*about[:1], names[0])] > 1:  # several configs, splits or variants: say which one this is
            about, names = list(dict.fromkeys(about)), ["_".join(dict.fromkeys(names))]
        else:
            about = about[:1]
        name = ".".join(part for part in ("_".join(about), names[0]) if part)
        while name in metrics:
            name += "_again"
        metrics[name] = value
    return metrics


def _dicts(parents: Any, key: str) -> Iterator[dict[Any, Any]]:
    """The dicts in the lists that the parents hold under the key, whatever else is there."""
    for parent in parents if isinstance(parents, list) else [parents]:
        children = _dict(parent).get(key)
        yield from (child for child in children if isinstance(child, dict)) if isinstance(children, list) else ()


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _rows(body: str) -> dict[str, Any]:
    """Rows ``| **Learning Rate** | 0.001 |`` of the tables with two columns; their heads and rules are none."""
    rows: dict[str, Any] = {}
    lines = [line.strip() for line in body.splitlines()]
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip().strip("*`").strip() for cell in line.strip("|").split("|")]
        is_row = line.startswith("|") and len(cells) == 2 and not _RULE.fullmatch(line) and not _RULE.fullmatch(below)
        if is_row and slug(cells[0]):
            rows[slug(cells[0])] = number(cells[1])
    return rows


_RULE = re.compile(r"\|?[\s:|-]*-[\s:|-]*\|?")
