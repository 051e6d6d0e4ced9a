"""What operators do with jobs: what waits and who works, failed jobs, and back into the queue with them."""

from typing import Annotated

import typer

from cli.amounts import credits_text, seconds_text, time_text
from cli.client import paged
from cli.commands import EdgeOption, JsonOption, LimitOption, open_edge
from cli.commands.admin_accounts import OPERATORS
from cli.failures import CommandError, usage
from cli.output import error_text, hold_word, level_word, note, write_json, write_table
from genmesh.errors.v1 import errors_pb2
from genmesh.jobs.v1 import jobs_pb2

REQUEUE_MAX = 1000
REQUEUE_TIMEOUT_S = 30.0
"""As long as the edge waits for an answer: every job that goes back is held for first. What was cut off can be run again."""

_REASON = "ERROR_REASON_"

app = typer.Typer()


@app.command(rich_help_panel=OPERATORS)
def queue(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Show what waits and runs, by pool and level, and who works on it."""
    with open_edge(edge) as client:
        pools = client.call(client.jobs_admin.GetQueueStats, jobs_pb2.GetQueueStatsRequest()).pools
    if json_output:
        for pool in pools:
            write_json(pool)
        return
    if not pools:
        note("no pool has jobs or workers")
        return
    write_table(
        ["pool", "level", "waiting", "delayed", "owners", "oldest wait", "running", "workers"],
        (row for pool in pools for row in _pool_rows(pool)),
    )


def _pool_rows(pool: jobs_pb2.PoolStats) -> list[list[str]]:
    """A row for each level; what runs and who works belongs to the pool and stands in its first row."""
    rows = [
        [
            level_word(level.priority),
            str(level.waiting_count),
            str(level.delayed_count),
            str(level.owner_count),
            seconds_text(level.oldest_wait_seconds) if level.waiting_count else "",
        ]
        for level in pool.levels
    ] or [[""] * 5]
    workers = "; ".join(_worker_text(worker) for worker in pool.workers) or "none"
    shared = [[str(pool.running_count), workers], *([["", ""]] * (len(rows) - 1))]
    return [[pool.pool, *row, *rest] for row, rest in zip(rows, shared, strict=True)]


def _worker_text(worker: jobs_pb2.Worker) -> str:
    slots = f"{worker.slot_count} {'slot' if worker.slot_count == 1 else 'slots'}"
    return f"{worker.worker_id} ({slots}, {', '.join(worker.loaded_models) or 'no model'} loaded)"


@app.command("dead-letters", rich_help_panel=OPERATORS)
def dead_letters(
    fingerprint: Annotated[str, typer.Option("--fingerprint", metavar="F", help="Only failures of this cause.")] = "",
    reason: Annotated[str, typer.Option("--reason", metavar="R", help="Only failures with this reason, for example worker_lost.")] = "",
    limit: LimitOption = 50,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List failed jobs of all owners, the newest failure first. Failures of the same cause have the same fingerprint."""
    wanted_reason = _reason_name(reason) if reason else ""
    with open_edge(edge) as client:

        def fetch(page_size: int, page_token: str):
            request = jobs_pb2.ListDeadLettersRequest(
                page_size=page_size, page_token=page_token, fingerprint=fingerprint, reason=wanted_reason
            )
            response = client.call(client.jobs_admin.ListDeadLetters, request)
            return response.dead_letters, response.next_page_token

        found = paged(fetch, limit)
        if json_output:
            for letter in found:
                write_json(letter)
            return
        write_table(
            ["failed", "job", "owner", "model", "reason", "fingerprint", "attempts", "retries", "worker", "price", "hold", "message"],
            (
                (
                    time_text(letter.fail_time),
                    letter.job_id,
                    letter.owner_id,
                    letter.model,
                    letter.reason.removeprefix(_REASON).lower(),
                    letter.fingerprint,
                    str(letter.attempt),
                    str(letter.retry_count),
                    letter.worker_id,
                    credits_text(letter.estimated_cost_millicredits),
                    hold_word(letter.hold),
                    letter.message,
                )
                for letter in found
            ),
        )


def _reason_name(text: str) -> str:
    """`worker-lost` → `ERROR_REASON_WORKER_LOST`. Raises CommandError when there is no such reason."""
    name = _REASON + text.upper().replace("-", "_").replace(" ", "_").removeprefix(_REASON)
    if name not in errors_pb2.ErrorReason.keys():  # noqa: SIM118  # no dictionary
        raise usage(f"no such reason: {text!r}", "give one as `genmesh admin dead-letters` shows it, for example worker_lost")
    return name


@app.command(rich_help_panel=OPERATORS)
def requeue(
    job_id: Annotated[str | None, typer.Argument(metavar="JOB", help="Id of a failed job; or give --fingerprint.")] = None,
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", metavar="F", help="Failed jobs of this cause, the oldest failures first.")
    ] = "",
    max_count: Annotated[
        int | None, typer.Option("--max", min=1, max=REQUEUE_MAX, metavar="N", help="With --fingerprint: at most N jobs. Default: 100.")
    ] = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Put failed jobs back into the queue: one, or those with a fingerprint. Their price is held anew."""
    if bool(job_id) == bool(fingerprint):
        raise usage("say which jobs: JOB or --fingerprint", "`genmesh admin dead-letters` lists both")
    if max_count is not None and not fingerprint:
        raise usage("--max goes with --fingerprint")
    request = (
        jobs_pb2.RequeueDeadLetterRequest(fingerprint=fingerprint, max_count=max_count or 0)
        if not job_id
        else jobs_pb2.RequeueDeadLetterRequest(job_id=job_id)
    )
    with open_edge(edge) as client:
        # By fingerprint it is not repeated: after a lost answer the second try would take the next jobs and not name the first.
        response = client.call(client.jobs_admin.RequeueDeadLetter, request, repeatable=not fingerprint, timeout_s=REQUEUE_TIMEOUT_S)
    if json_output:
        write_json(response)
    else:
        write_table(
            ["job", "result", "why"],
            [
                *((requeued, "in the queue again", "") for requeued in response.job_ids),
                *((refusal.job_id, "refused", error_text(refusal.error)) for refusal in response.refusals),
            ],
        )
    if response.job_ids:
        return
    if response.refusals:
        raise CommandError("no job went back into the queue", "the refusals say why; mend the cause and run it again")
    note("no failed job has this fingerprint")
