"""IdentityService, IdentityAdminService and MembershipService: messages to domain calls and back."""

import uuid
from datetime import datetime
from typing import Any

import grpc
from google.protobuf import timestamp_pb2

from gateway.accounts import Accounts
from gateway.identity import Account
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.errors import MeshError, Reason
from servicekit.identity import current_user_id

Context = grpc.aio.ServicerContext[Any, Any]


def _timestamp(time: datetime) -> timestamp_pb2.Timestamp:
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time)
    return message


def user_message(account: Account) -> identity_pb2.User:
    """An account as clients see it."""
    return identity_pb2.User(
        user_id=str(account.user_id),
        email=account.email,
        display_name=account.display_name,
        roles=account.roles,
        plan=identity_pb2.Plan.Value(account.plan),
        create_time=_timestamp(account.create_time),
    )


class IdentityServicer(identity_pb2_grpc.IdentityServiceServicer):
    """See IdentityService in the proto."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def RegisterUser(self, request: identity_pb2.RegisterUserRequest, context: Context) -> identity_pb2.RegisterUserResponse:
        """See the proto."""
        account = await self._accounts.register(email=request.email, password=request.password, display_name=request.display_name)
        return identity_pb2.RegisterUserResponse(user=user_message(account))

    async def SignIn(self, request: identity_pb2.SignInRequest, context: Context) -> identity_pb2.SignInResponse:
        """See the proto."""
        credential = request.WhichOneof("credential")
        if credential != "password":
            raise MeshError(
                grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED, f"sign-in by {credential} is not offered; use a password"
            )
        tokens = await self._accounts.sign_in(email=request.password.email, password=request.password.password)
        return identity_pb2.SignInResponse(
            access_token=tokens.access_token,
            expire_time=_timestamp(tokens.expire_time),
            refresh_token=tokens.refresh_token,
            user=user_message(tokens.account),
        )

    async def RefreshSession(self, request: identity_pb2.RefreshSessionRequest, context: Context) -> identity_pb2.RefreshSessionResponse:
        """See the proto."""
        tokens = await self._accounts.refresh(request.refresh_token)
        return identity_pb2.RefreshSessionResponse(
            access_token=tokens.access_token,
            expire_time=_timestamp(tokens.expire_time),
            refresh_token=tokens.refresh_token,
            user=user_message(tokens.account),
        )

    async def SignOut(self, request: identity_pb2.SignOutRequest, context: Context) -> identity_pb2.SignOutResponse:
        """See the proto."""
        await self._accounts.sign_out(uuid.UUID(current_user_id()), request.refresh_token)
        return identity_pb2.SignOutResponse()

    async def GetMe(self, request: identity_pb2.GetMeRequest, context: Context) -> identity_pb2.GetMeResponse:
        """See the proto."""
        account = await self._accounts.get(uuid.UUID(current_user_id()))
        return identity_pb2.GetMeResponse(user=user_message(account))


class IdentityAdminServicer(identity_pb2_grpc.IdentityAdminServiceServicer):
    """See IdentityAdminService in the proto."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def ListUsers(self, request: identity_pb2.ListUsersRequest, context: Context) -> identity_pb2.ListUsersResponse:
        """See the proto."""
        page = await self._accounts.list_page(page_size=request.page_size, page_token=request.page_token, email=request.email)
        return identity_pb2.ListUsersResponse(users=map(user_message, page.accounts), next_page_token=page.next_page_token)

    async def UpdateUser(self, request: identity_pb2.UpdateUserRequest, context: Context) -> identity_pb2.UpdateUserResponse:
        """See the proto."""
        plan = identity_pb2.Plan.Name(request.plan) if request.HasField("plan") else None
        account = await self._accounts.update(uuid.UUID(request.user_id), actor_id=current_user_id(), plan=plan)
        return identity_pb2.UpdateUserResponse(user=user_message(account))


class MembershipServicer(identity_pb2_grpc.MembershipServiceServicer):
    """See MembershipService in the proto."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def ListMembers(self, request: identity_pb2.ListMembersRequest, context: Context) -> identity_pb2.ListMembersResponse:
        """See the proto."""
        page = await self._accounts.member_page(page_size=request.page_size, page_token=request.page_token)
        return identity_pb2.ListMembersResponse(members=map(_member, page.accounts), next_page_token=page.next_page_token)


def _member(account: Account) -> identity_pb2.Member:
    return identity_pb2.Member(
        user_id=str(account.user_id),
        plan=identity_pb2.Plan.Value(account.plan),
        plan_start_time=_timestamp(account.plan_start_time),
    )
