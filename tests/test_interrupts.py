import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sane_ray.interrupts import handlers, interruptible

ROOT = Path(__file__).parents[1]

SLOW_END = """
import signal, sys, time
from sane_ray.interrupts import interruptible

def end():
    print("ending", flush=True)
    time.sleep(600)

with interruptible("interrupted", end):
    print("working", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_END], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    for expected in ("working", "ending"):
        assert process.stdout.readline().strip() == expected
        process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (130, "\ninterrupted\n")


def test_handlers_are_given_back():
    before = handlers()
    with interruptible("outer"):
        outer = handlers()
        with interruptible("inner"):
            assert handlers() not in (before, outer)
        assert handlers() == outer
    assert handlers() == before


def test_outside_the_main_thread_nothing_is_changed():
    before, within = handlers(), []

    def work():
        with interruptible("interrupted"):
            within.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert within == [before] and handlers() == before
