"""ID tokens of other providers: which are believed, what an issuer's documents may say, how long its keys are kept. The issuer's answers
come from a transport in this process."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import httpx
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.utils import base64url_encode

from gateway import oidc
from gateway.identity import external_display_name
from gateway.oidc import Client, Code, CodeFlow, Provider, check_outside_url
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
    jwk,
    rsa_key,
    signed_with_public_key,
    unsigned,
)

ISSUER = "https://accounts.example.com"
VERIFIER = "v" * 43
NONCE = "n" * 16


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """An issuer, how to reach it, and a clock."""

    def __init__(self) -> None:
        self.issuer = Issuer()
        self.issuer.url = ISSUER
        self.clock = Clock()
        self.away = False
        self.http = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            raise httpx.ConnectError("nobody there")
        form = dict(httpx.QueryParams(request.content.decode()))
        said = self.issuer.answer_to(request.method, request.url.path, form)
        return httpx.Response(said.status, stream=httpx.ByteStream(said.body), headers=list(said.headers))

    def google(self) -> Provider:
        return oidc.google(self.http, issuer=ISSUER, client_ids=(CLIENT_ID, APP_ID), clock=self.clock)

    def firebase(self) -> Provider:
        return oidc.firebase(self.http, issuer=ISSUER, project_id=PROJECT_ID, clock=self.clock)

    def code_flow(self) -> CodeFlow:
        return CodeFlow(self.http, self.google(), Client(CLIENT_ID, CLIENT_SECRET, (REDIRECT_URI,)))


@pytest_asyncio.fixture
async def world() -> AsyncGenerator[World]:
    made = World()
    yield made
    await made.http.aclose()


async def refusal(proof: Any) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await proof
    return caught.value


async def assert_refused(proof: Any) -> None:
    error = await refusal(proof)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_ID_TOKEN_INVALID), error.message


async def assert_unavailable(proof: Any) -> None:
    error = await refusal(proof)
    assert (error.code, error.retry_after_s is not None) == (grpc.StatusCode.UNAVAILABLE, True)


# --- tokens


async def test_a_good_token_proves_an_identity(world: World) -> None:
    claims = world.issuer.claims(email="Gwen@Example.org", name="Gwen")
    proven = await world.google().verify(world.issuer.sign(claims))
    assert (proven.issuer, proven.subject, proven.email, proven.display_name) == (ISSUER, claims["sub"], "gwen@example.org", "Gwen")


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "accounts.example.com"},  # how Google spelt itself
        {"aud": APP_ID, "azp": None},
        {"aud": [CLIENT_ID], "azp": None},
        {"aud": CLIENT_ID, "azp": APP_ID},
        {"aud": [CLIENT_ID, APP_ID], "azp": APP_ID},
        {"nonce": "an app's own"},
        {"name": None},
        {"name": 7},
    ],
)
async def test_what_else_is_a_good_token(world: World, changes: dict[str, Any]) -> None:
    proven = await world.google().verify(world.issuer.sign(world.issuer.claims(**changes)))
    assert proven.issuer == ISSUER


async def test_clocks_may_differ_a_little(world: World) -> None:
    now = int(time.time())
    for changes in ({"exp": now - 2}, {"iat": now + 2}, {"nbf": now + 2}):
        await world.google().verify(world.issuer.sign(world.issuer.claims(**changes)))


FORGED: dict[str, Callable[[Issuer], str]] = {
    "alg none": lambda issuer: unsigned(issuer.claims()),
    "alg none with a key id": lambda issuer: unsigned(issuer.claims(), kid=issuer.key_id),
    "HS256 with the public key": lambda issuer: signed_with_public_key(issuer.claims(), issuer.key, issuer.key_id),
    "PS256 with the right key": lambda issuer: jwt.encode(issuer.claims(), issuer.key, "PS256", {"kid": issuer.key_id}),
    "RS512 with the right key": lambda issuer: jwt.encode(issuer.claims(), issuer.key, "RS512", {"kid": issuer.key_id}),
    "ES256 with a key of one's own": lambda issuer: jwt.encode(
        issuer.claims(), ec.generate_private_key(ec.SECP256R1()), "ES256", {"kid": issuer.key_id}
    ),
    "another key under its id": lambda issuer: issuer.sign(issuer.claims(), key=rsa_key(2)),
    "unknown key": lambda issuer: issuer.sign(issuer.claims(), key=rsa_key(2), key_id="other"),
    "a key of one's own in the header": lambda issuer: issuer.sign(issuer.claims(), key=rsa_key(2), jwk=jwk(rsa_key(2), "first")),
    "a key set of one's own in the header": lambda issuer: issuer.sign(issuer.claims(), key=rsa_key(2), jku="https://evil.example/jwks"),
    "no key id and another key": lambda issuer: jwt.encode(issuer.claims(), rsa_key(2), "RS256"),
    "a key id that is none": lambda issuer: jwt.encode(issuer.claims(), issuer.key, "RS256", {"kid": ""}),
    "a key id without end": lambda issuer: issuer.sign(issuer.claims(), key_id="k" * 300),
    "an extension that must be understood": lambda issuer: issuer.sign(issuer.claims(), crit=["b64"], b64=False),
    "signature cut off": lambda issuer: issuer.sign(issuer.claims()).rpartition(".")[0] + ".",
    "claims exchanged": lambda issuer: _exchanged(issuer),
    "no JWT": lambda _: "x",
    "nested without end": lambda _: base64url_encode(b"[" * 6000).decode() + ".e30.x",
    "another issuer": lambda issuer: issuer.sign(issuer.claims(iss="https://accounts.evil.example")),
    "no issuer": lambda issuer: issuer.sign(issuer.claims(iss=None)),
    "another audience": lambda issuer: issuer.sign(issuer.claims(aud="somebody.else", azp=None)),
    "another audience besides": lambda issuer: issuer.sign(issuer.claims(aud=[CLIENT_ID, "somebody.else"])),
    "two audiences, issued to nobody": lambda issuer: issuer.sign(issuer.claims(aud=[CLIENT_ID, APP_ID], azp=None)),
    "no audience": lambda issuer: issuer.sign(issuer.claims(aud=None)),
    "issued to somebody else": lambda issuer: issuer.sign(issuer.claims(azp="somebody.else")),
    "issued to a list": lambda issuer: issuer.sign(issuer.claims(azp=[CLIENT_ID])),
    "expired": lambda issuer: issuer.sign(issuer.claims(exp=int(time.time()) - 60)),
    "no expiry": lambda issuer: issuer.sign(issuer.claims(exp=None)),
    "expiry that is none": lambda issuer: issuer.sign(issuer.claims(exp="never")),
    "expiry without end": lambda issuer: issuer.sign(issuer.claims(exp=float("inf"))),
    "not yet valid": lambda issuer: issuer.sign(issuer.claims(nbf=int(time.time()) + 60)),
    "issued tomorrow": lambda issuer: issuer.sign(issuer.claims(iat=int(time.time()) + 86_400)),
    "no time of issue": lambda issuer: issuer.sign(issuer.claims(iat=None)),
    "no subject": lambda issuer: issuer.sign(issuer.claims(sub=None)),
    "empty subject": lambda issuer: issuer.sign(issuer.claims(sub="")),
    "subject without end": lambda issuer: issuer.sign(issuer.claims(sub="s" * 256)),
    "subject with NUL": lambda issuer: issuer.sign(issuer.claims(sub="a\0b")),
    "no address": lambda issuer: issuer.sign(issuer.claims(email=None)),
    "an address that is none": lambda issuer: issuer.sign(issuer.claims(email="gwen")),
    "an address with NUL": lambda issuer: issuer.sign(issuer.claims(email="a\0b@example.org")),
    "an address with a space": lambda issuer: issuer.sign(issuer.claims(email="a b@example.org")),
    "an address with half a surrogate": lambda issuer: issuer.sign(issuer.claims(email="\ud800@example.org")),
    "unverified address": lambda issuer: issuer.sign(issuer.claims(email_verified=False)),
    "address verified in words": lambda issuer: issuer.sign(issuer.claims(email_verified="true")),
    "address nobody says is verified": lambda issuer: issuer.sign(issuer.claims(email_verified=None)),
}


def _exchanged(issuer: Issuer) -> str:
    header, _, signature = issuer.sign(issuer.claims()).split(".")
    return ".".join((header, issuer.sign(issuer.claims(sub="somebody-else")).split(".")[1], signature))


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
async def test_forged_tokens_are_refused(world: World, forge: Callable[[Issuer], str]) -> None:
    provider = world.google()
    await provider.verify(world.issuer.sign(world.issuer.claims()))  # the keys are there: that is not why
    await assert_refused(provider.verify(forge(world.issuer)))


async def test_names_keep_no_characters_that_cannot_be_stored(world: World) -> None:
    proven = await world.google().verify(world.issuer.sign(world.issuer.claims(name="G\0w\ud800en" + "n" * 200)))
    name = external_display_name(proven)
    assert name.startswith("Gwen")
    assert len(name) == 100


async def test_firebase(world: World) -> None:
    provider = world.firebase()
    claims = world.issuer.firebase_claims()
    assert (await provider.verify(world.issuer.sign(claims))).subject == claims["sub"]


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": CLIENT_ID},
        {"auth_time": None},
        {"auth_time": "yesterday"},
        {"auth_time": True},
        {"auth_time": int(time.time()) + 24 * 3600},  # from when tests are collected, long before this one runs
        {"firebase": None},
        {"firebase": {"sign_in_provider": ""}},
        {"firebase": "password"},
        {"email_verified": False},
        {"email": None},  # anonymous
    ],
)
async def test_what_firebase_tokens_have_to_say(world: World, changes: dict[str, Any]) -> None:
    await assert_refused(world.firebase().verify(world.issuer.sign(world.issuer.firebase_claims(**changes))))


# --- codes


def code(
    world: World, *, redirect_uri: str = REDIRECT_URI, verifier: str = VERIFIER, nonce: str = NONCE, claims: dict[str, Any] | None = None
) -> Code:
    issued = world.issuer.authorize(challenge=challenge_of(VERIFIER), **({"nonce": NONCE} | (claims or {})))
    return Code(issued, verifier, redirect_uri, nonce)


async def test_a_code_proves_an_identity_once(world: World) -> None:
    flow = world.code_flow()
    proof = code(world, claims={"sub": "gwen"})
    assert (await flow.prove(proof)).subject == "gwen"
    assert world.issuer.forms == [
        {
            "grant_type": "authorization_code",
            "code": proof.code,
            "code_verifier": VERIFIER,
            "redirect_uri": REDIRECT_URI,
            "client_id": CLIENT_ID,
            "client_secret": CLIENT_SECRET,
        }
    ]
    await assert_refused(flow.prove(proof))


@pytest.mark.parametrize(
    "changes",
    [
        {"verifier": "w" * 43},
        {"nonce": "m" * 16},
        {"claims": {"nonce": None}},
        {"claims": {"nonce": 7}},
        {"claims": {"nonce": "\ud800"}},
        {"claims": {"aud": APP_ID, "azp": APP_ID}},  # ours, but not the browser's
        {"claims": {"azp": APP_ID}},
        {"claims": {"email_verified": False}},
    ],
)
async def test_codes_of_another_sign_in_are_refused(world: World, changes: dict[str, Any]) -> None:
    await assert_refused(world.code_flow().prove(code(world, **changes)))


async def test_only_our_own_pages_are_sent_to_the_provider(world: World) -> None:
    flow = world.code_flow()
    for redirect_uri in ("https://evil.example/", REDIRECT_URI + "/", REDIRECT_URI.upper()):
        error = await refusal(flow.prove(code(world, redirect_uri=redirect_uri)))
        assert (error.code, error.violations[0][0]) == (grpc.StatusCode.INVALID_ARGUMENT, "google_code.redirect_uri")
    assert world.issuer.asked == []


@pytest.mark.parametrize(
    ("redirect_uri", "good"),
    [
        ("http://127.0.0.1:40123/callback", True),
        ("http://[::1]:1/callback", True),
        ("http://127.0.0.1/callback", True),
        ("http://127.0.0.1:40123/elsewhere", False),
        ("http://127.0.0.1:40123", False),
        ("http://127.0.0.1:40123/callback?x=1", False),
        ("http://localhost:40123/callback", False),
        ("http://127.0.0.1.evil.example:80/callback", False),
        ("http://127.0.0.1:80@evil.example/callback", False),
        ("https://127.0.0.1:443/callback", False),
    ],
)
async def test_programs_on_the_browsers_machine_take_any_port(world: World, redirect_uri: str, good: bool) -> None:
    listed = ("http://127.0.0.1/callback", "http://[::1]/callback")
    flow = CodeFlow(world.http, world.google(), Client(CLIENT_ID, CLIENT_SECRET, listed))
    error = await refusal(flow.prove(code(world, redirect_uri=redirect_uri, verifier="w" * 43)))
    # The verifier is wrong, so all are refused: by the provider, with the very URI, or before it is asked.
    expected = grpc.StatusCode.UNAUTHENTICATED if good else grpc.StatusCode.INVALID_ARGUMENT
    assert error.code is expected
    assert len([path for path in world.issuer.asked if "token" in path]) == (1 if good else 0)


@pytest.mark.parametrize(
    "said",
    [
        (401, b'{"error": "invalid_client"}'),
        (400, b'{"error": "invalid_client"}'),
        (500, b"{}"),
        (429, b"{}"),
        (302, b"{}"),
        (200, b"{}"),
        (200, b'{"id_token": 7}'),
        (200, b"no json"),
        (200, b"[]"),
        (200, b"[" * 100_000),
        (200, b" " * (oidc.DOCUMENT_MAX_BYTES + 1)),
    ],
)
async def test_a_provider_that_does_not_answer_as_it_should_is_away(world: World, said: tuple[int, bytes]) -> None:
    world.issuer.bent["/token"] = lambda: Answer(said[1], said[0], (("location", "https://evil.example/"),))
    await assert_unavailable(world.code_flow().prove(code(world)))
    assert [path for path in world.issuer.asked if path not in ("/.well-known/openid-configuration", "/jwks", "/token")] == []


# --- keys


async def test_documents_are_fetched_once_for_many(world: World) -> None:
    provider = world.google()
    tokens = [world.issuer.sign(world.issuer.claims()) for _ in range(20)]
    await asyncio.gather(*map(provider.verify, tokens))
    await provider.verify(tokens[0])
    assert world.issuer.asked == ["/.well-known/openid-configuration", "/jwks"]


async def test_an_unknown_key_is_looked_for_but_not_by_everybody(world: World) -> None:
    provider = world.google()
    await provider.verify(world.issuer.sign(world.issuer.claims()))
    world.issuer.rotate("second", 2)
    world.clock.now_s += oidc.UNKNOWN_KEY_RETRY_S + 1
    await provider.verify(world.issuer.sign(world.issuer.claims()))
    asked = len(world.issuer.asked)
    for number in range(50):
        await assert_refused(provider.verify(world.issuer.sign(world.issuer.claims(), key_id=f"made up {number}")))
    assert len(world.issuer.asked) == asked
    world.clock.now_s += oidc.UNKNOWN_KEY_RETRY_S + 1
    await assert_refused(provider.verify(world.issuer.sign(world.issuer.claims(), key_id="made up")))
    assert len(world.issuer.asked) == asked + 2


async def test_a_key_taken_back_is_believed_an_hour_at_most(world: World) -> None:
    provider = world.google()
    token = world.issuer.sign(world.issuer.claims())
    await provider.verify(token)
    world.issuer.rotate("second", 2)
    world.clock.now_s += oidc.KEYS_MAX_AGE_S
    await provider.verify(token)
    world.clock.now_s += 1
    await assert_refused(provider.verify(token))


async def test_while_the_issuer_is_away_its_keys_serve_on_for_a_while(world: World) -> None:
    provider = world.google()
    await assert_refused(provider.verify("x"))
    world.away = True
    await assert_unavailable(provider.verify(world.issuer.sign(world.issuer.claims())))
    world.away = False
    world.clock.now_s += oidc.UNKNOWN_KEY_RETRY_S + 1
    token = world.issuer.sign(world.issuer.claims())
    await provider.verify(token)
    world.away = True
    world.clock.now_s += oidc.KEYS_STALE_MAX_S
    await provider.verify(token)
    # A key that may be new cannot be told from one that is made up.
    await assert_unavailable(provider.verify(world.issuer.sign(world.issuer.claims(), key_id="new")))
    world.clock.now_s += 1
    await assert_unavailable(provider.verify(token))
    world.away = False
    world.clock.now_s += oidc.UNKNOWN_KEY_RETRY_S + 1
    await provider.verify(token)


async def test_who_hangs_up_does_not_end_the_fetch_for_the_others(world: World) -> None:
    provider = world.google()
    release = asyncio.Event()

    async def slow(request: httpx.Request) -> httpx.Response:
        await release.wait()
        said = world.issuer.answer_to(request.method, request.url.path, {})
        return httpx.Response(said.status, stream=httpx.ByteStream(said.body))

    async with httpx.AsyncClient(transport=httpx.MockTransport(slow)) as http:
        provider = oidc.google(http, issuer=ISSUER, client_ids=(CLIENT_ID,), clock=world.clock)
        token = world.issuer.sign(world.issuer.claims())
        first, second = (asyncio.create_task(provider.verify(token)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        release.set()
        await second
    assert len(world.issuer.asked) == 2


@pytest.mark.parametrize(
    "keys",
    [
        [],
        "keys",
        [7],
        [{"kty": "RSA", "kid": "first"}],
        [jwk(rsa_key(1), "first", use="enc")],
        [jwk(rsa_key(1), "first", alg="RS512")],
        [jwk(rsa_key(1), "first", kid=None)],
        [jwk(rsa_key(3, 1024), "first")],
        [{"kty": "oct", "kid": "first", "k": "c2VjcmV0", "alg": "RS256"}],
        [jwk(rsa_key(1), f"{number}") for number in range(oidc.KEYS_MAX + 1)],
    ],
)
async def test_keys_that_cannot_be_used_are_none(world: World, keys: Any) -> None:
    world.issuer.bent["/jwks"] = lambda: answer({"keys": keys})
    await assert_unavailable(world.google().verify(world.issuer.sign(world.issuer.claims())))


async def test_only_an_issuer_with_one_key_need_not_name_it(world: World) -> None:
    token = jwt.encode(world.issuer.claims(), world.issuer.key, "RS256")
    await world.google().verify(token)
    world.issuer.published.append(jwk(rsa_key(2), "second"))
    await assert_refused(world.google().verify(token))


async def test_a_key_beside_others_is_found(world: World) -> None:
    world.issuer.published = [{"kty": "EC"}, jwk(rsa_key(2), "other", use=None), jwk(rsa_key(1), "first", alg=None)]
    await world.google().verify(world.issuer.sign(world.issuer.claims()))


# --- addresses


@pytest.mark.parametrize(
    "url",
    ["https://accounts.google.com", "https://securetoken.google.com/p", "http://127.0.0.1:9400", "http://localhost:1", "http://[::1]:1"],
)
def test_addresses_that_can_be_asked(url: str) -> None:
    assert check_outside_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "http://accounts.google.com",
        "http://127.0.0.1.example.com",
        "http://10.0.0.1",
        "ftp://accounts.google.com",
        "file:///etc/passwd",
        "accounts.google.com",
        "https://",
        "https://user:password@example.com",
        "https://example.com?x=1",
        "https://example.com#x",
        "https://127.1",
        "http://127.1",
        "https://2130706433",
        "https://0x7f.0.0.1",
        "https://0x7f000001",
        "https://127.0.0.01",
        "https://gateway",
        "https://[::0:1]",
        "https://[fe80::1%25eth0]",
        "https://accounts.example.com.",
    ],
)
def test_addresses_that_cannot(url: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        check_outside_url(url)


@pytest.mark.parametrize("name", ["jwks_uri", "token_endpoint", "authorization_endpoint"])
@pytest.mark.parametrize(
    "url",
    [
        "http://accounts.example.com/jwks",
        "http://127.0.0.1:9901/config_dump",
        "https://127.0.0.1/jwks",
        "https://[::1]/jwks",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/jwks",
        "https://gateway:9443/jwks",
        "https://localhost/jwks",
        "https://issuer.localhost/jwks",
        "https://127.1/jwks",
        "https://127.0.1/jwks",
        "https://0x7f.1/jwks",
        "https://0177.0.0.1/jwks",
        "https://2130706433/jwks",
        "https://127.0.0.1./jwks",
        "https://[::ffff:127.0.0.1]/jwks",
        "file:///etc/passwd",
        "https://user@accounts.example.com/jwks",
        7,
        None,
    ],
)
async def test_an_issuer_sends_us_to_no_address_inside(world: World, name: str, url: Any) -> None:
    document = {key: value for key, value in world.issuer.document(**{name: url}).items() if value is not None}
    world.issuer.bent["/.well-known/openid-configuration"] = lambda: answer(document)
    await assert_unavailable(world.google().verify(world.issuer.sign(world.issuer.claims())))
    assert world.issuer.asked == ["/.well-known/openid-configuration"]


async def test_a_document_of_another_issuer_is_not_believed(world: World) -> None:
    world.issuer.bent["/.well-known/openid-configuration"] = lambda: answer(world.issuer.document(issuer=ISSUER + "/"))
    await assert_unavailable(world.google().verify(world.issuer.sign(world.issuer.claims())))
