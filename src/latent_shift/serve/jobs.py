"""The queue: jobs in an SQLite database, their inputs and results in folders beside it.

A job is queued, in progress, completed or failed. Each change is one transaction, on the disk before the call returns, so
that a server that is killed loses no job: what was in progress is queued again, once.

    DATA/jobs.sqlite
    DATA/jobs/<id>/inputs/<field>      files that came with the request
    DATA/jobs/<id>/frames.png          the frames side by side, without loss
    DATA/jobs/<id>/video.mp4, ...      made from these when they are asked for
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latent_shift.files import atomic_write

MAX_ATTEMPTS = 2
"""How often a job is begun before it fails because the server or its worker died."""
_ID = re.compile("video_[0-9a-f]{24}")
Status = Literal["queued", "in_progress", "completed", "failed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    status TEXT NOT NULL,
    model TEXT NOT NULL,
    request TEXT NOT NULL,
    inputs TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    expires REAL,
    error_code TEXT,
    error_message TEXT,
    result TEXT,
    bytes INTEGER NOT NULL DEFAULT 0,
    idempotency_key TEXT UNIQUE,
    request_hash TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
"""
_COLUMNS = (
    "number", "id", "kind", "status", "model", "request", "inputs", "attempts", "created", "started", "ended", "expires", "error_code",
    "error_message", "result", "bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A row of the database. Times are seconds since 1970.

    Attributes:
        number: place in the order of arrival.
        kind: "video", or "image" for those that `POST /v1/images/generations` made.
        request: arguments of `Request`, without files.
        inputs: the fields that are files.
        attempts: how often it was begun.
        result: fps, frames, size and settings of a completed job.
        bytes: size of its files.
    """

    number: int
    id: str
    kind: str
    status: Status
    model: str
    request: dict[str, Any]
    inputs: list[str]
    attempts: int
    created: float
    started: float | None
    ended: float | None
    expires: float | None
    error_code: str | None
    error_message: str | None
    result: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0


class KeyReused(ValueError):
    """An idempotency key that another request had."""


class QueueFull(RuntimeError):
    """As many jobs wait as may."""


class JobStore:
    """Jobs of a data folder. May be used by several threads of one process; the folder must be locked by the caller.

    Args:
        folder: data folder, created if missing.
        max_queued: jobs that may wait.
        max_bytes: bytes of all files; the oldest ended jobs are deleted to keep it.
        keep_seconds: time after which an ended job is deleted; None keeps it.

    Raises:
        ValueError: a folder `jobs` that is somebody else's, or a database that is none of ours.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_queued: int = 1000,
        max_bytes: int = 10 * 2**30,
        keep_seconds: float | None = None,
    ):
        self.folder = Path(folder)
        path = self.folder / "jobs.sqlite"
        if not path.exists() and (self.folder / "jobs").exists() and any((self.folder / "jobs").iterdir()):
            raise ValueError(
                f"{self.folder / 'jobs'}: not empty, but {path} is missing; expected another --data folder"
            )
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        self.max_queued, self.max_bytes, self.keep_seconds = max_queued, max_bytes, keep_seconds
        self._lock = threading.RLock()
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)
            self._select("LIMIT 1")
        except sqlite3.Error as error:
            raise ValueError(f"{path}: cannot be used: {error}") from None

    def close(self) -> None:
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction; raise OSError if the disk is full."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except BaseException as error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    number = errno.EBUSY if "locked" in str(error) else errno.ENOSPC
                    raise OSError(number, f"the database cannot be written: {error}") from error
                raise

    def _select(self, where: str, *values: Any) -> list[Job]:
        with self._lock:
            rows = self._database.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM jobs {where}", values
            ).fetchall()
        return [_to_job(row) for row in rows]

    def path(self, job_id: str) -> Path:
        """Return the folder of a job's files."""
        return self.folder / "jobs" / job_id

    # --- what clients do

    def add(
        self,
        request: Mapping[str, Any],
        *,
        model: str,
        kind: str = "video",
        inputs: Mapping[str, bytes] | None = None,
        result: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        request_hash: str | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job; return it and whether it is new.

        Args:
            request, model, kind: see `Job`.
            inputs: contents of the files, by the names of their fields.
            result: what is known already of the result: its frames and size.
            idempotency_key, request_hash: the same key with the same hash is the same job.

        Raises:
            KeyReused: the key belongs to another request.
            QueueFull: too many jobs wait.
            OSError: the disk is full; the job does not exist then.
        """
        job_id, inputs = f"video_{secrets.token_hex(12)}", inputs or {}
        size = sum(map(len, inputs.values()))
        if idempotency_key is not None and (job := self._by_key(idempotency_key, request_hash)):
            return job, False
        if self.count("queued") >= self.max_queued:
            raise QueueFull(f"the queue is full: {self.max_queued} jobs wait")
        if size:
            self.keep_quota(size)
            if self.total_bytes() + size > self.max_bytes:
                raise OSError(errno.ENOSPC, "the files of waiting jobs take all the space there may be")
        try:
            for name, content in inputs.items():
                (self.path(job_id) / "inputs").mkdir(parents=True, exist_ok=True)
                with atomic_write(self.path(job_id) / "inputs" / name) as file:
                    file.write(content)
            with self._transaction() as database:
                if idempotency_key is not None and (job := self._by_key(idempotency_key, request_hash)):
                    shutil.rmtree(self.path(job_id), ignore_errors=True)  # another thread was faster
                    return job, False
                database.execute(
                    "INSERT INTO jobs (id, kind, status, model, request, inputs, created, result, bytes, idempotency_key, request_hash) "
                    "VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        job_id, kind, model, json.dumps(dict(request)), json.dumps(list(inputs)), time.time(),
                        json.dumps(dict(result or {})), size, idempotency_key, request_hash,
                    ),
                )  # fmt: skip
        except BaseException:
            shutil.rmtree(self.path(job_id), ignore_errors=True)
            raise
        return self.get(job_id), True  # type: ignore[return-value]

    def _by_key(self, key: str, request_hash: str | None) -> Job | None:
        with self._lock:
            query = "SELECT id, request_hash FROM jobs WHERE idempotency_key = ?"
            row = self._database.execute(query, (key,)).fetchone()
        if row is None:
            return None
        if row[1] != request_hash:
            raise KeyReused(f"Idempotency-Key {key!r:.80} was used with another request")
        return self.get(row[0])

    def get(self, job_id: str) -> Job | None:
        """Return a job; None if there is none."""
        jobs = self._select("WHERE id = ?", job_id)
        return jobs[0] if jobs else None

    def videos(
        self, *, limit: int, after: int | None = None, descending: bool = True, status: str | None = None
    ) -> list[Job]:
        """Return videos in the order of arrival, at most `limit`, that come after the job of a number."""
        order, sign = ("DESC", "<") if descending else ("ASC", ">")
        where, values = "WHERE kind = 'video'", list[Any]()
        if after is not None:
            where, values = f"{where} AND number {sign} ?", [after]
        if status is not None:
            where, values = f"{where} AND status = ?", [*values, status]
        return self._select(f"{where} ORDER BY number {order} LIMIT ?", *values, limit)

    def count(self, status: str) -> int:
        with self._lock:
            return self._database.execute("SELECT COUNT(*) FROM jobs WHERE status = ?", (status,)).fetchone()[
                0
            ]

    def position(self, job: Job) -> int:
        """Return the place of a queued job: 1 is next."""
        with self._lock:
            query = "SELECT COUNT(*) FROM jobs WHERE status = 'queued' AND number <= ?"
            return self._database.execute(query, (job.number,)).fetchone()[0]

    def cancel_queued(self, job_id: str) -> bool:
        """Fail a job that still waits, as cancelled; return whether it did."""
        return self._end(job_id, "queued", "failed", code="cancelled", message="cancelled by a client")

    def delete(self, job_id: str) -> None:
        """Delete a job that is not in progress, and its files."""
        with self._transaction() as database:
            database.execute("DELETE FROM jobs WHERE id = ? AND status != 'in_progress'", (job_id,))
            row = database.execute("SELECT 1 FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            shutil.rmtree(self.path(job_id), ignore_errors=True)

    # --- what workers do

    def claim(self) -> Job | None:
        """Return the job that waits longest, now in progress; None if none waits."""
        with self._transaction() as database:
            row = database.execute(
                "UPDATE jobs SET status = 'in_progress', started = ?, attempts = attempts + 1 WHERE number = "
                f"(SELECT MIN(number) FROM jobs WHERE status = 'queued') RETURNING {', '.join(_COLUMNS)}",
                (time.time(),),
            ).fetchone()
        return None if row is None else _to_job(row)

    def complete(self, job_id: str, result: Mapping[str, Any]) -> bool:
        """Mark a job in progress, whose files are written, as completed; return whether it was in progress."""
        is_completed = self._end(job_id, "in_progress", "completed", result=result)
        self.update_bytes(job_id)
        return is_completed

    def fail(self, job_id: str, code: str, message: str) -> bool:
        """Mark a job in progress as failed."""
        return self._end(job_id, "in_progress", "failed", code=code, message=message)

    def _end(
        self,
        job_id: str,
        before: Status,
        after: Status,
        *,
        code: str | None = None,
        message: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> bool:
        now = time.time()
        expires = None if self.keep_seconds is None else now + self.keep_seconds
        text = None if result is None else json.dumps(dict(result))
        with self._transaction() as database:
            cursor = database.execute(
                "UPDATE jobs SET status = ?, ended = ?, expires = ?, error_code = ?, error_message = ?, result = COALESCE(?, result) "
                "WHERE id = ? AND status = ?",
                (after, now, expires, code, message, text, job_id, before),
            )
        return cursor.rowcount == 1

    def requeue(self, job: Job, reason: str, *, counts: bool = True) -> bool:
        """Queue a job in progress again, at its old place; or fail it if it was begun `MAX_ATTEMPTS` times.

        Args:
            job: the job.
            reason: of the failure.
            counts: whether this was an attempt; one that the server itself stopped was none.

        Returns:
            Whether it is queued.
        """
        if counts and job.attempts >= MAX_ATTEMPTS:
            self.fail(job.id, "interrupted", f"{reason}, {job.attempts} times")
            return False
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET status = 'queued', started = NULL, attempts = attempts - ? WHERE id = ? AND status = 'in_progress'",
                (0 if counts else 1, job.id),
            )
        return True

    def recover(self) -> tuple[int, int]:
        """Queue what was in progress when the server died, and remove files of jobs that do not exist. Call it once, before
        the workers start.

        Returns:
            How many jobs are queued again, and how many failed because it was not the first time.
        """
        for job in self._select("WHERE kind = 'image'"):  # the clients that waited for them are gone
            self.fail(job.id, "interrupted", "the server ended")
            self.delete(job.id)
        outcomes = [
            self.requeue(job, "the server ended while it ran")
            for job in self._select("WHERE status = 'in_progress'")
        ]
        known = {job.id for job in self._select("")}
        for folder in (self.folder / "jobs").iterdir():
            if _ID.fullmatch(folder.name) and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        self.delete_expired()
        return sum(outcomes), len(outcomes) - sum(outcomes)

    # --- space

    def update_bytes(self, job_id: str) -> None:
        """Count the bytes of a job's files."""
        size = sum(path.stat().st_size for path in self.path(job_id).rglob("*") if path.is_file())
        with self._transaction() as database:
            database.execute("UPDATE jobs SET bytes = ? WHERE id = ?", (size, job_id))

    def total_bytes(self) -> int:
        with self._lock:
            return self._database.execute("SELECT COALESCE(SUM(bytes), 0) FROM jobs").fetchone()[0]

    def keep_quota(self, size: int = 0, *, spared: str = "") -> list[str]:
        """Delete the oldest ended jobs, but one, until all files and `size` more bytes take no more than they may; return their
        ids."""
        deleted: list[str] = []
        while self.total_bytes() + size > self.max_bytes:
            oldest = self._select(
                "WHERE status IN ('completed', 'failed') AND bytes > 0 AND id != ? ORDER BY number LIMIT 1",
                spared,
            )
            if not oldest:
                break
            self.delete(oldest[0].id)
            deleted.append(oldest[0].id)
        return deleted

    def delete_expired(self) -> list[str]:
        """Delete the jobs whose time is over; return their ids."""
        expired = [job.id for job in self._select("WHERE expires IS NOT NULL AND expires <= ?", time.time())]
        for job_id in expired:
            self.delete(job_id)
        return expired


def _to_job(row: tuple[Any, ...]) -> Job:
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in ("request", "inputs", "result"):
        values[name] = json.loads(values[name] or "{}")
    return Job(**values)
