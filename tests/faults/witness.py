"""A watcher that never gives up: it resumes with its newest token whenever its watch breaks, and records every message."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import WATCH_JOBS, User, bearer, refusal_of
from tests.faults.mesh import PATIENCE_S, POLL_S, TRANSIENT

SILENT_S = 15.0
"""A watch that says nothing for thirty checkpoint intervals is taken for dead, as a client would."""


class Witness:
    """One watcher. `async with` it: it watches while the block runs, and until `ended` is awaited.

    Without job ids it watches everything of its user, and has to be told which jobs it should have seen end.
    """

    def __init__(self, user: User, *job_ids: str, channel: grpc.aio.Channel | None = None) -> None:
        self.user = user
        self.job_ids = job_ids
        self.messages: list[jobs_pb2.WatchJobsResponse] = []
        self.reconnects = 0
        self.failure: BaseException | None = None
        self._channel = channel or user.edge.channel
        self._news = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._call: Any = None
        self._dropped = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        await self.until(lambda: bool(self.messages))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    def start(self) -> None:
        """Begin to watch; for those who do not wait for the first message."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def drop(self) -> None:
        """Break the watch in the middle of things; it is resumed."""
        if self._call is not None:
            self._dropped = True
            self._call.cancel()

    @property
    def done(self) -> bool:
        """Whether it watches no more: the server ended its watch, or it was stopped."""
        return self._task is None or self._task.done()

    @property
    def events(self) -> list[jobs_pb2.JobEvent]:
        """Events in the order in which they came."""
        return [message.event for message in self.messages if message.HasField("event")]

    @property
    def snapshots(self) -> list[jobs_pb2.Job]:
        """Snapshots in the order in which they came."""
        return [message.snapshot for message in self.messages if message.HasField("snapshot")]

    def states(self) -> dict[str, "jobs_pb2.State.ValueType"]:
        """The newest state of each job, as this watcher knows it."""
        states: dict[str, jobs_pb2.State.ValueType] = {}
        for message in self.messages:
            if message.HasField("snapshot"):
                states[message.snapshot.job_id] = message.snapshot.state
            elif message.event.HasField("state_change"):
                states[message.event.job_id] = message.event.state_change.state
        return states

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait until what was seen is as wanted."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: wanted() or self.failure is not None or self.done)
        if self.failure is not None:
            raise self.failure
        assert wanted(), f"the watch ended before that: {[message.WhichOneof('message') for message in self.messages[-5:]]}"

    async def progressed(self, job_id: str, step: int, attempt: int = 1) -> None:
        """Wait until an attempt of a job has come so far."""

        def seen() -> bool:
            return any(
                event.job_id == job_id and event.attempt == attempt and event.progress.step >= step for event in reversed(self.events)
            )

        await self.until(seen)

    async def ended(self, *job_ids: str) -> None:
        """Wait until the jobs have ended, as this watcher knows it."""
        wanted = job_ids or self.job_ids

        def seen() -> bool:
            states = self.states()
            return all(states.get(job_id, 0) >= jobs_pb2.STATE_COMPLETED for job_id in wanted)

        await self.until(seen)

    async def _run(self) -> None:
        try:
            await self._watch()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # shown to whoever waits
            self.failure = error
        finally:
            async with self._news:
                self._news.notify_all()

    async def _watch(self) -> None:
        stub = self._channel.unary_stream(
            WATCH_JOBS.path,
            request_serializer=jobs_pb2.WatchJobsRequest.SerializeToString,
            response_deserializer=jobs_pb2.WatchJobsResponse.FromString,
        )
        troubled_since: float | None = None
        while True:
            token = self.messages[-1].resume_token if self.messages else ""
            request = jobs_pb2.WatchJobsRequest(job_ids=self.job_ids, resume_token=token)
            call = self._call = stub(request, metadata=tuple(bearer(self.user.token).items()))
            try:
                while True:
                    async with asyncio.timeout(SILENT_S):
                        message = await call.read()
                    if not isinstance(message, jobs_pb2.WatchJobsResponse):
                        return  # EOF: the server says that all jobs asked for have ended
                    troubled_since = None
                    self.messages.append(message)
                    async with self._news:
                        self._news.notify_all()
            except TimeoutError:
                pass
            except grpc.aio.AioRpcError as error:
                if error.code() not in TRANSIENT:
                    raise refusal_of(error) from None
            except asyncio.CancelledError:
                if not self._dropped:
                    raise
                self._dropped = False
            finally:
                call.cancel()
                self._call = None
            self.reconnects += 1
            troubled_since = troubled_since or time.monotonic()
            if time.monotonic() - troubled_since > PATIENCE_S:
                raise TimeoutError("the watch cannot be resumed")
            await asyncio.sleep(POLL_S)
