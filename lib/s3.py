"""What S3 and its client say and need: settings, a quick session, and the error codes behind exceptions."""

from datetime import datetime
from typing import Any

from aiobotocore.session import AioSession
from botocore.exceptions import ClientError, FlexibleChecksumError
from botocore.utils import parse_timestamp

MAX_CAUSES = 16
"""Exceptions looked at for S3's error code, one the cause of the other: `raise error from error` makes a chain without end."""

S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "skip_instance_cache": False,
    "config_kwargs": {
        "retries": {"mode": "adaptive", "max_attempts": 8},
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 32,
    },
}

REFUSED = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"}
"""Codes that come as another exception than `PermissionError` and mean the same."""

LOST_RACE = {"PreconditionFailed", "412"}

CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
"""Another write of the same key is under way, and may fail: neither written nor refused. S3 says: try again."""

CONFLICT_PAUSES_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)

NOT_IMPLEMENTED = {"NotImplemented", "501"}

SINGLE_PUT_BYTES = 5 * 2**30
"""S3's limit for one PUT. Always one PUT: radosgw 16.2 ignores `If-None-Match` when a multipart upload is completed."""

BATCH_DELETE = 1000
"""S3's limit for one request."""


def make_session() -> AioSession:
    """Make an S3 session that reads times quickly: botocore's parser takes half of a client's time for a page of a listing."""
    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=read_time)
    return session


def read_time(value: str | float) -> datetime:
    """Read a time as S3 writes it in listings (ISO 8601), or in any other way that botocore knows."""
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        found: datetime = parse_timestamp(value)
        return found


def may_pass(error: BaseException) -> bool:
    """Whether s3fs should try once more (five times in all, 2 s).

    Stores under load answer 403 to what they allow; and bytes whose checksum is not the store's have changed on their way.
    """
    return code_of(error) in ("AccessDenied", "403") or isinstance(error, FlexibleChecksumError)


def code_of(error: BaseException | None) -> str:
    """The S3 error code behind an exception, or ''. s3fs turns botocore's errors into `OSError`s and keeps them as the cause."""
    for _ in range(MAX_CAUSES):
        if isinstance(error, ClientError):
            return str(error.response.get("Error", {}).get("Code", ""))
        if error is None:
            break
        error = error.__cause__
    return ""
