"""HTTP to services of others: no redirects, no compression, bounded bodies and times.

What is asked and what the answers mean is the business of `oidc` and `breached`.
"""

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

CONNECTIONS_MAX = 20


class OutsideError(Exception):
    """The other side is away, or its answer is not one that we take."""


def open_client() -> httpx.AsyncClient:
    """A client for all of it; close it. Proxies and certificates are not taken from the environment."""
    return httpx.AsyncClient(
        follow_redirects=False,  # an issuer must not send us, and our client secret, elsewhere
        trust_env=False,
        timeout=None,  # noqa: S113  # each request has one for the whole of it
        limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX),
        # What is unpacked can be a thousand times what was sent.
        headers={"accept-encoding": "identity", "user-agent": "genmesh"},
    )


async def request(http: httpx.AsyncClient, method: str, url: str, *, max_bytes: int, timeout_s: float, **options: Any) -> tuple[int, bytes]:
    """Status and body of an answer. Raises OutsideError for one that is too long, takes too long or does not come at all."""
    try:
        async with asyncio.timeout(timeout_s), http.stream(method, url, **options) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise OutsideError("the answer is compressed")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise OutsideError("the answer is too long")
            return response.status_code, bytes(body)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
        raise OutsideError(repr(error)) from error


async def get_json(http: httpx.AsyncClient, url: str, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The JSON object at an address. Raises OutsideError."""
    status, body = await request(http, "GET", url, max_bytes=max_bytes, timeout_s=timeout_s, headers={"accept": "application/json"})
    if status != HTTPStatus.OK:
        raise OutsideError(f"status {status}")
    return _object(body)


async def post_form(
    http: httpx.AsyncClient, url: str, form: Mapping[str, str], *, max_bytes: int, timeout_s: float
) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of the answer to a form. Raises OutsideError."""
    status, body = await request(
        http, "POST", url, max_bytes=max_bytes, timeout_s=timeout_s, data=form, headers={"accept": "application/json"}
    )
    return status, _object(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    # Deep nesting is no ValueError.
    except (ValueError, RecursionError) as error:
        raise OutsideError("the answer is not JSON") from error
    if not isinstance(value, dict):
        raise OutsideError("the answer is not a JSON object")
    return value
