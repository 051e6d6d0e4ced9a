"""What one user owns does not exist for another, and nobody is anybody without a token that verifies."""

import time
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from google.protobuf.message import Message

from genmesh.credits.v1 import credits_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from servicekit.client import mesh_channel
from servicekit.settings import MeshSettings
from tests.e2e.caller import (
    CANCEL_JOB,
    CREATE_JOB,
    DEADLINE_S,
    DELETE_JOB,
    GET_BALANCE,
    GET_JOB,
    GET_ME,
    LIST_ENTRIES,
    LIST_JOBS,
    LIST_MODELS,
    LIST_USERS,
    RETRY_JOB,
    WATCH_JOBS,
    Edge,
    Method,
    Transport,
    User,
    Watched,
    bearer,
    image,
    refusal_of,
    refused,
    submission,
)
from tests.e2e.conftest import PLENTY, NewUser, Occupied

# --- what belongs to others ------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module")
async def done(alice: User) -> jobs_pb2.Job:
    """A job of alice's that is done."""
    return await alice.finished((await alice.submit(image(steps=1))).job_id)


async def test_jobs_of_others_do_not_exist(alice: User, new_user: NewUser, done: jobs_pb2.Job) -> None:
    eve = await new_user(PLENTY)
    nothing = str(uuid.uuid4())
    methods: list[Method[Any, Any]] = [GET_JOB, CANCEL_JOB, RETRY_JOB, DELETE_JOB]
    for transport in Transport:
        for method in methods:
            theirs, none = [await refused(eve.call(method, method.request(job_id=job_id), transport)) for job_id in (done.job_id, nothing)]
            assert (theirs.code, theirs.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
            # Not even by its wording does the answer tell that the job is there.
            assert (theirs.message, theirs.metadata, theirs.http_status) == (none.message, none.metadata, none.http_status)
        assert list((await eve.call(LIST_JOBS, jobs_pb2.ListJobsRequest(), transport)).jobs) == []
        entries = await eve.call(LIST_ENTRIES, credits_pb2.ListEntriesRequest(job_id=done.job_id), transport)
        assert list(entries.entries) == []
    for watch in (eve.watch, eve.watch_sse):
        async with aclosing(watch(done.job_id)) as messages:
            refusal = await refused(anext(messages))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert await eve.balance() == (PLENTY, 0)


async def test_a_waiting_job_cannot_be_cancelled_by_others(alice: User, new_user: NewUser, occupied: Occupied) -> None:
    eve = await new_user(0)
    async with occupied():
        job = await alice.submit(image(steps=1))
        for transport in Transport:
            assert (await refused(eve.cancel(job.job_id, transport))).code is grpc.StatusCode.NOT_FOUND
        assert (await alice.job(job.job_id)).state == jobs_pb2.STATE_PENDING
    assert (await alice.finished(job.job_id)).state == jobs_pb2.STATE_COMPLETED


async def test_a_watch_of_everything_is_of_everything_of_ones_own(alice: User, new_user: NewUser) -> None:
    eve = await new_user(PLENTY)
    seen = Watched()
    async with aclosing(eve.watch()) as messages:
        seen.messages.append(await anext(messages))
        theirs = await alice.submit(image(steps=1))
        await alice.watch_to_end(theirs.job_id)
        mine = await eve.submit(image(steps=1))
        async for message in messages:
            seen.messages.append(message)
            if message.event.state_change.state == jobs_pb2.STATE_COMPLETED:
                break
    assert {event.job_id for event in seen.events} == {mine.job_id}
    assert not seen.snapshots


async def test_page_tokens_of_others_show_nothing_of_theirs(new_user: NewUser, alice: User, done: jobs_pb2.Job) -> None:
    await alice.finished((await alice.submit(image(steps=1))).job_id)
    page = await alice.call(LIST_JOBS, jobs_pb2.ListJobsRequest(page_size=1))
    assert page.next_page_token
    assert [job.job_id for job in (await alice.call(LIST_JOBS, jobs_pb2.ListJobsRequest(page_token=page.next_page_token))).jobs][
        -1
    ] == done.job_id
    eve = await new_user(0)
    refusal = await refused(eve.call(LIST_JOBS, jobs_pb2.ListJobsRequest(page_token=page.next_page_token)))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_token"])


# --- who is nobody ---------------------------------------------------------------------------------------------------


def keys_of(edge: Edge) -> Iterator[Ed25519PrivateKey]:
    """The gateway's keys; there may be several while they rotate."""
    for file in (edge.stack.state.path / "keys").glob("*.pem"):
        key = load_pem_private_key(file.read_bytes(), password=None)
        assert isinstance(key, Ed25519PrivateKey)
        yield key


def made(token: str, key: Ed25519PrivateKey) -> bool:
    try:
        jwt.decode(token, key.public_key(), algorithms=["EdDSA"], options={"verify_aud": False})
    except jwt.InvalidSignatureError:
        return False
    return True


class Forger:
    """Has the gateway's own key, so that of each token it makes one thing alone is wrong."""

    def __init__(self, edge: Edge, user: User) -> None:
        self.key = next(key for key in keys_of(edge) if made(user.token, key))
        self.header = jwt.get_unverified_header(user.token)
        self.claims: dict[str, Any] = jwt.decode(user.token, options={"verify_signature": False})

    def token(self, *, key: Ed25519PrivateKey | None = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """The user's token with other claims; None leaves a claim out."""
        changed = {name: value for name, value in (self.claims | claims).items() if value is not None}
        return jwt.encode(changed, key or self.key, algorithm="EdDSA", headers=self.header | (header or {}))

    def unsigned(self) -> str:
        """`alg: none`."""
        no_key: Any = None
        return jwt.encode(self.claims, no_key, algorithm="none", headers={"kid": self.header["kid"]})

    def symmetric(self) -> str:
        """Signed by HMAC, with what everybody knows as the secret: the public key."""
        return jwt.encode(self.claims, self.key.public_key().public_bytes_raw(), algorithm="HS256", headers={"kid": self.header["kid"]})


@pytest.fixture(scope="module")
def forger(edge: Edge, alice: User) -> Forger:
    return Forger(edge, alice)


async def test_the_forger_forges_well(edge: Edge, alice: User, forger: Forger) -> None:
    """Or the refusals below would prove nothing."""
    me = await edge.call(GET_ME, identity_pb2.GetMeRequest(), forger.token())
    assert me.user.user_id == alice.user_id


def tokens(forger: Forger) -> dict[str, str]:
    now = int(time.time())
    return {
        "none": "",
        "garbage": "garbage",
        "three parts of garbage": "a.b.c",
        "long": "x" * 4000,
        "unsigned": forger.unsigned(),
        "symmetric": forger.symmetric(),
        "cut off": forger.token()[:-4],
        "expired": forger.token(iat=now - 1000, exp=now - 100),
        "without end": forger.token(exp=None),
        "of another issuer": forger.token(iss="https://elsewhere.example.com"),
        "for another audience": forger.token(aud="elsewhere"),
        "for no audience": forger.token(aud=None),
        "of another key": forger.token(key=Ed25519PrivateKey.generate()),
        "of an unknown key": forger.token(key=Ed25519PrivateKey.generate(), header={"kid": "unknown"}),
    }


CALLS: list[tuple[Method[Any, Any], Message]] = [
    (GET_JOB, jobs_pb2.GetJobRequest(job_id=str(uuid.uuid4()))),
    (CREATE_JOB, submission()),
    (LIST_JOBS, jobs_pb2.ListJobsRequest()),
    (GET_BALANCE, credits_pb2.GetBalanceRequest()),
    (GET_ME, identity_pb2.GetMeRequest()),
    (LIST_MODELS, inference_pb2.ListModelsRequest()),
    (LIST_USERS, identity_pb2.ListUsersRequest()),
]
NAMES = [
    "none",
    "garbage",
    "three parts of garbage",
    "long",
    "unsigned",
    "symmetric",
    "cut off",
    "expired",
    "without end",
    "of another issuer",
    "for another audience",
    "for no audience",
    "of another key",
    "of an unknown key",
]
"""Of the bad tokens below."""


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize("name", NAMES)
async def test_without_a_good_token_nobody_gets_in(edge: Edge, alice: User, forger: Forger, name: str, transport: Transport) -> None:
    token = tokens(forger)[name]
    before = await alice.balance()
    for method, request in CALLS:
        refusal = await refused(edge.call(method, request, token, transport))
        assert refusal.code is grpc.StatusCode.UNAUTHENTICATED, (method.path, refusal)
        if transport is Transport.JSON:
            assert refusal.http_status == 401
        assert not token or token not in refusal.message
    assert await alice.balance() == before


@pytest.mark.parametrize("name", NAMES)
async def test_without_a_good_token_nobody_watches(edge: Edge, alice: User, forger: Forger, name: str) -> None:
    nobody = User(edge, alice.user_id, alice.email, tokens(forger)[name])
    for watch in (nobody.watch, nobody.watch_sse):
        async with aclosing(watch()) as messages:
            refusal = await refused(anext(messages))
        assert refusal.code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", NAMES)
async def test_services_verify_again_what_the_edge_verified(edge: Edge, alice: User, forger: Forger, name: str) -> None:
    """Somebody who got past Envoy, with Envoy's own certificate, still gets nothing."""
    settings = MeshSettings(certificates_dir=edge.stack.certificates_dir)  # pyright: ignore[reportCallIssue]
    token = tokens(forger)[name]
    for service, process, method, request in (
        ("jobs_service", "jobs", LIST_JOBS, jobs_pb2.ListJobsRequest()),
        ("credit_service", "credits", GET_BALANCE, credits_pb2.GetBalanceRequest()),
        ("gateway", "gateway", GET_ME, identity_pb2.GetMeRequest()),
        ("inference_service", "inference-0", LIST_MODELS, inference_pb2.ListModelsRequest()),
    ):
        async with mesh_channel(settings, edge.stack.addresses[process], caller="envoy", service=service) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(method.path)(
                    request.SerializeToString(), metadata=tuple(bearer(token).items()), timeout=DEADLINE_S
                )
        refusal = refusal_of(raised.value)
        assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
        assert refusal.reason == {"none": "TOKEN_MISSING", "expired": "TOKEN_EXPIRED"}.get(name, "TOKEN_INVALID")


# --- who one says one is ---------------------------------------------------------------------------------------------


async def test_identity_headers_change_nothing(edge: Edge, alice: User, bob: User, done: jobs_pb2.Job) -> None:
    claims = {
        "x-user-id": alice.user_id,
        "x-user-roles": "admin",
        "x-user-plan": "PLAN_PRO",
        "x-org-id": alice.user_id,
        "x-jwt-payload": "eyJyb2xlcyI6WyJhZG1pbiJdfQ",
        "x-forwarded-client-cert": "By=spiffe://genmesh/credit_service;URI=spiffe://genmesh/jobs_service",
        "x-envoy-original-path": "/v1/jobs",
    }
    for transport in Transport:
        me = await edge.call(GET_ME, identity_pb2.GetMeRequest(), bob.token, transport, claims)
        assert (me.user.user_id, list(me.user.roles)) == (bob.user_id, [])
        theirs = await refused(edge.call(GET_JOB, jobs_pb2.GetJobRequest(job_id=done.job_id), bob.token, transport, claims))
        assert theirs.code is grpc.StatusCode.NOT_FOUND
        users = await refused(edge.call(LIST_USERS, identity_pb2.ListUsersRequest(), bob.token, transport, claims))
        assert (users.code, users.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
        nobody = await refused(edge.call(GET_ME, identity_pb2.GetMeRequest(), "", transport, claims))
        assert nobody.code is grpc.StatusCode.UNAUTHENTICATED
        # Price, plan and owner come from the server, whatever the headers say.
        job = (await edge.call(CREATE_JOB, submission(image(steps=1)), bob.token, transport, claims)).job
        assert (job.owner_id, job.priority) == (bob.user_id, jobs_pb2.PRIORITY_FREE)
        await bob.watch_to_end(job.job_id)


async def test_a_token_in_the_query_is_no_token(edge: Edge, alice: User) -> None:
    for path in (LIST_JOBS.rest, WATCH_JOBS.rest):
        reply = await edge.http.get(path, params={"access_token": alice.token})
        assert reply.status_code == 401
