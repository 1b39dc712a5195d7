"""The queue on the disk: each job ends once, whatever happens between."""

import asyncio
import threading
import time

import pytest

from latent_shift.serve.events import ALL, MAX_WAITING, Events, TooManyListeners
from latent_shift.serve.jobs import MAX_ATTEMPTS, JobStore, KeyReused, QueueFull


@pytest.fixture
def store(tmp_path):
    with_store = JobStore(tmp_path, max_queued=50)
    yield with_store
    with_store.close()


def add(store, prompt="a heart", **options):
    return store.add({"prompt": prompt, "seed": 0}, model="emoji", **options)[0]


def test_jobs_come_in_the_order_of_arrival(store):
    jobs = [add(store, str(index)) for index in range(5)]
    assert [store.position(job) for job in jobs] == [1, 2, 3, 4, 5]
    assert [store.claim().id for _ in jobs] == [job.id for job in jobs]
    assert store.claim() is None


def test_each_job_is_claimed_by_one_worker(store):
    ids, claimed = {add(store).id for _ in range(40)}, []

    def work():
        while (job := store.claim()) is not None:
            claimed.append(job.id)
            assert store.complete(job.id, {"fps": 8})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 40
    assert set(claimed) == ids


def test_an_ended_job_does_not_end_again(store):
    job = add(store)
    store.claim()
    assert store.complete(job.id, {"fps": 8})
    assert not store.fail(job.id, "late", "late")
    assert not store.complete(job.id, {})
    assert not store.cancel_queued(job.id)
    assert store.get(job.id).status == "completed"


def test_what_was_in_progress_is_queued_again_once(tmp_path):
    store = JobStore(tmp_path)
    first, second = add(store, "first"), add(store, "second")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        job = store.claim()
        assert (job.id, job.attempts) == (first.id, attempt)  # at its old place
        store.close()  # as after a kill: its state stays in_progress
        store = JobStore(tmp_path)
        assert store.recover() == ((1, 0) if attempt < MAX_ATTEMPTS else (0, 1))
    failed = store.get(first.id)
    assert (failed.status, failed.error_code) == ("failed", "interrupted")
    assert store.claim().id == second.id
    store.close()


def test_a_server_that_stops_counts_no_attempt(store):
    job = add(store)
    for _ in range(5):
        claimed = store.claim()
        assert claimed.attempts == 1
        assert store.requeue(claimed, "stopped", counts=False)
    assert store.get(job.id).status == "queued"


def test_files_without_a_job_are_removed_and_nobody_elses(store):
    job = add(store, inputs={"image": b"picture"})
    debris, foreign = store.path(f"video_{'0' * 24}"), store.path("thesis")
    (debris / "inputs").mkdir(parents=True)
    foreign.mkdir()
    store.recover()
    assert not debris.exists()
    assert foreign.exists()
    assert (store.path(job.id) / "inputs" / "image").read_bytes() == b"picture"


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "jobs" / "thesis").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected another --data folder"):
        JobStore(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "jobs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="cannot be used"):
        JobStore(tmp_path / "b")


def test_images_that_nobody_waits_for_are_dropped(store):
    store.add({"prompt": "a"}, model="emoji", kind="image")
    job = store.claim()
    store.add({"prompt": "b"}, model="emoji", kind="image")
    assert store.recover() == (0, 0)
    assert store.get(job.id) is None
    assert store.count("queued") == 0


def test_one_key_from_many_threads_is_one_job(store):
    results = []

    def send():
        results.append(
            store.add(
                {"prompt": "a"}, model="emoji", inputs={"image": b"x"}, idempotency_key="k", request_hash="1"
            )
        )

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job, _ in results}) == 1
    assert sum(is_new for _, is_new in results) == 1
    assert len(list((store.folder / "jobs").iterdir())) == 1


def test_idempotency_key(store):
    job, is_new = store.add({"prompt": "a"}, model="emoji", idempotency_key="k", request_hash="1")
    assert is_new
    assert store.add({"prompt": "a"}, model="emoji", idempotency_key="k", request_hash="1") == (job, False)
    with pytest.raises(KeyReused, match="was used with another request"):
        store.add({"prompt": "b"}, model="emoji", idempotency_key="k", request_hash="2")
    assert store.count("queued") == 1


def test_full_queue(tmp_path):
    store = JobStore(tmp_path, max_queued=2)
    add(store), add(store)
    with pytest.raises(QueueFull):
        add(store)
    store.claim()
    add(store)
    store.close()


def test_quota_deletes_the_oldest_results(tmp_path):
    store = JobStore(tmp_path, max_bytes=250)
    jobs = [add(store) for _ in range(4)]
    for _ in jobs[:3]:
        job = store.claim()
        store.path(job.id).mkdir()
        (store.path(job.id) / "frames.png").write_bytes(bytes(100))
        store.complete(job.id, {"fps": 8})
        store.keep_quota(spared=job.id)
    assert [store.get(job.id) is not None for job in jobs] == [False, True, True, True]
    assert not store.path(jobs[0].id).exists()
    assert store.total_bytes() == 200
    store.close()


def test_quota_counts_inputs(tmp_path):
    store = JobStore(tmp_path, max_bytes=250)
    ended = add(store, inputs={"image": bytes(100)})
    store.claim()
    store.fail(ended.id, "cancelled", "")
    add(store, inputs={"image": bytes(100)})
    add(store, inputs={"image": bytes(100)})  # takes the place of the ended one
    assert store.get(ended.id) is None
    with pytest.raises(OSError, match="all the space"):
        add(store, inputs={"image": bytes(100)})
    add(store)  # without files
    store.close()


def test_expiry(tmp_path):
    store = JobStore(tmp_path, keep_seconds=0.2)
    job, waiting = add(store), add(store)
    store.claim()
    store.complete(job.id, {"fps": 8})
    assert store.delete_expired() == []
    time.sleep(0.3)
    assert store.delete_expired() == [job.id]
    assert store.get(job.id) is None
    assert store.get(waiting.id).status == "queued"
    store.close()


def test_pages(store):
    jobs = [add(store, str(index)) for index in range(5)]
    store.add({"prompt": "still"}, model="emoji", kind="image")
    newest = store.videos(limit=2)
    assert [job.id for job in newest] == [jobs[4].id, jobs[3].id]
    assert [job.id for job in store.videos(limit=9, after=newest[-1].number)] == [
        jobs[2].id,
        jobs[1].id,
        jobs[0].id,
    ]
    assert [job.id for job in store.videos(limit=2, descending=False)] == [jobs[0].id, jobs[1].id]
    store.claim()
    assert [job.id for job in store.videos(limit=9, status="in_progress")] == [jobs[0].id]


def test_full_disk_leaves_no_job(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latent_shift.serve.jobs.atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        add(store, inputs={"image": b"x"})
    assert store.count("queued") == 0
    assert list((store.folder / "jobs").iterdir()) == []


def listen(events, job_id, last_id=None, *, publish=()):
    """Return the events that a listener gets until it ends."""

    async def run():
        events.attach(asyncio.get_running_loop())
        result = []

        async def collect():
            with events.listen(job_id, last_id) as coming:
                async for event in coming:
                    result.append(event)

        task = asyncio.ensure_future(collect())
        await asyncio.sleep(0.01)
        for arguments in publish:
            await asyncio.to_thread(events.publish, *arguments)
        await asyncio.sleep(0.01)
        if not task.done():
            events.close()
        await asyncio.wait_for(task, 5)
        return result

    return asyncio.run(run())


def test_events_reach_their_listener_and_end():
    events = Events()
    events.publish("a", "progress", {"step": 1})
    received = listen(
        events,
        "a",
        publish=[
            ("b", "progress", {}),
            ("a", "progress", {"step": 2}),
            ("a", "completed", {}),
            ("a", "late", {}),
        ],
    )
    assert [(event.name, event.data) for event in received] == [
        ("progress", {"step": 1}),
        ("progress", {"step": 2}),
        ("completed", {}),
    ]
    assert events.jobs_with_listeners() == []


def test_last_event_id():
    events = Events()
    for step in range(1, 5):
        events.publish("a", "progress", {"step": step})
        events.publish("a", "preview", {"step": step})
    everything = listen(events, "a")
    # Who comes anew gets the latest of each kind, who comes back what was missed.
    assert [(event.name, event.data["step"]) for event in everything] == [("progress", 4), ("preview", 4)]
    events = Events()
    for step in range(1, 5):
        events.publish("a", "progress", {"step": step})
    ids = [event.id for event in events._stored["a"]]
    assert [event.data["step"] for event in listen(events, "a", ids[1])] == [3, 4]
    events.closed = False
    assert [event.data["step"] for event in listen(events, "a", "of-another-run")] == [4]
    events.forget("a")
    assert events._stored == {}


def test_listener_of_all_jobs_goes_on_after_one_ends():
    received = listen(Events(), ALL, publish=[("a", "completed", {}), ("b", "progress", {})])
    assert [event.name for event in received] == ["completed", "progress"]


def test_a_slow_client_loses_passing_events_and_then_its_stream():
    async def run():
        events = Events()
        events.attach(asyncio.get_running_loop())
        with events.listen(ALL) as coming:
            for number in range(3 * MAX_WAITING - 10):
                events.publish("a", "preview", {"number": number})
            events.publish("a", "completed", {})
            await asyncio.sleep(0)
            first = [await anext(coming) for _ in range(2)]
            for number in range(3 * MAX_WAITING):
                events.publish("b", "queued", {"number": number})
            await asyncio.sleep(0)
            return first, [event async for event in coming]

    first, rest = asyncio.run(run())
    assert first[0].data["number"] > MAX_WAITING  # older previews were dropped
    assert len(rest) <= MAX_WAITING
    assert "completed" in {event.name for event in rest}


def test_streams_are_counted(monkeypatch):
    monkeypatch.setattr("latent_shift.serve.events.MAX_LISTENERS", 2)
    events = Events()

    async def run():
        with events.listen("a"), events.listen(ALL), pytest.raises(TooManyListeners), events.listen("b"):
            pass

    asyncio.run(run())
    assert events.jobs_with_listeners() == []
