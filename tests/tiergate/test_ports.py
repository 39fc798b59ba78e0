"""Ports that are named before anybody listens there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tiergate import ports
from tiergate.ports import free_ports


def test_they_differ_and_can_be_listened_on() -> None:
    found = free_ports(50)
    assert len(set(found)) == 50
    for port in found:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_no_outgoing_connection_is_ever_given_one() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first <= max(ports._PORTS):
        pytest.skip("this system gives outgoing connections all ports")
    assert all(1023 < port < first for port in free_ports(50))


def test_one_that_somebody_listens_on_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = free_ports(2)
    monkeypatch.setattr(ports, "_PORTS", [one, other])
    monkeypatch.setattr(ports, "_TRIES", 2)
    with socket.create_server(("127.0.0.1", one)):
        assert free_ports(1) == [other]
        with pytest.raises(OSError, match="2 free ports are needed"):
            free_ports(2)
