"""`jobs.compare` on real tiny models: the same model is accepted, another one is not, whatever order its labels stand in."""

import contextlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from transformers import AutoModelForSequenceClassification

from jobs import compare
from lib import checkpoint
from lib.errors import OverLimitError, UsageError
from tests import fakes
from tests.integration.test_equality import real_texts, score_singly


@pytest.fixture(scope="module")
def frozen(classifier: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A test set on which the champion is right, but for every tenth row."""
    texts = [text for text in real_texts(120) if text.strip()]
    model = checkpoint.load(classifier)
    best = score_singly(classifier, texts, model.card.max_length).argmax(axis=1)
    labels = [model.card.labels[(place + (row % 10 == 0)) % 3] for row, place in enumerate(best)]
    folder = str(tmp_path_factory.mktemp("frozen"))
    fakes.write_archive(folder, {"test.parquet": pa.table({"text": [*texts, None], "label": [*labels, "up"]})})
    return folder


def turned(classifier: str, folder: Path) -> str:
    """The same model with its labels in another order: the same answers."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    order = [2, 0, 1]
    model.classifier.weight.data = model.classifier.weight.data[order]
    model.classifier.bias.data = model.classifier.bias.data[order]
    names = [model.config.id2label[place] for place in order]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: at for at, name in enumerate(names)}
    model.save_pretrained(folder)
    for file in Path(classifier).iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def run(champion: str, challenger: str, frozen: str, *more: str) -> None:
    compare.main(["--champion", champion, "--challenger", challenger, "--set", f"test.path={frozen}", *more])


def test_equal_answers_are_accepted(
    classifier: str, frozen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = turned(classifier, tmp_path / "turned")
    run(classifier, other, frozen, "--json", str(tmp_path / "verdict.json"), "--set", "gate.metric=accuracy")
    shown = capsys.readouterr()
    assert "accepted: a loss of 0.20 points in accuracy is ruled out at 95% confidence" in shown.out
    assert "test: left out 1 rows (1 null text)" in shown.err
    record = json.loads((tmp_path / "verdict.json").read_text())
    assert (record["accepted"], record["difference"], record["low"], record["mcnemar_p"]) == (True, 0, 0, 1)
    assert record["champion"] == record["challenger"] == pytest.approx(0.9, abs=0.01)
    assert record["champion_digest"] != record["challenger_digest"]
    assert f" on {record['rows']} rows (digest {record['test_digest'][:12]}): champion" in shown.out


def test_a_verdict_says_which_rows_it_is_from(classifier: str, tmp_path: Path) -> None:
    """In whatever order and files they stand; a label more or less is another test set."""
    texts, labels = [f"row {number}" for number in range(6)], ["up", "down"] * 3
    rows = pa.table({"text": texts, "label": labels})
    sets = {
        "first": {"test.parquet": rows},
        "moved": {"a.parquet": rows.slice(3), "b.parquet": rows.slice(0, 3)},
        "mended": {"test.parquet": pa.table({"text": texts, "label": ["same", *labels[1:]]})},
    }
    digests = {}
    for name, files in sets.items():
        fakes.write_archive(str(tmp_path / name), files)
        with contextlib.suppress(OverLimitError):
            run(classifier, classifier, str(tmp_path / name), "--json", str(tmp_path / "verdict.json"))
        digests[name] = json.loads((tmp_path / "verdict.json").read_text())["test_digest"]
    assert digests["first"] == digests["moved"] != digests["mended"]
    asked = ("--test-digest", digests["first"][:12])
    with contextlib.suppress(OverLimitError):  # a verdict, whatever it is
        run(classifier, classifier, str(tmp_path / "moved"), *asked)
    with pytest.raises(UsageError, match=rf"digest of its rows is {digests['mended']}, expected {asked[1]} \(--test"):
        run(classifier, classifier, str(tmp_path / "mended"), *asked)
    with pytest.raises(SystemExit):
        run(classifier, classifier, str(tmp_path / "moved"), "--test-digest", "first")


def test_another_model_is_refused_with_exit_code_3(classifier: str, frozen: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path / "other", "bert", ("down", "same", "up"), seed=9)
    verdict = tmp_path / "verdict.json"
    with pytest.raises(OverLimitError, match=r"not accepted: the champion alone is right on .* it is worse") as caught:
        run(classifier, str(tmp_path / "other"), frozen, "--json", str(verdict))
    assert caught.value.exit_code == 3
    record = json.loads(verdict.read_text())
    assert (record["accepted"], record["metric"]) == (False, "macro_f1")
    assert record["high"] < 0


def test_what_cannot_be_compared_is_refused(classifier: str, frozen: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path / "other", "bert", ("down", "same", "over"))
    with pytest.raises(UsageError, match="only one of the two knows the labels over, up"):
        run(classifier, str(tmp_path / "other"), frozen)
    fakes.write_archive(str(tmp_path / "rows"), {"test.parquet": pa.table({"text": ["a"], "label": ["upp"]})})
    with pytest.raises(UsageError, match=r"label 'upp' is not in the labels of .*, did you mean 'up'"):
        run(classifier, classifier, str(tmp_path / "rows"))
