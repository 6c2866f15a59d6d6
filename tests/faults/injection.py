"""Faults inside worker processes: Ray calls `install` when each of them starts.

What to do stands in `spec.json` of the folder that `TEXTSWEEP_TEST_FAULTS` names, read at each call, so that one cluster serves
many tests; what was done is a line of `events.txt` beside it. Without a spec nothing is changed.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

VARIABLE = "TEXTSWEEP_TEST_FAULTS"


def spec() -> dict[str, Any]:
    """The faults of the test that is running."""
    path = Path(os.environ[VARIABLE], "spec.json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def happened(what: str) -> int:
    """Note that a fault happens now; returns how many have."""
    path = Path(os.environ[VARIABLE], "events.txt")
    with path.open("a") as events:
        events.write(f"{what} in {os.getpid()}\n")
    return len(path.read_text().splitlines())


def do(action: str) -> None:
    """Die, hang, raise, or wait until it is planted no more."""
    if action == "pause":
        while (spec().get("read") or {}).get("do") == "pause":
            time.sleep(0.1)
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        while True:
            time.sleep(3600)
    raise MemoryError("injected")


def holds(ids: Any, sequence: Sequence[int]) -> bool:
    """Whether token ids hold a sequence."""
    ids = np.asarray(ids)
    if len(ids) < len(sequence):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(sequence))
    return bool((windows == np.asarray(sequence)).all(axis=1).any())


def break_predictor(module: ModuleType) -> None:
    """A micro-batch with the poison tokens kills, hangs or raises."""
    forward = module.Predictor._launch

    def poisoned(self: Any, ids: Any, offsets: Any, type_ids: Any, rows: Any) -> Any:
        fault = spec().get("predict")
        if fault and any(holds(ids[offsets[row] : offsets[row + 1]], fault["tokens"]) for row in rows):
            happened(f"predict {fault['do']}")
            do(fault["do"])
        memory = spec().get("memory")
        if (
            memory
            and len(rows) > 1
            and len(rows) * max(offsets[row + 1] - offsets[row] for row in rows) > memory["most"]
        ):
            happened("memory")
            raise module.torch.OutOfMemoryError("injected")
        return forward(self, ids, offsets, type_ids, rows)

    module.Predictor._launch = poisoned


def break_reader(module: ModuleType) -> None:
    """Reading some shard kills its worker, always or the first few times."""
    read = module.read_chunks

    def poisoned(job: Any, chunks: Any, tokenizer: Any) -> Any:
        fault = spec().get("read", {"shard": "no such shard"})
        mine = chunks[0].shard == fault["shard"]
        if mine and happened(f"read {fault['do']}") <= fault.get("times", 10**9):
            do(fault["do"])
        return read(job, chunks, tokenizer)

    module.read_chunks = poisoned  # type: ignore[attr-defined]
    footer = module.read_footer

    def poisoned_footer(archive: Any, columns: Any, shard: str) -> Any:
        if shard == spec().get("footer"):
            happened("footer kill")
            do("kill")
        return footer(archive, columns, shard)

    module.read_footer = poisoned_footer  # type: ignore[attr-defined]


def break_store(module: ModuleType) -> None:
    """A worker dies right before or right after it has created the object of some shard."""
    create = module.Store.create

    def poisoned(self: Any, path: str, data: bytes) -> bool:
        fault = spec().get("write", {"shard": "no such shard", "when": "never", "times": 0})
        mine = fault["shard"] in path and "_dead_letter" not in path
        if mine and fault["when"] == "before" and happened("write before") <= fault["times"]:
            do("kill")
        created: bool = create(self, path, data)
        if mine and fault["when"] == "after" and happened("write after") <= fault["times"]:
            do("kill")
        return created

    module.Store.create = poisoned


def shorten_timeouts(module: ModuleType) -> None:
    """An S3 client does not wait a minute for an answer."""
    module.S3_OPTIONS["config_kwargs"]["read_timeout"] = spec().get("read_timeout", 60)


BREAKS: dict[str, Callable[[ModuleType], None]] = {
    "lib.predictor": break_predictor,
    "lib.blocks": break_reader,
    "lib.storage": break_store,
    "lib.s3": shorten_timeouts,
}


class Breaker(importlib.abc.MetaPathFinder):
    """Breaks a module right after it is imported: loading all of them in every worker would cost seconds each."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:  # noqa: ARG002 - given by Python
        if name not in BREAKS:
            return None
        sys.meta_path.remove(self)
        try:
            found = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert found is not None
        assert found.loader is not None
        run = found.loader.exec_module

        def run_and_break(module: ModuleType) -> None:
            run(module)
            BREAKS[name](module)

        found.loader.exec_module = run_and_break  # type: ignore[method-assign]
        return found


def install() -> None:
    """Called by Ray at the start of every worker process of a job that asks for it."""
    for name in BREAKS:
        if name in sys.modules:
            BREAKS[name](sys.modules[name])
    sys.meta_path.insert(0, Breaker())
