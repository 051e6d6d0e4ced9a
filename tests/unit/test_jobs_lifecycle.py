"""The state machine of jobs, and what each ending costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.lifecycle import TRANSITIONS, Priority, State, cost_of, retry_delay_s, sources

TERMINAL = {State.COMPLETED, State.FAILED, State.CANCELLED}

amounts = st.integers(1, 2**53)
steps = st.integers(1, 8_000)


def test_states_and_priorities_are_numbered_as_in_the_proto():
    assert {f"STATE_{state.name}": int(state) for state in State} == {
        name: number for name, number in jobs_pb2.State.items() if name != "STATE_UNSPECIFIED"
    }
    assert {f"PRIORITY_{priority.name}": int(priority) for priority in Priority} == {
        name: number for name, number in jobs_pb2.Priority.items() if name != "PRIORITY_UNSPECIFIED"
    }


def test_every_state_has_its_transitions_and_only_terminal_states_have_none():
    assert set(TRANSITIONS) == set(State)
    assert {state for state in State if not TRANSITIONS[state]} == TERMINAL
    assert {state for state in State if state.terminal} == TERMINAL


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (State.PENDING, {State.PROCESSING}),
        (State.PROCESSING, {State.PENDING, State.PROCESSING}),
        (State.COMPLETED, {State.PROCESSING}),
        (State.FAILED, {State.PENDING, State.PROCESSING}),
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


def test_the_wait_before_a_retry_doubles_up_to_a_minute():
    assert [retry_delay_s(attempt) for attempt in (1, 2, 3, 6, 7, 100)] == [1, 2, 4, 32, 60, 60]


@pytest.mark.parametrize(("plan", "priority"), [("PLAN_PRO", Priority.PRO), ("PLAN_FREE", Priority.FREE), ("", Priority.FREE)])
def test_priority_follows_from_the_plan(plan: str, priority: Priority):
    assert Priority.of_plan(plan) is priority
