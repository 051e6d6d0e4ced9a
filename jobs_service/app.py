"""Wiring: from settings to running processes. Resources open in one AsyncExitStack and close in reverse."""

import asyncio
import secrets
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import grpc
from redis import asyncio as redis
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2_grpc
from jobs_service import store
from jobs_service.dead_letters import DeadLetters
from jobs_service.deletion import Deletions
from jobs_service.delivery import Delivery
from jobs_service.dispatch import Dispatcher
from jobs_service.events import EventLog
from jobs_service.jobs import Jobs
from jobs_service.ledger import Ledger
from jobs_service.limits import Limits, WatchLeases
from jobs_service.queue import JobQueue
from jobs_service.queue_stats import queue_stats
from jobs_service.quotes import Quotes
from jobs_service.relay import Relay
from jobs_service.servicer import JobsAdminServicer, JobsServicer
from jobs_service.settings import DispatchSettings, JobsSettings, RelaySettings, ServeSettings
from jobs_service.uploads.checker import Checker
from jobs_service.uploads.intake import Uploads
from jobs_service.uploads.sweeper import UploadSweeper
from jobs_service.watch import Hub
from servicekit import database, objects, streams
from servicekit.client import mesh_channel
from servicekit.doorkeeper import Doorkeeper, remote_doorkeeper
from servicekit.errors import MeshError
from servicekit.limits import RateLimiter
from servicekit.objects import ObjectStore
from servicekit.process import until_stopped
from servicekit.server import MeshServer
from servicekit.telemetry import HttpServer, metrics_page

SERVICE = "jobs_service"
SCHEMA = "jobs"
HOUR_S = 3600
DAY_S = 24 * HOUR_S
GRPC_SERVICES = ("genmesh.jobs.v1.JobsService", "genmesh.jobs.v1.JobsAdminService")


@dataclass(frozen=True, slots=True)
class Resources:
    """What every process of jobs_service has open."""

    engine: AsyncEngine
    client: "redis.Redis"
    blocking: "redis.Redis"
    queue: JobQueue
    log: EventLog
    ledger: Ledger
    delivery: Delivery
    media: ObjectStore


async def open_resources(settings: JobsSettings, stack: AsyncExitStack, *, role: str, worker_id: str = "") -> Resources:
    """Open the stores and the channel to credit_service; the stack closes them."""
    engine = database.create_engine(settings, schema=SCHEMA, application=f"{SERVICE}-{role}")
    stack.push_async_callback(engine.dispose)
    client = streams.connect(settings)
    stack.push_async_callback(client.aclose)
    blocking = streams.connect(settings, blocking=True)
    stack.push_async_callback(blocking.aclose)
    media = stack.enter_context(ObjectStore(settings))
    channel = await stack.enter_async_context(mesh_channel(settings, settings.credits_address, caller=SERVICE, service="credit_service"))
    queue = JobQueue(
        client,
        settings.redis_prefix,
        lease_s=settings.lease_seconds,
        worker_id=worker_id,
        owner_limits=settings.owner_limits,
        blocking=blocking,
    )
    log = EventLog(client, settings.redis_prefix, retention_s=settings.event_retention_s, blocking=blocking)
    ledger = Ledger(channel, timeout_s=settings.rpc_timeout_s, hold_ttl_s=settings.hold_ttl_s)
    delivery = Delivery(engine, queue, log, ledger, media.presign)
    return Resources(engine, client, blocking, queue, log, ledger, delivery, media)


def translate(error: Exception) -> MeshError | None:
    """Errors of the stores' drivers, as typed errors."""
    return database.translate(error) or streams.translate(error) or objects.translate(error)


async def build_server(
    settings: ServeSettings, resources: Resources, hub: Hub, door: Doorkeeper, limits: Limits, uploads: Uploads
) -> MeshServer:
    """The server with JobsService registered, not yet running."""
    async with database.transaction(resources.engine) as connection:
        quotes = Quotes(await store.secret(connection, "quotes", secrets.token_bytes(32)))
    jobs = Jobs(
        resources.engine,
        resources.log,
        resources.ledger,
        resources.delivery,
        resources.media.presign,
        quotes,
        quote_ttl_s=settings.quote_ttl_s,
        hold_ttl_s=settings.hold_ttl_s,
        owner_limits=settings.owner_limits,
        limits=limits,
    )
    dead_letters = DeadLetters(resources.engine, resources.ledger, resources.delivery, limits)
    deletions = Deletions(resources.engine, resources.media, resources.log, resources.delivery)
    server = MeshServer(
        settings,
        service=SERVICE,
        verifier=door.verifier(settings),
        # Redis is missed, but not needed to accept a job: its absence does not take the service down.
        checks={"database": lambda: database.ping(resources.engine), "revocations": door.revocations.ready},
        translate=translate,
        audit=door.audit,
    )
    servicer = JobsServicer(
        jobs,
        dead_letters,
        deletions,
        hub,
        resources.log,
        limits=limits,
        checkpoint_interval_s=settings.checkpoint_interval_s,
        uploads=uploads,
    )
    jobs_pb2_grpc.add_JobsServiceServicer_to_server(servicer, server.grpc)
    admin = JobsAdminServicer(dead_letters, queue_stats(resources.engine))
    jobs_pb2_grpc.add_JobsAdminServiceServicer_to_server(admin, server.grpc)
    return server


async def serve(settings: ServeSettings, stop: asyncio.Event) -> None:
    """`serve`: the RPCs and the fan-out of watches."""
    async with AsyncExitStack() as stack:
        stack.enter_context(HttpServer(settings.metrics_address, {"/metrics": metrics_page}))
        resources = await open_resources(settings, stack, role="serve")
        # Watches are RPCs in flight: they leave room for those that make and cancel jobs.
        hub = Hub(resources.log, watches_max=settings.max_concurrent_rpcs // 2)
        door = await stack.enter_async_context(remote_doorkeeper(settings, service=SERVICE))
        leases = WatchLeases(resources.client, settings.redis_prefix)
        rates = RateLimiter(settings)
        stack.push_async_callback(rates.aclose)
        uploads = Uploads(resources.engine, resources.media, Checker(settings.media_limits), settings.upload_limits)
        stack.push_async_callback(uploads.close)
        server = await build_server(settings, resources, hub, door, Limits(settings.plan_limits, rates, leases), uploads)

        async def drain() -> None:
            await server.draining.wait()
            hub.drain()

        stack.callback(asyncio.create_task(drain(), name="drain").cancel)
        async with server.running(*GRPC_SERVICES):
            await until_stopped(stop, hub.run(), door.revocations.run(), leases.run())


async def dispatch(settings: DispatchSettings, stop: asyncio.Event) -> None:
    """`dispatch`: runs jobs on one inference replica."""
    async with AsyncExitStack() as stack:
        stack.enter_context(HttpServer(settings.metrics_address, {"/metrics": metrics_page}))
        resources = await open_resources(settings, stack, role="dispatch", worker_id=settings.worker_id)
        inference: grpc.aio.Channel = await stack.enter_async_context(
            mesh_channel(settings, settings.inference_address, caller=SERVICE, service="inference_service")
        )
        dispatcher = Dispatcher(
            settings,
            engine=resources.engine,
            blocking=resources.blocking,
            queue=resources.queue,
            log=resources.log,
            delivery=resources.delivery,
            presign=resources.media.presign,
            inference=inference,
        )

        drained = asyncio.Event()

        async def run() -> None:
            await dispatcher.run()
            drained.set()
            await asyncio.Event().wait()

        async def drain() -> None:
            await stop.wait()
            dispatcher.drain()
            await dispatcher.withdraw()
            with suppress(TimeoutError):  # what still runs goes back to the queue when its slot is cancelled
                async with asyncio.timeout(settings.drain_s):
                    await drained.wait()
            drained.set()
            await asyncio.Event().wait()

        await until_stopped(drained, run(), dispatcher.offer(), dispatcher.listen_for_cancels(), drain())


async def relay(settings: RelaySettings, stop: asyncio.Event) -> None:
    """`relay`: outbox, sweeper, queue positions."""
    async with AsyncExitStack() as stack:
        stack.enter_context(HttpServer(settings.metrics_address, {"/metrics": metrics_page}))
        resources = await open_resources(settings, stack, role="relay")
        worker = Relay(
            engine=resources.engine,
            queue=resources.queue,
            log=resources.log,
            ledger=resources.ledger,
            delivery=resources.delivery,
            deletions=Deletions(resources.engine, resources.media, resources.log, resources.delivery),
            lease_s=settings.lease_seconds,
            max_attempts=settings.max_attempts,
            job_retention_s=settings.job_retention_days * DAY_S,
            orphan_media_s=settings.orphan_media_hours * HOUR_S,
        )
        sweeper = UploadSweeper(resources.engine, resources.media, orphan_s=settings.orphan_media_hours * HOUR_S)
        rounds = (worker.outbox, worker.sweep, worker.positions, worker.measure, worker.deletions, worker.retention, sweeper.run)
        await until_stopped(stop, *(forever() for forever in rounds))
