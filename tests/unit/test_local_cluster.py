"""The script that starts a cluster on this machine: what it does to the folder that it is given. No cluster is started."""

import json
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "local" / "cluster.py"


def run(monkeypatch: pytest.MonkeyPatch, action: str, folder: Path) -> list[str]:
    """Run the script's `main`; the folders that a cluster would have been started in."""
    script: dict[str, Any] = runpy.run_path(str(SCRIPT))
    started: list[str] = []
    main = script["main"]
    main.__globals__["up"] = lambda state, *_, **__: started.append(str(state.folder))
    monkeypatch.setattr(sys, "argv", ["cluster.py", action, "--folder", str(folder)])
    main()
    return started


def test_a_folder_of_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    (tmp_path / "cluster.json").write_text("{}")
    for action in ("up", "down"):
        with pytest.raises(SystemExit, match="no cluster was started from here"):
            run(monkeypatch, action, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_what_a_cluster_left_is_ended_before_another_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, session = tmp_path / "cluster", tmp_path / "session"
    folder.mkdir()
    session.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = {"processes": [{"name": "head", "pid": gone.pid, "started": 0}], "values": {"session": str(session)}}
    (folder / "cluster.json").write_text(json.dumps(record))
    (folder / "head.log").write_text("of yesterday")
    assert run(monkeypatch, "up", folder) == [str(folder)]
    assert not session.exists()
    assert not folder.exists()
    assert run(monkeypatch, "up", folder) == [str(folder)], "a new folder"


def test_a_proxy_does_not_see_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is on loopback; with the proxy of an office in its environment a cluster never came up."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Silent."""

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        # Nobody listens at the proxy's port.
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        assert runpy.run_path(str(SCRIPT))["answers"](f"http://127.0.0.1:{server.server_port}", "token")
        thread.join()
    assert seen == ["/api/jobs/"]
