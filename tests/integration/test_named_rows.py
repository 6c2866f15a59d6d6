"""Rows that a report lists are named by the file they stand in and their number there."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from lib.config import validate
from lib.labelled import find_sources, prepare
from lib.mapped import map_set
from lib.runtime import cluster_facts
from lib.storage import open_store
from lib.train_config import TrainConfig
from lib.training import train
from tests import fakes
from tests.labelled import make_rows

FILES = {"deep/a.parquet": 70, "deep/b.parquet": 50, "c.parquet": 40}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several files, row groups of 16 rows, and every few rows one that cannot be used; one row in six with a wrong label."""
    folder = tmp_path_factory.mktemp("rows")
    fakes.make_encoder(folder / "base", "bert")
    chance = np.random.default_rng(0)
    for seed, (name, count) in enumerate(FILES.items()):
        texts: list[str | None]
        labels: list[str | None]
        texts, labels = map(list, make_rows(count, seed))  # type: ignore[assignment]
        for row in range(count):
            if row % 7 == 3:
                texts[row] = [None, "", " "][row % 3]
            elif row % 11 == 5:
                labels[row] = None
            elif row % 6 == 0:
                labels[row] = str(chance.choice(["bad", "fair", "good"]))
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / "set" / name, row_group_size=16)
    return folder


def configure(rows: Path, **sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {
        "train": {"path": f"{rows}/set"},
        "valid": {"fraction": 0.3},
        "model": {"base": f"{rows}/base", "precision": "fp32"},
        "optim": {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3},
        "output": {"path": f"{rows}/out"},
    }
    return validate(TrainConfig, values | sections)


def read(rows: Path, one: dict[str, Any]) -> dict[str, Any]:
    """The row that is named, as it stands in its file."""
    found: dict[str, Any] = pq.read_table(rows / "set" / one["shard"]).slice(one["row"], 1).to_pylist()[0]
    return found


def test_every_row_knows_its_file_and_its_number_there(
    rows: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into chunks of a few rows, several of a file; against plain transformers on the rows as pandas reads them."""
    monkeypatch.setattr("lib.sources.BLOCK_BYTES", 1500)
    config, folder = configure(rows), open_store(f"{rows}/tokenized")
    (source,) = find_sources(config)
    assert len(source.blocks) > 2 * len(FILES)
    index = prepare(config, [source], config.model.base, 64, folder)
    data = map_set(folder, index.files["train"], index.labels, index.task, 0, 64, None)
    tokenizer = AutoTokenizer.from_pretrained(config.model.base)
    seen = []
    for row in range(len(data)):
        place = data.place_of(row)
        original = read(rows, place)
        assert data.ids_of(row).tolist() == tokenizer(original["text"], truncation=True, max_length=64)["input_ids"]
        assert index.labels[int(data.targets[row])] == original["label"]
        seen.append((place["shard"], place["row"]))
    usable = [
        (name, row)
        for name in FILES
        for row, one in enumerate(pq.read_table(rows / "set" / name).to_pylist())
        if (one["text"] or "").strip() and one["label"] is not None
    ]
    assert sorted(seen) == sorted(usable) and len(usable) < sum(FILES.values())


def test_a_report_names_rows_that_were_set_aside_and_those_that_look_wrong(rows: Path, ray_session: None) -> None:
    config = configure(rows, output={"path": f"{rows}/out", "report_text": True}, data={"label_noise": True})
    found = train(config, "night-1", cluster_facts())
    tokenizer = AutoTokenizer.from_pretrained(config.output.path)
    listed = found["label_noise"]["listed"]
    assert len({one["shard"] for one in found["errors"]}) > 1 < len({one["shard"] for one in listed})
    for one in (*found["errors"], *listed):
        original = read(rows, one)
        ids = tokenizer(original["text"], truncation=True, max_length=64)["input_ids"]
        assert one["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert original["label"] == one.get("expected", one.get("label"))
    assert not {place_of(one) for one in found["errors"]} & {place_of(one) for one in listed}
    tables = pd.read_html(io.StringIO((Path(config.output.path) / "report.html").read_text()))
    shown = next(table for table in tables if "validation file" in table.columns).iloc[
        ::2
    ]  # every other line is a text
    assert list(zip(shown["validation file"], shown["row"].astype(int), strict=True)) == [
        place_of(one) for one in found["errors"]
    ]


def place_of(one: dict[str, Any]) -> tuple[str, int]:
    return one["shard"], one["row"]
