"""The audit trail in the gateway's keeping: its own entries and those that the other services send."""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import store
from gateway.store import AuditFilter, AuditRow
from servicekit import paging
from servicekit.audit import SUBJECT_MAX, AuditEntry
from servicekit.database import reading, transaction
from servicekit.errors import invalid, not_found, permission_denied

PAGES_OF = b"audit"
OWN = "gateway"
"""The reporter of the gateway's own entries."""
PACKAGES = {
    "jobs_service": "genmesh.jobs.v1",
    "credit_service": "genmesh.credits.v1",
    "inference_service": "genmesh.inference.v1",
}
"""What each service of the mesh serves, and so can report acts on: one that was broken into cannot tell tales of others."""
CODE_MAX = 16
"""The last code of google.rpc.Code."""
METHOD_MAX = 256
ADDRESS_MAX = 64
REQUEST_ID_MAX = 128
REASON_MAX = 128
DETAILS_MAX = 32
DETAIL_NAME_MAX = 64
DETAIL_VALUE_MAX = 512

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_BYTES = 8
_POSITION_BYTES = _TIME_BYTES + 16


class AuditLog:
    """Entries over one database; the gateway's own `servicekit.audit.AuditTrail`."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def begin(self, entry: AuditEntry, *, reporter: str = OWN) -> None:
        """Write down an act, as `reporter` (a proven service of the mesh) tells it; with `code` set, its end too. The same entry again
        changes nothing. What is too long is cut: an act is written down, whatever its request says.

        Raises INVALID_ARGUMENT for ids and codes that are none, PERMISSION_DENIED for an act on what the reporter does not serve and
        for an entry that is another's.
        """
        if reporter != OWN and not entry.method.startswith(f"{PACKAGES[reporter]}."):
            raise permission_denied(f"{reporter} does not serve this method")
        audit_entry_id = _id(entry.audit_entry_id, "entry.audit_entry_id")
        async with transaction(self._engine) as connection:
            theirs = await store.insert_audit_entry(
                connection,
                audit_entry_id=audit_entry_id,
                actor_user_id=_id(entry.actor_user_id, "entry.actor_user_id") if entry.actor_user_id else None,
                actor_api_key_id=_id(entry.actor_api_key_id, "entry.actor_api_key_id") if entry.actor_api_key_id else None,
                actor_service=_text(entry.actor_service, DETAIL_NAME_MAX),
                method=_text(entry.method, METHOD_MAX),
                subject=_text(entry.subject, SUBJECT_MAX),
                client_address=_text(entry.client_address, ADDRESS_MAX),
                request_id=_text(entry.request_id, REQUEST_ID_MAX),
                details=_details(entry.details),
                reporter=reporter,
            )
            if not theirs:
                raise permission_denied("this entry was written by another service")
            if entry.code is not None:
                await store.insert_audit_outcome(
                    connection,
                    audit_entry_id=audit_entry_id,
                    code=_code(entry.code),
                    reason=_text(entry.reason, REASON_MAX),
                    subject="",
                    details={},
                    reporter=reporter,
                )

    async def finish(self, entry: AuditEntry, *, reporter: str = OWN) -> None:
        """Write down how the act of an entry ended, and what it was done to if the entry does not say; the first outcome stays.

        Raises INVALID_ARGUMENT, NOT_FOUND where `reporter` began no such entry.
        """
        async with transaction(self._engine) as connection:
            known = await store.insert_audit_outcome(
                connection,
                audit_entry_id=_id(entry.audit_entry_id, "audit_entry_id"),
                code=_code(entry.code or 0),
                reason=_text(entry.reason, REASON_MAX),
                subject=_text(entry.subject, SUBJECT_MAX),
                details=_details(entry.details),
                reporter=reporter,
            )
        if not known:
            raise not_found("audit entry")

    async def list_page(self, selection: AuditFilter, *, page_size: int, page_token: str) -> tuple[list[AuditRow], str]:
        """A page of entries, newest first, and the token of the next page."""
        limit = paging.page_limit(page_size)
        query = PAGES_OF + repr(selection).encode()
        before = paging.decode_token(page_token, query)
        async with reading(self._engine) as connection:
            rows = await store.list_audit_entries(connection, selection, before=_position(before) if before else None, limit=limit + 1)
        more = len(rows) > limit
        rows = rows[:limit]
        return rows, paging.encode_token(_position_bytes(rows[-1]), query) if more else ""


def _position_bytes(row: AuditRow) -> bytes:
    microseconds = (row.act_time - _EPOCH) // timedelta(microseconds=1)
    return microseconds.to_bytes(_TIME_BYTES, "big", signed=True) + row.audit_entry_id.bytes


def _position(position: bytes) -> tuple[datetime, uuid.UUID]:
    # The checksum of a token is no secret: anybody can make one for a position that no entry ever had.
    microseconds = int.from_bytes(position[:_TIME_BYTES], "big", signed=True)
    try:
        if len(position) != _POSITION_BYTES:
            raise ValueError(len(position))
        return _EPOCH + timedelta(microseconds=microseconds), uuid.UUID(bytes=position[_TIME_BYTES:])
    except (ValueError, OverflowError):
        raise invalid("page_token", "is not a token that this list gave") from None


def _code(code: int) -> int:
    if not 0 <= code <= CODE_MAX:
        raise invalid("code", "must be a code of google.rpc.Code")
    return code


def _id(value: str, field: str) -> uuid.UUID:
    try:
        return uuid.UUID(value)
    except ValueError:
        raise invalid(field, "must be a UUID") from None


def _text(value: str, length_max: int) -> str:
    """PostgreSQL cannot hold NUL."""
    return value.replace("\0", "")[:length_max]


def _details(details: Mapping[str, str]) -> dict[str, str]:
    return {_text(name, DETAIL_NAME_MAX): _text(value, DETAIL_VALUE_MAX) for name, value in sorted(details.items())[:DETAILS_MAX]}
