"""A watcher's backlog: bounded, newest progress wins, changes of state stay."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs_service.events import Position
from jobs_service.watch import BACKLOG_HARD, BACKLOG_SOFT, Ready, Watcher


def ready(number: int, *, job: str = "a", is_state: bool = False) -> Ready:
    return Ready(Position(number, 0), job, number, 1, is_state, False, b"")


def taken(watcher: Watcher) -> list[Ready]:
    events: list[Ready] = []
    while (event := watcher.next()) is not None:
        events.append(event)
    return events


@pytest.fixture
def watcher() -> Watcher:
    return Watcher("owner", frozenset())


def test_a_watcher_that_keeps_up_gets_everything_in_order(watcher: Watcher):
    events = [ready(number, is_state=number % 7 == 0) for number in range(BACKLOG_SOFT)]
    for event in events:
        watcher.offer(event)
    assert taken(watcher) == events


def test_a_watcher_that_lags_gets_the_newest_progress_of_each_job(watcher: Watcher):
    for number in range(10 * BACKLOG_SOFT):
        watcher.offer(ready(number, job="ab"[number % 2]))
    events = taken(watcher)
    assert len(events) <= BACKLOG_SOFT + 1
    assert {event.job_id: event.sequence for event in events} == {"a": 10 * BACKLOG_SOFT - 2, "b": 10 * BACKLOG_SOFT - 1}


def test_progress_of_one_job_makes_no_room_at_the_cost_of_another(watcher: Watcher):
    watcher.offer(ready(0, job="quiet"))
    for number in range(1, 3 * BACKLOG_SOFT):
        watcher.offer(ready(number, job="busy"))
    assert "quiet" in {event.job_id for event in taken(watcher)}


def test_beyond_the_hard_limit_the_watcher_starts_over(watcher: Watcher):
    for number in range(BACKLOG_HARD):
        watcher.offer(ready(number, is_state=True))
    assert not watcher.lost
    watcher.offer(ready(BACKLOG_HARD, is_state=True))
    assert watcher.lost
    watcher.start_over()
    assert not watcher.lost
    watcher.offer(ready(BACKLOG_HARD + 1, is_state=True))
    assert [event.sequence for event in taken(watcher)] == [BACKLOG_HARD + 1]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=4 * BACKLOG_SOFT))
def test_changes_of_state_are_never_dropped_and_order_is_kept(offered: list[tuple[str, bool]]):
    watcher = Watcher("owner", frozenset())
    events = [ready(number, job=job, is_state=is_state) for number, (job, is_state) in enumerate(offered)]
    for event in events:
        watcher.offer(event)
    got = taken(watcher)
    assert not watcher.lost
    assert [event.sequence for event in got] == sorted(event.sequence for event in got)
    assert [event for event in got if event.is_state] == [event for event in events if event.is_state]
    for job in "abc":  # the newest of each job is there
        assert [event for event in events if event.job_id == job][-1:] == [event for event in got if event.job_id == job][-1:]


async def test_waiting_ends_with_its_time(watcher: Watcher):
    async with asyncio.timeout(5):
        await watcher.wait(0.01)


async def test_a_timer_that_rings_too_early_does_no_harm(watcher: Watcher):
    taken(watcher)
    first = asyncio.create_task(watcher.wait(0.02))
    await asyncio.sleep(0)
    watcher.offer(ready(1))
    await first
    assert taken(watcher) == [ready(1)]
    async with asyncio.timeout(5):
        await watcher.wait(60)  # ends with the timer of the wait before: the stream looks at the clock and waits again
    assert taken(watcher) == []


async def test_waiting_ends_with_an_event_a_loss_or_a_wake(watcher: Watcher):
    for signal in (lambda: watcher.offer(ready(1)), watcher.lose, watcher.wake):
        taken(watcher)
        watcher.start_over()
        waiting = asyncio.create_task(watcher.wait(60))
        await asyncio.sleep(0)
        assert not waiting.done()
        signal()
        async with asyncio.timeout(5):
            await waiting


def test_a_watcher_of_named_jobs_wants_only_those():
    assert Watcher("owner", frozenset()).wants("a")
    assert Watcher("owner", frozenset({"a"})).wants("a")
    assert not Watcher("owner", frozenset({"a"})).wants("b")
