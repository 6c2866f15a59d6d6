"""Fakes that are tiny real things: seeded models of every family with a tokenizer of its own kind, and archives.

Weights are drawn wider than a fresh model's, so that answers differ from text to text as a trained model's do. The same
arguments give the same bytes on every machine: scores of a fake can be pinned.
"""

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lib.storage import open_store

MAX_TOKENS = 64
"""The most tokens that the fakes can take, special ones included."""

VOCABULARY_SIZE = 600
HIDDEN_SIZE = 32
WEIGHT_STD = 0.12
HEAD_STD = 0.4

PROSE = """
The harbour was quiet when the first boats came home. Nobody on the pier spoke, because everyone could count: seven had
left before dawn, and only five were back. An old woman with a red scarf lit a lamp, put it on the wall, and waited.
"They know these waters," said the teacher, who had never been at sea; "they are not late, they are careful."
Prices in the market rose again this week: bread costs 3.20, a kilo of apples 2.75, and good coffee more than either.
The shop on the corner has closed, which is sad, though its owner was never friendly and the service was terribly slow.
I love this camera! The pictures are sharp, the battery lasts for two days, and it fits into any pocket. Well done.
I hate this phone. It broke after one month, nobody answered my letters, and the money is gone. Never buy it, please.
Researchers at the university measured the temperature of 1,204 lakes and found that most are warmer than in 1985.
Their method is simple: a small sensor, a long cable, and patience. It would not work under ice, as they say themselves.
Mix the flour with the butter, add sugar, eggs and a little salt, stir until smooth, and bake it for forty minutes.
The minister denied the report, the newspaper printed the documents, and on Thursday parliament will ask questions.
In the last minute of the game the young player, who had been ill all winter, ran past three defenders and scored.
If the function returns an error, look into the log file; if the log is empty, check that the server is running at all.
Between the mountains and the river there is a village where every house has a garden and every garden has a story.
Could you tell me where the station is? Yes: go straight on, turn left behind the church, and follow the yellow signs.
"""
"""What the vocabularies are made of. Written for this file, so that no version of Python or of a package changes it."""


# vocabularies: by plain BPE, since the trainers of WordPiece and Unigram give another result in every process


def train_bpe(
    pre_tokenizer: Any, special: Sequence[str], alphabet: Iterable[str], lowercase: bool = False
) -> Tokenizer:
    """A BPE tokenizer trained on the prose, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(special),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE.splitlines(), trainer)
    return tokenizer


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    """The pieces of a vocabulary in the order of their ids."""
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def wordpiece(special: Sequence[str]) -> dict[str, int]:
    """A lower-case WordPiece vocabulary: what BPE puts at the start of a word, the rest behind `##`, and single letters."""
    found = pieces_of(train_bpe(pre_tokenizers.Metaspace(), [], string.printable, lowercase=True))
    starts = [piece.removeprefix("▁") for piece in found if piece.startswith("▁") or len(piece) == 1]
    inner = [f"##{piece}" for piece in found if piece.isalnum()]
    pieces = dict.fromkeys([*special, *starts, *inner])
    pieces.pop("", None)
    return {piece: index for index, piece in enumerate(pieces)}


def unigram(special: Sequence[str]) -> list[tuple[str, float]]:
    """Pieces as SentencePiece writes them, each with a log probability: the more frequent, the higher."""
    pieces = pieces_of(train_bpe(pre_tokenizers.Metaspace(), special, set(PROSE) - {"\n"}))
    return [(piece, 0.0 if piece in special else -4.0 - rank / 100) for rank, piece in enumerate(pieces)]


def byte_level(special: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: nothing is unknown to it."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = train_bpe(pre_tokenizer, special, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# tokenizers: each family's own class, with the special tokens that its models expect

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ALBERT_SPECIAL = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
MPNET_SPECIAL = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece: BERT's, DistilBERT's and ELECTRA's."""
    return transformers.BertTokenizer(vocab=wordpiece(BERT_SPECIAL), model_max_length=MAX_TOKENS)


def mpnet_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece with RoBERTa's special tokens."""
    return transformers.MPNetTokenizer(vocab=wordpiece(MPNET_SPECIAL), model_max_length=MAX_TOKENS)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, two separators between the texts of a pair."""
    state = json.loads(byte_level(ROBERTA_SPECIAL).to_str())["model"]
    merges: Any = [tuple(pair) for pair in state["merges"]]
    return transformers.RobertaTokenizer(vocab=state["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def modernbert_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with BERT's special tokens, in the class that has no family."""
    tokenizer = byte_level(BERT_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT_SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def xlm_roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram, RoBERTa's special tokens."""
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    return transformers.XLMRobertaTokenizer(vocab=unigram(special), model_max_length=MAX_TOKENS)


def albert_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram, lower case, without accents."""
    return transformers.AlbertTokenizer(vocab=unigram(ALBERT_SPECIAL), model_max_length=MAX_TOKENS)


def deberta_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram, BERT's special tokens, upper case kept."""
    return transformers.DebertaV2Tokenizer(vocab=unigram(BERT_SPECIAL), model_max_length=MAX_TOKENS)


# models


@dataclass(frozen=True)
class Family:
    """How to build one family: its model type, its tokenizer, and what its configuration calls things."""

    model_type: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    sizes: dict[str, Any]


USUAL_SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": WEIGHT_STD,
}

BEHIND_PADDING = USUAL_SIZES | {"max_position_embeddings": MAX_TOKENS + 2}
"""Position numbers start behind the padding id, which is 1."""

FAMILIES = {
    "bert": Family("bert", bert_tokenizer, USUAL_SIZES),
    "distilbert": Family(
        "distilbert",
        bert_tokenizer,
        {"dim": HIDDEN_SIZE, "n_layers": 2, "n_heads": 2, "hidden_dim": 2 * HIDDEN_SIZE}
        | {"max_position_embeddings": MAX_TOKENS, "initializer_range": WEIGHT_STD},
    ),
    "roberta": Family("roberta", roberta_tokenizer, BEHIND_PADDING | {"type_vocab_size": 1}),
    "albert": Family("albert", albert_tokenizer, USUAL_SIZES | {"embedding_size": 16}),
    "deberta-v2": Family(
        "deberta-v2",
        deberta_tokenizer,
        USUAL_SIZES
        | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
        | {"position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "electra": Family("electra", bert_tokenizer, USUAL_SIZES | {"embedding_size": 16}),
    "mpnet": Family("mpnet", mpnet_tokenizer, BEHIND_PADDING),
    "xlm-roberta": Family("xlm-roberta", xlm_roberta_tokenizer, BEHIND_PADDING | {"type_vocab_size": 1}),
    "modernbert": Family(
        "modernbert",
        modernbert_tokenizer,
        USUAL_SIZES
        | {"local_attention": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        | {"cls_token_id": 2, "sep_token_id": 3},
    ),
}


def make_config(family: str, **changes: Any) -> Any:
    """A family's configuration, small, and right for its tokenizer."""
    chosen = FAMILIES[family]
    size = len(chosen.tokenizer())
    return transformers.AutoConfig.for_model(chosen.model_type, vocab_size=size, **chosen.sizes, **changes)


def make_classifier(
    folder: str | Path, family: str, labels: Sequence[str], problem_type: str | None = None, seed: int = 0
) -> None:
    """Save a classifier with its tokenizer as a Hugging Face folder; one label with no `problem_type` is a regression."""
    names = dict(enumerate(labels))
    config = make_config(
        family,
        num_labels=len(labels),
        id2label=names,
        label2id={label: index for index, label in names.items()},
        problem_type=problem_type,
    )
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    for name, weight in model.named_parameters():
        if name.split(".")[0] in ("classifier", "score"):
            torch.nn.init.normal_(weight, std=HEAD_STD)
    model.save_pretrained(folder)
    save_tokenizer(folder, family)


def make_encoder(folder: str | Path, family: str, seed: int = 0) -> None:
    """Save a pretrained encoder without a head, as `model.base` of training."""
    torch.manual_seed(seed)
    AutoModel.from_config(make_config(family)).save_pretrained(folder)
    save_tokenizer(folder, family)


def save_tokenizer(folder: str | Path, family: str) -> None:
    """Put a family's tokenizer into a model folder."""
    FAMILIES[family].tokenizer().save_pretrained(str(folder))


# archives


def to_parquet(table: pa.Table, row_group_size: int | None = None, **options: Any) -> bytes:
    """A table as the bytes of a Parquet file whose pages carry checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_size, **{"write_page_checksum": True, **options})
    return sink.getvalue().to_pybytes()


def write_archive(url: str, shards: Mapping[str, pa.Table | bytes], row_group_size: int | None = None) -> None:
    """Write shards by name below a folder on any storage; bytes are written as they are."""
    store = open_store(url)
    for name, content in shards.items():
        store.replace(name, content if isinstance(content, bytes) else to_parquet(content, row_group_size))
