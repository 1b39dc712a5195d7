"""Takes jobs from the store, gives them to workers, and says what becomes of them."""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from latent_shift.serve import results
from latent_shift.serve.events import ALL, Events
from latent_shift.serve.generator import Decoding, Failed, Finished, Step, Task, data_url
from latent_shift.serve.jobs import Job, JobStore
from latent_shift.serve.metrics import Metrics
from latent_shift.serve.workers import Worker, WorkerDied

log = logging.getLogger("latent_shift")
Result = TypeVar("Result")

MAX_PUBLISHED_POSITIONS = 50
"""Jobs at the front whose places are published to those who listen to all."""
RETRY_SECONDS = 1.0
MAX_PAUSE = 60
"""Seconds between two starts of a worker that dies while it loads the models."""
CANCELLED = Failed("cancelled", "cancelled by a client")


@dataclass
class WorkerState:
    """What is known of a worker. `status` is starting, idle, busy, failed or stopped."""

    name: str
    status: str = "starting"
    job_id: str | None = None
    error: str | None = None


@dataclass
class Progress:
    """How far a job in progress is."""

    done: int = 0
    total: int = 0
    stage: str = "sampling"
    seconds_left: float | None = None

    @property
    def percent(self) -> int:
        if self.stage == "decoding":
            return 95
        return int(95 * self.done / self.total) if self.total else 0


@dataclass
class _Run:
    """A job in progress. The flags are set by clients."""

    worker: Worker
    progress: Progress = field(default_factory=Progress)
    cancelled: bool = False
    deleted: bool = False


class _Interrupted(Exception):
    """The server stops, and the job is to be queued again."""


class Queue:
    """Runs jobs, one thread for each worker.

    A job is in `_running` exactly while it is in progress in the store: both change together, under `_changed`.

    Args:
        store: the jobs.
        events: where changes are published.
        workers: not started yet.
        describe: returns the video object of a job, for events.
        metrics: counted here.
        on_failure: called when the last worker could not load its models.
    """

    def __init__(
        self,
        store: JobStore,
        events: Events,
        workers: Sequence[Worker],
        *,
        describe: Callable[[Job], dict[str, Any]],
        metrics: Metrics,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self._store, self._events, self._workers = store, events, workers
        self._describe, self._metrics, self._on_failure = describe, metrics, on_failure
        self._changed = threading.Condition()
        self._running: dict[str, _Run] = {}
        self._decode_seconds: dict[tuple[Any, ...], float] = {}
        self.stopping = False
        self.states = [WorkerState(worker.name) for worker in workers]
        self._threads = [
            threading.Thread(target=self._work, args=(worker, state), name=worker.name, daemon=True)
            for worker, state in zip(workers, self.states, strict=True)
        ]

    @property
    def ready(self) -> bool:
        """Whether a worker has loaded its models."""
        return not self.stopping and any(state.status in ("idle", "busy") for state in self.states)

    @property
    def failure(self) -> str | None:
        """Why no worker could load its models; None if one could, or may yet."""
        if not self.states or any(state.status != "failed" for state in self.states):
            return None
        return self.states[-1].error

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def add(self, job: Job) -> None:
        """Tell workers and listeners of a new job."""
        with self._changed:
            self._changed.notify_all()
        self._publish_job(job)

    def progress(self, job_id: str) -> Progress | None:
        run = self._running.get(job_id)
        return None if run is None else run.progress

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; return whether it was queued or in progress. One in progress ends before its next step."""
        with self._changed:
            run = self._running.get(job_id)
            if run is None:
                is_cancelled = self._store.cancel_queued(job_id)
            else:
                run.cancelled = is_cancelled = True
        if run is not None:
            run.worker.cancel(job_id)
        elif is_cancelled:
            self._publish(job_id)
            self._publish_positions()
        return is_cancelled

    def delete(self, job_id: str) -> None:
        """Delete a job with its files; one in progress is cancelled first, and deleted when its worker has let go of it."""
        with self._changed:
            run = self._running.get(job_id)
            if run is None:
                self._store.delete(job_id)
            else:
                run.cancelled = run.deleted = True
        if run is not None:
            run.worker.cancel(job_id)
        self._events.publish(job_id, "deleted", {"id": job_id})
        self._publish_positions()

    def keep_quota(self, job_id: str) -> None:
        """Delete the oldest results for the space of a new one."""
        for deleted in self._store.keep_quota(spared=job_id):
            self._events.publish(deleted, "deleted", {"id": deleted})

    def is_deleted(self, job_id: str) -> bool:
        run = self._running.get(job_id)
        return run is not None and run.deleted

    def stop(self, seconds: float) -> None:
        """Take no more jobs; let the running steps end, queue their jobs again, and end the workers.

        Args:
            seconds: after which workers that have not ended their step are killed.
        """
        with self._changed:
            self.stopping = True
            running = dict(self._running)
            self._changed.notify_all()
        for job_id, run in running.items():
            run.worker.cancel(job_id)
        end = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0, end - time.monotonic()))
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(1)

    # --- the thread of a worker

    def _work(self, worker: Worker, state: WorkerState) -> None:
        while self._start(worker, state):
            job = self._next(worker)
            if job is None:
                break
            state.status, state.job_id = "busy", job.id
            is_alive = self._run(job)
            state.status, state.job_id = "idle" if is_alive else "starting", None
        if state.status != "failed":
            state.status = "stopped"

    def _start(self, worker: Worker, state: WorkerState) -> bool:
        """Start a worker that is not running; return whether it runs."""
        for attempt in itertools.count(1):
            if self.stopping:
                return False
            try:
                if state.status == "starting":
                    begun = time.monotonic()
                    worker.start()
                    log.info("%s is ready after %.1f s", worker.name, time.monotonic() - begun)
                state.status, state.error = "idle", None
                return True
            except WorkerDied as error:
                state.status, state.error = "starting", str(error)
                pause = min(2**attempt, MAX_PAUSE)
                log.warning("%s while it loaded the models; trying again in %d s", error, pause)
                with self._changed:
                    self._changed.wait_for(lambda: self.stopping, timeout=pause)
            except Exception as error:
                state.status, state.error = "failed", str(error)
                log.error("%s: %s", worker.name, error)
                if self.failure is not None:
                    self._on_failure()
                return False
        raise AssertionError

    def _next(self, worker: Worker) -> Job | None:
        """Wait for a job and take it; None if the server stops."""
        while True:
            with self._changed:
                if self.stopping:
                    return None
                job = self._try(self._store.claim)
                if job is not None:
                    self._running[job.id] = _Run(worker)
                    return job
            for job_id in self._try(self._store.delete_expired) or ():
                self._events.publish(job_id, "deleted", {"id": job_id})
            with self._changed:
                if not self.stopping and not self._store.count("queued"):
                    self._changed.wait(timeout=60)
                else:
                    self._changed.wait(timeout=RETRY_SECONDS)

    def _try(self, change: Callable[[], Result]) -> Result | None:
        """Change the store; None if its disk is full."""
        try:
            return change()
        except OSError as error:
            log.error("%s", error.strerror or error)
            return None

    def _run(self, job: Job) -> bool:
        """Run a job; return whether the worker lives on."""
        run, is_alive, begun = self._running[job.id], True, time.monotonic()
        self._metrics.begin(job)
        self._publish_job(job)
        self._publish_positions()
        ending: Finished | Failed | WorkerDied | _Interrupted
        try:
            ending = self._generate(job, run)
        except _Interrupted as error:
            ending = error
        except WorkerDied as error:
            log.warning("%s while it ran %s", error, job.id)
            ending, is_alive = error, False
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            log.error("%s: %s", job.id, error)
            ending = Failed("disk_full" if full else "generation_failed", error.strerror or str(error))
        except Exception as error:  # of a result that cannot be written, for example: the worker lives on
            log.exception("%s", job.id)
            ending = Failed("generation_failed", str(error))
        outcome = self._settle(job, run, ending)
        reason = f": {ending.message}" if outcome == "failed" and isinstance(ending, Failed) else ""
        log.info("%s %s after %.1f s%s", job.id, outcome, time.monotonic() - begun, reason)
        self._metrics.end(job, outcome)
        self._events.forget(job.id)
        if outcome != "deleted":
            self._publish(job.id)
        return is_alive

    def _generate(self, job: Job, run: _Run) -> Finished | Failed:
        """Give a job to its worker, publish its progress, and write its result."""
        inputs = {name: (self._store.path(job.id) / "inputs" / name).read_bytes() for name in job.inputs}
        shape = (job.model, *(job.result.get(name) for name in ("num_frames", "width", "height")))
        progress, start = run.progress, time.monotonic()
        previous = start
        for message in run.worker.run(Task(job.id, job.model, job.request, inputs)):
            now = time.monotonic()
            if isinstance(message, (Step, Decoding)) and (run.cancelled or self.stopping):
                run.worker.cancel(job.id)  # an earlier cancel may have come before the job
            if isinstance(message, Step):
                self._metrics.step(now - previous)
                previous = now
                seconds_left = (now - start) / message.done * (message.total - message.done)
                progress.done, progress.total = message.done, message.total
                progress.seconds_left = round(seconds_left + self._decode_seconds.get(shape, 0), 2)
                self._publish_progress(job, progress)
                if message.preview is not None and job.kind == "video":
                    data = {"id": job.id, "image": data_url(message.preview)}
                    self._events.publish(job.id, "preview", data)
            elif isinstance(message, Decoding):
                progress.stage, progress.seconds_left = "decoding", self._decode_seconds.get(shape)
                self._publish_progress(job, progress)
            elif isinstance(message, Failed):
                if message.code == "cancelled" and not run.cancelled:
                    raise _Interrupted
                return message
            else:
                self._decode_seconds[shape] = now - previous
                if not run.cancelled:
                    folder = self._store.path(job.id)
                    results.write_results(folder, message.frames, fps=message.fps, metadata=message.metadata)
                return message
        raise WorkerDied(f"{run.worker.name} said nothing more")

    def _settle(self, job: Job, run: _Run, ending: Finished | Failed | WorkerDied | _Interrupted) -> str:
        """Write what became of a job; return it: completed, failed, cancelled, deleted or requeued. While the disk is full, it
        is tried again: it must not be forgotten."""
        with self._changed:
            while True:
                try:
                    outcome = self._write_ending(job, run, ending)
                    break
                except OSError as error:
                    if self.stopping:  # the next server finds the job in progress
                        outcome = "requeued"
                        break
                    log.error("%s; trying again", error.strerror or error)
                    self._changed.wait(timeout=RETRY_SECONDS)
            del self._running[job.id]
            self._changed.notify_all()
        return outcome

    def _write_ending(
        self, job: Job, run: _Run, ending: Finished | Failed | WorkerDied | _Interrupted
    ) -> str:
        if run.cancelled:
            self._store.fail(job.id, CANCELLED.code, CANCELLED.message)
            if run.deleted:
                self._store.delete(job.id)
            return "deleted" if run.deleted else "cancelled"
        if isinstance(ending, Finished):
            num_frames, height, width, _ = ending.frames.shape
            result = {
                "fps": ending.fps, "num_frames": num_frames, "width": width, "height": height, "settings": ending.settings,
            }  # fmt: skip
            self._store.complete(job.id, result)
            self.keep_quota(job.id)
            return "completed"
        if isinstance(ending, Failed):
            self._store.fail(job.id, ending.code, ending.message)
            return "failed"
        counts = isinstance(ending, WorkerDied) and not self.stopping
        return "requeued" if self._store.requeue(job, str(ending), counts=counts) else "failed"

    # --- events

    def _publish_job(self, job: Job) -> None:
        if job.kind == "video":
            self._events.publish(job.id, job.status, self._describe(job))

    def _publish(self, job_id: str) -> None:
        job = self._store.get(job_id)
        if job is not None:
            self._publish_job(job)

    def _publish_progress(self, job: Job, progress: Progress) -> None:
        data = {
            "id": job.id, "stage": progress.stage, "step": progress.done, "of": progress.total, "progress": progress.percent,
            "eta_ms": None if progress.seconds_left is None else round(1000 * progress.seconds_left),
        }  # fmt: skip
        if job.kind == "video":
            self._events.publish(job.id, "progress", data)

    def _publish_positions(self) -> None:
        """Tell those who listen to queued jobs their new places."""
        ids = set(self._events.jobs_with_listeners())
        jobs = [job for job_id in ids - {ALL} if (job := self._store.get(job_id)) is not None]
        if ALL in ids:
            jobs += self._store.videos(limit=MAX_PUBLISHED_POSITIONS, descending=False, status="queued")
        for job in {job.id: job for job in jobs}.values():
            if job.status == "queued":
                self._publish_job(job)
