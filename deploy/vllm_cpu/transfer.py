"""What two vLLM of the engine environment need to exchange KV: NIXL, 220 MB that most users do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deploy.vllm_cpu.install import ROOT, InstallFailed

PACKAGES = ("nixl==1.5.1", "nixl-cu12==1.5.1")  # the second holds the library, which works without CUDA


def add_transfer(python: Path) -> None:
    """Add it to the environment of this interpreter. Raises InstallFailed."""
    uv = [sys.executable, str(ROOT / "deploy" / "uv_run.py"), "pip", "install", "--quiet", "--no-deps"]
    try:
        subprocess.run([*uv, "--python", str(python), *PACKAGES], check=True)
    except subprocess.CalledProcessError as failed:
        raise InstallFailed(f"{' and '.join(PACKAGES)} could not be installed: {failed}") from failed
