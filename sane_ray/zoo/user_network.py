"""Networks of the user's own: a function on their PYTHONPATH builds them, so that they can be measured and trained.

The function is imported by its name and called, never fetched and never unpickled. This module never trains, never
reads weights, and never imports Ray.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sane_ray.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class UserNetwork:
    """A function of the user's that builds a network, and the number of classes it is built for.

    Travels between processes as its name: each imports the function for itself.
    """

    path: str
    """``package.module:function``."""
    classes: int

    def __call__(self) -> nn.Module:
        """Builds the network, which torch's random state initialises.

        Raises:
            InputError: the function cannot be imported or called, or returns no module.
        """
        function = self.function()
        arguments = {"classes": self.classes} if _takes_classes(function) else {}
        try:
            network = function(**arguments)
        except Exception as error:  # it is anyone's code
            how = f"classes={self.classes}" if arguments else ""
            raise InputError(
                f"network {self.path!r}: calling it with ({how}) raised {type(error).__name__}: {error}; it must build "
                "the network without arguments, or with the keyword `classes` alone"
            ) from error
        if not isinstance(network, nn.Module):
            raise InputError(
                f"network {self.path!r} returns a {type(network).__name__}: it must return the network, a "
                "torch.nn.Module"
            )
        return network

    def build(self, seed: int = 0) -> nn.Module:
        """The network as it is initialised with torch's random state seeded; that state is put back."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self()

    def function(self) -> Callable[..., Any]:
        """What ``path`` names.

        Raises:
            InputError: it is no name of a function, or cannot be imported.
        """
        module_name, _, name = self.path.partition(":")
        if not module_name or not name.isidentifier():
            raise InputError(f"network is {self.path!r}: give package.module:function, such as my_networks:resnet")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # it is anyone's code
            raise InputError(
                f"network {self.path!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}): "
                "put the folder that it is in on PYTHONPATH, on all nodes of the cluster"
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            what = f"has no {name!r}" if function is None else f"has {name!r}, a {type(function).__name__}"
            raise InputError(f"network {self.path!r}: {module.__name__} {what}: name a function that builds it")
        return function

    @property
    def source(self) -> str:
        """Digest of the file that the function is in, 8 hex digits: when it changes, so may the network."""
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.function()))
            return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()[:8]
        except (OSError, TypeError):
            return ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every entry of the state dict by its key, in its order."""
        return {key: tuple(value.shape) for key, value in self.state_dict().items()}

    def state_dict(self, seed: int = 0) -> dict[str, Tensor]:
        """Weights of the network as its function initialises it."""
        return {key: value.detach().clone() for key, value in self.build(seed).state_dict().items()}

    def check_answers(self, images_BCHW: Tensor) -> None:
        """Runs the network once on a few images.

        Raises:
            InputError: it does not take them, or its answers are not [B, classes].
        """
        shape = list(images_BCHW.shape)
        try:
            with torch.no_grad():
                answers = self.build().eval()(images_BCHW)
        except Exception as error:  # it is anyone's code
            raise InputError(
                f"network {self.path!r} does not take images of shape {shape} ({type(error).__name__}: {error}): name "
                "images of the shape it was written for with --images"
            ) from error
        wanted = [len(images_BCHW), self.classes]
        if not isinstance(answers, Tensor) or list(answers.shape) != wanted:
            found = list(answers.shape) if isinstance(answers, Tensor) else f"a {type(answers).__name__}"
            raise InputError(
                f"network {self.path!r} answers images of shape {shape} with {found}: it must answer with logits of "
                f"shape {wanted}, as the images have {self.classes} classes"
            )


def check_same(wanted: Shapes, found: Shapes, path: str, what: str) -> None:
    """Checks that a network has the keys and shapes of given weights.

    Args:
        wanted: of the network.
        found: of the weights.
        path: name of the network, for the message.
        what: whose the weights are, for the message.

    Raises:
        InputError: names the first key that differs, and both shapes.
    """
    for key in {**wanted, **found}:
        if wanted.get(key) != found.get(key):
            raise InputError(
                f"network {path!r} does not fit {what}: {key} is {_shape(wanted.get(key))} in the network and "
                f"{_shape(found.get(key))} in {what}; name the function that builds those networks"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _takes_classes(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with ``classes`` by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD or (parameter.name == "classes" and parameter.kind in by_name)
        for parameter in parameters
    )
