"""A long random schedule of faults under load: seeded, so that the same seed replays the same faults with the same pauses between them.

What each fault meets depends on the machine; what is asked and in which order does not.
"""

import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import User, image
from tests.faults import invariants
from tests.faults.mesh import LEASE_S, STREAMS_A_CHANNEL, WORKERS, Mesh, new_channel, running
from tests.faults.witness import Witness

OWNERS = 8
"""Half of them on the paid plan."""
GAP_MIN_S, GAP_MAX_S = 0.5, 3.0
FREEZE_MAX_S = 2 * LEASE_S
IN_FLIGHT_MAX = 16
"""Submits and cancels at a time: the load is bounded, whatever the faults do to it."""
CANCELLED_PART = 0.15
DROP_INTERVAL_S = 0.1
LOST_EVERY = 6
"""Of so many faults one is the loss of a worker with its job, with no other fault beside it: what is measured is the lease, and not
a queue without Redis."""
LOST_STEPS = 60
REPLICA_EVERY = 8
"""Of so many faults one hits a replica: its model takes seconds to load."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a schedule."""

    gap_s: float
    """Pause before it."""
    kind: str
    target: str
    hold_s: float
    """How long it lasts, where it lasts."""

    def __str__(self) -> str:
        return f"+{self.gap_s:.2f} s {self.kind} {self.target}{f' for {self.hold_s:.2f} s' if self.hold_s else ''}"


KINDS: tuple[tuple[str, tuple[str, ...], bool, int], ...] = (
    # kind, targets, whether it lasts, weight
    ("kill", WORKERS, False, 6),
    ("kill", ("jobs", "relay", "credits", "gateway", "envoy"), False, 5),
    ("freeze", (*WORKERS, "jobs", "relay", "credits"), True, 4),
    ("kill", ("redis",), False, 2),
    ("flush", ("redis",), False, 2),
    ("forget", ("redis",), False, 1),
    ("freeze", ("redis",), True, 1),
    ("kill", ("postgres",), False, 1),
    ("quit", ("postgres",), False, 1),
    ("cut", ("jobs_service", "credit_service", ""), False, 2),
    ("kill", ("s3",), False, 1),
    ("freeze", ("s3",), True, 1),
    ("refuse", ("s3",), True, 1),
)
REPLICA_KINDS = ("kill", "kill-model")


def plan(seed: int, seconds: float) -> list[Fault]:
    """The faults of a seed: the same for the same arguments."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    left_s = seconds
    while True:
        gap_s = chance.uniform(GAP_MIN_S, GAP_MAX_S)
        kind, targets, lasts, _ = chance.choices(KINDS, [weight for *_, weight in KINDS])[0]
        target = chance.choice(targets)
        hold_s = chance.uniform(0.2, FREEZE_MAX_S) if lasts else 0.0
        if len(faults) % LOST_EVERY == LOST_EVERY - 1:
            kind, target, hold_s = "lose", "the worker of a job", 0.0
            left_s -= 2 * LEASE_S  # so long it takes about
        elif len(faults) % REPLICA_EVERY == REPLICA_EVERY - 1:
            kind, target, hold_s = chance.choice(REPLICA_KINDS), chance.choice(WORKERS).replace("dispatch", "inference"), 0.0
        left_s -= gap_s + hold_s
        if left_s < 0:
            return faults
        faults.append(Fault(gap_s, kind, target, hold_s))


@dataclass(slots=True)
class Run:
    """What came of a schedule."""

    faults: int = 0
    jobs: int = 0
    recoveries: list[float] = field(default_factory=list)
    """From the death of a worker to the next attempt of its job, in leases, by the database's clock."""
    violations: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The one line that counts."""
        doubles = sum("paid for more than once" in violation or "several jobs" in violation for violation in self.violations)
        lost = sum(violation.startswith(("lost", "not ended")) for violation in self.violations)
        return (
            f"faults {self.faults} · jobs {self.jobs} · double charges {doubles} · lost {lost}"
            f" · worst recovery {max(self.recoveries, default=float('nan')):.2f} × lease"  # noqa: RUF001
        )


class Schedule:
    """Runs one."""

    def __init__(self, mesh: Mesh, *, seed: int, seconds: float, jobs: int, watchers: int, say: Callable[[str], None]) -> None:
        self._mesh = mesh
        self._chance = random.Random(f"load {seed}")
        self._seconds = seconds
        self._jobs = jobs
        self._watchers = watchers
        self._faults = plan(seed, seconds)
        self._say = say
        self._run = Run()

    async def run(self) -> Run:
        """Load and faults together; then everything drains, and is checked."""
        mesh = self._mesh
        users = [await mesh.new_user(pro=index % 2 == 0) for index in range(OWNERS)]
        async with AsyncExitStack() as stack:
            watching = await self._watch(users, stack)
            dropping = asyncio.create_task(self._drop(watching))
            loading = asyncio.create_task(self._load(users))
            try:
                lost = await self._inflict(users[0])
                accepted = await loading
                accepted[users[0].user_id] += lost
            finally:
                dropping.cancel()
                loading.cancel()
                mesh.controls.heal()
                await asyncio.gather(dropping, loading, return_exceptions=True)
            await mesh.well()
            await invariants.drained(mesh)
            heard = [witness.ended(*accepted[witness.user.user_id]) for witness in watching]
            for outcome in await asyncio.gather(*heard, return_exceptions=True):
                if outcome is not None:
                    self._run.violations.append(f"a watcher did not hear how its jobs ended: {outcome!r}"[:300])
            self._run.violations += await invariants.check(mesh, watching)
        self._run.jobs = sum(map(len, accepted.values()))
        return self._run

    async def _watch(self, users: list[User], stack: AsyncExitStack) -> list[Witness]:
        channels = [await stack.enter_async_context(new_channel(self._mesh.stack)) for _ in range(-(-self._watchers // STREAMS_A_CHANNEL))]
        watching = [Witness(users[index % OWNERS], channel=channels[index // STREAMS_A_CHANNEL]) for index in range(self._watchers)]
        for witness in watching:
            witness.start()
            stack.push_async_callback(witness.stop)
        for witness in watching:
            await witness.until(lambda: bool(witness.messages))  # noqa: B023
        return watching

    async def _drop(self, watching: list[Witness]) -> None:
        while watching:
            await asyncio.sleep(DROP_INTERVAL_S)
            self._chance.choice(watching).drop()

    async def _load(self, users: list[User]) -> dict[str, list[str]]:
        """Submit all jobs, spread over the schedule; cancel some."""
        accepted: dict[str, list[str]] = {user.user_id: [] for user in users}
        limit = asyncio.Semaphore(IN_FLIGHT_MAX)
        chance = random.Random(self._chance.random())
        asked = [
            (users[index % OWNERS], image(f"job {index}", width=64, height=64, steps=chance.randint(2, 6)), chance.random())
            for index in range(self._jobs)
        ]

        async def one(user: User, spec: jobs_pb2.JobSpec, luck: float) -> None:
            async with limit:
                job = await self._mesh.submit(user, spec)
                accepted[user.user_id].append(job.job_id)
                if luck < CANCELLED_PART:
                    await asyncio.sleep(luck / CANCELLED_PART)  # somewhere in its life
                    await self._mesh.cancel(user, job.job_id)

        tasks: list[asyncio.Task[None]] = []
        try:
            for user, spec, luck in asked:
                tasks.append(asyncio.create_task(one(user, spec, luck)))
                await asyncio.sleep(0.9 * self._seconds / self._jobs)
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return accepted

    async def _inflict(self, user: User) -> list[str]:
        """The faults, one after the other; ids of the jobs that lost their worker."""
        lost: list[str] = []
        for fault in self._faults:
            await asyncio.sleep(fault.gap_s)
            self._say(str(fault))
            self._run.faults += 1
            if fault.kind == "lose":
                lost.append(await self._lose(user))
            else:
                with suppress(OSError, TimeoutError):  # a fault that meets another one may find nothing to do
                    await self._strike(fault)
        return lost

    async def _lose(self, user: User) -> str:
        mesh = self._mesh
        await mesh.well()
        job = await mesh.submit(user, image(width=64, height=64, steps=LOST_STEPS))
        row = await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_PROCESSING)
        attempt: int = row["attempt"]
        killed_time = (await mesh.patiently_sql("SELECT clock_timestamp()"))[0][0]
        mesh.controls.kill(row["worker_id"])
        row = await mesh.until_row(job.job_id, lambda row: row["attempt"] > attempt or row["state"] >= jobs_pb2.STATE_COMPLETED)
        if row["attempt"] == attempt + 1:
            ratio = (row["start_time"] - killed_time).total_seconds() / LEASE_S
            self._say(f"ran again after {ratio:.2f} leases")
            self._run.recoveries.append(ratio)
        return job.job_id

    async def _strike(self, fault: Fault) -> None:
        controls = self._mesh.controls
        strikes: dict[str, Callable[[], object]] = {
            "kill": lambda: controls.kill(fault.target),
            "quit": lambda: controls.kill(fault.target, signal.SIGQUIT),
            "kill-model": lambda: controls.kill_model(fault.target),
            "forget": controls.forget_redis,
        }
        patient: dict[str, Callable[[], Awaitable[object]]] = {
            "flush": controls.flush_redis,
            "cut": lambda: controls.end_connections(fault.target),
        }
        if fault.kind in strikes:
            strikes[fault.kind]()
        elif fault.kind in patient:
            with suppress(Exception):  # Redis or PostgreSQL may be down already
                async with asyncio.timeout(2):
                    await patient[fault.kind]()
        elif fault.kind == "freeze":
            async with controls.frozen(fault.target):
                await asyncio.sleep(fault.hold_s)
        else:
            controls.refuse_media()
            try:
                await asyncio.sleep(fault.hold_s)
            finally:
                controls.accept_media()


async def main(*, seed: int, seconds: float, jobs: int, watchers: int) -> int:
    """Run a schedule on a stack of its own; the exit code."""
    print(f"seed {seed}", flush=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.2f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="genmesh-faults-") as directory:
        async with running(Path(directory) / "stack") as mesh:
            began = time.monotonic()
            run = await Schedule(mesh, seed=seed, seconds=seconds, jobs=jobs, watchers=watchers, say=say).run()
    for violation in run.violations:
        print(violation, file=sys.stderr)
    print(run.summary(), flush=True)
    return 1 if run.violations else 0
