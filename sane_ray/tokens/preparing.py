"""Prepares a token store, or only looks: what `jobs/prepare.py` does, and what it says of it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pyarrow.parquet as pq

from sane_ray.cluster import connect, default_storage, local_path
from sane_ray.config import PrepareJob
from sane_ray.errors import InputError
from sane_ray.shell import command
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.inputs import Inputs, matching
from sane_ray.tokens.store.summary import summarize
from sane_ray.tokens.store.writing import audit_zoo, preview, write
from sane_ray.zoo import public
from sane_ray.zoo.catalog import catalog_source
from sane_ray.zoo.sources import Source, Zoo, check_one_source, name_of, read, to_fetch

_LISTED = 20


def run(config: PrepareJob, dry_run: bool) -> None:
    """Writes the store or the audit's catalog, or with ``inspect`` or a dry run only says what is there or would be."""
    if config.inspect:
        print(summarize(TokenStore.open(config.inspect)))
        return
    if config.zoo == "list":
        print(public.listing())
        return
    check_one_source(config.source, config.hub, config.zoo)
    storage = default_storage(config.storage)
    path, destination = paths(config)
    source = Source(path, hub=config.hub, zoo=config.zoo, reader=config.reader, properties=config.properties)
    if dry_run and (fetched := to_fetch(source)):
        print(f"{fetched}\nand then read it: run without --dry-run")
        return
    zoo = read(source, storage)
    if config.audit:
        print(audit(config, zoo, dry_run))
    else:
        prepare(config, zoo, destination, dry_run)


def prepare(config: PrepareJob, zoo: Zoo, destination: Path, dry_run: bool) -> None:
    """Writes the store, unless it is there."""
    inputs = Inputs.of(zoo.records, config.tokens, zoo.root)
    store = matching(inputs, destination)
    if store is not None:
        print(f"nothing to do: {destination} is complete, and was prepared from these checkpoints and this config")
    elif dry_run:
        unread = "".join(f"\nnot read: {name}" for name in zoo.unread()[:_LISTED])
        print(f"{preview(inputs)}\nfrom {zoo.path}\nto   {destination}{unread}")
        return
    else:
        with cluster(config, inputs):
            store = write(inputs, destination, zoo.unread())
    print(report(store))


def audit(config: PrepareJob, zoo: Zoo, dry_run: bool) -> str:
    """What the source holds; writes its catalog, unless it is a dry run."""
    default = default_storage(config.storage) / "catalogs" / f"{paths(config)[1].name}.parquet"
    catalog = local_path(config.catalog, "catalog") if config.catalog else default
    check_catalog(catalog, zoo)
    if dry_run:
        return f"would read {len(zoo.records):,} checkpoints of {zoo.path}, and write what they are to {catalog}"
    inputs = Inputs.of(zoo.records, config.tokens, zoo.root)
    with cluster(config, inputs):
        text = audit_zoo(inputs, catalog, origin=zoo.path, unread=zoo.unread())
    return f"{text}\n\ncatalog {catalog}: the same without what is left out; next: {next_command(catalog)}"


def next_command(catalog: Path) -> str:
    """Prepares what the catalog keeps, with what its architectures need."""
    kept = [
        row for row in pq.read_table(catalog, columns=["status", "architecture"]).to_pylist() if row["status"] == "kept"
    ]
    architectures = len({row["architecture"] for row in kept})
    needed = f" --tokens.max_architectures {architectures}" if architectures > 1 else ""
    return f"{command('python')} jobs/prepare.py --source {shlex.quote(str(catalog))}{needed}"


def check_catalog(catalog: Path, zoo: Zoo) -> None:
    """Raises ``InputError`` rather than overwrite the catalog of another source, or one that was edited."""
    if catalog.exists() and catalog_source(catalog) != str(zoo.path):
        raise InputError(
            f"{catalog} is there, and is not what an audit of {zoo.path} wrote: name another --catalog, or delete it"
        )


def cluster(config: PrepareJob, inputs: Inputs) -> AbstractContextManager[object]:
    """Ray, where the zoo is worth it."""
    return nullcontext() if inputs.is_small else connect(config.cluster)


def paths(config: PrepareJob) -> tuple[Path, Path]:
    """The zoo and the store, absolute, with the defaults filled in."""
    storage = default_storage(config.storage)
    source = local_path(config.source, "source") if config.source else storage / "zoos" / (config.zoo or "digits")
    name = name_of(config.hub) if config.hub else source.name.split(".")[0]
    store = local_path(config.store, "store") if config.store else storage / "stores" / name
    return source, store


def report(store: TokenStore) -> str:
    """What was left out or not aligned, where the store is, how much it holds, and what comes next."""
    counts = store.counts()
    done = (
        f"store {store.path}: {counts.checkpoints:,} checkpoints of {counts.models:,} models, {counts.tokens:,} tokens "
        f"({store.num_bytes / 1e6:,.1f} MB); "
        f"next: {command('python')} jobs/pretrain.py --store {shlex.quote(str(store.path))}"
    )
    return "\n".join([*left_out(store), *not_aligned(store), done])


def left_out(store: TokenStore) -> Iterator[str]:
    """Each checkpoint or file by itself where they are few, else each reason with an example."""
    rows = [(row["source"] or row["id"], row["reason"]) for row in store.skipped]
    if len(rows) <= _LISTED:
        yield from (f"left out {name}: {reason}" for name, reason in rows)
        return
    alike: dict[str, list[str]] = {}
    for name, reason in rows:
        alike.setdefault(reason, []).append(name)
    for reason, names in sorted(alike.items(), key=lambda pair: -len(pair[1]))[:_LISTED]:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        yield f"left out {names[0]}{more}: {reason}"
    yield f"all {len(rows):,} that were left out are in {store.path / 'catalog.parquet'}"


def not_aligned(store: TokenStore) -> Iterator[str]:
    """Architectures that stayed as they are although alignment was asked for."""
    if store.index["alignment"]["method"] == "none":
        return
    pairs = set(zip(*(store.models[column].to_pylist() for column in ("architecture", "model")), strict=True))
    models = Counter(
        architecture for architecture, _ in sorted(pairs) if architecture not in store.index["alignment"]["references"]
    )
    for name, count in models.most_common(_LISTED):
        why = (
            "no symmetry is known from its names and shapes; trace it (docs/zoos.md) and pass --tokens.symmetry"
            if store.architectures[name].symmetry.is_trivial
            else "its models are too large, or none of them is in the train split"
        )
        yield f"not aligned: {count:,} models of architecture {name}: {why}"
    if len(models) > _LISTED:
        yield f"not aligned: {len(models) - _LISTED:,} architectures more; --inspect {store.path} lists them"
