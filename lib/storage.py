"""Files on any fsspec URL: listing, reading, and the two writes that the commit rests on (create once, compare and swap).

The only module that knows fsspec and s3fs. Credentials, region and endpoint come from the usual AWS environment and profile
(`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...); none is ever taken from a configuration or printed.
"""

import contextlib
import errno
import fcntl
import os
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

from lib import s3
from lib.errors import DeniedError, IncompleteError, TextsweepError, UsageError
from lib.listing import LISTING_SCHEMA, PROBES, FileInfo, describe, is_temporary, protocol_of, to_listing

NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


@dataclass(frozen=True)
class Store:
    """A folder on some file system. Paths given to its methods are relative to it. Small, and picklable."""

    url: str
    """the folder, without a slash at the end"""

    @cached_property
    def fs(self) -> Any:
        """The fsspec file system behind the folder."""
        protocol = protocol_of(self.url)
        if protocol == "s3":
            s3fs.core.set_custom_error_handler(s3.may_pass)
            system = fsspec.filesystem("s3", **s3.S3_OPTIONS)
            system.session = system.session or s3.make_session()
            return system
        try:
            return fsspec.filesystem(protocol)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{self.url}: {error}") from None

    @cached_property
    def root(self) -> str:
        """The folder as the file system spells it."""
        return str(self.fs._strip_protocol(self.url)).rstrip("/")

    @property
    def is_s3(self) -> bool:
        """Whether the folder lies in an S3 bucket."""
        return protocol_of(self.url) == "s3"

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine."""
        return protocol_of(self.url) == "file"

    def full(self, path: str) -> str:
        """The path as the file system spells it."""
        return f"{self.root}/{path}" if path else self.root

    def at(self, path: str) -> "Store":
        """The store of a folder below this one."""
        return Store(f"{self.url}/{path}")

    def __getstate__(self) -> dict[str, str]:
        """Only the URL travels: every process opens its own connections."""
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)

    # reading

    def list(self, folder: str = "") -> pa.Table:
        """List every file below `folder`, sorted by path, as `LISTING_SCHEMA`. A folder that does not exist is empty.

        Pages go into Arrow as they come: a dict per object would cost 715 bytes each.
        """
        with explained(self.url, "list"):
            pages = list(self._pages(folder))
        found = pa.concat_tables([LISTING_SCHEMA.empty_table(), *pages])
        in_order = pc.all(pc.less(found["path"].slice(0, max(0, len(found) - 1)), found["path"].slice(1)))
        return found if in_order.as_py() is not False else found.sort_by("path")  # S3 lists in order

    def _pages(self, folder: str) -> Iterator[pa.Table]:
        if self.is_s3:
            yield from self._s3_pages(folder)
            return
        strip = len(self.root) + 1
        try:
            found: Iterable[Any] = self.fs.find(self.full(folder), detail=True).values()
        except FileNotFoundError:
            return
        infos = [describe(info, str(info["name"])[strip:]) for info in found]
        yield to_listing(info for info in infos if not is_temporary(info.path))

    def _s3_pages(self, folder: str) -> Iterator[pa.Table]:
        strip = len(self.root) - len(self.root.partition("/")[0]) if "/" in self.root else 0
        for page in self._s3_answers(folder):
            yield to_listing(
                FileInfo(
                    item["Key"][strip:],
                    item["Size"],
                    item["ETag"].strip('"'),
                    int(item["LastModified"].timestamp() * 1e9),
                )
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")
            )

    def _s3_answers(self, folder: str, **options: str) -> Iterator[dict[str, Any]]:
        bucket, _, key = self.full(folder).partition("/")
        prefix = f"{key.rstrip('/')}/" if key else ""
        token: dict[str, str] = {}
        while True:
            page = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def folders(self) -> Sequence[str]:
        """Names of the folders directly below this one, sorted; what lies in them is not listed."""
        with explained(self.url, "list"):
            if self.is_s3:
                pages = self._s3_answers("", Delimiter="/")
                found = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", [])]
            elif self.fs.isdir(self.root):
                found = [entry["name"] for entry in self.fs.ls(self.root, detail=True) if entry["type"] == "directory"]
            else:
                found = []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def info(self, path: str) -> FileInfo | None:
        """Describe one file, or return None if there is none; a folder is none."""
        try:
            with explained(f"{self.url}/{path}", "look at"):
                try:
                    found = self.fs.info(self.full(path))
                    return None if found["type"] == "directory" else describe(found, path)
                except OSError as error:
                    if s3.code_of(error) in ("400", "403"):  # the answer to a HEAD has no body to say why
                        bucket, _, key = self.full(path).partition("/")
                        self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
                    raise
        except FileNotFoundError:
            return None

    def is_folder(self) -> bool:
        """Whether this is a folder with something in it, and no file."""
        try:
            with explained(self.url, "look at"):
                return bool(self.fs.info(self.root)["type"] == "directory")
        except FileNotFoundError:
            return False

    def open(self, path: str) -> BinaryIO:
        """Open one file for reading at any position. On S3 every range read asks for the ETag seen at opening."""
        options = {"cache_type": "none"} if self.is_s3 else {}
        return self.fs.open(self.full(path), "rb", **options)

    def open_described(self, path: str) -> tuple[BinaryIO, FileInfo]:
        """Open one file and say which content it is: size, ETag and time belong to the bytes that will be read."""
        handle = self.open(path)
        details = getattr(handle, "details", None) if self.is_s3 else None
        return handle, describe(details or self.fs.info(self.full(path)), path)

    def read(self, path: str) -> bytes | None:
        """Read one file, or return None if there is none."""
        try:
            with explained(f"{self.url}/{path}", "read"):
                # One GET: s3fs asks for the size first, and reads large files in parts that may be of different contents.
                options = {"max_concurrency": 1} if self.is_s3 else {}
                return bytes(self.fs.cat_file(self.full(path), **options))
        except FileNotFoundError:
            return None

    # writing

    def check_writable(self) -> None:
        """Raise `UsageError` unless an object can be created and deleted here, before any work is done."""
        if not (self.is_s3 or self.is_local):
            raise UsageError(
                f"output {self.url}: predictions go to s3:// or to a local path, where a file can be created exactly once"
            )
        probe = f"{PROBES}{secrets.token_hex(8)}"
        try:
            self.create(probe, b"")
        except FileNotFoundError:
            raise UsageError(f"output {self.url}: cannot be created: No such file or directory") from None
        self.delete(probe)

    def create(self, path: str, data: bytes) -> bool:
        """Make a file visible whole, once. Returns False, and changes nothing, if it is there already."""
        if self.is_s3:
            return self.put_if(path, None, data)
        with explained(f"{self.url}/{path}", "write"):
            return self._link(path, data)

    def replace(self, path: str, data: bytes) -> None:
        """Write a file whole, over the one that is there."""
        with explained(f"{self.url}/{path}", "write"):
            if self.is_s3:
                self._put(path, data)
            else:
                self._write_temporary(path, data).replace(self.full(path))

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        """Write a file only if it still holds `expected` (None: is absent). Returns False, and changes nothing, if it does not.

        A lost acknowledgement makes our own success look like a lost race, so a refusal is read back before it is believed:
        `data` must be unique to the caller. Contents are compared: two writes within one tick of a disk's clock have equal times.
        """
        if self.is_local:
            with explained(f"{self.url}/{path}", "lock"), self._locked(path):
                if self.read(path) != expected:
                    return False
                self.replace(path, data)
                return True
        # First the ETag, then the content: if the ETag still fits when we write, the content was `expected` all the time.
        seen = self.info(path)
        if (self.read(path) if seen else None) != expected:
            return False
        return self.put_if(path, seen.etag if seen else None, data) or self.read(path) == data

    def put_if(self, path: str, etag: str | None, data: bytes) -> bool:
        """One conditional PUT (S3 only): if the object still has this ETag (None: is absent). Returns False if it is refused."""
        with explained(f"{self.url}/{path}", "write"):
            try:
                self._put(path, data, **({"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}))
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                if s3.code_of(error) == "NoSuchBucket":
                    raise
                return False  # the object with that ETag was deleted
        return True

    def delete(self, path: str) -> None:
        """Remove one file; one that is not there is fine."""
        with explained(f"{self.url}/{path}", "delete"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.full(path))

    def delete_all(self, paths: Sequence[str]) -> None:
        """Remove many files, a thousand with one request on S3."""
        # XML cannot hold control characters, which may stand in a shard's name.
        together = [path for path in paths if path.isprintable()] if self.is_s3 else []
        for start in range(0, len(together), s3.BATCH_DELETE):
            batch = together[start : start + s3.BATCH_DELETE]
            bucket = self.root.partition("/")[0]
            keys = [{"Key": self.full(path).partition("/")[2]} for path in batch]
            with explained(self.url, "delete from"):
                answer = self.fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
            if failed := answer.get("Errors"):
                first = f"{failed[0]['Key']}: {failed[0]['Code']}"
                raise IncompleteError(f"{self.url}: {len(failed)} of {len(batch)} files were not deleted ({first})")
        done = set(together)
        for path in paths:
            if path not in done:
                self.delete(path)

    def remove_folder(self) -> None:
        """Remove what a deleted folder leaves on a local disk: empty folders, locks, unfinished writes. S3 has no folders."""
        if self.is_local:
            shutil.rmtree(self.root, ignore_errors=True)

    def _put(self, path: str, data: bytes, **condition: Any) -> None:
        assert len(data) < s3.SINGLE_PUT_BYTES, f"{path}: {len(data)} bytes do not fit one PUT"
        bucket, _, key = self.full(path).partition("/")
        for pause in (*s3.CONFLICT_PAUSES_SECONDS, None):
            try:
                self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
                return
            except (OSError, ClientError) as error:
                code = s3.code_of(error)
                if code in s3.LOST_RACE:
                    raise FileExistsError(errno.EEXIST, "exists already", path) from error
                if code not in s3.CONFLICT or pause is None:
                    raise
                time.sleep(pause * random.uniform(0.5, 1.5))

    @contextlib.contextmanager
    def _locked(self, path: str) -> Iterator[None]:
        """Hold a lock file. The kernel lets go of it when its holder ends, however it ends; the file itself stays."""
        lock = Path(self.full(f"{path}.lock"))
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _write_temporary(self, path: str, data: bytes) -> Path:
        final = Path(self.full(path))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name[:150]}.{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _link(self, path: str, data: bytes) -> bool:
        temporary = self._write_temporary(path, data)
        try:
            os.link(temporary, self.full(path))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in NO_LINKS:
                raise UsageError(
                    f"{self.url}: its file system has no hard links ({error.strerror}), which make a file visible whole and once;"
                    " choose another file system, or s3://"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True


def cache_folder(name: str) -> Path:
    """Where this machine keeps what it can make or fetch again."""
    return Path(os.environ.get("TEXTSWEEP_CACHE", Path(tempfile.gettempdir()) / f"textsweep-{os.getuid()}")) / name


def open_store(url: str) -> Store:
    """Name a folder by URL; a plain path is made absolute. Keys and passwords in a URL are refused."""
    protocol = protocol_of(url)
    if "@" in url.partition("://")[2].partition("/")[0] and protocol != "hf":
        raise UsageError(
            f"{protocol}:// address with '@': credentials come from the environment or the AWS profile, never from a URL"
        )
    if protocol == "file":
        url = str(Path(url.removeprefix("file://")).expanduser().absolute())
    return Store(url.rstrip("/"))


def path_below(folder: Store, other: Store) -> str | None:
    """The path of `other` relative to `folder` ('' if they are the same), or None if it does not lie in it."""
    inside = protocol_of(folder.url) == protocol_of(other.url) and f"{other.root}/".startswith(f"{folder.root}/")
    return other.root[len(folder.root) + 1 :] if inside else None


@contextlib.contextmanager
def explained(url: str, verb: str) -> Iterator[None]:
    """Turn what storage raises into an error that a person can act on.

    `FileNotFoundError` of an object passes through: whether it may be missing, only the caller knows.
    """
    try:
        yield
    except TextsweepError:
        raise
    except FileNotFoundError as error:
        if s3.code_of(error) == "NoSuchBucket":
            raise UsageError(
                f"{url}: the bucket does not exist at this endpoint; check the name and AWS_ENDPOINT_URL"
            ) from error
        raise
    except PermissionError as error:
        code = s3.code_of(error) or "permission denied"
        raise DeniedError(
            f"{url}: not allowed to {verb} it ({code}); check the credentials in the environment and their rights"
        ) from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise UsageError(f"{url}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE") from error
    except (OSError, BotoCoreError, ClientError) as error:
        code = s3.code_of(error)
        if code in s3.REFUSED:
            raise DeniedError(
                f"{url}: not allowed to {verb} it ({code}); renew or check the credentials, and this machine's clock"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EROFS):
            raise UsageError(f"{url}: not possible to {verb} it: {error.strerror}; choose another path") from error
        if code in s3.NOT_IMPLEMENTED:
            raise UsageError(
                f"{url}: the store does not know how to {verb} it ({code}); use one that knows If-None-Match and If-Match"
            ) from error
        raise IncompleteError(f"{url}: storage failed to {verb} it: {type(error).__name__}: {error}") from error
