"""The whole stack: what the parts of this package make together."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

from cli.stack import edge, parts
from cli.stack.certificates import ensure_certificates, keep_renewed
from cli.stack.mesh import Mesh, migration_digests
from cli.stack.ports import LOOPBACK, PortBlock, hold_block, hold_edge
from cli.stack.postgres import DATABASE, ROLE_BY_SERVICE, Postgres
from cli.stack.process import ProcessSpec, ProcessStatus
from cli.stack.settings import StackSettings
from cli.stack.state import Secrets, StateDirectory
from cli.stack.supervisor import Supervisor


class Stack:
    """A stack on one state directory. See the package for how it is used; everything but the constructor needs `running()`."""

    def __init__(
        self,
        settings: StackSettings,
        *,
        environment: Mapping[str, str] | None = None,
        on_change: Callable[[ProcessStatus], None] = lambda _: None,
    ) -> None:
        """`environment` adds variables for the services; `on_change` is called with every status that changes."""
        self.settings = settings
        self.state = StateDirectory(settings.state_dir)
        self.certificates_dir = self.state.path / "certificates"
        self._environment = dict(environment or {})
        self._on_change = on_change
        self._started_at = time.time()
        self._supervisor: Supervisor
        self._secrets: Secrets
        self._postgres: Postgres
        self._ports: PortBlock
        self.edge_port = settings.edge_port
        self.edge_tls_port = settings.edge_tls_port
        self.addresses: dict[str, str] = {}

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Stack"]:
        """Everything is ready inside the block and gone after it. StackError says why it cannot be."""
        async with AsyncExitStack() as resources:
            specs = self._prepare(resources.enter_context(ExitStack()))
            self._supervisor = Supervisor(self.state.directory("logs"), self._changed)
            resources.push_async_callback(self._stop)
            renewing = asyncio.create_task(keep_renewed(self.certificates_dir, self.state.directory("authority")), name="certificates")
            resources.callback(renewing.cancel)
            await self._supervisor.start(specs)
            self.state.write(self._migrated_file, json.dumps(migration_digests()))
            yield self

    @property
    def edge_address(self) -> str:
        """HOST:PORT of the public door without TLS."""
        return f"{LOOPBACK}:{self.edge_port}"

    @property
    def edge_tls_address(self) -> str:
        """HOST:PORT of the public door with TLS; its certificate is signed by ca.crt and names localhost."""
        return f"{LOOPBACK}:{self.edge_tls_port}"

    @property
    def edge_url(self) -> str:
        """URL of the public door without TLS."""
        return f"http://{self.edge_address}"

    @property
    def edge_tls_url(self) -> str:
        """URL of the public door with TLS."""
        return f"https://localhost:{self.edge_tls_port}"

    @property
    def admin_email(self) -> str:
        """E-mail address of the first administrator."""
        return self.settings.admin_email

    @property
    def admin_password(self) -> str:
        """Password of the first administrator, as it was on first start."""
        given = self.settings.admin_password
        return given.get_secret_value() if given else self._secrets.admin_password

    @property
    def redis_url(self) -> str:
        """Redis of this stack."""
        return parts.redis_url(self._ports.port("redis"), self._secrets.redis)

    @property
    def s3_environment(self) -> dict[str, str]:
        """GENMESH_S3_… variables of this stack."""
        return parts.s3_environment(self._ports.port("s3"), self._secrets.s3_access_key_id, self._secrets.s3_secret_access_key)

    def database_url(self, service: str) -> str:
        """SQLAlchemy URL with the role of a service; `postgres`: the superuser, who sees all schemas."""
        if service == "postgres":
            return self._postgres.sqlalchemy_url(DATABASE, "postgres", self._secrets.postgres)
        role = ROLE_BY_SERVICE[service]
        return self._postgres.sqlalchemy_url(DATABASE, role, self._role_passwords[role])

    @property
    def processes(self) -> list[ProcessStatus]:
        """Every process, in the order in which `genmesh status` shows them."""
        return self._supervisor.statuses

    def process(self, name: str) -> ProcessStatus:
        """One process."""
        return self._supervisor.status(name)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is asked again at every change of a process."""
        await self._supervisor.until(condition)

    async def failed(self) -> None:
        """Wait until a process cannot be kept running; raises StackError then."""
        await self._supervisor.failed()

    @property
    def _role_passwords(self) -> dict[str, str]:
        made = self._secrets
        return {"genmesh_gateway": made.gateway_database, "genmesh_credits": made.credits_database, "genmesh_jobs": made.jobs_database}

    @property
    def _migrated_file(self) -> Path:
        """Which migrations the database has seen; beside its data, so that both go together."""
        return self.state.directory("postgres") / "migrated.json"

    def _migrated(self) -> set[str]:
        """Services with nothing to migrate: three processes less on a second start."""
        try:
            seen: dict[str, str] = json.loads(self._migrated_file.read_text())
        except (FileNotFoundError, ValueError):
            return set()
        return {service for service, digest in migration_digests().items() if seen.get(service) == digest}

    def _prepare(self, held: ExitStack) -> list[ProcessSpec]:
        """Take what only one stack can have, write what the children read; nothing is started yet."""
        settings, state = self.settings, self.state
        held.enter_context(state.held())
        state.end_leftovers()
        self._secrets = state.secrets()
        ensure_certificates(state.directory("certificates"), state.directory("authority"))
        ports = self._ports = held.enter_context(hold_block(state.port_base, state.path))
        state.port_base = ports.base
        self._postgres = Postgres(state.directory("postgres"), ports.port("postgres"), self._secrets.postgres)
        redis = parts.redis_spec(state.directory("redis"), ports.port("redis"), self._secrets.redis)
        s3 = parts.s3_spec(state.directory("objects"), ports.port("s3"), self._secrets.s3_access_key_id, self._secrets.s3_secret_access_key)
        self.edge_port = settings.edge_port or ports.port("edge")
        self.edge_tls_port = settings.edge_tls_port or ports.port("edge-tls")
        held.enter_context(hold_edge(self.edge_port, "GENMESH_EDGE_PORT"))
        held.enter_context(hold_edge(self.edge_tls_port, "GENMESH_EDGE_TLS_PORT"))
        mesh = Mesh(
            ports=ports,
            certificates_dir=self.certificates_dir,
            signing_keys_dir=state.directory("keys"),
            environment=self._environment,
            database_urls={service: self.database_url(service) for service in ROLE_BY_SERVICE},
            redis_url=self.redis_url,
            s3=self.s3_environment,
            admin_email=self.admin_email,
            admin_password=self.admin_password,
            replicas_inference=settings.replicas_inference,
            torch_threads=settings.torch_threads,
            drain_s=settings.drain_s,
            migrated=self._migrated(),
        ).specs()
        envoy_dir = state.directory("envoy")
        envoy_file = envoy_dir / "envoy.yaml"
        text = edge.configuration(
            ports,
            envoy_dir,
            edge_port=self.edge_port,
            edge_tls_port=self.edge_tls_port,
            certificates_dir=self.certificates_dir,
            replicas_inference=settings.replicas_inference,
            hsts_max_age_s=settings.hsts_max_age_s,
        )
        state.write(envoy_file, text)
        envoy = parts.envoy_spec(
            envoy_file, ports.port("envoy-admin"), self.edge_port, after=tuple(spec.name for spec in mesh if spec.check is not None)
        )
        specs = [self._postgres.spec(self._role_passwords), redis, s3, *mesh, envoy]
        self.addresses = {spec.name: spec.address for spec in specs if spec.address}
        return specs

    async def _stop(self) -> None:
        """Stop everything, even if the task that asks is cancelled meanwhile."""
        stopping = asyncio.create_task(self._supervisor.stop())
        cancelled = False
        while not stopping.done():
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError:
                cancelled = True
        stopping.result()
        if cancelled:
            raise asyncio.CancelledError

    def _changed(self, status: ProcessStatus) -> None:
        self.state.publish(
            {
                "started_at": self._started_at,
                "state_dir": str(self.state.path),
                "edge": {"url": self.edge_url, "tls_url": self.edge_tls_url, "port": self.edge_port, "tls_port": self.edge_tls_port},
                "admin": {"email": self.admin_email, "password_file": self.password_source},
                "processes": [status.to_json() for status in self.processes],
            }
        )
        self._on_change(status)

    @property
    def password_source(self) -> str:
        """Where a person finds the administrator's password."""
        return "GENMESH_ADMIN_PASSWORD" if self.settings.admin_password else str(self.state.secrets_file)
