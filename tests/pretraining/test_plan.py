import hashlib
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from sane_ray.errors import InputError
from sane_ray.pretraining.batch import FILLER
from sane_ray.pretraining.plan import Plan, plan_of

MODELS, EPOCHS = 12, 3


def make_plan(**changes):
    rng = np.random.default_rng(0)
    settings = {
        "group_sizes": [6] * (MODELS * EPOCHS // 6),
        "tokens": rng.integers(20, 60, size=MODELS * EPOCHS).tolist(),
        "models": [f"model{i % MODELS}" for i in rng.permutation(MODELS * EPOCHS)],
        "window": 16,
        "batch_size": 8,
        "pool_tokens": 50,
        "seed": 3,
    }
    return plan_of(**(settings | changes))


def mixed_zoo(models=300, epochs=20, a_group=40):
    """Small networks: row groups hold checkpoints of many models."""
    return {
        "group_sizes": [a_group] * (models * epochs // a_group),
        "tokens": [93] * (models * epochs),
        "models": np.random.default_rng(1).permutation(np.repeat(np.arange(models), epochs)),
    }


def large_zoo(models=100, epochs=5):
    """Large networks: a checkpoint a row group."""
    order = np.random.default_rng(2).permutation(np.repeat(np.arange(models), epochs))
    return {"group_sizes": [1] * len(order), "tokens": [800] * len(order), "models": order}


def zoo_of_parts(models=100, epochs=3, parts=4):
    """Larger ones: a checkpoint in several row groups, all of one model behind each other."""
    order = np.repeat(np.arange(models), epochs * parts)
    return {"group_sizes": [1] * len(order), "tokens": [300] * len(order), "models": order}


def heterogeneous_zoo(models=200):
    """Networks of 40 to 2000 tokens, 1 to 8 checkpoints each, 1 to 11 in a row group."""
    rng = np.random.default_rng(3)
    order = rng.permutation(np.repeat(np.arange(models), rng.integers(1, 9, models)))
    sizes = []
    while sum(sizes) < len(order):
        sizes.append(min(int(rng.integers(1, 12)), len(order) - sum(sizes)))
    return {"group_sizes": sizes, "tokens": rng.integers(40, 2000, models)[order], "models": order}


ZOOS = [mixed_zoo(), large_zoo(), zoo_of_parts(), heterogeneous_zoo()]


def plan_of_zoo(zoo, **changes):
    settings = {"window": 32, "batch_size": 32, "pool_tokens": -(-int(np.sum(zoo["tokens"])) // 6), "seed": 1}
    return plan_of(**(zoo | settings | changes))


def batches_of(plan, epoch, rank=0, world_size=1, first_step=0):
    """Step to its rows (slot, segment, start), filler included, in the order in which a rank sees them."""
    batches: dict[int, list[tuple[int, int, int]]] = {}
    for pool in plan.pools(epoch):
        share = plan.share(epoch, pool, rank=rank, world_size=world_size, first_step=first_step)
        for segment, start, step, slot in zip(*(column.tolist() for column in share), strict=True):
            batches.setdefault(step, []).append((slot, segment, start))
    return batches


def windows_of(batches):
    return [(segment, start) for rows in batches.values() for slot, segment, start in rows if slot != FILLER]


def test_every_token_of_every_checkpoint_is_covered():
    plan = make_plan()
    windows = windows_of(batches_of(plan, 0))
    assert len(windows) == plan.windows_per_epoch
    for checkpoint, tokens in enumerate(plan.tokens):
        seen = np.zeros(tokens, dtype=int)
        for start in (s for c, s in windows if c == checkpoint):
            assert 0 <= start <= tokens - plan.window
            seen[start : start + plan.window] += 1
        assert seen.min() >= 1


@pytest.mark.parametrize("tokens", [16, 17, 18, 31, 32, 33, 34, 47, 48, 49, 160, 161, 500])
def test_windows_of_a_checkpoint_differ_and_none_covers_a_token_more_than_thrice(tokens):
    plan = make_plan(tokens=[tokens] * (MODELS * EPOCHS), pool_tokens=2 * tokens)
    for epoch in range(5):
        windows = windows_of(batches_of(plan, epoch))
        assert len(set(windows)) == len(windows) == plan.windows_per_epoch
        seen = np.zeros((MODELS * EPOCHS, tokens), dtype=int)
        for checkpoint, start in windows:
            seen[checkpoint, start : start + plan.window] += 1
        assert (seen.min(), seen.max() <= 3) == (1, True)


def test_order_repeats_by_seed_and_changes_with_the_epoch():
    assert batches_of(make_plan(), 1) == batches_of(make_plan(), 1)
    assert windows_of(batches_of(make_plan(), 1)) != windows_of(batches_of(make_plan(), 2))
    assert windows_of(batches_of(make_plan(), 1)) != windows_of(batches_of(make_plan(seed=4), 1))


def test_the_order_of_this_version_stays_what_it_is():
    """Another order under the same signature would make a resumed run see windows twice: raise VERSION instead."""
    plan = make_plan()
    assert (
        hashlib.sha256(repr([batches_of(plan, epoch) for epoch in range(3)]).encode()).hexdigest()
        == "f74d9c3212f7ee12dcaee58e8cc380911fea42eb84617df8fc702121500af77e"
    )
    assert plan.signature == "64db99582ff9e6bddfb9c5ba9573a3581c7e697d1c6c2b59ef137342b86c9e8b"


@pytest.mark.parametrize("world_size", range(1, 9))
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size):
    plan = make_plan()
    whole = batches_of(plan, 5)
    assert list(whole) == list(range(plan.steps_per_epoch))
    shares = [batches_of(plan, 5, rank, world_size) for rank in range(world_size)]
    for step, batch in whole.items():
        rows = [share[step] for share in shares]
        assert {len(rank) for rank in rows} == {-(-plan.batch_size // world_size)}
        real = [row for rank in rows for row in rank if row[0] != FILLER]
        assert real == [row for row in batch if row[0] != FILLER]
        assert [slot for slot, _, _ in real] == list(range(len(real)))


def test_rows_beyond_a_rank_s_windows_are_filler_and_come_last():
    plan = make_plan(batch_size=7)
    for rank in range(3):
        for rows in batches_of(plan, 0, rank, world_size=3).values():
            filler = [slot == FILLER for slot, _, _ in rows]
            assert filler == sorted(filler)
            assert all(row == (FILLER, FILLER, 0) for row in rows if row[0] == FILLER)


def test_batches_are_full_but_for_the_last_pool_s_which_share_the_rest_evenly():
    plan = make_plan(batch_size=10)
    sizes = [sum(slot != FILLER for slot, _, _ in rows) for rows in batches_of(plan, 0).values()]
    last = plan.pools(0)[-1].first_step
    assert sum(sizes) == plan.windows_per_epoch
    assert set(sizes[:last]) == {10}
    assert max(sizes[last:]) - min(sizes[last:]) <= 1
    assert 0 < last < plan.steps_per_epoch == -(-plan.windows_per_epoch // 10)


def test_a_later_first_step_gives_the_rest_of_the_epoch():
    plan = make_plan()
    whole = batches_of(plan, 2, rank=1, world_size=3)
    for first_step in range(plan.steps_per_epoch + 1):
        rest = {step: rows for step, rows in whole.items() if step >= first_step}
        assert batches_of(plan, 2, rank=1, world_size=3, first_step=first_step) == rest


def test_each_window_is_seen_once_when_workers_come_and_go_within_an_epoch():
    plan = make_plan()
    seen: list[tuple[int, int]] = []
    legs = [(0, 3, 3), (3, 4, 8), (4, 9, 1), (9, plan.steps_per_epoch, 5)]
    for first_step, end, world_size in legs:
        for rank in range(world_size):
            share = batches_of(plan, 1, rank, world_size, first_step)
            seen += windows_of({step: rows for step, rows in share.items() if step < end})
    assert sorted(seen) == sorted(windows_of(batches_of(plan, 1)))
    assert len(set(seen)) == plan.windows_per_epoch


@pytest.mark.parametrize("zoo", ZOOS, ids=["mixed", "large", "parts", "heterogeneous"])
def test_a_batch_holds_one_window_of_a_model_where_there_are_models_enough(zoo):
    plan = plan_of_zoo(zoo)
    assert plan.most_of_a_model == 1
    assert 1 < plan.num_pools <= 6
    for epoch in range(10):
        for rows in batches_of(plan, epoch).values():
            models = [plan.models[segment] for slot, segment, _ in rows if slot != FILLER]
            assert len(set(models)) == len(models)


def test_models_that_are_too_few_are_spread_as_evenly_as_can_be():
    plan = plan_of_zoo(mixed_zoo(models=10, epochs=40))
    assert plan.most_of_a_model == 4  # 32 windows of 10 models
    counts = [Counter(plan.models[c] for s, c, _ in rows if s >= 0) for rows in batches_of(plan, 1).values()]
    assert max(max(count.values()) for count in counts) == 4


def test_one_model_with_most_of_the_windows_does_not_crowd_the_others():
    zoo = mixed_zoo()
    tokens = np.array(zoo["tokens"])
    tokens[zoo["models"] == 7] = 9000
    plan = plan_of_zoo(zoo | {"tokens": tokens})
    repeats = Counter()
    for rows in batches_of(plan, 0).values():
        count = Counter(int(plan.models[c]) for s, c, _ in rows if s >= 0)
        repeats |= count
    assert max(n for model, n in repeats.items() if model != 7) == 1
    assert repeats[7] <= plan.most_of_a_model


def test_pools_grow_only_as_far_as_batches_would_repeat_models():
    zoo = large_zoo()
    tokens = int(np.sum(zoo["tokens"]))
    few = plan_of_zoo(zoo, pool_tokens=tokens // 10)
    assert few.num_pools == 10  # 50 checkpoints a pool make batches of 32
    more = plan_of_zoo(zoo, pool_tokens=tokens // 40)
    assert (more.num_pools, more.most_of_a_model) == (10, 1)  # 12 would not
    most = plan_of_zoo(zoo, pool_tokens=tokens // 400)
    assert most.num_pools == 50  # eight times as large and no larger
    assert most.most_of_a_model > 1


def test_pools_are_equally_long_and_hold_every_row_group():
    plan = plan_of_zoo(heterogeneous_zoo())
    for epoch in range(3):
        pools = plan.pools(epoch)
        assert len(pools) == plan.num_pools
        assert max(pool.steps for pool in pools) - min(pool.steps for pool in pools) <= 1
        assert [pool.first_step for pool in pools] == np.cumsum([0] + [pool.steps for pool in pools])[:-1].tolist()
        assert sum(pool.steps for pool in pools) == plan.steps_per_epoch
        assert {group for pool in pools for group in pool.groups} == set(range(len(plan.starts) - 1))
        assert sum(len(pool.groups) for pool in pools) <= len(plan.starts) - 1 + plan.num_pools
        needed = [plan.groups_of(plan.windows(epoch, pool)) for pool in pools]
        assert needed == [sorted(pool.groups) for pool in pools]


def test_row_groups_of_a_model_are_spread_over_the_pools():
    plan = plan_of_zoo(zoo_of_parts())
    for epoch in range(3):
        for pool in plan.pools(epoch):
            of_a_model = Counter(plan.models[list(pool.groups)].tolist())  # a segment a row group
            assert max(of_a_model.values()) <= 12 / plan.num_pools + 2


@pytest.mark.parametrize("zoo", [large_zoo(), zoo_of_parts()], ids=["large", "parts"])
def test_a_rank_needs_its_part_of_a_pool_s_row_groups_where_each_is_of_one_model(zoo):
    plan = plan_of_zoo(zoo)
    for world_size in (2, 4, 8):
        for pool in plan.pools(0):
            for rank in range(world_size):
                share = plan.share(0, pool, rank=rank, world_size=world_size)
                assert len(plan.groups_of(share)) <= len(pool.groups) / world_size + 6


def test_a_rank_needs_few_row_groups_also_where_they_share_models():
    plan = plan_of_zoo(mixed_zoo(), batch_size=128)
    assert plan.most_of_a_model == 1
    parts = [
        len(plan.groups_of(plan.share(0, pool, rank=rank, world_size=8))) / len(pool.groups)
        for pool in plan.pools(0)
        for rank in range(8)
    ]
    assert np.mean(parts) < 0.4


def test_the_ledger_says_what_has_been_seen():
    plan = make_plan(batch_size=10)
    sizes = [
        sum(slot != FILLER for slot, _, _ in rows) for epoch in range(2) for rows in batches_of(plan, epoch).values()
    ]
    for step in range(len(sizes) + 1):
        ledger = json.loads(json.dumps(plan.ledger(step)))
        assert ledger == {
            "epoch": step // plan.steps_per_epoch,
            "step_of_epoch": step % plan.steps_per_epoch,
            "windows": sum(sizes[:step]),
            "seed": 3,
            "batch_size": 10,
            "signature": plan.signature,
        }


@pytest.mark.parametrize(
    "change",
    [
        {"window": 15},
        {"batch_size": 9},
        {"seed": 4},
        {"pool_tokens": 10**6},
        {"tokens": [40] * (MODELS * EPOCHS)},
        {"models": ["one"] * (MODELS * EPOCHS)},
        {"group_sizes": [12] * (MODELS * EPOCHS // 12)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_order_has_another_signature(change):
    assert make_plan().signature == make_plan().signature
    assert make_plan().signature != make_plan(**change).signature


def test_models_may_be_named_or_numbered():
    numbers = [i % MODELS for i in range(MODELS * EPOCHS)]
    plan = make_plan(models=numbers)
    assert make_plan(models=[f"model{i:02d}" for i in numbers]).signature == plan.signature
    assert make_plan(models=[10**12 + 7 * i for i in numbers]).signature == plan.signature


def test_a_plan_travels_small_and_unchanged():
    plan = plan_of_zoo(mixed_zoo())
    batches = batches_of(plan, 1)
    sent = pickle.dumps(plan)
    assert len(sent) < 8 * len(plan.tokens) + 8 * len(plan.starts) + 2000
    received = pickle.loads(sent)
    assert isinstance(received, Plan)
    assert received.signature == plan.signature
    assert batches_of(received, 1) == batches


def test_a_checkpoint_as_long_as_the_window_gives_one():
    plan = make_plan(tokens=[16] * (MODELS * EPOCHS))
    assert plan.windows_per_epoch == MODELS * EPOCHS
    assert {start for _, start in windows_of(batches_of(plan, 0))} == {0}


def test_an_epoch_may_be_one_batch():
    plan = make_plan(tokens=[16] * (MODELS * EPOCHS), batch_size=MODELS * EPOCHS)
    assert (plan.steps_per_epoch, plan.num_pools) == (1, 1)
    assert len(windows_of(batches_of(plan, 0))) == MODELS * EPOCHS


def test_a_window_longer_than_the_shortest_model_is_refused():
    with pytest.raises(InputError, match=r"autoencoder\.window is 64.*has 2\d tokens"):
        make_plan(window=64)


def test_a_batch_larger_than_an_epoch_is_refused():
    with pytest.raises(InputError, match=r"pretraining\.batch_size is 4096"):
        make_plan(batch_size=4096)


def test_a_store_without_training_checkpoints_is_refused():
    with pytest.raises(InputError, match="no training checkpoints"):
        make_plan(group_sizes=[], tokens=[], models=[])
