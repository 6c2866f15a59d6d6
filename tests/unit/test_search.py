"""What a search says before its trials run, and makes of what came out of them."""

from pathlib import Path
from typing import Any

import pytest

from lib.config import validate
from lib.errors import UsageError
from lib.runtime import Cluster, Node
from lib.search import place_trials, search
from lib.space import SearchConfig

TWO_NODES = Cluster((Node(cpus=2, gpus=0), Node(cpus=2, gpus=0)))


def configure(output: str = "o", **search_keys: Any) -> SearchConfig:
    values = {"train": {"path": "t"}, "model": {"base": "b"}, "output": {"path": output}, "search": search_keys}
    return validate(SearchConfig, values)


def test_a_local_folder_that_several_nodes_must_see_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(*_: Any) -> None:
        raise UsageError("taken")

    monkeypatch.setattr("lib.search.check_trials", lambda *_: ({}, []))
    monkeypatch.setattr("lib.search.claim", taken)
    with pytest.raises(UsageError, match="taken"):
        search(configure(str(tmp_path)), "night-1", TWO_NODES)
    said = f"output.path {tmp_path} is a local path: all 2 nodes must see it there"
    assert said in capsys.readouterr().out


def test_more_trials_at_a_time_than_fit_are_refused_by_the_number_that_was_given() -> None:
    """Which may be more than there are trials."""
    with pytest.raises(
        UsageError, match=r"search\.concurrent = 9 with a CPU for each trial, the cluster has 2 nodes, 4 CP"
    ):
        place_trials(configure(concurrent=9, trials=8), TWO_NODES)
    assert place_trials(configure(concurrent=9, trials=4), TWO_NODES) == (False, 1, 4)
