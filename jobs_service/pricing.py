"""Specs made whole and priced: defaults and limits of the model, the server's price. No I/O."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc

from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from servicekit.errors import MeshError, Reason, invalid, unavailable

SEED_MAX = 2**53 - 1


@dataclass(frozen=True, slots=True)
class PricedSpec:
    """A spec with nothing left open, and what it costs."""

    spec: jobs_pb2.JobSpec
    model: inference_pb2.Model
    kind: int
    steps: int
    """Steps over all pictures."""
    cost_millicredits: int


def resolve(spec: jobs_pb2.JobSpec, models: Mapping[str, inference_pb2.Model]) -> PricedSpec:
    """Fill in the model's defaults, check its limits, price the result. The seed is drawn when the spec has none.

    Raises INVALID_ARGUMENT with a field path, UNAVAILABLE while no worker has offered a model yet.
    """
    if not models:
        raise unavailable("no worker has offered a model yet", 2.0)
    image = jobs_pb2.ImageSpec()
    image.CopyFrom(spec.image)
    if image.init_upload_id:
        raise MeshError(
            grpc.StatusCode.UNIMPLEMENTED,
            Reason.ERROR_REASON_NOT_OFFERED,
            "image to image is not offered yet",
            violations=[("spec.image.init_upload_id", "image to image is not offered yet")],
        )
    if image.strength:
        raise invalid("spec.image.strength", "only with init_upload_id")
    model = _find(image.model, models.values())
    limits = model.image
    image.model = model.model_id
    image.width = _size("width", image.width or limits.default_width, limits)
    image.height = _size("height", image.height or limits.default_height, limits)
    if not image.HasField("steps"):
        image.steps = limits.default_steps
    if image.steps > limits.max_steps:
        raise invalid("spec.image.steps", f"{model.model_id} does at most {limits.max_steps} steps")
    if not image.HasField("guidance_scale"):
        image.guidance_scale = limits.default_guidance_scale
    image.image_count = image.image_count or 1
    image.seed = image.seed or 1 + secrets.randbelow(SEED_MAX)
    if image.format == jobs_pb2.IMAGE_FORMAT_UNSPECIFIED:
        image.format = jobs_pb2.IMAGE_FORMAT_PNG
    steps = image.steps * image.image_count
    return PricedSpec(jobs_pb2.JobSpec(image=image), model, jobs_pb2.KIND_IMAGE, steps, price_image(image, model))


def price_image(image: jobs_pb2.ImageSpec, model: inference_pb2.Model) -> int:
    """Millicredits: step price by steps by pictures by area over the default area, rounded up, at least 1."""
    area = image.width * image.height
    default_area = model.image.default_width * model.image.default_height
    amount = model.price.step_millicredits * image.steps * image.image_count * area
    return max(1, -(-amount // default_area))


def _find(model_id: str, models: Iterable[inference_pb2.Model]) -> inference_pb2.Model:
    for model in models:
        if model.kind == jobs_pb2.KIND_IMAGE and (model.model_id == model_id or (not model_id and model.is_default)):
            return model
    if not model_id:
        raise unavailable("no worker offers a default model for pictures", 2.0)
    raise invalid(
        "spec.image.model",
        "no such model for pictures; ListModels has those there are",
        reason=Reason.ERROR_REASON_MODEL_UNKNOWN,
        metadata={"model": model_id},
    )


def _size(name: str, value: int, limits: inference_pb2.ImageModel) -> int:
    if not limits.min_size <= value <= limits.max_size or value % limits.size_multiple:
        raise invalid(
            f"spec.image.{name}", f"must be a multiple of {limits.size_multiple} from {limits.min_size} to {limits.max_size} for this model"
        )
    return value
