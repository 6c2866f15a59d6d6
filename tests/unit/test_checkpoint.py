"""Checkpoints: what was committed is what is loaded, and a version changes with what decides a score, with nothing else."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from lib import checkpoint
from lib.checkpoint import CARD_NAME, COMMIT_NAME, Card, Checkpoint, commit, load, version_of
from lib.config import keys_of, validate
from lib.errors import IncompleteError, UsageError
from lib.schema import Head, Task
from lib.score_config import ScoreConfig
from lib.storage import Store, open_store
from lib.windows import Windows
from tests import fakes

LABELS = ("down", "same", "up")
CARD = Card(labels=LABELS, task=Task.MULTI_CLASS, max_length=32, metrics={"accuracy": 0.5})


@pytest.fixture
def folder(classifier: str, tmp_path: Path) -> Path:
    """A trained model that is not committed yet: a copy, for tests that change it."""
    return Path(shutil.copytree(classifier, tmp_path / "trained"))


@pytest.fixture
def committed(classifier: str, any_url: str) -> Store:
    store = open_store(any_url)
    commit(store, classifier, CARD)
    return store


def config(**changes: Any) -> ScoreConfig:
    values: dict[str, Any] = {
        "input": {"path": "s3://b/archive"},
        "model": {"path": "s3://b/model"},
        "output": {"path": "s3://b/out"},
        "forecast": {"node_hour": 1.0},  # a budget is refused without a price
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return validate(ScoreConfig, values)


# commit and load


def test_what_was_committed_is_loaded(committed: Store, classifier: str) -> None:
    found = load(committed.url)
    assert found.card.labels == found.facts.labels == LABELS
    assert found.card.task is found.facts.task is Task.MULTI_CLASS
    assert found.card.max_length == 32
    assert found.card.metrics == {"accuracy": 0.5}
    assert found.digest == load(classifier).digest
    for name in checkpoint.deciding_files(classifier):
        assert (Path(found.folder) / name).read_bytes() == (Path(classifier) / name).read_bytes()


def test_a_checkpoint_is_brought_to_a_machine_once(committed: Store) -> None:
    assert load(committed.url).folder == load(committed.url).folder


def test_a_second_commit_to_the_same_place_is_refused_and_changes_no_weights(committed: Store, tmp_path: Path) -> None:
    other = tmp_path / "other"
    fakes.make_classifier(other, "bert", LABELS, seed=1)
    before = load(committed.url)
    with pytest.raises(IncompleteError, match="another training run committed a checkpoint here"):
        commit(committed, str(other), CARD)
    assert load(committed.url).digest == before.digest


@pytest.mark.parametrize("missing", [COMMIT_NAME])
def test_a_half_written_checkpoint_is_none(committed: Store, missing: str) -> None:
    committed.delete(missing)
    with pytest.raises(UsageError, match=f"no {COMMIT_NAME} in it"):
        load(committed.url)


def test_a_folder_that_is_not_there_is_named(any_url: str) -> None:
    with pytest.raises(UsageError, match=any_url):
        load(any_url)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_file_is_found(committed: Store, name: str) -> None:
    content = bytearray(committed.read(name) or b"")
    position = content.rindex(b"}") if name.endswith(".json") else len(content) // 2
    content[position:position] = b" "
    committed.replace(name, bytes(content))
    with pytest.raises(UsageError, match=f"{name} has SHA-256 .* damaged or mixed"):
        load(committed.url)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_gone_is_missed(committed: Store, name: str) -> None:
    committed.delete(name)
    with pytest.raises(UsageError, match=f"{name} is missing"):
        load(committed.url)


def test_a_file_from_elsewhere_is_noticed(committed: Store) -> None:
    committed.replace("added_tokens.json", b"{}")
    with pytest.raises(UsageError, match=r"added_tokens\.json is not one of the files"):
        load(committed.url)


# folders that are no checkpoints of ours


def test_a_plain_hugging_face_folder_is_taken(classifier: str) -> None:
    found = load(classifier)
    assert found.card == Card(labels=LABELS, task=Task.MULTI_CLASS, max_length=fakes.MAX_TOKENS)


@pytest.mark.parametrize(("asked", "kept"), [(None, fakes.MAX_TOKENS), (16, 16), (9999, fakes.MAX_TOKENS)])
def test_the_length_is_never_more_than_the_model_can_take(asked: int | None, kept: int, classifier: str) -> None:
    assert load(classifier, asked).card.max_length == kept


@pytest.mark.parametrize("family", ["roberta", "mpnet", "xlm-roberta", "deberta-v2", "modernbert"])
def test_positions_that_the_padding_takes_are_not_counted(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, LABELS)
    assert load(str(tmp_path)).facts.max_positions == fakes.MAX_TOKENS


@pytest.mark.parametrize(
    ("labels", "problem", "task"),
    [
        (LABELS, None, Task.MULTI_CLASS),
        (LABELS, "multi_label_classification", Task.MULTI_LABEL),
        (("value",), None, Task.REGRESSION),
        (("value",), "regression", Task.REGRESSION),
        (("value",), "multi_label_classification", Task.MULTI_LABEL),
    ],
)
def test_the_task_is_read_from_the_model(
    labels: tuple[str, ...], problem: str | None, task: Task, tmp_path: Path
) -> None:
    fakes.make_classifier(tmp_path, "bert", labels, problem)
    assert load(str(tmp_path)).facts.task is task


def test_an_encoder_is_no_classifier(tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path, "bert")
    with pytest.raises(
        UsageError, match=r"holds BertModel, expected one that ends in ForSequenceClassification.*jobs\.train"
    ):
        load(str(tmp_path))


def test_weights_that_can_run_code_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no \*\.safetensors weights"):
        load(str(folder))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-model"}', "[]"])
def test_a_configuration_that_cannot_be_loaded_is_named(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UsageError, match=str(folder)):
        load(str(folder))


def test_a_card_that_is_not_valid_is_named(folder: Path) -> None:
    (folder / CARD_NAME).write_text('{"labels": ["a"], "task": "guessing", "max_length": 5}')
    with pytest.raises(UsageError, match=f"{CARD_NAME} is not valid: .*task"):
        load(str(folder))


# versions


def changed(found: Checkpoint, **changes: Any) -> Checkpoint:
    return Checkpoint(
        url=found.url,
        folder=found.folder,
        facts=found.facts,
        digest=found.digest,
        card=found.card.model_copy(update=changes),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model__precision": "bf16"},
        {"model__engine": "torch"},
        {"input__text_column": "body"},
        {"input__text_column": ["first", "second"]},
        {"input__key_columns": ["id"]},
        {"output__prefix": "my_"},
        {"output__probabilities": True},
    ],
    ids=str,
)
def test_a_version_changes_with_what_decides_the_output(changes: dict[str, Any], classifier: str) -> None:
    found = load(classifier)
    assert version_of(found, config(**changes)) != version_of(found, config())


HEADS = (
    Head(name="tone", task=Task.MULTI_CLASS, labels=("down", "up")),
    Head(name="stars", task=Task.REGRESSION, labels=("",)),
)

OTHER_FIELDS: dict[str, tuple[bool, Any]] = {
    "labels": (True, ("down", "up", "same")),
    "task": (True, Task.MULTI_LABEL),
    "max_length": (True, 16),
    "truncation": (True, "tail"),
    "windows": (True, Windows(4, 8, "mean")),
    "temperature": (True, 1.5),
    "thresholds": (True, (0.5, 0.4, 0.3)),
    "several": (True, HEADS),
    "files": (False, {"model.safetensors": "0" * 64}),  # those that are there decide
    "metrics": (False, {"f1": 1.0}),
    "trained": (False, {"seed": 1}),
}
"""For every field of a card: whether it decides a score or a column of the output, and a value that is not the default."""


def test_every_field_of_a_card_is_known_to_decide_the_version_or_not() -> None:
    assert list(Card.model_fields) == list(OTHER_FIELDS)


@pytest.mark.parametrize("field", OTHER_FIELDS)
def test_a_version_changes_with_a_field_of_the_card_if_it_decides_and_only_then(field: str, classifier: str) -> None:
    found = load(classifier)
    decides, value = OTHER_FIELDS[field]
    assert (version_of(changed(found, **{field: value}), config()) != version_of(found, config())) == decides


def test_a_version_changes_with_every_field_of_a_head_and_with_their_order(classifier: str) -> None:
    changes: dict[str, Any] = {
        "name": "mood",
        "task": Task.MULTI_LABEL,
        "labels": ("up", "down"),
        "temperature": 1.5,
        "thresholds": (0.5, 0.4),
    }
    assert {field.name for field in dataclasses.fields(Head)} == changes.keys()
    others = [(dataclasses.replace(HEADS[0], **{name: value}), HEADS[1]) for name, value in changes.items()]
    found = load(classifier)
    versions = {version_of(changed(found, several=heads), config()) for heads in [HEADS, HEADS[::-1], *others]}
    assert len(versions) == 2 + len(changes)


FILES = {
    **dict.fromkeys(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"], True),
    **dict.fromkeys(["model.safetensors.index.json", "special_tokens_map.json", "added_tokens.json"], True),
    **dict.fromkeys(["vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "dict.txt"], True),
    **dict.fromkeys(["spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm"], True),
    **dict.fromkeys(["metrics.json", "trainer_state.json", "training_args.json", "generation_config.json"], False),
    **dict.fromkeys(["README.md", "report.html", "chat_template.jinja", ".gitattributes", ".cache.json"], False),
    **dict.fromkeys(["pytorch_model.bin", "tf_model.h5", "optimizer.pt", "training_args.bin", "own.py"], False),
}
"""For every file that is, or may lie, in a model's folder: whether it decides a score, while nothing in it is run."""


def other_content(path: Path) -> bytes:
    """Something else than what is there, which can still be read."""
    if not path.exists():
        return b"{}"
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(json.loads(content) | {"note": 1}).encode()
    return content[:-1] + bytes([content[-1] ^ 1])  # the last weight's last byte


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_a_version_changes_with_a_file_if_it_decides_and_only_then(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, LABELS)
    assert {path.name for path in tmp_path.iterdir()} <= FILES.keys(), "say of each file whether it decides"
    before = version_of(load(str(tmp_path)), config())
    for name, decides in FILES.items():
        path = tmp_path / name
        old = path.read_bytes() if path.exists() else None
        path.write_bytes(other_content(path))
        assert (version_of(load(str(tmp_path)), config()) != before) == decides, name
        path.write_bytes(old) if old is not None else path.unlink()


def test_every_file_that_a_tokenizer_of_transformers_reads_decides() -> None:
    """BERTweet and PhoBERT have theirs in `bpe.codes`. What does not decide is not brought from S3 either."""
    sources = [path.read_text() for path in Path(transformers.__file__).parent.rglob("tokenization_*.py")]
    tables = [table for source in sources for table in re.findall(r"(?s)VOCAB_FILES_NAMES = \{(.*?)\}", source)]
    names = {name for table in tables for name in re.findall(r': "([^"]+)"', table)}
    assert {"vocab.txt", "bpe.codes", "spiece.model"} < names
    assert [name for name in sorted(names) if not checkpoint.is_deciding(name)] == []


def test_a_version_changes_with_the_scoring_revision(classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(classifier)
    before = version_of(found, config())
    monkeypatch.setattr(checkpoint, "SCORING_REVISION", checkpoint.SCORING_REVISION + 1)
    assert version_of(found, config()) != before


OTHER_VALUES: dict[str, tuple[bool, Any]] = {
    "input.path": (False, "s3://b/other"),
    "input.text_column": (True, "body"),
    "input.key_columns": (True, ("id",)),
    "input.rows": (False, "s3://b/letters"),  # the rows themselves decide: see the next test
    "input.deleted": (False, "remove"),
    "model.path": (False, "s3://b/other"),  # its files decide
    "model.max_length": (False, 16),  # what the checkpoint makes of it decides
    "model.precision": (True, "fp32"),
    "model.engine": (True, "torch"),
    "model.allow_pickle": (False, True),  # the files that are loaded decide
    "model.trust_remote_code": (False, True),
    "output.path": (False, "s3://b/other"),
    "output.prefix": (True, "pred_"),
    "output.probabilities": (True, True),
    "output.embedding": (True, "float16"),
    "output.embedding_pooling": (False, "max"),  # without a vector; with one: see below
    "output.keep_stale_hours": (False, 1.0),
    "output.single_writer": (False, True),
    "output.dead_letter_text": (False, True),
    "planning.chunk_mb": (False, 2.0),
    "limits.max_bad_rows": (False, 5),
    "limits.max_bad_shards": (False, 5),
    "limits.accept": (False, ("0" * 12,)),
    "limits.stall_seconds": (False, 1.0),
    "limits.hang_seconds": (False, 1.0),
    "limits.max_probes": (False, 1),
    "limits.budget": (False, 5.0),
    "drift.baseline": (False, "night-1"),
    "drift.max_psi": (False, 0.25),
    "resources.min_gpus": (False, 2),
    "resources.min_cpus": (False, 2),
    "resources.wait_seconds": (False, 5.0),
    "resources.num_actors": (False, 3),
    "resources.token_budget": (False, 100),
    "forecast.gpu_hour": (False, 3.5),
    "forecast.cpu_hour": (False, 0.1),
    "forecast.node_hour": (False, 2.0),
    "forecast.gpus": (False, 32),
    "forecast.cpus": (False, 64),
    "forecast.nodes": (False, 4),
    "forecast.device": (False, "NVIDIA H200"),
    "forecast.tokens_per_second": (False, 400_000.0),
    "forecast.measure_seconds": (False, 1.0),
    "forecast.sample_rows": (False, 100),
}
"""For every key: whether it decides a score or a column of the output, and a value that is not the default."""


def test_every_key_is_known_to_decide_the_version_or_not() -> None:
    assert [key for key, *_ in keys_of(ScoreConfig)] == list(OTHER_VALUES)


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_version_changes_with_a_key_if_it_decides_and_only_then(key: str, classifier: str) -> None:
    found = load(classifier)
    decides, value = OTHER_VALUES[key]
    other = config(**{key.replace(".", "__"): value})
    assert other != config()
    assert (version_of(found, other) != version_of(found, config())) == decides


def test_a_version_changes_with_the_kind_of_vector(classifier: str) -> None:
    found = load(classifier)
    kinds = [("float16", None), ("float32", None), ("float16", "mean"), ("float16", "max")]
    chosen = [config(output__embedding=kind, output__embedding_pooling=pooling) for kind, pooling in kinds]
    assert len({version_of(found, one) for one in chosen}) == len(kinds)


def test_a_version_changes_with_the_rows_that_are_scored(classifier: str) -> None:
    found = load(classifier)
    versions = {version_of(found, config(), selection) for selection in ("", "a", "b")}
    assert len(versions) == 3


def test_a_version_does_not_change_with_the_place(classifier: str, committed: Store) -> None:
    assert version_of(load(committed.url), config()) == version_of(load(classifier, 32), config())


def test_a_version_is_a_folder_name(classifier: str) -> None:
    version = version_of(load(classifier), config())
    assert len(version) == 16
    assert set(version) <= set("0123456789abcdef")
