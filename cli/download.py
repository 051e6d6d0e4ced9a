"""Fetches what a job made by its presigned URL, checked against the asset's size and SHA-256 before it gets its name."""

import hashlib
import http.client
import mimetypes
import os
import re
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

from cli.failures import usage
from cli.files import is_stream, replacing
from genmesh.jobs.v1 import jobs_pb2

CHUNK_BYTES = 64 * 1024
TIMEOUT_S = 30.0
SLUG_MAX = 40

MEDIA = frozenset({jobs_pb2.Asset.KIND_IMAGE, jobs_pb2.Asset.KIND_VIDEO, jobs_pb2.Asset.KIND_AUDIO, jobs_pb2.Asset.KIND_TEXT})

_SUFFIXES = {"image/png": ".png", "image/webp": ".webp", "image/jpeg": ".jpg"}


class DownloadError(Exception):
    """A file could not be fetched whole; a fresh URL may help."""


def media_of(job: jobs_pb2.Job) -> list[jobs_pb2.Asset]:
    """What the user asked for, thumbnails left out."""
    return [asset for asset in job.assets if asset.kind in MEDIA]


def check_target(out: Path | None) -> None:
    """Raise CommandError when nothing can be written to `out`: before the job, which costs credits, and not after."""
    if out is not None and is_stream(out):
        raise usage(f"not a file: {out}", "give --out the name of a file or a directory")
    directory = Path() if out is None else out if out.is_dir() else out.resolve().parent
    if not directory.is_dir():
        raise usage(f"no such directory: {directory}", "make it first, or choose another --out")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise usage(f"the directory cannot be written: {directory.absolute()}", "choose another --out")


def target_paths(job: jobs_pb2.Job, out: Path | None) -> list[Path]:
    """Where each of `media_of(job)` goes: `out`, or a name made of prompt and id in it; numbered when there are several."""
    media = media_of(job)
    directory, stem, suffix = Path(), f"{slug(job.spec.image.prompt)}-{job.job_id[-8:]}", ""
    if out is not None and out.is_dir():
        directory = out
    elif out is not None:
        directory, stem, suffix = out.parent, out.stem, out.suffix
    several = len(media) > 1
    return [directory / f"{stem}{f'-{number}' if several else ''}{suffix or _suffix(asset)}" for number, asset in enumerate(media, start=1)]


def slug(prompt: str) -> str:
    """`A tiger's face!` → `a-tiger-s-face`."""
    return "-".join(re.findall(r"[^\W_]+", prompt.lower()))[:SLUG_MAX].strip("-") or "image"


def fetch(asset: jobs_pb2.Asset, path: Path) -> None:
    """Download an asset to `path`, replacing what is there. Raises DownloadError; then `path` is untouched."""
    digest = hashlib.sha256()
    size = 0
    with replacing(path) as file:
        for chunk in _chunks(asset.url):
            size += len(chunk)
            if size > asset.size_bytes:
                raise DownloadError(f"the store sent more than the {asset.size_bytes} bytes announced")
            digest.update(chunk)
            file.write(chunk)
        if size != asset.size_bytes:
            raise DownloadError(f"the store sent {size} bytes of {asset.size_bytes}")
        if digest.hexdigest() != asset.sha256:
            raise DownloadError("the file differs from what the job made (SHA-256)")


def opener_for(url: str) -> urllib.request.OpenerDirector | None:
    """What opens a presigned URL; None when it is no web address."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"}:
        return None
    # The embedded store listens on this machine, where no proxy can reach it.
    local = parts.hostname is not None and (parts.hostname in {"localhost", "::1"} or parts.hostname.startswith("127."))
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))


def _chunks(url: str) -> Generator[bytes]:
    opener = opener_for(url)
    if opener is None:
        raise DownloadError("the asset has no web address")
    try:
        with opener.open(url, timeout=TIMEOUT_S) as response:
            while chunk := response.read(CHUNK_BYTES):
                yield chunk
    except urllib.error.HTTPError as error:
        raise DownloadError(f"the store answered {error.code}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        # The reason only: the URL is a key to the file and stays out of messages.
        raise DownloadError(f"the store cannot be reached: {getattr(error, 'reason', error)}") from error


def _suffix(asset: jobs_pb2.Asset) -> str:
    return _SUFFIXES.get(asset.content_type) or mimetypes.guess_extension(asset.content_type) or ""
