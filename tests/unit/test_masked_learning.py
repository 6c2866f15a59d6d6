"""One step of a masked-language model against plain transformers, and the rows that texts are packed into."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from lib.batching import share_of
from lib.config import TRUST_NOTHING, validate
from lib.corpus import find_corpus, is_aside, pack, prepare_corpus, rows_of, tokenize_block
from lib.errors import UsageError
from lib.language_model import load_language_model, save_language_model
from lib.learning import Team
from lib.mapped import TokenSet
from lib.masked_learning import EVALUATION_KEY, MaskedLearner, accumulate_masked, ask, summarize_masked
from lib.masking import Masking, new_masking
from lib.pretrain_config import PretrainConfig
from lib.sources import items_of
from lib.storage import open_store
from lib.tokenization import WHOLE, load_tokenizer
from lib.train_config import OptimSection
from tests import fakes

ROWS = 32


def teams(size: int) -> list[Team]:
    return [Team(rank=rank, size=size, device=torch.device("cpu"), dtype=torch.float32) for rank in range(size)]


def make_rows(path: Path, vocabulary: int) -> TokenSet:
    """Rows of chance, 3 to 40 tokens."""
    chance = np.random.default_rng(0)
    lists = [[2, *chance.integers(5, vocabulary, int(chance.integers(1, 38))).tolist(), 3] for _ in range(ROWS)]
    table = pa.table({"ids": pa.array(lists, pa.list_(pa.uint16()))})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return TokenSet([str(path)], 0, 64)


@pytest.fixture(params=["bert", "roberta", "electra", "modernbert"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, TokenSet, Masking]:
    """A base with a trained head, rows, and a masking, of a family."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(fakes.make_config(request.param)).save_pretrained(tmp_path / "base")
    fakes.save_tokenizer(tmp_path / "base", request.param)
    tokenizer = load_tokenizer(str(tmp_path / "base"), 64)
    return str(tmp_path / "base"), make_rows(tmp_path / "rows.arrow", 500), new_masking(tokenizer, 0.15, False)


def plainly(
    model: Any, data: TokenSet, masking: Masking, rows: np.ndarray[Any, Any], key: tuple[int, int]
) -> torch.Tensor:
    """Transformers' own loss: labels where something is asked for, -100 elsewhere."""
    asked = ask(data, rows, masking, *key)
    labels = torch.from_numpy(np.where(asked.chosen, asked.ids, -100))
    mask = torch.from_numpy(asked.mask.astype(np.int64))
    found: torch.Tensor = model(input_ids=torch.from_numpy(asked.seen), attention_mask=mask, labels=labels).loss
    return found


@pytest.mark.parametrize(("passes", "workers"), [(1, 1), (2, 1), (1, 2), (3, 5)])
def test_loss_and_gradient_are_those_of_transformers(
    passes: int, workers: int, case: tuple[str, TokenSet, Masking]
) -> None:
    """Over the tokens that are asked for in the whole step, whoever computes them: shares of rows have different numbers of them."""
    base, data, masking = case
    rows = np.random.default_rng(1).permutation(ROWS)
    plain = load_language_model(base, "model.base", TRUST_NOTHING, dropout=0.0)[0].train()
    expected = plainly(plain, data, masking, rows, (5, 9))
    expected.backward()
    asked = ask(data, rows, masking, 5, 9)
    losses, gradients = [], []
    for team in teams(workers):
        model = load_language_model(base, "model.base", TRUST_NOTHING, dropout=0.0)[0].train()
        shares = share_of(np.arange(ROWS), team.rank, workers, passes)
        losses.append(float(accumulate_masked(model, model, asked, shares, team)))
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    assert sum(losses) == pytest.approx(expected.item(), abs=1e-5)
    for name, one in plain.named_parameters():
        mine = torch.stack([found[name] for found in gradients]).mean(0)  # as workers exchange them
        assert one.grad is not None
        assert torch.allclose(mine, one.grad, rtol=1e-4, atol=1e-5), name
    assert max(float(one.grad.abs().max()) for one in plain.parameters() if one.grad is not None) > 1e-2


def test_each_step_asks_for_other_tokens_and_validation_always_for_the_same(
    case: tuple[str, TokenSet, Masking],
) -> None:
    """A step again, as after a resume, for the same ones, whatever rows are beside a row."""
    _, data, masking = case
    rows = np.arange(ROWS)
    once, again, backwards = (ask(data, some, masking, 1, 7).chosen for some in (rows, rows, rows[::-1]))
    assert np.array_equal(once, again) and np.array_equal(once, backwards[::-1])
    for seed, step in ((1, 8), (2, 7), (1, EVALUATION_KEY)):
        other = ask(data, rows, masking, seed, step).chosen
        assert (other & once).sum() < 0.4 * once.sum(), "by chance 15% of them are the same"


def test_validation_is_that_of_transformers_row_by_row(case: tuple[str, TokenSet, Masking]) -> None:
    base, data, masking = case
    model = load_language_model(base, "model.base", TRUST_NOTHING, dropout=0.5)[0]
    learner = MaskedLearner(model, OptimSection(seed=4), masking, teams(1)[0], 1)
    parts = [learner.evaluate_rows(data, np.arange(ROWS)[rank::3]) for rank in range(3)]
    losses, count, right = [], 0, 0
    for row in range(ROWS):
        asked = ask(data, np.array([row]), masking, 4, EVALUATION_KEY)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(asked.seen)).logits[torch.from_numpy(asked.chosen)]
        targets = torch.from_numpy(asked.ids[asked.chosen])
        losses.append(float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")))
        count, right = count + len(targets), right + int((logits.argmax(1) == targets).sum())
    found = summarize_masked(np.concatenate(parts))
    assert found["loss"] == pytest.approx(sum(losses) / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / count), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / count)


def test_a_step_that_asks_for_nothing_changes_no_gradient(case: tuple[str, TokenSet, Masking]) -> None:
    base, data, masking = case
    model = load_language_model(base, "model.base", TRUST_NOTHING)[0].train()
    asked = ask(data, np.arange(4), masking, 0, 0)
    asked.chosen[:] = False
    assert float(accumulate_masked(model, model, asked, [np.arange(4)], teams(1)[0])) == 0
    assert all(one.grad is not None and not one.grad.any() for one in model.parameters())


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_a_new_head_is_tied_and_the_pooler_is_kept(family: str, tmp_path: Path) -> None:
    """And plain transformers find nothing missing, neither for masked words nor, but for its classifier, for a classifier."""
    base = str(tmp_path / "base")
    fakes.make_encoder(base, family)
    with pytest.raises(
        UsageError, match=r"KEY .*base: it has no masked-language head \(.*\); take a base that has one"
    ):
        load_language_model(base, "KEY", TRUST_NOTHING)
    model, is_new = load_language_model(base, "KEY", TRUST_NOTHING, None, 3)
    again, _ = load_language_model(base, "KEY", TRUST_NOTHING, None, 3)
    assert is_new
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    output: Any = model.get_output_embeddings()
    words: Any = model.get_input_embeddings()
    assert output.weight is words.weight
    with torch.no_grad():
        words.weight += 0.25
    save_language_model(model, base, TRUST_NOTHING, str(tmp_path / "out"))
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.get_output_embeddings().weight, words.weight)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    encoder = {name for name in map(str, info["missing_keys"]) if name.startswith(f"{classifier.base_model_prefix}.")}
    assert not encoder
    before, after = load_file(Path(base) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in (name for name in before if name.startswith("pooler.")):
        assert torch.equal(after[f"{model.base_model_prefix}.{name}"], before[name])


# rows


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_rows_hold_all_texts_in_their_order(family: str, tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path, family)
    tokenizer = load_tokenizer(str(tmp_path), WHOLE)
    texts = [*fakes.PROSE.strip().splitlines(), "a", " ".join(fakes.PROSE.split()), "b"]
    several = [tokenizer.encode(texts[:3]), tokenizer.encode(texts[3:])]
    ids, lengths = rows_of(several, tokenizer.find_around(), 24, True)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    plain = [tokenizer.reference(text)["input_ids"] for text in texts]
    first, last = plain[0][0], plain[0][-1]
    assert all(row[0] == first and row[-1] == last and 3 <= len(row) <= 24 for row in rows)
    assert all(row[1] != last and row[-2] != last for row in rows), "no separator twice"
    assert np.mean([len(row) for row in rows]) > 22
    expected = [token for text in plain for token in text[1:-1]]
    assert [int(token) for row in rows for token in row if token not in (first, last)] == expected
    ends = np.cumsum([len(text) - 2 for text in plain])
    inside = {int(end) for end in ends}
    place = 0
    for row in rows:
        for token in row[1:-1]:
            if token == last:
                assert place in inside, "a separator stands between texts"
            else:
                place += 1
    one, each = rows_of([tokenizer.encode(["a b", "c"])], tokenizer.find_around(), 24, False)
    assert one.tolist() == [*tokenizer.reference("a b")["input_ids"], *tokenizer.reference("c")["input_ids"]]
    assert each.sum() == len(one)


def test_packing_by_hand() -> None:
    """Texts of 3, 0 and 4 tokens between 1 and 2, in rows of 5: three tokens, and a separator if there is room for more behind it."""
    ids = np.array([1, 11, 12, 13, 2, 1, 2, 1, 21, 22, 23, 24, 2])
    found, lengths = pack(ids, np.array([5, 2, 6]), (1, 1), 5)
    rows = [row.tolist() for row in np.split(found, np.cumsum(lengths)[:-1])]
    assert rows == [[1, 11, 12, 13, 2], [1, 21, 22, 2], [1, 23, 24, 2]]
    found, lengths = pack(ids, np.array([5, 2, 6]), (1, 1), 8)
    rows = [row.tolist() for row in np.split(found, np.cumsum(lengths)[:-1])]
    assert rows == [[1, 11, 12, 13, 2, 21, 22, 2], [1, 23, 24, 2]]


def test_equal_texts_are_on_one_side() -> None:
    texts = pa.array([f"text {number}" for number in range(4_000)] * 2, pa.large_string())
    aside = is_aside(texts, 0.1, 0)
    assert (aside[:4_000] == aside[4_000:]).all()
    assert abs(aside[:4_000].sum() - 400) < 5 * math.sqrt(4_000 * 0.1 * 0.9)
    other = is_aside(texts, 0.1, 1)[:4_000]
    assert abs((other & aside[:4_000]).sum() - 40) < 5 * math.sqrt(40), "another seed, another choice"


@pytest.mark.parametrize("packing", [True, False])
def test_a_block_of_two_columns_becomes_a_file_for_each_set(
    packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of a row follow each other; a row with a bad one is left out; doing it again writes the same bytes.

    Of a text that is control characters alone the tokenizer leaves nothing.
    """
    fakes.make_encoder(tmp_path / "base", "bert")
    lines = [*fakes.PROSE.strip().splitlines(), "\x07"]
    table = pa.table({"first": [*lines, "x", None], "second": [*lines[::-1], "", "y"]})
    fakes.write_archive(str(tmp_path / "texts"), {"a.parquet": table})
    values = {
        "train": {"path": str(tmp_path / "texts"), "text_column": ["first", "second"]},
        "valid": {"fraction": 0.3},
        "model": {"base": str(tmp_path / "base")},
        "mlm": {"packing": packing},
        "output": {"path": "-"},
    }
    config, folder = validate(PretrainConfig, values), open_store(str(tmp_path / "data"))
    (source,) = find_corpus(config)
    (item,) = items_of([source])
    tokenizer = load_tokenizer(str(tmp_path / "base"), WHOLE if packing else 24)
    around = tokenizer.find_around()
    report = tokenize_block(item, source, tokenizer, around, config, 24, folder)
    assert report["dropped"] == {"empty text": 2, "null text": 2, "text without a token": 2}
    assert report["read"] == 2 * len(table) == sum(one["texts"] for one in report["parts"].values()) + 6
    texts = pa.array([text for pair in zip(lines, lines[::-1], strict=True) for text in pair], pa.large_string())
    aside, full = is_aside(texts, 0.3, 0), np.array([text != lines[-1] for text in texts.to_pylist()])
    assert 0 < aside.sum() < len(texts)
    before = {}
    for name, chosen in (("train", ~aside), ("valid", aside)):
        expected, lengths = rows_of([tokenizer.encode(texts.filter(pa.array(chosen)))], around, 24, packing)
        part = report["parts"][name]
        assert (part["texts"], part["rows"], part["tokens"]) == ((chosen & full).sum(), len(lengths), lengths.sum())
        rows = TokenSet([folder.full(part["file"])], 0, 24)
        assert rows.lengths.tolist() == lengths.tolist()
        assert np.concatenate([rows.ids_of(row) for row in range(len(rows))]).tolist() == expected.tolist()
        before[name] = folder.read(part["file"])
    assert tokenize_block(item, source, tokenizer, around, config, 24, folder) == report
    assert {name: folder.read(report["parts"][name]["file"]) for name in before} == before
    monkeypatch.setattr("lib.corpus.tokenize_all", lambda *_: [report | {"read": report["read"] + 1}])
    with pytest.raises(AssertionError, match="texts lost"):
        prepare_corpus(config, [source], str(tmp_path / "base"), 24, folder)
