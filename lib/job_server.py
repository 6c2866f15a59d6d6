"""Ray's job server over HTTP: reaching it with a token, sending a job once, following it, stopping it; patience throughout."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError, RuntimeEnvSetupError
from ray.job_submission import JobSubmissionClient
from requests.exceptions import HTTPError, JSONDecodeError, SSLError

import lib
from lib.errors import IncompleteError, UsageError, say
from lib.job_log import Log, Tail
from lib.submission import Submission

STOP_WAIT_SECONDS = 40
"""Between SIGTERM and SIGKILL. Ray's default of 3 s would kill a job that is about to end cleanly, which takes up to 30."""

JOB_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)}
"""Read by the job's supervisor, which runs in the job's own environment: it holds on clusters that do not set it, too."""

STOP_MARGIN_SECONDS = 20
"""for the stop to arrive and for Ray to note the end"""

REQUEST_SECONDS = (10, 60)
"""to connect and to be answered; Ray's own client waits for ever"""

POLL_SECONDS = 1

FIRST_CONTACT_SECONDS = 30
"""An address that nobody answers is rather wrong than being restarted."""

NODE_POLL_SECONDS = 20
"""Between looks whether the node of a job's driver is there."""

NODE_GONE_SECONDS = 60
"""After which a driver is given up whose node is gone: Ray sees it by itself within 30 s, and a head that comes back finds its nodes again."""

MAX_BACKOFF_SECONDS = 30
MAX_BROKEN_TAILS = 5
"""in a row without a new character: the log cannot be read, which is no reason to give up the job"""

MAY_RUN = "; what was submitted may still be running: run the same command again"

Answer = TypeVar("Answer")


class AnswerError(RuntimeError):
    """The job server answered with an HTTP error."""

    def __init__(self, status: int, text: str) -> None:
        lines = [line for line in text.strip().splitlines() if line.strip(" .")]
        super().__init__(f"HTTP {status}: {lines[-1][:300] if lines else 'no message'}")
        self.status = status


class Client(JobSubmissionClient):
    """Ray's client, with a time limit for each request and errors that know their HTTP status."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        if is_loopback(urlsplit(self.get_address()).hostname or ""):
            # A proxy of the environment would be another machine, which would read the token and reach its own loopback.
            options["proxies"] = {"http": "", "https": ""}
        return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **options)

    def _raise_error(self, r: Any) -> None:
        raise AnswerError(r.status_code, r.text)


def connect(address: str | None, *, insecure: bool, patience_seconds: float) -> "Server":
    """Reach the job server. The token comes from where Ray's own commands take it, never from the command line.

    Raises `UsageError` for an address or a token that is wrong, `IncompleteError` if nobody answers.
    """
    url = check_address(address, insecure=insecure)
    token = find_token()
    for name in ("dashboard_sdk", "job.sdk"):  # they tell of every upload and closed connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    # Ray lets these win over the address that it is given.
    overriding = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def contact() -> Client:
        try:
            return Client(url, headers=headers)
        except OSError as error:
            if found := lasting(error):
                raise ValueError(f"{type(found).__name__}: {found}") from None
            raise

    try:
        return Server(patiently(contact, url, min(patience_seconds, FIRST_CONTACT_SECONDS)), patience_seconds)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--address {url}: no Ray job server: {str(error).splitlines()[0]}") from None
    finally:
        os.environ.update({name: value for name, value in overriding.items() if value is not None})


def check_address(address: str | None, *, insecure: bool) -> str:
    """The job server's URL. Raises `UsageError` if there is none, or if a token would cross a network in clear."""
    known = [os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS")]
    url = address or next((one for one in known if one and one.startswith(("http://", "https://"))), None)
    expected = "expected the job server's, such as http://127.0.0.1:8265 or https://head.example.com"
    if not url:
        raise UsageError(f"--address is required (or RAY_API_SERVER_ADDRESS): {expected}")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--address {url}: {expected}")
    if parts.username or parts.password:
        raise UsageError(f"--address: a URL with user:password@; {expected}")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not insecure:
        raise UsageError(
            f"--address {url}: without TLS everybody on the way can read the token and run any code on the cluster with it."
            " Use https, or a tunnel to loopback (kubectl port-forward, ssh -L), or --insecure on a network that you trust"
        )
    return url


def is_loopback(host: str) -> bool:
    """Whether a URL's host is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, 127.example.com among them
        return host == "localhost"


def find_token() -> str | None:
    """The user's token, looked for as Ray does. Raises `UsageError` if there is none, unless RAY_AUTH_MODE=disabled."""
    if os.environ.get("RAY_AUTH_MODE", "token") == "disabled":
        return None
    token = os.environ.get("RAY_AUTH_TOKEN")
    if token and token != lib.made_token:
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        if named:
            raise UsageError(f"RAY_AUTH_TOKEN_PATH={named}: cannot be read: {error.strerror}") from None
    raise UsageError(
        "no token for the cluster: set RAY_AUTH_TOKEN_PATH to a file that holds it (or RAY_AUTH_TOKEN); for a cluster that asks for none"
        " RAY_AUTH_MODE=disabled"
    )


def patiently(call: Callable[[], Answer], url: str, seconds: float, hint: str = "") -> Answer:
    """Call again while the job server cannot be reached or is not ready, with growing pauses.

    Raises `IncompleteError`, which ends with `hint`, after `seconds`; at once `UsageError` if the token or the request is refused, and
    `AnswerError` for what is not there (404).
    """
    deadline, pause = time.monotonic() + seconds, 1.0
    while True:
        try:
            return call()
        except AuthenticationError as error:
            raise UsageError(
                f"{url} refused the token: {str(error).splitlines()[0]}; expected the cluster's own in RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
            ) from None
        except AnswerError as error:
            if error.status == 404:
                raise
            if error.status < 500:
                raise UsageError(f"{url} refused the request: {error}") from None
            failure = str(error)
        except OSError as error:  # those of `requests` are, too: nobody there, cut short, no answer in time
            failure = innermost(error)
        left = deadline - time.monotonic()
        if left <= 0:
            raise IncompleteError(f"{url}: no answer for {seconds:g} s: {failure}{hint}") from None
        say(f"{url}: {failure}; trying again in {min(pause, left):.0f} s")
        time.sleep(min(pause, left))
        pause = min(2 * pause, MAX_BACKOFF_SECONDS)


@dataclass(frozen=True)
class Found:
    """An attempt as the cluster knows it."""

    id: str
    details: JobDetails

    @property
    def number(self) -> int:
        """Of the attempt, from 1."""
        return int(self.id.rpartition("-")[2])

    @property
    def status(self) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self.details.status.value)

    @property
    def has_ended(self) -> bool:
        """Whether its driver is gone for good."""
        return bool(self.details.status.is_terminal())


@dataclass
class Server:
    """The job server, reached with patience: every call waits for a head that is away, and raises `IncompleteError` in the end."""

    client: Client
    patience_seconds: float

    def ask(self, call: Callable[[], Answer]) -> Answer:
        """Call with the patience that was asked for."""
        return patiently(call, self.client.get_address(), self.patience_seconds, MAY_RUN)

    def find(self, submission_id: str) -> Found | None:
        """What the cluster knows of a submission; None if nothing."""
        try:
            return Found(submission_id, self.ask(lambda: self.client.get_job_info(submission_id)))
        except AnswerError:
            return None

    def latest(self, submission: Submission) -> Found | None:
        """The last attempt; None if there is none."""
        last, number = None, 1
        while found := self.find(submission.attempt(number)):
            last, number = found, number + 1
        return last

    def submit(
        self, submission: Submission, submission_id: str, package: Path, num_cpus: float = 0, num_gpus: float = 0
    ) -> bool:
        """Start an attempt. False if it was there already: ours, whose acknowledgement was lost, or another person's."""

        def post() -> bool:
            try:
                self.client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(package), "env_vars": dict(JOB_ENVIRONMENT)},
                    metadata=submission.metadata,
                    entrypoint_num_cpus=num_cpus,
                    entrypoint_num_gpus=num_gpus,
                )
            except (AnswerError, RuntimeEnvSetupError) as error:
                # Ray says that it knows an id with 500 and a traceback, and that its agent is not ready with 500, too. Whatever befell
                # the upload it wraps.
                if self.find(submission_id):
                    return False
                raise error.__cause__ or error from None
            return True

        return self.ask(post)

    def logs(self, submission_id: str) -> str:
        """What a job has printed so far. Raises `IncompleteError` if it was lost."""
        try:
            return self.ask(lambda: self.client.get_job_logs(submission_id))
        except AnswerError:
            self.known(submission_id)
            raise

    def show_rest(self, submission_id: str, log: Log) -> None:
        """Print what is left of an ended job's log at once: the tail would take about 3 s more. It may be gone with its node."""
        try:
            log.show(0, self.client.get_job_logs(submission_id))
        except (OSError, AnswerError) as error:
            say(f"{submission_id}: the end of its log cannot be read: {innermost(error)}")
        log.end()

    def stop(self, submission_id: str) -> Found:
        """Ask a job to end and wait until it has. Raises `IncompleteError` if it does not, or was lost."""
        with contextlib.suppress(AnswerError):  # if there is no such job, that is seen next
            self.ask(lambda: self.client.stop_job(submission_id))
        patience = STOP_WAIT_SECONDS + STOP_MARGIN_SECONDS
        deadline = time.monotonic() + patience
        while not (found := self.known(submission_id)).has_ended:
            if time.monotonic() > deadline:
                raise IncompleteError(
                    f"{submission_id}: still {found.status} {patience} s after it was asked to stop; look at Ray's dashboard"
                )
            time.sleep(POLL_SECONDS / 2)
        return found

    def known(self, submission_id: str) -> Found:
        """What the cluster knows of a submission that was there. Raises `IncompleteError` if it was lost."""
        if found := self.find(submission_id):
            return found
        raise IncompleteError(
            f"{submission_id}: the cluster does not know it any more: its head was started anew without fault tolerance of its state"
            " (GCS), and the job ended with it; what it had finished is kept: run the same command again"
        )

    def has_lost_driver(self, found: Found) -> bool:
        """Whether the node of a job's driver is gone. Not if that cannot be known, as behind an ingress for jobs alone."""
        node = getattr(found.details, "driver_node_id", None)
        try:
            nodes = self.client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
            alive = {one["raylet"]["nodeId"] for one in nodes if one["raylet"]["state"] == "ALIVE"}
        except (OSError, AuthenticationError, ValueError, KeyError, TypeError):
            return False
        return bool(node and alive) and node not in alive

    def follow(self, submission_id: str) -> Found:
        """Print a job's log until the job has ended. Raises `IncompleteError` if the cluster has lost it.

        Ray 2.60 goes on saying RUNNING of a job whose driver was lost with the head, if the head came back with its state from Redis, until
        it is asked to start or stop a job: such a one is stopped here.
        """
        log, tail, shown, broken = Log(), Tail(self.client, submission_id), "", 0
        node = NodeWatch()
        while True:
            before = log.printed
            ended = tail.copy(log, POLL_SECONDS)
            found = self.known(submission_id)
            if found.has_ended:
                self.show_rest(submission_id, log)
                return found
            if found.status != shown:
                shown = found.status
                log.end()
                say(f"{submission_id}: {shown}")
            if node.is_lost(self, found):
                self.stop(submission_id)
                raise IncompleteError(
                    f"{submission_id}: its driver was lost with the node that it ran on; what it had finished is kept: run the same"
                    " command again"
                )
            if ended and broken < MAX_BROKEN_TAILS:
                broken = broken + 1 if log.printed == before else 0
                if broken == MAX_BROKEN_TAILS:
                    say(f"{submission_id}: its log cannot be followed; still waiting for its end")
                else:
                    time.sleep(POLL_SECONDS)
                    tail = Tail(self.client, submission_id)


@dataclass
class NodeWatch:
    """Looks now and then whether the node of a job's driver is there."""

    looked: float = field(default_factory=time.monotonic)
    gone_since: float | None = None
    """the first look of those in a row that missed it: a head that is just back does not know its nodes yet"""

    def is_lost(self, server: Server, found: Found) -> bool:
        """Whether it has been gone for `NODE_GONE_SECONDS`."""
        now = time.monotonic()
        if now - self.looked <= NODE_POLL_SECONDS:
            return False
        self.looked = now
        if not server.has_lost_driver(found):
            self.gone_since = None
        elif self.gone_since is None:
            self.gone_since = now
        return self.gone_since is not None and now - self.gone_since > NODE_GONE_SECONDS


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it wraps: three layers of HTTP libraries."""
    found: BaseException | None = error
    while found:
        yield found
        found = found.__context__


def innermost(error: BaseException) -> str:
    """What an error that wraps others began with, in one line."""
    *_, first = causes(error)
    return f"{type(first).__name__}: {first}"


def lasting(error: OSError) -> BaseException | None:
    """What will not be otherwise a little later: a certificate, a refusal (4xx), a page for people in place of JSON."""
    for one in causes(error):
        refused = isinstance(one, HTTPError) and one.response is not None and one.response.status_code < 500
        if refused or isinstance(one, (JSONDecodeError, SSLError)):
            return one
    return None
