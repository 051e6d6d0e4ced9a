"""Other services verify what the gateway signs: keys over mTLS, rotation overlap, the process itself, the schema."""

import asyncio
import os
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gateway import app
from gateway.tables import metadata
from gateway.tokens import ACTIVATION_S
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.client import mesh_channel
from servicekit.database import create_engine, transaction
from servicekit.identity import RemoteKeys, TokenVerifier
from servicekit.settings import DatabaseSettings
from servicekit.tls import TlsFiles, client_ssl_context

PASSWORD = "correct horse battery"


async def access_token(gateway: Any) -> tuple[str, str]:
    """User id and access token of a fresh account."""
    email = f"ann-{uuid.uuid4().hex}@example.org"
    await gateway.users.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
    credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
    session = await gateway.users.SignIn(identity_pb2.SignInRequest(password=credential))
    return session.user.user_id, session.access_token


def verifier(gateway: Any, certificates: Path) -> TokenVerifier:
    """As another service of the mesh has one."""
    keys = RemoteKeys(gateway.jwks_url, TlsFiles.of(certificates, "jobs_service"))
    return TokenVerifier(keys, issuer=gateway.settings.token_issuer, audience=gateway.settings.token_audience)


def add_key(directory: Path, name: str, *, modified_at_s: float) -> None:
    file = directory / name
    file.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    os.utime(file, (modified_at_s, modified_at_s))


async def start_process(role: str, environment: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", role, env=environment, stderr=asyncio.subprocess.PIPE)


async def test_another_service_verifies_tokens_with_keys_fetched_over_mtls(gateway: Any, certificates: Path) -> None:
    user_id, token = await access_token(gateway)
    principal = await verifier(gateway, certificates).verify(token)
    assert (principal.user_id, principal.roles, principal.plan) == (user_id, frozenset(), "PLAN_FREE")


async def test_keys_are_json_for_mesh_certificates_only(gateway: Any, certificates: Path) -> None:
    def fetch(context: ssl.SSLContext) -> tuple[str | None, bytes]:
        with urllib.request.urlopen(gateway.jwks_url, context=context, timeout=10) as response:
            return response.headers["content-type"], response.read()

    mesh = client_ssl_context(TlsFiles.of(certificates, "envoy"))
    assert await asyncio.to_thread(fetch, mesh) == gateway.keys.jwks_page()
    anonymous = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(fetch, anonymous)


async def test_rotation_overlaps(start_gateway: Any, certificates: Path, tmp_path: Path) -> None:
    now = time.time()
    add_key(tmp_path, "first.pem", modified_at_s=now - 2 * ACTIVATION_S - 60)
    before = await start_gateway(signing_keys_dir=tmp_path)
    old_user, old_token = await access_token(before)
    add_key(tmp_path, "second.pem", modified_at_s=now - ACTIVATION_S - 60)
    after = await start_gateway(signing_keys_dir=tmp_path)
    assert after.keys.key_id != before.keys.key_id
    new_user, new_token = await access_token(after)
    verify = verifier(after, certificates).verify
    assert [(await verify(token)).user_id for token in (old_token, new_token)] == [old_user, new_user]
    # The gateway itself, too.
    me = await after.users.GetMe(identity_pb2.GetMeRequest(), metadata=[("authorization", f"Bearer {old_token}")])
    assert me.user.user_id == old_user


async def test_a_key_made_by_hand_is_published_by_a_running_gateway_and_signs_later(
    start_gateway: Any, certificates: Path, tmp_path: Path
) -> None:
    gateway = await start_gateway(signing_keys_dir=tmp_path)
    old = gateway.keys.key_id
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        "rotate-keys",
        env={name: value for name, value in os.environ.items() if not name.startswith("GENMESH_")}
        | {"GENMESH_SIGNING_KEYS_DIR": str(tmp_path)},
        stdout=asyncio.subprocess.PIPE,
    )
    stdout, _ = await process.communicate()
    assert process.returncode == 0
    new = stdout.decode().partition(":")[0]
    published = RemoteKeys(gateway.jwks_url, TlsFiles.of(certificates, "jobs_service"))
    async with asyncio.timeout(60):
        while await published.get(new) is None:  # noqa: ASYNC110  # asks anew every two seconds
            await asyncio.sleep(0.1)
    assert await published.get(old) is not None
    assert gateway.keys.key_id == old
    _, token = await access_token(gateway)
    await verifier(gateway, certificates).verify(token)


async def test_the_migration_makes_what_the_tables_say_also_by_two_at_once(postgres: Any) -> None:
    url = postgres.create_database()
    environment = os.environ | {"GENMESH_DATABASE_URL": url}
    processes = [await start_process("migrate", environment) for _ in range(2)]
    for process in processes:
        _, stderr = await process.communicate()
        assert process.returncode == 0, stderr.decode()
    settings = DatabaseSettings.model_validate({"database_url": url})
    engine = create_engine(settings, schema=app.SCHEMA, application="test")

    def differences(connection: sa.Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"version_table_schema": app.SCHEMA, "compare_server_default": True})
        return [
            difference
            for difference in compare_metadata(context, metadata)
            # Alembic's own table is in the schema and in no metadata.
            if not (difference[0] == "remove_table" and difference[1].name == "alembic_version")
        ]

    try:
        async with transaction(engine) as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await engine.dispose()


async def wait_for_line(process: asyncio.subprocess.Process, part: str) -> str:
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while line := (await process.stderr.readline()).decode():
            if part in line:
                return line
    raise AssertionError(f"the process ended before it logged {part}")


async def test_the_process_makes_its_administrator_serves_and_leaves_with_0(
    gateway: Any, database_url: str, certificates: Path, tmp_path: Path
) -> None:
    email = f"root-{uuid.uuid4().hex}@example.org"
    environment = os.environ | {
        "GENMESH_DATABASE_URL": database_url,
        "GENMESH_REDIS_URL": gateway.settings.redis_url.get_secret_value(),
        "GENMESH_CERTIFICATES_DIR": str(certificates),
        "GENMESH_SIGNING_KEYS_DIR": str(tmp_path),
        "GENMESH_JWKS_LISTEN_ADDRESS": "127.0.0.1:0",
        "GENMESH_LISTEN_ADDRESS": "127.0.0.1:0",
        "GENMESH_ADMIN_EMAIL": email,
        "GENMESH_ADMIN_PASSWORD": PASSWORD,
        "GENMESH_LOG_FORMAT": "json",
        "GENMESH_LOG_LEVEL": "info",
    }
    process = await start_process("serve", environment)
    try:
        line = await wait_for_line(process, "server.listening")
        port = int(line.partition('"port": ')[2].partition(",")[0])
        await wait_for_line(process, '"serving": true')
        async with mesh_channel(gateway.settings, f"127.0.0.1:{port}", caller="envoy", service="gateway") as channel:
            credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
            stub: identity_pb2_grpc.IdentityServiceAsyncStub = identity_pb2_grpc.IdentityServiceStub(channel)
            session = await stub.SignIn(identity_pb2.SignInRequest(password=credential))
        assert list(session.user.roles) == ["admin"]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_wrong_settings_end_the_process_with_78_and_say_which() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GENMESH_")}
    process = await start_process("serve", environment | {"GENMESH_ADMIN_PASSWORD": "short"})
    _, stderr = await process.communicate()
    assert process.returncode == 78
    for variable in ("GENMESH_DATABASE_URL", "GENMESH_CERTIFICATES_DIR", "GENMESH_SIGNING_KEYS_DIR", "GENMESH_ADMIN_PASSWORD"):
        assert variable in stderr.decode()


async def test_without_its_database_the_gateway_says_unavailable(start_gateway: Any, refused: Any) -> None:
    lost = await start_gateway(database_url="postgresql+asyncpg://nobody:x@127.0.0.1:1/none")
    credential = identity_pb2.PasswordCredential(email="a@example.org", password=PASSWORD)
    error = await refused(lost.users.SignIn(identity_pb2.SignInRequest(password=credential)))
    assert (error.code, error.message) == (grpc.StatusCode.UNAVAILABLE, "the database is out of reach right now")
    assert error.retry_after_s is not None
