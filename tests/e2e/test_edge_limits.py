"""Limits at the door, each exceeded on purpose against a real Envoy: rates, connections, streams, headers, bodies, malformed framing.

Refusals say the same on gRPC, grpc-web and JSON, and tell when to come back.
"""

import asyncio
import json
import socket
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from h2.events import RemoteSettingsChanged, ResponseReceived, StreamReset
from h2.settings import SettingCodes

from tests.canned_mesh import (
    API_KEY,
    GET_JOB,
    GRPC_WEB,
    H2,
    JOB_ID,
    CannedMesh,
    Edge,
    canned_mesh,
    frame,
    refusal_of_grpc,
    refusal_of_grpc_web,
    refusal_of_rest,
    refusals,
    trailers,
)

DEADLINE_S = 60.0
POLL_S = 0.05
LIMIT_REACHED = (8, "ERROR_REASON_LIMIT_REACHED", 1.0)
ONE_A_SECOND = {"edge_requests_per_s_ip": 1, "edge_burst_ip": 8}


@pytest_asyncio.fixture(scope="module")
async def mesh(certificates: Path) -> AsyncIterator[CannedMesh]:
    async with canned_mesh(certificates) as running:
        yield running


@asynccontextmanager
async def _edge(mesh: CannedMesh, directory: Path, **changes: Any) -> AsyncGenerator[Edge]:
    mesh.backend.seen.clear()
    mesh.backend.checks.clear()
    async with mesh.edge(directory, **changes) as edge:
        yield edge


# --- rates -------------------------------------------------------------------------------------------------------------------


async def _status(edge: Edge, headers: Mapping[str, str]) -> int:
    return (await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=dict(headers))).status_code


async def _empty_bucket(edge: Edge, headers: Mapping[str, str], burst: int) -> None:
    """Send at once what a bucket holds, and more: a few are refused."""
    # More than the bucket can have been filled up with meanwhile, however slow the machine.
    statuses = await asyncio.gather(*(_status(edge, headers) for _ in range(10 * burst)))
    # All of them, where the bucket was empty already.
    assert 429 in statuses
    assert set(statuses) <= {200, 429}


async def _refused_everywhere(edge: Edge, headers: Mapping[str, str], burst: int, limit: str) -> None:
    """On an empty bucket every transport is refused alike. It fills up by and by: asked again until all three were refused."""
    missing = {"grpc", "grpc-web", "rest"}
    async with asyncio.timeout(DEADLINE_S):
        while missing:
            await _empty_bucket(edge, headers, burst)
            for transport, refusal in (await _attempts(edge, headers)).items():
                if refusal is not None:
                    assert (refusal.code, refusal.reason, refusal.retry_after_s) == LIMIT_REACHED, transport
                    assert refusal.http_status == (429 if transport == "rest" else None)
                    assert (refusal.metadata, [subject for subject, _ in refusal.quota]) == ({"limit": limit}, [limit])
                    missing.discard(transport)


async def _attempts(edge: Edge, headers: Mapping[str, str]) -> dict[str, Any]:
    """The same request over every transport; None where it was answered."""
    web = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob", content=frame(GET_JOB.SerializeToString()), headers={**GRPC_WEB, **headers}
    )
    rest = await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=dict(headers))
    try:
        await edge.jobs.GetJob(GET_JOB, metadata=tuple(headers.items()))
        over_grpc = None
    except grpc.aio.AioRpcError as error:
        over_grpc = refusal_of_grpc(error)
    return {
        "grpc": over_grpc,
        "grpc-web": None if trailers(web.content).get("grpc-status") == "0" else refusal_of_grpc_web(web),
        "rest": None if rest.status_code == 200 else refusal_of_rest(rest),
    }


async def _admitted(edge: Edge, headers: Mapping[str, str]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await _status(edge, headers) == 429:  # noqa: ASYNC110  # time is what fills a bucket
            await asyncio.sleep(POLL_S)


async def test_an_address_has_its_rate(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path, **ONE_A_SECOND) as edge:
        await _refused_everywhere(edge, edge.bearer, burst=8, limit="edge.address")
        # A bucket fills again.
        await _admitted(edge, edge.bearer)


async def test_the_rate_of_an_address_comes_before_questions_to_the_gateway(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path, **ONE_A_SECOND) as edge:
        statuses = await asyncio.gather(*(_status(edge, {"x-api-key": "gmk_guess"}) for _ in range(80)))
        assert set(statuses) == {401, 429}
        assert len(edge.backend.checks) == statuses.count(401) < 80


async def test_behind_a_load_balancer_each_client_has_a_bucket(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path, trusted_hops=1, **ONE_A_SECOND) as edge:

        def of(address: str) -> dict[str, str]:
            # What a client claims stands before what the load balancer adds.
            return edge.bearer | {"x-forwarded-for": f"{uuid.uuid4().int % 250}.1.1.1, {address}"}

        await _empty_bucket(edge, of("203.0.113.7"), burst=8)
        assert await _status(edge, of("203.0.113.8")) == 200
        assert edge.backend.seen[-1]["x-client-address"] == "203.0.113.8"
        # Whoever has one address of a /64 has them all.
        statuses = await asyncio.gather(*(_status(edge, of(f"2001:db8::{number:x}")) for number in range(1, 81)))
        assert {429} < set(statuses)
        assert await _status(edge, of("2001:db8:1::1")) == 200


async def test_without_a_load_balancer_nobody_chooses_an_address(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path, **ONE_A_SECOND) as edge:
        statuses = await asyncio.gather(*(_status(edge, edge.bearer | {"x-forwarded-for": f"203.0.113.{number}"}) for number in range(80)))
        assert set(statuses) == {200, 429}


async def test_health_is_told_however_many_requests_an_address_sends(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path, **ONE_A_SECOND) as edge:
        # More than the bucket holds, before and after it is empty.
        for _ in range(2):
            probes = await asyncio.gather(*(edge.http.get("/healthz") for _ in range(80)))
            assert {probe.status_code for probe in probes} == {200}
            await _empty_bucket(edge, edge.bearer, burst=8)


async def test_a_user_has_a_rate_wherever_the_requests_come_from(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path, edge_requests_per_s_user=1, edge_burst_user=8) as edge:
        await _refused_everywhere(edge, edge.bearer, burst=8, limit="edge.user")
        other = {"authorization": f"Bearer {edge.issuer.token(sub=str(uuid.uuid4()))}"}
        assert await _status(edge, other) == 200
        # The same user by API key has the same bucket.
        await _refused_everywhere(edge, {"x-api-key": API_KEY}, burst=8, limit="edge.user")


async def test_without_limits_nobody_is_refused(mesh: CannedMesh, tmp_path: Path) -> None:
    off = {"edge_requests_per_s_ip": 0, "edge_burst_ip": 1, "edge_requests_per_s_user": 0, "edge_burst_user": 1}
    async with _edge(mesh, tmp_path, **off) as edge:
        assert set(await asyncio.gather(*(_status(edge, edge.bearer) for _ in range(50)))) == {200}


# --- a gateway that is away --------------------------------------------------------------------------------------------------


async def test_without_the_gateway_keys_are_refused_and_tokens_go_on(mesh: CannedMesh, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, but nobody listens
        async with _edge(mesh, tmp_path, gateway_addresses=(f"127.0.0.1:{nobody.getsockname()[1]}",)) as edge:
            for transport, refusal in (await refusals(edge, {"x-api-key": API_KEY})).items():
                assert (refusal.code, refusal.reason, refusal.retry_after_s) == (14, "ERROR_REASON_UNAVAILABLE", 1.0), transport
                assert refusal.http_status == (503 if transport == "rest" else None)
            assert edge.backend.seen == []
            assert await _status(edge, edge.bearer) == 200


async def test_without_keys_of_the_gateway_nobody_is_told_that_a_token_is_wrong(mesh: CannedMesh, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with _edge(mesh, tmp_path, jwks_address=f"127.0.0.1:{nobody.getsockname()[1]}") as edge:
            for transport, refusal in (await refusals(edge, edge.bearer)).items():
                assert (refusal.code, refusal.reason, refusal.retry_after_s) == (14, "ERROR_REASON_UNAVAILABLE", 1.0), transport
                assert refusal.http_status == (503 if transport == "rest" else None)


# --- connections and streams ---------------------------------------------------------------------------------------------------


async def test_connections_are_limited_and_those_that_are_there_stay(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path, edge_connections_max=20) as edge:
        assert await _status(edge, edge.bearer) == 200  # over a connection that stays
        crowd = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in range(40)]
        try:
            async with asyncio.timeout(DEADLINE_S):
                refused = asyncio.as_completed([reader.read(1) for reader, _ in crowd])
                for _ in range(40 - 17):  # 18 of 20 for one port, one of them is ours
                    assert await next(refused) == b""
            assert await _status(edge, edge.bearer) == 200
            # The other port has room left, and so has whoever looks after it all.
            _, writer = await asyncio.open_connection("127.0.0.1", edge.tls_port)
            writer.close()
            async with httpx.AsyncClient(base_url=edge.admin_url) as admin:
                assert (await admin.get("/ready")).status_code == 200
        finally:
            for _, writer in crowd:
                writer.transport.abort()


async def test_streams_of_a_connection_are_limited(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path) as edge, H2.to(edge.port) as client:
        await client.send()
        async for event in client.events():
            if isinstance(event, RemoteSettingsChanged):
                assert event.changed_settings[SettingCodes.MAX_CONCURRENT_STREAMS].new_value == 100
                break
        # A client that does not care: h2 itself would.
        client.connection.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
        client.connection.remote_settings.acknowledge()
        opened = {client.request("/v1/jobs:watch", edge.bearer) for _ in range(100)}
        await client.send()
        async for event in client.events():
            if isinstance(event, ResponseReceived):
                opened.discard(event.stream_id or 0)
            if not opened:
                break
        assert not opened
        client.request("/v1/jobs:watch", edge.bearer)
        await client.send()
        with suppress(ConnectionError):
            async for event in client.events():
                assert not isinstance(event, ResponseReceived)
        assert await _status(edge, edge.bearer) == 200


FRAMES = {
    "ping": b"\0\0\x08\x06\0\0\0\0\0" + b"12345678",
    "settings": b"\0\0\0\x04\0\0\0\0\0",
    "empty data": b"\0\0\0\0\0\0\0\0\x01",
    "priority": b"\0\0\x05\x02\0\0\0\0\x01" + b"\0\0\0\0\x10",
    "window update": b"\0\0\x04\x08\0\0\0\0\0" + b"\0\0\0\x01",
}
FRAMES_AT_ONCE = 10_000
FLOOD_MAX = 300


async def _flood(client: H2, frame: bytes) -> None:
    """Nothing is read meanwhile: what Envoy answers piles up on its side."""
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(FLOOD_MAX):
            await client.send(frame * FRAMES_AT_ONCE)


@pytest.mark.parametrize("kind", FRAMES)
async def test_frames_that_only_cost_close_the_connection(mesh: CannedMesh, tmp_path: Path, kind: str) -> None:
    async with _edge(mesh, tmp_path) as edge, H2.to(edge.port) as client:
        grpc_headers = {"content-type": "application/grpc", "te": "trailers"}
        client.request("/genmesh.jobs.v1.JobsService/GetJob", edge.bearer | grpc_headers, method="POST", end_stream=False)
        await client.send()
        with pytest.raises(ConnectionError):
            await _flood(client, FRAMES[kind])
        assert await _status(edge, edge.bearer) == 200


async def test_requests_that_are_taken_back_at_once_close_the_connection(mesh: CannedMesh, tmp_path: Path) -> None:
    """Rapid reset (CVE-2023-44487)."""
    async with _edge(mesh, tmp_path) as edge, H2.to(edge.port) as client:
        await client.send()
        for _ in range(1000):
            client.connection.reset_stream(client.request("/v1/me", {}))
        await client.send()
        with suppress(ConnectionError):
            async for _ in client.events():
                pass
        assert await _status(edge, edge.bearer) == 200


# --- sizes and shapes ----------------------------------------------------------------------------------------------------------


async def test_headers_are_limited_in_number_and_size(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path) as edge:
        many = {f"x-number-{number}": "x" for number in range(101)}
        assert await _status(edge, edge.bearer | many) == 431
        assert await _status(edge, edge.bearer | {"x-long": "x" * 40_000}) == 431
        async with H2.to(edge.port) as client:
            client.request("/v1/me", many)
            await client.send()
            async for event in client.events():
                if isinstance(event, ResponseReceived | StreamReset):
                    break
            else:
                raise AssertionError("neither answered nor reset")
            if isinstance(event, ResponseReceived):
                assert dict(event.headers or ()).get(b":status") == b"431"
        assert edge.backend.seen == []


async def test_bodies_of_rest_are_limited(mesh: CannedMesh, tmp_path: Path) -> None:
    async with _edge(mesh, tmp_path) as edge:
        body = json.dumps({"requestId": "x" * 3_000_000})
        refusal = refusal_of_rest(await edge.http.post("/v1/jobs", content=body, headers=edge.bearer))
        assert (refusal.http_status, refusal.code, refusal.reason) == (413, 8, "ERROR_REASON_REQUEST_TOO_LARGE")


SMUGGLED = "POST /v1/jobs HTTP/1.1\r\nhost: edge\r\n{headers}\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nhost: edge\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        "content-length: 5\r\ntransfer-encoding: chunked",
        "content-length: 5\r\ncontent-length: 6",
        "transfer-encoding: chunked, identity",
        "transfer-encoding: xchunked",
        "content-length: +5",
        "x-nul: a\0b\r\ncontent-length: 5",
        "bad name: x\r\ncontent-length: 5",
        "transfer_encoding: chunked\r\ncontent-length: 5",
    ],
)
async def test_a_request_that_two_servers_could_read_differently_is_refused(mesh: CannedMesh, tmp_path: Path, headers: str) -> None:
    async with _edge(mesh, tmp_path) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(SMUGGLED.format(headers=headers).encode())
        async with asyncio.timeout(DEADLINE_S):
            status = (await reader.readline()).split()[1]
        writer.transport.abort()
        assert status in (b"400", b"501")


@pytest.mark.parametrize(
    "request_line", ["GET /healthz HTTP/1.0", "GET /healthz HTTP/3.7", "GET /healthz", "GET http:// HTTP/1.1", "G\0T / HTTP/1.1"]
)
async def test_old_and_odd_request_lines_are_refused(mesh: CannedMesh, tmp_path: Path, request_line: str) -> None:
    async with _edge(mesh, tmp_path) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(f"{request_line}\r\nhost: edge\r\nconnection: close\r\n\r\n".encode())
        async with asyncio.timeout(DEADLINE_S):
            answer = await reader.read()
        writer.transport.abort()
        assert b" 200 " not in answer.partition(b"\r\n")[0]
