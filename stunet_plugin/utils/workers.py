"""Worker processes that may die: one task at a time each, results in the order of the tasks.

``multiprocessing.Pool`` waits for ever for a worker that was killed, ``concurrent.futures`` gives
up all its workers, and pebble the whole run if one dies while it takes its task.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from stunet_plugin.errors import PluginError

TIME_LIMIT = 3600.0
"""Seconds for one task."""
START_LIMIT = 600.0
"""Seconds for the start of a worker, which is no fault of its task."""
TASKS_PER_PROCESS = 8
"""How many tasks ahead of the first unfinished one may be under way or done."""
LOOK_EVERY = 1.0
"""Seconds between looks at the clock."""
_READY = ("ready",)
"""A worker's first message: one that dies before it cannot work at all."""


class Finished(NamedTuple):
    """A task with its result, or with the reason why there is none (then ``value`` is None)."""

    task: Any
    value: Any
    failure: str = ""


class _Slot:
    def __init__(self, task: Any) -> None:
        self.task = task
        self.finished: Finished | None = None
        self.children: list[_Slot] = []


def run_ordered(
    tasks: Iterator[Any],
    work: Callable[[Any], Any],
    processes: int,
    further: Callable[[Any], Sequence[Any]] = lambda _: (),
    time_limit: float = TIME_LIMIT,
) -> Generator[Finished, None, None]:
    """Run tasks in worker processes and yield their results in the order of the tasks.

    Args:
        tasks: taken from as workers become free.
        work: a function of a module, or a partial of one; it must not return None.
        processes: how many.
        further: tasks that a result brings with it; their results come just before it.
        time_limit: seconds after which a worker is stopped.

    Raises:
        PluginError: no worker can be started.
    """
    workers = [_Worker(work, time_limit) for _ in range(processes)]
    slots: deque[_Slot] = deque()
    waiting: deque[_Slot] = deque()
    more = True
    try:
        while more or slots:
            for worker in workers:
                room = more and len(slots) < processes * TASKS_PER_PROCESS
                if worker.slot is None and not waiting and room:
                    task = next(tasks, None)
                    more = task is not None
                    if more:
                        waiting.append(_Slot(task))
                        slots.append(waiting[0])
                if worker.slot is None and waiting:
                    worker.start(waiting.popleft())
            while slots and (first := slots[0]).finished is not None:
                slots.popleft()
                if first.children:
                    slots.extendleft(reversed([*first.children, first]))
                    first.children = []
                else:
                    yield first.finished
            for worker in _heard(workers):
                slot = worker.slot
                finished = worker.answer()
                if slot is not None and finished is not None:
                    slot.finished = finished
                    if finished.value is not None:
                        slot.children = [_Slot(task) for task in further(finished.value)]
                        waiting.extendleft(reversed(slot.children))
    finally:
        for worker in workers:
            worker.stop()


def _heard(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait for busy workers; return those that said something, ended or took too long."""
    busy = [worker for worker in workers if worker.slot is not None]
    handles = [handle for x in busy for handle in (x.connection, x.process.sentinel)]
    ready = wait(handles, timeout=LOOK_EVERY) if busy else []
    return [x for x in busy if x.late or x.connection in ready or x.process.sentinel in ready]


class _Worker:
    """One process at a time, started when there is work, replaced when it died."""

    def __init__(self, work: Callable[[Any], Any], time_limit: float) -> None:
        self.work, self.time_limit = work, time_limit
        self.slot: _Slot | None = None
        self.process: Any = None

    def start(self, slot: _Slot) -> None:
        for _ in range(2):
            if self.process is None or not self.process.is_alive():
                self._spawn()
            try:
                self.connection.send(slot.task)
                break
            except OSError:  # it died since it was asked
                self.stop()
        self.slot, self.since = slot, time.monotonic()

    def _spawn(self) -> None:
        self.stop()
        # Not fork: what the parent has loaded (ITK) runs threads, which a fork would break.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.work), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    @property
    def late(self) -> bool:
        limit = self.time_limit if self.ready else START_LIMIT
        return time.monotonic() - self.since > limit

    def answer(self) -> Finished | None:
        """Return what became of the task; None while the process starts."""
        assert self.slot is not None
        message: Any = None
        try:
            # A process that ended may have sent its result before.
            if self.connection.poll():
                message = self.connection.recv()
        except (EOFError, OSError):
            pass
        if message == _READY:
            self.ready, self.since = True, time.monotonic()
            return None
        if message is None:
            message = None, self._end()
        task, self.slot = self.slot.task, None
        return Finished(task, *message)

    def _end(self) -> str:
        """Stop the process; return what ended it."""
        late = self.late
        if not late:
            self.process.join(timeout=5)
        code = self.process.exitcode
        self.stop()
        how = f"ended with exit code {code}"
        if late:
            how = f"took longer than {self.time_limit if self.ready else START_LIMIT:g} s"
        elif code is not None and code < 0:
            name = signal.Signals(-code).name
            how = f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        if not self.ready:
            raise PluginError(f"A worker process could not be started: it {how}.")
        return f"worker process {how}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Any, work: Callable[[Any], Any]) -> None:
    """Take a task, send (value, failure), until the parent closes the pipe."""
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries in C complain on the terminal about files that we list ourselves.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    connection.send(_READY)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = work(task), ""
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(place.filename)}, line {place.lineno}"
            answer = None, f"{type(error).__name__}: {error} ({where})"
        connection.send(answer)
