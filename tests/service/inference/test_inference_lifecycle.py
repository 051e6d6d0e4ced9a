"""What happens to attempts around the model process: waiting, cancelling, losing it, draining, running out of memory."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest_asyncio
from grpc_health.v1 import health_pb2

from genmesh.inference.v1 import inference_pb2
from inference_service import model_host
from inference_service.settings import InferenceSettings
from tests.service.inference.conftest import Service, start_service, write_catalogue
from tests.service.inference.inference_client import collect, refused, request, serving, steps

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LONG = 100
"""Steps of an attempt that is not meant to come to its end."""


async def until_step(call: Any, step: int) -> None:
    """Read a stream until a step is done."""
    async for response in call:
        if response.progress.step >= step:
            return
    raise AssertionError("the attempt ended early")


async def following(call: Any) -> inference_pb2.GenerateResponse:
    """The next message of a stream."""
    async for response in call:
        return response
    raise AssertionError("the attempt ended early")


def counted_steps() -> float:
    """Steps that the model process has done so far, as its metric says."""
    metric = model_host.STEP_SECONDS.labels("emoji-diffusion")
    return next(sample.value for sample in metric._samples() if sample.name == "_count")  # pyright: ignore[reportPrivateUsage]


async def test_cancel_stops_the_model_within_a_step_and_frees_the_slot(service: Service) -> None:
    process_id, before = service.host.process_id, counted_steps()
    call = service.client.inference.Generate(request(steps=LONG))
    await until_step(call, 3)
    call.cancel()
    responses = await collect(service.client.inference.Generate(request(steps=2)))
    assert responses[-1].done.steps_done == 2
    # The third step, the one that ran when the cancel arrived, and one more should this machine be slow to tell it.
    assert 3 <= counted_steps() - before - 2 <= 5
    assert service.host.process_id == process_id, "a cancel must not cost the loaded models"


async def test_attempts_wait_in_order_and_see_their_position(service: Service) -> None:
    first = service.client.inference.Generate(request(steps=LONG))
    await until_step(first, 1)
    second, third = (service.client.inference.Generate(request(steps=2)) for _ in range(2))
    assert (await following(second)).queued.position == 1
    assert (await following(third)).queued.position == 2
    second.cancel()
    moved = await following(third)
    assert moved.queued.position == 1
    first.cancel()
    assert steps(await collect(third)) == [1, 2]


async def test_model_that_runs_is_not_unloaded(service: Service) -> None:
    call = service.client.inference.Generate(request(steps=LONG))
    await until_step(call, 1)
    busy = await refused(service.client.inference.UnloadModel(inference_pb2.UnloadModelRequest(model_id="emoji-diffusion")))
    assert (busy.code, busy.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ERROR_REASON_MODEL_BUSY")
    assert "emoji-diffusion" in service.host.loaded
    call.cancel()


async def test_killed_model_process_loses_its_attempt_and_is_replaced(service: Service) -> None:
    killed = service.host.process_id
    assert killed is not None
    running = service.client.inference.Generate(request(steps=LONG))
    await until_step(running, 2)
    waiting = service.client.inference.Generate(request(steps=2))
    assert (await following(waiting)).queued.position == 1
    restarts = model_host.PROCESS_RESTARTS._value.get()  # pyright: ignore[reportPrivateUsage]

    os.kill(killed, signal.SIGKILL)

    lost = await refused(running)
    assert (lost.code, lost.reason) == (grpc.StatusCode.ABORTED, "ERROR_REASON_WORKER_LOST")
    await serving(service.client, NOT_SERVING)
    responses = await collect(waiting)
    assert responses[0].HasField("loading")
    assert responses[-1].done.steps_done == 2
    await serving(service.client, SERVING)
    assert service.host.process_id not in (None, killed)
    assert model_host.PROCESS_RESTARTS._value.get() == restarts + 1  # pyright: ignore[reportPrivateUsage]


@pytest_asyncio.fixture
async def small_service(settings: InferenceSettings, tmp_path: Path) -> AsyncIterator[Service]:
    """A service of its own that lets one attempt wait, drains for long, and has little memory for pictures that are too large."""
    limits = {"min_size": 32, "max_size": 4096, "size_multiple": 8, "max_steps": 1000}
    file = write_catalogue(tmp_path / "catalogue.yaml", {"limits": limits})
    update = {"models_file": file, "max_waiting": 1, "drain_s": 60.0, "model_memory_bytes": 1024 * 1024 * 1024}
    async with AsyncExitStack() as stack:
        running = await start_service(stack, settings.model_copy(update=update))
        await serving(running.client, SERVING)
        yield running


async def test_too_large_for_memory_fails_alone_and_a_full_line_refuses(small_service: Service) -> None:
    service = small_service
    process_id = service.host.process_id
    too_large = await refused(service.client.inference.Generate(request(width=4096, height=4096, steps=1)))
    assert (too_large.code, too_large.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ERROR_REASON_MODEL_OUT_OF_MEMORY")
    # The next attempt gets a fresh process, not the end of the old one.
    running = service.client.inference.Generate(request(steps=1000))
    await until_step(running, 1)
    assert service.host.process_id not in (None, process_id)

    waiting = service.client.inference.Generate(request())
    assert (await following(waiting)).queued.position == 1
    full = await refused(service.client.inference.Generate(request()))
    assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ERROR_REASON_LIMIT_REACHED")
    for call in (running, waiting):
        call.cancel()


async def test_drain_lets_the_running_attempt_end_and_sends_waiting_ones_away(small_service: Service) -> None:
    service = small_service
    running = service.client.inference.Generate(request(steps=40))
    await until_step(running, 1)
    waiting = service.client.inference.Generate(request())
    assert (await following(waiting)).queued.position == 1
    service.server.draining.set()  # what leaving MeshServer.running does first; grpc's own grace period then waits for the rest
    finished, sent_away = await asyncio.gather(collect(running), refused(waiting))
    assert finished[-1].done.steps_done == 40
    assert (sent_away.code, sent_away.reason) == (grpc.StatusCode.UNAVAILABLE, "ERROR_REASON_UNAVAILABLE")
