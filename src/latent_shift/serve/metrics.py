"""Metrics for Prometheus."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from latent_shift.serve.jobs import Job, JobStore

_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Counts jobs, and measures waiting, running and steps."""

    def __init__(self, store: JobStore):
        self.registry = CollectorRegistry()
        options: Any = {"registry": self.registry, "namespace": "latent_shift"}
        self._ended = Counter("jobs", "Jobs that ended, or were queued again", ["status"], **options)
        self._requests = Counter("http_requests", "HTTP requests", ["method", "status"], **options)
        self._wait = Histogram("wait_seconds", "From arrival to begin", buckets=_SECONDS, **options)
        self._job = Histogram("job_seconds", "From begin to end", buckets=_SECONDS, **options)
        self._step = Histogram("step_seconds", "One sampling step", buckets=_SECONDS, **options)
        Gauge("queue_length", "Jobs that wait", **options).set_function(lambda: store.count("queued"))
        Gauge("running", "Jobs in progress", **options).set_function(lambda: store.count("in_progress"))
        Gauge("data_bytes", "Bytes of inputs and results", **options).set_function(store.total_bytes)

    def begin(self, job: Job) -> None:
        self._wait.observe(max(0.0, time.time() - job.created))

    def end(self, job: Job, outcome: str) -> None:
        self._ended.labels(outcome).inc()
        if job.started is not None:
            self._job.observe(max(0.0, time.time() - job.started))

    def step(self, seconds: float) -> None:
        self._step.observe(seconds)

    def request(self, method: str, status: int) -> None:
        # Clients can invent methods.
        self._requests.labels(method if method in _METHODS else "other", str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
