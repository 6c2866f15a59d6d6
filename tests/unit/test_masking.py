"""Which tokens are asked for, against the shares of the paper and the words of the tokenizers themselves."""

import math
from pathlib import Path

import numpy as np
import pytest

from lib.masking import new_masking
from lib.pieces import find_pieces, special_ids
from lib.tokenization import load_tokenizer
from lib.words import locate
from tests import fakes

LINES = [*fakes.PROSE.strip().splitlines(), "don't stop (now)!", "a,b. c", "x - y"]


@pytest.mark.parametrize("family", fakes.FAMILIES)
def test_words_begin_where_the_text_says(family: str, tmp_path: Path) -> None:
    """For WordPiece by the words that the tokenizer itself found; for the others by where the tokens stand in the text."""
    fakes.make_encoder(tmp_path, family)
    tokenizer = load_tokenizer(str(tmp_path), 64)
    pieces = find_pieces(tokenizer)
    assert pieces is not None
    seen = 0
    for line in LINES:
        ids = tokenizer.encode([line]).ids.astype(np.int64)
        found = pieces.starts(ids[None])[0]
        state = tokenizer.backend.encode(line)
        if tokenizer.reference.unk_token_id in ids:
            continue  # what it stands for is not known from the ids
        seen += 1
        if '"WordPiece"' in tokenizer.backend.to_str():
            words = state.word_ids
            expected = [index == 0 or word is None or word != words[index - 1] for index, word in enumerate(words)]
        else:
            ends = np.array([word.end for word in locate(tokenizer, line).words(np.ones(len(ids)))])
            owners = [
                int(np.searchsorted(ends, start + len(line[start:end]) - len(line[start:end].lstrip()), side="right"))
                for start, end in state.offsets
            ]
            special = special_ids(tokenizer)[ids]
            expected = [
                bool(index == 0 or special[index] or special[index - 1] or owners[index] != owners[index - 1])
                for index in range(len(ids))
            ]
        assert found.tolist() == expected, (line, tokenizer.reference.convert_ids_to_tokens(ids))
    assert seen > len(LINES) / 2


def far(found: int, of: int, share: float) -> float:
    """How many standard deviations of a binomial count lie between what was found and what was expected."""
    return abs(found - of * share) / math.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_shares_are_those_of_the_paper(family: str, whole_words: bool, tmp_path: Path) -> None:
    """Within 5 standard deviations: by chance once in 1.7 million looks. Special tokens and padding are never asked for."""
    fakes.make_encoder(tmp_path, family)
    tokenizer = load_tokenizer(str(tmp_path), 64)
    masking = new_masking(tokenizer, 0.15, whole_words)
    special = special_ids(tokenizer)
    chance = np.random.default_rng(0)
    usual = np.flatnonzero(~special)
    lengths = chance.integers(3, 64, 2_000)
    mask = np.arange(64) < lengths[:, None]
    ids = np.where(mask, chance.choice(usual, (2_000, 64)), tokenizer.reference.pad_token_id)
    ids[:, 0], ids[mask.sum(1) > 9, 9] = tokenizer.reference.cls_token_id, tokenizer.reference.sep_token_id
    seen, chosen = masking.draw(ids, mask, [(3, 7, row) for row in range(2_000)])
    assert not chosen[~mask | special[ids]].any()
    assert (seen == ids)[~chosen].all()
    if whole_words:
        pieces = masking.pieces
        assert pieces is not None
        starts = pieces.starts(ids)
        words = (starts & mask & ~special[ids]).sum()
        assert far((chosen & starts).sum(), words, 0.15) < 5
        inner = ~starts
        inner[:, 0] = False
        assert inner.sum() > 1_000
        assert (chosen[:, 1:] == chosen[:, :-1])[inner[:, 1:] & mask[:, 1:]].all(), "a word is asked for as a whole"
    else:
        assert far(chosen.sum(), (mask & ~special[ids]).sum(), 0.15) < 5
    count = int(chosen.sum())
    assert far((seen == masking.mask_id)[chosen].sum(), count, 0.8) < 5
    others = chosen & (seen != masking.mask_id)
    kept = (seen == ids)[others].sum()
    same_by_chance = 0.1 / len(usual)
    assert far(kept, count, 0.1 + same_by_chance) < 5
    assert not special[seen[others]].any()
    assert len(np.unique(seen[others])) > len(usual) / 2, "any token may come in its place"


def test_what_is_asked_for_is_decided_by_the_rows_key_alone(tmp_path: Path) -> None:
    fakes.make_encoder(tmp_path, "bert")
    masking = new_masking(load_tokenizer(str(tmp_path), 64), 0.3, False)
    ids = np.random.default_rng(0).integers(5, 500, (6, 20))
    lengths = np.array([20, 5, 12, 7, 20, 9])
    mask = np.arange(20) < lengths[:, None]
    keys = [(1, 2, row) for row in range(6)]
    seen, chosen = masking.draw(ids, mask, keys)
    order = np.array([3, 1, 5])
    short = slice(0, 9)
    again, asked = masking.draw(ids[order, short], mask[order, short], [keys[row] for row in order])
    assert (again == seen[order, short])[mask[order, short]].all() and (asked == chosen[order, short]).all()
    for other in ([(1, 3, row) for row in range(6)], [(2, 2, row) for row in range(6)]):
        assert (masking.draw(ids, mask, other)[1] != chosen).any()
