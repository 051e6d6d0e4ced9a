"""Domain errors and their form on the wire.

A `MeshError` carries code, reason and metadata; the errors layer of `interceptors` turns it into a google.rpc.Status with
exactly one ErrorInfo (domain `genmesh`). Services raise these and never call `context.abort`.
"""

import math
from collections.abc import Iterable, Mapping

import grpc
import prometheus_client
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from genmesh.errors.v1 import errors_pb2

DOMAIN = "genmesh"

SIGN_IN_FIRST = "sign in first: this call needs an access token (authorization: Bearer TOKEN) or an API key (x-api-key)"
"""What a caller without either is told, by Envoy and by services."""

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))

LIMITED = prometheus_client.Counter("genmesh_limited_total", "Calls refused because a limit was reached", ["limit"])

Reason = errors_pb2.ErrorReason
ReasonValue = errors_pb2.ErrorReason.ValueType


class MeshError(Exception):
    """A refusal with a typed reason.

    `violations` are (field path, description) pairs and become a BadRequest; `quota` are (subject, description) pairs and become a
    QuotaFailure; `retry_after_s` becomes a RetryInfo.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: ReasonValue,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[tuple[str, str]] = (),
        quota: Iterable[tuple[str, str]] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.quota = tuple(quota)
        self.retry_after_s = retry_after_s

    def to_status(self) -> status_pb2.Status:
        """The google.rpc.Status that clients see."""
        details: list[any_pb2.Any] = []

        def add(message: Message) -> None:
            packed = any_pb2.Any()
            packed.Pack(message)
            details.append(packed)

        add(error_details_pb2.ErrorInfo(reason=Reason.Name(self.reason), domain=DOMAIN, metadata=self.metadata))
        if self.violations:
            add(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
                        for field, description in self.violations
                    ]
                )
            )
        if self.quota:
            add(
                error_details_pb2.QuotaFailure(
                    violations=[
                        error_details_pb2.QuotaFailure.Violation(subject=subject, description=description)
                        for subject, description in self.quota
                    ]
                )
            )
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(self.retry_after_s * 1000))
            add(error_details_pb2.RetryInfo(retry_delay=delay))
        number: int = self.code.value[0]
        return status_pb2.Status(code=number, message=self.message, details=details)


def invalid(
    field: str, description: str, *, reason: ReasonValue = Reason.ERROR_REASON_INVALID_ARGUMENT, metadata: Mapping[str, str] | None = None
) -> MeshError:
    """INVALID_ARGUMENT for one field."""
    return MeshError(
        grpc.StatusCode.INVALID_ARGUMENT, reason, f"{field}: {description}", metadata=metadata, violations=[(field, description)]
    )


def not_found(what: str) -> MeshError:
    """NOT_FOUND, for what does not exist and for what is somebody else's alike."""
    return MeshError(grpc.StatusCode.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND, f"{what} not found")


def precondition(reason: ReasonValue, message: str, metadata: Mapping[str, str] | None = None) -> MeshError:
    """FAILED_PRECONDITION with its reason."""
    return MeshError(grpc.StatusCode.FAILED_PRECONDITION, reason, message, metadata=metadata)


def unavailable(message: str, retry_after_s: float = 1.0) -> MeshError:
    """UNAVAILABLE: try again after `retry_after_s`."""
    return MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE, message, retry_after_s=retry_after_s)


def unauthenticated(reason: ReasonValue, message: str) -> MeshError:
    """UNAUTHENTICATED with its reason."""
    return MeshError(grpc.StatusCode.UNAUTHENTICATED, reason, message)


def permission_denied(message: str, reason: ReasonValue = Reason.ERROR_REASON_PERMISSION_DENIED) -> MeshError:
    """PERMISSION_DENIED with its reason."""
    return MeshError(grpc.StatusCode.PERMISSION_DENIED, reason, message)


def duration_in_words(seconds: float) -> str:
    """A time for people, rounded up: `1 second`, `90 seconds`, `15 minutes`."""
    whole = max(1, math.ceil(seconds))
    # Rounded up to a unit that there is only one of, it could be twice as long as it is.
    unit_s, unit = next(one for one in _UNITS if whole % one[0] == 0 or whole >= 2 * one[0])
    count = math.ceil(whole / unit_s)
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def limit_reached(name: str, description: str, *, retry_after_s: float) -> MeshError:
    """RESOURCE_EXHAUSTED (LIMIT_REACHED) with RetryInfo, of a second at least, and a QuotaFailure whose subject is the limit's name.

    `description` is a sentence for the user, without its end: `too many watches: at most 50 may be open at once`.
    """
    LIMITED.labels(name).inc()
    retry_after_s = max(1.0, retry_after_s)
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.ERROR_REASON_LIMIT_REACHED,
        f"{description}; try again in {duration_in_words(retry_after_s)}",
        metadata={"limit": name},
        quota=[(name, description)],
        retry_after_s=retry_after_s,
    )


def from_rpc_error(error: grpc.aio.AioRpcError) -> MeshError:
    """What another service of the mesh refused, as an error of ours.

    A reason of the domain `genmesh` is kept, with its metadata, quota and time to retry. Field violations are not: they name
    fields of a request that our caller never saw. What has no reason (connection lost, deadline, INTERNAL) becomes UNAVAILABLE, so
    that the caller's caller may try again.
    """
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]  # AioRpcError has the same accessors as a Call
    known: MeshError | None = None
    info, retry, quota = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    for detail in status.details if status else ():
        if detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
        elif detail.Is(quota.DESCRIPTOR):
            detail.Unpack(quota)
        elif detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.keys():  # noqa: SIM118
            reason = Reason.Value(info.reason)
            if reason != Reason.ERROR_REASON_INTERNAL:
                known = MeshError(error.code(), reason, error.details() or "", metadata=info.metadata)
    if known is None:
        known = unavailable("a service of the mesh is out of reach")
    else:
        known.quota = tuple((violation.subject, violation.description) for violation in quota.violations)
    if retry.HasField("retry_delay"):
        known.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return known
