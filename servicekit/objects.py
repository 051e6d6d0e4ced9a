"""Media in S3: put, presign, list, delete. boto3 is synchronous; calls run in a bounded pool of threads."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

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
            refusal = unavailable(failure)
            refusal.reason = Reason.ERROR_REASON_STORE_FAILED
            raise refusal from error

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
