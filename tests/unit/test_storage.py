"""Storage: the same promises on a local disk and on a real S3 server, and messages that say what to do."""

import errno
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from botocore.utils import parse_timestamp

from jobs.demo_store import LoopbackS3
from lib.errors import IncompleteError, UsageError
from lib.listing import FileInfo, protocol_of, split_pattern
from lib.s3 import code_of, read_time
from lib.storage import Store, open_store
from tests.proxy import Fault, FaultyProxy, Rule

REPOSITORY = Path(__file__).parents[2]
RACERS = 16


@pytest.fixture
def store(any_url: str) -> Store:
    return open_store(any_url)


def paths(store: Store) -> list[str]:
    return list(store.list()["path"].to_pylist())


# creating


def test_create_makes_a_file_once(store: Store) -> None:
    assert store.create("a/b.parquet", b"first") is True
    before = store.info("a/b.parquet")
    assert store.create("a/b.parquet", b"second") is False
    assert store.read("a/b.parquet") == b"first"
    assert store.info("a/b.parquet") == before


def test_of_many_that_create_the_same_file_exactly_one_wins(store: Store) -> None:
    barrier = threading.Barrier(RACERS)

    def race(number: int) -> bool:
        barrier.wait()
        return store.create("contested", str(number).encode() * 1000)

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(race, range(RACERS)))
    assert sum(won) == 1
    assert store.read("contested") == str(won.index(True)).encode() * 1000
    assert paths(store) == ["contested"]


def test_replace_writes_over(store: Store) -> None:
    store.replace("x", b"one")
    store.replace("x", b"two")
    assert store.read("x") == b"two"
    assert paths(store) == ["x"]


def test_delete_removes_and_does_not_mind_what_is_not_there(store: Store) -> None:
    store.create("x", b"")
    store.delete("x")
    store.delete("x")
    assert store.read("x") is None
    assert store.info("x") is None


@pytest.mark.parametrize(
    "name", ["a b.parquet", "dt=2026-11-20/é文.parquet", "100%.parquet", "a+b&c?.parquet", "x" * 200]
)
def test_awkward_names_survive(store: Store, name: str) -> None:
    assert store.create(name, b"content")
    assert not store.create(name, b"other")
    assert paths(store) == [name]
    assert store.read(name) == b"content"
    with store.open(name) as handle:
        assert handle.read() == b"content"


# listing


def test_a_listing_is_sorted_complete_and_relative(store: Store) -> None:
    names = ["b", "a/2", "a/10", "a-b", "c/d/e"]
    for name in names:
        store.create(name, name.encode())
    listing = store.list()
    assert listing["path"].to_pylist() == sorted(names)
    assert listing["size"].to_pylist() == [len(name) for name in sorted(names)]
    assert store.list("a")["path"].to_pylist() == ["a/10", "a/2"]
    assert store.at("a").list()["path"].to_pylist() == ["10", "2"]


def test_a_folder_that_is_not_there_is_empty(store: Store) -> None:
    store.create("x", b"")
    assert store.list("missing").num_rows == 0
    assert store.at("missing").list().num_rows == 0


@pytest.mark.parametrize(
    "value", ["2026-11-22T03:38:10.000Z", "2026-11-22T03:38:10Z", "Sun, 22 Nov 2026 03:38:10 GMT", 1795318690.5, 0]
)
def test_times_are_read_as_botocore_reads_them(value: str | float) -> None:
    assert read_time(value) == parse_timestamp(value)


def test_a_listing_of_more_than_one_page_is_whole(s3: LoopbackS3) -> None:
    store = open_store(s3.bucket())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.create(f"{number:05d}", b""), range(1_050)))
    assert paths(store) == [f"{number:05d}" for number in range(1_050)]


def test_unfinished_writes_are_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store._write_temporary("a/x.parquet", b"half")
    (tmp_path / "a" / "_x").touch()
    assert paths(store) == ["a/_x"]


def test_info_agrees_with_the_listing(store: Store) -> None:
    store.create("x", b"12345")
    listed = FileInfo(*(store.list()[name][0].as_py() for name in ("path", "size", "etag", "mtime_ns")))
    assert store.info("x") == listed
    assert listed.size == 5


def test_the_description_of_an_open_file_agrees_with_the_listing(store: Store) -> None:
    store.create("x", b"12345")
    handle, info = store.open_described("x")
    with handle:
        assert handle.read() == b"12345"
    assert info == store.info("x")


# swapping


def test_swap_takes_the_place_of_what_was_expected_only(store: Store) -> None:
    assert store.swap("pointer", None, b"one")
    assert not store.swap("pointer", None, b"two")
    assert store.swap("pointer", b"one", b"three")
    assert not store.swap("pointer", b"one", b"four")
    assert store.read("pointer") == b"three"


def test_swap_of_what_is_gone_is_refused(store: Store) -> None:
    store.swap("pointer", None, b"one")
    store.delete("pointer")
    assert not store.swap("pointer", b"one", b"two")
    assert store.read("pointer") is None


def test_of_many_that_swap_the_same_file_exactly_one_wins(store: Store) -> None:
    store.swap("pointer", None, b"start")
    barrier = threading.Barrier(RACERS)

    def race(number: int) -> bool:
        barrier.wait()
        return store.swap("pointer", b"start", f"writer {number}".encode())

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(race, range(RACERS)))
    assert sum(won) == 1
    assert store.read("pointer") == f"writer {won.index(True)}".encode()


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.replace("pointer", b"one")
    times = (tmp_path / "pointer").stat()
    store.replace("pointer", b"two")
    os.utime(tmp_path / "pointer", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not store.swap("pointer", b"one", b"six")
    assert store.read("pointer") == b"two"


def test_a_lock_whose_holder_was_killed_stops_nobody(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    code = "import sys\nfrom lib.storage import open_store\nwith open_store(sys.argv[1])._locked('pointer'):\n    print('held', flush=True)\n    sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder, ThreadPoolExecutor(1) as pool:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        swap = pool.submit(store.swap, "pointer", None, b"ours")
        assert not wait([swap], timeout=0.3).done, "the lock was not held"
        holder.kill()
        assert swap.result(30)
    assert store.read("pointer") == b"ours"


def test_a_lost_answer_to_our_own_swap_is_no_lost_race(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    store = open_store(s3.bucket())
    lose_first_put(proxy)
    assert store.swap("pointer", None, b"ours")
    assert [fault for method, _, fault in proxy.seen if method == "PUT"] == [Fault.LOST_ANSWER, Fault.NONE]
    lose_first_put(proxy)
    assert store.swap("pointer", b"ours", b"ours again")
    assert store.read("pointer") == b"ours again"


def test_a_lost_answer_to_a_create_counts_as_there_already(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    store = open_store(s3.bucket())
    lose_first_put(proxy)
    assert store.create("object", b"ours") is False
    assert store.read("object") == b"ours"


def lose_first_put(proxy: FaultyProxy) -> None:
    """The server does the next PUT, and its answer is lost; the client's own second try is answered."""
    proxy.rule = first_puts(1, Fault.LOST_ANSWER)


def first_puts(count: int, fault: Fault) -> Rule:
    """A rule for so many PUTs; the later ones are passed on."""
    met: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> Fault:
        if method != "PUT" or len(met) >= count:
            return Fault.NONE
        met.append(path)
        return fault

    return rule


def test_another_write_under_way_is_no_lost_race(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    # S3 answers 409 while another PUT of the key is going on, which may fail: the object is not there, and must be tried again.
    store = open_store(s3.bucket())
    proxy.rule = first_puts(2, Fault.CONFLICT)
    assert store.create("object", b"ours") is True
    assert store.read("object") == b"ours"
    proxy.rule = first_puts(2, Fault.CONFLICT)
    assert store.swap("object", b"ours", b"ours again")
    assert [fault for method, _, fault in proxy.seen if method == "PUT"] == [*[Fault.CONFLICT] * 2, Fault.NONE] * 2


def test_a_file_is_read_with_one_request(s3: LoopbackS3) -> None:
    # Its size first and then its parts could be of two contents.
    store = open_store(s3.bucket())
    store.replace("pointer", b"one")
    before = len(s3.requests())
    assert store.read("pointer") == b"one"
    assert [method for method, _, _ in s3.requests()[before:]] == ["GET"]


# many files


def test_folders_are_named_without_listing_what_lies_in_them(store: Store) -> None:
    assert list(store.folders()) == []
    for name in ("b/1/x", "b/2", "a/x", "file", "_c d/x"):
        store.create(name, b"")
    assert list(store.folders()) == ["_c d", "a", "b"]
    assert list(store.at("b").folders()) == ["1"]


def test_many_files_are_deleted_and_no_others(store: Store) -> None:
    names = [*(f"a/{number:04d}" for number in range(1_003)), "a/é文 &<x>.parquet", "a/line\nbreak", "a/b\x01"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.create(name, b""), [*names, "kept"]))
    store.delete_all([*names, "was/never/there"])
    assert paths(store) == ["kept"]


# messages


def test_a_writable_folder_is_left_as_it_was(store: Store) -> None:
    store.check_writable()
    assert paths(store) == []


def test_a_missing_bucket_is_named(s3: LoopbackS3) -> None:
    store = open_store("s3://no-such-bucket/folder")
    with pytest.raises(UsageError, match=r"no-such-bucket.*does not exist"):
        store.check_writable()
    with pytest.raises(UsageError, match=r"bucket does not exist"):
        store.list()


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:  # as on exFAT and on most object stores mounted as folders
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError, match=r"has no hard links .*choose another file system"):
        open_store(str(tmp_path)).check_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [Store.create, Store.replace, lambda store, path, data: store.swap(path, None, data)])
def test_every_refused_write_names_the_credentials(
    write: Callable[[Store, str, bytes], object], s3: LoopbackS3, proxy: FaultyProxy
) -> None:
    store = open_store(s3.bucket())
    proxy.rule = lambda method, path, headers: Fault.DENIED if method == "PUT" else Fault.NONE
    with pytest.raises(UsageError, match=r"/object: not allowed to write it \(AccessDenied\); check the credentials"):
        write(store, "object", b"")


@pytest.mark.parametrize("folder", ["/proc/textsweep", "/sys/textsweep"])
def test_a_local_folder_that_cannot_be_written_is_named(folder: str) -> None:
    with pytest.raises(UsageError, match=f"{folder}.*(not allowed|cannot be created|not possible)") as caught:
        open_store(folder).check_writable()
    assert "bucket" not in str(caught.value)


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/below"):
        open_store(str(tmp_path / "file" / "below")).check_writable()


def test_a_refused_write_names_the_credentials(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    store = open_store(f"{s3.bucket()}/out")
    proxy.rule = lambda method, path, headers: Fault.DENIED if method == "PUT" else Fault.NONE
    with pytest.raises(UsageError, match=r"not allowed to write it .*check the credentials"):
        store.check_writable()


def test_a_refused_listing_names_the_credentials(s3: LoopbackS3, proxy: FaultyProxy) -> None:
    store = open_store(f"{s3.bucket()}/in")
    proxy.rule = lambda method, path, headers: Fault.DENIED
    with pytest.raises(UsageError, match=r"not allowed to list it \(AccessDenied\)"):
        store.list()


def test_missing_credentials_are_named(s3: LoopbackS3) -> None:
    # A process of its own: botocore looks for credentials once.
    code = "from lib.storage import open_store\nopen_store('s3://bucket').list()"
    environment = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert "UsageError: s3://bucket: Unable to locate credentials" in done.stderr
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in done.stderr


CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_a_server_that_is_not_there_is_infrastructure(s3: LoopbackS3) -> None:
    code = "from lib.storage import open_store\nopen_store('s3://bucket').list()"
    # Port 1 answers nobody; fewer tries than a job would make.
    environment = os.environ | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    patch = "import lib.s3\nlib.s3.S3_OPTIONS['config_kwargs']['retries'] = {'max_attempts': 1}\n"
    done = subprocess.run(
        [sys.executable, "-c", patch + code],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert f"{IncompleteError.__name__}: s3://bucket: storage failed to list it" in done.stderr


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://key@bucket", "ftp://user:pw@host/x"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="credentials come from the environment") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_an_unknown_protocol_is_a_wrong_command() -> None:
    with pytest.raises(UsageError, match="nosuch://x"):
        open_store("nosuch://x/y").list()


def test_only_stores_that_create_once_are_written_to() -> None:
    with pytest.raises(UsageError, match="predictions go to s3:// or to a local path"):
        open_store("memory://x").check_writable()


# names


def test_a_store_travels_as_its_url(store: Store) -> None:
    store.create("x", b"content")
    travelled = pickle.dumps(store)
    assert len(travelled) < 200 + len(store.url)
    assert pickle.loads(travelled) == store
    assert pickle.loads(travelled).read("x") == b"content"


def test_a_plain_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("a/b/").url == str(tmp_path / "a" / "b")
    assert open_store("file:///a/b").url == "/a/b"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://b/archive", ("s3://b/archive", "")),
        ("s3://b/archive/", ("s3://b/archive", "")),
        ("s3://b/archive/*.parquet", ("s3://b/archive", "*.parquet")),
        ("s3://b/archive/dt=2026-*/part.parquet", ("s3://b/archive", "dt=2026-*/part.parquet")),
        ("s3://b/archive/**/x-[0-9].parquet", ("s3://b/archive", "**/x-[0-9].parquet")),
        ("s3://b/x.parquet", ("s3://b", "x.parquet")),
        ("x.parquet", (".", "x.parquet")),
        ("*.parquet", (".", "*.parquet")),
        ("/data/x.pq", ("/data", "x.pq")),
    ],
)
def test_an_archive_is_a_root_and_a_pattern(url: str, expected: tuple[str, str]) -> None:
    assert split_pattern(url) == expected


@pytest.mark.parametrize(
    ("url", "protocol"), [("s3://b", "s3"), ("s3a://b", "s3"), ("/x", "file"), ("file:///x", "file"), ("hf://x", "hf")]
)
def test_the_protocol_is_read_from_the_url(url: str, protocol: str) -> None:
    assert protocol_of(url) == protocol


def test_an_s3a_address_is_the_same_bucket(s3: LoopbackS3) -> None:
    url = s3.bucket()
    open_store(url).create("x", b"1")
    assert open_store(url.replace("s3://", "s3a://")).read("x") == b"1"


def test_an_error_that_is_its_own_cause_is_no_endless_search() -> None:
    error = OSError("twice")
    error.__cause__ = error
    assert code_of(error) == ""
