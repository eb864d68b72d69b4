"""Worker processes that may die: one task at a time each, results in the order of the tasks, a
bounded number under way.

``multiprocessing.Pool`` waits for ever for the result of a worker that was killed, and
``concurrent.futures`` gives up all its workers. Scans come from everywhere, and a library that
crashes on one of them, or takes all the memory, must cost that scan alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from stunet_plugin.errors import PluginError

Task = TypeVar("Task")
Value = TypeVar("Value")

TIME_LIMIT = 3600.0
"""Seconds for one task."""
START_LIMIT = 600.0
"""Seconds for the start of a worker, which is no fault of its task."""
TASKS_PER_PROCESS = 8
"""How many tasks ahead of the first unfinished one may be under way or done."""
LOOK_EVERY = 1.0
"""Seconds between looks at the clock."""
_READY = "ready"
"""A worker's first message. One that dies before it never will work, which must not be taken for
the fault of a scan."""


@dataclass
class Finished(Generic[Task, Value]):
    """A task with its result, or with the reason why there is none."""

    task: Task
    value: Value | None
    failure: str = ""


@dataclass
class _Slot(Generic[Task, Value]):
    task: Task
    finished: Finished[Task, Value] | None = None
    children: list[_Slot[Task, Value]] = field(default_factory=list)


def run_ordered(
    tasks: Iterator[Task],
    work: Callable[[Task], Value],
    processes: int,
    further: Callable[[Value], Sequence[Task]] = lambda _: (),
    time_limit: float = TIME_LIMIT,
) -> Generator[Finished[Task, Value], None, None]:
    """Run tasks in worker processes and yield their results in the order of the tasks.

    Args:
        tasks: taken from as workers become free.
        work: what to do; it is sent to other processes, so it must be a function of a module, or a
            partial of one. It must not return None.
        processes: how many.
        further: tasks that a result brings with it; their results come just before it.
        time_limit: seconds after which a worker is stopped.

    Raises:
        PluginError: no worker can be started.
    """
    run = _Run[Any, Any](tasks, work, processes, further, time_limit)
    try:
        yield from run.results()
    finally:
        run.stop()


class _Run(Generic[Task, Value]):
    def __init__(
        self,
        tasks: Iterator[Task],
        work: Callable[[Task], Value],
        processes: int,
        further: Callable[[Value], Sequence[Task]],
        time_limit: float,
    ) -> None:
        self.tasks, self.further, self.time_limit = tasks, further, time_limit
        self.workers: list[_Worker] = [_Worker(work) for _ in range(processes)]
        self.window = processes * TASKS_PER_PROCESS
        self.slots: deque[_Slot[Task, Value]] = deque()
        self.waiting: deque[_Slot[Task, Value]] = deque()
        self.exhausted = False

    def results(self) -> Iterator[Finished[Task, Value]]:
        while True:
            self._fill()
            yield from self._ready()
            if not self.slots and self.exhausted:
                return
            self._wait()

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _fill(self) -> None:
        """Give every free worker a task."""
        for worker in self.workers:
            if worker.slot is not None:
                continue
            if not self.waiting and not self.exhausted and len(self.slots) < self.window:
                try:
                    slot: _Slot[Task, Value] = _Slot(next(self.tasks))
                except StopIteration:
                    self.exhausted = True
                else:
                    self.slots.append(slot)
                    self.waiting.append(slot)
            if not self.waiting:
                return
            worker.start(self.waiting.popleft())

    def _ready(self) -> Iterator[Finished[Task, Value]]:
        while self.slots and self.slots[0].finished is not None:
            slot = self.slots.popleft()
            if slot.children:
                children, slot.children = slot.children, []
                self.slots.extendleft(reversed([*children, slot]))
                continue
            assert slot.finished is not None
            yield slot.finished

    def _wait(self) -> None:
        busy = [worker for worker in self.workers if worker.slot is not None]
        by_handle: dict[Any, _Worker] = {}
        for worker in busy:
            by_handle[worker.connection] = by_handle[worker.sentinel] = worker
        ready = (
            {id(by_handle[handle]) for handle in wait(list(by_handle), timeout=LOOK_EVERY)}
            if busy
            else set()
        )
        for worker in busy:
            if id(worker) in ready:
                self._collect(worker)
            elif worker.ready and worker.seconds() > self.time_limit:
                worker.stop()
                self._finish(worker, None, f"took longer than {self.time_limit:g} s")
            elif not worker.ready and worker.seconds() > START_LIMIT:
                raise PluginError(
                    f"A worker process was not ready after {START_LIMIT:g} s. Is the machine"
                    " overloaded?"
                )

    def _collect(self, worker: _Worker) -> None:
        try:
            # A worker that ended may have sent its result before.
            message = worker.connection.recv() if worker.connection.poll() else None
        except (EOFError, OSError):
            message = None
        if message == _READY:
            worker.ready, worker.since = True, time.monotonic()
        elif message is not None:
            self._finish(worker, *message)
        elif worker.ready:
            self._finish(worker, None, f"worker process {worker.epitaph()}")
        else:
            raise PluginError(f"A worker process could not be started: it {worker.epitaph()}.")

    def _finish(self, worker: _Worker, value: Value | None, failure: str) -> None:
        slot, worker.slot = worker.slot, None
        assert slot is not None
        slot.finished = Finished(slot.task, value, failure)
        if value is not None:
            slot.children = [_Slot(task) for task in self.further(value)]
            self.waiting.extendleft(reversed(slot.children))


class _Worker:
    """One worker process at a time, started when there is work, replaced when it died."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.slot: _Slot[Any, Any] | None = None
        self.since = 0.0
        self.ready = False
        self.process: Any = None
        self.connection: Connection

    @property
    def sentinel(self) -> int:
        sentinel: int = self.process.sentinel
        return sentinel

    def start(self, slot: _Slot[Any, Any]) -> None:
        if self.process is None or not self.process.is_alive():
            self._spawn()
        try:
            self.connection.send(slot.task)
        except OSError:
            # It died since it was asked.
            self._spawn()
            self.connection.send(slot.task)
        self.slot, self.since = slot, time.monotonic()

    def seconds(self) -> float:
        """How long the worker has been at its task, or starting."""
        return time.monotonic() - self.since

    def _spawn(self) -> None:
        self.stop()
        # Not fork: what the parent has loaded (ITK) runs threads, which a fork would leave behind
        # in the middle of something.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.work), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def epitaph(self) -> str:
        """What ended the process."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """The worker: take a task, send (value, failure), until the parent closes the pipe."""
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
            answer = (work(task), "")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            answer = (
                None,
                (
                    f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}, line"
                    f" {place.lineno})"
                ),
            )
        connection.send(answer)
