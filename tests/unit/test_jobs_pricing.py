"""Specs made whole and priced."""

from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from jobs_service.pricing import SEED_MAX, PricedSpec, price_image, resolve
from servicekit.errors import MeshError, Reason

MODEL = inference_pb2.Model(
    model_id="small",
    kind=jobs_pb2.KIND_IMAGE,
    is_default=True,
    pool="pictures",
    image=inference_pb2.ImageModel(
        default_width=64,
        default_height=48,
        default_steps=20,
        default_guidance_scale=6.5,
        min_size=32,
        max_size=128,
        size_multiple=16,
        max_steps=50,
    ),
    price=inference_pb2.Price(step_millicredits=7),
)
OTHER = inference_pb2.Model(model_id="other", kind=jobs_pb2.KIND_IMAGE, image=MODEL.image, price=MODEL.price)
MODELS = {"other": OTHER, "small": MODEL}


def priced(**fields: Any) -> PricedSpec:
    return resolve(jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", **fields)), MODELS)


def refused(**fields: Any) -> MeshError:
    with pytest.raises(MeshError) as raised:
        priced(**fields)
    return raised.value


def test_what_the_spec_leaves_open_is_the_models_default():
    result = priced(seed=5)
    assert result.spec.image == jobs_pb2.ImageSpec(
        prompt="a tiger",
        model="small",
        width=64,
        height=48,
        steps=20,
        guidance_scale=6.5,
        image_count=1,
        seed=5,
        format=jobs_pb2.IMAGE_FORMAT_PNG,
    )
    assert (result.model, result.kind, result.steps, result.cost_millicredits) == (MODEL, jobs_pb2.KIND_IMAGE, 20, 140)


def test_what_the_spec_says_stays_also_where_it_is_zero():
    image = priced(
        model="other", width=32, height=128, steps=1, guidance_scale=0.0, image_count=3, format=jobs_pb2.IMAGE_FORMAT_WEBP
    ).spec.image
    assert (image.model, image.width, image.height, image.steps, image.guidance_scale) == ("other", 32, 128, 1, 0.0)
    assert (image.image_count, image.format) == (3, jobs_pb2.IMAGE_FORMAT_WEBP)


def test_the_callers_spec_is_not_touched():
    spec = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger"))
    resolve(spec, MODELS)
    assert spec == jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger"))


def test_a_seed_is_drawn_where_the_spec_has_none():
    seeds = {priced().spec.image.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(1 <= seed <= SEED_MAX for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"width": 16}, "spec.image.width"),
        ({"width": 144}, "spec.image.width"),
        ({"width": 65}, "spec.image.width"),
        ({"height": 40}, "spec.image.height"),
        ({"steps": 51}, "spec.image.steps"),
        ({"strength": 0.5}, "spec.image.strength"),
        ({"model": "unheard-of"}, "spec.image.model"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_field(fields: dict[str, Any], field: str):
    refusal = refused(**fields)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation[0] for violation in refusal.violations] == [field]


@pytest.mark.parametrize("fields", [{"width": 32}, {"width": 128}, {"height": 48}, {"steps": 50}, {"steps": 1}])
def test_limits_themselves_are_allowed(fields: dict[str, Any]):
    assert priced(**fields).cost_millicredits >= 1


def test_an_unknown_model_has_its_own_reason():
    refusal = refused(model="unheard-of")
    assert (refusal.reason, refusal.metadata) == (Reason.ERROR_REASON_MODEL_UNKNOWN, {"model": "unheard-of"})


def test_image_to_image_is_not_offered_yet():
    refusal = refused(init_upload_id="upload")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED)
    assert [violation[0] for violation in refusal.violations] == ["spec.image.init_upload_id"]


@pytest.mark.parametrize("models", [{}, {"other": OTHER}], ids=["none offered", "no default"])
def test_without_a_model_to_run_it_a_spec_is_to_be_tried_again(models: dict[str, inference_pb2.Model]):
    with pytest.raises(MeshError) as raised:
        resolve(jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger")), models)
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE)
    assert raised.value.retry_after_s is not None


@pytest.mark.parametrize(
    ("fields", "cost"),
    [
        ({}, 140),
        ({"steps": 1}, 7),
        ({"image_count": 4}, 560),
        ({"width": 128, "height": 96}, 560),
        ({"width": 32, "height": 32, "steps": 1}, 3),  # 7 * 1024 / 3072 = 2.33, rounded up
    ],
)
def test_the_price_is_steps_by_pictures_by_area_rounded_up(fields: dict[str, int], cost: int):
    assert priced(**fields).cost_millicredits == cost


@given(
    step=st.integers(0, 10**6), steps=st.integers(1, 1000), count=st.integers(1, 8), width=st.integers(1, 4096), height=st.integers(1, 4096)
)
def test_the_price_is_never_below_the_exact_share_nor_a_millicredit_above(step: int, steps: int, count: int, width: int, height: int):
    model = inference_pb2.Model()
    model.CopyFrom(MODEL)
    model.price.step_millicredits = step
    cost = price_image(jobs_pb2.ImageSpec(steps=steps, image_count=count, width=width, height=height), model)
    exact = step * steps * count * width * height  # times the default area
    assert cost >= 1
    assert exact <= cost * 64 * 48
    assert cost == 1 or exact > (cost - 1) * 64 * 48
