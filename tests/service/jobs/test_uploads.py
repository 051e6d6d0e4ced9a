"""Uploads over a real PostgreSQL and a real S3 server: what a URL is good for, what is checked, what is left, whoever dies when."""

import asyncio
import hashlib
import io
import re
import resource
import uuid
import wave
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO

import botocore.auth
import grpc
import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
from PIL import Image
from sqlalchemy.ext.asyncio import AsyncEngine

from jobs_service import tables
from jobs_service.uploads import intake, keys, store, sweeper, turns
from jobs_service.uploads.checker import Checker, Verdict
from jobs_service.uploads.intake import Announced, Uploads
from jobs_service.uploads.media import MediaLimits, Refusal, UploadLimits
from jobs_service.uploads.store import Upload, UploadState
from jobs_service.uploads.sweeper import UploadSweeper
from servicekit import database
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason, unavailable
from servicekit.objects import Downloaded, ObjectStore
from servicekit.settings import DatabaseSettings, ObjectSettings
from tests.service.jobs.bucket import DAY_S, Bucket
from tests.service.jobs.world import eventually, within

MEDIA = MediaLimits(max_pixels=1_000_000, max_duration_s=10, memory_bytes=1 << 30, cpu_s=20, wall_s=60)
LIMITS = UploadLimits(
    max_bytes=1_000_000,
    url_ttl_s=900,
    incomplete_max=3,
    stored_max_bytes=10_000_000,
    retention_s=DAY_S,
    checks_at_once=2,
    checks_waiting_max=4,
)


def picture() -> bytes:
    body = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(body, "PNG")
    return body.getvalue()


PICTURE, OTHER_PICTURE = picture(), picture()


class Gate(Checker):
    """Checks that wait to be let through, and are counted."""

    def __init__(self) -> None:
        super().__init__(MEDIA)
        self.open = asyncio.Event()
        self.begun = 0
        self.begins = asyncio.Condition()
        self.answer: Verdict | None = None
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def check(self, descriptor: int, content_type: str) -> Verdict:
        async with self.begins:
            self.begun += 1
            self.begins.notify_all()
        await self.open.wait()
        if self.meanwhile is not None:
            await self.meanwhile()
        return self.answer or await super().check(descriptor, content_type)

    async def until_begun(self, count: int) -> None:
        async with self.begins:
            await within(self.begins.wait_for(lambda: self.begun >= count))


class Place:
    """Uploads of an owner nobody has heard of."""

    def __init__(self, engine: AsyncEngine, media: ObjectStore, bucket: Bucket, http: httpx.AsyncClient) -> None:
        self.engine = engine
        self.media = media
        self.bucket = bucket
        self.http = http
        self.owner = uuid.uuid4()
        self.opened: list[Uploads] = []
        self.gate = Gate()
        self.uploads = self.server(Checker(MEDIA))

    def server(self, checker: Checker, *, media: ObjectStore | None = None, limits: UploadLimits = LIMITS) -> Uploads:
        uploads = Uploads(self.engine, media or self.media, checker, limits)
        self.opened.append(uploads)
        return uploads

    async def put(self, announced: Announced, body: bytes = PICTURE) -> httpx.Response:
        return await self.http.put(announced.put.url, content=body, headers=dict(announced.put.headers))

    async def arrived(self, body: bytes = PICTURE, content_type: str = "image/png") -> Announced:
        announced = await self.uploads.create(self.owner, content_type, len(body))
        assert (await self.put(announced, body)).status_code == 200
        return announced

    async def change(self, upload_id: uuid.UUID, **values: object) -> None:
        async with transaction(self.engine) as connection:
            await connection.execute(sa.update(tables.uploads).where(tables.uploads.c.upload_id == upload_id).values(**values))

    async def row(self, upload_id: uuid.UUID) -> Mapping[Any, Any] | None:
        async with transaction(self.engine) as connection:
            query = sa.select(tables.uploads).where(tables.uploads.c.upload_id == upload_id)
            return (await connection.execute(query)).mappings().one_or_none()

    async def some(self, upload_id: uuid.UUID) -> Mapping[Any, Any]:
        row = await self.row(upload_id)
        assert row is not None
        return row

    def sweeper(self, orphan_s: float = DAY_S) -> UploadSweeper:
        return UploadSweeper(self.engine, self.media, orphan_s=orphan_s)


@pytest_asyncio.fixture
async def place(jobs_database: str, s3: dict[str, str]) -> AsyncIterator[Place]:
    settings = DatabaseSettings.model_validate({"database_url": jobs_database, "database_pool_size": 10, "database_pool_timeout_s": 15})
    engine = database.create_engine(settings, schema="jobs", application="test")
    async with engine.begin() as connection:
        await connection.execute(sa.delete(tables.uploads))
    bucket = await asyncio.to_thread(Bucket, s3)
    with ObjectStore(bucket.settings) as media:
        async with httpx.AsyncClient(timeout=60) as http:
            place = Place(engine, media, bucket, http)
            yield place
            for uploads in place.opened:
                await uploads.close()
    await engine.dispose()


@pytest.fixture
def media_away() -> Iterator[ObjectStore]:
    nowhere = {"s3_endpoint_url": "http://127.0.0.1:1", "s3_access_key_id": "unused", "s3_secret_access_key": "unused"}
    with ObjectStore(ObjectSettings.model_validate(nowhere)) as media:
        yield media


async def refusal(awaitable: Awaitable[object]) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await within(awaitable)
    return caught.value


# --- the way of a file -----------------------------------------------------------------------------------------------------


async def test_a_file_is_announced_put_and_completed(place: Place):
    announced = await place.uploads.create(place.owner, "image/png", len(PICTURE))
    pending = await place.uploads.get(place.owner, announced.upload_id)
    assert (await place.put(announced)).status_code == 200

    complete = await within(place.uploads.complete(place.owner, announced.upload_id))

    assert (pending.state, complete.state) == (UploadState.PENDING, UploadState.COMPLETE)
    assert (complete.content_type, complete.size_bytes, complete.width, complete.height) == ("image/png", len(PICTURE), 64, 48)
    assert complete.sha256 == hashlib.sha256(PICTURE).digest()
    assert complete.expire_time > pending.expire_time
    assert complete == await place.uploads.get(place.owner, announced.upload_id)
    assert complete.object_key is not None
    assert place.bucket.listing() == {complete.object_key}
    assert place.bucket.get(complete.object_key) == PICTURE


async def test_where_a_file_goes_cannot_be_guessed(place: Place):
    first, second = [await place.uploads.create(place.owner, "image/png", 10) for _ in range(2)]

    found = [re.search(f"/incoming/{place.owner}/{one.upload_id}/([A-Za-z0-9_-]{{32}})\\?", one.put.url) for one in (first, second)]

    assert found[0]
    assert found[1]
    assert found[0][1] != found[1][1]


async def test_of_others_uploads_nothing_is_told(place: Place):
    announced = await place.arrived()
    stranger = uuid.uuid4()

    answers = [
        await refusal(place.uploads.get(stranger, announced.upload_id)),
        await refusal(place.uploads.complete(stranger, announced.upload_id)),
        await refusal(place.uploads.get(place.owner, uuid.uuid4())),
        await refusal(place.uploads.complete(place.owner, uuid.uuid4())),
    ]

    assert {(answer.code, answer.message) for answer in answers} == {(grpc.StatusCode.NOT_FOUND, "upload not found")}
    assert (await place.uploads.get(place.owner, announced.upload_id)).state is UploadState.PENDING


async def test_completing_again_is_no_error(place: Place):
    announced = await place.arrived()

    first = await within(place.uploads.complete(place.owner, announced.upload_id))

    assert await within(place.server(place.gate).complete(place.owner, announced.upload_id)) == first
    assert place.gate.begun == 0


async def test_a_file_that_has_not_arrived(place: Place):
    announced = await place.uploads.create(place.owner, "image/png", len(PICTURE))

    refused = await refusal(place.uploads.complete(place.owner, announced.upload_id))
    await place.put(announced)

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_UPLOAD_INVALID)
    assert refused.metadata == {"upload_id": str(announced.upload_id)}
    assert (await within(place.uploads.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE


async def test_a_file_that_is_too_large_is_not_announced(place: Place):
    refused = await refusal(place.uploads.create(place.owner, "image/png", LIMITS.max_bytes + 1))

    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.violations[0][0] == "size_bytes"


# --- what a URL is good for, as the real store sees it ---------------------------------------------------------------------


async def test_a_url_takes_nothing_but_what_was_announced(place: Place):
    announced = await place.uploads.create(place.owner, "image/png", len(PICTURE))
    url, headers = announced.put.url, dict(announced.put.headers)
    other_key = url.replace("?", "x?", 1)
    longer = re.sub("X-Amz-Expires=[0-9]+", "X-Amz-Expires=86400", url)
    assert longer != url

    async def stream() -> AsyncIterator[bytes]:
        yield PICTURE

    async def send(method: str = "PUT", to: str = url, body: bytes = PICTURE, change: Mapping[str, str | None] = {}) -> int:
        sent = {name: value for name, value in {**headers, "content-length": str(len(body)), **change}.items() if value is not None}
        return (await place.http.request(method, to, content=body, headers=sent)).status_code

    statuses = {
        "type": await send(change={"content-type": "image/svg+xml"}),
        "no type": await send(change={"content-type": None}),
        "shorter": await send(body=PICTURE[:-1]),
        "longer": await send(body=PICTURE + b"x"),
        "no length": (await place.http.put(url, content=stream(), headers={"content-type": "image/png"})).status_code,
        "key": await send(to=other_key),
        "expiry": await send(to=longer),
        "POST": await send("POST"),
        "GET": await send("GET"),
        "DELETE": await send("DELETE"),
        "acl": await send(change={"x-amz-acl": "public-read"}),
        "metadata": await send(change={"x-amz-meta-mtime": "0"}),
        "copy": await send(change={"x-amz-copy-source": f"/{place.bucket.name}/x"}),
    }

    assert statuses == dict.fromkeys(statuses, 403)
    assert place.bucket.listing() == set()
    assert await send() == 200


async def test_a_url_that_has_expired(place: Place, monkeypatch: pytest.MonkeyPatch):
    then = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=LIMITS.url_ttl_s + 1)
    with monkeypatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda *_, **__: then)
        announced = await place.uploads.create(place.owner, "image/png", len(PICTURE))

    assert then.strftime("%Y%m%dT%H%M%SZ") in announced.put.url
    assert (await place.put(announced)).status_code in (400, 403)
    assert place.bucket.listing() == set()


async def test_a_store_that_took_another_size(place: Place):
    announced = await place.uploads.create(place.owner, "image/png", len(PICTURE) - 1)
    key = (await place.some(announced.upload_id))["arrival_key"]
    place.bucket.put(key, body=PICTURE, age_s=0)

    refused = await refusal(place.uploads.complete(place.owner, announced.upload_id))

    assert (refused.reason, refused.message) == (
        Reason.ERROR_REASON_UPLOAD_INVALID,
        "the file has another size than was announced",
    )
    assert place.bucket.listing() == set()


# --- refused files -----------------------------------------------------------------------------------------------------------


async def test_a_refused_file_is_removed_and_the_upload_says_why(place: Place):
    announced = await place.arrived(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")

    refused = await refusal(place.uploads.complete(place.owner, announced.upload_id))
    again = await refusal(place.uploads.complete(place.owner, announced.upload_id))
    shown = await place.uploads.get(place.owner, announced.upload_id)

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_UPLOAD_INVALID)
    assert again.message == refused.message == shown.rejection == "the file is not of the type that was announced"
    assert (shown.state, shown.object_key, shown.sha256) == (UploadState.REJECTED, None, None)
    assert place.bucket.listing() == set()


async def test_a_check_that_says_nothing_refuses_nothing(place: Place):
    class Away(Checker):
        async def check(self, descriptor: int, content_type: str) -> Verdict:
            raise unavailable("no processes today")

    announced = await place.arrived()

    refused = await refusal(place.server(Away(MEDIA)).complete(place.owner, announced.upload_id))

    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert (await within(place.uploads.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE


async def test_the_store_is_away(place: Place, media_away: ObjectStore):
    announced = await place.arrived()

    refused = await refusal(place.server(Checker(MEDIA), media=media_away).complete(place.owner, announced.upload_id))

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_STORE_FAILED)
    assert (await within(place.uploads.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE


@pytest.mark.parametrize("taken_bytes", [0, 500_000])
async def test_a_disk_that_takes_only_a_part(place: Place, taken_bytes: int):
    # As on a full disk, the write that reaches this limit is cut short, and only the next one fails.
    body = io.BytesIO()
    with wave.open(body, "wb") as file:
        file.setparams((1, 2, 48_000, 0, "NONE", ""))
        file.writeframes(bytes(900_000))
    announced = await place.arrived(body.getvalue(), "audio/wav")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def soft(limit_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))

    class Narrow(ObjectStore):
        async def download(self, key: str, file: BinaryIO, *, size_bytes: int, timeout_s: float) -> Downloaded | None:
            soft(taken_bytes)
            try:
                return await super().download(key, file, size_bytes=size_bytes, timeout_s=timeout_s)
            finally:
                soft(limits[0])

    with Narrow(place.bucket.settings) as narrow:
        refused = await refusal(place.server(Checker(MEDIA), media=narrow).complete(place.owner, announced.upload_id))

    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE)
    assert (await within(place.uploads.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE


# --- a file that is replaced -------------------------------------------------------------------------------------------------


async def test_a_file_replaced_while_it_is_checked(place: Place):
    announced = await place.arrived()
    fake = b"<html>".ljust(len(PICTURE))

    async def replace() -> None:
        assert (await place.put(announced, fake)).status_code == 200

    place.gate.meanwhile = replace
    place.gate.open.set()

    complete = await within(place.server(place.gate).complete(place.owner, announced.upload_id))

    assert complete.sha256 == hashlib.sha256(PICTURE).digest()
    assert complete.object_key is not None
    assert place.bucket.get(complete.object_key) == PICTURE


async def test_a_file_replaced_after_it_was_checked(place: Place):
    announced = await place.arrived()
    complete = await within(place.uploads.complete(place.owner, announced.upload_id))
    assert (await place.put(announced, b"<html>".ljust(len(PICTURE)))).status_code == 200  # the URL still works

    again = await within(place.uploads.complete(place.owner, announced.upload_id))

    assert again == complete
    assert complete.object_key is not None
    assert place.bucket.get(complete.object_key) == PICTURE
    assert len(place.bucket.listing()) == 2

    # The relay waits for the end of the URL, then removes what was written.
    assert await place.sweeper().clear_arrivals() == 0
    await place.change(announced.upload_id, url_expire_time=sa.func.now() - timedelta(seconds=sweeper.CLOCK_SKEW_S + 1))
    assert await place.sweeper().clear_arrivals() == 1
    assert place.bucket.listing() == {complete.object_key}
    assert await place.sweeper().clear_arrivals() == 0
    assert (await place.some(announced.upload_id))["arrival_key"] is None


# --- many at once --------------------------------------------------------------------------------------------------------------


async def test_parallel_completes_check_once(place: Place):
    announced = await place.arrived()
    place.gate.open.set()
    server = place.server(place.gate)

    answers = await within(asyncio.gather(*(server.complete(place.owner, announced.upload_id) for _ in range(8))))

    assert place.gate.begun == 1
    assert {answer.object_key for answer in answers} == place.bucket.listing()


async def test_another_server_does_not_check_at_the_same_time(place: Place):
    announced = await place.arrived()
    first, second = place.server(place.gate), place.server(place.gate)
    checking = asyncio.create_task(first.complete(place.owner, announced.upload_id))
    await place.gate.until_begun(1)

    refused = await refusal(second.complete(place.owner, announced.upload_id))
    place.gate.open.set()
    complete = await within(checking)

    assert (refused.code, refused.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)
    assert place.gate.begun == 1
    assert await within(second.complete(place.owner, announced.upload_id)) == complete


async def test_uploads_that_are_incomplete_are_limited(place: Place):
    outcomes = await within(
        asyncio.gather(*(place.uploads.create(place.owner, "image/png", len(PICTURE)) for _ in range(10)), return_exceptions=True)
    )
    announced = [outcome for outcome in outcomes if isinstance(outcome, Announced)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, MeshError)]

    assert (len(announced), len(refused)) == (LIMITS.incomplete_max, 10 - LIMITS.incomplete_max)
    for one in refused:
        assert (one.code, one.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
        assert one.quota[0][0] == "uploads.incomplete"
        assert one.retry_after_s is not None
        assert intake.INCOMPLETE_TTL_S - 60 < one.retry_after_s <= intake.INCOMPLETE_TTL_S
    await place.uploads.create(uuid.uuid4(), "image/png", 10)  # others are not concerned
    await place.put(announced[0])
    await within(place.uploads.complete(place.owner, announced[0].upload_id))
    await place.uploads.create(place.owner, "image/png", 10)
    await place.change(announced[1].upload_id, expire_time=sa.func.now() - timedelta(seconds=1))
    await place.uploads.create(place.owner, "image/png", 10)


async def test_urls_that_work_are_limited_though_their_uploads_were_rejected(place: Place):
    count = LIMITS.incomplete_max * intake.URLS_PER_INCOMPLETE
    ids: list[uuid.UUID] = []
    for _ in range(count):
        ids.append((await place.uploads.create(place.owner, "image/png", 10)).upload_id)
        await place.change(ids[-1], state=UploadState.REJECTED, rejection="no")

    refused = await refusal(place.uploads.create(place.owner, "image/png", 10))
    await place.change(ids[0], url_expire_time=sa.func.now())

    assert refused.quota[0][0] == "uploads.urls"
    await place.uploads.create(place.owner, "image/png", 10)


async def test_what_is_kept_for_an_owner_is_limited(place: Place):
    small = place.server(
        Checker(MEDIA), limits=UploadLimits(1000, url_ttl_s=900, incomplete_max=3, stored_max_bytes=1500, retention_s=DAY_S,
                                            checks_at_once=1, checks_waiting_max=0),
    )  # fmt: skip
    await small.create(place.owner, "image/png", 1000)

    refused = await refusal(small.create(place.owner, "image/png", 501))

    assert refused.quota[0][0] == "uploads.stored_bytes"
    await small.create(place.owner, "image/png", 500)


async def test_checks_that_wait_are_limited(place: Place):
    server = place.server(place.gate)
    places = LIMITS.checks_at_once + LIMITS.checks_waiting_max
    owners = [uuid.uuid4() for _ in range(places + 1)]
    ids: list[uuid.UUID] = []
    for owner in owners:
        announced = await server.create(owner, "image/png", len(PICTURE))
        await place.put(announced)
        ids.append(announced.upload_id)
    waiting = [asyncio.create_task(server.complete(owner, one)) for owner, one in zip(owners[:-1], ids[:-1], strict=True)]
    await place.gate.until_begun(LIMITS.checks_at_once)

    async def all_have_a_place() -> bool:
        return len(server._checks) == places  # pyright: ignore[reportPrivateUsage]

    await eventually(all_have_a_place)

    refused = await refusal(server.complete(owners[-1], ids[-1]))
    running = place.gate.begun
    place.gate.open.set()

    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
    assert refused.retry_after_s
    assert running == LIMITS.checks_at_once
    assert {one.state for one in await within(asyncio.gather(*waiting))} == {UploadState.COMPLETE}
    assert (await within(server.complete(owners[-1], ids[-1]))).state is UploadState.COMPLETE


async def test_one_owner_does_not_take_all_places(place: Place):
    server = place.server(place.gate)
    announced = [await place.arrived() for _ in range(3)]
    checks = [asyncio.create_task(server.complete(place.owner, one.upload_id)) for one in announced]
    await place.gate.until_begun(1)

    async def all_have_a_place() -> bool:
        return len(server._checks) == 3  # pyright: ignore[reportPrivateUsage]  # half of the six places there are

    await eventually(all_have_a_place)
    one_more = uuid.uuid4()
    async with transaction(place.engine) as connection:
        await store.add(connection, one_more, place.owner, content_type="image/png", size_bytes=1, arrival_key="x", url_ttl_s=1, ttl_s=3600)

    refused = await refusal(server.complete(place.owner, one_more))
    place.gate.open.set()
    await within(asyncio.gather(*checks))

    assert refused.quota[0][0] == "uploads.checks"


async def arrived_of(place: Place, owner: uuid.UUID, count: int) -> list[uuid.UUID]:
    place.owner = owner
    return [(await place.arrived()).upload_id for _ in range(count)]


async def test_owners_take_turns(place: Place):
    greedy, modest = uuid.uuid4(), uuid.uuid4()
    of_greedy, of_modest = await arrived_of(place, greedy, 3), await arrived_of(place, modest, 1)
    server = place.server(place.gate)
    checks = [asyncio.create_task(server.complete(greedy, one)) for one in of_greedy]
    await place.gate.until_begun(1)
    checks.append(asyncio.create_task(server.complete(modest, of_modest[0])))
    await place.gate.until_begun(2)  # though the greedy one asked for the second slot first, and still has two that wait
    began: list[uuid.UUID] = []

    async def note() -> None:
        async with transaction(place.engine) as connection:
            now = sa.select(tables.uploads.c.owner_id).where(
                tables.uploads.c.check_end_time > sa.func.now(), tables.uploads.c.state == UploadState.PENDING
            )
            began.extend((await connection.execute(now)).scalars())

    await note()
    place.gate.open.set()
    await within(asyncio.gather(*checks))

    assert sorted(began) == sorted([greedy, modest])


async def test_who_has_most_places_gives_one_to_who_has_none(place: Place):
    crowd = [uuid.uuid4(), uuid.uuid4()]
    ids = {owner: await arrived_of(place, owner, 3) for owner in crowd}
    late = uuid.uuid4()
    [of_late] = await arrived_of(place, late, 1)
    server = place.server(place.gate)
    checks = [asyncio.create_task(server.complete(owner, one)) for owner in crowd for one in ids[owner]]
    await place.gate.until_begun(2)

    async def all_have_a_place() -> bool:
        return len(server._checks) == 6  # pyright: ignore[reportPrivateUsage]

    await eventually(all_have_a_place)

    async def all_wait() -> bool:
        return sum(len(places) for places in server._turns._waiting.values()) == 4  # pyright: ignore[reportPrivateUsage]

    await eventually(all_wait)
    checks.append(asyncio.create_task(server.complete(late, of_late)))
    await within(asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED))
    place.gate.open.set()
    outcomes = await within(asyncio.gather(*checks, return_exceptions=True))

    [displaced] = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert isinstance(displaced, MeshError)
    assert (displaced.reason, displaced.quota[0][0]) == (Reason.ERROR_REASON_LIMIT_REACHED, "uploads.checks")
    assert isinstance(outcomes[-1], Upload)
    [index] = [index for index, outcome in enumerate(outcomes) if outcome is displaced]
    owner, upload_id = crowd[index // 3], ids[crowd[index // 3]][index % 3]
    assert (await within(server.complete(owner, upload_id))).state is UploadState.COMPLETE


async def test_a_turn_that_is_given_up_goes_to_the_next(place: Place):
    server = place.server(place.gate)
    turns = server._turns  # pyright: ignore[reportPrivateUsage]
    first, second = uuid.uuid4(), uuid.uuid4()
    entered: list[uuid.UUID] = []

    async def take(owner: uuid.UUID, until: asyncio.Event) -> None:
        async with turns.turn(owner):
            entered.append(owner)
            await until.wait()

    end = asyncio.Event()
    running = [asyncio.create_task(take(uuid.uuid4(), end)) for _ in range(LIMITS.checks_at_once)]
    await asyncio.sleep(0)
    waiting, given_up, admitted = (asyncio.create_task(take(owner, end)) for owner in (first, first, second))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.sleep(0)
    end.set()
    await asyncio.sleep(0)  # those that run leave: `waiting` and `admitted` have a slot each and do not know
    waiting.cancel()
    last = asyncio.create_task(take(first, end))
    await within(asyncio.gather(*running, waiting, given_up, admitted, last, return_exceptions=True))

    assert (waiting.cancelled(), given_up.cancelled()) == (True, True)
    assert entered[LIMITS.checks_at_once :] == [second, first]
    assert (turns._free, turns._running, turns._waiting) == (LIMITS.checks_at_once, set(), {})  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("costly", ["refused", "slow", "hangs"])
async def test_costly_checks_of_an_owner_are_limited(place: Place, monkeypatch: pytest.MonkeyPatch, costly: str):
    monkeypatch.setattr(turns, "COSTLY_CHECKS_MAX", 2)
    place.gate.open.set()
    server = place.server(place.gate)

    async def hang() -> None:
        raise unavailable("too slow")

    if costly == "refused":
        place.gate.answer = Verdict(refusal=Refusal.BROKEN)
    else:
        monkeypatch.setattr(intake, "HEAVY_CHECK_S", -1.0)
        place.gate.meanwhile = hang if costly == "hangs" else None
    owner = place.owner
    first, second = await arrived_of(place, owner, 2)
    for upload_id in (first, second):
        await within(asyncio.gather(server.complete(owner, upload_id), return_exceptions=True))
    [one_more] = await arrived_of(place, owner, 1) if costly != "hangs" else [second]
    begun = place.gate.begun

    refused = await refusal(server.complete(owner, one_more))

    assert (refused.reason, refused.quota[0][0]) == (Reason.ERROR_REASON_LIMIT_REACHED, "uploads.costly_checks")
    assert refused.retry_after_s is not None
    assert turns.HOUR_S - 60 < refused.retry_after_s <= turns.HOUR_S
    assert place.gate.begun == begun == 2
    place.gate.answer = place.gate.meanwhile = None
    [of_another] = await arrived_of(place, uuid.uuid4(), 1)
    await within(server.complete(place.owner, of_another))  # others are not concerned
    monkeypatch.setattr(turns, "HOUR_S", 0.0)
    assert (await within(server.complete(owner, one_more))).state is UploadState.COMPLETE


async def test_checks_that_cost_little_are_not_counted(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "COSTLY_CHECKS_MAX", 1)
    for _ in range(2):
        announced = await place.arrived()
        assert (await within(place.uploads.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE


# --- whoever dies --------------------------------------------------------------------------------------------------------------


async def test_a_check_goes_on_when_its_caller_went_away(place: Place):
    announced = await place.arrived()
    server = place.server(place.gate)
    caller = asyncio.create_task(server.complete(place.owner, announced.upload_id))
    await place.gate.until_begun(1)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    place.gate.open.set()

    assert (await within(server.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE
    assert place.gate.begun == 1


async def test_a_server_that_stops_leaves_the_upload_to_others(place: Place):
    announced = await place.arrived()
    server = place.server(place.gate)
    caller = asyncio.create_task(server.complete(place.owner, announced.upload_id))
    await place.gate.until_begun(1)

    await within(server.close())

    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (await within(place.uploads.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE


async def claim(place: Place, upload_id: uuid.UUID) -> tuple[uuid.UUID, Upload]:
    check_id = uuid.uuid4()
    async with transaction(place.engine) as connection:
        claimed = await store.claim(connection, upload_id, check_id, lease_s=intake.CHECK_LEASE_S)
    assert claimed is not None
    return check_id, claimed


async def test_a_server_that_died_while_checking(place: Place):
    announced = await place.arrived()
    check_id, _ = await claim(place, announced.upload_id)

    refused = await refusal(place.uploads.complete(place.owner, announced.upload_id))
    await place.change(announced.upload_id, check_end_time=sa.func.now())
    complete = await within(place.uploads.complete(place.owner, announced.upload_id))
    async with transaction(place.engine) as connection:
        late = await store.end(connection, announced.upload_id, check_id, UploadState.REJECTED, ttl_s=60, rejection="too late")

    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert late is None
    assert await place.uploads.get(place.owner, announced.upload_id) == complete


async def test_a_verdict_after_the_claim_has_ended_counts_for_nothing(place: Place):
    announced = await place.arrived()

    async def take_too_long() -> None:
        await place.change(announced.upload_id, check_end_time=sa.func.now() - timedelta(seconds=1))

    place.gate.meanwhile = take_too_long
    place.gate.open.set()
    server = place.server(place.gate)

    refused = await refusal(server.complete(place.owner, announced.upload_id))
    place.gate.answer = Verdict(refusal=Refusal.BROKEN)
    also_refused = await refusal(server.complete(place.owner, announced.upload_id))

    assert refused.code is also_refused.code is grpc.StatusCode.UNAVAILABLE
    assert not {key for key in place.bucket.listing() if key.startswith(keys.CHECKED)}
    assert (await within(place.uploads.complete(place.owner, announced.upload_id))).state is UploadState.COMPLETE


async def test_a_server_that_died_before_it_could_say_what_it_stored(place: Place):
    announced = await place.arrived()
    complete = await within(place.uploads.complete(place.owner, announced.upload_id))
    pending = await place.arrived()
    key = (await place.some(pending.upload_id))["arrival_key"]
    assert complete.object_key is not None
    lost = [f"{part}/{place.owner}/{uuid.uuid4()}/lost" for part in (keys.ARRIVALS, keys.CHECKED)]
    fresh = [f"{part}/{place.owner}/{uuid.uuid4()}/fresh" for part in (keys.ARRIVALS, keys.CHECKED)]
    foreign = [f"{place.owner}/{uuid.uuid4()}/a.png", "uploads/notes.txt", f"incoming/{place.owner}/x"]
    for old in (*lost, *foreign, complete.object_key, key):
        place.bucket.put(old)
    for young in fresh:
        place.bucket.put(young, age_s=0)

    assert await place.sweeper().sweep_orphans() == len(lost)
    assert place.bucket.listing() == {*fresh, *foreign, complete.object_key, key}


async def test_a_sweep_goes_on_where_it_stopped(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("servicekit.objects.PAGE_MAX", 2)
    monkeypatch.setattr(sweeper, "SWEEP_PAGES", 2)
    for _ in range(9):
        place.bucket.put(f"{keys.CHECKED}/{place.owner}/{uuid.uuid4()}/lost")
    sweeping = place.sweeper()

    counts = [await sweeping.sweep_orphans() for _ in range(3)]

    assert counts == [4, 4, 1]
    assert place.bucket.listing() == set()


# --- what expires --------------------------------------------------------------------------------------------------------------


async def test_what_expired_is_gone_at_once_and_removed_soon(place: Place):
    pending, done, refused = await place.arrived(), await place.arrived(), await place.arrived(b"no picture")
    await within(place.uploads.complete(place.owner, done.upload_id))
    await refusal(place.uploads.complete(place.owner, refused.upload_id))
    kept = await place.arrived(OTHER_PICTURE)
    for one in (pending, done, refused):
        await place.change(one.upload_id, expire_time=sa.func.now() - timedelta(seconds=1))

    for one in (pending, done, refused):
        for answer in (place.uploads.get, place.uploads.complete):
            assert (await refusal(answer(place.owner, one.upload_id))).code is grpc.StatusCode.NOT_FOUND
    assert await place.sweeper().expire() == 3
    assert [await place.row(one.upload_id) for one in (pending, done, refused)] == [None] * 3
    assert place.bucket.listing() == {(await place.some(kept.upload_id))["arrival_key"]}


async def test_what_is_about_to_expire_is_not_checked_any_more(place: Place):
    announced = await place.arrived()
    await place.change(announced.upload_id, expire_time=sa.func.now() + timedelta(seconds=intake.CHECK_LEASE_S - 1))

    refused = await refusal(place.server(place.gate).complete(place.owner, announced.upload_id))

    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert place.gate.begun == 0


async def test_rows_stay_while_the_store_is_away(place: Place, media_away: ObjectStore):
    announced = await place.arrived()
    await place.change(announced.upload_id, expire_time=sa.func.now() - timedelta(seconds=1))

    away = await refusal(UploadSweeper(place.engine, media_away, orphan_s=DAY_S).expire())

    assert away.reason == Reason.ERROR_REASON_STORE_FAILED
    assert await place.sweeper().expire() == 1
    assert place.bucket.listing() == set()
