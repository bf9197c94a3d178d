"""Warm worker processes of one thread each: the right grain for many small experiments."""

import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

J = TypeVar("J")
R = TypeVar("R")

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read by libraries as they load


class JobError(RuntimeError):
    """A job failed; the message holds its traceback, `job` the job."""

    def __init__(self, job: Any, reason: str) -> None:
        super().__init__(f"job {job!r} failed\n{reason}")
        self.job = job


def run_all(function: Callable[[J], R], jobs: Iterable[J], *, workers: int | None = None) -> Iterator[tuple[J, R]]:
    """Run `function(job)` for all jobs and yield each (job, result) as soon as it is there, in any order.

    The processes start once, import what they need once, run on one thread and end with this one, however
    it ends. Leaving the iterator early, by Ctrl-C for instance, stops them at once; what was yielded is the
    caller's.

    Args:
        function: importable by name, as are the jobs' and results' types: they are pickled.
        jobs: any number.
        workers: processes; None is one for each core. With 0, or with a single job, everything runs in this
            process, on one thread too.

    Raises:
        JobError: from the first job that raises, whose result cannot be pickled, or whose process dies.
    """
    jobs = list(jobs)
    if workers == 0 or len(jobs) <= 1:
        yield from _inline(function, jobs)
    else:
        with warm(function, workers=min(workers or cores(), len(jobs))) as run:
            yield from run(jobs)


@contextmanager
def warm(
    function: Callable[[J], R], *, workers: int | None = None
) -> Iterator[Callable[[Iterable[J]], Iterator[tuple[J, R]]]]:
    """Processes that stay for several rounds of jobs: `run(jobs)` does what `run_all` does.

    They start with the first round and stop when the context is left.
    """
    connections: list[Connection] = []
    processes: list[Any] = []

    def run(jobs: Iterable[J]) -> Iterator[tuple[J, R]]:
        if not processes:
            _start(function, workers or cores(), processes, connections)
        return _spread(list(jobs), connections)

    try:
        yield run
    finally:
        for process in processes:
            process.kill()  # a terminated one may hang in its own clean-up
        for process in processes:
            process.join()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inline(function: Callable[[J], R], jobs: list[J]) -> Iterator[tuple[J, R]]:
    import torch  # workers do without it where the jobs do

    threads = torch.get_num_threads()
    for job in jobs:
        torch.set_num_threads(1)
        try:
            result = function(job)
        except Exception as error:
            raise JobError(job, traceback.format_exc()) from error
        finally:
            torch.set_num_threads(threads)
        yield job, result


def _start(function: Callable[[J], R], workers: int, processes: list[Any], connections: list[Connection]) -> None:
    context = get_context("spawn")
    outside = {name: os.environ.get(name) for name in _THREADS}
    resource_tracker.ensure_running()  # it lets signals through when it starts, so before they are held back
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is the parent's, a bit later
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the worker's death closes the pipe
            processes.append(process)
            connections.append(ours)
    finally:
        for name, value in outside.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _spread(jobs: list[J], connections: list[Connection]) -> Iterator[tuple[J, R]]:
    waiting: deque[J] = deque(jobs)
    running: dict[Any, J] = {}
    for connection in connections[: len(jobs)]:
        _send(connection, waiting.popleft(), running)
    while running:
        ready: list[Any] = wait(list(running))
        for connection in ready:
            job = running.pop(connection)
            try:
                done, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                raise JobError(job, "its process died") from None
            if not done:
                raise JobError(job, result)
            if waiting:
                _send(connection, waiting.popleft(), running)
            yield job, result


def _send(connection: Connection, job: J, running: dict[Any, J]) -> None:
    try:
        message = pickle.dumps(job)
    except Exception as error:
        raise JobError(job, traceback.format_exc()) from error
    connection.send_bytes(message)
    running[connection] = job


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """A worker's life: one job after another, until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent acts
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            message = pickle.dumps((True, function(job)))
        except Exception:
            message = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(message)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
