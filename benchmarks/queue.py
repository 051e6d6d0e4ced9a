"""What a job costs in the queue, against the same streams used bare, and against arq. Prints one JSON line.

    .venv/bin/python -m benchmarks.queue [--jobs N] [--rounds N] [--count N] [--owners N] [--arq-python PATH]

Every side puts all jobs in, takes `count` at a time and removes them, in turns on one Redis set up as the stack does: `raw` is
XADD, XREADGROUP COUNT, XACK and XDEL in plain pipelines; `raw_variadic` acknowledges a whole batch with one command of each kind;
`queue` is JobQueue with both levels, turns of owners and limits. arq pins an older redis-py: it runs in a process of its own, from
an environment given by --arq-python, enqueuing jobs that do nothing and draining them with a burst worker. Compared are jobs per
second of one core: processor time of the client and of Redis together, which a busy machine changes little.
"""

import argparse
import asyncio
import json
import secrets
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uuid_utils
from redis import asyncio as redis

from cli.stack import parts
from cli.stack.ports import hold_block
from cli.stack.supervisor import Supervisor
from jobs_service.lifecycle import Job, Priority, State
from jobs_service.queue import BATCH, JobQueue
from servicekit import streams
from servicekit.settings import RedisSettings

GROUP = "benchmark"
LIMITS = {Priority.FREE: 4, Priority.PRO: 16}
ARQ_TIMEOUT_S = 600
ARQ = """
import asyncio, json, sys, time
from arq import Worker, create_pool, func
from arq.connections import RedisSettings

async def nothing(context):
    pass

async def main(url, jobs, count):
    pool = await create_pool(RedisSettings.from_dsn(url))
    started, cpu = time.perf_counter(), time.process_time()
    for first in range(0, jobs, count):
        await asyncio.gather(*(pool.enqueue_job("nothing") for _ in range(min(count, jobs - first))))
    worker = Worker(
        [func(nothing, name="nothing", keep_result=0)],
        redis_pool=pool, burst=True, max_jobs=count, poll_delay=0.01, handle_signals=False,
    )
    await worker.async_run()
    assert worker.jobs_complete == jobs, worker.jobs_complete
    print(json.dumps([time.perf_counter() - started, time.process_time() - cpu]))

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""

Seconds = tuple[float, float]
"""Of the clock, and of the client's processor."""


def make_jobs(count: int, owners: int) -> list[Job]:
    """Jobs of both levels, owners in turns."""
    owner_ids = [uuid.uuid4() for _ in range(owners)]
    return [
        Job(
            job_id=uuid.UUID(bytes=uuid_utils.uuid7().bytes),
            owner_id=owner_ids[number % owners],
            kind=1,
            state=State.PENDING,
            version=1,
            priority=Priority(number // owners % 2 + 1),
            model="model",
            pool="pool",
            spec=b"",
            steps_agreed=1,
            estimated_cost=1,
        )
        for number in range(count)
    ]


async def raw(client: "redis.Redis", jobs: list[Job], count: int, *, variadic: bool) -> None:
    """A stream and a group, and nothing else."""
    stream: Any = f"raw:{secrets.token_hex(4)}"
    await client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    for first in range(0, len(jobs), BATCH):
        async with client.pipeline(transaction=False) as pipe:
            for job in jobs[first : first + BATCH]:
                pipe.xadd(stream, {"job": str(job.job_id), "owner": str(job.owner_id), "model": job.model})
            await pipe.execute()
    done = 0
    while done < len(jobs):
        reply: Any = await client.xreadgroup(GROUP, "worker", {stream: ">"}, count=count)
        entry_ids: list[bytes] = [entry_id for entry_id, _ in reply[0][1]]
        async with client.pipeline(transaction=False) as pipe:
            for some in [entry_ids] if variadic else [[entry_id] for entry_id in entry_ids]:
                pipe.xack(stream, GROUP, *some)
                pipe.xdel(stream, *some)
            await pipe.execute()
        done += len(entry_ids)


async def queue(client: "redis.Redis", jobs: list[Job], count: int) -> None:
    """The queue as the services use it."""
    ours = JobQueue(client, f"q{secrets.token_hex(4)}", lease_s=60, blocking=client, worker_id="worker", owner_limits=LIMITS)
    await ours.put_many(jobs)
    done = 0
    while done < len(jobs):
        entries = await ours.take(["pool"], count=count)
        await ours.done_many(entries)
        done += len(entries)


async def timed(work: Callable[[], Awaitable[None]]) -> Seconds:
    """What some work in this process takes."""
    started, cpu = time.perf_counter(), time.process_time()
    await work()
    return time.perf_counter() - started, time.process_time() - cpu


async def arq(python: Path, url: str, jobs: int, count: int) -> Seconds:
    """The same with arq."""
    process = await asyncio.create_subprocess_exec(str(python), "-c", ARQ, url, str(jobs), str(count), stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(ARQ_TIMEOUT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SystemExit(f"arq ended with {process.returncode}")
    elapsed_s, cpu_s = json.loads(output)
    return elapsed_s, cpu_s


async def server_cpu_s(client: "redis.Redis") -> float:
    """Processor time that Redis has used."""
    info: Any = await client.info("cpu")
    return info["used_cpu_user"] + info["used_cpu_sys"]


async def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Medians over the rounds of each side, and of the ratios within a round."""
    (directory / "redis").mkdir(mode=0o700)
    (directory / "logs").mkdir()
    supervisor = Supervisor(directory / "logs")
    with hold_block(None, directory) as ports:
        port, password = ports.port("redis"), secrets.token_urlsafe(16)
        try:
            await supervisor.start([parts.redis_spec(directory / "redis", port, password)])
            url = parts.redis_url(port, password)
            client = streams.connect(RedisSettings.model_validate({"redis_url": url}), blocking=True)
            try:
                return await compare(arguments, client, url)
            finally:
                await client.aclose()
        finally:
            await supervisor.stop()


async def compare(arguments: argparse.Namespace, client: "redis.Redis", url: str) -> dict[str, Any]:
    """All sides in turns, one round to warm up."""
    jobs, count = make_jobs(arguments.jobs, arguments.owners), arguments.count
    sides: dict[str, Callable[[], Awaitable[Seconds]]] = {
        "raw": lambda: timed(lambda: raw(client, jobs, count, variadic=False)),
        "raw_variadic": lambda: timed(lambda: raw(client, jobs, count, variadic=True)),
        "queue": lambda: timed(lambda: queue(client, jobs, count)),
    }
    python: Path | None = arguments.arq_python
    if python is not None:
        sides["arq"] = lambda: arq(python, url, len(jobs), count)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for round_number in range(arguments.rounds + 1):
        for name, side in sides.items():
            await client.flushall()
            before = await server_cpu_s(client)
            elapsed_s, client_cpu_s = await side()
            cpu_s = client_cpu_s + await server_cpu_s(client) - before
            if round_number:
                rates[name].append((len(jobs) / cpu_s, len(jobs) / elapsed_s))
    result: dict[str, Any] = {"redis": (await client.info("server"))["redis_version"]}
    for name, measured in rates.items():
        result[name] = {
            "jobs_per_s_per_core": round(statistics.median(per_core for per_core, _ in measured)),
            "jobs_per_s": round(statistics.median(per_s for _, per_s in measured)),
        }
    for name in sides:
        if name != "queue":
            ratios = [ours / theirs for (ours, _), (theirs, _) in zip(rates["queue"], rates[name], strict=True)]
            result[f"queue_to_{name}"] = round(statistics.median(ratios), 3)
    if python is None:
        result["arq"] = "not compared: --arq-python names no environment that has it"
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=64, help="jobs taken at once; for arq, jobs at a time")
    parser.add_argument("--owners", type=int, default=100)
    parser.add_argument("--arq-python", type=Path, help="python of an environment in which arq is installed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="genmesh-benchmark-") as directory:
        result = asyncio.run(measure(arguments, Path(directory)))
    settings = {name: getattr(arguments, name) for name in ("jobs", "rounds", "count", "owners")}
    print(json.dumps({"benchmark": "queue", **settings, **result}))


if __name__ == "__main__":
    main()
