"""What a token store holds, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow.compute as pc

from sane_ray.tokens.store.reading import SPLITS, Architecture, TokenStore
from sane_ray.tokens.store.text_table import table as columns
from sane_ray.tokens.store.text_table import value_range

_LISTED = 20
"""Skipped checkpoints shown."""


def summarize(store: TokenStore) -> str:
    """Counts by split, architectures with their layers, what is not in the tokens and why, and the columns known."""
    return "\n".join(
        [
            *_heading(store),
            "",
            *_splits(store),
            *(
                line
                for architecture in store.architectures.values()
                for line in ("", *_architecture(store, architecture))
            ),
            *_skipped(store),
            *_columns(store),
        ]
    )


def _heading(store: TokenStore) -> Iterator[str]:
    index = store.index
    yield f"token store {store.path}"
    yield f"  from           {index['inputs']['source']} (written by {index['written_by']}, format {index['version']})"
    yield f"  contents       {store.fingerprint[:16]}, {store.num_bytes / 1e6:,.1f} MB in {len(index['files'])} files"
    yield f"  tokens         {store.token_size} values of {store.dtype}"
    yield f"  normalisation  {index['normalization']}, per layer, from the train split"
    yield f"  alignment      {_alignment(store)}"
    yield f"  split          by {index['split']['by']}, seed {index['split']['seed']}"


def _alignment(store: TokenStore) -> str:
    references = ", ".join(store.index["alignment"]["references"].values())
    return f"by weights, to {references}" if references else "none: weights as they were found"


def _splits(store: TokenStore) -> list[str]:
    rows: list[Sequence[str]] = [("split", "models", "checkpoints", "tokens", "parameters", "row groups")]
    for name in (*SPLITS, None):
        counts = store.counts(name)
        numbers = (counts.models, counts.checkpoints, counts.tokens, counts.parameters, counts.row_groups)
        rows.append((name or "all", *(f"{number:,}" for number in numbers)))
    return columns(rows)


def _architecture(store: TokenStore, architecture: Architecture) -> Iterator[str]:
    table = architecture.table
    members = pc.sum(pc.equal(store.models["architecture"], architecture.name)).as_py()
    signal = table.parameters / (table.num_tokens * table.token_size)
    symmetry = ", ".join(f"{name} ({size})" for name, size in architecture.symmetry.sizes.items()) or "none known"
    yield f"architecture {architecture.name}: {members:,} checkpoints"
    yield f"  {table.parameters:,} parameters in {table.num_tokens:,} tokens; {signal:.1%} of the values are weights"
    origin = f" (from {architecture.symmetry.origin})" if architecture.symmetry.origin else ""
    yield f"  permutation symmetries: {symmetry}{origin}"
    rows: list[Sequence[str]] = [("layer", "key", "kind", "shape", "channels", "tokens/channel", "shift", "scale")]
    for number, layer in enumerate(table.layers):
        key = layer.key if layer.bias_key is None else f"{layer.key} + bias"
        shift, scale = architecture.normalization.shift[number], architecture.normalization.scale[number]
        shape = "x".join(map(str, layer.shape))
        sizes = (
            f"{layer.channels:,}",
            "dense" if layer.dense else str(layer.tokens_per_channel),
            f"{shift:.3g}",
            f"{scale:.3g}",
        )
        rows.append((str(number), key, layer.kind, shape, *sizes))
    yield from (f"  {line}" for line in columns(rows))
    if table.untokenized:
        yield "  not in the tokens:"
        for entry in table.untokenized:
            yield f"    {entry.key} {list(entry.shape)}: {entry.reason}"


def _skipped(store: TokenStore) -> Iterator[str]:
    if not store.skipped:
        return
    yield from ("", f"left out: {len(store.skipped):,} checkpoints of the zoo")
    for row in store.skipped[:_LISTED]:
        yield f"  {row['source'] or row['id']}: {row['reason']}"
    if len(store.skipped) > _LISTED:
        yield f"  and {len(store.skipped) - _LISTED:,} more, in catalog.parquet"


def _columns(store: TokenStore) -> Iterator[str]:
    names = [name for name in store.models.column_names if name.startswith(("property.", "config."))]
    if not names:
        return
    rows: list[Sequence[str]] = [("known of them", "values", "range")]
    for name in names:
        column = store.models[name]
        rows.append((name, f"{len(column) - column.null_count:,}", value_range(column)))
    yield from ("", *columns(rows))
