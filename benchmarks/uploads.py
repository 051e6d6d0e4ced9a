"""What an upload costs beside a bare PUT of the same bytes to the same store in the same run. Prints one JSON line.

    .venv/bin/python -m benchmarks.uploads [--rounds N] [--mebibytes N]

An upload is CreateUpload, the PUT to its URL and CompleteUpload, on `jobs_service.uploads` with PostgreSQL and the S3 server set up as the
stack does; every check runs in its limited process. The bare PUT goes to a presigned URL too. They take turns. The files are as large as
the default allows: noise, which no decoder gets through quickly for being simple. RPCs are left out: they add milliseconds.
"""

import argparse
import asyncio
import io
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import soundfile
from PIL import Image

from cli.stack import parts
from cli.stack.ports import hold_block
from cli.stack.postgres import DATABASE, ROLE_BY_SERVICE, Postgres
from cli.stack.supervisor import Supervisor
from jobs_service.settings import ServeSettings
from jobs_service.uploads.checker import Checker
from jobs_service.uploads.intake import Uploads
from jobs_service.uploads.store import UploadState
from servicekit import database
from servicekit.objects import ObjectStore

ROLE = ROLE_BY_SERVICE["jobs_service"]
MIB = 1 << 20
CHANNELS, RATE_HZ = 2, 44_100


def wav(size_bytes: int) -> bytes:
    """Noise of 16 bits."""
    body = io.BytesIO()
    samples = np.random.default_rng(1).integers(-20_000, 20_000, ((size_bytes - 1024) // 2 // CHANNELS, CHANNELS), np.int16)
    soundfile.write(body, samples, RATE_HZ, format="WAV", subtype="PCM_16")
    return body.getvalue()


def png(size_bytes: int) -> bytes:
    """Noise of three colours, which deflate cannot make smaller."""
    side = int((size_bytes * 0.99 / 3) ** 0.5)
    body = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)).save(body, "PNG", compress_level=1)
    return body.getvalue()


async def timed(act: Callable[[], Awaitable[None]]) -> float:
    started = time.perf_counter()
    await act()
    return time.perf_counter() - started


async def measure(uploads: Uploads, media: ObjectStore, http: httpx.AsyncClient, body: bytes, content_type: str, rounds: int) -> object:
    owner = uuid.uuid4()
    steps: dict[str, list[float]] = {"announce": [], "put": [], "complete": []}

    async def put(url: str, headers: dict[str, str]) -> None:
        (await http.put(url, content=body, headers=headers)).raise_for_status()

    async def bare() -> None:
        target = media.presign_put(f"bare/{uuid.uuid4()}", content_type, size_bytes=len(body), ttl_s=900)
        await put(target.url, dict(target.headers))

    async def upload() -> None:
        started = time.perf_counter()
        announced = await uploads.create(owner, content_type, len(body))
        said = time.perf_counter()
        await put(announced.put.url, dict(announced.put.headers))
        arrived = time.perf_counter()
        complete = await uploads.complete(owner, announced.upload_id)
        assert complete.state is UploadState.COMPLETE
        for name, seconds in (("announce", said - started), ("put", arrived - said), ("complete", time.perf_counter() - arrived)):
            steps[name].append(seconds)

    times: dict[str, list[float]] = {"bare_put": [], "upload": []}
    for _ in range(rounds):
        times["bare_put"].append(await timed(bare))
        times["upload"].append(await timed(upload))
    medians = {f"{name}_s": round(statistics.median(values), 3) for name, values in (times | steps).items()}
    ratio = statistics.median(upload / bare for upload, bare in zip(times["upload"], times["bare_put"], strict=True))
    return {"mebibytes": round(len(body) / MIB, 1), **medians, "worst_upload_s": round(max(times["upload"]), 3), "ratio": round(ratio, 2)}


async def run(rounds: int, size_bytes: int, directory: Path) -> object:
    supervisor = Supervisor(directory / "logs")
    for name in ("logs", "postgres", "objects"):
        (directory / name).mkdir(mode=0o700)
    with hold_block(None, directory) as ports:
        postgres = Postgres(directory / "postgres", ports.port("postgres"), secrets.token_urlsafe(16))
        password, key_id, key = secrets.token_urlsafe(16), secrets.token_hex(10), secrets.token_hex(20)
        try:
            store = parts.s3_spec(directory / "objects", ports.port("s3"), key_id, key)
            await supervisor.start([postgres.spec({ROLE: password}), store])
            url = postgres.sqlalchemy_url(DATABASE, ROLE, password)
            environment = {**os.environ, "GENMESH_DATABASE_URL": url}
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "jobs_service", "migrate", env=environment)
            if await process.wait():
                raise SystemExit("the schema could not be made")
            s3 = parts.s3_environment(ports.port("s3"), key_id, key)
            settings = ServeSettings.model_validate(
                {name.removeprefix("GENMESH_").lower(): value for name, value in s3.items()}
                | {"database_url": url, "redis_url": "redis://127.0.0.1:1/0", "certificates_dir": directory, "credits_address": "none:1"}
            )
            engine = database.create_engine(settings, schema="jobs", application="benchmark")
            with ObjectStore(settings) as media:
                uploads = Uploads(engine, media, Checker(settings.media_limits), settings.upload_limits)
                async with httpx.AsyncClient(timeout=120) as http:
                    results = {
                        name: await measure(uploads, media, http, make(size_bytes), content_type, rounds)
                        for name, content_type, make in (("wav", "audio/wav", wav), ("png", "image/png", png))
                    }
                await uploads.close()
            await engine.dispose()
            return results
        finally:
            await supervisor.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="genmesh-benchmark-") as directory:
        print(json.dumps(asyncio.run(run(arguments.rounds, arguments.mebibytes * MIB, Path(directory)))))


if __name__ == "__main__":
    main()
