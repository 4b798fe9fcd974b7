"""Permutation symmetries: which axes of a network's weights may be reordered together without changing its function."""

from sane_ray.tokens.symmetry.axes import (
    Axis,
    Indices,
    Part,
    Symmetry,
    gather_indices,
    order_of,
    permute,
    random_permutations,
)
from sane_ray.tokens.symmetry.families import derive_symmetry

__all__ = [
    "Axis",
    "Indices",
    "Part",
    "Symmetry",
    "derive_symmetry",
    "gather_indices",
    "order_of",
    "permute",
    "random_permutations",
]
