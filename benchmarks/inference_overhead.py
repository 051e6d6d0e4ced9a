"""What the service adds to a generation, against the bare diffusers pipeline in the same run. Prints one JSON line.

    .venv/bin/python -m benchmarks.inference_overhead [--rounds N] [--steps N]

Both sides make the same picture in turns, each in a process of its own with the same number of threads: the inference_service
of a whole stack, called as the dispatcher calls it, streams every step and preview over mTLS, encodes and stores; the bare
pipeline runs and converts to a PIL picture. Only the ratio says something on a machine that does other things too.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import uuid
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cli.stack import Stack, StackSettings
from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2
from inference_service.catalogue import Catalogue, Model
from servicekit.client import mesh_channel
from servicekit.settings import MeshSettings

CATALOGUE = Path(__file__).parents[1] / "models" / "catalogue.yaml"
PROMPT = "a tiger face"
THREADS = 1


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


async def measure(model: Model, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of both sides, and what there is to know beside them."""
    spec: dict[str, Any] = {
        "width": model.defaults.width,
        "height": model.defaults.height,
        "guidance_scale": model.defaults.guidance_scale,
    }
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=bare, args=(theirs, str(model.path), spec | {"num_inference_steps": steps}, THREADS), daemon=True)
    process.start()
    bare_s: list[float] = []
    service_s: list[float] = []
    pipeline_s: list[float] = []
    previews = 0
    async with AsyncExitStack() as resources:
        directory = resources.enter_context(tempfile.TemporaryDirectory(prefix="genmesh-benchmark-"))
        settings = StackSettings.model_validate({"state_dir": directory, "edge_port": 0, "edge_tls_port": 0, "torch_threads": THREADS})
        stack = await resources.enter_async_context(Stack(settings).running())
        mesh = MeshSettings.model_validate({"certificates_dir": stack.certificates_dir})
        channel = mesh_channel(mesh, stack.addresses["inference-0"], caller="jobs_service", service="inference_service")
        stub: Any = inference_pb2_grpc.InferenceServiceStub(await resources.enter_async_context(channel))
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
    catalogue = Catalogue.read(CATALOGUE)
    model = catalogue.default("image")
    assert model is not None
    result = asyncio.run(measure(model, arguments.rounds, arguments.steps or model.defaults.steps))
    print(json.dumps({"benchmark": "inference_overhead", "model": model.id, **result}))


if __name__ == "__main__":
    main()
