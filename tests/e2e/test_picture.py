"""The picture that came through the mesh is the one that the bare pipeline makes from the same spec and seed."""

import asyncio
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import DEADLINE_S, User, image

MODEL = Path(__file__).parents[2] / "models" / "emoji-diffusion"
BARE = """
import json, sys, torch
from diffusers import AutoPipelineForText2Image
torch.set_num_threads(1)
pipeline = AutoPipelineForText2Image.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
for number, spec in enumerate(json.loads(sys.argv[2])):
    seed, steps, count = spec.pop("seed"), spec.pop("steps"), spec.pop("image_count")
    for index in range(count):
        generator = torch.Generator("cpu").manual_seed(seed + index)
        pipeline(generator=generator, num_inference_steps=steps, **spec).images[0].save(f"{number}-{index}.png")
"""
SPECS: list[dict[str, Any]] = [
    {"prompt": "a tiger face", "seed": 7, "steps": 20, "width": 64, "height": 64, "guidance_scale": 3.0, "image_count": 1},
    {
        "prompt": "ghost, purple background",
        "negative_prompt": "red",
        "seed": 2**53 - 2,
        "steps": 3,
        "width": 72,
        "height": 40,
        "guidance_scale": 5.5,
        "image_count": 2,
    },
]


@pytest.fixture(scope="module")
async def bare(tmp_path_factory: pytest.TempPathFactory) -> list[list[np.ndarray]]:
    """What diffusers makes of SPECS without any code of ours, in a process of its own."""
    directory = tmp_path_factory.mktemp("bare")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", BARE, str(MODEL), json.dumps(SPECS), cwd=directory, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    async with asyncio.timeout(DEADLINE_S):
        _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]
    return [
        [np.asarray(Image.open(io.BytesIO((directory / f"{number}-{index}.png").read_bytes()))) for index in range(spec["image_count"])]
        for number, spec in enumerate(SPECS)
    ]


async def test_pictures_are_those_of_the_bare_pipeline(alice: User, bare: list[list[np.ndarray]]) -> None:
    for spec, wanted in zip(SPECS, bare, strict=True):
        job = await alice.finished((await alice.submit(image(**spec))).job_id)
        async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
            files = [(await client.get(asset.url)).content for asset in job.assets if asset.kind == jobs_pb2.Asset.KIND_IMAGE]
        pictures = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
        assert len(pictures) == len(wanted)
        for picture, expected in zip(pictures, wanted, strict=True):
            assert picture.shape == expected.shape == (spec["height"], spec["width"], 3)
            assert np.array_equal(picture, expected)
            assert picture.std() > 5, "a picture, and not one colour"
