"""JobsService and JobsAdminService: messages in, domain calls, messages out."""

import uuid
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc

from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from jobs_service.dead_letters import DeadLetters
from jobs_service.deletion import Deletions
from jobs_service.events import EventLog
from jobs_service.jobs import Jobs
from jobs_service.limits import Limits
from jobs_service.messages import dead_letter_message, timestamp
from jobs_service.queue_stats import QueueStats
from jobs_service.uploads.intake import Uploads
from jobs_service.uploads.servicer import UploadsServicer
from jobs_service.watch import Hub, WatchRequest, WatchStream
from servicekit import audit, paging
from servicekit.errors import invalid
from servicekit.identity import current_principal, current_user_id

REQUEUE_DEFAULT = 100
REQUEUE_MAX = 1000
EPOCH = datetime.fromtimestamp(0, UTC)

Context = grpc.aio.ServicerContext[Any, Any]


class JobsServicer(UploadsServicer):
    """Jobs of the signed-in user."""

    def __init__(
        self,
        jobs: Jobs,
        dead_letters: DeadLetters,
        deletions: Deletions,
        hub: Hub,
        log: EventLog,
        *,
        limits: Limits,
        checkpoint_interval_s: float,
        uploads: Uploads | None = None,
    ) -> None:
        super().__init__(uploads)
        self._jobs = jobs
        self._dead_letters = dead_letters
        self._deletions = deletions
        self._hub = hub
        self._log = log
        self._limits = limits
        self._checkpoint_interval_s = checkpoint_interval_s

    async def EstimateJob(self, request: jobs_pb2.EstimateJobRequest, context: Context) -> jobs_pb2.EstimateJobResponse:
        """See the proto."""
        estimate = await self._jobs.estimate(_owner(), current_principal().plan, request.spec)
        response = jobs_pb2.EstimateJobResponse(
            cost_millicredits=estimate.quote.cost_millicredits,
            quote_id=estimate.quote_id,
            queue_position=estimate.queue_position,
            eta_p50_seconds=estimate.forecast.p50_s,
            eta_p90_seconds=estimate.forecast.p90_s,
        )
        response.quote_expire_time.FromSeconds(estimate.quote.expire_time)
        return response

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: Context) -> jobs_pb2.CreateJobResponse:
        """See the proto."""
        return jobs_pb2.CreateJobResponse(job=await self._jobs.create(_owner(), current_principal().plan, request, _api_key_id()))

    async def BatchCreateJobs(self, request: jobs_pb2.BatchCreateJobsRequest, context: Context) -> jobs_pb2.BatchCreateJobsResponse:
        """See the proto."""
        jobs = await self._jobs.create_batch(_owner(), current_principal().plan, request.requests, _api_key_id())
        return jobs_pb2.BatchCreateJobsResponse(jobs=jobs)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        """See the proto."""
        return jobs_pb2.GetJobResponse(job=await self._jobs.get(_owner(), uuid.UUID(request.job_id)))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        """See the proto."""
        query = _list_query(request)
        before = paging.decode_token(request.page_token, query, length=paging.ID_BYTES)
        jobs, more = await self._jobs.page(
            _owner(),
            limit=paging.page_limit(request.page_size),
            before=uuid.UUID(bytes=before) if before else None,
            states=request.states,
            kinds=request.kinds,
        )
        return jobs_pb2.ListJobsResponse(jobs=jobs, next_page_token=paging.encode_token(more.bytes, query) if more else "")

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: Context) -> jobs_pb2.CancelJobResponse:
        """See the proto."""
        return jobs_pb2.CancelJobResponse(job=await self._jobs.cancel(_owner(), uuid.UUID(request.job_id)))

    async def RetryJob(self, request: jobs_pb2.RetryJobRequest, context: Context) -> jobs_pb2.RetryJobResponse:
        """See the proto."""
        job = await self._dead_letters.retry(uuid.UUID(request.job_id), _owner(), _api_key_id(), current_principal().plan)
        return jobs_pb2.RetryJobResponse(job=await self._jobs.get(_owner(), job.job_id))

    async def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: Context) -> jobs_pb2.DeleteJobResponse:
        """See the proto."""
        removed = await self._deletions.delete(_owner(), uuid.UUID(request.job_id))
        receipt = jobs_pb2.DeletionReceipt(
            job_id=str(removed.job_id),
            delete_time=timestamp(removed.delete_time),
            object_count=removed.object_count,
            size_bytes=removed.size_bytes,
            media_pending=removed.media_pending,
        )
        return jobs_pb2.DeleteJobResponse(receipt=receipt)

    def WatchJobs(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: jobs_pb2.WatchJobsRequest, context: Context
    ) -> AsyncGenerator[bytes, None]:
        """See the proto. Yields messages already serialised: an event is serialised once for all its watchers."""
        stream = WatchStream(self._hub, self._log, self._jobs.snapshots, checkpoint_interval_s=self._checkpoint_interval_s)
        watch = WatchRequest(
            owner_id=_owner(),
            job_ids=tuple(str(uuid.UUID(job_id)) for job_id in request.job_ids),
            resume_token=request.resume_token,
            caller=current_principal(),
        )
        return stream.run(watch, self._limits.watching(watch.owner_id, watch.caller.plan))


class JobsAdminServicer(jobs_pb2_grpc.JobsAdminServiceServicer):
    """The queue, for administrators."""

    def __init__(self, dead_letters: DeadLetters, queue_stats: QueueStats) -> None:
        self._dead_letters = dead_letters
        self._queue_stats = queue_stats

    async def GetQueueStats(self, request: jobs_pb2.GetQueueStatsRequest, context: Context) -> jobs_pb2.GetQueueStatsResponse:
        """See the proto."""
        return jobs_pb2.GetQueueStatsResponse(pools=await self._queue_stats())

    async def ListDeadLetters(self, request: jobs_pb2.ListDeadLettersRequest, context: Context) -> jobs_pb2.ListDeadLettersResponse:
        """See the proto."""
        query = b"\0".join((b"dead letters", request.fingerprint.encode(), request.reason.encode()))
        before = paging.decode_token(request.page_token, query, length=_FAILURE_BYTES)
        page, more = await self._dead_letters.page(
            limit=paging.page_limit(request.page_size),
            before=_failure_position(before) if before else None,
            fingerprint=request.fingerprint,
            reason=request.reason,
        )
        return jobs_pb2.ListDeadLettersResponse(
            dead_letters=[dead_letter_message(letter.job, released=letter.released) for letter in page],
            next_page_token=paging.encode_token(_failure_bytes(*more), query) if more else "",
        )

    async def RequeueDeadLetter(self, request: jobs_pb2.RequeueDeadLetterRequest, context: Context) -> jobs_pb2.RequeueDeadLetterResponse:
        """See the proto."""
        if request.HasField("job_id"):
            job = await self._dead_letters.retry(uuid.UUID(request.job_id))
            return jobs_pb2.RequeueDeadLetterResponse(job_ids=[str(job.job_id)])
        limit = min(request.max_count or REQUEUE_DEFAULT, REQUEUE_MAX)
        audit.about(fingerprint=request.fingerprint, max_count=str(limit))
        outcomes = await self._dead_letters.requeue(request.fingerprint, limit=limit)
        requeued = sum(outcome.refusal is None for outcome in outcomes)
        audit.about(requeued_count=str(requeued), refused_count=str(len(outcomes) - requeued))
        return jobs_pb2.RequeueDeadLetterResponse(
            job_ids=[str(outcome.job_id) for outcome in outcomes if outcome.refusal is None],
            refusals=[
                jobs_pb2.RequeueDeadLetterResponse.Refusal(job_id=str(outcome.job_id), error=outcome.refusal.to_status())
                for outcome in outcomes
                if outcome.refusal is not None
            ],
        )


_FAILURE_BYTES = 8 + paging.ID_BYTES


def _failure_bytes(moment: datetime, job_id: uuid.UUID) -> bytes:
    """Where a page of dead letters ends: the failure's time in microseconds, then the job."""
    return ((moment - EPOCH) // timedelta(microseconds=1)).to_bytes(8, "big") + job_id.bytes


def _failure_position(position: bytes) -> tuple[datetime, uuid.UUID]:
    try:
        moment = EPOCH + timedelta(microseconds=int.from_bytes(position[:8], "big"))
    except OverflowError:
        raise invalid("page_token", "is not a token that this list gave") from None
    return moment, uuid.UUID(bytes=position[8:])


def _owner() -> uuid.UUID:
    return uuid.UUID(current_user_id())


def _api_key_id() -> uuid.UUID | None:
    api_key_id = current_principal().api_key_id
    return None if api_key_id is None else uuid.UUID(api_key_id)


def _list_query(request: jobs_pb2.ListJobsRequest) -> bytes:
    """What a page token belongs to: the owner and the filters."""
    filters = jobs_pb2.ListJobsRequest(states=request.states, kinds=request.kinds)
    return _owner().bytes + filters.SerializeToString(deterministic=True)
