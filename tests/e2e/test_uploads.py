"""Uploads through the edge: announced, put into the store and completed over every way in, and refused for what they are."""

import asyncio
import hashlib
import io
import uuid
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
import pytest_asyncio
from PIL import Image

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import COMPLETE_UPLOAD, CREATE_UPLOAD, DEADLINE_S, GET_UPLOAD, Edge, Refusal, Transport, User


def picture() -> bytes:
    body = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(body, "PNG")
    return body.getvalue()


PICTURE = picture()


@pytest_asyncio.fixture(scope="module")
async def store() -> AsyncIterator[httpx.AsyncClient]:
    """A stranger's way to the store: with nothing but URLs."""
    async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
        yield client


async def announce(user: User, body: bytes = PICTURE, transport: Transport = Transport.GRPC) -> jobs_pb2.CreateUploadResponse:
    request = jobs_pb2.CreateUploadRequest(content_type="image/png", size_bytes=len(body))
    return await user.call(CREATE_UPLOAD, request, transport)


def completion(announced: jobs_pb2.CreateUploadResponse) -> jobs_pb2.CompleteUploadRequest:
    return jobs_pb2.CompleteUploadRequest(upload_id=announced.upload_id)


@pytest.mark.parametrize("transport", Transport)
async def test_a_file_is_announced_put_and_completed(alice: User, store: httpx.AsyncClient, transport: Transport):
    announced = await announce(alice, transport=transport)
    put = await store.put(announced.url, content=PICTURE, headers=dict(announced.headers))

    upload = (await alice.call(COMPLETE_UPLOAD, completion(announced), transport)).upload
    shown = (await alice.call(GET_UPLOAD, jobs_pb2.GetUploadRequest(upload_id=announced.upload_id), transport)).upload

    assert put.status_code == 200
    assert shown == upload
    assert (upload.state, upload.width, upload.height) == (jobs_pb2.UPLOAD_STATE_COMPLETE, 64, 48)
    assert (upload.size_bytes, upload.sha256) == (len(PICTURE), hashlib.sha256(PICTURE).hexdigest())


@pytest.mark.parametrize("transport", Transport)
async def test_a_file_that_is_no_picture(alice: User, store: httpx.AsyncClient, transport: Transport):
    body = b"<!doctype html><script>alert(1)</script>"
    announced = await announce(alice, body, transport)
    await store.put(announced.url, content=body, headers=dict(announced.headers))

    with pytest.raises(Refusal) as refused:
        await alice.call(COMPLETE_UPLOAD, completion(announced), transport)
    upload = (await alice.call(GET_UPLOAD, jobs_pb2.GetUploadRequest(upload_id=announced.upload_id), transport)).upload

    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.reason == "UPLOAD_INVALID"
    assert upload.state == jobs_pb2.UPLOAD_STATE_REJECTED
    assert upload.rejection == "the file is not of the type that was announced"


@pytest.mark.parametrize("transport", Transport)
async def test_what_cannot_be_announced(alice: User, edge: Edge, transport: Transport):
    codes: list[grpc.StatusCode] = []
    for content_type, size_bytes in (("image/svg+xml", 10), ("text/html", 10), ("image/png", 0), ("image/png", 2**40)):
        with pytest.raises(Refusal) as refused:
            await alice.call(CREATE_UPLOAD, jobs_pb2.CreateUploadRequest(content_type=content_type, size_bytes=size_bytes), transport)
        codes.append(refused.value.code)
    request = jobs_pb2.CreateUploadRequest(content_type="image/png", size_bytes=10)
    with pytest.raises(Refusal) as anonymous:
        await edge.call(CREATE_UPLOAD, request, transport=transport)

    assert codes == [grpc.StatusCode.INVALID_ARGUMENT] * 4
    assert anonymous.value.code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("transport", Transport)
async def test_uploads_of_others_do_not_exist(alice: User, bob: User, transport: Transport):
    announced = await announce(alice)
    codes: list[grpc.StatusCode] = []
    for upload_id in (announced.upload_id, str(uuid.uuid4())):
        with pytest.raises(Refusal) as refused:
            await bob.call(GET_UPLOAD, jobs_pb2.GetUploadRequest(upload_id=upload_id), transport)
        codes.append(refused.value.code)
        with pytest.raises(Refusal) as refused:
            await bob.call(COMPLETE_UPLOAD, jobs_pb2.CompleteUploadRequest(upload_id=upload_id), transport)
        codes.append(refused.value.code)

    assert codes == [grpc.StatusCode.NOT_FOUND] * 4


async def test_a_url_is_for_what_was_announced(alice: User, store: httpx.AsyncClient):
    announced = await announce(alice)
    headers = dict(announced.headers)

    refused = [
        await store.put(announced.url, content=PICTURE, headers=headers | {"content-type": "text/html"}),
        await store.put(announced.url, content=PICTURE + b"x", headers=headers | {"content-length": str(len(PICTURE) + 1)}),
        await store.put(announced.url.replace("?", "x?", 1), content=PICTURE, headers=headers),
        await store.get(announced.url),
        await store.delete(announced.url),
    ]

    assert [answer.status_code for answer in refused] == [403] * len(refused)


async def test_parallel_completes(alice: User, store: httpx.AsyncClient):
    announced = await announce(alice)
    await store.put(announced.url, content=PICTURE, headers=dict(announced.headers))

    answers = await asyncio.gather(*(alice.call(COMPLETE_UPLOAD, completion(announced)) for _ in range(5)))

    assert {answer.upload.state for answer in answers} == {jobs_pb2.UPLOAD_STATE_COMPLETE}
