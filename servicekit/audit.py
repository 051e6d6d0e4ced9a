"""The audit trail: who did what to whom, from where. Every method that is privileged or marked `audited` leaves an entry.

The gateway keeps the entries; services send theirs. An act of somebody signed in is written down before it happens: where that
is impossible, it does not happen. How it ended is added afterwards. What strangers may call (signing in) is written down after
it ended, so that a flood of refused attempts costs one entry each at most.
"""

import asyncio
import contextvars
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol

import grpc
import structlog
from google.protobuf.message import Message
from uuid_utils.compat import uuid7

from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.options.v1 import options_pb2
from servicekit.client import call_metadata
from servicekit.errors import MeshError, Reason, from_rpc_error, limit_reached, unavailable
from servicekit.identity import EDGE, Principal, current_principal

SUBJECT_FIELDS = ("user_id", "job_id", "api_key_id", "top_up_id", "upload_id", "identity_id")
"""Fields of requests that name whom or what an act is done to, first match."""
WRITE_TIMEOUT_S = 3.0
SUBJECT_MAX = 256
DETAIL_MAX = 500
FINISH_ATTEMPTS = 3
FINISH_PAUSE_S = 0.2
RECORDED_OF_STRANGERS = frozenset(
    {
        Reason.ERROR_REASON_BAD_CREDENTIALS,
        Reason.ERROR_REASON_ID_TOKEN_INVALID,
        Reason.ERROR_REASON_API_KEY_INVALID,
        Reason.ERROR_REASON_REFRESH_TOKEN_INVALID,
        Reason.ERROR_REASON_ACCOUNT_DISABLED,
    }
)
"""Refusals of strangers that say somebody tried to be somebody, which throttling bounds; others could be had by the thousand."""
ACTS_PER_MINUTE = 120
"""Entries that one account may cause a minute, in a process, with acts on itself and with what it may not do: they stay for ever."""
WINDOW_S = 60.0
COUNTED_MAX = 10_000

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class AuditEntry:
    """An act. `code` and `reason` are set once it has ended."""

    audit_entry_id: str
    method: str
    actor_user_id: str = ""
    actor_api_key_id: str = ""
    actor_service: str = ""
    subject: str = ""
    client_address: str = ""
    request_id: str = ""
    details: dict[str, str] = field(default_factory=dict[str, str])
    code: int | None = None
    reason: str = ""
    lasting: bool = False
    """Whether the act changed something, see `done`. Not written down."""


class AuditTrail(Protocol):
    """Where entries go. Both raise what their store raises."""

    async def begin(self, entry: AuditEntry) -> None:
        """Write down an act; with `code` set, its end too. The same entry again changes nothing."""
        ...

    async def finish(self, entry: AuditEntry) -> None:
        """Write down how the act of an entry ended, and what became known of it meanwhile: details, and a subject if it had none."""
        ...


_entry: contextvars.ContextVar[AuditEntry | None] = contextvars.ContextVar("audit_entry", default=None)
_finishing: set[asyncio.Future[None]] = set()
"""What is being written; the event loop alone would let go of it."""


def about(subject: str | None = None, **details: str) -> None:
    """Add to the entry of the call being served what only the domain knows. Never a secret. No entry: nothing happens.

    `subject`, of which the first stays, is for calls whose request has none of SUBJECT_FIELDS: their entries tell it once they ended.
    """
    entry = _entry.get()
    if entry is None:
        return
    if subject is not None and not entry.subject:
        entry.subject = subject[:SUBJECT_MAX]
    entry.details.update({key: value[:DETAIL_MAX] for key, value in details.items()})


def by(user_id: str) -> None:
    """Say who acted, where the call itself proved it (a sign-in)."""
    entry = _entry.get()
    if entry is not None:
        entry.actor_user_id = user_id


def done() -> None:
    """Say that the act has changed something, which hanging up does not undo: a stranger's is written down all the same."""
    entry = _entry.get()
    if entry is not None:
        entry.lasting = True


class Recorder:
    """Writes entries of the calls that one server serves."""

    def __init__(self, trail: AuditTrail) -> None:
        self._trail = trail
        self._counted: OrderedDict[str, tuple[float, int]] = OrderedDict()

    @asynccontextmanager
    async def around(self, method: str, request: Message, access: options_pb2.Access.ValueType) -> AsyncGenerator[None]:
        """Around an act of the current principal: its entry, and how it ended.

        Raises UNAVAILABLE if the entry cannot be written, RESOURCE_EXHAUSTED (LIMIT_REACHED) for somebody who acts too often.
        """
        principal = current_principal()
        if access == options_pb2.ACCESS_USER and not self._room(principal):
            bound = f"too many changes of this account: at most {ACTS_PER_MINUTE} in 1 minute"
            raise limit_reached("audited_acts", bound, retry_after_s=WINDOW_S)
        async with _recorded(self._trail, method, request, principal, first=access != options_pb2.ACCESS_PUBLIC):
            yield

    async def refused(self, method: str, request: Message, principal: Principal, refusal: MeshError) -> None:
        """Write down that somebody known tried what they may not do. Beyond a rate, and without the trail, the log has it."""
        entry = _begun(method, request, principal)
        _end(entry, refusal.code, Reason.Name(refusal.reason))
        if self._room(principal):
            await _finish(self._trail, entry, first=False)
        else:
            _log.warning("audit.refused", **asdict(entry))

    def _room(self, principal: Principal) -> bool:
        who, now = principal.user_id or "", time.monotonic()
        since, count = self._counted.pop(who, (now, 0))
        if now - since >= WINDOW_S:
            since, count = now, 0
        self._counted[who] = since, count + 1
        if len(self._counted) > COUNTED_MAX:
            self._counted.popitem(last=False)
        return count < ACTS_PER_MINUTE


@asynccontextmanager
async def _recorded(trail: AuditTrail, method: str, request: Message, principal: Principal, *, first: bool) -> AsyncGenerator[None]:
    entry = _begun(method, request, principal)
    if first:
        await _begin(trail, entry)
    token = _entry.set(entry)
    tell = True
    try:
        yield
        _end(entry, grpc.StatusCode.OK, "")
    except MeshError as refusal:
        _end(entry, refusal.code, Reason.Name(refusal.reason))
        tell = first or refusal.reason in RECORDED_OF_STRANGERS
        raise
    except asyncio.CancelledError:
        # The caller is gone, and may have what it came for. A stranger who got nothing is not counted by throttling, either.
        _end(entry, grpc.StatusCode.CANCELLED, "")
        tell = first or entry.lasting
        raise
    except BaseException:
        _end(entry, grpc.StatusCode.INTERNAL, "")
        raise
    finally:
        _entry.reset(token)
        if tell:
            await _finish(trail, entry, first=first)


def _begun(method: str, request: Message, principal: Principal) -> AuditEntry:
    entry = AuditEntry(
        audit_entry_id=str(uuid7()),
        method=method.removeprefix("/"),
        actor_user_id=principal.user_id or "",
        actor_api_key_id=principal.api_key_id or "",
        actor_service=principal.service if principal.user_id is None and principal.service not in (None, EDGE) else "",
        client_address=principal.client_address,
        request_id=principal.request_id,
    )
    for name in SUBJECT_FIELDS:
        if name in request.DESCRIPTOR.fields_by_name and (value := str(getattr(request, name))):
            entry.subject = value[:SUBJECT_MAX]
            break
    return entry


def _end(entry: AuditEntry, code: grpc.StatusCode, reason: str) -> None:
    number: int = code.value[0]
    entry.code, entry.reason = number, reason


async def _begin(trail: AuditTrail, entry: AuditEntry) -> None:
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await trail.begin(entry)
    except Exception as error:
        _log.error("audit.unwritten", method=entry.method, error=repr(error))
        raise unavailable("this act has to be written down first, and that is impossible right now") from error


async def _finish(trail: AuditTrail, entry: AuditEntry, *, first: bool) -> None:
    """Write the outcome (with `first`, of an entry that was begun), to the end: hanging up is no way around the trail."""
    finishing = asyncio.ensure_future(_write_outcome(trail, entry, first=first))
    _finishing.add(finishing)
    finishing.add_done_callback(_finishing.discard)
    await asyncio.shield(finishing)


async def _write_outcome(trail: AuditTrail, entry: AuditEntry, *, first: bool) -> None:
    """What was done stays done, so a trail that is away only costs the outcome."""
    for attempt in range(1, FINISH_ATTEMPTS + 1):
        if attempt > 1:
            await asyncio.sleep(FINISH_PAUSE_S)
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await (trail.finish(entry) if first else trail.begin(entry))
        except Exception as error:
            # The line has all that the entry would have had.
            _log.error("audit.outcome_unwritten", attempt=attempt, error=repr(error), **asdict(entry))
        else:
            return


class LogTrail:
    """Entries as log lines, for servers without a gateway: tests and tools."""

    async def begin(self, entry: AuditEntry) -> None:
        """See AuditTrail."""
        _log.info("audit", **asdict(entry))

    async def finish(self, entry: AuditEntry) -> None:
        """See AuditTrail."""
        await self.begin(entry)


class RemoteTrail:
    """Entries in the gateway's keeping."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = identity_pb2_grpc.AuditServiceStub(channel)

    async def begin(self, entry: AuditEntry) -> None:
        """See AuditTrail."""
        message = identity_pb2.AuditEntry(
            audit_entry_id=entry.audit_entry_id,
            actor_user_id=entry.actor_user_id,
            actor_api_key_id=entry.actor_api_key_id,
            actor_service=entry.actor_service,
            method=entry.method,
            subject=entry.subject,
            client_address=entry.client_address,
            request_id=entry.request_id,
            details=entry.details,
            code=entry.code,
            reason=entry.reason,
        )
        try:
            await self._stub.BeginAuditEntry(
                identity_pb2.BeginAuditEntryRequest(entry=message), metadata=call_metadata(), timeout=WRITE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def finish(self, entry: AuditEntry) -> None:
        """See AuditTrail."""
        request = identity_pb2.FinishAuditEntryRequest(
            audit_entry_id=entry.audit_entry_id,
            code=entry.code or 0,
            reason=entry.reason,
            details=entry.details,
            subject=entry.subject,
        )
        try:
            await self._stub.FinishAuditEntry(request, metadata=call_metadata(), timeout=WRITE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
