"""Workers on the machines of a Ray cluster: each is an actor with its own pipeline, on a GPU of its own where there are any.

Ray finds the machine, moves the arrays, and says when an actor or its machine died; the queue then starts another one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from latent_shift.serve.generator import Generator, Message, Task
from latent_shift.serve.workers import Worker, WorkerDied

_connecting = threading.Lock()


class RayWorker:
    """An actor of a Ray cluster.

    Args:
        number: of the worker, for its name.
        num: workers in all, which share the CPUs.
        address: of the cluster, as `ray.init` takes it; "local" starts one on this machine.
        models, device, engine: see `Generator`.
        threads: of each on the CPU; None is an equal share of the cluster's.
    """

    def __init__(
        self,
        number: int,
        num: int,
        address: str,
        models: Mapping[str, str],
        device: str | None,
        threads: int | None,
        engine: str = "torch",
    ):
        self.name = f"worker {number}"
        self._num, self._address, self._threads = num, address, threads
        self._engine = engine
        self._arguments = (dict(models), device)
        self._actor: Any = None

    def start(self) -> None:
        if self._actor is not None:
            return
        import ray

        with _connecting:
            if not ray.is_initialized():
                try:
                    ray.init(
                        self._address,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        include_dashboard=False,
                    )
                except (ConnectionError, ValueError) as error:
                    raise ValueError(f"--ray {self._address}: {error}") from None
        resources = ray.cluster_resources()
        has_gpus = (
            resources.get("GPU", 0) > 0 and self._arguments[1] in (None, "cuda") and self._engine == "torch"
        )
        cpus = self._threads or max(1, int(resources.get("CPU", 1)) // self._num)
        remote = ray.remote(Generator).options(
            num_gpus=int(has_gpus), num_cpus=1 if has_gpus else cpus, max_concurrency=2
        )
        self._actor = remote.remote(*self._arguments, None if has_gpus else cpus, self._engine)
        try:
            ray.get(self._actor.ready.remote())
        except ray.exceptions.ActorDiedError as error:
            self._actor = None
            if (cause := _init_error(error)) is not None:
                raise ValueError(cause) from None
            raise WorkerDied(f"{self.name} ended") from error

    def run(self, task: Task) -> Iterator[Message]:
        import ray

        try:
            for reference in self._actor.run.options(num_returns="streaming").remote(task):
                yield ray.get(reference)
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.ObjectLostError,
        ) as error:
            self._actor = None
            raise WorkerDied(f"{self.name} ended") from error

    def cancel(self, job_id: str) -> None:
        if self._actor is not None:
            self._actor.cancel.remote(job_id)

    def stop(self) -> None:
        import ray

        if self._actor is not None and ray.is_initialized():
            ray.kill(self._actor)
            self._actor = None


def _init_error(error: Exception) -> str | None:
    """Return what a `Generator` raised when it was made; None if its actor ended for another reason."""
    import ray

    cause = error.__cause__ or getattr(error, "cause", None)
    if isinstance(cause, ray.exceptions.RayTaskError):
        return str(cause.cause)
    text = str(error)
    return (
        text.strip().splitlines()[-1]
        if "The actor died because of an error raised in its creation task" in text
        else None
    )


def connect(
    address: str, num: int, models: Mapping[str, str], device: str | None = None, threads: int | None = None, engine: str = "torch"
) -> list[Worker]:  # fmt: skip
    """Return workers on a cluster; raise RuntimeError without Ray."""
    if find_spec("ray") is None:
        raise RuntimeError("--ray needs the extra: pip install 'latent-shift-video[ray]'")
    return [RayWorker(index + 1, num, address, models, device, threads, engine) for index in range(num)]
