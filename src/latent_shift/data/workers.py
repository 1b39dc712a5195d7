"""Call a function in worker processes, of which each may die without harm to the others.

`concurrent.futures.ProcessPoolExecutor` ends all work when one process dies, and waits forever for a process
that was killed while it returned a result.

Processes are spawned and not forked: a fork copies locks that other threads hold, such as those of torch, and waits
for them for ever. A process for decoding takes 0.3 s to start instead of 0.01 s.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any

from latent_shift.runtime import exit_with_parent

_GUARD = 'pass workers=1, or work in a script file below `if __name__ == "__main__":`'


class WorkerDied(RuntimeError):
    """A worker process ended during a call, or took too long for it."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    has_started: bool = False


class Workers:
    """A pool of processes for one function. A process that dies fails its own call and is replaced.

    Args:
        function: called in the processes; importable by name.
        num: number of processes.
        seconds: time after which a call is given up and its process is killed.
        initializer: called in each process before the first call.
        initargs: its arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        num: int,
        *,
        seconds: float = float("inf"),
        initializer: Callable[..., object] | None = None,
        initargs: Sequence[object] = (),
    ):
        self._context = multiprocessing.get_context("spawn")
        # A process opens this only after it watches its parent: to find the function may take long imports.
        self._arguments = (pickle.dumps(function), initializer, tuple(initargs))
        self._seconds = seconds
        self._starting = threading.Lock()
        self._closed = False
        self._all: set[BaseProcess] = set()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(num):
            self._idle.put(self._start())
        self._threads = ThreadPoolExecutor(num)  # each talks to one process at a time

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes; calls that have not begun are cancelled."""
        with self._starting:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._threads.shutdown()
        for process in self._all:
            process.join()

    def submit(self, *args: object) -> Future:
        """Call the function with `args` in one of the processes.

        Returns:
            A future with its result, or with its exception: `WorkerDied` if the process died.
        """
        return self._threads.submit(self._call, args)

    def _start(self) -> _Worker:
        with self._starting:  # else a process that starts while all are ended would be left
            if self._closed:
                raise WorkerDied("the workers were closed")
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
            with _interrupts_held():
                process.start()
            theirs.close()
            self._all.add(process)
            return _Worker(process, ours)

    def _call(self, args: tuple) -> Any:
        worker = self._idle.get()
        try:
            is_error, result = self._exchange(worker, args)
        except BaseException as error:
            # Whatever was raised, it is not known what the process does now. It could be an answer that cannot be unpickled.
            if isinstance(error, (EOFError, OSError)):
                worker.process.join(5)  # it is ending, with a reason
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
            try:
                replacement = self._start()
            except OSError:  # no memory for another process: the next call fails, and so on
                replacement = worker
            self._idle.put(replacement)
            if isinstance(error, (EOFError, OSError)):
                reason = _describe_end(worker.process.exitcode)
                if not worker.has_started and (worker.process.exitcode or 0) >= 0:
                    raise RuntimeError(f"{reason} while it started; {_GUARD}") from error
                raise WorkerDied(reason) from error
            raise
        self._idle.put(worker)
        if is_error:
            raise result
        return result

    def _exchange(self, worker: _Worker, args: tuple) -> tuple[bool, Any]:
        """Send the arguments and wait for the answer."""
        if not worker.has_started:
            self._receive(worker)
            worker.has_started = True
        worker.connection.send(args)
        return self._receive(worker)

    def _receive(self, worker: _Worker) -> Any:
        deadline = time.monotonic() + self._seconds
        while not worker.connection.poll(1):
            if time.monotonic() > deadline:
                raise WorkerDied(f"took longer than {self._seconds:g} s")
            if not worker.process.is_alive() and not worker.connection.poll():
                raise EOFError
        return worker.connection.recv()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back in the block. A process that starts in it never gets it, not even before `_serve` ignores it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe_end(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"the worker process ended with exit status {exitcode}"
    name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else f"signal {-exitcode}"
    hint = ", perhaps because the memory was full" if name == "SIGKILL" else ""
    return f"the worker process was ended by {name}{hint}"


def _serve(
    connection: Connection,
    pickled_function: bytes,
    initializer: Callable[..., object] | None,
    initargs: tuple,
) -> None:
    """Answer calls until the process is killed, or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    exit_with_parent()
    failure: Exception | None = None
    try:
        if initializer is not None:
            initializer(*initargs)
        function = pickle.loads(pickled_function)
    except Exception as error:
        failure = error
    connection.send("started")
    while True:
        try:
            args = connection.recv()
        except EOFError:
            return
        try:
            if failure is not None:
                raise failure
            answer = (False, function(*args))
        except Exception as error:
            answer = (True, error)
        connection.send(answer)
