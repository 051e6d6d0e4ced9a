"""One attempt of a job: spec in, progress, previews and stored files out.

Checks what only the catalogue knows, runs the model, names and stores its pictures. No proto here; servicer turns what this
yields into messages.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from inference_service.catalogue import Catalogue
from inference_service.messages import EncodedImage, Encoding, Ended, Picture, PreviewPicture, Started, Step
from inference_service.model_host import ImageRequest, LoadingModel, ModelHost, Waiting
from servicekit.errors import MeshError, Reason, invalid
from servicekit.objects import ObjectStore

ASSET_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "assets.genmesh.internal")

DENOISED_PERCENT = 95.0
ENCODED_PERCENT = 97.0
"""Encoding and storing take a moment too: a bar that stands at 100 before the picture is there lies."""


class Stage(Enum):
    """What an attempt is busy with."""

    DENOISING = "denoising"
    ENCODING = "encoding"
    UPLOADING = "uploading"


@dataclass(frozen=True, slots=True)
class ImageJob:
    """What a spec asks for; None where it says nothing. Names as in ImageSpec."""

    prompt: str
    negative_prompt: str
    model: str
    width: int | None
    height: int | None
    steps: int | None
    guidance_scale: float | None
    seed: int
    image_count: int | None
    format: Literal["png", "webp"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an attempt is."""

    percent: float
    step: int
    step_count: int
    stage: Stage
    eta_seconds: float
    event_time: float
    """When it happened, Unix time."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the media bucket."""

    asset_id: str
    kind: Literal["image", "thumbnail"]
    object_key: str
    content_type: str
    size_bytes: int
    width: int
    height: int
    blurhash: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Complete:
    """The attempt is complete."""

    steps_done: int
    pipeline_ms: int


AttemptEvent = Waiting | LoadingModel | Progress | PreviewPicture | StoredFile | Complete


class ProgressMeter:
    """Turns measured steps into percent, which never falls, and an estimate of the seconds left."""

    def __init__(self, step_count: int) -> None:
        self._step_count = step_count
        self._step = 0
        self._seconds = 0.0

    def begun(self) -> Progress:
        """The model starts."""
        return self._progress(Stage.DENOISING, 0.0, time.time())

    def stepped(self, step: Step) -> Progress:
        """A step is done."""
        self._step = step.step
        self._seconds += step.seconds
        return self._progress(Stage.DENOISING, DENOISED_PERCENT * step.step / self._step_count, step.done_time)

    def encoding(self) -> Progress:
        """All steps are done."""
        return self._progress(Stage.ENCODING, DENOISED_PERCENT, time.time())

    def uploading(self) -> Progress:
        """The last picture is encoded."""
        return self._progress(Stage.UPLOADING, ENCODED_PERCENT, time.time())

    def _progress(self, stage: Stage, percent: float, event_time: float) -> Progress:
        mean_s = self._seconds / self._step if self._step else 0.0
        return Progress(percent, self._step, self._step_count, stage, mean_s * (self._step_count - self._step), event_time)


class Generation:
    """Runs attempts."""

    def __init__(self, catalogue: Catalogue, host: ModelHost, store: ObjectStore) -> None:
        self._catalogue = catalogue
        self._host = host
        self._store = store

    def resolve(self, job: ImageJob) -> ImageRequest:
        """The job with every default filled in. INVALID_ARGUMENT names each field that the model cannot do."""
        model = self._catalogue.find(job.model) if job.model else self._catalogue.default("image")
        if model is None:
            raise invalid("spec.image.model", "no such model", reason=Reason.ERROR_REASON_MODEL_UNKNOWN, metadata={"model": job.model})
        request = ImageRequest(
            model=model,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            width=job.width or model.defaults.width,
            height=job.height or model.defaults.height,
            steps=job.steps or model.defaults.steps,
            guidance_scale=model.defaults.guidance_scale if job.guidance_scale is None else job.guidance_scale,
            seed=job.seed,
            image_count=job.image_count or 1,
            format=job.format,
        )
        problems = [
            ("spec.image.width", model.limits.size_problem(request.width)),
            ("spec.image.height", model.limits.size_problem(request.height)),
            ("spec.image.steps", model.limits.steps_problem(request.steps)),
        ]
        violations = [(field, problem) for field, problem in problems if problem is not None]
        if violations:
            refusal = invalid(*violations[0])
            raise MeshError(
                refusal.code, refusal.reason, "; ".join(f"{field}: {problem}" for field, problem in violations), violations=violations
            )
        return request

    async def run(self, request: ImageRequest, output_prefix: str) -> AsyncGenerator[AttemptEvent]:
        """Run an attempt; `Complete` is last. Errors as of ModelHost.run, and UNAVAILABLE (STORE_FAILED).

        Object keys follow from `output_prefix` and the number of the picture alone: another attempt overwrites them.
        """
        meter = ProgressMeter(request.steps * request.image_count)
        async with aclosing(self._host.run(request)) as events:
            async for event in events:
                match event:
                    case Waiting() | LoadingModel() | PreviewPicture():
                        yield event
                    case Started():
                        yield meter.begun()
                    case Step():
                        yield meter.stepped(event)
                    case Encoding():
                        yield meter.encoding()
                    case Picture():
                        if event.index == request.image_count - 1:
                            yield meter.uploading()
                        for file in await self._keep(event, output_prefix):
                            yield file
                    case Ended():
                        yield Complete(event.steps_done, round(event.pipeline_s * 1000))

    async def _keep(self, picture: Picture, prefix: str) -> tuple[StoredFile, StoredFile]:
        # Both at once: a store's answer takes longer than the bytes of a thumbnail.
        return await asyncio.gather(
            self._put(f"{prefix}image-{picture.index}", "image", picture.image, picture.blurhash),
            self._put(f"{prefix}thumbnail-{picture.index}", "thumbnail", picture.thumbnail, picture.blurhash),
        )

    async def _put(self, name: str, kind: Literal["image", "thumbnail"], file: EncodedImage, blurhash: str) -> StoredFile:
        key = f"{name}.{file.suffix}"
        await self._store.put(key, file.body, file.content_type)
        return StoredFile(
            asset_id=str(uuid.uuid5(ASSET_NAMESPACE, key)),
            kind=kind,
            object_key=key,
            content_type=file.content_type,
            size_bytes=len(file.body),
            width=file.width,
            height=file.height,
            blurhash=blurhash,
            sha256=hashlib.sha256(file.body).hexdigest(),
        )
