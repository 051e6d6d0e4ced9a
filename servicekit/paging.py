"""Pages of lists, alike in every service: sizes and opaque tokens."""

import hashlib

from jwt.utils import base64url_decode, base64url_encode

from servicekit.errors import invalid

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 200
CHECKSUM_BYTES = 4
ID_BYTES = 16
"""Length of a position that is a UUID."""


def page_limit(page_size: int) -> int:
    """Items a page, from a request's `page_size`: 0 means 50, more than 200 means 200."""
    return min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def encode_token(position: bytes, query: bytes) -> str:
    """The token of the page that follows `position`. It is good for this query (owner, filters …) only."""
    # Against mistakes, not attacks: what a page shows is decided by the caller and the filters of its own request.
    checksum = hashlib.blake2b(position + query, digest_size=CHECKSUM_BYTES, person=b"genmesh.page").digest()
    return base64url_encode(position + checksum).decode()


def decode_token(token: str, query: bytes, *, length: int | None = None) -> bytes | None:
    """The position that a page follows, of `length` bytes; None for the first page.

    Raises INVALID_ARGUMENT for a token that this query never gave: one of another owner or filter, or a damaged one.
    """
    if not token:
        return None
    try:
        position = base64url_decode(token)[:-CHECKSUM_BYTES]
        # Anybody can make a token with the right checksum.
        known = position != b"" and length in (None, len(position)) and encode_token(position, query) == token
    except ValueError:
        known, position = False, b""
    if not known:
        raise invalid("page_token", "is not a token that this list gave")
    return position
