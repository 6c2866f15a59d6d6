"""Training on a real Ray against independent oracles: plain torch, plain transformers one row at a time, scikit-learn."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, f1_score
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jobs.demo_store import LoopbackS3
from jobs.train import main
from lib import checkpoint
from lib.batching import share_of
from lib.config import OptimSection, TrainConfig, validate
from lib.errors import UsageError
from lib.learning import Learner, Team, accumulate, depth_of, new_optimizer, rdrop_losses
from lib.mapped import LabelledSet, Subset
from lib.model import load_classifier, new_classifier
from lib.runtime import Cluster, Node, cluster_facts
from lib.schema import Task
from lib.storage import open_store
from lib.training import place_workers, train
from tests import fakes

WORDS = {"bad": "broken awful terrible sad", "fair": "plain usual average middling", "good": "lovely great sharp happy"}
LABELS = tuple(WORDS)
TRAIN_ROWS, VALID_ROWS, TEST_ROWS = 81, 40, 101
BATCH_ROWS = 16
"""81 rows: the last batch of an epoch has one row, so that one of two workers has none."""

Weights = dict[str, torch.Tensor]


def make_rows(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts of many lengths with words that give their labels away."""
    chance = np.random.default_rng(seed)
    prose = fakes.PROSE.split()
    labels = [LABELS[index] for index in chance.integers(0, len(LABELS), count)]
    texts = []
    for label in labels:
        words = [*chance.choice(prose, int(chance.integers(1, 30))), *chance.choice(WORDS[label].split(), 3)]
        texts.append(" ".join(chance.permutation(words)))
    return texts, labels


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    fakes.make_encoder(folder, "bert")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Train, valid and test; of the rows of train six cannot be used."""
    folder = tmp_path_factory.mktemp("labelled")
    texts, labels = make_rows(TRAIN_ROWS, 1)
    bad = [("", "bad"), (" \n", "good"), (None, "good"), ("no label", None), (b"\xff\xfe", "bad"), (None, None)]
    raw: list[bytes | None] = [one.encode() for one in texts]
    raw[10:10] = [one.encode() if isinstance(one, str) else one for one, _ in bad]
    marks: list[str | None] = [*labels[:10], *(label for _, label in bad), *labels[10:]]
    fakes.write_archive(
        str(folder / "train"),
        {
            "a.parquet": pa.table({"text": pa.array(raw[:50], pa.binary()), "label": marks[:50]}),
            "b.parquet": pa.table(
                {"text": pa.array(raw[50:], pa.binary()), "label": pa.array(marks[50:]).dictionary_encode()}
            ),
        },
    )
    for name, count, seed in (("valid", VALID_ROWS, 2), ("test", TEST_ROWS, 3)):
        texts, labels = make_rows(count, seed)
        fakes.write_archive(str(folder), {f"{name}.parquet": pa.table({"text": texts, "label": labels})})
    rotated = dict(zip(LABELS, [*LABELS[1:], LABELS[0]], strict=True))
    texts, labels = make_rows(VALID_ROWS, 4)
    wrong = pa.table({"text": texts, "label": [rotated[label] for label in labels]})
    fakes.write_archive(str(folder), {"wrong.parquet": wrong})
    return {
        "train": f"{folder}/train/*.parquet",
        **{name: f"{folder}/{name}.parquet" for name in ("valid", "test", "wrong")},
    }


def configure(data: dict[str, str], base: str, output: str, **sections: dict[str, Any]) -> TrainConfig:
    """A configuration of the tests' usual run, with changes."""
    values: dict[str, dict[str, Any]] = {
        "train": {"path": data["train"]},
        "valid": {"path": data["valid"]},
        "test": {"path": data["test"]},
        "model": {"base": base, "precision": "fp32", "dropout": 0.0},
        "optim": {"batch_size": BATCH_ROWS, "epochs": 2, "learning_rate": 5e-4},
        "stopping": {"metric": "loss"},
        "output": {"path": output},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return validate(TrainConfig, values)


def weights_of(url: str) -> Weights:
    return load_file(Path(checkpoint.fetch(url)) / "model.safetensors")


def difference(first: Weights, second: Weights) -> float:
    """The largest one between two models' weights.

    Without the keys' biases: softmax does not see them, so their gradient is rounding alone, which Adam blows up to steps.
    """
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first if not name.endswith("key.bias"))


def score_plainly(folder: str, texts: Sequence[str]) -> torch.Tensor:
    """Logits (N, C) by plain transformers, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat(
            [model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).logits for text in texts]
        )


# one worker, two workers, accumulation


@pytest.fixture(scope="module")
def one(
    data: dict[str, str], base: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, dict[str, Any]]:
    """One worker, to a local folder."""
    config = configure(data, base, str(tmp_path_factory.mktemp("one") / "checkpoint"))
    return config, train(config, "night-1", cluster_facts())


@pytest.fixture(scope="module")
def two(data: dict[str, str], base: str, ray_session: None, s3: LoopbackS3) -> tuple[TrainConfig, dict[str, Any]]:
    """Two workers and the same global batch, to S3."""
    config = configure(data, base, f"{s3.bucket()}/models/two", resources={"num_workers": 2})
    return config, train(config, "night-1", cluster_facts())


def assert_same_learning(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Adam hides a gradient that is too large by a factor; its norm and the loss do not."""
    assert len(first["history"]) == len(second["history"]) == 2
    for left, right in zip(first["history"], second["history"], strict=True):
        for name in ("grad_norm", "train_loss", "loss"):
            assert left[name] == pytest.approx(right[name], rel=1e-4), name


def test_two_workers_learn_what_one_learns(
    one: tuple[TrainConfig, dict[str, Any]], two: tuple[TrainConfig, dict[str, Any]]
) -> None:
    assert_same_learning(one[1], two[1])
    assert difference(weights_of(one[0].output.path), weights_of(two[0].output.path)) < 1e-5


def test_accumulation_changes_nothing(
    one: tuple[TrainConfig, dict[str, Any]], data: dict[str, str], base: str, tmp_path: Path
) -> None:
    config = configure(data, base, str(tmp_path / "checkpoint"), optim={"accumulation_steps": 3})
    found = train(config, "night-1", cluster_facts())
    assert_same_learning(one[1], found)
    assert difference(weights_of(one[0].output.path), weights_of(config.output.path)) < 1e-5


def test_two_workers_evaluate_every_row_once(two: tuple[TrainConfig, dict[str, Any]], data: dict[str, str]) -> None:
    """101 rows: with an equal split one would be lost, with padding one would count twice."""
    texts, labels = make_rows(TEST_ROWS, 3)
    logits = score_plainly(checkpoint.fetch(two[0].output.path), texts)
    truth = [LABELS.index(label) for label in labels]
    tested = two[1]["test"]
    assert tested["rows"] == TEST_ROWS
    assert tested["confusion"] == confusion_matrix(truth, logits.argmax(1)).tolist()
    assert tested["macro_f1"] == pytest.approx(f1_score(truth, logits.argmax(1), average="macro"))
    assert tested["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor(truth))), abs=1e-5
    )


def test_unusable_rows_are_left_out_and_counted(one: tuple[TrainConfig, dict[str, Any]]) -> None:
    assert one[1]["rows"] == {"train": TRAIN_ROWS, "valid": VALID_ROWS, "test": TEST_ROWS}
    assert one[1]["dropped"]["train"] == {"empty text": 2, "null text": 2, "undecodable text": 1, "null label": 1}


def test_a_checkpoint_is_plain_transformers_and_says_what_it_was_made_from(
    two: tuple[TrainConfig, dict[str, Any]], base: str
) -> None:
    config, _ = two
    loaded = checkpoint.load(config.output.path)
    assert loaded.facts.labels == loaded.card.labels == LABELS
    trained = loaded.card.trained
    assert trained["run_id"] == "night-1"
    assert trained["config"] == config.model_dump(mode="json", exclude={"resources"})
    assert trained["label_counts"]["train"].keys() == set(LABELS)
    assert set(trained["versions"]) == {"python", "torch", "transformers", "ray"}
    texts, _ = make_rows(5, 9)
    ours, plain = load_classifier(loaded.folder), score_plainly(loaded.folder, texts)
    tokenizer, original = AutoTokenizer.from_pretrained(loaded.folder), AutoTokenizer.from_pretrained(base)
    for index, text in enumerate(texts):
        batch = tokenizer(text, return_tensors="pt")
        assert batch["input_ids"].tolist()[0] == original(text)["input_ids"]
        assert torch.allclose(ours(**batch).logits[0], plain[index], atol=1e-6)


def test_a_run_leaves_nothing_but_its_checkpoint(
    one: tuple[TrainConfig, dict[str, Any]], two: tuple[TrainConfig, dict[str, Any]]
) -> None:
    for config, result in (one, two):
        store = open_store(config.output.path)
        names = set(store.list()["path"].to_pylist())
        assert names == {
            "config.json",
            "metrics.json",
            "model.safetensors",
            "textsweep.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert json.loads(store.read("metrics.json") or b"") == result
    assert not (Path(one[0].output.path) / "_train").exists()


def test_a_finished_run_returns_at_once_and_another_is_refused(
    two: tuple[TrainConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = two
    monkeypatch.setattr("lib.training.run_workers", None)  # nothing is run again
    assert train(config, "night-1", cluster_facts()) == result
    assert "committed this checkpoint already" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"checkpoint of run 'night-1', this is run 'night-2'"):
        train(config, "night-2", cluster_facts())
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"seed": 1})})
    with pytest.raises(UsageError, match=r"run 'night-1' with another configuration"):
        train(other, "night-1", cluster_facts())
    fewer = config.model_copy(update={"resources": config.resources.model_copy(update={"num_workers": 1})})
    assert train(fewer, "night-1", cluster_facts()) == result


# best, stopping, multi-label


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_weights_are_kept_and_training_stops_early(
    keep: str, data: dict[str, str], base: str, ray_session: None, tmp_path: Path
) -> None:
    """The validation labels are rotated: the better the model learns, the worse it gets there. `last` takes no notice."""
    config = configure(
        data | {"valid": data["wrong"]},
        base,
        str(tmp_path / "checkpoint"),
        optim={"epochs": 20 if keep == "best" else 6, "learning_rate": 3e-3},
        stopping={"metric": "loss", "patience": 3, "keep": keep},
    )
    found = train(config, "night-1", cluster_facts())
    history = found["history"]
    losses = [entry["loss"] for entry in history]
    best = int(np.argmin(losses))
    if keep == "last":
        assert len(history) == 6 > best + 1
        assert found["best"] == history[-1]
        best = 5
    else:
        assert len(history) == best + 1 + 3 < 20
        assert found["best"] == history[best] != history[-1]
        assert abs(losses[-1] - losses[best]) > 1e-2

    rotated = {label: (index + 1) % 3 for index, label in enumerate(LABELS)}
    texts, labels = make_rows(VALID_ROWS, 4)
    logits = score_plainly(config.output.path, texts)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([rotated[label] for label in labels]))
    assert float(loss) == pytest.approx(losses[best], abs=1e-5)


def test_lists_of_numbers_train_a_multi_label_model_with_a_split_of_its_own(
    base: str, ray_session: None, tmp_path: Path
) -> None:
    texts, labels = make_rows(100, 5)
    numbers = [[10] if label == "bad" else [2, 10] if label == "good" else [] for label in labels]
    table = pa.table({"title": texts, "body": texts, "tags": pa.array([*numbers[:99], None], pa.list_(pa.int16()))})
    fakes.write_archive(str(tmp_path), {"all.parquet": table})
    config = configure(
        {"train": f"{tmp_path}/all.parquet", "valid": "", "test": f"{tmp_path}/all.parquet"},
        base,
        str(tmp_path / "checkpoint"),
        train={"text_column": ["title", "body"], "label_column": "tags"},
        valid={"path": None, "fraction": 0.25},
        optim={"epochs": 8, "learning_rate": 3e-3},
        stopping={"metric": "micro_f1"},
    )
    found = train(config, "night-1", cluster_facts())
    assert found["rows"] == {"train": 74, "valid": 25, "test": 99}
    loaded = checkpoint.load(config.output.path)
    assert loaded.facts.labels == ("2", "10")
    assert loaded.facts.task is Task.MULTI_LABEL

    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    model = load_classifier(loaded.folder)
    truth = np.array([["2" in map(str, one), "10" in map(str, one)] for one in map(set, numbers[:99])])
    with torch.no_grad():
        batches = [tokenizer(text, text, truncation=True, max_length=64, return_tensors="pt") for text in texts[:99]]
        answers = np.concatenate([(model(**batch).logits.sigmoid() >= 0.5).numpy() for batch in batches])
    assert found["test"]["micro_f1"] == pytest.approx(f1_score(truth, answers, average="micro"))
    assert found["test"]["micro_f1"] > 0.7


# killed workers


def train_workers() -> list[int]:
    """Process ids of this session's training workers: descendants of this process, nobody else's."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        try:
            status = (entry / "stat").read_text() if entry.name.isdigit() else ""
            title = (entry / "cmdline").read_text() if status else ""
        except OSError:
            continue
        if status:
            parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
            if title.startswith("ray::RayTrainWorker"):
                found.append(int(entry.name))

    def is_mine(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return sorted(filter(is_mine, found))


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[list[int]]:
    """Kills a worker of the run in `tmp_path` once three of its checkpoints were seen; gives the killed process ids."""
    killed: list[int] = []
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01) and not killed:
            seen.update(path.name for path in tmp_path.glob("killed/_train/*/checkpoints/checkpoint_*"))
            if len(seen) >= 3 and (workers := train_workers()):
                os.kill(workers[-1], signal.SIGKILL)
                killed.append(workers[-1])

    thread = threading.Thread(target=watch)
    thread.start()
    yield killed
    done.set()
    thread.join()


def test_a_killed_worker_resumes_to_the_same_weights(
    data: dict[str, str], base: str, ray_session: None, tmp_path: Path, killer: list[int]
) -> None:
    """With dropout, and in the middle of epochs: order, rates, moments, the average and randomness must all go on where they were."""
    changes: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.2},
        "optim": {"epochs": 3, "ema_decay": 0.8, "layer_decay": 0.9, "rdrop": 1.0},
        "stopping": {"metric": "loss", "evaluations_per_epoch": 6, "patience": 100},
        "resources": {"num_workers": 2},
    }
    whole = configure(data, base, str(tmp_path / "whole"), **changes)
    expected = train(whole, "night-1", cluster_facts())
    assert not killer
    config = configure(data, base, str(tmp_path / "killed"), **changes)
    found = train(config, "night-1", cluster_facts())

    assert len(killer) == 1
    assert len(found["resumed_after"]) == 1
    assert 0 < found["resumed_after"][0] < 18
    assert expected["resumed_after"] == []
    assert difference(weights_of(whole.output.path), weights_of(config.output.path)) < 1e-6
    assert [entry["step"] for entry in found["history"]] == list(range(1, 19))
    for left, right in zip(expected["history"], found["history"], strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], abs=1e-6)


def test_an_unfinished_run_goes_on_only_as_it_was_started(
    data: dict[str, str], base: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    config = configure(data, base, str(tmp_path / "checkpoint"), optim={"epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr("lib.training.run_workers", die)
        with pytest.raises(KeyboardInterrupt):
            train(config, "night-1", cluster_facts())
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UsageError, match=r"optim.learning_rate = 0.5, it was 0.0005"):
        train(other, "night-1", cluster_facts())
    monkeypatch.setattr("lib.labelled.tokenize_all", None)  # nothing is tokenized again
    assert len(train(config, "night-1", cluster_facts())["history"]) == 1


# mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.text_column=txt"], r"column 'txt' is missing, did you mean 'text'\? \(there are: text, label\)"),
        (["train.label_column=labels"], r"label column 'labels' is missing, did you mean 'label'\?"),
        (["train.path=NOWHERE/*.parquet"], r"train.path .*no Parquet file matches"),
        (
            ["valid.path=STRANGE"],
            r"valid.path: 2 labels do not occur in the training rows: 'god' \(2 rows\), 'odd' \(1 rows\)",
        ),
        (["train.path=FLOATS"], r"label column 'label' is double, expected strings, whole numbers, or lists"),
        (["valid.path=NUMBERS_AS_LISTS"], r"valid.path .* is multi_label, in train.path it is multi_class"),
        (
            ["resources.num_workers=64"],
            r"num_workers = 64 .* the cluster has 1 nodes, 4 CPUs, 0 GPUs; lower .* at most 4",
        ),
        (["resources.use_gpu=true"], r"num_workers = 1 with a GPU and a CPU each, the cluster has room for 0"),
        (["model.base=/nowhere"], r"/nowhere: there is no such model folder"),
        (["model.base=package:no_such_package"], r"no such Python package is installed here"),
        (["model.base=EMPTY"], r"no config.json in it"),
        (["output.path=/proc/none"], r"output /proc/none: "),
    ],
)
def test_mistakes_end_before_any_weights_are_loaded(
    changes: list[str],
    message: str,
    data: dict[str, str],
    base: str,
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = {
        "STRANGE": pa.table({"text": ["a", "b", "c", "d"], "label": ["good", "god", "odd", "god"]}),
        "FLOATS": pa.table({"text": ["a", "b"], "label": [0.5, 1.5]}),
        "NUMBERS_AS_LISTS": pa.table({"text": ["a", "b"], "label": [["good"], ["bad"]]}),
    }
    fakes.write_archive(str(tmp_path), {f"{name}.parquet": table for name, table in tables.items()})
    (tmp_path / "EMPTY").mkdir()
    places = {name: f"{tmp_path}/{name}.parquet" for name in tables} | {
        "NOWHERE": f"{tmp_path}/none",
        "EMPTY": f"{tmp_path}/EMPTY",
    }
    argv = [
        f"train.path={data['train']}",
        f"valid.path={data['valid']}",
        f"model.base={base}",
        f"output.path={tmp_path}/out",
    ]
    for change in changes:
        key, _, value = change.partition("=")
        head, slash, rest = value.partition("/")
        argv.append(f"{key}={places.get(head, head)}{slash}{rest}")
    monkeypatch.setattr("lib.training.run_workers", None)
    with pytest.raises(UsageError, match=message) as caught:
        main([word for assignment in argv for word in ("--set", assignment)])
    assert caught.value.exit_code == 2


def test_a_base_without_safetensors_is_refused(
    base: str, data: dict[str, str], ray_session: None, tmp_path: Path
) -> None:
    for path in Path(base).iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no \*\.safetensors weights in it \(there are: config\.json"):
        train(configure(data, str(tmp_path), str(tmp_path / "out")), "night-1", cluster_facts())


def test_workers_get_as_many_cpus_as_fit() -> None:
    def place(num_workers: int, *nodes: Node) -> tuple[bool, int]:
        config = configure({"train": "t", "valid": "v", "test": "t"}, "b", "o", resources={"num_workers": num_workers})
        return place_workers(config, Cluster(nodes))

    assert place(1, Node(4, 0)) == (False, 4)
    assert place(2, Node(4, 0)) == (False, 2)
    assert place(3, Node(4, 0)) == (False, 1)
    assert place(3, Node(8, 0), Node(4, 0)) == (False, 4)
    assert place(2, Node(0, 0), Node(8, 1), Node(8, 1)) == (True, 1)
    with pytest.raises(UsageError, match="room for 1"):
        place(2, Node(1, 4))


# the gradient itself, without Ray


@pytest.fixture
def small_set(tmp_path: Path) -> LabelledSet:
    """23 rows in two record batches of a mapped file."""
    chance = np.random.default_rng(0)
    lists = [chance.integers(5, 500, int(chance.integers(2, 40))).tolist() for _ in range(23)]
    labels = [LABELS[index] for index in chance.integers(0, 3, 23)]
    table = pa.table({"ids": pa.array(lists, pa.list_(pa.uint16())), "label": labels})
    with pa.ipc.new_file(tmp_path / "set.arrow", table.schema) as writer:
        for batch in table.to_batches(max_chunksize=14):
            writer.write_batch(batch)
    return LabelledSet([str(tmp_path / "set.arrow")], LABELS, Task.MULTI_CLASS, 0)


ALONE = Team(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)


def plain_loss(model: Any, data: LabelledSet, rows: Sequence[int]) -> torch.Tensor:
    """Mean loss of some rows, each in a forward pass of its own."""
    losses = []
    for row in rows:
        ids, mask, _ = data.gather(np.array([row]))
        assert mask.all()
        target = torch.tensor([int(data.targets[row])])
        losses.append(model(input_ids=torch.from_numpy(ids), labels=target).loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("accumulation_steps", "rdrop"), [(1, 0.0), (2, 0.0), (5, 0.0), (30, 0.0), (2, 3.0)])
def test_the_gradient_is_that_of_the_mean_loss(
    base: str, small_set: LabelledSet, accumulation_steps: int, rdrop: float
) -> None:
    """Without dropout R-Drop's two passes are equal, and change nothing."""
    rows = np.random.default_rng(1).permutation(23)[:17]
    ours = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7)
    shares = share_of(rows, 0, 1, accumulation_steps)
    loss = accumulate(ours, small_set, shares, 17, Task.MULTI_CLASS, ALONE, rdrop)
    plain = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7)
    expected = plain_loss(plain, small_set, rows.tolist())
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    for (name, left), right in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None, name
        assert torch.allclose(left.grad, right.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL])
def test_rdrop_is_the_formula_of_its_paper(task: Task) -> None:
    """By torch's own distributions; half of it, see `rdrop_losses`."""
    logits, losses = torch.randn(2 * 5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10.0)
    distribution: Any = Categorical if task is Task.MULTI_CLASS else Bernoulli
    first, second = (distribution(logits=some) for some in logits.chunk(2))
    both = (kl_divergence(first, second) + kl_divergence(second, first)) / 2
    both = both if both.ndim == 1 else both.mean(dim=1)
    expected = (losses[:5] + losses[5:] + 0.7 * both) / 2
    assert torch.allclose(rdrop_losses(logits, losses, task, 0.7), expected, atol=1e-6)


def test_rdrop_weighs_what_dropout_makes_of_a_row(base: str, small_set: LabelledSet) -> None:
    model = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.3, 7).train()
    found = []
    for weight in (1e-9, 4.0):
        torch.manual_seed(3)
        found.append(float(accumulate(model, small_set, [np.arange(23)], 23, Task.MULTI_CLASS, ALONE, weight)))
    assert found[1] > found[0] + 1e-4


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_every_weight_of_every_family_learns(family: str, small_set: LabelledSet, tmp_path: Path) -> None:
    """Workers would wait for the gradient of a weight that takes no part."""
    fakes.make_encoder(tmp_path / family, family)
    model = new_classifier(str(tmp_path / family), LABELS, Task.MULTI_CLASS, None, 7)
    accumulate(model, small_set, [np.arange(4)], 4, Task.MULTI_CLASS, ALONE)
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


def test_steps_are_those_of_a_plain_torch_loop(base: str, small_set: LabelledSet) -> None:
    """AdamW, decay of matrices alone, clipping, warm-up and decay of the rate, written out plainly."""
    optim = OptimSection(learning_rate=1e-3, warmup_fraction=0.25, weight_decay=0.1, max_grad_norm=0.5)
    batches = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 23), np.arange(0, 8)]
    learner = Learner(new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7), optim, Task.MULTI_CLASS, ALONE, 4)
    plain = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7).train()
    groups = [
        {"params": [one for one in plain.parameters() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in plain.parameters() if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    for number, (rows, rate) in enumerate(zip(batches, (1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3), strict=True)):
        learner.step(number, small_set, rows)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        plain_loss(plain, small_set, rows.tolist()).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert norm > 0.5, "clipping must be at work"
        optimizer.step()
    ours = {name: one.detach() for name, one in learner.model.named_parameters()}
    assert difference(ours, {name: one.detach() for name, one in plain.named_parameters()}) < 1e-5


def test_each_layer_learns_at_its_own_rate(base: str) -> None:
    optim = OptimSection(learning_rate=1e-3, head_learning_rate=5e-3, layer_decay=0.5)
    model = new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7)
    assert model.config.num_hidden_layers == 2
    names = {id(one): name for name, one in model.named_parameters()}
    rates = {
        names[id(one)]: group["peak"] for group in new_optimizer(model, optim).param_groups for one in group["params"]
    }
    expected = {
        "bert.embeddings.": 1e-3 / 4,
        "bert.encoder.layer.0.": 1e-3 / 2,
        "bert.encoder.layer.1.": 1e-3,
        "bert.pooler.": 5e-3,
        "classifier.": 5e-3,
    }
    assert rates == {name: next(rate for start, rate in expected.items() if name.startswith(start)) for name in rates}
    assert rates.keys() == set(names.values())


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_every_family_has_a_depth_for_each_layer(family: str, tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path / family, family)
    model = new_classifier(str(tmp_path / family), LABELS, Task.MULTI_CLASS, None, 7)
    depths = {name: depth_of(name, model) for name, _ in model.named_parameters()}
    layers = (
        1 if family == "albert" else model.config.num_hidden_layers
    )  # ALBERT's layers are one, used again and again
    assert set(depths.values()) == set(range(layers + 2))
    words = next(name for name, one in model.named_parameters() if one is model.get_input_embeddings().weight)
    assert depths[words] == layers + 1
    encoder = {id(one) for one in model.base_model.parameters()}
    assert {depths[name] for name, one in model.named_parameters() if id(one) not in encoder} == {0}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_average_of_the_weights_is_what_is_evaluated(
    base: str, small_set: LabelledSet, process_group: None
) -> None:
    """Its first value is the first step's; from then on a tenth of each step's weights comes in."""
    optim = OptimSection(learning_rate=1e-2, ema_decay=0.9)
    learner = Learner(new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7), optim, Task.MULTI_CLASS, ALONE, 4)
    expected: Weights = {}
    for number in range(4):
        learner.step(number, small_set, np.arange(23))
        for name, one in learner.model.state_dict().items():
            expected[name] = one.clone() if number == 0 else 0.9 * expected[name] + 0.1 * one
    average = learner.candidate.state_dict()
    assert difference(average, expected) < 1e-6
    assert difference(average, learner.model.state_dict()) > 1e-3
    found = learner.evaluate(Subset(small_set, np.arange(23)))
    assert found is not None
    plain = plain_loss(learner.candidate.eval(), small_set, range(23)).item()
    assert found[1].mean() == pytest.approx(plain, rel=1e-5)


def test_a_set_gives_its_rows_in_any_order(small_set: LabelledSet) -> None:
    rows = Subset(small_set, np.array([22, 0, 13, 14]))
    ids, mask, type_ids = small_set.gather(rows.chosen)
    assert type_ids is None
    assert mask.sum(axis=1).tolist() == rows.lengths.tolist()
    for place, row in enumerate(rows.chosen):
        alone, _, _ = small_set.gather(np.array([row]))
        assert ids[place][mask[place]].tolist() == alone[0].tolist()
        assert not ids[place][~mask[place]].any()
