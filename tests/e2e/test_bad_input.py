"""What nobody should send: each refused with a typed error that names the field, before anything is held or made."""

import json
import math
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from genmesh.credits.v1 import credits_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import (
    CANCEL_JOB,
    CREATE_JOB,
    ESTIMATE_JOB,
    GET_JOB,
    LIST_ENTRIES,
    LIST_JOBS,
    Method,
    Refusal,
    Transport,
    User,
    bearer,
    image,
    refused,
    submission,
)
from tests.e2e.conftest import NewUser

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CREDITS = 1_000_000


@pytest_asyncio.fixture(scope="module")
async def victim(new_user: NewUser) -> User:
    """Has the credits to pay for whatever would get through."""
    return await new_user(CREDITS)


@pytest_asyncio.fixture(autouse=True)
async def _nothing_held_and_nothing_made(victim: User) -> AsyncGenerator[None]:  # pyright: ignore[reportUnusedFunction]
    yield
    assert await victim.balance() == (CREDITS, 0)
    assert await victim.jobs() == []
    assert len(await victim.entries()) == 1, "the grant"


def check(refusal: Refusal, field: str, transport: Transport, reason: str = "INVALID_ARGUMENT") -> None:
    """The typed refusal of a service that names the field."""
    assert (refusal.code, refusal.reason) == (INVALID, reason)
    assert [info.domain for info in refusal.infos] == ["genmesh"]
    assert set(refusal.fields) == {field}  # it may break more than one rule
    assert refusal.http_status == (400 if transport is Transport.JSON else None)


# --- specs -----------------------------------------------------------------------------------------------------------

BIG = 2**31 - 1
BAD_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "empty prompt": ("prompt", {"prompt": ""}),
    "blank prompt": ("prompt", {"prompt": " \t\r\n "}),
    "NUL in prompt": ("prompt", {"prompt": "a tiger\0face"}),
    "prompt over the limit": ("prompt", {"prompt": "x" * 2001}),
    "prompt of 1 MB": ("prompt", {"prompt": "x" * 1_000_000}),
    "NUL in negative prompt": ("negative_prompt", {"negative_prompt": "\0"}),
    "negative prompt of 1 MB": ("negative_prompt", {"negative_prompt": "x" * 1_000_000}),
    "zero steps": ("steps", {"steps": 0}),
    "negative steps": ("steps", {"steps": -1}),
    "huge steps": ("steps", {"steps": BIG}),
    "steps over the model's": ("steps", {"steps": 101}),
    "NaN guidance": ("guidance_scale", {"guidance_scale": math.nan}),
    "infinite guidance": ("guidance_scale", {"guidance_scale": math.inf}),
    "minus infinite guidance": ("guidance_scale", {"guidance_scale": -math.inf}),
    "negative guidance": ("guidance_scale", {"guidance_scale": -0.5}),
    "huge guidance": ("guidance_scale", {"guidance_scale": 1e300}),
    "negative width": ("width", {"width": -64}),
    "absurd width": ("width", {"width": BIG}),
    "absurd height": ("height", {"height": 100_000}),
    "width over the model's": ("width", {"width": 136}),
    "height under the model's": ("height", {"height": 24}),
    "width between multiples": ("width", {"width": 65}),
    "negative count": ("image_count", {"image_count": -1}),
    "too many pictures": ("image_count", {"image_count": 9}),
    "negative seed": ("seed", {"seed": -1}),
    "seed beyond JSON": ("seed", {"seed": 2**53}),
    "strength without a picture": ("strength", {"strength": 0.5}),
    "NaN strength": ("strength", {"strength": math.nan}),
    "path as model": ("model", {"model": "../../etc/passwd"}),
    "dots as model": ("model", {"model": ".."}),
    "path within the model": ("model", {"model": "emoji-diffusion/../emoji-diffusion"}),
    "URL as model": ("model", {"model": "https://example.com/model"}),
    "NUL in model": ("model", {"model": "emoji-diffusion\0"}),
    "upper case model": ("model", {"model": "Emoji-Diffusion"}),
    "long model": ("model", {"model": "m" * 65}),
    "format that is none": ("format", {"format": 99}),
    "negative format": ("format", {"format": -1}),
}


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize(("field", "values"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
async def test_bad_spec(victim: User, transport: Transport, field: str, values: dict[str, Any]) -> None:
    spec = image(**values)
    check(await refused(victim.call(CREATE_JOB, submission(spec), transport)), f"spec.image.{field}", transport)
    check(await refused(victim.call(ESTIMATE_JOB, jobs_pb2.EstimateJobRequest(spec=spec), transport)), f"spec.image.{field}", transport)


@pytest.mark.parametrize("transport", Transport)
async def test_every_fault_is_named_at_once(victim: User, transport: Transport) -> None:
    spec = image("", steps=0, width=-1)
    refusal = await refused(victim.call(CREATE_JOB, submission(spec, "no-uuid"), transport))
    assert refusal.code is INVALID
    assert set(refusal.fields) == {"request_id", "spec.image.prompt", "spec.image.steps", "spec.image.width"}


@pytest.mark.parametrize("transport", Transport)
async def test_unknown_model(victim: User, transport: Transport) -> None:
    refusal = await refused(victim.call(CREATE_JOB, submission(image(model="no-such-model")), transport))
    check(refusal, "spec.image.model", transport, "MODEL_UNKNOWN")
    assert refusal.metadata == {"model": "no-such-model"}


@pytest.mark.parametrize("transport", Transport)
async def test_what_is_not_offered_yet(victim: User, transport: Transport) -> None:
    refusal = await refused(victim.call(CREATE_JOB, submission(image(init_upload_id="x")), transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_OFFERED")
    assert refusal.fields == ["spec.image.init_upload_id"]
    assert refusal.http_status in (None, 501)


# --- the rest of a request -------------------------------------------------------------------------------------------


def deadline(seconds: int) -> jobs_pb2.CreateJobRequest:
    request = submission()
    request.start_deadline.seconds = seconds
    return request


ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001"
BAD_REQUESTS: dict[str, tuple[Method[Any, Any], str, Message]] = {
    "no request id": (CREATE_JOB, "request_id", jobs_pb2.CreateJobRequest(spec=image())),
    "request id that is none": (CREATE_JOB, "request_id", submission(request_id="1")),
    "request id as a path": (CREATE_JOB, "request_id", submission(request_id="../" + ID)),
    "no spec": (CREATE_JOB, "spec", jobs_pb2.CreateJobRequest(request_id=ID)),
    "spec of no kind": (CREATE_JOB, "spec.kind", jobs_pb2.CreateJobRequest(request_id=ID, spec=jobs_pb2.JobSpec())),
    "long quote": (CREATE_JOB, "quote_id", jobs_pb2.CreateJobRequest(request_id=ID, spec=image(), quote_id="q" * 1025)),
    "deadline in the past": (CREATE_JOB, "start_deadline", deadline(1)),
    "no spec to estimate": (ESTIMATE_JOB, "spec", jobs_pb2.EstimateJobRequest()),
    "job id that is none": (GET_JOB, "job_id", jobs_pb2.GetJobRequest(job_id="x")),
    "job id with a quote mark": (GET_JOB, "job_id", jobs_pb2.GetJobRequest(job_id="' OR 1=1 --")),
    "job to cancel that is none": (CANCEL_JOB, "job_id", jobs_pb2.CancelJobRequest(job_id="x")),
    "negative page": (LIST_JOBS, "page_size", jobs_pb2.ListJobsRequest(page_size=-1)),
    "garbled page token": (LIST_JOBS, "page_token", jobs_pb2.ListJobsRequest(page_token="garbled")),
    "page token that is no base64": (LIST_JOBS, "page_token", jobs_pb2.ListJobsRequest(page_token="%%%")),
    "page token of 17 bytes": (LIST_JOBS, "page_token", jobs_pb2.ListJobsRequest(page_token="A" * 23)),
    "long page token": (LIST_JOBS, "page_token", jobs_pb2.ListJobsRequest(page_token="A" * 513)),
    "unspecified state": (LIST_JOBS, "states[0]", jobs_pb2.ListJobsRequest(states=[jobs_pb2.STATE_UNSPECIFIED])),
    "unknown state": (LIST_JOBS, "states[1]", jobs_pb2.ListJobsRequest(states=[1, 99])),  # pyright: ignore[reportArgumentType]
    "unspecified kind": (LIST_JOBS, "kinds[0]", jobs_pb2.ListJobsRequest(kinds=[jobs_pb2.KIND_UNSPECIFIED])),
    "too many states": (LIST_JOBS, "states", jobs_pb2.ListJobsRequest(states=[jobs_pb2.STATE_FAILED] * 11)),
    "negative page of entries": (LIST_ENTRIES, "page_size", credits_pb2.ListEntriesRequest(page_size=-1)),
    "garbled page token of entries": (LIST_ENTRIES, "page_token", credits_pb2.ListEntriesRequest(page_token="garbled")),
    "entries of a job that is none": (LIST_ENTRIES, "job_id", credits_pb2.ListEntriesRequest(job_id="x")),
}


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize(("method", "field", "request_"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
async def test_bad_request(victim: User, transport: Transport, method: Method[Any, Any], field: str, request_: Message) -> None:
    refusal = await refused(victim.call(method, request_, transport))
    if transport is Transport.JSON and not refusal.fields:
        # Envoy knows the enums, and answers before any service does.
        assert (refusal.code, refusal.reason, refusal.http_status) == (INVALID, "MALFORMED_REQUEST", 400)
        assert field.startswith("states")
        return
    check(refusal, field, transport)


@pytest.mark.parametrize("transport", Transport)
async def test_foreign_and_garbled_quotes(victim: User, transport: Transport) -> None:
    spec = image(steps=3)
    quote = (await victim.call(ESTIMATE_JOB, jobs_pb2.EstimateJobRequest(spec=image(steps=1)))).quote_id
    for quote_id in ("garbled", "A" * 40, quote, quote[:-1] + "x"):
        request = jobs_pb2.CreateJobRequest(request_id=str(uuid.uuid4()), spec=spec, quote_id=quote_id)
        refusal = await refused(victim.call(CREATE_JOB, request, transport))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "QUOTE_INVALID")


async def test_a_time_that_is_none(victim: User) -> None:
    for seconds, nanos in ((2**62, 0), (-(2**62), 0), (4_000_000_000, -1), (4_000_000_000, 2_000_000_000)):
        request = submission()
        request.start_deadline.seconds, request.start_deadline.nanos = seconds, nanos
        for transport in (Transport.GRPC, Transport.GRPC_WEB):
            check(await refused(victim.call(CREATE_JOB, request, transport)), "start_deadline", transport)


# --- bytes that are no message ---------------------------------------------------------------------------------------

MARK = "@@@"
WHOLE = submission(image(MARK)).SerializeToString()
BAD_BYTES = {
    # What UTF-8 makes of U+D800, half of a pair; grpc's own libraries would not send it.
    "unpaired surrogate": WHOLE.replace(MARK.encode(), b"\xed\xa0\x80"),
    "invalid UTF-8": WHOLE.replace(MARK.encode(), b"\xff\xfe\xfd"),
    "overlong UTF-8": WHOLE.replace(MARK.encode(), b"\xe0\x80\xaf"),
    "cut off": WHOLE[:-1],
    "random": bytes(range(255, 0, -1)),
    "group that never ends": b"\x13" * 1000,
    "deeply nested groups": b"\x13" * 100_000,
    "number where a message belongs": b"\x10\x01",
}


@pytest.mark.parametrize("transport", [Transport.GRPC, Transport.GRPC_WEB])
@pytest.mark.parametrize("body", BAD_BYTES.values(), ids=BAD_BYTES.keys())
async def test_bytes_that_are_no_message(victim: User, transport: Transport, body: bytes) -> None:
    send = victim.edge.grpc if transport is Transport.GRPC else victim.edge.grpc_web
    refusal = await refused(send(CREATE_JOB.path, body, bearer(victim.token)))
    assert (refusal.code, [info.domain for info in refusal.infos]) == (INVALID, ["genmesh"])
    # A field of another type is an unknown field to protobuf: then it is what lacks that is named.
    assert refusal.reason == "MALFORMED_REQUEST" or {"request_id", "spec"} <= set(refusal.fields)


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize("size_bytes", [3_000_000, 5_000_000])
async def test_message_over_the_limit(victim: User, transport: Transport, size_bytes: int) -> None:
    refusal = await refused(victim.call(CREATE_JOB, submission(image("x" * size_bytes)), transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE")
    # The connection to the service is not the worse for it.
    assert await victim.jobs() == []


# --- JSON ------------------------------------------------------------------------------------------------------------


def document(**values: Any) -> dict[str, Any]:
    return {"requestId": str(uuid.uuid4()), "spec": {"image": {"prompt": "a tiger face", "steps": 4, **values}}}


DEPTH = 100_000
BAD_JSON: dict[str, str | bytes] = {
    "nothing": "",
    "half": '{"requestId":',
    "array": "[]",
    "string": '"x"',
    "null": "null",
    "no JSON": "requestId=x&spec=y",
    "XML": "<job/>",
    "two documents": json.dumps(document()) * 2,
    "text after the end": json.dumps(document()) + "x",
    "word as width": json.dumps(document(width="wide")),
    "fraction as width": json.dumps(document(width=64.5)),
    "width beyond 32 bit": json.dumps(document(width=2**40)),
    "object as prompt": json.dumps(document(prompt={"text": "a tiger"})),
    "array as prompt": json.dumps(document(prompt=["a tiger"])),
    "word as steps": json.dumps(document(steps="many")),
    "NaN": json.dumps(document(guidanceScale=math.nan)),
    "Infinity": json.dumps(document(guidanceScale=math.inf)),
    "NaN as proto JSON has it": json.dumps(document(guidanceScale="NaN")),
    "Infinity as proto JSON has it": json.dumps(document(guidanceScale="-Infinity")),
    "number beyond double": json.dumps(document(guidanceScale=0)).replace('"guidanceScale": 0', '"guidanceScale": 1e999'),
    "unknown enum": json.dumps(document(format="IMAGE_FORMAT_GIF")),
    "unknown enum number": json.dumps(document(format=99)),
    "unknown fields in place of known ones": json.dumps({"request": str(uuid.uuid4()), "specification": {"picture": {}}}),
    "spec as a string": json.dumps({"requestId": str(uuid.uuid4()), "spec": "a tiger"}),
    "spec as null": json.dumps({"requestId": str(uuid.uuid4()), "spec": None}),
    "time that is none": json.dumps(document() | {"startDeadline": "yesterday"}),
    "unpaired surrogate": json.dumps(document(prompt="\ud800")),
    "surrogates the wrong way round": json.dumps(document(prompt="\udc00\ud800")),
    "NUL": json.dumps(document(prompt="a\0b")),
    "invalid UTF-8": json.dumps(document(prompt=MARK)).encode().replace(MARK.encode(), b"\xff\xfe"),
    "surrogate as UTF-8": json.dumps(document(prompt=MARK)).encode().replace(MARK.encode(), b"\xed\xa0\x80"),
    "UTF-16": json.dumps(document()).encode("utf-16"),
    "deep objects": '{"spec":' * DEPTH + "1" + "}" * DEPTH,
    "deep arrays": '{"spec":' + "[" * DEPTH + "]" * DEPTH + "}",
    "deep unknown field": '{"x":' + '{"x":' * DEPTH + "1" + "}" * DEPTH + "}",
    "deep and never closed": '{"spec":{"image":' * DEPTH,
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
async def test_bad_json(victim: User, body: str | bytes) -> None:
    refusal = await refused(victim.edge.rest(CREATE_JOB, CREATE_JOB.rest, [], body, bearer(victim.token)))
    assert (refusal.code, refusal.http_status) == (INVALID, 400)
    if refusal.infos:
        assert [info.domain for info in refusal.infos] == ["genmesh"]
        assert refusal.fields or refusal.reason == "MALFORMED_REQUEST"


async def test_json_over_the_limit(victim: User) -> None:
    body = json.dumps(document(prompt="x" * 3_000_000))
    refusal = await refused(victim.edge.rest(CREATE_JOB, CREATE_JOB.rest, [], body, bearer(victim.token)))
    assert (refusal.code, refusal.reason, refusal.http_status) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", 413)


BAD_QUERIES = [
    ("pageSize", "many"),
    ("pageSize", "99999999999"),
    ("pageSize", "1.5"),
    ("states", "STATE_NONE"),
    ("unknown", "1"),
    ("owner_id", "somebody"),
    ("pageToken", "\0"),
    ("pageToken", "\udcff"),
]


@pytest.mark.parametrize("query", BAD_QUERIES, ids=lambda query: f"{query[0]}={query[1]!a}")
async def test_bad_query(victim: User, query: tuple[str, str]) -> None:
    name, value = query
    path = f"{LIST_JOBS.rest}?{name}=" + "".join(f"%{byte:02x}" for byte in value.encode(errors="surrogateescape"))
    refusal = await refused(victim.edge.rest(LIST_JOBS, path, [], None, bearer(victim.token)))
    assert (refusal.code, refusal.http_status) == (INVALID, 400)
