"""The RPCs of genmesh.credits.v1: message → ledger → message. No SQL and no rules here."""

from uuid import UUID

from google.protobuf import timestamp_pb2
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import ledger, store
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit.database import transaction
from servicekit.identity import current_user_id
from servicekit.interceptors import Context
from servicekit.paging import page_limit

_KINDS = {
    ledger.Kind.GRANT: pb.Entry.KIND_GRANT,
    ledger.Kind.RESERVE: pb.Entry.KIND_RESERVE,
    ledger.Kind.CAPTURE: pb.Entry.KIND_CAPTURE,
    ledger.Kind.RELEASE: pb.Entry.KIND_RELEASE,
    ledger.Kind.EXPIRE: pb.Entry.KIND_EXPIRE,
}
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

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def GetBalance(self, request: pb.GetBalanceRequest, context: Context) -> pb.GetBalanceResponse:
        """See CreditsService."""
        user_id = ledger.user_id_of(current_user_id())
        async with transaction(self._engine) as connection:
            balance = await store.balance(connection, user_id=user_id)
        return pb.GetBalanceResponse(
            available_millicredits=balance.available_millicredits, reserved_millicredits=balance.reserved_millicredits
        )

    async def ListEntries(self, request: pb.ListEntriesRequest, context: Context) -> pb.ListEntriesResponse:
        """See CreditsService."""
        query = ledger.EntryQuery(ledger.user_id_of(current_user_id()), UUID(request.job_id) if request.job_id else None)
        limit = page_limit(request.page_size)
        before = query.position(request.page_token)
        async with transaction(self._engine) as connection:
            found = await store.list_entries(connection, query, before=before, limit=limit + 1)
        entries, next_page_token = ledger.page(query, found, limit)
        return pb.ListEntriesResponse(entries=[_entry(entry) for entry in entries], next_page_token=next_page_token)


class LedgerAdminServicer(pb_grpc.LedgerAdminServiceServicer):
    """What administrators do to the ledger."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def GrantCredits(self, request: pb.GrantCreditsRequest, context: Context) -> pb.GrantCreditsResponse:
        """See LedgerAdminService."""
        async with transaction(self._engine) as connection:
            answer = await store.grant(
                connection,
                actor_id=ledger.user_id_of(current_user_id()),
                request_id=UUID(request.request_id),
                user_id=UUID(request.user_id),
                amount_millicredits=request.amount_millicredits,
                reason=request.reason,
            )
        balance = ledger.granted(answer)
        return pb.GrantCreditsResponse(
            available_millicredits=balance.available_millicredits, reserved_millicredits=balance.reserved_millicredits
        )


class LedgerServicer(pb_grpc.LedgerServiceServicer):
    """Holds and their settlement, for jobs_service.

    The ledger's answer is judged after the transaction: a refusal may have moved credits (a hold found expired).
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def ReserveCredits(self, request: pb.ReserveCreditsRequest, context: Context) -> pb.ReserveCreditsResponse:
        """See LedgerService."""
        async with transaction(self._engine) as connection:
            answer = await store.reserve(
                connection,
                reservation_id=UUID(request.reservation_id),
                job_id=UUID(request.job_id or request.reservation_id),
                user_id=UUID(request.user_id),
                amount_millicredits=request.amount_millicredits,
                ttl=request.ttl.ToTimedelta(),
            )
        reservation = ledger.reserved(answer, amount_millicredits=request.amount_millicredits)
        return pb.ReserveCreditsResponse(reservation=_reservation(reservation))

    async def CaptureReservation(self, request: pb.CaptureReservationRequest, context: Context) -> pb.CaptureReservationResponse:
        """See LedgerService."""
        async with transaction(self._engine) as connection:
            answer = await store.capture(
                connection, reservation_id=UUID(request.reservation_id), amount_millicredits=request.amount_millicredits
            )
        return pb.CaptureReservationResponse(reservation=_reservation(ledger.captured(answer)))

    async def ReleaseReservation(self, request: pb.ReleaseReservationRequest, context: Context) -> pb.ReleaseReservationResponse:
        """See LedgerService."""
        async with transaction(self._engine) as connection:
            answer = await store.release(connection, reservation_id=UUID(request.reservation_id))
        return pb.ReleaseReservationResponse(reservation=_reservation(ledger.released(answer)))

    async def GetReservation(self, request: pb.GetReservationRequest, context: Context) -> pb.GetReservationResponse:
        """See LedgerService."""
        async with transaction(self._engine) as connection:
            answer = await store.get_reservation(connection, reservation_id=UUID(request.reservation_id))
        return pb.GetReservationResponse(reservation=_reservation(ledger.shown(answer)))


def _reservation(reservation: ledger.Reservation) -> pb.Reservation:
    message = pb.Reservation(
        reservation_id=str(reservation.reservation_id),
        user_id=str(reservation.user_id),
        state=_STATES[reservation.state],
        amount_millicredits=reservation.amount_millicredits,
        captured_millicredits=reservation.captured_millicredits,
        job_id=str(reservation.job_id),
    )
    message.expire_time.FromDatetime(reservation.expire_time)
    message.create_time.FromDatetime(reservation.create_time)
    return message


def _entry(entry: ledger.Entry) -> pb.Entry:
    create_time = timestamp_pb2.Timestamp()
    create_time.FromDatetime(entry.create_time)
    return pb.Entry(
        entry_id=entry.entry_id,
        kind=_KINDS[entry.kind],
        account=_ACCOUNTS[entry.account],
        amount_millicredits=entry.amount_millicredits,
        balance_after_millicredits=entry.balance_after_millicredits,
        job_id=str(entry.job_id) if entry.job_id else "",
        reason=entry.reason or "",
        create_time=create_time,
    )
