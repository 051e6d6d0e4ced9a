"""Jobs as messages of the contract. No I/O but the computing of presigned URLs."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from google.protobuf import timestamp_pb2
from google.rpc import status_pb2

from genmesh.credits.v1 import credits_pb2
from genmesh.jobs.v1 import jobs_pb2
from jobs_service.lifecycle import Job, State

LINE_DESCRIPTION_MAX = 200
"""Characters of a receipt line's description that credit_service takes."""

Presign = Callable[[str, str], tuple[str, datetime]]
"""Object key and content type → URL and its end."""


def timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A protobuf timestamp, or None."""
    if moment is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message


def presigned(asset: jobs_pb2.Asset, presign: Presign) -> jobs_pb2.Asset:
    """An asset as clients see it: with a fresh URL, without its object key."""
    shown = jobs_pb2.Asset()
    shown.CopyFrom(asset)
    shown.url, expires = presign(asset.object_key, asset.content_type)
    shown.url_expire_time.FromDatetime(expires)
    shown.ClearField("object_key")
    return shown


def job_message(
    job: Job,
    presign: Presign,
    *,
    progress: jobs_pb2.Progress | None = None,
    queue_position: int = 0,
    waiting: jobs_pb2.Waiting | None = None,
) -> jobs_pb2.Job:
    """A job as its owner sees it."""
    running = job.state is State.PROCESSING
    return jobs_pb2.Job(
        job_id=str(job.job_id),
        owner_id=str(job.owner_id),
        state=jobs_pb2.State.ValueType(job.state),
        spec=jobs_pb2.JobSpec.FromString(job.spec),
        priority=jobs_pb2.Priority.ValueType(job.priority),
        attempt=job.attempt,
        worker_id=job.worker_id,
        progress=progress if running else None,
        assets=[presigned(jobs_pb2.Asset.FromString(asset), presign) for asset in job.assets],
        error=None if job.error is None else status_pb2.Status.FromString(job.error),
        estimated_cost_millicredits=job.estimated_cost,
        cost_millicredits=job.cost or 0,
        receipt=receipt(job),
        queue_position=queue_position,
        waiting=waiting,
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time),
        finish_time=timestamp(job.finish_time),
        cancel_requested=job.cancel_requested_time is not None,
        retry_count=job.retry_count,
    )


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What decides how long a job waits, beside the job itself."""

    queue_position: int = 0
    worker_away: bool = False
    """No worker offers its model."""
    owner_running: int = 0
    owner_limit: int = 0
    """0: no limit."""
    progress: jobs_pb2.Progress | None = None


def waiting(job: Job, around: Circumstances, now: datetime) -> jobs_pb2.Waiting | None:
    """What a job waits for, in fields and in words; None when it does not wait."""
    reasons = jobs_pb2.Waiting
    if job.state is State.PROCESSING:
        if around.progress is None or around.progress.stage != jobs_pb2.STAGE_LOADING:
            return None
        return reasons(reason=reasons.REASON_MODEL_LOADING, message=f"{job.model} is being loaded", model=job.model)
    if job.state is not State.PENDING:
        return None
    facts = reasons(
        queue_position=around.queue_position,
        owner_running=around.owner_running,
        owner_limit=around.owner_limit,
        model=job.model,
        retry_time=timestamp(job.retry_time),
    )
    if job.retry_time is not None and job.retry_time > now:
        facts.reason = reasons.REASON_RETRY
        facts.message = f"attempt {job.attempt} failed, the next one begins in {(job.retry_time - now).total_seconds():.0f} s or later"
    elif around.worker_away:
        facts.reason, facts.message = reasons.REASON_NO_WORKER, f"no worker offers {job.model} right now"
    elif 0 < around.owner_limit <= around.owner_running:
        facts.reason = reasons.REASON_OWNER_LIMIT
        facts.message = f"{around.owner_running} of its owner's jobs run, as many as may run at once"
    else:
        facts.reason = reasons.REASON_IN_QUEUE
        ahead = around.queue_position - 1
        facts.message = "it is next" if ahead <= 0 else f"{ahead} {'job is' if ahead == 1 else 'jobs are'} before it"
    return facts


def dead_letter_message(job: Job, *, released: bool) -> jobs_pb2.DeadLetter:
    """A failed job as an operator sees it."""
    letter = jobs_pb2.DeadLetter
    return letter(
        job_id=str(job.job_id),
        owner_id=str(job.owner_id),
        kind=jobs_pb2.Kind.ValueType(job.kind),
        model=job.model,
        reason=job.failure_reason or "",
        message=status_pb2.Status.FromString(job.error or b"").message,
        fingerprint=job.fingerprint or "",
        attempt=job.attempt,
        retry_count=job.retry_count,
        worker_id=job.worker_id,
        create_time=timestamp(job.create_time),
        fail_time=timestamp(job.finish_time),
        hold=letter.HOLD_RELEASED if released else letter.HOLD_RELEASING,
        estimated_cost_millicredits=job.estimated_cost,
    )


def receipt(job: Job) -> jobs_pb2.Receipt | None:
    """What an ended job cost, itemised."""
    if job.cost is None:
        return None
    return jobs_pb2.Receipt(
        steps_done=job.steps_done,
        steps_agreed=job.steps_agreed,
        step_price_millicredits=job.estimated_cost // job.steps_agreed,
        captured_millicredits=job.cost,
        released_millicredits=job.estimated_cost - job.cost,
    )


def receipt_lines(job: Job) -> list[credits_pb2.ReceiptLine]:
    """What an ended job's payment was for, line by line; the amounts add up to its cost. Nothing where it cost nothing."""
    if not job.cost:
        return []
    image = jobs_pb2.JobSpec.FromString(job.spec).image
    pictures = f"{image.image_count} {'picture' if image.image_count == 1 else 'pictures'}"
    size = f", {image.width}×{image.height}, {pictures}"  # noqa: RUF001
    # Cut, not sent in vain: a capture that is refused for its words would be tried again for ever.
    description = job.model[: LINE_DESCRIPTION_MAX - len(size)] + size
    return [
        credits_pb2.ReceiptLine(description=description, quantity=job.steps_done, unit="step", amount_millicredits=job.cost),
    ]


def state_change(job: Job, presign: Presign, *, queue_position: int = 0) -> jobs_pb2.JobEvent:
    """The event that a job is in its state now."""
    event = new_event(job.job_id, job.attempt)
    event.state_change.state = jobs_pb2.State.ValueType(job.state)
    event.state_change.job.CopyFrom(job_message(job, presign, queue_position=queue_position))
    return event


def new_event(job_id: uuid.UUID, attempt: int) -> jobs_pb2.JobEvent:
    """An event that happens now, without payload and sequence number."""
    event = jobs_pb2.JobEvent(job_id=str(job_id), attempt=attempt)
    event.event_time.GetCurrentTime()
    return event
