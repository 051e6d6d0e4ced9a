"""The state machine of jobs, what each ending costs, when a failed attempt is tried again, and what docs/state-machine.md says of it."""

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.lifecycle import BACKOFFS, TRANSITIONS, Priority, State, cost_of, failure, retry_delay_s, sources
from servicekit.errors import MeshError, Reason, ReasonValue

TERMINAL = {State.COMPLETED, State.FAILED, State.CANCELLED}
LOST = Reason.ERROR_REASON_WORKER_LOST
DOCUMENT = Path(__file__).parents[2] / "docs" / "state-machine.md"

amounts = st.integers(1, 2**53)
steps = st.integers(1, 8_000)
jitters = st.floats(0, 1, exclude_max=True)


def test_states_and_priorities_are_numbered_as_in_the_proto():
    assert {f"STATE_{state.name}": int(state) for state in State} == {
        name: number for name, number in jobs_pb2.State.items() if name != "STATE_UNSPECIFIED"
    }
    assert {f"PRIORITY_{priority.name}": int(priority) for priority in Priority} == {
        name: number for name, number in jobs_pb2.Priority.items() if name != "PRIORITY_UNSPECIFIED"
    }


def test_every_state_has_its_transitions_and_of_the_ended_only_failed_has_a_way_back():
    assert set(TRANSITIONS) == set(State)
    assert {state for state in State if state.terminal} == TERMINAL
    assert {state: TRANSITIONS[state] for state in TERMINAL} == {
        State.COMPLETED: frozenset(),
        State.CANCELLED: frozenset(),
        State.FAILED: frozenset({State.PENDING}),
    }


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (State.PENDING, {State.PROCESSING, State.FAILED}),
        (State.PROCESSING, {State.PENDING, State.PROCESSING}),
        (State.COMPLETED, {State.PROCESSING}),
        (State.FAILED, {State.PROCESSING}),
        (State.CANCELLED, {State.PENDING, State.PROCESSING}),
    ],
)
def test_sources_are_the_transitions_read_backwards(target: State, expected: set[State]):
    assert set(sources(target)) == expected


@pytest.mark.parametrize(
    ("state", "steps_done", "cost"),
    [
        (State.COMPLETED, 0, 100),  # the price agreed, whatever was counted
        (State.COMPLETED, 3, 100),
        (State.CANCELLED, 0, 0),
        (State.CANCELLED, 1, 33),  # rounded down, for the user
        (State.CANCELLED, 2, 66),
        (State.CANCELLED, 3, 100),
        (State.CANCELLED, 9, 100),  # never more than was held
        (State.FAILED, 2, 0),
    ],
)
def test_what_an_ending_costs(state: State, steps_done: int, cost: int):
    assert cost_of(state, estimated_cost=100, steps_agreed=3, steps_done=steps_done) == cost


@given(estimated=amounts, agreed=steps, done=st.integers(0, 10_000))
def test_a_cancelled_job_costs_its_share_and_never_more_than_was_held(estimated: int, agreed: int, done: int):
    cost = cost_of(State.CANCELLED, estimated_cost=estimated, steps_agreed=agreed, steps_done=done)
    share = estimated * min(done, agreed)
    assert cost * agreed <= share < (cost + 1) * agreed
    assert 0 <= cost <= estimated


@given(estimated=amounts, agreed=steps, done=st.integers(0, 10_000))
def test_more_steps_never_cost_less(estimated: int, agreed: int, done: int):
    first, second = (cost_of(State.CANCELLED, estimated_cost=estimated, steps_agreed=agreed, steps_done=n) for n in (done, done + 1))
    assert first <= second


# --- another attempt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "waits_s"),
    [
        (LOST, [1, 2, 4, 32, 60, 60]),
        (Reason.ERROR_REASON_UNAVAILABLE, [1, 2, 4, 32, 60, 60]),
        (Reason.ERROR_REASON_LIMIT_REACHED, [1, 2, 4, 32, 60, 60]),
        (Reason.ERROR_REASON_STORE_FAILED, [4, 8, 16, 128, 256, 300]),
        (Reason.ERROR_REASON_MODEL_OUT_OF_MEMORY, [4, 8, 16, 120, 120, 120]),
    ],
)
def test_the_wait_before_another_attempt_doubles_up_to_its_cap(reason: ReasonValue, waits_s: list[float]):
    assert reason in BACKOFFS
    assert [retry_delay_s(reason, failures, max_attempts=101, jitter=0) for failures in (1, 2, 3, 6, 7, 100)] == waits_s


def test_what_lies_in_the_job_itself_is_never_tried_again():
    final = set(Reason.values()) - set(BACKOFFS)
    assert Reason.ERROR_REASON_INVALID_ARGUMENT in final
    assert all(retry_delay_s(reason, 1, max_attempts=100, jitter=0) is None for reason in final)


@pytest.mark.parametrize(("failures", "again"), [(1, True), (2, True), (3, False), (4, False)])
def test_no_attempt_follows_the_last_one(failures: int, again: bool):
    assert (retry_delay_s(LOST, failures, max_attempts=3, jitter=0) is not None) is again


@given(reason=st.sampled_from(sorted(BACKOFFS)), failures=st.integers(1, 99), jitter=jitters)
def test_jitter_takes_off_at_most_half(reason: int, failures: int, jitter: float):
    whole, drawn = (retry_delay_s(reason, failures, max_attempts=100, jitter=part) for part in (0.0, jitter))
    assert whole is not None
    assert drawn is not None
    assert whole / 2 <= drawn <= whole <= BACKOFFS[reason].cap_s


# --- fingerprints of failures -----------------------------------------------------------------------------------------


def fingerprint(message: str, *, model: str = "small", reason: ReasonValue = LOST) -> str:
    return failure(MeshError(grpc.StatusCode.ABORTED, reason, message), model).fingerprint


def test_a_failure_keeps_what_clients_see_and_names_its_reason():
    refusal = MeshError(grpc.StatusCode.ABORTED, LOST, "the worker was lost", metadata={"worker": "w"})
    known = failure(refusal, "small")
    assert status_pb2.Status.FromString(known.error) == refusal.to_status()
    assert known.reason == "ERROR_REASON_WORKER_LOST"
    assert re.fullmatch("[0-9a-f]{16}", known.fingerprint)  # as RequeueDeadLetter wants it


@given(numbers=st.tuples(st.integers(0), st.integers(0)), ids=st.tuples(st.uuids(), st.uuids()))
def test_failures_that_differ_in_numbers_and_ids_only_are_alike(numbers: tuple[int, int], ids: tuple[object, object]):
    first, second = (f"job {job_id} needs {number} bytes, has {number / 7:.1f}" for number, job_id in zip(numbers, ids, strict=True))
    assert fingerprint(first) == fingerprint(second)


def test_failures_of_another_reason_model_or_wording_are_not_alike():
    known = {
        fingerprint("out of memory"),
        fingerprint("out of luck"),
        fingerprint("out of memory", model="large"),
        fingerprint("out of memory", reason=Reason.ERROR_REASON_STORE_FAILED),
    }
    assert len(known) == 4


# --- the document -----------------------------------------------------------------------------------------------------


def table(heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading of docs/state-machine.md."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_document_has_every_transition_and_no_other():
    written = {tuple(re.findall("`([a-z]+)`", row[0])) for row in table("Transitions")}
    drawn = set(re.findall(r"^ +([a-z]+) --> ([a-z]+)", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert written == drawn == {(source.name.lower(), target.name.lower()) for source in State for target in TRANSITIONS[source]}


def test_the_document_has_the_backoffs():
    written = {row[0].strip("`"): (float(row[1]), float(row[2])) for row in table("When an attempt is tried again")}
    assert written == {Reason.Name(Reason.ValueType(reason)): (backoff.base_s, backoff.cap_s) for reason, backoff in BACKOFFS.items()}


@pytest.mark.parametrize(("plan", "priority"), [("PLAN_PRO", Priority.PRO), ("PLAN_FREE", Priority.FREE), ("", Priority.FREE)])
def test_priority_follows_from_the_plan(plan: str, priority: Priority):
    assert Priority.of_plan(plan) is priority
