"""Servers as child processes: started, waited for, and ended with all they started."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.server_process import ServerFailed, ServerProcess

SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ.get("WORD", "").encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _server(port: int, folder: Path) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", SERVER, str(port)], f"http://127.0.0.1:{port}/", folder / "log")


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_it_is_ready_inside_and_gone_after_with_its_children(tmp_path: Path, free_port: Callable[[], int]) -> None:
    with _server(free_port(), tmp_path) as server:
        assert server.poll() is None
        child = int(server.log().split()[1])
        assert _is_alive(server.pid)
        assert _is_alive(child)
    assert server.poll() == -signal.SIGTERM
    for _ in range(100):
        if not _is_alive(child):
            break
        time.sleep(0.05)
    assert not _is_alive(child)
    server.stop()


def test_a_server_that_ends_at_once_fails_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(ServerFailed, match=r"(?s)ended with 1.*no such model"):
        ServerProcess(command, "http://127.0.0.1:9/", tmp_path / "log").__enter__()


def test_a_server_that_never_answers_fails_and_is_stopped(tmp_path: Path, free_port: Callable[[], int]) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    server = ServerProcess(command, f"http://127.0.0.1:{free_port()}/", tmp_path / "log", ready_timeout_s=0.3)
    with pytest.raises(ServerFailed, match="did not answer within"):
        server.__enter__()
    assert server.poll() == -signal.SIGTERM


def test_one_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('set', flush=True)"
    code += "; time.sleep(600)"
    server = ServerProcess([sys.executable, "-c", code], "http://127.0.0.1:9/", tmp_path / "log", grace_s=0.2)
    server.launch()
    while "set" not in server.log():
        time.sleep(0.02)
    server.stop()
    assert server.poll() == -signal.SIGKILL


def test_it_can_be_signalled_and_waited_for(tmp_path: Path, free_port: Callable[[], int]) -> None:
    with _server(free_port(), tmp_path) as server:
        server.signal(signal.SIGKILL)
        assert server.wait(10) == -signal.SIGKILL


def test_before_the_start_there_is_no_process(tmp_path: Path) -> None:
    server = ServerProcess(["true"], "http://127.0.0.1:9/", tmp_path / "log")
    assert server.poll() is None
    assert server.log() == ""
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.pid
    with pytest.raises(RuntimeError, match="not started"):
        server.wait(1)
    server.stop()
