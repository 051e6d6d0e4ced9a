"""What a check of an uploaded file is told and what it finds: shared by the service and the limited process that looks at the file.

Imports next to nothing, as that process does.
"""

import enum
import json
from dataclasses import asdict, dataclass


class Refusal(enum.StrEnum):
    """Why a file is no good."""

    SIZE = "size"
    TYPE = "type"
    POLYGLOT = "polyglot"
    BROKEN = "broken"
    PIXELS = "pixels"
    ANIMATED = "animated"
    DURATION = "duration"
    SAMPLES = "samples"
    AUDIO_FORM = "audio_form"
    NOT_FINITE = "not_finite"
    LIMITS = "limits"


SAMPLES_PER_SECOND = 2 * 48_000
"""Samples of audio, of all channels together, are capped at what the longest audio has in 48 kHz stereo. Without that cap 24 MB of silence
in 8 channels of 384 kHz keep a decoder busy for minutes; with it, what is allowed is decoded well within the processor time of a check."""


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What a file may be, and what looking at it may take."""

    max_pixels: int
    max_duration_s: int
    memory_bytes: int
    cpu_s: int
    wall_s: float

    @property
    def max_samples(self) -> int:
        """Samples that audio may have, of all channels together."""
        return self.max_duration_s * SAMPLES_PER_SECOND

    def encode(self) -> str:
        """As one argument of a command."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, argument: str) -> "MediaLimits":
        """What `encode` made."""
        return cls(**json.loads(argument))


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """What owners may bring, whatever their plan, and how much work checks may be."""

    max_bytes: int
    url_ttl_s: int
    incomplete_max: int
    stored_max_bytes: int
    retention_s: float
    checks_at_once: int
    checks_waiting_max: int


def message(refusal: Refusal, limits: MediaLimits) -> str:
    """The refusal in words for the file's owner."""
    return {
        Refusal.SIZE: "the file has another size than was announced",
        Refusal.TYPE: "the file is not of the type that was announced",
        Refusal.POLYGLOT: "the file has content of another kind in it, before, after or beside what was announced",
        Refusal.BROKEN: "the file is damaged or incomplete",
        Refusal.PIXELS: f"the picture has more than {limits.max_pixels:,} pixels",
        Refusal.ANIMATED: "the picture is animated: only still pictures are taken",
        Refusal.DURATION: f"the audio is longer than {limits.max_duration_s:,} seconds",
        Refusal.SAMPLES: f"the audio has more samples than {limits.max_duration_s:,} seconds of 48 kHz stereo (of Opus: mono) have",
        Refusal.AUDIO_FORM: "the audio has more than 8 channels, or a sample rate outside 1,000 to 384,000 Hz",
        Refusal.NOT_FINITE: "the audio has samples that are no numbers",
        Refusal.LIMITS: "decoding the file takes too much memory or time",
    }[refusal]
