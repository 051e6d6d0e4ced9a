"""Quotes: a price promised for a while, signed so that it need not be stored. No I/O."""

import base64
import binascii
import hashlib
import hmac
import time
import uuid
from dataclasses import dataclass

import grpc

from genmesh.jobs.v1 import jobs_pb2
from servicekit.errors import MeshError, Reason

MAC_BYTES = 16


@dataclass(frozen=True, slots=True)
class Quote:
    """A price in millicredits, good until `expire_time` (Unix seconds)."""

    cost_millicredits: int
    expire_time: int


class Quotes:
    """Signs and reads quotes with a secret that all replicas share."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, owner_id: uuid.UUID, spec: jobs_pb2.JobSpec, quote: Quote) -> str:
        """The quote as an opaque id, good for this owner and this spec only."""
        payload = f"{quote.cost_millicredits}.{quote.expire_time}"
        return base64.urlsafe_b64encode(self._mac(owner_id, spec, payload) + payload.encode()).decode().rstrip("=")

    def read(self, quote_id: str, owner_id: uuid.UUID, spec: jobs_pb2.JobSpec) -> Quote:
        """The quote behind an id; FAILED_PRECONDITION (QUOTE_INVALID) when it is not ours, for another spec, or expired."""
        try:
            raw = base64.b64decode(quote_id + "=" * (-len(quote_id) % 4), altchars=b"-_", validate=True)
            mac, payload = raw[:MAC_BYTES], raw[MAC_BYTES:].decode("ascii")
            if not hmac.compare_digest(mac, self._mac(owner_id, spec, payload)):
                raise ValueError("not signed by us for this spec")
            cost, expire_time = (int(part) for part in payload.split("."))
            if expire_time < time.time():
                raise ValueError("expired")
        except (ValueError, binascii.Error) as error:
            raise MeshError(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.ERROR_REASON_QUOTE_INVALID,
                "the quote is unknown, expired, or for another spec: ask for a new one",
                violations=[("quote_id", str(error))],
            ) from None
        return Quote(cost, expire_time)

    def _mac(self, owner_id: uuid.UUID, spec: jobs_pb2.JobSpec, payload: str) -> bytes:
        message = b"\0".join([owner_id.bytes, payload.encode(), spec.SerializeToString(deterministic=True)])
        return hmac.digest(self._secret, message, hashlib.sha256)[:MAC_BYTES]
