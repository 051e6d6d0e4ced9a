"""Quotes: promised to one owner for one spec, for a while."""

import base64
import time
import uuid

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.quotes import Quote, Quotes
from servicekit.errors import MeshError, Reason

QUOTES = Quotes(b"s" * 32)
OWNER = uuid.UUID(int=7)
SPEC = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", steps=4))


def quote(seconds: int = 60) -> Quote:
    return Quote(1234, int(time.time()) + seconds)


def refusal(quote_id: str, *, quotes: Quotes = QUOTES, owner: uuid.UUID = OWNER, spec: jobs_pb2.JobSpec = SPEC) -> MeshError:
    with pytest.raises(MeshError) as raised:
        quotes.read(quote_id, owner, spec)
    return raised.value


def test_a_quote_is_read_back():
    promised = quote()
    assert QUOTES.read(QUOTES.sign(OWNER, SPEC, promised), OWNER, SPEC) == promised


def test_a_quote_is_good_with_every_replica_that_has_the_secret():
    promised = quote()
    assert Quotes(b"s" * 32).read(QUOTES.sign(OWNER, SPEC, promised), OWNER, SPEC) == promised


def test_a_quote_is_refused_when_it_has_expired():
    error = refusal(QUOTES.sign(OWNER, SPEC, quote(-2)))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_QUOTE_INVALID)
    assert error.violations == (("quote_id", "expired"),)


def test_a_quote_is_refused_for_another_owner_another_spec_another_secret():
    quote_id = QUOTES.sign(OWNER, SPEC, quote())
    other_spec = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", steps=5))
    for error in (
        refusal(quote_id, owner=uuid.UUID(int=8)),
        refusal(quote_id, spec=other_spec),
        refusal(quote_id, quotes=Quotes(b"t" * 32)),
    ):
        assert error.reason == Reason.ERROR_REASON_QUOTE_INVALID


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_quote_with_any_bit_turned_is_refused(position: int, bit: int):
    quote_id = QUOTES.sign(OWNER, SPEC, quote())
    raw = bytearray(base64.urlsafe_b64decode(quote_id + "=" * (-len(quote_id) % 4)))
    raw[position % len(raw)] ^= 1 << bit
    tampered = base64.urlsafe_b64encode(raw).decode().rstrip("=")
    assert refusal(tampered).reason == Reason.ERROR_REASON_QUOTE_INVALID


@given(st.text(max_size=200))
def test_any_text_that_is_no_quote_is_refused(text: str):
    assert refusal(text).reason == Reason.ERROR_REASON_QUOTE_INVALID
