"""What a service other than the gateway takes from the gateway to know its callers: keys, revocations, the audit trail."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from servicekit.audit import AuditTrail, LogTrail, RemoteTrail
from servicekit.client import mesh_channel
from servicekit.identity import KeySource, RemoteKeys, TokenVerifier
from servicekit.revocations import Revocations, remote_fetch
from servicekit.settings import ServerSettings
from servicekit.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class Doorkeeper:
    """Who gets in, and where it is written down. `revocations.run()` has to run beside the server."""

    keys: KeySource
    revocations: Revocations = field(default_factory=Revocations)
    audit: AuditTrail = field(default_factory=LogTrail)

    def verifier(self, settings: ServerSettings) -> TokenVerifier:
        """What verifies access tokens."""
        return TokenVerifier(self.keys, issuer=settings.token_issuer, audience=settings.token_audience, revocations=self.revocations)


@asynccontextmanager
async def remote_doorkeeper(settings: ServerSettings, *, service: str) -> AsyncGenerator[Doorkeeper]:
    """The doorkeeper of a service, over its channel to the gateway."""
    async with mesh_channel(settings, settings.gateway_address, caller=service, service="gateway") as channel:
        keys = RemoteKeys(settings.jwks_url, TlsFiles.of(settings.certificates_dir, service))
        yield Doorkeeper(keys, Revocations(remote_fetch(channel)), RemoteTrail(channel))
