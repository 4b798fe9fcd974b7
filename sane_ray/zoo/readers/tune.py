"""The published Ray Tune zoos (modelzoos.cc, SANE, ViT zoo, WeightCLIP), and what ``jobs/build_zoo.py`` writes.

``<zoo>/…/<model>/{params.json | config.json, result.json, checkpoint_{E} | checkpoint_{E:06d}/checkpoints}``, where a
line of ``result.json`` (one JSON object a line, or one list) belongs to the checkpoint whose epoch equals its
``training_iteration``. Never guesses: a checkpoint without its line has no properties.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from sane_ray.errors import InputError
from sane_ray.zoo import checkpoint
from sane_ray.zoo.checkpoint import Checkpoint
from sane_ray.zoo.readers import Record, Value
from sane_ray.zoo.readers.folders import is_folder, scan
from sane_ray.zoo.readers.side_files import flat, json_of, parsed, text_of

NAME = "tune"
LOOKS_FOR = "model folders with checkpoint_<epoch>/checkpoints in them (published Ray Tune layout)"

_LOG = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint_(\d{1,15})")
_WEIGHTS = "checkpoints"
_PRETRAINING, _FINETUNING = "pretraining", "finetuning"  # folders of the ViT zoo

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

    A checkpoint folder without weights is listed too, so that whoever reads it counts it as missing. Files beside the
    weights that cannot be read are logged; their models have no properties or no config.
    """
    found = sorted(_model_folders(root)) if root.is_dir() else []
    if not any(Path(folder, name, _WEIGHTS).is_file() for folder, epochs in found for name in chain(*epochs.values())):
        return []
    licenses: dict[str, str | None] = {}
    records = [record for folder, epochs in found for record in _records(root, folder, epochs, licenses)]
    return sorted(_with_parents(records), key=lambda record: (record.model, record.epoch))


def open_checkpoint(record: Record) -> Checkpoint:
    """Opens the weights of one of the records.

    Raises:
        InputError: The file cannot be read without running code, or two folders claim to be this checkpoint.
    """
    if record.member:
        raise InputError(f"{record.path}: {record.member} beside it claims the same epoch; remove one of them")
    return checkpoint.open_checkpoint(record.path)


def _model_folders(root: Path) -> Iterator[tuple[str, dict[int, list[str]]]]:
    """Every folder that has checkpoint folders, with their names by epoch."""
    for folder, entries in scan(root.absolute(), descend=lambda name: _CHECKPOINT.fullmatch(name) is None):
        epochs: dict[int, list[str]] = defaultdict(list)
        for entry in entries:
            match = _CHECKPOINT.fullmatch(entry.name)
            if match and (is_folder(entry) or entry.is_symlink()):
                epochs[int(match[1])].append(entry.name)
        if epochs:
            yield folder, dict(sorted(epochs.items()))


def _records(
    root: Path, folder: str, epochs: dict[int, list[str]], licenses: dict[str, str | None]
) -> Iterator[Record]:
    model = os.path.relpath(folder, root.absolute()).replace(os.sep, "/")
    model = root.absolute().name if model == "." else model
    results = _results(folder)
    config = _config(folder, ("params.json", "config.json", "run_config.json"))
    license_name = config.get("license") or _license(root, str(Path(folder).parent), licenses)
    for epoch, names in epochs.items():
        with_weights = [name for name in names if Path(folder, name, _WEIGHTS).is_file()] if names[1:] else names
        yield Record(
            id=f"{model}/{epoch}",
            model=model,
            epoch=epoch,
            path=f"{folder}/{(with_weights or names)[0]}/{_WEIGHTS}",
            properties=results.get(epoch, {}),
            config=config,
            reader=NAME,
            member=", ".join(with_weights[1:]),
            license=None if license_name is None else str(license_name),
        )


def _with_parents(records: list[Record]) -> list[Record]:
    """A fine-tuned network, ``finetuning/<base>/<model>``, comes from ``pretraining/<base>`` if that is in the zoo."""
    models = {record.model for record in records}
    parents: dict[str, tuple[str, ...]] = {}
    for record in records:
        folder = Path(record.path).parent.parent
        if record.model not in parents and folder.parent.parent.name == _FINETUNING:
            zoo, _, _ = record.model.rpartition(f"{_FINETUNING}/{folder.parent.name}/{folder.name}")
            base = f"{zoo}{_PRETRAINING}/{folder.parent.name}"
            parents[record.model] = (base if base in models else folder.parent.name,)
    return [replace(record, parents=parents.get(record.model, ())) for record in records] if parents else records


def _results(folder: str) -> dict[int, dict[str, Value]]:
    """Properties by epoch. Zoos differ in whether the untrained network has a line: match by number."""
    results: dict[int, dict[str, Value]] = {}
    for row in _json_rows(f"{folder}/result.json") or _csv_rows(f"{folder}/progress.csv"):
        epoch = row.get("training_iteration", row.get("epoch"))
        if isinstance(epoch, int | float) and not isinstance(epoch, bool) and epoch == epoch // 1:
            results[int(epoch)] = _properties(row)
    return results


def _json_rows(path: str) -> list[dict[str, Any]]:
    text = text_of(path)
    rows: list[Any] = []
    if text.lstrip().startswith("["):
        rows = parsed(path, text) or []
    else:
        damaged = 0
        for line in text.splitlines():
            try:
                rows.append(json.loads(line) if line.strip() else None)
            except (ValueError, RecursionError):
                damaged += 1
        if damaged:
            _LOG.warning("%s: %d damaged lines; their checkpoints have no properties", path, damaged)
    return [row for row in rows if isinstance(row, dict)]


def _csv_rows(path: str) -> list[dict[str, Any]]:
    """The same as a table, which Ray Tune writes too: settings in columns ``config/…``, nested values as ``a/b``."""
    try:
        rows = list(csv.DictReader(text_of(path).splitlines()))
    except csv.Error as error:
        _LOG.warning("%s: no table (%s); its model has no properties", path, error)
        return []
    return [
        {key.replace("/", "::"): _number(cell) for key, cell in row.items() if key and not key.startswith("config/")}
        for row in rows
    ]


def _number(cell: str | None) -> Value:
    for kind in (int, float):
        try:
            return kind(cell or "")
        except ValueError:
            continue
    return cell or None


def _properties(row: dict[str, Any]) -> dict[str, Value]:
    values = flat({key: value for key, value in row.items() if key not in _BOOKKEEPING})
    train = values.get("train_acc")
    held_out = values["test_acc"] if values.get("test_acc") is not None else values.get("val_acc")
    if isinstance(train, int | float) and isinstance(held_out, int | float):
        values["ggap"] = train - held_out
    return values


def _config(folder: str, names: tuple[str, ...]) -> dict[str, Value]:
    """The settings in the first of the files that can be read."""
    contents = (json_of(f"{folder}/{name}") for name in names)
    return flat(next((content for content in contents if isinstance(content, dict)), {}))


def _license(root: Path, folder: str, known: dict[str, str | None]) -> str | None:
    """The licence that the config.json of the folder, or of the nearest around it in ``root``, names for its models."""
    if not Path(folder).is_relative_to(root.absolute()):
        return None
    if folder not in known:
        value = _config(folder, ("config.json",)).get("license")
        known[folder] = value if isinstance(value, str) else _license(root, str(Path(folder).parent), known)
    return known[folder]
