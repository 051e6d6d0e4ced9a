"""Checks of uploaded files: what passes, what is refused and why, and what the process that looks may do to its parent: nothing.

Every bomb is made here. Files go through the real process; pieces of Python in its place do what a broken decoder might.
"""

import asyncio
import io
import os
import struct
import sys
import tempfile
import time
import warnings
import wave
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from jobs_service.uploads import media_check
from jobs_service.uploads.checker import COMMAND, Checker, Verdict
from jobs_service.uploads.media import MediaLimits, Refusal, message
from servicekit.errors import MeshError, Reason

LIMITS = MediaLimits(max_pixels=1_000_000, max_duration_s=10, memory_bytes=1 << 30, cpu_s=20, wall_s=60)
DEADLINE_S = 60.0
RATE_HZ = 8000


def picture(file_format: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    body = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(body, file_format, **options)
    return body.getvalue()


def audio(file_format: str, subtype: str, *, seconds: float = 1.0, rate: int = 16_000, channels: int = 1) -> bytes:
    body = io.BytesIO()
    wave_form = np.sin(np.arange(int(seconds * rate)) / 10) * 0.3
    soundfile.write(body, np.repeat(wave_form[:, None], channels, 1), rate, format=file_format, subtype=subtype)
    return body.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, pixels: bytes = b"", before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    body = bytearray(picture("JPEG"))
    start = body.index(b"\xff\xc0") + 5
    body[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(body)


def wav(samples: "np.ndarray[Any, Any]", rate: int = RATE_HZ) -> bytes:
    body = io.BytesIO()
    soundfile.write(body, samples, rate, format="WAV", subtype="FLOAT")
    return body.getvalue()


def zip_file() -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("index.html", "<p>hello")
    return body.getvalue()


GOOD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png": ("image/png", lambda: picture("PNG")),
    "jpeg": ("image/jpeg", lambda: picture("JPEG")),
    "jpeg, progressive": ("image/jpeg", lambda: picture("JPEG", progressive=True, optimize=True)),
    "jpeg with a gain map after it": ("image/jpeg", lambda: picture("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])),
    "jpeg, padded": ("image/jpeg", lambda: picture("JPEG") + bytes(512)),
    "webp": ("image/webp", lambda: picture("WEBP")),
    "webp, lossless": ("image/webp", lambda: picture("WEBP", lossless=True)),
    "webp, extended": ("image/webp", lambda: picture("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")),
    "wav": ("audio/wav", lambda: audio("WAV", "PCM_16")),
    "wav, 24 bit, six channels": ("audio/wav", lambda: audio("WAVEX", "PCM_24", channels=6)),
    "wav, float": ("audio/wav", lambda: audio("WAV", "FLOAT")),
    "flac": ("audio/flac", lambda: audio("FLAC", "PCM_16")),
    "mp3": ("audio/mpeg", lambda: audio("MP3", "MPEG_LAYER_III")),
    "mp3, tagged": ("audio/mpeg", lambda: b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + audio("MP3", "MPEG_LAYER_III")),
    "mp3, MPEG-2 rates": ("audio/mpeg", lambda: audio("MP3", "MPEG_LAYER_III", rate=22_050)),
    "ogg vorbis": ("audio/ogg", lambda: audio("OGG", "VORBIS")),
    "ogg opus": ("audio/ogg", lambda: audio("OGG", "OPUS", rate=48_000)),
}


async def check(body: bytes, content_type: str, *, limits: MediaLimits = LIMITS, command: tuple[str, ...] = COMMAND) -> Verdict:
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        file.seek(0)
        async with asyncio.timeout(DEADLINE_S):
            return await Checker(limits, command=command).check(file.fileno(), content_type)


@pytest.mark.parametrize("name", GOOD)
async def test_passes(name: str):
    content_type, make = GOOD[name]

    verdict = await check(make(), content_type)

    assert verdict.refusal is None
    if content_type.startswith("image/"):
        assert (verdict.width, verdict.height, verdict.duration_ms) == (64, 48, 0)
    else:
        assert verdict.width == verdict.height == 0
        assert verdict.duration_ms == pytest.approx(1000, abs=150)


@pytest.mark.parametrize("name", [name for name in GOOD if "padded" not in name])
async def test_cut_short(name: str):
    content_type, make = GOOD[name]
    body = make()

    assert (await check(body[: len(body) * 2 // 3], content_type)).refusal is Refusal.BROKEN


@pytest.mark.parametrize("announced", ["image/png", "image/jpeg", "image/webp", "audio/wav", "audio/flac", "audio/ogg", "audio/mpeg"])
async def test_another_type(announced: str):
    kinds = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "wav": "audio/wav", "flac": "audio/flac"}
    others = [GOOD[name][1]() for name, kind in kinds.items() if kind != announced]
    others += [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<!doctype html><p>hello", b"GIF89a" + bytes(60), bytes(64), b"x"]

    assert {(await check(other, announced)).refusal for other in others} == {Refusal.TYPE}


async def test_video_in_ogg():
    body = bytearray(audio("OGG", "VORBIS"))
    start = body.index(b"\x01vorbis")
    body[start : start + 7] = b"\x80theora"

    assert (await check(bytes(body), "audio/ogg")).refusal in (Refusal.TYPE, Refusal.BROKEN)


PNG = picture("PNG")
POLYGLOTS: dict[str, tuple[str, bytes]] = {
    "html after a png": ("image/png", PNG + b"<html ><script>alert(1)</script>"),
    "bytes after a png": ("image/png", PNG + b"anything"),
    "script in a comment of a png": ("image/png", PNG[:33] + chunk(b"tEXt", b"Comment\0<script>alert(1)</script>") + PNG[33:]),
    "html in a comment of a jpeg": ("image/jpeg", picture("JPEG", comment=b"<!DOCTYPE html><p>")),
    "svg in a comment of a jpeg": ("image/jpeg", picture("JPEG", comment=b"<svg onload=alert(1)>")),
    "pdf in a comment of a jpeg": ("image/jpeg", picture("JPEG", comment=b"%PDF-1.7")),
    "zip after a jpeg": ("image/jpeg", picture("JPEG") + zip_file()),
    "zip in a chunk of a png": ("image/png", PNG[:-12] + chunk(b"zzZz", zip_file())[:-4] + b"\0\0\0\0" + PNG[-12:]),
    "bytes after a webp": ("image/webp", picture("WEBP") + b"<html >"),
    "zip after a flac": ("audio/flac", audio("FLAC", "PCM_16") + zip_file()),
    "html after an mp3": ("audio/mpeg", audio("MP3", "MPEG_LAYER_III") + b"<html ><body>"),
    "pdf in the tag of an mp3": ("audio/mpeg", b"ID3\x04\0\0\0\0\0\x0a%PDF-1.7\n\0" + audio("MP3", "MPEG_LAYER_III")),
    "zip after an ogg": ("audio/ogg", audio("OGG", "VORBIS") + zip_file()),
    "zip after a wav": ("audio/wav", audio("WAV", "PCM_16") + zip_file()),
    "rar in a wav": ("audio/wav", wav(np.frombuffer(b"Rar!\x1a\x07\x01\x00" * 8, np.float32))),
}


@pytest.mark.parametrize("name", POLYGLOTS)
async def test_polyglot(name: str):
    content_type, body = POLYGLOTS[name]

    assert (await check(body, content_type)).refusal in (Refusal.POLYGLOT, Refusal.BROKEN)


async def test_a_zip_of_which_a_png_is_a_part():
    # Its directory is at the end of the file and its comment ends with the picture: a whole picture, and a whole archive.
    archive = zip_file()
    inside = len(PNG[:-12]) + 8
    tail = struct.pack(">I", zlib.crc32(b"zzZz" + archive[:-2] + struct.pack("<H", 16))) + PNG[-12:]
    body = PNG[:-12] + struct.pack(">I", len(archive)) + b"zzZz" + archive[:-2] + struct.pack("<H", 16) + tail
    with zipfile.ZipFile(io.BytesIO(body)) as opened:
        assert opened.namelist() == ["index.html"]
    with Image.open(io.BytesIO(body)) as opened_picture:
        opened_picture.load()
    assert body[inside:].startswith(b"PK")

    assert (await check(body, "image/png")).refusal is Refusal.POLYGLOT


async def test_a_picture_that_claims_to_be_huge_is_not_decoded():
    for body, content_type in (
        (png(65_535, 65_535), "image/png"),
        (png(2**31 - 1, 2**31 - 1), "image/png"),
        (jpeg_of_size(65_535, 65_535), "image/jpeg"),
        (picture("WEBP", size=(1001, 1000)), "image/webp"),
    ):
        assert (await check(body, content_type)).refusal is Refusal.PIXELS


async def test_a_picture_without_pixels():
    assert (await check(png(0, 10), "image/png")).refusal is Refusal.BROKEN
    assert (await check(jpeg_of_size(0, 10), "image/jpeg")).refusal is Refusal.BROKEN


async def test_the_size_in_a_webp_is_the_size_of_its_picture():
    body = bytearray(picture("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"))
    body[24:27] = (9).to_bytes(3, "little")  # the canvas claims to be 10 pixels wide

    assert (await check(bytes(body), "image/webp")).refusal is Refusal.BROKEN


async def test_a_decompression_bomb():
    # Four gigapixels of one colour in 4 MB of zlib, announced as such; then the same data announced as one pixel.
    zeros = zlib.compressobj(9)
    bomb = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(1024)) + zeros.flush()
    for width, height, refusals in ((32_768, 32_768, {Refusal.PIXELS}), (1, 1, {None, Refusal.BROKEN, Refusal.LIMITS})):
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", bomb) + chunk(b"IEND", b"")

        assert (await check(body, "image/png")).refusal in refusals


async def test_a_bomb_in_the_text_of_a_png():
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(512 << 20), 9))

    assert (await check(png(1, 1, pixels=bytes(4), before=text), "image/png")).refusal in (Refusal.BROKEN, Refusal.LIMITS, None)


@pytest.mark.parametrize(("file_format", "content_type"), [("PNG", "image/png"), ("WEBP", "image/webp")])
async def test_animated(file_format: str, content_type: str):
    body = picture(file_format, save_all=True, append_images=[Image.new("RGB", (64, 48))])

    assert (await check(body, content_type)).refusal is Refusal.ANIMATED


async def test_a_damaged_picture():
    body = bytearray(PNG)
    body[len(body) // 2] ^= 0xFF

    assert (await check(bytes(body), "image/png")).refusal is Refusal.BROKEN


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_audio_of_what_is_no_number(value: float):
    samples = np.zeros(RATE_HZ, np.float32)
    samples[-1] = value

    assert (await check(wav(samples), "audio/wav")).refusal is Refusal.NOT_FINITE


async def test_audio_that_is_too_long():
    for body, content_type in (
        (audio("WAV", "PCM_16", seconds=11, rate=RATE_HZ), "audio/wav"),
        (audio("FLAC", "PCM_16", seconds=11), "audio/flac"),
        (audio("OGG", "VORBIS", seconds=11), "audio/ogg"),
        (audio("MP3", "MPEG_LAYER_III", seconds=11), "audio/mpeg"),
    ):
        assert (await check(body, content_type)).refusal is Refusal.DURATION


async def test_audio_that_claims_to_be_long():
    flac = bytearray(audio("FLAC", "PCM_16"))
    flac[8 + 13] |= 0x0F  # the upper bits of 36 that count samples
    flac[8 + 14 : 8 + 18] = b"\xff" * 4
    ogg = bytearray(audio("OGG", "VORBIS"))
    page = ogg.rindex(b"OggS")
    ogg[page + 6 : page + 14] = (2**62).to_bytes(8, "little")
    riff = bytearray(audio("WAV", "PCM_16"))
    riff[40:44] = b"\xf0\xff\xff\xff"

    assert (await check(bytes(flac), "audio/flac")).refusal is Refusal.DURATION
    assert (await check(bytes(ogg), "audio/ogg")).refusal in (Refusal.DURATION, Refusal.BROKEN)
    assert (await check(bytes(riff), "audio/wav")).refusal is Refusal.BROKEN


async def test_audio_of_more_samples_than_its_longest_in_stereo_has():
    # Silence costs a decoder as much as music, and hardly any bytes.
    silence = audio("FLAC", "PCM_16", seconds=10, rate=96_000, channels=1)
    too_much = audio("FLAC", "PCM_16", seconds=10, rate=48_000, channels=3)

    assert (await check(silence, "audio/flac")).refusal is None
    assert (await check(too_much, "audio/flac")).refusal is Refusal.SAMPLES


async def test_opus_may_have_half_as_many_samples():
    for rate, channels, refused in ((48_000, 1, None), (48_000, 2, Refusal.SAMPLES), (16_000, 2, Refusal.SAMPLES)):
        opus = audio("OGG", "OPUS", seconds=9.9, rate=rate, channels=channels)

        assert (await check(opus, "audio/ogg")).refusal is refused


async def test_audio_of_too_many_samples_is_not_decoded(monkeypatch: pytest.MonkeyPatch):
    class Watched(soundfile.SoundFile):
        def read(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("decoded")

    monkeypatch.setattr(soundfile, "SoundFile", Watched)

    with pytest.raises(media_check.RefusedError) as refused:
        media_check.check(audio("FLAC", "PCM_16", seconds=1, rate=384_000, channels=3), "audio/flac", replace(LIMITS, max_duration_s=10))

    assert refused.value.refusal is Refusal.SAMPLES


async def test_a_flac_that_does_not_say_how_long_it_is():
    flac = bytearray(audio("FLAC", "PCM_16"))
    flac[8 + 13] &= 0xF0
    flac[8 + 14 : 8 + 18] = bytes(4)

    assert (await check(bytes(flac), "audio/flac")).refusal is Refusal.BROKEN


async def test_the_form_of_audio():
    for channels, rate in ((9, 16_000), (1, 999), (1, 384_001)):
        body = io.BytesIO()
        with wave.open(body, "wb") as file:
            file.setparams((channels, 2, rate, 0, "NONE", ""))
            file.writeframes(bytes(2 * channels * 100))

        assert (await check(body.getvalue(), "audio/wav")).refusal is Refusal.AUDIO_FORM


async def test_too_much_memory():
    # 900 Mpx are allowed here, and a process that may have 512 MiB: it decodes until there is no more.
    limits = MediaLimits(max_pixels=900_000_000, max_duration_s=10, memory_bytes=512 << 20, cpu_s=20, wall_s=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        body = png(20_000, 20_000, pixels=bytes(1000))

    assert (await check(body, "image/png", limits=limits)).refusal is Refusal.LIMITS


# --- what the process does to its parent ---------------------------------------------------------------------------------

READY = "print('ready', flush=True);"


def stand_in(code: str) -> tuple[str, ...]:
    """A process that runs this in place of the check."""
    return (sys.executable, "-I", "-c", code)


def number_in(path: str) -> int:
    return int(file.read_text()) if (file := Path(path)).exists() else 0


LIMITED = (
    "import sys; from jobs_service.uploads.media import MediaLimits; from jobs_service.uploads import media_check;"
    "media_check.give_up_rights(MediaLimits.decode(sys.argv[2]));" + READY
)


@pytest.mark.parametrize(
    "code",
    [
        READY + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        READY + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        READY + "import sys; sys.exit(3)",
        READY + "print('{}{}')",
        READY + 'print(\'{"width": 64, "height": 48, "html": "<script>"}\')',
        READY + 'print(\'{"refusal": "because I say so"}\')',
        READY + 'print(\'{"width": true, "height": 48}\')',
        READY + "print('x' * 100_000_000)",
        READY + "import itertools\nfor _ in itertools.count(): print('{}', flush=True)",
        LIMITED + "x = bytearray(4 << 30)",
        LIMITED + "\nwhile True: pass",
    ],
)
async def test_a_process_that_does_not_live_to_tell(code: str):
    limits = MediaLimits(max_pixels=10_000, max_duration_s=10, memory_bytes=1 << 30, cpu_s=1, wall_s=60)

    assert (await check(PNG, "image/png", command=stand_in(code), limits=limits)).refusal is Refusal.LIMITS


@pytest.mark.parametrize(
    "answer",
    [
        "{}",
        '{"width": 64}',
        '{"width": 1000, "height": 1001}',
        '{"width": 64, "height": 48, "duration_ms": 1}',
        '{"duration_ms": 1000}',
    ],
)
async def test_an_answer_that_cannot_be(answer: str):
    assert (await check(PNG, "image/png", command=stand_in(f"{READY} print({answer!r})"))).refusal is Refusal.BROKEN


async def test_a_process_that_hangs_is_ended():
    with tempfile.TemporaryDirectory() as directory:
        pid_file = os.path.join(directory, "pid")
        code = f"import os, time; open({pid_file!r}, 'w').write(str(os.getpid())); {READY} time.sleep(3600)"
        limits = MediaLimits(max_pixels=10_000, max_duration_s=10, memory_bytes=1 << 30, cpu_s=20, wall_s=1.5)

        started = time.monotonic()
        with pytest.raises(MeshError) as refused:
            await check(PNG, "image/png", command=stand_in(code), limits=limits)

        assert refused.value.reason == Reason.ERROR_REASON_UNAVAILABLE
        assert time.monotonic() - started < DEADLINE_S
        process_id = number_in(pid_file)
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


async def test_a_check_that_is_cancelled_leaves_no_process():
    with tempfile.TemporaryDirectory() as directory:
        pid_file = os.path.join(directory, "pid")
        code = f"import os, time; open({pid_file!r} + '.new', 'w').write(str(os.getpid())); os.rename({pid_file!r} + '.new', {pid_file!r});"
        checking = asyncio.create_task(check(PNG, "image/png", command=stand_in(code + "time.sleep(3600)")))
        async with asyncio.timeout(DEADLINE_S):
            while number_in(pid_file) == 0:  # noqa: ASYNC110  # it is another process that writes it
                await asyncio.sleep(0.01)
        checking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await checking
        process_id = number_in(pid_file)
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


@pytest.mark.parametrize(
    "code", ["import no_such_module", "print('hello')", READY + 'print(\'{"fault": "ImportError()"}\')', READY.replace("ready", "steady")]
)
async def test_what_is_our_fault_is_not_the_files(code: str):
    with pytest.raises(MeshError) as refused:
        await check(PNG, "image/png", command=stand_in(code))

    assert refused.value.reason == Reason.ERROR_REASON_UNAVAILABLE


@pytest.mark.parametrize(
    "deed",
    [
        "open('/etc/hostname')",
        "open('/tmp/mine', 'w')",
        "__import__('socket').socket()",
        "__import__('socket').create_connection(('127.0.0.1', 80))",
        "__import__('os').pipe()",
        "__import__('os').dup(0)",
        "__import__('os').write(0, b'changed')",
    ],
)
async def test_what_the_process_cannot_do(deed: str):
    code = (
        LIMITED
        + f"""
import json, socket
try:
    {deed}
except OSError as error:
    print(json.dumps({{"width": 1, "height": 1}}))
else:
    print(json.dumps({{"refusal": "broken"}}))
"""
    )
    # The modules are there before the rights are given up.
    code = "import socket, json;" + code
    with tempfile.NamedTemporaryFile() as file:
        file.write(PNG)
        file.flush()
        with Path(file.name).open("rb") as reader:  # noqa: ASYNC230
            async with asyncio.timeout(DEADLINE_S):
                verdict = await Checker(LIMITS, command=stand_in(code)).check(reader.fileno(), "image/png")

    assert verdict.refusal is None


async def test_what_the_process_is_told_of_us(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GENMESH_S3_SECRET_ACCESS_KEY", "secret")
    allowed = {"LC_ALL", "OPENBLAS_NUM_THREADS"}
    code = f"{READY}import os, json; print(json.dumps({{'width': 1, 'height': 1}} if set(os.environ) <= {allowed!r} else {{}}))"

    assert (await check(PNG, "image/png", command=stand_in(code))).refusal is None


def test_every_refusal_has_words_for_people():
    assert len({message(refusal, LIMITS) for refusal in Refusal}) == len(Refusal)
