"""The whole stack measured: second start, idle memory, CreateJob, progress events. Prints one JSON line.

    .venv/bin/python -m benchmarks.mesh [--jobs 200] [--watched 5]

Every latency is taken by a client through Envoy. Floors, in the same run: `GetJob` (the same way through Envoy, token check
and one query, no writes) for `CreateJob`; the period of a step for the delay of its event.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import grpc
import psutil

from cli.stack import Stack, StackSettings
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc

PASSWORD = "benchmark password"
WARM_UP = 20
GRANT_MILLICREDITS = 1_000_000_000


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {name: round(cuts[index] * 1000, 2) for name, index in (("p50", 49), ("p90", 89), ("p99", 98))}


def memory_mb(model_worker: bool) -> dict[str, float]:
    """Resident and proportional memory of every process below this one, without (or of only) model processes."""
    totals = {"rss": 0.0, "pss": 0.0}
    for child in psutil.Process().children(recursive=True):
        # torch is loaded in the model's own process and nowhere else.
        is_model = any("libtorch" in region.path for region in child.memory_maps())
        if is_model is model_worker:
            memory = child.memory_full_info()
            totals["rss"] += memory.rss / 2**20
            totals["pss"] += memory.pss / 2**20
    return {name: round(value) for name, value in totals.items()}


class Client:
    """A user of the mesh, through Envoy."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.identity: Any = identity_pb2_grpc.IdentityServiceStub(channel)
        self.jobs: Any = jobs_pb2_grpc.JobsServiceStub(channel)
        self.admin: Any = credits_pb2_grpc.LedgerAdminServiceStub(channel)
        self.metadata: list[tuple[str, str]] = []

    async def sign_in(self, email: str, password: str) -> list[tuple[str, str]]:
        """Metadata of a session."""
        credential = identity_pb2.PasswordCredential(email=email, password=password)
        session = await self.identity.SignIn(identity_pb2.SignInRequest(password=credential))
        return [("authorization", f"Bearer {session.access_token}")]

    async def prepare(self, stack: Stack) -> None:
        """A fresh user with credits."""
        email = f"{uuid.uuid4().hex}@example.com"
        registered = await self.identity.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
        self.metadata = await self.sign_in(email, PASSWORD)
        await self.admin.GrantCredits(
            credits_pb2.GrantCreditsRequest(
                request_id=str(uuid.uuid4()), user_id=registered.user.user_id, amount_millicredits=GRANT_MILLICREDITS, reason="benchmark"
            ),
            metadata=await self.sign_in(stack.admin_email, stack.admin_password),
        )

    async def create(self, steps: int) -> jobs_pb2.Job:
        """Submit a job."""
        spec = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger face", seed=1, steps=steps))
        request = jobs_pb2.CreateJobRequest(request_id=str(uuid.uuid4()), spec=spec)
        return (await self.jobs.CreateJob(request, metadata=self.metadata)).job

    async def finished(self, job_id: str) -> list[float]:
        """Watch a job to its end; the delays of its progress events, from the model's step to here."""
        watch = self.jobs.WatchJobs(jobs_pb2.WatchJobsRequest(job_ids=[job_id]), metadata=self.metadata)
        return [
            time.time() - message.event.event_time.ToNanoseconds() / 1e9
            async for message in watch
            if message.event.progress.stage == jobs_pb2.STAGE_DENOISING
        ]


async def measure(jobs: int, watched: int) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="genmesh-benchmark-") as directory:
        settings = StackSettings(state_dir=Path(directory), edge_port=0, edge_tls_port=0)
        starts: list[float] = []
        for _ in range(2):
            started = time.perf_counter()
            async with Stack(settings).running():
                starts.append(time.perf_counter() - started)
        async with Stack(settings).running() as stack, grpc.aio.insecure_channel(stack.edge_address) as channel:
            client = Client(channel)
            await client.prepare(stack)
            await client.finished((await client.create(steps=2)).job_id)
            idle, model = memory_mb(model_worker=False), memory_mb(model_worker=True)

            # The machine is idle but for the submits: the dispatcher is paused, each job is cancelled while it waits.
            creates: list[float] = []
            gets: list[float] = []
            dispatcher = psutil.Process(stack.process("dispatch-0").pid)
            dispatcher.suspend()
            for index in range(jobs + WARM_UP):
                started = time.perf_counter()
                job = await client.create(steps=1)
                created = time.perf_counter()
                await client.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=job.job_id), metadata=client.metadata)
                got = time.perf_counter()
                await client.jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id=job.job_id), metadata=client.metadata)
                if index >= WARM_UP:
                    creates.append(created - started)
                    gets.append(got - created)
            dispatcher.resume()

            delays: list[float] = []
            for _ in range(watched):
                delays += await client.finished((await client.create(steps=40)).job_id)
    create, get = percentiles_ms(creates), percentiles_ms(gets)
    return {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]},
        "start_s": {"first": round(starts[0], 1), "second": round(starts[1], 1)},
        "idle_memory_mb": idle,
        "model_process_memory_mb": model,
        "create_job_ms": create,
        "get_job_ms": get,
        "create_over_get_p50": round(create["p50"] / get["p50"], 2),
        "progress_delay_ms": percentiles_ms(delays),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--watched", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(measure(arguments.jobs, arguments.watched))))


if __name__ == "__main__":
    main()
