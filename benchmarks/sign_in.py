"""What signing in costs, against the cryptography that it cannot do without in the same run. Prints one JSON line.

    .venv/bin/python -m benchmarks.sign_in [--rounds N]

One gateway over PostgreSQL and Redis as the stack sets them up, called by gRPC over mTLS as Envoy calls it, one call at a time: by
an ID token whose issuer's keys are cached, by password with the default argon2id parameters, and by refresh token. Their floor, in
the same rounds: what none of them can do without, one after the other: a call that does nothing, two durable commits (the session;
the entry of the audit trail), the signatures or the hash. `first_ms` is the one sign-in that fetches the issuer's documents.
"""

import argparse
import asyncio
import json
import math
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import argon2
import jwt
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.ext.asyncio import AsyncEngine

from cli.stack import parts
from cli.stack.certificates import ensure_certificates
from cli.stack.ports import hold_block
from cli.stack.postgres import DATABASE, ROLE_BY_SERVICE, Postgres
from cli.stack.supervisor import Supervisor
from gateway import app
from gateway.settings import GatewaySettings
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit import process, telemetry
from servicekit.client import mesh_channel
from servicekit.database import migrate, transaction
from tests.service.gateway.issuer import CLIENT_ID, Issuer, running_issuer

PASSWORD = "correct horse battery"
WARM_UP_ROUNDS = 10

Step = Callable[[], Awaitable[None]]


@asynccontextmanager
async def running_gateway(issuer: Issuer) -> AsyncGenerator[tuple[GatewaySettings, AsyncEngine, Any]]:
    """A gateway with what it needs, and a stub for it."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genmesh-benchmark-")))
        for name in ("logs", "redis", "postgres", "certificates", "authority"):
            (directory / name).mkdir(mode=0o700)
        block = stack.enter_context(hold_block(None, directory))
        ensure_certificates(directory / "certificates", directory / "authority")
        supervisor = Supervisor(directory / "logs")
        stack.push_async_callback(supervisor.stop)
        redis_password = secrets.token_urlsafe(16)
        role, password = ROLE_BY_SERVICE[app.SERVICE], secrets.token_urlsafe(16)
        postgres = Postgres(directory / "postgres", block.port("postgres"), secrets.token_urlsafe(16))
        await supervisor.start(
            [postgres.spec({role: password}), parts.redis_spec(directory / "redis", block.port("redis"), redis_password)]
        )
        settings = GatewaySettings.model_validate(
            {
                "certificates_dir": directory / "certificates",
                "database_url": postgres.sqlalchemy_url(DATABASE, role, password),
                "redis_url": parts.redis_url(block.port("redis"), redis_password),
                "signing_keys_dir": directory / "keys",
                "log_level": "warning",
                "drain_s": 0,
                "google_issuer": issuer.url,
                "google_client_ids": (CLIENT_ID,),
            }
        )
        telemetry.configure(settings, service=app.SERVICE, role="benchmark")
        await asyncio.to_thread(migrate, settings, package="gateway", schema=app.SCHEMA)
        deps = await stack.enter_async_context(app.open_dependencies(settings))
        await deps.revocations.poll()
        stack.push_async_callback(process.end, [asyncio.create_task(task) for task in app.background(deps)])
        server = await stack.enter_async_context(app.build_server(settings, deps).running(*app.SERVICE_NAMES))
        channel = await stack.enter_async_context(mesh_channel(settings, f"127.0.0.1:{server.port}", caller="envoy", service=app.SERVICE))
        yield settings, deps.engine, identity_pb2_grpc.IdentityServiceStub(channel)


async def took(step: Step) -> float:
    """Seconds of a step."""
    started = time.perf_counter()
    await step()
    return time.perf_counter() - started


async def measure(rounds: int) -> dict[str, Any]:
    """Seconds of every step, and of its floor."""
    with running_issuer() as issuer:
        async with running_gateway(issuer) as (settings, engine, stub):
            token = issuer.sign(issuer.claims())
            email = f"ann-{secrets.token_hex(8)}@example.org"
            await stub.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
            by_password = identity_pb2.SignInRequest(password=identity_pb2.PasswordCredential(email=email, password=PASSWORD))
            by_token = identity_pb2.SignInRequest(google_id_token=token)
            hasher = argon2.PasswordHasher(
                time_cost=settings.password_hash_iterations, memory_cost=settings.password_hash_memory_kib, parallelism=1
            )
            signing, claims = Ed25519PrivateKey.generate(), issuer.claims()
            public = issuer.key.public_key()

            async def id_token() -> None:
                await stub.SignIn(by_token)

            async def password() -> None:
                nonlocal refresh_token
                refresh_token = (await stub.SignIn(by_password)).refresh_token

            async def refresh() -> None:
                nonlocal refresh_token
                request = identity_pb2.RefreshSessionRequest(refresh_token=refresh_token)
                refresh_token = (await stub.RefreshSession(request)).refresh_token

            async def signatures() -> None:
                jwt.decode(token, public, algorithms=["RS256"], audience=CLIENT_ID)
                jwt.encode(claims, signing, algorithm="EdDSA")

            async def nothing() -> None:
                await stub.GetSignInOptions(identity_pb2.GetSignInOptionsRequest())

            async def commits() -> None:
                for _ in range(2):
                    async with transaction(engine) as connection:
                        await connection.execute(sa.text("SELECT pg_logical_emit_message(true, 'benchmark', 'x')"))

            async def argon2id() -> None:
                await asyncio.to_thread(hasher.hash, PASSWORD)

            refresh_token = ""
            first_s = await took(id_token)
            steps: dict[str, Step] = {
                "id_token": id_token,
                "signatures": signatures,
                "password": password,
                "argon2id": argon2id,
                "refresh": refresh,
                "nothing": nothing,
                "commits": commits,
            }
            times: dict[str, list[float]] = {name: [] for name in steps}
            for number in range(WARM_UP_ROUNDS + rounds):
                for name, step in steps.items():
                    seconds = await took(step)
                    if number >= WARM_UP_ROUNDS:
                        times[name].append(seconds)
            fetched = issuer.asked.count("/jwks")
    return {"first_s": first_s, "key_fetches": fetched, "times": times}


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and 99th percentiles in milliseconds, and ratios to the floors."""
    times: dict[str, list[float]] = measured["times"]
    report: dict[str, Any] = {"first_ms": round(measured["first_s"] * 1000, 1), "key_fetches": measured["key_fetches"]}
    for name, seconds in times.items():
        ordered = sorted(seconds)
        report[f"{name}_p50_ms"] = round(statistics.median(ordered) * 1000, 2)
        report[f"{name}_p99_ms"] = round(ordered[math.ceil(0.99 * len(ordered)) - 1] * 1000, 2)
    for name, own in (("id_token", "signatures"), ("password", "argon2id"), ("refresh", "signatures")):
        floor = sum(statistics.median(times[part]) for part in ("nothing", "commits", own))
        report[f"{name}_ratio"] = round(statistics.median(times[name]) / floor, 2)
    report["cached_keys_under_100_ms"] = report["id_token_p99_ms"] < 100
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds: int = parser.parse_args().rounds
    print(json.dumps({"rounds": rounds} | figures(asyncio.run(measure(rounds)))))


if __name__ == "__main__":
    main()
