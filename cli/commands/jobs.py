"""Jobs that stand: list, show, cancel, retry, delete, download, watch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console

from cli.amounts import credits_text, time_text
from cli.client import paged
from cli.commands import EdgeOption, JsonOption, LimitOption, interrupts, open_edge
from cli.commands.generate import check_completed, save
from cli.download import check_target
from cli.failures import CommandError, failure_of
from cli.output import (
    note,
    prompt_of,
    reason_text,
    state_word,
    waiting_fields,
    write_fields,
    write_json,
    write_table,
)
from cli.progress import JobView, JobViews, displaying
from genmesh.jobs.v1 import jobs_pb2

app = typer.Typer()
group = typer.Typer(help="Your jobs.", no_args_is_help=True)
app.add_typer(group, name="jobs")

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]


class JobState(StrEnum):
    """States of a job, as typed."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


_STATES = {state: jobs_pb2.State.Value(f"STATE_{state.name}") for state in JobState}


@group.command("list")
def list_jobs(
    state: Annotated[list[JobState] | None, typer.Option("--state", help="Only jobs in this state; may be repeated.")] = None,
    limit: LimitOption = 20,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List your jobs, newest first."""
    with open_edge(edge) as client:

        def fetch(page_size: int, page_token: str):
            request = jobs_pb2.ListJobsRequest(
                page_size=page_size, page_token=page_token, states=[_STATES[wanted] for wanted in dict.fromkeys(state or ())]
            )
            response = client.call(client.jobs.ListJobs, request)
            return response.jobs, response.next_page_token

        found = paged(fetch, limit)
        if json_output:
            for job in found:
                write_json(job)
            return
        write_table(
            ["job", "state", "created", "credits", "prompt"],
            (
                (
                    job.job_id,
                    state_word(job.state),
                    time_text(job.create_time),
                    credits_text(job.cost_millicredits or job.estimated_cost_millicredits).split()[0],
                    prompt_of(job),
                )
                for job in found
            ),
        )


@group.command()
def show(job_id: JobArgument, edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Show a job."""
    with open_edge(edge) as client:
        job = client.call(client.jobs.GetJob, jobs_pb2.GetJobRequest(job_id=job_id)).job
    if json_output:
        write_json(job)
        return
    image, receipt = job.spec.image, job.receipt
    write_fields(
        [
            ("job", job.job_id),
            ("state", JobView(job).describe()),
            *waiting_fields(job),
            ("error", reason_text(job) if job.state == jobs_pb2.STATE_FAILED else ""),
            ("prompt", prompt_of(job)),
            ("avoid", image.negative_prompt),
            ("model", image.model),
            ("size", f"{image.width}x{image.height}"),
            ("steps", str(image.steps)),
            ("guidance", f"{image.guidance_scale:g}"),
            ("seed", str(image.seed)),
            ("pictures", str(image.image_count or 1)),
            ("agreed price", credits_text(job.estimated_cost_millicredits)),
            ("charged", credits_text(job.cost_millicredits) if job.finish_time.seconds else ""),
            ("steps done", f"{receipt.steps_done} of {receipt.steps_agreed}" if receipt.steps_agreed else ""),
            ("price a step", credits_text(receipt.step_price_millicredits) if receipt.step_price_millicredits else ""),
            ("given back", credits_text(receipt.released_millicredits) if receipt.released_millicredits else ""),
            ("worker", f"{job.worker_id}, attempt {job.attempt}" if job.attempt else ""),
            ("retried", f"{job.retry_count} {'time' if job.retry_count == 1 else 'times'}" if job.retry_count else ""),
            ("created", time_text(job.create_time)),
            ("started", time_text(job.start_time)),
            ("ended", time_text(job.finish_time)),
            *((jobs_pb2.Asset.Kind.Name(asset.kind).removeprefix("KIND_").lower(), asset.url) for asset in job.assets),
        ]
    )


@group.command("cancel")
def cancel_job(job_id: JobArgument, edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Stop a job. One that waits costs nothing, one that runs is charged for the steps done."""
    with open_edge(edge) as client:
        job = client.call(client.jobs.CancelJob, jobs_pb2.CancelJobRequest(job_id=job_id)).job
    if json_output:
        write_json(job)
    elif job.state == jobs_pb2.STATE_CANCELLED:
        print(f"cancelled, charged {credits_text(job.cost_millicredits)}")
    else:
        print("stopping: it ends within one step")


@group.command("retry")
def retry_job(job_id: JobArgument, edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Put a failed job back into the queue. Its agreed price is held anew."""
    with open_edge(edge) as client:
        job = client.call(client.jobs.RetryJob, jobs_pb2.RetryJobRequest(job_id=job_id)).job
    if json_output:
        write_json(job)
    else:
        print(f"in the queue again, at most {credits_text(job.estimated_cost_millicredits)}; follow it with `genmesh watch {job_id}`")


@group.command("delete")
def delete_jobs(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB", help="Ids of jobs that have ended.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove jobs that have ended, with what they made, for good. Your ledger entries stay."""
    wanted = list(dict.fromkeys(job_ids))
    if not yes:
        what = "this job" if len(wanted) == 1 else f"these {len(wanted)} jobs"
        typer.confirm(f"Delete {what} and the media for good?", abort=True, err=True)
    refused: list[tuple[str, CommandError]] = []
    with open_edge(edge) as client:
        for job_id in wanted:
            try:
                receipt = client.call(client.jobs.DeleteJob, jobs_pb2.DeleteJobRequest(job_id=job_id)).receipt
            except grpc.RpcError as error:
                refused.append((job_id, failure_of(error)))
                continue
            if json_output:
                write_json(receipt)
            else:
                print(_receipt_text(receipt))
    if not refused:
        return
    first = refused[0][1]
    if len(wanted) == 1:
        raise first
    raise first.told(
        f"{len(refused)} of {len(wanted)} jobs were not deleted",
        notes=tuple(f"{job_id}: {failure.message}" for job_id, failure in refused),
    )


def _receipt_text(receipt: jobs_pb2.DeletionReceipt) -> str:
    files = f"{receipt.object_count} {'file' if receipt.object_count == 1 else 'files'}, {receipt.size_bytes} bytes"
    later = "; files remain while the store is away, and are removed as soon as it is back" if receipt.media_pending else ""
    return f"deleted {receipt.job_id} with {files}{later}"


@group.command()
def download(
    job_id: JobArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to save; a directory is fine.")] = None,
    edge: EdgeOption = None,
) -> None:
    """Save what a completed job made."""
    check_target(out)
    with open_edge(edge) as client:
        job = client.call(client.jobs.GetJob, jobs_pb2.GetJobRequest(job_id=job_id)).job
        check_completed(job)
        if job.state != jobs_pb2.STATE_COMPLETED:
            raise CommandError(f"the job has not ended: {JobView(job).describe()}", f"follow it with `genmesh watch {job_id}`")
        for path in save(client, job, out):
            print(f"saved {path}")


@app.command()
def watch(
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="JOB", help="Jobs to follow; none: all, until Ctrl-C.")] = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Follow jobs live until they have ended. Leaving with Ctrl-C does not touch them.

    The exit code tells how they ended: 0 all completed, 1 one failed, 7 one was cancelled.

    With --json: each message of the watch (WatchJobsResponse).
    """
    views = JobViews()
    with open_edge(edge) as client, interrupts(client.stop):
        try:
            if json_output:
                for response in client.watch(job_ids or ()):
                    views.apply(response)
                    write_json(response)
            else:
                with displaying(views, Console(highlight=False)) as display:

                    def interrupted() -> None:
                        views.interrupt()
                        for view in views.by_id.values():
                            display.update(view)

                    for response in client.watch(job_ids or (), on_interruption=interrupted):
                        changed = views.apply(response)
                        if changed is not None:
                            display.update(changed)
        except KeyboardInterrupt:
            note("left; the jobs go on")
            raise
    # A failure says more than a cancellation.
    for view in sorted(views.by_id.values(), key=lambda view: view.job.state != jobs_pb2.STATE_FAILED):
        check_completed(view.job)
