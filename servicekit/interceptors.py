"""What happens around every RPC, in this order: telemetry, errors, authentication, validation, audit.

Telemetry is outermost, so that refusals are counted; errors come next, so that every refusal inside has a typed status.
gRPC's own services (health, reflection) pass untouched: mTLS guards them.
"""

import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
import protovalidate
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from genmesh.options.v1 import options_pb2
from servicekit import telemetry
from servicekit.audit import LogTrail, Recorder
from servicekit.errors import SIGN_IN_FIRST, MeshError, Reason, permission_denied, unauthenticated
from servicekit.identity import EDGE, Principal, TokenVerifier, current_principal, peer_service, set_principal

_log = structlog.get_logger(__name__)

BEARER = "bearer "
UNGUARDED_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")
PRIVILEGED = (options_pb2.ACCESS_ADMIN, options_pb2.ACCESS_OPERATOR)
CLIENT_ADDRESS = "x-client-address"
ADDRESS_TELLERS = (EDGE, "gateway")
"""Peers whose word on where a call comes from is taken: the gateway passes on what the edge told it, with calls in a caller's name."""
RETRY_AFTER = "retry-after"
REQUEST_ID_MAX = 128
STREAM_CHECK_INTERVAL_S = 5.0
"""How often a stream that sends looks whether its caller may still have it."""

Context = grpc.aio.ServicerContext[Any, Any]


class Malformed:
    """Stands for a request whose bytes are not a message of the method's type."""


@dataclass(slots=True)
class Call:
    """One RPC on its way through the layers."""

    method: str
    request: Message | Malformed
    context: Context
    metadata: Mapping[str, str]
    request_id: str
    code: grpc.StatusCode = grpc.StatusCode.OK


class Layer(Protocol):
    """Something that happens around every RPC."""

    def around(self, call: Call) -> AbstractAsyncContextManager[None]:
        """Enter before the servicer's method runs, leave after it ended (for streams: after the last message)."""
        ...


class Telemetry:
    """Counts, times and traces; binds request id and method to every log line of the call."""

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None]:
        """See Layer."""
        started = time.perf_counter()
        in_flight = telemetry.RPC_IN_FLIGHT.labels(call.method)
        in_flight.inc()
        with (
            structlog.contextvars.bound_contextvars(method=call.method, request_id=call.request_id),
            telemetry.server_span(call.method, call.metadata),
        ):
            try:
                yield
            except BaseException:
                if call.code is grpc.StatusCode.OK:
                    call.code = grpc.StatusCode.CANCELLED
                raise
            finally:
                in_flight.dec()
                seconds = time.perf_counter() - started
                telemetry.RPC_SECONDS.labels(call.method, call.code.name).observe(seconds)
                _log.debug("rpc", code=call.code.name, seconds=round(seconds, 6))


class Errors:
    """Turns exceptions into typed statuses. What nobody foresaw becomes INTERNAL with an id that the log has."""

    def __init__(self, translate: Callable[[Exception], MeshError | None] = lambda _: None) -> None:
        self._translate = translate

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None]:
        """See Layer."""
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # CancelledError is no Exception and passes
            refusal = error if isinstance(error, MeshError) else _not_offered(error) or self._translate(error)
            if refusal is None:
                error_id = str(uuid.uuid4())
                _log.exception("rpc.internal_error", error_id=error_id)
                refusal = MeshError(
                    grpc.StatusCode.INTERNAL, Reason.ERROR_REASON_INTERNAL, f"internal error {error_id}", metadata={"error_id": error_id}
                )
            elif refusal is not error:
                _log.warning("rpc.translated_error", error=repr(error), reason=Reason.Name(refusal.reason))
            call.code = refusal.code
            await _abort(call.context, refusal)


async def _abort(context: Context, refusal: MeshError) -> None:
    status = rpc_status.to_status(refusal.to_status())
    trailers = status.trailing_metadata
    if refusal.retry_after_s is not None:
        # What HTTP has for RetryInfo: Envoy makes it a header of REST answers.
        trailers = (*trailers, (RETRY_AFTER, str(math.ceil(refusal.retry_after_s))))
    await context.abort(status.code, status.details, trailers)


def _not_offered(error: Exception) -> MeshError | None:
    """What the generated base class raises for a method of the contract that a servicer does not define."""
    if isinstance(error, NotImplementedError):
        return MeshError(grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED, "this method is not offered here")
    return None


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Who may call a method, from its options."""

    access: options_pb2.Access.ValueType
    callers: frozenset[str] = frozenset()
    scope: str | None = None
    """What an API key has to be allowed to do; None: no key may call the method."""
    audited: bool = False


@cache
def access_rule(method: str) -> AccessRule:
    """The rule of `/package.Service/Method`, which is served here. Without an `access` option it is ACCESS_UNSPECIFIED."""
    service, _, name = method.removeprefix("/").partition("/")
    options = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name].GetOptions()
    access = options.Extensions[options_pb2.access]
    privileged = access in PRIVILEGED
    scope = options_pb2.SCOPE_ADMIN if privileged else options.Extensions[options_pb2.scope]
    return AccessRule(
        access,
        frozenset(options.Extensions[options_pb2.callers]),
        scope=options_pb2.Scope.Name(scope).removeprefix("SCOPE_").lower() if scope else None,
        audited=privileged or options.Extensions[options_pb2.audited],
    )


class Authentication:
    """Proves the caller and checks the method's `access` option; what no rule allows is refused."""

    def __init__(self, verifier: TokenVerifier, recorder: Recorder | None = None) -> None:
        self._verifier = verifier
        self._recorder = recorder or Recorder(LogTrail())

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None]:
        """See Layer."""
        service = peer_service(call.context.auth_context())
        rule = access_rule(call.method)
        proven = await self._prove(rule, call, service)
        principal = replace(proven, client_address=_client_address(call, service), request_id=call.request_id)
        try:
            _authorize(rule, principal)
        except MeshError as refusal:
            if rule.access in PRIVILEGED and isinstance(call.request, Message):
                await self._recorder.refused(call.method, call.request, principal, refusal)
            raise
        set_principal(principal)
        yield

    async def _prove(self, rule: AccessRule, call: Call, service: str | None) -> Principal:
        authorization = call.metadata.get("authorization", "")
        if rule.access == options_pb2.ACCESS_PUBLIC:
            return Principal(service=service)
        if service is not None and service in rule.callers and not authorization:
            return Principal(service=service)
        if rule.access == options_pb2.ACCESS_USER or rule.access in PRIVILEGED:
            if not authorization.lower().startswith(BEARER):
                raise unauthenticated(Reason.ERROR_REASON_TOKEN_MISSING, SIGN_IN_FIRST)
            return await self._verifier.verify(authorization[len(BEARER) :].strip())
        raise permission_denied("this call is not open to this caller")


def _authorize(rule: AccessRule, principal: Principal) -> None:
    """What the proven caller may do; services were weighed when they were proven."""
    if principal.scopes is not None and rule.scope not in principal.scopes:
        raise scope_missing(rule.scope)
    if rule.access == options_pb2.ACCESS_ADMIN and not principal.is_admin:
        raise permission_denied("this call needs the role admin")
    if rule.access == options_pb2.ACCESS_OPERATOR and not principal.is_operator:
        raise permission_denied("this call needs the role operator")


def scope_missing(scope: str | None) -> MeshError:
    """PERMISSION_DENIED (SCOPE_MISSING): a call that the API key in use may not make."""
    what = f"this API key lacks the scope {scope}" if scope else "no API key may do this: sign in"
    return MeshError(grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_SCOPE_MISSING, what, metadata={"scope": scope or ""})


def _client_address(call: Call, service: str | None) -> str:
    if service in ADDRESS_TELLERS:
        return call.metadata.get(CLIENT_ADDRESS, "")
    # `ipv4:10.0.0.1:4711`, `ipv6:%5B::1%5D:4711`
    address = unquote(call.context.peer()).partition(":")[2]
    return address.rpartition(":")[0].strip("[]")


class Audit:
    """Writes an entry of the audit trail around every method that asks for one."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None]:
        """See Layer."""
        rule = access_rule(call.method)
        if not rule.audited or isinstance(call.request, Malformed):
            yield
            return
        async with self._recorder.around(call.method, call.request, rule.access):
            yield


class Validation:
    """Checks requests against the protovalidate rules of the proto."""

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncGenerator[None]:
        """See Layer."""
        if isinstance(call.request, Malformed):
            raise MeshError(
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.ERROR_REASON_MALFORMED_REQUEST,
                "the request is not a valid message (is every string UTF-8?)",
            )
        try:
            protovalidate.validate(call.request)
        except protovalidate.ValidationError as error:
            violations = [(field_path(violation.proto.field), violation.proto.message) for violation in error.violations]
            # A rule about several fields has no field of its own.
            summary = "; ".join(f"{field}: {description}" if field else description for field, description in violations)
            raise MeshError(
                grpc.StatusCode.INVALID_ARGUMENT, Reason.ERROR_REASON_INVALID_ARGUMENT, summary, violations=violations
            ) from None
        yield


def field_path(path: Any) -> str:
    """`spec.image.prompt`, `job_ids[2]` from a protovalidate field path."""
    parts: list[str] = []
    for element in path.elements if path is not None else ():
        subscript = element.subscript
        parts.append(element.field_name + (f"[{subscript.value}]" if subscript is not None else ""))
    return ".".join(parts)


class Interceptor(grpc.aio.ServerInterceptor):
    """Runs the layers around every method with one request message (unary or server streaming).

    Server-streaming methods are async generators; they may yield messages or messages already serialised.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Wrap the handler of a call; None (unknown method) stays None."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        if handler is None or method.startswith(UNGUARDED_PREFIXES):
            return handler
        if handler.request_streaming:
            raise TypeError(f"{method}: client streaming is not part of the contract")
        metadata = {key: value for key, value in handler_call_details.invocation_metadata if isinstance(value, str)}  # pyright: ignore[reportAttributeAccessIssue]
        request_id = metadata.get("x-request-id", "")[:REQUEST_ID_MAX] or str(uuid.uuid4())

        def deserialize(data: bytes) -> Message | Malformed:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return Malformed()

        def serialize(response: Message | bytes) -> bytes:
            # A fan-out serialises a message once and hands the same bytes to every stream.
            return response if isinstance(response, bytes) else handler.response_serializer(response)

        if handler.response_streaming:
            # A coroutine that writes, not one more generator around the method's: a fan-out feels each of them.
            async def stream(request: Message | Malformed, context: Context) -> None:
                write = context.write
                async with AsyncExitStack() as stack:
                    await self._enter(stack, Call(method, request, context, metadata, request_id))
                    caller, checked = current_principal(), time.monotonic()
                    async with aclosing(handler.unary_stream(request, context)) as responses:
                        async for response in responses:
                            await write(response)
                            if time.monotonic() - checked > STREAM_CHECK_INTERVAL_S:
                                caller.check_alive()
                                checked = time.monotonic()

            return grpc.unary_stream_rpc_method_handler(stream, deserialize, serialize)  # pyright: ignore[reportArgumentType]

        async def unary(request: Message | Malformed, context: Context) -> Any:
            async with AsyncExitStack() as stack:
                await self._enter(stack, Call(method, request, context, metadata, request_id))
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, deserialize, handler.response_serializer)  # pyright: ignore[reportArgumentType]

    async def _enter(self, stack: AsyncExitStack, call: Call) -> None:
        for layer in self._layers:
            await stack.enter_async_context(layer.around(call))
