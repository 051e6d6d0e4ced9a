"""IdentityAdminService: messages to domain calls and back."""

import uuid
from dataclasses import asdict
from datetime import datetime
from typing import Any

import grpc

from gateway.accounts import Accounts
from gateway.admin import Administration
from gateway.audit import AuditLog
from gateway.messages import moment, timestamp, user_message
from gateway.store import AuditFilter, AuditRow
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit import audit
from servicekit.identity import current_user_id

Context = grpc.aio.ServicerContext[Any, Any]


def audit_entry_message(row: AuditRow) -> identity_pb2.AuditEntry:
    """An entry as administrators see it."""
    return identity_pb2.AuditEntry(
        audit_entry_id=str(row.audit_entry_id),
        act_time=timestamp(row.act_time),
        actor_user_id=str(row.actor_user_id or ""),
        actor_api_key_id=str(row.actor_api_key_id or ""),
        actor_service=row.actor_service,
        method=row.method,
        subject=row.subject,
        client_address=row.client_address,
        request_id=row.request_id,
        details=row.details,
        code=row.code,
        reason=row.reason or "",
        reporter=row.reporter or "",
    )


class IdentityAdminServicer(identity_pb2_grpc.IdentityAdminServiceServicer):
    """See IdentityAdminService in the proto."""

    def __init__(self, accounts: Accounts, administration: Administration, audit_log: AuditLog) -> None:
        self._accounts = accounts
        self._administration = administration
        self._audit_log = audit_log

    async def ListUsers(self, request: identity_pb2.ListUsersRequest, context: Context) -> identity_pb2.ListUsersResponse:
        """See the proto."""
        if request.email:
            audit.about(email=request.email)
        page = await self._accounts.list_page(page_size=request.page_size, page_token=request.page_token, email=request.email)
        return identity_pb2.ListUsersResponse(users=map(user_message, page.accounts), next_page_token=page.next_page_token)

    async def UpdateUser(self, request: identity_pb2.UpdateUserRequest, context: Context) -> identity_pb2.UpdateUserResponse:
        """See the proto."""
        # What is asked for: an entry of a refused act has to say what was tried, too.
        if request.HasField("plan"):
            audit.about(plan=identity_pb2.Plan.Name(request.plan))
        if request.HasField("roles"):
            audit.about(roles=",".join(sorted(request.roles.roles)))
        if request.HasField("disabled"):
            audit.about(disabled=str(request.disabled).lower())
        account = await self._administration.update(
            uuid.UUID(request.user_id),
            actor_id=current_user_id(),
            plan=identity_pb2.Plan.Name(request.plan) if request.HasField("plan") else None,
            roles=list(request.roles.roles) if request.HasField("roles") else None,
            disabled=request.disabled if request.HasField("disabled") else None,
        )
        return identity_pb2.UpdateUserResponse(user=user_message(account))

    async def ListAuditEntries(
        self, request: identity_pb2.ListAuditEntriesRequest, context: Context
    ) -> identity_pb2.ListAuditEntriesResponse:
        """See the proto."""
        selection = AuditFilter(
            actor_user_id=uuid.UUID(request.actor_user_id) if request.actor_user_id else None,
            # No entry has NUL in it; PostgreSQL would refuse the question.
            subject=request.subject.replace("\0", "\ufffd"),
            method=request.method.replace("\0", "\ufffd"),
            start_time=moment(request.start_time, "start_time") if request.HasField("start_time") else None,
            end_time=moment(request.end_time, "end_time") if request.HasField("end_time") else None,
        )
        audit.about(
            **{
                f"filter_{name}": value.isoformat() if isinstance(value, datetime) else str(value)
                for name, value in asdict(selection).items()
                if value
            }
        )
        rows, next_page_token = await self._audit_log.list_page(selection, page_size=request.page_size, page_token=request.page_token)
        return identity_pb2.ListAuditEntriesResponse(audit_entries=map(audit_entry_message, rows), next_page_token=next_page_token)
