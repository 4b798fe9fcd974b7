"""Windows that cover a sequence, each with context on both sides: how a model reads a network longer than its window.

Each token is the content of one window; the tokens around a window's content, its halo, are read for context alone, and
what comes out for them is dropped. All windows of a sequence are equally long, so they go through the model as one
batch: at the ends, where there is no halo on one side, a window has more of it on the other (as published). The
published ``haloify`` ends with an assertion on most combinations of length, window and halo; where it runs, these are
its windows. Never runs a model, never imports more than torch.

Shape suffixes: N tokens of a sequence, S windows, L tokens of a window with its halo, C tokens of content, X values of
a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sane_ray.errors import InputError


@dataclass(frozen=True)
class Windows:
    """The windows ``first`` to ``stop`` of those that cover a sequence.

    Window i has the content ``i * window`` to ``(i + 1) * window``, and L = min(N, window + 2 halo) tokens from
    ``i * window - halo``, moved inwards where that is beyond an end of the sequence.

    Attributes:
        num_tokens: Length of the sequence, N.
        window: Tokens that are the content of a window; the last may have fewer.
        halo: Tokens of context on each side of it.
        first: First window.
        stop: End of the windows; -1 is all of them.

    Raises:
        InputError: A length that is not positive, a negative halo, or no such windows.
    """

    num_tokens: int
    window: int
    halo: int = 0
    first: int = 0
    stop: int = -1

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.window < 1 or self.halo < 0:
            raise InputError(
                f"{self.num_tokens} tokens in windows of {self.window} with a halo of {self.halo}: tokens and window "
                "must be positive, the halo not negative"
            )
        count = -(-self.num_tokens // self.window)
        if self.stop == -1:
            object.__setattr__(self, "stop", count)
        if not 0 <= self.first < self.stop <= count:
            raise InputError(f"windows {self.first} to {self.stop}: a sequence of {self.num_tokens} has {count}")

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def length(self) -> int:
        """Tokens of each window, L."""
        return min(self.num_tokens, self.window + 2 * self.halo)

    @property
    def starts_S(self) -> Tensor:
        """First token of each window, int64 [S]."""
        starts_S = torch.arange(self.first, self.stop) * self.window - self.halo
        return starts_S.clamp(min=0, max=self.num_tokens - self.length)

    @property
    def span(self) -> tuple[int, int]:
        """The tokens that the windows are cut from: the first, and the last + 1."""
        starts_S = self.starts_S
        return int(starts_S[0]), int(starts_S[-1]) + self.length

    @property
    def content(self) -> tuple[int, int]:
        """The tokens that are the content of the windows: the first, and the last + 1."""
        return self.first * self.window, min(self.stop * self.window, self.num_tokens)

    @property
    def indices_SL(self) -> Tensor:
        """Tokens of each window, int64 [S, L]."""
        return self.starts_S[:, None] + torch.arange(self.length)

    def cut(self, rows_nX: Tensor) -> Tensor:
        """The windows of sequences: [..., n, X], the rows of ``span``, to [..., S, L, X].

        Raises:
            InputError: There are not as many rows.
        """
        begin, end = self.span
        _check_rows(rows_nX, 1, (end - begin,), "these windows are cut from rows of")
        if len(self) == 1:
            return rows_nX.unsqueeze(-3)
        picked = rows_nX.index_select(-2, (self.indices_SL - begin).flatten().to(rows_nX.device))
        return picked.unflatten(-2, (len(self), self.length))

    def join(self, rows_SLX: Tensor) -> Tensor:
        """The content of windows: [..., S, L, X] to [..., C, X]. Undoes ``cut``.

        Raises:
            InputError: There are not as many windows, or they are not as long.
        """
        _check_rows(rows_SLX, 2, (len(self), self.length), "these windows are")
        if len(self) == 1 and self.span == self.content:
            return rows_SLX.squeeze(-3)
        tokens_C = torch.arange(*self.content)
        number_C = tokens_C // self.window - self.first
        place_C = number_C * self.length + tokens_C - self.starts_S[number_C]
        return rows_SLX.flatten(-3, -2).index_select(-2, place_C.to(rows_SLX.device))

    def split(self, at_once: int) -> Iterator[Windows]:
        """The same windows, so many at once; their contents follow each other."""
        for first in range(self.first, self.stop, at_once):
            yield dataclasses.replace(self, first=first, stop=min(first + at_once, self.stop))


def _check_rows(rows: Tensor, axes: int, wanted: tuple[int, ...], what: str) -> None:
    found = tuple(rows.shape[-1 - axes : -1])
    if found != wanted:
        raise InputError(f"rows have shape {list(rows.shape)}, but {what} {list(wanted)}")
