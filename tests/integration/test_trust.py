"""What a model folder may run: nothing, unless the configuration says so. Canary files tell."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs import predict
from lib import checkpoint
from lib.config import Trust, validate
from lib.errors import UsageError
from lib.model import new_classifier
from lib.predictor import Predictor
from lib.schema import Task
from lib.score_config import ModelSection, ScoreConfig
from lib.storage import open_store
from lib.tokenization import Tokenizer
from lib.train_config import TrainConfig, TrainModelSection
from lib.training import check_base

PICKLE, CODE = Trust(pickle=True), Trust(code=True)
LABELS = ("down", "same", "up")

MODELING = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification

Path({canary!r}).touch()

class OwnConfig(BertConfig):
    model_type = "own"

class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def pickled(classifier: str, tmp_path: Path) -> Path:
    """The classifier with pickled weights in place of safetensors ones."""
    folder = Path(shutil.copytree(classifier, tmp_path / "pickled"))
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


@pytest.fixture
def own_code(classifier: str, tmp_path: Path, canary: Path) -> Path:
    """The classifier as a family that only its own Python file knows; running that file makes the canary."""
    folder = Path(shutil.copytree(classifier, tmp_path / "own"))
    (folder / "own_modeling.py").write_text(MODELING.format(canary=str(canary)), encoding="utf-8")
    names = {"AutoConfig": "OwnConfig", "AutoModelForSequenceClassification": "OwnForSequenceClassification"}
    set_keys(
        folder / "config.json",
        model_type="own",
        architectures=["OwnForSequenceClassification"],
        auto_map={auto: f"own_modeling.{name}" for auto, name in names.items()},
    )
    set_keys(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    return folder


def set_keys(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def scores(model: checkpoint.Checkpoint) -> Any:
    tokens = checkpoint.tokenizer_of(model).encode(["the harbour was quiet", "bread costs 3.20"])
    return Predictor(model, "fp32").probabilities(tokens.ids, tokens.offsets)


class Exploit:
    """What unpickling makes of it is a call."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


# pickled weights


def test_pickled_weights_are_refused_with_the_reason_and_the_cure(pickled: Path) -> None:
    message = r"no \*\.safetensors weights in it \(there are: .*pytorch_model\.bin.*can run code.*save_pretrained.*model\.allow_pickle=true"
    with pytest.raises(UsageError, match=f"model.path .*{message}"):
        checkpoint.load(str(pickled))
    with pytest.raises(UsageError, match=f"model.base .*{message}"):
        check_base(str(pickled), TrainModelSection(base="b"))


def test_pickled_weights_that_are_allowed_give_the_same_scores(pickled: Path, classifier: str) -> None:
    found = scores(checkpoint.load(str(pickled), trust=PICKLE))
    assert np.array_equal(found, scores(checkpoint.load(classifier)))
    check_base(str(pickled), TrainModelSection(base="b", allow_pickle=True))
    model = new_classifier(str(pickled), LABELS, Task.MULTI_CLASS, None, 0, PICKLE)
    assert torch.equal(
        model.state_dict()["bert.pooler.dense.weight"],
        load_file(Path(classifier) / "model.safetensors")["bert.pooler.dense.weight"],
    )


def test_pickled_weights_come_along_from_storage(pickled: Path, any_url: str, environment: pytest.MonkeyPatch) -> None:
    store = open_store(any_url)
    for path in pickled.iterdir():
        store.replace(path.name, path.read_bytes())
    with pytest.raises(UsageError, match="allow_pickle"):
        checkpoint.load(any_url)
    assert checkpoint.load(any_url, trust=PICKLE).digest == checkpoint.load(str(pickled), trust=PICKLE).digest


def test_a_pickle_that_calls_something_is_refused_even_when_pickles_are_allowed(pickled: Path, canary: Path) -> None:
    torch.save({"bert.pooler.dense.weight": Exploit(canary)}, pickled / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled weights hold more than tensors, and were not loaded"):
        scores(checkpoint.load(str(pickled), trust=PICKLE))
    assert not canary.exists()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert canary.exists(), "the exploit must work where nothing stops it"


def test_pickles_count_in_the_version_only_if_they_are_what_is_loaded(classifier: str, pickled: Path) -> None:
    plain = checkpoint.load(classifier).digest
    both = Path(shutil.copytree(classifier, pickled / "both"))
    shutil.copy(pickled / "pytorch_model.bin", both)
    assert checkpoint.load(str(both), trust=PICKLE).digest == plain
    before = checkpoint.load(str(pickled), trust=PICKLE).digest
    torch.save({}, pickled / "pytorch_model.bin")
    assert checkpoint.load(str(pickled), trust=PICKLE).digest != before


# code


def test_code_is_not_run_unless_it_is_trusted(own_code: Path, canary: Path) -> None:
    message = r"Python code of its own.*none of it was run.*model\.trust_remote_code=true"
    with pytest.raises(UsageError, match=message):
        checkpoint.load(str(own_code))
    with pytest.raises(UsageError, match=message):
        check_base(str(own_code), TrainModelSection(base="b"))
    with pytest.raises(UsageError, match=message):
        predict.main(["--set", f"model.path={own_code}", "a text"])
    assert not canary.exists()


def test_nobody_is_asked_whether_to_run_a_tokenizers_code(
    own_code: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on standard input, where a `y` may happen to stand."""
    (own_code / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")  # a family without a tokenizer
    set_keys(
        own_code / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own_modeling.Own", None]},
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UsageError, match=r"Python code of its own.*model\.trust_remote_code=true"):
        Tokenizer(str(own_code), 32)
    assert not canary.exists()


def test_code_that_is_trusted_is_run_and_gives_its_scores(own_code: Path, canary: Path, classifier: str) -> None:
    found = scores(checkpoint.load(str(own_code), trust=CODE))
    assert canary.exists()
    assert np.array_equal(found, scores(checkpoint.load(classifier)))


def test_trusted_code_is_part_of_the_version(own_code: Path, classifier: str, any_url: str) -> None:
    before = checkpoint.load(str(own_code), trust=CODE).digest
    store = open_store(any_url)
    for path in own_code.iterdir():
        store.replace(path.name, path.read_bytes())
    assert checkpoint.load(any_url, trust=CODE).digest == before
    with (own_code / "own_modeling.py").open("a", encoding="utf-8") as file:
        file.write("# another score\n")
    assert checkpoint.load(str(own_code), trust=CODE).digest != before
    assert checkpoint.load(classifier, trust=CODE).digest == checkpoint.load(classifier).digest


def test_code_from_another_place_is_refused_since_the_version_would_not_hold_it(own_code: Path, canary: Path) -> None:
    set_keys(own_code / "config.json", auto_map={"AutoConfig": "someone/model--own_modeling.OwnConfig"})
    with pytest.raises(UsageError, match=r"takes code from another place \(someone/model--own_modeling.OwnConfig\)"):
        checkpoint.load(str(own_code), trust=CODE)
    assert not canary.exists()


# configuration


def test_both_are_off_until_they_are_asked_for_and_are_no_part_of_the_version(classifier: str) -> None:
    scoring = {"input": {"path": "a"}, "model": {"path": classifier}, "output": {"path": "b"}}
    asked = {
        "input": {"path": "a"},
        "model": {"path": classifier, "allow_pickle": True, "trust_remote_code": True},
        "output": {"path": "b", "dead_letter_text": True},  # decides no score either
    }
    plain, trusting = validate(ScoreConfig, scoring), validate(ScoreConfig, asked)
    assert (plain.model.trust, trusting.model.trust) == (Trust(), Trust(pickle=True, code=True))
    versions = [
        checkpoint.version_of(checkpoint.load(classifier, trust=config.model.trust), config)
        for config in (plain, trusting)
    ]
    assert versions[0] == versions[1]
    assert ModelSection(path="a").trust == TrainModelSection(base="a").trust == Trust()
    training = {"train": {"path": "a"}, "model": {"base": "b", "allow_pickle": True}, "output": {"path": "c"}}
    assert validate(TrainConfig, training).model.trust == PICKLE
