"""A real S3 server on loopback (moto's), for the demo and the tests. Nothing outside this machine can reach it.

It keeps objects in memory and forgets them when it stops: good for a demo, for nothing else.

    python -m jobs.demo_store LOG      # serve until SIGTERM or Ctrl-C, with a bucket s3://demo; prints what to export
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import boto3

from lib.errors import UsageError, run_job

START_SECONDS = 60
STOP_SECONDS = 10

# The server ends with its owner, even one that is killed: then its standard input ends. One PUT at a time: moto looks whether an
# object is there and then writes it, and on a busy machine two that create it at once were both told that they had.
SERVER = """
import os, sys, threading
from moto.s3.responses import S3Response
from moto.server import main
one, put = threading.Lock(), S3Response.put_object
def put_object(self):
    with one:
        return put(self)
S3Response.put_object = put_object
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
main(["-H", "127.0.0.1", "-p", "0"])
"""

ADDRESS = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")
ACCESS = re.compile(r'"(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[\d.]+" (?P<status>\d{3})')
COLOUR = re.compile(r"\x1b\[\d*m")


class LoopbackS3:
    """One server process: `with LoopbackS3(log) as server`. Ended by its process id, also when the block raises."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.url = ""

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C ends the demo's steps first, and the server when nobody needs it any more.
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self.url = self._wait_for_address()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _wait_for_address(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if found := ADDRESS.search(self.log.read_text(errors="replace")):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(
            f"moto's S3 server did not start within {START_SECONDS} s; its output is in {self.log}:"
            f" {self.log.read_text(errors='replace')[-500:]}"
        )

    def _stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server, and no other; moto takes any key."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": "loopback",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            # A proxy of the machine must not see requests to loopback.
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def bucket(self, name: str = "") -> str:
        """Create a bucket and return its URL; without a name, one that no other call gets."""
        name = name or f"bucket-{secrets.token_hex(6)}"
        boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="loopback",
            aws_secret_access_key="loopback",
        ).create_bucket(Bucket=name)
        return f"s3://{name}"

    def requests(self) -> list[tuple[str, str, int]]:
        """Every request so far as `(method, path with query, status)`, from the server's access log."""
        text = COLOUR.sub("", self.log.read_text(errors="replace"))
        return [(found["method"], found["path"], int(found["status"])) for found in ACCESS.finditer(text)]


def main(argv: Sequence[str]) -> None:
    """Serve until somebody ends it."""
    if len(argv) != 1:
        raise UsageError(f"expected the path of a log, found {list(argv)}: python -m jobs.demo_store LOG")
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: sys.exit(0))
    with LoopbackS3(Path(argv[0])) as server:
        server.bucket("demo")
        for name, value in server.environment.items():
            print(f"export {name}={value}")
        print("ready", flush=True)
        while True:
            signal.pause()


if __name__ == "__main__":
    sys.exit(run_job(main))
