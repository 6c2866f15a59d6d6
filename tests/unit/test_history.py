"""Earlier runs, read from a folder of versions: the latest first, no more than are needed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lib import history
from lib.history import latest_records, records_by_version
from lib.storage import Store, open_store
from lib.versions import read_json


def write_run(folder: Path, version: str, run: str, moment: int) -> None:
    place = folder / version / "_runs" / run
    place.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"run_id": run}))
    (place / "config.json").write_text("{}")
    os.utime(place / "run.json", (moment, moment))


def test_runs_come_latest_first_and_versions_by_their_latest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, old, new, empty = (letter * 16 for letter in "abcd")
    for version, run, moment in (
        (mine, "m", 9),
        (old, "o2", 4),
        (new, "n1", 3),
        (new, "n3", 7),
        (new, "n2", 5),
        (old, "o1", 1),
    ):
        write_run(tmp_path, version, run, moment)
    (tmp_path / empty).mkdir()
    (tmp_path / new / "_runs" / "n2" / "run.json").write_text("no JSON")
    os.utime(tmp_path / new / "_runs" / "n2" / "run.json", (5, 5))
    output = open_store(str(tmp_path))
    read: list[str] = []

    def counted(store: Store, name: str) -> dict[str, Any]:
        read.append(name)
        return read_json(store, name)

    monkeypatch.setattr(history, "read_json", counted)
    assert latest_records(output.at(new), 9, but="n3") == [{}, {"run_id": "n1"}]
    read.clear()
    versions = records_by_version(output, mine, 2)
    assert next(versions) == [{"run_id": "n3"}, {}]
    assert len(read) == 2, "the other version's are not read before they are asked for"
    assert list(versions) == [[{"run_id": "o2"}, {"run_id": "o1"}]]
