"""What the audit trail says of privileged acts on the ledger."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import app, store
from credit_service.balances import BalanceFeed
from credit_service.ledger import Discrepancy
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit.audit import AuditEntry
from servicekit.client import mesh_channel
from servicekit.doorkeeper import Doorkeeper
from tests.service.credits.callers import Signer, refused

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import CreditsServiceAsyncStub, LedgerAdminServiceAsyncStub


class MemoryTrail:
    """Keeps how acts ended."""

    def __init__(self) -> None:
        self.finished: list[AuditEntry] = []

    async def begin(self, entry: AuditEntry) -> None:
        """See AuditTrail."""

    async def finish(self, entry: AuditEntry) -> None:
        """See AuditTrail."""
        self.finished.append(replace(entry, details=dict(entry.details)))

    def only(self) -> AuditEntry:
        """The one act since the last time."""
        [entry] = self.finished
        self.finished.clear()
        return entry


class Ledger:
    """The server's stubs and its trail."""

    def __init__(self, admin: "LedgerAdminServiceAsyncStub", users: "CreditsServiceAsyncStub", trail: MemoryTrail) -> None:
        self.admin, self.users, self.trail = admin, users, trail


@pytest_asyncio.fixture
async def ledger(credit_settings: CreditSettings, engine: AsyncEngine, feed: BalanceFeed, signer: Signer) -> AsyncIterator[Ledger]:
    trail = MemoryTrail()
    deps = app.Dependencies(engine, Doorkeeper(signer, audit=trail), feed)
    async with (
        app.build_server(credit_settings, deps).running(*app.GRPC_SERVICES) as server,
        mesh_channel(credit_settings, f"127.0.0.1:{server.port}", caller="envoy", service=app.SERVICE) as channel,
    ):
        yield Ledger(pb_grpc.LedgerAdminServiceStub(channel), pb_grpc.CreditsServiceStub(channel), trail)


async def test_what_was_given_and_taken_back(ledger: Ledger, signer: Signer, user_id: uuid.UUID):
    admin = signer.metadata(uuid.uuid4(), "admin")
    expire_time = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    grant = pb.GrantCreditsRequest(request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=500, reason="sorry")
    await ledger.admin.GrantCredits(grant, metadata=admin)
    entry = ledger.trail.only()
    assert (entry.subject, entry.code, entry.details) == (str(user_id), 0, {"amount_millicredits": "500", "reason": "sorry"})

    promotion = pb.GrantCreditsRequest(request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=7, reason="welcome")
    promotion.expire_time.FromDatetime(expire_time)
    await ledger.admin.GrantCredits(promotion, metadata=admin)
    details = {"amount_millicredits": "7", "reason": "welcome", "expire_time": expire_time.isoformat()}
    assert ledger.trail.only().details == details

    clawback = pb.ClawbackCreditsRequest(request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=9_000, reason="fraud")
    await refused(ledger.admin.ClawbackCredits(clawback, metadata=admin))  # what was tried is said too
    entry = ledger.trail.only()
    assert (entry.reason, entry.details) == (
        "ERROR_REASON_INSUFFICIENT_CREDITS",
        {"amount_millicredits": "9000", "reason": "fraud"},
    )


async def test_how_spending_was_bounded(ledger: Ledger, signer: Signer, user_id: uuid.UUID):
    admin, user, key = signer.metadata(uuid.uuid4(), "admin"), signer.metadata(user_id), str(uuid.uuid4())
    await ledger.admin.SetUserCeiling(pb.SetUserCeilingRequest(user_id=str(user_id), daily_millicredits=0), metadata=admin)
    entry = ledger.trail.only()
    assert (entry.subject, entry.details) == (str(user_id), {"daily_millicredits": "0"})
    await ledger.admin.SetUserCeiling(pb.SetUserCeilingRequest(user_id=str(user_id), lift=True), metadata=admin)
    assert ledger.trail.only().details == {"lift": "true"}
    bounds = pb.SetKeyCeilingRequest(api_key_id=key, daily_millicredits=1, monthly_millicredits=2)
    await ledger.users.SetKeyCeiling(bounds, metadata=user)
    entry = ledger.trail.only()
    assert (entry.subject, entry.details) == (key, {"daily_millicredits": "1", "monthly_millicredits": "2"})
    await ledger.users.SetKeyCeiling(pb.SetKeyCeilingRequest(api_key_id=key, lift=True), metadata=user)
    assert ledger.trail.only().details == {"lift": "true"}


@pytest.mark.parametrize("count", [0, 2])
async def test_how_many_problems_an_audit_found(ledger: Ledger, signer: Signer, monkeypatch: pytest.MonkeyPatch, count: int):
    async def discrepancies(_connection: store.AsyncConnection) -> AsyncIterator[Discrepancy]:
        for number in range(count):
            yield Discrepancy(problem="does not add up", subject=str(number), expected="0", actual="1")

    monkeypatch.setattr(store, "discrepancies", discrepancies)
    call = ledger.admin.AuditLedger(pb.AuditLedgerRequest(), metadata=signer.metadata(uuid.uuid4(), "admin"))
    *_, last = [message async for message in call]
    assert last.summary.discrepancy_count == count
    assert ledger.trail.only().details == {"discrepancy_count": str(count)}
