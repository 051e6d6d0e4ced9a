"""The audit: everything that the books say, recomputed from the entries."""

from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager

import grpc
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import store
from credit_service.ledger import AuditSummary, Discrepancy
from servicekit.database import snapshot
from servicekit.errors import MeshError, Reason

AUDIT_TIMEOUT_S = 900
"""Longest audit: it reads every entry, in one statement where other operations take one row."""
RETRY_AFTER_S = 30.0


class Auditor:
    """Audits, one at a time: each keeps a connection and a snapshot of the database for as long as it takes."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._running = False

    @contextmanager
    def audit(self) -> Generator[AsyncGenerator[Discrepancy | AuditSummary]]:
        """The findings of an audit: each discrepancy as it is found, then the summary.

        Raises RESOURCE_EXHAUSTED (LIMIT_REACHED) while another audit runs here.
        """
        if self._running:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.ERROR_REASON_LIMIT_REACHED,
                "an audit is under way; try again when it has ended",
                retry_after_s=RETRY_AFTER_S,
            )
        self._running = True
        try:
            yield self._findings()
        finally:
            self._running = False

    async def _findings(self) -> AsyncGenerator[Discrepancy | AuditSummary]:
        # All that is compared has to be seen at one moment, or credits that move meanwhile look lost.
        async with snapshot(self._engine) as connection:
            for timeout in ("statement_timeout", "idle_in_transaction_session_timeout"):  # who reads the findings may be slow
                await connection.execute(sa.text(f"SET LOCAL {timeout} = '{AUDIT_TIMEOUT_S}s'"))
            count = 0
            async for discrepancy in store.discrepancies(connection):
                count += 1
                yield discrepancy
            yield await store.audit_summary(connection, discrepancy_count=count)
