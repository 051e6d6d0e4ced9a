"""Media in S3: put, presign, delete. boto3 is synchronous; calls run in a bounded pool of threads."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from servicekit.errors import MeshError, Reason, unavailable
from servicekit.settings import ObjectSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

THREADS = 4


class ObjectStore:
    """A bucket. Use as a context manager, so that its threads end with it."""

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
        """Store an object, replacing one of the same key. UNAVAILABLE (STORE_FAILED) when the store refuses."""

        def call() -> None:
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType=content_type)

        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except (BotoCoreError, ClientError) as error:
            refusal = unavailable("the media could not be stored")
            refusal.reason = Reason.ERROR_REASON_STORE_FAILED
            raise refusal from error

    async def delete(self, *keys: str) -> None:
        """Remove objects; those that do not exist are no error."""

        def call() -> None:
            for key in keys:
                self._client.delete_object(Bucket=self._bucket, Key=key)

        await asyncio.get_running_loop().run_in_executor(self._threads, call)

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
