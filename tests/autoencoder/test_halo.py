"""Windows with a halo cover any sequence, can be undone, and are the published ones wherever those exist."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sane_ray.autoencoder.halo import Windows
from sane_ray.errors import InputError

SIZES = {"num_tokens": st.integers(1, 200), "window": st.integers(1, 60), "halo": st.integers(0, 70)}


def published_windows(num_tokens, window, halo):
    """First and last + 1 token of each window as the published code cuts them; None where it ends with an assertion."""
    count, full = -(-num_tokens // window), window + 2 * halo
    middle = [(number * window - halo, (number + 1) * window + halo) for number in range(1, count - 1)]
    last = [(max(0, num_tokens - full), num_tokens)] if count > 1 else []
    windows = [(0, min(full, num_tokens)), *middle, *last]
    runs = halo < window and all(end - begin == full and end <= num_tokens for begin, end in windows)
    return windows if runs else None


def test_the_published_windows_of_the_parity_data_are_cut_and_joined(parity):
    data = np.load(parity / "halo_w16_h4_n53.npz")
    rows = 3 * torch.arange(53.0)[:, None] + torch.arange(3)
    windows = Windows(53, 16, 4)
    assert torch.equal(windows.cut(rows[None]), torch.from_numpy(data["windows"]))
    assert torch.equal(windows.cut(rows[None].long()), torch.from_numpy(data["positions"]))
    assert torch.equal(windows.join(torch.from_numpy(data["windows"]))[0], rows)


@pytest.mark.parametrize(
    ("num_tokens", "window", "halo", "runs"),
    [
        (53704, 128, 64, True), (53704, 128, 12, True), (93, 32, 8, True), (48, 32, 8, True), (256, 128, 64, True),
        (53524, 128, 64, False), (53524, 156, 64, False), (53704, 156, 64, False), (300, 128, 64, False),
        (39304, 128, 64, False), (48, 64, 8, False), (93, 64, 16, False), (93, 93, 0, True),
    ],
)  # fmt: skip
def test_no_length_crashes_and_those_the_published_code_can_cut_are_cut_alike(num_tokens, window, halo, runs):
    published = published_windows(num_tokens, window, halo)
    assert (published is not None) == runs
    indices = Windows(num_tokens, window, halo).indices_SL
    if published:
        assert indices.tolist() == [list(range(begin, end)) for begin, end in published]
    assert Windows(num_tokens, window, halo).join(indices[..., None])[:, 0].tolist() == list(range(num_tokens))


@settings(max_examples=300, deadline=None)
@given(**SIZES)
def test_any_sequence_is_cut_into_full_windows_and_put_together_again(num_tokens, window, halo):
    windows = Windows(num_tokens, window, halo)
    rows = torch.arange(2 * num_tokens * 3).view(2, num_tokens, 3)
    cut = windows.cut(rows)
    assert cut.shape == (2, -(-num_tokens // window), min(num_tokens, window + 2 * halo), 3)
    assert torch.equal(windows.join(cut), rows)
    for number, index in enumerate(windows.indices_SL.tolist()):
        assert index == list(range(index[0], index[0] + windows.length)) and 0 <= index[0] <= index[-1] < num_tokens
        content = range(number * window, min((number + 1) * window, num_tokens))
        wanted = range(max(0, content[0] - halo), min(num_tokens, content[-1] + halo + 1))
        assert index[0] <= wanted[0] and wanted[-1] <= index[-1], "content and its halo are in the window"
    published = published_windows(num_tokens, window, halo)
    if published is not None:
        assert [(index[0], index[-1] + 1) for index in windows.indices_SL.tolist()] == published


@settings(max_examples=100, deadline=None)
@given(**SIZES, at_once=st.integers(1, 8))
def test_windows_some_at_once_need_only_their_span_and_are_the_same(num_tokens, window, halo, at_once):
    windows = Windows(num_tokens, window, halo)
    rows = torch.arange(num_tokens)[:, None]
    contents, parts = [], list(windows.split(at_once))
    for part in parts:
        begin, end = part.span
        assert end - begin <= len(part) * windows.length
        contents.append(part.join(part.cut(rows[begin:end])))
        assert contents[-1][:, 0].tolist() == list(range(*part.content))
    assert torch.equal(torch.cat(contents), rows)
    assert torch.equal(torch.cat([part.indices_SL for part in parts]), windows.indices_SL)
    assert all(len(part) <= at_once for part in parts) and parts[-1].stop == len(windows)


def test_what_a_window_says_of_its_halo_is_dropped():
    number_of_window = torch.arange(3)[:, None, None].expand(3, 14, 1)
    assert Windows(27, 10, 2).join(number_of_window)[:, 0].tolist() == [0] * 10 + [1] * 10 + [2] * 7


def test_without_a_halo_the_last_window_is_moved_back_to_be_full():
    windows = Windows(30, 12)
    assert windows.starts_S.tolist() == [0, 12, 18]
    rows = torch.arange(3)[:, None, None].expand(3, 12, 1)
    assert windows.join(rows)[:, 0].tolist() == [0] * 12 + [1] * 12 + [2] * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Windows(10, 0), r"10 tokens in windows of 0"),
        (lambda: Windows(10, 4, -1), r"halo of -1"),
        (lambda: Windows(0, 4), r"0 tokens"),
        (lambda: Windows(10, 4, first=2, stop=5), r"windows 2 to 5: a sequence of 10 has 3"),
        (lambda: Windows(10, 4, 1).cut(torch.zeros(9, 2)), r"\[9, 2\], but these windows are cut from rows of \[10\]"),
        (lambda: Windows(10, 4, 1).join(torch.zeros(3, 5, 2)), r"but these windows are \[3, 6\]"),
    ],
)
def test_what_does_not_fit_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()
