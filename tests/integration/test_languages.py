"""Any script, from labelled Parquet to predictions: names of columns, labels and files included. XLM-RoBERTa's and mDeBERTa's shapes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jobs import predict, score
from jobs.train import main as train
from lib import checkpoint
from tests import fakes
from tests.integration.test_scoring import read_predictions

SCRIPTS = {
    "latin": ("cuốn sách này được viết", "tuyệt vời", "tồi tệ"),
    "cyrillic": ("эта книга была очень", "хорошая", "плохая"),
    "greek": ("το βιβλίο αυτό ήταν πολύ", "καλό", "κακό"),
    "arabic": ("كان هذا الكتاب", "رائعا", "سيئا"),
    "hebrew": ("הספר הזה היה", "נפלא", "גרוע"),
    "devanagari": ("यह किताब बहुत", "अच्छी", "बुरी"),
    "thai": ("หนังสือเล่มนี้", "ดีมาก", "แย่มาก"),
    "han": ("这本书写得", "非常好", "非常差"),
    "kana": ("この本はとても", "すばらしい", "ひどい"),
    "hangul": ("이 책은 정말", "훌륭하다", "끔찍하다"),
}
"""What is said of a book, and two words that end it."""

LABELS = ("добро", "悪い")


def make_rows(count: int, seed: int) -> pd.DataFrame:
    """Sentences of chance in all scripts, some of two, with the label that the last word gives away."""
    chance = np.random.default_rng(seed)
    names = list(SCRIPTS)
    rows = []
    for number in range(count):
        place, label = number % len(names), int(chance.integers(2))
        beginning, *words = SCRIPTS[names[place]]
        other = SCRIPTS[names[int(chance.integers(len(names)))]][0]
        text = f"{other}, {beginning} {words[label]}" if chance.random() < 0.3 else f"{beginning} {words[label]}"
        rows.append({"キー": f"№{number}", "текст": text, "תווית": LABELS[label], "script": names[place]})
    return pd.DataFrame(rows)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("family", ["xlm-roberta", "deberta-v2"])
def test_ten_scripts_are_learned_and_scored_like_any_other(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = "\n".join(" ".join(parts) for parts in SCRIPTS.values())
    monkeypatch.setattr(fakes, "PROSE", f"{corpus}\n{corpus}, .")
    fakes.make_encoder(tmp_path / "основа", family)
    learned, unseen = make_rows(400, 1), make_rows(100, 2)
    fakes.write_archive(str(tmp_path / "訓練"), {"عينة.parquet": pa.Table.from_pandas(learned)})
    shards = {"απρίλιος/один 1.parquet": unseen[:60], "मई.parquet": unseen[60:]}
    fakes.write_archive(str(tmp_path / "書庫"), {name: pa.Table.from_pandas(part) for name, part in shards.items()})
    settings: dict[str, Any] = {
        "train.path": tmp_path / "訓練",
        "train.text_column": "текст",
        "train.label_column": "תווית",
        "model.base": tmp_path / "основа",
        "model.precision": "fp32",
        "model.dropout": 0.0,
        "optim.learning_rate": 3e-3,
        "optim.epochs": 6,
        "output.path": tmp_path / "模型",
    }
    train([word for key, value in settings.items() for word in ("--set", f"{key}={value}")])
    settings = {
        "input.path": tmp_path / "書庫",
        "input.text_column": "текст",
        "input.key_columns": '["キー"]',
        "model.path": tmp_path / "模型",
        "model.precision": "fp32",
        "output.path": tmp_path / "результат",
        "output.probabilities": "true",
    }
    score.main([word for key, value in settings.items() for word in ("--set", f"{key}={value}")])
    found = read_predictions(str(tmp_path / "результат")).to_pandas().set_index("キー").loc[unseen["キー"]]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "模型")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "模型").eval()
    assert checkpoint.load(str(tmp_path / "模型")).facts.labels == LABELS
    for text, given, probabilities in zip(unseen["текст"], found["label"], found["probabilities"], strict=True):
        ids = tokenizer(text, return_tensors="pt")
        assert tokenizer.unk_token_id not in ids["input_ids"], "the vocabulary knows all scripts"
        with torch.inference_mode():
            expected = model(**ids).logits[0].softmax(-1)
        assert probabilities == pytest.approx(expected.numpy(), abs=1e-4)
        assert given == LABELS[int(expected.argmax())]
    right = pd.Series(found["label"].to_numpy() == unseen["תווית"].to_numpy()).groupby(unseen["script"]).mean()
    assert len(right) == 10 and right.mean() > 0.9, right

    capsys.readouterr()
    predict.main(["--set", f"model.path={tmp_path / '模型'}", *unseen["текст"][:10]])
    few = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert few["text"].tolist() == unseen["текст"][:10].tolist()
    assert few["label"].tolist() == found["label"][:10].tolist()
    report = (tmp_path / "模型" / "report.html").read_text(encoding="utf-8")
    assert all(f">{label}</text>" in report for label in LABELS), "plots have letters, not the shapes of one font"
