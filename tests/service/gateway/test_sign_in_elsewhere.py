"""Sign-in through other identity providers: real ones over HTTP on loopback, by the real server, over the real database."""

import asyncio
import os
import re
import secrets
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import httpx
import jwt
import pytest
import pytest_asyncio
import sqlalchemy as sa
import structlog

from gateway import identity, oidc, store
from gateway.tables import audit_entries, audit_outcomes, identities, passwords, sessions, users
from genmesh.identity.v1 import identity_pb2
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from tests.service.gateway.issuer import (
    APP_ID,
    CLIENT_ID,
    CLIENT_SECRET,
    PROJECT_ID,
    REDIRECT_URI,
    Answer,
    Issuer,
    answer,
    challenge_of,
    rsa_key,
    running_issuer,
    signed_with_public_key,
    unsigned,
)

PASSWORD = "correct horse battery"
INVALID = (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_ID_TOKEN_INVALID)
NOT_OFFERED = (grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED)


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


def fresh_email() -> str:
    return f"gwen-{uuid.uuid4().hex}@example.org"


def google_settings(issuer: str) -> dict[str, Any]:
    return {
        "google_issuer": issuer,
        "google_client_ids": (CLIENT_ID, APP_ID),
        "google_client_secret": CLIENT_SECRET,
        "google_redirect_uris": (REDIRECT_URI,),
    }


@pytest.fixture(scope="module")
def issuer() -> Generator[Issuer]:
    """An issuer that says what it should."""
    with running_issuer() as running:
        yield running


@pytest_asyncio.fixture(scope="module")
async def google(start_gateway: Any, issuer: Issuer) -> Any:
    """A gateway that offers everything."""
    return await start_gateway(**google_settings(issuer.url), firebase_project_id=PROJECT_ID, firebase_issuer=issuer.url)


def by_token(gateway: Any, token: str, **fields: Any) -> Any:
    return gateway.users.SignIn(identity_pb2.SignInRequest(google_id_token=token, **fields))


def by_firebase(gateway: Any, token: str) -> Any:
    return gateway.users.SignIn(identity_pb2.SignInRequest(firebase_id_token=token))


def by_code(gateway: Any, code: identity_pb2.AuthorizationCode) -> Any:
    return gateway.users.SignIn(identity_pb2.SignInRequest(google_code=code))


def link(gateway: Any, access_token: str, token: str) -> Any:
    return gateway.users.LinkIdentity(identity_pb2.LinkIdentityRequest(google_id_token=token), metadata=bearer(access_token))


async def linked(gateway: Any, access_token: str) -> list[identity_pb2.LinkedIdentity]:
    return list((await gateway.users.ListIdentities(identity_pb2.ListIdentitiesRequest(), metadata=bearer(access_token))).identities)


def unlink(gateway: Any, access_token: str, identity_id: str) -> Any:
    return gateway.users.UnlinkIdentity(identity_pb2.UnlinkIdentityRequest(identity_id=identity_id), metadata=bearer(access_token))


async def with_password(gateway: Any, email: str) -> identity_pb2.SignInResponse:
    """A session of a new account with a password."""
    await gateway.users.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
    credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
    return await gateway.users.SignIn(identity_pb2.SignInRequest(password=credential))


async def count(gateway: Any, query: Any) -> int:
    async with transaction(gateway.engine) as connection:
        return (await connection.execute(sa.select(sa.func.count()).select_from(query.subquery()))).scalar_one()


async def audited(gateway: Any, user_id: str, method: str) -> list[Any]:
    """What the audit trail says that an account did, oldest first."""
    async with transaction(gateway.engine) as connection:
        query = (
            sa.select(
                audit_entries,
                audit_outcomes.c.code,
                audit_outcomes.c.reason,
                audit_outcomes.c.subject.label("late_subject"),
                audit_outcomes.c.details.label("more"),
            )
            .outerjoin(audit_outcomes, audit_outcomes.c.audit_entry_id == audit_entries.c.audit_entry_id)
            .where(
                audit_entries.c.actor_user_id == uuid.UUID(user_id),
                audit_entries.c.method == f"genmesh.identity.v1.IdentityService/{method}",
            )
            .order_by(audit_entries.c.act_time)
        )
        return list(await connection.execute(query))


# --- the whole flow of a browser, with a provider that we did not write


@pytest_asyncio.fixture(scope="module")
async def provider() -> AsyncGenerator[str]:
    """The address of a provider, which is a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "oidc_provider_mock", "--port", "0", stderr=asyncio.subprocess.PIPE, env=os.environ | {"NO_COLOR": "1"}
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(60):
            while (found := re.search(rb"running on http://127[.]0[.]0[.]1:([0-9]+)", await process.stderr.readline())) is None:
                assert not process.stderr.at_eof()
        reading = asyncio.create_task(process.stderr.read())
        yield f"http://127.0.0.1:{found[1].decode()}"
    finally:
        process.terminate()
        await process.wait()
    await reading


async def test_a_browser_signs_in_with_an_authorization_code(start_gateway: Any, refused: Any, provider: str) -> None:
    gateway = await start_gateway(**google_settings(provider))
    subject, email = secrets.token_hex(8), fresh_email()
    verifier, nonce, state = secrets.token_urlsafe(48), secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    options = await gateway.users.GetSignInOptions(identity_pb2.GetSignInOptionsRequest())
    assert (options.google.client_id, options.google.redirect_uris, options.HasField("firebase")) == (CLIENT_ID, [REDIRECT_URI], False)
    async with httpx.AsyncClient(trust_env=False) as browser:
        claims = {"email": email, "email_verified": True, "name": "Gwen"}
        (await browser.put(f"{provider}/users/{subject}", json=claims)).raise_for_status()
        question = {
            "client_id": options.google.client_id,
            "redirect_uri": options.google.redirect_uris[0],
            "response_type": "code",
            "scope": options.google.scope,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge_of(verifier),
            "code_challenge_method": "S256",
        }
        sent_back = await browser.post(options.google.authorization_endpoint, params=question, data={"sub": subject})
    came_to = urlsplit(sent_back.headers["location"])
    returned = parse_qs(came_to.query)
    assert (f"{came_to.scheme}://{came_to.netloc}{came_to.path}", returned["state"]) == (REDIRECT_URI, [state])
    code = identity_pb2.AuthorizationCode(code=returned["code"][0], code_verifier=verifier, redirect_uri=REDIRECT_URI, nonce=nonce)
    session = await by_code(gateway, code)
    assert (session.user.email, session.user.display_name, session.user.plan) == (email, "Gwen", identity_pb2.PLAN_FREE)
    me = await gateway.users.GetMe(identity_pb2.GetMeRequest(), metadata=bearer(session.access_token))
    assert me.user == session.user
    await gateway.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=session.refresh_token))
    again = await refused(by_code(gateway, code))
    assert (again.code, again.reason) == INVALID


# --- ID tokens


async def test_the_first_sign_in_makes_an_account_and_the_next_finds_it(google: Any, issuer: Issuer) -> None:
    claims = issuer.claims()
    first = await by_token(google, issuer.sign(claims))
    assert (first.user.email, first.user.plan, list(first.user.roles)) == (claims["email"].lower(), identity_pb2.PLAN_FREE, [])
    # Who somebody is does not hang on an address, which may change.
    second = await by_token(google, issuer.sign(claims | {"email": fresh_email(), "name": "Another"}))
    assert second.user == first.user
    user_id = uuid.UUID(first.user.user_id)
    assert await count(google, passwords.select().where(passwords.c.user_id == user_id)) == 0
    entries = await audited(google, first.user.user_id, "SignIn")
    assert [(entry.subject, entry.code, entry.details["credential"]) for entry in entries] == [
        (first.user.user_id, 0, "google_id_token")
    ] * 2


async def test_of_many_first_sign_ins_at_once_one_makes_the_account(google: Any, issuer: Issuer) -> None:
    claims = issuer.claims()
    # The provider may have changed the address meanwhile.
    tokens = [issuer.sign(claims | {"email": claims["email"] if number % 2 else fresh_email()}) for number in range(8)]
    sessions = await asyncio.gather(*(by_token(google, token) for token in tokens))
    assert len({session.user.user_id for session in sessions}) == 1
    assert await count(google, identities.select().where(identities.c.subject == claims["sub"])) == 1


FORGED: dict[str, Callable[[Issuer], str]] = {
    "alg none": lambda issuer: unsigned(issuer.claims(), kid=issuer.key_id),
    "HS256 with the public key": lambda issuer: signed_with_public_key(issuer.claims(), issuer.key, issuer.key_id),
    "another key under its id": lambda issuer: issuer.sign(issuer.claims(), key=rsa_key(2)),
    "unknown key": lambda issuer: issuer.sign(issuer.claims(), key=rsa_key(2), key_id="other"),
    "another issuer": lambda issuer: issuer.sign(issuer.claims(iss="https://accounts.evil.example")),
    "another audience": lambda issuer: issuer.sign(issuer.claims(aud="somebody.else", azp=None)),
    "issued to somebody else": lambda issuer: issuer.sign(issuer.claims(azp="somebody.else")),
    "of the other provider": lambda issuer: issuer.sign(issuer.firebase_claims()),
    "expired": lambda issuer: issuer.sign(issuer.claims(exp=int(time.time()) - 60)),
    "not yet valid": lambda issuer: issuer.sign(issuer.claims(nbf=int(time.time()) + 60)),
    "no expiry": lambda issuer: issuer.sign(issuer.claims(exp=None)),
    "no subject": lambda issuer: issuer.sign(issuer.claims(sub=None)),
    "no address": lambda issuer: issuer.sign(issuer.claims(email=None)),
    "unverified address": lambda issuer: issuer.sign(issuer.claims(email_verified=False)),
    "no JWT": lambda _: "x",
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
async def test_forged_tokens_are_refused_and_make_no_account(google: Any, issuer: Issuer, refused: Any, forge: Any) -> None:
    before = await count(google, users.select())
    error = await refused(by_token(google, forge(issuer)))
    assert (error.code, error.reason) == INVALID
    assert await count(google, users.select()) == before


async def test_refusals_and_logs_repeat_no_token(google: Any, issuer: Issuer, refused: Any) -> None:
    token = issuer.sign(issuer.claims(), key=rsa_key(2))
    with structlog.testing.capture_logs() as logs:
        error = await refused(by_token(google, token))
    for part in token.split("."):
        assert part not in error.message
        assert part not in repr(logs)


async def test_firebase(google: Any, issuer: Issuer, refused: Any) -> None:
    claims = issuer.firebase_claims()
    session = await by_firebase(google, issuer.sign(claims))
    assert session.user.email == claims["email"].lower()
    for wrong in (issuer.claims(), issuer.firebase_claims(auth_time=int(time.time()) + 600), issuer.firebase_claims(firebase=None)):
        error = await refused(by_firebase(google, issuer.sign(wrong)))
        assert (error.code, error.reason) == INVALID


async def test_a_disabled_account_stays_disabled_by_every_way(google: Any, issuer: Issuer, refused: Any) -> None:
    token = issuer.sign(issuer.claims())
    session = await by_token(google, token)
    async with transaction(google.engine) as connection:
        await connection.execute(
            users.update().where(users.c.user_id == uuid.UUID(session.user.user_id)).values(disabled_time=sa.func.now())
        )
    error = await refused(by_token(google, token))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_ACCOUNT_DISABLED)


async def test_keys_change_without_a_restart(start_gateway: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "UNKNOWN_KEY_RETRY_S", 0.0)
    with running_issuer() as issuer:
        gateway = await start_gateway(**google_settings(issuer.url))
        old = issuer.sign(issuer.claims())
        await by_token(gateway, old)
        issuer.rotate("second", 2)
        await by_token(gateway, issuer.sign(issuer.claims()))
        assert (await refused(by_token(gateway, old))).reason == Reason.ERROR_REASON_ID_TOKEN_INVALID


async def test_without_its_issuer_known_keys_go_on_and_unknown_ones_cannot_be_told(start_gateway: Any, refused: Any) -> None:
    with running_issuer() as issuer:
        gateway = await start_gateway(**google_settings(issuer.url))
        token = issuer.sign(issuer.claims())
        await by_token(gateway, token)
    await by_token(gateway, token)
    stranger = await start_gateway(**google_settings(issuer.url))
    error = await refused(by_token(stranger, token))
    assert (error.code, error.retry_after_s is not None) == (grpc.StatusCode.UNAVAILABLE, True)
    assert str(urlsplit(issuer.url).port) not in error.message
    # What needs no issuer still works, also the page that says so.
    options = await stranger.users.GetSignInOptions(identity_pb2.GetSignInOptionsRequest())
    assert (options.google.client_id, options.google.authorization_endpoint, list(options.google.redirect_uris)) == (CLIENT_ID, "", [])
    await with_password(stranger, fresh_email())


@pytest.mark.parametrize(
    "bend",
    [
        pytest.param(lambda elsewhere: Answer(b"", 302, (("location", elsewhere),)), id="redirect"),
        pytest.param(lambda _: Answer(b" " * (oidc.DOCUMENT_MAX_BYTES + 1)), id="oversized"),
        pytest.param(lambda _: Answer(b"\x1f\x8b" + b"\0" * 100, 200, (("content-encoding", "gzip"),)), id="compressed"),
        pytest.param(lambda _: Answer(b"[" * 100_000), id="nested"),
        pytest.param(lambda _: Answer(b"<html>"), id="no JSON"),
        pytest.param(lambda _: answer([]), id="no object"),
        pytest.param(lambda _: answer({}), id="empty"),
        pytest.param(lambda _: answer({}, 500), id="500"),
    ],
)
@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/jwks"])
async def test_issuers_that_say_what_they_should_not(start_gateway: Any, refused: Any, bend: Any, path: str) -> None:
    with running_issuer() as issuer, running_issuer() as elsewhere:
        gateway = await start_gateway(**google_settings(issuer.url))
        issuer.bent[path] = lambda: bend(f"{elsewhere.url}{path}")
        error = await refused(by_token(gateway, issuer.sign(issuer.claims())))
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert elsewhere.asked == []


async def test_what_is_not_set_is_not_offered(gateway: Any, start_gateway: Any, issuer: Issuer, refused: Any) -> None:
    code = identity_pb2.AuthorizationCode(code="c", code_verifier="v" * 43, redirect_uri=REDIRECT_URI, nonce="n" * 16)
    for call in (by_token(gateway, "x"), by_firebase(gateway, "x"), by_code(gateway, code)):
        error = await refused(call)
        assert (error.code, error.reason) == NOT_OFFERED
    options = await gateway.users.GetSignInOptions(identity_pb2.GetSignInOptionsRequest())
    assert options == identity_pb2.GetSignInOptionsResponse()
    apps_only = await start_gateway(google_issuer=issuer.url, google_client_ids=(CLIENT_ID,))
    await by_token(apps_only, issuer.sign(issuer.claims()))
    assert (await refused(by_code(apps_only, code))).reason == Reason.ERROR_REASON_NOT_OFFERED
    options = await apps_only.users.GetSignInOptions(identity_pb2.GetSignInOptionsRequest())
    assert (options.google.client_id, options.google.authorization_endpoint) == (CLIENT_ID, "")
    session = await with_password(gateway, fresh_email())
    assert (await refused(link(gateway, session.access_token, "x"))).reason == Reason.ERROR_REASON_NOT_OFFERED


# --- codes


def code_for(issuer: Issuer, **changes: Any) -> identity_pb2.AuthorizationCode:
    verifier, nonce = secrets.token_urlsafe(48), secrets.token_urlsafe(24)
    code = issuer.authorize(challenge=challenge_of(verifier), nonce=nonce)
    good: dict[str, Any] = {"code": code, "code_verifier": verifier, "redirect_uri": REDIRECT_URI, "nonce": nonce}
    return identity_pb2.AuthorizationCode(**(good | changes))


async def test_a_code_works_once_and_only_with_what_began_the_sign_in(google: Any, issuer: Issuer, refused: Any) -> None:
    code = code_for(issuer)
    await by_code(google, code)
    for wrong in (code, code_for(issuer, code="made up"), code_for(issuer, code_verifier="w" * 43), code_for(issuer, nonce="m" * 16)):
        error = await refused(by_code(google, wrong))
        assert (error.code, error.reason) == INVALID
        assert wrong.code not in error.message


async def test_codes_are_sent_nowhere_for_a_page_of_somebody_else(google: Any, issuer: Issuer, refused: Any) -> None:
    asked = issuer.asked.count("/token")
    error = await refused(by_code(google, code_for(issuer, redirect_uri="https://evil.example/")))
    assert (error.code, error.message.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "google_code.redirect_uri")
    assert issuer.asked.count("/token") == asked


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"code_verifier": "short"}, "code_verifier"),
        ({"nonce": "short"}, "nonce"),
        ({"code": ""}, "code"),
        ({"redirect_uri": ""}, "redirect_uri"),
    ],
)
async def test_codes_that_are_incomplete(google: Any, issuer: Issuer, refused: Any, changes: dict[str, str], field: str) -> None:
    error = await refused(by_code(google, code_for(issuer, **changes)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"google_code.{field}:" in error.message


async def test_our_secret_is_in_no_answer_and_no_log(start_gateway: Any, refused: Any) -> None:
    with running_issuer() as issuer:
        gateway = await start_gateway(**google_settings(issuer.url) | {"google_client_secret": "an old secret"})
        with structlog.testing.capture_logs() as logs:
            error = await refused(by_code(gateway, code := code_for(issuer)))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    for secret in ("an old secret", code.code, code.code_verifier):
        assert secret not in error.message + repr(logs)
    assert any(log["event"] == "code.exchange_failed" and log["error"] == "invalid_client" for log in logs)


# --- addresses and linking


async def test_an_address_of_another_account_is_never_linked_by_itself(google: Any, issuer: Issuer, refused: Any) -> None:
    """Who registers somebody else's address and waits gets nothing."""
    claims = issuer.claims()
    session = await with_password(google, claims["email"])
    error = await refused(by_token(google, issuer.sign(claims)))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN)
    assert await count(google, identities.select().where(identities.c.subject == claims["sub"])) == 0
    await link(google, session.access_token, issuer.sign(claims))
    assert (await by_token(google, issuer.sign(claims))).user == session.user


async def test_an_account_made_elsewhere_has_no_password_and_its_address_is_taken(google: Any, issuer: Issuer, refused: Any) -> None:
    session = await by_token(google, issuer.sign(issuer.claims()))
    error = await refused(google.users.RegisterUser(identity_pb2.RegisterUserRequest(email=session.user.email, password=PASSWORD)))
    assert error.reason == Reason.ERROR_REASON_EMAIL_TAKEN
    credential = identity_pb2.PasswordCredential(email=session.user.email, password=PASSWORD)
    error = await refused(google.users.SignIn(identity_pb2.SignInRequest(password=credential)))
    assert error.reason == Reason.ERROR_REASON_BAD_CREDENTIALS


async def test_linking(google: Any, issuer: Issuer, refused: Any) -> None:
    ann, eve = await with_password(google, fresh_email()), await with_password(google, fresh_email())
    claims = issuer.claims(email=fresh_email())
    for _ in range(2):  # again is no error
        await link(google, ann.access_token, issuer.sign(claims))
    session = await by_token(google, issuer.sign(claims))
    assert session.user == ann.user  # the address stays, too
    taken = (grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_IDENTITY_TAKEN)
    for access_token, wrong in ((eve.access_token, claims), (ann.access_token, issuer.claims())):
        error = await refused(link(google, access_token, issuer.sign(wrong)))
        assert (error.code, error.reason) == taken
    error = await refused(link(google, eve.access_token, issuer.sign(issuer.claims(), key=rsa_key(2))))
    assert (error.code, error.reason) == INVALID
    error = await refused(link(google, "", issuer.sign(issuer.claims())))
    assert error.code is grpc.StatusCode.UNAUTHENTICATED
    # One of each provider.
    firebase = identity_pb2.LinkIdentityRequest(firebase_id_token=issuer.sign(issuer.firebase_claims()))
    await google.users.LinkIdentity(firebase, metadata=bearer(eve.access_token))
    entries = await audited(google, ann.user.user_id, "LinkIdentity")
    assert [(entry.code, entry.reason) for entry in entries] == [(0, ""), (0, ""), (6, "ERROR_REASON_IDENTITY_TAKEN")]
    assert entries[0].more["external_subject"] == claims["sub"]


async def change_sessions(gateway: Any, user_id: str, **values: Any) -> None:
    async with transaction(gateway.engine) as connection:
        await connection.execute(sessions.update().where(sessions.c.user_id == uuid.UUID(user_id)).values(**values))


async def test_only_a_young_session_links_and_unlinks(google: Any, issuer: Issuer, refused: Any) -> None:
    session = await with_password(google, email := fresh_email())
    kept = issuer.claims(email=fresh_email())
    await link(google, session.access_token, issuer.sign(kept))
    [before] = await linked(google, session.access_token)
    aged = sa.func.now() - timedelta(seconds=google.settings.recent_sign_in_s + 1)
    await change_sessions(google, session.user.user_id, create_time=aged)
    # However young the token is.
    session = await google.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=session.refresh_token))
    claims = issuer.claims(email=fresh_email())
    # Whose identity it is, and whether it is the last one, is not even looked at.
    for call in (
        link(google, session.access_token, issuer.sign(claims)),
        unlink(google, session.access_token, before.identity_id),
        unlink(google, session.access_token, str(uuid.uuid4())),
    ):
        error = await refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)
        assert "sign in again" in error.message
    assert await linked(google, session.access_token) == [before]
    credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
    again = await google.users.SignIn(identity_pb2.SignInRequest(password=credential))
    await unlink(google, again.access_token, before.identity_id)
    await link(google, again.access_token, issuer.sign(claims))


async def test_a_session_that_was_ended_links_and_unlinks_no_more(google: Any, issuer: Issuer) -> None:
    """Its access token may be believed for some seconds yet."""
    session = await by_token(google, issuer.sign(issuer.claims()))
    [found] = await linked(google, session.access_token)
    user_id = uuid.UUID(session.user.user_id)
    session_id = uuid.UUID(jwt.decode(session.access_token, options={"verify_signature": False})["sid"])
    await change_sessions(google, session.user.user_id, end_time=sa.func.now(), end_reason=identity.END_SIGNED_OUT)
    proof = oidc.IdToken("google_id_token", issuer.sign(issuer.claims()))
    for call in (
        google.accounts.link(user_id, session_id, proof, client_address=""),
        google.accounts.unlink(user_id, session_id, uuid.UUID(found.identity_id)),
    ):
        with pytest.raises(MeshError) as caught:
            await call
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED


async def test_of_many_who_link_one_identity_one_gets_it(google: Any, issuer: Issuer) -> None:
    sessions = [await with_password(google, fresh_email()) for _ in range(4)]
    claims = issuer.claims()
    calls = [link(google, session.access_token, issuer.sign(claims)) for session in sessions]
    answers: list[Any] = await asyncio.gather(*calls, by_token(google, issuer.sign(claims)), return_exceptions=True)
    refusals = [one for one in answers if isinstance(one, grpc.aio.AioRpcError)]
    assert {one.code() for one in refusals} <= {grpc.StatusCode.ALREADY_EXISTS}
    assert await count(google, identities.select().where(identities.c.subject == claims["sub"])) == 1
    # Either the sign-in came first, made an account and everybody else was refused; or it found the account of who linked.
    assert len(refusals) in (3, 4)


# --- unlinking


@pytest_asyncio.fixture(scope="module")
async def two_issuers(start_gateway: Any, issuer: Issuer) -> AsyncGenerator[tuple[Any, Issuer]]:
    """A gateway whose providers are not the same issuer, and the second of them."""
    with running_issuer() as other:
        yield await start_gateway(**google_settings(issuer.url), firebase_project_id=PROJECT_ID, firebase_issuer=other.url), other


def link_firebase(gateway: Any, access_token: str, token: str) -> Any:
    return gateway.users.LinkIdentity(identity_pb2.LinkIdentityRequest(firebase_id_token=token), metadata=bearer(access_token))


async def test_identities_are_listed_to_their_owner_oldest_first(two_issuers: tuple[Any, Issuer], issuer: Issuer, refused: Any) -> None:
    gateway, other = two_issuers
    ann, eve = await with_password(gateway, fresh_email()), await by_token(gateway, issuer.sign(issuer.claims()))
    assert await linked(gateway, ann.access_token) == []
    await link_firebase(gateway, ann.access_token, other.sign(other.firebase_claims()))
    await link(gateway, ann.access_token, issuer.sign(issuer.claims()))
    found = await linked(gateway, ann.access_token)
    assert [one.issuer for one in found] == [other.url, issuer.url]
    assert found[0].create_time.ToNanoseconds() < found[1].create_time.ToNanoseconds()
    assert abs(found[0].create_time.ToSeconds() - time.time()) < 60
    # The first sign-in made a link too.
    [of_eve] = await linked(gateway, eve.access_token)
    assert of_eve.issuer == issuer.url
    assert len({one.identity_id for one in (*found, of_eve)}) == 3
    assert (await refused(linked(gateway, ""))).code is grpc.StatusCode.UNAUTHENTICATED


async def test_who_unlinked_an_identity_is_a_stranger_with_it(google: Any, issuer: Issuer, refused: Any) -> None:
    claims = issuer.claims()
    ann = await with_password(google, claims["email"])
    await link(google, ann.access_token, issuer.sign(claims))
    by_identity = await by_token(google, issuer.sign(claims))
    [found] = await linked(google, ann.access_token)
    await unlink(google, ann.access_token, found.identity_id)
    assert await linked(google, ann.access_token) == []
    error = await refused(by_token(google, issuer.sign(claims)))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN)
    other = await by_token(google, issuer.sign(claims | {"email": fresh_email()}))
    assert other.user.user_id != ann.user.user_id
    # What was begun with it goes on, the password too.
    await google.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=by_identity.refresh_token))
    error = await refused(unlink(google, ann.access_token, found.identity_id))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND)
    # Room for another one of this issuer.
    await link(google, ann.access_token, issuer.sign(issuer.claims()))
    [next_one] = await linked(google, ann.access_token)
    assert next_one.identity_id != found.identity_id
    [made, _] = await audited(google, ann.user.user_id, "LinkIdentity")
    assert (made.subject, made.late_subject) == ("", found.identity_id)
    [done, again] = await audited(google, ann.user.user_id, "UnlinkIdentity")
    assert [(entry.subject, entry.code) for entry in (done, again)] == [(found.identity_id, 0), (found.identity_id, 5)]
    assert (done.more, again.more) == ({"issuer": issuer.url, "external_subject": claims["sub"]}, {})


async def test_identities_of_others_are_not_there(google: Any, issuer: Issuer, refused: Any) -> None:
    ann, eve = await by_token(google, issuer.sign(claims := issuer.claims())), await with_password(google, fresh_email())
    [found] = await linked(google, ann.access_token)
    for identity_id in (found.identity_id, str(uuid.uuid4())):
        error = await refused(unlink(google, eve.access_token, identity_id))
        assert (error.code, error.message) == (grpc.StatusCode.NOT_FOUND, "identity not found")
    assert (await refused(unlink(google, eve.access_token, "x"))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refused(unlink(google, "", found.identity_id))).code is grpc.StatusCode.UNAUTHENTICATED
    assert (await by_token(google, issuer.sign(claims))).user == ann.user


async def test_the_only_way_in_stays(two_issuers: tuple[Any, Issuer], issuer: Issuer, refused: Any) -> None:
    gateway, other = two_issuers
    last = (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_LAST_IDENTITY)
    session = await by_token(gateway, issuer.sign(issuer.claims()))
    [first] = await linked(gateway, session.access_token)
    error = await refused(unlink(gateway, session.access_token, first.identity_id))
    assert (error.code, error.reason) == last
    await link_firebase(gateway, session.access_token, other.sign(claims := other.firebase_claims()))
    await unlink(gateway, session.access_token, first.identity_id)
    [second] = await linked(gateway, session.access_token)
    error = await refused(unlink(gateway, session.access_token, second.identity_id))
    assert (error.code, error.reason) == last
    assert (await by_firebase(gateway, other.sign(claims))).user == session.user


async def until_waiting(gateway: Any, count: int = 1) -> None:
    """Return when so many statements wait for a lock."""
    waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
    async with asyncio.timeout(20):
        while True:
            # A transaction sees those of its beginning: each question takes one of its own.
            async with transaction(gateway.engine) as connection:
                if (await connection.execute(waiting)).scalar_one() >= count:
                    return
            await asyncio.sleep(0.02)


async def test_two_at_once_do_not_unlink_both(two_issuers: tuple[Any, Issuer], issuer: Issuer) -> None:
    gateway, other = two_issuers
    session = await by_token(gateway, issuer.sign(issuer.claims()))
    await link_firebase(gateway, session.access_token, other.sign(other.firebase_claims()))
    both = [one.identity_id for one in await linked(gateway, session.access_token)]
    async with transaction(gateway.engine) as connection:
        await store.lock_user(connection, uuid.UUID(session.user.user_id))
        calls = [asyncio.ensure_future(unlink(gateway, session.access_token, identity_id)) for identity_id in both]
        await until_waiting(gateway, 2)
    answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    [error] = [one for one in answers if isinstance(one, grpc.aio.AioRpcError)]
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert len(await linked(gateway, session.access_token)) == 1


async def test_who_signs_in_while_it_is_unlinked_is_a_stranger(google: Any, issuer: Issuer, refused: Any) -> None:
    claims = issuer.claims()
    ann = await with_password(google, claims["email"])
    await link(google, ann.access_token, issuer.sign(claims))
    async with transaction(google.engine) as connection:
        await store.lock_user(connection, uuid.UUID(ann.user.user_id))
        signing_in = asyncio.ensure_future(by_token(google, issuer.sign(claims)))
        await until_waiting(google)
        [found] = await store.list_identities(connection, uuid.UUID(ann.user.user_id))
        await store.delete_identity(connection, found.identity_id)
    error = await refused(signing_in)
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN)


async def test_a_session_that_ends_while_it_links_links_nothing(google: Any, issuer: Issuer, refused: Any) -> None:
    ann = await with_password(google, fresh_email())
    async with transaction(google.engine) as connection:
        await store.lock_user(connection, uuid.UUID(ann.user.user_id))
        linking = asyncio.ensure_future(link(google, ann.access_token, issuer.sign(issuer.claims())))
        await until_waiting(google)
        await store.end_sessions(connection, uuid.UUID(ann.user.user_id), identity.END_SIGNED_OUT)
    error = await refused(linking)
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)
    assert await linked(google, ann.access_token) == []


async def test_the_tokens_are_the_gateways_own(google: Any, issuer: Issuer) -> None:
    session = await by_token(google, issuer.sign(issuer.claims()))
    claims = jwt.decode(session.access_token, options={"verify_signature": False})
    assert claims["iss"] == google.settings.token_issuer
    assert re.fullmatch(r"[0-9a-f-]{36}", claims["sid"])


# --- failures are counted


def attempt(gateway: Any, address: str = "192.0.2.1", **proof: Any) -> Any:
    return gateway.users.SignIn(identity_pb2.SignInRequest(**proof), metadata=[("x-client-address", address)])


LIMITED = (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)


async def test_forged_tokens_are_counted_and_stop_no_right_one(start_gateway: Any, issuer: Issuer, refused: Any) -> None:
    gateway = await start_gateway(**google_settings(issuer.url), sign_in_client_failures_max=3)
    for _ in range(3):
        assert (await refused(attempt(gateway, google_id_token="x"))).reason == Reason.ERROR_REASON_ID_TOKEN_INVALID
    error = await refused(attempt(gateway, google_id_token="x"))
    assert (error.code, error.reason) == LIMITED
    assert error.retry_after_s is not None
    await attempt(gateway, google_id_token=issuer.sign(issuer.claims()))
    # A code costs a call to the provider, whether it is right or not.
    asked = issuer.asked.count("/token")
    error = await refused(attempt(gateway, google_code=code_for(issuer)))
    assert (error.code, error.reason) == LIMITED
    assert issuer.asked.count("/token") == asked
    await attempt(gateway, "192.0.2.2", google_code=code_for(issuer))


async def test_whatever_refuses_a_proof_is_counted(start_gateway: Any, issuer: Issuer, refused: Any) -> None:
    """None of it could otherwise be had without end, by who has a token that is good, or needs none."""
    not_offered = await start_gateway(sign_in_client_failures_max=2)
    for _ in range(2):
        assert (await refused(attempt(not_offered, firebase_id_token="x"))).reason == Reason.ERROR_REASON_NOT_OFFERED
    assert (await refused(attempt(not_offered, firebase_id_token="x"))).reason == Reason.ERROR_REASON_LIMIT_REACHED
    gateway = await start_gateway(**google_settings(issuer.url), sign_in_client_failures_max=2)
    claims = issuer.claims()
    await with_password(gateway, claims["email"])
    for _ in range(2):
        assert (await refused(attempt(gateway, google_id_token=issuer.sign(claims)))).reason == Reason.ERROR_REASON_EMAIL_TAKEN
    assert (await refused(attempt(gateway, google_id_token=issuer.sign(claims)))).reason == Reason.ERROR_REASON_LIMIT_REACHED
    with running_issuer() as gone:
        away = await start_gateway(**google_settings(gone.url), sign_in_client_failures_max=2)
        token = gone.sign(gone.claims())
    for _ in range(2):
        assert (await refused(attempt(away, google_id_token=token))).code is grpc.StatusCode.UNAVAILABLE
    assert (await refused(attempt(away, google_id_token=token))).reason == Reason.ERROR_REASON_LIMIT_REACHED


async def test_sign_ins_with_one_identity_are_counted(start_gateway: Any, issuer: Issuer, refused: Any) -> None:
    gateway = await start_gateway(**google_settings(issuer.url), sign_ins_max=2)
    token = issuer.sign(issuer.claims())
    for _ in range(2):
        await attempt(gateway, google_id_token=token)
    error = await refused(attempt(gateway, google_id_token=token))
    assert (error.code, error.reason) == LIMITED
    await attempt(gateway, google_id_token=issuer.sign(issuer.claims()))
