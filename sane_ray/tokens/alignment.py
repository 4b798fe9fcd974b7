"""Aligns a network to a reference: the permutation of its hidden channels that brings its weights closest.

Networks that differ by the order of their channels are one function, but far apart as vectors. Weight matching
(Git Re-Basin, Ainsworth et al., arXiv 2209.04836, algorithm 1) maximises the inner product of the reference and the
permuted network by coordinate ascent: one permutation of the symmetry after the other, in an order drawn at random,
the others held still, each an exact linear assignment. It ends where no single permutation can be improved. Which axes
belong together is the symmetry's knowledge; this module never looks at the data that a network was trained on, and
never imports Ray.

What makes it fast, with the result of plain coordinate ascent:

* Each tensor lies ready once for each of its permuted axes, [M, K, n], so that a profit matrix is one gather of
  contiguous rows and one matrix product.
* A permutation is looked at again only if a neighbour has moved since; then only the moved channels are multiplied.
* The first sweep matches each permutation by what is fixed or matched already: each matrix is needed once.
* Assignments start from the potentials of the relaxed problem (entropic optimal transport) or of the last assignment,
  which leave the exact solver short augmenting paths.

Shape suffixes: n length of a permutation; M entries of the axes that other permutations reorder; K all other entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sane_ray.errors import InputError
from sane_ray.tokens.symmetry import Indices, Part, Symmetry, order_of, permute

Cost = Literal["all", "weights"]
Floats = NDArray[np.floating[Any]]

_TOLERANCE = 1e-7
"""Least gain of a move, as a change of the cosine: the rounding of float32 products."""
_RELAXED_FROM = 96
"""Length of permutation from which on solving the relaxed problem first is quicker."""
_ROUNDS = 12
"""Rounds in which potentials are tightened; more cost more than they save the next time."""


@dataclass(frozen=True)
class Alignment:
    """How to permute a network so that it matches a reference.

    Attributes:
        permutations: For each name of the symmetry its permutation, int64: channel c becomes what channel
            ``permutation[c]`` was, as ``sane_ray.tokens.symmetry.permute`` reads it.
        sweeps: Rounds over the permutations that it took.
        similarity_before: Cosine of the counted tensors of the reference and of the network as it is.
        similarity_after: The same for the permuted network; never less.
    """

    permutations: dict[str, Indices]
    sweeps: int
    similarity_before: float
    similarity_after: float


def match(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    symmetry: Symmetry,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
    cost: Cost = "all",
) -> Alignment:
    """Aligns ``other`` to ``reference``; ``permute(other, symmetry, alignment.permutations)`` is the aligned network.

    Args:
        reference: State dict that stays as it is.
        other: State dict of the same architecture.
        symmetry: Symmetry of the architecture.
        seed: Seed of the order in which permutations are visited.
        max_sweeps: Most rounds over all permutations; fewer are needed in general.
        cost: Which tensors of the symmetry count: ``all``, as published, or ``weights``, without the running statistics
            of batch norms (whose variances can outweigh everything else).

    Raises:
        InputError: The networks do not fit the symmetry or each other, or hold values that are not finite.
    """
    return Matcher(reference, symmetry, cost=cost).match(other, seed=seed, max_sweeps=max_sweeps)


class Matcher:
    """A reference made ready to align many networks to it.

    Args:
        reference: State dict that stays as it is, of any floating-point type.
        symmetry: Symmetry of the architecture.
        cost: Which tensors of the symmetry count, as in ``match``.

    Raises:
        InputError: The reference does not fit the symmetry, or holds values that are not finite.
    """

    def __init__(self, reference: Mapping[str, Tensor], symmetry: Symmetry, *, cost: Cost = "all") -> None:
        self._symmetry = symmetry
        keys = [key for key, axes in symmetry.axes.items() if any(axes) and (cost == "all" or not _is_statistic(key))]
        self._reference = {key: _values(reference, key, symmetry) for key in keys}
        self._squares = _squares(self._reference, "the reference")
        found = [term for key, values in self._reference.items() for term in _terms(key, values, symmetry)]
        self._terms = {name: [term for term in found if term.name == name] for name in sorted({t.name for t in found})}
        self._neighbours = {name: {n for term in terms for n in term.sources} for name, terms in self._terms.items()}
        self._whole = {term.key for term in found if term.is_whole}

    def match(self, other: Mapping[str, Tensor], *, seed: int = 0, max_sweeps: int = 100) -> Alignment:
        """Aligns a network to the reference; see ``sane_ray.tokens.alignment.match``."""
        if max_sweeps < 1:
            raise InputError(f"max_sweeps is {max_sweeps}: it must be at least 1")
        values = {key: _values(other, key, self._symmetry, mine.shape) for key, mine in self._reference.items()}
        squares = _squares(values, "the network to align")
        norm = math.sqrt(sum(self._squares.values()) * sum(squares.values())) or 1.0
        permutations = {name: np.arange(size) for name, size in self._symmetry.sizes.items()}
        blocks = {name: _Block(name, terms, self._reference, values) for name, terms in self._terms.items()}
        rng = np.random.default_rng(seed)
        before = sum(_dot(mine, values[key]) for key, mine in self._reference.items())
        start = self._begin(blocks, permutations, rng, before + _TOLERANCE * norm, values)
        visits, gained = self._ascend(blocks, permutations, rng, (max_sweeps - 1) * len(blocks), _TOLERANCE * norm)
        after = (before if start is None else start) + gained
        return Alignment(permutations, 1 + -(-visits // max(len(blocks), 1)), before / norm, after / norm)

    def _begin(
        self,
        blocks: Mapping[str, _Block],
        permutations: dict[str, Indices],
        rng: np.random.Generator,
        least: float,
        values: Mapping[str, Tensor],
    ) -> float | None:
        """The first sweep, by what is known so far: the order of a neighbour that has not been matched says nothing.

        Returns:
            The similarity that was reached; None if it is below ``least``, then the permutations stay as they were
            (the networks are close as they are).
        """
        present, known, similarity = dict(permutations), set[str](), 0.0
        waiting = [list(blocks)[place] for place in rng.permutation(len(blocks))]
        while waiting:
            name = next((name for name in waiting if blocks[name].knows(known)), waiting[0])
            waiting.remove(name)
            permutations[name], profit = blocks[name].begin(permutations, known)
            known.add(name)
            similarity += profit
        for key in self._reference.keys() - self._whole:
            similarity += _dot(self._reference[key], _permuted(values[key], key, self._symmetry, permutations))
        if similarity > least:
            return similarity
        permutations.update(present)
        return None

    def _ascend(
        self,
        blocks: Mapping[str, _Block],
        permutations: dict[str, Indices],
        rng: np.random.Generator,
        most: int,
        least: float,
    ) -> tuple[int, float]:
        """Improves one permutation at a time until none can be; returns how often it tried, and what was gained.

        Next is the one whose neighbours have moved most since it was tried, at first and among equals a random one:
        others would have to be tried again.
        """
        names, gained = [list(blocks)[place] for place in rng.permutation(len(blocks))], 0.0
        moved = dict.fromkeys(names, 1.0)
        for visit in range(most):
            name = max(names, key=moved.__getitem__, default=None)
            if name is None or not moved[name]:
                return visit, gained
            moved[name] = 0.0
            order, gain = blocks[name].improve(permutations, self._symmetry)
            if gain > least:
                fraction = float(np.mean(order != permutations[name]))
                permutations[name], gained = order, gained + gain
                for neighbour in self._neighbours[name]:
                    moved[neighbour] += fraction
        return most, gained


@dataclass(frozen=True)
class _Term:
    """What a tensor says about a permutation through one part of one of its axes."""

    key: str
    name: str
    axis: int
    part: Part
    axes: tuple[int, ...]
    """The other axes with permutations; their entries are M."""
    parts: tuple[tuple[Part, ...], ...]
    """How these axes are permuted."""
    sources: frozenset[str]
    """The permutations of these axes."""
    reference_MKn: Floats
    is_whole: bool
    """Whether each axis of the tensor has one part, and no two the same permutation: then this term is all of it."""

    @property
    def is_vector(self) -> bool:
        """Whether the tensor has one value for each channel."""
        return self.is_whole and self.reference_MKn.shape[:2] == (1, 1)

    @property
    def is_coupled(self) -> bool:
        """Whether the tensor has the permutation on another axis too, so that its profit is not linear in it."""
        return self.name in self.sources

    def arrange(self, values: Tensor) -> Floats:
        """Another network's tensor as [M, K, n], contiguous."""
        return _arrange(values, self.axis, self.part, self.axes)

    def gather(self, permutations: Mapping[str, Indices]) -> Indices:
        """Sources of the M entries."""
        indices: Indices = np.zeros(1, np.int64)
        for parts in self.parts:
            order = order_of(parts, permutations)
            indices = (indices[:, None] * len(order) + order).reshape(-1) if len(indices) > 1 else order
        return indices


def _terms(key: str, values: Tensor, symmetry: Symmetry) -> list[_Term]:
    parts = [symmetry.parts(key, axis, length) for axis, length in enumerate(values.shape)]
    named = [axis for axis, its in enumerate(parts) if any(part.name is not None for part in its)]
    names = [part.name for its in parts for part in its if part.name is not None]
    is_whole = len(set(names)) == len(names) and all(len(its) == 1 for its in parts)
    terms = []
    for axis in named:
        others = tuple(other for other in named if other != axis)
        their = tuple(parts[other] for other in others)
        sources = frozenset(part.name for its in their for part in its if part.name is not None)
        for part in parts[axis]:
            if part.name is not None:
                arranged = _arrange(values, axis, part, others)
                terms.append(_Term(key, part.name, axis, part, others, their, sources, arranged, is_whole))
    return terms


def _arrange(values: Tensor, axis: int, part: Part, others: tuple[int, ...]) -> Floats:
    rest = [other for other in range(values.dim()) if other != axis and other not in others]
    moved = values.narrow(axis, part.start, part.stop - part.start)
    moved = moved.unflatten(axis, (-1, part.block)) if part.block > 1 else moved.unsqueeze(axis + 1)
    place = [other + (other > axis) for other in range(values.dim())]
    moved = moved.permute([*(place[a] for a in others), *(place[a] for a in rest), axis + 1, axis])
    entries = math.prod(values.shape[other] for other in others)
    return moved.reshape(entries, -1, (part.stop - part.start) // part.block).contiguous().numpy()


class _Profit:
    """The profit matrix of a term: what each channel of the reference gains by each channel of the other network."""

    def __init__(self, term: _Term, values: Tensor) -> None:
        self.term = term
        self.other_MKn = term.arrange(values)
        self.indices_M: Indices | None = None
        self.profit_nn: Floats = np.zeros((0, 0), np.float32)

    def refresh(self, permutations: Mapping[str, Indices], total_nn: Floats) -> None:
        """Brings the matrix, and a total that it is part of, to what the other permutations are now.

        Only entries whose sources have moved are multiplied, unless these are most.
        """
        indices_M = self.term.gather(permutations)
        if self.indices_M is None:
            self.profit_nn = self._product(slice(None), indices_M)
            total_nn += self.profit_nn
        else:
            moved = np.flatnonzero(indices_M != self.indices_M)
            if 2 * len(moved) > len(indices_M):
                total_nn -= self.profit_nn
                self.profit_nn = self._product(slice(None), indices_M)
                total_nn += self.profit_nn
            elif len(moved):
                change_nn = self._product(moved, indices_M[moved], self.indices_M[moved])
                self.profit_nn += change_nn
                total_nn += change_nn
        self.indices_M = indices_M

    def _product(self, rows: Any, indices: Indices, less: Indices | None = None) -> Floats:
        mine, theirs = self.term.reference_MKn[rows], self.other_MKn
        size = mine.shape[2]
        if len(theirs) > 1:
            theirs = theirs.take(indices, axis=0)
            if less is not None:
                theirs -= self.other_MKn.take(less, axis=0)
        product: Floats = mine.reshape(-1, size).T @ theirs.reshape(-1, size)
        return product


class _Block:
    """One permutation while a network is being aligned."""

    def __init__(
        self, name: str, terms: Sequence[_Term], reference: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> None:
        self.name = name
        self.reference, self.values = reference, values
        self.coupled = {term.key for term in terms if term.is_coupled}
        self.profits = [_Profit(term, values[term.key]) for term in terms if not term.is_vector]
        self.size = terms[0].reference_MKn.shape[2]
        self.potentials_n: Floats = np.zeros(self.size)
        self.is_new = True  # whether the total has little to do with that of the last assignment
        vectors = [term for term in terms if term.is_vector]
        self.has_vectors = bool(vectors)
        self.total_nn: Floats = np.zeros((self.size, self.size))
        if vectors:  # their profits never change; in float64, since vectors differ most in size
            mine_VC = np.stack([term.reference_MKn[0, 0] for term in vectors], dtype=np.float64)
            theirs_VC = np.stack([values[term.key].numpy() for term in vectors], dtype=np.float64)
            self.total_nn = mine_VC.T @ theirs_VC

    def knows(self, known: set[str]) -> bool:
        """Whether anything can be said about the permutation when only some others are known."""
        return self.has_vectors or any(profit.term.sources <= known for profit in self.profits)

    def begin(self, permutations: Mapping[str, Indices], known: set[str]) -> tuple[Indices, float]:
        """The best permutation by what is known, and the similarity of those whole tensors that are known with it."""
        if not self.knows(known):
            return permutations[self.name], 0.0
        similarity, rows = 0.0, np.arange(self.size)
        vectors_nn = self.total_nn.copy() if self.has_vectors else None
        used = [profit for profit in self.profits if profit.term.sources <= known]
        for profit in used:
            profit.refresh(permutations, self.total_nn)
        best = self._assign()
        if vectors_nn is not None:
            similarity += float(vectors_nn[rows, best].sum())
        similarity += sum(
            float(profit.profit_nn[rows, best].sum(dtype=np.float64)) for profit in used if profit.term.is_whole
        )
        return best, similarity

    def improve(self, permutations: Mapping[str, Indices], symmetry: Symmetry) -> tuple[Indices, float]:
        """The best permutation while the others stay, and what it gains over the present one."""
        self.is_new |= any(profit.indices_M is None for profit in self.profits)
        for profit in self.profits:
            profit.refresh(permutations, self.total_nn)
        best, present, rows = self._assign(), permutations[self.name], np.arange(self.size)
        if not self.coupled:
            return best, float((self.total_nn[rows, best] - self.total_nn[rows, present]).sum())
        return best, self._coupled_gain(best, permutations, symmetry)

    def _coupled_gain(self, best: Indices, permutations: Mapping[str, Indices], symmetry: Symmetry) -> float:
        """What a move gains where tensors have the permutation on two axes: there the assignment was only a guess."""
        after, gain = {**permutations, self.name: best}, 0.0
        for key in {profit.term.key for profit in self.profits}:
            mine, theirs = self.reference[key], self.values[key]
            gain += _dot(mine, _permuted(theirs, key, symmetry, after))
            gain -= _dot(mine, _permuted(theirs, key, symmetry, permutations))
        vectors_nn = self.total_nn - sum(profit.profit_nn for profit in self.profits)
        rows = np.arange(self.size)
        return gain + float((vectors_nn[rows, best] - vectors_nn[rows, permutations[self.name]]).sum())

    def _assign(self) -> Indices:
        """The permutation of greatest total profit."""
        if self.size < _RELAXED_FROM:
            return linear_sum_assignment(self.total_nn, maximize=True)[1]
        cost_nn = -self.total_nn
        if self.is_new:
            self.potentials_n, self.is_new = _relax(cost_nn, self.potentials_n), False
        best = linear_sum_assignment(_reduced(cost_nn, self.potentials_n))[1]
        self.potentials_n = _tighten(cost_nn, self.potentials_n, best)
        return best


def _relax(cost_nn: Floats, potentials_n: Floats) -> Floats:
    """Column potentials of the entropic transport problem, which are close to those of the assignment (Sinkhorn)."""
    for relative, iterations in ((0.1, 10), (0.1, 10), (0.05, 20)):
        kernel_nn = _reduced(cost_nn, potentials_n)
        epsilon = relative * float(kernel_nn.mean())
        if not epsilon:
            break
        kernel_nn = np.exp((kernel_nn * (-1 / epsilon)).astype(np.float32))
        columns_n: Floats = np.ones(len(cost_nn), np.float32)
        for _ in range(iterations):
            rows_n = 1 / (kernel_nn @ columns_n + 1e-30)
            columns_n = 1 / (rows_n @ kernel_nn + 1e-30)
        potentials_n = potentials_n + epsilon * np.log(columns_n.astype(np.float64))
    return potentials_n


def _reduced(cost_nn: Floats, potentials_n: Floats) -> Floats:
    """Costs less potentials of columns and rows, none negative: the best assignment is the same, but found sooner."""
    reduced_nn: Floats = cost_nn - potentials_n
    reduced_nn -= reduced_nn.min(axis=1, keepdims=True)
    return reduced_nn


def _tighten(cost_nn: Floats, potentials_n: Floats, best_n: Indices) -> Floats:
    """Potentials nearer to those that prove an assignment the best: some rounds of Bellman-Ford."""
    excess_nn = (cost_nn[:, best_n] - cost_nn[np.arange(len(cost_nn)), best_n][:, None]).astype(np.float32)
    tight_n = potentials_n[best_n].astype(np.float32)
    paths_nn = np.empty_like(excess_nn)
    for _ in range(_ROUNDS):
        np.add(excess_nn, tight_n[:, None], out=paths_nn)
        tighter_n = paths_nn.min(axis=0)  # never more than before: the diagonal of the excess is 0
        if (tighter_n == tight_n).all():
            break
        tight_n = tighter_n
    result_n = np.empty_like(potentials_n)
    result_n[best_n] = tight_n
    return result_n


def _values(state_dict: Mapping[str, Tensor], key: str, symmetry: Symmetry, shape: torch.Size | None = None) -> Tensor:
    """A tensor as float32 on the CPU, checked."""
    tensor = state_dict.get(key)
    if tensor is None:
        raise InputError(f"{key} is missing, which the symmetry permutes: align only networks of one architecture")
    if tensor.dim() != len(symmetry.axes[key]) or (shape is not None and tensor.shape != shape):
        wanted = f"{tuple(shape)} in the reference" if shape is not None else f"{len(symmetry.axes[key])} axes"
        raise InputError(f"{key} has the shape {tuple(tensor.shape)}, but must have {wanted}")
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _dot(one: Tensor, other: Tensor) -> float:
    """Inner product of two tensors: rows in float32, their sum in float64."""
    rows = len(one) if one.dim() > 1 else 1
    return float(np.vecdot(one.numpy().reshape(rows, -1), other.numpy().reshape(rows, -1)).sum(dtype=np.float64))


def _squares(values: Mapping[str, Tensor], what: str) -> dict[str, float]:
    """Squared norms, which must be finite."""
    squares = {key: _dot(tensor, tensor) for key, tensor in values.items()}
    for key, square in squares.items():
        if not math.isfinite(square):
            raise InputError(f"{key} of {what} holds values that are not finite (or too large): leave it out")
    return squares


def _permuted(tensor: Tensor, key: str, symmetry: Symmetry, permutations: Mapping[str, Indices]) -> Tensor:
    return permute({key: tensor}, symmetry, permutations)[key]


def _is_statistic(key: str) -> bool:
    return key.rpartition(".")[2] in {"running_mean", "running_var"}
