"""The listening sockets that a supervisor owns and its workers share."""

from __future__ import annotations

import contextlib
import socket

_BACKLOG = 1024


def listen(host: str, port: int) -> list[socket.socket]:
    """Bound and listening sockets, one for each address of `host`, all on one port (0: a free one).

    Raises OSError.

    They are never closed while the service lives. So a connection that nobody has accepted yet outlives the worker
    that would have taken it.
    """
    listeners: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            # Port 0 is chosen by the first socket, and the others follow.
            wanted = port or (listeners[0].getsockname()[1] if listeners else 0)
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # Else it would take the IPv4 address as well, which has a socket of its own.
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, wanted))
            listener.listen(_BACKLOG)
            listener.setblocking(False)
    except OSError:
        for listener in listeners:
            with contextlib.suppress(OSError):
                listener.close()
        raise
    return listeners


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def port_of(listener: socket.socket) -> int:
    """The port it listens on."""
    return int(listener.getsockname()[1])
