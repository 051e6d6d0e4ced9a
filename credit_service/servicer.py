"""The RPCs of genmesh.credits.v1: message → ledger → message. No SQL and no rules here."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from uuid import UUID

import structlog
from google.protobuf import timestamp_pb2
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import ledger, store
from credit_service.audit import Auditor
from credit_service.balances import BalanceFeed
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit import audit
from servicekit.database import reading, transaction
from servicekit.errors import invalid
from servicekit.identity import current_principal, current_user_id
from servicekit.interceptors import Context
from servicekit.paging import page_limit

_log = structlog.get_logger(__name__)

_KINDS = {
    ledger.Kind.GRANT: pb.Entry.KIND_GRANT,
    ledger.Kind.RESERVE: pb.Entry.KIND_RESERVE,
    ledger.Kind.CAPTURE: pb.Entry.KIND_CAPTURE,
    ledger.Kind.RELEASE: pb.Entry.KIND_RELEASE,
    ledger.Kind.EXPIRE: pb.Entry.KIND_EXPIRE,
    ledger.Kind.CLAWBACK: pb.Entry.KIND_CLAWBACK,
    ledger.Kind.LAPSE: pb.Entry.KIND_LAPSE,
    ledger.Kind.PLAN_GRANT: pb.Entry.KIND_PLAN_GRANT,
    ledger.Kind.TOP_UP: pb.Entry.KIND_TOP_UP,
    ledger.Kind.REFUND: pb.Entry.KIND_REFUND,
}
_KINDS_BY_NUMBER = {number: kind for kind, number in _KINDS.items()}
_ACCOUNTS = {
    ledger.Account.AVAILABLE: pb.Entry.ACCOUNT_AVAILABLE,
    ledger.Account.RESERVED: pb.Entry.ACCOUNT_RESERVED,
}
_STATES = {
    ledger.State.HELD: pb.Reservation.STATE_HELD,
    ledger.State.CAPTURED: pb.Reservation.STATE_CAPTURED,
    ledger.State.RELEASED: pb.Reservation.STATE_RELEASED,
    ledger.State.EXPIRED: pb.Reservation.STATE_EXPIRED,
}


class CreditsServicer(pb_grpc.CreditsServiceServicer):
    """What users see of their own credits."""

    def __init__(self, engine: AsyncEngine, feed: BalanceFeed) -> None:
        self._engine = engine
        self._feed = feed

    async def GetBalance(self, request: pb.GetBalanceRequest, context: Context) -> pb.GetBalanceResponse:
        """See CreditsService."""
        user_id = ledger.user_id_of(current_user_id())
        async with reading(self._engine) as connection:
            balance = await store.balance(connection, user_id=user_id)
        return pb.GetBalanceResponse(
            available_millicredits=balance.available_millicredits,
            reserved_millicredits=balance.reserved_millicredits,
            promotional_millicredits=balance.promotional_millicredits,
            next_expire_time=_timestamp(balance.next_expire_time),
        )

    async def WatchBalance(self, request: pb.WatchBalanceRequest, context: Context) -> AsyncGenerator[pb.WatchBalanceResponse]:
        """See CreditsService."""
        user_id = ledger.user_id_of(current_user_id())
        async with aclosing(self._feed.watch(user_id, caller=current_principal())) as balances:
            async for balance in balances:
                yield pb.WatchBalanceResponse(
                    available_millicredits=balance.available_millicredits,
                    reserved_millicredits=balance.reserved_millicredits,
                    promotional_millicredits=balance.promotional_millicredits,
                    next_expire_time=_timestamp(balance.next_expire_time),
                    version=balance.version,
                )

    async def ListEntries(self, request: pb.ListEntriesRequest, context: Context) -> pb.ListEntriesResponse:
        """See CreditsService."""
        entries, next_page_token = await _list_entries(self._engine, ledger.user_id_of(current_user_id()), request)
        return pb.ListEntriesResponse(entries=map(_entry, entries), next_page_token=next_page_token)

    async def ListCeilings(self, request: pb.ListCeilingsRequest, context: Context) -> pb.ListCeilingsResponse:
        """See CreditsService."""
        async with reading(self._engine) as connection:
            ceilings = await store.list_ceilings(connection, user_id=ledger.user_id_of(current_user_id()))
        return pb.ListCeilingsResponse(ceilings=map(_ceiling, ceilings))

    async def SetKeyCeiling(self, request: pb.SetKeyCeilingRequest, context: Context) -> pb.SetKeyCeilingResponse:
        """See CreditsService."""
        api_key_id = _api_key_id(request.api_key_id)
        user_id = ledger.user_id_of(current_user_id())
        with self._feed.changing(user_id):  # what was due to lapse has lapsed
            ceiling = await _set_ceiling(self._engine, user_id, api_key_id, request)
        return pb.SetKeyCeilingResponse(ceiling=ceiling)


class LedgerAdminServicer(pb_grpc.LedgerAdminServiceServicer):
    """What administrators do to the ledger."""

    def __init__(self, engine: AsyncEngine, feed: BalanceFeed) -> None:
        self._engine = engine
        self._feed = feed
        self._auditor = Auditor(engine)

    async def GrantCredits(self, request: pb.GrantCreditsRequest, context: Context) -> pb.GrantCreditsResponse:
        """See LedgerAdminService."""
        user_id = UUID(request.user_id)
        expire_time = _moment("expire_time", request.expire_time) if request.HasField("expire_time") else None
        audit.about(amount_millicredits=str(request.amount_millicredits), reason=request.reason)
        if expire_time is not None:
            audit.about(expire_time=expire_time.isoformat())
        with self._feed.changing(user_id):
            async with transaction(self._engine) as connection:
                answer = await store.grant(
                    connection,
                    actor_id=ledger.user_id_of(current_user_id()),
                    request_id=UUID(request.request_id),
                    user_id=user_id,
                    amount_millicredits=request.amount_millicredits,
                    reason=request.reason,
                    expire_time=expire_time,
                )
        balance = ledger.granted(answer)
        _log.info(
            "grant.done",
            user_id=request.user_id,
            actor_id=current_user_id(),
            request_id=request.request_id,
            amount_millicredits=request.amount_millicredits,
        )
        return pb.GrantCreditsResponse(
            available_millicredits=balance.available_millicredits, reserved_millicredits=balance.reserved_millicredits
        )

    async def ClawbackCredits(self, request: pb.ClawbackCreditsRequest, context: Context) -> pb.ClawbackCreditsResponse:
        """See LedgerAdminService."""
        user_id = UUID(request.user_id)
        audit.about(amount_millicredits=str(request.amount_millicredits), reason=request.reason)
        with self._feed.changing(user_id):
            async with transaction(self._engine) as connection:
                answer = await store.clawback(
                    connection,
                    actor_id=ledger.user_id_of(current_user_id()),
                    request_id=UUID(request.request_id),
                    user_id=user_id,
                    amount_millicredits=request.amount_millicredits,
                    reason=request.reason,
                )
        balance = ledger.taken_back(answer, amount_millicredits=request.amount_millicredits)
        _log.info(
            "clawback.done",
            user_id=request.user_id,
            actor_id=current_user_id(),
            request_id=request.request_id,
            amount_millicredits=request.amount_millicredits,
        )
        return pb.ClawbackCreditsResponse(
            available_millicredits=balance.available_millicredits, reserved_millicredits=balance.reserved_millicredits
        )

    async def GetAccount(self, request: pb.GetAccountRequest, context: Context) -> pb.GetAccountResponse:
        """See LedgerAdminService."""
        user_id = UUID(request.user_id)
        async with reading(self._engine) as connection:
            balance = await store.balance(connection, user_id=user_id)
            promotions = await store.promotions(connection, user_id=user_id)
            ceilings = await store.list_ceilings(connection, user_id=user_id)
        return pb.GetAccountResponse(
            available_millicredits=balance.available_millicredits,
            reserved_millicredits=balance.reserved_millicredits,
            promotional_millicredits=balance.promotional_millicredits,
            promotions=[
                pb.PromotionalCredits(
                    available_millicredits=promotion.available_millicredits,
                    reserved_millicredits=promotion.reserved_millicredits,
                    expire_time=_timestamp(promotion.expire_time),
                )
                for promotion in promotions
            ],
            ceilings=map(_ceiling, ceilings),
        )

    async def ListAccountEntries(self, request: pb.ListAccountEntriesRequest, context: Context) -> pb.ListAccountEntriesResponse:
        """See LedgerAdminService."""
        entries, next_page_token = await _list_entries(self._engine, UUID(request.user_id), request)
        return pb.ListAccountEntriesResponse(entries=map(_entry_with_actor, entries), next_page_token=next_page_token)

    async def SetUserCeiling(self, request: pb.SetUserCeilingRequest, context: Context) -> pb.SetUserCeilingResponse:
        """See LedgerAdminService."""
        user_id = UUID(request.user_id)
        with self._feed.changing(user_id):
            ceiling = await _set_ceiling(self._engine, user_id, None, request)
        _log.info("ceiling.set", user_id=request.user_id, actor_id=current_user_id())
        return pb.SetUserCeilingResponse(ceiling=ceiling)

    async def AuditLedger(self, request: pb.AuditLedgerRequest, context: Context) -> AsyncGenerator[pb.AuditLedgerResponse]:
        """See LedgerAdminService."""
        with self._auditor.audit() as begun:
            yield pb.AuditLedgerResponse()
            found = 0
            async with aclosing(begun) as findings:
                async for finding in findings:
                    if isinstance(finding, ledger.Discrepancy):
                        found += 1
                        audit.about(discrepancy_count=str(found))  # as far as it got, should nobody wait for the summary
                        yield pb.AuditLedgerResponse(discrepancy=pb.Discrepancy(**asdict(finding)))
                    else:
                        audit.about(discrepancy_count=str(finding.discrepancy_count))
                        yield pb.AuditLedgerResponse(summary=_summary(finding))


class LedgerServicer(pb_grpc.LedgerServiceServicer):
    """Holds and their settlement, for jobs_service.

    The ledger's answer is judged after the transaction: a refusal may have moved credits (a hold found expired).
    """

    def __init__(self, engine: AsyncEngine, feed: BalanceFeed) -> None:
        self._engine = engine
        self._feed = feed

    async def ReserveCredits(self, request: pb.ReserveCreditsRequest, context: Context) -> pb.ReserveCreditsResponse:
        """See LedgerService."""
        user_id = UUID(request.user_id)
        with self._feed.changing(user_id):
            answer = await store.reserve(
                self._engine,
                reservation_id=UUID(request.reservation_id),
                job_id=UUID(request.job_id or request.reservation_id),
                user_id=user_id,
                amount_millicredits=request.amount_millicredits,
                ttl=request.ttl.ToTimedelta(),
                model=request.model,
                api_key_id=_api_key_id(request.api_key_id) if request.api_key_id else None,
            )
        reservation = ledger.reserved(answer, amount_millicredits=request.amount_millicredits)
        return pb.ReserveCreditsResponse(reservation=_reservation(reservation))

    async def CaptureReservation(self, request: pb.CaptureReservationRequest, context: Context) -> pb.CaptureReservationResponse:
        """See LedgerService."""
        lines = ledger.receipt(
            [ledger.ReceiptLine(line.description, line.quantity, line.unit, line.amount_millicredits) for line in request.lines],
            amount_millicredits=request.amount_millicredits,
        )
        answer = await store.capture(
            self._engine,
            reservation_id=UUID(request.reservation_id),
            amount_millicredits=request.amount_millicredits,
            lines=lines,
        )
        self._settled(answer)
        return pb.CaptureReservationResponse(reservation=_reservation(ledger.captured(answer)))

    async def ReleaseReservation(self, request: pb.ReleaseReservationRequest, context: Context) -> pb.ReleaseReservationResponse:
        """See LedgerService."""
        answer = await store.release(self._engine, reservation_id=UUID(request.reservation_id))
        self._settled(answer)
        return pb.ReleaseReservationResponse(reservation=_reservation(ledger.released(answer)))

    async def GetReservation(self, request: pb.GetReservationRequest, context: Context) -> pb.GetReservationResponse:
        """See LedgerService."""
        async with transaction(self._engine) as connection:
            answer = await store.get_reservation(connection, reservation_id=UUID(request.reservation_id))
        return pb.GetReservationResponse(reservation=_reservation(ledger.shown(answer)))

    def _settled(self, answer: ledger.ReservationAnswer) -> None:
        if answer.reservation is not None:
            self._feed.changed(answer.reservation.user_id)


async def _list_entries(
    engine: AsyncEngine, user_id: UUID, request: pb.ListEntriesRequest | pb.ListAccountEntriesRequest
) -> tuple[Sequence[ledger.Entry], str]:
    query = ledger.EntryQuery(
        user_id=user_id,
        job_id=UUID(request.job_id) if request.job_id else None,
        kinds=frozenset(_KINDS_BY_NUMBER[kind] for kind in request.kinds),
        start_time=_moment("start_time", request.start_time) if request.HasField("start_time") else None,
        end_time=_moment("end_time", request.end_time) if request.HasField("end_time") else None,
    )
    limit = page_limit(request.page_size)
    before = query.position(request.page_token)
    async with reading(engine) as connection:
        found = await store.list_entries(connection, query, before=before, limit=limit + 1)
    return ledger.page(query, found, limit)


def _api_key_id(text: str) -> UUID:
    api_key_id = UUID(text)
    if api_key_id == store.WHOLE_ACCOUNT:
        raise invalid("api_key_id", "names no API key")
    return api_key_id


async def _set_ceiling(
    engine: AsyncEngine, user_id: UUID, api_key_id: UUID | None, request: pb.SetKeyCeilingRequest | pb.SetUserCeilingRequest
) -> pb.Ceiling:
    for name in ("daily_millicredits", "monthly_millicredits"):
        if request.HasField(name):
            audit.about(**{name: str(getattr(request, name))})
    if request.lift:
        audit.about(lift="true")
    async with transaction(engine) as connection:
        outcome, ceiling = await store.set_ceiling(
            connection,
            user_id=user_id,
            api_key_id=api_key_id,
            daily_millicredits=request.daily_millicredits if request.HasField("daily_millicredits") else None,
            monthly_millicredits=request.monthly_millicredits if request.HasField("monthly_millicredits") else None,
        )
    return _ceiling(ledger.accepted_ceiling(outcome, ceiling))


def _reservation(reservation: ledger.Reservation) -> pb.Reservation:
    message = pb.Reservation(
        reservation_id=str(reservation.reservation_id),
        user_id=str(reservation.user_id),
        state=_STATES[reservation.state],
        amount_millicredits=reservation.amount_millicredits,
        captured_millicredits=reservation.captured_millicredits,
        job_id=str(reservation.job_id),
        model=reservation.model,
    )
    message.expire_time.FromDatetime(reservation.expire_time)
    message.create_time.FromDatetime(reservation.create_time)
    return message


def _entry(entry: ledger.Entry) -> pb.Entry:
    return pb.Entry(
        entry_id=entry.entry_id,
        event_id=entry.event_id,
        kind=_KINDS[entry.kind],
        account=_ACCOUNTS[entry.account],
        amount_millicredits=entry.amount_millicredits,
        balance_after_millicredits=entry.balance_after_millicredits,
        job_id=str(entry.job_id) if entry.job_id else "",
        reason=entry.reason or "",
        create_time=_timestamp(entry.create_time),
        model=entry.model,
        lines=[pb.ReceiptLine(**asdict(line)) for line in entry.lines],
        expire_time=_timestamp(entry.expire_time),
        top_up_id=str(entry.top_up_id) if entry.top_up_id else "",
    )


def _entry_with_actor(entry: ledger.Entry) -> pb.Entry:
    message = _entry(entry)
    message.actor_id = str(entry.actor_id) if entry.actor_id else ""
    return message


def _ceiling(ceiling: ledger.Ceiling) -> pb.Ceiling:
    return pb.Ceiling(
        api_key_id=str(ceiling.api_key_id) if ceiling.api_key_id else "",
        daily_millicredits=ceiling.daily_millicredits,
        monthly_millicredits=ceiling.monthly_millicredits,
        spent_today_millicredits=min(ceiling.spent_today_millicredits, ledger.INT64_MAX),
        spent_this_month_millicredits=min(ceiling.spent_this_month_millicredits, ledger.INT64_MAX),
    )


def _summary(summary: ledger.AuditSummary) -> pb.AuditSummary:
    return pb.AuditSummary(
        discrepancy_count=summary.discrepancy_count,
        account_count=summary.account_count,
        event_count=summary.event_count,
        entry_count=summary.entry_count,
        reservation_count=summary.reservation_count,
        totals=[pb.AccountTotal(account=account, amount_millicredits=str(total)) for account, total in summary.totals.items()],
    )


def _timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    if moment is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message


def _moment(field: str, message: timestamp_pb2.Timestamp) -> datetime:
    try:
        return message.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise invalid(field, "is no valid time") from error
