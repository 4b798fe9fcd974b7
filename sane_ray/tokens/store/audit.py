"""What a zoo holds, in words: before a store is written, or instead.

Only tells what pass 1 found, and never fails because of it: what would be refused is said.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc

from sane_ray.config import TokensConfig
from sane_ray.errors import InputError
from sane_ray.tokens.store.inspection import Found
from sane_ray.tokens.store.layout import hints
from sane_ray.tokens.store.text_table import table, value_range
from sane_ray.tokens.symmetry import derive_symmetry
from sane_ray.zoo import foreign
from sane_ray.zoo.readers import Record
from sane_ray.zoo.splits import SPLITS, assign_splits
from sane_ray.zoo.tables import value_columns

_LISTED = 20
"""Lines of one list."""
_EXAMPLES = 5


def audit(
    found: Found,
    left_out: Sequence[tuple[Record, str]],
    config: TokensConfig,
    *,
    source: str | Path,
    sizes: Sequence[float] = (),
    unclaimed: Sequence[str] = (),
) -> str:
    """Says what a zoo holds: checkpoints, architectures, what is left out, duplicates, licences, lineage, splits.

    Args:
        found: What pass 1 saw; what it is to leave out is already taken from the usable ones.
        left_out: Records that were not wanted before any file was opened (epochs, filters), and why.
        config: How the zoo would be split.
        source: The zoo, for the heading.
        sizes: Bytes of each of the records found.
        unclaimed: Files that look like weights, but that the zoo's reader did not list (``catalog.unclaimed``).

    Returns:
        Lines of text.
    """
    records = [*found.records, *(record for record, _ in left_out)]
    splits, refused = _splits(found, config)
    sections = [
        _heading(found, records, source, sizes),
        _architectures(found),
        _left_out(found, left_out),
        _unclaimed(unclaimed),
        _foreign(unclaimed, Path(source)),
        _duplicates(found, splits),
        _licenses(records),
        _lineage(records),
        _split_counts(found, splits, refused, config),
        _known(records),
    ]
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def _heading(found: Found, records: Sequence[Record], source: str | Path, sizes: Sequence[float]) -> Iterator[str]:
    readers = Counter(record.reader for record in records)
    epochs = sorted({record.epoch for record in records})
    span = f"epochs {epochs[0]:,} to {epochs[-1]:,} ({len(epochs):,} different)" if len(epochs) > 1 else ""
    megabytes = f"{sum(sizes) / 1e6:,.1f} MB" if sizes else ""
    models = len({record.model for record in records})
    yield f"zoo {source}"
    yield f"  read by  {', '.join(f'{name} ({count:,})' for name, count in readers.most_common())}"
    yield f"  found    {_list(f'{len(records):,} checkpoints of {models:,} models', span, megabytes)}"
    yield f"  usable   {len(found.usable()):,} checkpoints of {len(_usable_models(found)):,} models"


def _architectures(found: Found) -> Iterator[str]:
    positions: dict[str, list[int]] = defaultdict(list)
    for position, key in found.usable():
        positions[key].append(position)
    if not positions:
        return
    rows = [["architecture", "models", "checkpoints", "parameters", "layers", "symmetry", "for example"]]
    ranked = sorted(positions.items(), key=lambda item: (-len(item[1]), item[0]))
    for key, members in ranked[:_LISTED]:
        models, layers = {found.records[position].model for position in members}, found.tables[key]
        counts = (len(models), len(members), layers.parameters, len(layers.layers))
        symmetry = derive_symmetry(layers, hints([found.records[position] for position in members]))
        known = "none known" if symmetry.is_trivial else symmetry.origin
        rows.append([key[:8], *(f"{count:,}" for count in counts), known, found.records[members[0]].id])
    yield from table(rows)
    yield from _more(len(positions) - _LISTED, "architectures")


def _left_out(found: Found, left_out: Sequence[tuple[Record, str]]) -> Iterator[str]:
    positions = sorted(found.reasons.items()) + sorted(found.unwanted.items())
    reasons = [(found.records[position], reason) for position, reason in positions] + list(left_out)
    if not reasons:
        return
    ids = {record.id for record in found.records}
    alike: dict[str, list[tuple[Record, str]]] = defaultdict(list)
    for record, reason in reasons:
        alike[_kind(reason, ids)].append((record, reason))
    yield f"left out: {len(reasons):,} of {len(found.records) + len(left_out):,} checkpoints"
    groups = sorted(alike.values(), key=len, reverse=True)
    rows = [("checkpoints", "for example", "because it")]
    rows += [(f"{len(group):,}", group[0][0].id, group[0][1]) for group in groups[:_LISTED]]
    yield from (f"  {line}" for line in table(rows))
    yield from _more(len(groups) - _LISTED, "reasons")


def _kind(reason: str, ids: set[str]) -> str:
    """The reason without what differs from checkpoint to checkpoint: names of others, and numbers."""
    words = ("…" if word.rstrip(",;.") in ids else word for word in reason.split())
    return re.sub(r"\d[\d.,e+-]*", "#", " ".join(words))


def _unclaimed(files: Sequence[str]) -> Iterator[str]:
    readable = [name for name in files if foreign.by_suffix(name) is None]
    if readable:
        yield (
            f"passed over: {len(readable):,} files that look like weights and are no checkpoint of this zoo, for "
            f"example {', '.join(readable[:_EXAMPLES])}; --reader files reads them"
        )


def _foreign(files: Sequence[str], source: Path) -> Iterator[str]:
    for known, names in foreign.by_format(files):
        listed = ", ".join(names[:_EXAMPLES]) + (", …" if len(names) > _EXAMPLES else "")
        remedy = known.remedy_for(source / names[0])
        yield f"not read: {len(names):,} files ({listed}), each {known.is_not_read}; {remedy}"


def _duplicates(found: Found, splits: Mapping[str, str]) -> Iterator[str]:
    copies: dict[str, list[Record]] = defaultdict(list)
    for record, digest in zip(found.records, found.digests, strict=True):
        if digest:
            copies[digest].append(record)
    groups = [group for group in copies.values() if len(group) > 1]
    if not groups:
        yield "duplicates: none"
        return
    across = [group for group in groups if len({record.model for record in group}) > 1]
    leaking = [group for group in across if len({splits.get(record.model) for record in group} - {None}) > 1]
    repeats = sum(len(group) - 1 for group in groups)
    yield (
        f"duplicates: {repeats:,} checkpoints have the weights of an earlier one, in {len(groups):,} groups: "
        f"{len(groups) - len(across):,} within one model, {len(across):,} across models"
    )
    if leaking:
        yield f"  {len(leaking):,} groups have models in different splits; keep tokens.duplicates at 'drop'"
    for group in sorted(groups, key=len, reverse=True)[:_EXAMPLES]:
        names = [record.id for record in group]
        more = f" and {len(names) - _EXAMPLES:,} more" if len(names) > _EXAMPLES else ""
        yield f"  {' = '.join(names[:_EXAMPLES])}{more}"
    yield from _more(len(groups) - _EXAMPLES, "groups")


def _licenses(records: Sequence[Record]) -> Iterator[str]:
    models: dict[str | None, set[str]] = defaultdict(set)
    for record in records:
        models[record.license or None].add(record.model)
    counts = Counter(record.license or None for record in records)
    rows = [("licence", "models", "checkpoints")]
    for name, count in sorted(counts.items(), key=lambda item: (item[0] is not None, -item[1]))[:_LISTED]:
        rows.append((name or "none named", f"{len(models[name]):,}", f"{count:,}"))
    yield from table(rows)
    yield from _more(len(counts) - _LISTED, "licences")


def _lineage(records: Sequence[Record]) -> Iterator[str]:
    parents = {record.model: record.parents for record in records if record.parents}
    counts = Counter(name for names in parents.values() for name in names)
    if not counts:
        return
    rows = [("made from", "models"), *((name, f"{count:,}") for name, count in counts.most_common(_LISTED))]
    yield from table(rows)
    yield from _more(len(counts) - _LISTED, "parents")


def _splits(found: Found, config: TokensConfig) -> tuple[dict[str, str], str]:
    """The split of each usable model, or why they cannot be split."""
    try:
        records = [found.records[position] for position, _ in found.usable()]
        return assign_splits(records, config) if records else {}, ""
    except InputError as error:
        return {}, str(error)


def _split_counts(found: Found, splits: Mapping[str, str], refused: str, config: TokensConfig) -> Iterator[str]:
    if refused:
        yield f"split: refused, because {refused}"
        return
    models, usable = Counter(splits.values()), [found.records[position].model for position, _ in found.usable()]
    checkpoints = Counter(splits.get(model) for model in usable)
    rows = [("split", "models", "checkpoints")]
    rows += [(name, f"{models[name]:,}", f"{checkpoints[name]:,}") for name in SPLITS]
    if checkpoints[None]:
        rows.append(("in none", f"{len(set(usable) - splits.keys()):,}", f"{checkpoints[None]:,}"))
    yield from table(rows)
    by_fractions = not config.split_file and config.split_by != "published"
    empty = [name for name, part in zip(SPLITS, config.split, strict=True) if part > 0 and not models[name]]
    if empty and by_fractions:
        yield f"  {', '.join(empty)} would hold no model: set that fraction of tokens.split to 0, or add models"


def _known(records: Sequence[Record]) -> Iterator[str]:
    columns = value_columns("property", [record.properties for record in records])
    columns |= value_columns("config", [record.config for record in records])
    if not columns:
        return
    rows = [("known of them", "values", "range")]
    for name, column in columns.items():
        absent = column.null_count + (pc.sum(pc.is_nan(column)).as_py() or 0 if column.type == "double" else 0)
        rows.append((name, f"{len(column) - absent:,}", value_range(column)))
    yield from table(rows)


def _usable_models(found: Found) -> dict[str, str]:
    """Each usable model's architecture: that of its first usable checkpoint."""
    return {found.records[position].model: key for position, key in reversed(found.usable())}


def _more(count: int, what: str) -> Iterator[str]:
    if count > 0:
        yield f"  and {count:,} more {what}"


def _list(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
