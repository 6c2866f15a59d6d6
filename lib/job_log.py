"""The log of a job on a cluster, followed while it grows."""

import asyncio
import queue
import sys
import threading
import time

import aiohttp
from ray.job_submission import JobSubmissionClient

PROGRESS = "scoring: "
"""How lines start that a terminal shows in place of the one before."""


class Log:
    """A job's log on standard output. A tail that starts over repeats nothing; a terminal shows progress in one line."""

    def __init__(self) -> None:
        self.printed = 0
        """characters of the log"""
        self.in_place = sys.stdout.isatty()
        self.open_line = False

    def show(self, start: int, text: str) -> None:
        """Print what is new in `text`, which stands at `start` in the log."""
        new = text[max(0, self.printed - start) :]
        self.printed = max(self.printed, start + len(text))
        for line in new.splitlines(keepends=True):
            progress = self.in_place and line.startswith(PROGRESS)
            lead = ("\r\x1b[K" if progress else "\n") if self.open_line else ""
            sys.stdout.write(lead + (line.rstrip("\n") if progress else line))
            self.open_line = progress
        sys.stdout.flush()

    def end(self) -> None:
        """Leave the line of progress."""
        if self.open_line:
            print(flush=True)
            self.open_line = False


class Tail:
    """A job's log from its beginning, read by a thread of its own: a server that hangs must not hold the status or Ctrl-C."""

    def __init__(self, client: JobSubmissionClient, submission_id: str) -> None:
        self.parts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.position = 0
        threading.Thread(target=self._read, args=(client, submission_id), daemon=True).start()

    def _read(self, client: JobSubmissionClient, submission_id: str) -> None:
        async def copy() -> None:
            async for part in client.tail_job_logs(submission_id):
                self.parts.put(part)

        try:
            asyncio.run(copy())
        except (aiohttp.ClientError, OSError, RuntimeError):
            pass  # it is asked for its status next, which says what is wrong
        finally:
            self.parts.put(None)

    def copy(self, log: Log, seconds: float) -> bool:
        """Print what comes within `seconds`; True if the log or the connection has ended."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                part = self.parts.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return False
            if part is None:
                return True
            log.show(self.position, part)
            self.position += len(part)
