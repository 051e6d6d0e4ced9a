"""Access tokens that stop before they expire: sessions signed out, API keys revoked, accounts disabled or changed.

The gateway decides and keeps the list; every other service polls it, so that a check costs no call. A service that cannot
ask for too long refuses tokens altogether: it would not know of a revocation any more.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import grpc
import prometheus_client
import structlog

from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.client import call_metadata
from servicekit.errors import MeshError, Reason, unauthenticated, unavailable

POLL_INTERVAL_S = 5.0
RETRY_INTERVAL_S = 0.5
STALE_AFTER_S = 45.0
"""With the 15 s after which a stream looks again at the latest: what is revoked has stopped everywhere within 60 s."""
PAGE_SIZE = 1000
TOKEN_LIFE_MAX_S = 3600
"""No access token lives longer (GENMESH_ACCESS_TOKEN_TTL_S): what was revoked before that has nothing left to stop."""
FORGET_AFTER_S = TOKEN_LIFE_MAX_S + 60.0
POLL_TIMEOUT_S = 5.0

REVOCATIONS = prometheus_client.Gauge("genmesh_revocations", "Revocations of access tokens that are remembered")

Kind = Literal["session", "api_key", "user"]
KINDS: tuple[Kind, ...] = ("session", "api_key", "user")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Revoked:
    """Tokens of a session, an API key or an account, issued at `revoke_time` (Unix time) or before."""

    kind: Kind
    subject_id: str
    revoke_time: float


Fetch = Callable[[str], Awaitable[tuple[Iterable[Revoked], str, bool]]]
"""From a cursor (empty: from the beginning) to what was revoked since, the next cursor, and whether there is more already."""


def _refusal(kind: Kind, *, by_key: bool) -> MeshError:
    if kind == "api_key":
        return unauthenticated(Reason.ERROR_REASON_API_KEY_INVALID, "the API key is not valid any more")
    what = "call again with the API key, whose owner was changed" if by_key else "refresh the session or sign in again"
    return unauthenticated(Reason.ERROR_REASON_TOKEN_REVOKED, f"the access token was revoked: {what}")


class Revocations:
    """What has been revoked, as far as this process knows. Without a fetch it knows only what `add` tells it."""

    def __init__(self, fetch: Fetch | None = None) -> None:
        self._fetch = fetch
        self._times: dict[tuple[Kind, str], float] = {}
        self._current_until = float("-inf") if fetch else float("inf")
        self._cursor = ""

    def add(self, revoked: Revoked) -> None:
        """Take note of a revocation."""
        key = (revoked.kind, revoked.subject_id)
        self._times[key] = max(revoked.revoke_time, self._times.get(key, 0.0))

    def check(self, *, issue_time: float, session_id: str | None, api_key_id: str | None, user_id: str | None) -> None:
        """Raise UNAUTHENTICATED (TOKEN_REVOKED, API_KEY_INVALID) for a revoked token, UNAVAILABLE if that cannot be known right now."""
        if time.monotonic() > self._current_until:
            raise unavailable("whether the access token still holds cannot be checked right now")
        if not self._times:
            return
        subjects: tuple[tuple[Kind, str | None], ...] = (("session", session_id), ("api_key", api_key_id), ("user", user_id))
        for kind, subject_id in subjects:
            if subject_id is not None and issue_time <= self._times.get((kind, subject_id), -1.0):
                raise _refusal(kind, by_key=api_key_id is not None)

    async def ready(self) -> None:
        """Raise until the list has been read for the first time; for health."""
        if self._current_until == float("-inf"):
            raise unavailable("revocations have not been read yet")

    async def poll(self) -> None:
        """Read what is new once."""
        if self._fetch is None:
            return
        asked = time.monotonic()
        more = True
        while more:
            revoked, self._cursor, more = await self._fetch(self._cursor)
            for one in revoked:
                self.add(one)
        # Counted from before the question: what was revoked while the answer travelled is in the next one.
        self._current_until = asked + STALE_AFTER_S
        oldest = time.time() - FORGET_AFTER_S
        self._times = {key: revoke_time for key, revoke_time in self._times.items() if revoke_time > oldest}
        REVOCATIONS.set(len(self._times))

    async def run(self) -> None:
        """Keep the list current, for ever."""
        failing = False
        while True:
            try:
                async with asyncio.timeout(POLL_TIMEOUT_S):
                    await self.poll()
            except Exception as error:  # whatever is wrong, the next try is near, and `check` knows how old the list is
                if not failing:
                    _log.warning("revocations.poll_failed", error=repr(error))
                failing = True
            else:
                failing = False
            await asyncio.sleep(RETRY_INTERVAL_S if failing else POLL_INTERVAL_S)


def remote_fetch(channel: grpc.aio.Channel) -> Fetch:
    """Asks the gateway's RevocationService."""
    stub = identity_pb2_grpc.RevocationServiceStub(channel)

    async def fetch(cursor: str) -> tuple[Iterable[Revoked], str, bool]:
        request = identity_pb2.ListRevocationsRequest(page_size=PAGE_SIZE, cursor=cursor)
        reply: identity_pb2.ListRevocationsResponse = await stub.ListRevocations(request, metadata=call_metadata(), timeout=POLL_TIMEOUT_S)
        return [found for one in reply.revocations if (found := _revoked(one))], reply.cursor, reply.more

    return fetch


def _revoked(message: identity_pb2.Revocation) -> Revoked | None:
    revoke_time = message.revoke_time.seconds + message.revoke_time.nanos / 1e9
    match message.WhichOneof("subject"):
        case "session_id":
            return Revoked("session", message.session_id, revoke_time)
        case "api_key_id":
            return Revoked("api_key", message.api_key_id, revoke_time)
        case "user_id":
            return Revoked("user", message.user_id, revoke_time)
        case _:
            return None
