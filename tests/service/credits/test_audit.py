"""The audit finds whatever does not add up: each balance, counter and record is falsified once, and named."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import app, audit, store
from credit_service.audit import Auditor
from credit_service.ledger import AuditSummary, Discrepancy, ReceiptLine
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2 as pb
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from tests.service.credits.callers import Signer, refused

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import LedgerAdminServiceAsyncStub

HOUR = timedelta(hours=1)
USER, KEY = uuid.UUID(int=1), uuid.UUID(int=2)

ALLOW = (
    "GRANT UPDATE ON credits.entries, credits.grants, credits.clawbacks, credits.lots, credits.reservations TO CURRENT_USER",
    "ALTER TABLE credits.entries DISABLE TRIGGER USER",
    "ALTER TABLE credits.events DISABLE TRIGGER USER",
    "ALTER TABLE credits.grants DISABLE TRIGGER USER",
    "ALTER TABLE credits.clawbacks DISABLE TRIGGER USER",
)
"""What it takes to falsify history; rolled back, as the falsifications are."""

FALSIFIED = {
    "balance differs from entries: available": (
        "UPDATE credits.accounts SET available_millicredits = available_millicredits + 1",
        str(USER),
    ),
    "balance differs from entries: reserved": (
        "UPDATE credits.accounts SET reserved_millicredits = reserved_millicredits + 1",
        str(USER),
    ),
    "reserved balance differs from open holds": (
        "UPDATE credits.accounts SET reserved_millicredits = reserved_millicredits + 1",
        str(USER),
    ),
    "promotional balance differs from what is left of promotional credits": (
        "UPDATE credits.accounts SET promotional_millicredits = promotional_millicredits + 1",
        str(USER),
    ),
    "more versions of a balance than events": ("UPDATE credits.accounts SET version = version + 1", str(USER)),
    "promotional credits differ from entries: available": (
        "UPDATE credits.lots SET available_millicredits = available_millicredits + 1 WHERE reserved_millicredits > 0",
        None,
    ),
    "promotional credits differ from entries: reserved": (
        "UPDATE credits.lots SET reserved_millicredits = reserved_millicredits + 1 WHERE reserved_millicredits > 0",
        None,
    ),
    "promotional part of a hold differs from entries": (
        "UPDATE credits.reservations SET promotional_millicredits = 0 WHERE promotional_millicredits > 0",
        None,
    ),
    "reserved promotional credits differ from open holds": (
        "UPDATE credits.reservations SET state = 'released', settle_time = now() WHERE state = 'held'",
        None,
    ),
    "event does not sum to zero": (
        "UPDATE credits.entries SET amount_millicredits = amount_millicredits - 1 WHERE account = 'revenue'",
        None,
    ),
    "balance after an entry differs from the sum so far": (
        "UPDATE credits.entries SET balance_after_millicredits = balance_after_millicredits + 1 WHERE account = 'reserved'",
        None,
    ),
    "event without entries": ("INSERT INTO credits.events (kind, create_time) VALUES ('lapse', now())", None),
    "captured amount differs from revenue": (
        "UPDATE credits.reservations SET captured_millicredits = captured_millicredits - 1 WHERE state = 'captured'",
        None,
    ),
    "held amount differs from entries": ("UPDATE credits.reservations SET amount_millicredits = amount_millicredits + 1", None),
    "settled reservation without its settling event": (
        "UPDATE credits.reservations SET state = 'released', settle_time = now() WHERE state = 'held'",
        None,
    ),
    "receipt lines differ from what was captured": (
        """UPDATE credits.events SET lines = '[{"description": "x", "quantity": 1, "unit": "", "amount_millicredits": 1}]'
        WHERE kind = 'capture'""",
        None,
    ),
    "credits given or taken back differ from what was recorded": ("UPDATE credits.grants SET amount_millicredits = 1", None),
    "credits given or taken back differ from what was recorded, in whose they are": (
        f"""WITH other AS (INSERT INTO credits.accounts (user_id) VALUES ('{uuid.UUID(int=9)}') RETURNING user_id)
        UPDATE credits.grants SET user_id = other.user_id FROM other""",
        None,
    ),
    "credits given or taken back differ from what was recorded, in what happened": (
        "UPDATE credits.clawbacks SET event_id = (SELECT event_id FROM credits.events WHERE kind = 'capture')",
        None,
    ),
    "credits given or taken back differ from what was recorded, in the answer": (
        "UPDATE credits.grants SET available_after_millicredits = available_after_millicredits + 1",
        None,
    ),
    "credits given or taken back differ from what was recorded, in when they expire": (
        "UPDATE credits.lots SET expire_time = expire_time + interval '1 year'",
        None,
    ),
    "event moves what its kind does not": (
        "UPDATE credits.entries SET account = 'grants' WHERE account = 'revenue'",
        None,
    ),
    "event of a reservation moves another user's credits": (
        f"""WITH other AS (INSERT INTO credits.accounts (user_id) VALUES ('{uuid.UUID(int=9)}') RETURNING user_id)
        UPDATE credits.reservations SET user_id = other.user_id FROM other WHERE state = 'captured'""",
        None,
    ),
    "spending of a ceiling differs from reservations: day": (
        "UPDATE credits.ceilings SET spent_today_millicredits = spent_today_millicredits + 1",
        f"{USER} {KEY}",
    ),
    "spending of a ceiling differs from reservations: month": (
        "UPDATE credits.ceilings SET spent_this_month_millicredits = 0",
        f"{USER} {uuid.UUID(int=0)}",
    ),
    "entry moves promotional credits of another user": (
        f"""WITH other AS (INSERT INTO credits.accounts (user_id) VALUES ('{uuid.UUID(int=9)}') RETURNING user_id)
        UPDATE credits.lots SET user_id = other.user_id FROM other""",
        None,
    ),
}


@pytest_asyncio.fixture(scope="module")
async def books(migrated_database: Callable[[], str], credit_settings: CreditSettings) -> AsyncIterator[AsyncEngine]:
    """A ledger in which a little of everything has happened, in a database of its own."""
    url = await asyncio.to_thread(migrated_database)
    engine = app.create_engine(credit_settings.model_copy(update={"database_url": credit_settings.database_url.__class__(url)}))
    async with transaction(engine) as connection:

        async def give(amount: int, expire_time: datetime | None = None) -> None:
            await store.grant(
                connection,
                actor_id=USER,
                request_id=uuid.uuid4(),
                user_id=USER,
                amount_millicredits=amount,
                reason="test",
                expire_time=expire_time,
            )

        async def hold(amount: int) -> uuid.UUID:
            reservation_id = uuid.uuid4()
            await store.reserve(
                connection,
                reservation_id=reservation_id,
                job_id=reservation_id,
                user_id=USER,
                amount_millicredits=amount,
                ttl=HOUR,
                model="small",
                api_key_id=KEY,
            )
            return reservation_id

        for api_key_id in (None, KEY):
            await store.set_ceiling(connection, user_id=USER, api_key_id=api_key_id, daily_millicredits=10_000, monthly_millicredits=10_000)
        await give(1_000)
        for days in (1, 2):
            await give(100, datetime.now(UTC) + timedelta(days=days))
        line = ReceiptLine("small", 3, "step", 130)
        await store.capture(connection, reservation_id=await hold(150), amount_millicredits=130, lines=[line])
        await store.release(connection, reservation_id=await hold(10))
        await hold(100)
        await store.clawback(connection, actor_id=USER, request_id=uuid.uuid4(), user_id=USER, amount_millicredits=5, reason="test")
    yield engine
    await engine.dispose()


async def findings(engine: AsyncEngine) -> tuple[list[Discrepancy], AuditSummary]:
    with Auditor(engine).audit() as audited:
        *found, summary = [finding async for finding in audited]
    assert isinstance(summary, AuditSummary)
    return [finding for finding in found if isinstance(finding, Discrepancy)], summary


async def test_sound_books_have_a_trial_balance_of_zero(books: AsyncEngine):
    found, summary = await findings(books)
    assert found == []
    assert (summary.discrepancy_count, summary.account_count, summary.reservation_count) == (0, 1, 3)
    assert sum(summary.totals.values()) == 0
    assert summary.totals == {"available": 965, "reserved": 100, "revenue": 130, "grants": -1195}
    assert summary.event_count == 9


@pytest.mark.parametrize("problem", FALSIFIED)
async def test_what_was_falsified_is_found(books: AsyncEngine, problem: str):
    falsify, subject = FALSIFIED[problem]
    async with books.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        begun = await connection.begin()
        try:
            for allow in ALLOW:
                await connection.execute(sa.text(allow))
            await connection.execute(sa.text(falsify))
            found = [finding async for finding in store.discrepancies(connection)]
        finally:
            await begun.rollback()
    problem = problem.partition(",")[0]
    assert problem in {finding.problem for finding in found}
    if subject is not None:
        assert subject in {finding.subject for finding in found if finding.problem == problem}


async def test_one_audit_at_a_time(books: AsyncEngine):
    auditor = Auditor(books)
    with auditor.audit() as first:
        assert isinstance(await anext(first), AuditSummary)
        with pytest.raises(MeshError) as refusal, auditor.audit():
            pass
        await first.aclose()
    assert (refusal.value.code, refusal.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
    with auditor.audit() as second:
        assert isinstance(await anext(second), AuditSummary)
        await second.aclose()


async def test_an_audit_may_take_longer_than_other_statements(books: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    summary = store.audit_summary

    async def look(connection: store.AsyncConnection, *, discrepancy_count: int) -> AuditSummary:
        seen.append((await connection.execute(sa.text("SHOW statement_timeout"))).scalar_one())
        seen.append((await connection.execute(sa.text("SHOW transaction_isolation"))).scalar_one())
        seen.append((await connection.execute(sa.text("SHOW transaction_read_only"))).scalar_one())
        return await summary(connection, discrepancy_count=discrepancy_count)

    monkeypatch.setattr(audit.store, "audit_summary", look)
    await findings(books)
    assert seen == ["15min", "repeatable read", "on"]


async def test_administrators_audit_by_rpc(admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer):
    call = admin_stub.AuditLedger(pb.AuditLedgerRequest(), metadata=signer.metadata(uuid.uuid4(), "admin"))
    first, *middle, last = [message async for message in call]
    assert first.WhichOneof("finding") is None
    assert middle == []
    assert last.summary.discrepancy_count == 0
    assert sum(int(total.amount_millicredits) for total in last.summary.totals) == 0


async def test_users_do_not_audit(admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer):
    call = admin_stub.AuditLedger(pb.AuditLedgerRequest(), metadata=signer.metadata(uuid.uuid4()))
    refusal = await refused(call.read())  # pyright: ignore[reportArgumentType]
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
