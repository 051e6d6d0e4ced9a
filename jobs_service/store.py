"""All SQL of jobs_service but that of uploads. Functions take the caller's connection, so that transactions compose.

Changes of state are guarded: an UPDATE names the states (and the attempt) it may start from and returns the new row, or
nothing when somebody else was first. Only the database's clock is used.
"""

import enum
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.asyncio import AsyncConnection

from jobs_service.lifecycle import Failure, Job, Priority, State, cost_of, sources
from jobs_service.tables import deletions, jobs, models, outbox, requests, retries, secrets, workers

POSITION_MAX = 10_000
"""Places are counted up to here; counting further would cost more than it tells."""

DURATION_SAMPLE = 50
"""Newest completed jobs of a model that estimates learn from."""


class Duty(enum.IntEnum):
    """What an outbox row obliges somebody to do."""

    ANNOUNCE = 1
    """Publish the job's state; put it into the queue if it is pending."""
    SETTLE = 2
    """Capture or release its reservation."""


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A duty that has not been done yet."""

    outbox_id: int
    job_id: uuid.UUID
    duty: Duty
    failures: int


@dataclass(frozen=True, slots=True)
class Request:
    """A submit request: `intent` is the serialised intended job until the job is committed."""

    digest: bytes
    job_id: uuid.UUID
    intent: bytes | None
    abandoned: bool


def _job(row: Mapping[Any, Any]) -> Job:
    values = dict(row)
    values.pop("place", None)
    values |= {"state": State(values["state"]), "priority": Priority(values["priority"]), "assets": tuple(values["assets"])}
    return Job(**values)


async def _one(connection: AsyncConnection, query: sa.Executable) -> Job | None:
    row = (await connection.execute(query)).mappings().one_or_none()
    return None if row is None else _job(row)


async def _all(connection: AsyncConnection, query: sa.Executable) -> list[Job]:
    return [_job(row) for row in (await connection.execute(query)).mappings()]


# --- submitting -------------------------------------------------------------------------------------------------------


async def find_requests(connection: AsyncConnection, owner_id: uuid.UUID, request_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Request]:
    """Those of the submit requests with these ids that are known."""
    columns = (requests.c.request_id, requests.c.digest, requests.c.job_id, requests.c.intent, requests.c.abandoned)
    query = sa.select(*columns).where(requests.c.owner_id == owner_id, requests.c.request_id.in_(request_ids))
    return {row.request_id: Request(*row[1:]) for row in await connection.execute(query)}


@dataclass(frozen=True, slots=True)
class Note:
    """A submit request that is about to become a job."""

    request_id: uuid.UUID
    digest: bytes
    job_id: uuid.UUID
    intent: bytes
    cost: int


@dataclass(frozen=True, slots=True)
class OpenWork:
    """What an owner has open: jobs that wait or run, submits and retries that may become such."""

    jobs: int
    cost_millicredits: int


@dataclass(frozen=True, slots=True)
class Noting:
    """What became of notes."""

    noted: frozenset[uuid.UUID] | None
    """The requests that were new; None: a limit is in the way, nothing was noted."""
    work: OpenWork
    """What the owner has open with the new ones, noted or not; zeros where there was no limit."""


_NOTE_REQUESTS = sa.text(
    "SELECT * FROM jobs.note_requests(:owner_id, :request_ids, :digests, :job_ids, :intents, :costs, :jobs_max, :cost_max)"
).bindparams(
    sa.bindparam("request_ids", type_=pg.ARRAY(pg.UUID(as_uuid=True))),
    sa.bindparam("digests", type_=pg.ARRAY(pg.BYTEA)),
    sa.bindparam("job_ids", type_=pg.ARRAY(pg.UUID(as_uuid=True))),
    sa.bindparam("intents", type_=pg.ARRAY(pg.BYTEA)),
    sa.bindparam("costs", type_=pg.ARRAY(sa.BigInteger)),
)


async def note_requests(
    connection: AsyncConnection, owner_id: uuid.UUID, notes: Sequence[Note], *, jobs_max: int = 0, cost_max: int = 0
) -> Noting:
    """Note that jobs are about to be submitted, all of the new ones or none: not when the owner would then have more open than `jobs_max`
    jobs, or for more than `cost_max` (0: no limit). Decided for one call of an owner after the other, so never exceeded.
    """
    row = (
        await connection.execute(
            _NOTE_REQUESTS,
            {
                "owner_id": owner_id,
                "request_ids": [note.request_id for note in notes],
                "digests": [note.digest for note in notes],
                "job_ids": [note.job_id for note in notes],
                "intents": [note.intent for note in notes],
                "costs": [note.cost for note in notes],
                "jobs_max": jobs_max,
                "cost_max": cost_max,
            },
        )
    ).one()
    return Noting(None if row.noted is None else frozenset(row.noted), OpenWork(row.open_jobs, row.open_cost))


async def open_work(connection: AsyncConnection, owner_id: uuid.UUID) -> OpenWork:
    """What an owner has open. It grows no more, but for what this transaction adds and administrators retry, before that has ended."""
    row = (await connection.execute(sa.text("SELECT * FROM jobs.open_work(:owner_id)"), {"owner_id": owner_id})).one()
    return OpenWork(row.open_jobs, row.open_cost)


async def delete_request(connection: AsyncConnection, owner_id: uuid.UUID, request_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Forget a request that was refused before it became this job. One that is a job, or means another one by now, stays."""
    await connection.execute(
        sa.delete(requests).where(
            requests.c.owner_id == owner_id,
            requests.c.request_id == request_id,
            requests.c.job_id == job_id,
            requests.c.intent.is_not(None),
        )
    )


async def commit_job(
    connection: AsyncConnection, job: Job, request_id: uuid.UUID, *, fallback_s: float
) -> tuple[Job, list[OutboxRow]] | None:
    """Make the intended job real, with its duty to be announced. None when the request was abandoned in the meantime.

    Committed by somebody else already: that job, and no duties.
    """
    mine = (requests.c.owner_id == job.owner_id) & (requests.c.request_id == request_id)
    row = (await connection.execute(sa.select(requests.c.intent, requests.c.abandoned).where(mine).with_for_update())).one_or_none()
    if row is None or row.abandoned:
        return None
    if row.intent is None:
        committed = await get_job(connection, job.job_id)
        return None if committed is None else (committed, [])
    await connection.execute(sa.update(requests).where(mine).values(intent=None))
    values = asdict(job)
    for unset in ("create_time", "start_time", "finish_time", "cancel_requested_time"):
        values.pop(unset)
    values["assets"] = list(job.assets)
    inserted = (await connection.execute(sa.insert(jobs).values(**values).returning(jobs))).mappings().one()
    return _job(inserted), [await add_duty(connection, job.job_id, Duty.ANNOUNCE, fallback_s)]


async def abandon_request(connection: AsyncConnection, owner_id: uuid.UUID, request_id: uuid.UUID) -> bool:
    """Mark one request as never to become a job; False when it is one already, or gone."""
    mine = (requests.c.owner_id == owner_id) & (requests.c.request_id == request_id) & requests.c.intent.is_not(None)
    return (await connection.execute(sa.update(requests).where(mine).values(abandoned=True))).rowcount == 1


async def abandon_requests(connection: AsyncConnection, *, older_than_s: float, limit: int) -> list[tuple[uuid.UUID, uuid.UUID, uuid.UUID]]:
    """Mark requests that never became a job: (owner, request, job) of each, so that their holds can be released."""
    stale = (
        sa.select(requests.c.owner_id, requests.c.request_id)
        .where(requests.c.intent.is_not(None), requests.c.create_time < sa.func.now() - timedelta(seconds=older_than_s))
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    result = await connection.execute(
        sa.update(requests)
        .where(sa.tuple_(requests.c.owner_id, requests.c.request_id).in_(stale))
        .values(abandoned=True)
        .returning(requests.c.owner_id, requests.c.request_id, requests.c.job_id)
    )
    return [(row.owner_id, row.request_id, row.job_id) for row in result]


# --- reading ----------------------------------------------------------------------------------------------------------


async def get_job(connection: AsyncConnection, job_id: uuid.UUID, owner_id: uuid.UUID | None = None, *, locked: bool = False) -> Job | None:
    """A job; with `owner_id`, only if it is theirs. `locked`: nobody changes it before the end of the transaction."""
    query = sa.select(jobs).where(jobs.c.job_id == job_id)
    if owner_id is not None:
        query = query.where(jobs.c.owner_id == owner_id)
    return await _one(connection, query.with_for_update() if locked else query)


async def get_jobs(connection: AsyncConnection, owner_id: uuid.UUID, job_ids: Sequence[uuid.UUID]) -> list[Job]:
    """Those of the jobs that are the owner's."""
    return await _all(connection, sa.select(jobs).where(jobs.c.owner_id == owner_id, jobs.c.job_id.in_(job_ids)))


async def current_jobs(connection: AsyncConnection, owner_id: uuid.UUID, *, ended_since: datetime | None, limit: int) -> list[Job]:
    """The owner's jobs that have not ended, oldest first, then those that ended since that moment."""
    current = jobs.c.state < State.COMPLETED
    if ended_since is not None:
        current |= jobs.c.finish_time >= ended_since
    order = (jobs.c.state >= State.COMPLETED, jobs.c.job_id)
    return await _all(connection, sa.select(jobs).where(jobs.c.owner_id == owner_id, current).order_by(*order).limit(limit))


async def list_jobs(
    connection: AsyncConnection,
    owner_id: uuid.UUID,
    *,
    limit: int,
    before: uuid.UUID | None,
    states: Sequence[int],
    kinds: Sequence[int],
) -> list[Job]:
    """Jobs of an owner, newest first, older than `before`."""
    query = sa.select(jobs).where(jobs.c.owner_id == owner_id)
    if before is not None:
        query = query.where(jobs.c.job_id < before)
    if states:
        query = query.where(jobs.c.state.in_(states))
    if kinds:
        query = query.where(jobs.c.kind.in_(kinds))
    return await _all(connection, query.order_by(jobs.c.job_id.desc()).limit(limit))


def _level(pool: str, priority: Priority) -> sa.ColumnElement[bool]:
    return (jobs.c.state == State.PENDING) & (jobs.c.pool == pool) & (jobs.c.priority == priority)


async def place_of_newcomer(connection: AsyncConnection, pool: str, priority: Priority, owner_id: uuid.UUID) -> int:
    """Place in its level that a job of the owner would get now, 1 is next: owners are served in turn."""
    level = _level(pool, priority)
    turn = 1 + sa.select(sa.func.count()).where(level, jobs.c.owner_id == owner_id).scalar_subquery()
    others = sa.select(jobs.c.owner_id).where(level, jobs.c.owner_id != owner_id).limit(POSITION_MAX).subquery()
    counts = sa.select(sa.func.count().label("count")).select_from(others).group_by(others.c.owner_id).subquery()
    ahead = sa.select(sa.func.coalesce(sa.func.sum(sa.func.least(counts.c.count, turn)), 0)).scalar_subquery()
    return int((await connection.execute(sa.select(turn + ahead))).scalar_one())


def _places(turn_max: int, *levels: sa.ColumnElement[bool]) -> sa.Subquery:
    """Waiting jobs with their places in their levels: the first jobs of all owners, then the second ones …, each round by age.

    Up to the `turn_max`-th job of each owner, which is as far as PostgreSQL then numbers them.
    """
    waiting = (
        sa.select(
            jobs.c.job_id,
            jobs.c.pool,
            jobs.c.priority,
            sa.func.row_number().over(partition_by=(jobs.c.pool, jobs.c.priority, jobs.c.owner_id), order_by=jobs.c.job_id).label("turn"),
        )
        .where(jobs.c.state == State.PENDING, *levels)
        .subquery()
    )
    place = sa.func.row_number().over(partition_by=(waiting.c.pool, waiting.c.priority), order_by=(waiting.c.turn, waiting.c.job_id))
    return sa.select(waiting.c.job_id, place.label("place")).where(waiting.c.turn <= turn_max).subquery()


async def queue_positions(connection: AsyncConnection, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Places of pending jobs in their levels, 1 is next; `POSITION_MAX` for those too far back to count, none for jobs that do not wait."""
    mine, own = jobs.alias("mine"), jobs.alias("own")
    same = (own.c.pool == mine.c.pool) & (own.c.priority == mine.c.priority) & (own.c.owner_id == mine.c.owner_id)
    turn = sa.select(sa.func.count()).where(own.c.state == State.PENDING, same, own.c.job_id <= mine.c.job_id).scalar_subquery()
    asked = (
        await connection.execute(
            sa.select(mine.c.job_id, mine.c.pool, mine.c.priority, turn.label("turn")).where(
                mine.c.job_id.in_(job_ids), mine.c.state == State.PENDING
            )
        )
    ).all()
    if not asked:
        return {}
    levels = sa.tuple_(jobs.c.pool, jobs.c.priority).in_({(row.pool, row.priority) for row in asked})
    places = _places(min(POSITION_MAX, max(row.turn for row in asked)), levels)
    result = await connection.execute(sa.select(places.c.job_id, places.c.place).where(places.c.job_id.in_([row.job_id for row in asked])))
    # A job may have been claimed between the two statements.
    too_far = {row.job_id: POSITION_MAX for row in asked if row.turn > POSITION_MAX}
    return too_far | {row.job_id: min(POSITION_MAX, row.place) for row in result}


async def front_of_queue(connection: AsyncConnection, limit: int) -> list[tuple[Job, int]]:
    """The first `limit` pending jobs of every level, with their places."""
    places = _places(limit)
    result = await connection.execute(
        sa.select(jobs, places.c.place).join(places, places.c.job_id == jobs.c.job_id).where(places.c.place <= limit)
    )
    return [(_job(row), row["place"]) for row in result.mappings()]


async def running_of_owner(connection: AsyncConnection, owner_id: uuid.UUID) -> dict[str, int]:
    """How many of the owner's jobs run, by pool."""
    result = await connection.execute(
        sa.select(jobs.c.pool, sa.func.count()).where(jobs.c.owner_id == owner_id, jobs.c.state == State.PROCESSING).group_by(jobs.c.pool)
    )
    return {row[0]: row[1] for row in result}


async def pending_jobs(connection: AsyncConnection, *, after: uuid.UUID | None, older_than_s: float, limit: int) -> list[Job]:
    """Jobs that wait and were submitted longer ago than that, in the order of their ids, after `after`."""
    query = sa.select(jobs).where(jobs.c.state == State.PENDING, jobs.c.create_time <= sa.func.now() - timedelta(seconds=older_than_s))
    if after is not None:
        query = query.where(jobs.c.job_id > after)
    return await _all(connection, query.order_by(jobs.c.job_id).limit(limit))


async def pools(connection: AsyncConnection) -> list[str]:
    """Every pool that has unfinished jobs or workers."""
    unfinished = sa.select(jobs.c.pool).where(jobs.c.state < State.COMPLETED)
    offered = sa.select(sa.func.unnest(workers.c.pools))
    return sorted((await connection.execute(sa.union(unfinished, offered))).scalars())


@dataclass(frozen=True, slots=True)
class Level:
    """Jobs that wait in one level of a pool."""

    pool: str
    priority: Priority
    waiting: int
    delayed: int
    owners: int
    oldest_wait_s: float


async def levels(connection: AsyncConnection) -> list[Level]:
    """What waits, by pool and level."""
    delayed = sa.func.count().filter(jobs.c.retry_time > sa.func.now())
    oldest_s = sa.func.extract("epoch", sa.func.now() - sa.func.min(jobs.c.create_time))
    result = await connection.execute(
        sa.select(jobs.c.pool, jobs.c.priority, sa.func.count(), delayed, sa.func.count(jobs.c.owner_id.distinct()), oldest_s)
        .where(jobs.c.state == State.PENDING)
        .group_by(jobs.c.pool, jobs.c.priority)
    )
    return [Level(row[0], Priority(row[1]), row[2], row[3], row[4], float(row[5])) for row in result]


async def running_by_pool(connection: AsyncConnection) -> dict[str, int]:
    """How many jobs run in each pool."""
    query = sa.select(jobs.c.pool, sa.func.count()).where(jobs.c.state == State.PROCESSING).group_by(jobs.c.pool)
    return {row[0]: row[1] for row in await connection.execute(query)}


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that the newest completed jobs took: median and 90th percentile."""

    p50_s: float
    p90_s: float


async def paces(connection: AsyncConnection) -> tuple[dict[str, Pace], dict[str, Pace]]:
    """Seconds a step took by model, and seconds a job took by pool, in the newest completed jobs of each model."""
    known = sa.select(models.c.model_id).subquery()
    job_s = sa.func.extract("epoch", jobs.c.finish_time - jobs.c.start_time)
    newest = (
        sa.select(jobs.c.pool, jobs.c.model, job_s.label("job_s"), (job_s / jobs.c.steps_agreed).label("step_s"))
        .where(jobs.c.model == known.c.model_id, jobs.c.state == State.COMPLETED)
        .order_by(jobs.c.job_id.desc())
        .limit(DURATION_SAMPLE)
        .lateral()
    )

    async def by(key: sa.ColumnElement[str], seconds: sa.ColumnElement[Any]) -> dict[str, Pace]:
        quantiles = [sa.func.percentile_cont(part).within_group(seconds).label(name) for name, part in (("p50", 0.5), ("p90", 0.9))]
        query = sa.select(key.label("key"), *quantiles).select_from(known.join(newest, sa.true())).group_by(key)
        return {row["key"]: Pace(float(row["p50"]), float(row["p90"])) for row in (await connection.execute(query)).mappings()}

    return await by(newest.c.model, newest.c.step_s), await by(newest.c.pool, newest.c.job_s)


# --- changing state ---------------------------------------------------------------------------------------------------


async def _move(
    connection: AsyncConnection, job_id: uuid.UUID, target: State, *guards: sa.ColumnElement[bool], **values: Any
) -> Job | None:
    return await _one(
        connection,
        sa.update(jobs)
        .where(jobs.c.job_id == job_id, jobs.c.state.in_(sources(target)), *guards)
        .values(state=target, version=jobs.c.version + 1, **values)
        .returning(jobs),
    )


async def start_attempt(connection: AsyncConnection, job_id: uuid.UUID, *, worker_id: str, entry: str, takeover: bool) -> Job | None:
    """Give a job to a worker: pending → processing, with the next attempt number.

    A `takeover` (queue entry claimed from a silent worker) may also start a job that is processing, if this very entry
    was the one it ran under: a stray second entry of the job starts nothing. The attempt that was lost counts as failed.
    """
    startable = jobs.c.state == State.PENDING
    if takeover:
        startable |= (jobs.c.state == State.PROCESSING) & (jobs.c.queue_entry == entry)
    in_time = jobs.c.start_deadline.is_(None) | (jobs.c.start_deadline > sa.func.now()) | (jobs.c.attempt > 0)
    return await _move(
        connection,
        job_id,
        State.PROCESSING,
        startable,
        in_time,
        attempt=jobs.c.attempt + 1,
        failures=jobs.c.failures + sa.case((jobs.c.state == State.PROCESSING, 1), else_=0),
        retry_time=None,
        worker_id=worker_id,
        queue_entry=entry,
        start_time=sa.func.now(),
        steps_done=0,
    )


async def finish(
    connection: AsyncConnection,
    job: Job,
    target: State,
    *,
    fallback_s: float,
    steps_done: int = 0,
    assets: Sequence[bytes] = (),
    failure: Failure | None = None,
) -> tuple[Job, list[OutboxRow]] | None:
    """End a job in `target`, with the duties to announce and settle it.

    `job` is the job as the caller knows it: its attempt and its version guard the write. None: somebody else was first.
    """
    cost = cost_of(target, estimated_cost=job.estimated_cost, steps_agreed=job.steps_agreed, steps_done=steps_done)
    ended = await _move(
        connection,
        job.job_id,
        target,
        *_as_known(job),
        steps_done=steps_done,
        assets=list(assets),
        error=failure and failure.error,
        failure_reason=failure and failure.reason,
        fingerprint=failure and failure.fingerprint,
        failures=job.failures + (failure is not None),
        cost=cost,
        finish_time=sa.func.now(),
    )
    if ended is None:
        return None
    return ended, [await add_duty(connection, job.job_id, duty, fallback_s) for duty in (Duty.ANNOUNCE, Duty.SETTLE)]


def _as_known(job: Job) -> tuple[sa.ColumnElement[bool], ...]:
    return jobs.c.attempt == job.attempt, jobs.c.version == job.version


async def requeue(
    connection: AsyncConnection, job: Job, *, delay_s: float, failed: bool, fallback_s: float
) -> tuple[Job, list[OutboxRow]] | None:
    """Put a processing job back into the queue, due after `delay_s`, with the duty to announce it; guarded by attempt and version.

    `failed`: its attempt counts against the limit, as it failed or was lost. None: somebody else was first.
    """
    back = await _move(
        connection,
        job.job_id,
        State.PENDING,
        *_as_known(job),
        jobs.c.state == State.PROCESSING,
        failures=job.failures + failed,
        retry_time=sa.func.now() + timedelta(seconds=delay_s) if delay_s else None,
    )
    return None if back is None else (back, [await add_duty(connection, job.job_id, Duty.ANNOUNCE, fallback_s)])


async def request_cancel(connection: AsyncConnection, job_id: uuid.UUID, owner_id: uuid.UUID) -> Job | None:
    """Note the wish to stop a processing job; the first wish's time stays."""
    return await _one(
        connection,
        sa.update(jobs)
        .where(jobs.c.job_id == job_id, jobs.c.owner_id == owner_id, jobs.c.state == State.PROCESSING)
        .values(cancel_requested_time=sa.func.coalesce(jobs.c.cancel_requested_time, sa.func.now()))
        .returning(jobs),
    )


async def cancel_requested(connection: AsyncConnection, job_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Those of the jobs whose owner wants them stopped."""
    result = await connection.execute(sa.select(jobs.c.job_id).where(jobs.c.job_id.in_(job_ids), jobs.c.cancel_requested_time.is_not(None)))
    return list(result.scalars())


async def late_jobs(connection: AsyncConnection, limit: int) -> list[Job]:
    """Jobs that have not started by their deadline."""
    return await _all(
        connection,
        sa.select(jobs).where(jobs.c.state == State.PENDING, jobs.c.attempt == 0, jobs.c.start_deadline < sa.func.now()).limit(limit),
    )


async def running_jobs(connection: AsyncConnection, *, older_than_s: float, limit: int) -> list[Job]:
    """Jobs whose attempt started longer ago than that, oldest first."""
    return await _all(
        connection,
        sa.select(jobs)
        .where(jobs.c.state == State.PROCESSING, jobs.c.start_time < sa.func.now() - timedelta(seconds=older_than_s))
        .order_by(jobs.c.start_time)
        .limit(limit),
    )


# --- dead letters: failed jobs, and their way back --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A failed job, and whether its hold was released already."""

    job: Job
    released: bool


async def dead_letters(
    connection: AsyncConnection, *, limit: int, before: tuple[datetime, uuid.UUID] | None, fingerprint: str = "", reason: str = ""
) -> list[DeadLetter]:
    """Failed jobs of all owners, the newest failure first, older than `before`."""
    settling = sa.exists().where(outbox.c.job_id == jobs.c.job_id, outbox.c.duty == Duty.SETTLE)
    query = sa.select(jobs, settling.label("settling")).where(jobs.c.state == State.FAILED)
    if before is not None:
        query = query.where(sa.tuple_(jobs.c.finish_time, jobs.c.job_id) < before)
    if fingerprint:
        query = query.where(jobs.c.fingerprint == fingerprint)
    if reason:
        query = query.where(jobs.c.failure_reason == reason)
    letters: list[DeadLetter] = []
    for row in (await connection.execute(query.order_by(jobs.c.finish_time.desc(), jobs.c.job_id.desc()).limit(limit))).mappings():
        values = dict(row)
        settling_now = values.pop("settling")
        letters.append(DeadLetter(_job(values), not settling_now))
    return letters


async def dead_letter_count(connection: AsyncConnection) -> int:
    """How many failed jobs there are."""
    return (await connection.execute(sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == State.FAILED))).scalar_one()


async def failed_jobs(connection: AsyncConnection, fingerprint: str, limit: int) -> list[Job]:
    """Failed jobs with this fingerprint, the oldest failure first."""
    query = sa.select(jobs).where(jobs.c.state == State.FAILED, jobs.c.fingerprint == fingerprint)
    return await _all(connection, query.order_by(jobs.c.finish_time).limit(limit))


@dataclass(frozen=True, slots=True)
class Retry:
    """A retry under way."""

    reservation_id: uuid.UUID
    abandoned: bool
    api_key_id: uuid.UUID | None = None


def _unsettled(job: Job) -> sa.ColumnElement[bool]:
    return sa.exists().where(outbox.c.job_id == job.job_id, outbox.c.duty == Duty.SETTLE)


async def add_retry(
    connection: AsyncConnection, job_id: uuid.UUID, reservation_id: uuid.UUID, *, api_key_id: uuid.UUID | None = None
) -> Retry | None:
    """Note that a failed job is about to be retried under a new hold and a key; the retry under way, if there is one already.

    None: the one that was under way is being forgotten in this moment.
    """
    note = pg.insert(retries).values(job_id=job_id, reservation_id=reservation_id, api_key_id=api_key_id)
    await connection.execute(note.on_conflict_do_nothing())
    known = sa.select(retries.c.reservation_id, retries.c.abandoned, retries.c.api_key_id).where(retries.c.job_id == job_id)
    row = (await connection.execute(known)).one_or_none()
    return None if row is None else Retry(*row)


async def retry_noted(connection: AsyncConnection, job_id: uuid.UUID) -> bool:
    """Whether a retry of the job is under way."""
    return bool((await connection.execute(sa.select(sa.exists().where(retries.c.job_id == job_id)))).scalar_one())


async def delete_retry(connection: AsyncConnection, job_id: uuid.UUID, reservation_id: uuid.UUID) -> None:
    """Forget a retry that was refused or undone."""
    await connection.execute(sa.delete(retries).where(retries.c.job_id == job_id, retries.c.reservation_id == reservation_id))


async def commit_retry(
    connection: AsyncConnection, job: Job, reservation_id: uuid.UUID, *, fallback_s: float
) -> tuple[Job, list[OutboxRow]] | None:
    """failed → pending under the new hold and its key, as if just submitted. None when the retry was abandoned, its last hold is not
    settled, or the job is no longer as known."""
    mine = (retries.c.job_id == job.job_id) & (retries.c.reservation_id == reservation_id)
    note = (await connection.execute(sa.select(retries.c.api_key_id, retries.c.abandoned).where(mine).with_for_update())).one_or_none()
    if note is None or note.abandoned:
        return None
    back = await _move(
        connection,
        job.job_id,
        State.PENDING,
        jobs.c.version == job.version,
        jobs.c.state == State.FAILED,
        ~_unsettled(job),
        attempt=0,
        failures=0,
        retry_count=jobs.c.retry_count + 1,
        retry_time=None,
        reservation_id=reservation_id,
        api_key_id=note.api_key_id,
        worker_id="",
        queue_entry="",
        steps_done=0,
        cost=None,
        error=None,
        failure_reason=None,
        fingerprint=None,
        cancel_requested_time=None,
        start_deadline=None,
        start_time=None,
        finish_time=None,
    )
    if back is None:
        return None
    await connection.execute(sa.delete(retries).where(mine))
    return back, [await add_duty(connection, job.job_id, Duty.ANNOUNCE, fallback_s)]


async def abandon_retries(connection: AsyncConnection, *, older_than_s: float, limit: int) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """Mark retries that never came to be: (job, reservation) of each, so that their holds can be released."""
    stale = (
        sa.select(retries.c.job_id)
        .where(retries.c.create_time < sa.func.now() - timedelta(seconds=older_than_s))
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    result = await connection.execute(
        sa.update(retries).where(retries.c.job_id.in_(stale)).values(abandoned=True).returning(retries.c.job_id, retries.c.reservation_id)
    )
    return [(row.job_id, row.reservation_id) for row in result]


# --- deletion ---------------------------------------------------------------------------------------------------------


async def delete_job(connection: AsyncConnection, job: Job) -> datetime | None:
    """Delete an ended job as the caller knows it, and note that its media have to go; when. None: its end is not announced or not
    settled yet, a retry is under way, or it is no longer as known."""
    obliged = sa.exists().where(outbox.c.job_id == job.job_id)
    retried = sa.exists().where(retries.c.job_id == job.job_id)
    gone = (
        sa.delete(jobs)
        .where(jobs.c.job_id == job.job_id, jobs.c.version == job.version, jobs.c.state >= State.COMPLETED, ~obliged, ~retried)
        .returning(jobs.c.owner_id)
    )
    if (await connection.execute(gone)).one_or_none() is None:
        return None
    noted = sa.insert(deletions).values(job_id=job.job_id, owner_id=job.owner_id).returning(deletions.c.delete_time)
    return (await connection.execute(noted)).scalar_one()


async def unfinished_deletions(connection: AsyncConnection, *, older_than_s: float, limit: int) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """(job, owner) of deleted jobs whose media may still be there."""
    result = await connection.execute(
        sa.select(deletions.c.job_id, deletions.c.owner_id)
        .where(deletions.c.delete_time < sa.func.now() - timedelta(seconds=older_than_s))
        .order_by(deletions.c.delete_time)
        .limit(limit)
    )
    return [(row.job_id, row.owner_id) for row in result]


async def deletion_done(connection: AsyncConnection, job_id: uuid.UUID) -> None:
    """The media of a deleted job are gone."""
    await connection.execute(sa.delete(deletions).where(deletions.c.job_id == job_id))


async def ended_jobs(connection: AsyncConnection, *, older_than_s: float, limit: int) -> list[Job]:
    """Jobs that ended longer ago than that, oldest first."""
    ended = (jobs.c.state >= State.COMPLETED) & (jobs.c.finish_time < sa.func.now() - timedelta(seconds=older_than_s))
    return await _all(connection, sa.select(jobs).where(ended).order_by(jobs.c.finish_time).limit(limit))


async def delete_old_requests(connection: AsyncConnection, *, older_than_s: float, limit: int) -> int:
    """Forget submit requests that old whose jobs are gone; how many."""
    gone = ~sa.exists().where(jobs.c.job_id == requests.c.job_id)
    old = (
        sa.select(requests.c.owner_id, requests.c.request_id)
        .where(requests.c.intent.is_(None), requests.c.create_time < sa.func.now() - timedelta(seconds=older_than_s), gone)
        .limit(limit)
    )
    result = await connection.execute(sa.delete(requests).where(sa.tuple_(requests.c.owner_id, requests.c.request_id).in_(old)))
    return result.rowcount


async def media_owners(connection: AsyncConnection, job_ids: Sequence[uuid.UUID], *, hold: bool = False) -> dict[uuid.UUID, Job]:
    """Those of the jobs that exist, for telling orphaned media from others; `hold` keeps them as they are until the transaction ends."""
    query = sa.select(jobs).where(jobs.c.job_id.in_(job_ids))
    return {job.job_id: job for job in await _all(connection, query.with_for_update(read=True) if hold else query)}


# --- outbox -----------------------------------------------------------------------------------------------------------


async def add_duty(connection: AsyncConnection, job_id: uuid.UUID, duty: Duty, delay_s: float) -> OutboxRow:
    """Oblige the relay to do `duty` after `delay_s`, unless it has been done and deleted by then."""
    due_time = sa.func.now() + timedelta(seconds=delay_s)
    result = await connection.execute(sa.insert(outbox).values(job_id=job_id, duty=duty, due_time=due_time).returning(outbox.c.outbox_id))
    return OutboxRow(result.scalar_one(), job_id, duty, 0)


async def due_duties(connection: AsyncConnection, *, limit: int, again_after_s: float) -> list[OutboxRow]:
    """Take due duties: each is hidden from other relays for `again_after_s`, doubled with every failure up to a minute."""
    due = (
        sa.select(outbox.c.outbox_id)
        .where(outbox.c.due_time <= sa.func.now())
        .order_by(outbox.c.due_time)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    wait_s = sa.func.least(60.0, again_after_s * sa.func.power(2, sa.func.least(outbox.c.failures, 10)))
    result = await connection.execute(
        sa.update(outbox)
        .where(outbox.c.outbox_id.in_(due))
        .values(failures=outbox.c.failures + 1, due_time=sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, wait_s))
        .returning(outbox.c.outbox_id, outbox.c.job_id, outbox.c.duty, outbox.c.failures)
    )
    return [OutboxRow(row.outbox_id, row.job_id, Duty(row.duty), row.failures) for row in result]


async def duties_of(connection: AsyncConnection, job_id: uuid.UUID, duty: Duty) -> list[int]:
    """Ids of the duties of this kind that a job has outstanding."""
    return list((await connection.execute(sa.select(outbox.c.outbox_id).where(outbox.c.job_id == job_id, outbox.c.duty == duty))).scalars())


async def delete_duties(connection: AsyncConnection, outbox_ids: Sequence[int]) -> None:
    """Duties done. Losing this in a crash repeats them, which is harmless: no need to wait for the disk."""
    await connection.execute(sa.text("SET LOCAL synchronous_commit = off"))
    await connection.execute(sa.delete(outbox).where(outbox.c.outbox_id.in_(outbox_ids)))


# --- models, workers, secrets -------------------------------------------------------------------------------------------


async def offer_models(connection: AsyncConnection, offered: Sequence[tuple[str, bytes]]) -> None:
    """Note the models that a worker offers now."""
    if offered:
        statement = pg.insert(models).values([{"model_id": key, "model": model, "seen_time": sa.func.now()} for key, model in offered])
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=[models.c.model_id], set_={"model": statement.excluded.model, "seen_time": statement.excluded.seen_time}
            )
        )


async def offered_models(connection: AsyncConnection) -> list[tuple[bytes, float]]:
    """Every model ever offered, with the seconds since a worker last offered it."""
    age = sa.func.extract("epoch", sa.func.now() - models.c.seen_time)
    return [(row[0], float(row[1])) for row in await connection.execute(sa.select(models.c.model, age).order_by(models.c.model_id))]


@dataclass(frozen=True, slots=True)
class Worker:
    """A dispatcher that offers models."""

    worker_id: str
    pools: tuple[str, ...]
    slot_count: int
    loaded_models: tuple[str, ...]
    seen_time: datetime


async def offer_worker(
    connection: AsyncConnection, worker_id: str, *, pools: Sequence[str], slot_count: int, loaded_models: Sequence[str]
) -> None:
    """Note that a worker is there, and forget those that have not been for a day."""
    values = {"pools": list(pools), "slot_count": slot_count, "loaded_models": list(loaded_models), "seen_time": sa.func.now()}
    statement = pg.insert(workers).values(worker_id=worker_id, **values)
    await connection.execute(statement.on_conflict_do_update(index_elements=[workers.c.worker_id], set_=values))
    await connection.execute(sa.delete(workers).where(workers.c.seen_time < sa.func.now() - timedelta(days=1)))


async def withdraw_worker(connection: AsyncConnection, worker_id: str) -> None:
    """Forget a worker that stops."""
    await connection.execute(sa.delete(workers).where(workers.c.worker_id == worker_id))


async def live_workers(connection: AsyncConnection, *, silent_s: float) -> list[Worker]:
    """Workers that said within `silent_s` that they are there."""
    result = await connection.execute(
        sa.select(workers).where(workers.c.seen_time > sa.func.now() - timedelta(seconds=silent_s)).order_by(workers.c.worker_id)
    )
    return [Worker(row.worker_id, tuple(row.pools), row.slot_count, tuple(row.loaded_models), row.seen_time) for row in result]


async def secret(connection: AsyncConnection, name: str, fresh: bytes) -> bytes:
    """The shared secret of this name; `fresh` becomes it when there is none."""
    await connection.execute(pg.insert(secrets).values(name=name, value=fresh).on_conflict_do_nothing())
    return (await connection.execute(sa.select(secrets.c.value).where(secrets.c.name == name))).scalar_one()
