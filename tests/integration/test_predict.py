"""`jobs.predict`: texts from arguments, standard input or CSV; CSV out, the same scores as everywhere."""

import csv
import io
import re
import sys
from pathlib import Path

import lxml.html
import numpy as np
import pandas as pd
import pytest

from jobs import predict
from lib import checkpoint
from lib.errors import UsageError
from tests import fakes
from tests.integration.test_equality import real_texts, score_singly


def run_predict(model: str, *arguments: str) -> None:
    predict.main(["--set", f"model.path={model}", "--set", "model.precision=fp32", *arguments])


def test_texts_from_arguments(classifier: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = list(real_texts(5))
    run_predict(classifier, "--", *texts)
    found = pd.read_csv(io.StringIO(capsys.readouterr().out))
    model = checkpoint.load(classifier)
    expected = score_singly(classifier, texts, model.card.max_length)
    assert found["label"].tolist() == [model.card.labels[best] for best in expected.argmax(axis=1)]
    assert np.abs(found["score"] - expected.max(axis=1)).max() <= 1e-5


def test_texts_from_standard_input(
    classifier: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one line\nanother line\n"))
    run_predict(classifier)
    assert pd.read_csv(io.StringIO(capsys.readouterr().out))["text"].tolist() == ["one line", "another line"]


def test_a_csv_column_keeps_its_rows_and_the_other_columns(classifier: str, tmp_path: Path) -> None:
    pd.DataFrame({"id": ["7", "8", "9"], "body": ["good", "", "=1+1"], "note": ["@cmd", "-", "x"]}).to_csv(
        tmp_path / "in.csv", index=False
    )
    run_predict(
        classifier, "--csv", str(tmp_path / "in.csv"), "--column", "body", "--output", str(tmp_path / "out.csv")
    )
    found = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
    assert found["id"].tolist() == ["7", "8", "9"]
    assert found["error"].tolist() == ["", "empty", ""]
    assert found["label"].tolist()[1] == ""
    assert found["body"].tolist()[2] == "'=1+1", "a spreadsheet must not run it"
    assert found["note"].tolist() == ["'@cmd", "'-", "x"]


def test_no_cell_starts_a_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    labels = ("=EVIL()", "@same", "+up")
    fakes.make_classifier(tmp_path, "bert", labels)
    formulas = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "x\r=1", "＝1+1", "-", "-1-1"]
    numbers = ["-5", "+3.25", "-1e-3", "-.5", "7"]
    texts = formulas + numbers
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["=header", "body"], *([text, f"text {text}"] for text in texts)])
    output = tmp_path / "out.csv"
    run_predict(str(tmp_path), "--csv", str(tmp_path / "in.csv"), "--column", "body", "--output", str(output))
    with output.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["'=header", "body"]
    assert [row[0] for row in rows] == [
        *("'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\t=1", "'\n=1", "x\n=1", "'＝1+1", "'-", "'-1-1"),
        *numbers,
    ]
    assert {row[header.index("label")] for row in rows} <= {f"'{label}" for label in labels}
    for cell in [*header, *(cell for row in rows for cell in row)]:
        assert not cell.startswith(("=", "@", "\t", "\r", "\n")), cell
        assert cell[:1] not in ("+", "-") or float(cell) == float(cell), cell


def test_several_labels_are_one_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.make_classifier(tmp_path, "bert", ("joy", "anger", "fear"), "multi_label_classification")
    run_predict(str(tmp_path), "the harbour was quiet", "bread costs 3.20")
    found = pd.read_csv(io.StringIO(capsys.readouterr().out), keep_default_na=False)
    counts = [len(cell.split("; ")) if cell else 0 for cell in found["labels"]]
    assert counts == [len(str(cell).split("; ")) if str(cell) else 0 for cell in found["scores"]]
    assert sum(counts) > 0


def test_mistakes(classifier: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,body\n1,x\n")
    with pytest.raises(UsageError, match=r"no column 'bdy', did you mean 'body'\? \(there are: id, body\)"):
        run_predict(classifier, "--csv", str(tmp_path / "in.csv"), "--column", "bdy")
    with pytest.raises(UsageError, match="1 texts and --csv"):
        run_predict(classifier, "--csv", str(tmp_path / "in.csv"), "a text")
    with pytest.raises(UsageError, match=r"none\.csv: cannot be read"):
        run_predict(classifier, "--csv", str(tmp_path / "none.csv"))
    with pytest.raises(UsageError, match="there is no such model folder"):
        run_predict(str(tmp_path / "nothing"), "a text")


EXPLAINED = ("I love this camera! It never broke.", "", "Prices <b>rose</b> again & again.")


def test_explanations_come_in_place_of_the_csv(
    classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_predict(classifier, "--", *EXPLAINED)
    scored = capsys.readouterr().out
    files = {name: tmp_path / name for name in ("why.html", "scored.csv")}
    run_predict(
        classifier,
        "--explain",
        "--html",
        str(files["why.html"]),
        "--output",
        str(files["scored.csv"]),
        "--",
        *EXPLAINED,
    )
    said = capsys.readouterr().out
    assert files["scored.csv"].read_text() == scored
    table = pd.read_csv(io.StringIO(scored), keep_default_na=False)
    heads = re.findall(r"^text (\d): (.*?)(?:, score ([\d.]+);.*)?$", said, re.MULTILINE)
    assert [(number, label) for number, label, _ in heads] == [
        ("1", table["label"][0]),
        ("2", "no answer"),
        ("3", table["label"][2]),
    ]
    assert [float(heads[index][2]) for index in (0, 2)] == pytest.approx(
        [float(table["score"][index]) for index in (0, 2)], abs=1e-3
    )
    assert {line.split()[0] for line in said.splitlines() if line.startswith("  ")} >= {"camera", "love", "rose"}
    page = lxml.html.fromstring(files["why.html"].read_text())
    assert [one.text_content() for one in page.find_class("text")] == list(EXPLAINED)
    assert not page.xpath("//p[@class='text']//b") and len(page.xpath("//p[@class='text']//mark")) > 5

    run_predict(classifier, "--explain", EXPLAINED[0])
    assert capsys.readouterr().out.startswith("text 1: "), "no CSV"


def test_on_a_terminal_words_are_coloured(
    classifier: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    run_predict(classifier, "--explain", EXPLAINED[0])
    assert "\x1b[" in (shown := capsys.readouterr().out)
    assert EXPLAINED[0] in re.sub(r"\x1b\[[\d;]+m", "", shown)
    monkeypatch.setenv("NO_COLOR", "1")
    run_predict(classifier, "--explain", EXPLAINED[0])
    assert "\x1b[" not in capsys.readouterr().out


def test_pages_are_explanations_and_go_where_one_can_write(classifier: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--html x\.html: it is a page of explanations; add --explain"):
        run_predict(classifier, "--html", "x.html", "a text")
    with pytest.raises(UsageError, match=r"--html .*: cannot be written: .*"):
        run_predict(classifier, "--explain", "--html", str(tmp_path / "none" / "x.html"), "a text")
