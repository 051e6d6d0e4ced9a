"""The media store as somebody else than the service sees it."""

import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config

from servicekit.settings import ObjectSettings

DAY_S = 24 * 3600.0


class Bucket:
    """A bucket of the test's own."""

    def __init__(self, s3: Mapping[str, str]) -> None:
        self.name = f"test-{secrets.token_hex(6)}"
        self.settings = ObjectSettings.model_validate(
            {name.removeprefix("GENMESH_").lower(): value for name, value in s3.items()} | {"s3_bucket": self.name}
        )
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=s3["GENMESH_S3_ENDPOINT_URL"],
            aws_access_key_id=s3["GENMESH_S3_ACCESS_KEY_ID"],
            aws_secret_access_key=s3["GENMESH_S3_SECRET_ACCESS_KEY"],
            region_name=s3["GENMESH_S3_REGION"],
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        self._client.create_bucket(Bucket=self.name)

    def put(self, *keys: str, body: bytes = b"xxx", age_s: float = 2 * DAY_S) -> None:
        """Store the same bytes under each key, as if some time ago."""
        # rclone takes the time of modification from this; a listing shows it.
        metadata = {"mtime": f"{time.time() - age_s:.0f}"}

        def put(key: str) -> None:
            self._client.put_object(Bucket=self.name, Key=key, Body=body, Metadata=metadata)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(put, keys))

    def get(self, key: str) -> bytes:
        """What an object has."""
        return self._client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def listing(self) -> set[str]:
        """Keys of all objects."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return {found["Key"] for page in pages for found in page.get("Contents", ())}
