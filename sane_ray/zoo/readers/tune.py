"""The published Ray Tune zoos (modelzoos.cc, SANE, ViT zoo, WeightCLIP), and what ``jobs/build_zoo.py`` writes.

``<zoo>/…/<model>/{params.json | config.json, result.json, checkpoint_{E} | checkpoint_{E:06d}/checkpoints}``, where
``result.json`` holds one JSON object a line (or one list) and belongs to the checkpoint whose epoch equals its
``training_iteration``. Never guesses: a checkpoint without its line has no properties.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sane_ray.errors import InputError
from sane_ray.zoo import checkpoint
from sane_ray.zoo.checkpoint import Checkpoint
from sane_ray.zoo.readers import Record, Value

NAME = "tune"
LOOKS_FOR = "model folders with checkpoint_<epoch>/checkpoints in them (published Ray Tune layout)"

_LOG = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")
_WEIGHTS = "checkpoints"

_BOOKKEEPING = frozenset(
    (
        "autoscaler",
        "checkpoint_dir_name",
        "config",
        "date",
        "done",
        "episodes_total",
        "experiment_id",
        "experiment_tag",
        "hist_stats",
        "hostname",
        "iterations_since_restore",
        "node_ip",
        "pid",
        "should_checkpoint",
        "time_since_restore",
        "time_this_iter_s",
        "time_total_s",
        "timestamp",
        "timesteps_since_restore",
        "timesteps_total",
        "trial_id",
        "trial_log_path",
        "warmup_time",
    )
)
"""Keys of a result line that Ray Tune writes about itself and its machine: no property of a network."""


def discover(root: Path) -> list[Record]:
    """Lists the checkpoints under ``root``, models in order of name and then epoch.

    A checkpoint folder without weights is listed too, so that whoever reads it counts it as missing.

    Raises:
        InputError: two folders of one model claim the same epoch, or a params.json or result.json is no JSON.
    """
    found = sorted(_model_folders(root), key=lambda pair: pair[0])
    if not any((folder / name / _WEIGHTS).is_file() for folder, epochs in found for name in epochs.values()):
        return []
    license_name = _license(root)
    return [record for folder, epochs in found for record in _records(root, folder, epochs, license_name)]


def open_checkpoint(record: Record) -> Checkpoint:
    """Opens the weights of one of the records.

    Raises:
        InputError: The file cannot be read without running code.
    """
    return checkpoint.open_checkpoint(record.path)


def _text(value: Value) -> str | None:
    return None if value is None else str(value)


def _model_folders(root: Path) -> Iterator[tuple[Path, dict[int, str]]]:
    """Every folder that has checkpoint folders, with their names by epoch. Links are followed, each folder once."""
    seen = {os.path.realpath(root)}
    for folder, names, _ in os.walk(root, followlinks=True):
        epochs: dict[int, str] = {}
        deeper = []
        for name in sorted(names):
            match = _CHECKPOINT.fullmatch(name)
            if match is None:
                real = os.path.realpath(Path(folder, name))
                if not name.startswith(".") and real not in seen:
                    seen.add(real)
                    deeper.append(name)
            elif int(match[1]) in epochs:
                raise InputError(
                    f"{folder}: {epochs[int(match[1])]} and {name} both claim epoch {int(match[1])}; remove one of them"
                )
            else:
                epochs[int(match[1])] = name
        names[:] = deeper
        if epochs:
            yield Path(folder), dict(sorted(epochs.items()))


def _records(root: Path, folder: Path, epochs: dict[int, str], license_name: str | None) -> Iterator[Record]:
    model = root.name if folder == root else folder.relative_to(root).as_posix()
    results = _results(folder / "result.json")
    config = _config(folder) if folder != root else _config(folder, names=("params.json",))
    for epoch, name in epochs.items():
        yield Record(
            id=f"{model}/{epoch}",
            model=model,
            epoch=epoch,
            path=str((folder / name / _WEIGHTS).absolute()),
            properties=results.get(epoch, {}),
            config=config,
            reader=NAME,
            license=_text(config.get("license")) or license_name,
        )


def _results(path: Path) -> dict[int, dict[str, Value]]:
    """Properties by epoch. Zoos differ in whether the untrained network has a line: match by number."""
    results: dict[int, dict[str, Value]] = {}
    for row in _rows(path):
        epoch = row.get("training_iteration", row.get("epoch"))
        if isinstance(epoch, int):
            results[epoch] = _properties(row)
    return results


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("["):
        rows = _json(path, text)
    else:
        rows, damaged = [], 0
        for line in text.splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                damaged += bool(line.strip())
        if damaged:
            _LOG.warning("%s: %d damaged lines; their checkpoints have no properties", path, damaged)
    return [row for row in rows if isinstance(row, dict)]


def _properties(row: dict[str, Any]) -> dict[str, Value]:
    values = {key: _value(value) for key, value in row.items() if key not in _BOOKKEEPING}
    train, test = row.get("train_acc"), row.get("test_acc")
    if isinstance(train, int | float) and isinstance(test, int | float):
        values["ggap"] = train - test
    return values


def _config(folder: Path, names: tuple[str, ...] = ("params.json", "config.json")) -> dict[str, Value]:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return {}
    content = _json(path, path.read_text(encoding="utf-8", errors="replace"))
    return _flat(content) if isinstance(content, dict) else {}


def _license(root: Path) -> str | None:
    """The licence that the zoo's own config.json names for all its models, if it does."""
    path = root / "config.json"
    content = _json(path, path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    value = content.get("license") if isinstance(content, dict) else None
    return value if isinstance(value, str) else None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); repair it, or remove it to read the zoo without it") from error


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Value]:
    """Nested settings under the published ``section::name`` keys."""
    flat: dict[str, Value] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}::")
        else:
            flat[prefix + key] = _value(value)
    return flat


def _value(value: Any) -> Value:
    """Numbers, strings and null as they are; lists and the like as JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value, sort_keys=True)
