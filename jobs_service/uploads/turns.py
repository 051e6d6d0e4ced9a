"""Whose file is checked next, and who has had enough for now."""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from servicekit.errors import MeshError, limit_reached

HOUR_S = 3600.0
BUSY_RETRY_AFTER_S = 2.0
COSTLY_CHECKS_MAX = 30
"""Checks of an owner in an hour that refuse the file or are heavy, on one server: nobody else's files wait for more of them."""


class Turns:
    """Slots that owners take in turns, one at a time each: whoever asks for many waits for everybody who asks for one."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._running: set[uuid.UUID] = set()
        self._waiting: dict[uuid.UUID, deque[asyncio.Future[None]]] = {}
        """Whose turn is next comes first."""

    @asynccontextmanager
    async def turn(self, owner_id: uuid.UUID) -> AsyncGenerator[None]:
        """A slot while the block runs. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED) when somebody else was given the place to wait in."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner_id, deque()).append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._forget(owner_id, place)
            elif place.exception() is None:  # cancelled just when it was admitted
                self._leave(owner_id)
            raise
        try:
            yield
        finally:
            self._leave(owner_id)

    def displace_for(self, owner_id: uuid.UUID) -> bool:
        """Take the last place from the owner who has most, if that is for somebody who has less even then."""
        longest = max(self._waiting, key=self._count, default=None)
        if longest is None or self._count(longest) < self._count(owner_id) + 2:
            return False
        place = self._waiting[longest][-1]
        self._forget(longest, place)
        if not place.done():
            place.set_exception(too_many_checks())
        return True

    def _count(self, owner_id: uuid.UUID) -> int:
        return len(self._waiting.get(owner_id, ())) + (owner_id in self._running)

    def _admit(self) -> None:
        while self._free:
            owner_id = next((owner_id for owner_id in self._waiting if owner_id not in self._running), None)
            if owner_id is None:
                return
            places = self._waiting.pop(owner_id)
            place = places.popleft()
            if places:
                self._waiting[owner_id] = places  # behind the others
            if not place.done():  # a cancelled one removes itself in a moment
                self._free -= 1
                self._running.add(owner_id)
                place.set_result(None)

    def _leave(self, owner_id: uuid.UUID) -> None:
        self._free += 1
        self._running.discard(owner_id)
        self._admit()

    def _forget(self, owner_id: uuid.UUID, place: "asyncio.Future[None]") -> None:
        places = self._waiting.get(owner_id)
        if places is not None and place in places:
            places.remove(place)
            if not places:
                del self._waiting[owner_id]


class CostlyChecks:
    """When owners had checks that cost much and gave little, in the last hour. Of this server, whose processors it is about."""

    def __init__(self) -> None:
        self._times: dict[uuid.UUID, deque[float]] = {}
        """In the order of the last of them."""

    def count(self, owner_id: uuid.UUID) -> None:
        """The owner had one just now."""
        now = time.monotonic()
        times = self._times.pop(owner_id, None) or deque(maxlen=COSTLY_CHECKS_MAX)
        times.append(now)
        self._times[owner_id] = times
        while (oldest := next(iter(self._times))) != owner_id and self._times[oldest][-1] <= now - HOUR_S:
            del self._times[oldest]

    def less_s(self, owner_id: uuid.UUID) -> float | None:
        """How long until the owner may have another; None: now."""
        times = self._times.get(owner_id)
        if times is None or len(times) < COSTLY_CHECKS_MAX:
            return None
        less_s = times[0] + HOUR_S - time.monotonic()
        return less_s if less_s > 0 else None


def too_many_checks() -> MeshError:
    """RESOURCE_EXHAUSTED (LIMIT_REACHED): no place to wait is left."""
    return limit_reached("uploads.checks", "too many uploads are being checked", retry_after_s=BUSY_RETRY_AFTER_S)
