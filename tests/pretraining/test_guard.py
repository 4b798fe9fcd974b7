import json
import math

from sane_ray.pretraining.guard import ENOUGH, MOST_UNUSABLE, WINDOW, Spike, SpikeGuard


def points(norms, first=1):
    return [{"step": float(first + i), "train/gradient_norm": norm} for i, norm in enumerate(norms)]


def test_a_norm_far_above_the_median_is_a_spike():
    guard = SpikeGuard(10.0)
    assert guard.look(points([1.0] * ENOUGH)) == []
    assert guard.look(points([9.9, 10.1, 1.0, 500.0], first=21)) == [Spike(22, 10.1, 1.0), Spike(24, 500.0, 1.0)]


def test_a_level_that_stays_becomes_the_usual_one():
    guard = SpikeGuard(10.0)
    guard.look(points([1.0] * WINDOW))
    assert len(guard.look(points([20.0] * WINDOW, first=101))) == WINDOW / 2


def test_nothing_is_unusual_before_enough_steps():
    assert SpikeGuard(10.0).look(points([1.0] * (ENOUGH - 1) + [1e6])) == []


def test_the_usual_follows_the_last_steps_only():
    guard = SpikeGuard(10.0)
    guard.look(points([100.0] * WINDOW))
    guard.look(points([1.0] * WINDOW))
    assert guard.norms == [1.0] * WINDOW
    assert [spike.step for spike in guard.look(points([50.0], first=500))] == [500]


def test_steps_without_a_finite_gradient_are_counted_until_one_has_it():
    guard = SpikeGuard(10.0)
    guard.look(points([1.0, math.nan, math.inf]))
    assert (guard.unusable, guard.skipped, guard.norms) == (2, 2, [1.0])
    guard.look(points([1.0]))
    assert (guard.unusable, guard.skipped) == (0, 2)


def test_a_long_run_of_steps_without_a_finite_gradient_is_seen_when_it_is_over_too():
    guard = SpikeGuard(10.0)
    guard.look(points([math.nan] * (MOST_UNUSABLE + 14) + [1.0, math.nan]))
    assert guard.unusable == MOST_UNUSABLE + 14
    guard.look(points([math.nan, 1.0, math.inf, 1.0]))
    assert guard.unusable == 2, "the runs of the look before are over"


def test_such_a_run_is_counted_across_looks_and_checkpoints():
    guard, restored = SpikeGuard(10.0), SpikeGuard(10.0)
    guard.look(points([1.0] + [math.nan] * (MOST_UNUSABLE - 1)))
    restored.restore(json.loads(json.dumps(guard.state())))
    for each in (guard, restored):
        assert each.unusable == MOST_UNUSABLE - 1
        each.look(points([math.nan, 1.0]))
        assert each.unusable == MOST_UNUSABLE


def test_a_restored_guard_judges_as_the_one_that_was_saved():
    norms = [1.0 + 0.01 * i for i in range(60)] + [math.nan]
    guard, restored = SpikeGuard(5.0), SpikeGuard(5.0)
    guard.look(points(norms))
    restored.restore(json.loads(json.dumps(guard.state())))
    following = points([6.6, 6.4, 1.0, 7.0], first=62)
    assert guard.look(following) == restored.look(following)
    assert guard.state() == restored.state()
