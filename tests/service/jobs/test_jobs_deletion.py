"""Deletion: the receipt and what is gone after it, stores that are away, retention, orphaned media."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from redis import asyncio as redis
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import deletion, store
from jobs_service.deletion import Deletions, Receipt
from jobs_service.delivery import Delivery
from jobs_service.events import START, EventLog, Position, shard_of
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Failure, Job, State
from jobs_service.messages import state_change
from jobs_service.queue import JobQueue
from jobs_service.settings import DispatchSettings
from jobs_service.store import Duty
from jobs_service.tables import deletions, jobs, outbox, requests
from servicekit import objects
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from servicekit.objects import ObjectStore
from tests.service.jobs.bucket import DAY_S, Bucket
from tests.service.jobs.world import eventually, new_job, presign, refused, submit

FAILURE = Failure(b"\x08\x0a", "ERROR_REASON_MODEL_OUT_OF_MEMORY", "f" * 16)
COUNT_ABOVE_A_PAGE = objects.PAGE_MAX + 1


@pytest.fixture
def bucket(s3: dict[str, str]) -> Bucket:
    return Bucket(s3)


@pytest.fixture
def media(bucket: Bucket) -> Iterator[ObjectStore]:
    with ObjectStore(bucket.settings) as store:
        yield store


@pytest.fixture
def media_away(settings: DispatchSettings) -> Iterator[ObjectStore]:
    with ObjectStore(settings) as store:
        yield store


class Place:
    """Deletions over stores of which some may be away, and jobs for them."""

    def __init__(self, engine: AsyncEngine, client: "redis.Redis", ledger: Ledger, media: ObjectStore, settings: DispatchSettings) -> None:
        self.engine = engine
        self.client = client
        self.ledger = ledger
        self.media = media
        self.settings = settings
        self.owner = uuid.uuid4()
        self.log = self._log(client)

    def _log(self, client: "redis.Redis") -> EventLog:
        return EventLog(client, self.settings.redis_prefix, retention_s=600)

    def deletions(
        self, *, media: ObjectStore | None = None, ledger: Ledger | None = None, client: "redis.Redis | None" = None
    ) -> Deletions:
        log = self._log(client or self.client)
        queue = JobQueue(client or self.client, self.settings.redis_prefix, lease_s=1, blocking=self.client)
        delivery = Delivery(self.engine, queue, log, ledger or self.ledger, presign)
        return Deletions(self.engine, media or self.media, log, delivery)

    async def job(
        self, state: State = State.COMPLETED, *, assets: tuple[str, ...] = (), announced: bool = True, settled: bool = True
    ) -> Job:
        """A job in that state; an ended one was announced and settled unless told otherwise."""
        async with transaction(self.engine) as connection:
            job = await submit(connection, new_job(self.owner))
            if state is State.PENDING:
                return job
            started = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
            assert started is not None
            if state is State.PROCESSING:
                return started
            serialised = [jobs_pb2.Asset(object_key=started.media_prefix + name).SerializeToString() for name in assets]
            ended = await store.finish(
                connection, started, state, fallback_s=60, assets=serialised, failure=FAILURE if state is State.FAILED else None
            )
            assert ended is not None
            done = [duty for duty, is_done in ((Duty.ANNOUNCE, announced), (Duty.SETTLE, settled)) if is_done]
            await connection.execute(sa.delete(outbox).where(outbox.c.job_id == job.job_id, outbox.c.duty.in_(done)))
        if announced:
            await self.log.publish(state_change(ended[0], presign), owner_id=self.owner, version=ended[0].version, final=True)
        return ended[0]

    async def stored(self, job: Job) -> Job | None:
        async with transaction(self.engine) as connection:
            return await store.get_job(connection, job.job_id)

    async def noted(self) -> int:
        async with transaction(self.engine) as connection:
            return (await connection.execute(sa.select(sa.func.count()).select_from(deletions))).scalar_one()

    async def requests(self) -> int:
        async with transaction(self.engine) as connection:
            return (await connection.execute(sa.select(sa.func.count()).select_from(requests))).scalar_one()

    async def known_to_redis(self, job: Job) -> bool:
        return bool(await self.client.hexists(self.log.keys.job(job.job_id), "sequence"))

    async def age(self, *aged: Job, days: float) -> None:
        """Let jobs have ended, and been submitted, that long ago."""
        ids, moment = [job.job_id for job in aged], sa.func.now() - timedelta(days=days)
        async with transaction(self.engine) as connection:
            await connection.execute(sa.update(jobs).where(jobs.c.job_id.in_(ids)).values(finish_time=moment))
            await connection.execute(sa.update(requests).where(requests.c.job_id.in_(ids)).values(create_time=moment))

    async def time_to_finish(self) -> None:
        """Let the deletions have been noted long enough ago for the relay."""
        moment = sa.func.now() - timedelta(seconds=deletion.FINISH_AFTER_S + 1)
        async with transaction(self.engine) as connection:
            await connection.execute(sa.update(deletions).values(delete_time=moment))


@pytest.fixture
def place(engine: AsyncEngine, client: "redis.Redis", ledger: Ledger, media: ObjectStore, settings: DispatchSettings) -> Place:
    return Place(engine, client, ledger, media, settings)


def counts(receipt: Receipt) -> tuple[int, int, bool]:
    return receipt.object_count, receipt.size_bytes, receipt.media_pending


# --- by the owner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.COMPLETED, State.FAILED, State.CANCELLED])
async def test_a_deleted_job_leaves_nothing_but_its_neighbours(place: Place, bucket: Bucket, state: State):
    job, neighbour = await place.job(state), await place.job()
    bucket.put(job.media_prefix + "image-0.png", body=b"x" * 1000)
    bucket.put(job.media_prefix + "thumbnail-0.png", body=b"x" * 24)
    bucket.put(neighbour.media_prefix + "image-0.png", f"{place.owner}/{job.job_id}-not/image-0.png")
    assert await place.known_to_redis(job)

    receipt = await place.deletions().delete(place.owner, job.job_id)

    assert (receipt.job_id, *counts(receipt)) == (job.job_id, 2, 1024, False)
    assert bucket.listing() == {neighbour.media_prefix + "image-0.png", f"{place.owner}/{job.job_id}-not/image-0.png"}
    assert await place.stored(job) is None
    assert await place.stored(neighbour) == neighbour
    assert not await place.known_to_redis(job)
    assert await place.known_to_redis(neighbour)
    assert await place.noted() == 0


async def test_a_job_that_is_deleted_or_another_owners_is_not_found(place: Place, bucket: Bucket):
    job = await place.job()
    bucket.put(job.media_prefix + "image-0.png")
    assert (await refused(place.deletions().delete(uuid.uuid4(), job.job_id))).code is grpc.StatusCode.NOT_FOUND
    assert await place.stored(job) == job
    assert len(bucket.listing()) == 1
    await place.deletions().delete(place.owner, job.job_id)
    assert (await refused(place.deletions().delete(place.owner, job.job_id))).code is grpc.StatusCode.NOT_FOUND


async def test_of_two_who_delete_a_job_at_once_one_gets_the_receipt(place: Place, bucket: Bucket):
    job = await place.job()
    bucket.put(job.media_prefix + "image-0.png")
    answers = await asyncio.gather(*(place.deletions().delete(place.owner, job.job_id) for _ in range(4)), return_exceptions=True)
    receipts = [answer for answer in answers if isinstance(answer, Receipt)]
    assert [counts(receipt) for receipt in receipts] == [(1, 3, False)]
    others = {answer.code for answer in answers if isinstance(answer, MeshError)}
    assert others <= {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("state", [State.PENDING, State.PROCESSING])
async def test_a_job_that_has_not_ended_is_refused(place: Place, bucket: Bucket, state: State):
    job = await place.job(state)
    bucket.put(job.media_prefix + "image-0.png")
    refusal = await refused(place.deletions().delete(place.owner, job.job_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_JOB_NOT_TERMINAL)
    assert refusal.metadata == {"state": f"STATE_{state.name}"}
    assert await place.stored(job) == job
    assert len(bucket.listing()) == 1


async def test_a_job_is_kept_while_its_bill_cannot_be_settled(place: Place, no_ledger: Ledger, bucket: Bucket):
    job = await place.job(settled=False)
    bucket.put(job.media_prefix + "image-0.png")
    refusal = await refused(place.deletions(ledger=no_ledger).delete(place.owner, job.job_id))
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    assert refusal.retry_after_s
    assert await place.stored(job) == job
    assert len(bucket.listing()) == 1


async def test_a_bill_not_settled_yet_is_settled_first(
    place: Place,
    fund: Callable[[uuid.UUID, int], Awaitable[None]],
    balance: Callable[[uuid.UUID], Awaitable[tuple[int, int]]],
):
    await fund(place.owner, 1000)
    job = await place.job(settled=False)
    await place.ledger.reserve(job)
    await place.deletions().delete(place.owner, job.job_id)
    assert await place.stored(job) is None
    assert await balance(place.owner) == (1000 - job.estimated_cost, 0)


async def test_a_job_that_is_about_to_be_retried_is_kept(place: Place):
    job = await place.job(State.FAILED)
    async with transaction(place.engine) as connection:
        await store.add_retry(connection, job.job_id, uuid.uuid4())
    assert (await refused(place.deletions().delete(place.owner, job.job_id))).code is grpc.StatusCode.UNAVAILABLE
    assert await place.stored(job) == job


async def test_more_objects_than_a_request_may_name_all_go(place: Place, bucket: Bucket):
    job = await place.job()
    bucket.put(*(f"{job.media_prefix}frame-{number:05d}.png" for number in range(COUNT_ABOVE_A_PAGE)))
    assert counts(await place.deletions().delete(place.owner, job.job_id)) == (COUNT_ABOVE_A_PAGE, 3 * COUNT_ABOVE_A_PAGE, False)
    assert bucket.listing() == set()


# --- stores that are away ---------------------------------------------------------------------------------------------


async def test_without_the_media_store_the_job_goes_and_its_media_follow(place: Place, media_away: ObjectStore, bucket: Bucket):
    job = await place.job()
    bucket.put(job.media_prefix + "image-0.png")
    away = place.deletions(media=media_away)
    assert counts(await away.delete(place.owner, job.job_id)) == (0, 0, True)
    assert await place.stored(job) is None
    assert await place.noted() == 1

    await place.deletions().finish()  # whoever deleted it may still be at it
    assert len(bucket.listing()) == 1
    await place.time_to_finish()
    await away.finish()  # the store is still away
    assert await place.noted() == 1
    await place.deletions().finish()
    assert bucket.listing() == set()
    assert not await place.known_to_redis(job)
    assert await place.noted() == 0


async def test_without_redis_what_it_has_goes_later(place: Place, no_redis: "redis.Redis", bucket: Bucket):
    job = await place.job()
    bucket.put(job.media_prefix + "image-0.png")
    assert counts(await place.deletions(client=no_redis).delete(place.owner, job.job_id)) == (1, 3, True)
    assert bucket.listing() == set()
    await place.time_to_finish()
    await place.deletions().finish()
    assert not await place.known_to_redis(job)
    assert await place.noted() == 0


async def test_a_job_whose_end_nobody_was_told_of_is_announced_first(place: Place, no_redis: "redis.Redis"):
    job = await place.job(announced=False)
    with pytest.raises(RedisError):
        await place.deletions(client=no_redis).delete(place.owner, job.job_id)
    await place.deletions().delete(place.owner, job.job_id)
    last = (await place.log.range(shard_of(place.owner), START, Position(2**63, 0), 100))[-1]
    assert (last.job_id, last.final) == (str(job.job_id), True)


async def test_a_media_store_that_hangs_holds_nobody_up(place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    job = await place.job()

    async def hang(*_: object, **__: object) -> objects.Page:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(deletion, "REMOVE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(place.media, "list", hang)
    assert counts(await place.deletions().delete(place.owner, job.job_id)) == (0, 0, True)


async def test_objects_that_may_not_go_do_not_hold_up_the_others(place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    first, second = await place.job(), await place.job()
    bucket.put(first.media_prefix + "locked", second.media_prefix + "image-0.png")
    delete = place.media.delete

    async def refuse(*keys: str) -> None:
        if any(key.endswith("locked") for key in keys):
            raise MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_STORE_FAILED, "locked")
        await delete(*keys)

    monkeypatch.setattr(place.media, "delete", refuse)
    async with transaction(place.engine) as connection:
        for job in (first, second):
            assert await store.delete_job(connection, job) is not None
    await place.time_to_finish()
    await place.deletions().finish()
    assert bucket.listing() == {first.media_prefix + "locked"}
    assert await place.noted() == 1


# --- by age -----------------------------------------------------------------------------------------------------------


async def test_jobs_expire_with_their_media_and_requests(place: Place, bucket: Bucket):
    old, new = [await place.job(state) for state in (State.COMPLETED, State.FAILED)], await place.job()
    running = await place.job(State.PROCESSING)
    for job in (*old, new, running):
        bucket.put(job.media_prefix + "image-0.png")
    await place.age(*old, days=91)
    await place.age(new, days=89)

    assert await place.deletions().expire(retention_s=90 * DAY_S) == 2

    assert bucket.listing() == {job.media_prefix + "image-0.png" for job in (new, running)}
    assert [await place.stored(job) is None for job in (*old, new, running)] == [True, True, False, False]
    assert await place.requests() == 2
    assert await place.deletions().expire(retention_s=90 * DAY_S) == 0


async def test_a_request_is_remembered_after_its_job_was_deleted(place: Place):
    job = await place.job()
    await place.deletions().delete(place.owner, job.job_id)
    await place.deletions().expire(retention_s=90 * DAY_S)
    assert await place.requests() == 1  # a repeat of the submit must not make another job


async def test_a_job_expires_in_batches_and_only_once_settled(place: Place, no_ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    unsettled, *settled = [await place.job(settled=number > 0) for number in range(4)]
    await place.age(unsettled, *settled, days=100)
    monkeypatch.setattr(deletion, "EXPIRE_BATCH", 3)
    away = place.deletions(ledger=no_ledger)
    assert [await away.expire(retention_s=90 * DAY_S) for _ in range(3)] == [2, 1, 0]
    assert await place.stored(unsettled) is not None
    assert await place.deletions().expire(retention_s=90 * DAY_S) == 1


async def test_jobs_stop_expiring_while_the_media_store_is_away(place: Place, media: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    old = [await place.job() for _ in range(deletion.MISSES_MAX + 1)]
    await place.age(*old, days=100)

    async def refuse(*_: object, **__: object) -> objects.Page:
        raise MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_STORE_FAILED, "away")

    monkeypatch.setattr(media, "list", refuse)
    assert await place.deletions().expire(retention_s=90 * DAY_S) == deletion.MISSES_MAX
    assert await place.noted() == deletion.MISSES_MAX


# --- orphans ----------------------------------------------------------------------------------------------------------


async def test_media_that_no_job_has_are_deleted_and_no_others(place: Place, bucket: Bucket):
    completed = await place.job(assets=("image-0.png",))
    failed, cancelled = await place.job(State.FAILED), await place.job(State.CANCELLED)
    pending, running = await place.job(State.PENDING), await place.job(State.PROCESSING)
    gone = await place.job()
    await place.deletions().delete(place.owner, gone.job_id)
    orphans = {
        completed.media_prefix + "image-1.png",  # of an attempt that made more
        failed.media_prefix + "image-0.png",
        cancelled.media_prefix + "deeper/image-0.png",
        gone.media_prefix + "image-0.png",  # uploaded by an attempt that was still at it
        f"{uuid.uuid4()}/{uuid.uuid4()}/image-0.png",
        f"{uuid.uuid4()}/{running.job_id}/image-0.png",  # another owner never had this job
    }
    kept = {completed.media_prefix + "image-0.png"} | {f"{job.media_prefix}image-0.png" for job in (pending, running)}
    foreign = {
        f"uploads/{uuid.uuid4()}/{uuid.uuid4()}/image-0.png",
        f"{uuid.uuid4()}/avatar.png",
        f"{uuid.uuid4()}/uploads/image-0.png",
        f"{uuid.uuid4()}/{uuid.uuid4()}",
        f"{uuid.uuid4()}/{str(uuid.uuid4()).upper()}/image-0.png",
        f"{uuid.uuid4().hex}/{uuid.uuid4()}/image-0.png",
        "picture.png",
    }
    young = {f"{uuid.uuid4()}/{uuid.uuid4()}/image-0.png", failed.media_prefix + "image-1.png"}
    bucket.put(*orphans, *kept, *foreign)
    bucket.put(*young, age_s=DAY_S / 2)

    assert await place.deletions().sweep_orphans(older_than_s=DAY_S) == len(orphans)

    assert bucket.listing() == kept | foreign | young
    assert await place.deletions().sweep_orphans(older_than_s=DAY_S) == 0


async def test_a_sweep_goes_on_where_the_round_before_stopped(place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    orphans = {f"{uuid.uuid4()}/{uuid.uuid4()}/image-{number}.png" for number in range(3) for _ in range(3)}
    kept = {f"a/{number}" for number in range(4)} | {"zzz"}
    bucket.put(*orphans, *kept)
    monkeypatch.setattr(objects, "PAGE_MAX", 2)
    monkeypatch.setattr(deletion, "SWEEP_PAGES", 1)
    deletions = place.deletions()
    rounds = (len(orphans) + len(kept)) // 2
    assert sum([await deletions.sweep_orphans(older_than_s=DAY_S) for _ in range(rounds)]) == len(orphans)
    assert bucket.listing() == kept

    late = f"{uuid.UUID(int=0)}/{uuid.uuid4()}/image-0.png"  # before everything else: seen when the sweep begins anew
    bucket.put(late)
    for _ in range(len(kept)):
        await deletions.sweep_orphans(older_than_s=DAY_S)
    assert late not in bucket.listing()


async def test_a_page_that_cannot_be_deleted_does_not_end_every_round(place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    locked, orphan = f"{uuid.UUID(int=0)}/{uuid.uuid4()}/locked", f"{uuid.UUID(int=1)}/{uuid.uuid4()}/image-0.png"
    bucket.put(locked, orphan)
    delete = place.media.delete

    async def refuse(*keys: str) -> None:
        if locked in keys:
            raise MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_STORE_FAILED, "locked")
        await delete(*keys)

    monkeypatch.setattr(place.media, "delete", refuse)
    monkeypatch.setattr(objects, "PAGE_MAX", 1)
    deletions = place.deletions()
    assert (await refused(deletions.sweep_orphans(older_than_s=DAY_S))).reason == Reason.ERROR_REASON_STORE_FAILED
    assert await deletions.sweep_orphans(older_than_s=DAY_S) == 1
    assert bucket.listing() == {locked}


async def test_a_retry_waits_until_the_leftovers_are_gone(place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch):
    job = await place.job(State.FAILED)
    key = job.media_prefix + "image-0.png"
    bucket.put(key)
    deleting, go_on = asyncio.Event(), asyncio.Event()
    delete = place.media.delete

    async def slow(*keys: str) -> None:
        deleting.set()
        await go_on.wait()
        await delete(*keys)

    async def retry() -> None:
        async with transaction(place.engine) as connection:
            reservation_id = uuid.uuid4()
            await store.add_retry(connection, job.job_id, reservation_id)
            assert await store.commit_retry(connection, job, reservation_id, fallback_s=60) is not None
        assert key not in bucket.listing()  # now it may be written anew

    async def waits_for_a_lock() -> bool:
        async with transaction(place.engine) as connection:
            waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
            return bool((await connection.execute(waiting)).scalar_one())

    monkeypatch.setattr(place.media, "delete", slow)
    sweep = asyncio.create_task(place.deletions().sweep_orphans(older_than_s=DAY_S))
    await deleting.wait()
    retried = asyncio.create_task(retry())
    await eventually(waits_for_a_lock)
    go_on.set()
    assert await sweep == 1
    await retried


# --- the store itself -------------------------------------------------------------------------------------------------


async def test_a_listing_shows_sizes_and_times_and_goes_on_after_a_key_that_is_gone(
    bucket: Bucket, media: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objects, "PAGE_MAX", 2)
    bucket.put("a/1", "a/2", "a/3 with <é> and 100%", "b/1", body=b"1234567", age_s=DAY_S)
    page = await media.list("a/")
    assert ([found.key for found in page.objects], page.more) == (["a/1", "a/2"], True)
    assert {found.size_bytes for found in page.objects} == {7}
    assert all(abs(time.time() - found.modified_time.timestamp() - DAY_S) < 3600 for found in page.objects)
    await media.delete("a/2", "a/never")
    rest = await media.list("a/", after="a/2")
    assert ([found.key for found in rest.objects], rest.more) == (["a/3 with <é> and 100%"], False)
    await media.delete("a/1", "a/3 with <é> and 100%", "b/1")
    assert bucket.listing() == set()
    await media.delete()


async def test_what_the_store_refuses_is_typed(bucket: Bucket):
    nowhere = bucket.settings.model_copy(update={"s3_bucket": "no-such-bucket"})
    with ObjectStore(nowhere) as media:
        for call in (media.list(""), media.delete("a"), media.put("a", b"", "text/plain")):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_STORE_FAILED)


async def test_a_single_object_that_may_not_go_is_an_error(media: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    client: Any = media._client  # pyright: ignore[reportPrivateUsage]  # no store here refuses a single key
    monkeypatch.setattr(client, "delete_objects", lambda **_: {"Errors": [{"Key": "a", "Code": "AccessDenied", "Message": "locked"}]})
    assert (await refused(media.delete("a"))).reason == Reason.ERROR_REASON_STORE_FAILED
