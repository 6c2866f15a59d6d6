"""What a loaded classifier does not compute because its head does not read it, and in which precision weights are held."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from lib.model import FIRST_TOKEN_FAMILIES, leave_out_the_unread, load_classifier, logits_of, new_classifier
from lib.schema import Task
from lib.train_config import HeadSection
from tests import fakes

IDS = torch.arange(5, 65).reshape(4, 15)
MASK = (torch.arange(15) < torch.tensor([15, 9, 2, 15])[:, None]).long()


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_the_last_layer_computes_only_what_is_read_where_that_is_known(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, ("down", "same", "up"))
    model = load_classifier(str(tmp_path))
    with torch.inference_mode():
        expected = logits_of(model, IDS, MASK, None)
        leave_out_the_unread(model)
        found = logits_of(model, IDS, MASK, None)
        hidden = model.base_model(IDS, attention_mask=MASK)[0]  # type: ignore[operator]
    assert (found - expected).abs().max() <= 2e-6
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
