"""What a tokenizing task says of an error, which Ray Data would bring back without its type."""

from typing import Any

import pytest

from lib.errors import DeniedError, IncompleteError, TextsweepError, UsageError
from lib.sources import report_of


@pytest.mark.parametrize(
    ("error", "is_usage"),
    [
        (UsageError("train.path: no such column"), True),
        (IncompleteError("train.path: it changed while it was read"), False),
        (DeniedError("s3://bucket/rows: not allowed to read it (ExpiredToken)"), False),
    ],
)
def test_an_error_is_a_report_that_says_whether_the_command_is_wrong(error: TextsweepError, is_usage: bool) -> None:
    """What was allowed when the run started is not the command's fault."""

    def tokenize_block(item: dict[str, Any]) -> dict[str, Any]:
        raise error

    report = report_of(tokenize_block, {})
    assert report["is_usage"] is is_usage and str(error) in report["failure"]
