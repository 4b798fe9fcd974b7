import logging
import shutil
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from ray.data import DataContext

from sane_ray.config import AugmentationConfig, TokensConfig
from sane_ray.errors import InputError
from sane_ray.pretraining.batch import FILLER
from sane_ray.pretraining.plan import Plan, Windows
from sane_ray.pretraining.stream import (
    MOST_ITEMS,
    Part,
    WindowReader,
    fixed_batches,
    parts_of,
    patiently,
    plan_of_store,
    stream,
    to_batch,
    whole_steps,
    windows_of_split,
)
from sane_ray.tokens.store import TokenStore
from sane_ray.tokens.store.writing import write_store
from sane_ray.tokens.symmetry import permute, random_permutations
from sane_ray.tokens.tokenizer import tokenize
from sane_ray.zoo.catalog import discover

W, B = 20, 6
PUBLISHED = AugmentationConfig(view_1="canonical", view_2="canonical")
PERMUTED = AugmentationConfig(view_1="permuted", view_2="permuted", seed=3)
SPLIT = [0.5, 0.25, 0.25]


def make_reader(store, augmentation=PUBLISHED, rank=0, world_size=1, split="train", pool_mb=256.0, batch_size=B):
    plan, groups = plan_of_store(store, split, window=W, batch_size=batch_size, pool_mb=pool_mb, seed=5)
    return WindowReader(store.path, plan, groups, augmentation, rank, world_size)


@pytest.fixture(scope="module")
def exact(zoo, tmp_path_factory):
    """A store whose tokens are the weights as they are."""
    tokens = TokensConfig(dtype="float32", normalization="none", split=SPLIT)
    return write_store(discover(zoo), tmp_path_factory.mktemp("stores") / "exact", tokens, source=zoo)


@pytest.fixture(scope="module")
def scattered(zoo, tmp_path_factory):
    """A store with a row group for each checkpoint, and a file for each row group."""
    tokens = TokensConfig(split=SPLIT, row_group_mb=0.001, file_mb=0.001)
    return write_store(discover(zoo), tmp_path_factory.mktemp("stores") / "scattered", tokens, source=zoo)


def planned(reader, epochs):
    """Checkpoint, first token and slot of each of a worker's rows, in order, straight from the plan; None is filler."""
    segments = [segment for group in reader.groups for segment in group.segments]
    rows = []
    for epoch in range(epochs):
        for pool in reader.plan.pools(epoch):
            share = reader.plan.share(epoch, pool, rank=reader.rank, world_size=reader.world_size)
            for number, start, _, slot in zip(*(column.tolist() for column in share), strict=True):
                segment = segments[number]
                rows.append(None if number == FILLER else (segment.checkpoint, segment.first + start, slot))
    return rows


def rows_of(batches):
    """Rows of batches one after the other: values of the fields of Batch."""
    return [row for batch in batches for row in zip(*(getattr(batch, f.name) for f in fields(batch)), strict=True)]


def read(reader, store, epochs=1):
    """The batches, read in this process."""
    dtype = getattr(torch, store.dtype)
    parts = parts_of(reader.plan, epochs, 0)
    blocks = (block for part in parts for block in reader.read(store, part))
    return [to_batch(columns, dtype) for columns in whole_steps(blocks, reader.rows)]


def assert_equal(batches, others):
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others, strict=True):
        for each in fields(one):
            assert torch.equal(getattr(one, each.name), getattr(other, each.name))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (1, 4)])
def test_a_worker_gets_its_share_of_the_plan_in_order(store, rank, world_size):
    reader = make_reader(store, rank=rank, world_size=world_size)
    batches = list(stream(reader, epochs=2, first_step=0))
    assert [len(batch) for batch in batches] == [reader.rows] * 2 * reader.plan.steps_per_epoch
    rows, windows = rows_of(batches), planned(reader, 2)
    assert None in windows  # 32 windows in 6 steps, and 6 places for 4 workers of 2 rows each
    for (view_1, view_2, signal, positions, slot, found), window in zip(rows, windows, strict=True):
        if window is None:
            assert slot == found == FILLER
            assert not view_1.any() and not view_2.any() and not signal.any() and not positions.any()
            continue
        checkpoint, start, place = window
        table = store.architecture_of(checkpoint).table
        assert (found, slot) == (checkpoint, place)
        assert torch.equal(view_1.float(), store.tokens(checkpoint)[start : start + W])
        assert torch.equal(view_2, view_1)
        assert np.array_equal(signal, table.signal_counts[start : start + W])
        assert np.array_equal(positions, table.positions[start : start + W])


def test_a_resumed_stream_is_the_rest_of_an_uninterrupted_one_but_for_what_it_skips(store):
    reader = make_reader(store, PERMUTED)
    first_step = reader.plan.steps_per_epoch + 2
    skip = frozenset({first_step + 1, 2 * reader.plan.steps_per_epoch, 1})  # the last is before the beginning
    whole = list(stream(reader, epochs=3, first_step=0))
    rest = list(stream(reader, epochs=3, first_step=first_step, skip=skip))
    assert_equal(rest, [batch for step, batch in enumerate(whole) if step >= first_step and step not in skip])
    assert list(stream(reader, epochs=3, first_step=len(whole))) == []


@pytest.mark.parametrize("pool_mb", [256.0, 0.003])
def test_workers_of_any_number_get_the_same_windows_and_views(scattered, pool_mb):
    whole = make_reader(scattered, PERMUTED, pool_mb=pool_mb)
    assert (whole.plan.num_pools > 1) == (pool_mb < 1)
    together = rows_of(read(whole, scattered, epochs=2))
    steps = 2 * whole.plan.steps_per_epoch
    shares = [rows_of(read(replace(whole, rank=rank, world_size=4), scattered, epochs=2)) for rank in range(4)]
    count = len(shares[0]) // steps
    dealt = [row for s in range(steps) for share in shares for row in share[s * count : (s + 1) * count]]
    kept, expected = ([row for row in rows if row[4] != FILLER] for rows in (dealt, together))
    assert len(kept) == len(expected) == 2 * whole.plan.windows_per_epoch
    for one, other in zip(kept, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_worker_reads_no_row_group_that_it_does_not_need(scattered, tmp_path):
    store = TokenStore.open(shutil.copytree(scattered.path, tmp_path / "store"))
    reader = make_reader(store, rank=1, world_size=4, batch_size=8)
    expected = read(reader, store)
    needed: set[int] = set()
    for pool in reader.plan.pools(0):
        needed |= set(reader.plan.groups_of(reader.plan.share(0, pool, rank=1, world_size=4)))
    assert 0 < len(needed) < len(reader.groups)
    for number in set(range(len(reader.groups))) - needed:
        (store.path / reader.groups[number].file).unlink()
    assert_equal(read(reader, store), expected)


@pytest.mark.parametrize("kinds", [("canonical", "permuted"), ("permuted", "permuted"), ("permuted", "canonical")])
def test_a_permuted_view_is_the_same_network_permuted(exact, kinds):
    reader = make_reader(exact, AugmentationConfig(view_1=kinds[0], view_2=kinds[1], seed=3))
    batches = read(reader, exact, epochs=2)
    rows = [row for row in rows_of(batches) if row[4] != FILLER]
    windows = [window for window in planned(reader, 2) if window is not None]
    assert len(rows) == len(windows) == 2 * reader.plan.windows_per_epoch
    for place, (checkpoint, start, _) in enumerate(windows):
        architecture = exact.architecture_of(checkpoint)
        epoch = place // reader.plan.windows_per_epoch
        for view, kind in enumerate(kinds):
            network = exact.state_dict(checkpoint)
            if kind == "permuted":
                rng = np.random.default_rng((reader.plan.seed, 3, epoch, view + 1, checkpoint))
                network = permute(network, architecture.symmetry, random_permutations(architecture.symmetry, rng))
            assert torch.equal(rows[place][view], tokenize(network, architecture.table)[start : start + W])
    assert not torch.equal(batches[0].view_1, batches[0].view_2)


def test_windows_of_a_model_in_segments_cover_it_and_are_not_permuted(zoo, tmp_path):
    tokens = TokensConfig(dtype="float32", split=SPLIT, segment_mb=0.001, row_group_mb=0.009)
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    assert {segment.tokens for group in store.row_groups("train") for segment in group.segments} == {26}  # 52 in two
    reader = make_reader(store, AugmentationConfig(view_1="permuted", view_2="canonical"))
    windows = [window for window in planned(reader, 1) if window is not None]
    rows = [row for row in rows_of(read(reader, store)) if row[4] != FILLER]
    for (view_1, view_2, _, positions, *_), (checkpoint, start, _) in zip(rows, windows, strict=True):
        assert torch.equal(view_1, store.tokens(checkpoint)[start : start + W]) and torch.equal(view_1, view_2)
        assert np.array_equal(positions, store.architecture_of(checkpoint).table.positions[start : start + W])
    covered = {(c, token) for c, s, _ in windows for token in range(s, s + W)}
    assert {token for c, token in covered if c == windows[0][0]} == set(range(52))


def test_bfloat16_tokens_arrive_as_such(zoo, tmp_path):
    tokens = TokensConfig(dtype="bfloat16", split=SPLIT)
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    reader = make_reader(store, AugmentationConfig())
    batch = next(stream(reader, epochs=1, first_step=0))
    assert batch.view_1.dtype == batch.view_2.dtype == torch.bfloat16
    checkpoint, start, _ = planned(reader, 1)[0]
    assert torch.equal(batch.view_1[0].float(), store.tokens(checkpoint)[start : start + W])
    assert_equal([batch], read(reader, store)[:1])


def test_windows_are_counted_by_split(store):
    checkpoints = {split: store.counts(split).checkpoints for split in ("train", "val", "test")}
    assert checkpoints == {"train": 8, "val": 4, "test": 4}
    assert windows_of_split(store, "val", W) == 4 * 4  # 52 tokens: ceil(52 / 20) + 1 windows each


def test_fixed_batches_are_the_first_of_the_stream(store):
    reader = make_reader(store, AugmentationConfig(), rank=1, world_size=4)
    assert_equal(fixed_batches(reader, 3), read(reader, store)[:3])


@pytest.mark.parametrize("pool_mb", [256.0, 0.003])
def test_fixed_batches_need_no_row_group_of_later_steps(scattered, tmp_path, pool_mb):
    store = TokenStore.open(shutil.copytree(scattered.path, tmp_path / "store"))
    reader = make_reader(store, AugmentationConfig(), batch_size=3, pool_mb=pool_mb)
    expected = read(reader, store)[:1]
    share = reader.plan.share(0, reader.plan.pools(0)[0], rank=0, world_size=1)
    needed = reader.plan.groups_of(Windows(*(column[share.step < 1] for column in share)))
    assert 0 < len(needed) < len(reader.groups)
    for number in set(range(len(reader.groups))) - set(needed):
        file = store.path / reader.groups[number].file
        file.write_bytes(bytes(file.stat().st_size))  # reading it would fail at once
    assert_equal(fixed_batches(reader, 1), expected)


@pytest.mark.parametrize("kinds", [("permuted", "permuted"), ("canonical", "permuted")])
def test_a_second_view_that_nobody_computes_is_not_sent(store, kinds):
    both = make_reader(store, AugmentationConfig(view_1=kinds[0], view_2=kinds[1], seed=3))
    one = replace(both, views=1)
    assert "view_2" in next(both.read(store, Part(0, 0, 1)))
    assert "view_2" not in next(one.read(store, Part(0, 0, 1)))
    assert one.bytes_a_row(store) < both.bytes_a_row(store)
    batches = read(one, store)
    assert all(batch.view_2 is batch.view_1 for batch in batches)
    assert all(torch.equal(a.view_1, b.view_1) for a, b in zip(batches, read(both, store), strict=True))


def test_the_work_of_many_epochs_of_many_pools_is_a_short_list():
    pools = 10_000
    segments = np.arange(pools + 1)
    tokens, models = np.full(pools, 8, np.int32), np.arange(pools, dtype=np.int32)
    plan = Plan(segments, tokens, models, window=8, batch_size=1, num_pools=pools, seed=0)
    assert plan.steps_per_epoch == pools
    parts = parts_of(plan, epochs=50, first_step=2 * pools + 17)
    assert len(parts) <= MOST_ITEMS + 50
    assert [(part.epoch, number) for part in parts for number in range(part.begin, part.end)] == [
        (epoch, number) for epoch in range(2, 50) for number in range(pools)
    ]
    assert parts_of(plan, epochs=2, first_step=2 * pools) == []


def test_blocks_that_were_joined_or_cut_on_the_way_are_whole_steps_again():
    column = np.arange(60).reshape(30, 2)
    blocks = [{"slot": piece, "other": -piece} for piece in np.split(column, [7, 8, 15, 29])]
    steps = list(whole_steps(blocks, 5))
    assert [len(step["slot"]) for step in steps] == [5] * 6
    assert np.array_equal(np.concatenate([step["slot"] for step in steps]), column)
    assert np.array_equal(np.concatenate([step["other"] for step in steps]), -column)


def test_reading_waits_for_storage_that_is_away(scattered, tmp_path, caplog):
    path, away = tmp_path / "store", tmp_path / "away"
    store = TokenStore.open(shutil.copytree(scattered.path, path))
    reader = make_reader(store)
    expected = read(reader, store)
    path.rename(away)
    back = threading.Timer(0.5, lambda: away.rename(path))
    back.start()
    with caplog.at_level(logging.WARNING, "sane_ray.pretraining.stream"):
        assert_equal(read(reader, store), expected)
    back.join()
    assert "trying again in 1 s" in caplog.text and str(path) in caplog.text


def test_reading_gives_up_in_the_end_and_at_once_where_a_file_is_damaged(scattered, tmp_path, caplog):
    store = TokenStore.open(shutil.copytree(scattered.path, tmp_path / "store"))
    group = store.row_groups("train")[0]
    file = store.path / group.file
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(InputError, match="No such file"):
        patiently(lambda: store.read_row_group(group), store.path, waits=(0.01, 0.02))
    assert caplog.text.count("trying again") == 2
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(InputError, match="damaged"):
        patiently(lambda: store.read_row_group(group), store.path, waits=(0.01,))
    assert caplog.text.count("trying again") == 2


def test_a_stream_may_stand_still_for_as_long_as_it_likes(store, ray_session, monkeypatch):
    """Ray Data's own limit is shorter here than it takes to start the task that reads."""
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1e-3)
    reader = make_reader(store)
    assert_equal(list(stream(reader, epochs=1, first_step=0)), read(reader, store))


def test_streams_need_no_cpu_of_the_cluster_and_do_not_wait_for_each_other(store, ray_session):
    """Two workers hold all CPUs, and each waits for the other after every batch, as in a collective."""
    readers = [make_reader(store, rank=rank, world_size=2) for rank in range(2)]

    class Worker:
        def __init__(self, reader: WindowReader) -> None:
            self.batches = stream(reader, epochs=1, first_step=0)

        def next(self) -> list[int] | None:
            batch = next(self.batches, None)
            return None if batch is None else batch.slot.tolist()

    actor = ray_session.remote(num_cpus=2)(Worker)
    workers = [actor.remote(reader) for reader in readers]
    ray_session.get([worker.__ray_ready__.remote() for worker in workers])
    assert ray_session.available_resources().get("CPU", 0) == 0
    steps = []
    while None not in (slots := ray_session.get([worker.next.remote() for worker in workers], timeout=300)):
        steps.append(sorted(slot for one in slots for slot in one if slot != FILLER))
    assert slots == [None, None]
    assert [slot for step in steps for slot in step] == np.concatenate(
        [readers[0].plan.windows(0, pool).slot for pool in readers[0].plan.pools(0)]
    ).tolist()
    for worker in workers:
        ray_session.kill(worker)
