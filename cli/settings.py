"""Settings of the user commands, by environment variable. The embedded stack has its own beside `cli/stack`."""

import json
from pathlib import Path

import typer
from pydantic import Field, SecretStr

from servicekit.settings import Settings


class ClientSettings(Settings):
    """How the command line reaches a genmesh, and as whom."""

    edge_url: str | None = Field(None, description="Edge to call, http://HOST:PORT or https://HOST:PORT; unset: where you signed in")
    edge_port: int = Field(8080, ge=0, le=65535, description="Port of the embedded stack's edge, used when nothing names another")
    edge_ca_file: Path | None = Field(
        None, description="CA certificate (PEM) that an https edge is checked against; unset: the embedded stack's, else the system's"
    )
    state_dir: Path = Field(Path(".genmesh"), description="State directory of the embedded stack: data, logs, certificates")
    session_file: Path | None = Field(
        None, description="Where the login is stored; unset: session.json in the user's configuration directory"
    )
    email: str | None = Field(None, description="For scripts: sign in as this account for each command, storing nothing")
    password: SecretStr | None = Field(None, description="For scripts: password that goes with GENMESH_EMAIL")
    api_key: SecretStr | None = Field(None, description="For scripts: API key to call with instead of a login, see `genmesh keys create`")

    @property
    def default_edge(self) -> str:
        """Edge of the embedded stack on this machine: where it says it is, if its port was left to it."""
        if self.edge_port == 0:
            stack = self.state_dir / "stack.json"
            if stack.is_file():
                return json.loads(stack.read_bytes())["edge"]["url"]
        return f"http://127.0.0.1:{self.edge_port or 8080}"

    @property
    def session_path(self) -> Path:
        """Where the login is stored."""
        return self.session_file or Path(typer.get_app_dir("genmesh")) / "session.json"

    @property
    def ca_file(self) -> Path | None:
        """CA for an https edge; None: the system's."""
        if self.edge_ca_file is not None:
            return self.edge_ca_file
        embedded = self.state_dir / "certificates" / "ca.crt"
        return embedded if embedded.is_file() else None
