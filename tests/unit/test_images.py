"""Encoding of pictures: bounds on size, no metadata, hashes of any shape."""

import io

import numpy as np
import pytest
from PIL import Image

from inference_service import images


def noise(width: int, height: int) -> Image.Image:
    """The picture that compresses worst."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_png_is_lossless_and_bare() -> None:
    picture = noise(40, 24)
    picture.info["prompt"] = "secret"
    file = images.encode(picture, "png")
    back = Image.open(io.BytesIO(file.body))
    assert np.array_equal(np.asarray(back), np.asarray(picture))
    assert (file.content_type, file.suffix, file.width, file.height) == ("image/png", "png", 40, 24)
    assert back.info == {}
    assert b"secret" not in file.body


def test_webp_is_webp() -> None:
    file = images.encode(noise(40, 24), "webp")
    assert Image.open(io.BytesIO(file.body)).format == "WEBP"
    assert (file.content_type, file.suffix) == ("image/webp", "webp")


@pytest.mark.parametrize(
    ("size", "thumbnail"), [((64, 64), (64, 64)), ((512, 512), (128, 128)), ((1024, 256), (128, 32)), ((8, 2048), (1, 128))]
)
def test_thumbnail_has_at_most_128_pixels(size: tuple[int, int], thumbnail: tuple[int, int]) -> None:
    file = images.thumbnail(noise(*size))
    assert (file.width, file.height) == Image.open(io.BytesIO(file.body)).size == thumbnail


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (256, 256), (1024, 1024), (4096, 8)])
def test_preview_fits_whatever_the_picture(size: tuple[int, int]) -> None:
    body = images.preview(noise(*size))
    picture = Image.open(io.BytesIO(body))
    picture.load()
    assert picture.format == "JPEG"
    assert len(body) <= 16 * 1024
    assert max(picture.size) <= 256


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (1024, 8)])
def test_blurhash_leaves_the_picture_usable(size: tuple[int, int]) -> None:
    picture = noise(*size)
    assert len(images.blurhash_of(picture)) == 28
    picture.load()


def test_blurhash_has_the_mean_colour() -> None:
    # Characters 3 to 6 are the mean colour, 0xFFFFFF in base 83: https://github.com/woltapp/blurhash/blob/master/Algorithm.md
    assert images.blurhash_of(Image.new("RGB", (50, 50), "white"))[2:6] == "TSUA"
