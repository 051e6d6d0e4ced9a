"""Puts a file to a presigned URL."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cli.download import TIMEOUT_S, opener_for

CONTENT_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".oga": "audio/ogg",
}
"""What can be uploaded, by how its name ends."""


class UploadError(Exception):
    """A file could not be put. `repeatable`: another try may help."""

    def __init__(self, message: str, *, repeatable: bool) -> None:
        super().__init__(message)
        self.repeatable = repeatable


class _Counted:
    """A file that tells how much of it has been read, and gives no more than `size_bytes`."""

    def __init__(self, file: BinaryIO, size_bytes: int, on_sent: Callable[[int], None]) -> None:
        self._file = file
        self._left = size_bytes
        self._sent = 0
        self._on_sent = on_sent

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(self._left if size < 0 else min(size, self._left))
        if not chunk and self._left:
            raise UploadError("the file has become shorter meanwhile", repeatable=False)
        self._left -= len(chunk)
        self._sent += len(chunk)
        self._on_sent(self._sent)
        return chunk


def put(path: Path, url: str, headers: dict[str, str], size_bytes: int, on_sent: Callable[[int], None] = lambda _: None) -> None:
    """Put the first `size_bytes` of a file; `on_sent` is told how many have gone. Raises UploadError, which does not tell the URL."""
    opener = opener_for(url)
    if opener is None:
        raise UploadError("the upload has no web address", repeatable=False)
    with path.open("rb") as file:
        named = {name.lower(): value for name, value in headers.items()} | {"content-length": str(size_bytes)}
        request = urllib.request.Request(url, _Counted(file, size_bytes, on_sent), named, method="PUT")  # pyright: ignore[reportArgumentType]  # noqa: S310  # it reads, which is all that is asked of it
        try:
            with opener.open(request, timeout=TIMEOUT_S):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            raise UploadError(f"the store answered {error.code}", repeatable=error.code >= 500) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            # The reason only: the URL is a key and stays out of messages.
            raise UploadError(f"the store cannot be reached: {getattr(error, 'reason', error)}", repeatable=True) from error
