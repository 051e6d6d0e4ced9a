"""What owners do with jobs: estimate, create, look, cancel. Behind the servicer, in terms of the domain."""

import asyncio
import base64
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import structlog
import uuid_utils
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import pricing, store
from jobs_service.delivery import FALLBACK_S, Delivery
from jobs_service.events import EventLog
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, Priority, State
from jobs_service.limits import Limits
from jobs_service.messages import Circumstances, Presign, job_message, waiting
from jobs_service.offers import Forecast, Offers
from jobs_service.quotes import Quote, Quotes
from jobs_service.watch import WatchRequest
from servicekit.database import autocommit, reading, transaction
from servicekit.errors import MeshError, Reason, invalid, not_found, precondition, unavailable

SNAPSHOTS_MAX = 500
"""Unfinished jobs that a watch of everything begins with."""
CANCEL_TRIES = 5
BATCH_HOLDS_AT_ONCE = 8
START_WITHIN = 0.9
"""Part of its hold's life within which a job has to start: no model runs on a hold that is about to expire."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would cost and how long it would take."""

    quote_id: str
    quote: Quote
    queue_position: int
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Noted:
    """A submit request and the job it means."""

    request_id: uuid.UUID
    job: Job
    committed: bool
    """The job is there already: this is a repeat."""


class Jobs:
    """Jobs of owners, over store, queue, events and ledger."""

    def __init__(
        self,
        engine: AsyncEngine,
        log: EventLog,
        ledger: Ledger,
        delivery: Delivery,
        presign: Presign,
        quotes: Quotes,
        *,
        quote_ttl_s: int,
        hold_ttl_s: int,
        owner_limits: Mapping[Priority, int],
        limits: Limits,
    ) -> None:
        self._engine = engine
        self._log = log
        self._ledger = ledger
        self._delivery = delivery
        self._presign = presign
        self._quotes = quotes
        self._quote_ttl_s = quote_ttl_s
        self._start_within = timedelta(seconds=hold_ttl_s * START_WITHIN)
        self._owner_limits = owner_limits
        self._limits = limits
        self.offers = Offers(engine)

    # --- submitting -------------------------------------------------------------------------------------------------

    async def estimate(self, owner_id: uuid.UUID, plan: str, spec: jobs_pb2.JobSpec) -> Estimate:
        """Price a spec and guess its time. Holds nothing. Raises LIMIT_REACHED."""
        await self._limits.count_estimate(owner_id, plan)
        await self.offers.refresh()
        priced = pricing.resolve(spec, self.offers.models)
        model, priority = priced.model, Priority.of_plan(plan)
        async with reading(self._engine) as connection:
            place = await store.place_of_newcomer(connection, model.pool, priority, owner_id)
        quote = Quote(priced.cost_millicredits, int(time.time()) + self._quote_ttl_s)
        time_left = self.offers.forecast(model_id=model.model_id, pool=model.pool, priority=priority, steps=priced.steps, place=place)
        return Estimate(self._quotes.sign(owner_id, spec, quote), quote, place, time_left)

    async def create(
        self, owner_id: uuid.UUID, plan: str, request: jobs_pb2.CreateJobRequest, api_key_id: uuid.UUID | None = None
    ) -> jobs_pb2.Job:
        """Accept a job: the intent is noted, the credits are held, the job is committed, then announced.

        The note comes first, so that a repeat of the request, whatever happened to the first, continues with the same job
        id and API key (and so the same hold); a note that never becomes a job is found by the relay, which releases the hold.
        What the owner may have open counts notes too, so it is refused (LIMIT_REACHED) before anything is held.
        """
        await self.offers.refresh()
        (noted,) = await self._note(owner_id, plan, [request], api_key_id)
        if noted.committed:
            return await self.get(owner_id, noted.job.job_id)
        job = noted.job
        try:
            await self._ledger.reserve(job)
        except MeshError as refusal:
            if refusal.reason != Reason.ERROR_REASON_UNAVAILABLE:
                async with transaction(self._engine) as connection:
                    await store.delete_request(connection, job.owner_id, noted.request_id, job.job_id)
            raise
        return (await self._commit([noted]))[0]

    async def create_batch(
        self, owner_id: uuid.UUID, plan: str, requests: Sequence[jobs_pb2.CreateJobRequest], api_key_id: uuid.UUID | None = None
    ) -> list[jobs_pb2.Job]:
        """Accept all of the jobs or none of them; each as `create` does."""
        await self.offers.refresh()
        noted = await self._note(owner_id, plan, requests, api_key_id, within=lambda index: _within(f"requests[{index}]"))
        try:
            await self._reserve_all([one.job for one in noted if not one.committed])
        except MeshError as refusal:
            if refusal.reason != Reason.ERROR_REASON_UNAVAILABLE:  # else a repeat may go on from here, or the relay undoes it
                await self._undo(noted)
            raise
        fresh = iter(await self._commit([one for one in noted if not one.committed]))
        return [await self.get(owner_id, one.job.job_id) if one.committed else next(fresh) for one in noted]

    async def _note(
        self,
        owner_id: uuid.UUID,
        plan: str,
        requests: Sequence[jobs_pb2.CreateJobRequest],
        api_key_id: uuid.UUID | None,
        *,
        within: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> list[Noted]:
        """Note all of the requests or none. Everything that can be refused is, before anything is noted; what was noted before is no
        longer up for that, nor counted again. `within` says where the refusal of a request belongs."""
        digests = [hashlib.sha256(_without_id(request).SerializeToString(deterministic=True)).digest() for request in requests]
        ids = [uuid.UUID(request.request_id) for request in requests]
        async with reading(self._engine) as connection:
            known = await store.find_requests(connection, owner_id, ids)
        noted: dict[int, Noted] = {}
        fresh: dict[int, Job] = {}
        # The same id twice in a batch (a UUID can be written in several ways) is the same job twice.
        first: dict[uuid.UUID, int] = {}
        for index, request in enumerate(requests):
            with within(index):
                if ids[index] in known:
                    noted[index] = await self._known(owner_id, ids[index], known[ids[index]], digests[index])
                elif first.setdefault(ids[index], index) == index:
                    fresh[index] = self._intend(owner_id, plan, request, api_key_id)
                elif digests[first[ids[index]]] != digests[index]:
                    raise _reused()
        if fresh:
            await self._limits.count_submits(owner_id, plan, len(fresh))
            notes = [
                store.Note(ids[index], digests[index], job.job_id, _encode_intent(job), job.estimated_cost) for index, job in fresh.items()
            ]
            limits = self._limits.of(plan)
            async with autocommit(self._engine) as connection:
                noting = await store.note_requests(
                    connection, owner_id, notes, jobs_max=limits.open_jobs, cost_max=limits.queued_millicredits
                )
            if noting.noted is None:
                self._limits.check_open(plan, noting.work)
            assert noting.noted is not None
            noted |= {index: Noted(ids[index], job, committed=False) for index, job in fresh.items() if ids[index] in noting.noted}
            try:
                for index in fresh.keys() - noted.keys():
                    with within(index):
                        noted[index] = await self._noted_elsewhere(owner_id, ids[index], digests[index])
            except MeshError:
                await self._undo([one for index, one in noted.items() if ids[index] in noting.noted])
                raise
        return [noted[index] if index in noted else noted[first[ids[index]]] for index in range(len(requests))]

    async def _noted_elsewhere(self, owner_id: uuid.UUID, request_id: uuid.UUID, digest: bytes) -> Noted:
        """The request that another call noted in this moment."""
        async with reading(self._engine) as connection:
            known = await store.find_requests(connection, owner_id, [request_id])
        if not known:
            raise unavailable("the same request is being refused right now; try again", 0.1)
        return await self._known(owner_id, request_id, known[request_id], digest)

    async def _known(self, owner_id: uuid.UUID, request_id: uuid.UUID, known: store.Request, digest: bytes) -> Noted:
        if known.digest != digest:
            raise _reused()
        if known.intent is not None:
            return Noted(request_id, _decode_intent(known.intent, known.job_id, owner_id), committed=False)
        async with reading(self._engine) as connection:
            job = await store.get_job(connection, known.job_id, owner_id)
        if job is None:
            raise not_found("job")  # it was deleted since
        return Noted(request_id, job, committed=True)

    def _intend(self, owner_id: uuid.UUID, plan: str, request: jobs_pb2.CreateJobRequest, api_key_id: uuid.UUID | None) -> Job:
        priced = pricing.resolve(request.spec, self.offers.models)
        cost = priced.cost_millicredits
        if request.quote_id:
            cost = min(cost, self._quotes.read(request.quote_id, owner_id, request.spec).cost_millicredits)
        now = datetime.now(UTC)
        deadline = now + self._start_within
        if request.HasField("start_deadline"):
            wished = _moment(request)
            if wished <= now:
                raise invalid("start_deadline", "lies in the past")
            deadline = min(deadline, wished)
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
            api_key_id=api_key_id,
            start_deadline=deadline,
        )

    async def _reserve_all(self, jobs: Sequence[Job]) -> None:
        at_once = asyncio.Semaphore(BATCH_HOLDS_AT_ONCE)

        async def reserve(job: Job) -> None:
            async with at_once:
                await self._ledger.reserve(job)

        # All are waited for: what is undone after a refusal must not be held a moment later.
        outcomes = await asyncio.gather(*map(reserve, jobs), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def _undo(self, noted: Sequence[Noted]) -> None:
        for one in noted:
            if one.committed:
                continue
            async with transaction(self._engine) as connection:
                # Marked first: a repeat of the same request in this moment must not become a job whose hold is released here.
                if not await store.abandon_request(connection, one.job.owner_id, one.request_id):
                    continue
            await self._ledger.release_unused(one.job.hold_id)
            async with transaction(self._engine) as connection:
                await store.delete_request(connection, one.job.owner_id, one.request_id, one.job.job_id)

    async def _commit(self, noted: Sequence[Noted]) -> list[jobs_pb2.Job]:
        """Make noted jobs real, all in one transaction, and announce them."""
        accepted: list[tuple[Job, list[store.OutboxRow], int]] = []
        try:
            async with transaction(self._engine) as connection:
                for one in noted:
                    job = one.job
                    place = await store.place_of_newcomer(connection, job.pool, job.priority, job.owner_id)
                    time_left = self.offers.forecast(
                        model_id=job.model, pool=job.pool, priority=job.priority, steps=job.steps_agreed, place=place
                    )
                    job = replace(job, estimate_s=time_left.p50_s)
                    committed = await store.commit_job(connection, job, one.request_id, fallback_s=FALLBACK_S)
                    if committed is None:
                        raise _UndoneError(job)
                    accepted.append((*committed, place))
        except _UndoneError as undone:
            # Whoever undid it may have released before we reserved: nobody else knows of this hold any more.
            await self._ledger.release_unused(undone.job.hold_id)
            raise unavailable("the request took too long and was undone; try again", 0.5) from None
        messages: list[jobs_pb2.Job] = []
        for job, _, place in accepted:
            _log.info("job.accepted", job_id=str(job.job_id), model=job.model, cost=job.estimated_cost)
            messages.append(self._message(job, Circumstances(queue_position=place, worker_away=self.offers.away(job.model))))
        await asyncio.gather(*(self._delivery.now(job, duties, queue_position=place) for job, duties, place in accepted))
        return messages

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
        pending = [job.job_id for job in jobs if job.state is State.PENDING]
        running = [job.job_id for job in jobs if job.state is State.PROCESSING]
        positions: dict[uuid.UUID, int] = {}
        of_owner: dict[str, int] = {}
        progress: dict[uuid.UUID, jobs_pb2.Progress] = {}
        if pending:
            await self.offers.refresh()
            async with reading(self._engine) as connection:
                positions = await store.queue_positions(connection, pending)
                of_owner = await store.running_of_owner(connection, jobs[0].owner_id)
        if running:
            try:
                progress = await self._log.progress(running)
            except (RedisError, OSError) as error:  # progress is a comfort; the job itself is in PostgreSQL
                _log.warning("progress.unknown", error=repr(error))
        return [
            self._message(
                job,
                Circumstances(
                    queue_position=positions.get(job.job_id, 0),
                    worker_away=self.offers.away(job.model),
                    owner_running=of_owner.get(job.pool, 0),
                    progress=progress.get(job.job_id),
                ),
            )
            for job in jobs
        ]

    def _message(self, job: Job, around: Circumstances) -> jobs_pb2.Job:
        around = replace(around, owner_limit=self._owner_limits.get(job.priority, 0))
        return job_message(
            job,
            self._presign,
            progress=around.progress,
            queue_position=around.queue_position,
            waiting=waiting(job, around, datetime.now(UTC)),
        )

    # --- stopping ---------------------------------------------------------------------------------------------------

    async def cancel(self, owner_id: uuid.UUID, job_id: uuid.UUID) -> jobs_pb2.Job:
        """End a waiting job now; ask the worker of a running one to stop. Again: the same answer."""
        for _ in range(CANCEL_TRIES):  # it may change its state between the look and the write
            async with transaction(self._engine) as connection:
                job = await store.get_job(connection, job_id, owner_id)
                if job is None:
                    raise not_found("job")
                if job.state is State.CANCELLED:
                    return self._message(job, Circumstances())
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
                return self._message(ended[0], Circumstances())
            if asked is not None:
                try:
                    await self._log.ask_to_cancel(job_id)
                except (RedisError, OSError) as error:  # the worker also looks into PostgreSQL
                    _log.warning("cancel.not_told", job_id=str(job_id), error=repr(error))
                return (await self._messages([asked]))[0]
        raise unavailable("the job is changing its state right now; try again", 0.2)


class _UndoneError(Exception):
    """A submit request was marked as abandoned before its job was committed."""

    def __init__(self, job: Job) -> None:
        super().__init__(str(job.job_id))
        self.job = job


@contextmanager
def _within(path: str) -> Generator[None]:
    """Refusals of the block name their fields below `path`."""
    try:
        yield
    except MeshError as refusal:
        refusal.violations = tuple((f"{path}.{field}", description) for field, description in refusal.violations)
        raise


def _reused() -> MeshError:
    return MeshError(
        grpc.StatusCode.ALREADY_EXISTS,
        Reason.ERROR_REASON_REQUEST_ID_REUSED,
        "this request_id was used before with other content: a new job needs a new request_id",
    )


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
    values: dict[str, Any] = {
        "kind": job.kind,
        "priority": int(job.priority),
        "model": job.model,
        "pool": job.pool,
        "spec": base64.b64encode(job.spec).decode(),
        "steps_agreed": job.steps_agreed,
        "estimated_cost": job.estimated_cost,
        "start_deadline": job.start_deadline.isoformat() if job.start_deadline else None,
    }
    if job.api_key_id is not None:  # left out where there is none: during an update, replicas that know no keys read it too
        values["api_key_id"] = str(job.api_key_id)
    return json.dumps(values).encode()


def _decode_intent(intent: bytes, job_id: uuid.UUID, owner_id: uuid.UUID) -> Job:
    values = json.loads(intent)
    deadline, api_key_id = values.pop("start_deadline"), values.get("api_key_id")
    values |= {
        "priority": Priority(values["priority"]),
        "spec": base64.b64decode(values["spec"]),
        "start_deadline": datetime.fromisoformat(deadline) if deadline else None,
        "api_key_id": uuid.UUID(api_key_id) if api_key_id else None,
    }
    return Job(job_id=job_id, owner_id=owner_id, state=State.PENDING, version=1, **values)
