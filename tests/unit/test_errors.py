"""Domain errors to google.rpc.Status and back."""

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from servicekit import errors
from servicekit.errors import MeshError, Reason, from_rpc_error


def unpack(status: status_pb2.Status) -> dict[str, any_pb2.Any]:
    """Details of a status by type name; a type that comes twice fails."""
    details = {detail.type_url.rpartition("/")[2]: detail for detail in status.details}
    assert len(details) == len(status.details)
    return details


def rpc_error(status: status_pb2.Status | None, code: grpc.StatusCode, message: str = "") -> grpc.aio.AioRpcError:
    """The error a client's call raises for `status`; None: the server sent none, or there was no server."""
    trailing = rpc_status.to_status(status).trailing_metadata if status is not None else ()
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=message)


def test_a_plain_error_has_exactly_one_error_info() -> None:
    error = MeshError(grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN, "taken", metadata={"a": "b"})
    status = error.to_status()
    assert (status.code, status.message) == (grpc.StatusCode.ALREADY_EXISTS.value[0], "taken")
    details = unpack(status)
    assert list(details) == ["google.rpc.ErrorInfo"]
    info = error_details_pb2.ErrorInfo()
    assert details["google.rpc.ErrorInfo"].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("ERROR_REASON_EMAIL_TAKEN", "genmesh", {"a": "b"})


def test_violations_become_a_bad_request() -> None:
    details = unpack(errors.invalid("spec.image.steps", "must be positive").to_status())
    assert set(details) == {"google.rpc.ErrorInfo", "google.rpc.BadRequest"}
    bad_request = error_details_pb2.BadRequest()
    assert details["google.rpc.BadRequest"].Unpack(bad_request)
    assert [(v.field, v.description) for v in bad_request.field_violations] == [("spec.image.steps", "must be positive")]


def test_retry_after_becomes_a_retry_info() -> None:
    details = unpack(errors.unavailable("away", retry_after_s=0.5).to_status())
    assert set(details) == {"google.rpc.ErrorInfo", "google.rpc.RetryInfo"}
    retry = error_details_pb2.RetryInfo()
    assert details["google.rpc.RetryInfo"].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 500


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 second"),
        (0.2, "1 second"),
        (1.1, "2 seconds"),
        (60, "1 minute"),
        (61, "61 seconds"),
        (121, "3 minutes"),
        (900, "15 minutes"),
        (3600, "1 hour"),
        (3601, "61 minutes"),
        (7201, "3 hours"),
        (86400, "1 day"),
        (90000, "25 hours"),
        (31 * 86400 - 0.5, "31 days"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert errors.duration_in_words(seconds) == words


def test_a_limit_says_when_to_come_back_in_words_and_is_named_for_programs() -> None:
    error = errors.limit_reached("watches", "too many watches: at most 50 may be open at once", retry_after_s=179.5)
    assert error.message == "too many watches: at most 50 may be open at once; try again in 3 minutes"
    assert (error.metadata, error.quota) == ({"limit": "watches"}, (("watches", "too many watches: at most 50 may be open at once"),))


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (errors.invalid("f", "d"), grpc.StatusCode.INVALID_ARGUMENT, Reason.ERROR_REASON_INVALID_ARGUMENT),
        (errors.not_found("job"), grpc.StatusCode.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND),
        (
            errors.precondition(Reason.ERROR_REASON_JOB_TERMINAL, "m"),
            grpc.StatusCode.FAILED_PRECONDITION,
            Reason.ERROR_REASON_JOB_TERMINAL,
        ),
        (errors.unavailable("m"), grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE),
        (
            errors.unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "m"),
            grpc.StatusCode.UNAUTHENTICATED,
            Reason.ERROR_REASON_TOKEN_EXPIRED,
        ),
        (errors.permission_denied("m"), grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED),
    ],
)
def test_factories_and_the_way_back(error: MeshError, code: grpc.StatusCode, reason: int) -> None:
    assert (error.code, error.reason) == (code, reason)
    received = from_rpc_error(rpc_error(error.to_status(), code, error.message))
    assert (received.code, received.reason, received.message) == (code, reason, error.message)


def test_metadata_survives_the_way_back() -> None:
    sent = errors.precondition(
        Reason.ERROR_REASON_INSUFFICIENT_CREDITS, "poor", {"required_millicredits": "5", "available_millicredits": "3"}
    )
    assert from_rpc_error(rpc_error(sent.to_status(), sent.code, sent.message)).metadata == sent.metadata


def test_the_time_to_retry_survives_the_way_back() -> None:
    sent = errors.unavailable("away", retry_after_s=2.5)
    assert from_rpc_error(rpc_error(sent.to_status(), sent.code, sent.message)).retry_after_s == 2.5


def ceiling() -> MeshError:
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.ERROR_REASON_CEILING_REACHED,
        "no room",
        metadata={"period": "day"},
        quota=[("user:ann", "100 a day"), ("api_key:one", "10 a day")],
        retry_after_s=31 * 24 * 3600,
    )


def test_quota_becomes_a_quota_failure() -> None:
    details = unpack(ceiling().to_status())
    assert set(details) == {"google.rpc.ErrorInfo", "google.rpc.QuotaFailure", "google.rpc.RetryInfo"}
    failure = error_details_pb2.QuotaFailure()
    assert details["google.rpc.QuotaFailure"].Unpack(failure)
    assert [(v.subject, v.description) for v in failure.violations] == [("user:ann", "100 a day"), ("api_key:one", "10 a day")]


def test_a_refusal_for_a_quota_survives_the_way_back_whole() -> None:
    sent = ceiling().to_status()
    assert from_rpc_error(rpc_error(sent, grpc.StatusCode.RESOURCE_EXHAUSTED, sent.message)).to_status() == sent


def test_a_quota_of_somebody_else_is_not_passed_on() -> None:
    status = status_with("QUOTA", "example.com", grpc.StatusCode.RESOURCE_EXHAUSTED)
    status.details.add().Pack(
        error_details_pb2.QuotaFailure(violations=[error_details_pb2.QuotaFailure.Violation(subject="s", description="secret")])
    )
    received = from_rpc_error(rpc_error(status, grpc.StatusCode.RESOURCE_EXHAUSTED, "secret text"))
    assert (received.code, received.quota) == (grpc.StatusCode.UNAVAILABLE, ())


def test_fields_of_a_request_the_caller_never_saw_are_not_passed_on() -> None:
    sent = errors.invalid("reservation_id", "must be a UUID")
    assert from_rpc_error(rpc_error(sent.to_status(), sent.code, sent.message)).violations == ()


def status_with(reason: str, domain: str, code: grpc.StatusCode) -> status_pb2.Status:
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    return status_pb2.Status(code=code.value[0], message="secret text", details=[packed])


@pytest.mark.parametrize(
    "error",
    [
        rpc_error(None, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        rpc_error(None, grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"),
        rpc_error(status_with("ERROR_REASON_INTERNAL", "genmesh", grpc.StatusCode.INTERNAL), grpc.StatusCode.INTERNAL, "secret text"),
        rpc_error(
            status_with("ERROR_REASON_NOT_FOUND", "example.com", grpc.StatusCode.NOT_FOUND), grpc.StatusCode.NOT_FOUND, "secret text"
        ),
        rpc_error(status_with("ERROR_REASON_OF_TOMORROW", "genmesh", grpc.StatusCode.ABORTED), grpc.StatusCode.ABORTED, "secret text"),
    ],
    ids=["deadline", "no connection", "internal", "foreign domain", "unknown reason"],
)
def test_what_has_no_reason_of_ours_becomes_unavailable(error: grpc.aio.AioRpcError) -> None:
    received = from_rpc_error(error)
    assert (received.code, received.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE)
    assert received.retry_after_s is not None
    assert "secret" not in received.message
