"""All SQL of jobs_service. Functions take the caller's connection, so that transactions compose.

Changes of state are guarded: an UPDATE names the states (and the attempt) it may start from and returns the new row, or
nothing when somebody else was first. Only the database's clock is used.
"""

import enum
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.asyncio import AsyncConnection

from jobs_service.lifecycle import Job, Priority, State, cost_of, sources
from jobs_service.tables import jobs, models, outbox, requests, secrets

POSITION_MAX = 10_000
"""Places in the queue are counted up to here; counting further would cost more than it tells."""

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


def _job(row: sa.RowMapping) -> Job:
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


async def find_request(connection: AsyncConnection, owner_id: uuid.UUID, request_id: uuid.UUID) -> Request | None:
    """The submit request with this id, or None."""
    row = (
        await connection.execute(
            sa.select(requests.c.digest, requests.c.job_id, requests.c.intent, requests.c.abandoned).where(
                requests.c.owner_id == owner_id, requests.c.request_id == request_id
            )
        )
    ).one_or_none()
    return None if row is None else Request(*row)


async def add_request(
    connection: AsyncConnection, owner_id: uuid.UUID, request_id: uuid.UUID, *, digest: bytes, job_id: uuid.UUID, intent: bytes
) -> bool:
    """Note that a job is about to be submitted; False when the request is there already."""
    # Losing this row in a crash of PostgreSQL loses nothing but a hold, which expires: no need to wait for the disk.
    await connection.execute(sa.text("SET LOCAL synchronous_commit = off"))
    result = await connection.execute(
        pg.insert(requests)
        .values(owner_id=owner_id, request_id=request_id, digest=digest, job_id=job_id, intent=intent)
        .on_conflict_do_nothing()
        .returning(requests.c.job_id)
    )
    return result.one_or_none() is not None


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


async def get_job(connection: AsyncConnection, job_id: uuid.UUID, owner_id: uuid.UUID | None = None) -> Job | None:
    """A job; with `owner_id`, only if it is theirs."""
    query = sa.select(jobs).where(jobs.c.job_id == job_id)
    if owner_id is not None:
        query = query.where(jobs.c.owner_id == owner_id)
    return await _one(connection, query)


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


async def place_of_newcomer(connection: AsyncConnection, pool: str, priority: Priority) -> int:
    """Place in the queue that a job would get now, 1 is next."""
    ahead = sa.select(sa.literal(1)).where(jobs.c.state == State.PENDING, jobs.c.pool == pool, jobs.c.priority >= priority)
    return 1 + (await connection.execute(sa.select(sa.func.count()).select_from(ahead.limit(POSITION_MAX).subquery()))).scalar_one()


async def queue_positions(connection: AsyncConnection, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Places of pending jobs in their pools, 1 is next."""
    mine, other = jobs.alias("mine"), jobs.alias("other")
    ahead = (
        sa.select(sa.literal(1))
        .where(
            other.c.state == State.PENDING,
            other.c.pool == mine.c.pool,
            (other.c.priority > mine.c.priority) | ((other.c.priority == mine.c.priority) & (other.c.job_id < mine.c.job_id)),
        )
        .correlate(mine)
        .limit(POSITION_MAX)
        .subquery()
        .lateral()
    )
    count = sa.select(sa.func.count()).select_from(ahead).scalar_subquery()
    result = await connection.execute(sa.select(mine.c.job_id, count).where(mine.c.job_id.in_(job_ids), mine.c.state == State.PENDING))
    return {row[0]: 1 + row[1] for row in result}


async def front_of_queue(connection: AsyncConnection, limit: int) -> list[tuple[Job, int]]:
    """The first `limit` pending jobs of every pool, with their places."""
    place = sa.func.row_number().over(partition_by=jobs.c.pool, order_by=(jobs.c.priority.desc(), jobs.c.job_id)).label("place")
    ranked = sa.select(jobs.c.job_id, place).where(jobs.c.state == State.PENDING).subquery()
    result = await connection.execute(
        sa.select(jobs, ranked.c.place).join(ranked, ranked.c.job_id == jobs.c.job_id).where(ranked.c.place <= limit)
    )
    return [(_job(row), row["place"]) for row in result.mappings()]


async def seconds_per_step(connection: AsyncConnection, model: str) -> tuple[float, float] | None:
    """Median and 90th percentile of the seconds a step took in the newest completed jobs of a model; None without any."""
    newest = (
        sa.select((sa.func.extract("epoch", jobs.c.finish_time - jobs.c.start_time) / jobs.c.steps_agreed).label("seconds"))
        .where(jobs.c.model == model, jobs.c.state == State.COMPLETED)
        .order_by(jobs.c.job_id.desc())
        .limit(DURATION_SAMPLE)
        .subquery()
    )
    row = (
        await connection.execute(
            sa.select(
                sa.func.percentile_cont(0.5).within_group(newest.c.seconds),
                sa.func.percentile_cont(0.9).within_group(newest.c.seconds),
            )
        )
    ).one()
    return None if row[0] is None else (float(row[0]), float(row[1]))


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
    was the one it ran under: a stray second entry of the job starts nothing.
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
    error: bytes | None = None,
) -> tuple[Job, list[OutboxRow]] | None:
    """End a job in `target`, with the duties to announce and settle it.

    `job` is the job as the caller knows it: its attempt and its state guard the write. None: somebody else was first.
    """
    cost = cost_of(target, estimated_cost=job.estimated_cost, steps_agreed=job.steps_agreed, steps_done=steps_done)
    ended = await _move(
        connection,
        job.job_id,
        target,
        jobs.c.attempt == job.attempt,
        jobs.c.state == job.state,
        steps_done=steps_done,
        assets=list(assets),
        error=error,
        cost=cost,
        finish_time=sa.func.now(),
    )
    if ended is None:
        return None
    return ended, [await add_duty(connection, job.job_id, duty, fallback_s) for duty in (Duty.ANNOUNCE, Duty.SETTLE)]


async def requeue(connection: AsyncConnection, job: Job, *, delay_s: float) -> Job | None:
    """Put a processing job back into the queue after `delay_s` (the relay does it then); guarded by the attempt."""
    back = await _move(connection, job.job_id, State.PENDING, jobs.c.attempt == job.attempt, jobs.c.state == State.PROCESSING)
    if back is not None:
        await add_duty(connection, job.job_id, Duty.ANNOUNCE, delay_s)
    return back


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


async def delete_duties(connection: AsyncConnection, outbox_ids: Sequence[int]) -> None:
    """Duties done. Losing this in a crash repeats them, which is harmless: no need to wait for the disk."""
    await connection.execute(sa.text("SET LOCAL synchronous_commit = off"))
    await connection.execute(sa.delete(outbox).where(outbox.c.outbox_id.in_(outbox_ids)))


async def announce_pending(connection: AsyncConnection) -> int:
    """Oblige the relay to announce every pending job again: how the queue comes back after Redis was lost."""
    pending = sa.select(jobs.c.job_id, sa.literal(int(Duty.ANNOUNCE))).where(jobs.c.state == State.PENDING)
    result = await connection.execute(sa.insert(outbox).from_select(["job_id", "duty"], pending))
    return result.rowcount


# --- models and secrets -----------------------------------------------------------------------------------------------


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


async def secret(connection: AsyncConnection, name: str, fresh: bytes) -> bytes:
    """The shared secret of this name; `fresh` becomes it when there is none."""
    await connection.execute(pg.insert(secrets).values(name=name, value=fresh).on_conflict_do_nothing())
    return (await connection.execute(sa.select(secrets.c.value).where(secrets.c.name == name))).scalar_one()
