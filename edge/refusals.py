"""What Envoy says when it refuses a request itself: the same google.rpc.Status, with the same reasons, as services answer with.

gRPC and grpc-web read it from `grpc-status` and `grpc-status-details-bin`, REST from a JSON body. Nothing in it comes from the
request; only a request that cannot be read is told what is wrong with it.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from genmesh.errors.v1.errors_pb2 import ErrorReason
from servicekit.errors import SIGN_IN_FIRST

DOMAIN = "genmesh"
SOON_S = 1
"""Buckets of the limits fill every second, health checks find a service within two."""
LATER_S = 60
"""The gateway takes no more guesses of an address for minutes."""
_TYPE_URL = "type.googleapis.com/"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refusal of Envoy's and how it is told. It is the first one that fits `status` and `details`."""

    status: int
    """The HTTP status that Envoy chose."""
    code: int
    """google.rpc.Code."""
    reason: ErrorReason.ValueType
    message: str
    details: str = ""
    """How %RESPONSE_CODE_DETAILS% begins; empty: anyhow."""
    or_above: bool = False
    """Whether higher statuses are meant too."""
    tell_status: int | None = None
    """The HTTP status for REST, where Envoy chose another one."""
    grpc_code: int | None = None
    """google.rpc.Code for gRPC and grpc-web, where it differs."""
    retry_after_s: int | None = None
    """When the same request may go through."""
    explain: bool = False
    """Whether REST is told Envoy's own words."""
    limit: str = ""
    """The name of the limit that was reached."""
    bound: str = ""
    """What that limit bounds, for people."""
    signed_in: bool = False
    """Whether it takes a token that Envoy has verified before it refused."""


_JWT = "jwt_authn_access_denied"
_KEY = "ext_authz_denied"
# Only the transcoder says what is wrong with a request: the words of others are a status's name, or none.
_TRANSCODER = ("grpc_json_transcode_failure", "early_grpc_json_transcode_failure")
_UNREADABLE = "the request cannot be read"

REFUSALS = (
    Refusal(
        401,
        code_pb2.UNAVAILABLE,
        ErrorReason.ERROR_REASON_UNAVAILABLE,
        "access tokens cannot be verified right now",
        details=_JWT + "{Jwks_remote_fetch",
        tell_status=503,
        retry_after_s=SOON_S,
    ),
    Refusal(
        401,
        code_pb2.UNAUTHENTICATED,
        ErrorReason.ERROR_REASON_TOKEN_MISSING,
        SIGN_IN_FIRST,
        details=_JWT + "{Jwt_is_missing",
    ),
    Refusal(
        401,
        code_pb2.UNAUTHENTICATED,
        ErrorReason.ERROR_REASON_TOKEN_EXPIRED,
        "the access token has expired",
        details=_JWT + "{Jwt_is_expired",
    ),
    Refusal(
        401,
        code_pb2.UNAUTHENTICATED,
        ErrorReason.ERROR_REASON_API_KEY_INVALID,
        "the API key is unknown, expired or revoked",
        details=_KEY,
    ),
    Refusal(401, code_pb2.UNAUTHENTICATED, ErrorReason.ERROR_REASON_TOKEN_INVALID, "the access token does not verify"),
    # A wrong audience.
    Refusal(
        403,
        code_pb2.UNAUTHENTICATED,
        ErrorReason.ERROR_REASON_TOKEN_INVALID,
        "the access token does not verify",
        details=_JWT,
        tell_status=401,
    ),
    Refusal(
        403,
        code_pb2.PERMISSION_DENIED,
        ErrorReason.ERROR_REASON_PERMISSION_DENIED,
        "pages of this origin may not do this",
        details="csrf_origin_mismatch",
    ),
    Refusal(403, code_pb2.PERMISSION_DENIED, ErrorReason.ERROR_REASON_PERMISSION_DENIED, "not allowed"),
    Refusal(
        400,
        code_pb2.INVALID_ARGUMENT,
        ErrorReason.ERROR_REASON_INVALID_ARGUMENT,
        "send an API key or an access token, not both",
        details=_KEY,
    ),
    Refusal(404, code_pb2.NOT_FOUND, ErrorReason.ERROR_REASON_NOT_FOUND, "no such resource", grpc_code=code_pb2.UNIMPLEMENTED),
    Refusal(405, code_pb2.UNIMPLEMENTED, ErrorReason.ERROR_REASON_NOT_OFFERED, "the resource has no such method"),
    Refusal(413, code_pb2.RESOURCE_EXHAUSTED, ErrorReason.ERROR_REASON_REQUEST_TOO_LARGE, "the request is too large"),
    Refusal(
        429,
        code_pb2.RESOURCE_EXHAUSTED,
        ErrorReason.ERROR_REASON_LIMIT_REACHED,
        "too many wrong API keys from this address; try again in 1 minute",
        details=_KEY,
        retry_after_s=LATER_S,
        limit="api_keys",
        bound="wrong API keys from this address",
    ),
    # Both buckets refuse in the same words; that of an address is asked before there is a verified token.
    Refusal(
        429,
        code_pb2.RESOURCE_EXHAUSTED,
        ErrorReason.ERROR_REASON_LIMIT_REACHED,
        "too many requests of this account; try again in 1 second",
        retry_after_s=SOON_S,
        limit="edge.user",
        bound="requests per second of this account",
        signed_in=True,
    ),
    Refusal(
        429,
        code_pb2.RESOURCE_EXHAUSTED,
        ErrorReason.ERROR_REASON_LIMIT_REACHED,
        "too many requests from this address; try again in 1 second",
        retry_after_s=SOON_S,
        limit="edge.address",
        bound="requests per second of this address",
    ),
    Refusal(503, code_pb2.UNAVAILABLE, ErrorReason.ERROR_REASON_UNAVAILABLE, "the service is out of reach right now", retry_after_s=SOON_S),
    Refusal(
        504, code_pb2.DEADLINE_EXCEEDED, ErrorReason.ERROR_REASON_UNAVAILABLE, "the service did not answer in time", retry_after_s=SOON_S
    ),
    # A transfer encoding that is not known.
    Refusal(501, code_pb2.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_MALFORMED_REQUEST, _UNREADABLE),
    Refusal(500, code_pb2.INTERNAL, ErrorReason.ERROR_REASON_INTERNAL, "internal error", or_above=True),
    *(
        Refusal(
            400,
            code_pb2.INVALID_ARGUMENT,
            ErrorReason.ERROR_REASON_MALFORMED_REQUEST,
            _UNREADABLE,
            details=details,
            or_above=True,
            explain=True,
        )
        for details in _TRANSCODER
    ),
    Refusal(408, code_pb2.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_MALFORMED_REQUEST, "the request did not arrive in time"),
    Refusal(431, code_pb2.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_MALFORMED_REQUEST, "the headers of the request are too large"),
    Refusal(400, code_pb2.INVALID_ARGUMENT, ErrorReason.ERROR_REASON_MALFORMED_REQUEST, _UNREADABLE, or_above=True),
)


def mappers() -> Iterator[Json]:
    """The mappers of `local_reply_config`, in order."""
    for refusal in REFUSALS:
        yield _for_grpc(refusal)
        yield _for_rest(refusal)


def _filters(refusal: Refusal) -> list[Json]:
    value = {"default_value": refusal.status, "runtime_key": f"refusals.{refusal.status}"}
    filters: list[Json] = [{"status_code_filter": {"comparison": {"op": "GE" if refusal.or_above else "EQ", "value": value}}}]
    if refusal.details:
        cel = {
            "@type": f"{_TYPE_URL}envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
            "expression": f"response.code_details.startsWith('{refusal.details}')",
        }
        filters.append({"extension_filter": {"name": "envoy.access_loggers.extension_filters.cel", "typed_config": cel}})
    if refusal.signed_in:
        subject = {"filter": "envoy.filters.http.jwt_authn", "path": [{"key": "token"}, {"key": "sub"}], "value": {"present_match": True}}
        filters.append({"metadata_filter": {"matcher": subject, "match_if_key_not_found": False}})
    return filters


# A transcoded request looks like gRPC by the time it is refused, but has kept its original path.
_IS_GRPC: list[Json] = [
    {"header_filter": {"header": {"name": "content-type", "string_match": {"prefix": "application/grpc"}}}},
    {"header_filter": {"header": {"name": "x-envoy-original-path", "present_match": True, "invert_match": True}}},
]


def _for_grpc(refusal: Refusal) -> Json:
    """For grpc-web too, which by itself would keep the HTTP status, and guess the code from it."""
    status = _status(refusal, refusal.code if refusal.grpc_code is None else refusal.grpc_code)
    return {
        "filter": {"and_filter": {"filters": [*_filters(refusal), *_IS_GRPC]}},
        "status_code": HTTPStatus.OK,
        "headers_to_add": [
            *_challenge(refusal, always=False),
            _set("content-type", "application/grpc"),
            _set("grpc-status", str(status.code)),
            _set("grpc-message", status.message),
            _set("grpc-status-details-bin", base64.b64encode(status.SerializeToString()).decode().rstrip("=")),
        ],
        "body_format_override": {"text_format_source": {"inline_string": ""}},
    }


def _for_rest(refusal: Refusal) -> Json:
    filters = _filters(refusal)
    mapper: Json = {
        "filter": {"and_filter": {"filters": filters}} if len(filters) > 1 else filters[0],
        "body_format_override": {
            "json_format": {
                "code": refusal.code,
                "message": "%LOCAL_REPLY_BODY%" if refusal.explain else refusal.message,
                "details": [{"@type": _TYPE_URL + detail.DESCRIPTOR.full_name, **fields} for detail, fields in _details(refusal)],
            }
        },
    }
    if refusal.tell_status is not None:
        mapper["status_code"] = refusal.tell_status
    headers = _challenge(refusal, always=True)
    if refusal.retry_after_s is not None:
        headers.append(_set("retry-after", str(refusal.retry_after_s)))
    if headers:
        mapper["headers_to_add"] = headers
    return mapper


def _challenge(refusal: Refusal, *, always: bool) -> list[Json]:
    """The challenge of a 401, in place of jwt_authn's own: that repeats the URL, query string included."""
    # By status 200, which gRPC has, there is none; but what jwt_authn has added has to go.
    told = refusal.status if refusal.tell_status is None else refusal.tell_status
    if HTTPStatus.UNAUTHORIZED not in (refusal.status, told):
        return []
    action = "OVERWRITE_IF_EXISTS_OR_ADD" if always and told == HTTPStatus.UNAUTHORIZED else "OVERWRITE_IF_EXISTS"
    return [_set("www-authenticate", f'Bearer realm="{DOMAIN}"', action)]


def _set(key: str, value: str, action: str = "OVERWRITE_IF_EXISTS_OR_ADD") -> Json:
    return {"header": {"key": key, "value": value.replace("%", "%%")}, "append_action": action}


def _details(refusal: Refusal) -> list[tuple[Any, Json]]:
    """Each detail as a message and as the fields of its JSON."""
    reason = ErrorReason.Name(refusal.reason)
    metadata = {"limit": refusal.limit} if refusal.limit else {}
    details: list[tuple[Any, Json]] = [
        (
            error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata),
            {"reason": reason, "domain": DOMAIN, "metadata": metadata},
        )
    ]
    if refusal.limit:
        violation = error_details_pb2.QuotaFailure.Violation(subject=refusal.limit, description=refusal.bound)
        details.append(
            (
                error_details_pb2.QuotaFailure(violations=[violation]),
                {"violations": [{"subject": refusal.limit, "description": refusal.bound}]},
            )
        )
    if refusal.retry_after_s is not None:
        delay = duration_pb2.Duration(seconds=refusal.retry_after_s)
        details.append((error_details_pb2.RetryInfo(retry_delay=delay), {"retryDelay": f"{refusal.retry_after_s}s"}))
    return details


def _status(refusal: Refusal, code: int) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=refusal.message)
    for detail, _ in _details(refusal):
        status.details.add().Pack(detail)
    return status
