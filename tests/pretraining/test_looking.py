"""When a training looks whether a node is to be taken away, by a clock of our own."""

import itertools
import types

import pytest
import ray.train

from sane_ray.pretraining import worker


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test lets pass."""
    seconds = [1000.0]
    monkeypatch.setattr(worker, "time", types.SimpleNamespace(monotonic=lambda: seconds[0], time=lambda: 0.0))
    return seconds


@pytest.fixture
def notices(monkeypatch):
    """What Ray Train says at each look."""
    said = []
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: said.pop(0) if said else None)
    return said


def loop_at(step, clock):
    """A loop without anything but what looking needs, just loaded at that step."""
    loop = object.__new__(worker._Loop)
    state = types.SimpleNamespace(step=step, skipped=[], extra=None)
    loop.trainer = types.SimpleNamespace(state=state, precision="torch.float32")
    loop.rank, loop.preempted, loop.report_is_due = 0, False, False
    loop.looked, loop.next_look = (clock[0], 0), 0
    loop.guard = types.SimpleNamespace(restore=lambda state: None)
    loop.reader = types.SimpleNamespace(plan=types.SimpleNamespace(ledger=lambda step: step))

    def load_latest(state):
        names = {"precision": "torch.float32", "guard": {}, "validated": {}, "validated_at": 0}
        state.extra = names | {"ledger": step, "spikes": 0, "rollbacks": 0}
        return step

    loop.checkpoints = types.SimpleNamespace(load_latest=load_latest)
    return loop


def looks(loop, clock, steps, seconds_a_step):
    """Seconds at which it looked."""
    begin, found = clock[0], []
    for _ in range(steps):
        loop.trainer.state.step += 1
        clock[0] += seconds_a_step
        before = loop.next_look
        loop._look()
        if loop.next_look != before:
            found.append(clock[0] - begin)
    return found


def test_a_run_that_went_on_from_a_late_step_looks_every_two_seconds_from_its_first_step(clock, notices):
    loop = loop_at(100_000, clock)
    clock[0] += 30
    assert loop._load() == 100_000
    clock[0] += 10  # the first batch takes its time
    seen = looks(loop, clock, steps=200, seconds_a_step=0.5)
    assert len(seen) >= 40
    assert max(b - a for a, b in itertools.pairwise(seen)) <= 2.5


def test_the_first_notice_is_told_apart_from_later_ones(clock, notices):
    loop = loop_at(0, clock)
    loop._load()
    notices += ["taken away", "taken away"]
    loop.trainer.state.step = 1
    assert loop._look() == "first"
    loop.trainer.state.step = loop.next_look
    clock[0] += 2
    assert loop._look() == "again"
    loop.trainer.state.step = loop.next_look
    assert loop._look() == ""
