"""What people type, read: amounts of credits, sizes, times. What is none of these is a CommandError (usage)."""

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, DecimalException

from google.protobuf.timestamp_pb2 import Timestamp

from cli.amounts import MILLICREDITS
from cli.failures import usage

SIZE_MAX = 4096
MILLICREDITS_MAX = 2**63 - 1  # what the wire carries

_UNIT_S = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_SPAN = re.compile(r"(\d{1,5})([mhdw])", re.ASCII)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_LOCAL = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?", re.ASCII)
_RFC_3339 = re.compile(_LOCAL.pattern + r"([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def parse_credits(text: str, *, zero: bool = False) -> int:
    """`1.5` → 1500 millicredits. Raises CommandError when it is no positive amount (or `zero`) of whole millicredits."""
    try:
        millicredits = Decimal(text) * MILLICREDITS
        # Bounded first: the int of a number like 1e99999999 would take for ever.
        if not (0 if zero else 1) <= millicredits <= MILLICREDITS_MAX or millicredits != int(millicredits):
            raise ValueError
    except (DecimalException, ValueError):
        positive = "a number, 0 or more," if zero else "a positive number"
        raise usage(f"not an amount of credits: {text!r}", f"give {positive} with at most three decimals, for example 12.5") from None
    return int(millicredits)


def parse_bound(text: str) -> int | None:
    """`none` → no bound; else an amount of credits, 0 included. Raises CommandError."""
    return None if text.strip().lower() == "none" else parse_credits(text, zero=True)


def parse_size(text: str) -> tuple[int, int]:
    """`64x48` → (64, 48); `64` → (64, 64). Raises CommandError."""
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (0 < width <= SIZE_MAX and 0 < height <= SIZE_MAX):
        raise usage(f"not a size: {text!r}", f"give WIDTHxHEIGHT in pixels, for example 64x64, at most {SIZE_MAX}")
    return width, height


def parse_time(text: str) -> Timestamp:
    """`2026-07-01` (midnight UTC) or RFC 3339 with its offset. Raises CommandError."""
    text = text.strip()
    timestamp = Timestamp()
    if _LOCAL.fullmatch(text):
        raise usage(f"not a time: {text!r}: where?", f"add Z or an offset, for example {text}Z or {text}+02:00")
    try:
        if _DATE.fullmatch(text):
            timestamp.FromDatetime(datetime.fromisoformat(text).replace(tzinfo=UTC))
        elif _RFC_3339.fullmatch(text):
            timestamp.FromDatetime(datetime.fromisoformat(text.upper()).astimezone(UTC))
        else:
            raise ValueError
    except (ValueError, OverflowError):  # no such day or hour; a time before year 1 or after 9999
        raise usage(
            f"not a time: {text!r}", "give a date (midnight UTC) or RFC 3339, for example 2026-07-01 or 2026-07-01T08:30:00+02:00"
        ) from None
    return timestamp


def parse_from_now(text: str, *, ago: bool = False) -> Timestamp:
    """`30d` → in 30 days (`ago`: 30 days ago); also m, h and w, and all that `parse_time` reads. Raises CommandError."""
    span = _SPAN.fullmatch(text.strip().lower())
    if span is None:
        return parse_time(text)
    seconds = int(span[1]) * _UNIT_S[span[2]]
    timestamp = Timestamp()
    timestamp.FromDatetime(datetime.now(UTC) + timedelta(seconds=-seconds if ago else seconds))
    return timestamp
