"""Starts a service so that a test can kill it at an exact point: `python -m tests.faults.launcher SERVICE ROLE`.

The product has no hook for this. Functions of the product are wrapped before its main runs; a wrapper looks for a file that the
test writes to arm the point, and ends the process with SIGKILL when it is there. Imports next to nothing at first: a model
process that inference_service spawns imports this module too.
"""

import functools
import importlib
import inspect
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTORY = "GENMESH_FAULTS_DIR"
PROCESS = "GENMESH_FAULTS_PROCESS"

BEFORE, AFTER = "before", "after"

POINTS: dict[str, tuple[str, str, str, str]] = {
    # After ReserveCredits was answered, before the job is committed.
    "credits-held": ("jobs_service serve", "jobs_service.ledger", "Ledger.reserve", AFTER),
    # After the job was committed, before it is put into the queue and announced.
    "job-committed": ("jobs_service serve", "jobs_service.delivery", "Delivery.now", BEFORE),
    # After the duties of a commit were done, before they are deleted from the outbox: they will be done again.
    "duties-done": ("jobs_service", "jobs_service.store", "delete_duties", BEFORE),
    # After the media were stored, before the end of the job is committed.
    "media-stored": ("jobs_service dispatch", "jobs_service.store", "finish", BEFORE),
    # After the end of the job was committed, before it is announced, settled and taken from the queue.
    "end-committed": ("jobs_service dispatch", "jobs_service.delivery", "Delivery.now", BEFORE),
    # After all that, before its queue entry is acknowledged.
    "entry-kept": ("jobs_service dispatch", "jobs_service.queue", "JobQueue.done", BEFORE),
    # With every event of a job: what a job does that is the death of its dispatcher.
    "event": ("jobs_service dispatch", "jobs_service.events", "EventLog.publish", BEFORE),
    # When a job reaches a replica: what a job does that is the death of its replica.
    "generation": ("inference_service", "inference_service.generation", "Generation.resolve", BEFORE),
    # After the ledger has committed, before its caller hears of it.
    "hold-committed": ("credit_service", "credit_service.servicer", "LedgerServicer.ReserveCredits", AFTER),
    "capture-committed": ("credit_service", "credit_service.servicer", "LedgerServicer.CaptureReservation", AFTER),
    "grant-committed": ("credit_service", "credit_service.servicer", "LedgerAdminServicer.GrantCredits", AFTER),
    "clawback-committed": ("credit_service", "credit_service.servicer", "LedgerAdminServicer.ClawbackCredits", AFTER),
    "ceiling-committed": ("credit_service", "credit_service.servicer", "LedgerAdminServicer.SetUserCeiling", AFTER),
    # After a member got the credits of a month, before anybody hears of it and the round is over.
    "month-granted": ("credit_service", "credit_service.store", "grant_plan", AFTER),
    "release-committed": ("credit_service", "credit_service.servicer", "LedgerServicer.ReleaseReservation", AFTER),
}
"""Name → the processes that have it, module, function, and whether the process ends before the function or after it."""


def armed_file(directory: Path, process: str, point: str) -> Path:
    """Where a test arms a point of a process: JSON {"match": texts that the arguments have to contain, "always": bool}."""
    return directory / f"{process}.{point}"


def struck_file(directory: Path, process: str, point: str) -> Path:
    """Where a process notes that it ends at a point, a line each time."""
    return directory / f"{process}.{point}.struck"


def _strike(point: str, arguments: tuple[Any, ...]) -> None:
    directory, process = Path(os.environ[DIRECTORY]), os.environ[PROCESS]
    armed = armed_file(directory, process, point)
    try:
        rule = json.loads(armed.read_text())
    except FileNotFoundError:
        return
    told = repr(arguments)
    if not all(text in told for text in rule["match"]):
        return
    if not rule["always"]:
        armed.unlink()
    with struck_file(directory, process, point).open("a") as file:
        file.write("struck\n")
    os.kill(os.getpid(), signal.SIGKILL)


def _wrapped(point: str, function: Callable[..., Any], when: str) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            if when == BEFORE:
                _strike(point, (args[1:], kwargs))
            result = await function(*args, **kwargs)
            if when == AFTER:
                _strike(point, (args[1:], kwargs))
            return result

        return wrapper

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        if when == BEFORE:
            _strike(point, (args[1:], kwargs))
        result = function(*args, **kwargs)
        if when == AFTER:
            _strike(point, (args[1:], kwargs))
        return result

    return plain


def main() -> None:
    """Wrap the points of this process, then be the process."""
    service, role = sys.argv[1:]
    for point, (processes, module_name, path, when) in POINTS.items():
        if f"{service} {role}".startswith(processes):
            owner: Any = importlib.import_module(module_name)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, _wrapped(point, getattr(owner, name), when))
    sys.argv = [service, role]
    runpy.run_module(service, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
