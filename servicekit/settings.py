"""Settings every service shares, read from `GENMESH_…` environment variables and checked at start.

A service's own `settings.py` combines these classes with what it alone needs. Nothing else reads the environment.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

EXIT_CONFIGURATION = 78  # EX_CONFIG of sysexits.h: the supervisor must not restart into the same mistake


def _host_port(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("expected HOST:PORT, for example 127.0.0.1:9000")
    return value


HostPort = Annotated[str, AfterValidator(_host_port)]


class Settings(BaseSettings):
    """Base of all settings: frozen, prefix `GENMESH_`, empty variables count as unset."""

    model_config = SettingsConfigDict(
        env_prefix="GENMESH_",
        frozen=True,
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,  # a refused password must not end up in a log
    )


class TelemetrySettings(Settings):
    """Logs, metrics and traces of a process."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level that is logged")
    log_format: Literal["json", "console"] = Field("json", description="`json`: a line an event; `console`: for people")
    metrics_address: HostPort = Field("127.0.0.1:0", description="Where Prometheus metrics are served (port 0: chosen free)")
    otlp_endpoint: str | None = Field(
        None, description="OTLP/gRPC collector for traces, for example http://127.0.0.1:4317; unset: no traces"
    )


class MeshSettings(TelemetrySettings):
    """A process that talks to other services of the mesh."""

    certificates_dir: Path = Field(description="Directory with `ca.crt`, `<service>.crt` and `<service>.key` of the mesh")
    rpc_timeout_s: float = Field(5.0, gt=0, le=120, description="Deadline of calls to other services where the caller has none")


class ServerSettings(MeshSettings):
    """A process that serves RPCs."""

    listen_address: HostPort = Field("127.0.0.1:0", description="Where the gRPC server listens (mTLS)")
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=64 * 1024, description="Largest request message a server accepts")
    max_concurrent_rpcs: int = Field(4096, ge=1, description="Requests in flight at most; more are refused with RESOURCE_EXHAUSTED")
    drain_s: float = Field(10.0, ge=0, le=300, description="How long running calls may take to end after SIGTERM")
    token_issuer: str = Field("https://genmesh.internal", description="`iss` of access tokens")
    token_audience: str = Field("genmesh", description="`aud` of access tokens")
    gateway_address: HostPort = Field(
        "127.0.0.1:50050",
        description="Where the gateway says which access tokens were revoked, keeps the audit trail, and who has which plan",
    )
    jwks_url: str = Field("https://127.0.0.1:9443/.well-known/jwks.json", description="Where the gateway serves its public keys (mTLS)")


class DatabaseSettings(Settings):
    """PostgreSQL of a service."""

    database_url: SecretStr = Field(
        description="postgresql+asyncpg://USER:PASSWORD@HOST:PORT/DATABASE; one role a service, which owns the service's schema"
    )
    database_pool_size: int = Field(5, ge=1, le=100, description="Connections a process holds at most")
    database_pool_timeout_s: float = Field(2.0, gt=0, description="Wait for a free connection before RESOURCE_EXHAUSTED")
    database_statement_timeout_s: float = Field(10.0, gt=0, description="Longest statement")


class RedisSettings(Settings):
    """Redis, for queues and events."""

    redis_url: SecretStr = Field(description="redis://[:PASSWORD@]HOST:PORT/0")
    redis_cluster: bool = Field(False, description="The URL names a node of a Redis Cluster")
    redis_prefix: str = Field("genmesh", pattern=r"^[A-Za-z0-9_-]+$", description="Prefix of every key, so that stacks can share a server")


class ObjectSettings(Settings):
    """S3, for media."""

    s3_endpoint_url: str = Field(description="Endpoint the services use")
    s3_public_endpoint_url: str | None = Field(
        None, description="Endpoint in presigned URLs, where clients reach the store by another name"
    )
    s3_bucket: str = Field("genmesh-media", description="Bucket for media")
    s3_region: str = Field("us-east-1", description="Region, part of the signature")
    s3_access_key_id: SecretStr = Field(description="Access key")
    s3_secret_access_key: SecretStr = Field(description="Secret key")
    s3_url_ttl_s: int = Field(3600, ge=60, le=7 * 24 * 3600, description="Life of presigned URLs")


S = TypeVar("S", bound=Settings)


def load(settings: type[S], **given: object) -> S:
    """Read and check settings, `given` ones from the caller and the rest from the environment.

    A wrong or missing variable ends the process with exit code 78 and says which and why.
    """
    try:
        return settings(**given)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            # A rule about several variables has no place of its own, and names them itself.
            variable = "_".join(("GENMESH", *(str(part).upper() for part in problem["loc"]))) if problem["loc"] else "settings"
            print(f"{variable}: {problem['msg']}", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)
