"""A running inference_service with real S3 and mTLS, its clients, and what the bare pipeline makes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import pytest_asyncio
import yaml
from botocore.config import Config
from grpc_health.v1 import health_pb2
from PIL import Image
from safetensors.numpy import load_file, save_file

from inference_service.app import SERVED, Dependencies, build_host, build_server
from inference_service.catalogue import Catalogue
from inference_service.model_host import ModelHost
from inference_service.settings import InferenceSettings
from servicekit.client import mesh_channel
from servicekit.doorkeeper import Doorkeeper
from servicekit.identity import RemoteKeys
from servicekit.objects import ObjectStore
from servicekit.server import MeshServer
from servicekit.tls import TlsFiles
from tests.service.inference.inference_client import BARE_SPECS, TIGER, Client, client_of, serving

MODELS = Path(__file__).parents[3] / "models"


@dataclass(frozen=True)
class Service:
    """A server in this process, with its model process."""

    settings: InferenceSettings
    catalogue: Catalogue
    host: ModelHost
    server: MeshServer
    client: Client


def write_catalogue(file: Path, *changes: dict[str, Any]) -> Path:
    """A catalogue of the default model, once for each change; the first is the default."""
    entry = yaml.safe_load((MODELS / "catalogue.yaml").read_text())["models"][0]
    entry["path"] = str(MODELS / entry["path"])
    entries = [entry | change | {"default": number == 0} for number, change in enumerate(changes)]
    file.write_text(yaml.safe_dump({"models": entries}))
    return file


@pytest.fixture(scope="session")
def damaged_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the default model: one computes NaN, one has a truncated file, one has weights as a pickle."""
    root = tmp_path_factory.mktemp("models")
    copies = {name: Path(shutil.copytree(MODELS / "emoji-diffusion", root / name)) for name in ("nan", "truncated", "pickled")}
    for directory in copies.values():
        for path in (directory, *directory.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    weights = "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(copies["nan"] / weights)
    tensors["conv_in.weight"] = np.full_like(tensors["conv_in.weight"], np.nan)
    save_file(tensors, copies["nan"] / weights)
    truncated = copies["truncated"] / weights
    truncated.write_bytes(truncated.read_bytes()[:100_000])
    (copies["pickled"] / weights).rename(copies["pickled"] / "unet/diffusion_pytorch_model.bin")
    return copies


@pytest.fixture(scope="session")
def catalogue_file(tmp_path_factory: pytest.TempPathFactory, damaged_models: dict[str, Path]) -> Path:
    return write_catalogue(
        tmp_path_factory.mktemp("catalogue") / "catalogue.yaml",
        {},
        {"id": "second", "preload": False},
        *({"id": name, "path": str(directory), "preload": False} for name, directory in damaged_models.items()),
    )


@pytest.fixture(scope="session")
def environment(s3: dict[str, str], certificates: Path, catalogue_file: Path) -> dict[str, str]:
    return {**s3, "GENMESH_CERTIFICATES_DIR": str(certificates), "GENMESH_MODELS_FILE": str(catalogue_file), "GENMESH_DEVICE": "cpu"}


@pytest.fixture(scope="session")
def settings(environment: dict[str, str]) -> Iterator[InferenceSettings]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield InferenceSettings()  # pyright: ignore[reportCallIssue]


async def start_service(stack: AsyncExitStack, settings: InferenceSettings) -> Service:
    """Start a service in this process; it ends with the stack."""
    catalogue = Catalogue.read(settings.models_file)
    store = stack.enter_context(ObjectStore(settings))
    keys = RemoteKeys(settings.jwks_url, TlsFiles.of(settings.certificates_dir, "inference_service"))
    host = build_host(settings, catalogue)
    server = build_server(settings, Dependencies(catalogue, host, store, Doorkeeper(keys)))
    await stack.enter_async_context(host.running(server.draining))
    await stack.enter_async_context(server.running(*SERVED))
    channel = mesh_channel(settings, f"127.0.0.1:{server.port}", caller="jobs_service", service="inference_service")
    client = client_of(await stack.enter_async_context(channel))
    return Service(settings, catalogue, host, server, client)


@pytest_asyncio.fixture(scope="session")
async def service(settings: InferenceSettings) -> AsyncIterator[Service]:
    async with AsyncExitStack() as stack:
        running = await start_service(stack, settings)
        await serving(running.client, health_pb2.HealthCheckResponse.SERVING)
        yield running


@pytest.fixture(scope="session")
def bucket(s3: dict[str, str]) -> Any:
    """Reads objects as somebody else than the service would."""
    client = boto3.client(
        "s3",
        endpoint_url=s3["GENMESH_S3_ENDPOINT_URL"],
        aws_access_key_id=s3["GENMESH_S3_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["GENMESH_S3_SECRET_ACCESS_KEY"],
        region_name=s3.get("GENMESH_S3_REGION", "us-east-1"),
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    name = s3.get("GENMESH_S3_BUCKET", "genmesh-media")

    class Bucket:
        def read(self, key: str) -> tuple[bytes, str]:
            found = client.get_object(Bucket=name, Key=key)
            return found["Body"].read(), found["ContentType"]

        def keys(self, prefix: str) -> list[str]:
            return sorted(item.get("Key", "") for item in client.list_objects_v2(Bucket=name, Prefix=prefix).get("Contents", []))

    return Bucket()


@pytest.fixture(scope="session")
def bare_pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What diffusers makes of BARE_SPECS without any code of ours, in a process of its own."""
    directory = tmp_path_factory.mktemp("bare")
    script = """
import json, sys, torch
from diffusers import AutoPipelineForText2Image
torch.set_num_threads(1)
pipeline = AutoPipelineForText2Image.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
for number, spec in enumerate(json.loads(sys.argv[2])):
    seed, steps = spec.pop("seed"), spec.pop("steps")
    pipeline(generator=torch.Generator("cpu").manual_seed(seed), num_inference_steps=steps, **spec).images[0].save(f"{number}.png")
"""
    specs = json.dumps([{"prompt": TIGER, **spec} for spec in BARE_SPECS.values()])
    subprocess.run(
        [sys.executable, "-c", script, str(MODELS / "emoji-diffusion"), specs],
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return {name: np.asarray(Image.open(directory / f"{number}.png")) for number, name in enumerate(BARE_SPECS)}
