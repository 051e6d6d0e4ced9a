"""What the service adds to a generation, against the bare diffusers pipeline in the same run. Prints one JSON line.

    GENMESH_S3_…=… GENMESH_CERTIFICATES_DIR=… python benchmarks/inference_overhead.py [--rounds N] [--steps N]

Takes the settings of inference_service from the environment. Both sides make the same picture in turns, each in a process
of its own with the same number of threads: the service streams every step and preview over mTLS, encodes and stores; the
bare pipeline runs and converts to a PIL picture. Only the ratio of the medians says something on a machine that does
other things too.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
import uuid
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from typing import Any

from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2
from inference_service.app import SERVED, Dependencies, build_host, build_server
from inference_service.catalogue import Catalogue, Model
from inference_service.settings import InferenceSettings
from servicekit import telemetry
from servicekit.client import mesh_channel
from servicekit.identity import RemoteKeys
from servicekit.objects import ObjectStore
from servicekit.settings import load
from servicekit.tls import TlsFiles

PROMPT = "a tiger face"


def bare(connection: Connection, directory: str, spec: dict[str, Any], threads: int) -> None:
    """The bare pipeline: a seed in, seconds out."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    import torch
    from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image

    torch.set_num_threads(threads)
    pipeline = AutoPipelineForText2Image.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    while (seed := connection.recv()) is not None:
        started = time.perf_counter()
        pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(seed), **spec)
        connection.send(time.perf_counter() - started)


async def measure(settings: InferenceSettings, catalogue: Catalogue, model: Model, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of both sides, and what there is to know beside them."""
    spec: dict[str, Any] = {
        "width": model.defaults.width,
        "height": model.defaults.height,
        "guidance_scale": model.defaults.guidance_scale,
    }
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=bare, args=(theirs, str(model.path), spec | {"num_inference_steps": steps}, settings.torch_threads), daemon=True
    )
    process.start()
    bare_s: list[float] = []
    service_s: list[float] = []
    pipeline_s: list[float] = []
    previews = 0
    async with AsyncExitStack() as stack:
        store = stack.enter_context(ObjectStore(settings))
        keys = RemoteKeys(settings.jwks_url, TlsFiles.of(settings.certificates_dir, "inference_service"))
        host = build_host(settings, catalogue)
        server = build_server(settings, Dependencies(catalogue, host, store, keys))
        await stack.enter_async_context(host.running(server.draining))
        await stack.enter_async_context(server.running(*SERVED))
        channel = mesh_channel(settings, f"127.0.0.1:{server.port}", caller="jobs_service", service="inference_service")
        stub = inference_pb2_grpc.InferenceServiceStub(await stack.enter_async_context(channel))
        for round_number in range(rounds + 1):  # the first one warms both up
            seed = round_number + 1
            ours.send(seed)
            bare_round_s: float = await asyncio.to_thread(ours.recv)
            request = inference_pb2.GenerateRequest(
                job_id=str(uuid.uuid4()),
                attempt=1,
                spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt=PROMPT, model=model.id, seed=seed, steps=steps, **spec)),
                output_prefix="benchmarks/inference_overhead/",
            )
            started = time.perf_counter()
            pipeline_ms = 0
            round_previews = 0
            async for response in stub.Generate(request):
                round_previews += response.HasField("preview")
                pipeline_ms = response.done.pipeline_ms
            elapsed_s = time.perf_counter() - started
            if round_number:
                bare_s.append(bare_round_s)
                service_s.append(elapsed_s)
                pipeline_s.append(pipeline_ms / 1000)
                previews += round_previews
        ours.send(None)
        await asyncio.to_thread(process.join)
    return {
        "rounds": rounds,
        "steps": steps,
        "bare_median_s": round(statistics.median(bare_s), 4),
        "service_median_s": round(statistics.median(service_s), 4),
        "pipeline_in_service_median_s": round(statistics.median(pipeline_s), 4),
        "previews_per_picture": round(previews / rounds, 1),
        "ratio": round(statistics.median(service / alone for service, alone in zip(service_s, bare_s, strict=True)), 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=0, help="0: the model's default")
    arguments = parser.parse_args()
    settings = load(InferenceSettings)
    telemetry.configure(settings, service="inference_service", role="benchmark")  # logs to stderr: the result stays alone
    catalogue = Catalogue.read(settings.models_file)
    model = catalogue.default("image")
    assert model is not None
    result = asyncio.run(measure(settings, catalogue, model, arguments.rounds, arguments.steps or model.defaults.steps))
    print(json.dumps({"benchmark": "inference_overhead", "model": model.id, **result}))


if __name__ == "__main__":
    main()
