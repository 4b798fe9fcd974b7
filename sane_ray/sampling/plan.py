"""What will be sampled, decided before anything starts: model, anchors, images, target, and where the results go.

Reads indices, images and the model's config, never weights of the zoo. Never imports Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sane_ray.autoencoder.model import SANE
from sane_ray.cluster import default_storage, local_path
from sane_ray.config import SampleJob, SamplingConfig, to_dict
from sane_ray.embedding.job import model_folder
from sane_ray.embedding.preprocessing import Preprocessing
from sane_ray.embedding.writing import model_fingerprint
from sane_ray.errors import InputError
from sane_ray.sampling.anchors import Anchors, choose
from sane_ray.sampling.batch_norm import IMAGES
from sane_ray.sampling.targets import Target
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.reading import json_digest, settings_of
from sane_ray.zoo.architectures import architecture_for, described, from_params, image_shape_of, parameter_shapes
from sane_ray.zoo.images import ImageData, load_images
from sane_ray.zoo.user_network import UserNetwork, check_same

VERSION = 1

_SELECTING = "is the best of many draws on validation images"


@dataclass(frozen=True)
class SamplePlan:
    """Everything that sampling needs to begin."""

    model: Path
    anchors: Anchors
    images: ImageData | None
    """None where networks of this kind cannot be run here."""
    images_path: str
    """What was named for them, if it was a file."""
    why_no_images: str
    recipe: dict[str, Any]
    """Params of the networks that come out: architecture, classes, and how the best anchor was trained."""
    target: Target | None
    """How weights of the anchors' architecture become those of another; None for the same."""
    output: Path
    name: str
    config: SamplingConfig
    identity: dict[str, Any]
    """All that decides what comes out."""
    network: UserNetwork | None = None
    """What builds networks that are of none of our own architectures; None for those that are."""
    rest: dict[str, Tensor] = field(default_factory=dict)
    """Entries of that network's state dict that never were tokens, as it has them when it is built."""

    warnings: list[str] = field(default_factory=list)
    """What makes the results doubtful."""

    @property
    def digest(self) -> str:
        """Of the identity, 8 hex digits."""
        return json_digest(self.identity)[:8]


def plan_of(job: SampleJob) -> SamplePlan:
    """Decides everything.

    Raises:
        InputError: something is missing or does not fit; names the flag and the remedy.
    """
    if not job.model:
        raise InputError("no model is named: --model RUN, such as results/runs/<run>")
    if not job.store:
        raise InputError("no token store is named: --store STORE, the one of the networks to draw from")
    storage = default_storage(job.storage)
    model_path = model_folder(local_path(job.model, "model"))
    store = TokenStore.open(local_path(job.store, "store"))
    anchors = choose(store, job.sampling)
    preprocessing, settings = Preprocessing(SANE.from_pretrained(model_path)), settings_of(store)
    preprocessing.of_store(anchors.architecture, settings)
    _check_drawable(job.sampling, anchors)
    images, why = _images_of_network(job, anchors.params) if job.network else _images(job, anchors.params)
    _check_measurable(job.sampling, why)
    recipe = _recipe(job, anchors, images)
    network = UserNetwork(job.network, images.classes) if job.network and images is not None else None
    target: Target | None = None
    rest: dict[str, Tensor] = {}
    if network is not None and images is not None:
        target, rest = fit_of(network, anchors)
        network.check_answers(torch.from_numpy(images.images_NCHW[:2]))
        recipe |= {"network::function": network.path, "network::source": network.source}
    elif images is not None:
        target = _target(anchors, recipe)
    identity = {
        "version": VERSION,
        "model": model_fingerprint(model_path),
        "store": store.fingerprint,
        "anchors": anchors.ids,
        "images": images.fingerprint if images is not None else "",
        "recipe": recipe,
        "settings": to_dict(job.sampling),
    }
    name = job.run_name or f"{store.path.name}-{json_digest(identity)[:8]}"
    output = local_path(job.output, "output") if job.output else storage / "samples" / name
    named = job.images if job.images.endswith((".npz", ".parquet")) else ""
    path = str(Path(named).expanduser().absolute()) if named else ""
    warnings = [*preprocessing.warnings_of(settings.get("align", "none")), *_doubts(job, anchors)]
    _check_bandwidth(job.sampling, anchors, images)
    return SamplePlan(
        model_path, anchors, images, path, why, recipe, target, output, name, job.sampling, identity, network, rest,
        warnings,
    )  # fmt: skip


def _check_drawable(config: SamplingConfig, anchors: Anchors) -> None:
    """Raises ``InputError`` if densities cannot be fitted to these anchors."""
    mode = anchors.architecture.normalization.mode
    if mode != "standardize":
        raise InputError(
            f"{anchors.store.path} has {mode} normalisation, but noise and distances are in units of each layer's "
            "spread: sample from a store that was prepared with --tokens.normalization standardize"
        )
    several = [method for method in config.methods if method.split(":")[0] in _OF_SEVERAL]
    if len(anchors.ordinals) == 1 and several:
        raise InputError(
            f"config field sampling.methods has {several[0]!r}, which needs several anchors, and there is one: choose "
            "more anchors, or other methods"
        )
    if len(anchors.ordinals) == 1 and not config.bandwidth and any("kde" in method for method in config.methods):
        raise InputError("config field sampling.bandwidth is 0, and one anchor has no spread to choose it by: set it")


_OF_SEVERAL = ("sane_gaussian", "sane_mixture", "sane_interpolation", "average", "interpolation")


def _check_bandwidth(config: SamplingConfig, anchors: Anchors, images: ImageData | None) -> None:
    """Raises ``InputError`` if validation images are to choose the bandwidth, and cannot."""
    needed = any(method.split(":")[0] in ("sane_kde", "sane_kde_token", "noise") for method in config.methods)
    classes = anchors.params.get("model::o_dim", images.classes if images is not None else 0)
    if needed and not config.bandwidth and images is not None and int(classes) != images.classes:
        raise InputError(
            f"the last layer begins anew for {images.classes} classes, so that validation images cannot choose the "
            "bandwidth: set --sampling.bandwidth, such as what a run on the anchors' own images chose"
        )


def _doubts(job: SampleJob, anchors: Anchors) -> list[str]:
    """What makes the measures doubtful."""
    if "dataset::seed" in anchors.params or not job.images:
        return []
    return [
        "the store does not say how its networks' images were split: if --images are theirs, validation and test ones "
        "are among those that the anchors were trained on, and only scratch is measured fairly"
    ]


def _images_of_network(job: SampleJob, params: Mapping[str, Any]) -> tuple[ImageData, str]:
    """The images that networks of the user's are measured with."""
    if not job.images:
        raise InputError(
            f"--network {job.network} needs --images: name those that its networks were trained on (`digits`, "
            "`mnist5k`, or a path to .npz or .parquet), so that they can be measured and conditioned"
        )
    if job.target:
        raise InputError("--target names one of our own architectures, and --network another: give one of them")
    return load_images(job.images, seed=int(params.get("dataset::seed", 0))), ""


def _images(job: SampleJob, params: Mapping[str, Any]) -> tuple[ImageData | None, str]:
    """The images, or why there are none."""
    try:
        from_params({**params, "seed": 0, "model::init_type": "uniform", "model::dropout": 0.0})
    except InputError as error:
        own = "--network package.module:function names what builds networks of your own"
        if job.images or job.target:
            raise InputError(f"--images and --target need networks that can be run here, but {error}; {own}") from error
        return None, f"{error}; {own}"
    seed = int(params.get("dataset::seed", 0))
    name = job.images or str(params.get("dataset::name", ""))
    if not name:
        return None, "the store does not say which images its networks were trained on: name them with --images"
    try:
        images = load_images(name, seed=seed)
    except InputError as error:
        if job.images:
            raise
        return None, f"{error}; or name the file with --images"
    if not job.images and images.fingerprint != params.get("dataset::fingerprint", images.fingerprint):
        raise InputError(
            f"images {name!r} are not those that the networks of the store were trained on (fingerprint "
            f"{images.fingerprint} instead of {params['dataset::fingerprint']}): name the right ones with --images"
        )
    return images, ""


def _check_measurable(config: SamplingConfig, why: str) -> None:
    """Raises ``InputError`` if a method selects on images and there are none."""
    selecting = [method for method in config.methods if ":" in method]
    if why and selecting:
        plain = [method for method in config.methods if ":" not in method and method != "scratch"]
        raise InputError(
            f"config field sampling.methods has {selecting[0]!r}, which {_SELECTING}, and networks cannot be measured: "
            f"{why}. Without images choose methods without a selection: --sampling.methods '[{', '.join(plain)}]'"
        )


def _recipe(job: SampleJob, anchors: Anchors, images: ImageData | None) -> dict[str, Any]:
    """Params of the networks that come out."""
    recipe = dict(anchors.params)
    if images is None:
        return recipe
    if job.network:
        return recipe | {
            "model::o_dim": images.classes,
            "dataset::name": images.name,
            "dataset::fingerprint": images.fingerprint,
        }
    _, height, width = shape = images.shape
    if shape != image_shape_of(recipe):
        raise InputError(
            f"--images {images.name} have shape {list(shape)}, but the networks of {anchors.store.path} take "
            f"{list(image_shape_of(recipe))}: resize the images (an .npz of images and labels), or name others"
        )
    if job.target:
        architecture = architecture_for(job.target, shape)
        recipe["model::type"] = architecture.published_name
    return recipe | {
        "model::channels_in": shape[0],
        "model::image_height": height,
        "model::image_width": width,
        "model::o_dim": images.classes,
        "dataset::name": images.name,
        "dataset::fingerprint": images.fingerprint,
    }


def _target(anchors: Anchors, recipe: Mapping[str, Any]) -> Target | None:
    """How weights of the anchors become those of the recipe's architecture; None if they have its shapes."""
    source, wanted = shapes_of(anchors.params), shapes_of(recipe)
    if source == wanted:
        return None
    return Target(source, wanted, initialization=str(recipe["model::init_type"]))


def fit_of(network: UserNetwork, anchors: Anchors) -> tuple[Target | None, dict[str, Tensor]]:
    """How weights of the anchors become those of a user's network: with a new head, and what never were tokens.

    Returns:
        What fits them to another number of classes (None for the same), and the rest of the state dict.

    Raises:
        InputError: the network has not the keys and shapes of the anchors.
    """
    table = anchors.architecture.table
    source: dict[str, tuple[int, ...]] = {layer.key: layer.shape for layer in table.layers}
    source |= {layer.bias_key: layer.shape[:1] for layer in table.layers if layer.bias_key is not None}
    stored = source | {each.key: each.shape for each in table.untokenized}
    built = network.state_dict()
    wanted = {key: tuple(value.shape) for key, value in built.items()}
    what = f"the networks of {anchors.store.path}"
    differing = next((key for key in wanted if wanted[key] != stored.get(key)), None)
    if differing is not None and stored.get(differing):  # of other classes, if it can be built for those
        as_trained = UserNetwork(network.path, stored[differing][0])
        check_same(as_trained.shapes, stored, network.path, what)
    else:
        check_same(wanted, stored, network.path, what)
    ordered = {key: source[key] for key in wanted if key in source}
    target = None if differing is None else Target(ordered, {key: wanted[key] for key in ordered})
    return target, {key: value for key, value in built.items() if key not in source}


def shapes_of(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the network that params describe."""
    return parameter_shapes(described(params), image_shape_of(params), int(params["model::o_dim"]))


def describe(plan: SamplePlan) -> str:
    """The plan in a few lines."""
    config, images = plan.config, plan.images
    shown = (
        f"{images.name}: {'x'.join(map(str, images.shape))}, {images.classes} classes"
        if images is not None
        else f"none, so that nothing is measured: {plan.why_no_images}"
    )
    lines = [
        f"model      {plan.model}",
        f"anchors    {plan.anchors.words}",
        f"images     {shown}",
        f"networks   {_described_networks(plan)}",
        f"methods    {', '.join(config.methods)}",
        f"draws      {config.candidates} candidates and {config.repetitions} kept of each method",
        f"results    {plan.output}",
    ]
    if plan.target is not None:
        lines[4:4] = [f"target     {line}" for line in plan.target.describe()]
    lines += [f"warning    {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def _described_networks(plan: SamplePlan) -> str:
    """What they are, how the best anchor was trained, and what becomes of what was not decoded."""
    known = [f"{key.split('::')[1]} {plan.recipe[key]}" for key in _RECIPE if key in plan.recipe]
    trained = f", trained as the best anchor was: {', '.join(known)}" if known else ""
    if plan.network is None:
        return f"{plan.recipe.get('model::type', plan.anchors.architecture.name)}{trained}"
    lines = [f"{plan.network.path}(){trained or '; the store does not say how they were trained'}"]
    norms = sum(isinstance(module, _BatchNorm) for module in plan.network.build().modules())
    if norms and plan.images is not None:
        count = min(IMAGES, len(plan.images.rows["train"]))
        lines.append(f"statistics of {norms} batch norms: {_STATISTICS[plan.config.batch_norm].format(count)}")
    left = [key for key in plan.rest if not key.endswith("num_batches_tracked")]
    if left:
        lines.append(f"not in the store, as the network is built: {', '.join(left[:5])}{', ...' * (len(left) > 5)}")
    return "\n           ".join(lines)


_STATISTICS = {
    "reset": "estimated from {} training images",
    "published": "decoded, and then averaged with those of {} training images",
    "keep": "as decoded",
}

_RECIPE = ("model::nlin", "model::dropout", "optim::optimizer", "optim::lr", "optim::wd", "training::batchsize")
