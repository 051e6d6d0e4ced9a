"""Sign-in as clients meet it: the real gateway behind the real Envoy, by gRPC, grpc-web and JSON alike."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import jwt
import pytest
import pytest_asyncio
from google.protobuf import json_format

from genmesh.identity.v1 import identity_pb2
from tests import canned_mesh
from tests.e2e.caller import (
    GET_ME,
    GET_SIGN_IN_OPTIONS,
    GRPC_WEB,
    LINK_IDENTITY,
    LIST_IDENTITIES,
    REFRESH_SESSION,
    REGISTER_USER,
    SIGN_IN,
    SIGN_OUT,
    UNLINK_IDENTITY,
    Edge,
    Method,
    Transport,
    bearer,
    frame,
    frames,
    refused,
)
from tests.service.gateway.issuer import (
    CLIENT_ID,
    CLIENT_SECRET,
    PROJECT_ID,
    REDIRECT_URI,
    Issuer,
    challenge_of,
    rsa_key,
    running_issuer,
    signed_with_public_key,
    unsigned,
)

PASSWORD = "correct horse battery"
WRONG = "wrong horse battery"
COOKIE = "__Host-genmesh_refresh"
TRANSPORTS = list(Transport)
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def issuer() -> Generator[Issuer]:
    with running_issuer() as running:
        yield running


@pytest_asyncio.fixture(scope="module")
async def edge(start_gateway: Any, issuer: Issuer, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Edge]:
    """Envoy in front of a gateway whose limits are as they are for everybody, but for registrations."""
    gateway = await start_gateway(
        google_issuer=issuer.url,
        google_client_ids=(CLIENT_ID,),
        google_client_secret=CLIENT_SECRET,
        google_redirect_uris=(REDIRECT_URI,),
        firebase_project_id=PROJECT_ID,
        firebase_issuer=issuer.url,
    )
    places: dict[str, Any] = {"gateway_addresses": (f"127.0.0.1:{gateway.port}",), "jwks_address": urlsplit(gateway.jwks_url).netloc}
    directory = tmp_path_factory.mktemp("envoy")
    async with canned_mesh.canned_mesh(certificates) as mesh, mesh.edge(directory, **places) as running:
        yield Edge(None, running.channel, running.http)  # pyright: ignore[reportArgumentType]  # of no stack


async def register(edge: Edge) -> str:
    email = f"ann-{uuid.uuid4().hex}@example.org"
    await edge.call(REGISTER_USER, identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
    return email


def by_password(email: str, password: str = PASSWORD, *, cookie: bool = False) -> identity_pb2.SignInRequest:
    return identity_pb2.SignInRequest(password=identity_pb2.PasswordCredential(email=email, password=password), refresh_token_cookie=cookie)


FORGED: dict[str, Callable[[Issuer], str]] = {
    "alg none": lambda issuer: unsigned(issuer.claims(), kid=issuer.key_id),
    "HS256 with the public key": lambda issuer: signed_with_public_key(issuer.claims(), issuer.key, issuer.key_id),
    "another key": lambda issuer: issuer.sign(issuer.claims(), key=rsa_key(2)),
    "another issuer": lambda issuer: issuer.sign(issuer.claims(iss="https://accounts.evil.example")),
    "another audience": lambda issuer: issuer.sign(issuer.claims(aud="somebody.else", azp=None)),
    "expired": lambda issuer: issuer.sign(issuer.claims(exp=int(time.time()) - 60)),
    "unverified address": lambda issuer: issuer.sign(issuer.claims(email_verified=False)),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
async def test_forged_id_tokens(edge: Edge, issuer: Issuer, transport: Transport, forge: Any) -> None:
    refusal = await refused(edge.call(SIGN_IN, identity_pb2.SignInRequest(google_id_token=forge(issuer)), transport=transport))
    assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "ID_TOKEN_INVALID")
    assert refusal.http_status == (401 if transport is Transport.JSON else None)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_else_is_refused(edge: Edge, issuer: Issuer, transport: Transport) -> None:
    def call(request: identity_pb2.SignInRequest) -> Any:
        return refused(edge.call(SIGN_IN, request, transport=transport))

    email = await register(edge)
    wrong = await call(by_password(email, WRONG))
    unknown = await call(by_password(f"x{email}", WRONG))
    assert (wrong.code, wrong.reason) == (Code.UNAUTHENTICATED, "BAD_CREDENTIALS")
    assert str(unknown) == str(wrong)
    assert (await call(identity_pb2.SignInRequest(api_key="gmk_" + "x" * 56))).reason == "API_KEY_INVALID"
    assert (await call(identity_pb2.SignInRequest(firebase_id_token="x"))).reason == "ID_TOKEN_INVALID"
    assert (await call(identity_pb2.SignInRequest())).code is Code.INVALID_ARGUMENT
    code = identity_pb2.AuthorizationCode(code="x", code_verifier="v" * 43, redirect_uri="https://evil.example/", nonce="n" * 16)
    assert (await call(identity_pb2.SignInRequest(google_code=code))).code is Code.INVALID_ARGUMENT
    code.redirect_uri = REDIRECT_URI
    assert (await call(identity_pb2.SignInRequest(google_code=code))).reason == "ID_TOKEN_INVALID"
    forged = identity_pb2.LinkIdentityRequest(google_id_token=issuer.sign(issuer.claims(), key=rsa_key(2)))
    assert (await refused(edge.call(LINK_IDENTITY, forged, transport=transport))).code is Code.UNAUTHENTICATED
    session = await edge.call(SIGN_IN, by_password(email), transport=transport)
    refusal = await refused(edge.call(LINK_IDENTITY, forged, session.access_token, transport))
    assert refusal.reason == "ID_TOKEN_INVALID"
    refusal = await refused(edge.call(REFRESH_SESSION, identity_pb2.RefreshSessionRequest(refresh_token="x"), transport=transport))
    assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_guessing(edge: Edge, transport: Transport) -> None:
    email = await register(edge)
    for _ in range(5):
        await refused(edge.call(SIGN_IN, by_password(email, WRONG), transport=transport))
    # Where a call comes from is not the caller's to say.
    for headers in ({}, {"x-client-address": "192.0.2.1"}, {"x-forwarded-for": "192.0.2.1"}):
        refusal = await refused(edge.call(SIGN_IN, by_password(email), transport=transport, headers=headers))
        assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
        assert refusal.http_status == (429 if transport is Transport.JSON else None)
        assert "try again in" in refusal.message


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_way_in(edge: Edge, issuer: Issuer, transport: Transport) -> None:
    options = await edge.call(GET_SIGN_IN_OPTIONS, identity_pb2.GetSignInOptionsRequest(), transport=transport)
    assert (options.google.client_id, options.firebase.project_id) == (CLIENT_ID, PROJECT_ID)
    code = issuer.authorize(challenge=challenge_of("v" * 43), nonce="n" * 16)
    ways = (
        by_password(await register(edge)),
        identity_pb2.SignInRequest(google_id_token=issuer.sign(issuer.claims())),
        identity_pb2.SignInRequest(firebase_id_token=issuer.sign(issuer.firebase_claims())),
        identity_pb2.SignInRequest(
            google_code=identity_pb2.AuthorizationCode(code=code, code_verifier="v" * 43, redirect_uri=REDIRECT_URI, nonce="n" * 16)
        ),
    )
    for request in ways:
        session = await edge.call(SIGN_IN, request, transport=transport)
        me = await edge.call(GET_ME, identity_pb2.GetMeRequest(), session.access_token, transport)
        assert me.user == session.user
        again = identity_pb2.RefreshSessionRequest(refresh_token=session.refresh_token)
        session = await edge.call(REFRESH_SESSION, again, transport=transport)
        await edge.call(SIGN_OUT, identity_pb2.SignOutRequest(), session.access_token, transport)
        again = identity_pb2.RefreshSessionRequest(refresh_token=session.refresh_token)
        assert (await refused(edge.call(REFRESH_SESSION, again, transport=transport))).code is Code.UNAUTHENTICATED


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_linking_listing_and_unlinking(edge: Edge, issuer: Issuer, transport: Transport) -> None:
    async def call(method: Method[Any, Any], request: Any) -> Any:
        return await edge.call(method, request, session.access_token, transport)

    claims = issuer.claims()
    session = await edge.call(SIGN_IN, identity_pb2.SignInRequest(google_id_token=issuer.sign(claims)))
    [only] = (await call(LIST_IDENTITIES, identity_pb2.ListIdentitiesRequest())).identities
    assert only.issuer == issuer.url
    refusal = await refused(call(UNLINK_IDENTITY, identity_pb2.UnlinkIdentityRequest(identity_id=only.identity_id)))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "LAST_IDENTITY")
    assert refusal.http_status == (400 if transport is Transport.JSON else None)
    session = await edge.call(SIGN_IN, by_password(await register(edge)))
    refusal = await refused(call(UNLINK_IDENTITY, identity_pb2.UnlinkIdentityRequest(identity_id=only.identity_id)))
    assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "NOT_FOUND")
    await call(LINK_IDENTITY, identity_pb2.LinkIdentityRequest(google_id_token=issuer.sign(issuer.claims())))
    [made] = (await call(LIST_IDENTITIES, identity_pb2.ListIdentitiesRequest())).identities
    await call(UNLINK_IDENTITY, identity_pb2.UnlinkIdentityRequest(identity_id=made.identity_id))
    assert not (await call(LIST_IDENTITIES, identity_pb2.ListIdentitiesRequest())).identities
    of_nobody: list[tuple[Method[Any, Any], Any]] = [
        (LIST_IDENTITIES, identity_pb2.ListIdentitiesRequest()),
        (UNLINK_IDENTITY, identity_pb2.UnlinkIdentityRequest(identity_id=only.identity_id)),
    ]
    for method, request in of_nobody:
        assert (await refused(edge.call(method, request, transport=transport))).code is Code.UNAUTHENTICATED


# --- cookies


async def in_browser(
    edge: Edge, method: Method[Any, Any], request: Any, transport: Transport, **headers: str
) -> tuple[Any, httpx.Response]:
    """The answer's message, and the answer as a browser gets it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if transport is Transport.JSON:
        reply = await edge.http.request(method.http, method.rest, json=json_format.MessageToDict(request), headers=named)
        return (json_format.ParseDict(reply.json(), method.response()) if reply.is_success else None), reply
    reply = await edge.http.post(method.path, content=frame(request.SerializeToString()), headers={**GRPC_WEB, **named})
    messages = [payload for flag, payload in frames(reply.content) if not flag & 0x80]
    return (method.response.FromString(messages[0]) if messages else None), reply


@pytest.mark.parametrize("transport", [Transport.GRPC_WEB, Transport.JSON])
async def test_a_browsers_session_lives_in_a_cookie(edge: Edge, transport: Transport) -> None:
    email = await register(edge)
    session, reply = await in_browser(edge, SIGN_IN, by_password(email, cookie=True), transport)
    [header] = reply.headers.get_list("set-cookie")
    pair, *attributes = header.split("; ")
    assert pair.startswith(f"{COOKIE}=")
    assert {"Path=/", "Secure", "HttpOnly", "SameSite=Strict"} <= set(attributes)
    assert (session.refresh_token, "no-store" in reply.headers["cache-control"]) == ("", True)
    session, reply = await in_browser(edge, REFRESH_SESSION, identity_pb2.RefreshSessionRequest(), transport, cookie=pair)
    [header] = reply.headers.get_list("set-cookie")
    new_pair = header.partition(";")[0]
    assert (session.user.email, new_pair != pair) == (email, True)
    authorization = bearer(session.access_token)["authorization"]
    request = identity_pb2.SignOutRequest()
    answer, reply = await in_browser(edge, SIGN_OUT, request, transport, cookie=new_pair, authorization=authorization)
    assert answer is not None
    [header] = reply.headers.get_list("set-cookie")
    assert header.startswith(f"{COOKIE}=; Max-Age=0;")
    answer, reply = await in_browser(edge, REFRESH_SESSION, identity_pb2.RefreshSessionRequest(), transport, cookie=new_pair)
    assert (answer, reply.headers["set-cookie"].startswith(f"{COOKIE}=; Max-Age=0;")) == (None, True)
    if transport is Transport.JSON:
        assert (reply.status_code, reply.json()["details"][0]["reason"]) == (401, "ERROR_REASON_REFRESH_TOKEN_INVALID")


@pytest.mark.parametrize("transport", [Transport.GRPC_WEB, Transport.JSON])
async def test_pages_of_others_cannot_use_the_cookie(edge: Edge, transport: Transport) -> None:
    _, reply = await in_browser(edge, SIGN_IN, by_password(await register(edge), cookie=True), transport)
    pair = reply.headers["set-cookie"].partition(";")[0]
    request = identity_pb2.RefreshSessionRequest()
    answer, _ = await in_browser(edge, REFRESH_SESSION, request, transport, cookie=pair, origin="https://evil.example")
    assert answer is None
    # It was not even used up.
    session, _ = await in_browser(edge, REFRESH_SESSION, request, transport, cookie=pair)
    assert jwt.decode(session.access_token, options={"verify_signature": False})["sub"] == session.user.user_id
