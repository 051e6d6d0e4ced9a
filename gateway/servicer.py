"""IdentityService and MembershipService: messages to domain calls and back."""

import uuid
from typing import Any

import grpc

from gateway import cookies
from gateway.accounts import Accounts, Tokens
from gateway.api_keys import ApiKeys
from gateway.api_keys_servicer import ApiKeysServicer
from gateway.identity import Account, LinkedIdentity
from gateway.messages import timestamp, user_message
from gateway.oidc import SCOPE, Code, IdToken, Proof, Providers
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.errors import MeshError
from servicekit.identity import current_principal, current_user_id

Context = grpc.aio.ServicerContext[Any, Any]


class IdentityServicer(ApiKeysServicer):
    """See IdentityService in the proto; its methods on API keys are in `api_keys_servicer`."""

    def __init__(self, accounts: Accounts, providers: Providers, api_keys: ApiKeys, *, cookie_max_age_s: int) -> None:
        """`cookie_max_age_s`: how long a browser keeps a refresh token."""
        self._accounts = accounts
        self._providers = providers
        self.api_keys = api_keys
        self._cookie_max_age_s = cookie_max_age_s

    async def RegisterUser(self, request: identity_pb2.RegisterUserRequest, context: Context) -> identity_pb2.RegisterUserResponse:
        """See the proto."""
        account = await self._accounts.register(
            email=request.email, password=request.password, display_name=request.display_name, client_address=_client_address()
        )
        return identity_pb2.RegisterUserResponse(user=user_message(account))

    async def GetSignInOptions(
        self, request: identity_pb2.GetSignInOptionsRequest, context: Context
    ) -> identity_pb2.GetSignInOptionsResponse:
        """See the proto."""
        offer = await self._providers.offer()
        response = identity_pb2.GetSignInOptionsResponse()
        if offer.google_client_id:
            response.google.client_id = offer.google_client_id
            response.google.authorization_endpoint = offer.authorization_endpoint
            response.google.scope = SCOPE
            response.google.redirect_uris.extend(offer.redirect_uris)
        if offer.firebase_project_id:
            response.firebase.project_id = offer.firebase_project_id
        return response

    async def SignIn(self, request: identity_pb2.SignInRequest, context: Context) -> identity_pb2.SignInResponse:
        """See the proto."""
        match request.WhichOneof("credential"):
            case "password":
                password = request.password
                tokens = await self._accounts.sign_in(email=password.email, password=password.password, client_address=_client_address())
            case "api_key":
                tokens = await self.api_keys.sign_in(request.api_key, client_address=_client_address())
            case _:
                tokens = await self._accounts.sign_in_elsewhere(_proof(request), client_address=_client_address())
        in_cookie = request.refresh_token_cookie and tokens.refresh_token != ""
        response = identity_pb2.SignInResponse(
            access_token=tokens.access_token,
            expire_time=timestamp(tokens.expire_time),
            refresh_token="" if in_cookie else tokens.refresh_token,
            user=user_message(tokens.account),
        )
        await self._send_metadata(context, tokens, in_cookie=in_cookie)
        return response

    async def RefreshSession(self, request: identity_pb2.RefreshSessionRequest, context: Context) -> identity_pb2.RefreshSessionResponse:
        """See the proto. A token in the request is one that the caller chose; the cookie comes along by itself and then stays as it is."""
        in_cookie = request.refresh_token == ""
        refresh_token = cookies.refresh_token(context.invocation_metadata()) if in_cookie else request.refresh_token
        try:
            tokens = await self._accounts.refresh(refresh_token, client_address=_client_address())
        except MeshError as error:
            # A refused token is of no session that lives, nor is what another tab got for it: the browser need not send it again.
            if error.code is grpc.StatusCode.UNAUTHENTICATED and in_cookie and refresh_token:
                await context.send_initial_metadata((cookies.forget(),))
            raise
        response = identity_pb2.RefreshSessionResponse(
            access_token=tokens.access_token,
            expire_time=timestamp(tokens.expire_time),
            refresh_token="" if in_cookie else tokens.refresh_token,
            user=user_message(tokens.account),
        )
        await self._send_metadata(context, tokens, in_cookie=in_cookie)
        return response

    async def SignOut(self, request: identity_pb2.SignOutRequest, context: Context) -> identity_pb2.SignOutResponse:
        """See the proto."""
        user_id = uuid.UUID(current_user_id())
        if request.refresh_token:
            await self._accounts.sign_out(user_id, refresh_token=request.refresh_token)
            return identity_pb2.SignOutResponse()
        cookie = cookies.refresh_token(context.invocation_metadata())
        ended = cookie != "" and await self._accounts.sign_out(user_id, refresh_token=cookie)
        session_id = _session_id()
        # A cookie that is stale, or another account's, must not keep this one signed in.
        if not ended and session_id is not None:
            await self._accounts.sign_out_session(user_id, session_id)
        if cookie:
            await context.send_initial_metadata((cookies.forget(),))
        return identity_pb2.SignOutResponse()

    async def GetMe(self, request: identity_pb2.GetMeRequest, context: Context) -> identity_pb2.GetMeResponse:
        """See the proto."""
        account = await self._accounts.get(uuid.UUID(current_user_id()))
        return identity_pb2.GetMeResponse(user=user_message(account))

    async def LinkIdentity(self, request: identity_pb2.LinkIdentityRequest, context: Context) -> identity_pb2.LinkIdentityResponse:
        """See the proto."""
        await self._accounts.link(uuid.UUID(current_user_id()), _session_id(), _proof(request), client_address=_client_address())
        return identity_pb2.LinkIdentityResponse()

    async def ListIdentities(self, request: identity_pb2.ListIdentitiesRequest, context: Context) -> identity_pb2.ListIdentitiesResponse:
        """See the proto."""
        linked = await self._accounts.list_identities(uuid.UUID(current_user_id()))
        return identity_pb2.ListIdentitiesResponse(identities=map(_linked_identity, linked))

    async def UnlinkIdentity(self, request: identity_pb2.UnlinkIdentityRequest, context: Context) -> identity_pb2.UnlinkIdentityResponse:
        """See the proto."""
        await self._accounts.unlink(uuid.UUID(current_user_id()), _session_id(), uuid.UUID(request.identity_id))
        return identity_pb2.UnlinkIdentityResponse()

    async def _send_metadata(self, context: Context, tokens: Tokens, *, in_cookie: bool) -> None:
        """The last thing of a call: it goes out at once, and with a cookie in it the client has what it came for."""
        kept = (cookies.keep(tokens.refresh_token, max_age_s=self._cookie_max_age_s),) if in_cookie else ()
        # RFC 6749, 5.1: answers with tokens are nothing for caches.
        await context.send_initial_metadata((("cache-control", "no-store"), *kept))


def _client_address() -> str:
    return current_principal().client_address


def _session_id() -> uuid.UUID | None:
    session_id = current_principal().session_id
    return uuid.UUID(session_id) if session_id is not None else None


def _linked_identity(linked: LinkedIdentity) -> identity_pb2.LinkedIdentity:
    return identity_pb2.LinkedIdentity(identity_id=str(linked.identity_id), issuer=linked.issuer, create_time=timestamp(linked.create_time))


def _proof(request: identity_pb2.SignInRequest | identity_pb2.LinkIdentityRequest) -> Proof:
    if request.HasField("google_code"):
        code = request.google_code
        return Code(code=code.code, code_verifier=code.code_verifier, redirect_uri=code.redirect_uri, nonce=code.nonce)
    if request.HasField("google_id_token"):
        return IdToken("google_id_token", request.google_id_token)
    return IdToken("firebase_id_token", request.firebase_id_token)


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
        plan_start_time=timestamp(account.plan_start_time),
    )
