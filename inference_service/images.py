"""Pictures as files: encode, thumbnail, BlurHash, preview. No torch here and no I/O.

Runs in the model process, so that the server spends no CPU on pixels.
"""

import io
import warnings
from typing import Literal

import blurhash
from PIL import Image

from inference_service.messages import EncodedImage

THUMBNAIL_SIDE_PX = 128
PREVIEW_SIDE_PX = 256
PREVIEW_MAX_BYTES = 16 * 1024  # Preview.inline_jpeg in jobs.proto
BLURHASH_COMPONENTS = (4, 3)
BLURHASH_SIDE_PX = 32  # a hash of 4 by 3 components looks the same from any larger picture

_WEBP_QUALITY = 90
_THUMBNAIL_QUALITY = 80
_PREVIEW_QUALITIES = (80, 60, 40, 20)
_PREVIEW_SIDES = (PREVIEW_SIDE_PX, 128, 64)


def encode(image: Image.Image, file_format: Literal["png", "webp"]) -> EncodedImage:
    """The picture as a file without any metadata: what it was made from stays with its owner."""
    if file_format == "webp":
        return _file(image, "webp", quality=_WEBP_QUALITY, method=4)
    return _file(image, "png")


def thumbnail(image: Image.Image) -> EncodedImage:
    """A WebP whose longest side has at most 128 px."""
    return _file(_shrunk(image, THUMBNAIL_SIDE_PX), "webp", quality=_THUMBNAIL_QUALITY)


def preview(image: Image.Image) -> bytes:
    """A JPEG of at most 16 KiB whose longest side has at most 256 px."""
    for side in _PREVIEW_SIDES:
        small = _shrunk(image, side)
        for quality in _PREVIEW_QUALITIES:
            body = _bytes(small, "jpeg", quality=quality)
            if len(body) <= PREVIEW_MAX_BYTES:
                return body
    raise ValueError("no preview of this picture is small enough")  # 64 px at quality 20 cannot be: 3 bytes a pixel are 12 KiB


def blurhash_of(image: Image.Image) -> str:
    """The BlurHash of a picture (https://blurha.sh)."""
    small = image.convert("RGB").resize(_fitting(image, BLURHASH_SIDE_PX), Image.Resampling.BOX)
    with warnings.catch_warnings():
        # blurhash-python reads pixels by Image.getdata, which Pillow will drop one day.
        warnings.simplefilter("ignore", DeprecationWarning)
        return blurhash.encode(small, *BLURHASH_COMPONENTS)


def _fitting(image: Image.Image, side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(image.size))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    size = _fitting(image, side)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _bytes(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _file(image: Image.Image, file_format: Literal["png", "webp"], **options: int) -> EncodedImage:
    return EncodedImage(
        body=_bytes(image, file_format, **options),
        content_type=f"image/{file_format}",
        suffix=file_format,
        width=image.width,
        height=image.height,
    )
