"""Media in S3: put, read, presign, list, delete. boto3 is synchronous; calls run in a bounded pool of threads."""

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from servicekit.errors import MeshError, Reason, unavailable
from servicekit.settings import ObjectSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

THREADS = 4
PAGE_MAX = 1000
"""Objects a request may list or delete: what S3 allows."""
PIECE_BYTES = 1 << 20
"""What a download has in memory at a time."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing shows it."""

    key: str
    size_bytes: int
    modified_time: datetime
    """By the store's clock."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing."""

    objects: Sequence[StoredObject]
    more: bool
    """Whether objects come after the last one."""


@dataclass(frozen=True, slots=True)
class PresignedPut:
    """A URL that stores one object, with the headers that the request has to carry."""

    url: str
    headers: Mapping[str, str]
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class Downloaded:
    """An object that was read. `sha256` is empty when it was not, as it has another size than expected."""

    size_bytes: int
    sha256: bytes = b""


class ObjectStore:
    """A bucket. Use as a context manager, so that its threads end with it.

    What the store refuses, and a store out of reach, is UNAVAILABLE (STORE_FAILED).
    """

    def __init__(self, settings: ObjectSettings) -> None:
        self._bucket = settings.s3_bucket
        self._url_ttl_s = settings.s3_url_ttl_s
        self._client = _client(settings, settings.s3_endpoint_url)
        # A second client only where clients reach the store by another name: making one takes a quarter of a second.
        public = settings.s3_public_endpoint_url
        self._presigner = _client(settings, public) if public else self._client
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")

    def __enter__(self) -> "ObjectStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def put(self, key: str, body: bytes, content_type: str) -> None:
        """Store an object, replacing one of the same key."""
        await self._call(
            lambda: self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=content_type),
            "the media could not be stored",
        )

    async def put_file(self, key: str, file: BinaryIO, content_type: str) -> None:
        """Store a whole file as an object, replacing one of the same key. The file's position does not matter afterwards."""

        def put(source: BinaryIO) -> None:
            source.seek(0)
            self._client.put_object(Bucket=self._bucket, Key=key, Body=source, ContentType=content_type)

        await self._call_with(file, "rb", put, "the media could not be stored")

    async def download(self, key: str, file: BinaryIO, *, size_bytes: int, timeout_s: float) -> Downloaded | None:
        """Read an object of exactly this size into a file, piece by piece. None: there is no such object.

        One of another size is not read. Nothing is written to the file any more, shortly after this is cancelled or takes too long.
        OSError when the file cannot take all of it.
        """
        ended = threading.Event()
        give_up_at = time.monotonic() + timeout_s

        def fetch(target: BinaryIO) -> Downloaded | None:
            try:
                reply = self._client.get_object(Bucket=self._bucket, Key=key)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                    return None
                raise
            body = reply["Body"]
            try:
                if reply["ContentLength"] != size_bytes:
                    return Downloaded(reply["ContentLength"])
                digest, count = hashlib.sha256(), 0
                for piece in body.iter_chunks(PIECE_BYTES):
                    count += len(piece)
                    if ended.is_set() or time.monotonic() > give_up_at or count > size_bytes:
                        raise TransferError
                    digest.update(piece)
                    _write_all(target, piece)
                if count != size_bytes:
                    raise TransferError
                return Downloaded(count, digest.digest())
            finally:
                body.close()  # or the rest of it would be read before the connection is used again

        try:
            return await self._call_with(file, "wb", fetch, "the media could not be read")
        finally:
            ended.set()

    async def list(self, prefix: str, *, after: str = "") -> Page:
        """Objects whose keys begin with `prefix` and come after a key (it need not exist), in the order of keys: up to 1,000."""
        reply = await self._call(
            lambda: self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, StartAfter=after, MaxKeys=PAGE_MAX),
            "the media could not be listed",
        )
        objects = [StoredObject(found["Key"], found["Size"], found["LastModified"]) for found in reply.get("Contents", ())]  # pyright: ignore[reportTypedDictNotRequiredAccess]  # S3 always says them
        return Page(objects, bool(objects) and reply.get("IsTruncated", False))

    async def delete(self, *keys: str) -> None:
        """Remove objects, 1,000 a request; those that do not exist are no error."""
        for start in range(0, len(keys), PAGE_MAX):
            await self._call(lambda batch=keys[start : start + PAGE_MAX]: self._delete(batch), "the media could not be deleted")

    def _delete(self, keys: Sequence[str]) -> None:
        reply = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
        # Success says only that the request was understood: each key has its own outcome.
        for refused in reply.get("Errors", ()):
            raise ClientError({"Error": {"Code": refused.get("Code", ""), "Message": refused.get("Message", "")}}, "DeleteObjects")

    async def _call(self, call: Callable[[], T], failure: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except (BotoCoreError, ClientError) as error:
            raise _failed(failure) from error

    async def _call_with(self, file: BinaryIO, mode: str, call: Callable[[BinaryIO], T], failure: str) -> T:
        # With a descriptor of its own: the caller may be cancelled and close the file while the thread goes on for a moment.
        own = cast(BinaryIO, os.fdopen(os.dup(file.fileno()), mode, buffering=0))
        running = self._threads.submit(call, own)
        running.add_done_callback(lambda _: own.close())
        try:
            return await asyncio.wrap_future(running)
        except (BotoCoreError, ClientError, TransferError) as error:
            raise _failed(failure) from error

    async def ping(self) -> None:
        """Raise unless the bucket can be reached."""
        await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._client.head_bucket(Bucket=self._bucket))

    def presign(self, key: str, content_type: str) -> tuple[str, datetime]:
        """A URL that reads this one object, and when it expires. Pure computation."""
        url = self._presigner.generate_presigned_url(
            "get_object",
            Params={"Bucket": self._bucket, "Key": key, "ResponseContentType": content_type},
            ExpiresIn=self._url_ttl_s,
        )
        return url, datetime.now(UTC) + timedelta(seconds=self._url_ttl_s)

    def presign_put(self, key: str, content_type: str, *, size_bytes: int, ttl_s: int) -> PresignedPut:
        """A URL that stores an object of exactly this type and size under this key. Pure computation.

        Type and size are signed headers: a request that has others, or more `x-amz-…` headers, does not fit the signature.
        """
        url = self._presigner.generate_presigned_url(
            "put_object",
            Params={"Bucket": self._bucket, "Key": key, "ContentType": content_type, "ContentLength": size_bytes},
            ExpiresIn=ttl_s,
        )
        headers = {"content-type": content_type, "content-length": str(size_bytes)}
        return PresignedPut(url, headers, datetime.now(UTC) + timedelta(seconds=ttl_s))


class TransferError(Exception):
    """A transfer that was given up."""


def _write_all(target: BinaryIO, piece: bytes) -> None:
    # Without a buffer a write may take a part and be content: a disk with little room left does so before it says that it is full.
    rest = memoryview(piece)
    while rest:  # ends: every write takes a byte or raises
        rest = rest[target.write(rest) :]


def _failed(what: str) -> MeshError:
    refusal = unavailable(what)
    refusal.reason = Reason.ERROR_REASON_STORE_FAILED
    return refusal


def _client(settings: ObjectSettings, endpoint_url: str) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id.get_secret_value(),
        aws_secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            connect_timeout=2,
            read_timeout=15,
            retries={"mode": "standard", "max_attempts": 4},
            # Not every S3 server knows the newer checksum trailers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def translate(error: Exception) -> MeshError | None:
    """S3 errors as typed errors; None for what is not one of them."""
    if isinstance(error, (BotoCoreError, ClientError)):
        return unavailable("the media store is out of reach right now")
    return None
