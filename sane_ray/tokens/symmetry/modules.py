"""The modules of a network, as a layer table's keys and shapes show them."""

from __future__ import annotations

from collections.abc import Mapping

from sane_ray.tokens.symmetry.axes import shapes_of
from sane_ray.tokens.tokenizer import LayerTable

Tensors = Mapping[str, tuple[int, ...]]
Modules = dict[str, dict[str, tuple[int, ...]]]
"""Shapes of the tensors of each module, by their last names."""


def modules_of(table: LayerTable) -> Modules:
    """The modules of an architecture, tokenised or not; scalars and counters are left out."""
    modules: Modules = {}
    for key, shape in shapes_of(table).items():
        module, _, name = key.rpartition(".")
        if shape and name != "num_batches_tracked":
            modules.setdefault(module, {})[name] = shape
    return modules


def is_layer(tensors: Tensors) -> bool:
    """Whether a module is a convolution or linear layer: a weight, and at most one bias a channel."""
    weight = tensors.get("weight", ())
    return len(weight) >= 2 and tensors.keys() <= {"weight", "bias"} and tensors.get("bias", weight[:1]) == weight[:1]


def is_batch_norm(tensors: Tensors) -> bool:
    """Whether a module is a batch norm: running statistics, and at most weight and bias of the same length."""
    statistics = {"running_mean", "running_var"}
    one_length = len(set(tensors.values())) == 1 and all(len(shape) == 1 for shape in tensors.values())
    return one_length and statistics <= tensors.keys() <= statistics | {"weight", "bias"}
