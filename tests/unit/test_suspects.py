"""What the death of a process that tries rows alone is taken for. That rows are found which kill it: `tests/faults/test_poison.py`."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import RayActorError

from lib.errors import IncompleteError
from lib.suspects import LOST_NODES, Bench

NODE_LOST = "The actor died because its node has died. Node Id: 1f"
KILLED = "Worker unexpectedly exits with a connection error code 2. End of file."


@pytest.mark.parametrize(
    ("deaths", "survives"),
    [
        ([], True),
        ([KILLED], False),
        ([NODE_LOST], True),
        ([NODE_LOST, KILLED], False),
        ([NODE_LOST] * (LOST_NODES - 1), True),
        ([NODE_LOST] * LOST_NODES, None),
    ],
    ids=["none", "killed", "a node", "a node, then killed", "all but too many nodes", "too many nodes"],
)
def test_a_process_that_goes_with_its_node_is_no_proof(
    deaths: list[str], survives: bool | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = list(deaths)

    class Worker:
        """A process that dies as often as it was told."""

        @property
        def score(self) -> Any:
            return SimpleNamespace(remote=lambda: ray.ObjectRef.nil())

    def wait(_bench: Bench, _reference: object) -> str:
        if left:
            raise RayActorError("0" * 32, left.pop(0))
        return "done"

    monkeypatch.setattr("lib.suspects.end_actors", lambda _progress: None)
    monkeypatch.setattr(Bench, "start", lambda _bench: Worker())
    monkeypatch.setattr(Bench, "wait", wait)
    bench = Bench(cast(Any, SimpleNamespace(progress=None)))
    if survives is None:
        with pytest.raises(
            IncompleteError, match=f"{LOST_NODES} processes in a row were lost with their nodes; .* run the same"
        ):
            bench.survives("score")
    else:
        assert bench.survives("score") == survives
    assert not left
    assert capsys.readouterr().err.count("a node was lost") == deaths.count(NODE_LOST)
