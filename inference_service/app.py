"""Wiring of inference_service: opens resources, registers servicers, runs until told to stop."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from inference_service.catalogue import Catalogue
from inference_service.generation import Generation
from inference_service.model_entry import Spawned
from inference_service.model_host import ModelHost
from inference_service.servicer import InferenceServicer, ModelCatalogServicer
from inference_service.settings import InferenceSettings
from servicekit import objects, telemetry
from servicekit.doorkeeper import Doorkeeper, remote_doorkeeper
from servicekit.objects import ObjectStore
from servicekit.process import until_stopped
from servicekit.server import MeshServer

SERVICE = "inference_service"
SERVED = tuple(service.full_name for service in inference_pb2.DESCRIPTOR.services_by_name.values())


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the server needs that is opened outside of it."""

    catalogue: Catalogue
    host: ModelHost
    store: ObjectStore
    door: Doorkeeper


def build_host(settings: InferenceSettings, catalogue: Catalogue, first: Spawned | None = None) -> ModelHost:
    """The model host as the settings want it; not started. `first`: its model process, where it was spawned ahead."""
    return ModelHost(
        catalogue,
        settings.model_options(),
        max_waiting=settings.max_waiting,
        load_timeout_s=settings.load_timeout_s,
        cancel_timeout_s=settings.cancel_timeout_s,
        first=first,
    )


def build_server(settings: InferenceSettings, deps: Dependencies) -> MeshServer:
    """The server with its servicers; not started."""
    server = MeshServer(
        settings,
        service=SERVICE,
        verifier=deps.door.verifier(settings),
        checks={"models": deps.host.check, "store": deps.store.ping, "revocations": deps.door.revocations.ready},
        translate=objects.translate,
        audit=deps.door.audit,
    )
    generation = Generation(deps.catalogue, deps.host, deps.store)
    inference_pb2_grpc.add_ModelCatalogServiceServicer_to_server(ModelCatalogServicer(deps.catalogue, deps.host), server.grpc)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(deps.catalogue, deps.host, generation), server.grpc)
    return server


async def serve(settings: InferenceSettings, catalogue: Catalogue, first: Spawned, stop: asyncio.Event) -> None:
    """Serve until `stop`; running attempts then get `drain_s` to end before they are cancelled."""
    async with AsyncExitStack() as stack:
        stack.enter_context(telemetry.HttpServer(settings.metrics_address, {"/metrics": telemetry.metrics_page}))
        store = stack.enter_context(ObjectStore(settings))
        door = await stack.enter_async_context(remote_doorkeeper(settings, service=SERVICE))
        host = build_host(settings, catalogue, first)
        server = build_server(settings, Dependencies(catalogue, host, store, door))
        await stack.enter_async_context(host.running(server.draining))
        await stack.enter_async_context(server.running(*SERVED))
        await until_stopped(stop, host.watch(), door.revocations.run())
