"""Passwords: argon2id in a bounded pool of threads, off the event loop.

What a password may look like is the proto's business; where hashes are kept is the store's.
"""

import asyncio
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import argon2
from argon2.exceptions import VerifyMismatchError

from servicekit.errors import limit_reached

BUSY_RETRY_AFTER_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a password is right, and whether its hash was made with other parameters than today's."""

    correct: bool
    outdated: bool = False


class Passwords:
    """Hashes and verifies passwords; `close` it when done."""

    def __init__(self, *, memory_kib: int, iterations: int, threads: int, waiting_max: int, client_max: int) -> None:
        """At most `threads` passwords are worked on and `waiting_max` more wait; of one client `client_max` in all."""
        # One lane a hash: the pool uses the cores.
        self._hasher = argon2.PasswordHasher(time_cost=iterations, memory_cost=memory_kib, parallelism=1)
        self._decoy = self._hasher.hash("no account has this password")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="passwords")
        self._pending_max = threads + waiting_max
        self._pending = 0
        self._client_max = client_max
        self._pending_of: Counter[str] = Counter()

    def close(self) -> None:
        """Let running work end and drop what waits."""
        self._pool.shutdown(cancel_futures=True)

    async def hash(self, password: str, *, client: str | None = None) -> str:
        """The argon2id hash of a password, with its parameters and salt. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED).

        `client`: who asks; None: the gateway itself.
        """
        return await self._run(lambda: self._hasher.hash(normal(password)), client)

    async def verify(self, stored: str | None, password: str, *, client: str | None = None) -> Verdict:
        """Compare a password with a stored hash. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED).

        None (no such account) takes as long as a wrong password, so that time does not tell which addresses have accounts.
        """

        def compare() -> Verdict:
            try:
                self._hasher.verify(stored or self._decoy, normal(password))
            except VerifyMismatchError:
                return Verdict(correct=False)
            return Verdict(correct=stored is not None, outdated=stored is not None and self._hasher.check_needs_rehash(stored))

        return await self._run(compare, client)

    async def _run(self, work: Callable[[], T], client: str | None) -> T:
        # Nobody, with however many accounts, takes all the places.
        if self._pending >= self._pending_max or (client is not None and self._pending_of[client] >= self._client_max):
            bound = f"too many passwords at once: at most {self._pending_max} of all, {self._client_max} of an address"
            raise limit_reached("passwords", bound, retry_after_s=BUSY_RETRY_AFTER_S)
        self._pending += 1
        if client is not None:
            self._pending_of[client] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._pending -= 1
            if client is not None:
                self._pending_of -= Counter((client,))  # which drops what is zero


def normal(password: str) -> bytes:
    """The same password typed on another keyboard may arrive as other code points (NIST SP 800-63B, 3.1.1.2)."""
    return unicodedata.normalize("NFKC", password).encode()
