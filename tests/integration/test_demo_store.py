"""The loopback S3 server: it keeps objects, counts requests, and ends with its owner however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from jobs.demo_store import LoopbackS3
from lib.storage import open_store

REPOSITORY = Path(__file__).parents[2]
DEADLINE_SECONDS = 20


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        with urlopen(url, timeout=5):
            return True
    except (URLError, ConnectionError):
        return False


def test_requests_are_counted_with_their_status(s3: LoopbackS3) -> None:
    before = len(s3.requests())
    store = open_store(s3.bucket())
    store.create("a", b"1")
    store.create("a", b"2")
    bucket = store.url.removeprefix("s3://")
    assert s3.requests()[before:] == [
        ("PUT", f"/{bucket}", 200),
        ("PUT", f"/{bucket}/a", 200),
        ("PUT", f"/{bucket}/a", 412),
    ]


def test_buckets_are_never_the_same(s3: LoopbackS3) -> None:
    assert s3.bucket() != s3.bucket()
    assert s3.bucket("my-name") == "s3://my-name"


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    with LoopbackS3(tmp_path / "log") as server:
        assert answers(server.url)
    assert server.process.returncode is not None
    assert not answers(server.url)


def test_it_ends_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys\nfrom jobs.demo_store import LoopbackS3\n"
        "with LoopbackS3(pathlib.Path(sys.argv[1])) as server:\n    print(server.url, flush=True)\n    signal.pause()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert owner.stdout
    url = owner.stdout.readline().strip()
    assert answers(url)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while answers(url):
        assert time.monotonic() < deadline, "the server outlived its owner"
