"""What a checkpoint says of how it was made: all that decides it, and no password."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import zero_shot as job
from lib.config import validate
from lib.errors import UsageError
from lib.masked_fitting import readme
from lib.pretrain_config import PretrainConfig
from lib.score_config import ZeroShotConfig
from lib.zero_shot import made_from

BASE = "s3://me:secret@host/base"


def test_a_card_of_a_further_pre_training_holds_no_password() -> None:
    values = {"train": {"path": "t"}, "model": {"base": BASE}, "output": {"path": "o"}}
    parts: Any = SimpleNamespace(
        config=validate(PretrainConfig, values), run_id="r", max_length=8, index=SimpleNamespace(fingerprint="f")
    )
    counts = {"texts": {"train": 9, "valid": 1}, "tokens": {"train": 90}, "rows": {"train": 9}, "new_head": True}
    text = readme(parts, {**counts, "best": {"loss": 1.0}})
    assert "From `s3://***@host/base`, on 9 texts (90 tokens in 9 rows" in text


def test_a_checkpoint_without_training_holds_no_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"labels": {"file": "l"}, "model": {"base": BASE}, "output": {"path": f"{tmp_path}/out"}}
    made = made_from(validate(ZeroShotConfig, values), "r", {"a": ("b",)})
    assert made["config"]["model"]["base"] == "s3://***@host/base" and "secret" not in json.dumps(made)
    argv = [f"--set={section}.{key}={value}" for section, keys in values.items() for key, value in keys.items()]
    with pytest.raises(UsageError, match=r"labels\.file l: cannot be read"):
        job.main(argv)
    said = capsys.readouterr().out
    assert "***@host/base" in said and "secret" not in said
