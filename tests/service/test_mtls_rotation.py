"""Certificates replaced under running gRPC and HTTPS servers and channels: new connections use them, old ones go on."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from cryptography import x509
from structlog.testing import capture_logs

from cli.stack.certificates import rotate
from servicekit import client, tls
from servicekit.client import mesh_channel
from servicekit.identity import peer_service
from servicekit.settings import MeshSettings
from servicekit.telemetry import HttpServer
from servicekit.tls import TlsFiles, WatchedContext, client_ssl_context, read_material, server_credentials
from tests.authority import Authority, pem, replace
from tests.canned_mesh import canned_mesh

HOUR = timedelta(hours=1)
ENDED = {"start": -9 * HOUR, "end": -HOUR}
SERVER = "credit_service"
CALLER = "jobs_service"
WHO = "/genmesh.probe.v1.Peers/Who"
WATCH = "/genmesh.probe.v1.Peers/Watch"
NOBODY = b"nobody"
EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]  # missing in the stubs
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "RELOAD_INTERVAL_S", 0.0)


@dataclass
class Mesh:
    """A directory of certificates, a gRPC server that tells callers what it knows of them."""

    directory: Path
    authority: Authority
    port: int = 0
    ticks: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue[bytes])

    def issue(self, service: str, **options: Any) -> int:
        """Replace the pair of a service; the new serial number."""
        return self.authority.issue(service, **options).write(self.directory, service)

    def files(self, service: str) -> TlsFiles:
        return TlsFiles.of(self.directory, service)

    def channel(self, service: str = SERVER) -> grpc.aio.Channel:
        settings = MeshSettings(certificates_dir=self.directory)  # pyright: ignore[reportCallIssue]  # the rest has defaults
        return mesh_channel(settings, f"127.0.0.1:{self.port}", caller=CALLER, service=service)

    async def shown_serial(self, port: int | None = None) -> int:
        """Serial number of the certificate that the server shows to a new connection."""
        context = client_ssl_context(self.files("envoy"), SERVER)
        context.set_alpn_protocols(["h2"])

        def shake_hands() -> int:
            address = ("127.0.0.1", port or self.port)
            with socket.create_connection(address, TIMEOUT_S) as plain, context.wrap_socket(plain) as connection:
                return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"").serial_number

        return await asyncio.to_thread(shake_hands)


def new_mesh(directory: Path) -> Mesh:
    mesh = Mesh(directory, Authority())
    replace(directory / "ca.crt", mesh.authority.pem)
    for service in (SERVER, CALLER, "envoy"):
        mesh.issue(service)
    return mesh


async def who(_request: bytes, context: Any) -> bytes:
    """Service and serial number of the caller's certificate."""
    seen = context.auth_context()
    serial = x509.load_pem_x509_certificate(seen["x509_pem_cert"][0]).serial_number
    return b"%s %x" % ((peer_service(seen) or NOBODY.decode()).encode(), serial)


@pytest_asyncio.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[Mesh]:
    mesh = new_mesh(tmp_path)
    async with serving(mesh):
        yield mesh


@contextlib.asynccontextmanager
async def serving(mesh: Mesh) -> AsyncGenerator[None]:
    async def watch(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield await who(b"", context)
        while tick := await mesh.ticks.get():
            yield tick

    server = grpc.aio.server()
    methods = {"Who": grpc.unary_unary_rpc_method_handler(who), "Watch": grpc.unary_stream_rpc_method_handler(watch)}  # pyright: ignore[reportArgumentType]
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("genmesh.probe.v1.Peers", methods)])
    mesh.port = server.add_secure_port("127.0.0.1:0", server_credentials(mesh.files(SERVER)))
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


async def ask(channel: grpc.aio.Channel) -> bytes:
    return await channel.unary_unary(WHO)(b"", timeout=TIMEOUT_S)


def caller(serial: int) -> bytes:
    return b"%s %x" % (CALLER.encode(), serial)


async def refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def until(condition: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- leaves


async def test_calls_after_a_rotation_show_the_new_certificate(mesh: Mesh) -> None:
    async with mesh.channel() as channel:
        method = channel.unary_unary(WHO)
        assert await method(b"", timeout=TIMEOUT_S) == caller(read_material(mesh.files(CALLER)).serial_number)
        for _ in range(3):
            serial = mesh.issue(CALLER)
            assert await method(b"", timeout=TIMEOUT_S) == caller(serial)
            assert await ask(channel) == caller(serial)


async def test_a_stream_that_is_open_survives_rotations_of_both_ends(mesh: Mesh) -> None:
    async with mesh.channel() as channel:
        stream = channel.unary_stream(WATCH)(b"")
        before = await stream.read()
        for tick in (b"1", b"2"):
            mesh.issue(SERVER)
            serial = mesh.issue(CALLER)
            assert await ask(channel) == caller(serial) != before
            mesh.ticks.put_nowait(tick)
            assert await stream.read() == tick
        mesh.ticks.put_nowait(b"")
        assert await stream.read() is EOF
        assert await stream.code() is grpc.StatusCode.OK


async def test_calls_under_way_do_not_notice_rotations(mesh: Mesh) -> None:
    """Callers that never pause, both ends replaced again and again."""
    async with mesh.channel() as channel:
        done = asyncio.Event()

        async def ask_on() -> set[bytes]:
            answers: set[bytes] = set()
            while not done.is_set():
                answers.add(await ask(channel))
            return answers

        asking = [asyncio.create_task(ask_on()) for _ in range(8)]
        serials: list[int] = []
        for _ in range(20):
            mesh.issue(SERVER)
            serials.append(mesh.issue(CALLER))
            await ask(channel)
        done.set()
        answers = set[bytes]().union(*await asyncio.gather(*asking))
        assert len(answers & {caller(serial) for serial in serials}) > 1


async def test_channels_of_earlier_certificates_close_when_their_calls_have_ended(mesh: Mesh) -> None:
    async with mesh.channel() as channel:
        retired: dict[Any, Any] = channel._retired  # pyright: ignore[reportAttributeAccessIssue]  # nothing outside sees them
        stream = channel.unary_stream(WATCH)(b"")
        await stream.read()
        for _ in range(3):
            mesh.issue(CALLER)
            await ask(channel)
        await until(lambda: len(retired) == 1)
        mesh.ticks.put_nowait(b"")
        assert await stream.read() is EOF
        await until(lambda: not retired)


async def test_earlier_channels_are_bounded(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETIRED_MAX", 2)
    async with mesh.channel() as channel:
        streams: list[Any] = []
        for _ in range(4):
            streams.append(channel.unary_stream(WATCH)(b""))
            await streams[-1].read()
            mesh.issue(CALLER)
            await ask(channel)
        await until(lambda: [stream.done() for stream in streams] == [True, True, False, False])


async def test_closing_a_channel_closes_the_earlier_ones_too(mesh: Mesh) -> None:
    channel = mesh.channel()
    stream = channel.unary_stream(WATCH)(b"")
    await stream.read()
    mesh.issue(CALLER)
    await ask(channel)
    await channel.close()
    assert stream.done()
    with pytest.raises(grpc.aio.UsageError):
        await ask(channel)
    await channel.close()


async def test_a_server_shows_its_new_certificate_to_new_connections(mesh: Mesh) -> None:
    assert await mesh.shown_serial() == read_material(mesh.files(SERVER)).serial_number
    serial = mesh.issue(SERVER)
    assert await mesh.shown_serial() == serial


async def test_half_a_replacement_changes_nothing(mesh: Mesh) -> None:
    before = {service: read_material(mesh.files(service)).serial_number for service in (SERVER, CALLER)}
    issued = {service: mesh.authority.issue(service) for service in before}
    async with mesh.channel() as channel:
        assert await ask(channel) == caller(before[CALLER])
        with capture_logs() as logs:
            for service, one in issued.items():
                replace(mesh.directory / f"{service}.key", pem(one.key))
            assert await ask(channel) == caller(before[CALLER])
            assert await mesh.shown_serial() == before[SERVER]
        assert [line["event"] for line in logs] == ["tls.files_refused"] * 2
        for service, one in issued.items():
            replace(mesh.directory / f"{service}.crt", one.certificate_pem)
        assert await ask(channel) == caller(issued[CALLER].certificate.serial_number)
        assert await mesh.shown_serial() == issued[SERVER].certificate.serial_number


async def test_a_caller_whose_certificate_has_ended_heals_without_a_restart(mesh: Mesh) -> None:
    mesh.issue(CALLER, **ENDED)
    async with mesh.channel() as channel:
        await refused(channel)
        serial = mesh.issue(CALLER)
        assert await ask(channel) == caller(serial)


async def test_a_server_whose_certificate_has_ended_heals_without_a_restart(tmp_path: Path) -> None:
    mesh = new_mesh(tmp_path)
    mesh.issue(SERVER, **ENDED)
    async with serving(mesh), mesh.channel() as channel:
        await refused(channel)
        mesh.issue(SERVER)
        # The channel that was refused tries again by itself.
        assert await channel.unary_unary(WHO)(b"", timeout=TIMEOUT_S, wait_for_ready=True)


# --- names


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["spiffe://elsewhere/jobs_service"],
        ["spiffe://genmesh.example/jobs_service"],
        ["spiffe://genmesh/jobs_service", "spiffe://genmesh/envoy"],
        ["spiffe://genmesh/jobs_service", "spiffe://elsewhere/jobs_service"],
        ["spiffe://genmesh/jobs_service", "https://genmesh.example"],
        ["https://genmesh/jobs_service"],
        ["SPIFFE://genmesh/jobs_service"],
    ],
)
async def test_a_certificate_without_exactly_one_name_of_ours_names_nobody(mesh: Mesh, uris: list[str]) -> None:
    """The DNS name of a service is no proof: `callers` are compared with the SPIFFE id alone."""
    mesh.issue(CALLER, uris=uris)
    async with mesh.channel() as channel:
        assert (await ask(channel)).startswith(NOBODY)


async def test_a_caller_of_another_authority_does_not_get_in(mesh: Mesh) -> None:
    Authority().issue(CALLER).write(mesh.directory, CALLER)
    async with mesh.channel() as channel:
        await refused(channel)


async def test_the_certificate_of_another_service_does_not_impersonate_a_server(mesh: Mesh) -> None:
    mesh.authority.issue("inference_service").write(mesh.directory, SERVER)
    async with mesh.channel() as channel:
        await refused(channel)
    async with mesh.channel(service="inference_service") as channel:
        assert await ask(channel)


# --- authorities


async def test_a_new_authority_takes_over_without_a_failed_call(tmp_path: Path) -> None:
    """A long-lived channel, connections made all the time and HTTPS requests, through all stages of `rotate`."""
    directory, authority_dir = tmp_path / "certificates", tmp_path / "authority"
    directory.mkdir()
    authority_dir.mkdir()
    rotate(directory, authority_dir)
    mesh = Mesh(directory, Authority())
    old = tmp_path / "old"
    shutil.copytree(directory, old)
    page = HttpServer("127.0.0.1:0", {"/": lambda: ("text/plain", b"here")}, tls=mesh.files(SERVER))
    contexts = WatchedContext(mesh.files(CALLER), lambda files: client_ssl_context(files, SERVER))
    with page:
        async with serving(mesh), mesh.channel() as channel:
            stream = channel.unary_stream(WATCH)(b"")
            await stream.read()
            first = await ask(channel)
            rotating = asyncio.create_task(asyncio.to_thread(rotate, directory, authority_dir, True, settle_s=0.5))
            calls = 0
            while not rotating.done():
                await ask(channel)
                async with mesh.channel() as fresh:
                    await ask(fresh)
                assert await asyncio.to_thread(fetch, page.port, contexts.current()) == b"here"
                calls += 1
            assert "ca" in await rotating
            assert calls > 2
            assert await ask(channel) == caller(read_material(mesh.files(CALLER)).serial_number) != first
            assert await mesh.shown_serial() == read_material(mesh.files(SERVER)).serial_number
            mesh.ticks.put_nowait(b"still here")
            assert await stream.read() == b"still here"
            mesh.ticks.put_nowait(b"")
            assert await stream.read() is EOF

            # Who holds a certificate of the earlier authority is a stranger now, by gRPC and by HTTPS.
            assert len(x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())) == 1
            shutil.copy(directory / "ca.crt", old / "ca.crt")
            async with Mesh(old, Authority(), mesh.port).channel() as stranger:
                await refused(stranger)
            with pytest.raises((urllib.error.URLError, OSError)):
                await asyncio.to_thread(fetch, page.port, client_ssl_context(TlsFiles.of(old, CALLER), SERVER))


# --- HTTPS


def fetch(port: int, context: ssl.SSLContext) -> bytes:
    with urllib.request.urlopen(f"https://127.0.0.1:{port}/", context=context, timeout=TIMEOUT_S) as response:
        return response.read()


async def test_https_shows_the_new_certificate_to_new_connections(mesh: Mesh) -> None:
    with HttpServer("127.0.0.1:0", {}, tls=mesh.files(SERVER)) as server:
        assert await mesh.shown_serial(server.port) == read_material(mesh.files(SERVER)).serial_number
        serial = mesh.issue(SERVER)
        assert await mesh.shown_serial(server.port) == serial


async def test_another_service_does_not_impersonate_an_https_server(mesh: Mesh) -> None:
    """By its name in the certificate, for members share the address."""
    mesh.issue("gateway")
    with HttpServer("127.0.0.1:0", {"/": lambda: ("text/plain", b"keys")}, tls=mesh.files(SERVER)) as server:
        assert await asyncio.to_thread(fetch, server.port, client_ssl_context(mesh.files(CALLER), SERVER)) == b"keys"
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(fetch, server.port, client_ssl_context(mesh.files(CALLER), "gateway"))


# --- Envoy


async def test_the_edge_follows_a_new_authority_without_a_failed_request(tmp_path: Path) -> None:
    """Through a real Envoy and servers of every service: requests and new TLS connections all the time."""
    directory, authority_dir, envoy_dir = (tmp_path / name for name in ("certificates", "authority", "envoy"))
    for made in (directory, authority_dir, envoy_dir):
        made.mkdir()
    rotate(directory, authority_dir)
    async with canned_mesh(directory) as mesh, mesh.edge(envoy_dir) as edge, httpx.AsyncClient(base_url=edge.admin_url) as admin:
        assert (await edge.http.get("/v1/models", headers=edge.bearer)).status_code == 200
        rotating = asyncio.create_task(asyncio.to_thread(rotate, directory, authority_dir, True, settle_s=1.0))
        requests = 0
        while not rotating.done():
            assert (await edge.http.get("/v1/models", headers=edge.bearer)).status_code == 200
            await asyncio.to_thread(edge_serial, directory, edge.tls_port)
            requests += 1
        await rotating
        assert requests > 5
        expected = {serial_of(directory, name) for name in ("ca", "envoy", "edge")}
        async with asyncio.timeout(TIMEOUT_S):
            while expected != await loaded_serials(admin):  # noqa: ASYNC110  # Envoy tells nobody that it has read a file
                await asyncio.sleep(0.05)
        assert edge_serial(directory, edge.tls_port) == serial_of(directory, "edge")
        assert (await edge.http.get("/v1/models", headers=edge.bearer)).status_code == 200


def serial_of(directory: Path, name: str) -> int:
    return x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes()).serial_number


def edge_serial(directory: Path, port: int) -> int:
    """Serial number of the certificate that the public port shows; a client with the newest bundle has to accept it."""
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"").serial_number


async def loaded_serials(admin: httpx.AsyncClient) -> set[int]:
    certificates = (await admin.get("/certs")).json()["certificates"]
    return {int(one["serial_number"], 16) for pair in certificates for one in (*pair.get("ca_cert", ()), *pair.get("cert_chain", ()))}
