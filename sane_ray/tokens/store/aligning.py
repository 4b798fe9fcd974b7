"""Between the passes: which permutation brings each model nearest to the reference of its architecture.

Found for a model's last checkpoint and applied to all its epochs, so that a model's training stays one path (SANE,
arXiv 2406.09997, section 3.3). Plain functions of plain data: ``sane_ray.tokens.store.writing`` runs them in Ray tasks.
Never imports Ray.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.alignment import Alignment, Matcher
from sane_ray.tokens.store.inputs import look
from sane_ray.tokens.store.inspection import why
from sane_ray.tokens.store.layout import Row, is_whole
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.zoo.catalog import open_record
from sane_ray.zoo.readers import Record, bare

_MODELS_A_TASK = 16


Models = dict[tuple[str, str], Alignment]
"""Alignments by model and name of the architecture, since a model may change its shape while it is trained."""


class AlignJob(NamedTuple):
    """Models of one architecture that one task aligns."""

    reference: Record
    records: list[Record]
    """The last checkpoint of each model."""
    architecture: str
    symmetry: dict[str, Any]


@dataclass(frozen=True)
class Aligned:
    """How the models of a store were aligned."""

    references: dict[str, str]
    """Id of the reference checkpoint of each architecture."""
    alignments: Models
    """The references are not among them."""

    def holds(self, row: Row) -> bool:
        """Whether a checkpoint is reordered."""
        return (row.record.model, row.architecture.name) in self.alignments

    def table(self) -> pa.Table:
        """A row a model, architecture and permutation."""
        rows = [
            (*names, permutation, order.astype(np.int32), alignment.similarity_before, alignment.similarity_after)
            for names, alignment in self.alignments.items()
            for permutation, order in alignment.permutations.items()
        ]
        kinds = {
            "model": pa.string(),
            "architecture": pa.string(),
            "permutation": pa.string(),
            "order": pa.list_(pa.int32()),
            "similarity_before": pa.float64(),
            "similarity_after": pa.float64(),
        }
        columns = zip(*rows, strict=True) if rows else [()] * len(kinds)
        return pa.table(
            {name: pa.array(values, kind) for (name, kind), values in zip(kinds.items(), columns, strict=True)}
        )


NOT_ALIGNED = Aligned({}, {})


def references(rows: Sequence[Row], config: TokensConfig) -> dict[str, Row]:
    """The reference checkpoint of each architecture that can be aligned: the last one of ``tokens.align_to``, else of
    the first training model.

    Raises:
        InputError: The model ``tokens.align_to`` is not among the rows.
    """
    last = _last_checkpoints(rows)
    if config.align_to and all(model != config.align_to for model, _ in last):
        raise InputError(
            f"config field tokens.align_to is {config.align_to!r}, but that model was left out: name another, or see "
            "why with --audit"
        )
    chosen: dict[str, Row] = {}
    for (model, name), row in sorted(last.items(), key=lambda pair: (pair[0][0] != config.align_to, pair[0])):
        table, symmetry = row.architecture.table, row.architecture.symmetry
        if is_whole(table, config) and not symmetry.is_trivial and (row.split == "train" or model == config.align_to):
            chosen.setdefault(name, row)
    return chosen


def jobs(rows: Sequence[Row], chosen: Mapping[str, Row]) -> list[AlignJob]:
    """The work, cut into what one task does."""
    work = []
    last = _last_checkpoints(rows)
    for name, reference in chosen.items():
        symmetry = reference.architecture.symmetry.to_dict()
        others = [
            bare(row.record)
            for (model, architecture), row in last.items()
            if architecture == name and model != reference.record.model
        ]
        for start in range(0, len(others), _MODELS_A_TASK):
            records = others[start : start + _MODELS_A_TASK]
            work.append(AlignJob(bare(reference.record), records, name, symmetry))
    return work


def align(job: AlignJob, seed: int) -> Models | str:
    """Aligns the models of one job; a string says what cannot be read."""
    record = job.reference
    aligned: Models = {}
    try:
        matcher = _matcher(record.path, record.reader, record.member, json.dumps(job.symmetry), look(record.path))
        for record in job.records:
            aligned[record.model, job.architecture] = matcher.match(open_record(record).state_dict(), seed=seed)
    except Exception as error:  # told with the file's name
        return f"{record.path}: {why(error, record)}"
    return aligned


def _last_checkpoints(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The last checkpoint of each model in each of its architectures."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        names = (row.record.model, row.architecture.name)
        if names not in last or row.record.epoch >= last[names].record.epoch:
            last[names] = row
    return last


@functools.lru_cache(maxsize=2)
def _matcher(path: str, reader: str, member: str, symmetry: str, seen: tuple[int, int]) -> Matcher:
    """A reference, which a process makes ready once, and anew when its file is ``seen`` to be another."""
    weights = open_record(Record("", "", 0, path, reader=reader, member=member)).state_dict()
    return Matcher(weights, Symmetry.from_dict(json.loads(symmetry)))
