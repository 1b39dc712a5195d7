"""Events of jobs, from the threads of the workers to the clients that listen."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

FINAL = ("completed", "failed", "deleted")
PASSING = ("progress", "preview")
"""Events that a later one of the same name replaces. Only these are stored, the others are in the database."""
ALL = ""
"""Stands for every job."""
MAX_STORED = 64
"""Events of a job that a client can catch up on with Last-Event-ID."""
MAX_WAITING = 256
"""Events that wait for one client; a client that is so slow loses passing events, then the stream."""
MAX_LISTENERS = 256


@dataclass(frozen=True)
class Event:
    """`id` is unique among all events of all runs of a server; `name` is queued, in_progress, progress, preview, completed,
    failed or deleted."""

    id: str
    name: str
    data: dict[str, Any]


class TooManyListeners(RuntimeError):
    """More streams than `MAX_LISTENERS`."""


class _Listener:
    """The events that wait for one client. Used by the event loop's thread alone."""

    def __init__(self, events: list[Event]):
        self._events = deque(events)
        self._has_news = asyncio.Event()
        self._is_closed = False

    def put(self, event: Event) -> None:
        if len(self._events) >= MAX_WAITING:
            self._events = deque(old for old in self._events if old.name not in PASSING)
        if len(self._events) >= MAX_WAITING:
            self._is_closed = True
        else:
            self._events.append(event)
        self._has_news.set()

    def close(self) -> None:
        self._is_closed = True
        self._has_news.set()

    async def get(self) -> Event | None:
        """Return the next event, None at the end of the stream."""
        while not self._events:
            if self._is_closed:
                return None
            self._has_news.clear()
            await self._has_news.wait()
        return self._events.popleft()


class Events:
    """Publishes events of jobs. `publish` and `forget` may be called by any thread, the rest by the event loop's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._stored: dict[str, deque[Event]] = {}
        self._listeners: dict[str, set[_Listener]] = defaultdict(set)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop of the listeners."""
        self._loop = loop

    def publish(self, job_id: str, name: str, data: dict[str, Any]) -> None:
        """Send an event to the listeners of a job."""
        with self._lock:
            event = Event(f"{self._start}-{next(self._numbers)}", name, data)
            if name in PASSING:
                stored = self._stored.setdefault(job_id, deque(maxlen=MAX_STORED))
                for old in [
                    old for old in stored if old.name == name == "preview"
                ]:  # only the latest is of use
                    stored.remove(old)
                stored.append(event)
            listeners = [*self._listeners.get(job_id, ()), *self._listeners.get(ALL, ())]
            loop = self._loop
        if listeners and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_put, listeners, event)

    def forget(self, job_id: str) -> None:
        """Drop what is stored of a job."""
        with self._lock:
            self._stored.pop(job_id, None)

    def jobs_with_listeners(self) -> list[str]:
        """Return the ids of the jobs that somebody listens to, and `ALL` if somebody listens to every job."""
        with self._lock:
            return list(self._listeners)

    @contextmanager
    def listen(self, job_id: str, last_id: str | None = None) -> Iterator[AsyncIterator[Event]]:
        """Listen to a job from now on, in the block: iterate over its events as they come, first those after `last_id` if they
        are still stored, else the latest of each name. The iterator ends with a final event, when the server stops, or when
        the client is too slow. With `ALL`, it yields the events of every job.

        Raises:
            TooManyListeners: see there.
        """
        with self._lock:
            if sum(map(len, self._listeners.values())) >= MAX_LISTENERS:
                raise TooManyListeners(f"{MAX_LISTENERS} streams are open")
            stored = list(self._stored.get(job_id, ()))
            ids = [event.id for event in stored]
            if last_id in ids:
                missed = stored[ids.index(last_id) + 1 :]
            else:
                latest = {event.name: event for event in stored}
                missed = [event for event in stored if latest[event.name] is event]
            listener = _Listener(missed)
            self._listeners[job_id].add(listener)
        if self.closed:
            listener.close()
        try:
            yield self._iterate(job_id, listener)
        finally:
            with self._lock:
                self._listeners[job_id].discard(listener)
                if not self._listeners[job_id]:
                    del self._listeners[job_id]

    async def _iterate(self, job_id: str, listener: _Listener) -> AsyncIterator[Event]:
        while (event := await listener.get()) is not None:
            yield event
            if event.name in FINAL and job_id != ALL:
                return

    def close(self) -> None:
        """End all streams, so that the server can stop."""
        self.closed = True
        with self._lock:
            listeners = [listener for group in self._listeners.values() for listener in group]
        for listener in listeners:
            listener.close()


def _put(listeners: list[_Listener], event: Event) -> None:
    for listener in listeners:
        listener.put(event)
