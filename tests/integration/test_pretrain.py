"""Further pre-training on a real Ray, from Parquet to an encoder that is fine-tuned with changed rows: workers, kills, mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from jobs import pretrain as job
from jobs import zero_shot
from jobs.demo_store import LoopbackS3
from lib import checkpoint
from lib.config import validate
from lib.errors import UsageError
from lib.pretrain_config import PretrainConfig
from lib.pretraining import pretrain
from lib.runtime import cluster_facts
from lib.storage import open_store
from lib.train_config import TrainConfig
from lib.training import train
from tests import fakes
from tests.killing import killing
from tests.labelled import Weights, difference, make_rows

TEXTS = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with labelled sets; of the training texts three cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", TEXTS, 1), ("valid", 40, 2), ("test", 60, 3)):
        texts, labels = make_rows(count, seed)
        bad = [None, "", " \n"] if name == "train" else []
        table = pa.table({"text": [*texts, *bad], "label": [*labels, *(["good"] * len(bad))]})
        fakes.write_archive(str(folder), {f"{name}.parquet": table})
    return str(folder)


def configure(data: str, base: str, output: str, **sections: dict[str, Any]) -> PretrainConfig:
    """A run with all that has a state, in the middle of epochs."""
    values: dict[str, dict[str, Any]] = {
        "train": {"path": f"{data}/train.parquet"},
        "valid": {"fraction": 0.2},
        "model": {"base": base, "precision": "fp32", "max_length": 32, "dropout": 0.0},
        "mlm": {"whole_words": True},
        "optim": {"batch_size": 16, "epochs": 2, "learning_rate": 3e-3, "ema_decay": 0.5},
        "stopping": {"evaluations_per_epoch": 4, "patience": 100},
        "output": {"path": output},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return validate(PretrainConfig, values)


def weights_of(url: str) -> Weights:
    return load_file(Path(checkpoint.fetch(url)) / "model.safetensors")


@pytest.fixture(scope="module")
def one(
    data: str, base: str, ray_session: None, s3: LoopbackS3, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """By one worker, in two passes a step, to S3."""
    config = configure(data, base, f"{s3.bucket()}/encoder", optim={"accumulation_steps": 2})
    return config.output.path, pretrain(config, "night-1", cluster_facts())


def test_a_killed_run_of_two_workers_gives_what_one_worker_gives(
    data: str, base: str, one: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Weights in parts, too, with the decoder tied to the embeddings."""
    output = str(tmp_path / "killed")
    config = configure(data, base, output, resources={"num_workers": 2, "strategy": "fsdp"})
    with killing(Path(output), 3) as killed:
        found = pretrain(config, "night-1", cluster_facts())
    assert len(killed) == len(found["resumed_after"]) == 1
    assert one[1]["resumed_after"] == []
    assert len(found["history"]) == len(one[1]["history"]) == 8
    for left, right in zip(one[1]["history"], found["history"], strict=True):
        for name in ("train_loss", "grad_norm", "loss"):
            assert left[name] == pytest.approx(right[name], abs=1e-4), name
    assert difference(weights_of(one[0]), weights_of(output)) < 2e-5
    assert pretrain(config, "night-1", cluster_facts()) == found, "a finished run returns at once"


def test_the_encoder_is_plain_transformers_and_has_learned(one: tuple[str, dict[str, Any]], base: str) -> None:
    url, found = one
    folder = checkpoint.fetch(url)
    _, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and found["new_head"]
    assert found["dropped"] == {"train": {"empty text": 2, "null text": 1}}
    assert found["texts"]["train"] + found["texts"]["valid"] == TEXTS
    assert 15 < found["texts"]["valid"] < 50
    losses = [entry["loss"] for entry in found["history"]]
    assert found["best"]["loss"] == min(losses) < losses[0] - 0.2
    assert found["best"]["perplexity"] == pytest.approx(np.exp(found["best"]["loss"]))
    before, after = load_file(Path(base) / "model.safetensors"), weights_of(url)
    changed = {name for name, value in before.items() if not torch.equal(value, after[f"bert.{name}"])}
    assert before.keys() - changed == {"pooler.dense.weight", "pooler.dense.bias"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = fakes.PROSE.split("\n")[1]
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    card = (open_store(url).read("README.md") or b"").decode()
    assert f"on {found['texts']['train']:,} texts" in card and f"loss {found['best']['loss']:.4f}" in card
    loaded = checkpoint.load(url, encoder=True)
    assert (loaded.card.max_length, loaded.card.trained["run_id"]) == (32, "night-1")


def test_it_is_a_base_of_training_with_changed_rows_and_of_masked_prompts(
    one: tuple[str, dict[str, Any]], data: str, tmp_path: Path
) -> None:
    """Augmented rows are the same for two workers, of which one is killed, as for one."""
    found = []
    for workers in (1, 2):
        output = tmp_path / str(workers)
        values = {
            "train": {"path": f"{data}/train.parquet"},
            "valid": {"path": f"{data}/valid.parquet"},
            "test": {"path": f"{data}/test.parquet"},
            "model": {"base": one[0], "precision": "fp32", "dropout": 0.0},
            "augment": {"drop": 0.2, "swap": 0.2, "replace": 0.3},
            "optim": {"batch_size": 16, "epochs": 1, "learning_rate": 5e-4},
            "stopping": {"metric": "loss", "evaluations_per_epoch": 8, "patience": 100},
            "output": {"path": str(output)},
            "resources": {"num_workers": workers},
        }
        config = validate(TrainConfig, values)
        if workers == 1:
            metrics = train(config, "night-1", cluster_facts())
        else:
            with killing(output, 3) as killed:
                metrics = train(config, "night-1", cluster_facts())
            assert len(killed) == len(metrics["resumed_after"]) == 1
        found.append((metrics, weights_of(str(output))))
    for left, right in zip(found[0][0]["history"], found[1][0]["history"], strict=True):
        for name in ("train_loss", "grad_norm", "loss"):
            assert left[name] == pytest.approx(right[name], abs=1e-4), name
    assert difference(found[0][1], found[1][1]) < 1e-5
    (tmp_path / "labels.toml").write_text('down = ["not"]\nup = ["the", "a"]\n')
    settings = [f"labels.file={tmp_path}/labels.toml", f"model.base={one[0]}", f"output.path={tmp_path}/prompt"]
    settings.append("prompt.template={text} It was [MASK].")
    zero_shot.main([word for value in settings for word in ("--set", value)])
    assert checkpoint.load(str(tmp_path / "prompt")).facts.labels == ("down", "up")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.path=NOWHERE/*.parquet"], r"train.path .*no Parquet file matches"),
        (["train.text_column=txt"], r"column 'txt' is missing, did you mean 'text'\?"),
        (
            ["valid.fraction=0.000001"],
            r"valid.fraction = 1e-06: of 150 texts none was set aside; raise it, or give valid.path",
        ),
        (["optim.rdrop=1.0"], r"optim.rdrop in further pre-training: .* leave it out"),
        (
            ["optim.unfreeze_layers=1"],
            r"optim.unfreeze_layers in further pre-training: the head's decoder are the embeddings",
        ),
        (["stopping.metric=accuracy"], r"stopping.metric = \"accuracy\": input should be 'loss'"),
        (["model.base=NO_MASK"], r"its tokenizer has no mask token, so nothing can be hidden with it"),
        (["model.base=STRANGE"], r"transformers has no masked-language head for gpt2 models"),
        (["resources.num_workers=64"], r"num_workers = 64 .* the cluster has 1 nodes"),
    ],
)
def test_mistakes_end_before_any_weights_are_loaded(
    changes: list[str],
    message: str,
    data: str,
    base: str,
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_MASK", "STRANGE"):
        (tmp_path / name).mkdir()
        for path in Path(base).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "NO_MASK")
    (tmp_path / "STRANGE" / "config.json").write_text('{"model_type": "gpt2"}')
    argv = [f"train.path={data}/train.parquet", f"model.base={base}", f"output.path={tmp_path}/out"]
    places = {name: f"{tmp_path}/{name}" for name in ("NOWHERE", "NO_MASK", "STRANGE")}
    for change in changes:
        key, _, value = change.partition("=")
        head, slash, rest = value.partition("/")
        argv.append(f"{key}={places.get(head, head)}{slash}{rest}")
    monkeypatch.setattr("lib.pretraining.run_to_commit", None)
    with pytest.raises(UsageError, match=message) as caught:
        job.main([word for assignment in argv for word in ("--set", assignment)])
    assert caught.value.exit_code == 2
