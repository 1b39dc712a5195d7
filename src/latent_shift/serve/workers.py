"""Workers that own a pipeline: processes of this machine. Those of other machines are in ray_workers.py.

A worker that dies loses its job and no more: `run` raises `WorkerDied`, and the next call starts another one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

from tqdm import tqdm

from latent_shift.pipelines import catalog
from latent_shift.runtime import exit_with_parent, set_passive_waiting, skip_packages
from latent_shift.serve.generator import Failed, Finished, Generator, Message, Task

START_SECONDS = 600.0


class WorkerDied(RuntimeError):
    """A worker ended before its job did."""


class Worker(Protocol):
    """What the queue needs of a worker. All but `cancel` are called by one thread."""

    name: str

    def start(self) -> None:
        """Load the models; return when they are loaded. Raise ValueError or RuntimeError if they cannot be, WorkerDied if
        the worker dies."""

    def run(self, task: Task) -> Iterator[Message]:
        """Yield what happens to a job. Raise WorkerDied if the worker dies."""

    def cancel(self, job_id: str) -> None:
        """End a job before its next step."""

    def stop(self) -> None:
        """End the worker at once."""


class ProcessWorker:
    """A worker process of this machine.

    Args:
        number: of the worker, for its name.
        models, device, threads, engine: see `Generator`.
    """

    def __init__(
        self, number: int, models: Mapping[str, str], *, device: str | None = None, threads: int | None = None, engine: str = "torch"
    ):  # fmt: skip
        self.name = f"worker {number}"
        self._arguments = (dict(models), device, threads, engine)
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._sending = threading.Lock()

    def start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_main, args=(other, *self._arguments), name=self.name, daemon=True
        )
        self._process.start()
        other.close()
        if not self._connection.poll(START_SECONDS):
            self.stop()
            raise WorkerDied(f"{self.name} took more than {START_SECONDS:g} s")
        answer = self._receive()
        if isinstance(answer, Failed):
            self.stop()
            raise ValueError(answer.message)

    def run(self, task: Task) -> Iterator[Message]:
        self._send(("run", task))
        while True:
            message = self._receive()
            assert message is not None
            yield message
            if isinstance(message, (Finished, Failed)):
                return

    def cancel(self, job_id: str) -> None:
        with contextlib.suppress(WorkerDied):
            self._send(("cancel", job_id))

    def stop(self) -> None:
        process, connection = self._process, self._connection
        self._process = None
        if process is not None:
            process.kill()
            process.join()
        if connection is not None:
            connection.close()

    def _send(self, message: object) -> None:
        with self._sending:
            try:
                if self._connection is None:
                    raise BrokenPipeError
                self._connection.send(message)
            except OSError as error:
                raise WorkerDied(f"{self.name} ended") from error

    def _receive(self) -> Message | None:
        try:
            assert self._connection is not None
            return self._connection.recv()
        except (EOFError, OSError) as error:
            process, code = self._process, None
            self._process = None
            if process is not None:
                process.join(5)
                process.kill()
                process.join()
                code = process.exitcode
            raise WorkerDied(f"{self.name} ended with status {code}") from error


def _main(
    connection: Connection, models: Mapping[str, str], device: str | None, threads: int | None, engine: str
) -> None:
    """Serve a `ProcessWorker` until its server ends."""
    exit_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when a worker ends
        signal.signal(number, signal.SIG_IGN)
    set_passive_waiting()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    # Any request may name a scheduler that needs SciPy.
    if engine == "torch":
        skip_packages(set.intersection(*map(catalog.unused_packages, models.values())) - {"scipy"})
    try:
        generator = Generator(models, device, threads, engine)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        connection.send(Failed("setup_failed", str(error)))
        return
    connection.send(None)
    tasks: list[Task] = []
    has_task = threading.Condition()

    def listen() -> None:
        while True:
            try:
                verb, content = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if verb == "cancel":
                generator.cancel(content)
                continue
            with has_task:
                tasks.append(content)
                has_task.notify()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        with has_task:
            has_task.wait_for(lambda: tasks)
            task = tasks.pop(0)
        for message in generator.run(task):
            connection.send(message)
