"""What README.md says about reading predictions, done as it stands there; and that its tables name every key."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pydantic import BaseModel

from lib.pretrain_config import PretrainConfig
from lib.score_config import ScoreConfig
from lib.train_config import TrainConfig
from tests.conftest import REPOSITORY
from tests.integration.test_scoring import read_predictions
from tests.stand_in import add, run_night


@pytest.fixture
def predictions(tmp_path: Path, classifier: str) -> pa.Table:
    """What readers are to see of an archive whose folders look like partitions and of which one shard has changed."""
    add(tmp_path, "dt=2026-11-19/one.parquet", "up", "down", "same")
    add(tmp_path, "dt=2026-11-20/two words.parquet", "down")
    run_night(tmp_path, classifier, "first")
    add(tmp_path, "dt=2026-11-20/two words.parquet", "up", "up")
    run_night(tmp_path, classifier, "second")
    found = read_predictions(f"{tmp_path}/scores")
    assert found["label"].to_pylist() == ["up", "down", "same", "up", "up"]
    assert len(list((tmp_path / "scores").rglob("*-of-*.parquet"))) == 3, "an old object that nobody is to read"
    return found


def block(language: str, folder: Path) -> str:
    """The one block of a language in README's chapter on the output, for the predictions in a folder."""
    chapter = (REPOSITORY / "README.md").read_text().partition("\n## Output\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"(?s)```{language}\n(.*?)```", chapter)
    return found.replace("s3://bucket/scores", f"{folder}/scores")


def test_the_lines_for_pandas_read_what_is_published(predictions: pa.Table, tmp_path: Path) -> None:
    lines = [line for line in block("python", tmp_path).splitlines() if "spark." not in line]
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    pd.testing.assert_frame_equal(names["scores"].reset_index(drop=True), predictions.to_pandas())


def test_the_lines_for_duckdb_read_what_is_published(predictions: pa.Table, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed: README's SQL is not run")
    (manifest,) = (tmp_path / "scores").glob("*/_runs/second/manifest.parquet")
    version = manifest.relative_to(tmp_path / "scores").parts[0]
    with duckdb.connect() as connection:
        connection.execute(block("sql", tmp_path).replace("<version>", version).replace("<run>", "second"))
        rows, columns = connection.fetchall(), [column[0] for column in connection.description]
    assert columns == predictions.column_names
    assert sorted(rows) == sorted(tuple(row.values()) for row in predictions.to_pylist())


@pytest.mark.parametrize("config", [TrainConfig, PretrainConfig, ScoreConfig])
def test_every_key_stands_in_a_table(config: type[BaseModel]) -> None:
    rows = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("| ")]
    named = set(re.findall(r"\w+\.\w+", " ".join(part for row in rows for part in row.split("`")[1::2])))
    sections = {name: field.annotation for name, field in config.model_fields.items()}
    keys = {f"{name}.{key}" for name, one in sections.items() for key in getattr(one, "model_fields", {})}
    assert len(keys) > 20
    assert not keys - named
