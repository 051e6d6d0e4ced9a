"""Passwords against those who guess: what is counted, who has to wait, what answers tell; breached passwords."""

import asyncio
import hashlib
import statistics
import threading
import time
import uuid
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
import structlog
from redis import asyncio as redis

from gateway.tables import audit_entries, audit_outcomes, users
from gateway.throttle import WAITING_MAX
from genmesh.identity.v1 import identity_pb2
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from tests.service.gateway.issuer import Answer, serving

PASSWORD = "correct horse battery"
WRONG = "wrong horse battery"
LIMITED = (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
BAD = (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_BAD_CREDENTIALS)
HOME, OFFICE = "192.0.2.1", "198.51.100.7"


def fresh_email() -> str:
    return f"ann-{uuid.uuid4().hex}@example.org"


def from_(address: str) -> list[tuple[str, str]]:
    """As Envoy says it."""
    return [("x-client-address", address)]


def register(gateway: Any, email: str, password: str = PASSWORD, address: str = HOME) -> Any:
    return gateway.users.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=password), metadata=from_(address))


def sign_in(gateway: Any, email: str, password: str, address: str = HOME) -> Any:
    credential = identity_pb2.PasswordCredential(email=email, password=password)
    return gateway.users.SignIn(identity_pb2.SignInRequest(password=credential), metadata=from_(address))


def kind(error: MeshError) -> tuple[grpc.StatusCode, int]:
    return error.code, error.reason


async def entries_about(gateway: Any, user_id: str) -> list[Any]:
    """What the audit trail says of sign-ins to an account."""
    async with transaction(gateway.engine) as connection:
        query = (
            sa.select(audit_entries, audit_outcomes.c.reason)
            .join(audit_outcomes, audit_outcomes.c.audit_entry_id == audit_entries.c.audit_entry_id)
            .where(audit_entries.c.subject == user_id, audit_entries.c.method.endswith("/SignIn"))
        )
        return list(await connection.execute(query))


# --- guessing


async def test_who_guesses_one_accounts_password_has_to_wait_also_with_the_right_one(gateway: Any, refused: Any) -> None:
    email = fresh_email()
    await register(gateway, email)
    for _ in range(5):
        assert kind(await refused(sign_in(gateway, email, WRONG))) == BAD
    for password in (WRONG, PASSWORD):
        error = await refused(sign_in(gateway, email.upper(), password))
        assert kind(error) == LIMITED
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 15 * 60
    # Others, and the same one elsewhere or as somebody else, go on.
    await sign_in(gateway, email, PASSWORD, OFFICE)
    other = fresh_email()
    await register(gateway, other)
    await sign_in(gateway, other, PASSWORD)


async def test_what_succeeds_is_not_counted_as_a_failure(gateway: Any, refused: Any) -> None:
    email = fresh_email()
    await register(gateway, email)
    for _ in range(4):
        await refused(sign_in(gateway, email, WRONG))
    for _ in range(8):
        await sign_in(gateway, email, PASSWORD)
    assert kind(await refused(sign_in(gateway, email, WRONG))) == BAD
    assert kind(await refused(sign_in(gateway, email, WRONG))) == LIMITED


async def test_guesses_sent_all_at_once_are_no_way_around(gateway: Any, refused: Any) -> None:
    email = fresh_email()
    await register(gateway, email)
    errors = await asyncio.gather(*(refused(sign_in(gateway, email, WRONG)) for _ in range(WAITING_MAX)))
    assert [kind(error) for error in errors].count(BAD) == 5
    assert [kind(error) for error in errors].count(LIMITED) == WAITING_MAX - 5


async def test_right_passwords_sent_all_at_once_are_no_attack(gateway: Any) -> None:
    email = fresh_email()
    await register(gateway, email)
    sessions = await asyncio.gather(*(sign_in(gateway, email, PASSWORD) for _ in range(WAITING_MAX)))
    assert len({session.refresh_token for session in sessions}) == WAITING_MAX


async def test_no_more_than_a_few_wait_for_each_other(gateway: Any) -> None:
    email = fresh_email()
    await register(gateway, email)
    attempts = [asyncio.ensure_future(sign_in(gateway, email, PASSWORD)) for _ in range(WAITING_MAX * 4)]
    answers: list[Any] = await asyncio.gather(*attempts, return_exceptions=True)
    assert {one.code() for one in answers if isinstance(one, grpc.aio.AioRpcError)} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    await sign_in(gateway, email, PASSWORD)  # and nothing is left behind


async def test_many_who_guess_one_account_do_not_lock_its_owner_out(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_in_account_failures_max=6)
    email, stranger = fresh_email(), fresh_email()
    await register(gateway, email, address=OFFICE)
    await sign_in(gateway, email, PASSWORD, HOME)
    for number in range(6):
        for address in (email, stranger):
            assert kind(await refused(sign_in(gateway, address, WRONG, f"203.0.113.{number}"))) == BAD
    # From where nobody has signed in yet nobody can now, and whether there is an account does not show.
    for address in (email, stranger):
        assert kind(await refused(sign_in(gateway, address, PASSWORD, "203.0.113.99"))) == LIMITED
    assert kind(await refused(sign_in(gateway, email, PASSWORD, OFFICE))) == LIMITED
    await sign_in(gateway, email, PASSWORD, HOME)
    # At home the other limit still counts.
    for _ in range(5):
        assert kind(await refused(sign_in(gateway, email, WRONG, HOME))) == BAD
    assert kind(await refused(sign_in(gateway, email, WRONG, HOME))) == LIMITED


async def test_who_guesses_at_many_accounts_has_to_wait(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=7)
    for _ in range(7):
        assert kind(await refused(sign_in(gateway, fresh_email(), WRONG))) == BAD
    assert kind(await refused(sign_in(gateway, fresh_email(), WRONG))) == LIMITED
    assert kind(await refused(sign_in(gateway, fresh_email(), WRONG, OFFICE))) == BAD


async def test_who_guesses_does_not_lock_out_those_who_are_known_at_the_same_address(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=3)
    email, new = fresh_email(), fresh_email()
    await register(gateway, email)
    await register(gateway, new)
    await sign_in(gateway, email, PASSWORD)
    for _ in range(3):
        assert kind(await refused(sign_in(gateway, fresh_email(), WRONG))) == BAD
    await sign_in(gateway, email, PASSWORD)
    assert kind(await refused(sign_in(gateway, new, PASSWORD))) == LIMITED
    # Of one account nobody has more guesses for that.
    for _ in range(5):
        assert kind(await refused(sign_in(gateway, email, WRONG))) == BAD
    assert kind(await refused(sign_in(gateway, email, PASSWORD))) == LIMITED


async def test_right_passwords_are_counted_by_account_and_client(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_ins_max=3)
    email, neighbour = fresh_email(), fresh_email()
    await register(gateway, email)
    await register(gateway, neighbour)
    user = (await sign_in(gateway, email, PASSWORD)).user
    for _ in range(2):
        await sign_in(gateway, email, PASSWORD)
    assert kind(await refused(sign_in(gateway, email, PASSWORD))) == LIMITED
    await sign_in(gateway, neighbour, PASSWORD)
    await sign_in(gateway, email, PASSWORD, OFFICE)
    assert len(await entries_about(gateway, user.user_id)) == 4


async def test_refusals_of_right_passwords_count_too(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=3)
    email = fresh_email()
    user = (await register(gateway, email)).user
    async with transaction(gateway.engine) as connection:
        await connection.execute(users.update().where(users.c.user_id == uuid.UUID(user.user_id)).values(disabled_time=sa.func.now()))
    for _ in range(3):
        assert (await refused(sign_in(gateway, email, PASSWORD))).reason == Reason.ERROR_REASON_ACCOUNT_DISABLED
    assert kind(await refused(sign_in(gateway, email, PASSWORD))) == LIMITED


@pytest.mark.parametrize(
    ("addresses", "same"),
    [
        (("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"), True),
        (("2001:db8:1:2::1", "2001:db8:1:3::1"), False),
        (("192.0.2.9", "::ffff:192.0.2.9"), True),
        (("192.0.2.9", "192.0.2.10"), False),
    ],
)
async def test_what_counts_as_one_client(start_gateway: Any, refused: Any, addresses: tuple[str, str], same: bool) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=1)
    first, second = addresses
    await refused(sign_in(gateway, fresh_email(), WRONG, first))
    assert (kind(await refused(sign_in(gateway, fresh_email(), WRONG, second))) == LIMITED) is same


async def test_replicas_count_together(start_gateway: Any, refused: Any) -> None:
    prefix = f"test-{uuid.uuid4().hex}"
    replicas = [await start_gateway(redis_prefix=prefix) for _ in range(2)]
    email = fresh_email()
    await register(replicas[0], email)
    for number in range(5):
        assert kind(await refused(sign_in(replicas[number % 2], email, WRONG))) == BAD
    for replica in replicas:
        assert kind(await refused(sign_in(replica, email, PASSWORD))) == LIMITED


async def test_without_redis_each_counts_by_itself(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(redis_url="redis://127.0.0.1:1/0")
    email = fresh_email()
    await register(gateway, email)
    await sign_in(gateway, email, PASSWORD)
    for _ in range(5):
        assert kind(await refused(sign_in(gateway, email, WRONG))) == BAD
    assert kind(await refused(sign_in(gateway, email, PASSWORD))) == LIMITED


async def test_redis_has_no_addresses_of_accounts(gateway: Any, refused: Any) -> None:
    email = fresh_email()
    await refused(sign_in(gateway, email, WRONG))
    client = redis.Redis.from_url(gateway.settings.redis_url.get_secret_value())
    try:
        keys = [key async for key in client.scan_iter(f"{gateway.settings.redis_prefix}:*")]
    finally:
        await client.aclose()
    assert keys
    assert not any(email.encode() in key for key in keys)


async def test_registrations_are_counted_too_taken_addresses_included(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(registrations_max=3)
    email = fresh_email()
    await register(gateway, email)
    for _ in range(2):
        assert (await refused(register(gateway, email))).reason == Reason.ERROR_REASON_EMAIL_TAKEN
    assert kind(await refused(register(gateway, fresh_email()))) == LIMITED
    await register(gateway, fresh_email(), address=OFFICE)


# --- what answers tell


async def test_refusals_are_the_same_with_and_without_an_account(gateway: Any, refused: Any) -> None:
    known, unknown = fresh_email(), fresh_email()
    await register(gateway, known)
    for _ in range(7):
        first, second = await refused(sign_in(gateway, known, WRONG)), await refused(sign_in(gateway, unknown, WRONG))
        assert (kind(first), first.metadata, first.quota) == (kind(second), second.metadata, second.quota)


async def test_refusals_take_the_same_time_with_and_without_an_account(start_gateway: Any, refused: Any) -> None:
    """A hash that takes long shows whether it is computed for both; a rough bound, which no noise crosses, tells."""
    gateway = await start_gateway(sign_in_failures_max=1000, password_hash_memory_kib=19 * 1024, password_hash_iterations=6)
    known, unknown = fresh_email(), fresh_email()
    await register(gateway, known)
    took: dict[str, list[float]] = {known: [], unknown: []}
    for _ in range(7):
        for email in took:
            began = time.perf_counter()
            await refused(sign_in(gateway, email, WRONG))
            took[email].append(time.perf_counter() - began)
    fastest = {email: min(times) for email, times in took.items()}
    assert 0.5 < fastest[unknown] / fastest[known] < 2, {email: statistics.median(times) for email, times in took.items()}


async def test_failures_are_in_the_audit_trail_without_what_was_typed(gateway: Any, refused: Any) -> None:
    email = fresh_email()
    user = (await register(gateway, email)).user
    await refused(sign_in(gateway, email, WRONG, OFFICE))
    for _ in range(8):  # of which only those that were not stopped
        await refused(sign_in(gateway, email, WRONG, OFFICE))
    entries = await entries_about(gateway, user.user_id)
    assert len(entries) == 5
    assert {(entry.actor_user_id, entry.client_address, entry.reason) for entry in entries} == {
        (None, OFFICE, "ERROR_REASON_BAD_CREDENTIALS")
    }
    assert not any(secret in repr(entry) for entry in entries for secret in (WRONG, email))


# --- breached passwords


def sha1(password: str) -> str:
    return hashlib.sha1(password.encode()).hexdigest().upper()


async def test_passwords_known_from_breaches_are_refused_and_told_to_nobody(start_gateway: Any, refused: Any) -> None:
    asked: list[str] = []
    known, padded = sha1(PASSWORD), sha1("only a padding line")

    def range_of(_method: str, path: str, _form: dict[str, str]) -> Answer:
        asked.append(path)
        lines = [f"{'0' * 35}:7", f"{known[5:]}:3", f"{padded[5:]}:0"]
        return Answer("\r\n".join(lines).encode())

    with serving(range_of) as url:
        gateway = await start_gateway(breached_passwords_url=f"{url}/range/")
        error = await refused(register(gateway, fresh_email()))
        assert kind(error) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.ERROR_REASON_PASSWORD_BREACHED)
        assert error.message.startswith("password: ")
        await register(gateway, fresh_email(), "only a padding line")
        await register(gateway, fresh_email(), "nobody else has this")
    assert asked == [f"/range/{sha1(password)[:5]}" for password in (PASSWORD, "only a padding line", "nobody else has this")]


@pytest.mark.parametrize("said", [Answer(b"", 503), Answer(b"x" * 300_000), Answer(b"\xff\xfe"), Answer(b"", 302, (("location", "/x"),))])
async def test_a_service_that_is_away_stops_nobody(start_gateway: Any, said: Answer) -> None:
    with serving(lambda *_: said) as url:
        gateway = await start_gateway(breached_passwords_url=url)
        await register(gateway, fresh_email())
    with structlog.testing.capture_logs() as logs:
        await register(gateway, fresh_email())
    assert [log["log_level"] for log in logs if log["event"] == "breached.unknown"] == ["warning"]


async def test_a_service_that_hangs_stops_nobody_for_long(start_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.breached.TIMEOUT_S", 0.2)
    release = threading.Event()

    def hang(*_: Any) -> Answer:
        release.wait(30)
        return Answer(b"")

    with serving(hang) as url:
        gateway = await start_gateway(breached_passwords_url=url)
        try:
            await asyncio.wait_for(register(gateway, fresh_email()), 10)
        finally:
            release.set()
