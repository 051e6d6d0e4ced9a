"""What is internal stays so: unreachable through the edge by any path and transport, and closed to strangers on the inside."""

import asyncio
import itertools
import re
import ssl
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cli.stack.certificates import ensure_certificates
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from servicekit.client import mesh_channel
from servicekit.settings import MeshSettings
from servicekit.tls import TlsFiles, channel_credentials, server_name
from tests.e2e.caller import DEADLINE_S, GRPC_WEB, Edge, User, answered_too_early, bearer, frame, image, refusal_of

SERVERS = {"gateway": "gateway", "jobs": "jobs_service", "credits": "credit_service", "inference-0": "inference_service"}
"""Name of the process → whose certificate it has."""
ID = str(uuid.uuid4())
INTERNAL = {
    "/genmesh.credits.v1.LedgerService/ReserveCredits": credits_pb2.ReserveCreditsRequest(
        reservation_id=ID, user_id=ID, amount_millicredits=1
    ).SerializeToString(),
    "/genmesh.credits.v1.LedgerService/CaptureReservation": credits_pb2.CaptureReservationRequest(
        reservation_id=ID, amount_millicredits=1
    ).SerializeToString(),
    "/genmesh.credits.v1.LedgerService/ReleaseReservation": b"",
    "/genmesh.credits.v1.LedgerService/GetReservation": b"",
    "/genmesh.inference.v1.InferenceService/Generate": b"",
    "/genmesh.inference.v1.InferenceService/LoadModel": b"",
    "/genmesh.inference.v1.InferenceService/UnloadModel": b"",
    "/grpc.health.v1.Health/Check": b"",
    "/grpc.health.v1.Health/Watch": b"",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": b"",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": b"",
}
ADMIN = [
    "/stats",
    "/config_dump",
    "/clusters",
    "/server_info",
    "/ready",
    "/logging",
    "/certs",
    "/stats/prometheus",
    "/quitquitquit",
    "/metrics",
]
TRICKS = [
    "{path}",
    "/{path}",
    "//edge{path}",
    "{path}/",
    "{path}.",
    "{path}?x=y",
    "{path}%00",
    "{path};x",
    "/.{path}",
    "/v1{path}",
    "/v1/..{path}",
    "/v1/%2e%2e{path}",
    "/v1/jobs/..%2f..{path}",
    "/v1/models/../..{path}",
    "/healthz/..{path}",
    "{escaped}",
    "{backslashed}",
    "{upper}",
    "{lower}",
    "http://credit-service.genmesh.internal{path}",
]
# INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED, INTERNAL (what a malformed HTTP request is to gRPC), UNAUTHENTICATED
REFUSALS = {"3", "5", "12", "13", "16"}
CONTENT_TYPES = ("application/grpc", "application/grpc-web+proto", "application/json")


async def exchange(
    edge: Edge, method: str, target: str, headers: Mapping[str, str], body: bytes = b""
) -> tuple[int, dict[str, str], bytes]:
    """One HTTP/1.1 exchange with the request target exactly as given: clients would tidy it up."""
    host, port = edge.stack.edge_address.split(":")
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = {"host": "edge", "content-length": str(len(body)), "connection": "close", **headers}
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        writer.write(head.encode() + b"\r\n" + body)
        # No further than the answer goes: Envoy leaves the connection open for a while, then resets it if it did not read all of the body.
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        answer = {key.lower(): value.strip() for key, _, value in (field.partition(":") for field in fields)}
        length = answer.get("content-length")
        rest = await reader.readexactly(int(length)) if length is not None else await reader.read()
        writer.close()
        await writer.wait_closed()
    return int(status.split()[1]), answer, rest


async def served(edge: Edge) -> dict[str, float]:
    """How many calls of internal methods each service has seen, refused ones included, by method and code."""
    counts: dict[str, float] = {}
    async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
        for process in SERVERS:
            page = (await client.get(f"http://{edge.stack.process(process).metrics_address}/metrics")).text
            for labels, value in re.findall(r"^genmesh_rpc_duration_seconds_count\{(.*)\} (.*)$", page, re.MULTILINE):
                if any(f'"{path}"' in labels for path in INTERNAL):
                    counts[f"{process} {labels}"] = float(value)
    return counts


@pytest.mark.parametrize("path", INTERNAL)
async def test_internal_methods_are_not_reached(edge: Edge, alice: User, admin: User, path: str) -> None:
    before = await served(edge)

    async def attempt(content_type: str, trick: str, method: str, user: User) -> None:
        target = trick.format(
            path=path, escaped=path.replace("/", "%2f"), backslashed=path.replace("/", "\\"), upper=path.upper(), lower=path.lower()
        )
        body = b"{}" if content_type == "application/json" else frame(INTERNAL[path])
        headers = {"content-type": content_type, "te": "trailers", **bearer(user.token)}
        status, answer, rest = await exchange(edge, method, target, headers, body)
        _, found, trailer = rest.partition(b"grpc-status:")
        code = answer.get("grpc-status") or (trailer.split(b"\r\n")[0].decode().strip() if found else "")
        assert status in (400, 401, 404) or (status == 200 and code in REFUSALS), (method, target, content_type, status, answer, rest)

    for user in (alice, admin):
        await asyncio.gather(*(attempt(*one, user) for one in itertools.product(CONTENT_TYPES, TRICKS, ("POST", "GET"))))
    grown = {key for key, value in (await served(edge)).items() if value != before.get(key, 0)}
    # Only what goes on inside anyway, and went well: a call from outside would have been refused by the service.
    assert not [key for key in grown if 'code="OK"' not in key]


async def test_internal_services_by_stub(edge: Edge, admin: User) -> None:
    metadata = tuple(bearer(admin.token).items())
    channel: Any = edge.channel
    health: Any = health_pb2_grpc.HealthStub(channel)
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    ledger: Any = credits_pb2_grpc.LedgerServiceStub(channel)
    inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    calls: list[Callable[[], Any]] = [
        lambda: ledger.GetReservation(credits_pb2.GetReservationRequest(reservation_id=ID), metadata=metadata),
        lambda: inference.LoadModel(inference_pb2.LoadModelRequest(model_id="emoji-diffusion"), metadata=metadata),
        lambda: health.Check(health_pb2.HealthCheckRequest(), metadata=metadata),
        lambda: reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata).read(),
        lambda: inference.Generate(inference_pb2.GenerateRequest(job_id=ID, attempt=1, spec=image()), metadata=metadata).read(),
    ]
    for call in calls:
        while True:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call()
            if not answered_too_early(raised.value):
                break
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("path", INTERNAL)
async def test_internal_methods_have_no_rest_path(edge: Edge, admin: User, path: str) -> None:
    for method, content_type in (("POST", "application/json"), ("GET", "application/json"), ("POST", "application/grpc-web+proto")):
        reply = await edge.http.request(method, path, headers={**GRPC_WEB, "content-type": content_type, **bearer(admin.token)})
        assert reply.status_code == 404 or reply.headers["grpc-status"] in REFUSALS


async def test_envoys_own_door_is_not_the_edge(edge: Edge, admin: User) -> None:
    own = edge.stack.edge_url

    async def attempt(path: str, form: str, method: str, token: str) -> None:
        target = form.format(path=path, edge=own)
        status, _, body = await exchange(edge, method, target, bearer(token))
        assert status in (400, 401, 404), (method, target, status, body[:200])

    forms = ("{path}", "/{path}", "/v1/..{path}", "/healthz/..{path}", "{edge}{path}", "http://admin{path}")
    await asyncio.gather(*(attempt(*one) for one in itertools.product(ADMIN, forms, ("GET", "POST"), (admin.token, ""))))
    assert edge.stack.process("envoy").is_well


# --- the inside ------------------------------------------------------------------------------------------------------


async def talk(address: str, context: ssl.SSLContext | None) -> bytes:
    """The first byte that a server answers to the beginning of an HTTP/2 connection; none when it refuses the peer."""
    host, port = address.split(":")
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            await writer.drain()
            return await reader.read(1)
        except (ssl.SSLError, ConnectionError):  # with TLS 1.3 a client hears only after the handshake that its certificate is missed
            return b""
        finally:
            writer.transport.abort()


def context_of(edge: Edge, files: TlsFiles | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(edge.stack.certificates_dir / "ca.crt"))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


@pytest.mark.parametrize("process", SERVERS)
async def test_services_want_a_certificate_of_the_mesh(edge: Edge, process: str, tmp_path: Path) -> None:
    ensure_certificates(tmp_path, tmp_path)  # a stranger with an authority of its own
    address = edge.stack.addresses[process]
    strangers = {"without": None, "of another authority": TlsFiles.of(tmp_path, "jobs_service")}
    for files in strangers.values():
        assert await talk(address, context_of(edge, files)) == b"", "not one byte"
    assert await talk(address, None) == b""
    # The same with a certificate of the mesh is answered: it is the certificate that made the difference.
    assert await talk(address, context_of(edge, TlsFiles.of(edge.stack.certificates_dir, "cli")))


@pytest.mark.parametrize("process", SERVERS)
async def test_stubs_without_a_certificate_do_not_connect(edge: Edge, process: str) -> None:
    credentials = grpc.ssl_channel_credentials((edge.stack.certificates_dir / "ca.crt").read_bytes())
    options = [("grpc.ssl_target_name_override", server_name(SERVERS[process])), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(edge.stack.addresses[process], credentials, options=options) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def inside(edge: Edge, caller: str, process: str) -> grpc.aio.Channel:
    settings = MeshSettings(certificates_dir=edge.stack.certificates_dir)  # pyright: ignore[reportCallIssue]
    return mesh_channel(settings, edge.stack.addresses[process], caller=caller, service=SERVERS[process])


@pytest.mark.parametrize("caller", ["envoy", "cli", "gateway", "inference_service", "credit_service"])
async def test_methods_of_services_are_for_jobs_service_alone(edge: Edge, admin: User, caller: str) -> None:
    for path, request in INTERNAL.items():
        if not path.startswith("/genmesh."):
            continue
        process = "credits" if "Ledger" in path else "inference-0"
        async with inside(edge, caller, process) as channel:
            for headers in ({}, bearer(admin.token)):
                options: dict[str, Any] = {"metadata": tuple(headers.items()), "timeout": DEADLINE_S}
                streams = path.endswith("/Generate")
                call = channel.unary_stream(path)(request, **options).read() if streams else channel.unary_unary(path)(request, **options)
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
                refusal = refusal_of(raised.value)
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"), path


async def test_jobs_service_sees_the_reservation_of_a_job(edge: Edge, alice: User) -> None:
    job = await alice.finished((await alice.submit(image(steps=1))).job_id)
    async with inside(edge, "jobs_service", "credits") as channel:
        stub = credits_pb2_grpc.LedgerServiceStub(channel)
        found = (await stub.GetReservation(credits_pb2.GetReservationRequest(reservation_id=job.job_id), timeout=DEADLINE_S)).reservation
    assert (found.user_id, found.state) == (alice.user_id, credits_pb2.Reservation.STATE_CAPTURED)
    assert found.amount_millicredits == found.captured_millicredits == job.cost_millicredits


async def test_a_service_is_not_mistaken_for_another(edge: Edge) -> None:
    """A certificate of the mesh is good for its own name only."""
    credentials = channel_credentials(TlsFiles.of(edge.stack.certificates_dir, "jobs_service"))
    options = [("grpc.ssl_target_name_override", server_name("gateway")), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(edge.stack.addresses["credits"], credentials, options=options) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
