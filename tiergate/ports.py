"""Ports for servers that this program starts and has to name before they listen."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from pathlib import Path

_LOWEST = 10_000
_USUAL_FIRST_OUTGOING = 32_768
_TRIES = 1_000


def _first_outgoing() -> int:
    try:
        told = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        told = _USUAL_FIRST_OUTGOING
    return max(told, _LOWEST + _TRIES)


_PORTS: Sequence[int] = range(_LOWEST, _first_outgoing())


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody listens on now. Raises OSError when there are none.

    As far as the system leaves any, none of those that it gives to outgoing connections: any of these could take
    the port before its server does, and whoever asks there whether the server listens could meet itself.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, _TRIES):
        if len(found) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    if len(found) < count:
        raise OSError(f"{count} free ports are needed on 127.0.0.1, between {_PORTS[0]} and {_PORTS[-1]}")
    return found
