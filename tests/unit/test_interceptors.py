"""The layers around every RPC, on a real server with mTLS and a service made for the purpose."""

import asyncio
import base64
import dataclasses
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import jwt
import prometheus_client
import pytest
import pytest_asyncio
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from structlog.testing import capture_logs

from genmesh.errors.v1 import errors_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.options.v1 import options_pb2
from servicekit import audit, interceptors
from servicekit.audit import AuditEntry
from servicekit.client import mesh_channel
from servicekit.errors import DOMAIN, MeshError, Reason, not_found, unavailable
from servicekit.identity import ALGORITHM, TokenVerifier, current_principal
from servicekit.revocations import Revocations, Revoked
from servicekit.server import MeshServer
from servicekit.settings import MeshSettings, ServerSettings

PROBE = "genmesh.probe.v1.ProbeService"
ISSUER = "https://issuer.test"
AUDIENCE = "probe"
KEY_ID = "the-key"
USER_ID = "01890a5d-ac96-774b-bcce-b302099a8057"


@dataclass(frozen=True)
class Method:
    """A method of the probe: its options and form."""

    name: str
    access: options_pb2.Access.ValueType = options_pb2.ACCESS_UNSPECIFIED
    callers: tuple[str, ...] = ()
    request: type[Message] = identity_pb2.ListUsersRequest
    streaming: bool = False
    scope: options_pb2.Scope.ValueType = options_pb2.SCOPE_UNSPECIFIED
    audited: bool = False

    @property
    def path(self) -> str:
        return f"/{PROBE}/{self.name}"


UNSTATED = Method("Unstated")
PUBLIC = Method("Public", options_pb2.ACCESS_PUBLIC)
NESTED = Method("Nested", options_pb2.ACCESS_PUBLIC, request=identity_pb2.SignInRequest)
USER = Method("User", options_pb2.ACCESS_USER)
USER_OR_JOBS = Method("UserOrJobs", options_pb2.ACCESS_USER, ("jobs_service",))
ADMIN = Method("Admin", options_pb2.ACCESS_ADMIN)
SERVICE = Method("Service", options_pb2.ACCESS_SERVICE, ("jobs_service",))
WATCH = Method("Watch", options_pb2.ACCESS_PUBLIC, streaming=True)
WATCH_USER = Method("WatchUser", options_pb2.ACCESS_USER, streaming=True)
OPERATOR = Method("Operator", options_pb2.ACCESS_OPERATOR)
READ = Method("Read", options_pb2.ACCESS_USER, scope=options_pb2.SCOPE_READ)
SUBMIT = Method("Submit", options_pb2.ACCESS_USER, scope=options_pb2.SCOPE_SUBMIT)
AUDITED = Method("Audited", options_pb2.ACCESS_USER, request=identity_pb2.RevokeApiKeyRequest, audited=True)
AUDITED_SIGN_IN = Method("AuditedSignIn", options_pb2.ACCESS_PUBLIC, audited=True)
WATCH_AUDITED = Method("WatchAudited", options_pb2.ACCESS_ADMIN, streaming=True)
METHODS = (
    *(UNSTATED, PUBLIC, NESTED, USER, USER_OR_JOBS, ADMIN, SERVICE, WATCH, WATCH_USER),
    *(OPERATOR, READ, SUBMIT, AUDITED, AUDITED_SIGN_IN, WATCH_AUDITED),
)


def describe_probe() -> None:
    """Add the probe to the descriptors, where the layers look for a method's options."""
    file = descriptor_pb2.FileDescriptorProto(
        name="genmesh/probe/v1/probe.proto",
        package="genmesh.probe.v1",
        syntax="proto3",
        dependency=[identity_pb2.DESCRIPTOR.name, options_pb2.DESCRIPTOR.name],
    )
    service = file.service.add(name="ProbeService")
    for method in METHODS:
        described = service.method.add(
            name=method.name,
            input_type=f".{method.request.DESCRIPTOR.full_name}",
            output_type=f".{identity_pb2.User.DESCRIPTOR.full_name}",
            server_streaming=method.streaming,
        )
        if method.access:
            described.options.Extensions[options_pb2.access] = method.access
        described.options.Extensions[options_pb2.callers].extend(method.callers)
        if method.scope:
            described.options.Extensions[options_pb2.scope] = method.scope
        if method.audited:
            described.options.Extensions[options_pb2.audited] = True
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())


async def echo_caller(_request: Any) -> identity_pb2.User:
    """Answer with who the layers say is calling."""
    principal = current_principal()
    return identity_pb2.User(user_id=principal.user_id or "", display_name=principal.service or "", roles=sorted(principal.roles))


async def count_to_three(_request: Any) -> AsyncGenerator[identity_pb2.User]:
    for number in range(3):
        yield identity_pb2.User(user_id=str(number))


class OneKey:
    """A key source with the one key that signs."""

    def __init__(self) -> None:
        self.private = Ed25519PrivateKey.generate()
        raw = self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        x = base64.urlsafe_b64encode(raw).decode().rstrip("=")
        self.public = jwt.PyJWK.from_dict({"kty": "OKP", "crv": "Ed25519", "x": x, "alg": ALGORITHM, "kid": KEY_ID})
        self.public_pem = self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        return self.public if key_id == KEY_ID else None

    def token(self, *, key_id: str | None = KEY_ID, **claims: Any) -> str:
        return jwt.encode(
            {key: value for key, value in (valid_claims() | claims).items() if value is not None},
            self.private,
            algorithm=ALGORITHM,
            headers={} if key_id is None else {"kid": key_id},
        )


def valid_claims() -> dict[str, Any]:
    now = int(time.time())
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": USER_ID, "iat": now, "exp": now + 900, "jti": str(uuid.uuid4()), "roles": []}


class OddError(Exception):
    """Stands for an exception of a library that `translate` knows."""


class MemoryTrail:
    """Keeps entries in memory; `away` makes it refuse what it is told, `slow` makes ends of acts wait for `go_on`."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.begun: list[AuditEntry] = []
        self.finished: list[AuditEntry] = []
        self.away = False
        self.writing, self.slow = asyncio.Event(), False
        self.go_on = asyncio.Event()

    async def begin(self, entry: AuditEntry) -> None:
        await self._take(self.begun, entry)

    async def finish(self, entry: AuditEntry) -> None:
        await self._take(self.finished, entry)

    async def _take(self, kept: list[AuditEntry], entry: AuditEntry) -> None:
        if self.away:
            raise ConnectionError("the trail is away")
        if self.slow and entry.code is not None:
            self.writing.set()
            await self.go_on.wait()
        kept.append(dataclasses.replace(entry, details=dict(entry.details)))


class Probe:
    """A running server; tests set what its methods do."""

    def __init__(self, certificates: Path) -> None:
        self.keys = OneKey()
        self.trail = MemoryTrail()
        self.revocations = Revocations()
        self.unary: Callable[[Any], Awaitable[identity_pb2.User]] = echo_caller
        self.stream: Callable[[Any], AsyncGenerator[identity_pb2.User]] = count_to_three
        self.settings = MeshSettings.model_validate({"certificates_dir": certificates})
        self.server = MeshServer(
            ServerSettings.model_validate({"certificates_dir": certificates, "drain_s": 0}),
            service="jobs_service",
            verifier=TokenVerifier(self.keys, issuer=ISSUER, audience=AUDIENCE, revocations=self.revocations),
            checks={},
            translate=lambda error: unavailable("translated") if isinstance(error, OddError) else None,
            audit=self.trail,
        )

        async def unary(request: Any, _context: Any) -> identity_pb2.User:
            return await self.unary(request)

        async def stream(request: Any, _context: Any) -> AsyncIterator[identity_pb2.User]:
            async for message in self.stream(request):
                yield message

        self.server.grpc.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    PROBE,
                    {
                        method.name: grpc.unary_stream_rpc_method_handler(
                            stream,  # pyright: ignore[reportArgumentType]
                            method.request.FromString,
                            identity_pb2.User.SerializeToString,
                        )
                        if method.streaming
                        else grpc.unary_unary_rpc_method_handler(
                            unary,  # pyright: ignore[reportArgumentType]
                            method.request.FromString,
                            identity_pb2.User.SerializeToString,
                        )
                        for method in METHODS
                    },
                )
            ]
        )

    def channel(self, caller: str) -> grpc.aio.Channel:
        return mesh_channel(self.settings, f"127.0.0.1:{self.server.port}", caller=caller, service="jobs_service")


@pytest_asyncio.fixture(scope="module")
async def running(certificates: Path) -> AsyncGenerator[Probe]:
    describe_probe()
    probe = Probe(certificates)
    async with probe.server.running(PROBE):
        yield probe


@pytest.fixture
def probe(running: Probe) -> Probe:
    running.unary, running.stream = echo_caller, count_to_three
    running.trail.forget()
    return running


@pytest_asyncio.fixture
async def call(probe: Probe) -> AsyncGenerator[Callable[..., Any]]:
    """`call(method, request, token=…, caller=…)` starts a call; `caller` names the client's certificate."""
    channels: dict[str, grpc.aio.Channel] = {}

    def start(
        method: Method, request: Message | bytes | None = None, *, token: str | None = None, caller: str = "envoy", **metadata: str
    ) -> Any:
        channel = channels.get(caller) or channels.setdefault(caller, probe.channel(caller))
        connect = channel.unary_stream if method.streaming else channel.unary_unary
        data = request if isinstance(request, bytes) else (request or method.request()).SerializeToString()
        headers = {key.replace("_", "-"): value for key, value in metadata.items()}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        # Requests go as bytes, so that broken ones can be sent too.
        return connect(method.path, None, identity_pb2.User.FromString)(data, metadata=tuple(headers.items()), timeout=20)

    yield start
    for channel in channels.values():
        await channel.close()


@dataclass(frozen=True)
class Refusal:
    """What a client sees of a refused call."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    violations: list[tuple[str, str]]


async def finish(started: Any) -> None:
    """Wait for the answer of a call, or for the end of a stream."""
    if not hasattr(started, "__aiter__"):
        await started
        return
    async for _ in started:
        pass


async def refusal(started: Any) -> Refusal:
    """Wait for a call (or the end of a stream) to be refused. Every refusal has exactly one ErrorInfo of our domain."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish(started)
    status = rpc_status.from_call(caught.value)  # pyright: ignore[reportArgumentType]
    assert status is not None, caught.value
    infos: list[error_details_pb2.ErrorInfo] = []
    violations: list[tuple[str, str]] = []
    for detail in status.details:
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            infos.append(info)
        elif detail.Unpack(bad_request):
            violations += [(violation.field, violation.description) for violation in bad_request.field_violations]
    assert [info.domain for info in infos] == [DOMAIN]
    reason = infos[0].reason.removeprefix("ERROR_REASON_")
    assert errors_pb2.ErrorReason.Value(infos[0].reason)
    return Refusal(caught.value.code(), reason, status.message, dict(infos[0].metadata), violations)


def verdict(refused: Refusal) -> tuple[grpc.StatusCode, str]:
    return refused.code, refused.reason


TOKEN_MISSING = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
TOKEN_INVALID = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
TOKEN_EXPIRED = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


# --- access


@pytest.mark.parametrize("caller", ["envoy", "jobs_service"])
async def test_a_method_without_the_option_is_refused_to_everybody(probe: Probe, call: Any, caller: str) -> None:
    assert verdict(await refusal(call(UNSTATED, caller=caller))) == DENIED
    assert verdict(await refusal(call(UNSTATED, caller=caller, token=probe.keys.token(roles=["admin"])))) == DENIED


@pytest.mark.parametrize("token", [None, "nonsense"])
async def test_public_needs_nothing_and_reads_no_token(call: Any, token: str | None) -> None:
    assert (await call(PUBLIC, token=token)).user_id == ""


async def test_user_needs_a_token(probe: Probe, call: Any) -> None:
    missing = await refusal(call(USER))
    assert verdict(missing) == TOKEN_MISSING
    assert "x-api-key" in missing.message
    answer = await call(USER, token=probe.keys.token(roles=["operator", "admin"]))
    assert (answer.user_id, list(answer.roles), answer.display_name) == (USER_ID, ["admin", "operator"], "")


@pytest.mark.parametrize("authorization", ["", "Basic YTpi", "Bearer", "token"])
async def test_what_is_no_bearer_token_is_a_missing_token(call: Any, authorization: str) -> None:
    assert verdict(await refusal(call(USER, authorization=authorization))) == TOKEN_MISSING


async def test_the_scheme_has_no_case(probe: Probe, call: Any) -> None:
    assert (await call(USER, authorization=f"bEARER {probe.keys.token()}")).user_id == USER_ID


async def test_admin_needs_the_role(probe: Probe, call: Any) -> None:
    assert verdict(await refusal(call(ADMIN))) == TOKEN_MISSING
    assert verdict(await refusal(call(ADMIN, token=probe.keys.token(roles=["operator"])))) == DENIED
    assert (await call(ADMIN, token=probe.keys.token(roles=["admin"]))).user_id == USER_ID


async def test_service_needs_the_certificate_of_a_named_caller(probe: Probe, call: Any) -> None:
    assert (await call(SERVICE, caller="jobs_service")).display_name == "jobs_service"
    for other in ("envoy", "credit_service", "cli"):
        assert verdict(await refusal(call(SERVICE, caller=other))) == DENIED
    # No token opens it, an administrator's neither.
    assert verdict(await refusal(call(SERVICE, token=probe.keys.token(roles=["admin"])))) == DENIED


async def test_a_named_caller_goes_beside_users(probe: Probe, call: Any) -> None:
    answer = await call(USER_OR_JOBS, caller="jobs_service")
    assert (answer.user_id, answer.display_name) == ("", "jobs_service")
    assert verdict(await refusal(call(USER_OR_JOBS, caller="credit_service"))) == TOKEN_MISSING
    assert (await call(USER_OR_JOBS, token=probe.keys.token())).user_id == USER_ID


async def test_a_token_goes_before_the_certificate(probe: Probe, call: Any) -> None:
    """A service that passes a user's token on acts for the user; with a bad token it does not fall back to itself."""
    assert (await call(USER_OR_JOBS, caller="jobs_service", token=probe.keys.token())).user_id == USER_ID
    assert verdict(await refusal(call(USER_OR_JOBS, caller="jobs_service", token="nonsense"))) == TOKEN_INVALID


async def test_a_peer_without_a_mesh_certificate_does_not_get_in(probe: Probe, certificates: Path) -> None:
    anonymous = grpc.ssl_channel_credentials((certificates / "ca.crt").read_bytes())
    options = [("grpc.ssl_target_name_override", "jobs-service.genmesh.internal")]
    for channel in (
        grpc.aio.secure_channel(f"127.0.0.1:{probe.server.port}", anonymous, options=options),
        grpc.aio.insecure_channel(f"127.0.0.1:{probe.server.port}"),
    ):
        async with channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(PUBLIC.path)(b"", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# --- kinds of tokens


def unsigned(claims: dict[str, Any]) -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none', 'typ': 'JWT', 'kid': KEY_ID})}.{part(claims)}."


def signed_with_the_public_key(keys: OneKey) -> str:
    """The public key taken for the secret of an HMAC. PyJWT refuses to make such a token: by hand."""
    header = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "typ": "JWT", "kid": KEY_ID}).encode()).rstrip(b"=")
    claims = base64.urlsafe_b64encode(json.dumps(valid_claims()).encode()).rstrip(b"=")
    signed = header + b"." + claims
    signature = hmac.digest(keys.public_pem, signed, "sha256")
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def changed_after_signing(keys: OneKey) -> str:
    header, _, signature = keys.token().split(".")
    claims = base64.urlsafe_b64encode(json.dumps(valid_claims() | {"roles": ["admin"]}).encode()).decode().rstrip("=")
    return f"{header}.{claims}.{signature}"


def long_ago() -> dict[str, int]:
    return {"iat": int(time.time()) - 1000, "exp": int(time.time()) - 100}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda _: unsigned(valid_claims()), TOKEN_INVALID),
        (signed_with_the_public_key, TOKEN_INVALID),
        (changed_after_signing, TOKEN_INVALID),
        (lambda _: OneKey().token(), TOKEN_INVALID),
        (lambda keys: keys.token(key_id="other"), TOKEN_INVALID),
        (lambda keys: keys.token(key_id=None), TOKEN_INVALID),
        (lambda keys: keys.token(iss="https://other.test"), TOKEN_INVALID),
        (lambda keys: keys.token(iss=None), TOKEN_INVALID),
        (lambda keys: keys.token(aud="other"), TOKEN_INVALID),
        (lambda keys: keys.token(aud=None), TOKEN_INVALID),
        (lambda keys: keys.token(sub=None), TOKEN_INVALID),
        (lambda keys: keys.token(exp=None), TOKEN_INVALID),
        (lambda keys: keys.token(iat=int(time.time()) + 3600), TOKEN_INVALID),
        (lambda keys: keys.token(**long_ago()), TOKEN_EXPIRED),
        (lambda _: "nonsense", TOKEN_INVALID),
        (lambda _: "a.b.c", TOKEN_INVALID),
        (lambda _: "x" * 4000, TOKEN_INVALID),
    ],
    ids=[
        "alg none",
        "HS256 with the public key",
        "changed claims",
        "another key under our id",
        "unknown key id",
        "no key id",
        "other issuer",
        "no issuer",
        "other audience",
        "no audience",
        "no subject",
        "no expiry",
        "from the future",
        "expired",
        "no token at all",
        "three parts of nothing",
        "long",
    ],
)
@pytest.mark.parametrize("method", [USER, WATCH_USER], ids=["unary", "stream"])
async def test_tokens_that_prove_nothing(
    probe: Probe, call: Any, method: Method, make: Callable[[OneKey], str], expected: tuple[grpc.StatusCode, str]
) -> None:
    assert verdict(await refusal(call(method, token=make(probe.keys)))) == expected


# --- validation


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab", b"\x12\x01\xff"], ids=["garbage", "cut short", "string not UTF-8"])
async def test_bytes_that_are_no_message(call: Any, data: bytes) -> None:
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert verdict(await refusal(call(PUBLIC, data))) == expected
    assert verdict(await refusal(call(WATCH, data))) == expected


async def test_who_is_asked_before_what(call: Any) -> None:
    assert verdict(await refusal(call(USER, b"\xff"))) == TOKEN_MISSING
    assert verdict(await refusal(call(USER, identity_pb2.ListUsersRequest(page_size=-1)))) == TOKEN_MISSING


async def test_every_broken_rule_is_named_by_its_field(call: Any) -> None:
    refused = await refusal(call(PUBLIC, identity_pb2.ListUsersRequest(page_size=-1, email="x" * 255)))
    assert verdict(refused) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    assert [field for field, _ in refused.violations] == ["page_size", "email"]
    assert all(description for _, description in refused.violations)


async def test_nested_fields_and_oneofs_have_their_path(call: Any) -> None:
    nested = await refusal(call(NESTED, identity_pb2.SignInRequest(password=identity_pb2.PasswordCredential(email="a"))))
    assert [field for field, _ in nested.violations] == ["password.password"]
    missing = await refusal(call(NESTED, identity_pb2.SignInRequest()))
    assert [field for field, _ in missing.violations] == ["credential"]


async def test_broken_rules_end_a_stream_before_it_starts(probe: Probe, call: Any) -> None:
    started: list[Any] = []

    async def stream(request: Any) -> AsyncGenerator[identity_pb2.User]:
        started.append(request)
        yield identity_pb2.User()

    probe.stream = stream
    refused = await refusal(call(WATCH, identity_pb2.ListUsersRequest(page_size=-1)))
    assert [field for field, _ in refused.violations] == ["page_size"]
    assert started == []


# --- errors

SECRET = "SELECT password FROM /etc/shadow"


def raising(error: BaseException) -> Callable[[Any], Awaitable[identity_pb2.User]]:
    async def unary(_request: Any) -> identity_pb2.User:
        raise error

    return unary


async def test_a_domain_error_is_its_status(probe: Probe, call: Any) -> None:
    probe.unary = raising(
        MeshError(grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_JOB_TERMINAL, "the job ended", metadata={"state": "S"})
    )
    refused = await refusal(call(PUBLIC))
    assert refused == Refusal(grpc.StatusCode.FAILED_PRECONDITION, "JOB_TERMINAL", "the job ended", {"state": "S"}, [])


@pytest.mark.parametrize(("retry_after_s", "told"), [(None, None), (1, "1"), (0.2, "1"), (59.1, "60")])
@pytest.mark.parametrize("method", [PUBLIC, WATCH], ids=["call", "stream"])
async def test_when_to_come_back_is_told_as_http_tells_it(
    probe: Probe, call: Any, method: Method, retry_after_s: float | None, told: str | None
) -> None:
    error = MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE, "away", retry_after_s=retry_after_s)

    async def stream(_request: Any) -> AsyncGenerator[identity_pb2.User]:
        yield identity_pb2.User()
        raise error

    probe.unary, probe.stream = raising(error), stream
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish(call(method))
    assert dict(caught.value.trailing_metadata()).get("retry-after") == told
    assert rpc_status.from_call(caught.value) == error.to_status()  # pyright: ignore[reportArgumentType]


async def test_an_unforeseen_exception_tells_nothing_but_the_id_in_the_log(probe: Probe, call: Any) -> None:
    probe.unary = raising(RuntimeError(SECRET))
    with capture_logs() as logs:
        refused = await refusal(call(PUBLIC))
    assert verdict(refused) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    error_id = refused.metadata["error_id"]
    assert refused.message == f"internal error {error_id}"
    assert SECRET not in repr(refused)
    (logged,) = [entry for entry in logs if entry["event"] == "rpc.internal_error"]
    assert logged["error_id"] == error_id
    assert logged["exc_info"]


async def test_errors_of_libraries_are_translated(probe: Probe, call: Any) -> None:
    probe.unary = raising(OddError(SECRET))
    refused = await refusal(call(PUBLIC))
    assert verdict(refused) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert refused.message == "translated"


async def test_a_client_that_goes_away_cancels_the_method(probe: Probe, call: Any, caplog: pytest.LogCaptureFixture) -> None:
    entered, left = asyncio.Event(), asyncio.Event()
    seen: list[type[BaseException]] = []

    async def unary(_request: Any) -> identity_pb2.User:
        entered.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            seen.append(type(error))
            raise
        finally:
            left.set()
        raise AssertionError("unreachable")

    probe.unary = unary
    before = observed(PUBLIC, "CANCELLED")
    with caplog.at_level(logging.ERROR), capture_logs() as logs:
        started = call(PUBLIC)
        await entered.wait()
        started.cancel()
        await asyncio.wait_for(left.wait(), 20)
        await until(lambda: observed(PUBLIC, "CANCELLED") == before + 1)
    assert seen == [asyncio.CancelledError]
    assert not caplog.records
    assert "rpc.internal_error" not in [entry["event"] for entry in logs]
    probe.unary = echo_caller
    await call(PUBLIC)


# --- streams


async def test_a_stream_arrives_whole(call: Any) -> None:
    assert [message.user_id async for message in call(WATCH)] == ["0", "1", "2"]


async def test_the_caller_is_known_until_the_end_of_a_stream(probe: Probe, call: Any) -> None:
    async def stream(_request: Any) -> AsyncGenerator[identity_pb2.User]:
        for _ in range(2):
            yield identity_pb2.User(user_id=current_principal().user_id or "")

    probe.stream = stream
    assert [message.user_id async for message in call(WATCH_USER, token=probe.keys.token())] == [USER_ID] * 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [(not_found("job"), (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")), (RuntimeError(SECRET), (grpc.StatusCode.INTERNAL, "INTERNAL"))],
    ids=["domain error", "unforeseen"],
)
async def test_an_error_amid_a_stream_comes_after_what_was_sent(
    probe: Probe, call: Any, error: Exception, expected: tuple[grpc.StatusCode, str]
) -> None:
    async def stream(_request: Any) -> AsyncGenerator[identity_pb2.User]:
        yield identity_pb2.User(user_id="first")
        raise error

    probe.stream = stream
    with capture_logs():
        messages = aiter(call(WATCH))
        assert (await anext(messages)).user_id == "first"
        refused = await refusal(messages)
    assert verdict(refused) == expected
    assert SECRET not in repr(refused)


async def test_a_client_that_leaves_a_stream_ends_the_generator(probe: Probe, call: Any) -> None:
    left = asyncio.Event()

    async def stream(_request: Any) -> AsyncGenerator[identity_pb2.User]:
        try:
            yield identity_pb2.User(user_id="first")
            await asyncio.Event().wait()
        finally:
            left.set()

    probe.stream = stream
    before = observed(WATCH, "CANCELLED")
    started = call(WATCH)
    await started.read()
    started.cancel()
    await asyncio.wait_for(left.wait(), 20)
    await until(lambda: observed(WATCH, "CANCELLED") == before + 1)


# --- telemetry


def observed(method: Method, code: str) -> float:
    """Calls counted for a method and code."""
    labels = {"method": method.path, "code": code}
    return prometheus_client.REGISTRY.get_sample_value("genmesh_rpc_duration_seconds_count", labels) or 0.0


def in_flight(method: Method) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value("genmesh_rpc_in_flight", {"method": method.path})


async def until(reached: Callable[[], bool]) -> None:
    """Let the server's tasks run until `reached()`: what it counts after the last byte has no signal for clients."""
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("method", "code"),
    [(PUBLIC, "OK"), (WATCH, "OK"), (USER, "UNAUTHENTICATED"), (WATCH_USER, "UNAUTHENTICATED"), (UNSTATED, "PERMISSION_DENIED")],
)
async def test_calls_are_counted_refusals_too(call: Any, method: Method, code: str) -> None:
    before = observed(method, code)
    if code != "OK":
        await refusal(call(method))
    elif method.streaming:
        assert [message async for message in call(method)]
    else:
        await call(method)
    await until(lambda: observed(method, code) == before + 1 and in_flight(method) == 0)


async def test_the_log_of_a_call_has_its_request_id(probe: Probe, call: Any) -> None:
    probe.unary = raising(RuntimeError("boom"))
    bound: list[dict[str, Any]] = []

    def read(_logger: Any, _name: str, event: Any) -> Any:
        bound.append(dict(structlog.contextvars.get_contextvars()))
        return event

    with capture_logs(processors=[read]):
        await refusal(call(PUBLIC, x_request_id="request-17"))
    assert any({"request_id": "request-17", "method": PUBLIC.path}.items() <= one.items() for one in bound)


# --- beside the contract


async def test_an_unknown_method_is_unimplemented(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(Method("Nothing"))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_and_reflection_need_no_token(probe: Probe) -> None:
    async with probe.channel("envoy") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service=PROBE))
        async for state in watching:
            if state.status == health_pb2.HealthCheckResponse.SERVING:
                break
        watching.cancel()

        async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(cast("grpc.Channel", channel))
        answers = reflection.ServerReflectionInfo(ask())
        names = [service.name async for answer in answers for service in answer.list_services_response.service]
        assert PROBE in names


# --- roles, keys, revocations


async def test_operator_needs_the_role_or_a_higher_one(probe: Probe, call: Any) -> None:
    assert verdict(await refusal(call(OPERATOR))) == TOKEN_MISSING
    assert verdict(await refusal(call(OPERATOR, token=probe.keys.token()))) == DENIED
    for role in ("operator", "admin"):
        assert (await call(OPERATOR, token=probe.keys.token(roles=[role]))).user_id == USER_ID


def key_token(probe: Probe, *scopes: str, roles: tuple[str, ...] = ()) -> str:
    return probe.keys.token(api_key_id=str(uuid.uuid4()), scopes=list(scopes), roles=list(roles))


@pytest.mark.parametrize(
    ("method", "scope"), [(READ, "read"), (SUBMIT, "submit"), (ADMIN, "admin"), (OPERATOR, "admin"), (USER, None), (AUDITED, None)]
)
async def test_a_key_does_what_its_scopes_say(probe: Probe, call: Any, method: Method, scope: str | None) -> None:
    every = {"read", "submit", "admin"}
    request = identity_pb2.RevokeApiKeyRequest(api_key_id=USER_ID) if method is AUDITED else None
    others = await refusal(call(method, request, token=key_token(probe, *(every - {scope}), roles=("admin",))))
    assert verdict(others) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
    assert others.metadata == {"scope": scope or ""}
    if scope is not None:
        assert (await call(method, request, token=key_token(probe, scope, roles=("admin",)))).user_id == USER_ID
    # A session has no scopes: it may do all that its user may.
    assert (await call(method, request, token=probe.keys.token(roles=["admin"]))).user_id == USER_ID


async def test_a_key_token_that_says_nothing_may_do_nothing(probe: Probe, call: Any) -> None:
    token = probe.keys.token(api_key_id=str(uuid.uuid4()))
    assert verdict(await refusal(call(READ, token=token))) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
    token = probe.keys.token(api_key_id=str(uuid.uuid4()), scopes=["everything", "*"])
    assert verdict(await refusal(call(READ, token=token))) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")


async def test_scopes_give_no_roles(probe: Probe, call: Any) -> None:
    assert verdict(await refusal(call(ADMIN, token=key_token(probe, "admin")))) == DENIED


@pytest.mark.parametrize("claim", ["sid", "api_key_id"])
@pytest.mark.parametrize("value", ["nonsense", 7, [], {"a": 1}])
async def test_ids_in_tokens_are_ids(probe: Probe, call: Any, claim: str, value: Any) -> None:
    assert verdict(await refusal(call(USER, token=probe.keys.token(**{claim: value})))) == TOKEN_INVALID


TOKEN_REVOKED = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_REVOKED")


@pytest.mark.parametrize(("kind", "claim"), [("session", "sid"), ("api_key", "api_key_id"), ("user", "sub")])
async def test_a_revoked_token_is_refused(probe: Probe, call: Any, kind: Any, claim: str) -> None:
    subject, other, now = str(uuid.uuid4()), str(uuid.uuid4()), int(time.time())
    claims: dict[str, Any] = {"scopes": ["read"]} if kind == "api_key" else {}
    before, later, of_another = (
        probe.keys.token(key_id=KEY_ID, **{claim: whose, "iat": issued}, **claims)
        for whose, issued in ((subject, now - 10), (subject, now), (other, now - 10))
    )
    for token in (before, later, of_another):
        await call(READ, token=token)
    probe.revocations.add(Revoked(kind, subject, now - 5))
    revoked = (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID") if kind == "api_key" else TOKEN_REVOKED
    assert verdict(await refusal(call(READ, token=before))) == revoked, "the token was verified before, and is remembered"
    for token in (later, of_another):
        await call(READ, token=token)


async def test_a_running_stream_ends_when_its_token_is_revoked(probe: Probe, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "STREAM_CHECK_INTERVAL_S", -1.0)
    session_id, open_ = str(uuid.uuid4()), asyncio.Event()

    async def endless(_request: Any) -> AsyncGenerator[identity_pb2.User]:
        yield identity_pb2.User(user_id="first")
        await open_.wait()
        while True:
            yield identity_pb2.User(user_id="more")

    probe.stream = endless
    started = call(WATCH_USER, token=probe.keys.token(sid=session_id))
    messages = aiter(started)
    assert (await anext(messages)).user_id == "first"
    probe.revocations.add(Revoked("session", session_id, time.time() + 1))
    open_.set()
    assert verdict(await refusal(started)) == TOKEN_REVOKED


# --- where a call comes from


async def echo_origin(_request: Any) -> identity_pb2.User:
    principal = current_principal()
    return identity_pb2.User(user_id=principal.client_address, display_name=principal.request_id)


async def test_only_the_edge_and_the_gateway_say_where_a_call_comes_from(probe: Probe, call: Any) -> None:
    probe.unary = echo_origin
    answer = await call(PUBLIC, x_client_address="203.0.113.9", x_request_id="the-request")
    assert (answer.user_id, answer.display_name) == ("203.0.113.9", "the-request")
    assert (await call(PUBLIC, caller="gateway", x_client_address="203.0.113.9")).user_id == "203.0.113.9"
    for other in ("jobs_service", "cli"):
        assert (await call(PUBLIC, caller=other, x_client_address="203.0.113.9")).user_id == "127.0.0.1"
    assert (await call(PUBLIC)).user_id == "", "the edge always says; nobody's word is made up"


# --- the audit trail


async def test_a_privileged_act_is_written_down_before_and_after(probe: Probe, call: Any) -> None:
    seen: list[int] = []

    async def act(_request: Any) -> identity_pb2.User:
        seen.append(len(probe.trail.begun))
        audit.about(subject="somebody", amount="5")
        return identity_pb2.User()

    probe.unary = act
    await call(ADMIN, token=probe.keys.token(roles=["admin"]), x_client_address="203.0.113.9", x_request_id="the-request")
    assert seen == [1], "before the act"
    [begun], [finished] = probe.trail.begun, probe.trail.finished
    assert (begun.method, begun.actor_user_id, begun.client_address, begun.request_id, begun.code) == (
        f"{PROBE}/Admin", USER_ID, "203.0.113.9", "the-request", None,
    )  # fmt: skip
    assert finished.audit_entry_id == begun.audit_entry_id
    assert (finished.subject, finished.details, finished.code, finished.reason) == ("somebody", {"amount": "5"}, 0, "")


async def test_the_request_names_whom_it_is_done_to(probe: Probe, call: Any) -> None:
    key_id = str(uuid.uuid4())
    await call(AUDITED, identity_pb2.RevokeApiKeyRequest(api_key_id=key_id), token=probe.keys.token())
    assert [entry.subject for entry in probe.trail.begun] == [key_id]


async def test_what_cannot_be_written_down_is_not_done(probe: Probe, call: Any) -> None:
    done: list[Any] = []

    async def act(request: Any) -> identity_pb2.User:
        done.append(request)
        return identity_pb2.User()

    probe.unary, probe.trail.away = act, True
    assert (await refusal(call(ADMIN, token=probe.keys.token(roles=["admin"])))).code is grpc.StatusCode.UNAVAILABLE
    assert done == []
    await call(USER, token=probe.keys.token())  # what is not audited does not depend on the trail
    assert len(done) == 1


async def test_an_outcome_that_cannot_be_written_down_undoes_nothing(probe: Probe, call: Any) -> None:
    async def act(_request: Any) -> identity_pb2.User:
        probe.trail.away = True
        return identity_pb2.User(user_id="done")

    probe.unary = act
    with capture_logs() as logs:
        assert (await call(ADMIN, token=probe.keys.token(roles=["admin"]))).user_id == "done"
    [entry] = probe.trail.begun
    unwritten = [line for line in logs if line["event"] == "audit.outcome_unwritten"]
    assert [line["attempt"] for line in unwritten] == [1, 2, 3]
    assert {(line["audit_entry_id"], line["code"]) for line in unwritten} == {(entry.audit_entry_id, 0)}


async def test_refusals_are_outcomes(probe: Probe, call: Any) -> None:
    async def refuse(_request: Any) -> identity_pb2.User:
        raise not_found("account")

    probe.unary = refuse
    await refusal(call(ADMIN, token=probe.keys.token(roles=["admin"])))
    assert [(entry.code, entry.reason) for entry in probe.trail.finished] == [(5, "ERROR_REASON_NOT_FOUND")]


async def test_who_tries_what_they_may_not_do_is_written_down(probe: Probe, call: Any) -> None:
    await refusal(call(ADMIN, token=probe.keys.token(roles=["operator"]), x_client_address="203.0.113.9"))
    await refusal(call(OPERATOR, token=key_token(probe, "read", roles=("admin",))))
    assert [(entry.method.rpartition("/")[2], entry.code, entry.reason) for entry in probe.trail.begun] == [
        ("Admin", 7, "ERROR_REASON_PERMISSION_DENIED"),
        ("Operator", 7, "ERROR_REASON_SCOPE_MISSING"),
    ]
    assert (probe.trail.begun[0].actor_user_id, probe.trail.begun[0].client_address) == (USER_ID, "203.0.113.9")
    # Strangers, and requests that are none, changed nothing and nobody answers for them.
    await refusal(call(ADMIN))
    await refusal(call(ADMIN, identity_pb2.ListUsersRequest(page_size=-1), token=probe.keys.token(roles=["admin"])))
    await refusal(call(SUBMIT, token=key_token(probe, "read")))
    assert len(probe.trail.begun) == 2


async def test_one_account_leaves_no_flood_of_entries(probe: Probe, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "ACTS_PER_MINUTE", 3)
    somebody, request = str(uuid.uuid4()), identity_pb2.RevokeApiKeyRequest(api_key_id=USER_ID)
    token = probe.keys.token(sub=somebody)
    for _ in range(3):
        await call(AUDITED, request, token=token)
    refused = await refusal(call(AUDITED, request, token=token))
    assert verdict(refused) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    assert verdict(await refusal(call(ADMIN, token=token))) == DENIED
    assert len(probe.trail.begun) == 3
    await call(AUDITED, request, token=probe.keys.token(sub=str(uuid.uuid4())))
    for _ in range(5):  # administrators are not held up
        await call(ADMIN, token=probe.keys.token(sub=somebody, roles=["admin"]))


async def ended(probe: Probe, method: Method) -> AuditEntry:
    """The only entry that says how its act ended; a stranger's is written down only then."""
    entries = probe.trail.finished if method is ADMIN else probe.trail.begun
    async with asyncio.timeout(20):
        while not entries:  # noqa: ASYNC110  # nobody signals it
            await asyncio.sleep(0.01)
    [entry] = entries
    return entry


@pytest.mark.parametrize("method", [ADMIN, AUDITED_SIGN_IN])
async def test_hanging_up_leaves_an_entry(probe: Probe, call: Any, method: Method) -> None:
    begun = asyncio.Event()

    async def hang(_request: Any) -> identity_pb2.User:
        audit.done()
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    probe.unary = hang
    started = call(method, token=probe.keys.token(roles=["admin"]))
    await begun.wait()
    started.cancel()
    assert (await ended(probe, method)).code == 1


@pytest.mark.parametrize("method", [ADMIN, AUDITED_SIGN_IN])
@pytest.mark.parametrize("refused", [False, True])
async def test_hanging_up_while_it_is_written_down_leaves_an_entry(probe: Probe, call: Any, method: Method, refused: bool) -> None:
    async def act(_request: Any) -> identity_pb2.User:
        if refused:
            raise MeshError(grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_BAD_CREDENTIALS, "wrong")
        return identity_pb2.User()

    probe.unary, probe.trail.slow = act, True
    started = call(method, token=probe.keys.token(roles=["admin"]))
    await probe.trail.writing.wait()
    started.cancel()
    await asyncio.wait([asyncio.ensure_future(started)])
    assert not (probe.trail.finished if method is ADMIN else probe.trail.begun)
    probe.trail.go_on.set()
    assert (await ended(probe, method)).code == (16 if refused else 0)


async def test_a_stranger_who_changed_nothing_and_hangs_up_leaves_none(probe: Probe, call: Any) -> None:
    """Throttling counts refusals: without this, deadlines of some milliseconds would fill the trail."""
    begun, gone = asyncio.Event(), asyncio.Event()

    async def hang(_request: Any) -> identity_pb2.User:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()
        raise AssertionError

    probe.unary = hang
    started = call(AUDITED_SIGN_IN)
    await begun.wait()
    started.cancel()
    await gone.wait()
    probe.unary = echo_caller
    await call(AUDITED_SIGN_IN)  # written down after whatever the one before would have left
    assert [entry.code for entry in probe.trail.begun] == [0]


async def test_strangers_are_written_down_after_the_fact(probe: Probe, call: Any) -> None:
    async def sign_in(_request: Any) -> identity_pb2.User:
        assert probe.trail.begun == []
        audit.by(USER_ID)
        audit.about(method="password")
        raise MeshError(grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_BAD_CREDENTIALS, "wrong")

    probe.unary = sign_in
    await refusal(call(AUDITED_SIGN_IN))
    [entry] = probe.trail.begun
    assert (entry.actor_user_id, entry.actor_service, entry.details, entry.code) == (USER_ID, "", {"method": "password"}, 16)
    assert probe.trail.finished == []


async def test_a_flood_of_strangers_leaves_no_flood_of_entries(probe: Probe, call: Any) -> None:
    async def limited(_request: Any) -> identity_pb2.User:
        raise MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED, "later")

    probe.unary = limited
    await refusal(call(AUDITED_SIGN_IN))
    assert probe.trail.begun == []


async def test_a_stream_is_one_act(probe: Probe, call: Any) -> None:
    await finish(call(WATCH_AUDITED, token=probe.keys.token(roles=["admin"])))
    assert [entry.method for entry in probe.trail.begun] == [f"{PROBE}/WatchAudited"]
    assert [entry.code for entry in probe.trail.finished] == [0]


async def test_a_fault_is_an_outcome(probe: Probe, call: Any) -> None:
    async def fail(_request: Any) -> identity_pb2.User:
        raise RuntimeError("a fault of ours")

    probe.unary = fail
    assert (await refusal(call(ADMIN, token=probe.keys.token(roles=["admin"])))).code is grpc.StatusCode.INTERNAL
    assert [entry.code for entry in probe.trail.finished] == [13]
