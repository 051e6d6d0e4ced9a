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
    edge_port: Port = Field(8080, description="Public port, plaintext HTTP/1.1 and HTTP/2; 0: chosen free")
    edge_tls_port: Port = Field(8443, description="Public port, TLS; 0: chosen free")
    admin_host: str = Field("127.0.0.1", min_length=1, description="Address of Envoy's admin interface; it knows no passwords")
    admin_port: Port = Field(9901, description="Envoy's admin interface: health, `/stats/prometheus`")
    certificates_dir: Path = Field(
        description="Directory with `ca.crt`, `{envoy,edge}.{crt,key}`, as Envoy sees it; files renamed into it are read at once"
    )
    sds_dir: Path | None = Field(
        None, description="Where the files go that tell Envoy which certificates to watch, as Envoy sees it; unset: certificates_dir"
    )
    descriptors: Path = Field(ENVOY_DIR / "descriptors.binpb", description="Descriptor set of the contract, as Envoy sees it")
    openapi: Path = Field(ENVOY_DIR / "openapi.json", description="What is served at /openapi.json, as Envoy sees it")
    docs_dir: Path = Field(ENVOY_DIR / "docs", description="What is served at /docs, as Envoy sees it")
    gateway_addresses: Addresses = Field(description="gRPC addresses of gateway, HOST:PORT, comma separated")
    jobs_addresses: Addresses = Field(description="gRPC addresses of jobs_service")
    credits_addresses: Addresses = Field(description="gRPC addresses of credit_service")
    inference_addresses: Addresses = Field(description="gRPC addresses of inference_service")
    jwks_address: HostPort = Field(description="HTTPS address where gateway serves /.well-known/jwks.json")
    token_issuer: str = Field("https://genmesh.internal", min_length=1, description="`iss` of access tokens")
    token_audience: str = Field("genmesh", min_length=1, description="`aud` of access tokens")
    allowed_origins: Origins = Field((), description="Origins whose pages may call the edge (CORS), comma separated")
    trusted_hops: int = Field(
        0,
        ge=0,
        le=10,
        description="Load balancers in front of Envoy that add the client's address to `x-forwarded-for`; 0: clients connect here",
    )
    edge_requests_per_s_ip: int = Field(
        500, ge=0, description="Requests a second from one address (IPv6: one /64), by each Envoy; 0: no limit"
    )
    edge_burst_ip: int = Field(2000, ge=1, description="Requests that one address may send at once after a pause")
    edge_requests_per_s_user: int = Field(200, ge=0, description="Requests a second of one signed-in user, by each Envoy; 0: no limit")
    edge_burst_user: int = Field(1000, ge=1, description="Requests that one user may send at once after a pause")
    edge_connections_max: int = Field(
        10_000, ge=10, description="Client connections of one Envoy; one port takes at most nine tenths of them"
    )
    edge_heap_mb: int = Field(
        1024, ge=64, description="Memory at which Envoy sheds load: streams with large buffers first, then all new requests"
    )
    hsts_max_age_s: int = Field(
        31_536_000,
        ge=0,
        description="How long browsers use nothing but TLS with this host (`strict-transport-security`); 0: they forget it",
    )
