"""The mesh as a Python service uses it: generated stubs, synchronous, on pytest-grpc's channel fixtures, against the edge."""

import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cli.stack import Stack
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from tests.e2e.caller import DEADLINE_S, PASSWORD, bearer, ended, image, submission

Metadata = tuple[tuple[str, str], ...]

# pytest-grpc starts a server of its own unless these are overridden; here the running mesh is the server.


@pytest.fixture(scope="module")
def grpc_addr(stack: Stack) -> str:
    return f"localhost:{stack.edge_tls_port}"


@pytest.fixture(scope="module")
def grpc_channel(grpc_addr: str, stack: Stack) -> Iterator[grpc.Channel]:
    """Over TLS, as from another machine."""
    credentials = grpc.ssl_channel_credentials((stack.certificates_dir / "ca.crt").read_bytes())
    with grpc.secure_channel(grpc_addr, credentials) as channel:
        yield channel


@pytest.fixture(scope="module")
def grpc_stub_cls() -> type[jobs_pb2_grpc.JobsServiceStub]:
    return jobs_pb2_grpc.JobsServiceStub


@pytest.fixture(scope="module")
def session(grpc_channel: grpc.Channel, stack: Stack) -> identity_pb2.SignInResponse:
    """A new user, signed in, with credits."""
    identity = identity_pb2_grpc.IdentityServiceStub(grpc_channel)

    def sign_in(email: str, password: str) -> identity_pb2.SignInResponse:
        credential = identity_pb2.PasswordCredential(email=email, password=password)
        return identity.SignIn(identity_pb2.SignInRequest(password=credential), timeout=DEADLINE_S)

    email = f"{uuid.uuid4().hex}@example.com"
    user = identity.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=PASSWORD), timeout=DEADLINE_S).user
    administrator = sign_in(stack.admin_email, stack.admin_password)
    credits_pb2_grpc.LedgerAdminServiceStub(grpc_channel).GrantCredits(
        credits_pb2.GrantCreditsRequest(
            request_id=str(uuid.uuid4()), user_id=user.user_id, amount_millicredits=100_000, reason="for a test"
        ),
        metadata=tuple(bearer(administrator.access_token).items()),
        timeout=DEADLINE_S,
    )
    return sign_in(email, PASSWORD)


@pytest.fixture(scope="module")
def metadata(session: identity_pb2.SignInResponse) -> Metadata:
    return tuple(bearer(session.access_token).items())


def test_models_are_listed(grpc_channel: grpc.Channel, metadata: Metadata) -> None:
    catalogue = inference_pb2_grpc.ModelCatalogServiceStub(grpc_channel)
    models = catalogue.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=DEADLINE_S).models
    assert [model.model_id for model in models if model.is_default] == ["emoji-diffusion"]


def test_a_job_from_estimate_to_receipt(grpc_stub: jobs_pb2_grpc.JobsServiceStub, metadata: Metadata) -> None:
    options: Any = {"metadata": metadata, "timeout": DEADLINE_S}
    spec = image(width=128, height=128, steps=15)
    estimate = grpc_stub.EstimateJob(jobs_pb2.EstimateJobRequest(spec=spec), **options)
    assert estimate.quote_expire_time.seconds > 0
    assert 0 < estimate.eta_p50_seconds <= estimate.eta_p90_seconds
    request = submission(spec)
    request.quote_id = estimate.quote_id
    job = grpc_stub.CreateJob(request, **options).job
    assert job.estimated_cost_millicredits == estimate.cost_millicredits

    events = [
        message.event
        for message in grpc_stub.WatchJobs(jobs_pb2.WatchJobsRequest(job_ids=[job.job_id]), **options)
        if message.HasField("event")
    ]
    assert [ended(event) for event in events] == [False] * (len(events) - 1) + [True]
    done = grpc_stub.GetJob(jobs_pb2.GetJobRequest(job_id=job.job_id), **options).job
    assert done.state == jobs_pb2.STATE_COMPLETED
    assert done.receipt.captured_millicredits == done.cost_millicredits == estimate.cost_millicredits


def test_pages_of_jobs_join_without_gap_or_overlap(grpc_stub: jobs_pb2_grpc.JobsServiceStub, metadata: Metadata) -> None:
    options: Any = {"metadata": metadata, "timeout": DEADLINE_S}
    made = [grpc_stub.CreateJob(submission(image(steps=1)), **options).job.job_id for _ in range(4)]
    for _ in grpc_stub.WatchJobs(jobs_pb2.WatchJobsRequest(job_ids=made), **options):
        pass
    listed: list[str] = []
    token = ""
    while True:
        page = grpc_stub.ListJobs(jobs_pb2.ListJobsRequest(page_size=2, page_token=token, states=[jobs_pb2.STATE_COMPLETED]), **options)
        assert 0 < len(page.jobs) <= 2
        listed += [job.job_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert listed[:4] == made[::-1], "newest first"
    assert len(listed) == len(set(listed))
    assert not grpc_stub.ListJobs(jobs_pb2.ListJobsRequest(states=[jobs_pb2.STATE_FAILED]), **options).jobs


def test_a_stream_that_is_dropped_ends(grpc_stub: jobs_pb2_grpc.JobsServiceStub, metadata: Metadata) -> None:
    call = grpc_stub.WatchJobs(jobs_pb2.WatchJobsRequest(), metadata=metadata, timeout=DEADLINE_S)
    assert next(call).resume_token
    call.cancel()
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    assert raised.value.code() is grpc.StatusCode.CANCELLED  # pyright: ignore[reportAttributeAccessIssue]


def test_refusals_are_typed(grpc_stub: jobs_pb2_grpc.JobsServiceStub, metadata: Metadata) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        grpc_stub.CreateJob(submission(image("", steps=-1)), metadata=metadata, timeout=DEADLINE_S)
    assert isinstance(raised.value, grpc.Call)
    status = rpc_status.from_call(raised.value)
    assert status is not None
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad_request)
    assert (info.domain, info.reason) == ("genmesh", "ERROR_REASON_INVALID_ARGUMENT")
    assert {violation.field for violation in bad_request.field_violations} == {"spec.image.prompt", "spec.image.steps"}


def test_a_session_is_refreshed_and_ended(grpc_channel: grpc.Channel, session: identity_pb2.SignInResponse) -> None:
    identity = identity_pb2_grpc.IdentityServiceStub(grpc_channel)
    renewed = identity.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=session.refresh_token), timeout=DEADLINE_S)
    metadata = tuple(bearer(renewed.access_token).items())
    assert identity.GetMe(identity_pb2.GetMeRequest(), metadata=metadata, timeout=DEADLINE_S).user == session.user
    identity.SignOut(identity_pb2.SignOutRequest(refresh_token=renewed.refresh_token), metadata=metadata, timeout=DEADLINE_S)
    with pytest.raises(grpc.RpcError) as raised:
        identity.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=renewed.refresh_token), timeout=DEADLINE_S)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED  # pyright: ignore[reportAttributeAccessIssue]
