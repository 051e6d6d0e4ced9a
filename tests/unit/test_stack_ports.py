"""Blocks of ports: consecutive, exclusive, found again; taken edge ports are refused with the variable that changes them."""

import socket
from pathlib import Path

import pytest

from cli.stack import StackError
from cli.stack.ports import ANY, BLOCK_SIZE, FIRST_PORT, LAST_PORT, LOOPBACK, PortBlock, hold_block, hold_edge, is_free


def listener(port: int = 0, host: str = LOOPBACK) -> socket.socket:
    server = socket.socket()
    server.bind((host, port))
    server.listen()
    return server


def test_two_stacks_never_share_a_block(tmp_path: Path) -> None:
    with hold_block(None, tmp_path) as first, hold_block(None, tmp_path) as second:
        assert abs(first.base - second.base) >= BLOCK_SIZE
        for block in (first, second):
            assert FIRST_PORT <= block.base <= LAST_PORT - BLOCK_SIZE


def test_the_block_of_last_time_is_taken_again(tmp_path: Path) -> None:
    with hold_block(None, tmp_path) as block:
        base = block.base
    with hold_block(base, tmp_path / "another") as block:
        assert block.base == base


def test_a_block_with_a_taken_port_is_passed_over(tmp_path: Path) -> None:
    with hold_block(None, tmp_path) as block:
        base = block.base
    with listener(base + 17), hold_block(base, tmp_path) as block:
        assert block.base != base


def test_names_keep_their_ports_and_the_guard_has_its_own() -> None:
    block = PortBlock(20_000)
    assert block.port("a") == 20_001
    assert block.port("b") == 20_002
    assert block.address("a") == "127.0.0.1:20001"
    for index in range(BLOCK_SIZE - 3):
        block.port(f"more-{index}")
    with pytest.raises(StackError, match="63 ports"):
        block.port("one too many")


@pytest.mark.parametrize("host", [LOOPBACK, ANY])
def test_a_taken_edge_port_names_port_and_variable(host: str) -> None:
    with listener(host=host) as server:
        port = server.getsockname()[1]
        with pytest.raises(StackError) as caught, hold_edge(port, "GENMESH_EDGE_PORT"):
            pass
    assert str(port) in caught.value.message
    assert "GENMESH_EDGE_PORT=" in caught.value.advice


def test_a_held_edge_port_is_taken_for_others_but_not_for_envoy(tmp_path: Path) -> None:
    with hold_block(None, tmp_path) as block:
        port = block.port("edge")
        with hold_edge(port, "GENMESH_EDGE_PORT"):
            assert not is_free(port, ANY)
            with socket.socket() as envoy:
                envoy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                envoy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                envoy.bind((ANY, port))
                envoy.listen()
                with socket.create_connection((LOOPBACK, port), timeout=5):
                    envoy.accept()[0].close()
        assert is_free(port, ANY)
