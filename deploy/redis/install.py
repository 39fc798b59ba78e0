"""Install Debian's or Ubuntu's `redis-server` for the tests, and leave no service of it running.

`python deploy/redis/install.py` does nothing when `redis-server` is on the PATH already. The tests start servers
of their own on free ports; a service that the package starts would only take port 6379 and memory, so it is
stopped and kept from starting with the machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = "redis-server"
OLDEST = 7  # the tests' servers use settings of Redis 7.0
SYSTEMD = Path("/run/systemd/system")  # is there where systemd runs the machine
INIT_SCRIPT = Path("/etc/init.d/redis-server")
BY_HAND = f"install Redis {OLDEST} or later by hand, so that `redis-server` is on the PATH"


class InstallFailed(Exception):
    """There is no redis-server, and it could not be installed."""


def _as_root(command: list[str]) -> list[str]:
    if os.geteuid() == 0:
        return command
    if shutil.which("sudo") is None:
        raise InstallFailed(
            f"not root, and there is no sudo: as root run `apt-get install {PACKAGE}`, or {BY_HAND}"
        )
    return ["sudo", *command]


def _apt(*arguments: str) -> None:
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    command = _as_root([*quiet, *arguments])
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as failed:
        raise InstallFailed(f"{' '.join(command)} ended with {failed.returncode}; {BY_HAND}") from failed


def _silence_service() -> None:
    """Stop the service that the package may have started. A machine that runs no services has none to stop."""
    if SYSTEMD.exists():
        subprocess.run(_as_root(["systemctl", "disable", "--quiet", "--now", PACKAGE]), check=False)
    elif INIT_SCRIPT.exists():
        subprocess.run(_as_root([str(INIT_SCRIPT), "stop"]), check=False, stdout=subprocess.DEVNULL)
        subprocess.run(_as_root(["update-rc.d", PACKAGE, "disable"]), check=False, stdout=subprocess.DEVNULL)


def _new_enough(program: str) -> str:
    answer = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"v=(\d+)", answer)
    if version is None or int(version[1]) < OLDEST:
        raise InstallFailed(f"{program} is too old ({answer.strip()}): {BY_HAND}")
    return program


def install() -> str:
    """Where `redis-server` is, installed if need be. Raises InstallFailed, which names the remedy."""
    found = shutil.which(PACKAGE)
    if found is not None:
        return _new_enough(found)
    if shutil.which("apt-get") is None:
        raise InstallFailed(f"{PACKAGE} is not on the PATH and there is no apt-get here: {BY_HAND}")
    _apt("update")
    _apt("install", "--yes", "--no-install-recommends", PACKAGE)
    _silence_service()
    found = shutil.which(PACKAGE)
    if found is None:
        raise InstallFailed(f"apt-get installed {PACKAGE}, but it is not on the PATH: {BY_HAND}")
    return _new_enough(found)


def main() -> int:
    try:
        print(f"redis-server ready: {install()}")
    except InstallFailed as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
