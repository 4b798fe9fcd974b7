import numpy as np
import pytest
import torch

from sane_ray.config import AugmentationConfig, TokensConfig
from sane_ray.pretraining.stream import WindowReader, fixed_batches, plan_of_store, stream, windows_of_split
from sane_ray.tokens.store.writing import write_store
from sane_ray.tokens.symmetry import permute, random_permutations
from sane_ray.tokens.tokenizer import tokenize
from sane_ray.zoo.catalog import discover

W, B = 20, 6
PUBLISHED = AugmentationConfig(view_1="canonical", view_2="canonical")


def make_reader(store, augmentation=PUBLISHED, rank=0, world_size=1, split="train"):
    plan, groups = plan_of_store(store, split, window=W, batch_size=B, pool_mb=256, seed=5)
    return WindowReader(store.path, plan, groups, augmentation, rank, world_size)


def planned(reader, epochs):
    """Checkpoint and first token of each of a worker's windows, in order, straight from the plan."""
    segments = [segment for group in reader.groups for segment in group.segments]
    windows = []
    for epoch in range(epochs):
        for pool in reader.plan.pools(epoch):
            share = reader.plan.share(epoch, pool, rank=reader.rank, world_size=reader.world_size)
            for number, start in zip(share.segment.tolist(), share.start.tolist(), strict=True):
                windows.append((segments[number].checkpoint, segments[number].first + start))
    return windows


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_gets_its_share_of_the_plan_in_order(store, rank):
    reader = make_reader(store, rank=rank, world_size=2)
    batches = list(stream(reader, epochs=2, first_step=0, data_cpus=1))
    assert len(batches) == 2 * reader.plan.steps_per_epoch
    rows = [row for batch in batches for row in zip(*vars(batch).values(), strict=True)]
    windows = planned(reader, 2)
    assert len(rows) == len(windows)
    for (view_1, view_2, signal, positions), (checkpoint, start) in zip(rows, windows, strict=True):
        table = store.architecture_of(checkpoint).table
        expected = store.tokens(checkpoint)[start : start + W]
        assert torch.equal(view_1.float(), expected)
        assert torch.equal(view_2, view_1)
        assert np.array_equal(signal, table.signal_counts[start : start + W])
        assert np.array_equal(positions, table.positions[start : start + W])


def test_a_resumed_stream_is_the_rest_of_an_uninterrupted_one(store):
    reader = make_reader(store, AugmentationConfig())
    first_step = reader.plan.steps_per_epoch + 2
    whole = list(stream(reader, epochs=3, first_step=0, data_cpus=1))
    rest = list(stream(reader, epochs=3, first_step=first_step, data_cpus=1))
    assert len(rest) == len(whole) - first_step > 0
    for one, other in zip(rest, whole[first_step:], strict=True):
        assert torch.equal(one.view_1, other.view_1)
        assert torch.equal(one.view_2, other.view_2)


def test_a_permuted_view_is_the_same_network_permuted(zoo, tmp_path):
    exact = TokensConfig(dtype="float32", normalization="none", split=[0.5, 0.25, 0.25])
    store = write_store(discover(zoo), tmp_path / "store", exact, source=zoo)
    reader = make_reader(store, AugmentationConfig(view_1="canonical", view_2="permuted"))
    batch = fixed_batches(reader, 1)[0]
    for row, (checkpoint, start) in enumerate(planned(reader, 1)[:B]):
        architecture = store.architecture_of(checkpoint)
        rng = np.random.default_rng((reader.plan.seed, 0, 2, checkpoint, start))
        permutations = random_permutations(architecture.symmetry, rng)
        network = permute(store.state_dict(checkpoint), architecture.symmetry, permutations)
        assert torch.equal(batch.view_2[row], tokenize(network, architecture.table)[start : start + W])
        assert torch.equal(batch.view_1[row], store.tokens(checkpoint)[start : start + W])
    assert not torch.equal(batch.view_1, batch.view_2)


def test_windows_of_a_model_in_segments_cover_it_and_are_not_permuted(zoo, tmp_path):
    tokens = TokensConfig(dtype="float32", split=[0.5, 0.25, 0.25], segment_mb=0.001, row_group_mb=0.009)
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    assert {segment.tokens for group in store.row_groups("train") for segment in group.segments} == {26}  # 52 in two
    reader = make_reader(store, AugmentationConfig(view_1="permuted", view_2="canonical"))
    windows = planned(reader, 1)
    batches = stream(reader, epochs=1, first_step=0, data_cpus=1)
    rows = [row for batch in batches for row in zip(*vars(batch).values(), strict=True)]
    for (view_1, view_2, _, positions), (checkpoint, start) in zip(rows, windows, strict=True):
        assert torch.equal(view_1, store.tokens(checkpoint)[start : start + W]) and torch.equal(view_1, view_2)
        assert np.array_equal(positions, store.architecture_of(checkpoint).table.positions[start : start + W])
    covered = {(c, token) for pool in reader.plan.pools(0) for c, s in windows for token in range(s, s + W)}
    assert {token for c, token in covered if c == windows[0][0]} == set(range(52))


def test_bfloat16_tokens_arrive_as_such(zoo, tmp_path):
    tokens = TokensConfig(dtype="bfloat16", split=[0.5, 0.25, 0.25])
    store = write_store(discover(zoo), tmp_path / "store", tokens, source=zoo)
    reader = make_reader(store)
    batch = next(stream(reader, epochs=1, first_step=0, data_cpus=1))
    checkpoint, start = planned(reader, 1)[0]
    assert batch.view_1.dtype == torch.bfloat16
    assert torch.equal(batch.view_1[0].float(), store.tokens(checkpoint)[start : start + W])


def test_windows_are_counted_by_split(store):
    checkpoints = {split: store.counts(split).checkpoints for split in ("train", "val", "test")}
    assert checkpoints == {"train": 8, "val": 4, "test": 4}
    assert windows_of_split(store, "val", W) == 4 * 4  # 52 tokens: ceil(52 / 20) + 1 windows each
