import itertools
import os
import queue
import signal
import threading
import time
from contextlib import closing, suppress

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError

from sane_ray.errors import InputError
from sane_ray.finetuning.executor import Outcome, _reason, execute

LONG = 3600  # seconds that no test waits
A_MINUTE = 60


def reporting(folder, call):
    """Work that leaves a file with the name of its process; within the test, so that it travels whole."""

    def build():
        (folder / str(os.getpid())).touch()
        return call

    return build


def is_alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(folder):
    """Until no process that left a file is alive; how many there were."""
    pids = [file.name for file in folder.iterdir()]
    end = time.monotonic() + A_MINUTE
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, "actors are left"
        time.sleep(0.05)
    return len(pids)


def test_each_item_has_one_outcome_though_actors_are_killed(ray_session, tmp_path):
    turns: queue.Queue = queue.Queue()

    def square(number):
        time.sleep(0.01)
        return number**2

    def kill():
        killed = set()
        while turns.get():
            pid = next((file.name for file in tmp_path.iterdir() if file.name not in killed), None)
            if pid:
                killed.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = []
    items = ((f"item {number}", number) for number in range(100))
    for outcome in execute(reporting(tmp_path, square), items, actors=3, num_cpus=0.5, retries=100):
        outcomes.append(outcome)
        if len(outcomes) % 20 == 10:
            turns.put(True)
    turns.put(False)
    killer.join()
    assert {outcome.key: outcome.value for outcome in outcomes} == {
        f"item {number}": number**2 for number in range(100)
    }
    assert len(outcomes) == 100 and not any(outcome.error for outcome in outcomes)
    assert wait_for_end(tmp_path) > 1  # some were replaced


def test_what_ends_its_actor_is_tried_again_and_given_up(ray_session, tmp_path):
    def do(order):
        first = tmp_path / order
        again = first.exists()
        first.touch()
        if order == "dies" or (order == "dies once" and not again):
            os._exit(1)
        return order

    orders = ["dies", "dies once", "works"]
    outcomes = list(execute(lambda: do, [(order, order) for order in orders], actors=2, num_cpus=0.5, retries=1))
    assert sorted(outcome.key for outcome in outcomes) == orders
    dies, once, works = sorted(outcomes, key=lambda outcome: outcome.key)
    assert (dies.value, dies.attempts) == (None, 2) and "its actor died" in dies.error
    assert once == Outcome("dies once", "dies once", None, 2)
    assert works == Outcome("works", "works", None, 1)


def test_what_takes_too_long_is_given_up(ray_session, capsys):
    outcomes = list(execute(lambda: time.sleep, [("hangs", LONG)], num_cpus=0.5, timeout=1, retries=0))
    assert outcomes == [Outcome("hangs", None, "took longer than 1 s", 1)]
    assert "1/1" in (shown := capsys.readouterr().err.split("\r")[-1]) and "1 failed" in shown


def test_what_takes_too_long_is_tried_again_and_its_actor_may_start_slowly(ray_session, tmp_path):
    def do(order):
        first = tmp_path / order
        if order == "hangs once" and not first.exists():
            first.touch()
            time.sleep(LONG)
        return order

    def build():
        time.sleep(1.7)  # is not counted
        return do

    items = [(order, order) for order in ("hangs once", "works")]
    outcomes = {each.key: each for each in execute(build, items, num_cpus=0.5, timeout=1.5, retries=9)}
    assert {key: outcome.value for key, outcome in outcomes.items()} == dict(items)
    assert outcomes["hangs once"].attempts > 1


def test_an_exception_is_an_outcome_and_is_not_tried_again(ray_session, tmp_path):
    def do(payload):
        if payload == "raise":
            raise ValueError("bad\nweights " + "x" * 10_000)
        if payload == "exit":
            raise SystemExit(3)
        if payload == "device":
            raise RuntimeError("CUDA error: device-side assert triggered")
        return threading.Lock() if payload == "lock" else payload

    items = [(payload, payload) for payload in ("raise", "exit", "lock", "device", "works", "works too")]
    outcomes = list(execute(reporting(tmp_path, do), items, actors=1, num_cpus=0.5))
    assert [outcome.key for outcome in outcomes] == [key for key, _ in items]
    assert {outcome.attempts for outcome in outcomes} == {1}
    raised, left, stuck, device, *good = outcomes
    assert raised.error.startswith("ValueError: bad weights xxx") and "(test_executor.py:" in raised.error
    assert len(raised.error) < 1100
    assert left.error.startswith("SystemExit: 3")
    assert stuck.error.startswith("TypeError: ") and "lock" in stuck.error and "\n" not in stuck.error
    assert device.error.startswith("RuntimeError: CUDA error")
    assert [outcome.value for outcome in good] == ["works", "works too"]
    assert wait_for_end(tmp_path) == 2  # a process whose device is broken is not used again


def test_what_cannot_be_built_ends_the_run(ray_session):
    def needs_a_package():
        import no_such_package

        return no_such_package.work

    with pytest.raises(RuntimeError, match=r"3 tries failed: ModuleNotFoundError: No module named 'no_such_package'"):
        list(execute(needs_a_package, [(0, 0), (1, 1)], num_cpus=0.5))


def test_a_wrong_input_of_the_work_is_told_as_such(ray_session):
    def needs_a_folder(folder):
        raise InputError(f"no folder {folder}")

    with pytest.raises(InputError, match=r"^no folder images"):
        list(execute(needs_a_folder, [(0, 0)], arguments=["images"], num_cpus=0.5))


def test_an_actor_that_fails_to_start_now_and_then_is_built_again(ray_session, tmp_path):
    def build():
        if sum(1 for _ in tmp_path.iterdir()) < 2:
            (tmp_path / str(os.getpid())).touch()
            raise OSError("storage is away")
        return str

    assert [outcome.value for outcome in execute(build, [(0, 7)], num_cpus=0.5)] == ["7"]


def test_items_are_taken_when_an_actor_is_free_and_closing_ends_the_actors(ray_session, tmp_path):
    taken = 0

    def endless():
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield number, number

    def do(number):
        while sum(1 for _ in tmp_path.iterdir()) < 2:  # actors
            time.sleep(0.05)
        return number

    most = 0
    with closing(execute(reporting(tmp_path, do), endless(), actors=2, num_cpus=0.5)) as outcomes:
        for done, _ in enumerate(itertools.islice(outcomes, 50)):
            most = max(most, taken - done)
    assert 0 < most <= 4
    assert wait_for_end(tmp_path) == 2


@pytest.mark.parametrize("by", ["items", "consumer"])
def test_what_is_raised_ends_the_actors(ray_session, tmp_path, by):
    def items():
        yield "done", 0
        if by == "items":
            raise KeyError("no more")
        yield "never done", LONG

    def consume():
        for _ in execute(reporting(tmp_path, time.sleep), items(), actors=2, num_cpus=0.5):
            if by == "consumer":
                raise KeyError("enough")

    with pytest.raises(KeyError, match=r"no more|enough"):
        consume()
    assert wait_for_end(tmp_path) >= 1


def test_outcomes_come_as_they_are_done_on_the_actors_that_there_are(ray_session, tmp_path):
    go_on = tmp_path / "go on"

    def do(number):
        while number == 0 and not go_on.exists():
            time.sleep(0.05)
        return number

    keys = []
    for outcome in execute(lambda: do, ((number, number) for number in range(6)), actors=40, num_cpus=2):
        keys.append(outcome.key)
        if len(keys) == 5:
            go_on.touch()
    assert set(keys[:5]) == {1, 2, 3, 4, 5} and keys[5] == 0


def test_arguments_are_given_to_each_actor(ray_session):
    def build(weights, offset):
        return lambda payload: float(weights.sum()) + offset + payload

    weights = ray_session.put(np.ones(1_000_000))
    items = [(number, number) for number in range(3)]
    outcomes = execute(build, items, arguments=[weights, 10], actors=1, num_cpus=0.5)
    assert [outcome.value for outcome in outcomes] == [1_000_010.0, 1_000_011.0, 1_000_012.0]


def test_without_items_no_actor_starts(ray_session, tmp_path):
    assert list(execute(reporting(tmp_path, str), iter(()), num_cpus=0.5)) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cpus": 64}, r"an actor needs 64 CPUs of one node, but .* at most 4 CPUs.*: ask for fewer, or add"),
        ({"num_gpus": 0.25}, r"an actor needs 1 CPUs and 0\.25 GPUs .* 0 GPUs"),
        ({"num_cpus": 0}, r"num_cpus is 0: give above 0"),
        ({"num_gpus": 1.5}, r"num_gpus is 1\.5: give a whole number, 1 or 2"),
        ({"timeout": -1}, r"timeout is -1: give 0 or more"),
        ({"retries": 0.5}, r"retries is 0\.5: give a whole number"),
    ],
)
def test_what_the_cluster_never_gives_is_refused_before_anything_starts(ray_session, options, message):
    with pytest.raises(InputError, match=message):
        execute(lambda: str, [(0, 0)], **options)


def test_a_lack_of_memory_is_told_with_its_remedy():
    assert "ran out of memory: use fewer actors" in _reason(OutOfMemoryError("low on memory"))
    assert "if memory runs out: then use fewer actors" in _reason(ActorDiedError())
    assert _reason(NodeDiedError("died")) == "the node of its actor was lost"
