"""What the mesh offers now: models, workers, how long jobs take. Read from the store every few seconds; estimates are made of it."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.inference.v1 import inference_pb2
from jobs_service import store
from jobs_service.lifecycle import Priority
from jobs_service.store import Level, Pace, Worker
from servicekit.database import reading

MAX_AGE_S = 2.0
WORKER_SILENT_S = 15.0
"""A worker that has not said for this long that it is there, is not."""
FIRST_GUESS = Pace(0.1, 0.3)
"""Seconds a step takes until there is a completed job to learn from."""
OTHER_LEVEL_SHARE = {Priority.PRO: 1 / 3, Priority.FREE: 3.0}
"""Jobs of the other level that go ahead for each of this one, when both levels are full: see the queue's weights."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds until a job ends: half of such jobs are faster than the first, nine of ten than the second."""

    p50_s: float
    p90_s: float


def forecast(*, steps: int, step: Pace, ahead: float, job: Pace, slots: int) -> Forecast:
    """The time of `steps` steps after `ahead` other jobs have gone through `slots` slots."""
    rounds = ahead / max(1, slots)
    return Forecast(steps * step.p50_s + rounds * job.p50_s, steps * step.p90_s + rounds * job.p90_s)


class Offers:
    """Models and workers as they were at most `MAX_AGE_S` ago."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._read = float("-inf")
        self._refreshing = asyncio.Lock()
        self.models: Mapping[str, inference_pb2.Model] = {}
        """Every model ever offered, by id: a job may be submitted while its worker is away."""
        self.workers: list[Worker] = []
        self._ages_s: dict[str, float] = {}
        self._steps: dict[str, Pace] = {}
        self._jobs: dict[str, Pace] = {}
        self._levels: list[Level] = []
        self._running: dict[str, int] = {}

    async def refresh(self) -> None:
        """Read again what has grown old. Raises UNAVAILABLE when it cannot be read."""
        if self._fresh:
            return
        async with self._refreshing:  # one call reads, the others that found it old wait for that
            if not self._fresh:
                await self._reread()

    @property
    def _fresh(self) -> bool:
        return time.monotonic() - self._read < MAX_AGE_S and bool(self.models)

    async def _reread(self) -> None:
        async with reading(self._engine) as connection:
            offered = await store.offered_models(connection)
            self.workers = await store.live_workers(connection, silent_s=WORKER_SILENT_S)
            self._steps, self._jobs = await store.paces(connection)
            self._levels = await store.levels(connection)
            self._running = await store.running_by_pool(connection)
        models = [(inference_pb2.Model.FromString(model), age_s) for model, age_s in offered]
        self.models = {model.model_id: model for model, _ in models}
        self._ages_s = {model.model_id: age_s for model, age_s in models}
        self._read = time.monotonic()

    def away(self, model_id: str) -> bool:
        """Whether no worker offers the model right now."""
        model = self.models.get(model_id)
        if model is None or self._ages_s[model_id] > WORKER_SILENT_S:
            return True
        return not any(model.pool in worker.pools for worker in self.workers)

    def forecast(self, *, model_id: str, pool: str, priority: Priority, steps: int, place: int) -> Forecast:
        """When a job at this place of its level ends."""
        step = self._steps.get(model_id, FIRST_GUESS)
        other = sum(level.waiting for level in self._levels if level.pool == pool and level.priority != priority)
        # Of what runs now, half is done on average.
        ahead = place - 1 + min(other, OTHER_LEVEL_SHARE[priority] * place) + self._running.get(pool, 0) / 2
        slots = sum(worker.slot_count for worker in self.workers if pool in worker.pools)
        job = self._jobs.get(pool, Pace(steps * step.p50_s, steps * step.p90_s))
        return forecast(steps=steps, step=step, ahead=ahead, job=job, slots=slots)
