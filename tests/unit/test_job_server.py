"""What is made of the answers of whatever stands at an address: Ray's job server, an ingress, something else."""

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import aiohttp
import pytest
from ray.dashboard.modules.job.common import JobStatus
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.exceptions import AuthenticationError

from jobs import publish
from lib.config import parse_only
from lib.errors import IncompleteError, UsageError
from lib.job_server import STOP_WAIT_SECONDS, Client, Server, connect
from lib.packaging import Package
from lib.submission import plan

VERSION = json.dumps({"ray_version": "2.60.0"})


class Answers(ThreadingHTTPServer):
    """Says what `answers` holds for the beginning of a path; of nothing else it knows."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {"GET /api/version": (200, VERSION)}
        self.bodies: dict[str, bytes] = {}
        """what came with each request, the last of its kind"""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request at a time, as the server was told."""

    server: Answers

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        asked = f"{self.command} {self.path}"
        self.server.bodies[asked] = body
        found = [answer for start, answer in self.server.answers.items() if asked.startswith(start)]
        status, text = found[0] if found else (404, "")
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = do_POST = answer

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    with Answers() as found:
        thread = threading.Thread(target=found.serve_forever, args=[0.01])
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def reach(url: str) -> Server:
    """Without patience: what would be tried again is an `IncompleteError` at once."""
    return connect(url, insecure=False, patience_seconds=0)


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (400, "no such host", "HTTPError: 400"),
        (404, "", "404"),
        (200, "<html>Please sign in</html>", "JSONDecodeError: Expecting value"),
        (200, "{}", "ray_version"),
        (200, "[]", ""),
    ],
)
def test_another_server_is_told_at_once(server: Answers, status: int, text: str, says: str) -> None:
    server.answers["GET /api/version"] = (status, text)
    with pytest.raises(UsageError, match=f"no Ray job server: .*{says}"):
        reach(server.url)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_told_at_once(server: Answers, status: int) -> None:
    server.answers["GET /api/version"] = (status, "")
    with pytest.raises(UsageError, match="refused the token"):
        reach(server.url)


def test_a_server_without_tls_is_told_at_once(server: Answers) -> None:
    with pytest.raises(UsageError, match="no Ray job server: SSLError"):
        reach(server.url.replace("http", "https"))


def test_who_may_answer_later_is_waited_for_and_nothing_is_said_to_run(server: Answers) -> None:
    server.answers["GET /api/version"] = (503, "starting")
    with pytest.raises(IncompleteError, match="no answer for 0 s: HTTPError: 503") as ended:
        reach(server.url)
    assert "submitted" not in str(ended.value)
    server.answers["GET /api/version"] = (200, VERSION)
    reached = reach(server.url)
    server.answers["GET /api/jobs/"] = (502, "")
    with pytest.raises(IncompleteError, match="may still be running"):
        reached.find("x")


@pytest.mark.parametrize(("status", "error"), [(413, UsageError), (503, IncompleteError)])
def test_what_befalls_the_upload_is_no_bug(
    server: Answers, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    (tmp_path / "sent.zip").write_bytes(b"sent")
    server.answers["PUT /api/packages/"] = (status, "Request Entity Too Large")
    argv = ["list", "--set", "output.path=s3://b/scores"]
    package = Package(tmp_path, ("sent.zip",), 4, None)
    submission = plan("publish", argv, parse_only(publish.main, argv), package)
    with pytest.raises(error, match=f"HTTP {status}: Request Entity Too Large"):
        reach(server.url).submit(submission, submission.attempt(1), tmp_path / "sent.zip")


def test_a_driver_has_the_processors_that_were_asked_for_and_the_time_to_stop(server: Answers, tmp_path: Path) -> None:
    (tmp_path / "sent.zip").write_bytes(b"sent")
    accepted = json.dumps({"job_id": "x", "submission_id": "x"})
    server.answers |= {"GET /api/packages/": (200, "{}"), "POST /api/jobs/": (200, accepted)}
    argv = ["list", "--set", "output.path=s3://b/scores"]
    submission = plan("publish", argv, parse_only(publish.main, argv), Package(tmp_path, ("sent.zip",), 4, None))
    assert reach(server.url).submit(submission, "x", tmp_path / "sent.zip", 2, 0.5)
    sent = json.loads(server.bodies["POST /api/jobs/"])
    assert (sent["entrypoint_num_cpus"], sent["entrypoint_num_gpus"]) == (2, 0.5)
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}


def test_loopback_is_reached_without_a_proxy(server: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would see the token, and the loopback that it asks is its own."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Answers() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        # Nobody answers there: a request that takes the proxy ends by its time limit.
        monkeypatch.setattr("lib.job_server.REQUEST_SECONDS", (1, 1))
        assert reach(server.url).find("x") is None


class BreakingTail:
    """A client whose first tail of a job's log breaks behind the first line; the job ends when the second one has shown the rest."""

    def __init__(self) -> None:
        self.tails = 0
        self.deadline = time.monotonic() + 20
        self.shown = False

    def get_address(self) -> str:
        return "http://127.0.0.1"

    async def tail_job_logs(self, _job_id: str) -> AsyncIterator[str]:
        self.tails += 1
        yield "one\n"
        if self.tails == 1:
            raise aiohttp.ClientConnectionError
        yield "two\n"
        self.shown = True

    def get_job_info(self, job_id: str) -> JobDetails:
        status = JobStatus.SUCCEEDED if self.shown or time.monotonic() > self.deadline else JobStatus.RUNNING
        return JobDetails(type=JobType.SUBMISSION, submission_id=job_id, status=status, entrypoint="true")

    def get_job_logs(self, _job_id: str) -> str:
        return ""


def test_a_log_that_breaks_off_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lib.job_server.POLL_SECONDS", 0.01)
    client = BreakingTail()
    found = Server(cast(Client, client), 0).follow("x-1")
    assert (found.status, client.tails) == ("SUCCEEDED", 2)
    assert capsys.readouterr().out == "one\ntwo\n", "shown while the job ran, and once"


class OrphanedJob(BreakingTail):
    """A client of a job on node n0 of which RUNNING is said until it is stopped, or a second after it began."""

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__()
        self.deadline, self.nodes, self.stopped = time.monotonic() + 1, list(nodes), False
        self.away_seconds = 0.0

    async def tail_job_logs(self, _job_id: str) -> AsyncIterator[str]:
        yield "one\n"

    def get_job_info(self, job_id: str) -> JobDetails:
        time.sleep(self.away_seconds)
        self.away_seconds = 0.0
        ended = JobStatus.FAILED if self.stopped else JobStatus.SUCCEEDED
        status = ended if self.stopped or time.monotonic() > self.deadline else JobStatus.RUNNING
        return JobDetails(
            type=JobType.SUBMISSION, submission_id=job_id, status=status, entrypoint="true", driver_node_id="n0"
        )

    def stop_job(self, _job_id: str) -> None:
        self.stopped = True

    def _do_request(self, method: str, endpoint: str) -> SimpleNamespace:
        assert (method, endpoint) == ("GET", "/nodes?view=summary")
        said = self.nodes.pop(0) if len(self.nodes) > 1 else self.nodes[0]
        if said == "refused":
            raise AuthenticationError("refused")
        return SimpleNamespace(json=lambda: json.loads(said))


def nodes_said(**states: str) -> str:
    return json.dumps(
        {"data": {"summary": [{"raylet": {"nodeId": name, "state": one}} for name, one in states.items()]}}
    )


@pytest.mark.parametrize(
    ("nodes", "seconds", "is_orphan"),
    [
        (nodes_said(n0="DEAD", n1="ALIVE"), 0.0, True),
        (nodes_said(n1="ALIVE"), 0.0, True),
        (nodes_said(n0="DEAD", n1="ALIVE"), 600.0, False),
        (nodes_said(n0="ALIVE", n1="ALIVE"), 0.0, False),
        (nodes_said(), 0.0, False),
        ("<html>", 0.0, False),
        ("refused", 0.0, False),
    ],
    ids=["dead", "forgotten", "a moment ago", "there", "no nodes", "a page for people", "refused"],
)
def test_a_job_whose_driver_was_lost_with_the_head_is_not_waited_for(
    nodes: str, seconds: float, is_orphan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("POLL_SECONDS", 0.01), ("NODE_POLL_SECONDS", 0.0), ("NODE_GONE_SECONDS", seconds)):
        monkeypatch.setattr(f"lib.job_server.{name}", value)
    client = OrphanedJob([nodes])
    follow = Server(cast(Client, client), 0).follow
    if is_orphan:
        with pytest.raises(
            IncompleteError,
            match=r"x-1: its driver was lost with the node that it ran on; .* run the same command again",
        ):
            follow("x-1")
    else:
        assert follow("x-1").status == "SUCCEEDED"
    assert client.stopped == is_orphan


def test_a_head_that_is_just_back_need_not_know_its_nodes_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POLL_SECONDS", 0.01), ("NODE_POLL_SECONDS", 0.0), ("NODE_GONE_SECONDS", 0.1)):
        monkeypatch.setattr(f"lib.job_server.{name}", value)
    client = OrphanedJob([nodes_said(n1="ALIVE"), nodes_said(n0="ALIVE", n1="ALIVE")])
    client.away_seconds = 0.3
    assert Server(cast(Client, client), 0).follow("x-1").status == "SUCCEEDED"
    assert not client.stopped


@pytest.mark.parametrize("call", [Server.known, Server.stop, Server.logs])
def test_a_job_that_its_head_forgot_is_incomplete(call: Callable[[Server, str], object], server: Answers) -> None:
    with pytest.raises(IncompleteError, match="x-1: the cluster does not know it any more: its head was started anew"):
        call(reach(server.url), "x-1")
