"""The life of a job: its record, its states, what each ending costs. No I/O.

    pending ──► processing ──► completed
     │  ▲  ▲      │  ▲  │ ├──► failed ──┐
     │  │  └──────┘  └──┘ └──► cancelled│
     │  └─────── retried ───────────────┘
     └───────────────────────► cancelled

Every change of state raises `version` by one: it fences. A write names the version it began with, and comes too late once another
was first. `attempt` counts the starts for people; `failures` counts the attempts that failed or were lost against their limit.
docs/state-machine.md draws it, with who may do what.
"""

import enum
import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import grpc

from servicekit.errors import MeshError, Reason


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
    State.PENDING: frozenset({State.PROCESSING, State.CANCELLED}),
    State.PROCESSING: frozenset({State.PROCESSING, State.PENDING, State.COMPLETED, State.FAILED, State.CANCELLED}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset({State.PENDING}),
    State.CANCELLED: frozenset(),
}
"""From each state, where a job may go. processing → processing is a takeover after a lost lease; failed → pending a retry that
somebody asked for, with a new hold."""


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
    api_key_id: uuid.UUID | None = None
    """The API key that its hold counts under; None: its owner had signed in."""
    attempt: int = 0
    failures: int = 0
    """Attempts that failed or were lost since the job was submitted or retried."""
    retry_count: int = 0
    """How often it was put back after it had failed for good."""
    retry_time: datetime | None = None
    """When the next attempt is due, after a failed one."""
    reservation_id: uuid.UUID | None = None
    """The hold of a retried job; None: the first one, which has the job's id."""
    worker_id: str = ""
    queue_entry: str = ""
    steps_done: int = 0
    cost: int | None = None
    assets: tuple[bytes, ...] = field(default=())
    error: bytes | None = None
    failure_reason: str | None = None
    fingerprint: str | None = None
    estimate_s: float | None = None
    """Seconds from submission to the end, as estimated at submission."""
    cancel_requested_time: datetime | None = None
    start_deadline: datetime | None = None
    create_time: datetime | None = None
    start_time: datetime | None = None
    finish_time: datetime | None = None

    @property
    def hold_id(self) -> uuid.UUID:
        """Id of the reservation that pays for the job now."""
        return self.reservation_id or self.job_id

    @property
    def media_prefix(self) -> str:
        """Where its media lie: the same for every attempt, so that a retry overwrites and nothing is left behind."""
        return f"{self.owner_id}/{self.job_id}/"


def cost_of(state: State, *, estimated_cost: int, steps_agreed: int, steps_done: int) -> int:
    """What a job that ends in `state` costs, in millicredits: the whole price when completed, the steps done (rounded
    down) when cancelled, nothing when it failed."""
    if state is State.COMPLETED:
        return estimated_cost
    if state is State.CANCELLED:
        return estimated_cost * min(steps_done, steps_agreed) // steps_agreed
    return 0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts: the first, then doubled, at most `cap_s`."""

    base_s: float
    cap_s: float


BACKOFFS: Mapping[int, Backoff] = {
    Reason.ERROR_REASON_WORKER_LOST: Backoff(1, 60),
    Reason.ERROR_REASON_UNAVAILABLE: Backoff(1, 60),
    # Of the inference service: more attempts than it lets wait.
    Reason.ERROR_REASON_LIMIT_REACHED: Backoff(1, 60),
    # A store or a GPU's memory does not come back within a second.
    Reason.ERROR_REASON_STORE_FAILED: Backoff(4, 300),
    Reason.ERROR_REASON_MODEL_OUT_OF_MEMORY: Backoff(4, 120),
}
"""Failures that another attempt may not meet again. Any other reason lies in the job itself: it is never retried."""


def retry_delay_s(reason: int, failures: int, *, max_attempts: int, jitter: float) -> float | None:
    """Seconds to wait before the attempt after the `failures`-th failed one; None: there is none.

    `jitter` in [0, 1) takes off up to half, so that what failed together does not come back together.
    """
    backoff = BACKOFFS.get(reason)
    if backoff is None or failures >= max_attempts:
        return None
    return min(backoff.cap_s, backoff.base_s * 2.0 ** (failures - 1)) * (1 - jitter / 2)


_IDS_AND_NUMBERS = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8,}|\d+")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed for good. `error` is a serialised google.rpc.Status."""

    error: bytes
    reason: str
    fingerprint: str


def worker_lost() -> MeshError:
    """Why a job fails whose last attempt ended with its worker. The words are always the same: its fingerprint follows from them."""
    message = "its worker was lost, and no attempt is left"
    return MeshError(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_WORKER_LOST, message)


def failure(refusal: MeshError, model: str) -> Failure:
    """The failure that a refusal is; its fingerprint is the same for the same cause, whatever the numbers and ids in its words."""
    reason = Reason.Name(refusal.reason)
    words = _IDS_AND_NUMBERS.sub("#", refusal.message.lower())
    fingerprint = hashlib.sha256("\0".join((reason, model, words)).encode()).hexdigest()[:16]
    return Failure(refusal.to_status().SerializeToString(), reason, fingerprint)
