"""Files of yours, brought to the mesh: put, show."""

import time
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cli.amounts import time_text
from cli.commands import EdgeOption, JsonOption, missing_is, open_edge, parse_id
from cli.connection import BACKOFF_FIRST_S
from cli.failures import CommandError, ExitCode, failure_of, reason_of, usage
from cli.files import is_stream
from cli.output import note, upload_word, write_fields, write_json
from cli.upload import CONTENT_TYPES, UploadError, put
from genmesh.jobs.v1 import jobs_pb2

UPLOAD_TRIES = 3
CHECK_TIMEOUT_S = 60.0
"""The whole file is read and decoded before the answer."""

app = typer.Typer()
group = typer.Typer(help="Your uploads: files brought to the mesh and checked there.", no_args_is_help=True)
app.add_typer(group, name="uploads")


@group.command("put")
def put_upload(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Picture (PNG, JPEG, WebP) or audio (WAV, MP3, FLAC, Ogg).")],
    content_type: Annotated[
        str | None, typer.Option("--type", metavar="MIME", help="Its type, for example image/png. Default: by the name of FILE.")
    ] = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Upload a file and have it checked. Prints the upload's id; what was found goes to standard error."""
    announced = _announce(file, content_type)
    with open_edge(edge) as client:
        ticket = client.call(client.jobs.CreateUpload, announced)
        _send(file, announced, ticket)
        request = jobs_pb2.CompleteUploadRequest(upload_id=ticket.upload_id)
        try:
            upload = client.call(client.jobs.CompleteUpload, request, timeout_s=CHECK_TIMEOUT_S).upload
        except grpc.RpcError as error:
            if reason_of(error) != "ERROR_REASON_UPLOAD_INVALID":
                raise
            raise failure_of(error).told(code=ExitCode.USAGE, notes=(f"upload {ticket.upload_id}",)) from error
    if json_output:
        write_json(upload)
        return
    note(_found_text(upload))
    print(upload.upload_id)


def _announce(file: Path, content_type: str | None) -> jobs_pb2.CreateUploadRequest:
    """What CreateUpload has to know. Raises CommandError when there is nothing that can be uploaded."""
    content_type = content_type or CONTENT_TYPES.get(file.suffix.lower())
    if content_type is None:
        raise usage(f"the type of {file} is not known by its name", f"rename it ({' '.join(CONTENT_TYPES)}), or give --type")
    if not file.exists():
        raise usage(f"no such file: {file}", "check the name")
    if file.is_dir() or is_stream(file):
        raise usage(f"not a file: {file}", "only files can be uploaded: their size is announced before")
    size_bytes = file.stat().st_size
    if not size_bytes:
        raise usage(f"the file is empty: {file}", "choose another")
    return jobs_pb2.CreateUploadRequest(content_type=content_type, size_bytes=size_bytes)


def _send(file: Path, announced: jobs_pb2.CreateUploadRequest, ticket: jobs_pb2.CreateUploadResponse) -> None:
    """Put the file where the ticket says. A put that broke is done again from the start."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(file.name, total=announced.size_bytes)
        for left in reversed(range(UPLOAD_TRIES)):
            try:
                put(file, ticket.url, dict(ticket.headers), announced.size_bytes, lambda sent: progress.update(task, completed=sent))
            except UploadError as error:
                if not left or not error.repeatable:
                    raise CommandError(f"{file} was not uploaded: {error}", "run it again", code=ExitCode.UNAVAILABLE) from error
                time.sleep(BACKOFF_FIRST_S)
            else:
                return


def _found_text(upload: jobs_pb2.Upload) -> str:
    """`image/png, 64x48 pixels, 1234 bytes`."""
    found = [upload.content_type]
    if upload.width:
        found.append(f"{upload.width}x{upload.height} pixels")
    if upload.duration_ms:
        found.append(f"{upload.duration_ms / 1000:g} s")
    return ", ".join((*found, f"{upload.size_bytes} bytes"))


@group.command("show")
def show_upload(
    upload_id: Annotated[str, typer.Argument(metavar="UPLOAD", help="Id of the upload.")],
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show an upload: whether it can be used, what it is, when it is removed."""
    request = jobs_pb2.GetUploadRequest(upload_id=parse_id(upload_id, "an upload", "give the id that `genmesh uploads put` printed"))
    with open_edge(edge) as client, missing_is(f"you have no upload {upload_id}", "it may have been removed: upload the file again"):
        upload = client.call(client.jobs.GetUpload, request).upload
    if json_output:
        write_json(upload)
        return
    write_fields(
        [
            ("upload", upload.upload_id),
            ("state", upload_word(upload.state)),
            ("why", upload.rejection),
            ("what", _found_text(upload)),
            ("SHA-256", upload.sha256),
            ("made", time_text(upload.create_time)),
            ("removed after", time_text(upload.expire_time)),
        ]
    )
