"""Messages that several servicers of the gateway make and read."""

from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

from gateway.identity import Account
from genmesh.identity.v1 import identity_pb2
from servicekit.errors import invalid


def timestamp(time: datetime) -> timestamp_pb2.Timestamp:
    """A time as messages have it."""
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time)
    return message


def moment(message: timestamp_pb2.Timestamp, field: str) -> datetime:
    """The time in a field of a request. Raises INVALID_ARGUMENT for one outside the years 1 to 9999."""
    try:
        return message.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise invalid(field, "must be a time in the years 1 to 9999") from None


def user_message(account: Account) -> identity_pb2.User:
    """An account as clients see it."""
    return identity_pb2.User(
        user_id=str(account.user_id),
        email=account.email,
        display_name=account.display_name,
        roles=account.roles,
        plan=identity_pb2.Plan.Value(account.plan),
        create_time=timestamp(account.create_time),
        disabled=account.disabled,
    )
