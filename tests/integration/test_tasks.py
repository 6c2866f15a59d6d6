"""Several labelled sets, one encoder, a head each: from training on a real Ray to the columns of an archive, against plain transformers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from markdown_it import MarkdownIt
from sklearn.metrics import confusion_matrix, f1_score

from jobs import predict
from lib import checkpoint
from lib.config import validate
from lib.errors import UsageError
from lib.runtime import cluster_facts
from lib.schema import Task
from lib.storage import open_store
from lib.train_config import TrainConfig
from lib.training import train
from tests import fakes
from tests.integration.test_scoring import read_predictions, run_score
from tests.integration.test_training import score_plainly, weights_of
from tests.labelled import LABELS, difference, make_rows

pytestmark = pytest.mark.usefixtures("ray_session")

LONG, SHORT = "long", "short"


def flags_of(text: str) -> list[str]:
    """Labels of the second task: what can be counted in a text."""
    words = text.split()
    return [LONG if len(words) > 16 else SHORT, *(["a_the"] if "the" in words else [])]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tone of 61 texts, with rows for validation and test; the flags of 40, without."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, count, seed in (("tone", 61, 1), ("valid", 20, 2), ("test", 31, 3), ("flags", 40, 4)):
        texts, labels = make_rows(count, seed)
        label: list[Any] = [flags_of(text) for text in texts] if name == "flags" else list(labels)
        fakes.write_archive(str(folder), {f"{name}.parquet": pa.table({"words": texts, "label": label})})
    fakes.make_encoder(folder / "base", "bert")
    columns = {"text_column": "words"}
    return {
        "tasks": {
            "tone": {
                "path": f"{folder}/tone.parquet",
                "valid": f"{folder}/valid.parquet",
                "test": f"{folder}/test.parquet",
                **columns,
            },
            "flags": {"path": f"{folder}/flags.parquet", **columns},
        },
        "valid": {"fraction": 0.25},
        "model": {"base": str(folder / "base"), "precision": "fp32", "dropout": 0.0},
        "optim": {"batch_size": 16, "epochs": 2, "learning_rate": 5e-4},
        "sampling": {"temperature": 2.0},
        "decision": {"temperature": True},
        "stopping": {"keep": "last"},
    }


def run(settings: dict[str, Any], output: Path | str, **changes: Any) -> dict[str, Any]:
    values = settings | {"output": {"path": str(output), "report_text": True}} | changes
    return train(validate(TrainConfig, values), "night", cluster_facts())


@pytest.fixture(scope="module")
def trained(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("trained") / "model")
    return folder, run(settings, folder)


def test_each_head_is_measured_on_its_own_rows(trained: tuple[str, dict[str, Any]]) -> None:
    folder, found = trained
    assert found["rows"] == {"train": 61 + 30, "valid": 20 + 10, "test": 31}
    tone, flags = found["tasks"]["tone"], found["tasks"]["flags"]
    assert (tone["labels"], flags["labels"], flags["test"]) == (list(LABELS), ["a_the", LONG, SHORT], None)
    texts, labels = make_rows(31, 3)
    answers = score_plainly(folder, texts)[:, :3].argmax(1)
    truth = [LABELS.index(label) for label in labels]
    assert tone["test"]["confusion"] == confusion_matrix(truth, answers, labels=[0, 1, 2]).tolist()
    texts, labels = make_rows(20, 2)
    answers, truth = score_plainly(folder, texts)[:, :3].argmax(1), [LABELS.index(label) for label in labels]
    expected = f1_score(truth, answers, labels=[0, 1, 2], average="macro", zero_division=0)
    last = found["history"][-1]
    assert last["tone_macro_f1"] == pytest.approx(expected)
    assert last["macro_f1"] == pytest.approx((expected + last["flags_macro_f1"]) / 2)
    assert flags["valid"]["rows"] == 10
    assert tone["temperature"] != flags["temperature"]


def test_rows_that_another_task_is_tested_on_are_not_learned_from(settings: dict[str, Any], tmp_path: Path) -> None:
    texts, _ = make_rows(31, 3)  # those that the tone is tested on
    new, _ = make_rows(20, 5)
    label = [flags_of(text) for text in [*texts[:4], *new]]
    fakes.write_archive(str(tmp_path), {"flags.parquet": pa.table({"words": [*texts[:4], *new], "label": label})})
    fakes.write_archive(str(tmp_path), {"valid.parquet": pa.table({"words": new[:5], "label": label[4:9]})})
    flags = {"path": f"{tmp_path}/flags.parquet", "valid": f"{tmp_path}/valid.parquet", "text_column": "words"}
    tasks = settings["tasks"] | {"flags": flags}
    found = run(settings, tmp_path / "model", tasks=tasks, data={"duplicates": "drop"}, optim={"epochs": 1})
    tone, flags = found["tasks"]["tone"], found["tasks"]["flags"]
    assert tone["known_from_tasks"] == {"flags": {"valid": 0, "test": 4}}
    assert flags["known_from_tasks"] == {"tone": {"valid": 0}}
    assert flags["known_from_training"] == {"valid": 5}
    assert flags["rows"]["train"] == 20 - 5, "without those of its own validation and those of the other's test"
    page = (open_store(str(tmp_path / "model")).read("report.html") or b"").decode()
    assert "4 test rows are known from the training rows of the task flags" in page


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_learn_what_one_learns(
    strategy: str, trained: tuple[str, dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    found = run(settings, tmp_path / "two", resources={"num_workers": 2, "strategy": strategy})
    assert difference(weights_of(trained[0]), weights_of(str(tmp_path / "two"))) < 1e-5
    for left, right in zip(trained[1]["history"], found["history"], strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-4)


def test_one_pass_over_an_archive_gives_all_heads_columns(
    trained: tuple[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = trained
    texts, _ = make_rows(30, 9)
    fakes.write_archive(str(tmp_path / "archive"), {"one.parquet": pa.table({"text": [None, *texts]})})
    run_score(
        str(tmp_path / "archive"),
        folder,
        str(tmp_path / "scores"),
        "limits.max_bad_rows=1",
        "output.probabilities=true",
    )
    found = read_predictions(str(tmp_path / "scores")).to_pandas()
    assert found.columns.tolist()[2:] == [
        "tone_label", "tone_score", "tone_probabilities", "flags_labels", "flags_scores", "flags_probabilities", "num_tokens", "truncated", "error",
    ]  # fmt: skip
    assert found.iloc[0][["tone_label", "tone_score", "flags_labels"]].isna().all()
    logits = score_plainly(folder, texts)
    tone = (logits[:, :3] / metrics["tasks"]["tone"]["temperature"]).softmax(-1).numpy()
    flags = (logits[:, 3:] / metrics["tasks"]["flags"]["temperature"]).sigmoid().numpy()
    assert np.abs(np.stack(found["tone_probabilities"][1:].to_list()) - tone).max() < 1e-4
    assert np.abs(np.stack(found["flags_probabilities"][1:].to_list()) - flags).max() < 1e-4
    assert found["tone_label"][1:].tolist() == [LABELS[best] for best in tone.argmax(1)]
    names = ("a_the", LONG, SHORT)
    assert [list(row) for row in found["flags_labels"][1:]] == [
        [name for name, one in zip(names, row, strict=True) if one >= 0.5] for row in flags
    ]
    page = next((tmp_path / "scores").glob("*/_runs/run/report.html")).read_text()
    assert "Labels of tone" in page and "Labels of flags" in page

    capsys.readouterr()
    predict.main(["--set", f"model.path={folder}", "--set", "model.precision=fp32", texts[0]])
    shown = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert shown["tone_label"].tolist() == [LABELS[tone[0].argmax()]]
    assert shown["tone_score"][0] == pytest.approx(tone[0].max(), abs=1e-4)

    predict.main(["--set", f"model.path={folder}", "--set", "model.precision=fp32", "--explain", texts[0]])
    explained = capsys.readouterr().out
    assert f"text 1: tone/{LABELS[tone[0].argmax()]}, score {tone[0].max():.3f}; log-odds" in explained
    surest = flags[0].argmax()
    assert f"text 1: flags/{names[surest]}, score {flags[0][surest]:.3f}; log-odds" in explained


def test_the_checkpoint_says_what_its_heads_answer(trained: tuple[str, dict[str, Any]]) -> None:
    folder, found = trained
    loaded = checkpoint.load(folder)
    assert loaded.card.task is Task.SEVERAL
    assert [(head.name, head.task) for head in loaded.card.heads] == [
        ("tone", Task.MULTI_CLASS),
        ("flags", Task.MULTI_LABEL),
    ]
    assert (
        loaded.facts.labels
        == loaded.card.labels
        == ("tone/bad", "tone/fair", "tone/good", "flags/a_the", "flags/long", "flags/short")
    )
    page = (open_store(folder).read("report.html") or b"").decode()
    for expected in (
        "Head tone",
        "Head flags",
        f"{found['tasks']['tone']['test']['macro_f1']:.4f}",
        f"{found['tasks']['flags']['valid']['macro_f1']:.4f}",
    ):
        assert expected in page
    assert "<mark class=" in page and all(one["unexplained"] is None for one in found["tasks"].values())
    assert page.count("<html") == page.count("</html>") == page.count("<body>") == 1
    card = (open_store(folder).read("README.md") or b"").decode()
    titles = [
        one.content
        for one in MarkdownIt().parse(card.partition("---\n")[2].partition("---\n")[2])
        if one.type == "inline"
    ]
    assert titles[0] == "Head `tone`" and "Head `flags`" in titles and card.count("library_name") == 1


def test_heads_learn_what_they_are_given(settings: dict[str, Any], tmp_path: Path) -> None:
    found = run(
        settings,
        tmp_path / "model",
        optim={"batch_size": 8, "epochs": 12, "learning_rate": 2e-3},
        tasks={name: one | {"test": one["path"]} for name, one in settings["tasks"].items()},
    )
    assert found["tasks"]["tone"]["test"]["macro_f1"] > 0.9
    assert found["tasks"]["flags"]["test"]["micro_f1"] > 0.85


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"label_noise": True}}, r"task 'flags': data\.label_noise looks at rows with one label each"),
        ({"decision": {"abstain": 0.9}}, r"task 'flags': decision\.abstain"),
        ({"valid": {"fraction": 0.0}, "decision": {}}, r"valid\.fraction = 0 with tasks \(tone, flags\)"),
        ({"stopping": {"metric": "pearson"}}, r"stopping\.metric = pearson: this data is multi-class"),
        ({"loss": {"class_weights": "balanced"}}, r"task 'flags': loss\.class_weights"),
        ({"tasks": {"a": {"path": "/none"}, "b": {"path": "/none"}}}, r"task 'a': .*/none"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_task_is_refused_with_its_name(
    changes: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run(settings, tmp_path / "none", **changes)
    assert not (tmp_path / "none" / "_train").exists()
