"""What the gateway tells the other services of the mesh, and takes from them: RevocationService and AuditService."""

from typing import Any

import grpc
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import revocations
from gateway.audit import PACKAGES, AuditLog
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.audit import AuditEntry
from servicekit.errors import permission_denied
from servicekit.identity import current_principal
from servicekit.paging import PAGE_SIZE_DEFAULT
from servicekit.revocations import PAGE_SIZE, Revoked

Context = grpc.aio.ServicerContext[Any, Any]


class RevocationServicer(identity_pb2_grpc.RevocationServiceServicer):
    """See RevocationService in the proto."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def ListRevocations(self, request: identity_pb2.ListRevocationsRequest, context: Context) -> identity_pb2.ListRevocationsResponse:
        """See the proto."""
        limit = min(request.page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE)
        revoked, cursor, more = await revocations.page(self._engine, cursor=request.cursor, limit=limit)
        return identity_pb2.ListRevocationsResponse(revocations=map(_revocation, revoked), cursor=cursor, more=more)


def _revocation(revoked: Revoked) -> identity_pb2.Revocation:
    message = identity_pb2.Revocation()
    match revoked.kind:
        case "session":
            message.session_id = revoked.subject_id
        case "api_key":
            message.api_key_id = revoked.subject_id
        case "user":
            message.user_id = revoked.subject_id
    message.revoke_time.FromMilliseconds(round(revoked.revoke_time * 1000))
    return message


class AuditServicer(identity_pb2_grpc.AuditServiceServicer):
    """See AuditService in the proto."""

    def __init__(self, audit_log: AuditLog) -> None:
        self._audit_log = audit_log

    async def BeginAuditEntry(self, request: identity_pb2.BeginAuditEntryRequest, context: Context) -> identity_pb2.BeginAuditEntryResponse:
        """See the proto."""
        entry = request.entry
        await self._audit_log.begin(
            AuditEntry(
                audit_entry_id=entry.audit_entry_id,
                method=entry.method,
                actor_user_id=entry.actor_user_id,
                actor_api_key_id=entry.actor_api_key_id,
                actor_service=entry.actor_service,
                subject=entry.subject,
                client_address=entry.client_address,
                request_id=entry.request_id,
                details=dict(entry.details),
                code=entry.code if entry.HasField("code") else None,
                reason=entry.reason,
            ),
            reporter=_reporter(),
        )
        return identity_pb2.BeginAuditEntryResponse()

    async def FinishAuditEntry(
        self, request: identity_pb2.FinishAuditEntryRequest, context: Context
    ) -> identity_pb2.FinishAuditEntryResponse:
        """See the proto."""
        await self._audit_log.finish(
            AuditEntry(
                audit_entry_id=request.audit_entry_id,
                method="",
                code=request.code,
                reason=request.reason,
                subject=request.subject,
                details=dict(request.details),
            ),
            reporter=_reporter(),
        )
        return identity_pb2.FinishAuditEntryResponse()


def _reporter() -> str:
    service = current_principal().service
    if service not in PACKAGES:
        raise permission_denied("this service reports no acts")
    return service
