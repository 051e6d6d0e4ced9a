"""The cookie that keeps a browser's refresh token away from its scripts.

`__Host-` (RFC 6265bis, 4.1.3.2): set by this very host over TLS, for all its paths; no sibling domain can plant one.
"""

from collections.abc import Iterable, Sequence

NAME = "__Host-genmesh_refresh"
ATTRIBUTES = "Path=/; Secure; HttpOnly; SameSite=Strict"
TOKEN_MAX = 512
"""As in the proto: what is longer is no token of ours."""


def keep(refresh_token: str, *, max_age_s: int) -> tuple[str, str]:
    """Metadata that has the browser keep a refresh token."""
    return ("set-cookie", f"{NAME}={refresh_token}; Max-Age={max_age_s}; {ATTRIBUTES}")


def forget() -> tuple[str, str]:
    """Metadata that has the browser drop it."""
    return ("set-cookie", f"{NAME}=; Max-Age=0; {ATTRIBUTES}")


def refresh_token(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The refresh token among the cookies of a call; empty: none, or several that differ, of which none can be believed."""
    found = {
        value
        for key, header in metadata or ()
        if key == "cookie" and isinstance(header, str)
        for name, value in _pairs(header.split(";"))
        if name == NAME
    }
    token = found.pop() if len(found) == 1 else ""
    return token if len(token) <= TOKEN_MAX else ""


def _pairs(parts: Sequence[str]) -> Iterable[tuple[str, str]]:
    for part in parts:
        name, _, value = part.partition("=")
        yield name.strip(), value.strip()
