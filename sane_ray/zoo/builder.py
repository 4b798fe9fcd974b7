"""Builds a zoo: trains a population of small networks in Ray tasks and writes it in the published zoo layout.

``<zoo>/config.json`` says what the zoo is; a model is a folder that appears under its name when all of it is written::

    NN_tune_trainable_<zoo>_<number>/params.json                 flat, published keys; enough to rebuild the network
                                     result.json                 one JSON line an epoch, from epoch 0 (untrained)
                                     checkpoint_<epoch>/checkpoints   torch.save of the state dict

Model i depends on (seed, i) and the config's choices alone: neither on how many models there are, nor on which train
beside it, nor on which are already there. Never touches a finished model, and never unpickles anything.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import shutil
import statistics
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sane_ray.config import ZooConfig
from sane_ray.errors import InputError
from sane_ray.zoo.architectures import architecture_for, from_params, parameter_shapes
from sane_ray.zoo.images import ImageData, load_images
from sane_ray.zoo.stacked import SGD_MOMENTUM, Trained, stack_key, train_stack

STACK = 8
"""Networks trained side by side in one task: twice as many gain a tenth in speed, and progress comes half as often."""

IN_FLIGHT = 16
"""Fewest tasks submitted ahead of their results: enough for an autoscaler to see the demand."""

LAYOUT = 1
"""Version of what this module writes; part of config.json."""

MOST_VALUES = 8
"""Most values of a hyper-parameter that a plan counts one by one."""

_SHOWN = 12
"""Digits of a fingerprint that a sentence tells."""

_UNFINISHED = ".building"
"""Folder inside the zoo where models lie until they are whole; readers pass over hidden folders."""

_LOG = logging.getLogger(__name__)

Params = dict[str, Any]


class ZooBuildError(RuntimeError):
    """Some models could not be built; the others are finished and stay."""


@dataclass(frozen=True)
class ZooPlan:
    """What a zoo will be, decided before anything is trained."""

    config: ZooConfig
    images: ImageData
    identity: dict[str, Any]
    """Contents of config.json: two zoos are the same if and only if these are."""
    models: dict[str, Params]
    """Params by folder name, in order of number."""

    @property
    def parameters(self) -> int:
        """Parameters of one network."""
        architecture = architecture_for(self.config.architecture, self.images.shape)
        shapes = parameter_shapes(architecture, self.images.shape, self.images.classes)
        return sum(math.prod(shape) for shape in shapes.values())

    def missing(self, zoo: Path) -> dict[str, Params]:
        """The models that are not finished in ``zoo``."""
        return {
            name: params
            for name, params in self.models.items()
            if not _is_finished(zoo / name, self.config.checkpoint_epochs)
        }


def build_zoo(config: ZooConfig, output: Path) -> Path:
    """Trains what is missing of the zoo in ``output``, in tasks of the already connected Ray cluster.

    A model is trained once: an interrupted or repeated build goes on with what is left, and a model whose folder was
    deleted comes back the same. All nodes must see ``output``. Only one build may write to a zoo at a time.

    Args:
        config: what to train.
        output: folder of the zoo; made if it does not exist.

    Returns:
        ``output``.

    Raises:
        InputError: the images cannot be used, or ``output`` holds something else than this zoo.
        ZooBuildError: some models failed; names them. All others are finished.
    """
    zoo = Path(output).expanduser().absolute()
    plan = plan_zoo(config)
    check_zoo(plan, zoo)
    _write_identity(plan, zoo)
    missing = plan.missing(zoo)
    if not missing:
        return zoo
    try:
        failures = _train_missing(plan, missing, zoo)
    except KeyboardInterrupt:
        finished = len(plan.models) - len(plan.missing(zoo))
        _LOG.warning(
            "%d of %d models are finished, and kept: the same command trains the rest", finished, len(plan.models)
        )
        raise
    finally:
        shutil.rmtree(zoo / _UNFINISHED, ignore_errors=True)
    if failures:
        raise ZooBuildError(
            f"{len(failures)} of {len(plan.models)} models of {zoo} could not be built; the others are finished, and "
            f"the same command builds only these: {_by_reason(failures)}"
        )
    return zoo


def plan_zoo(config: ZooConfig) -> ZooPlan:
    """Decides every model of a zoo; reads the images, trains and writes nothing.

    Raises:
        InputError: the images cannot be used, or fit no architecture.
    """
    images = load_images(config.dataset, seed=config.seed)
    architecture_for(config.architecture, images.shape)
    zoo = {**dataclasses.asdict(config), "dataset": images.name}  # a file may move: its fingerprint says what it holds
    identity = {
        "layout": LAYOUT,
        "zoo": zoo,
        "images": {"name": images.name, "fingerprint": images.fingerprint, "shape": list(images.shape)},
    }
    prefix = _digest({**identity, "zoo": {**zoo, "models": None}})[:5]
    chosen = itertools.islice(_choices(config), config.models)
    models = {
        f"NN_tune_trainable_{prefix}_{index:05d}": _params(config, images, index, each)
        for index, each in enumerate(chosen)
    }
    return ZooPlan(config, images, identity, models)


def check_zoo(plan: ZooPlan, zoo: Path) -> None:
    """Refuses a folder that holds anything but this zoo; an absent or empty one will do.

    Raises:
        InputError: it is a file, holds another zoo (names the first field that differs), or other things.
    """
    remedy = "choose another folder (--output of jobs/build_zoo.py, --storage of jobs/pretrain.py), or remove it"
    if not zoo.exists():
        return
    if not zoo.is_dir():
        raise InputError(f"{zoo} is a file, not a folder: {remedy}")
    path = zoo / "config.json"
    if not path.exists():
        if any(entry.name != _UNFINISHED for entry in zoo.iterdir()):
            raise InputError(f"{zoo} is not empty, but holds no config.json of a zoo: {remedy}")
        return
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}): {remedy}") from error
    for key, *values in _differences(found, json.loads(json.dumps(plan.identity))):
        here, wanted = (str(value)[:_SHOWN] if key.endswith("fingerprint") else value for value in values)
        raise InputError(
            f"{path} belongs to another zoo: {key} is {here!r} there, but {wanted!r} is asked for; "
            f"ask for the same to go on with that zoo, or {remedy}"
        )


def describe(plan: ZooPlan, zoo: Path) -> str:
    """The plan in a few lines: what would be trained, how large it becomes, and where."""
    missing, epochs = len(plan.missing(zoo)), plan.config.checkpoint_epochs
    file = io.BytesIO()
    torch.save(from_params(next(iter(plan.models.values()))).state_dict(), file)
    kind = architecture_for(plan.config.architecture, plan.images.shape).name
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in plan.images.rows.items())
    channels, height, width = plan.images.shape
    lines = [
        f"zoo          {zoo}",
        f"images       {plan.images.name}: {channels}x{height}x{width}, {plan.images.classes} classes ({rows})",
        f"models       {len(plan.models):,} {kind} of {plan.parameters:,} parameters; {missing:,} to train",
        f"checkpoints  {len(plan.models) * len(epochs):,} (epochs {', '.join(map(str, epochs))}), "
        f"{len(plan.models) * len(epochs) * file.tell() / 1e6:,.1f} MB",
    ]
    for key in ("model::nlin", "model::init_type", "model::dropout", "optim::optimizer", "optim::lr", "optim::wd"):
        values = [params[key] for params in plan.models.values()]
        counts = collections.Counter(values)
        if len(counts) > MOST_VALUES:
            spread = f"{min(values):.2g} .. {max(values):.2g}, median {statistics.median(values):.2g}"
        else:
            spread = ", ".join(
                f"{value} ({count})" for value, count in sorted(counts.items(), key=lambda pair: pair[0])
            )
        lines.append(f"{key.split('::')[1]:12} {spread}")
    return "\n".join(lines)


def grid(config: ZooConfig) -> list[Params]:
    """All combinations of the config's lists, the last varying fastest: published keys, without a seed."""
    keys = ("model::nlin", "model::init_type", "optim::optimizer", "optim::lr", "optim::wd", "model::dropout")
    lists = (
        config.activations,
        config.initializations,
        config.optimizers,
        config.learning_rates,
        config.weight_decays,
        config.dropouts,
    )
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]


def _choices(config: ZooConfig) -> Iterator[Params]:
    """Hyper-parameters of model 0, 1, 2, ... without end."""
    if config.search == "grid":
        yield from itertools.cycle(grid(config))
    for index in itertools.count():
        yield _draw(config, np.random.default_rng([config.seed, index]))


def _params(config: ZooConfig, images: ImageData, index: int, chosen: Mapping[str, Any]) -> Params:
    """The params.json of model ``index``."""
    sgd = chosen["optim::optimizer"] == "sgd"
    channels, height, width = images.shape
    return {
        "model::type": architecture_for(config.architecture, images.shape).published_name,
        "model::channels_in": channels,
        "model::image_height": height,
        "model::image_width": width,
        "model::o_dim": images.classes,
        "model::nlin": chosen["model::nlin"],
        "model::dropout": chosen["model::dropout"],
        "model::init_type": chosen["model::init_type"],
        "model::use_bias": True,
        "optim::optimizer": chosen["optim::optimizer"],
        "optim::lr": chosen["optim::lr"] * (10 if sgd else 1),
        "optim::wd": chosen["optim::wd"],
        "optim::momentum": SGD_MOMENTUM if sgd else 0.0,
        "training::batchsize": config.batch_size,
        "training::epochs_train": config.checkpoint_epochs[-1],
        "training::loss": "nll",
        "dataset::name": images.name,
        "dataset::fingerprint": images.fingerprint,
        "dataset::seed": config.seed,
        "seed": int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0]),
    }


def _draw(config: ZooConfig, rng: np.random.Generator) -> Params:
    def pick(values: Sequence[Any]) -> Any:
        return values[int(rng.integers(len(values)))]

    low, high = math.log(config.learning_rates[0]), math.log(config.learning_rates[-1])
    return {
        "model::nlin": pick(config.activations),
        "model::init_type": pick(config.initializations),
        "optim::optimizer": pick(config.optimizers),
        "optim::lr": float(f"{math.exp(rng.uniform(low, high)):.6g}"),
        "optim::wd": pick(config.weight_decays),
        "model::dropout": pick(config.dropouts),
    }


def _train_missing(plan: ZooPlan, missing: Mapping[str, Params], zoo: Path) -> dict[str, str]:
    """Trains models stack by stack in Ray tasks; returns the failed ones with their reasons."""
    import ray

    if not ray.is_initialized():
        raise RuntimeError("building a zoo needs a connected Ray: `with sane_ray.cluster.connect(config): ...`")
    task = ray.remote(num_cpus=1)(_build_stack)
    images = ray.put(plan.images)
    stacks = iter(_stacks(missing))
    bound = max(IN_FLIGHT, 2 * int(ray.cluster_resources().get("CPU", 0)))
    running: dict[Any, list[str]] = {}
    failures: dict[str, str] = {}
    diverged: list[str] = []
    done = len(plan.models) - len(missing)
    with tqdm(total=len(plan.models), initial=done, desc="training models", unit="model") as progress:
        try:
            while True:
                for names in itertools.islice(stacks, bound - len(running)):
                    models = {name: missing[name] for name in names}
                    running[task.remote(models, images, plan.config.checkpoint_epochs, str(zoo))] = names
                if not running:
                    break
                (finished,), _ = ray.wait(list(running))
                names = running.pop(finished)
                try:
                    diverged += ray.get(finished)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None) or error
                    first_line = (str(cause).strip() or "no message").splitlines()[0]
                    failures |= dict.fromkeys(names, f"{type(cause).__name__}: {first_line}")
                    _LOG.warning("training of %s failed", ", ".join(names), exc_info=error)
                progress.update(len(names))
        finally:
            for reference in running:
                ray.cancel(reference)
    if diverged:
        _LOG.warning(
            "%d models diverged to NaN or Inf weights, and are in the zoo as such: %s", len(diverged), diverged
        )
    return failures


def _by_reason(failures: Mapping[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in failures.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in names.items())


def _stacks(models: Mapping[str, Params]) -> Iterator[list[str]]:
    """Names of models to train side by side: those that run the same operations, up to ``STACK`` of them."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, params in models.items():
        groups.setdefault(stack_key(params), []).append(name)
    for names in groups.values():
        yield from (names[start : start + STACK] for start in range(0, len(names), STACK))


def _build_stack(models: dict[str, Params], images: ImageData, epochs: list[int], zoo: str) -> list[str]:
    """The Ray task: trains models side by side and writes them. Returns the names of those that diverged."""
    trained = train_stack(list(models.values()), images, epochs)
    for name, history in zip(models, trained, strict=True):
        _write_model(history, Path(zoo), name)
    return [name for name, history in zip(models, trained, strict=True) if not _is_finite(history)]


def _is_finite(history: Trained) -> bool:
    return all(value.isfinite().all() for state in history.checkpoints.values() for value in state.values())


def _write_model(history: Trained, zoo: Path, name: str) -> None:
    """Writes a model's folder aside and moves it to its name in one step."""
    aside = zoo / _UNFINISHED / f"{name}.{uuid.uuid4().hex}"
    try:
        for epoch, state in history.checkpoints.items():
            path = _checkpoint(aside, epoch)
            path.parent.mkdir(parents=True)
            torch.save(state, path)
        (aside / "params.json").write_text(json.dumps(history.params, indent=1) + "\n")
        (aside / "result.json").write_text("".join(_result_line(*row) for row in enumerate(history.results)))
        if (zoo / name).exists():  # a model that lost some of its files
            shutil.rmtree(zoo / name)
        aside.replace(zoo / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _result_line(epoch: int, metrics: Mapping[str, float]) -> str:
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return json.dumps({"training_iteration": epoch, **finite}, allow_nan=False) + "\n"


def _checkpoint(model: Path, epoch: int) -> Path:
    return model / f"checkpoint_{epoch:06d}" / "checkpoints"


def _is_finished(model: Path, epochs: Sequence[int]) -> bool:
    files = [model / "params.json", model / "result.json", *(_checkpoint(model, epoch) for epoch in epochs)]
    return all(file.is_file() for file in files)


def _write_identity(plan: ZooPlan, zoo: Path) -> None:
    if (zoo / "config.json").exists():
        return
    aside = zoo / _UNFINISHED / f"config.{uuid.uuid4().hex}.json"
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(plan.identity, indent=1) + "\n")
    aside.replace(zoo / "config.json")


def _differences(found: Any, wanted: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys at which two JSON values differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted({*found, *wanted}, key=str):
            yield from _differences(found.get(name), wanted.get(name), f"{key}.{name}".lstrip("."))
    elif found != wanted:
        yield key, found, wanted


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
