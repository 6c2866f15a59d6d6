"""Whether a store keeps its word: of many that create or swap one file at once, exactly one wins. Asked before a run writes.

A store may answer conditional writes right one after the other and still let several win a race (OpenStack Swift 2.38: 2
to 6 of 24), or not know the headers at all (rclone). Both would damage what is published, some day, silently.
"""

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from lib.errors import UsageError
from lib.listing import PROBES, describe
from lib.s3 import NOT_IMPLEMENTED, code_of
from lib.storage import Store, explained

RACERS = 8
CREATE_ROUNDS = 3
"""On Swift 2.38 seven of ten first rounds had more than one winner, so that three in a row say nothing once in forty times."""

SWAP_ROUNDS = 1
"""45 requests on a store that keeps its word."""

WRONG_ETAG = "0" * 32

UNFINISHED_NS = 24 * 3_600 * 10**9
"""A file that is no longer one of a run at work: no write takes a day."""


def check_output(output: Store, *, single_writer: bool) -> None:
    """Raise `UsageError` unless the folder can be written to and its store keeps its word. Leaves nothing behind.

    With `single_writer` the second is not asked: the user promises that no two runs ever write here at once.
    """
    output.check_writable()
    if single_writer:
        print(
            f"WARNING: output.single_writer = true: {output.url} is published to without compare-and-swap;"
            " two runs that write at once can undo each other's publication",
            flush=True,
        )
        return
    if broken := list(find_broken_promises(output)):
        raise UsageError(
            f"output {output.url}: the store does not keep conditional writes apart: {'; '.join(broken)}. Two runs that write at"
            " once could damage what is published: use a store with atomic If-None-Match and If-Match, or promise with"
            " output.single_writer = true that no two runs ever write here at once"
        )


def find_broken_promises(output: Store) -> Iterator[str]:
    """Say, with numbers, what goes wrong when files are created and swapped, one after the other and all at once."""
    folder = output.at(f"{PROBES}{secrets.token_hex(8)}")
    names = [*(f"create-{number}" for number in range(CREATE_ROUNDS)), "swap"]
    try:
        yield from check_creating(folder, names[:-1])
        yield from check_swapping(folder, names[-1])
    finally:
        folder.delete_all(names)
        folder.remove_folder()


def check_creating(folder: Store, names: Sequence[str]) -> Iterator[str]:
    """Create each file by all racers at once, then once more."""
    for number, name in enumerate(names):
        claims, kept = race(folder, name, partial(folder.create, name))
        if not is_won_once(claims, kept):
            again = folder.create(name, b"late")
            known = "the header is ignored" if again else "the header is known, and lost in a race"
            yield (
                f"If-None-Match: {len(claims)} of {RACERS} that created one object at once were told that they had,"
                f" expected 1 (round {number + 1} of {len(names)}; {known})"
            )
            return


def check_swapping(folder: Store, name: str) -> Iterator[str]:
    """Swap with a wrong ETag, with the right one, and by all racers at once."""
    folder.replace(name, b"before")
    if not folder.is_s3:
        if folder.swap(name, b"wrong", b"after") or not folder.swap(name, b"before", b"after"):
            yield "swap: what is expected and what is there are not compared"
    elif problem := check_etags(folder, name):
        yield problem
        return
    for number in range(SWAP_ROUNDS):
        before, seen = folder.read(name), folder.info(name)
        etag = seen.etag if seen else None

        def attempt(data: bytes, before: bytes | None = before, etag: str | None = etag) -> bool:
            return folder.put_if(name, etag, data) if folder.is_s3 else folder.swap(name, before, data)

        claims, kept = race(folder, name, attempt)
        if not is_won_once(claims, kept):
            yield (
                f"If-Match: {len(claims)} of {RACERS} that swapped one object at once were told that they had, expected 1"
                f" (round {number + 1} of {SWAP_ROUNDS}; the header is known, and lost in a race)"
            )
            return


def check_etags(folder: Store, name: str) -> str | None:
    """Whether a wrong ETag is refused and the right one accepted, one after the other."""
    seen = folder.info(name)
    assert seen is not None
    try:
        if folder.put_if(name, WRONG_ETAG, b"wrong"):
            return "If-Match: a write with a wrong ETag was accepted, expected a refusal (the header is ignored)"
        if not folder.put_if(name, seen.etag, b"after") and folder.read(name) != b"after":
            return f"If-Match: a write with the right ETag {seen.etag} was refused, expected it to be accepted"
    except UsageError as error:
        if code_of(error) not in NOT_IMPLEMENTED:
            raise
        return f"If-Match: not known to the store ({code_of(error)})"
    return None


def race(folder: Store, name: str, attempt: Callable[[bytes], bool]) -> tuple[list[bytes], bytes | None]:
    """Let all racers write at once; returns the contents whose writers were told that they won, and what is there then."""
    start = threading.Barrier(RACERS)

    def run(number: int) -> bytes | None:
        data = f"{number} {secrets.token_hex(8)}".encode()
        start.wait()
        return data if attempt(data) else None

    with ThreadPoolExecutor(RACERS) as pool:
        claims = [data for data in pool.map(run, range(RACERS)) if data is not None]
    return claims, folder.read(name)


def is_won_once(claims: Sequence[bytes], kept: bytes | None) -> bool:
    """One winner whose content is there; none is as good if something is there: its acknowledgement was lost on the way."""
    return claims == [kept] or (not claims and kept is not None)


def remove_unfinished(output: Store, now_ns: int) -> None:
    """Remove what runs that were killed a day ago or more left of their probes and, on a local disk, of their writes.

    `now_ns` is the time by the storage's clock. Nobody reads these files; without this they would be there for ever.
    """
    before = now_ns - UNFINISHED_NS
    if output.is_s3:
        with explained(output.url, "list"):
            found = output.fs.find(output.root, prefix=PROBES, detail=True).values()
        probes = [describe(info, str(info["name"])[len(output.root) + 1 :]) for info in found]
        output.delete_all([one.path for one in probes if (one.mtime_ns or now_ns) < before])
        return
    root = Path(output.root)
    for path in (*root.glob(f"{PROBES}*/*"), *root.glob(f"{PROBES}*"), *root.rglob(".*.tmp")):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime_ns < before:
                path.rmdir() if path.is_dir() else path.unlink()
