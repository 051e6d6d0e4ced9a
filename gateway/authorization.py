"""Access tokens in the place of API keys, for Envoy's question about requests that bring a key (ext_authz)."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc

from gateway.accounts import Tokens
from gateway.api_keys import ApiKeys, secret_hash
from servicekit.errors import MeshError
from servicekit.identity import TokenVerifier

CACHE_S = 30.0
"""The token of a key is handed out again for so long; then the key is looked up anew."""
CACHED_KEYS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class _Proven:
    tokens: Tokens
    fresh_until: float


class KeyTokens:
    """Access tokens for API keys, each remembered for a little while, so that a busy program costs no query a request."""

    def __init__(self, api_keys: ApiKeys, verifier: TokenVerifier, *, clock: Callable[[], float] = time.monotonic) -> None:
        """A token that `verifier` refuses (it was revoked) is not handed out again. `clock`: seconds."""
        self._api_keys = api_keys
        self._verifier = verifier
        self._clock = clock
        self._proven: OrderedDict[bytes, _Proven] = OrderedDict()
        self._proving: dict[bytes, asyncio.Task[Tokens]] = {}

    async def get(self, secret: str, *, client_address: str) -> str:
        """An access token for a key. Raises as `ApiKeys.check`."""
        digest = secret_hash(secret)
        known = self._proven.get(digest)
        if known is not None:
            self._proven.move_to_end(digest)
            if self._clock() < known.fresh_until and await self._holds(known.tokens):
                return known.tokens.access_token
        # One question for all who ask at the same time.
        proving = self._proving.get(digest)
        if proving is None:
            proof = self._api_keys.check(secret, client_address=client_address)
            proving = self._proving[digest] = asyncio.create_task(self._prove(digest, proof))
            proving.add_done_callback(lambda _: self._proving.pop(digest))
        tokens = await asyncio.shield(proving)
        return tokens.access_token

    async def _prove(self, digest: bytes, proof: Awaitable[Tokens]) -> Tokens:
        try:
            tokens = await proof
        except MeshError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                self._proven.pop(digest, None)
            raise
        self._proven[digest] = _Proven(tokens, self._clock() + CACHE_S)
        if len(self._proven) > CACHED_KEYS_MAX:
            self._proven.popitem(last=False)
        return tokens

    async def _holds(self, tokens: Tokens) -> bool:
        try:
            await self._verifier.verify(tokens.access_token)
        except MeshError:
            return False
        return True
