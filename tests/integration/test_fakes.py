"""The fakes are what they claim to be: loadable, of their family, and with answers that differ from text to text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests import fakes

TEXTS = ["The harbour was quiet.", "I hate this phone!", "Mix the flour with 1,204 eggs"]


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_a_classifier_of_each_family_loads_and_answers(family: str, tmp_path: Path) -> None:
    fakes.make_classifier(tmp_path, family, ("a", "b", "c"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.model_type == family
    assert tokenizer.model_max_length == fakes.MAX_TOKENS
    longest = " ".join(TEXTS * 40)
    batch = tokenizer([*TEXTS, longest], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (4, fakes.MAX_TOKENS)
    assert batch["input_ids"].max() < model.config.vocab_size
    assert tokenizer.unk_token_id not in batch["input_ids"][0]
    with torch.no_grad():
        probabilities = model.eval()(**batch).logits.softmax(-1)
    assert probabilities.std(dim=0).max() > 0.004


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_an_encoder_of_each_family_loads(family: str, tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path, family)
    assert AutoModel.from_pretrained(tmp_path).config.model_type == family
