"""The listening sockets."""

from __future__ import annotations

import socket

import pytest

from tiergate.workers.sockets import listen, port_of


def test_they_listen_on_one_free_port() -> None:
    listeners = listen("127.0.0.1", 0)
    assert len(listeners) == 1
    with socket.create_connection(("127.0.0.1", port_of(listeners[0]))):
        pass
    for listener in listeners:
        assert not listener.getblocking()
        listener.close()


def test_every_address_of_a_name_has_the_same_port() -> None:
    listeners = listen("localhost", 0)
    assert len({port_of(listener) for listener in listeners}) == 1
    for listener in listeners:
        listener.close()


def test_an_address_that_is_taken_is_an_error() -> None:
    (taken,) = listen("127.0.0.1", 0)
    with taken, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", port_of(taken))
