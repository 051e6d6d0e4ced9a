"""credit_service as an internal Python service uses it: generated stubs on pytest-grpc's channel, against the real process.

pytest-grpc's own server is synchronous; here its fixtures get the address of `python -m credit_service serve`, which
fetches its keys, is ready when its health says so, sweeps overdue holds by itself and ends on SIGTERM with exit code 0.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from credit_service import app
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit.telemetry import HttpServer
from servicekit.tls import TlsFiles, channel_credentials, server_name
from tests.gateway_stand_in import stand_in_gateway
from tests.service.credits.callers import Signer, refusal_of

READY_TIMEOUT_S = 30
EVENT_TIMEOUT_S = 30
STOP_TIMEOUT_S = 15


class Process:
    """`credit_service serve`, running. Its log is read to the end, so that it never waits for its reader."""

    def __init__(self, stderr: IO[str]) -> None:
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stderr,), daemon=True).start()

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            print(line, end="")
            if line.startswith("{"):
                self._events.put(json.loads(line))

    def wait_for(self, name: str) -> dict[str, Any]:
        """The next event of this name in the log."""
        while (event := self._events.get(timeout=EVENT_TIMEOUT_S))["event"] != name:
            pass
        return event


@pytest.fixture(scope="module")
def credit_process(migrated_database: Callable[[], str], certificates: Path, signer: Signer) -> Iterator[Process]:
    command = [sys.executable, "-m", "credit_service", "serve"]
    with (
        HttpServer("127.0.0.1:0", {"/jwks": signer.key_set_page}, tls=TlsFiles.of(certificates, "gateway")) as keys,
        stand_in_gateway(certificates) as gateway_address,
    ):
        environment = {
            **os.environ,
            "GENMESH_DATABASE_URL": migrated_database(),
            "GENMESH_CERTIFICATES_DIR": str(certificates),
            "GENMESH_JWKS_URL": f"https://127.0.0.1:{keys.port}/jwks",
            "GENMESH_GATEWAY_ADDRESS": gateway_address,
            "GENMESH_LISTEN_ADDRESS": "127.0.0.1:0",
            "GENMESH_METRICS_ADDRESS": "127.0.0.1:0",
            "GENMESH_HOLD_EXPIRY_INTERVAL_S": "0.05",
            "GENMESH_LOG_LEVEL": "info",
            "GENMESH_LOG_FORMAT": "json",
        }
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                yield Process(process.stderr)
            finally:
                process.terminate()
                assert process.wait(STOP_TIMEOUT_S) == 0


@pytest.fixture(scope="module")
def grpc_addr(credit_process: Process) -> str:
    return f"127.0.0.1:{credit_process.wait_for('server.listening')['port']}"


@pytest.fixture(scope="module")
def grpc_create_channel(grpc_addr: str, certificates: Path) -> Callable[[str], grpc.Channel]:
    """Channels of any member of the mesh."""

    def create(caller: str) -> grpc.Channel:
        credentials = channel_credentials(TlsFiles.of(certificates, caller))
        return grpc.secure_channel(grpc_addr, credentials, [("grpc.ssl_target_name_override", server_name(app.SERVICE))])

    return create


@pytest.fixture(scope="module")
def grpc_channel(grpc_create_channel: Callable[[str], grpc.Channel]) -> Iterator[grpc.Channel]:
    """A channel of jobs_service to a server that is ready."""
    with grpc_create_channel("jobs_service") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its methods are not in its stubs
        watch = health.Watch(
            health_pb2.HealthCheckRequest(service="genmesh.credits.v1.LedgerService"), timeout=READY_TIMEOUT_S, wait_for_ready=True
        )
        assert any(update.status == health_pb2.HealthCheckResponse.SERVING for update in watch)
        watch.cancel()
        yield channel


@pytest.fixture(scope="module")
def grpc_stub_cls() -> type[pb_grpc.LedgerServiceStub]:
    return pb_grpc.LedgerServiceStub


@pytest.fixture(scope="module")
def users(grpc_create_channel: Callable[[str], grpc.Channel]) -> Iterator[grpc.Channel]:
    """The channel that carries the calls of users."""
    with grpc_create_channel("envoy") as channel:
        yield channel


@pytest.fixture
def funded_user(grpc_channel: grpc.Channel, users: grpc.Channel, signer: Signer) -> str:
    """A user with 1,000 millicredits."""
    user_id = str(uuid.uuid4())
    request = pb.GrantCreditsRequest(request_id=str(uuid.uuid4()), user_id=user_id, amount_millicredits=1000, reason="test")
    pb_grpc.LedgerAdminServiceStub(users).GrantCredits(request, metadata=signer.metadata(uuid.uuid4(), "admin"))
    return user_id


def reserve_request(user_id: str, amount_millicredits: int, *, ttl_s: int = 3600) -> pb.ReserveCreditsRequest:
    request = pb.ReserveCreditsRequest(reservation_id=str(uuid.uuid4()), user_id=user_id, amount_millicredits=amount_millicredits)
    request.ttl.FromSeconds(ttl_s)
    return request


def balance(users: grpc.Channel, signer: Signer, user_id: str) -> tuple[int, int]:
    response = pb_grpc.CreditsServiceStub(users).GetBalance(pb.GetBalanceRequest(), metadata=signer.metadata(user_id))
    return response.available_millicredits, response.reserved_millicredits


def test_a_job_is_paid(grpc_stub: pb_grpc.LedgerServiceStub, users: grpc.Channel, signer: Signer, funded_user: str):
    held = grpc_stub.ReserveCredits(reserve_request(funded_user, 400)).reservation
    assert held.state == pb.Reservation.STATE_HELD
    assert balance(users, signer, funded_user) == (600, 400)
    paid = grpc_stub.CaptureReservation(pb.CaptureReservationRequest(reservation_id=held.reservation_id, amount_millicredits=300))
    assert paid.reservation.state == pb.Reservation.STATE_CAPTURED
    assert grpc_stub.GetReservation(pb.GetReservationRequest(reservation_id=held.reservation_id)).reservation == paid.reservation
    assert balance(users, signer, funded_user) == (700, 0)


def test_a_cancelled_job_costs_nothing(grpc_stub: pb_grpc.LedgerServiceStub, users: grpc.Channel, signer: Signer, funded_user: str):
    held = grpc_stub.ReserveCredits(reserve_request(funded_user, 400)).reservation
    grpc_stub.ReleaseReservation(pb.ReleaseReservationRequest(reservation_id=held.reservation_id))
    assert balance(users, signer, funded_user) == (1000, 0)


def test_a_job_beyond_the_balance_is_refused_with_what_is_missing(grpc_stub: pb_grpc.LedgerServiceStub, funded_user: str):
    with pytest.raises(grpc.RpcError) as raised:
        grpc_stub.ReserveCredits(reserve_request(funded_user, 1001))
    refusal = refusal_of(raised.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_CREDITS")
    assert refusal.metadata == {"required_millicredits": "1001", "available_millicredits": "1000"}


def test_a_hold_that_nobody_settles_comes_back_by_itself(
    grpc_stub: pb_grpc.LedgerServiceStub, credit_process: Process, users: grpc.Channel, signer: Signer, funded_user: str
):
    held = grpc_stub.ReserveCredits(reserve_request(funded_user, 400, ttl_s=1)).reservation
    assert credit_process.wait_for("holds.expired")["count"] == 1
    assert balance(users, signer, funded_user) == (1000, 0)
    shown = grpc_stub.GetReservation(pb.GetReservationRequest(reservation_id=held.reservation_id))
    assert shown.reservation.state == pb.Reservation.STATE_EXPIRED


def test_stubs_of_other_services_are_refused(
    grpc_create_channel: Callable[[str], grpc.Channel], grpc_channel: grpc.Channel, funded_user: str
):
    with grpc_create_channel("inference_service") as channel, pytest.raises(grpc.RpcError) as raised:
        pb_grpc.LedgerServiceStub(channel).ReserveCredits(reserve_request(funded_user, 1))
    assert refusal_of(raised.value).code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("role", ["serve", "migrate"])
def test_missing_settings_say_which_variable_and_end_with_78(role: str):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GENMESH_")}
    ended = subprocess.run([sys.executable, "-m", "credit_service", role], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 78
    assert "GENMESH_DATABASE_URL" in ended.stderr
