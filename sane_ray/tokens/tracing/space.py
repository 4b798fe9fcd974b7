"""Which axes of which tensors must be reordered together: union-find over axes that can be cut and factored.

An axis is a sum of segments (``cat``, ``chunk``), a segment a product of factors from the outermost to the innermost
(``view``, ``flatten``), a factor an atom, which may be permuted, or a number of entries that stay in place. Tying two
axes cuts and factors their atoms until they match, then merges them; where they cannot match, atoms are pinned. Pinning
is always sound: it only takes permutations away. This module knows nothing of networks or torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

Segment = tuple[int, ...]
"""Product of factors: an atom's number, or minus the number of fixed entries. Factors of one entry are left out."""
Dim = tuple[Segment, ...]
"""Sum of segments."""

MOST_SEGMENTS = 4096
"""An axis of more segments than this is pinned: nobody could read it, and every gather would walk it."""


def fixed(size: int) -> Dim:
    """An axis that stays as it is."""
    return (_fixed(size),) if size else ()


def _fixed(size: int) -> Segment:
    return () if size == 1 else (-size,)


class Space:
    """The atoms of a network, and what they have been found to be."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._same: list[int] = []
        self._made_of: dict[int, Dim] = {}
        self._pinned: set[int] = set()

    def fresh(self, size: int) -> Dim:
        """An axis that nothing is known of yet."""
        if size <= 1:
            return fixed(size)
        self._sizes.append(size)
        self._same.append(len(self._same))
        return ((len(self._sizes) - 1,),)

    def size(self, dim: Dim) -> int:
        """Entries of an axis."""
        return sum(map(self.segment_size, dim))

    def segment_size(self, segment: Iterable[int]) -> int:
        """Entries of a segment."""
        return math.prod(-factor if factor < 0 else self._sizes[factor] for factor in segment)

    def resolve(self, dim: Dim) -> Dim:
        """The axis in atoms that are neither pinned nor made of others."""
        found: list[Segment] = []
        for segment in dim:
            for part in self._resolve_segment(segment):
                if found and _is_fixed(part) and _is_fixed(found[-1]):
                    found[-1] = _fixed(self.segment_size(found[-1]) + self.segment_size(part))
                else:
                    found.append(part)
        return tuple(found)

    def pin(self, dim: Dim) -> Dim:
        """Fixes an axis, and returns it."""
        for segment in self.resolve(dim):
            self._pinned.update(factor for factor in segment if factor >= 0)
        return fixed(self.size(dim))

    def times(self, *dims: Dim) -> Dim:
        """Axes flattened into one, the outermost first."""
        product: list[Segment] = [()]
        for dim in dims:
            product = self._times(product, self.resolve(dim))
        return self.resolve(tuple(product))

    def tie(self, first: Dim, second: Dim) -> Dim:
        """Makes two axes of the same length move alike, and returns the axis."""
        left, right = list(self.resolve(first)), list(self.resolve(second))
        while left and right:
            a, b = self._next(left), self._next(right)
            size_a, size_b = self.segment_size(a), self.segment_size(b)
            if size_a == size_b:
                self._tie_segments(a, b)
            elif size_a > size_b:
                head, tail = self._cut_segment(a, size_b)
                left[:0], right[:0] = [*head, *tail], [b]
            else:
                head, tail = self._cut_segment(b, size_a)
                left[:0], right[:0] = [a], [*head, *tail]
        return self.resolve(first)

    def cut(self, dim: Dim, at: int) -> tuple[Dim, Dim]:
        """The entries before and from ``at`` on: from now on they only move among themselves."""
        head: list[Segment] = []
        tail = list(self.resolve(dim))
        while tail and at > 0:
            segment = self._next(tail)
            size = self.segment_size(segment)
            if size > at:
                before, after = self._cut_segment(segment, at)
                head += before
                tail[:0] = after
                break
            head.append(segment)
            at -= size
        return tuple(head), tuple(tail)

    def split(self, dim: Dim, sizes: list[int]) -> list[Dim]:
        """An axis as several, the outermost first: the inverse of ``times``."""
        dim = self.resolve(dim)
        if len(sizes) == 1:
            return [dim]
        inner = math.prod(sizes[1:])
        if any(self.segment_size(segment) % inner for segment in dim):
            pieces, rest = [], dim
            for _ in range(sizes[0]):
                piece, rest = self.cut(rest, inner)
                pieces.append(piece)
            outer: Dim = fixed(sizes[0])
        else:
            halves = [self._split_segment(segment, inner) for segment in dim]
            outer = tuple(segment for before, _ in halves for segment in before)
            pieces = [after for _, after in halves]
        for piece in pieces[1:]:
            self.tie(pieces[0], piece)
        return [outer, *self.split(pieces[0], sizes[1:])]

    def settle(self, dims: Iterable[Dim]) -> None:
        """Pins what a ``Symmetry`` cannot say: two permutations in one product, or two block sizes in one axis.

        Of a product the outermost atom stays free (heads, not the entries of a head).
        """
        kept, before = list(dims), -1
        while before != len(self._pinned):
            before = len(self._pinned)
            for dim in kept:
                self._settle(dim)

    def blocks(self, dim: Dim) -> tuple[int, list[int]]:
        """Block size of a settled axis, and its segments: an atom's number, or minus a number of fixed blocks."""
        dim = self.resolve(dim)
        block = max((self._block(segment) for segment in dim if not _is_fixed(segment)), default=1)
        found: list[int] = []
        for segment in dim:
            if _is_fixed(segment):
                found.append(-(self.segment_size(segment) // block))
            else:
                copies = -segment[0] if segment[0] < 0 else 1
                found += [next(factor for factor in segment if factor >= 0)] * copies
        return block, found

    def atom_size(self, atom: int) -> int:
        """Entries of an atom."""
        return self._sizes[atom]

    def _settle(self, dim: Dim) -> None:
        for segment in self.resolve(dim):
            for atom in [factor for factor in segment if factor >= 0][1:]:
                self._pinned.add(atom)
        self._keep_one_block_size(self.resolve(dim))
        if len(self.blocks(dim)[1]) > MOST_SEGMENTS:
            self.pin(dim)

    def _keep_one_block_size(self, dim: Dim) -> None:
        """Pins the segments of all block sizes but one: that which leaves most entries free and divides the rest."""
        entries: dict[int, int] = {}
        for segment in dim:
            if not _is_fixed(segment):
                block = self._block(segment)
                entries[block] = entries.get(block, 0) + self.segment_size(segment)
        for block in sorted(entries, key=lambda each: (-entries[each], each)):
            others = [segment for segment in dim if _is_fixed(segment) or self._block(segment) != block]
            if all(self.segment_size(segment) % block == 0 for segment in others):
                self.pin(tuple(others))
                return
        self.pin(dim)

    def _block(self, segment: Segment) -> int:
        """Entries that move as one with the segment's outermost atom."""
        place = next(place for place, factor in enumerate(segment) if factor >= 0)
        return self.segment_size(segment[place + 1 :])

    def _root(self, atom: int) -> int:
        while self._same[atom] != atom:
            atom = self._same[atom]
        return atom

    def _resolve_segment(self, segment: Segment) -> list[Segment]:
        product: list[Segment] = [()]
        for factor in segment:
            root = self._root(factor) if factor >= 0 else factor
            if root < 0 or root in self._pinned:
                inner: Dim = fixed(self.segment_size((root,)))
            elif root in self._made_of:
                inner = self.resolve(self._made_of[root])
            else:
                inner = ((root,),)
            product = self._times(product, inner)
        return product

    def _times(self, outer: list[Segment], inner: Dim) -> list[Segment]:
        copies = sum(1 if not segment else -segment[0] for segment in outer)
        unreadable = not all(map(_is_fixed, outer)) or copies * len(inner) > MOST_SEGMENTS
        if len(inner) != 1 and outer != [()] and unreadable:
            inner = self.pin(inner)
        if len(inner) != 1:
            return [segment for _ in range(copies) for segment in inner]
        return [_merge(segment + inner[0]) for segment in outer]

    def _next(self, queue: list[Segment]) -> Segment:
        """Takes the first segment off a queue, as far as it is now known."""
        first, *rest = self._resolve_segment(queue.pop(0))
        queue[:0] = rest
        return first

    def _cut_segment(self, segment: Segment, at: int) -> tuple[list[Segment], list[Segment]]:
        known = self._resolve_segment(segment)
        if known != [segment]:
            head, tail = self.cut(tuple(known), at)
            return list(head), list(tail)
        if _is_fixed(segment):
            return [_fixed(at)], [_fixed(self.segment_size(segment) - at)]
        first, inner = segment[0], segment[1:]
        block = self.segment_size(inner)
        whole, rest = divmod(at, block)
        size = self.segment_size((first,))
        if first >= 0 and not rest:
            start, end = self.fresh(whole), self.fresh(size - whole)
            self._made_of[first] = start + end
            return [_merge(start[0] + inner)], [_merge(end[0] + inner)]
        if first >= 0:
            self._pinned.add(first)
        before = [_merge(_fixed(whole) + inner)] if whole else []
        left = size - whole - bool(rest)
        after = [_merge(_fixed(left) + inner)] if left else []
        if rest:
            head_rest, tail_rest = self._cut_segment(inner, rest)
            return before + head_rest, tail_rest + after
        return before, after

    def _split_segment(self, segment: Segment, inner: int) -> tuple[Dim, Dim]:
        """A segment as an outer and an inner axis of ``inner`` entries."""
        need = self.segment_size(segment) // inner
        outer: Segment = ()
        for place, factor in enumerate(segment):
            if need == 1:
                return (_merge(outer),), (segment[place:],)
            size = self.segment_size((factor,))
            if need % size == 0:
                outer, need = (*outer, factor), need // size
                continue
            if size % need:
                break
            first, second = self._factor(factor, need)
            return (_merge(outer + first),), (_merge(second + segment[place + 1 :]),)
        if need == 1:
            return (_merge(outer),), ((),)
        self.pin((segment,))
        return fixed(self.segment_size(segment) // inner), fixed(inner)

    def _factor(self, factor: int, outer: int) -> tuple[Segment, Segment]:
        """A factor as a product whose first has ``outer`` entries."""
        inner = self.segment_size((factor,)) // outer
        if factor < 0 or factor in self._pinned:
            return _fixed(outer), _fixed(inner)
        first, second = self.fresh(outer)[0], self.fresh(inner)[0]
        self._made_of[factor] = (first + second,)
        return first, second

    def _tie_segments(self, a: Segment, b: Segment) -> None:
        if [a] != self._resolve_segment(a) or [b] != self._resolve_segment(b):
            self.tie((a,), (b,))
            return
        left, right = a, b
        while left and right:
            size_a, size_b = self.segment_size(left[:1]), self.segment_size(right[:1])
            if max(size_a, size_b) % min(size_a, size_b):
                self.pin((a,))
                self.pin((b,))
                return
            if size_a > size_b:
                first, second = self._factor(left[0], size_b)
                left = first + second + left[1:]
            elif size_b > size_a:
                first, second = self._factor(right[0], size_a)
                right = first + second + right[1:]
            self._tie_factors(left[0], right[0])
            left, right = self._again(left[1:]), self._again(right[1:])

    def _again(self, segment: Segment) -> Segment:
        """The rest of a product after its atoms may have changed; a sum in it is pinned."""
        found = self._resolve_segment(segment)
        if len(found) > 1:
            self.pin(tuple(found))
            found = self._resolve_segment(segment)
        return found[0] if len(found) == 1 else _fixed(self.segment_size(segment))

    def _tie_factors(self, a: int, b: int) -> None:
        if a < 0 or b < 0 or a in self._pinned or b in self._pinned:
            self._pinned.update(atom for atom in (a, b) if atom >= 0)
        else:
            self._same[b] = a


def _is_fixed(segment: Segment) -> bool:
    return all(factor < 0 for factor in segment)


def _merge(segment: Segment) -> Segment:
    """A product with neighbouring fixed factors made one."""
    found: list[int] = []
    for factor in segment:
        if factor < 0 and found and found[-1] < 0:
            found[-1] *= -factor
        else:
            found.append(factor)
    return tuple(found)
