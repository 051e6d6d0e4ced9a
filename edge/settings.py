"""What the edge needs to know about where it runs. Everything else about Envoy stands in `envoy/envoy.yaml`."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from servicekit.settings import HostPort, Settings

ENVOY_DIR = Path(__file__).resolve().parent.parent / "envoy"
ORIGIN_SCHEMES = ("http://", "https://")


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _origin(value: str) -> str:
    if not value.startswith(ORIGIN_SCHEMES) or value.count("/") != 2:
        raise ValueError("expected SCHEME://HOST[:PORT] without a path, for example https://console.example.org")
    return value


# NoDecode: comma separated in the environment, not JSON.
Addresses = Annotated[tuple[HostPort, ...], NoDecode, BeforeValidator(_split), Field(min_length=1)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split)]
Port = Annotated[int, Field(ge=0, le=65535)]


class EnvoySettings(Settings):
    """Where Envoy listens, where the services are, who makes tokens.

    Addresses with names become DNS clusters. Port 0 is chosen free; ask the admin interface (`/listeners`) which it was.
    """

    listen_host: str = Field("0.0.0.0", description="Address the two public listeners bind to")  # noqa: S104  # the edge is the public door
    edge_port: Port = Field(8080, description="Public port, plaintext HTTP/1.1 and HTTP/2")
    edge_tls_port: Port = Field(8443, description="Public port, TLS")
    admin_port: Port = Field(9901, description="Envoy's admin interface, on loopback only")
    certificates_dir: Path = Field(description="Directory with `ca.crt`, `{envoy,edge}.{crt,key}`, as Envoy sees it")
    descriptors: Path = Field(ENVOY_DIR / "descriptors.binpb", description="Descriptor set of the contract, as Envoy sees it")
    gateway_addresses: Addresses = Field(description="gRPC addresses of gateway, HOST:PORT, comma separated")
    jobs_addresses: Addresses = Field(description="gRPC addresses of jobs_service")
    credits_addresses: Addresses = Field(description="gRPC addresses of credit_service")
    inference_addresses: Addresses = Field(description="gRPC addresses of inference_service")
    jwks_address: HostPort = Field(description="HTTPS address where gateway serves /.well-known/jwks.json")
    token_issuer: str = Field("https://genmesh.internal", min_length=1, description="`iss` of access tokens")
    token_audience: str = Field("genmesh", min_length=1, description="`aud` of access tokens")
    allowed_origins: Origins = Field((), description="Origins whose pages may call the edge (CORS), comma separated")
