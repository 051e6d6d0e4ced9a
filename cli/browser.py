"""Sign-in with an identity provider in the user's browser: authorization code with PKCE and a loopback redirect (RFC 8252)."""

import base64
import hashlib
import os
import queue
import secrets
import sys
import threading
import webbrowser
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

from cli.failures import CommandError, ExitCode
from genmesh.identity.v1 import identity_pb2

LOOPBACK = "127.0.0.1"
WAIT_S = 300.0
"""For somebody who has to find a telephone for the second factor."""
REQUEST_TIMEOUT_S = 5.0
POLL_S = 0.5

_PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": "default-src 'none'",
    "referrer-policy": "no-referrer",  # the address has the code
    "cache-control": "no-store",
    "connection": "close",
}
_TITLES = {200: "Signed in at the provider", 400: "Not what was waited for", 404: "Nothing here"}


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the provider sent the browser back with: a code, or why there is none."""

    code: str = ""
    error: str = ""


def sign_in_code(
    google: identity_pb2.GoogleSignIn, present: Callable[[str], None], *, wait_s: float = WAIT_S
) -> identity_pb2.AuthorizationCode:
    """Send the user to the provider and wait until they are back; `present` is given the address for their browser.

    Raises CommandError when they refuse, do not come back in time, or no redirect to this machine is allowed.
    """
    endpoint = urlsplit(google.authorization_endpoint)
    on_loopback = endpoint.scheme == "http" and endpoint.hostname in {LOOPBACK, "localhost"}
    # Not any other scheme, wherever it claims to lead: what is opened here is whatever the desktop has for it.
    if not endpoint.hostname or not (endpoint.scheme == "https" or on_loopback):
        raise CommandError("the edge names no safe address to sign in at", "tell whoever runs this genmesh")
    redirect = _loopback_redirect(google.redirect_uris)
    state, nonce, code_verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(32), secrets.token_urlsafe(64)
    answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
    with _listening(redirect, state, answers) as port:
        redirect_uri = redirect._replace(netloc=f"{redirect.hostname}:{port}").geturl()
        query = urlencode(
            {
                "client_id": google.client_id,
                "redirect_uri": redirect_uri,
                "response_type": "code",
                "scope": google.scope,
                "state": state,
                "nonce": nonce,
                "code_challenge": _s256(code_verifier),
                "code_challenge_method": "S256",
            }
        )
        present(endpoint._replace(query=f"{endpoint.query}&{query}" if endpoint.query else query).geturl())
        answer = _waited(answers, wait_s)
    if not answer.code:
        raise CommandError(
            f"the sign-in was refused: {answer.error[:200]}", "begin again, or use `genmesh login --email`", code=ExitCode.DENIED
        )
    return identity_pb2.AuthorizationCode(code=answer.code, code_verifier=code_verifier, redirect_uri=redirect_uri, nonce=nonce)


def open_browser(url: str) -> None:
    """Open the address where there is a browser with a window of its own; one in this terminal would take it over."""
    if sys.platform == "linux" and not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")):
        return
    with suppress(webbrowser.Error):
        webbrowser.open(url)


def _loopback_redirect(allowed: "list[str] | Any") -> SplitResult:
    """The redirect URI to use: one with any port if it is allowed, else one with a port of its own."""
    found = [parts for parts in map(urlsplit, allowed) if parts.scheme == "http" and parts.hostname in {LOOPBACK, "localhost"}]
    # Any port is for the address only, not for the name (RFC 8252, 7.3).
    for parts in (*(one for one in found if one.port is None and one.hostname == LOOPBACK), *(one for one in found if one.port)):
        return parts
    raise CommandError(
        "this genmesh lets no command line sign in with Google",
        f"whoever runs it adds http://{LOOPBACK}/callback to GENMESH_GOOGLE_REDIRECT_URIS, and to the client at Google",
    )


@contextmanager
def _listening(redirect: SplitResult, state: str, answers: "queue.SimpleQueue[_Answer]") -> Generator[int]:
    """Take the browser back on the redirect's port, or any, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S
        server_version = "genmesh"
        sys_version = ""

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            values = {name: value[0] for name, value in parse_qs(asked.query, max_num_fields=20).items()}
            if asked.path != redirect.path:
                self._show(404)
            elif not secrets.compare_digest(values.get("state", "").encode(), state.encode()):
                # Any page in the browser can send requests here: what does not know the state ends nothing.
                self._show(400)
            else:
                with suppress(OSError):  # who closed the page at once is signed in all the same
                    self._show(200)
                answers.put(_Answer(values.get("code", ""), values.get("error_description") or values.get("error", "no code")))

        def _show(self, status: int) -> None:
            body = f"<!doctype html><title>genmesh</title><p>{_TITLES[status]}. Go back to the terminal; this page can be closed.".encode()
            self.send_response(status)
            for name, value in _PAGE_HEADERS.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass  # the request line has the code

    try:
        server = ThreadingHTTPServer((LOOPBACK, redirect.port or 0), Handler)
    except OSError as error:
        raise CommandError(f"cannot listen on {LOOPBACK}:{redirect.port}: {error.strerror}", "end the program that does") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _waited(answers: "queue.SimpleQueue[_Answer]", wait_s: float) -> _Answer:
    left_s = wait_s
    while left_s > 0:
        with suppress(queue.Empty):  # in short turns, so that Ctrl-C is heard everywhere
            return answers.get(timeout=min(POLL_S, left_s))
        left_s -= POLL_S
    raise CommandError(f"nobody came back from the browser within {wait_s:g} s", "begin again", code=ExitCode.UNAVAILABLE)


def _s256(code_verifier: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(code_verifier.encode()).digest()).rstrip(b"=").decode()
