"""Monthly credits of plans: which month of a member is due, and the rounds that grant it.

A month counts from the moment the member got the plan, in UTC; its day is clamped where a month is too short (31 January, 28
February, 31 March). Each grant is idempotent in the ledger, so a round that dies is simply done again, by whichever replica is next.
"""

import asyncio
import calendar
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc
import prometheus_client
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import store
from credit_service.prices import PlanPrice, PriceTable
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit import database
from servicekit.client import call_metadata

ROUND = "plan_grants"
PAGE_MEMBERS = 200
LEASE_S = 60.0
"""How long a round is its replica's without a word from it: far more than a page of members takes."""
LOOK_INTERVAL_S = 10.0
"""How often a replica looks whether a round is to be had."""
GRACE = timedelta(days=2)
"""How long credits outlive their month unless the next ones come: nobody is without because a round is late."""
RETRY_MIN_S = 0.5
RETRY_MAX_S = 30.0

GRANTED = prometheus_client.Counter("genmesh_plan_grants_total", "Months of plans whose credits were granted", ["plan"])

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Month:
    """A month of a plan, counted from 0; it ends where the next one starts."""

    number: int
    start_time: datetime
    end_time: datetime


def month_start(plan_start_time: datetime, number: int) -> datetime:
    """When a month of a plan starts."""
    first = plan_start_time.astimezone(UTC)
    years, month = divmod(first.month - 1 + number, 12)
    year = first.year + years
    return first.replace(year=year, month=month + 1, day=min(first.day, calendar.monthrange(year, month + 1)[1]))


def month_at(plan_start_time: datetime, moment: datetime) -> Month | None:
    """The month of a plan that a moment falls into; None for one before the plan."""
    first, now = plan_start_time.astimezone(UTC), moment.astimezone(UTC)
    number = (now.year - first.year) * 12 + now.month - first.month
    if month_start(first, number) > now:
        number -= 1
    return Month(number, month_start(first, number), month_start(first, number + 1)) if number >= 0 else None


def due_month(price: PlanPrice, plan_start_time: datetime, moment: datetime) -> Month | None:
    """The month whose credits a member should have at a moment; None where there are none. Months that were missed are not made up for:
    their credits would have expired."""
    month = month_at(plan_start_time, moment)
    if month is None or price.monthly_grant_millicredits == 0 or (month.number == 0 and price.first_grant == "after_a_month"):
        return None
    return month


@dataclass(frozen=True, slots=True)
class _Due:
    user_id: uuid.UUID
    price: PlanPrice
    month: Month


class PlanGrants:
    """Grants all members what is due, a round every `interval_s`, whatever the number of replicas.

    `changed` is told of every user whose balance a round changed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        gateway: grpc.aio.Channel,
        prices: PriceTable,
        *,
        interval_s: float,
        timeout_s: float,
        changed: Callable[[uuid.UUID], None],
        lease_s: float = LEASE_S,
    ) -> None:
        self._engine = engine
        self._stub: identity_pb2_grpc.MembershipServiceAsyncStub = identity_pb2_grpc.MembershipServiceStub(gateway)  # pyright: ignore[reportAttributeAccessIssue]
        self._prices = {identity_pb2.Plan.Value(plan): price for plan, price in prices.plans.items()}
        self._interval = timedelta(seconds=interval_s)
        self._lease = timedelta(seconds=lease_s)
        self._timeout_s = timeout_s
        self._changed = changed
        self._holder = uuid.uuid4()

    async def run(self) -> None:
        """Rounds, for ever. A gateway or a database that is away is waited for; any other error ends it."""
        retry_s = RETRY_MIN_S
        while True:
            try:
                await self.round()
            except Exception as error:
                # Whatever the gateway answers: that members wait for their credits must not take the ledger down.
                if not isinstance(error, grpc.aio.AioRpcError) and database.translate(error) is None:
                    raise
                _log.warning("plan_grants.failed", error=repr(error), retry_s=retry_s)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
            else:
                retry_s = RETRY_MIN_S
                await asyncio.sleep(min(self._interval.total_seconds(), LOOK_INTERVAL_S))

    async def round(self) -> int | None:
        """Do the round if it is due and nobody else does it; how many grants it took, or None if it was not ours to end.

        Raises what the gateway and the database raise; then this replica has the round for as long as its claim lasts, and may go on.
        """
        granted = 0
        page_token = ""
        # Claimed anew for every page, which prolongs the claim, and gives the members of the page the database's time.
        while (moment := await self._claim()) is not None:
            page = await self._stub.ListMembers(
                identity_pb2.ListMembersRequest(page_size=PAGE_MEMBERS, page_token=page_token),
                timeout=self._timeout_s,
                metadata=call_metadata(),
            )
            granted += await self._grant(page.members, moment)
            page_token = page.next_page_token
            if not page_token:
                async with database.transaction(self._engine) as connection:
                    await store.finish_round(connection, ROUND, holder=self._holder, interval=self._interval)
                if granted:
                    _log.info("plan_grants.round_done", granted=granted)
                return granted
        if page_token:
            _log.warning("plan_grants.round_lost", granted=granted)
        return None

    async def _claim(self) -> datetime | None:
        async with database.transaction(self._engine) as connection:
            return await store.claim_round(connection, ROUND, holder=self._holder, lease=self._lease)

    async def _grant(self, members: Sequence[identity_pb2.Member], moment: datetime) -> int:
        """Grant what is due to the members of a page; how many grants it took."""
        due = [one for member in members if (one := self._due(member, moment)) is not None]
        async with database.transaction(self._engine) as connection:
            # One question a page: in nearly every round nearly everybody has theirs.
            lacking = await store.without_plan_grant(connection, [(one.user_id, one.price.plan, one.month.start_time) for one in due])
        granted = 0
        for one in due:
            if one.user_id not in lacking:
                continue
            async with database.transaction(self._engine) as connection:
                outcome = await store.grant_plan(
                    connection,
                    user_id=one.user_id,
                    plan=one.price.plan,
                    start_time=one.month.start_time,
                    end_time=one.month.end_time,
                    expire_time=one.month.end_time + GRACE,
                    amount_millicredits=one.price.monthly_grant_millicredits,
                )
            if outcome == store.PLAN_GRANTED:
                granted += 1
                GRANTED.labels(one.price.plan).inc()
                self._changed(one.user_id)
            elif outcome != store.PLAN_GRANT_KNOWN:
                _log.error("plan_grants.refused", user_id=str(one.user_id), plan=one.price.plan, outcome=outcome)
        return granted

    def _due(self, member: identity_pb2.Member, moment: datetime) -> _Due | None:
        try:
            user_id = uuid.UUID(member.user_id)
        except ValueError:
            _log.error("plan_grants.member_unreadable", user_id=member.user_id)
            return None
        price = self._prices.get(member.plan)
        if price is None:
            # Of a gateway that is newer than this process: its members get theirs from a process that knows the plan.
            _log.warning("plan_grants.plan_unknown", user_id=member.user_id, plan=member.plan)
            return None
        month = due_month(price, member.plan_start_time.ToDatetime(tzinfo=UTC), moment)
        return None if month is None else _Due(user_id, price, month)
