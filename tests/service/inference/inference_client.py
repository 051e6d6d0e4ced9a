"""How tests call the inference service: requests, streams read to their end, typed refusals."""

import uuid
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2
from inference_service.app import SERVED

TIGER = "a tiger face"

BARE_SPECS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 7, "width": 64, "height": 64, "steps": 20, "guidance_scale": 3.0, "negative_prompt": ""},
    "next seed": {"seed": 8, "width": 64, "height": 64, "steps": 20, "guidance_scale": 3.0, "negative_prompt": ""},
    "wide": {"seed": 9007199254740991, "width": 72, "height": 32, "steps": 3, "guidance_scale": 5.5, "negative_prompt": "red"},
}


@dataclass(frozen=True)
class Client:
    """What jobs_service has of the inference service."""

    inference: "inference_pb2_grpc.InferenceServiceAsyncStub"  # a class of the .pyi only
    catalogue: "inference_pb2_grpc.ModelCatalogServiceAsyncStub"
    health: Any


def client_of(channel: grpc.aio.Channel) -> Client:
    return Client(
        inference_pb2_grpc.InferenceServiceStub(channel),
        inference_pb2_grpc.ModelCatalogServiceStub(channel),
        health_pb2_grpc.HealthStub(channel),
    )


def request(prefix: str | None = None, **spec: Any) -> inference_pb2.GenerateRequest:
    """A request for a tiger; `spec` changes fields of the ImageSpec."""
    fields: dict[str, Any] = {"prompt": TIGER, "seed": 7, "width": 64, "height": 64, "steps": 4, "guidance_scale": 3.0, "image_count": 1}
    return inference_pb2.GenerateRequest(
        job_id=str(uuid.uuid4()),
        attempt=1,
        spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(**(fields | spec))),
        output_prefix=prefix or f"tests/{uuid.uuid4()}/",
    )


@dataclass(frozen=True)
class Refusal:
    """A typed error as a client sees it."""

    code: grpc.StatusCode
    reason: str
    fields: tuple[str, ...]
    metadata: dict[str, str]


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return Refusal(error.code(), info.reason, tuple(violation.field for violation in bad.field_violations), dict(info.metadata))


async def refused(call: Any) -> Refusal:
    """Read a stream (or await a call) that has to end with an error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (collect(call) if hasattr(call, "__aiter__") else call)
    return refusal(caught.value)


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in call]


def assets(responses: list[inference_pb2.GenerateResponse], kind: jobs_pb2.Asset.Kind.ValueType) -> list[jobs_pb2.Asset]:
    return [response.asset for response in responses if response.WhichOneof("message") == "asset" and response.asset.kind == kind]


def steps(responses: list[inference_pb2.GenerateResponse]) -> list[int]:
    """Step numbers of denoising progress, without the one that opens the stage."""
    return [
        response.progress.step
        for response in responses
        if response.WhichOneof("message") == "progress" and response.progress.stage == jobs_pb2.STAGE_DENOISING and response.progress.step
    ]


async def serving(client: Client, wanted: int) -> None:
    """Wait until the server says about itself what is wanted."""
    watch = client.health.Watch(health_pb2.HealthCheckRequest(service=SERVED[0]), timeout=120)
    try:
        async for answer in watch:
            if answer.status == wanted:
                return
    finally:
        watch.cancel()
