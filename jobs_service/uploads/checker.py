"""Runs `media_check` on a file, in a process that can do little and ends soon. What it says is read as a stranger's word."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import structlog
from prometheus_client import Histogram
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs_service.uploads.media import MediaLimits, Refusal
from servicekit.errors import unavailable

ANSWER_MAX_BYTES = 4096
COMMAND = (sys.executable, "-I", "-B", "-m", "jobs_service.uploads.media_check")

CHECK_SECONDS = Histogram("genmesh_upload_check_seconds", "Time of one check of an uploaded file in its process", ["outcome"])

_log = structlog.get_logger(__name__)


class Verdict(BaseModel):
    """What a check found: a refusal, or the size of a picture, or the duration of audio."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    refusal: Annotated[Refusal | None, Field(strict=False)] = None
    fault: Annotated[str, Field(max_length=200)] = ""
    width: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    height: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    duration_ms: Annotated[int, Field(ge=0)] = 0


class Checker:
    """Checks files, each in a process of its own."""

    def __init__(self, limits: MediaLimits, *, command: Sequence[str] = COMMAND) -> None:
        self.limits = limits
        self._command = command

    async def check(self, descriptor: int, content_type: str) -> Verdict:
        """Look at the file behind a read-only descriptor. UNAVAILABLE when the process could not begin, or nothing is heard in
        time; when it does not live to tell its verdict the file is refused: it was the file's doing."""
        started = asyncio.get_running_loop().time()
        verdict = await self._ask(descriptor, content_type)
        outcome = verdict.refusal.value if verdict.refusal else "passed"
        CHECK_SECONDS.labels(outcome).observe(asyncio.get_running_loop().time() - started)
        return verdict

    async def _ask(self, descriptor: int, content_type: str) -> Verdict:
        process = self._start(descriptor, content_type)
        said = b""
        try:
            async with asyncio.timeout(self.limits.wall_s), _reading(process) as stdout:
                while len(said) <= ANSWER_MAX_BYTES and (piece := await stdout.read(ANSWER_MAX_BYTES)):
                    said += piece
                if len(said) <= ANSWER_MAX_BYTES:
                    await asyncio.to_thread(process.wait)
        except TimeoutError:
            # Processor time is what a file may take, and is refused beyond. This may be a busy machine: the file is not judged by it.
            _log.warning("upload_check.too_slow", content_type=content_type)
            raise unavailable("the file could not be checked in time; try again", 5.0) from None
        finally:
            await _end(process)
        ready, _, answer = said.partition(b"\n")
        if ready != b"ready":
            _log.error("upload_check.did_not_begin", exit_code=process.returncode, said=said[:200])
            raise unavailable("the file cannot be checked right now", 5.0)
        return self._read(answer, content_type, process.returncode)

    def _start(self, descriptor: int, content_type: str) -> "subprocess.Popen[bytes]":
        # By `subprocess`, which does without fork: the fork of uvloop's own runs the handlers that gRPC has for forks, between its
        # threads, and every tenth child or so did not live to its first line.
        return subprocess.Popen(  # noqa: S603  # our own module
            [*self._command, content_type, self.limits.encode()],
            stdin=descriptor,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
            start_new_session=True,
        )

    def _read(self, answer: bytes, content_type: str, exit_code: int | None) -> Verdict:
        try:
            verdict = Verdict.model_validate_json(answer)
        except ValidationError:
            _log.warning("upload_check.died", exit_code=exit_code, said=answer[:200])
            return Verdict(refusal=Refusal.LIMITS)
        if verdict.fault:
            _log.error("upload_check.failed", error=verdict.fault)
            raise unavailable("the file cannot be checked right now", 5.0)
        if verdict.refusal is None and not self._plausible(verdict, picture=content_type.startswith("image/")):
            _log.warning("upload_check.implausible", said=answer[:200])
            return Verdict(refusal=Refusal.BROKEN)
        return verdict

    def _plausible(self, verdict: Verdict, *, picture: bool) -> bool:
        if picture:
            return 0 < verdict.width * verdict.height <= self.limits.max_pixels and not verdict.duration_ms
        # The last block is whole: a duration at the limit is rounded to milliseconds.
        return 0 < verdict.duration_ms <= self.limits.max_duration_s * 1000 + 1 and not verdict.width and not verdict.height


@asynccontextmanager
async def _reading(process: "subprocess.Popen[bytes]") -> AsyncGenerator[asyncio.StreamReader]:
    """What a process says, while the block runs; the pipe is closed at its end."""
    reader = asyncio.StreamReader(limit=ANSWER_MAX_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), process.stdout)
    try:
        yield reader
    finally:
        transport.close()


async def _end(process: "subprocess.Popen[bytes]") -> None:
    """Leave nothing of a process, nor of what it may have started, also when cancelled."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the leader of a session of its own
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, process.wait))
