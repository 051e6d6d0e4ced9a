"""The processes of the mesh: which there are, what each is told by environment, what it waits for.

Names of variables are those of `servicekit.settings` and of the services' own settings; compose.yaml uses the same.
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cli.stack.health import grpc_ready, http_ready
from cli.stack.ports import LOOPBACK, PortBlock
from cli.stack.process import Phase, ProcessSpec

STOP_MARGIN_S = 5.0
"""On top of the drain: closing pools, flushing, unloading models."""
NAMES = {"gateway": "gateway", "credits": "credit_service", "jobs": "jobs_service"}
"""Services with a schema, by the names of their processes."""
SECRETS = {
    "GENMESH_ADMIN_PASSWORD": "gateway",
    "GENMESH_GOOGLE_CLIENT_SECRET": "gateway",
    "GENMESH_STRIPE_SECRET_KEY": "credits",
    "GENMESH_STRIPE_WEBHOOK_SECRET": "credits",
    # Those of who types commands: no process of the mesh is told.
    "GENMESH_PASSWORD": "",
    "GENMESH_API_KEY": "",
}
"""What the environment may have that one process alone is told."""
DEFAULT_MODELS_FILE = Path(__file__).resolve().parents[2] / "models" / "catalogue.yaml"
"""The catalogue of the repository, wherever the command is called from."""


def migration_digests() -> dict[str, str]:
    """A digest of each service's migrations, by service. The services are found, not imported."""
    digests: dict[str, str] = {}
    for service in NAMES.values():
        spec = importlib.util.find_spec(service)
        digest = hashlib.sha256()
        for directory in spec.submodule_search_locations or () if spec else ():
            for file in sorted(Path(directory, "migrations").rglob("*.py")):
                digest.update(file.read_bytes())
        digests[service] = digest.hexdigest()
    return digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """All that the processes are told. `environment` holds what the user set; what is chosen here overrides it."""

    ports: PortBlock
    certificates_dir: Path
    signing_keys_dir: Path
    environment: Mapping[str, str]
    database_urls: Mapping[str, str]
    redis_url: str
    s3: Mapping[str, str]
    admin_email: str
    admin_password: str
    replicas_inference: int
    torch_threads: int
    drain_s: float
    migrated: Collection[str] = ()
    """Services whose schema is known to be the newest: their migration would only cost time."""

    def specs(self) -> list[ProcessSpec]:
        """Migrations and services, in the order in which they are shown."""
        return list(self._specs())

    def _specs(self) -> Iterator[ProcessSpec]:
        jobs = {
            "GENMESH_DATABASE_URL": self.database_urls["jobs_service"],
            "GENMESH_REDIS_URL": self.redis_url,
            "GENMESH_CREDITS_ADDRESS": self.ports.address("credits"),
            **self.s3,
        }
        for name, service in NAMES.items():
            if service in self.migrated:
                continue
            yield ProcessSpec(
                name=f"migrate-{name}",
                service=service,
                role="migrate",
                argv=(sys.executable, "-m", service, "migrate"),
                phase=Phase.MIGRATIONS,
                # The settings of a service are read whole, whatever its role.
                env=self._env({"GENMESH_DATABASE_URL": self.database_urls[service]} | (jobs if service == "jobs_service" else {})),
                after=("postgres",),
            )
        yield self._server(
            "gateway",
            "gateway",
            {
                "GENMESH_DATABASE_URL": self.database_urls["gateway"],
                "GENMESH_REDIS_URL": self.redis_url,
                "GENMESH_CREDITS_ADDRESS": self.ports.address("credits"),
                "GENMESH_JWKS_LISTEN_ADDRESS": self.ports.address("gateway-jwks"),
                "GENMESH_SIGNING_KEYS_DIR": str(self.signing_keys_dir),
                "GENMESH_ADMIN_EMAIL": self.admin_email,
                "GENMESH_ADMIN_PASSWORD": self.admin_password,
            },
            after=(*self._schema("gateway"), "redis"),
        )
        yield self._server(
            "credits",
            "credit_service",
            {"GENMESH_DATABASE_URL": self.database_urls["credit_service"]},
            after=(*self._schema("credits"), "gateway"),  # who asks it for revocations is ready when it is
        )
        yield self._server("jobs", "jobs_service", jobs, after=(*self._schema("jobs"), "redis", "s3", "gateway"))
        yield self._worker("relay", "relay", jobs, after=(*self._schema("jobs"), "redis"))
        for index in range(self.replicas_inference):
            yield self._server(
                f"inference-{index}",
                "inference_service",
                {
                    **self.s3,
                    "GENMESH_MODELS_FILE": os.environ.get("GENMESH_MODELS_FILE") or str(DEFAULT_MODELS_FILE),
                    "GENMESH_TORCH_THREADS": str(self.torch_threads),
                    # On a shared machine, threads of several torch processes that spin while they wait starve each other.
                    "OMP_NUM_THREADS": str(self.torch_threads),
                    "OMP_WAIT_POLICY": "PASSIVE",
                },
                # Before everything else: loading torch is the longest part of a start, and the store is not needed for it.
                after=(),
                start_timeout_s=300.0,  # large models take their time
                takes_turn=False,
            )
            yield self._worker(
                f"dispatch-{index}",
                "dispatch",
                jobs
                | {
                    "GENMESH_INFERENCE_ADDRESS": self.ports.address(f"inference-{index}"),
                    "GENMESH_WORKER_ID": f"dispatch-{index}",
                },
                after=(*self._schema("jobs"), "redis"),
            )

    def _schema(self, name: str) -> tuple[str, ...]:
        """What a process that uses the schema of `name` waits for."""
        return ("postgres",) if NAMES[name] in self.migrated else (f"migrate-{name}",)

    def _server(
        self,
        name: str,
        service: str,
        env: Mapping[str, str],
        *,
        after: tuple[str, ...],
        start_timeout_s: float = 60.0,
        takes_turn: bool = True,
    ) -> ProcessSpec:
        address = self.ports.address(name)
        return ProcessSpec(
            name=name,
            service=service,
            role="serve",
            argv=(sys.executable, "-m", service, "serve"),
            phase=Phase.SERVICES,
            env=self._env({**env, "GENMESH_LISTEN_ADDRESS": address, "GENMESH_GATEWAY_ADDRESS": self.ports.address("gateway")}, name),
            after=after,
            check=grpc_ready(self.certificates_dir, address, service),
            address=address,
            metrics_address=self.ports.address(f"{name}-metrics"),
            stop_timeout_s=self.drain_s + STOP_MARGIN_S,
            start_timeout_s=start_timeout_s,
            takes_turn=takes_turn,
        )

    def _worker(self, name: str, role: str, env: Mapping[str, str], *, after: tuple[str, ...]) -> ProcessSpec:
        return ProcessSpec(
            name=name,
            service="jobs_service",
            role=role,
            argv=(sys.executable, "-m", "jobs_service", role),
            phase=Phase.WORKERS,
            env=self._env(env, name),
            after=after,
            # It serves nothing but its metrics, which it does once its resources are open.
            check=http_ready(LOOPBACK, self.ports.port(f"{name}-metrics"), "/metrics"),
            metrics_address=self.ports.address(f"{name}-metrics"),
            stop_timeout_s=self.drain_s + STOP_MARGIN_S,
            takes_turn=True,
        )

    def _env(self, env: Mapping[str, str], name: str | None = None) -> dict[str, str]:
        """Environment of a child; with `name`, that of one that stays and serves metrics."""
        chosen = {
            "GENMESH_CERTIFICATES_DIR": str(self.certificates_dir),
            "GENMESH_JWKS_URL": f"https://{self.ports.address('gateway-jwks')}/.well-known/jwks.json",
            "GENMESH_DRAIN_S": str(self.drain_s),
            **env,
        }
        if name is not None:
            chosen["GENMESH_METRICS_ADDRESS"] = self.ports.address(f"{name}-metrics")
        given = dict(os.environ) | dict(self.environment)
        return {key: value for key, value in given.items() if SECRETS.get(key, name) == name} | chosen
