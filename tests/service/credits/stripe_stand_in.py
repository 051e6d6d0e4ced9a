"""The remote end of Stripe for tests: what it answers to `POST /v1/checkout/sessions`, and the notices that it signs and sends.

Payloads in `stripe_payloads/` are no recordings: they were written after the field lists of API version 2026-10-28.endive and
Stripe's published samples, without some fields that are rarely set.
"""

import copy
import hashlib
import hmac
import json
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from genmesh.credits.v1 import payments_pb2 as pb

PAYLOADS = Path(__file__).parent / "stripe_payloads"
SECRET_KEY = "sk_test_51SVwYzLhT8nQw4Rb"
WEBHOOK_SECRET = "whsec_9f2c4e6a8b0d1f3a5c7e9b1d3f5a7c9e"
HANG = "hang"
DROP = "drop"
ERRORS = {
    400: {"type": "invalid_request_error", "message": "Invalid currency: xxx.", "param": "line_items[0][price_data][currency]"},
    401: {"type": "invalid_request_error", "message": "Invalid API Key provided: sk_test_****4Rb"},
    402: {"type": "card_error", "code": "card_declined", "message": "Your card was declined."},
    429: {"type": "invalid_request_error", "code": "rate_limit", "message": "Request rate limit exceeded."},
    500: {"type": "api_error", "message": "An unknown error occurred."},
}


@dataclass(frozen=True)
class Sent:
    """A request as it came in."""

    headers: dict[str, str]
    form: dict[str, str]


@dataclass
class StandIn:
    """Answers from `script` first (an HTTP status, HANG or DROP); opens sessions when nothing is left there."""

    url: str = ""
    script: deque[int | str] = field(default_factory=deque[int | str])
    requests: list[Sent] = field(default_factory=list[Sent])
    released: threading.Event = field(default_factory=threading.Event)
    hung: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """One for each request that has begun to hang."""
    _answers: dict[str, tuple[dict[str, str], bytes]] = field(default_factory=dict[str, tuple[dict[str, str], bytes]])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sessions(self, top_up_id: str) -> list[Sent]:
        """The requests for the checkout of a purchase."""
        return [sent for sent in self.requests if sent.form["client_reference_id"] == top_up_id]

    def answer(self, sent: Sent) -> tuple[int, bytes] | None:
        """Status and body, as Stripe would; None: hang up."""
        with self._lock:
            self.requests.append(sent)
            scripted = self.script.popleft() if self.script else None
        if scripted == HANG:
            self.hung.release()
            self.released.wait()
            return None
        if scripted == DROP:
            return None
        if isinstance(scripted, int):
            return scripted, json.dumps({"error": ERRORS[scripted]}).encode()
        if sent.headers.get("Authorization") != f"Bearer {SECRET_KEY}":
            return 401, json.dumps({"error": ERRORS[401]}).encode()
        with self._lock:
            form, body = self._answers.setdefault(sent.headers["Idempotency-Key"], (sent.form, self._session(sent.form)))
        if form != sent.form:
            return 400, json.dumps({"error": {"type": "idempotency_error", "message": "Keys for idempotent requests…"}}).encode()
        return 200, body

    def _session(self, form: dict[str, str]) -> bytes:
        session = json.loads((PAYLOADS / "session.json").read_text())
        now = int(time.time())
        amount = int(form["line_items[0][price_data][unit_amount]"])
        session_id = f"cs_test_{secrets.token_hex(29)}"
        session |= {
            "id": session_id,
            "amount_subtotal": amount,
            "amount_total": amount,
            "currency": form["line_items[0][price_data][currency]"],
            "client_reference_id": form["client_reference_id"],
            "metadata": {"genmesh_top_up_id": form["metadata[genmesh_top_up_id]"]},
            "created": now,
            "expires_at": now + 86_400,
            "success_url": form["success_url"],
            "cancel_url": form["cancel_url"],
            "url": f"https://checkout.stripe.com/c/pay/{session_id}",
        }
        return json.dumps(session, indent=2).encode()


@contextmanager
def stand_in() -> Generator[StandIn]:
    """The stand-in, listening."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
            form = {key: values[0] for key, values in parse_qs(raw, strict_parsing=True).items()}
            reply = state.answer(Sent(dict(self.headers), form)) if self.path == "/v1/checkout/sessions" else (404, b"{}")
            if reply is None:
                self.close_connection = True
                return
            status, body = reply
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Request-Id", f"req_{secrets.token_hex(7)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Tests read requests, not logs."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True)
class Notice:
    """A notice: an event of Stripe about a purchase. Its id is its own."""

    name: str
    event: dict[str, Any]

    @property
    def body(self) -> bytes:
        """As Stripe writes it."""
        return json.dumps(self.event, indent=2, ensure_ascii=False).encode()

    def request(self) -> pb.ReceivePaymentEventRequest:
        """As the edge passes it on."""
        request = pb.ReceivePaymentEventRequest()
        request.body.content_type = "application/json; charset=utf-8"
        request.body.data = self.body
        return request


def notice(name: str, top_up: pb.TopUp, *, refunded_minor: int = 0, **changes: Any) -> Notice:
    """The recorded event of this name, about this purchase; `changes` to its object."""
    event = copy.deepcopy(json.loads((PAYLOADS / f"{name}.json").read_text()))
    about = event["data"]["object"]
    event["id"] = f"evt_{uuid.uuid4().hex}"
    event["created"] = int(time.time())
    if "genmesh_top_up_id" in about["metadata"]:
        about["metadata"] = {"genmesh_top_up_id": top_up.top_up_id}
    for amount in ("amount", "amount_captured", "amount_subtotal", "amount_total"):
        if amount in about:
            about[amount] = top_up.price_minor
    if "client_reference_id" in about:
        about["client_reference_id"] = top_up.top_up_id
    if name == "charge.refunded":
        about["amount_refunded"] = refunded_minor
        about["refunded"] = refunded_minor == top_up.price_minor
    about |= changes
    return Notice(name, event)


def sign(body: bytes, *, secret: str = WEBHOOK_SECRET, age_s: int = 0) -> str:
    """The header of https://docs.stripe.com/webhooks#verify-manually."""
    timestamp = int(time.time()) - age_s
    mac = hmac.new(secret.encode(), b"%d.%b" % (timestamp, body), hashlib.sha256)
    return f"t={timestamp},v1={mac.hexdigest()},v0={'0' * 64}"
