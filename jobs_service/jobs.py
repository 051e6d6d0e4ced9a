"""What owners do with jobs: estimate, create, look, cancel. Behind the servicer, in terms of the domain."""

import base64
import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
import structlog
import uuid_utils
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from jobs_service import pricing, store
from jobs_service.delivery import FALLBACK_S, Delivery
from jobs_service.events import EventLog
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, Priority, State
from jobs_service.messages import Presign, job_message
from jobs_service.quotes import Quote, Quotes
from jobs_service.watch import WatchRequest
from servicekit.database import reading, transaction
from servicekit.errors import MeshError, Reason, invalid, not_found, precondition, unavailable

MODELS_MAX_AGE_S = 2.0
WORKER_SILENT_S = 15.0
"""A model that no worker has offered for this long has no worker."""
FIRST_GUESS_STEP_S = (0.1, 0.3)
"""Seconds a step takes (median, 90th percentile), until there is a completed job to learn from."""
SNAPSHOTS_MAX = 500
"""Unfinished jobs that a watch of everything begins with."""
CANCEL_TRIES = 5

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would cost and how long it would take."""

    quote_id: str
    quote: Quote
    queue_position: int
    eta_p50_s: float
    eta_p90_s: float


class Jobs:
    """Jobs of owners, over store, queue, events and ledger."""

    def __init__(
        self, engine: AsyncEngine, log: EventLog, ledger: Ledger, delivery: Delivery, presign: Presign, quotes: Quotes, *, quote_ttl_s: int
    ) -> None:
        self._engine = engine
        self._log = log
        self._ledger = ledger
        self._delivery = delivery
        self._presign = presign
        self._quotes = quotes
        self._quote_ttl_s = quote_ttl_s
        self._models: dict[str, inference_pb2.Model] = {}
        self._silent: set[str] = set()
        self._models_read = float("-inf")

    # --- submitting -------------------------------------------------------------------------------------------------

    async def estimate(self, owner_id: uuid.UUID, plan: str, spec: jobs_pb2.JobSpec) -> Estimate:
        """Price a spec and guess its time. Holds nothing."""
        await self._refresh_models()
        priced = pricing.resolve(spec, self._models)
        async with reading(self._engine) as connection:
            position = await store.place_of_newcomer(connection, priced.model.pool, Priority.of_plan(plan))
            step_s = await store.seconds_per_step(connection, priced.model.model_id) or FIRST_GUESS_STEP_S
        quote = Quote(priced.cost_millicredits, int(time.time()) + self._quote_ttl_s)
        p50, p90 = (seconds * priced.steps * position for seconds in step_s)
        return Estimate(self._quotes.sign(owner_id, spec, quote), quote, position, p50, p90)

    async def create(self, owner_id: uuid.UUID, plan: str, request: jobs_pb2.CreateJobRequest) -> jobs_pb2.Job:
        """Accept a job: the intent is noted, the credits are held, the job is committed, then announced.

        The note comes first, so that a repeat of the request, whatever happened to the first, continues with the same job
        id (and so the same hold); a note that never becomes a job is found by the relay, which releases the hold.
        """
        request_id = uuid.UUID(request.request_id)
        digest = hashlib.sha256(_without_id(request).SerializeToString(deterministic=True)).digest()
        await self._refresh_models()
        async with transaction(self._engine) as connection:
            known = await store.find_request(connection, owner_id, request_id)
            if known is None:
                job = self._intend(owner_id, plan, request)
                added = await store.add_request(
                    connection, owner_id, request_id, digest=digest, job_id=job.job_id, intent=_encode_intent(job)
                )
                if not added:  # somebody else noted the same request in this moment
                    known = await store.find_request(connection, owner_id, request_id)
                    if known is None:
                        raise unavailable("the same request is being refused right now; try again", 0.1)
        if known is not None:
            if known.digest != digest:
                raise MeshError(
                    grpc.StatusCode.ALREADY_EXISTS,
                    Reason.ERROR_REASON_REQUEST_ID_REUSED,
                    "this request_id was used before with other content: a new job needs a new request_id",
                )
            if known.intent is None:
                return await self.get(owner_id, known.job_id)
            job = _decode_intent(known.intent, known.job_id, owner_id)
        return await self._commit(job, request_id)  # pyright: ignore[reportPossiblyUnboundVariable]  # bound in either branch

    def _intend(self, owner_id: uuid.UUID, plan: str, request: jobs_pb2.CreateJobRequest) -> Job:
        priced = pricing.resolve(request.spec, self._models)
        cost = priced.cost_millicredits
        if request.quote_id:
            cost = min(cost, self._quotes.read(request.quote_id, owner_id, request.spec).cost_millicredits)
        deadline = None
        if request.HasField("start_deadline"):
            deadline = _moment(request)
            if deadline <= datetime.now(UTC):
                raise invalid("start_deadline", "lies in the past")
        return Job(
            job_id=uuid.UUID(bytes=uuid_utils.uuid7().bytes),
            owner_id=owner_id,
            kind=priced.kind,
            state=State.PENDING,
            version=1,
            priority=Priority.of_plan(plan),
            model=priced.model.model_id,
            pool=priced.model.pool,
            spec=priced.spec.SerializeToString(),
            steps_agreed=priced.steps,
            estimated_cost=cost,
            start_deadline=deadline,
        )

    async def _commit(self, job: Job, request_id: uuid.UUID) -> jobs_pb2.Job:
        try:
            await self._ledger.reserve(job.job_id, job.owner_id, job.estimated_cost)
        except MeshError as refusal:
            if refusal.reason != Reason.ERROR_REASON_UNAVAILABLE:
                async with transaction(self._engine) as connection:
                    await store.delete_request(connection, job.owner_id, request_id, job.job_id)
            raise
        async with transaction(self._engine) as connection:
            committed = await store.commit_job(connection, job, request_id, fallback_s=FALLBACK_S)
            position = (await store.queue_positions(connection, [job.job_id])).get(job.job_id, 0) if committed else 0
        if committed is None:
            # Whoever undid it may have released before we reserved: nobody else knows of this hold any more.
            await self._ledger.release_unused(job.job_id)
            raise unavailable("the request took too long and was undone; try again", 0.5)
        job, duties = committed
        await self._delivery.now(job, duties, queue_position=position)
        _log.info("job.accepted", job_id=str(job.job_id), model=job.model, cost=job.estimated_cost)
        return self._message(job, position, None)

    async def _refresh_models(self) -> None:
        if time.monotonic() - self._models_read < MODELS_MAX_AGE_S and self._models:
            return
        async with reading(self._engine) as connection:
            offered = await store.offered_models(connection)
        models = [(inference_pb2.Model.FromString(model), age) for model, age in offered]
        self._models = {model.model_id: model for model, _ in models}
        self._silent = {model.model_id for model, age in models if age > WORKER_SILENT_S}
        self._models_read = time.monotonic()

    # --- looking ----------------------------------------------------------------------------------------------------

    async def get(self, owner_id: uuid.UUID, job_id: uuid.UUID) -> jobs_pb2.Job:
        """One job of the owner, or NOT_FOUND."""
        async with reading(self._engine) as connection:
            job = await store.get_job(connection, job_id, owner_id)
        if job is None:
            raise not_found("job")
        return (await self._messages([job]))[0]

    async def page(
        self, owner_id: uuid.UUID, *, limit: int, before: uuid.UUID | None, states: Sequence[int], kinds: Sequence[int]
    ) -> tuple[list[jobs_pb2.Job], uuid.UUID | None]:
        """A page of the owner's jobs, newest first, and where the next page begins (None: there is none)."""
        async with reading(self._engine) as connection:
            page = await store.list_jobs(connection, owner_id, limit=limit + 1, before=before, states=states, kinds=kinds)
        more = page[limit - 1].job_id if len(page) > limit else None
        return await self._messages(page[:limit]), more

    async def snapshots(self, request: WatchRequest) -> list[tuple[Job, jobs_pb2.Job]]:
        """What a watch begins with; NOT_FOUND when a job it names is not the owner's."""
        async with reading(self._engine) as connection:
            if request.job_ids:
                wanted = [uuid.UUID(job_id) for job_id in request.job_ids]
                found = {job.job_id: job for job in await store.get_jobs(connection, request.owner_id, wanted)}
                if len(found) < len(set(wanted)):
                    raise not_found("job")
                jobs = [found[job_id] for job_id in dict.fromkeys(wanted)]
            else:
                jobs = await store.current_jobs(connection, request.owner_id, ended_since=request.ended_since, limit=SNAPSHOTS_MAX)
        return list(zip(jobs, await self._messages(jobs), strict=True))

    async def _messages(self, jobs: Sequence[Job]) -> list[jobs_pb2.Job]:
        waiting = [job.job_id for job in jobs if job.state is State.PENDING]
        running = [job.job_id for job in jobs if job.state is State.PROCESSING]
        positions: dict[uuid.UUID, int] = {}
        progress: dict[uuid.UUID, jobs_pb2.Progress] = {}
        if waiting:
            await self._refresh_models()
            async with reading(self._engine) as connection:
                positions = await store.queue_positions(connection, waiting)
        if running:
            try:
                progress = await self._log.progress(running)
            except (RedisError, OSError) as error:  # progress is a comfort; the job itself is in PostgreSQL
                _log.warning("progress.unknown", error=repr(error))
        return [self._message(job, positions.get(job.job_id, 0), progress.get(job.job_id)) for job in jobs]

    def _message(self, job: Job, position: int, progress: jobs_pb2.Progress | None) -> jobs_pb2.Job:
        waiting = None
        if job.state is State.PENDING:
            waiting = jobs_pb2.Waiting(
                reason=jobs_pb2.Waiting.REASON_IN_QUEUE,
                message=f"{position - 1} jobs are before it" if position > 1 else "it is next",
            )
            if job.model in self._silent:
                waiting = jobs_pb2.Waiting(reason=jobs_pb2.Waiting.REASON_NO_WORKER, message=f"no worker offers {job.model} right now")
        return job_message(job, self._presign, progress=progress, queue_position=position, waiting=waiting)

    # --- stopping ---------------------------------------------------------------------------------------------------

    async def cancel(self, owner_id: uuid.UUID, job_id: uuid.UUID) -> jobs_pb2.Job:
        """End a waiting job now; ask the worker of a running one to stop. Again: the same answer."""
        for _ in range(CANCEL_TRIES):  # it may change its state between the look and the write
            async with transaction(self._engine) as connection:
                job = await store.get_job(connection, job_id, owner_id)
                if job is None:
                    raise not_found("job")
                if job.state is State.CANCELLED:
                    return self._message(job, 0, None)
                if job.state.terminal:
                    state = jobs_pb2.State.Name(jobs_pb2.State.ValueType(job.state))
                    raise precondition(Reason.ERROR_REASON_JOB_TERMINAL, "the job has ended already", {"state": state})
                if job.state is State.PENDING:
                    ended = await store.finish(connection, job, State.CANCELLED, fallback_s=FALLBACK_S)
                    asked = None
                else:
                    ended = None
                    asked = await store.request_cancel(connection, job_id, owner_id)
            if ended is not None:
                await self._delivery.now(*ended)
                return self._message(ended[0], 0, None)
            if asked is not None:
                try:
                    await self._log.ask_to_cancel(job_id)
                except (RedisError, OSError) as error:  # the worker also looks into PostgreSQL
                    _log.warning("cancel.not_told", job_id=str(job_id), error=repr(error))
                return (await self._messages([asked]))[0]
        raise unavailable("the job is changing its state right now; try again", 0.2)


def _without_id(request: jobs_pb2.CreateJobRequest) -> jobs_pb2.CreateJobRequest:
    body = jobs_pb2.CreateJobRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return body


def _moment(request: jobs_pb2.CreateJobRequest) -> datetime:
    try:
        return request.start_deadline.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise invalid("start_deadline", "is no valid time") from error


def _encode_intent(job: Job) -> bytes:
    return json.dumps(
        {
            "kind": job.kind,
            "priority": int(job.priority),
            "model": job.model,
            "pool": job.pool,
            "spec": base64.b64encode(job.spec).decode(),
            "steps_agreed": job.steps_agreed,
            "estimated_cost": job.estimated_cost,
            "start_deadline": job.start_deadline.isoformat() if job.start_deadline else None,
        }
    ).encode()


def _decode_intent(intent: bytes, job_id: uuid.UUID, owner_id: uuid.UUID) -> Job:
    values = json.loads(intent)
    deadline = values.pop("start_deadline")
    values |= {
        "priority": Priority(values["priority"]),
        "spec": base64.b64decode(values["spec"]),
        "start_deadline": datetime.fromisoformat(deadline) if deadline else None,
    }
    return Job(job_id=job_id, owner_id=owner_id, state=State.PENDING, version=1, **values)
