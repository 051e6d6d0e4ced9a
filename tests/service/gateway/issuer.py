"""An OpenID provider on loopback whose every answer a test can bend, with keys of its own; it insists on PKCE."""

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm

CLIENT_ID = "browser.apps.example"
APP_ID = "app.apps.example"
CLIENT_SECRET = "the client's secret"
PROJECT_ID = "project-of-tests"
REDIRECT_URI = "https://console.example.org/signed-in"


@cache
def rsa_key(number: int, bits: int = 2048) -> rsa.RSAPrivateKey:
    """A key that lives as long as the tests: making one takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def jwk(key: rsa.RSAPrivateKey, key_id: str, **changes: Any) -> dict[str, Any]:
    """The public half of a key, as an issuer publishes it."""
    described = {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": key_id, "alg": "RS256", "use": "sig"}
    return {name: value for name, value in (described | changes).items() if value is not None}


def unsigned(claims: Mapping[str, Any], **header: Any) -> str:
    """A token with `alg: none`."""
    return f"{_part({'alg': 'none', 'typ': 'JWT', **header})}.{_part(claims)}."


def signed_with_public_key(claims: Mapping[str, Any], key: rsa.RSAPrivateKey, key_id: str) -> str:
    """A token with `alg: HS256` whose secret is what everybody can read."""
    body = f"{_part({'alg': 'HS256', 'typ': 'JWT', 'kid': key_id})}.{_part(claims)}"
    secret = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return f"{body}.{_base64url(hmac.digest(secret, body.encode(), 'sha256'))}"


def _part(value: Mapping[str, Any]) -> str:
    return _base64url(json.dumps(value).encode())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@dataclass(frozen=True)
class Answer:
    """What the issuer sends."""

    body: bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


def answer(value: Any, status: int = 200) -> Answer:
    """JSON."""
    return Answer(json.dumps(value).encode(), status)


@dataclass(frozen=True)
class _Code:
    challenge: str
    redirect_uri: str
    claims: dict[str, Any]


class Issuer:
    """See the module. `bent[path]` takes the place of what the issuer would say there."""

    def __init__(self) -> None:
        self.url = ""
        self.key_id = "first"
        self.key = rsa_key(1)
        self.published = [jwk(self.key, self.key_id)]
        self.bent: dict[str, Callable[[], Answer]] = {}
        self.asked: list[str] = []
        self.forms: list[dict[str, str]] = []
        self._codes: dict[str, _Code] = {}

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Those of a good ID token for an app; None leaves one out."""
        now = int(time.time())
        subject = secrets.token_hex(8)
        good: dict[str, Any] = {
            "iss": self.url,
            "aud": CLIENT_ID,
            "azp": CLIENT_ID,
            "sub": subject,
            "iat": now,
            "exp": now + 3600,
            "email": f"Gwen-{subject}@example.org",
            "email_verified": True,
            "name": "Gwen Google",
        }
        return {name: value for name, value in (good | changes).items() if value is not None}

    def firebase_claims(self, **changes: Any) -> dict[str, Any]:
        """Those of Firebase Authentication."""
        special = {"aud": PROJECT_ID, "azp": None, "auth_time": int(time.time()) - 5, "firebase": {"sign_in_provider": "password"}}
        return self.claims(**(special | changes))

    def sign(self, claims: Mapping[str, Any], *, key: rsa.RSAPrivateKey | None = None, key_id: str | None = None, **header: Any) -> str:
        """An ID token."""
        return jwt.encode(dict(claims), key or self.key, algorithm="RS256", headers={"kid": key_id or self.key_id, **header})

    def rotate(self, key_id: str, number: int) -> None:
        """Sign with another key from now on, and publish it alone."""
        self.key_id, self.key = key_id, rsa_key(number)
        self.published = [jwk(self.key, key_id)]

    def authorize(self, *, challenge: str, redirect_uri: str = REDIRECT_URI, **claims: Any) -> str:
        """The code that a browser comes back with; `claims` are those of the ID token it stands for."""
        code = secrets.token_urlsafe(16)
        self._codes[code] = _Code(challenge, redirect_uri, self.claims(**claims))
        return code

    def answer_to(self, method: str, path: str, form: dict[str, str]) -> Answer:
        """What is said to a request."""
        self.asked.append(path)
        if path in self.bent:
            return self.bent[path]()
        if method == "POST":
            self.forms.append(form)
            return self._exchange(form)
        match path:
            case "/.well-known/openid-configuration":
                return answer(self.document())
            case "/jwks":
                return answer({"keys": self.published})
            case _:
                return answer({}, 404)

    def document(self, **changes: Any) -> dict[str, Any]:
        """The discovery document."""
        endpoints = {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
        }
        return endpoints | changes

    def _exchange(self, form: dict[str, str]) -> Answer:
        if (form.get("client_id"), form.get("client_secret")) != (CLIENT_ID, CLIENT_SECRET):
            return answer({"error": "invalid_client"}, 401)
        code = self._codes.pop(form.get("code", ""), None)
        challenge = _base64url(hashlib.sha256(form.get("code_verifier", "").encode()).digest())
        if code is None or form.get("redirect_uri") != code.redirect_uri or challenge != code.challenge:
            return answer({"error": "invalid_grant"}, 400)
        return answer({"access_token": "unused", "token_type": "Bearer", "id_token": self.sign(code.claims)})


def challenge_of(verifier: str) -> str:
    """S256 (RFC 7636)."""
    return _base64url(hashlib.sha256(verifier.encode()).digest())


@contextmanager
def running_issuer() -> Generator[Issuer]:
    """An issuer while the block runs."""
    issuer = Issuer()
    with serving(issuer.answer_to) as url:
        issuer.url = url
        yield issuer


@contextmanager
def serving(answer_to: Callable[[str, str, dict[str, str]], Answer]) -> Generator[str]:
    """Serve answers to (method, path, form) over HTTP while the block runs; the address."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("content-length", "0"))
            form = {name: values[0] for name, values in parse_qs(self.rfile.read(length).decode()).items()}
            said = answer_to(self.command, urlsplit(self.path).path, form)
            self.send_response(said.status)
            for name, value in said.headers:
                self.send_header(name, value)
            self.send_header("content-length", str(len(said.body)))
            self.end_headers()
            with suppress(OSError):  # who asked had enough
                self.wfile.write(said.body)

        do_GET = do_POST = _handle  # noqa: N815  # names that the base class looks for

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
