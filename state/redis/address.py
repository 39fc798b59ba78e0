"""Where the shared store is: a URL, read into an `Address`. Only `check_files` opens files.

========================== ============================================================
``redis://``               one server (a Redis or a Valkey)
``unix://``                one server, over a socket of this machine
``redis+sentinel://``      a primary that Sentinels watch: hosts are theirs, the path is ``/SERVICE[/DATABASE]``
``redis+cluster://``       a Cluster: hosts are some of its nodes
========================== ============================================================

``rediss`` instead of ``redis`` speaks TLS; ``valkey`` and ``valkeys`` mean the same as ``redis`` and ``rediss``.
"""

from __future__ import annotations

import difflib
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379
MOST_DATABASES = 2**16

_HOST = re.compile(r"^(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9_.-]+))(?::(?P<port>[0-9]+))?$")
_ENCODE = "a password with : / ? # @ or % in it must be percent-encoded"
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class BadStoreUrl(ValueError):
    """A store's URL says something wrong. The message names the part, never a user or a password."""


class Deployment(Enum):
    """What stands at the address."""

    SERVER = "one server"
    SOCKET = "a unix socket"
    SENTINEL = "a primary watched by Sentinels"
    CLUSTER = "a Cluster"


@dataclass(frozen=True, slots=True)
class Host:
    """A name or an IP address (IPv6 without brackets), and a port."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Whom to log in as. Neither is ever shown.

    Attributes:
        username: an ACL user; None is the server's default user.
        password: in clear.
        password_file: read at every connection, so that a password can be changed while the gateway runs.
    """

    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Tls:
    """How TLS is spoken. Without `authority` the system's authorities count.

    Attributes:
        authority: PEM file with the authorities that may sign the server's certificate.
        certificate, key: this client's own, PEM.
        insecure: believe any certificate.
    """

    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Address:
    """A store's URL, read. `str` gives it without user, password and options.

    Attributes:
        hosts: the server, the Sentinels, or some of the Cluster's nodes; empty for a socket.
        path: the socket.
        service: the name by which the Sentinels know the primary.
        database: 0 in a Cluster.
        login: for the servers that hold the data.
        sentinel_login: for the Sentinels.
    """

    deployment: Deployment
    hosts: tuple[Host, ...] = ()
    path: Path | None = None
    service: str | None = None
    database: int = 0
    login: Credentials = Credentials()
    sentinel_login: Credentials = Credentials()
    tls: Tls | None = None

    def __str__(self) -> str:
        hosts = ",".join(str(host) for host in self.hosts)
        scheme = "redis" if self.tls is None else "rediss"
        match self.deployment:
            case Deployment.SOCKET:
                return f"unix://{self.path}?db={self.database}"
            case Deployment.SENTINEL:
                return f"{scheme}+sentinel://{hosts}/{self.service}/{self.database}"
            case Deployment.CLUSTER:
                return f"{scheme}+cluster://{hosts}"
            case Deployment.SERVER:
                return f"{scheme}://{hosts}/{self.database}"

    def check_files(self) -> None:
        """See that the files it names are there and say what they should. Blocking. Raises BadStoreUrl."""
        for name, login in (("password_file", self.login), ("sentinel_password_file", self.sentinel_login)):
            if login.password_file is not None:
                try:
                    login.password_file.read_text()
                except (OSError, UnicodeDecodeError) as error:
                    raise BadStoreUrl(f"store URL: {name}: {error}") from error
        if self.tls is None:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.tls.authority is not None:
                context.load_verify_locations(self.tls.authority)
        except OSError as error:
            raise BadStoreUrl(f"store URL: tls_ca: {self.tls.authority}: {error}") from error
        try:
            if self.tls.certificate is not None:
                context.load_cert_chain(self.tls.certificate, self.tls.key)
        except OSError as error:
            files = f"{self.tls.certificate} and {self.tls.key}"
            raise BadStoreUrl(f"store URL: tls_certificate and tls_key: {files}: {error}") from error


_DEPLOYMENTS = {"": Deployment.SERVER, "sentinel": Deployment.SENTINEL, "cluster": Deployment.CLUSTER}
_TLS_OPTIONS = frozenset({"tls_ca", "tls_certificate", "tls_key", "tls_insecure"})
_LOGIN_OPTIONS = frozenset({"password_file"})
_SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password", "sentinel_password_file"})


def parse_url(url: str) -> Address:
    """Read a store's URL. Raises BadStoreUrl, whose message can be shown: it repeats no secret."""
    try:
        parts = urlsplit(url.strip())
    except ValueError as error:
        raise BadStoreUrl(f"store URL: cannot be read; {_ENCODE}") from error
    if parts.fragment or "@" in parts.path + parts.query:
        raise BadStoreUrl(f"store URL: cannot be read; {_ENCODE}")
    if parts.scheme == "unix":
        return _socket(parts)
    deployment, secured = _scheme(parts.scheme)
    allowed = _LOGIN_OPTIONS | (_TLS_OPTIONS if secured else frozenset())
    if deployment is Deployment.SENTINEL:
        allowed |= _SENTINEL_OPTIONS
    user, hosts = _authority(
        parts.netloc, DEFAULT_SENTINEL_PORT if deployment is Deployment.SENTINEL else DEFAULT_PORT
    )
    if deployment is Deployment.SERVER and len(hosts) > 1:
        raise BadStoreUrl("store URL: several hosts need redis+sentinel:// or redis+cluster://")
    options = _options(parts.query, allowed, secured=secured)
    service, database = _path(deployment, parts.path)
    return Address(
        deployment,
        hosts,
        service=service,
        database=database,
        login=_login(user, options.get("password_file"), "password_file"),
        sentinel_login=_login(
            (options.get("sentinel_username"), options.get("sentinel_password")),
            options.get("sentinel_password_file"),
            "sentinel_password_file",
        ),
        tls=_tls(options) if secured else None,
    )


def _scheme(scheme: str) -> tuple[Deployment, bool]:
    """What stands there, and whether TLS is spoken."""
    base, _, suffix = scheme.partition("+")
    if base not in {"redis", "rediss", "valkey", "valkeys"} or suffix not in _DEPLOYMENTS:
        known = "redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster://"
        raise BadStoreUrl(f"store URL: must begin with {known}")
    return _DEPLOYMENTS[suffix], base.endswith("s") and base != "redis"


def _socket(parts: SplitResult) -> Address:
    user, _, rest = parts.netloc.rpartition("@")
    if rest or not parts.path.startswith("/") or parts.path == "/":
        raise BadStoreUrl("store URL: unix:// needs the socket's absolute path: unix:///run/redis.sock?db=0")
    options = _options(parts.query, _LOGIN_OPTIONS | {"db"}, secured=False)
    return Address(
        Deployment.SOCKET,
        path=Path(unquote(parts.path)),
        database=_database(options.get("db", "0")),
        login=_login(_user(user), options.get("password_file"), "password_file"),
    )


def _user(text: str) -> tuple[str | None, str | None]:
    name, colon, password = text.partition(":")
    return unquote(name) or None, unquote(password) if colon and password else None


def _authority(text: str, port: int) -> tuple[tuple[str | None, str | None], tuple[Host, ...]]:
    user, _, listed = text.rpartition("@")
    hosts = []
    for item in listed.split(","):
        match = _HOST.match(item)
        if match is None:
            what = "has no host" if not item else "has a host or port that cannot be read"
            raise BadStoreUrl(f"store URL: {what}; {_ENCODE}")
        number = int(match["port"] or port)
        if not 0 < number < 2**16:
            raise BadStoreUrl("store URL: a port must be 1 to 65535")
        hosts.append(Host(match["six"] or match["name"], number))
    return _user(user), tuple(hosts)


def _options(query: str, allowed: frozenset[str], *, secured: bool) -> Mapping[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise BadStoreUrl("store URL: after the ? there must be name=value, joined by &") from error
    options: dict[str, str] = {}
    for name, value in pairs:
        if name not in allowed:
            raise BadStoreUrl(f"store URL: {_unknown(name, allowed, secured=secured)}")
        if name in options or not value:
            raise BadStoreUrl(f"store URL: {name}: must be given once, with a value")
        options[name] = value
    return options


def _unknown(name: str, allowed: frozenset[str], *, secured: bool) -> str:
    if name in _TLS_OPTIONS and not secured:
        return f"{name}: only with TLS; begin the URL with rediss"
    if name in _SENTINEL_OPTIONS:
        return f"{name}: only with redis+sentinel://"
    near = difflib.get_close_matches(name, sorted(allowed), n=1)
    if near:
        return f"unknown option {name!r}; did you mean {near[0]}?"
    return f"unknown option {name!r}; there are {', '.join(sorted(allowed))}"


def _path(deployment: Deployment, path: str) -> tuple[str | None, int]:
    """The service and the database."""
    steps = [unquote(step) for step in path.strip("/").split("/")] if path.strip("/") else []
    if deployment is Deployment.SENTINEL:
        if not 1 <= len(steps) <= 2:
            raise BadStoreUrl(
                "store URL: redis+sentinel:// needs the service's name: /SERVICE or /SERVICE/DATABASE"
            )
        return steps[0], _database(steps[1] if len(steps) == 2 else "0")
    if len(steps) > 1:
        raise BadStoreUrl("store URL: the path must be /DATABASE, a number")
    database = _database(steps[0] if steps else "0")
    if deployment is Deployment.CLUSTER and database:
        raise BadStoreUrl("store URL: a Cluster has database 0 only")
    return None, database


def _database(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= MOST_DATABASES:
        raise BadStoreUrl("store URL: the database must be a number such as 0")
    return int(text)


def _login(user: tuple[str | None, str | None], file: str | None, name: str) -> Credentials:
    username, password = user
    if password is not None and file is not None:
        raise BadStoreUrl(f"store URL: a password and {name}: give one of them")
    if username is not None and password is None and file is None:
        raise BadStoreUrl(
            "store URL: a user without a password; give USER:PASSWORD@, or :PASSWORD@ for the default user"
        )
    return Credentials(username, password, None if file is None else Path(file))


def _tls(options: Mapping[str, str]) -> Tls:
    flag = options.get("tls_insecure", "no").lower()
    if flag not in _FLAGS:
        raise BadStoreUrl("store URL: tls_insecure: must be yes or no")
    if _FLAGS[flag] and "tls_ca" in options:
        raise BadStoreUrl("store URL: tls_ca and tls_insecure=yes: give one of them")
    files = {name: Path(options[name]) for name in ("tls_ca", "tls_certificate", "tls_key") if name in options}
    if ("tls_certificate" in files) != ("tls_key" in files):
        raise BadStoreUrl("store URL: tls_certificate and tls_key: give both or neither")
    return Tls(files.get("tls_ca"), files.get("tls_certificate"), files.get("tls_key"), _FLAGS[flag])
