"""Who calls the gateway in its tests: people with accounts, administrators, programs with keys."""

import uuid
from dataclasses import dataclass
from typing import Any

import jwt

from genmesh.identity.v1 import identity_pb2

PASSWORD = "correct horse battery"

Metadata = list[tuple[str, str]]


def bearer(token: str) -> Metadata:
    """Call metadata of somebody with an access token."""
    return [("authorization", f"Bearer {token}")]


@dataclass(frozen=True)
class Person:
    """Somebody with an account and a session."""

    user: identity_pb2.User
    access_token: str
    refresh_token: str

    @property
    def metadata(self) -> Metadata:
        """What proves this person."""
        return bearer(self.access_token)

    @property
    def user_id(self) -> uuid.UUID:
        """The account."""
        return uuid.UUID(self.user.user_id)


def fresh_email() -> str:
    """An address that nobody has."""
    return f"somebody-{uuid.uuid4().hex}@example.org"


async def sign_in(gateway: Any, email: str) -> Person:
    """A new session."""
    credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
    session = await gateway.users.SignIn(identity_pb2.SignInRequest(password=credential))
    return Person(session.user, session.access_token, session.refresh_token)


async def person(gateway: Any) -> Person:
    """Somebody new."""
    email = fresh_email()
    await gateway.users.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
    return await sign_in(gateway, email)


async def admin(gateway: Any) -> Person:
    """A new administrator."""
    email = fresh_email()
    await gateway.accounts.ensure_admin(email=email, password=PASSWORD)
    return await sign_in(gateway, email)


async def update(gateway: Any, by: Person, user_id: uuid.UUID | str, **changes: Any) -> identity_pb2.User:
    """What an administrator does to an account."""
    if "roles" in changes:
        changes["roles"] = identity_pb2.Roles(roles=changes["roles"])
    request = identity_pb2.UpdateUserRequest(user_id=str(user_id), **changes)
    return (await gateway.admin.UpdateUser(request, metadata=by.metadata)).user


async def create_key(gateway: Any, owner: Person, *scopes: str, **wanted: Any) -> identity_pb2.CreateApiKeyResponse:
    """A key of somebody, with its secret."""
    named = [identity_pb2.ApiKeyScope.Value(f"API_KEY_SCOPE_{scope.upper()}") for scope in scopes or ("read",)]
    values: dict[str, Any] = {"display_name": "ci", "scopes": named} | wanted
    return await gateway.users.CreateApiKey(identity_pb2.CreateApiKeyRequest(**values), metadata=owner.metadata)


async def revoke_key(gateway: Any, owner: Person, api_key_id: str) -> identity_pb2.ApiKey:
    """End a key."""
    return (await gateway.users.RevokeApiKey(identity_pb2.RevokeApiKeyRequest(api_key_id=api_key_id), metadata=owner.metadata)).api_key


def key_sign_in(gateway: Any, secret: str, metadata: Metadata | None = None) -> Any:
    """The call that changes a key for an access token."""
    return gateway.users.SignIn(identity_pb2.SignInRequest(api_key=secret), metadata=metadata or [])


def get_me(gateway: Any, token: str) -> Any:
    """A call that any token with the scope `read` may make."""
    return gateway.users.GetMe(identity_pb2.GetMeRequest(), metadata=bearer(token))


def claims_of(token: str) -> dict[str, Any]:
    """What a token says."""
    return jwt.decode(token, options={"verify_signature": False})
