"""How often somebody may try to prove who they are, and how often succeed.

Three limits on failures with passwords, each with another attacker in mind: one client that guesses one account's, one client that
guesses anybody's, many clients that guess one account's. The last two are those that others could use to lock an owner out, so they
do not hold for clients from which the account has been signed in to: whoever knows the password gets in from there, and through
another identity provider from anywhere.

What cannot be guessed (refresh tokens, API keys, ID tokens) is looked at first: a right one passes whatever others at its address
did, and of wrong ones only so many are told more than that there were too many.

Successes are counted by account and client, not by client alone: who shares an address with somebody busy is not stopped.
"""

import asyncio
import hashlib
import ipaddress
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

import grpc

from servicekit.errors import MeshError, limit_reached
from servicekit.limits import RateLimiter

IPV6_CLIENT_PREFIX = 64
"""Bits of an IPv6 address that name a client: the rest is its own to choose."""
WAITING_MAX = 16
"""Sign-ins of one client to one account that wait for each other."""
WAITING_RETRY_AFTER_S = 1.0
WORDS = {
    "registrations": "new accounts from this address",
    "sign_ins": "sign-ins to this account from this address",
    "sign_in": "failed sign-ins to this account from this address",
    "sign_in_account": "failed sign-ins to this account",
    "sign_in_client": "failed sign-ins from this address",
    "refresh_client": "wrong refresh tokens from this address",
    "api_keys": "wrong API keys from this address",
}
"""What the limits count, for people."""


@dataclass(frozen=True, slots=True)
class ThrottleLimits:
    """Failures until somebody has to wait; of registrations all of them, of sign-ins and refreshes those that succeed."""

    account_client_15min: int
    account_hour: int
    client_hour: int
    registrations_client_hour: int
    successes_account_client_hour: int


def client_network(address: str) -> str:
    """What stands for a client: its IPv4 address, or the network of its IPv6 address; anything else as it is."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), IPV6_CLIENT_PREFIX), strict=False))
    return str(parsed)


class Throttle:
    """Counts proofs, in Redis for all replicas together."""

    def __init__(self, limiter: RateLimiter, limits: ThrottleLimits) -> None:
        self._limiter = limiter
        self._limits = limits
        self._pending: Counter[tuple[str, ...]] = Counter()
        self._locks: dict[tuple[str, ...], asyncio.Lock] = {}

    async def registration(self, client: str) -> None:
        """Count a registration, which also tells whether an address has an account. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED)."""
        await self._hit(self._limits.registrations_client_hour, "registrations", client)

    async def success(self, account: str, client: str) -> None:
        """Count a proof that is right, before anything is made of it. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED)."""
        await self._hit(self._limits.successes_account_client_hour, "sign_ins", account, client)

    @asynccontextmanager
    async def unguessable(self, what: str, client: str) -> AsyncGenerator[None]:
        """Around all that a proof that cannot be guessed leads to: whatever refuses it counts.

        After too many a refusal becomes RESOURCE_EXHAUSTED (LIMIT_REACHED); what is right passes.
        """
        try:
            yield
        except MeshError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                await self._hit(self._limits.client_hour, what, client)
            raise

    @asynccontextmanager
    async def client(self, what: str, client: str, *, known: bool = False) -> AsyncGenerator[None]:
        """Around all that a proof that can be guessed, or costs something, leads to: whatever refuses it counts.

        Raises RESOURCE_EXHAUSTED (LIMIT_REACHED) after too many; never if the client is `known`.
        """
        async with self._counted(f"{self._limits.client_hour}/hour", what, client, refuse=not known):
            yield

    @asynccontextmanager
    async def password(self, email: str, client: str, *, known: bool) -> AsyncGenerator[None]:
        """Around the check of a password: a wrong one counts; `known`: the account has been signed in to from this client.

        The address need not have an account: the answer must not tell.
        """
        account = hashlib.sha256(email.encode()).hexdigest()
        # One at a time: a burst of right ones need not be refused as if they were wrong.
        async with (
            self._alone(account, client),
            self._counted(f"{self._limits.account_client_15min}/15minutes", "sign_in", account, client),
            nullcontext() if known else self._counted(f"{self._limits.account_hour}/hour", "sign_in_account", account),
        ):
            yield

    async def _hit(self, most_hour: int, name: str, *who: str) -> None:
        await self._limiter.hit(f"{most_hour}/hour", name, *who, what=WORDS[name])

    @asynccontextmanager
    async def _counted(self, limit: str, name: str, *who: str, refuse: bool = True) -> AsyncGenerator[None]:
        key = (name, *who)
        # What is still being checked may fail too: guesses sent all at once are no way around the limit.
        self._pending[key] += 1
        try:
            if refuse:
                await self._limiter.check(limit, name, *who, what=WORDS[name], cost=self._pending[key])
            try:
                yield
            except MeshError as error:
                if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    await self._limiter.count(limit, name, *who)
                raise
        finally:
            self._pending[key] -= 1
            if not self._pending[key]:
                del self._pending[key]

    @asynccontextmanager
    async def _alone(self, *who: str) -> AsyncGenerator[None]:
        waiting = ("waiting", *who)
        if self._pending[waiting] >= WAITING_MAX:
            raise limit_reached("sign_in", f"too many sign-ins at once: at most {WAITING_MAX}", retry_after_s=WAITING_RETRY_AFTER_S)
        self._pending[waiting] += 1
        lock = self._locks.setdefault(who, asyncio.Lock())
        try:
            async with lock:
                yield
        finally:
            self._pending[waiting] -= 1
            if not self._pending[waiting]:
                del self._pending[waiting]
                del self._locks[who]
