"""A stack whose processes can be killed at exact points, its users, and what was asked of it: what fault tests and the schedule share."""

import asyncio
import dataclasses
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import asyncpg
import grpc
import httpx
import jwt
from google.protobuf.message import Message

from cli.stack import Stack, StackSettings, supervisor
from cli.stack.process import ProcessSpec
from gateway.tokens import SigningKeys
from genmesh.credits.v1 import credits_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import (
    AUDIT_LEDGER,
    CREATE_JOB,
    GRANT_CREDITS,
    PASSWORD,
    REGISTER_USER,
    SIGN_IN,
    UPDATE_USER,
    Edge,
    Method,
    Refusal,
    User,
    submission,
)
from tests.faults import launcher
from tests.faults.controls import Controls

LEASE_S = 2.0
CHECKPOINT_INTERVAL_S = 0.5
PLAN_GRANT_INTERVAL_S = 0.5
REPLICAS = 2
WORKERS = tuple(f"dispatch-{index}" for index in range(REPLICAS))
PLENTY = 100_000_000
WATCHES_MAX = 2_000
"""Of one user: a few users have all the watches here."""
STREAMS_A_CHANNEL = 80
"""Envoy takes 100 streams a connection."""

RESTART_PAUSE_MAX_S = 0.5
"""The supervisor's pauses grow with every death of a process; here processes die all the time, and tests would wait for that."""
CALL_TIMEOUT_S = 8.0
TOKEN_LIFE_S = 60.0
"""Deadline of a call that a fault may swallow; then it is made again."""
PATIENCE_S = 90.0
"""How long a client goes on trying: far more than any fault lasts."""
POLL_S = 0.05
TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,  # a server that is killed resets its streams, which gRPC calls INTERNAL
        grpc.StatusCode.CANCELLED,  # the same while the answer was on its way
        grpc.StatusCode.ABORTED,
    }
)
"""Refusals after which a client makes the same call again."""


def transient(refusal: Refusal) -> bool:
    """Whether the same call may go through soon: a ceiling stands for a day at least."""
    return refusal.code in TRANSIENT and refusal.reason != "CEILING_REACHED"


Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Value = TypeVar("Value")


@dataclass(slots=True)
class Asked:
    """What was asked of the mesh, and what it promised: what invariants are checked against."""

    accepted: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """Job ids answered, by owner and request id."""
    deleted: set[str] = field(default_factory=set)
    """Jobs that their owner deleted."""
    refusals: int = 0
    """Refusals that a retry healed."""


class FaultStack(Stack):
    """A stack whose services run under `launcher`."""

    @property
    def faults_dir(self) -> Path:
        """Where points are armed."""
        return self.state.directory("faults")

    def _prepare(self, held: ExitStack) -> list[ProcessSpec]:
        root = Path(__file__).resolve().parents[2]
        specs: list[ProcessSpec] = []
        for spec in super()._prepare(held):
            service = spec.argv[2:]
            if spec.argv[:2] == (sys.executable, "-m") and spec.role != "migrate":
                path = os.pathsep.join([str(root), str(root / "gen"), *filter(None, [spec.env.get("PYTHONPATH")])])
                env = {**spec.env, launcher.DIRECTORY: str(self.faults_dir), launcher.PROCESS: spec.name, "PYTHONPATH": path}
                spec = dataclasses.replace(spec, argv=(sys.executable, "-m", launcher.__name__, *service), env=env)
            specs.append(spec)
        return specs


class Mesh:
    """A running stack with what tests do to it."""

    def __init__(self, stack: FaultStack, edge: Edge, admin: User, database: asyncpg.Pool) -> None:
        self.stack = stack
        self.edge = edge
        self.database = database
        """As superuser, who sees all schemas."""
        self.asked = Asked()
        self.controls = Controls(stack, stack.faults_dir)
        self._admin = admin

    # --- users ----------------------------------------------------------------------------------------------------------

    async def new_user(self, millicredits: int = PLENTY, *, pro: bool = False) -> User:
        """A user with so many millicredits; `pro`: on the paid plan."""
        email = f"{uuid.uuid4().hex}@example.com"
        await self.edge.call(REGISTER_USER, identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
        user = await sign_in(self.edge, email, PASSWORD)
        if pro:
            await self.as_admin(UPDATE_USER, identity_pb2.UpdateUserRequest(user_id=user.user_id, plan=identity_pb2.PLAN_PRO))
            user = await sign_in(self.edge, email, PASSWORD)
        if millicredits:
            grant = credits_pb2.GrantCreditsRequest(
                request_id=str(uuid.uuid4()), user_id=user.user_id, amount_millicredits=millicredits, reason="for a fault test"
            )
            await self.as_admin(GRANT_CREDITS, grant)
        return user

    async def as_admin(self, method: Method[Request, Response], request: Request) -> Response:
        """A call of the administrator's, until it is answered or refused for good."""
        return await self.patiently(lambda: self.until(self._admin, TOKEN_LIFE_S).call(method, request))

    def until(self, user: User, seconds: float) -> User:
        """The user with an access token that ends so soon, signed with the gateway's own key."""
        claims = jwt.decode(user.token, options={"verify_signature": False})
        claims |= {"iat": int(time.time()), "exp": int(time.time() + seconds), "jti": str(uuid.uuid4())}
        return dataclasses.replace(user, token=SigningKeys.open(self.stack.state.directory("keys")).sign(claims))

    # --- calls as a patient client makes them -----------------------------------------------------------------------------

    async def submit(self, user: User, spec: jobs_pb2.JobSpec, request_id: str = "") -> jobs_pb2.Job:
        """Submit a job, with the same request id until it is accepted. Raises Refusal when trying again is of no use."""
        request = submission(spec, request_id)
        response = await self.patiently(lambda: user.call(CREATE_JOB, request))
        self.asked.accepted.setdefault((user.user_id, request.request_id), set()).add(response.job.job_id)
        return response.job

    async def cancel(self, user: User, job_id: str) -> jobs_pb2.Job | None:
        """Cancel a job; None when it had ended before."""
        try:
            return await self.patiently(lambda: user.cancel(job_id))
        except Refusal as refusal:
            if refusal.reason != "JOB_TERMINAL":
                raise
            return None

    async def patiently(self, call: Callable[[], Awaitable[Value]]) -> Value:
        """Make a call again and again until it is answered or refused for good."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    return await call()
            except (Refusal, TimeoutError) as error:
                if (isinstance(error, Refusal) and not transient(error)) or time.monotonic() > deadline:
                    raise
                self.asked.refusals += 1
                await asyncio.sleep(POLL_S)

    # --- the truth --------------------------------------------------------------------------------------------------------

    async def row(self, job_id: str) -> asyncpg.Record:
        """A job as PostgreSQL has it."""
        row = await self.patiently_sql("SELECT * FROM jobs.jobs WHERE job_id = $1", uuid.UUID(job_id))
        assert row, f"no job {job_id}"
        return row[0]

    async def patiently_sql(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Rows of a query, however often PostgreSQL is restarted meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await self.database.fetch(query, *args, timeout=CALL_TIMEOUT_S)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(POLL_S)

    async def until_row(self, job_id: str, wanted: Callable[[asyncpg.Record], bool]) -> asyncpg.Record:
        """The job's row once it is as wanted."""
        deadline = time.monotonic() + PATIENCE_S
        while not wanted(row := await self.row(job_id)):
            assert time.monotonic() < deadline, f"never came; the row is {dict(row)}"
            await asyncio.sleep(POLL_S / 5)
        return row

    async def audit(self) -> list[str]:
        """What the ledger's own audit finds, as an administrator asks for it."""

        async def ask() -> list[str]:
            *found, last = [
                message async for message in self.until(self._admin, TOKEN_LIFE_S).stream(AUDIT_LEDGER, credits_pb2.AuditLedgerRequest())
            ]
            assert last.HasField("summary"), "the audit did not come to its end"
            assert sum(int(total.amount_millicredits) for total in last.summary.totals) == 0, last.summary
            return [f"{one.discrepancy.problem} {one.discrepancy.subject}" for one in found if one.HasField("discrepancy")]

        return await self.patiently(ask)

    async def well(self) -> None:
        """Wait until every process is healthy."""
        async with asyncio.timeout(PATIENCE_S):
            await self.stack.until(lambda: all(process.is_well for process in self.stack.processes))


async def sign_in(edge: Edge, email: str, password: str) -> User:
    """Sign in."""
    credential = identity_pb2.PasswordCredential(email=email, password=password)
    session = await edge.call(SIGN_IN, identity_pb2.SignInRequest(password=credential))
    return User(edge, session.user.user_id, email, session.access_token)


@asynccontextmanager
async def running(directory: Path) -> AsyncGenerator[Mesh]:
    """A mesh on a state directory; everything is gone afterwards."""
    settings = StackSettings(state_dir=directory, edge_port=0, edge_tls_port=0, replicas_inference=REPLICAS, drain_s=1.0)
    environment = {
        "GENMESH_LEASE_SECONDS": str(LEASE_S),
        "GENMESH_CHECKPOINT_INTERVAL_S": str(CHECKPOINT_INTERVAL_S),
        "GENMESH_PLAN_GRANT_INTERVAL_S": str(PLAN_GRANT_INTERVAL_S),
        "GENMESH_WATCHES_FREE": str(WATCHES_MAX),
        "GENMESH_WATCHES_PRO": str(WATCHES_MAX),
    }
    pause_max_s, supervisor.BACKOFF_MAX_S = supervisor.BACKOFF_MAX_S, RESTART_PAUSE_MAX_S
    try:
        async with AsyncExitStack() as resources:
            stack = FaultStack(settings, environment=environment)
            await resources.enter_async_context(stack.running())
            channel = await resources.enter_async_context(new_channel(stack))
            http = await resources.enter_async_context(httpx.AsyncClient(base_url=stack.edge_url, timeout=PATIENCE_S))
            edge = Edge(stack, channel, http)
            url = stack.database_url("postgres").replace("+asyncpg", "")
            database = await resources.enter_async_context(
                asyncpg.create_pool(url, min_size=0, max_size=4, timeout=CALL_TIMEOUT_S, command_timeout=CALL_TIMEOUT_S)
            )
            admin = await sign_in(edge, stack.admin_email, stack.admin_password)
            yield Mesh(stack, edge, admin, database)
    finally:
        supervisor.BACKOFF_MAX_S = pause_max_s


def new_channel(stack: Stack) -> grpc.aio.Channel:
    """A connection of its own to the public door, which tries again soon when it is broken."""
    return grpc.aio.insecure_channel(
        stack.edge_address,
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 500),
        ],
    )
