"""All SQL about uploads. Functions take the caller's connection, so that transactions compose; only the database's clock is used."""

import enum
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from jobs_service.tables import uploads


class UploadState(enum.IntEnum):
    """Where an upload stands; values as in the proto."""

    PENDING = 1
    COMPLETE = 2
    REJECTED = 3


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that a user brings."""

    upload_id: uuid.UUID
    owner_id: uuid.UUID
    state: UploadState
    content_type: str
    size_bytes: int
    arrival_key: str | None
    object_key: str | None
    width: int
    height: int
    duration_ms: int
    sha256: bytes | None
    rejection: str | None
    create_time: datetime
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class UploadUsage:
    """What an owner has of uploads: how much, and in how many seconds it gets less."""

    incomplete: int
    incomplete_less_s: float
    urls: int
    """URLs that can be written to."""
    urls_less_s: float
    stored_bytes: int
    stored_less_s: float


_upload_columns = (
    uploads.c.upload_id,
    uploads.c.owner_id,
    uploads.c.state,
    uploads.c.content_type,
    uploads.c.size_bytes,
    uploads.c.arrival_key,
    uploads.c.object_key,
    uploads.c.width,
    uploads.c.height,
    uploads.c.duration_ms,
    uploads.c.sha256,
    uploads.c.rejection,
    uploads.c.create_time,
    uploads.c.expire_time,
)


async def _upload(connection: AsyncConnection, query: sa.Executable) -> Upload | None:
    row = (await connection.execute(query)).mappings().one_or_none()
    return None if row is None else _upload_of(row)


def _upload_of(row: Mapping[Any, Any]) -> Upload:
    values = dict(row)
    values["state"] = UploadState(values["state"])
    return Upload(**values)


async def usage(connection: AsyncConnection, owner_id: uuid.UUID) -> UploadUsage:
    """What the owner has now. Until the transaction ends nobody else gets an answer for this owner: it is for deciding about one more."""
    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(f"uploads.{owner_id}", 0))))
    now = sa.func.now()

    def less_s(moment: sa.Column[datetime], counted: sa.ColumnElement[bool]) -> sa.ColumnElement[Any]:
        return sa.func.coalesce(sa.func.extract("epoch", sa.func.min(moment).filter(counted) - now), 0)

    incomplete, live, kept = (
        uploads.c.state == UploadState.PENDING,
        uploads.c.url_expire_time > now,
        uploads.c.state != UploadState.REJECTED,
    )
    row = (
        await connection.execute(
            sa.select(
                sa.func.count().filter(incomplete),
                less_s(uploads.c.expire_time, incomplete),
                sa.func.count().filter(live),
                less_s(uploads.c.url_expire_time, live),
                sa.func.coalesce(sa.func.sum(uploads.c.size_bytes).filter(kept), 0),
                less_s(uploads.c.expire_time, kept),
            ).where(uploads.c.owner_id == owner_id, uploads.c.expire_time > now)
        )
    ).one()
    return UploadUsage(row[0], float(row[1]), row[2], float(row[3]), int(row[4]), float(row[5]))


async def add(
    connection: AsyncConnection,
    upload_id: uuid.UUID,
    owner_id: uuid.UUID,
    *,
    content_type: str,
    size_bytes: int,
    arrival_key: str,
    url_ttl_s: float,
    ttl_s: float,
) -> None:
    """Note an upload that is announced."""
    await connection.execute(
        sa.insert(uploads).values(
            upload_id=upload_id,
            owner_id=owner_id,
            state=UploadState.PENDING,
            content_type=content_type,
            size_bytes=size_bytes,
            arrival_key=arrival_key,
            url_expire_time=sa.func.now() + timedelta(seconds=url_ttl_s),
            expire_time=sa.func.now() + timedelta(seconds=ttl_s),
        )
    )


async def get(connection: AsyncConnection, upload_id: uuid.UUID, owner_id: uuid.UUID) -> Upload | None:
    """An upload of the owner that has not expired."""
    mine = (uploads.c.upload_id == upload_id) & (uploads.c.owner_id == owner_id)
    return await _upload(connection, sa.select(*_upload_columns).where(mine, uploads.c.expire_time > sa.func.now()))


async def claim(connection: AsyncConnection, upload_id: uuid.UUID, check_id: uuid.UUID, *, lease_s: float) -> Upload | None:
    """Begin a check that ends within the lease. None: another one is under way, or the upload is not pending for that long any more."""
    end = sa.func.now() + timedelta(seconds=lease_s)
    free = sa.or_(uploads.c.check_end_time.is_(None), uploads.c.check_end_time <= sa.func.now())
    return await _upload(
        connection,
        sa.update(uploads)
        .where(uploads.c.upload_id == upload_id, uploads.c.state == UploadState.PENDING, free, uploads.c.expire_time > end)
        .values(check_id=check_id, check_end_time=end)
        .returning(*_upload_columns),
    )


async def release(connection: AsyncConnection, upload_id: uuid.UUID, check_id: uuid.UUID) -> None:
    """End a check that came to no verdict."""
    mine = (uploads.c.upload_id == upload_id) & (uploads.c.check_id == check_id)
    await connection.execute(sa.update(uploads).where(mine).values(check_id=None, check_end_time=None))


async def end(
    connection: AsyncConnection, upload_id: uuid.UUID, check_id: uuid.UUID, state: UploadState, *, ttl_s: float, **values: object
) -> Upload | None:
    """pending → complete or rejected, by the check that has the claim. None: it has it no longer."""
    mine = (uploads.c.upload_id == upload_id) & (uploads.c.check_id == check_id) & (uploads.c.check_end_time > sa.func.now())
    return await _upload(
        connection,
        sa.update(uploads)
        .where(mine, uploads.c.state == UploadState.PENDING)
        .values(state=state, check_id=None, check_end_time=None, expire_time=sa.func.now() + timedelta(seconds=ttl_s), **values)
        .returning(*_upload_columns),
    )


async def expired(connection: AsyncConnection, *, limit: int) -> list[Upload]:
    """Uploads that are kept no longer, the oldest first. None of them can change any more."""
    query = sa.select(*_upload_columns).where(uploads.c.expire_time < sa.func.now()).order_by(uploads.c.expire_time).limit(limit)
    return [_upload_of(row) for row in (await connection.execute(query)).mappings()]


async def delete(connection: AsyncConnection, upload_id: uuid.UUID) -> None:
    """Forget an upload."""
    await connection.execute(sa.delete(uploads).where(uploads.c.upload_id == upload_id))


async def dead_arrivals(connection: AsyncConnection, *, older_than_s: float, limit: int) -> list[tuple[uuid.UUID, str]]:
    """(upload, arrival key) of checked uploads whose URL stopped working that long ago."""
    dead = uploads.c.url_expire_time < sa.func.now() - timedelta(seconds=older_than_s)
    result = await connection.execute(
        sa.select(uploads.c.upload_id, uploads.c.arrival_key)
        .where(uploads.c.state != UploadState.PENDING, uploads.c.arrival_key.is_not(None), dead)
        .order_by(uploads.c.url_expire_time)
        .limit(limit)
    )
    return [(row.upload_id, row.arrival_key) for row in result]


async def arrivals_cleared(connection: AsyncConnection, upload_ids: Sequence[uuid.UUID]) -> None:
    """Nothing is left where the URLs of these uploads wrote."""
    await connection.execute(sa.update(uploads).where(uploads.c.upload_id.in_(upload_ids)).values(arrival_key=None))


async def known_keys(connection: AsyncConnection, keys: Sequence[str]) -> set[str]:
    """Those of the object keys that an upload has."""
    arrival = sa.select(uploads.c.arrival_key).where(uploads.c.arrival_key.in_(keys))
    checked = sa.select(uploads.c.object_key).where(uploads.c.object_key.in_(keys))
    return set((await connection.execute(sa.union_all(arrival, checked))).scalars())
