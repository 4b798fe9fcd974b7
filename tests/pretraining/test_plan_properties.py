"""Random zoos of a few checkpoints: whatever they are, an epoch holds what it must, and each worker its part."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sane_ray.pretraining.batch import FILLER
from sane_ray.pretraining.plan import plan_of, window_counts

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def plans(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
    number = sum(sizes)
    tokens = draw(st.lists(st.integers(4, 40), min_size=number, max_size=number))
    models = draw(st.lists(st.integers(0, 9), min_size=number, max_size=number))
    window = draw(st.integers(1, min(tokens)))
    windows = int(window_counts(np.array(tokens), window).sum())
    return plan_of(
        sizes,
        tokens,
        models,
        window=window,
        batch_size=draw(st.integers(1, min(windows, 20))),
        pool_tokens=draw(st.integers(1, 2 * sum(tokens))),
        seed=draw(st.integers(0, 3)),
    )


@PROPERTY
@given(plan=plans(), epoch=st.integers(0, 2))
def test_an_epoch_holds_every_window_once_and_repeats_models_no_more_than_its_pools_force_it_to(plan, epoch):
    seen = Counter()
    steps = []
    for pool in plan.pools(epoch):
        windows = plan.windows(epoch, pool)
        models = plan.models[windows.segment]
        batches = Counter(zip(windows.step.tolist(), models.tolist(), strict=True))
        for (_, model), count in batches.items():
            assert count <= -(-int((models == model).sum()) // pool.steps)
        sizes = np.bincount(windows.step - pool.first_step, minlength=pool.steps)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.min() >= 1 and sizes.max() <= plan.batch_size
        if epoch == 0:
            assert max(batches.values()) <= plan.most_of_a_model
        seen.update(zip(windows.segment.tolist(), windows.start.tolist(), strict=True))
        steps += np.unique(windows.step).tolist()
    assert steps == list(range(plan.steps_per_epoch))
    assert set(seen.values()) == {1}
    assert sum(seen.values()) == plan.windows_per_epoch
    for segment, tokens in enumerate(plan.tokens.tolist()):
        starts = sorted(start for number, start in seen if number == segment)
        assert starts[0] == 0 and starts[-1] == tokens - plan.window
        assert np.diff(starts).max(initial=0) <= plan.window


@PROPERTY
@given(plan=plans(), epoch=st.integers(0, 2), data=st.data())
def test_workers_that_change_in_an_epoch_see_each_of_its_windows_once(plan, epoch, data):
    change = data.draw(st.integers(0, plan.steps_per_epoch))
    before, after = (data.draw(st.integers(1, plan.batch_size + 1)) for _ in range(2))
    seen = []
    for world_size, first_step, end in ((before, 0, change), (after, change, plan.steps_per_epoch)):
        for rank in range(world_size):
            for pool in plan.pools(epoch):
                share = plan.share(epoch, pool, rank=rank, world_size=world_size, first_step=first_step)
                assert set(np.bincount(share.step)[first_step:].tolist()) <= {0, -(-plan.batch_size // world_size)}
                mine = (share.slot != FILLER) & (share.step < end)
                seen += zip(*(column[mine].tolist() for column in (share.step, share.slot)), strict=True)
    whole = [
        place
        for pool in plan.pools(epoch)
        for windows in [plan.windows(epoch, pool)]
        for place in zip(windows.step.tolist(), windows.slot.tolist(), strict=True)
    ]
    assert sorted(seen) == whole
    assert len(seen) == plan.windows_per_epoch
    assert plan.ledger(change)["windows"] == sum(step < change for step, _ in whole)
