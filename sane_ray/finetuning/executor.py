"""Runs one piece of work on very many items, in Ray actors that may die: each item has one outcome, in any order.

Made for items of seconds to minutes, such as evaluating a generated model, up to millions of them. An actor has one
item at a time and none waits for it, so that a timeout measures the item alone, and a death costs that item one attempt
and the others nothing. Never takes more items from their iterator than there are actors to run them, never repeats what
raised a Python exception (it would come again), never yields an item twice, and never leaves an actor behind.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sane_ray.errors import InputError

K = TypeVar("K")
P = TypeVar("P")
V = TypeVar("V")

_LOG = logging.getLogger(__name__)

_TRIES = 3  # of building an actor, before it is given up
_LOOK_SECONDS = 5.0  # at most between two looks at all that runs
_PATIENCE_SECONDS = 30.0  # without any actor, until that is told
_LONGEST_TEXT = 1000  # of an error, which may be kept a million times
_DEVICE_ERROR = "CUDA error"  # in PyTorch's text: all that follows in the process would fail too
_NODE_DIED = "its node has died"  # in Ray's text, which alone tells it
_OUT_OF_MEMORY = (
    "its actor was ended since its node ran out of memory: use fewer actors, more CPUs for each of them, or fewer "
    "models at once"
)
_DIED = (
    "its actor died (a crash, or ended by the system, which does so without a word if memory runs out: then use fewer "
    "actors or fewer models at once)"
)


@dataclass(frozen=True)
class Outcome(Generic[K, V]):
    """What became of an item."""

    key: K
    """Of the item."""
    value: V | None
    """What the work returned; None with an error."""
    error: str | None
    """Why there is no value, in one line; None without an error."""
    attempts: int
    """How often it was begun: more than once after deaths and timeouts."""


def execute(
    work: Callable[..., Callable[[P], V]],
    items: Iterable[tuple[K, P]],
    *,
    arguments: Sequence[Any] = (),
    actors: int = 0,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    timeout: float = 0.0,
    retries: int = 2,
    what: str = "evaluate",
    unit: str = "item",
    total: int | None = None,
) -> Generator[Outcome[K, V], None, None]:
    """Calls work on the payload of each item, in actors of the connected Ray, and yields outcomes as they come.

    ``work(*arguments)`` is called once in each actor, and what it returns once for each item: a class with a
    ``__call__``, or a function that returns a function. Both arrive by way of Ray's object store, once a node.

    When the generator is closed, or anything is raised through it, all actors are killed. Close it where that may be
    before its end: ``with contextlib.closing(execute(...)) as outcomes``.

    Args:
        work: builds what is called with each payload.
        items: keys and payloads; taken one by one, when an actor is free.
        arguments: of ``work``; those that are no ``ObjectRef`` are put into the object store, once.
        actors: most actors at a time: all are asked for, and those that the cluster has room for work meanwhile; 0 is
            as many as its nodes have room for now.
        num_cpus: CPUs of an actor.
        num_gpus: GPUs of an actor; less than 1 shares one.
        timeout: seconds that an item may take from when a free actor gets it; 0 is for ever.
        retries: further attempts at an item whose actor died, or that took too long.
        what: the verb of the progress bar.
        unit: what an item is, for the bar.
        total: number of items, for the time left; None is unknown, unless ``items`` has a length.

    Raises:
        InputError: a number is out of range, or no node ever has room for an actor: both before anything starts. Or
            ``work`` raised it in the actors.
        RuntimeError: the actors cannot be built; the text has the traceback.
    """
    from sane_ray.preflight import room

    _check(actors=actors, num_cpus=num_cpus, num_gpus=num_gpus, timeout=timeout, retries=retries)
    places = room({"CPU": num_cpus, "GPU": num_gpus}, "an actor")
    size = actors or places
    if total is None and isinstance(items, Sized):
        total = len(items)
    if total is not None:
        size = max(1, min(size, total))
    crew = _Crew(work, arguments, size, num_cpus=num_cpus, num_gpus=num_gpus)
    return _Execution(crew, iter(items), timeout, retries).outcomes(what, unit, total)


def _check(**numbers: float) -> None:
    """Refuses what Ray would refuse later, or never keep count of.

    Raises:
        InputError: names the number.
    """
    for name, number in numbers.items():
        if number < 0 or (number == 0 and name == "num_cpus"):
            least = "above 0, so that actors are counted" if name == "num_cpus" else "0 or more"
            raise InputError(f"{name} is {number:g}: give {least}")
        if number != int(number) and (name in ("actors", "retries") or (number > 1 and name.startswith("num_"))):
            raise InputError(f"{name} is {number:g}: give a whole number, {int(number)} or {int(number) + 1}")


@dataclass(frozen=True)
class _Failure:
    """An exception that was raised in an actor, as text: itself it may not travel."""

    text: str
    trace: str
    is_input: bool

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        """Describes an exception that was just caught."""
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        trace = "".join(traceback.format_exception(error))
        return cls(_one_line(text) + where, trace, isinstance(error, InputError))


class _Worker:
    """In a process of its own: builds the work once and calls it for each item."""

    def build(self, work: Callable[..., Callable[[Any], Any]], *arguments: Any) -> _Failure | None:
        try:
            self.work = work(*arguments)
        except (Exception, SystemExit) as error:
            return _Failure.of(error)
        return None

    def run(self, payload: Any) -> tuple[Any, str | None]:
        """The value, or the error's text."""
        try:
            return self.work(payload), None
        except (Exception, SystemExit) as error:
            return None, _Failure.of(error).text


class _Crew:
    """Actors: asked for, built, free for an item, replaced and ended."""

    def __init__(
        self,
        work: Callable[..., Callable[[Any], Any]],
        arguments: Sequence[Any],
        size: int,
        *,
        num_cpus: float,
        num_gpus: float,
    ) -> None:
        import ray

        self._actor = ray.remote(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="DEFAULT"
        )(_Worker)
        self._work = ray.put(work)
        self._arguments = [each if isinstance(each, ray.ObjectRef) else ray.put(each) for each in arguments]
        self.size = size
        self.actors: set[Any] = set()
        self.free: list[Any] = []
        self.building: dict[Any, Any] = {}
        self._failures = 0
        self._one_was_built = False

    @property
    def built(self) -> int:
        """Actors that work or could."""
        return len(self.actors) - len(self.building)

    def resize(self, wanted: int) -> None:
        """Asks for actors, or ends those that have no work, until there are as many as wanted, or ``size`` of them."""
        while len(self.actors) < min(wanted, self.size):
            actor = self._actor.remote()
            self.actors.add(actor)
            self.building[actor.build.remote(self._work, *self._arguments)] = actor
        while len(self.actors) > wanted and (self.free or self.building):
            self.end(self.free.pop() if self.free else self.building.popitem()[1])

    def welcome(self, built: Any) -> None:
        """Takes an actor that says it is built, or has failed.

        Raises:
            InputError: none can be built, for a reason that ``work`` told so.
            RuntimeError: none can be built.
        """
        import ray

        actor = self.building.pop(built)
        try:
            failure = ray.get(built)
        except ray.exceptions.RayError as error:  # it died, or what it was to be built of could not travel
            failure = _Failure(_reason(error), str(error), is_input=False)
        if failure is None:
            self.free.append(actor)
            self._failures, self._one_was_built = 0, True
            return
        self.end(actor)
        if _NODE_DIED not in failure.trace:  # which says nothing of the work
            self._failures += 1
            self._give_up(failure)

    def _give_up(self, failure: _Failure) -> None:
        """Does with an actor less after some failures one after the other, or without any if there is no hope."""
        if self._failures % _TRIES:
            return
        self.size -= 1
        if self._one_was_built and self.size:
            _LOG.warning("an actor cannot be built, %d are left to work: %s", self.size, failure.text)
        elif failure.is_input:
            raise InputError(failure.text)
        else:
            raise RuntimeError(f"the actors cannot be built, {_TRIES} tries failed: {failure.text}\n\n{failure.trace}")

    def end(self, actor: Any) -> None:
        """Kills an actor, whether or not it has died."""
        import ray

        self.actors.discard(actor)
        ray.kill(actor)

    def end_all(self) -> None:
        """Kills all, unless Ray has ended, which killed them."""
        import ray

        for actor in list(self.actors) if ray.is_initialized() else ():
            self.end(actor)


@dataclass
class _Item:
    key: Any
    payload: Any
    attempts: int = 0
    actor: Any = None
    began: float = 0.0


class _Execution(Generic[K, V]):
    """Items on their way through a crew."""

    def __init__(self, crew: _Crew, items: Iterator[tuple[K, Any]], timeout: float, retries: int) -> None:
        self.crew = crew
        self.items = items
        self.timeout = timeout
        self.retries = retries
        self.again: deque[_Item] = deque()
        self.running: dict[Any, _Item] = {}  # oldest first
        self.exhausted = False
        self.waiting_since: float | None = time.monotonic()

    def outcomes(self, what: str, unit: str, total: int | None) -> Generator[Outcome[K, V], None, None]:
        """Works until there are no items; the crew ends with it, however it ends."""
        from sane_ray.tokens.store.progress_bar import progress_bar  # imports torch, which an actor may not need

        failed = 0
        try:
            with progress_bar(what, total, unit) as bar:
                self.again.extend(self._taken(1))  # without any item, no actor is worth its start
                while self._assign():
                    for outcome in self._round():
                        failed += outcome.error is not None
                        bar.set_postfix_str(f"{self.crew.built} actors, {failed} failed", refresh=False)
                        bar.update()
                        yield outcome
        finally:
            self.crew.end_all()

    def _taken(self, most: int) -> Iterator[_Item]:
        """The next items."""
        for _ in range(most):
            pair = None if self.exhausted else next(self.items, None)
            if pair is None:
                self.exhausted = True
                return
            yield _Item(*pair)

    def _assign(self) -> bool:
        """Gives free actors items, those that are tried again first; whether anything is left to do."""
        while self.crew.free:
            item = self.again.popleft() if self.again else next(self._taken(1), None)
            if item is None:
                break
            item.actor = self.crew.free.pop()
            item.attempts += 1
            item.began = time.monotonic()
            self.running[item.actor.run.remote(item.payload)] = item
        left = len(self.running) + len(self.again)
        self.crew.resize(left if self.exhausted else self.crew.size)
        return left > 0 or not self.exhausted

    def _round(self) -> list[Outcome[K, V]]:
        """Waits until something has happened, and what came of it."""
        outcomes = []
        for reference in self._ready():
            if reference in self.crew.building:
                self.crew.welcome(reference)
            else:
                outcomes.append(self._settle(reference))
        outcomes.extend(self._overdue())
        return [outcome for outcome in outcomes if outcome is not None]

    def _ready(self) -> list[Any]:
        """All that is done, at least one unless time is up for an item."""
        import ray

        references = [*self.crew.building, *self.running]
        patience = _LOOK_SECONDS
        if self.timeout and self.running:
            oldest = next(iter(self.running.values()))
            patience = min(patience, max(0.0, oldest.began + self.timeout - time.monotonic()))
        ready, _ = ray.wait(references, timeout=patience, fetch_local=False)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        self._tell_of_waiting()
        return ready

    def _settle(self, reference: Any) -> Outcome[K, V] | None:
        """The outcome of an item that is done; None if it is to be tried again."""
        import ray

        item = self.running.pop(reference)
        try:
            value, error = ray.get(reference)
        except ray.exceptions.RayTaskError as problem:  # the payload or the value could not travel
            value, error = None, _reason(problem)
        except ray.exceptions.RayError as problem:
            return self._lost(item, _reason(problem))
        if error and _DEVICE_ERROR in error:
            self.crew.end(item.actor)
        else:
            self.crew.free.append(item.actor)
        return Outcome(item.key, value, error, item.attempts)

    def _overdue(self) -> Iterator[Outcome[K, V] | None]:
        """Outcomes of items that take too long; None for those to be tried again."""
        now = time.monotonic()
        for reference, item in list(self.running.items()):
            if not self.timeout or now - item.began < self.timeout:
                return
            del self.running[reference]
            yield self._lost(item, f"took longer than {self.timeout:g} s")

    def _lost(self, item: _Item, reason: str) -> Outcome[K, V] | None:
        """Ends an item's actor; the outcome if it was the last attempt."""
        self.crew.end(item.actor)
        item.actor = None
        if item.attempts > self.retries:
            return Outcome(item.key, None, reason, item.attempts)
        _LOG.warning("%s is tried again after attempt %d: %s", item.key, item.attempts, reason)
        self.again.append(item)
        return None

    def _tell_of_waiting(self) -> None:
        """Says once that the cluster is busy."""
        if self.running:
            self.waiting_since = None
        elif self.waiting_since is not None and time.monotonic() - self.waiting_since > _PATIENCE_SECONDS:
            self.waiting_since = None
            _LOG.warning("no actor works yet: they are being built, or wait until the cluster has room for them")


def _reason(error: BaseException) -> str:
    """What went wrong, from what Ray raised."""
    import ray

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return _OUT_OF_MEMORY
    if _NODE_DIED in str(error) or isinstance(error, ray.exceptions.NodeDiedError | ray.exceptions.ObjectLostError):
        return "the node of its actor was lost"
    if isinstance(error, ray.exceptions.RayActorError):
        return _DIED
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    return _one_line(f"{type(error).__name__}: {error}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_TEXT else f"{line[:_LONGEST_TEXT]}..."
