"""Whether a password is known from breaches of other sites: a range query (k-anonymity), which tells five hex digits of a hash.

API: https://haveibeenpwned.com/API/v3#PwnedPasswords.
"""

import hashlib
from http import HTTPStatus

import httpx
import structlog

from gateway import outside
from gateway.passwords import normal

PREFIX_DIGITS = 5
RANGE_MAX_BYTES = 256 * 1024
TIMEOUT_S = 2.0

_log = structlog.get_logger(__name__)


class BreachedPasswords:
    """Asks a range API; without an address nothing is known."""

    def __init__(self, http: httpx.AsyncClient, url: str | None) -> None:
        self._http = http
        self._url = url.rstrip("/") if url else None

    async def known(self, password: str) -> bool:
        """Whether the password is in a breach. False when nobody can tell: people can register without that service."""
        if self._url is None:
            return False
        digest = hashlib.sha1(normal(password), usedforsecurity=False).hexdigest().upper()
        prefix, suffix = digest[:PREFIX_DIGITS], digest[PREFIX_DIGITS:]
        try:
            # Padding: the length of the answer does not tell the prefix either.
            status, body = await outside.request(
                self._http,
                "GET",
                f"{self._url}/{prefix}",
                max_bytes=RANGE_MAX_BYTES,
                timeout_s=TIMEOUT_S,
                headers={"add-padding": "true"},
            )
            if status != HTTPStatus.OK:
                raise outside.OutsideError(f"status {status}")
        except outside.OutsideError as error:
            _log.warning("breached.unknown", error=str(error)[:200])
            return False
        for line in body.decode("ascii", errors="replace").splitlines():
            found, _, count = line.partition(":")
            # Padding lines have the count 0.
            if found.strip().upper() == suffix:
                return count.strip() != "0"
        return False
