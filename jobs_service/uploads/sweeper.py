"""Removes what uploads leave behind."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from jobs_service.uploads import store
from jobs_service.uploads.keys import ARRIVALS, CHECKED, is_key
from servicekit.database import reading, transaction
from servicekit.errors import MeshError
from servicekit.objects import ObjectStore, StoredObject

SWEEP_INTERVAL_S = 60.0
EXPIRE_BATCH = 500
SWEEP_PAGES = 5
"""Pages of each part of the bucket that a round looks at; the next one goes on from there."""
CLOCK_SKEW_S = 60.0
"""What the store's clock, which ends URLs, may differ from the database's."""

_log = structlog.get_logger(__name__)


class UploadSweeper:
    """Removes uploads that expired, what URLs wrote after the check, and objects that no upload has. Any number may work at once."""

    def __init__(self, engine: AsyncEngine, media: ObjectStore, *, orphan_s: float) -> None:
        self._engine = engine
        self._media = media
        self._orphan_s = orphan_s
        self._swept = dict.fromkeys((ARRIVALS, CHECKED), "")

    async def run(self) -> None:
        """Sweep, round after round."""
        while True:
            for one in (self.expire, self.clear_arrivals, self.sweep_orphans):
                try:
                    if count := await one():
                        _log.info("uploads.swept", round=one.__name__, count=count)
                except (SQLAlchemyError, OSError, MeshError) as error:
                    _log.warning("uploads.trouble", round=one.__name__, error=repr(error)[:300])
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def expire(self) -> int:
        """Remove a batch of expired uploads, files first: a row that is left leads the next round to them. How many."""
        async with reading(self._engine) as connection:
            expired = await store.expired(connection, limit=EXPIRE_BATCH)
        for upload in expired:
            await self._media.delete(*(key for key in (upload.arrival_key, upload.object_key) if key is not None))
            async with transaction(self._engine) as connection:
                await store.delete(connection, upload.upload_id)
        return len(expired)

    async def clear_arrivals(self) -> int:
        """Remove, for a batch of checked uploads, what their URLs may have written again before they stopped working. How many."""
        async with reading(self._engine) as connection:
            dead = await store.dead_arrivals(connection, older_than_s=CLOCK_SKEW_S, limit=EXPIRE_BATCH)
        if dead:
            await self._media.delete(*(key for _, key in dead))
            async with transaction(self._engine) as connection:
                await store.arrivals_cleared(connection, [upload_id for upload_id, _ in dead])
        return len(dead)

    async def sweep_orphans(self) -> int:
        """Delete objects that no upload has, in the next pages: of checks that died, of PUTs that took longer than their upload lived."""
        # The store's clock may differ from ours by less than anybody's choice of an age.
        stored_before = datetime.now(UTC) - timedelta(seconds=self._orphan_s)
        count = 0
        for part in (ARRIVALS, CHECKED):
            for _ in range(SWEEP_PAGES):
                page = await self._media.list(f"{part}/", after=self._swept[part])
                # First, so that an object that may not go does not end every round: its page comes again after the last one.
                self._swept[part] = page.objects[-1].key if page.more else ""
                count += await self._sweep([found for found in page.objects if found.modified_time < stored_before])
                if not page.more:
                    break
        return count

    async def _sweep(self, objects: Sequence[StoredObject]) -> int:
        keys = [found.key for found in objects if is_key(found.key)]
        if not keys:
            return 0
        async with reading(self._engine) as connection:
            known = await store.known_keys(connection, keys)
        orphans = [key for key in keys if key not in known]
        await self._media.delete(*orphans)
        return len(orphans)
