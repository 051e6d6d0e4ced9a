"""RPCs of inference_service: proto ⇄ domain, nothing else."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2
from inference_service.catalogue import Catalogue, Model
from inference_service.generation import AttemptEvent, Complete, Generation, ImageJob, Progress, Stage, StoredFile
from inference_service.messages import PreviewPicture
from inference_service.model_host import LoadingModel, ModelHost, Waiting
from servicekit.errors import MeshError, Reason, invalid

Context = grpc.aio.ServicerContext[Any, Any]

_STAGES = {
    Stage.DENOISING: jobs_pb2.STAGE_DENOISING,
    Stage.ENCODING: jobs_pb2.STAGE_ENCODING,
    Stage.UPLOADING: jobs_pb2.STAGE_UPLOADING,
}
_ASSET_KINDS = {"image": jobs_pb2.Asset.KIND_IMAGE, "thumbnail": jobs_pb2.Asset.KIND_THUMBNAIL}
_JOB_KINDS = {"image": jobs_pb2.KIND_IMAGE}


class ModelCatalogServicer(inference_pb2_grpc.ModelCatalogServiceServicer):
    """genmesh.inference.v1.ModelCatalogService."""

    def __init__(self, catalogue: Catalogue, host: ModelHost) -> None:
        self._catalogue = catalogue
        self._host = host

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Context) -> inference_pb2.ListModelsResponse:
        """See inference.proto."""
        return inference_pb2.ListModelsResponse(models=[_model(model, self._host) for model in self._catalogue.models])


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """genmesh.inference.v1.InferenceService."""

    def __init__(self, catalogue: Catalogue, host: ModelHost, generation: Generation) -> None:
        self._catalogue = catalogue
        self._host = host
        self._generation = generation

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        """See inference.proto."""
        image = self._generation.resolve(_image_job(request.spec.image))
        async with aclosing(self._generation.run(image, request.output_prefix)) as events:
            async for event in events:
                yield _response(event, image.model.id)

    async def LoadModel(self, request: inference_pb2.LoadModelRequest, context: Context) -> inference_pb2.LoadModelResponse:
        """See inference.proto."""
        model = self._find(request.model_id)
        await self._host.load(model)
        return inference_pb2.LoadModelResponse(model=_model(model, self._host))

    async def UnloadModel(self, request: inference_pb2.UnloadModelRequest, context: Context) -> inference_pb2.UnloadModelResponse:
        """See inference.proto."""
        model = self._find(request.model_id)
        await self._host.unload(model)
        return inference_pb2.UnloadModelResponse(model=_model(model, self._host))

    def _find(self, model_id: str) -> Model:
        model = self._catalogue.find(model_id)
        if model is None:
            raise invalid("model_id", "no such model", reason=Reason.ERROR_REASON_MODEL_UNKNOWN, metadata={"model": model_id})
        return model


def _image_job(spec: jobs_pb2.ImageSpec) -> ImageJob:
    if spec.init_upload_id:
        raise MeshError(grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED, "starting from a picture is not offered yet")
    return ImageJob(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        model=spec.model,
        width=spec.width or None,
        height=spec.height or None,
        steps=spec.steps if spec.HasField("steps") else None,
        guidance_scale=spec.guidance_scale if spec.HasField("guidance_scale") else None,
        seed=spec.seed,
        image_count=spec.image_count or None,
        format="webp" if spec.format == jobs_pb2.IMAGE_FORMAT_WEBP else "png",
    )


def _model(model: Model, host: ModelHost) -> inference_pb2.Model:
    return inference_pb2.Model(
        model_id=model.id,
        display_name=model.display_name,
        kind=_JOB_KINDS[model.kind],
        is_default=model.default,
        image=inference_pb2.ImageModel(
            default_width=model.defaults.width,
            default_height=model.defaults.height,
            default_steps=model.defaults.steps,
            default_guidance_scale=model.defaults.guidance_scale,
            min_size=model.limits.min_size,
            max_size=model.limits.max_size,
            size_multiple=model.limits.size_multiple,
            max_steps=model.limits.max_steps,
        ),
        price=inference_pb2.Price(step_millicredits=model.price.step_millicredits),
        loaded=model.id in host.loaded,
        device=host.device,
        license=model.license,
        pool=model.pool,
    )


def _response(event: AttemptEvent, model_id: str) -> inference_pb2.GenerateResponse:
    match event:
        case Waiting():
            return inference_pb2.GenerateResponse(queued=inference_pb2.Queued(position=event.ahead))
        case LoadingModel():
            return inference_pb2.GenerateResponse(loading=inference_pb2.Loading(model_id=model_id))
        case Progress():
            response = inference_pb2.GenerateResponse(
                progress=jobs_pb2.Progress(
                    percent=event.percent,
                    step=event.step,
                    step_count=event.step_count,
                    stage=_STAGES[event.stage],
                    eta_seconds=event.eta_seconds,
                )
            )
            response.event_time.FromNanoseconds(int(event.event_time * 1e9))
            return response
        case PreviewPicture():
            return inference_pb2.GenerateResponse(preview=jobs_pb2.Preview(inline_jpeg=event.jpeg, blurhash=event.blurhash))
        case StoredFile():
            return inference_pb2.GenerateResponse(
                asset=jobs_pb2.Asset(
                    asset_id=event.asset_id,
                    kind=_ASSET_KINDS[event.kind],
                    content_type=event.content_type,
                    size_bytes=event.size_bytes,
                    width=event.width,
                    height=event.height,
                    blurhash=event.blurhash,
                    sha256=event.sha256,
                    object_key=event.object_key,
                )
            )
        case Complete():
            return inference_pb2.GenerateResponse(done=inference_pb2.Done(steps_done=event.steps_done, pipeline_ms=event.pipeline_ms))
