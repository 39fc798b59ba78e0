"""Start the real engines of the engine environment on this machine: `vllm serve` and `transformers serve`.

As a command, `python deploy/vllm_cpu/server.py --port 8000` installs what is missing, serves until it is
interrupted, and prints the base URL once the engine answers.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from deploy.server_process import ServerFailed, ServerProcess, free_port  # noqa: E402 (the path comes first)
from deploy.vllm_cpu.install import InstallFailed, install  # noqa: E402

MODEL_NAME = "tiny"
MAX_MODEL_TOKENS = 8192
MAX_RUNNING_SEQS = 64
MAX_BATCHED_TOKENS = 4096
READY_TIMEOUT_S = 300.0  # the first start of a fresh environment compiles all of vLLM's Python files

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",  # 5 s by default: shorter than a gateway's pool keeps connections
}
TRANSFER = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "fail",
}
PLUGIN = "tiergate_vllm_cpu"  # keeps the engine from spinning on its neighbours' cores


def prepare(venv: Path = ROOT / ".venv-vllm", work: Path = ROOT / ".engine") -> tuple[Path, Path]:
    """Install the environment and make the model, where needed; returns its `bin` folder and the model's.

    Raises InstallFailed.
    """
    python = install(venv)
    maker = ROOT / "deploy" / "vllm_cpu" / "make_model.py"
    model = work / "model"
    done = model / "generation_config.json"  # the last file that is written
    if not done.exists() or done.stat().st_mtime < maker.stat().st_mtime:
        work.mkdir(exist_ok=True)
        try:
            subprocess.run([str(python), str(maker), str(model)], check=True)
        except subprocess.CalledProcessError as failed:
            raise InstallFailed(f"the tiny model could not be made: {failed}") from failed
    return python.parent, model


def vllm_server(
    programs: Path,
    model: Path,
    port: int,
    log_path: Path,
    *,
    extra: Sequence[str] = (),
    cpus: str | None = None,
    development: bool = False,
    driven: bool = False,
    transfer_port: int | None = None,
) -> ServerProcess:
    """A `vllm serve` that schedules by priority, counts its load and caches no prefixes (prompts repeat)
    unless `extra` has --enable-prefix-caching.

    `driven` gives it Tiergate's scheduler and control routes; until somebody gives orders it runs as stock. `cpus`
    binds its threads (vLLM's VLLM_CPU_OMP_THREADS_BIND, for instance "0"); by default it takes all.
    `development` opens vLLM's development routes: what its scheduler is set to, and abort by request id.
    `transfer_port` lets it exchange KV with others of its kind over loopback (`transfer.add_transfer` first).
    """
    command = [str(programs / "vllm"), "serve", str(model)]
    command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "256M"]
    command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(MAX_MODEL_TOKENS), "--max-num-seqs", str(MAX_RUNNING_SEQS)]
    command += ["--max-num-batched-tokens", str(MAX_BATCHED_TOKENS), "--scheduling-policy", "priority"]
    command += ["--enable-server-load-tracking", "--no-enable-prefix-caching"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "pythonic"]
    # a random model that may write blanks into JSON writes nothing else
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}', *extra]
    plugins = [PLUGIN]
    if driven:
        command += ["--scheduler-cls", "tiergate_engine.vllm.Scheduler"]
        plugins.append("tiergate")
    transfer: dict[str, str] = {}
    if transfer_port is not None:
        command += ["--kv-transfer-config", json.dumps(TRANSFER)]
        transfer = {
            "UCX_TLS": "tcp,self,sm",
            "UCX_NET_DEVICES": "lo",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(transfer_port),
        }
    return ServerProcess(
        command,
        f"http://127.0.0.1:{port}/health",
        log_path,
        environment={
            **ENVIRONMENT,
            **transfer,
            "VLLM_PLUGINS": ",".join(plugins),
            "VLLM_CPU_OMP_THREADS_BIND": cpus or "auto",
            "VLLM_SERVER_DEV_MODE": "1" if development else "0",
        },
        ready_timeout_s=READY_TIMEOUT_S,
    )


def transformers_server(programs: Path, model: Path, port: int, log_path: Path, cache: Path) -> ServerProcess:
    """A `transformers serve` with continuous batching. The model's name is its path."""
    (cache / "hub").mkdir(parents=True, exist_ok=True)  # without it /v1/models is a 500
    command = [str(programs / "transformers"), "serve", str(model), "--continuous-batching"]
    command += ["--cb-block-size", "32", "--cb-num-blocks", "2048", "--cb-max-batch-tokens", "512"]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    return ServerProcess(
        command,
        f"http://127.0.0.1:{port}/health",
        log_path,
        environment={**ENVIRONMENT, "HF_HOME": str(cache)},
        ready_timeout_s=READY_TIMEOUT_S,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve a tiny random model with a real vLLM on CPU.")
    parser.add_argument("--port", type=int, default=None, help="a free one by default")
    parser.add_argument("--cpus", default=None, help='cores its threads are bound to, for instance "0"')
    parser.add_argument("--development", action="store_true", help="open vLLM's development routes")
    parser.add_argument("--driven", action="store_true", help="with Tiergate's scheduler and control routes")
    parser.add_argument("--caching", action="store_true", help="with a prefix cache")
    parser.add_argument("--log", type=Path, default=ROOT / ".engine" / "vllm.log")
    args = parser.parse_args()
    port: int = args.port or free_port()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways to end it take the engine down
    try:
        programs, model = prepare()
        settings = {"development": args.development, "driven": args.driven}
        extra = ("--enable-prefix-caching",) if args.caching else ()
        with vllm_server(programs, model, port, args.log, extra=extra, cpus=args.cpus, **settings) as server:
            print(f"http://127.0.0.1:{port}", flush=True)
            server.wait()
            print(f"the engine ended by itself, see {args.log}", file=sys.stderr)
    except KeyboardInterrupt:
        return 0
    except (InstallFailed, ServerFailed) as error:
        print(f"server: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
