"""What administrators do: find accounts, give credits, look after the queue and the jobs that failed."""

import uuid
from typing import Annotated

import typer

from cli.client import Edge, paged
from cli.commands import EdgeOption, JsonOption, LimitOption, open_edge
from cli.commands.account import plan_word
from cli.failures import CommandError, ExitCode, usage
from cli.output import (
    credits_text,
    error_text,
    hold_word,
    level_word,
    note,
    parse_credits,
    seconds_text,
    time_text,
    write_json,
    write_table,
)
from genmesh.credits.v1 import credits_pb2
from genmesh.errors.v1 import errors_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2

REQUEUE_MAX = 1000
REQUEUE_TIMEOUT_S = 30.0
"""As long as the edge waits for an answer: every job that goes back is held for first. What was cut off can be run again."""

_REASON = "ERROR_REASON_"

app = typer.Typer()
group = typer.Typer(help="For administrators: accounts, credits, the queue.", no_args_is_help=True)
app.add_typer(group, name="admin")


@group.command()
def grant(
    who: Annotated[str, typer.Argument(metavar="EMAIL_OR_USER_ID", help="Who gets the credits.")],
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="How many credits, for example 100 or 2.5.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the ledger with your id.")],
    request_id: Annotated[
        str | None, typer.Option("--request-id", metavar="UUID", help="Run it again with the same id and it still grants once.")
    ] = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give credits to a user."""
    millicredits = parse_credits(amount)
    with open_edge(edge) as client:
        user_id = find_user_id(client, who)
        response = client.call(
            client.ledger_admin.GrantCredits,
            credits_pb2.GrantCreditsRequest(
                request_id=request_id or str(uuid.uuid4()), user_id=user_id, amount_millicredits=millicredits, reason=reason
            ),
        )
        if json_output:
            write_json(response)
        else:
            print(f"granted {credits_text(millicredits)}; {who} now has {credits_text(response.available_millicredits)}")


def find_user_id(client: Edge, who: str) -> str:
    """The id of an account given by id or e-mail address. Raises CommandError when there is no such address."""
    try:
        return str(uuid.UUID(who))
    except ValueError:
        if "@" not in who:
            raise usage(f"neither an e-mail address nor a user id: {who!r}", "`genmesh admin users` lists accounts") from None
    users = client.call(client.identity_admin.ListUsers, identity_pb2.ListUsersRequest(email=who)).users
    for user in users:
        if user.email == who.lower():
            return user.user_id
    raise CommandError(f"no account has the address {who}", "`genmesh admin users` lists accounts", code=ExitCode.NOT_FOUND)


@group.command()
def users(
    email: Annotated[str, typer.Option("--email", metavar="ADDRESS", help="Only the account with this address.")] = "",
    limit: LimitOption = 50,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List accounts, newest first."""
    with open_edge(edge) as client:

        def fetch(page_size: int, page_token: str):
            request = identity_pb2.ListUsersRequest(page_size=page_size, page_token=page_token, email=email)
            response = client.call(client.identity_admin.ListUsers, request)
            return response.users, response.next_page_token

        found = paged(fetch, limit)
        if json_output:
            for user in found:
                write_json(user)
            return
        write_table(
            ["e-mail", "name", "user id", "plan", "roles", "since"],
            (
                (user.email, user.display_name, user.user_id, plan_word(user), ",".join(user.roles), time_text(user.create_time))
                for user in found
            ),
        )


@group.command()
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


@group.command("dead-letters")
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


@group.command()
def requeue(
    job_id: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Id of a failed job.")] = None,
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
