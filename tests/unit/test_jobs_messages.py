"""Jobs as messages: receipts, assets."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime

from google.rpc import code_pb2, status_pb2

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.lifecycle import Job, Priority, State
from jobs_service.messages import job_message, presigned, receipt, state_change

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SPEC = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger"))
ASSET = jobs_pb2.Asset(asset_id="one", object_key="owner/job/one.png", content_type="image/png", size_bytes=5)
JOB = Job(
    job_id=uuid.UUID(int=1),
    owner_id=uuid.UUID(int=2),
    kind=jobs_pb2.KIND_IMAGE,
    state=State.PENDING,
    version=1,
    priority=Priority.PRO,
    model="small",
    pool="pictures",
    spec=SPEC.SerializeToString(),
    steps_agreed=20,
    estimated_cost=145,
    create_time=MOMENT,
)


def presign(key: str, content_type: str) -> tuple[str, datetime]:
    return f"https://media/{key}?as={content_type}", MOMENT


def test_a_job_that_has_not_ended_has_no_receipt():
    assert receipt(JOB) is None
    assert not job_message(JOB, presign).HasField("receipt")


def test_a_receipt_itemises_and_adds_up():
    ended = replace(JOB, state=State.CANCELLED, steps_done=3, cost=21)
    assert receipt(ended) == jobs_pb2.Receipt(
        steps_done=3, steps_agreed=20, step_price_millicredits=7, captured_millicredits=21, released_millicredits=124
    )


def test_a_receipt_of_a_failed_job_releases_everything():
    shown = receipt(replace(JOB, state=State.FAILED, cost=0))
    assert shown is not None
    assert (shown.captured_millicredits, shown.released_millicredits) == (0, 145)


def test_assets_are_shown_with_a_url_and_without_their_key():
    shown = job_message(replace(JOB, state=State.COMPLETED, cost=145, assets=(ASSET.SerializeToString(),)), presign).assets[0]
    assert (shown.url, shown.object_key) == ("https://media/owner/job/one.png?as=image/png", "")
    assert shown.url_expire_time.ToDatetime(UTC) == MOMENT
    assert ASSET.object_key  # the stored one is not touched
    assert presigned(ASSET, presign) == shown


def test_progress_is_shown_only_while_the_job_runs():
    progress = jobs_pb2.Progress(step=2)
    assert job_message(replace(JOB, state=State.PROCESSING), presign, progress=progress).progress == progress
    assert not job_message(JOB, presign, progress=progress).HasField("progress")


def test_a_failed_job_says_why():
    status = status_pb2.Status(code=code_pb2.ABORTED, message="NaN")
    assert job_message(replace(JOB, state=State.FAILED, cost=0, error=status.SerializeToString()), presign).error == status


def test_a_change_of_state_carries_the_whole_job():
    event = state_change(JOB, presign, queue_position=3)
    assert event.state_change.state == jobs_pb2.STATE_PENDING
    assert event.state_change.job == job_message(JOB, presign, queue_position=3)
    assert event.state_change.job.spec == SPEC
