"""Revocations: access tokens that stop working before they expire, as the gateway writes them down and tells the mesh."""

import uuid
from collections.abc import Iterable, Mapping
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import store
from servicekit.database import transaction
from servicekit.errors import invalid
from servicekit.revocations import FORGET_AFTER_S, KINDS, PAGE_SIZE, Fetch, Kind, Revoked

MARGINS: Mapping[Kind, timedelta] = {"session": timedelta(seconds=60), "api_key": timedelta(seconds=60), "user": timedelta(seconds=1)}
"""How much later than the database's now `revoke_time` is. Until the change is committed, tokens are made from what was before; and one
that is made right after a change of its account says it was issued a little later than it was. Sessions and API keys get no tokens
any more, so theirs can be generous."""
SETTLE = timedelta(seconds=60)
"""Transactions end sooner than that: what was written down before can be trusted to be visible."""
KEEP = timedelta(seconds=FORGET_AFTER_S) + 2 * SETTLE
"""How long revocations are kept; no access token lives longer."""
CURSOR_DIGITS_MAX = 18


async def revoke(connection: AsyncConnection, kind: Kind, subject_id: uuid.UUID) -> None:
    """Revoke, from this transaction's commit on, every access token of a session, API key or account that exists by then."""
    await store.insert_revocation(connection, kind=kind, subject_id=subject_id, margin=MARGINS[kind])


def fetch_from(engine: AsyncEngine) -> Fetch:
    """Where the gateway itself reads its revocations: the table. Answers RevocationService too."""

    async def fetch(cursor: str) -> tuple[Iterable[Revoked], str, bool]:
        return await page(engine, cursor=cursor, limit=PAGE_SIZE)

    return fetch


async def page(engine: AsyncEngine, *, cursor: str, limit: int) -> tuple[list[Revoked], str, bool]:
    """Up to `limit` revocations after a cursor, the next cursor, and whether there is more. Raises INVALID_ARGUMENT.

    Ids are given before transactions commit: one may turn up behind others that were listed. So the cursor after the last page goes back
    to where everything is settled, and the newest are listed again.
    """
    if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) <= CURSOR_DIGITS_MAX):
        raise invalid("cursor", "is not a cursor that this list gave")
    async with transaction(engine) as connection:
        # Asked first: what settles while the list is read is listed again, too.
        settled = await store.last_settled_revocation(connection, settle=SETTLE)
        rows = await store.list_revocations(connection, after=int(cursor or 0), limit=limit + 1)
    more = len(rows) > limit
    rows = rows[:limit]
    # A kind that this version does not know, written by a newer one, is not for it.
    revoked = [Revoked(kind, str(row.subject_id), row.revoke_time.timestamp()) for row in rows for kind in KINDS if kind == row.kind]
    return revoked, str(rows[-1].revocation_id if more else settled), more
