"""Run uv with pip's own settings: indexes, find-links, certificates, from its files or environment variables.

`python deploy/uv_run.py ARGUMENT...` is `uv ARGUMENT...`, under the interpreter of an environment that has pip and
uv. Addresses stay where pip keeps them, never in this project's files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


def pip_settings() -> dict[str, str]:
    """What `pip config list` knows, by setting name; the environment wins over the files, as in pip."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    settings: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        rank = {"global": 0, "install": 1, ":env:": 2}.get(section, -1)
        if rank >= ranks.get(name, 0):
            ranks[name] = rank
            settings[name] = value.strip("'\"").replace("\\n", " ")
    return settings


def uv_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The same settings in uv's words."""
    environment: dict[str, str] = {}
    if index := settings.get("index-url"):
        environment["UV_DEFAULT_INDEX"] = index
    if extra := settings.get("extra-index-url"):
        environment["UV_INDEX"] = " ".join(extra.split())
    if links := settings.get("find-links"):
        environment["UV_FIND_LINKS"] = ",".join(links.split())
    if certificates := settings.get("cert"):
        environment["SSL_CERT_FILE"] = certificates
    if timeout := settings.get("default-timeout") or settings.get("timeout"):
        environment["UV_HTTP_TIMEOUT"] = timeout
    # pip takes the best version over all indexes, where uv by itself takes the first index that has the name
    environment["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return environment


def uv(arguments: Sequence[str]) -> None:
    """Run uv. Raises CalledProcessError when it fails."""
    environment = {**uv_environment(pip_settings()), **os.environ}
    subprocess.run([sys.executable, "-m", "uv", *arguments], check=True, env=environment)


if __name__ == "__main__":
    try:
        uv(sys.argv[1:])
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)
