"""The life of a job: its record, its states, what each ending costs. No I/O.

    pending ──► processing ──► completed
       │  ▲          │  ├────► failed
       │  └─ retry ──┘  └────► cancelled
       └─────────────────────► cancelled | failed

Every change of state raises `version` by one; `attempt` counts the starts and is the fencing token of a worker's writes.
"""

import enum
import uuid
from dataclasses import dataclass, field
from datetime import datetime


class State(enum.IntEnum):
    """States, numbered as in the proto."""

    PENDING = 1
    PROCESSING = 2
    COMPLETED = 3
    FAILED = 4
    CANCELLED = 5

    @property
    def terminal(self) -> bool:
        """Whether a job in this state has ended."""
        return self >= State.COMPLETED


TRANSITIONS: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.PROCESSING, State.CANCELLED, State.FAILED}),
    State.PROCESSING: frozenset({State.PROCESSING, State.PENDING, State.COMPLETED, State.FAILED, State.CANCELLED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}
"""From each state, where a job may go. processing → processing is a takeover after a lost lease."""


def sources(target: State) -> list[State]:
    """The states from which `target` may be reached: what a guarded UPDATE has to test."""
    return [state for state, targets in TRANSITIONS.items() if target in targets]


class Priority(enum.IntEnum):
    """Levels of the queue, numbered as in the proto."""

    FREE = 1
    PRO = 2

    @classmethod
    def of_plan(cls, plan: str) -> "Priority":
        """Level of the jobs of a plan."""
        return cls.PRO if plan == "PLAN_PRO" else cls.FREE


@dataclass(frozen=True, slots=True)
class Job:
    """A job as PostgreSQL has it. `spec`, `assets` and `error` are serialised messages of the contract."""

    job_id: uuid.UUID
    owner_id: uuid.UUID
    kind: int
    state: State
    version: int
    priority: Priority
    model: str
    pool: str
    spec: bytes
    steps_agreed: int
    estimated_cost: int
    attempt: int = 0
    worker_id: str = ""
    queue_entry: str = ""
    steps_done: int = 0
    cost: int | None = None
    assets: tuple[bytes, ...] = field(default=())
    error: bytes | None = None
    cancel_requested_time: datetime | None = None
    start_deadline: datetime | None = None
    create_time: datetime | None = None
    start_time: datetime | None = None
    finish_time: datetime | None = None


def cost_of(state: State, *, estimated_cost: int, steps_agreed: int, steps_done: int) -> int:
    """What a job that ends in `state` costs, in millicredits: the whole price when completed, the steps done (rounded
    down) when cancelled, nothing when it failed."""
    if state is State.COMPLETED:
        return estimated_cost
    if state is State.CANCELLED:
        return estimated_cost * min(steps_done, steps_agreed) // steps_agreed
    return 0


def retry_delay_s(attempt: int) -> float:
    """Wait before attempt `attempt` + 1: 1 s, 2 s, 4 s … at most a minute."""
    return min(60.0, 2.0 ** (attempt - 1))
