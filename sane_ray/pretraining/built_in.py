"""The zoo and the token store that a pretraining builds when it is given none: small networks on built-in images."""

from __future__ import annotations

from pathlib import Path

from sane_ray.config import PretrainJob
from sane_ray.errors import InputError
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.layout import table_settings
from sane_ray.tokens.store.writing import matching_store, write_store
from sane_ray.tokens.tokenizer import build_layer_table
from sane_ray.zoo.architectures import from_params
from sane_ray.zoo.builder import build_zoo, check_zoo, plan_zoo
from sane_ray.zoo.catalog import discover


def find_store(job: PretrainJob, storage: Path) -> TokenStore | None:
    """The built-in store if it is there.

    Raises:
        InputError: what is there is another one, or the config does not fit the zoo that would be built.
    """
    zoo, path = built_in_paths(job, storage)
    plan = plan_zoo(job.zoo)
    check_zoo(plan, zoo)
    network = from_params(next(iter(plan.models.values())))
    table = build_layer_table(network.state_dict(), **table_settings(job.tokens))
    if job.autoencoder.window > table.num_tokens:
        raise InputError(
            f"config field autoencoder.window is {job.autoencoder.window}, but the networks of the built-in zoo have "
            f"{table.num_tokens} tokens: set it to {table.num_tokens} or less, or name your own --store"
        )
    if plan.missing(zoo):
        return None
    return matching_store(discover(zoo), path, job.tokens, source=zoo)


def build_store(job: PretrainJob, storage: Path) -> TokenStore:
    """The built-in zoo and its token store, made unless they are there."""
    zoo, path = built_in_paths(job, storage)
    build_zoo(job.zoo, zoo)
    return write_store(discover(zoo), path, job.tokens, source=zoo)


def built_in_paths(job: PretrainJob, storage: Path) -> tuple[Path, Path]:
    """Where the zoo and the store are that this job builds when none is named."""
    name = Path(job.zoo.dataset).stem
    return storage / "zoos" / name, storage / "stores" / name


def describe_building(job: PretrainJob, storage: Path) -> str:
    """What comes before training when there is no store yet."""
    zoo, path = built_in_paths(job, storage)
    checkpoints = job.zoo.models * len(job.zoo.checkpoint_epochs)
    return (
        f"would train {job.zoo.models} networks on {job.zoo.dataset} into {zoo},\n"
        f"write their {checkpoints} checkpoints as tokens to {path},\n"
        f"then pretrain SANE on them for {job.pretraining.epochs} epochs"
    )
