"""Which folders cannot be loaded, what a loaded classifier does not compute because its head does not read it, and in which precision."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from lib import checkpoint
from lib.errors import UsageError
from lib.model import FIRST_TOKEN_FAMILIES, leave_out_the_unread, load_classifier, logits_of, new_classifier
from lib.schema import Task
from lib.train_config import HeadSection
from tests import fakes

IDS = torch.arange(5, 65).reshape(4, 15)
MASK = (torch.arange(15) < torch.tensor([15, 9, 2, 15])[:, None]).long()


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_the_last_layer_computes_only_what_is_read_where_that_is_known(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, ("down", "same", "up"))
    model = load_classifier(str(tmp_path)).double()  # in fp32 processors differ by 2e-6
    with torch.inference_mode():
        expected = logits_of(model, IDS, MASK, None)
        leave_out_the_unread(model)
        found = logits_of(model, IDS, MASK, None)
        hidden = model.base_model(IDS, attention_mask=MASK)[0]  # type: ignore[operator]
    assert (found - expected).abs().max() <= 1e-12
    assert hidden.shape[1] == (1 if family in FIRST_TOKEN_FAMILIES else 15)


class MeanPooled(BertForSequenceClassification):
    """A head of its own that reads every token."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        hidden = self.bert(input_ids, attention_mask=attention_mask)[0]
        mean = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.classifier(mean))


def test_a_head_of_its_own_is_left_alone(tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, "bert", ("down", "same", "up"))
    model = MeanPooled.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = logits_of(model, IDS, MASK, None)
        leave_out_the_unread(model)
        assert torch.equal(logits_of(model, IDS, MASK, None), expected)


@pytest.mark.parametrize("head", [HeadSection(), HeadSection(pooling="mean", hidden_sizes=(8,))], ids=["family", "own"])
@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16], ids=str)
def test_a_base_that_was_saved_in_half_precision_learns_in_fp32(
    saved: torch.dtype, head: HeadSection, tmp_path: Path
) -> None:
    """Steps smaller than what half precision tells apart would be lost."""
    fakes.make_encoder(tmp_path, "bert")
    AutoModel.from_pretrained(tmp_path).to(saved).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype is saved, "as transformers loads it"
    model = new_classifier(str(tmp_path), ("down", "up"), Task.MULTI_CLASS, None, 0, head=head)
    assert {one.dtype for one in model.state_dict().values() if one.is_floating_point()} == {torch.float32}


# what is no model


def keep_half(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def keep_nothing(weights: Path) -> None:
    weights.write_bytes(b"")


def replace_by_a_page(weights: Path) -> None:
    weights.write_bytes(b"<html>not found</html>" * 50)


def leave_out_the_head(weights: Path) -> None:
    save_file({name: one for name, one in load_file(weights).items() if name != "classifier.weight"}, weights)


def shorten_the_head(weights: Path) -> None:
    save_file({name: one[:2].clone() for name, one in load_file(weights).items()}, weights)


def rename(weights: Path) -> None:
    weights.rename(weights.with_name("weights.safetensors"))


def list_in_half_a_file(weights: Path) -> None:
    weights.rename(weights.with_name("model-00001-of-00001.safetensors"))
    names = dict.fromkeys(
        load_file(weights.with_name("model-00001-of-00001.safetensors")), "model-00001-of-00001.safetensors"
    )
    index = json.dumps({"metadata": {}, "weight_map": names})
    weights.with_name("model.safetensors.index.json").write_text(index[: len(index) // 2])


def list_without_metadata(weights: Path) -> None:
    list_in_half_a_file(weights)
    weights.with_name("model.safetensors.index.json").write_text('{"weight_map": {}}')


def list_nothing(weights: Path) -> None:
    list_in_half_a_file(weights)
    weights.with_name("model.safetensors.index.json").write_text("[]")


UNREADABLE = r"model\.safetensors \([\d,]+ bytes\) cannot be read as safetensors \(.*get it again"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (keep_half, UNREADABLE),
        (keep_nothing, UNREADABLE),
        (replace_by_a_page, UNREADABLE),
        (leave_out_the_head, r"1 weights are missing or have another shape \(classifier\.weight\)"),
        (shorten_the_head, r"weights are missing or have another shape .*not trained as a classifier"),
        (
            list_in_half_a_file,
            r"index\.json \([\d,]+ bytes\) is not what it should be, JSON with metadata and a weight_map.*get it again",
        ),
        (list_without_metadata, r"index\.json \(18 bytes\) is not what it should be"),
        (list_nothing, r"index\.json \(2 bytes\) is not what it should be"),
        (rename, r"not all there: .*no file named model\.safetensors.*get the whole folder again"),
    ],
)
def test_weights_that_cannot_be_used_are_named(
    damage: Callable[[Path], None], message: str, classifier: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(classifier, tmp_path / "damaged"))
    damage(folder / "model.safetensors")
    with pytest.raises(UsageError, match=f"^{folder}: .*{message}"):
        load_classifier(str(folder))
    if message == UNREADABLE:
        with pytest.raises(UsageError, match=f"^model.path {folder}: {message}"):
            checkpoint.load(str(folder))
