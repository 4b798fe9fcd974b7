"""Small text files beside weights (settings, results), as a stranger may have left them.

What is missing is nothing; what cannot be read costs a warning, and its model only what stood there. Values come out
as a table can hold them: numbers of 64 bits, text, booleans and None.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sane_ray.zoo.readers import Value
from sane_ray.zoo.tables import clean_text, plain_value

_LOG = logging.getLogger(__name__)
_DEEPEST = 32  # levels of settings that become parts of a name; what is deeper is text


def text_of(path: str | Path) -> str:
    """What a file holds; nothing where it does not exist, or, with a warning, where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:  # no file can have a name with a NUL in it
        _LOG.warning("%s: cannot be read (%s); its model is listed without it", path, error)
        return ""


def json_of(path: str | Path) -> Any:
    """What a JSON file says; None if it is missing or empty, or, with a warning, damaged."""
    text = text_of(path)
    return parsed(path, text) if text else None


def parsed(path: str | Path, text: str) -> Any:
    """What a text says that is to be JSON; None, with a warning, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _LOG.warning("%s: not JSON (%s); its model is listed without it", path, error)
        return None


def object_of(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds; an empty one, with a warning, if it holds something else."""
    content = json_of(path)
    if content is not None and not isinstance(content, dict):
        _LOG.warning("%s: holds a %s, not an object; its model is listed without it", path, type(content).__name__)
    return content if isinstance(content, dict) else {}


def flat(content: Mapping[Any, Any], labels: Collection[str] = ()) -> dict[str, Value]:
    """Nested settings under ``section::name`` keys, lists as JSON text.

    Args:
        content: As read from JSON.
        labels: Keys whose objects name a model's classes: only their number is kept, as ``num_labels``.
    """
    return _flat(content, frozenset(labels), "", 0)


def _flat(content: Mapping[Any, Any], labels: frozenset[str], prefix: str, depth: int) -> dict[str, Value]:
    settings: dict[str, Value] = {}
    for key, value in content.items():
        name = clean_text(f"{prefix}{key}")
        if key in labels and isinstance(value, dict):
            settings.setdefault(f"{prefix}num_labels", len(value))
        elif isinstance(value, dict) and depth < _DEEPEST:
            settings |= _flat(value, labels, f"{name}::", depth + 1)
        elif value is None or isinstance(value, bool | int | float | str):
            settings[name] = plain_value(value)
        else:
            settings[name] = _json_text(value)
    return settings


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except (ValueError, TypeError, RecursionError):  # nested as deep as a parser can just read it
        return "nested too deep"
