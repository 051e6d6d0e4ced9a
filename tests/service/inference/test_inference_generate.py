"""Generate on a real model, a real store and mTLS: pictures, progress, previews, refusals."""

import hashlib
import io
import uuid
from contextlib import AsyncExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from inference_service.app import SERVED, Dependencies, build_server
from servicekit.client import mesh_channel
from servicekit.doorkeeper import Doorkeeper
from servicekit.identity import RemoteKeys
from servicekit.objects import ObjectStore
from servicekit.tls import TlsFiles
from tests.service.inference.conftest import Service
from tests.service.inference.inference_client import BARE_SPECS, assets, client_of, collect, refused, request, steps

IMAGE, THUMBNAIL = jobs_pb2.Asset.KIND_IMAGE, jobs_pb2.Asset.KIND_THUMBNAIL


def pixels(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


def kinds(responses: list[inference_pb2.GenerateResponse]) -> list[str]:
    return [str(response.WhichOneof("message")) for response in responses]


@pytest.mark.parametrize("name", ["plain", "wide"])
async def test_picture_is_what_the_bare_pipeline_makes(
    service: Service, bucket: Any, bare_pictures: dict[str, np.ndarray], name: str
) -> None:
    responses = await collect(service.client.inference.Generate(request(**BARE_SPECS[name])))
    (asset,) = assets(responses, IMAGE)
    body, content_type = bucket.read(asset.object_key)
    assert content_type == asset.content_type == "image/png"
    assert np.array_equal(pixels(body), bare_pictures[name])
    assert (asset.width, asset.height) == (BARE_SPECS[name]["width"], BARE_SPECS[name]["height"])
    assert asset.sha256 == hashlib.sha256(body).hexdigest()
    assert asset.size_bytes == len(body)
    assert asset.url == ""
    assert len(asset.blurhash) == 28


async def test_two_pictures_have_consecutive_seeds(service: Service, bucket: Any, bare_pictures: dict[str, np.ndarray]) -> None:
    sent = request(**BARE_SPECS["plain"], image_count=2)
    responses = await collect(service.client.inference.Generate(sent))
    first, second = assets(responses, IMAGE)
    assert np.array_equal(pixels(bucket.read(first.object_key)[0]), bare_pictures["plain"])
    assert np.array_equal(pixels(bucket.read(second.object_key)[0]), bare_pictures["next seed"])
    assert steps(responses) == list(range(1, 41))
    assert responses[-1].done.steps_done == 40
    prefix = sent.output_prefix
    assert bucket.keys(prefix) == [f"{prefix}{name}" for name in ("image-0.png", "image-1.png", "thumbnail-0.webp", "thumbnail-1.webp")]


async def test_stream_counts_every_step_and_ends_with_done(service: Service) -> None:
    responses = await collect(service.client.inference.Generate(request(steps=20)))
    assert steps(responses) == list(range(1, 21))
    progress = [response.progress for response in responses if response.WhichOneof("message") == "progress"]
    assert {message.step_count for message in progress} == {20}
    percents = [message.percent for message in progress]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert percents[-1] < 100
    stages = [message.stage for message in progress]
    assert stages == sorted(stages)
    assert {jobs_pb2.STAGE_DENOISING, jobs_pb2.STAGE_ENCODING, jobs_pb2.STAGE_UPLOADING} == set(stages)
    denoising = [message.eta_seconds for message in progress if message.step]
    assert denoising[0] > denoising[-1] == 0
    assert kinds(responses)[-3:] == ["asset", "asset", "done"]
    assert responses[-1].done.steps_done == 20
    assert responses[-1].done.pipeline_ms > 0


async def test_previews_are_small_pictures_of_the_way(service: Service) -> None:
    responses = await collect(service.client.inference.Generate(request(steps=40, width=128, height=96)))
    previews = [(number, response.preview) for number, response in enumerate(responses) if response.WhichOneof("message") == "preview"]
    assert previews
    for _, preview in previews:
        assert len(preview.inline_jpeg) <= 16 * 1024
        picture = Image.open(io.BytesIO(preview.inline_jpeg))
        picture.load()
        assert picture.format == "JPEG"
        assert picture.size == (128, 96)
        assert len(preview.blurhash) == 28
    last_step = max(number for number, response in enumerate(responses) if response.progress.stage == jobs_pb2.STAGE_DENOISING)
    assert previews[-1][0] < last_step, "a preview after the last step is wasted"


async def test_every_picture_of_a_few_steps_has_a_preview(service: Service) -> None:
    responses = await collect(service.client.inference.Generate(request(steps=5, image_count=2)))
    steps, seen = 0, list[int]()
    for response in responses:
        steps = max(steps, response.progress.step)
        if response.HasField("preview"):
            seen.append(steps)
    assert {3, 8} <= set(seen), "60 % of five steps are three"


async def test_same_spec_and_seed_give_the_same_file_under_the_same_keys(service: Service, bucket: Any) -> None:
    prefix = f"tests/{uuid.uuid4()}/"
    first = await collect(service.client.inference.Generate(request(prefix)))
    again = await collect(service.client.inference.Generate(request(prefix)))
    other = await collect(service.client.inference.Generate(request(seed=8)))
    assert [asset.SerializeToString() for asset in assets(first, IMAGE)] == [asset.SerializeToString() for asset in assets(again, IMAGE)]
    assert assets(first, THUMBNAIL)[0].asset_id == assets(again, THUMBNAIL)[0].asset_id
    assert assets(first, IMAGE)[0].asset_id != assets(other, IMAGE)[0].asset_id
    assert assets(first, IMAGE)[0].sha256 != assets(other, IMAGE)[0].sha256
    assert bucket.keys(prefix) == [f"{prefix}image-0.png", f"{prefix}thumbnail-0.webp"]


async def test_webp_and_thumbnail(service: Service, bucket: Any) -> None:
    responses = await collect(service.client.inference.Generate(request(format=jobs_pb2.IMAGE_FORMAT_WEBP, width=128, height=64)))
    (image,), (thumbnail,) = assets(responses, IMAGE), assets(responses, THUMBNAIL)
    for asset in (image, thumbnail):
        body, content_type = bucket.read(asset.object_key)
        assert content_type == asset.content_type == "image/webp"
        picture = Image.open(io.BytesIO(body))
        assert picture.format == "WEBP"
        assert picture.size == (asset.width, asset.height)
        assert max(picture.size) == 128
    assert image.object_key.endswith("/image-0.webp")
    assert thumbnail.object_key.endswith("/thumbnail-0.webp")


async def test_files_do_not_tell_the_prompt(service: Service, bucket: Any) -> None:
    responses = await collect(service.client.inference.Generate(request(prompt="zebra-secret")))
    for asset in (*assets(responses, IMAGE), *assets(responses, THUMBNAIL)):
        body = bucket.read(asset.object_key)[0]
        assert b"zebra" not in body
        assert Image.open(io.BytesIO(body)).info.keys() <= {"loop", "background", "duration", "timestamp"}


async def test_what_a_spec_leaves_out_is_the_models_default(service: Service) -> None:
    sent = request()
    for field in ("width", "height", "steps", "guidance_scale", "image_count"):
        sent.spec.image.ClearField(field)
    responses = await collect(service.client.inference.Generate(sent))
    (asset,) = assets(responses, IMAGE)
    assert (asset.width, asset.height) == (64, 64)
    assert responses[-1].done.steps_done == 20


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({"width": 24}, ("spec.image.width",)),
        ({"width": 136}, ("spec.image.width",)),
        ({"height": 68}, ("spec.image.height",)),
        ({"width": 4096, "height": 4096, "steps": 101}, ("spec.image.width", "spec.image.height", "spec.image.steps")),
        ({"steps": 101}, ("spec.image.steps",)),
        ({"steps": 0}, ("spec.image.steps",)),
        ({"guidance_scale": float("nan")}, ("spec.image.guidance_scale",)),
        ({"prompt": " "}, ("spec.image.prompt",)),
    ],
)
async def test_what_the_model_cannot_make_is_refused_by_field(service: Service, spec: dict[str, Any], fields: tuple[str, ...]) -> None:
    refusal = await refused(service.client.inference.Generate(request(**spec)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason == "ERROR_REASON_INVALID_ARGUMENT"
    assert tuple(dict.fromkeys(refusal.fields)) == fields


async def test_unknown_model_is_refused(service: Service) -> None:
    refusal = await refused(service.client.inference.Generate(request(model="no-such-model")))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason == "ERROR_REASON_MODEL_UNKNOWN"
    assert refusal.fields == ("spec.image.model",)
    assert refusal.metadata == {"model": "no-such-model"}


async def test_start_pictures_are_not_offered_yet(service: Service) -> None:
    refusal = await refused(service.client.inference.Generate(request(init_upload_id="upload")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "ERROR_REASON_NOT_OFFERED")


@pytest.mark.parametrize("prefix", ["../", "/", "a//", "a/../b/", "a"])
async def test_output_stays_under_its_prefix(service: Service, prefix: str) -> None:
    refusal = await refused(service.client.inference.Generate(request(prefix)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ("output_prefix",)


async def test_output_that_is_not_finite_is_an_error_and_no_black_picture(service: Service, bucket: Any) -> None:
    sent = request(model="nan")
    refusal = await refused(service.client.inference.Generate(sent))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ERROR_REASON_MODEL_OUTPUT_INVALID")
    assert bucket.keys(sent.output_prefix) == []


@pytest.mark.parametrize("model", ["truncated", "pickled"])
async def test_weights_that_cannot_be_used_fail_the_model_only(service: Service, model: str) -> None:
    process_id = service.host.process_id
    for call in (
        service.client.inference.Generate(request(model=model)),
        service.client.inference.LoadModel(inference_pb2.LoadModelRequest(model_id=model)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ERROR_REASON_MODEL_FAILED")
        assert uuid.UUID(refusal.metadata["error_id"])
    assert (await collect(service.client.inference.Generate(request())))[-1].HasField("done")
    assert service.host.process_id == process_id


async def test_store_that_is_gone_is_unavailable(service: Service) -> None:
    async with AsyncExitStack() as stack:
        settings = service.settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})
        store = stack.enter_context(ObjectStore(settings))
        keys = RemoteKeys(settings.jwks_url, TlsFiles.of(settings.certificates_dir, "inference_service"))
        server = build_server(settings, Dependencies(service.catalogue, service.host, store, Doorkeeper(keys)))
        await stack.enter_async_context(server.running(*SERVED))
        channel = mesh_channel(settings, f"127.0.0.1:{server.port}", caller="jobs_service", service="inference_service")
        client = client_of(await stack.enter_async_context(channel))
        refusal = await refused(client.inference.Generate(request()))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "ERROR_REASON_STORE_FAILED")


async def test_only_jobs_service_may_call(service: Service) -> None:
    for caller in ("gateway", "envoy", "cli"):
        channel = mesh_channel(service.settings, f"127.0.0.1:{service.server.port}", caller=caller, service="inference_service")
        async with channel:
            refusal = await refused(client_of(channel).inference.Generate(request()))
        assert refusal.code is grpc.StatusCode.PERMISSION_DENIED


async def test_catalogue_load_and_unload(service: Service) -> None:
    client = service.client

    async def models() -> dict[str, inference_pb2.Model]:
        answer = await client.catalogue.ListModels(inference_pb2.ListModelsRequest())
        return {model.model_id: model for model in answer.models}

    listed = await models()
    assert list(listed) == ["emoji-diffusion", "second", "nan", "truncated", "pickled"]
    default = listed["emoji-diffusion"]
    assert default.is_default
    assert default.kind == jobs_pb2.KIND_IMAGE
    assert (default.image.default_width, default.image.default_steps, default.image.default_guidance_scale) == (64, 20, 3.0)
    assert (default.image.min_size, default.image.max_size, default.image.size_multiple) == (32, 128, 8)
    assert default.device == "cpu"
    assert default.license == "MIT"
    assert default.price.step_millicredits > 0

    loaded = await client.inference.LoadModel(inference_pb2.LoadModelRequest(model_id="second"))
    assert loaded.model.loaded
    assert (await models())["second"].loaded
    responses = await collect(client.inference.Generate(request(model="second")))
    assert "loading" not in kinds(responses)

    for _ in range(2):
        unloaded = await client.inference.UnloadModel(inference_pb2.UnloadModelRequest(model_id="second"))
        assert not unloaded.model.loaded
    responses = await collect(client.inference.Generate(request(model="second")))
    assert kinds(responses)[0] == "loading"
    assert responses[0].loading.model_id == "second"

    refusal = await refused(client.inference.LoadModel(inference_pb2.LoadModelRequest(model_id="none")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ERROR_REASON_MODEL_UNKNOWN")
