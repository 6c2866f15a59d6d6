"""The benchmarks run, at a small size, and check the answers of what they time."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lib.checkpoint import fetch
from lib.tokenization import load_tokenizer
from tests.benchmarks import ladder, material, peers
from tests.benchmarks.variants import Graphs, variants


class Broken(Graphs):
    """As one whose kernels are not there."""

    def stage(self, *_: object) -> Any:
        raise RuntimeError("no kernel for this")


def test_the_ladder_climbs_from_limit_to_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "--models",
        "MiniLM-L6",
        "--regimes",
        "messages",
        "--repeats",
        "1",
        "--seconds",
        "0.1",
        "--no-jobs",
        "--variants",
        "--json",
    ]
    torch.set_num_threads(1)  # beside another busy process two wait for each other: ten times as slow
    monkeypatch.setattr(ladder, "PROBE_TOKENS", 500)
    monkeypatch.setattr(ladder, "variants", lambda *words: variants(*words) | {"broken": Broken(*words)})
    monkeypatch.setattr(sys, "argv", ["ladder", *words, str(tmp_path / "found.json")])
    ladder.main()
    found = json.loads((tmp_path / "found.json").read_text())
    (one,) = found["ladder"]
    assert list(one["rungs"]) == ["limit", "forward", "+ batches", "+ tokens", "+ Parquet"]
    assert all(rung["tokens_per_second"] > 0 for rung in one["rungs"].values())
    assert one["mean_tokens"] == pytest.approx(material.REGIMES["messages"].mean_tokens, rel=0.25)
    assert one["labels_equal"] >= 0.95
    assert set(found["engines"]["MiniLM-L6"]) == {
        *(f"{engine} {dtype}" for engine in ("torch", "openvino") for dtype in ("fp32", "bf16")),
        "openvino int8",
    }
    for name, engine in found["engines"]["MiniLM-L6"].items():
        assert engine["largest_difference"] <= (1e-4 if "fp32" in name else 2e-2)
    assert set(found["variants"]["MiniLM-L6"]) == {"packed", "plain norms", "compiled layers", "graphs"}
    assert found["failed_variants"]["MiniLM-L6"] == {"broken": "RuntimeError: no kernel for this"}
    assert all(variant["largest_difference"] <= 1e-4 for variant in found["variants"]["MiniLM-L6"].values())


@pytest.mark.parametrize("name", material.REGIMES)
def test_texts_have_the_mean_length_that_is_asked_for(name: str) -> None:
    texts = material.make_texts(500, material.REGIMES[name])
    tokens = load_tokenizer(fetch(material.ENCODER), material.MAX_LENGTH).encode(texts)
    assert tokens.lengths.mean() == pytest.approx(material.REGIMES[name].mean_tokens, rel=0.03)
    assert texts == material.make_texts(500, material.REGIMES[name])


def test_a_peer_with_other_answers_is_seen() -> None:
    expected = pd.DataFrame({"label": ["a", "b", "c", "a"], "score": np.array([0.5, 0.6, 0.7, 0.8])})
    found = expected.assign(label=["a", "b", "a", "a"], score=[0.5, 0.65, 0.7, 0.8])
    assert peers.compare(found, expected) == {"labels_equal": 0.75, "largest_difference": pytest.approx(0.05)}


def test_the_forward_passes_alone_answer_as_the_pipeline_and_are_timed_without_what_is_around_them(
    classifier: str, tmp_path: Path
) -> None:
    material.make_archive(tmp_path / "archive", [f"message {row}" + " again" * (row % 7) for row in range(24)], 2)
    found = {}
    for name, run in {"alone": peers.forward_alone, "pipeline": peers.transformers_pipeline("float32", 1)}.items():
        peers.make(tmp_path / name)
        began = time.monotonic()
        run(str(tmp_path / "archive"), Path(classifier), tmp_path / name)
        found[name] = (time.monotonic() - began, peers.answers_of(tmp_path / name))
    assert peers.compare(found["alone"][1], found["pipeline"][1])["largest_difference"] < 2e-2
    assert 0 < float((tmp_path / "alone" / peers.OWN_SECONDS).read_text()) < found["alone"][0] / 2


def test_a_system_that_took_no_longer_for_more_texts_has_no_rate(
    classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([2.0, 1.9])

    def timed(name: str, archive: str, model: Path, output: Path) -> float:
        peers.SYSTEMS[name].run(archive, model, peers.make(output))
        return next(seconds)

    monkeypatch.setattr(peers, "timed", timed)
    texts = [f"message {row}" for row in range(64)]
    found = peers.measure(["pipeline, default"], texts, 1, Path(classifier), tmp_path)
    assert found["systems"] == {}
    assert "took no longer ([(2.0, 1.9)] s)" in found["failed"]["pipeline, default"]
    peers.show(found)
    assert capsys.readouterr().out.startswith("64 texts")


@pytest.mark.parametrize(
    ("device", "absent"), [("cuda", "OpenVINO, bf16, 8 rows"), ("cpu", "pipeline, bf16, batch 256")]
)
def test_a_system_that_is_not_for_this_hardware_is_refused_by_name(
    device: str, absent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "device", lambda: device)
    monkeypatch.setattr(sys, "argv", ["peers", "--only", absent])
    with pytest.raises(SystemExit):
        peers.main()
    assert f"invalid choice: '{absent}'" in capsys.readouterr().err
    assert {"pipeline, default", "Textsweep, forward alone"} < set(peers.parts_here())
