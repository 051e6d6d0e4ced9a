"""Page sizes and page tokens, the same for every list."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.errors import MeshError
from servicekit.paging import decode_token, encode_token, page_limit


@pytest.mark.parametrize(("asked", "given_size"), [(0, 50), (1, 1), (200, 200), (201, 200), (2**31 - 1, 200)])
def test_page_sizes(asked: int, given_size: int):
    assert page_limit(asked) == given_size


@given(st.binary(min_size=1, max_size=32), st.binary(max_size=64))
def test_tokens_come_back_as_they_went(position: bytes, query: bytes):
    assert decode_token(encode_token(position, query), query) == position


@given(st.binary(min_size=1, max_size=32))
def test_a_token_of_our_own_making_has_the_length_that_is_expected(position: bytes):
    token = encode_token(position, b"query")
    assert decode_token(token, b"query", length=len(position)) == position
    for length in (len(position) - 1, len(position) + 1):
        with pytest.raises(MeshError) as raised:
            decode_token(token, b"query", length=length)
        assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_no_token_is_the_first_page():
    assert decode_token("", b"query") is None


@given(st.text(min_size=1, max_size=60))
@pytest.mark.parametrize("known", ["x", "!", "AAAA", "AAAAAAAA", "====", "a" * 512, "\0", "a b"])
def test_garbage_is_no_token(known: str, drawn: str):
    for token in (known, drawn):
        with pytest.raises(MeshError) as raised:
            decode_token(token, b"query")
        assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [field for field, _ in raised.value.violations] == ["page_token"]


def test_a_token_is_good_for_its_query_alone():
    token = encode_token(b"position", b"query of one")
    with pytest.raises(MeshError):
        decode_token(token, b"query of another")


@pytest.mark.parametrize("mangle", [lambda token: token[:-1], lambda token: token + "=", lambda token: token.swapcase()])
def test_a_damaged_token_is_refused(mangle: "type[str]"):
    with pytest.raises(MeshError):
        decode_token(mangle(encode_token(b"position", b"query")), b"query")
