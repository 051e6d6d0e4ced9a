"""What the supervisor runs: a process as it is meant to be (`ProcessSpec`) and as it is (`ProcessStatus`)."""

import enum
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Check = Callable[[], Awaitable[None]]
"""Returns when the process does its work; raises whatever when it does not (yet)."""

Step = Callable[[], Awaitable[None]]


class StackError(Exception):
    """The stack cannot start or go on: what happened, what to do next, and the log lines that show it."""

    def __init__(self, message: str, advice: str = "", *, lines: tuple[str, ...] = ()) -> None:
        super().__init__("\n".join((message, *lines, *((advice,) if advice else ()))))
        self.message = message
        self.advice = advice
        self.lines = lines


class Phase(enum.IntEnum):
    """Order of stopping, last one first. Starting follows `after`, which allows more at a time."""

    PARTS = 0
    MIGRATIONS = 1
    SERVICES = 2
    WORKERS = 3
    EDGE = 4


class Health(enum.StrEnum):
    """Where a process stands."""

    WAITING = "waiting"  # for others to be ready first
    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"  # runs, but its check fails
    RESTARTING = "restarting"  # died; starts again after a pause
    DONE = "done"  # a one-time step that ended well
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Account:
    """The system user a child runs as, where that is not the supervisor's own."""

    user_id: int
    group_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """A process as it is meant to be.

    `check` None means a one-time step: it is ready when it has ended with 0. `prepare` runs before the first start,
    `on_ready` after every start as soon as `check` passes and before others see the process as ready.
    """

    name: str
    service: str
    role: str
    argv: tuple[str, ...]
    phase: Phase
    env: Mapping[str, str]
    check: Check | None = None
    after: tuple[str, ...] = ()
    prepare: Step | None = None
    on_ready: Step | None = None
    address: str = ""
    metrics_address: str = ""
    account: Account | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    start_timeout_s: float = 60.0
    takes_turn: bool = False
    """Its start keeps a core busy: not more of these start at once than there are cores to spare."""


@dataclass(slots=True)
class ProcessStatus:
    """A process as it is. `started_at` and `created_at` are Unix times; `created_at` is the kernel's and, with the pid, unique."""

    name: str
    service: str
    role: str
    address: str = ""
    metrics_address: str = ""
    pid: int | None = None
    health: Health = Health.WAITING
    restarts: int = 0
    started_at: float | None = None
    created_at: float | None = None
    detail: str = field(default="")

    @classmethod
    def of(cls, spec: ProcessSpec) -> "ProcessStatus":
        """The status of a process that has not started."""
        return cls(spec.name, spec.service, spec.role, spec.address, spec.metrics_address)

    @property
    def is_well(self) -> bool:
        """Whether it runs and works, or ended well where it was meant to end."""
        return self.health in (Health.HEALTHY, Health.DONE)

    def to_json(self) -> dict[str, Any]:
        """As written to stack.json."""
        return asdict(self)
