"""Jobs as messages: receipts, assets, what a job waits for, dead letters."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import protovalidate
import pytest
from google.rpc import code_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from genmesh.credits.v1 import credits_pb2
from genmesh.jobs.v1 import jobs_pb2
from jobs_service.lifecycle import Job, Priority, State, cost_of
from jobs_service.messages import (
    Circumstances,
    dead_letter_message,
    job_message,
    presigned,
    receipt,
    receipt_lines,
    state_change,
    waiting,
)

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


def bill(**fields: int) -> bytes:
    image: dict[str, Any] = {"width": 512, "height": 64, "image_count": 1} | fields
    return jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", **image)).SerializeToString()


@pytest.mark.parametrize(
    ("count", "description"),
    [(1, "small, 512×64, 1 picture"), (2, "small, 512×64, 2 pictures")],  # noqa: RUF001
)
def test_a_bill_says_what_was_made_by_which_model_and_how_much_of_it(count: int, description: str):
    done = replace(JOB, state=State.COMPLETED, steps_done=20, cost=145, spec=bill(image_count=count))
    [line] = receipt_lines(done)
    assert (line.description, line.quantity, line.unit, line.amount_millicredits) == (description, 20, "step", 145)
    assert "tiger" not in line.description


@pytest.mark.parametrize(("state", "cost"), [(State.PENDING, None), (State.FAILED, 0), (State.CANCELLED, 0)])
def test_what_costs_nothing_has_no_bill(state: State, cost: int | None):
    assert receipt_lines(replace(JOB, state=state, cost=cost)) == []


@given(
    state=st.sampled_from([State.COMPLETED, State.CANCELLED]),
    price=st.integers(1, 10**12),
    agreed=st.integers(1, 10**6),
    done=st.integers(0, 10**6),
    model=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300),
    size=st.integers(1, 2**31 - 1),
)
def test_the_lines_of_a_bill_add_up_and_are_never_refused(state: State, price: int, agreed: int, done: int, model: str, size: int):
    cost = cost_of(state, estimated_cost=price, steps_agreed=agreed, steps_done=done)
    job = replace(JOB, state=state, model=model, steps_agreed=agreed, estimated_cost=price, steps_done=done, cost=cost)
    lines = receipt_lines(replace(job, spec=bill(width=size, height=size, image_count=8)))
    assert sum(line.amount_millicredits for line in lines) == cost
    assert bool(lines) is (cost > 0)
    protovalidate.validate(
        credits_pb2.CaptureReservationRequest(reservation_id=str(job.hold_id), amount_millicredits=max(1, cost), lines=lines)
    )


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


def test_a_job_says_how_often_it_was_retried():
    assert job_message(replace(JOB, retry_count=2), presign).retry_count == 2


def test_a_change_of_state_carries_the_whole_job():
    event = state_change(JOB, presign, queue_position=3)
    assert event.state_change.state == jobs_pb2.STATE_PENDING
    assert event.state_change.job == job_message(JOB, presign, queue_position=3)
    assert event.state_change.job.spec == SPEC


# --- what a job waits for ---------------------------------------------------------------------------------------------

Waiting = jobs_pb2.Waiting
LATER = MOMENT + timedelta(seconds=3)
EVERYTHING = Circumstances(queue_position=5, worker_away=True, owner_running=4, owner_limit=4)
"""All that can make a job wait, at once."""


def reason_of(job: Job, around: Circumstances, now: datetime = MOMENT) -> "Waiting.Reason.ValueType":
    found = waiting(job, around, now)
    assert found is not None
    return found.reason


@pytest.mark.parametrize(
    ("job", "around", "reason"),
    [
        (replace(JOB, retry_time=LATER), EVERYTHING, Waiting.REASON_RETRY),
        (JOB, EVERYTHING, Waiting.REASON_NO_WORKER),
        (JOB, replace(EVERYTHING, worker_away=False), Waiting.REASON_OWNER_LIMIT),
        (JOB, replace(EVERYTHING, worker_away=False, owner_running=3), Waiting.REASON_IN_QUEUE),
    ],
)
def test_the_reason_that_lasts_whatever_else_changes_comes_first(job: Job, around: Circumstances, reason: "Waiting.Reason.ValueType"):
    assert reason_of(job, around) == reason


def test_a_retry_that_is_due_is_no_reason_any_more():
    around = Circumstances(queue_position=1)
    due = replace(JOB, attempt=1, retry_time=MOMENT)
    assert reason_of(due, around) == Waiting.REASON_IN_QUEUE
    assert reason_of(due, around, MOMENT - timedelta(seconds=1)) == Waiting.REASON_RETRY


@pytest.mark.parametrize(
    ("running", "limit", "waits"), [(0, 0, False), (9, 0, False), (3, 4, False), (4, 4, True), (5, 4, True)]
)  # more than the limit: it was lowered since
def test_an_owner_waits_for_their_own_jobs_only_where_there_is_a_limit(running: int, limit: int, waits: bool):
    found = reason_of(JOB, Circumstances(queue_position=1, owner_running=running, owner_limit=limit))
    assert (found == Waiting.REASON_OWNER_LIMIT) is waits


def test_the_facts_are_told_whatever_the_reason():
    found = waiting(replace(JOB, attempt=2, retry_time=LATER), EVERYTHING, MOMENT)
    assert found is not None
    assert (found.queue_position, found.owner_running, found.owner_limit, found.model) == (5, 4, 4, "small")
    assert found.retry_time.ToDatetime(UTC) == LATER
    shown = waiting(JOB, EVERYTHING, MOMENT)
    assert shown is not None
    assert not shown.HasField("retry_time")


@pytest.mark.parametrize(
    ("job", "around", "words"),
    [
        (replace(JOB, attempt=2, retry_time=LATER), Circumstances(), "attempt 2 failed, the next one begins in 3 s or later"),
        (JOB, Circumstances(worker_away=True), "no worker offers small right now"),
        (JOB, Circumstances(owner_running=4, owner_limit=4), "4 of its owner's jobs run, as many as may run at once"),
        (JOB, Circumstances(queue_position=1), "it is next"),
        (JOB, Circumstances(queue_position=2), "1 job is before it"),
        (JOB, Circumstances(queue_position=3), "2 jobs are before it"),
    ],
)
def test_the_reason_in_words(job: Job, around: Circumstances, words: str):
    found = waiting(job, around, MOMENT)
    assert found is not None
    assert found.message == words


def test_a_running_job_waits_only_while_its_model_is_loaded():
    running = replace(JOB, state=State.PROCESSING, attempt=1)
    loading = replace(EVERYTHING, progress=jobs_pb2.Progress(stage=jobs_pb2.STAGE_LOADING))
    assert waiting(running, loading, MOMENT) == Waiting(reason=Waiting.REASON_MODEL_LOADING, message="small is being loaded", model="small")
    assert waiting(running, replace(loading, progress=jobs_pb2.Progress(stage=jobs_pb2.STAGE_DENOISING)), MOMENT) is None
    assert waiting(running, EVERYTHING, MOMENT) is None


@pytest.mark.parametrize("state", [state for state in State if state.terminal])
def test_an_ended_job_waits_for_nothing(state: State):
    loading = replace(EVERYTHING, progress=jobs_pb2.Progress(stage=jobs_pb2.STAGE_LOADING))
    assert waiting(replace(JOB, state=state, retry_time=LATER), loading, MOMENT) is None


# --- dead letters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("released", "hold"), [(True, jobs_pb2.DeadLetter.HOLD_RELEASED), (False, jobs_pb2.DeadLetter.HOLD_RELEASING)])
def test_a_dead_letter_says_what_failed_and_whether_the_credits_are_back(released: bool, hold: jobs_pb2.DeadLetter.Hold.ValueType):
    failed = replace(
        JOB,
        state=State.FAILED,
        cost=0,
        attempt=3,
        retry_count=1,
        worker_id="w1",
        error=status_pb2.Status(code=code_pb2.ABORTED, message="NaN").SerializeToString(),
        failure_reason="ERROR_REASON_WORKER_LOST",
        fingerprint="0123456789abcdef",
        finish_time=LATER,
    )
    letter = dead_letter_message(failed, released=released)
    assert (letter.job_id, letter.owner_id, letter.kind, letter.model) == (str(JOB.job_id), str(JOB.owner_id), JOB.kind, "small")
    assert (letter.reason, letter.message, letter.fingerprint) == ("ERROR_REASON_WORKER_LOST", "NaN", "0123456789abcdef")
    assert (letter.attempt, letter.retry_count, letter.worker_id, letter.hold) == (3, 1, "w1", hold)
    assert letter.estimated_cost_millicredits == 145
    assert (letter.create_time.ToDatetime(UTC), letter.fail_time.ToDatetime(UTC)) == (MOMENT, LATER)
    assert b"tiger" not in letter.SerializeToString()  # an operator does not see prompts
