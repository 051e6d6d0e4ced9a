"""Resume tokens and shards of the event log, without Redis."""

import base64
import uuid

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.events import NUMBER_MAX, SHARDS, Position, StoredEvent, Token, owner_tag, shard_of
from servicekit.errors import MeshError, Reason

positions = st.builds(Position, st.integers(0, NUMBER_MAX), st.integers(0, NUMBER_MAX))
EPOCH = uuid.UUID(int=9).hex
OWNER = uuid.UUID(int=7)
TAG = owner_tag(OWNER)


def refused(text: str, owner_id: uuid.UUID = OWNER) -> None:
    with pytest.raises(MeshError) as raised:
        Token.decode(text, owner_id=owner_id)
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.ERROR_REASON_INVALID_ARGUMENT)
    assert raised.value.violations[0][0] == "resume_token"


@given(positions)
def test_a_token_is_read_back(position: Position):
    token = Token(EPOCH, TAG, position)
    assert Token.decode(token.encode(), owner_id=OWNER) == token
    assert len(token.encode()) <= 256  # what WatchJobsRequest takes


@given(positions)
def test_a_token_of_another_owner_is_refused(position: Position):
    refused(Token(EPOCH, TAG, position).encode(), uuid.UUID(int=8))


@given(st.text(max_size=80))
def test_any_text_that_is_no_token_is_refused(text: str):
    refused(text)


@pytest.mark.parametrize(
    "position", ["1-", "-1-1", "1", "", "+1-1", "01-1", "1_0-1", "18446744073709551616-0", "0-18446744073709551616", "1-1.x", "1-1\xff"]
)
def test_a_token_that_we_would_not_write_like_this_is_refused(position: str):
    refused(base64.urlsafe_b64encode(f"{EPOCH}.{TAG}.{position}".encode("latin-1")).decode().rstrip("="))


@given(positions, positions)
def test_positions_are_ordered_as_redis_orders_them(one: Position, other: Position):
    assert (one < other) == ((one.milliseconds, one.number) < (other.milliseconds, other.number))
    assert Position.parse(str(one)) == one


def test_owners_spread_over_all_shards_and_stay_where_they_are():
    owners = [uuid.UUID(int=number) for number in range(200)]
    assert {shard_of(owner) for owner in owners} == set(range(SHARDS))
    assert all(shard_of(owner) == shard_of(str(owner)) for owner in owners)


def test_a_stored_event_becomes_a_response_with_sequence_and_token():
    event = jobs_pb2.JobEvent(job_id="job", attempt=2, progress=jobs_pb2.Progress(step=3))
    stored = StoredEvent(Position(1, 2), "owner", "job", event.SerializeToString(), 17, 4, False, False)
    response = jobs_pb2.WatchJobsResponse.FromString(stored.message("token"))
    event.sequence = 17
    assert response == jobs_pb2.WatchJobsResponse(event=event, resume_token="token")
