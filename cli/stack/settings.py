"""Settings of the embedded stack itself. What services read is passed on to them untouched."""

from pathlib import Path

from pydantic import Field, SecretStr

from servicekit.settings import Settings

REPLICAS_MAX = 16  # what fits in one block of ports


class StackSettings(Settings):
    """How many of what, where its data lies, and the two public ports."""

    state_dir: Path = Field(default=Path(".genmesh"), description="Data, logs, certificates and secrets of the embedded stack")
    edge_port: int = Field(default=8080, ge=0, le=65535, description="Public port without TLS (HTTP/1.1 and h2c); 0: chosen free")
    edge_tls_port: int = Field(default=8443, ge=0, le=65535, description="Public port with TLS; 0: chosen free")
    admin_email: str = Field(default="admin@genmesh.local", description="E-mail address of the first administrator")
    admin_password: SecretStr | None = Field(default=None, description="Password of the first administrator; unset: made on first start")
    replicas_inference: int = Field(default=1, ge=1, le=REPLICAS_MAX, description="Inference processes, each with a dispatcher beside it")
    torch_threads: int = Field(default=1, ge=1, le=1024, description="Threads of each inference process")
    drain_s: float = Field(default=5.0, ge=0, le=300, description="How long running calls may take to end when the stack stops")
    # Not Envoy's default: a browser that trusts our authority would want TLS of everything else on this host, too.
    hsts_max_age_s: int = Field(default=0, ge=0, description="How long browsers use nothing but TLS with this host; 0: they need not")
