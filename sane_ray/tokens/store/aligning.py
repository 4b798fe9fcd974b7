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
from numpy.typing import NDArray

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.alignment import Alignment, Matcher
from sane_ray.tokens.store.inspection import why
from sane_ray.tokens.store.layout import Row, is_whole
from sane_ray.tokens.symmetry import Symmetry
from sane_ray.zoo.catalog import open_record
from sane_ray.zoo.readers import Record, bare

_MODELS_A_TASK = 16


class AlignJob(NamedTuple):
    """Models of one architecture that one task aligns."""

    reference: Record
    records: list[Record]
    """The last checkpoint of each model."""
    symmetry: dict[str, Any]


@dataclass(frozen=True)
class Aligned:
    """How the models of a store were aligned."""

    references: dict[str, str]
    """Id of the reference checkpoint of each architecture."""
    alignments: dict[str, Alignment]
    """By model; the references are not among them."""

    def permutations(self, model: str) -> Mapping[str, NDArray[np.int64]] | None:
        """What a model is reordered by, or None if it stays as it is."""
        alignment = self.alignments.get(model)
        return None if alignment is None else alignment.permutations

    def table(self) -> pa.Table:
        """A row a model and permutation."""
        rows = [
            (model, name, order, alignment)
            for model, alignment in self.alignments.items()
            for name, order in alignment.permutations.items()
        ]
        return pa.table(
            {
                "model": pa.array([row[0] for row in rows], pa.string()),
                "permutation": pa.array([row[1] for row in rows], pa.string()),
                "order": pa.array([row[2].astype(np.int32) for row in rows], pa.list_(pa.int32())),
                "similarity_before": pa.array([row[3].similarity_before for row in rows], pa.float64()),
                "similarity_after": pa.array([row[3].similarity_after for row in rows], pa.float64()),
            }
        )


NOT_ALIGNED = Aligned({}, {})


def references(rows: Sequence[Row], config: TokensConfig) -> dict[str, Row]:
    """The reference checkpoint of each architecture that can be aligned: the last one of ``tokens.align_to``, else of
    the first training model.

    Raises:
        InputError: No model is named ``tokens.align_to``.
    """
    last = _last_checkpoints(rows)
    if config.align_to and config.align_to not in last:
        raise InputError(
            f"config field tokens.align_to is {config.align_to!r}: no such model in the store; take one of "
            f"{', '.join(sorted(last)[:5])}"
        )
    chosen: dict[str, Row] = {}
    for model, row in sorted(last.items(), key=lambda pair: (pair[0] != config.align_to, pair[0])):
        table, symmetry = row.architecture.table, row.architecture.symmetry
        if is_whole(table, config) and not symmetry.is_trivial and (row.split == "train" or model == config.align_to):
            chosen.setdefault(row.architecture.name, row)
    return chosen


def jobs(rows: Sequence[Row], chosen: Mapping[str, Row]) -> list[AlignJob]:
    """The work, cut into what one task does."""
    work = []
    for name, reference in chosen.items():
        symmetry = reference.architecture.symmetry.to_dict()
        members = [bare(row.record) for row in _last_checkpoints(rows).values() if row.architecture.name == name]
        others = [record for record in members if record.model != reference.record.model]
        for start in range(0, len(others), _MODELS_A_TASK):
            work.append(AlignJob(bare(reference.record), others[start : start + _MODELS_A_TASK], symmetry))
    return work


def align(job: AlignJob, seed: int) -> dict[str, Alignment] | str:
    """Aligns the models of one job, by name; a string says what cannot be read."""
    record = job.reference
    aligned = {}
    try:
        matcher = _matcher(record.path, record.reader, record.member, json.dumps(job.symmetry))
        for record in job.records:
            aligned[record.model] = matcher.match(open_record(record).state_dict(), seed=seed)
    except Exception as error:  # told with the file's name
        return f"{record.path}: {why(error, record)}"
    return aligned


def _last_checkpoints(rows: Sequence[Row]) -> dict[str, Row]:
    last: dict[str, Row] = {}
    for row in rows:
        if row.record.model not in last or row.record.epoch >= last[row.record.model].record.epoch:
            last[row.record.model] = row
    return last


@functools.lru_cache(maxsize=2)
def _matcher(path: str, reader: str, member: str, symmetry: str) -> Matcher:
    """A reference, which a process makes ready once."""
    weights = open_record(Record("", "", 0, path, reader=reader, member=member)).state_dict()
    return Matcher(weights, Symmetry.from_dict(json.loads(symmetry)))
