"""Takes files that users bring: announces them, checks what arrived, keeps what passed.

What is checked is what is kept: a file is read once from where it arrived, into a file that nobody else can write; that one is hashed,
checked and stored under another key, where no URL writes. The URL may go on working: what it writes then nobody reads, and it is removed.
"""

import asyncio
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import prometheus_client
import structlog
import uuid_utils
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from jobs_service.uploads import store
from jobs_service.uploads.checker import Checker, Verdict
from jobs_service.uploads.keys import ARRIVALS, CHECKED, new_key
from jobs_service.uploads.media import Refusal, UploadLimits, message
from jobs_service.uploads.store import Upload, UploadState
from jobs_service.uploads.turns import COSTLY_CHECKS_MAX, CostlyChecks, Turns, too_many_checks
from servicekit.database import reading, transaction
from servicekit.errors import MeshError, Reason, duration_in_words, invalid, limit_reached, not_found, precondition, unavailable
from servicekit.objects import ObjectStore, PresignedPut

INCOMPLETE_TTL_S = 3600.0
"""What is not complete by then is removed: longer than any URL works, for a PUT that began in time and is slow."""
REJECTED_TTL_S = 24 * 3600.0
"""How long an owner can read why a file was rejected."""
URLS_PER_INCOMPLETE = 5
"""URLs of an owner that work at a time, for each upload that may be incomplete: those of complete and rejected uploads still write."""
CHECK_LEASE_S = 300.0
"""Nobody else checks a file for that long; reading, checking and storing it take less or are given up."""
DOWNLOAD_TIMEOUT_S = 60.0
OWNER_SHARE = 2
"""One owner may take one of so many places where checks wait."""
HEAVY_CHECK_S = 10.0
"""A check that takes longer is heavy: two hours of music, or a file made to keep a decoder busy."""
FAREWELL_S = 5.0

UPLOADS = prometheus_client.Counter("genmesh_uploads", "Uploads by how their check ended", ["outcome"])

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Announced:
    """An upload and where to put its file."""

    upload_id: uuid.UUID
    put: PresignedPut


class Uploads:
    """Uploads of owners, over PostgreSQL and S3. `close` it: checks go on when those who asked for them went away."""

    def __init__(self, engine: AsyncEngine, media: ObjectStore, checker: Checker, limits: UploadLimits) -> None:
        self._engine = engine
        self._media = media
        self._checker = checker
        self._limits = limits
        self._turns = Turns(limits.checks_at_once)
        self._costly = CostlyChecks()
        self._places = limits.checks_at_once + limits.checks_waiting_max
        self._checks: dict[uuid.UUID, asyncio.Task[Upload]] = {}
        self._of_owner: Counter[uuid.UUID] = Counter()

    async def close(self) -> None:
        """End all checks; what they checked is pending again."""
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)

    async def create(self, owner_id: uuid.UUID, content_type: str, size_bytes: int) -> Announced:
        """Announce a file. Raises INVALID_ARGUMENT (its size), RESOURCE_EXHAUSTED (LIMIT_REACHED)."""
        if size_bytes > self._limits.max_bytes:
            raise invalid("size_bytes", f"at most {self._limits.max_bytes:,} bytes")
        upload_id = uuid.UUID(bytes=uuid_utils.uuid7().bytes)
        key = new_key(ARRIVALS, owner_id, upload_id)
        async with transaction(self._engine) as connection:
            self._require_room(await store.usage(connection, owner_id), size_bytes)
            await store.add(
                connection,
                upload_id,
                owner_id,
                content_type=content_type,
                size_bytes=size_bytes,
                arrival_key=key,
                url_ttl_s=self._limits.url_ttl_s,
                ttl_s=INCOMPLETE_TTL_S,
            )
        return Announced(upload_id, self._media.presign_put(key, content_type, size_bytes=size_bytes, ttl_s=self._limits.url_ttl_s))

    def _require_room(self, usage: store.UploadUsage, size_bytes: int) -> None:
        """Raise RESOURCE_EXHAUSTED (LIMIT_REACHED) when the owner may not have one more."""
        limits = self._limits
        urls_max = limits.incomplete_max * URLS_PER_INCOMPLETE
        if usage.incomplete >= limits.incomplete_max:
            raise limit_reached(
                "uploads.incomplete",
                f"too many incomplete uploads: at most {limits.incomplete_max} at once",
                retry_after_s=usage.incomplete_less_s,
            )
        if usage.urls >= urls_max:
            raise limit_reached(
                "uploads.urls",
                f"too many uploads: at most {urls_max} in {duration_in_words(limits.url_ttl_s)}",
                retry_after_s=usage.urls_less_s,
            )
        if usage.stored_bytes + size_bytes > limits.stored_max_bytes:
            description = f"too much uploaded: at most {limits.stored_max_bytes:,} bytes are kept for a user"
            raise limit_reached("uploads.stored_bytes", description, retry_after_s=usage.stored_less_s)

    async def get(self, owner_id: uuid.UUID, upload_id: uuid.UUID) -> Upload:
        """One upload of the owner, or NOT_FOUND."""
        async with reading(self._engine) as connection:
            upload = await store.get(connection, upload_id, owner_id)
        if upload is None:
            raise not_found("upload")
        return upload

    async def complete(self, owner_id: uuid.UUID, upload_id: uuid.UUID) -> Upload:
        """The upload, complete: checked now, unless it was before.

        Raises NOT_FOUND, FAILED_PRECONDITION (UPLOAD_INVALID), RESOURCE_EXHAUSTED (LIMIT_REACHED: too many checks wait), UNAVAILABLE.
        """
        upload = await self.get(owner_id, upload_id)
        if upload.state is not UploadState.PENDING:
            return _settled(upload)
        # A check outlives the call: a client that could not wait finds it done when it asks again.
        return await asyncio.shield(self._checks.get(upload_id) or self._begin(upload))

    def _begin(self, upload: Upload) -> "asyncio.Task[Upload]":
        if (less_s := self._costly.less_s(upload.owner_id)) is not None:
            description = (
                f"too many costly checks: at most {COSTLY_CHECKS_MAX} in 1 hour may end in refusal or take over {HEAVY_CHECK_S:.0f} s"
            )
            raise limit_reached("uploads.costly_checks", description, retry_after_s=less_s)
        shared_out = self._of_owner[upload.owner_id] >= max(1, self._places // OWNER_SHARE)
        if shared_out or (len(self._checks) >= self._places and not self._turns.displace_for(upload.owner_id)):
            raise too_many_checks()
        check = self._checks[upload.upload_id] = asyncio.create_task(self._check_in_turn(upload), name="upload-check")
        self._of_owner[upload.owner_id] += 1

        def ended(task: "asyncio.Task[Upload]") -> None:
            del self._checks[upload.upload_id]
            self._of_owner[upload.owner_id] -= 1
            self._of_owner += Counter()  # forgets owners without a check
            if not task.cancelled():
                task.exception()  # whoever asked may be gone

        check.add_done_callback(ended)
        return check

    async def _check_in_turn(self, upload: Upload) -> Upload:
        async with self._turns.turn(upload.owner_id):
            check_id = uuid.uuid4()
            async with transaction(self._engine) as connection:
                claimed = await store.claim(connection, upload.upload_id, check_id, lease_s=CHECK_LEASE_S)
            if claimed is None:
                now = await self.get(upload.owner_id, upload.upload_id)
                if now.state is UploadState.PENDING:
                    raise unavailable("the file is being checked; try again")
                return _settled(now)
            try:
                async with asyncio.timeout(CHECK_LEASE_S - FAREWELL_S):
                    ended = await self._check(claimed, check_id)
            except BaseException as error:
                await self._release(claimed, check_id)
                if isinstance(error, (TimeoutError, OSError)):
                    _log.error("upload.not_checked", upload_id=str(upload.upload_id), error=repr(error)[:300])
                    raise unavailable("the file cannot be checked right now") from error
                raise
            return _settled(ended)

    async def _release(self, upload: Upload, check_id: uuid.UUID) -> None:
        """Let the next call check it. If that fails, or we are cancelled again, the claim ends by itself."""
        try:
            async with asyncio.timeout(FAREWELL_S), transaction(self._engine) as connection:
                await store.release(connection, upload.upload_id, check_id)
        except (SQLAlchemyError, OSError) as error:
            _log.warning("upload.not_released", upload_id=str(upload.upload_id), error=repr(error)[:300])

    async def _check(self, upload: Upload, check_id: uuid.UUID) -> Upload:
        """Complete or reject a file that was claimed."""
        assert upload.arrival_key is not None
        with _private_file() as (file, reader):
            found = await self._media.download(upload.arrival_key, file, size_bytes=upload.size_bytes, timeout_s=DOWNLOAD_TIMEOUT_S)
            if found is None:
                raise _upload_invalid(upload.upload_id, "the file has not arrived: PUT it to the URL first")
            if found.size_bytes != upload.size_bytes or not found.sha256:
                verdict = Verdict(refusal=Refusal.SIZE)
            else:
                verdict = await self._look(upload, reader)
            if verdict.refusal is not None:
                return await self._reject(upload, check_id, verdict.refusal)
            key = new_key(CHECKED, upload.owner_id, upload.upload_id)
            await self._media.put_file(key, file, upload.content_type)
        async with transaction(self._engine) as connection:
            complete = await store.end(
                connection,
                upload.upload_id,
                check_id,
                UploadState.COMPLETE,
                ttl_s=self._limits.retention_s,
                object_key=key,
                sha256=found.sha256,
                width=verdict.width,
                height=verdict.height,
                duration_ms=verdict.duration_ms,
            )
        if complete is None:
            await self._remove(key)
            raise unavailable("checking the file took too long; try again")
        UPLOADS.labels("complete").inc()
        _log.info("upload.complete", upload_id=str(upload.upload_id), content_type=upload.content_type, size_bytes=upload.size_bytes)
        await self._remove(upload.arrival_key)
        return complete

    async def _look(self, upload: Upload, reader: int) -> Verdict:
        verdict: Verdict | None = None
        began = time.monotonic()
        try:
            verdict = await self._checker.check(reader, upload.content_type)
            return verdict
        finally:
            if time.monotonic() - began > HEAVY_CHECK_S or (verdict is not None and verdict.refusal is not None):
                self._costly.count(upload.owner_id)

    async def _reject(self, upload: Upload, check_id: uuid.UUID, refusal: Refusal) -> Upload:
        assert upload.arrival_key is not None
        async with transaction(self._engine) as connection:
            rejected = await store.end(
                connection,
                upload.upload_id,
                check_id,
                UploadState.REJECTED,
                ttl_s=REJECTED_TTL_S,
                rejection=message(refusal, self._checker.limits),
            )
        if rejected is None:
            raise unavailable("checking the file took too long; try again")
        UPLOADS.labels(refusal.value).inc()
        _log.info("upload.rejected", upload_id=str(upload.upload_id), content_type=upload.content_type, refusal=refusal.value)
        await self._remove(upload.arrival_key)
        return rejected

    async def _remove(self, key: str) -> None:
        """Remove an object; what cannot be removed now the relay removes."""
        try:
            await self._media.delete(key)
        except MeshError as error:
            _log.warning("upload.object_left", key=key, error=repr(error)[:300])


@contextmanager
def _private_file() -> Generator[tuple[BinaryIO, int]]:
    """A file without a name, and a descriptor that reads it and cannot write: what is checked by somebody else stays as it was read."""
    descriptor, path = tempfile.mkstemp(prefix="genmesh-upload-")
    try:
        reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.unlink(path)
    with os.fdopen(descriptor, "w+b", buffering=0) as file:
        try:
            yield file, reader
        finally:
            os.close(reader)


def _settled(upload: Upload) -> Upload:
    """The upload when it is complete; a rejected one is a refusal."""
    if upload.state is UploadState.REJECTED:
        raise _upload_invalid(upload.upload_id, upload.rejection or "")
    return upload


def _upload_invalid(upload_id: uuid.UUID, description: str) -> MeshError:
    return precondition(Reason.ERROR_REASON_UPLOAD_INVALID, description, {"upload_id": str(upload_id)})
