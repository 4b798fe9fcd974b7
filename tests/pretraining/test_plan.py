import numpy as np
import pytest

from sane_ray.errors import InputError
from sane_ray.pretraining.plan import plan_of

MODELS, EPOCHS = 12, 3


def make_plan(**changes):
    rng = np.random.default_rng(0)
    ordinals = rng.permutation(MODELS * EPOCHS)
    settings = {
        "row_groups": [ordinals[i : i + 6].tolist() for i in range(0, len(ordinals), 6)],
        "tokens": rng.integers(20, 60, size=MODELS * EPOCHS).tolist(),
        "models": [f"model{i % MODELS}" for i in range(MODELS * EPOCHS)],
        "window": 16,
        "batch_size": 8,
        "pool_tokens": 400,
        "seed": 3,
    }
    return plan_of(**(settings | changes))


def epoch_of(plan, epoch, rank=0, world_size=1, first_step=0):
    shares = [
        plan.share(epoch, pool, rank=rank, world_size=world_size, first_step=first_step) for pool in plan.pools(epoch)
    ]
    return [(int(c), int(s)) for share in shares for c, s in zip(share.segment, share.start, strict=True)]


def test_every_token_of_every_checkpoint_is_covered():
    plan = make_plan()
    windows = [(c, s) for pool in plan.pools(0) for c, s in zip(*plan.windows(0, pool), strict=True)]
    assert len(windows) == plan.windows_per_epoch
    for checkpoint, tokens in enumerate(plan.tokens):
        seen = np.zeros(tokens, dtype=int)
        for start in (s for c, s in windows if c == checkpoint):
            assert 0 <= start <= tokens - plan.window
            seen[start : start + plan.window] += 1
        assert seen.min() >= 1


@pytest.mark.parametrize("tokens", [16, 17, 18, 31, 32, 33, 34, 47, 48, 49, 160, 161, 500])
def test_windows_of_a_checkpoint_differ_and_none_covers_a_token_more_than_thrice(tokens):
    plan = make_plan(tokens=[tokens] * (MODELS * EPOCHS), pool_tokens=10**9)
    for epoch in range(5):
        windows = [(c, s) for pool in plan.pools(epoch) for c, s in zip(*plan.windows(epoch, pool), strict=True)]
        assert len(set(windows)) == len(windows) == plan.windows_per_epoch
        seen = np.zeros((MODELS * EPOCHS, tokens), dtype=int)
        for checkpoint, start in windows:
            seen[checkpoint, start : start + plan.window] += 1
        assert (seen.min(), seen.max() <= 3) == (1, True)


def test_order_repeats_by_seed_and_changes_with_the_epoch():
    assert epoch_of(make_plan(), 1) == epoch_of(make_plan(), 1)
    assert epoch_of(make_plan(), 1) != epoch_of(make_plan(), 2)
    assert epoch_of(make_plan(), 1) != epoch_of(make_plan(seed=4), 1)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size):
    plan = make_plan()
    whole = epoch_of(plan, 5)
    share = plan.batch_size // world_size
    slices = [epoch_of(plan, 5, rank, world_size) for rank in range(world_size)]
    for step in range(plan.steps_per_epoch):
        batch = [window for rank in slices for window in rank[step * share : (step + 1) * share]]
        assert batch == whole[step * plan.batch_size : (step + 1) * plan.batch_size]
    assert all(len(rank) == plan.steps_per_epoch * share for rank in slices)


def test_a_later_first_step_gives_the_rest_of_the_epoch():
    plan = make_plan()
    assert epoch_of(plan, 2, first_step=4) == epoch_of(plan, 2)[4 * plan.batch_size :]


def test_a_batch_holds_one_window_of_a_model_where_there_are_models_enough():
    plan = make_plan(tokens=[48] * (MODELS * EPOCHS), pool_tokens=10**9)
    windows = epoch_of(plan, 0)
    for step in range(plan.steps_per_epoch):
        batch = windows[step * plan.batch_size : (step + 1) * plan.batch_size]
        assert len({plan.models[c] for c, _ in batch}) == plan.batch_size


def test_a_checkpoint_as_long_as_the_window_gives_one():
    plan = make_plan(tokens=[16] * (MODELS * EPOCHS))
    assert plan.windows_per_epoch == MODELS * EPOCHS
    assert {start for _, start in epoch_of(plan, 0)} == {0}


def test_a_window_longer_than_the_shortest_model_is_refused():
    with pytest.raises(InputError, match=r"autoencoder\.window is 64.*has 2\d tokens"):
        make_plan(window=64)


def test_an_epoch_smaller_than_a_batch_is_refused():
    with pytest.raises(InputError, match=r"pretraining\.batch_size is 4096"):
        make_plan(batch_size=4096)


def test_a_store_without_training_checkpoints_is_refused():
    with pytest.raises(InputError, match="no training checkpoints"):
        make_plan(row_groups=[])
