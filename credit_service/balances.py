"""Watches of balances: whoever changed one says so, and every process reads and sends it anew to those who watch it.

Notices travel between processes by LISTEN and NOTIFY of PostgreSQL. They only save waiting: one that is lost costs a watcher
`CHECKPOINT_INTERVAL_S`, never a change. What a balance is: `ledger`; how it is read: `store`.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import structlog
from prometheus_client import Counter, Gauge
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import store
from credit_service.ledger import Balance
from servicekit import database
from servicekit.errors import MeshError, Reason, unavailable
from servicekit.identity import Principal

CHANNEL = "credits_balances"
LISTENER = "credit_service-balances"
"""The dedicated connection's application_name."""
CHECKPOINT_INTERVAL_S = 15.0
"""After so much silence a balance is read and sent again, which heals a notice that was lost with a process."""
READ_INTERVAL_S = 0.02
"""Pause between two reads: a burst of changes costs few of them."""
READ_USERS_MAX = 500
"""Users whose balances are read by one query."""
READ_TIMEOUT_S = 5.0
READ_RETRY_S = 0.5
NOTIFY_INTERVAL_S = 0.05
"""Pause between two transactions that notify: each takes a lock that all of the database's notifying transactions share."""
NOTICE_USERS_MAX = 200
"""Users named by one notice: a payload has to stay below 8,000 bytes."""
UNSENT_USERS_MAX = 10_000
"""Users remembered for the next notices; had more changed, they tell of everybody."""
EVERYBODY = "*"
PING_INTERVAL_S = 15.0
"""Silence after which the listening connection is tried: a peer that vanished says nothing of it."""
COMMAND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 0.5
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
WATCHES_MAX = 2_048
"""Watches of a process: half the RPCs that it serves at once, as money must move however many people watch it."""
USER_WATCHES_MAX = 20
"""Watches of one user in a process."""

WATCHERS = Gauge("genmesh_balance_watchers", "Open watches of balances")
READS = Counter("genmesh_balance_reads_total", "Queries that read balances for watchers")

_NOTIFY = "SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload"
_NOTHING = Balance(available_millicredits=0, reserved_millicredits=0, promotional_millicredits=0, next_expire_time=None, version=0)
_SQLALCHEMY_OPTIONS = {"async_fallback", "async_creator_fn", "prepared_statement_cache_size", "prepared_statement_name_func"}
"""What a database URL may say that is not for the driver."""

_log = structlog.get_logger(__name__)


class Watcher:
    """The slot between the reader and one stream: the newest balance, which replaces the one before whether that was sent or not."""

    def __init__(self) -> None:
        self.waiting = False
        """Whether there is a balance to take."""
        self._newest: Balance | None = None
        self._repeat = False
        self._woken = asyncio.Event()

    def offer(self, balance: Balance) -> None:
        """Put a balance into the slot, unless it is an older one, or was there before, and no repetition was asked for.

        Asked for, an older one is true too: of a database that failed over and lost what it had.
        """
        newest = self._newest
        if newest is not None and not self._repeat and (balance.version < newest.version or balance == newest):
            return
        self._newest = balance
        self._repeat = False
        self.waiting = True
        self.wake()

    def repeat(self) -> None:
        """Take the next balance offered even if it is the same."""
        self._repeat = True

    def take(self) -> Balance:
        """The newest balance, which is then no longer waiting."""
        if self._newest is None:
            raise RuntimeError("no balance is waiting")
        self.waiting = False
        return self._newest

    def wake(self) -> None:
        """Make `wait` return."""
        self._woken.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when there may be something to take, at the latest after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        self._woken.clear()


class BalanceFeed:
    """Hands balances to those who watch them. One a process; `run` has to run."""

    def __init__(
        self, engine: AsyncEngine, *, watches_max: int = WATCHES_MAX, checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    ) -> None:
        self._engine = engine
        self._watches_max = watches_max
        self._checkpoint_interval_s = checkpoint_interval_s
        self._watchers: dict[UUID, set[Watcher]] = {}
        self._count = 0
        self._news: dict[UUID, None] = {}
        """Users whose balance is to be read, in the order in which they became so; all of them are watched."""
        self._news_came = asyncio.Event()
        self._unsent: set[UUID] = set()
        """Users of whose change the other processes have not been told."""
        self._unsent_everybody = False
        self._unsent_came = asyncio.Event()
        self._draining = False
        self._server_process_id = 0
        """PostgreSQL's process that serves the listening connection: what it says was said here."""
        self.listening = asyncio.Event()
        """Set while changes made by other processes are heard of."""

    def changed(self, user_id: UUID) -> None:
        """Say that a user's balance has changed, after the commit. Costs next to nothing; nobody is waited for."""
        self._ask((user_id,))
        if len(self._unsent) >= UNSENT_USERS_MAX:
            self._unsent_everybody = True
            self._unsent.clear()
        if not self._unsent_everybody:
            self._unsent.add(user_id)
        self._unsent_came.set()

    @contextmanager
    def changing(self, user_id: UUID) -> Generator[None]:
        """Say that a user's balance has changed when the block ends, however it ends: a caller may go away after the commit."""
        try:
            yield
        finally:
            self.changed(user_id)

    async def watch(self, user_id: UUID, *, caller: Principal) -> AsyncGenerator[Balance]:
        """A user's balance as it is now, then whenever it has changed, and after every silence of the checkpoint interval.

        Versions never go back; of changes that come faster than they are taken, only the newest balance is told. While the
        database is away it waits. It ends with the caller's access token.

        Raises RESOURCE_EXHAUSTED (LIMIT_REACHED) for a watch too many, UNAUTHENTICATED (TOKEN_EXPIRED, TOKEN_REVOKED), UNAVAILABLE when the
        process ends.
        """
        with self._watching(user_id) as watcher:
            checkpoint_due = time.monotonic() + self._checkpoint_interval_s
            while True:
                caller.check_alive()
                if self._draining:
                    raise unavailable("this server is going away; watch again", 0.1)
                if watcher.waiting:
                    yield watcher.take()
                    checkpoint_due = time.monotonic() + self._checkpoint_interval_s
                    continue
                timeout_s = checkpoint_due - time.monotonic()
                if timeout_s <= 0:
                    watcher.repeat()
                    self._ask((user_id,))
                    timeout_s = self._checkpoint_interval_s
                    checkpoint_due = time.monotonic() + timeout_s
                if caller.expire_time is not None:
                    timeout_s = min(timeout_s, max(0.0, caller.expire_time - time.time()))
                await watcher.wait(timeout_s)

    def drain(self) -> None:
        """End all watches."""
        self._draining = True
        for watcher in itertools.chain.from_iterable(self._watchers.values()):
            watcher.wake()

    async def run(self) -> None:
        """Read, notify and listen until cancelled. A database that is away is waited for; any other error ends it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(), name="balances-read")
            tasks.create_task(self._notify_and_listen(), name="balances-listen")

    @contextmanager
    def _watching(self, user_id: UUID) -> Generator[Watcher]:
        watchers = self._watchers.get(user_id, set())
        if len(watchers) >= USER_WATCHES_MAX:
            raise _too_many(f"{USER_WATCHES_MAX} watches of this balance are open; end one of them first")
        if self._count >= self._watches_max:
            raise _too_many("too many balances are watched here; try again", retry_after_s=1.0)
        watcher = Watcher()
        watchers.add(watcher)
        self._watchers[user_id] = watchers
        self._count += 1
        WATCHERS.inc()
        self._ask((user_id,))
        try:
            yield watcher
        finally:
            WATCHERS.dec()
            self._count -= 1
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[user_id]
                self._news.pop(user_id, None)

    def _ask(self, user_ids: Iterable[UUID]) -> None:
        for user_id in user_ids:
            if user_id in self._watchers:
                self._news[user_id] = None
                self._news_came.set()

    async def _read(self) -> None:
        """Read the balances with news, one query at a time, and hand them to those who watched before it began."""
        while True:
            await self._news_came.wait()
            # A watcher that comes during the query has asked for one of its own: this one may be older than the watcher.
            asked = {user_id: tuple(self._watchers[user_id]) for user_id in itertools.islice(self._news, READ_USERS_MAX)}
            for user_id in asked:
                del self._news[user_id]
            if not self._news:
                self._news_came.clear()
            if not asked:
                continue
            pause_s = READ_INTERVAL_S
            try:
                async with asyncio.timeout(READ_TIMEOUT_S), database.reading(self._engine) as connection:
                    balances = await store.balances(connection, list(asked))
            except Exception as error:
                if not _away(error):
                    raise
                _log.warning("balances.read_failed", error=repr(error))
                self._ask(asked)
                pause_s = READ_RETRY_S
            else:
                READS.inc()
                _hand_out(asked, balances)
            await asyncio.sleep(pause_s)

    async def _notify_and_listen(self) -> None:
        retry_s = RETRY_MIN_S
        while True:
            try:
                async with self._connection() as connection:
                    while True:
                        await self._notify(connection)
                        retry_s = RETRY_MIN_S
            except Exception as error:
                if not _away(error):
                    raise
                _log.warning("balances.listener_lost", error=repr(error))
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_MAX_S)

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[asyncpg.Connection]:
        """A connection that listens. Not one of the pool: it stays for ever, and operations on money need theirs."""
        _, url_options = self._engine.dialect.create_connect_args(self._engine.url)
        options: dict[str, Any] = {key: value for key, value in url_options.items() if key not in _SQLALCHEMY_OPTIONS}
        options |= {"timeout": database.CONNECT_TIMEOUT_S, "command_timeout": COMMAND_TIMEOUT_S}
        connection = await asyncpg.connect(**options, server_settings={"application_name": LISTENER})
        try:
            self._server_process_id = connection.get_server_pid()
            connection.add_termination_listener(lambda _: self._unsent_came.set())
            await connection.add_listener(CHANNEL, self._heard)
            # Nobody knows what was said while this process did not listen.
            self._ask(tuple(self._watchers))
            self.listening.set()
            yield connection
        finally:
            self.listening.clear()
            with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close(timeout=CLOSE_TIMEOUT_S)

    async def _notify(self, connection: asyncpg.Connection) -> None:
        """Tell the other processes what has changed here since the last time. Raises when the connection is lost."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PING_INTERVAL_S):
                await self._unsent_came.wait()
        if connection.is_closed():
            raise ConnectionResetError("the listening connection was closed")
        self._unsent_came.clear()
        user_ids, everybody = self._unsent, self._unsent_everybody
        self._unsent, self._unsent_everybody = set(), False
        try:
            # Not in the transaction that moves the credits: that would make all of them wait for one another. With nothing to
            # tell it is a ping.
            await connection.execute(_NOTIFY, CHANNEL, [EVERYBODY] if everybody else notices(user_ids))
        except BaseException:
            self._unsent_everybody |= everybody
            self._unsent |= user_ids
            self._unsent_came.set()
            raise
        await asyncio.sleep(NOTIFY_INTERVAL_S)

    def _heard(self, _connection: object, server_process_id: int, _channel: str, payload: str) -> None:
        if server_process_id == self._server_process_id or not self._watchers:
            return
        try:
            self._ask(tuple(self._watchers) if payload == EVERYBODY else map(UUID, payload.split(",")))
        except ValueError:
            _log.warning("balances.notice_not_understood", payload=payload[:100])


def notices(user_ids: Iterable[UUID]) -> list[str]:
    """The payloads that name these users, each short enough for PostgreSQL."""
    names = [str(user_id) for user_id in user_ids]
    return [",".join(names[start : start + NOTICE_USERS_MAX]) for start in range(0, len(names), NOTICE_USERS_MAX)]


def _hand_out(asked: Mapping[UUID, Sequence[Watcher]], balances: Mapping[UUID, Balance]) -> None:
    for user_id, watchers in asked.items():
        balance = balances.get(user_id, _NOTHING)
        for watcher in watchers:
            watcher.offer(balance)


def _away(error: Exception) -> bool:
    """Whether an error says that the database cannot be used for now."""
    return isinstance(error, (asyncpg.PostgresError, asyncpg.InterfaceError)) or database.translate(error) is not None


def _too_many(message: str, retry_after_s: float | None = None) -> MeshError:
    return MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED, message, retry_after_s=retry_after_s)
