"""WatchBalance: pushed on change from this process and from others, whatever happens to PostgreSQL, and nothing left behind."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from google.protobuf import duration_pb2
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from credit_service import app, balances, store
from credit_service.balances import NOTICE_USERS_MAX, READ_USERS_MAX, USER_WATCHES_MAX, WATCHERS, BalanceFeed
from credit_service.ledger import Balance
from genmesh.credits.v1 import credits_pb2 as pb
from servicekit.errors import MeshError, Reason
from servicekit.identity import Principal
from servicekit.process import end
from servicekit.settings import DatabaseSettings
from tests.service.credits.callers import Signer, refusal_of

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import CreditsServiceAsyncStub, LedgerServiceAsyncStub

    WatchCall = grpc.aio.UnaryStreamCall[pb.WatchBalanceRequest, pb.WatchBalanceResponse]

DEADLINE_S = 30.0
NEVER_S = 3_600.0
"""A checkpoint interval that no test lives to see: what arrives was pushed."""
SHORT_S = 0.05

Watch = AsyncGenerator[Balance]
Give = Callable[[uuid.UUID, int], Awaitable[None]]


class DatabaseProxy:
    """Stands between a feed and PostgreSQL, so that PostgreSQL can be away for the one and not for all."""

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._links: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def url(self) -> str:
        """Where PostgreSQL seems to be."""
        return self._url.set(host="127.0.0.1", port=self._port).render_as_string(hide_password=False)

    async def open(self) -> None:
        """Let connections in, at the same port as before."""
        self._flowing.set()
        self._server = await asyncio.start_server(self._link, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut all connections and refuse new ones."""
        assert self._server is not None
        self._server.close()
        await end(self._links)
        await self._server.wait_closed()

    def hush(self) -> None:
        """Swallow what is said on the connections there are, and on new ones, as a network that lost its way would."""
        self._flowing.clear()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._url.host, self._url.port)
            try:
                pumps = [asyncio.create_task(self._pump(reader, far_writer)), asyncio.create_task(self._pump(far_reader, writer))]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await end(pumps)
            finally:
                far_writer.transport.abort()
        except asyncio.CancelledError:
            pass  # cut: the server that started this task would log it
        finally:
            writer.transport.abort()
            self._links.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(64 * 1024):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass


class Gate:
    """Counts the queries of feeds and holds back their answers while it is shut."""

    def __init__(self) -> None:
        self.asked = 0
        self.at_once_max = 0
        self._at_once = 0
        self._open = asyncio.Event()
        self._open.set()
        self.held = asyncio.Event()
        """Set when an answer is being held back."""

    async def balances(self, connection: AsyncConnection, user_ids: Collection[uuid.UUID]) -> dict[uuid.UUID, Balance]:
        """What the store says, as of the time it was asked."""
        self.asked += 1
        self._at_once += 1
        self.at_once_max = max(self.at_once_max, self._at_once)
        try:
            found = dict(await _BALANCES(connection, user_ids))
            if not self._open.is_set():
                self.held.set()
                await self._open.wait()
            return found
        finally:
            self._at_once -= 1

    def shut(self) -> None:
        """Hold back what is asked from now on."""
        self.held.clear()
        self._open.clear()

    def open(self) -> None:
        """Let everything through."""
        self._open.set()


_BALANCES = store.balances


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(store, "balances", gate.balances)
    return gate


@pytest.fixture(autouse=True)
def _no_ping(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    """What a ping heals in the end has to heal without one."""
    monkeypatch.setattr(balances, "PING_INTERVAL_S", NEVER_S)


@pytest.fixture(scope="module")
def watched_database(migrated_database: Callable[[], str]) -> str:
    """A database of its own: no server of another test says here what has changed."""
    return migrated_database()


@asynccontextmanager
async def engine_of(url: str) -> AsyncGenerator[AsyncEngine]:
    engine = app.create_engine(DatabaseSettings.model_validate({"database_url": url}))
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest_asyncio.fixture(scope="module")
async def watched_engine(watched_database: str) -> AsyncIterator[AsyncEngine]:
    async with engine_of(watched_database) as engine:
        yield engine


@pytest.fixture
def give(watched_engine: AsyncEngine) -> Give:
    """Gives credits to a user and tells nobody."""

    async def give(user_id: uuid.UUID, amount_millicredits: int) -> None:
        await give_all([user_id], amount_millicredits, watched_engine)

    return give


async def give_all(user_ids: Iterable[uuid.UUID], amount_millicredits: int, engine: AsyncEngine) -> None:
    statement = sa.text(
        "SELECT credits.grant_credits(gen_random_uuid(), gen_random_uuid(), user_id, :amount, 'test') FROM unnest(:users) AS user_id"
    )
    statement = statement.bindparams(sa.bindparam("users", type_=sa.ARRAY(sa.Uuid)))
    async with engine.connect() as connection:
        await connection.execute(statement, {"users": list(user_ids), "amount": amount_millicredits})


@asynccontextmanager
async def running(
    engine: AsyncEngine, *, checkpoint_interval_s: float = NEVER_S, watches_max: int = balances.WATCHES_MAX
) -> AsyncGenerator[BalanceFeed]:
    """A feed as a process of the service has it."""
    feed = BalanceFeed(engine, checkpoint_interval_s=checkpoint_interval_s, watches_max=watches_max)
    task = asyncio.create_task(feed.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            await feed.listening.wait()
        yield feed
        assert not task.done()
    finally:
        await end({task})


@pytest_asyncio.fixture
async def this_process(watched_engine: AsyncEngine) -> AsyncIterator[BalanceFeed]:
    async with running(watched_engine) as feed:
        yield feed


@pytest_asyncio.fixture
async def other_process(watched_database: str) -> AsyncIterator[BalanceFeed]:
    """The feed of another process: its own engine, its own connection."""
    async with engine_of(watched_database) as engine, running(engine) as feed:
        yield feed


def watching(feed: BalanceFeed, user_id: uuid.UUID, *, expire_time: float | None = None) -> "aclosing[Watch]":
    return aclosing(feed.watch(user_id, caller=Principal(expire_time=expire_time)))


async def next_of(watch: Watch) -> Balance:
    async with asyncio.timeout(DEADLINE_S):
        return await anext(watch)


async def until(watch: Watch, available_millicredits: int) -> Balance:
    """Read until the balance is so much; versions never go back on the way."""
    version = -1
    async with asyncio.timeout(DEADLINE_S):
        async for balance in watch:
            assert balance.version >= version
            version = balance.version
            if balance.available_millicredits == available_millicredits:
                return balance
    raise AssertionError("the watch ended")


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # what is waited for has no signal
            await asyncio.sleep(0.005)


async def listeners(engine: AsyncEngine) -> set[int]:
    """Processes of PostgreSQL that serve listening connections to this database."""
    query = sa.text("SELECT pid FROM pg_stat_activity WHERE application_name = :name AND datname = current_database()")
    async with engine.connect() as connection:
        return set((await connection.execute(query, {"name": balances.LISTENER})).scalars())


async def kill_listeners(engine: AsyncEngine) -> None:
    query = sa.text("SELECT pg_terminate_backend(pid) FROM unnest(:pids) AS pid").bindparams(
        sa.bindparam("pids", type_=sa.ARRAY(sa.Integer))
    )
    killed = await listeners(engine)
    assert killed
    async with engine.connect() as connection:
        await connection.execute(query, {"pids": list(killed)})


async def test_the_balance_comes_at_once(this_process: BalanceFeed, give: Give, user_id: uuid.UUID):
    await give(user_id, 500)
    async with watching(this_process, user_id) as watch:
        first = await next_of(watch)
    assert (first.available_millicredits, first.reserved_millicredits) == (500, 0)
    assert first.version > 0


async def test_a_user_nobody_has_heard_of_has_nothing(this_process: BalanceFeed, give: Give, user_id: uuid.UUID):
    async with watching(this_process, user_id) as watch:
        assert await next_of(watch) == Balance(available_millicredits=0, reserved_millicredits=0)
        await give(user_id, 7)
        this_process.changed(user_id)
        assert (await next_of(watch)).available_millicredits == 7


async def test_a_change_is_pushed(this_process: BalanceFeed, give: Give, user_id: uuid.UUID):
    async with watching(this_process, user_id) as watch:
        before = await next_of(watch)
        for total in (10, 20, 30):
            await give(user_id, 10)
            this_process.changed(user_id)
            after = await next_of(watch)
            assert after.available_millicredits == total
            assert after.version > before.version
            before = after


async def test_a_change_is_pushed_from_another_process(
    this_process: BalanceFeed, other_process: BalanceFeed, give: Give, user_id: uuid.UUID
):
    async with watching(this_process, user_id) as here, watching(other_process, user_id) as there:
        await next_of(here)
        await next_of(there)
        for total, changer in ((10, other_process), (20, this_process), (30, other_process)):
            await give(user_id, 10)
            changer.changed(user_id)
            await until(here, total)
            await until(there, total)


async def test_a_process_where_nobody_watches_says_and_hears_of_changes(this_process: BalanceFeed, other_process: BalanceFeed, give: Give):
    async with AsyncExitStack() as stack:
        user_ids = [uuid.uuid4() for _ in range(3)]
        for user_id in user_ids:
            other_process.changed(user_id)
            this_process.changed(user_id)
        watches = [await stack.enter_async_context(watching(this_process, user_id)) for user_id in user_ids]
        for user_id, watch in zip(user_ids, watches, strict=True):
            await next_of(watch)
            await give(user_id, 5)
            other_process.changed(user_id)
            await until(watch, 5)


async def test_every_watcher_gets_the_balance_of_its_own_user(
    this_process: BalanceFeed, other_process: BalanceFeed, watched_engine: AsyncEngine, gate: Gate
):
    users = {uuid.uuid4(): amount for amount in range(1, 201)}
    async with AsyncExitStack() as stack:
        watches = [(user_id, await stack.enter_async_context(watching(this_process, user_id))) for user_id in users for _ in range(3)]
        firsts = await asyncio.gather(*(next_of(watch) for _, watch in watches))
        assert {first.available_millicredits for first in firsts} == {0}
        for user_id, amount in users.items():
            await give_all([user_id], amount, watched_engine)
            other_process.changed(user_id)
        found = await asyncio.gather(*(until(watch, users[user_id]) for user_id, watch in watches))
        assert len(found) == 600
    assert gate.at_once_max == 1


async def test_a_notice_longer_than_postgresql_takes_is_split(
    this_process: BalanceFeed, other_process: BalanceFeed, watched_engine: AsyncEngine
):
    users = [uuid.uuid4() for _ in range(2 * NOTICE_USERS_MAX + 10)]
    async with AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(watching(this_process, user_id)) for user_id in users]
        await asyncio.gather(*map(next_of, watches))
        await give_all(users, 3, watched_engine)
        for user_id in users:
            other_process.changed(user_id)
        await asyncio.gather(*(until(watch, 3) for watch in watches))


async def test_more_changes_than_are_remembered_are_told_as_everybody(
    this_process: BalanceFeed, other_process: BalanceFeed, give: Give, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(balances, "UNSENT_USERS_MAX", 10)
    async with watching(this_process, user_id) as watch:
        await next_of(watch)
        await give(user_id, 3)
        # No turn for others in between: all of them wait for one notice.
        other_process.changed(user_id)
        for _ in range(100):
            other_process.changed(uuid.uuid4())
        await until(watch, 3)


async def test_more_users_than_one_query_takes_are_all_told(this_process: BalanceFeed, watched_engine: AsyncEngine, gate: Gate):
    users = [uuid.uuid4() for _ in range(READ_USERS_MAX + 10)]
    async with AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(watching(this_process, user_id)) for user_id in users]
        await asyncio.gather(*map(next_of, watches))
        await give_all(users, 4, watched_engine)
        before = gate.asked
        for user_id in users:
            this_process.changed(user_id)
        await asyncio.gather(*(until(watch, 4) for watch in watches))
        assert gate.asked - before == 2


async def test_a_burst_of_changes_costs_one_more_read(this_process: BalanceFeed, give: Give, user_id: uuid.UUID, gate: Gate):
    async with watching(this_process, user_id) as watch:
        await next_of(watch)
        gate.shut()
        this_process.changed(user_id)
        await gate.held.wait()
        before = gate.asked
        for _ in range(20):
            await give(user_id, 1)
        for _ in range(1_000):
            this_process.changed(user_id)
            await asyncio.sleep(0)
        assert gate.asked == before
        gate.open()
        assert (await next_of(watch)).available_millicredits == 20
        assert gate.asked == before + 1
        assert gate.at_once_max == 1


async def test_a_watch_never_begins_with_what_was_asked_before_it(this_process: BalanceFeed, give: Give, user_id: uuid.UUID, gate: Gate):
    async with watching(this_process, user_id) as early:
        await next_of(early)
        gate.shut()
        this_process.changed(user_id)
        await gate.held.wait()  # read before the grant, told after it
        await give(user_id, 9)
        async with watching(this_process, user_id) as late:
            first = asyncio.ensure_future(next_of(late))
            await asyncio.sleep(0)
            gate.open()
            assert (await first).available_millicredits == 9
            await until(early, 9)


async def test_a_watch_may_end_before_its_first_balance(this_process: BalanceFeed, give: Give, user_id: uuid.UUID, gate: Gate):
    async with watching(this_process, user_id) as watch:
        await next_of(watch)
        gate.shut()
        this_process.changed(user_id)
        await gate.held.wait()
        hasty = asyncio.create_task(next_of(this_process.watch(uuid.uuid4(), caller=Principal())))
        await eventually(lambda: gauge() == 2)
        await end({hasty})
        await eventually(lambda: gauge() == 1)
        gate.open()
        await give(user_id, 1)
        this_process.changed(user_id)
        await until(watch, 1)


async def test_a_slow_reader_finds_only_the_newest(this_process: BalanceFeed, give: Give, user_id: uuid.UUID):
    async with watching(this_process, user_id) as slow, watching(this_process, user_id) as quick:
        await next_of(slow)
        await next_of(quick)
        for total in range(1, 21):
            await give(user_id, 1)
            this_process.changed(user_id)
            await until(quick, total)
        # What the quick one was handed, the slow one was handed with it.
        assert (await next_of(slow)).available_millicredits == 20
        await give(user_id, 1)
        this_process.changed(user_id)
        assert (await next_of(slow)).available_millicredits == 21


async def test_silence_ends_with_a_checkpoint(watched_engine: AsyncEngine, give: Give, user_id: uuid.UUID):
    await give(user_id, 5)
    async with running(watched_engine, checkpoint_interval_s=SHORT_S) as feed, watching(feed, user_id) as watch:
        first = await next_of(watch)
        assert [await next_of(watch) for _ in range(3)] == [first] * 3


async def test_a_checkpoint_heals_a_lost_notice(watched_engine: AsyncEngine, give: Give, user_id: uuid.UUID):
    async with running(watched_engine, checkpoint_interval_s=SHORT_S) as feed, watching(feed, user_id) as watch:
        await next_of(watch)
        await give(user_id, 5)  # by a process that died before it told anybody
        await until(watch, 5)


async def test_a_listener_that_is_killed_comes_back_and_misses_nothing(
    this_process: BalanceFeed, other_process: BalanceFeed, watched_engine: AsyncEngine, give: Give, user_id: uuid.UUID
):
    async with watching(this_process, user_id) as here, watching(other_process, user_id) as there:
        await next_of(here)
        await next_of(there)
        for total in (1, 2):
            before = await listeners(watched_engine)
            await give(user_id, 1)  # nobody tells of it: it is found because everything is read again
            await kill_listeners(watched_engine)
            await until(here, total)
            await until(there, total)
            async with asyncio.timeout(DEADLINE_S):
                await this_process.listening.wait()
                await other_process.listening.wait()
            assert not before & await listeners(watched_engine)
        await give(user_id, 10)
        this_process.changed(user_id)
        await until(there, 12)


async def test_streams_wait_while_postgresql_is_away(other_process: BalanceFeed, watched_database: str, give: Give, user_id: uuid.UUID):
    proxy = DatabaseProxy(watched_database)
    await proxy.open()
    try:
        async with engine_of(proxy.url) as engine, running(engine) as feed, watching(feed, user_id) as here:
            async with watching(other_process, user_id) as there:
                await next_of(here)
                await next_of(there)
                for total in (1, 2):
                    await proxy.close()
                    await eventually(lambda: not feed.listening.is_set())
                    waiting = asyncio.ensure_future(until(here, total))
                    await give(user_id, 1)
                    feed.changed(user_id)  # cannot be told to others now, nor read
                    await proxy.open()
                    await waiting
                    await until(there, total)
            # A watch that begins while it is away begins late.
            await proxy.close()
            async with watching(feed, user_id) as late:
                first = asyncio.ensure_future(next_of(late))
                await eventually(lambda: not feed.listening.is_set())
                await proxy.open()
                assert (await first).available_millicredits == 2
    finally:
        await proxy.close()


async def test_a_connection_that_fell_silent_is_found_out(
    other_process: BalanceFeed, watched_database: str, give: Give, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(balances, "PING_INTERVAL_S", 0.1)
    async with behind_proxy(watched_database, monkeypatch) as (proxy, feed), watching(feed, user_id) as watch:
        await next_of(watch)
        proxy.hush()
        await give(user_id, 6)
        other_process.changed(user_id)
        await eventually(lambda: not feed.listening.is_set())
        await proxy.close()
        await proxy.open()
        await until(watch, 6)


async def test_a_notice_that_may_not_have_arrived_is_sent_again(
    other_process: BalanceFeed, watched_database: str, give: Give, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch
):
    async with behind_proxy(watched_database, monkeypatch) as (proxy, feed), watching(other_process, user_id) as there:
        await next_of(there)
        proxy.hush()
        await give(user_id, 6)
        feed.changed(user_id)
        await eventually(lambda: not feed.listening.is_set())
        await proxy.close()
        await proxy.open()
        await until(there, 6)


@asynccontextmanager
async def behind_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[tuple[DatabaseProxy, BalanceFeed]]:
    """A feed that soon takes an unanswered command for a lost connection."""
    monkeypatch.setattr(balances, "COMMAND_TIMEOUT_S", 0.5)
    monkeypatch.setattr(balances, "READ_TIMEOUT_S", 1.0)
    proxy = DatabaseProxy(url)
    await proxy.open()
    async with engine_of(proxy.url) as engine:
        try:
            async with running(engine) as feed:
                yield proxy, feed
        finally:
            await proxy.close()  # first: an engine waits for the farewell of a peer that is silent


async def test_a_watch_that_is_cancelled_leaves_nothing_behind(this_process: BalanceFeed, give: Give, user_id: uuid.UUID):
    before = asyncio.all_tasks()

    async def read(user_id: uuid.UUID) -> None:
        async with watching(this_process, user_id) as watch:
            async for _ in watch:
                pass

    for _ in range(3):  # more than there may be at once: places come back
        readers = [asyncio.create_task(read(user_id)) for _ in range(USER_WATCHES_MAX)]
        await eventually(lambda: gauge() == USER_WATCHES_MAX)
        assert not [reader for reader in readers if reader.done()]
        await end(readers)
        assert gauge() == 0
    this_process.changed(user_id)
    await give(user_id, 1)
    assert asyncio.all_tasks() <= before


def gauge() -> float:
    (sample,) = next(iter(WATCHERS.collect())).samples
    return sample.value


async def test_a_feed_that_ends_leaves_nothing_behind(watched_engine: AsyncEngine, user_id: uuid.UUID):
    before = asyncio.all_tasks()
    async with running(watched_engine) as feed:
        feed.changed(user_id)
        assert await listeners(watched_engine)
    assert asyncio.all_tasks() <= before
    async with asyncio.timeout(DEADLINE_S):
        while await listeners(watched_engine):  # noqa: ASYNC110  # PostgreSQL gives no sign
            await asyncio.sleep(0.01)


async def test_one_user_may_watch_so_often(this_process: BalanceFeed, user_id: uuid.UUID):
    async with AsyncExitStack() as stack:
        for _ in range(USER_WATCHES_MAX):
            await next_of(await stack.enter_async_context(watching(this_process, user_id)))
        await refused_as_too_many(this_process, user_id)
        async with watching(this_process, uuid.uuid4()) as watch:
            await next_of(watch)
    async with watching(this_process, user_id) as watch:
        await next_of(watch)


async def test_one_process_takes_so_many_watches(watched_engine: AsyncEngine):
    async with running(watched_engine, watches_max=2) as feed:
        async with watching(feed, uuid.uuid4()) as one, watching(feed, uuid.uuid4()) as two:
            await next_of(one)
            await next_of(two)
            await refused_as_too_many(feed, uuid.uuid4())
        async with watching(feed, uuid.uuid4()) as watch:
            await next_of(watch)


async def refused_as_too_many(feed: BalanceFeed, user_id: uuid.UUID) -> None:
    with pytest.raises(MeshError) as raised:
        await next_of(feed.watch(user_id, caller=Principal()))
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)


async def test_a_watch_ends_with_the_access_token(this_process: BalanceFeed, user_id: uuid.UUID):
    async with watching(this_process, user_id, expire_time=time.time() + 0.2) as watch:
        with pytest.raises(MeshError) as raised:
            await until(watch, 1)
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_TOKEN_EXPIRED)


async def test_watches_end_with_the_process(watched_engine: AsyncEngine, user_id: uuid.UUID):
    async with running(watched_engine) as feed, watching(feed, user_id) as watch:
        await next_of(watch)
        waiting = asyncio.ensure_future(next_of(watch))
        await asyncio.sleep(0)
        feed.drain()
        with pytest.raises(MeshError) as raised:
            await waiting
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(MeshError, match="going away"):
            await next_of(feed.watch(user_id, caller=Principal()))


async def test_an_error_nobody_foresaw_ends_the_feed(watched_engine: AsyncEngine, user_id: uuid.UUID, monkeypatch: pytest.MonkeyPatch):
    async def broken(connection: AsyncConnection, user_ids: Collection[uuid.UUID]) -> dict[uuid.UUID, Balance]:
        raise KeyError("broken")

    monkeypatch.setattr(store, "balances", broken)
    feed = BalanceFeed(watched_engine)
    async with watching(feed, user_id) as watch:
        waiting = asyncio.ensure_future(next_of(watch))
        try:
            with pytest.raises(ExceptionGroup) as raised:
                async with asyncio.timeout(DEADLINE_S):
                    await feed.run()
        finally:
            await end({waiting})
    assert raised.group_contains(KeyError)


async def test_credits_that_lapse_are_told_before_they_are_swept(watched_engine: AsyncEngine, user_id: uuid.UUID):
    grant = "SELECT credits.grant_credits(gen_random_uuid(), gen_random_uuid(), :user_id, 5, 'test', clock_timestamp() + interval '1 hour')"
    async with running(watched_engine, checkpoint_interval_s=SHORT_S) as feed, watching(feed, user_id) as watch:
        async with watched_engine.connect() as connection:
            await connection.execute(sa.text(grant), {"user_id": user_id})
        before = await until(watch, 5)
        assert before.promotional_millicredits == 5
        assert before.next_expire_time is not None
        async with watched_engine.connect() as connection:
            # The service's role may not; the owner of the schema, which it is here too, may allow it.
            await connection.execute(sa.text("GRANT UPDATE (expire_time) ON credits.lots TO CURRENT_USER"))
            lapse = sa.text("UPDATE credits.lots SET expire_time = clock_timestamp() WHERE user_id = :user_id")
            await connection.execute(lapse, {"user_id": user_id})
            await connection.execute(sa.text("REVOKE UPDATE (expire_time) ON credits.lots FROM CURRENT_USER"))
        after = await until(watch, 0)
        assert (after.version, after.promotional_millicredits, after.next_expire_time) == (before.version, 0, None)


@pytest.fixture
def watch_rpc(credits_stub: "CreditsServiceAsyncStub", signer: Signer) -> Callable[[uuid.UUID], "WatchCall"]:
    """Calls WatchBalance as a user."""
    return lambda user_id: credits_stub.WatchBalance(pb.WatchBalanceRequest(), metadata=signer.metadata(user_id))


async def read(call: "WatchCall") -> pb.WatchBalanceResponse:
    async with asyncio.timeout(DEADLINE_S):
        response = await call.read()
    assert isinstance(response, pb.WatchBalanceResponse)
    return response


async def test_users_watch_their_own_balance(
    watch_rpc: Callable[[uuid.UUID], "WatchCall"],
    ledger_stub: "LedgerServiceAsyncStub",
    fund: Callable[[uuid.UUID, int], Awaitable[None]],
    user_id: uuid.UUID,
):
    call = watch_rpc(user_id)
    assert await read(call) == pb.WatchBalanceResponse()
    await fund(user_id, 100)
    granted = await read(call)
    assert (granted.available_millicredits, granted.reserved_millicredits) == (100, 0)
    reservation_id = str(uuid.uuid4())
    await ledger_stub.ReserveCredits(
        pb.ReserveCreditsRequest(
            reservation_id=reservation_id, user_id=str(user_id), amount_millicredits=30, ttl=duration_pb2.Duration(seconds=60)
        )
    )
    held = await read(call)
    assert (held.available_millicredits, held.reserved_millicredits) == (70, 30)
    await ledger_stub.CaptureReservation(pb.CaptureReservationRequest(reservation_id=reservation_id, amount_millicredits=10))
    captured = await read(call)
    assert (captured.available_millicredits, captured.reserved_millicredits) == (90, 0)
    assert 0 < granted.version < held.version < captured.version
    call.cancel()
    await eventually(lambda: gauge() == 0)


async def test_watching_too_often_is_refused(watch_rpc: Callable[[uuid.UUID], "WatchCall"], user_id: uuid.UUID):
    calls = [watch_rpc(user_id) for _ in range(USER_WATCHES_MAX)]
    await asyncio.gather(*map(read, calls))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await read(watch_rpc(user_id))
    refusal = refusal_of(raised.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    for call in calls:
        call.cancel()
    await eventually(lambda: gauge() == 0)
