"""credit_service as jobs_service sees it: hold before a job is accepted, settle after it ended.

Every id used for money is the job's id, or derives from it when a failed job is retried, and never from an attempt: repeating a call
repeats its answer.
"""

import uuid

import grpc
import structlog
from google.protobuf import duration_pb2

from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from jobs_service.lifecycle import Job
from jobs_service.messages import receipt_lines
from servicekit.client import call_metadata
from servicekit.errors import MeshError, Reason, from_rpc_error, unavailable

_log = structlog.get_logger(__name__)

SETTLED_OTHERWISE = (
    Reason.ERROR_REASON_RESERVATION_CAPTURED,
    Reason.ERROR_REASON_RESERVATION_RELEASED,
    Reason.ERROR_REASON_RESERVATION_EXPIRED,
    Reason.ERROR_REASON_NOT_FOUND,
)


class Ledger:
    """Holds and settlements of jobs."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float, hold_ttl_s: int) -> None:
        self._stub: credits_pb2_grpc.LedgerServiceAsyncStub = credits_pb2_grpc.LedgerServiceStub(channel)  # pyright: ignore[reportAttributeAccessIssue]
        self._timeout_s = timeout_s
        self._hold_ttl = duration_pb2.Duration(seconds=hold_ttl_s)

    async def reserve(self, job: Job) -> None:
        """Hold the price of a job, under its hold's id and its API key.

        Raises what credit_service refuses: INSUFFICIENT_CREDITS, CEILING_REACHED …, UNAVAILABLE.
        """
        request = credits_pb2.ReserveCreditsRequest(
            reservation_id=str(job.hold_id),
            user_id=str(job.owner_id),
            amount_millicredits=job.estimated_cost,
            ttl=self._hold_ttl,
            job_id=str(job.job_id),
            model=job.model,
            api_key_id=str(job.api_key_id) if job.api_key_id else "",
        )
        try:
            response = await self._stub.ReserveCredits(request, timeout=self._timeout_s, metadata=call_metadata())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if response.reservation.state != credits_pb2.Reservation.STATE_HELD:
            # A repeat that found its hold settled or expired: there is nothing to run the job on.
            raise unavailable("the hold of this request has ended; try again")

    async def settle(self, job: Job) -> None:
        """Capture the cost of an ended job, or release its hold when it costs nothing. Raises UNAVAILABLE."""
        if job.cost is None:
            raise ValueError(f"job {job.job_id} has not ended")
        reservation_id = str(job.hold_id)
        try:
            if job.cost > 0:
                capture = credits_pb2.CaptureReservationRequest(
                    reservation_id=reservation_id, amount_millicredits=job.cost, lines=receipt_lines(job)
                )
                await self._stub.CaptureReservation(capture, timeout=self._timeout_s, metadata=call_metadata())
            else:
                await self._release(reservation_id)
        except grpc.aio.AioRpcError as error:
            refusal = from_rpc_error(error)
            if refusal.reason not in SETTLED_OTHERWISE:
                raise refusal from error
            # Nothing we do again can change it: a person has to look (the audit finds it too).
            _log.error("settle.refused", job_id=str(job.job_id), cost=job.cost, reason=Reason.Name(refusal.reason))

    async def release_unused(self, reservation_id: uuid.UUID) -> None:
        """Release the hold of a job or a retry that never came to be, if there is one. Raises UNAVAILABLE."""
        try:
            await self._release(str(reservation_id))
        except grpc.aio.AioRpcError as error:
            refusal: MeshError = from_rpc_error(error)
            if refusal.reason not in SETTLED_OTHERWISE:
                raise refusal from error

    async def _release(self, reservation_id: str) -> None:
        request = credits_pb2.ReleaseReservationRequest(reservation_id=reservation_id)
        await self._stub.ReleaseReservation(request, timeout=self._timeout_s, metadata=call_metadata())
