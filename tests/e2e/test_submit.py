"""A prompt becomes a picture, whichever way it comes in; a request that is repeated stays one job and one bill."""

import asyncio
import hashlib
import io
import uuid

import grpc
import httpx
import pytest
from PIL import Image

from genmesh.credits.v1 import credits_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import CREATE_JOB, DEADLINE_S, ESTIMATE_JOB, LIST_MODELS, Transport, User, image, refused, submission


@pytest.fixture
async def price_of_step(alice: User) -> int:
    """Of the default model at its default size, in millicredits."""
    models = (await alice.call(LIST_MODELS, inference_pb2.ListModelsRequest())).models
    [price] = [model.price.step_millicredits for model in models if model.is_default]
    assert price > 0
    return price


async def download(asset: jobs_pb2.Asset) -> bytes:
    """The file, by its presigned URL alone; checked against what the asset says."""
    async with httpx.AsyncClient(timeout=DEADLINE_S) as anyone:
        reply = await anyone.get(asset.url)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == asset.content_type
    assert len(reply.content) == asset.size_bytes
    assert hashlib.sha256(reply.content).hexdigest() == asset.sha256
    return reply.content


@pytest.mark.parametrize("transport", Transport)
async def test_prompt_becomes_picture(alice: User, transport: Transport, price_of_step: int) -> None:
    before, _ = await alice.balance()
    spec = image(f"a penguin by {transport}", width=64, height=64, steps=5)
    estimate = await alice.call(ESTIMATE_JOB, jobs_pb2.EstimateJobRequest(spec=spec), transport)
    submitted = await alice.submit(spec, transport)
    assert uuid.UUID(submitted.job_id).version == 7
    assert (submitted.owner_id, submitted.state) == (alice.user_id, jobs_pb2.STATE_PENDING)
    assert submitted.estimated_cost_millicredits == estimate.cost_millicredits == 5 * price_of_step
    assert submitted.queue_position >= 1

    job = await alice.finished(submitted.job_id)
    assert job.state == jobs_pb2.STATE_COMPLETED, job.error
    assert (job.attempt, job.worker_id) == (1, "dispatch-0")
    assert job.create_time.ToNanoseconds() <= job.start_time.ToNanoseconds() <= job.finish_time.ToNanoseconds()

    pictures = [asset for asset in job.assets if asset.kind == jobs_pb2.Asset.KIND_IMAGE]
    thumbnails = [asset for asset in job.assets if asset.kind == jobs_pb2.Asset.KIND_THUMBNAIL]
    assert (len(pictures), len(thumbnails)) == (1, 1)
    for asset, file_format in ((pictures[0], "PNG"), (thumbnails[0], "WEBP")):
        assert not asset.object_key
        assert len(asset.blurhash) >= 6
        picture = Image.open(io.BytesIO(await download(asset)))
        assert (picture.format, picture.size) == (file_format, (asset.width, asset.height))
    assert (pictures[0].width, pictures[0].height) == (64, 64)

    cost = submitted.estimated_cost_millicredits
    assert job.cost_millicredits == cost
    assert job.receipt == jobs_pb2.Receipt(
        steps_done=5, steps_agreed=5, step_price_millicredits=price_of_step, captured_millicredits=cost, released_millicredits=0
    )
    assert await alice.balance() == (before - cost, 0)
    kinds = [entry.kind for entry in await alice.entries(job.job_id)]
    assert kinds.count(credits_pb2.Entry.KIND_CAPTURE) == 1


async def test_what_the_spec_leaves_open_is_shown_resolved(alice: User) -> None:
    [model] = [one for one in (await alice.call(LIST_MODELS, inference_pb2.ListModelsRequest())).models if one.is_default]
    job = await alice.submit(jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a sunflower")))
    await alice.cancel(job.job_id)
    shown = job.spec.image
    limits = model.image
    assert (shown.model, shown.width, shown.height) == (model.model_id, limits.default_width, limits.default_height)
    assert (shown.steps, shown.guidance_scale) == (limits.default_steps, limits.default_guidance_scale)
    assert (shown.image_count, shown.format) == (1, jobs_pb2.IMAGE_FORMAT_PNG)
    assert shown.seed > 0
    assert (await alice.finished(job.job_id)).spec == job.spec


async def test_several_pictures_as_webp_each_with_its_own_seed(alice: User) -> None:
    job = await alice.finished(
        (await alice.submit(image(image_count=2, steps=2, format=jobs_pb2.IMAGE_FORMAT_WEBP, width=72, height=40))).job_id
    )
    pictures = [await download(asset) for asset in job.assets if asset.kind == jobs_pb2.Asset.KIND_IMAGE]
    assert [(Image.open(io.BytesIO(body)).format, Image.open(io.BytesIO(body)).size) for body in pictures] == [("WEBP", (72, 40))] * 2
    assert pictures[0] != pictures[1]
    assert (job.receipt.steps_done, job.receipt.steps_agreed) == (4, 4)


async def test_a_presigned_url_opens_one_file_only(alice: User) -> None:
    job = await alice.finished((await alice.submit(image(steps=1))).job_id)
    [picture] = [asset for asset in job.assets if asset.kind == jobs_pb2.Asset.KIND_IMAGE]
    [thumbnail] = [asset for asset in job.assets if asset.kind == jobs_pb2.Asset.KIND_THUMBNAIL]
    path, _, signature = picture.url.partition("?")
    other, _, _ = thumbnail.url.partition("?")
    async with httpx.AsyncClient(timeout=DEADLINE_S) as anyone:
        for attempt in (anyone.get(f"{other}?{signature}"), anyone.get(path), anyone.put(picture.url, content=b"mine now")):
            assert (await attempt).status_code in (400, 403)
    await download(picture)


# --- idempotency -----------------------------------------------------------------------------------------------------


async def test_the_same_request_is_the_same_job(alice: User) -> None:
    request = submission(image("asked for twice"))
    first = (await alice.call(CREATE_JOB, request)).job
    again = [(await alice.call(CREATE_JOB, request, transport)).job for transport in Transport]
    assert {job.job_id for job in again} == {first.job_id}
    job = await alice.finished(first.job_id)
    assert (await alice.call(CREATE_JOB, request)).job.state == jobs_pb2.STATE_COMPLETED
    holds = [entry for entry in await alice.entries(job.job_id) if entry.kind == credits_pb2.Entry.KIND_RESERVE]
    assert sum(entry.amount_millicredits for entry in holds if entry.account == credits_pb2.Entry.ACCOUNT_RESERVED) == job.cost_millicredits


@pytest.mark.parametrize("transport", Transport)
async def test_the_same_id_for_something_else_is_refused(alice: User, transport: Transport) -> None:
    request = submission(image("the first", steps=1))
    job = (await alice.call(CREATE_JOB, request)).job
    jobs = await alice.jobs()
    refusal = await refused(alice.call(CREATE_JOB, submission(image("another", steps=1), request.request_id), transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert refusal.http_status == (409 if transport is Transport.JSON else None)
    assert [job.job_id for job in await alice.jobs()] == [job.job_id for job in jobs]
    await alice.finished(job.job_id)


async def test_the_same_id_of_another_user_is_another_job(alice: User, bob: User) -> None:
    request = submission(image(steps=1))
    mine, theirs = (await alice.call(CREATE_JOB, request)).job, (await bob.call(CREATE_JOB, request)).job
    assert mine.job_id != theirs.job_id
    assert ((await alice.finished(mine.job_id)).state, (await bob.finished(theirs.job_id)).state) == (jobs_pb2.STATE_COMPLETED,) * 2


async def test_identical_requests_at_once_are_one_job(alice: User) -> None:
    before, _ = await alice.balance()
    request = submission(image("asked for at once", steps=2))
    answers = await asyncio.gather(*(alice.call(CREATE_JOB, request, transport) for transport in (*Transport, *Transport)))
    [job_id] = {answer.job.job_id for answer in answers}
    job = await alice.finished(job_id)
    assert [one.job_id for one in await alice.jobs()].count(job_id) == 1
    assert sum(one.spec.image.prompt == "asked for at once" for one in await alice.jobs()) == 1
    assert await alice.balance() == (before - job.cost_millicredits, 0)
