"""Who calls credit_service in its tests: signers of access tokens, and how a refusal reads at the caller's end."""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from jwt.algorithms import OKPAlgorithm

from servicekit.errors import DOMAIN

KEY_ID = "test-key"


class Signer:
    """Makes access tokens as the gateway does, and shows the public key as a KeySource and as a key set."""

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()
        jwk: dict[str, Any] = OKPAlgorithm.to_jwk(self._private.public_key(), as_dict=True)
        self._jwk = {**jwk, "kid": KEY_ID, "alg": "EdDSA", "use": "sig"}

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """See KeySource."""
        return jwt.PyJWK.from_dict(self._jwk) if key_id == KEY_ID else None

    def key_set_page(self) -> tuple[str, bytes]:
        """The key set, as the gateway serves it."""
        return "application/json", json.dumps({"keys": [self._jwk]}).encode()

    def metadata(self, user_id: uuid.UUID | str, *roles: str, api_key_id: str | None = None) -> tuple[tuple[str, str], ...]:
        """Call metadata that proves a user, who may be signed in with an API key."""
        now = int(time.time())
        claims = {
            "iss": "https://genmesh.internal",
            "aud": "genmesh",
            "sub": str(user_id),
            "iat": now,
            "exp": now + 900,
            "jti": str(uuid.uuid4()),
            "roles": list(roles),
            "plan": "PLAN_FREE",
        }
        if api_key_id is not None:
            claims |= {"api_key_id": api_key_id, "scopes": ["read", "submit", "admin"]}
        token = jwt.encode(claims, self._private, algorithm="EdDSA", headers={"kid": KEY_ID})
        return (("authorization", f"Bearer {token}"),)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client learns from a refused call."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    fields: tuple[str, ...]


def refusal_of(error: Any) -> Refusal:
    """Read a refusal; every one has exactly one ErrorInfo of our domain."""
    status = rpc_status.from_call(error)
    assert status is not None
    infos: list[error_details_pb2.ErrorInfo] = []
    fields: list[str] = []
    for detail in status.details:
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            infos.append(info)
        elif detail.Unpack(bad_request):
            fields += [violation.field for violation in bad_request.field_violations]
    assert [info.domain for info in infos] == [DOMAIN]
    return Refusal(error.code(), infos[0].reason.removeprefix("ERROR_REASON_"), dict(infos[0].metadata), tuple(fields))


async def refused(call: "grpc.aio.UnaryUnaryCall[Any, Any]") -> Refusal:
    """Await a call that has to be refused."""
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError(f"was not refused, but answered {response}")
