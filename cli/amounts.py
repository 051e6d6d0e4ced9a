"""How amounts of credits, money and time are written. What people type is read in `cli.inputs`."""

from datetime import UTC
from decimal import Decimal

from google.protobuf.timestamp_pb2 import Timestamp

MILLICREDITS = 1000

# ISO 4217: most currencies have hundredths.
_MINOR_DIGITS = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV", "XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def credits_text(millicredits: int) -> str:
    """1500 → `1.5 credits`; exact."""
    number = f"{Decimal(millicredits) / MILLICREDITS:f}"
    return f"{number} {'credit' if number.lstrip('-') == '1' else 'credits'}"


def change_text(millicredits: int) -> str:
    """1500 → `+1.5 credits`."""
    return f"{'+' if millicredits > 0 else ''}{credits_text(millicredits)}"


def money_text(amount_minor: int, currency: str) -> str:
    """4999 USD → `49.99 USD`."""
    digits = _MINOR_DIGITS.get(currency, 2)
    return f"{Decimal(amount_minor).scaleb(-digits):f} {currency}"


def time_text(timestamp: Timestamp) -> str:
    """Local time to the second; empty when unset."""
    if not timestamp.seconds:
        return ""
    return timestamp.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def utc_text(timestamp: Timestamp) -> str:
    """RFC 3339 in UTC, always to the microsecond, so that texts sort as times do; empty when unset."""
    if not timestamp.seconds and not timestamp.nanos:
        return ""
    return timestamp.ToDatetime(tzinfo=UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def seconds_text(seconds: float) -> str:
    """75.2 → `1 min 15 s`; 11000 → `3 h 3 min`."""
    whole = max(0, round(seconds))
    for unit_s, unit, rest_s, rest in ((_DAY_S, "d", _HOUR_S, "h"), (_HOUR_S, "h", _MINUTE_S, "min"), (_MINUTE_S, "min", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // rest_s} {rest}"
    return f"{whole} s"
