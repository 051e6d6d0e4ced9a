"""JobsService: messages in, domain calls, messages out."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from jobs_service.events import EventLog
from jobs_service.jobs import Jobs
from jobs_service.watch import Hub, WatchRequest, WatchStream
from servicekit import paging
from servicekit.identity import current_principal, current_user_id

Context = grpc.aio.ServicerContext[Any, Any]


class JobsServicer(jobs_pb2_grpc.JobsServiceServicer):
    """Jobs of the signed-in user."""

    def __init__(self, jobs: Jobs, hub: Hub, log: EventLog, *, checkpoint_interval_s: float) -> None:
        self._jobs = jobs
        self._hub = hub
        self._log = log
        self._checkpoint_interval_s = checkpoint_interval_s

    async def EstimateJob(self, request: jobs_pb2.EstimateJobRequest, context: Context) -> jobs_pb2.EstimateJobResponse:
        """See the proto."""
        estimate = await self._jobs.estimate(_owner(), current_principal().plan, request.spec)
        response = jobs_pb2.EstimateJobResponse(
            cost_millicredits=estimate.quote.cost_millicredits,
            quote_id=estimate.quote_id,
            queue_position=estimate.queue_position,
            eta_p50_seconds=estimate.eta_p50_s,
            eta_p90_seconds=estimate.eta_p90_s,
        )
        response.quote_expire_time.FromSeconds(estimate.quote.expire_time)
        return response

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: Context) -> jobs_pb2.CreateJobResponse:
        """See the proto."""
        return jobs_pb2.CreateJobResponse(job=await self._jobs.create(_owner(), current_principal().plan, request))

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        """See the proto."""
        return jobs_pb2.GetJobResponse(job=await self._jobs.get(_owner(), uuid.UUID(request.job_id)))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        """See the proto."""
        query = _list_query(request)
        before = paging.decode_token(request.page_token, query)
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

    async def WatchJobs(self, request: jobs_pb2.WatchJobsRequest, context: Context) -> AsyncGenerator[jobs_pb2.WatchJobsResponse, None]:
        """See the proto. Yields messages already serialised: an event is serialised once for all its watchers."""
        stream = WatchStream(self._hub, self._log, self._jobs.snapshots, checkpoint_interval_s=self._checkpoint_interval_s)
        watch = WatchRequest(
            owner_id=_owner(),
            job_ids=tuple(str(uuid.UUID(job_id)) for job_id in request.job_ids),
            resume_token=request.resume_token,
            expire_time=current_principal().expire_time,
        )
        async with aclosing(stream.run(watch)) as messages:
            async for message in messages:
                yield message  # pyright: ignore[reportReturnType]


def _owner() -> uuid.UUID:
    return uuid.UUID(current_user_id())


def _list_query(request: jobs_pb2.ListJobsRequest) -> bytes:
    """What a page token belongs to: the owner and the filters."""
    filters = jobs_pb2.ListJobsRequest(states=request.states, kinds=request.kinds)
    return _owner().bytes + filters.SerializeToString(deterministic=True)
