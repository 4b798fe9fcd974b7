"""The small networks of our zoos: the two published ones and those for 8x8 images, each written once as layers.

A network is rebuilt from a model's ``params.json`` alone. This module never trains and never touches the global random
state: an initialisation depends on nothing but the seed in the params.

Dropout never has a place of its own but in ``cnn_l``: it sits inside the activation, so that the keys of a state dict
do not depend on the dropout rate (the published code shifts them, which makes two architectures of one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sane_ray.errors import InputError


@dataclass(frozen=True)
class Conv:
    """A convolution of stride 1."""

    channels: int
    kernel: int
    padding: int = 0


@dataclass(frozen=True)
class Pool:
    """Maximum over 2x2 pixels; an odd last row or column is left out."""


@dataclass(frozen=True)
class Activation:
    """The model's non-linearity, followed by its dropout where the architecture has it here."""

    dropout: bool = False


@dataclass(frozen=True)
class Dropout:
    """The model's dropout, at a place of its own."""


@dataclass(frozen=True)
class Flatten:
    """Channels, rows and columns become one axis, channels slowest."""


@dataclass(frozen=True)
class Linear:
    """A fully connected layer; ``None`` features are the number of classes."""

    features: int | None


Layer = Conv | Pool | Activation | Dropout | Flatten | Linear


@dataclass(frozen=True)
class Architecture:
    """A network as a list of layers; layer i has the keys ``module_list.{i}.weight`` and ``module_list.{i}.bias``."""

    name: str
    published_name: str
    """What ``model::type`` says in a params.json."""
    image_size: int
    """Height and width of the images it is meant for."""
    layers: tuple[Layer, ...]


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "digits_cnn",
            "digits_cnn",
            8,
            (
                Conv(8, 3, padding=1),
                Pool(),
                Activation(dropout=True),
                Conv(10, 3),
                Activation(dropout=True),
                Flatten(),
                Linear(24),
                Activation(dropout=True),
                Linear(None),
            ),
        ),
        Architecture(
            "cnn_s",
            "CNN",
            28,
            (
                Conv(8, 5),
                Pool(),
                Activation(dropout=True),
                Conv(6, 5),
                Pool(),
                Activation(dropout=True),
                Conv(4, 2),
                Activation(),
                Flatten(),
                Linear(20),
                Activation(dropout=True),
                Linear(None),
            ),
        ),
        Architecture(
            "cnn_l",
            "CNN3",
            32,
            (
                Conv(16, 3),
                Pool(),
                Activation(),
                Dropout(),
                Conv(32, 3),
                Pool(),
                Activation(),
                Dropout(),
                Conv(15, 3),
                Pool(),
                Activation(),
                Dropout(),
                Flatten(),
                Linear(20),
                Activation(),
                Dropout(),
                Linear(None),
            ),
        ),
        Architecture(
            "digits_cnn_wide",
            "digits_cnn_wide",
            8,
            (
                Conv(16, 3, padding=1),
                Pool(),
                Activation(dropout=True),
                Conv(20, 3),
                Activation(dropout=True),
                Flatten(),
                Linear(48),
                Activation(dropout=True),
                Linear(None),
            ),
        ),
        Architecture(
            "digits_cnn_deep",
            "digits_cnn_deep",
            8,
            (
                Conv(8, 3, padding=1),
                Pool(),
                Activation(dropout=True),
                Conv(10, 3),
                Activation(dropout=True),
                Conv(10, 3, padding=1),
                Activation(dropout=True),
                Flatten(),
                Linear(24),
                Activation(dropout=True),
                Linear(None),
            ),
        ),
    )
}
"""By name. Keys, shapes and parameter counts of ``cnn_s`` (2,464 with 1 channel) and ``cnn_l`` (10,853 with 3) are
those of the published zoos; ``digits_cnn`` has 2,044 parameters in 52 channels of at most 73 values (bias included).
``digits_cnn_wide`` (7,438) has twice its channels and ``digits_cnn_deep`` (2,954) a convolution more."""

AUTO = ("digits_cnn", "cnn_s", "cnn_l")
"""What ``auto`` chooses among: one architecture for each size of images."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
"""By the published names."""

BIAS = 0.01
"""Value of every bias at initialisation, as in the published zoos."""


class ZooNet(nn.Module):
    """A network of the zoo: its layers one after the other, in ``module_list``."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(modules)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, classes]."""
        x = images_BCHW
        for module in self.module_list:
            x = module(x)
        return x


def architecture_for(name: str, image_shape: tuple[int, int, int]) -> Architecture:
    """The architecture of that name, or with ``auto`` the one meant for images of that size.

    Args:
        name: key of ``ARCHITECTURES``, or ``auto``.
        image_shape: channels, height, width.

    Raises:
        InputError: no architecture has the name, or is meant for the size, or the images are too small for it.
    """
    _, height, width = image_shape
    if name == "auto":
        choices = [ARCHITECTURES[choice] for choice in AUTO]
        for architecture in choices:
            if height == width == architecture.image_size:
                return architecture
        sizes = ", ".join(f"{each.image_size}x{each.image_size} ({each.name})" for each in choices)
        raise InputError(
            f"zoo.architecture 'auto' knows images of {sizes}, these are {height}x{width}: "
            "resize them, or name an architecture"
        )
    if name not in ARCHITECTURES:
        raise InputError(f"zoo.architecture is {name!r}: must be one of auto, {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    parameter_shapes(architecture, image_shape, classes=2)
    return architecture


def parameter_shapes(
    architecture: Architecture, image_shape: tuple[int, int, int], classes: int
) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its key, in the order of the state dict.

    Raises:
        InputError: the images are too small: nothing is left of them after a convolution or a pooling.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    channels, height, width = image_shape
    features = 0
    for index, layer in enumerate(architecture.layers):
        match layer:
            case Conv():
                shapes[f"module_list.{index}.weight"] = (layer.channels, channels, layer.kernel, layer.kernel)
                shapes[f"module_list.{index}.bias"] = (layer.channels,)
                grow = 2 * layer.padding - layer.kernel + 1
                channels, height, width = layer.channels, height + grow, width + grow
            case Pool():
                height, width = height // 2, width // 2
            case Flatten():
                features = channels * height * width
            case Linear():
                out = classes if layer.features is None else layer.features
                shapes[f"module_list.{index}.weight"] = (out, features)
                shapes[f"module_list.{index}.bias"] = (out,)
                features = out
        if min(height, width) < 1:
            raise InputError(
                f"images of {image_shape[1]}x{image_shape[2]} are too small for zoo.architecture "
                f"{architecture.name!r}, which is meant for {architecture.image_size}x{architecture.image_size}: "
                "name another one, or resize the images"
            )
    return shapes


def from_params(params: Mapping[str, Any]) -> ZooNet:
    """The untrained network that a ``params.json`` describes, initialised from its seed; in training mode.

    Args:
        params: flat, with the published keys ``model::type`` (``CNN`` or ``CNN3``, or a name of ours),
            ``model::channels_in``, ``model::o_dim``, ``model::nlin``, ``model::dropout``, ``model::init_type``,
            ``seed``; and ``model::image_height``, ``model::image_width`` where not the architecture's own.

    Raises:
        InputError: a key is missing, or has a value that names nothing we know.
    """
    architecture = described(params)
    image_shape = image_shape_of(params)
    classes = int(_value(params, "model::o_dim"))
    shapes = parameter_shapes(architecture, image_shape, classes)
    with torch.device("meta"):  # the constructors' own initialisation would draw from the global random state
        modules = [_module(index, layer, shapes, params) for index, layer in enumerate(architecture.layers)]
    net = ZooNet(modules).to_empty(device="cpu")
    initialize(net, str(_value(params, "model::init_type")), generator(params, "initialization"))
    return net


def described(params: Mapping[str, Any]) -> Architecture:
    """The architecture that ``model::type`` of a params.json names."""
    kind = _value(params, "model::type")
    for architecture in ARCHITECTURES.values():
        if kind in (architecture.name, architecture.published_name):
            return architecture
    known = ", ".join(each.published_name for each in ARCHITECTURES.values())
    raise InputError(f"params key model::type is {kind!r}: must be one of {known}")


def image_shape_of(params: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of the images that a params.json's network takes."""
    size = described(params).image_size
    height, width = (params.get(f"model::image_{side}", size) for side in ("height", "width"))
    return int(_value(params, "model::channels_in")), int(height), int(width)


def generator(params: Mapping[str, Any], stream: str) -> torch.Generator:
    """A random generator that depends on the params' seed and the stream's name alone.

    Each use of randomness has its own stream, so that none shifts another.
    """
    state = np.random.SeedSequence([int(_value(params, "seed")), *stream.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def initialize(net: nn.Module, init_type: str, generator: torch.Generator) -> None:
    """Fills a network's weights in place; biases become ``BIAS``.

    ``uniform`` is U(-1/sqrt(fan_in), 1/sqrt(fan_in)) and ``normal`` is N(0, 0.1): the published code takes
    U(0, 1) and N(0, 1), which saturate networks of this size. The others are those of ``torch.nn.init``.

    Raises:
        InputError: ``init_type`` is none of ``INITIALIZATIONS``.
    """
    if init_type not in INITIALIZATIONS:
        raise InputError(f"params key model::init_type is {init_type!r}: must be one of {', '.join(INITIALIZATIONS)}")
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                INITIALIZATIONS[init_type](module.weight, generator)
                module.get_parameter("bias").fill_(BIAS)


def _uniform(weight: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound, generator=generator)


INITIALIZATIONS: dict[str, Callable[[Tensor, torch.Generator], object]] = {
    "uniform": _uniform,
    "normal": lambda weight, generator: nn.init.normal_(weight, std=0.1, generator=generator),
    "kaiming_uniform": lambda weight, generator: nn.init.kaiming_uniform_(weight, generator=generator),
    "kaiming_normal": lambda weight, generator: nn.init.kaiming_normal_(weight, generator=generator),
    "xavier_uniform": lambda weight, generator: nn.init.xavier_uniform_(weight, generator=generator),
    "xavier_normal": lambda weight, generator: nn.init.xavier_normal_(weight, generator=generator),
}
"""By the published names."""


def _module(index: int, layer: Layer, shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, Any]) -> nn.Module:
    rate = float(params.get("model::dropout") or 0.0)
    match layer:
        case Conv():
            out, channels, kernel, _ = shapes[f"module_list.{index}.weight"]
            return nn.Conv2d(channels, out, kernel, padding=layer.padding)
        case Pool():
            return nn.MaxPool2d(2)
        case Activation():
            activation = activation_of(params)
            return nn.Sequential(activation, nn.Dropout(rate)) if layer.dropout else activation
        case Dropout():
            return nn.Dropout(rate)
        case Flatten():
            return nn.Flatten()
        case Linear():
            out, features = shapes[f"module_list.{index}.weight"]
            return nn.Linear(features, out)


def activation_of(params: Mapping[str, Any]) -> nn.Module:
    """The non-linearity that ``model::nlin`` names.

    Raises:
        InputError: it names none of ``ACTIVATIONS``.
    """
    name = _value(params, "model::nlin")
    if name not in ACTIVATIONS:
        raise InputError(f"params key model::nlin is {name!r}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _value(params: Mapping[str, Any], key: str) -> Any:
    if key not in params:
        raise InputError(
            f"params have no key {key!r} (they have {', '.join(sorted(params))}): the model cannot be rebuilt"
        )
    return params[key]
