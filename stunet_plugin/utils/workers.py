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
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from stunet_plugin.errors import PluginError

TIME_LIMIT = 3600.0
"""Seconds for one task."""
START_LIMIT = 600.0
"""Seconds for the start of a worker, which is no fault of its task."""
TASKS_PER_PROCESS = 8
"""How many tasks ahead of the first unfinished one may be under way or done."""
_READY = ("ready",)
"""A worker's first message: one that dies before it cannot work at all."""


@dataclass(eq=False)
class Finished:
    """A task with its result, or with the reason why there is none (then ``value`` is None)."""

    task: Any
    value: Any = None
    failure: str = ""


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
    ordered: list[Finished] = []
    waiting: list[Finished] = []
    more = True
    try:
        while more or ordered:
            for worker in workers:
                if worker.task is not None:
                    continue
                if not waiting and more and len(ordered) < processes * TASKS_PER_PROCESS:
                    task = next(tasks, None)
                    more = task is not None
                    if more:
                        waiting = [Finished(task)]
                        ordered += waiting
                if waiting:
                    worker.start(waiting.pop(0))
            while ordered and (ordered[0].value is not None or ordered[0].failure):
                yield ordered.pop(0)
            busy = [worker for worker in workers if worker.task is not None]
            if busy:
                handles = [one for x in busy for one in (x.connection, x.process.sentinel)]
                wait(handles, timeout=1.0)  # to look at the clock
            for finished in filter(None, [worker.answer() for worker in busy]):
                if finished.value is not None:
                    brought = [Finished(task) for task in further(finished.value)]
                    place = ordered.index(finished)
                    ordered[place:place] = brought
                    waiting[:0] = brought
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process at a time, started when there is work, replaced when it died."""

    def __init__(self, work: Callable[[Any], Any], time_limit: float) -> None:
        self.work, self.time_limit = work, time_limit
        self.task: Finished | None = None
        self.process: Any = None

    def start(self, task: Finished) -> None:
        for _ in range(2):
            if self.process is None or not self.process.is_alive():
                self._spawn()
            try:
                self.connection.send(task.task)
                break
            except OSError:  # it died since it was asked; where another does, too, answer() says so
                self.process.join(timeout=5)
        self.task, self.since = task, time.monotonic()

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
        """Return the task with what became of it; None while the process starts or works on it."""
        assert self.task is not None
        message: Any = None
        # In this order: a process that ended may have sent its result before.
        goes_on = self.process.is_alive() and not self.late
        try:
            if self.connection.poll():
                message = self.connection.recv()
            elif goes_on:
                return None
        except (EOFError, OSError):
            pass
        if message == _READY:
            self.ready, self.since = True, time.monotonic()
            return None
        finished, self.task = self.task, None
        finished.value, finished.failure = message or (None, self._end())
        return finished

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
