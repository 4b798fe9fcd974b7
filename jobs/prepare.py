"""Turns checkpoints of any kind into a token store, once: a second run with the same inputs does nothing."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from sane_ray.cli import run_job
from sane_ray.cluster import connect, default_storage, local_path
from sane_ray.config import PrepareJob
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.summary import summarize
from sane_ray.tokens.store.writing import audit_zoo, matching_store, needs_ray, preview, write_store
from sane_ray.zoo import public
from sane_ray.zoo.catalog import unclaimed
from sane_ray.zoo.readers import Record
from sane_ray.zoo.sources import Source, check_one_source, name_of, read, to_fetch

EXAMPLES = """\
examples:
  python jobs/prepare.py --source ZOO --audit                      what is there, and what would be left out
  python jobs/prepare.py --source ZOO --store STORE
  python jobs/prepare.py --source ZOO --tokens.where 'test_acc > 0.7 and epoch >= 21' --tokens.align weights
  python jobs/prepare.py --source models/ --tokens.token_size 288 --tokens.max_architectures 20
  python jobs/prepare.py --zoo list                                public zoos that can be downloaded
  python jobs/prepare.py --zoo cifar10-cnn-sample
  python jobs/prepare.py --hub org/name --tokens.token_size 288 --tokens.split '[1.0, 0.0, 0.0]'
  python jobs/prepare.py --inspect STORE
"""

_LISTED = 20


def main(config: PrepareJob, dry_run: bool) -> None:
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
    records, root = read(source, storage)
    if config.audit:
        print(audit(config, records, root, dry_run))
    else:
        prepare(config, records, root, destination, dry_run)


def prepare(config: PrepareJob, records: list[Record], source: Path, destination: Path, dry_run: bool) -> None:
    """Writes the store, unless it is there."""
    store = matching_store(records, destination, config.tokens, source=source)
    if store is not None:
        print(f"nothing to do: {destination} is complete, and was prepared from these checkpoints and this config")
    elif dry_run:
        print(f"{preview(records, config.tokens, source=source)}\nfrom {source}\nto   {destination}")
        return
    else:
        with cluster(config, records, source):
            store = write_store(records, destination, config.tokens, source=source)
    print(report(store))


def audit(config: PrepareJob, records: list[Record], source: Path, dry_run: bool) -> str:
    """What the source holds; writes its catalog, unless it is a dry run."""
    if dry_run:
        return f"would read {len(records):,} checkpoints of {source}, and say what they are"
    catalog = default_storage(config.storage) / "catalogs" / f"{paths(config)[1].name}.parquet"
    with cluster(config, records, source):
        others = unclaimed(source, records) if paths(config)[0].is_dir() or config.hub else []
        text = audit_zoo(records, catalog, config.tokens, source=source, unclaimed=others)
    return f"{text}\n\ncatalog {catalog}; next: python jobs/prepare.py --source {config.source or source}"


def cluster(config: PrepareJob, records: list[Record], source: Path) -> AbstractContextManager[object]:
    """Ray, where the zoo is worth it."""
    return connect(config.cluster) if needs_ray(records, config.tokens, source=source) else nullcontext()


def paths(config: PrepareJob) -> tuple[Path, Path]:
    """The zoo and the store, absolute, with the defaults filled in."""
    storage = default_storage(config.storage)
    source = local_path(config.source, "source") if config.source else storage / "zoos" / (config.zoo or "digits")
    name = name_of(config.hub) if config.hub else source.name.split(".")[0]
    store = local_path(config.store, "store") if config.store else storage / "stores" / name
    return source, store


def report(store: TokenStore) -> str:
    """What was left out, where the store is, how much it holds, and what comes next."""
    counts, skipped = store.counts(), store.skipped
    left_out = [f"left out {row['source'] or row['id']}: {row['reason']}" for row in skipped]
    if len(skipped) > _LISTED:
        reasons = Counter(row["reason"] for row in skipped).most_common(_LISTED)
        left_out = [f"left out {count:,} checkpoints: {reason}" for reason, count in reasons]
        left_out += [f"all {len(skipped):,} are in {store.path / 'catalog.parquet'}"]
    done = (
        f"store {store.path}: {counts.checkpoints:,} checkpoints of {counts.models:,} models, {counts.tokens:,} tokens "
        f"({store.num_bytes / 1e6:,.1f} MB); next: python jobs/pretrain.py --store {store.path}"
    )
    return "\n".join([*left_out, done])


if __name__ == "__main__":
    run_job(PrepareJob, main, examples=EXAMPLES)
