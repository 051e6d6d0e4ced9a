"""`python -I -B -m jobs_service.uploads.media_check TYPE LIMITS < FILE`: looks whether a file that a user brought is what it claims to be.

A process of its own, because decoders have bugs: before it reads a byte of the file it gives up memory, processor time, processes, and
every file descriptor but the three it has, so that it can neither open a file nor a connection. It says `ready` when that is done, then
its verdict as one JSON object. What it says is believed by nobody without being checked.
"""

import errno
import io
import json
import math
import mmap
import re
import resource
import signal
import sys
import warnings
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import mutagen
import numpy as np
import puremagic
import soundfile
from mutagen.flac import FLAC
from mutagen.mp3 import MP3
from mutagen.oggflac import OggFLAC
from mutagen.oggopus import OggOpus
from mutagen.oggvorbis import OggVorbis
from mutagen.wave import WAVE
from PIL import Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin

from jobs_service.uploads.media import MediaLimits, Refusal

CHUNKS_MAX = 400_000
"""Parts of a container that are looked at: two hours of Ogg in pages of 20 ms."""
PICTURES_MAX = 8
"""JPEGs one after the other in one file: cameras append depth and gain maps."""
CHANNELS_MAX = 8
SAMPLE_RATES_HZ = (1_000, 384_000)
BLOCK_FRAMES = 65_536
MISSING_FRAMES_MAX = 4_096
"""Frames a decoder may give less than the header says: lossy codecs round to whole packets."""
OPUS_COST, OPUS_RATE_HZ = 2, 48_000
"""A sample of Opus counts twice, and at the rate it is decoded at, whatever rate comes out: it costs three times what Vorbis does."""
LENGTH_UNKNOWN_FRAMES = 1 << 62
"""From here on libsndfile means that the header does not say."""
SURE = 0.4
"""What puremagic calls a match of four bytes."""
EDGE_BYTES = 64 * 1024
ZIP_TAIL_BYTES = 22 + 0xFFFF

_FOREIGN = re.compile(rb"(?i)<!doctype|<html[\s>]|<svg[\s>]|<script|<iframe|<\?php\s|%pdf-|rar!\x1a\x07|7z\xbc\xaf\x27\x1c")
"""What makes a browser or an unpacker see something else in a file. Looked for at its edges, where they look."""
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
"""The next marker after compressed data, in which 0xFF stands before 0x00 or a restart marker only."""
_MIME_TYPES = {
    "audio/wav": {"audio/wav", "audio/wave", "audio/x-wav"},
    "audio/flac": {"audio/flac", "audio/x-flac"},
    "audio/ogg": {"audio/ogg", "application/ogg", "audio/opus", "audio/vorbis"},
}
"""What puremagic calls types that have several names."""
_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
_DECODED_AS = {"image/png": {"PNG"}, "image/jpeg": {"JPEG", "MPO"}, "image/webp": {"WEBP"}}
_AUDIO_FORMATS = {"audio/wav": {"WAV", "WAVEX"}, "audio/flac": {"FLAC"}, "audio/ogg": {"OGG"}, "audio/mpeg": {"MP3", "MPEG"}}
_PLUGINS = (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin)  # imported here: later there are no files to import

Data = mmap.mmap | bytes


class RefusedError(Exception):
    """The file is no good."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal


def check(data: Data, content_type: str, limits: MediaLimits) -> dict[str, int]:
    """`width` and `height` of a picture, `duration_ms` of audio. Raises RefusedError, and whatever decoders raise."""
    _check_type(data, content_type)
    if content_type in _FORMATS:
        width, height = _PICTURES[content_type](data)
        _check_edges(data)
        if width * height > limits.max_pixels:
            raise RefusedError(Refusal.PIXELS)
        if not width or not height:
            raise RefusedError(Refusal.BROKEN)
        _decode_picture(_reader(data), content_type, (width, height), limits)
        return {"width": width, "height": height}
    _SOUNDS[content_type](data)
    _check_edges(data)
    _check_duration(_reader(data), content_type, data, limits)
    return {"duration_ms": _decode_audio(_reader(data), content_type, limits)}


def _reader(data: Data) -> BinaryIO:
    return cast(BinaryIO, _Reader(data))


class _Reader(io.RawIOBase):
    """The file as decoders want it: a file without a descriptor, and without a copy of it in memory."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        part = self._data[self._position : self._position + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self._position, len(self._data))[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "before the beginning")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position


def _need(fact: object, refusal: Refusal = Refusal.BROKEN) -> None:
    if not fact:
        raise RefusedError(refusal)


def _check_type(data: Data, content_type: str) -> None:
    """By content alone: the signature at the very beginning, and what a database of signatures says of both ends."""
    _need(_SIGNATURES[content_type](bytes(data[:16])), Refusal.TYPE)
    try:
        found = puremagic.magic_string(bytes(data[:EDGE_BYTES]))
    except puremagic.PureError:
        found = []
    surest = max((match.confidence for match in found), default=0.0)
    names = _MIME_TYPES.get(content_type, {content_type})
    known = any(match.mime_type in names for match in found if match.confidence == surest)
    # The signature of MPEG audio has eleven bits: not every frame is in the database, which must not be sure of another type then.
    _need(known or (content_type == "audio/mpeg" and surest < SURE), Refusal.TYPE)


def _check_edges(data: Data) -> None:
    head, tail = bytes(data[:EDGE_BYTES]), bytes(data[-ZIP_TAIL_BYTES:])
    foreign = _FOREIGN.search(head) or _FOREIGN.search(tail)
    # A tape archive has its signature at 257, an image of a CD at 32769.
    _need(not foreign and data[257:262] != b"ustar" and data[32769:32774] != b"CD001", Refusal.POLYGLOT)
    end = tail.find(b"PK\x05\x06")
    while end >= 0:  # ends: every find begins after the one before
        comment_bytes = int.from_bytes(tail[end + 20 : end + 22], "little")
        _need(end + 22 + comment_bytes != len(tail), Refusal.POLYGLOT)
        end = tail.find(b"PK\x05\x06", end + 1)


# --- pictures: size from the header, and the container read to its very end ---------------------------------------------


def _png(data: Data) -> tuple[int, int]:
    size = (0, 0)
    position = 8
    for number in range(CHUNKS_MAX):
        length, kind = int.from_bytes(data[position : position + 4], "big"), bytes(data[position + 4 : position + 8])
        end = position + 12 + length
        _need(end <= len(data) and (kind == b"IHDR") == (number == 0))
        if kind == b"IHDR":
            _need(length == 13)
            size = (int.from_bytes(data[position + 8 : position + 12], "big"), int.from_bytes(data[position + 12 : position + 16], "big"))
        _need(kind != b"acTL", Refusal.ANIMATED)
        checksum = int.from_bytes(data[end - 4 : end], "big")
        _need(zlib.crc32(memoryview(data)[position + 4 : end - 4]) == checksum)
        position = end
        if kind == b"IEND":
            _need(position == len(data), Refusal.POLYGLOT)
            return size
    raise RefusedError(Refusal.LIMITS)


def _jpeg(data: Data) -> tuple[int, int]:
    size, position = _one_jpeg(data, 0)
    for _ in range(PICTURES_MAX):
        rest = bytes(data[position : position + EDGE_BYTES])
        stripped = rest.lstrip(b"\x00\xff")  # cameras pad to whole blocks; 0xFF is the first byte of the next picture, too
        if not stripped:
            _need(position + len(rest) == len(data), Refusal.POLYGLOT)
            return size
        start = position + len(rest) - len(stripped) - 1
        _need(data[start : start + 2] == b"\xff\xd8", Refusal.POLYGLOT)
        position = _one_jpeg(data, start)[1]
    raise RefusedError(Refusal.POLYGLOT)


def _one_jpeg(data: Data, start: int) -> tuple[tuple[int, int], int]:
    """Size of the picture that begins there, and where it ends."""
    size = (0, 0)
    position = start + 2
    for _ in range(CHUNKS_MAX):
        found = _JPEG_MARKER.match(data, position)
        _need(found)
        assert found is not None
        marker, position = found[0][-1], found.end()
        if marker == 0xD9:
            return size, position
        length = int.from_bytes(data[position : position + 2], "big")
        _need(length >= 2 and position + length <= len(data))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            _need(size == (0, 0) and length >= 8)
            size = (int.from_bytes(data[position + 5 : position + 7], "big"), int.from_bytes(data[position + 3 : position + 5], "big"))
        position += length
        if marker == 0xDA:  # compressed data up to the next marker
            scan_end = _JPEG_MARKER.search(data, position)
            _need(scan_end)
            assert scan_end is not None
            position = scan_end.start()
    raise RefusedError(Refusal.LIMITS)


def _webp(data: Data) -> tuple[int, int]:
    size = (0, 0)
    for kind, start, length in _riff(data):
        _need(kind not in (b"ANIM", b"ANMF"), Refusal.ANIMATED)
        head = bytes(data[start : start + 10])
        if kind == b"VP8X":
            _need(length >= 10 and size == (0, 0))
            _need(not head[0] & 0x02, Refusal.ANIMATED)
            size = (int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1)
        elif kind == b"VP8L" and size == (0, 0):
            bits = int.from_bytes(head[1:5], "little")
            _need(length >= 5 and head[0] == 0x2F)
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"VP8 " and size == (0, 0):
            _need(length >= 10 and head[3:6] == b"\x9d\x01\x2a")
            size = (int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF)
    return size


def _riff(data: Data) -> list[tuple[bytes, int, int]]:
    """Chunks of a RIFF file as (kind, start, length). They fill it, as its header says, to the last byte."""
    declared = int.from_bytes(data[4:8], "little") + 8
    _need(len(data) - declared in (0, 1) or declared > len(data), Refusal.POLYGLOT)
    _need(declared <= len(data))
    chunks: list[tuple[bytes, int, int]] = []
    position = 12
    while position < declared:
        _need(len(chunks) < CHUNKS_MAX, Refusal.LIMITS)
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        _need(position + 8 + length <= declared)
        chunks.append((bytes(data[position : position + 4]), position + 8, length))
        position += 8 + length + length % 2
    return chunks


def _decode_picture(file: BinaryIO, content_type: str, size: tuple[int, int], limits: MediaLimits) -> None:
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=[_FORMATS[content_type]]) as image:
            _need(image.format in _DECODED_AS[content_type], Refusal.TYPE)
            _need(image.size == size)
            _need(image.format == "MPO" or getattr(image, "n_frames", 1) == 1, Refusal.ANIMATED)
            image.load()


# --- audio ---------------------------------------------------------------------------------------------------------------


def _wav(data: Data) -> None:
    kinds = [kind for kind, _, _ in _riff(data)]
    _need(kinds.count(b"fmt ") == 1 and kinds.count(b"data") == 1)


def _flac(data: Data) -> None:
    position = 4
    for number in range(CHUNKS_MAX):
        head = bytes(data[position : position + 4])
        _need(len(head) == 4 and (head[0] & 0x7F == 0) == (number == 0))
        position += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            _need(data[position : position + 2] in (b"\xff\xf8", b"\xff\xf9"))
            return
    raise RefusedError(Refusal.LIMITS)


def _ogg(data: Data) -> None:
    """One stream, page after page to the very end."""
    position = 0
    serial = bytes(data[14:18])
    for _ in range(CHUNKS_MAX):
        if position == len(data):
            return
        _need(data[position : position + 4] == b"OggS" and position + 27 <= len(data), Refusal.POLYGLOT if position else Refusal.BROKEN)
        _need(data[position + 14 : position + 18] == serial)
        segment_count = data[position + 26]
        lengths = bytes(data[position + 27 : position + 27 + segment_count])
        position += 27 + segment_count + sum(lengths)
        _need(position <= len(data))
    raise RefusedError(Refusal.LIMITS)


def _mpeg(data: Data) -> None:
    """Frames follow the tag, if there is one."""
    position = 0
    if data[:3] == b"ID3":
        size = bytes(data[6:10])
        _need(len(size) == 4 and max(size) < 0x80)
        position = 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3]) + (10 if data[5] & 0x10 else 0)
        _need(position < len(data))
    start = bytes(data[position : position + EDGE_BYTES]).lstrip(b"\x00")  # tags are padded
    _need(_is_mpeg_frame(start))


def _is_mpeg_frame(head: bytes) -> bool:
    """Whether an MPEG audio frame of layer III begins there."""
    return len(head) >= 4 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 == 0x02 and head[1] & 0x18 != 0x08


def _is_ogg_audio(data: Data) -> type[OggVorbis | OggOpus | OggFLAC]:
    first = bytes(data[27 + data[26] : 27 + data[26] + 8])
    for signature, kind in ((b"\x01vorbis", OggVorbis), (b"OpusHead", OggOpus), (b"\x7fFLAC", OggFLAC)):
        if first.startswith(signature):
            return kind
    raise RefusedError(Refusal.TYPE)


def _check_duration(file: BinaryIO, content_type: str, data: Data, limits: MediaLimits) -> None:
    """By the headers: a file that only claims to be long is not decoded either."""
    kinds: dict[str, Any] = {"audio/wav": WAVE, "audio/flac": FLAC, "audio/mpeg": MP3}
    kind = kinds.get(content_type) or _is_ogg_audio(data)
    try:
        opened: Any = kind(file)
        duration_s = float(opened.info.length)
    except mutagen.MutagenError:
        raise RefusedError(Refusal.BROKEN) from None
    _need(math.isfinite(duration_s) and duration_s >= 0)
    _need(duration_s <= limits.max_duration_s, Refusal.DURATION)


def _decode_audio(file: BinaryIO, content_type: str, limits: MediaLimits) -> int:
    """Milliseconds that were decoded."""
    with soundfile.SoundFile(file) as sound:
        _need(sound.format in _AUDIO_FORMATS[content_type], Refusal.TYPE)
        rate = sound.samplerate
        _need(1 <= sound.channels <= CHANNELS_MAX and SAMPLE_RATES_HZ[0] <= rate <= SAMPLE_RATES_HZ[1], Refusal.AUDIO_FORM)
        _need(sound.frames < LENGTH_UNKNOWN_FRAMES)  # whether something is missing could not be told
        _need(sound.frames <= limits.max_duration_s * rate, Refusal.DURATION)
        samples_per_frame = sound.channels * (OPUS_COST * OPUS_RATE_HZ / rate if sound.subtype == "OPUS" else 1)
        _need(sound.frames * samples_per_frame <= limits.max_samples, Refusal.SAMPLES)
        buffer = np.empty((BLOCK_FRAMES, sound.channels), np.float32)
        frames = 0
        while frames <= limits.max_duration_s * rate:
            block = sound.read(out=buffer)
            if not len(block):
                break
            frames += len(block)
            _need(frames * samples_per_frame <= limits.max_samples, Refusal.SAMPLES)
            _need(bool(np.isfinite(block).all()), Refusal.NOT_FINITE)
        _need(frames <= limits.max_duration_s * rate, Refusal.DURATION)
        _need(frames and frames + MISSING_FRAMES_MAX >= sound.frames)
        return max(1, round(frames * 1000 / rate))


_SIGNATURES: dict[str, Callable[[bytes], bool]] = {
    "image/png": lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"),
    "image/jpeg": lambda head: head.startswith(b"\xff\xd8\xff"),
    "image/webp": lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP",
    "audio/wav": lambda head: head[:4] == b"RIFF" and head[8:12] == b"WAVE",
    "audio/flac": lambda head: head.startswith(b"fLaC"),
    "audio/ogg": lambda head: head.startswith(b"OggS"),
    "audio/mpeg": lambda head: head.startswith(b"ID3") or _is_mpeg_frame(head),
}
_PICTURES: dict[str, Callable[[Data], tuple[int, int]]] = {"image/png": _png, "image/jpeg": _jpeg, "image/webp": _webp}
_SOUNDS: dict[str, Callable[[Data], None]] = {"audio/wav": _wav, "audio/flac": _flac, "audio/ogg": _ogg, "audio/mpeg": _mpeg}


# --- the process ---------------------------------------------------------------------------------------------------------


def give_up_rights(limits: MediaLimits) -> None:
    """Lower what this process may take, for good. No file and no connection can be opened from here on."""
    signal.alarm(math.ceil(limits.wall_s) + 1)  # should nobody be left to end it
    for what, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),  # does not bind root
    ):
        resource.setrlimit(what, (most, most))


def main() -> None:
    """Check the file on standard input."""
    content_type, limits = sys.argv[1], MediaLimits.decode(sys.argv[2])
    Image.preinit()
    data = mmap.mmap(0, 0, access=mmap.ACCESS_READ)
    give_up_rights(limits)
    print("ready", flush=True)
    verdict: dict[str, object]
    try:
        verdict = dict(check(data, content_type, limits))
    except RefusedError as refused:
        verdict = {"refusal": refused.refusal.value}
    except MemoryError:
        verdict = {"refusal": Refusal.LIMITS.value}
    except Exception as error:
        # A module or a descriptor that is missing is our fault; everything else is what decoders say of damaged files.
        ours = isinstance(error, (ImportError, NameError)) or (isinstance(error, OSError) and error.errno == errno.EMFILE)
        verdict = {"fault" if ours else "refusal": repr(error)[:200] if ours else Refusal.BROKEN.value}
    print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
