"""Making media: price it, submit it, follow it, save it. Also what there is to make it with."""

import json
import uuid
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.protobuf import json_format
from rich.console import Console

from cli.amounts import credits_text, seconds_text
from cli.client import Edge
from cli.commands import EdgeOption, JsonOption, interrupts, open_edge
from cli.download import DownloadError, check_target, fetch, media_of, target_paths
from cli.failures import CommandError, ExitCode, failure_of, reason_of, usage
from cli.inputs import parse_size
from cli.output import note, reason_text, write_fields, write_json, write_table
from cli.pictures import show_picture
from cli.progress import Display, JobView, JobViews, displaying
from genmesh.credits.v1 import credits_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2

DOWNLOAD_TRIES = 3

app = typer.Typer()
generate = typer.Typer(help="Make media from a prompt.", no_args_is_help=True)
estimate = typer.Typer(help="Say what a job would cost and how long it would take.", no_args_is_help=True)
app.add_typer(generate, name="generate")
app.add_typer(estimate, name="estimate")


class Format(StrEnum):
    """File format of pictures."""

    PNG = "png"
    WEBP = "webp"


_FORMATS = {Format.PNG: jobs_pb2.IMAGE_FORMAT_PNG, Format.WEBP: jobs_pb2.IMAGE_FORMAT_WEBP}

PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")]
SizeOption = Annotated[str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Size in pixels. Default: the model's.")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Denoising steps. Default: the model's.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Same seed, same picture. Default: drawn.")]
ModelOption = Annotated[str, typer.Option("--model", metavar="ID", help="Model, see `genmesh models`. Default: the default model.")]
GuidanceOption = Annotated[float | None, typer.Option("--guidance", metavar="SCALE", help="How closely to follow the prompt.")]
NegativeOption = Annotated[str, typer.Option("--negative", metavar="PROMPT", help="What to avoid.")]
CountOption = Annotated[int, typer.Option("--count", min=1, max=8, metavar="N", help="How many pictures.")]
FormatOption = Annotated[Format | None, typer.Option("--format", help="File format. Default: by the name of --out, else png.")]


def image_spec(
    prompt: str,
    *,
    size: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    model: str = "",
    guidance: float | None = None,
    negative: str = "",
    count: int = 1,
    file_format: Format | None = None,
) -> jobs_pb2.JobSpec:
    """A spec from what the user typed; what is left out is the model's choice."""
    width, height = parse_size(size) if size else (0, 0)
    try:
        image = jobs_pb2.ImageSpec(
            prompt=prompt,
            negative_prompt=negative,
            model=model,
            width=width,
            height=height,
            seed=seed or 0,
            image_count=count,
            format=_FORMATS[file_format or Format.PNG],
        )
        if steps is not None:
            image.steps = steps
        if guidance is not None:
            image.guidance_scale = guidance
    except (ValueError, UnicodeError) as error:  # beyond what the wire can carry: huge numbers, broken text
        raise usage(f"a value is out of range: {error}") from error
    return jobs_pb2.JobSpec(image=image)


@generate.command("image")
def generate_image(
    prompt: PromptArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File or directory to save to. Default: named after the prompt."),
    ] = None,
    size: SizeOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    model: ModelOption = "",
    guidance: GuidanceOption = None,
    negative: NegativeOption = "",
    count: CountOption = 1,
    file_format: FormatOption = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit and print the job's id; see `genmesh watch`.")] = False,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make pictures from a prompt and save them.

    Shows the progress while it runs. Ctrl-C cancels the job; a second one leaves at once.

    With --json: each message of the watch (WatchJobsResponse), then an object with job, files and availableMillicredits.

    For example: genmesh generate image "a tiger face" --size 64x64 --seed 7 --out tiger.png
    """
    if file_format is None and out is not None and out.suffix.lower() == ".webp":
        file_format = Format.WEBP
    spec = image_spec(
        prompt,
        size=size,
        steps=steps,
        seed=seed,
        model=model,
        guidance=guidance,
        negative=negative,
        count=count,
        file_format=file_format,
    )
    if not no_wait:
        check_target(out)
    with open_edge(edge) as client:
        job = submit(client, spec)
        if no_wait:
            if json_output:
                write_json(job)
            else:
                print(job.job_id)
            return
        job = follow(client, job, json_output=json_output)
        for path in finish(client, job, out, json_output=json_output):
            if not json_output:
                print(f"saved {path}")


def submit(client: Edge, spec: jobs_pb2.JobSpec) -> jobs_pb2.Job:
    """Submit a job once, however often the call has to be repeated."""
    return client.call(client.jobs.CreateJob, jobs_pb2.CreateJobRequest(request_id=str(uuid.uuid4()), spec=spec)).job


def cancel(client: Edge, job_id: str) -> jobs_pb2.Job:
    """Ask for a job to stop; one that ended meanwhile is fine. The job as it stands."""
    try:
        return client.call(client.jobs.CancelJob, jobs_pb2.CancelJobRequest(job_id=job_id)).job
    except grpc.RpcError as error:
        if reason_of(error) != "ERROR_REASON_JOB_TERMINAL":
            raise
    return client.call(client.jobs.GetJob, jobs_pb2.GetJobRequest(job_id=job_id)).job


def follow(client: Edge, job: jobs_pb2.Job, *, json_output: bool = False) -> jobs_pb2.Job:
    """Show a job on stderr (as JSON: on stdout) until it has ended. The ended job, with fresh URLs.

    The first Ctrl-C cancels the job and waits for what the server makes of it, the second ends in KeyboardInterrupt.
    """
    view = JobView(job)
    views = JobViews({job.job_id: view})
    nothing: AbstractContextManager[Display | None] = nullcontext()
    with nothing if json_output else displaying(views, Console(stderr=True, highlight=False)) as display:

        def show() -> None:
            if display is not None:
                display.update(view)

        def interrupted() -> None:
            views.interrupt()
            show()

        def ask_to_cancel() -> None:
            view.cancelling = True
            show()
            try:
                cancel(client, job.job_id)
            except (grpc.RpcError, CommandError) as error:
                view.cancelling = False
                failure = error if isinstance(error, CommandError) else failure_of(error)
                note(f"the job could not be cancelled: {failure.message}; Ctrl-C again leaves it running")

        show()
        with interrupts(ask_to_cancel, client.stop):
            try:
                for response in client.watch([job.job_id], on_interruption=interrupted):
                    views.apply(response)
                    show()
                    if json_output:
                        write_json(response)
            except KeyboardInterrupt:
                note(f"left; see `genmesh jobs show {job.job_id}`")
                raise
            except grpc.RpcError as error:
                if reason_of(error) != "ERROR_REASON_SCOPE_MISSING":
                    raise
                raise failure_of(error).told(
                    f"the job {job.job_id} was accepted, runs and is charged, but this API key may not look at it",
                    f"a key with the scope read, or a login, may: `genmesh jobs show {job.job_id}`",
                ) from error
    return client.call(client.jobs.GetJob, jobs_pb2.GetJobRequest(job_id=job.job_id)).job


def finish(client: Edge, job: jobs_pb2.Job, out: Path | None, *, json_output: bool = False) -> list[Path]:
    """Save what an ended job made and say what it cost; the files. Raises CommandError when it did not complete."""
    paths = save(client, job, out) if job.state == jobs_pb2.STATE_COMPLETED else []
    balance = _balance(client)
    if json_output:
        result: dict[str, object] = {
            "job": json_format.MessageToDict(job, always_print_fields_with_no_presence=True),
            "files": [str(path) for path in paths],
        }
        if balance is not None:
            result["availableMillicredits"] = str(balance)
        print(json.dumps(result), flush=True)
    check_completed(job)
    if not json_output:
        for path in paths:
            show_picture(path)
        left = f", {credits_text(balance)} left" if balance is not None else ""
        print(f"charged {credits_text(job.cost_millicredits)}{left}")
    return paths


def check_completed(job: jobs_pb2.Job) -> None:
    """Raise CommandError for a job that failed or was cancelled."""
    charged = f"charged {credits_text(job.cost_millicredits)}" if job.cost_millicredits else "nothing was charged"
    if job.state == jobs_pb2.STATE_FAILED:
        raise CommandError(
            f"the job failed: {reason_text(job)}",
            f"{charged}; `genmesh jobs show {job.job_id}` tells more, `genmesh jobs retry {job.job_id}` runs it again",
            status=job.error if job.error.code else None,
        )
    if job.state == jobs_pb2.STATE_CANCELLED:
        raise CommandError(f"the job was cancelled, {charged}", code=ExitCode.CANCELLED)


def save(client: Edge, job: jobs_pb2.Job, out: Path | None) -> list[Path]:
    """Download what a completed job made; a URL that fails is replaced by a fresh one."""
    paths = target_paths(job, out)
    if not paths:
        raise CommandError("the job made no file", f"`genmesh jobs show {job.job_id}` tells more")
    for index, path in enumerate(paths):
        for attempt in range(1, DOWNLOAD_TRIES + 1):
            try:
                fetch(media_of(job)[index], path)
                break
            except DownloadError as error:
                if attempt == DOWNLOAD_TRIES:
                    raise CommandError(
                        f"the result could not be fetched: {error}",
                        f"it is kept: try `genmesh jobs download {job.job_id}`",
                        code=ExitCode.UNAVAILABLE,
                    ) from error
                job = client.call(client.jobs.GetJob, jobs_pb2.GetJobRequest(job_id=job.job_id)).job
    return paths


def _balance(client: Edge) -> int | None:
    try:
        return client.call(client.credits.GetBalance, credits_pb2.GetBalanceRequest()).available_millicredits
    except grpc.RpcError:
        return None  # the job is done and saved: its success does not hang on this line


@estimate.command("image")
def estimate_image(
    prompt: PromptArgument,
    size: SizeOption = None,
    steps: StepsOption = None,
    model: ModelOption = "",
    count: CountOption = 1,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Price pictures without making them."""
    spec = image_spec(prompt, size=size, steps=steps, model=model, count=count)
    with open_edge(edge) as client:
        response = client.call(client.jobs.EstimateJob, jobs_pb2.EstimateJobRequest(spec=spec))
        if json_output:
            write_json(response)
            return
        write_fields(
            [
                ("price", f"at most {credits_text(response.cost_millicredits)}"),
                ("place in the queue", str(response.queue_position or "")),
                ("time", f"half of such jobs take less than {seconds_text(response.eta_p50_seconds)}" if response.eta_p50_seconds else ""),
                ("", f"nine of ten take less than {seconds_text(response.eta_p90_seconds)}" if response.eta_p90_seconds else ""),
            ]
        )


@app.command()
def models(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """List the models, their defaults, limits and prices."""
    with open_edge(edge) as client:
        found = client.call(client.models.ListModels, inference_pb2.ListModelsRequest()).models
        if json_output:
            for model in found:
                write_json(model)
            return
        write_table(
            ["model", "name", "kind", "default", "sizes", "steps", "price a step", "loaded", "licence"],
            (
                (
                    f"{model.model_id}{' (default)' if model.is_default else ''}",
                    model.display_name,
                    jobs_pb2.Kind.Name(model.kind).removeprefix("KIND_").lower(),
                    f"{model.image.default_width}x{model.image.default_height}, {model.image.default_steps} steps",
                    f"{model.image.min_size} to {model.image.max_size}, multiples of {model.image.size_multiple}",
                    f"up to {model.image.max_steps}",
                    credits_text(model.price.step_millicredits),
                    model.device if model.loaded else "no",
                    model.license,
                )
                for model in found
            ),
        )
