"""The server's side of the model process: keeps it alive, queues attempts for its one slot, carries messages.

Nothing here blocks the event loop: a thread reads the pipe, and commands are small enough for its buffer.
"""

import asyncio
import itertools
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import grpc
import prometheus_client
import structlog

from inference_service.catalogue import Catalogue, Model
from inference_service.messages import (
    Cancel,
    Command,
    Ended,
    Failure,
    FailureKind,
    ImageRun,
    Load,
    Loaded,
    Message,
    ModelFiles,
    Options,
    PreviewPicture,
    Ready,
    RunMessage,
    Step,
    Task,
    Unload,
)
from inference_service.model_entry import Spawned, spawn
from servicekit.errors import MeshError, Reason, precondition, unavailable

STEP_SECONDS = prometheus_client.Histogram(
    "genmesh_inference_step_seconds",
    "Time of one denoising step",
    ["model"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
GENERATION_SECONDS = prometheus_client.Histogram(
    "genmesh_inference_generation_seconds",
    "Time a run held the model, by how it ended",
    ["model", "outcome"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
QUEUE_DEPTH = prometheus_client.Gauge("genmesh_inference_queue_depth", "Tasks that wait for the model")
PROCESS_RESTARTS = prometheus_client.Counter("genmesh_inference_process_restarts", "Model processes started in place of one that ended")

RESTART_DELAY_S = 0.1
RESTART_DELAY_MAX_S = 10.0
HEALTHY_AFTER_S = 30.0
"""A process that lived this long did not die of being started."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The attempt waits for the slot behind `ahead` others."""

    ahead: int


@dataclass(frozen=True, slots=True)
class LoadingModel:
    """The attempt has the slot, its model is not in memory yet."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A run, all values resolved."""

    model: Model
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    image_count: int
    format: Literal["png", "webp"]


HostEvent = Waiting | LoadingModel | RunMessage | Ended


class Place:
    """A place in the line for the slot."""

    def __init__(self) -> None:
        self.moved = asyncio.Event()


class Line:
    """Who waits for the slot, in order of arrival. The first in line has it."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._places: list[Place] = []
        self._closed = False

    def join(self) -> Place:
        """A place at the end. RESOURCE_EXHAUSTED when too many wait already."""
        self._refuse_if_closed()
        if len(self._places) > self._max_waiting:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.ERROR_REASON_LIMIT_REACHED,
                "too many attempts wait for this model server",
                retry_after_s=1.0,
            )
        place = Place()
        self._places.append(place)
        self._count()
        return place

    def leave(self, place: Place) -> None:
        """Give the place up; everyone behind moves on. Leaving twice is no error."""
        if place in self._places:
            index = self._places.index(place)
            self._places.remove(place)
            for other in self._places[index:]:
                other.moved.set()
            self._count()

    def ahead(self, place: Place) -> int:
        """How many are before the place; `place.moved` tells when that changes. 0: it has the slot."""
        place.moved.clear()
        ahead = self._places.index(place)
        if ahead:
            self._refuse_if_closed()
        return ahead

    def close(self) -> None:
        """Send away everyone who waits, and everyone who comes; the one with the slot keeps it."""
        self._closed = True
        for place in self._places:
            place.moved.set()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise unavailable("this model server is shutting down")

    def _count(self) -> None:
        QUEUE_DEPTH.set(max(0, len(self._places) - 1))


class RunningTask:
    """A task given to the process: what it said so far and has not been read."""

    def __init__(self, task: Task, place: Place | None) -> None:
        self.task = task
        self.place = place
        self.started_at = time.monotonic()
        self.ended = False
        self._messages: deque[RunMessage | Ended] = deque()
        self._arrived = asyncio.Event()

    def put(self, message: RunMessage | Ended) -> None:
        """Keep a message for the reader. Bounded by the steps and pictures of the run: of previews only the newest is kept."""
        if isinstance(message, PreviewPicture):
            self._messages = deque(kept for kept in self._messages if not isinstance(kept, PreviewPicture))
        self._messages.append(message)
        self.ended = self.ended or isinstance(message, Ended)
        self._arrived.set()

    async def next(self) -> RunMessage | Ended:
        """The next message, in order."""
        while not self._messages:
            self._arrived.clear()
            await self._arrived.wait()
        return self._messages.popleft()


class Child:
    """One model process and the thread that reads its pipe; `on_message` is called on the event loop."""

    def __init__(self, spawned: Spawned, on_message: Callable[["Child", Message], None]) -> None:
        self.process = spawned.process
        self._connection = spawned.connection
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.hung_up = asyncio.Event()
        self._thread = threading.Thread(target=self._read, name="model-pipe", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Give a command. One that finds the process dead is lost like the process, which `hung_up` tells."""
        with suppress(OSError):
            self._connection.send(command)

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()

    async def close(self) -> None:
        """End the process and wait until nothing of it is left. It has no state worth a farewell."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.process.kill()
        self.process.join()
        self._thread.join()  # the pipe ended with the process
        self._connection.close()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message: Message = self._connection.recv()
                self._loop.call_soon_threadsafe(self._on_message, self, message)
        self._loop.call_soon_threadsafe(self.hung_up.set)


class ModelHost:
    """Runs models on one device, one task at a time."""

    def __init__(
        self,
        catalogue: Catalogue,
        options: Options,
        *,
        max_waiting: int,
        load_timeout_s: float,
        cancel_timeout_s: float,
        first: Spawned | None = None,
    ) -> None:
        """`first` is a model process already started with the same options; without it the host starts its own."""
        self._catalogue = catalogue
        self._options = options
        self._first = first
        self._load_timeout_s = load_timeout_s
        self._cancel_timeout_s = cancel_timeout_s
        self._line = Line(max_waiting)
        self._ids = itertools.count(1)
        self._child: Child | None = None
        self._tasks: dict[int, RunningTask] = {}
        self._ready = asyncio.Event()
        self._not_preloaded: tuple[str, ...] = ()
        self._supervisor: asyncio.Task[None] | None = None
        self.device = ""
        """Where models run; empty until the first process has said it."""
        self.loaded: frozenset[str] = frozenset()
        """Ids of the models in memory."""

    @property
    def process_id(self) -> int | None:
        """Process id of the model process; None while there is none."""
        return self._child.process.pid if self._child else None

    @asynccontextmanager
    async def running(self, draining: asyncio.Event) -> AsyncGenerator["ModelHost"]:
        """Keep a model process running while the block runs. From `draining` on, attempts that wait are sent away."""
        self._supervisor = asyncio.create_task(self._supervise(), name="model-supervisor")
        close = asyncio.create_task(self._close_line(draining), name="model-line")
        try:
            yield self
        finally:
            for task in (close, self._supervisor):
                task.cancel()
            await asyncio.gather(close, self._supervisor, return_exceptions=True)

    async def watch(self) -> None:
        """Raise when the supervision of the model process has died."""
        assert self._supervisor is not None
        await asyncio.shield(self._supervisor)

    async def check(self) -> None:
        """Raise unless the process is up and the models to preload are in memory."""
        if not self._ready.is_set():
            raise RuntimeError("the model process is starting")
        if self._not_preloaded:
            raise RuntimeError(f"could not be loaded: {', '.join(self._not_preloaded)}")

    async def run(self, request: ImageRequest) -> AsyncGenerator[HostEvent]:
        """Make pictures: waits for the slot, then yields what the model tells; `Ended` is last.

        Leaving early cancels the run; the slot is free for the next one as soon as the model has stopped. Raises ABORTED
        (MODEL_FAILED, MODEL_OUTPUT_INVALID, WORKER_LOST) and RESOURCE_EXHAUSTED (MODEL_OUT_OF_MEMORY, LIMIT_REACHED).
        """
        task = ImageRun(
            task_id=next(self._ids),
            model=_files(request.model),
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            image_count=request.image_count,
            format=request.format,
        )
        async with aclosing(self._perform(task)) as events:
            async for event in events:
                yield event

    async def load(self, model: Model) -> None:
        """Load a model; returns when it is in memory. Errors as of `run`."""
        async with aclosing(self._perform(Load(next(self._ids), _files(model)))) as events:
            async for _ in events:
                pass

    async def unload(self, model: Model) -> None:
        """Free a model. FAILED_PRECONDITION (MODEL_BUSY) while it runs."""
        running = (running.task for running in self._tasks.values())
        if any(isinstance(task, ImageRun) and task.model.model_id == model.id for task in running):
            raise precondition(Reason.ERROR_REASON_MODEL_BUSY, "the model runs a job", {"model": model.id})
        async with aclosing(self._perform(Unload(next(self._ids), model.id))) as events:
            async for _ in events:
                pass

    async def _supervise(self) -> None:
        delay_s = RESTART_DELAY_S
        while True:
            started = time.monotonic()
            child = self._child = Child(self._first or spawn(self._options), self._on_message)
            self._first = None
            preload = asyncio.create_task(self._preload(child), name="model-preload")
            try:
                await child.hung_up.wait()
            finally:
                preload.cancel()
                self._lose(child)
                await asyncio.shield(child.close())
            lived_s = time.monotonic() - started
            _log.error("model_process.ended", exit_code=child.process.exitcode, lived_s=round(lived_s, 1))
            PROCESS_RESTARTS.inc()
            delay_s = RESTART_DELAY_S if lived_s > HEALTHY_AFTER_S else min(delay_s * 2, RESTART_DELAY_MAX_S)
            await asyncio.sleep(delay_s)

    async def _close_line(self, draining: asyncio.Event) -> None:
        await draining.wait()
        self._line.close()

    async def _preload(self, child: Child) -> None:
        await child.ready.wait()
        failed: list[str] = []
        for model in self._catalogue.preloaded:
            message = await self._give(child, Load(next(self._ids), _files(model)), None).next()
            failure = message.failure if isinstance(message, Ended) else None
            if failure is not None:
                failed.append(model.id)
                _log.error("model.preload_failed", model=model.id, kind=failure.kind.value, detail=failure.detail)
        self._not_preloaded = tuple(failed)
        self._ready.set()
        _log.info("model_process.ready", pid=child.process.pid, device=self.device, loaded=sorted(self.loaded))

    async def _perform(self, task: Task) -> AsyncGenerator[HostEvent]:
        place = self._line.join()
        running: RunningTask | None = None
        try:
            while ahead := self._line.ahead(place):
                yield Waiting(ahead)
                await place.moved.wait()
            if not self._ready.is_set() or (not isinstance(task, Unload) and task.model.model_id not in self.loaded):
                yield LoadingModel()
            running = self._give(await self._ready_child(), task, place)
            while True:
                message = await running.next()
                if isinstance(message, Ended) and message.failure is not None:
                    raise _refusal(task, message.failure)
                yield message
                if isinstance(message, Ended):
                    return
        finally:
            if running is None:
                self._line.leave(place)
            elif not running.ended:
                self._cancel(running)  # the place is left when the process has answered

    async def _ready_child(self) -> Child:
        try:
            async with asyncio.timeout(self._load_timeout_s):
                while self._child is None or not self._ready.is_set():
                    await self._ready.wait()
        except TimeoutError:
            raise unavailable("the model process is not ready") from None
        return self._child

    def _give(self, child: Child, task: Task, place: Place | None) -> RunningTask:
        running = self._tasks[task.task_id] = RunningTask(task, place)
        child.send(task)
        return running

    def _cancel(self, running: RunningTask) -> None:
        child = self._child
        if child is None:
            return

        def enforce() -> None:
            if not running.ended and child is self._child:
                _log.error("model_process.deaf", cancel_timeout_s=self._cancel_timeout_s)
                child.kill()

        child.send(Cancel(running.task.task_id))
        asyncio.get_running_loop().call_later(self._cancel_timeout_s, enforce)

    def _on_message(self, child: Child, message: Message) -> None:
        if child is not self._child:
            return
        match message:
            case Ready():
                self.device = message.device
                child.ready.set()
            case Loaded():
                self.loaded = frozenset(message.model_ids)
            case Ended():
                if message.failure is not None and message.failure.kind is FailureKind.OUT_OF_MEMORY:
                    # What is left of the heap cannot be trusted to hold the next picture: a fresh process takes over.
                    self._ready.clear()
                    child.kill()
                self._end(message)
            case _:
                running = self._tasks.get(message.task_id)
                if running is not None:
                    running.put(message)
                    if isinstance(message, Step) and isinstance(running.task, ImageRun):
                        STEP_SECONDS.labels(running.task.model.model_id).observe(message.seconds)

    def _end(self, ended: Ended) -> None:
        running = self._tasks.pop(ended.task_id, None)
        if running is None:
            return
        running.put(ended)
        if running.place is not None:
            self._line.leave(running.place)
        if isinstance(running.task, ImageRun):
            outcome = ended.failure.kind.value if ended.failure else "completed"
            GENERATION_SECONDS.labels(running.task.model.model_id, outcome).observe(time.monotonic() - running.started_at)

    def _lose(self, child: Child) -> None:
        assert child is self._child
        self._ready.clear()
        self._child = None
        self.loaded = frozenset()
        for task_id in list(self._tasks):
            self._end(Ended(task_id, Failure(FailureKind.PROCESS_LOST)))


def _files(model: Model) -> ModelFiles:
    return ModelFiles(
        model_id=model.id,
        directory=str(model.path),
        dtype=model.dtype,
        size_multiple=model.limits.size_multiple,
        default_width=model.defaults.width,
        default_height=model.defaults.height,
    )


def _refusal(task: Task, failure: Failure) -> MeshError:
    match failure.kind:
        case FailureKind.OUT_OF_MEMORY:
            _log.warning("model.out_of_memory", detail=failure.detail)
            return MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_MODEL_OUT_OF_MEMORY, "the model ran out of memory for this spec"
            )
        case FailureKind.OUTPUT_INVALID:
            _log.warning("model.output_invalid", detail=failure.detail)
            return MeshError(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_MODEL_OUTPUT_INVALID, "the model's output is not a picture")
        case FailureKind.PROCESS_LOST | FailureKind.CANCELLED:
            return MeshError(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_WORKER_LOST, "the model process was lost")
        case FailureKind.MODEL_FAILED:
            error_id = str(uuid.uuid4())
            name = task.model_id if isinstance(task, Unload) else task.model.model_id
            _log.error("model.failed", error_id=error_id, model=name, detail=failure.detail)
            return MeshError(
                grpc.StatusCode.ABORTED,
                Reason.ERROR_REASON_MODEL_FAILED,
                f"the model failed: error {error_id}",
                metadata={"error_id": error_id},
            )
