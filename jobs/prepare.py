"""Turns a zoo of checkpoints into a token store, once: a second run with the same inputs does nothing."""

from __future__ import annotations

from pathlib import Path

from sane_ray.cli import run_job
from sane_ray.cluster import connect, default_storage, local_path
from sane_ray.config import PrepareJob
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.summary import summarize
from sane_ray.tokens.store.writing import matching_store, preview, write_store
from sane_ray.zoo.catalog import discover

EXAMPLES = """\
examples:
  python jobs/prepare.py --source ZOO --store STORE
  python jobs/prepare.py --source ZOO --store STORE --tokens.token_size 288 --tokens.epochs '[21, 22, 23, 24, 25]'
  python jobs/prepare.py --source ZOO --dry-run
  python jobs/prepare.py --inspect STORE
"""


def main(config: PrepareJob, dry_run: bool) -> None:
    """Writes the store, or with ``inspect`` or a dry run only says what is there or would be."""
    if config.inspect:
        print(summarize(TokenStore.open(config.inspect)))
        return
    source, destination = paths(config)
    records = discover(source)
    store = matching_store(records, destination, config.tokens, source=source)
    if store is not None:
        print(f"nothing to do: {destination} is complete, and was prepared from these checkpoints and this config")
    elif dry_run:
        print(f"{preview(records, config.tokens, source=source)}\nfrom {source}\nto   {destination}")
        return
    else:
        with connect(config.cluster):
            store = write_store(records, destination, config.tokens, source=source)
    print(report(store))


def paths(config: PrepareJob) -> tuple[Path, Path]:
    """The zoo and the store, absolute, with the defaults filled in."""
    storage = default_storage(config.storage)
    source = local_path(config.source, "source") if config.source else storage / "zoos" / "digits"
    store = local_path(config.store, "store") if config.store else storage / "stores" / source.name
    return source, store


def report(store: TokenStore) -> str:
    """What was left out, where the store is, how much it holds, and what comes next."""
    counts = store.counts()
    left_out = [f"left out {row['source']}: {row['reason']}" for row in store.skipped]
    done = (
        f"store {store.path}: {counts.checkpoints:,} checkpoints of {counts.models:,} models, {counts.tokens:,} tokens "
        f"({store.num_bytes / 1e6:,.1f} MB); next: python jobs/pretrain.py --store {store.path}"
    )
    return "\n".join([*left_out, done])


if __name__ == "__main__":
    run_job(PrepareJob, main, examples=EXAMPLES)
