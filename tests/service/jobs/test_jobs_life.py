"""The whole life of jobs against a model of it: any sequence of events, on the real database, gives what the model says."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy.ext.asyncio import AsyncConnection

from jobs_service import store
from jobs_service.lifecycle import TRANSITIONS, Failure, Job, State, cost_of
from jobs_service.settings import DispatchSettings
from jobs_service.store import Duty, OutboxRow, Retry
from jobs_service.tables import metadata, outbox, retries
from servicekit import database
from tests.service.jobs.world import new_job, submit
from tests.service.stateful import run_machine

T = TypeVar("T")

EXAMPLES = 30
STEPS = 40
SLEEPERS = 8
"""Newest versions whose writers wake up too late, each with every write there is."""
OWNERS = (uuid.UUID(int=1), uuid.UUID(int=2))
KEYS = (None, uuid.UUID(int=3), uuid.UUID(int=4))
"""API keys that are submitted and retried with."""
ENDINGS = [State.COMPLETED, State.FAILED, State.CANCELLED]
FAILURE = Failure(error=b"\x08\x0a", reason="ERROR_REASON_WORKER_LOST", fingerprint="f" * 16)
CLOCKED = {"create_time": None, "start_time": None, "finish_time": None, "retry_time": None, "cancel_requested_time": None}
"""Fields that the model knows the presence of only: the clock is the database's."""


@dataclass
class Known:
    """What the model knows of a job."""

    job: Job
    """The row, without its clock times."""
    times: frozenset[str]
    """Clock times that are set."""
    past: list[Job] = field(default_factory=list)
    """Rows as they were at every version before, for writers who slept."""
    entries: list[str] = field(default_factory=list)
    note: Retry | None = None
    duties: Counter[Duty] = field(default_factory=Counter)
    """Those outstanding."""
    rounds: int = 0
    """How often it ended."""
    settled: int = 0
    """Duties to settle that were ever done."""
    deleted: bool = False

    def is_in(self, *states: State) -> bool:
        return not self.deleted and self.job.state in states

    def moves(
        self, state: State, duties: tuple[Duty, ...], *, sets: set[str] | None = None, unsets: set[str] | None = None, **to: Any
    ) -> None:
        """The job is in another state now, one version on."""
        assert state in TRANSITIONS[self.job.state]
        self.past.append(self.job)
        self.job = replace(self.job, state=state, version=self.job.version + 1, **to)
        self.times = (self.times | (sets or set())) - (unsets or set())
        self.duties.update(duties)
        if state.terminal:
            self.rounds += 1


class LifeMachine(RuleBasedStateMachine):
    """Jobs of two owners; everybody who may write to them, in any order, on time and too late."""

    run: ClassVar[asyncio.Runner]
    connection: ClassVar[AsyncConnection]

    jobs = Bundle("jobs")

    @initialize()
    def begin(self) -> None:
        async def empty() -> None:
            async with self.connection.begin():
                await self.connection.execute(sa.text("TRUNCATE " + ", ".join(table.name for table in metadata.sorted_tables)))

        self.run.run(empty())
        self.all: list[Known] = []
        self.seen: dict[uuid.UUID, tuple[State, int]] = {}
        self.entries = 0

    def do(self, operation: Coroutine[Any, Any, T]) -> T:
        """In a transaction of its own, as every write in the service."""

        async def within() -> T:
            async with self.connection.begin():
                return await operation

        return self.run.run(within())

    def row(self, known: Known) -> Job:
        """The job as a caller gets it who looks now; one that is gone as it was last."""
        return self.do(store.get_job(self.connection, known.job.job_id)) or known.job

    def check(self, changed: tuple[Job, list[OutboxRow]] | Job | None, *, allowed: bool, duties: tuple[Duty, ...] = ()) -> bool:
        assert (changed is not None) is allowed
        if isinstance(changed, tuple):
            assert tuple(row.duty for row in changed[1]) == duties
        return allowed

    # --- the owner --------------------------------------------------------------------------------------------------

    @rule(target=jobs, owner=st.sampled_from(OWNERS), price=st.integers(1, 200), steps=st.integers(1, 20), key=st.sampled_from(KEYS))
    def submit(self, owner: uuid.UUID, price: int, steps: int, key: uuid.UUID | None) -> Any:
        if len(self.all) == 4:  # of few jobs each lives longer
            return multiple()
        job = self.do(submit(self.connection, new_job(owner, estimated_cost=price, steps_agreed=steps, api_key_id=key)))
        known = Known(replace(job, **CLOCKED), frozenset({"create_time"}), duties=Counter([Duty.ANNOUNCE]))
        self.all.append(known)
        return known

    @rule(known=jobs, other=st.booleans())
    def wish_to_cancel(self, known: Known, other: bool) -> None:
        owner = known.job.owner_id
        asked = self.do(store.request_cancel(self.connection, known.job.job_id, uuid.uuid4() if other else owner))
        if self.check(asked, allowed=known.is_in(State.PROCESSING) and not other):
            known.times |= {"cancel_requested_time"}  # no change of state: nobody is fenced by it

    @rule(known=jobs)
    def cancel_while_it_waits(self, known: Known) -> None:
        if not known.is_in(State.PROCESSING):
            self.end(known, State.CANCELLED, steps=0)

    # --- workers ----------------------------------------------------------------------------------------------------

    @rule(known=jobs, takeover=st.booleans())
    def start_from_a_new_entry(self, known: Known, takeover: bool) -> None:
        """The entry that was put last, or a stray second one: of a running job it starts nothing, however it was come by."""
        self.entries += 1
        self.start(known, f"s/{self.entries}-0", takeover=takeover, allowed=known.is_in(State.PENDING))

    @rule(known=jobs, takeover=st.booleans())
    def start_from_its_own_entry(self, known: Known, takeover: bool) -> None:
        """Read again, or claimed after its worker fell silent."""
        allowed = known.is_in(State.PENDING) or (takeover and known.is_in(State.PROCESSING))
        self.start(known, known.job.queue_entry, takeover=takeover, allowed=allowed)

    @rule(known=jobs, which=st.integers(0, 100))
    def start_from_an_old_entry(self, known: Known, which: int) -> None:
        if known.entries:
            entry = known.entries[which % len(known.entries)]
            own = entry == known.job.queue_entry
            self.start(known, entry, takeover=True, allowed=known.is_in(State.PENDING) or (own and known.is_in(State.PROCESSING)))

    def start(self, known: Known, entry: str, *, takeover: bool, allowed: bool) -> None:
        worker = f"w{self.entries}"
        attempt = store.start_attempt(self.connection, known.job.job_id, worker_id=worker, entry=entry, takeover=takeover)
        if self.check(self.do(attempt), allowed=allowed):
            lost = known.is_in(State.PROCESSING)
            known.entries.append(entry)
            known.moves(
                State.PROCESSING,
                (),
                sets={"start_time"},
                unsets={"retry_time"},
                attempt=known.job.attempt + 1,
                failures=known.job.failures + lost,
                worker_id=worker,
                queue_entry=entry,
            )

    @rule(known=jobs, failed=st.booleans(), delay_s=st.sampled_from([0.0, 60.0]))
    def put_back(self, known: Known, failed: bool, delay_s: float) -> None:
        back = self.do(store.requeue(self.connection, self.row(known), delay_s=delay_s, failed=failed, fallback_s=60))
        if self.check(back, allowed=known.is_in(State.PROCESSING), duties=(Duty.ANNOUNCE,)):
            due = {"retry_time"} if delay_s else set[str]()
            known.moves(State.PENDING, (Duty.ANNOUNCE,), sets=due, failures=known.job.failures + failed)

    @rule(known=jobs, state=st.sampled_from(ENDINGS), steps=st.integers(0, 25))
    def end(self, known: Known, state: State, steps: int) -> None:
        failure = FAILURE if state is State.FAILED else None
        assets = [b"a"] if state is State.COMPLETED else []
        ended = self.do(
            store.finish(self.connection, self.row(known), state, fallback_s=60, steps_done=steps, assets=assets, failure=failure)
        )
        allowed = not known.deleted and state in TRANSITIONS[known.job.state]
        if self.check(ended, allowed=allowed, duties=(Duty.ANNOUNCE, Duty.SETTLE)):
            price, agreed = known.job.estimated_cost, known.job.steps_agreed
            known.moves(
                state,
                (Duty.ANNOUNCE, Duty.SETTLE),
                sets={"finish_time"},
                steps_done=steps,
                assets=tuple(assets),
                cost=cost_of(state, estimated_cost=price, steps_agreed=agreed, steps_done=steps),
                failures=known.job.failures + (state is State.FAILED),
                error=failure and failure.error,
                failure_reason=failure and failure.reason,
                fingerprint=failure and failure.fingerprint,
            )

    @rule(known=jobs)
    def everybody_who_knew_it_before_writes_too_late(self, known: Known) -> None:
        async def write() -> None:
            connection = self.connection
            before = await store.get_job(connection, known.job.job_id)
            reservation_id = known.note.reservation_id if known.note else uuid.uuid4()
            for old in [*known.past[-SLEEPERS:], replace(known.job, version=known.job.version + 1)]:
                # As if the state were still the one it is in now: only attempt and version tell.
                stale = replace(old, state=known.job.state)
                for state in ENDINGS:
                    failure = FAILURE if state is State.FAILED else None
                    assert await store.finish(connection, stale, state, fallback_s=60, steps_done=1, failure=failure) is None
                for failed in (True, False):
                    assert await store.requeue(connection, stale, delay_s=0, failed=failed, fallback_s=60) is None
                assert await store.commit_retry(connection, stale, reservation_id, fallback_s=60) is None
                assert await store.delete_job(connection, stale) is None
            assert await store.get_job(connection, known.job.job_id) == before

        self.do(write())

    # --- bills, retries, deletion -------------------------------------------------------------------------------------

    @rule(known=jobs, duty=st.sampled_from(Duty))
    def do_duties(self, known: Known, duty: Duty) -> None:
        async def done() -> int:
            outstanding = await store.duties_of(self.connection, known.job.job_id, duty)
            await store.delete_duties(self.connection, outstanding)
            return len(outstanding)

        count = self.do(done())
        assert count == known.duties.pop(duty, 0)
        known.settled += count if duty is Duty.SETTLE else 0

    @rule(known=jobs, key=st.sampled_from(KEYS))
    def note_a_retry(self, known: Known, key: uuid.UUID | None) -> None:
        if not known.is_in(State.FAILED):
            return  # who notes has looked, and keeps the row locked
        reservation_id = uuid.uuid4()
        noted = self.do(store.add_retry(self.connection, known.job.job_id, reservation_id, api_key_id=key))
        known.note = known.note or Retry(reservation_id, abandoned=False, api_key_id=key)
        assert noted == known.note

    @rule(known=jobs, mine=st.booleans())
    def commit_a_retry(self, known: Known, mine: bool) -> None:
        note = known.note
        reservation_id = note.reservation_id if note is not None and mine else uuid.uuid4()
        back = self.do(store.commit_retry(self.connection, self.row(known), reservation_id, fallback_s=60))
        noted = note is not None and mine and not note.abandoned
        allowed = noted and known.is_in(State.FAILED) and not known.duties[Duty.SETTLE]
        if self.check(back, allowed=allowed, duties=(Duty.ANNOUNCE,)) and note is not None:
            known.note = None
            known.moves(
                State.PENDING,
                (Duty.ANNOUNCE,),
                unsets={"start_time", "finish_time", "retry_time", "cancel_requested_time"},
                attempt=0,
                failures=0,
                retry_count=known.job.retry_count + 1,
                reservation_id=reservation_id,
                api_key_id=note.api_key_id,
                worker_id="",
                queue_entry="",
                steps_done=0,
                cost=None,
                error=None,
                failure_reason=None,
                fingerprint=None,
            )

    @rule(known=jobs, settled=st.booleans(), key=st.sampled_from(KEYS))
    def fail_and_retry(self, known: Known, settled: bool, key: uuid.UUID | None) -> None:
        """What chance alone would seldom put together."""
        self.start_from_a_new_entry(known, takeover=False)
        self.end(known, State.FAILED, steps=1)
        if settled:
            self.do_duties(known, Duty.SETTLE)
        self.note_a_retry(known, key)
        self.commit_a_retry(known, mine=True)

    @rule()
    def abandon_all_retries(self) -> None:
        found = self.do(store.abandon_retries(self.connection, older_than_s=0, limit=100))
        noted = {(known.job.job_id, known.note.reservation_id) for known in self.all if known.note is not None}
        assert set(found) == noted
        for known in self.all:
            known.note = known.note and replace(known.note, abandoned=True)

    @rule(known=jobs)
    def forget_a_retry(self, known: Known) -> None:
        reservation_id = known.note.reservation_id if known.note else uuid.uuid4()
        self.do(store.delete_retry(self.connection, known.job.job_id, reservation_id))
        known.note = None

    @rule(known=jobs)
    def delete(self, known: Known) -> None:
        deleted = self.do(store.delete_job(self.connection, self.row(known)))
        allowed = known.is_in(*ENDINGS) and not known.duties.total() and known.note is None
        assert (deleted is not None) is allowed
        known.deleted |= allowed

    # --- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        jobs, duties, noted = self.do(self.everything())
        assert set(jobs) == {known.job.job_id for known in self.all if not known.deleted}
        for known in self.all:
            if not known.deleted:
                self.compare(jobs[known.job.job_id], known)
            assert duties.get(known.job.job_id, Counter()) == known.duties
            # Every round is settled once, and it is over before the next one begins.
            assert known.rounds == known.job.retry_count + known.job.state.terminal
            assert known.settled + known.duties[Duty.SETTLE] == known.rounds
            assert known.duties[Duty.SETTLE] <= known.job.state.terminal
            assert known.note is None or known.is_in(State.FAILED)
        assert noted == {known.job.job_id: known.note for known in self.all if known.note is not None}

    async def everything(self) -> tuple[dict[uuid.UUID, Job], dict[uuid.UUID, Counter[Duty]], dict[uuid.UUID, Retry]]:
        jobs = await store.media_owners(self.connection, [known.job.job_id for known in self.all])
        duties: dict[uuid.UUID, Counter[Duty]] = {}
        for job_id, duty in await self.connection.execute(sa.select(outbox.c.job_id, outbox.c.duty)):
            duties.setdefault(job_id, Counter())[Duty(duty)] += 1
        noted = await self.connection.execute(
            sa.select(retries.c.job_id, retries.c.reservation_id, retries.c.abandoned, retries.c.api_key_id)
        )
        return jobs, duties, {row.job_id: Retry(row.reservation_id, row.abandoned, row.api_key_id) for row in noted}

    def compare(self, job: Job, known: Known) -> None:
        assert replace(job, **CLOCKED) == known.job
        assert {name for name in CLOCKED if getattr(job, name) is not None} == known.times
        state, version = self.seen.get(job.job_id, (job.state, job.version))
        if job.version == version:
            assert job.state is state
        else:
            assert job.version > version
            assert job.version > version + 1 or job.state in TRANSITIONS[state]  # a rule may make more than one step
        self.seen[job.job_id] = job.state, job.version


def test_any_course_of_events_keeps_the_rules(settings: DispatchSettings):
    with asyncio.Runner() as runner:
        engine = database.create_engine(settings, schema="jobs", application="test")
        connection = runner.run(engine.connect().__aenter__())
        try:
            LifeMachine.run, LifeMachine.connection = runner, connection
            run_machine(LifeMachine, examples=EXAMPLES, steps=STEPS)
        finally:
            runner.run(connection.close())
            runner.run(engine.dispose())
