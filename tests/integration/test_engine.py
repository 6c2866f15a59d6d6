"""Engines: which one scores, why another one does not, and that OpenVINO's scores stand in their rows' places."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lib import checkpoint
from lib.checkpoint import tokenizer_of
from lib.config import EngineChoice, PrecisionChoice, Trust
from lib.engine import EngineError, PackedEngine
from lib.errors import UsageError
from lib.model import FIRST_TOKEN_FAMILIES, leave_out_the_unread, load_classifier
from lib.packing import add_and_norm
from lib.predictor import Predictor
from tests import fakes
from tests.benchmarks.variants import variants
from tests.conftest import REPOSITORY
from tests.integration.test_equality import BOUNDS, ENGINES

LINES = [line for line in fakes.PROSE.splitlines() if line]


# the same scores


@pytest.fixture(scope="module")
def two_threads(classifier: str) -> Iterator[Predictor]:
    """A predictor whose micro-batches are small and end in any order."""
    predictor = Predictor(checkpoint.load(classifier), "fp32", "openvino", token_budget=64, threads=2)
    torch.set_num_threads(1)
    yield predictor


@pytest.fixture(scope="module")
def one_by_one(classifier: str) -> Predictor:
    return Predictor(checkpoint.load(classifier), "fp32", "torch", token_budget=1)


@given(lengths=st.lists(st.integers(0, fakes.MAX_TOKENS), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_every_row_gets_its_own_score_whatever_ends_first(
    lengths: list[int], seed: int, two_threads: Predictor, one_by_one: Predictor
) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(seed).integers(5, 300, offsets[-1]).astype(np.uint16)
    counted: list[tuple[int, int]] = []
    found = two_threads.probabilities(ids, offsets, on_batch=lambda *batch: counted.append(batch))
    expected = one_by_one.probabilities(ids, offsets)
    assert (np.isnan(found).all(axis=1) == (np.array(lengths) == 0)).all()
    assert np.nanmax(np.abs(found - expected), initial=0) <= BOUNDS["openvino", "fp32"][0]
    assert [sum(column) for column in zip((0, 0), *counted, strict=True)] == [np.count_nonzero(lengths), sum(lengths)]


def logits_singly(folder: Path, texts: Sequence[str], seconds: Sequence[str] | None = None) -> torch.Tensor:
    """The oracle: plain transformers in fp32, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [(text,) for text in texts] if seconds is None else list(zip(texts, seconds, strict=True))
    options = {"truncation": True, "max_length": fakes.MAX_TOKENS, "return_tensors": "pt"}
    with torch.inference_mode():
        return torch.cat([model(**tokenizer(*row, **options)).logits for row in rows])


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_pairs_of_texts(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, ("down", "same", "up"))
    model = checkpoint.load(str(tmp_path))
    tokens = tokenizer_of(model).encode(LINES, LINES[::-1])
    expected = logits_singly(tmp_path, LINES, LINES[::-1]).softmax(-1).numpy()
    for engine in ENGINES:
        predictor = Predictor(model, "fp32", engine)
        found = predictor.probabilities(tokens.ids, tokens.offsets, tokens.type_ids)
        assert np.abs(found - expected).max() <= BOUNDS[engine, "fp32"][0]
        if family in ("bert", "electra"):  # those whose tokenizers and weights know segments
            without = predictor.probabilities(tokens.ids, tokens.offsets)
            assert np.abs(without - expected).max() > 1e-3, "segments must make a difference"


@pytest.mark.parametrize("engine", ENGINES)
def test_several_labels_and_numbers(engine: EngineChoice, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path / "multi", "bert", ("joy", "anger", "fear"), "multi_label_classification")
    fakes.make_classifier(tmp_path / "number", "distilbert", ("stars",))
    for name in ("multi", "number"):
        model = checkpoint.load(str(tmp_path / name))
        tokens = tokenizer_of(model).encode(LINES)
        logits = logits_singly(tmp_path / name, LINES)
        expected = (logits.sigmoid() if name == "multi" else logits).numpy()
        found = Predictor(model, "fp32", engine).probabilities(tokens.ids, tokens.offsets)
        assert np.abs(found - expected).max() <= BOUNDS[engine, "fp32"][0]


PACKED = sorted(FIRST_TOKEN_FAMILIES & set(fakes.FAMILIES))


def packed_engine(folder: Path) -> PackedEngine:
    """As on a GPU, but for its kernels."""
    model = load_classifier(str(folder))
    leave_out_the_unread(model)
    return PackedEngine(model, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_score_as_if_each_were_alone(family: str, pairs: bool, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, ("down", "same", "up"))
    model = checkpoint.load(str(tmp_path))
    texts = [line[: 2 + 6 * index] for index, line in enumerate(LINES)]
    seconds = [*texts[1:], texts[0]] if pairs else None
    tokens = tokenizer_of(model).encode(texts, seconds)
    predictor = Predictor(model, "fp32", "torch", token_budget=2_000)
    predictor.engine, computed_for_nothing = packed_engine(tmp_path), predictor.padding
    found = predictor.probabilities(tokens.ids, tokens.offsets, tokens.type_ids)
    assert predictor.padding == computed_for_nothing
    expected = logits_singly(tmp_path, texts, seconds).softmax(-1).numpy()
    assert len(set(tokens.lengths)) > 3, "rows of different lengths must meet"
    assert np.abs(found - expected).max() <= 1e-6


@pytest.mark.parametrize("family", sorted(set(fakes.FAMILIES) - FIRST_TOKEN_FAMILIES))
def test_other_families_are_not_packed(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, ("down", "same", "up"))
    with pytest.raises(EngineError, match=f"rows of {family} models are not packed"):
        packed_engine(tmp_path)


@pytest.mark.parametrize("compiles", [True, False])
def test_packed_norms_are_compiled_where_that_is_possible(
    compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, by the compiler for processors, or without the C compiler that both need."""
    fakes.make_classifier(tmp_path, "bert", ("down", "same", "up"))
    tokens = tokenizer_of(loaded := checkpoint.load(str(tmp_path))).encode(LINES)
    predictor = Predictor(loaded, "fp32", "torch", token_budget=100)
    predictor.engine = engine = packed_engine(tmp_path)
    expected = predictor.probabilities(tokens.ids, tokens.offsets)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    with torch._inductor.config.patch({} if compiles else {"cpp.cxx": ("no-such-compiler",)}):
        engine._compile()
    layers: Any = engine.model.layers
    assert all((layer.norm is not add_and_norm) == compiles for layer in layers)
    said = capfd.readouterr().err
    assert said.startswith("WARNING: PyTorch cannot compile") == (not compiles), said
    assert "a C compiler (apt-get install gcc)" in said or compiles
    found = predictor.probabilities(tokens.ids, tokens.offsets)
    assert np.abs(found - expected).max() <= 1e-6
    if compiles:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 1, "one kernel for every number of tokens"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in PACKED for name in ("graphs", "fp8")),
        ("bert", "plain norms"),
        ("bert", "compiled layers"),
    ],
)
def test_what_could_be_faster_on_gpus_scores_the_same(family: str, name: str, tmp_path: Path) -> None:
    """Packs of one size, and matrix products in FP8: a benchmark's, not an engine's."""
    fakes.make_classifier(tmp_path, family, ("down", "same", "up"))
    texts = [line[: 2 + 6 * index] for index, line in enumerate(LINES)]
    tokens = tokenizer_of(loaded := checkpoint.load(str(tmp_path))).encode(texts)
    predictor = Predictor(loaded, "fp32", "torch", token_budget=int(tokens.lengths.sum() // 2))
    model = load_classifier(str(tmp_path))
    leave_out_the_unread(model)
    predictor.engine = variants(model, torch.device("cpu"), torch.float32, predictor.token_budget)[name]
    packs: list[int] = []
    found = predictor.probabilities(tokens.ids, tokens.offsets, on_batch=lambda rows, _: packs.append(rows))
    assert len(packs) > 1 and len(set(packs)) > 1, "packs must hold different numbers of rows"
    difference = np.abs(found - logits_singly(tmp_path, texts).softmax(-1).numpy()).max()
    least, most = (1e-6, 5e-2) if "fp8" in name else (0, 1e-6)
    assert least <= difference <= most


# which engine


OWN_CODE = """
import torch
from transformers import BertConfig, BertForSequenceClassification

class OwnConfig(BertConfig):
    model_type = "own"

class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        found = super().forward(input_ids, attention_mask, token_type_ids)
        {extra}
        return found
"""

EXTRAS = {
    "cannot convert": 'torch.jit.is_tracing() and [][attention_mask.sum() and "never with a trace"]',
    "cannot compute": "found.logits *= torch.tensor([[1 + 1 / n] for n in attention_mask.sum(1).tolist()])",
    "away from plain": "found.logits *= 0.5 if torch.jit.is_tracing() else 1.0",
}
"""What OpenVINO says, and a line of a model's code, right in PyTorch, that makes it say so: a trace fixes Python's numbers."""


@pytest.mark.parametrize("says", EXTRAS)
def test_a_model_that_openvino_gets_wrong_is_scored_by_torch(
    says: str, classifier: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(classifier, tmp_path / f"own_{len(says)}"))
    (folder / "own_modeling.py").write_text(OWN_CODE.format(extra=EXTRAS[says]), encoding="utf-8")
    names = {"AutoConfig": "OwnConfig", "AutoModelForSequenceClassification": "OwnForSequenceClassification"}
    for file, changes in {
        "config.json": {
            "model_type": "own",
            "architectures": ["OwnForSequenceClassification"],
            "auto_map": {auto: f"own_modeling.{name}" for auto, name in names.items()},
        },
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"},
    }.items():
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    model = checkpoint.load(str(folder), trust=Trust(code=True))
    tokens = tokenizer_of(model).encode(LINES)
    predictor = Predictor(model, "fp32")
    assert predictor.engine.name == "torch"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert "going on with torch" in said[0]
    expected = Predictor(model, "fp32", "torch").probabilities(tokens.ids, tokens.offsets)
    assert np.array_equal(predictor.probabilities(tokens.ids, tokens.offsets), expected)
    with pytest.raises(UsageError, match=f"{says}.*torch"):
        Predictor(model, "fp32", "openvino")


@pytest.mark.parametrize(
    ("has_amx", "precision", "tokens"), [(True, "bf16", 2_048), (True, "fp32", 512), (False, "bf16", 512)]
)
def test_micro_batches_are_larger_where_there_is_amx(
    has_amx: bool, precision: PrecisionChoice, tokens: int, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert Predictor(checkpoint.load(classifier), precision, "openvino").token_budget == tokens


def test_openvino_beside_a_gpu_is_refused(classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"model\.engine = openvino computes on processors.*GPU.*auto or torch"):
        Predictor(checkpoint.load(classifier), "fp32", "openvino")


PREDICT = "import sys; from jobs import predict; from lib.errors import run_job; code = run_job(predict.main); "


def run_python(code: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own, with an empty home."""
    home.mkdir()
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("engine", ["auto", "openvino"])
def test_without_openvino_auto_is_torch_and_openvino_is_a_mistake(engine: str, classifier: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['openvino'] = None; {PREDICT} sys.exit(code)"
    options = ("--set", f"model.path={classifier}", "--set", "model.precision=fp32", "--set", f"model.engine={engine}")
    done = run_python(code, tmp_path / "home", *options, LINES[0], LINES[1])
    said = done.stderr.strip().splitlines()[-1]
    assert "openvino cannot be imported" in said
    assert "pip install openvino" in said
    if engine == "openvino":
        assert done.returncode == 2
        assert "model.engine = openvino" in said
        return
    assert done.returncode == 0, done.stderr
    assert said.endswith("going on with torch")
    table = pd.read_csv(io.StringIO(done.stdout))  # the line does not stand in it
    expected = logits_singly(Path(classifier), LINES[:2]).softmax(-1).max(-1).values.numpy()
    assert np.abs(table["score"] - expected).max() <= 1e-5


def test_openvino_reports_its_use_to_nobody(classifier: str, tmp_path: Path) -> None:
    """Its conversion tools send an event to Google Analytics when they are imported, and keep an id in the home folder."""
    code = f"{PREDICT} assert 'openvino' in sys.modules; assert 'openvino_telemetry' not in sys.modules; sys.exit(code)"
    home = tmp_path / "home"
    done = run_python(code, home, "--set", f"model.path={classifier}", "--set", "model.engine=openvino", LINES[0])
    assert done.returncode == 0, done.stderr
    assert not (home / "intel").exists()
