"""Changed training rows, by hand, against plain transformers, and one by one against all together."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForMaskedLM

from lib.augmentation import DROP, SWAP, Augmenter, check_augment, check_augmenter, new_augmenter, reorder
from lib.config import validate
from lib.errors import UsageError
from lib.language_model import check_head
from lib.learning import Learner, logits_of_rows
from lib.loss import Objective
from lib.mapped import LabelledSet, Subset
from lib.model import new_classifier
from lib.schema import Task
from lib.sharding import copy_weights
from lib.tokenization import Tokenizer, load_tokenizer
from lib.train_config import AugmentSection, OptimSection, TrainConfig
from tests import fakes
from tests.labelled import LABELS, difference
from tests.unit.test_learning import ALONE, process_group

__all__ = ["process_group"]

TEXTS = fakes.PROSE.strip().splitlines()


@pytest.fixture(scope="module", params=["bert", "roberta"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a masked-language head that has an opinion, also on columns that are no tokens: a vocabulary padded for speed."""
    folder, config = tmp_path_factory.mktemp(request.param), fakes.make_config(request.param)
    config.vocab_size += 64
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    fakes.save_tokenizer(folder, request.param)
    return str(folder)


def config_of(base: str, **sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {"train": {"path": "t"}, "model": {"base": base}, "output": {"path": "o"}}
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return validate(TrainConfig, values)


def augmenter_of(base: str, **augment: Any) -> Augmenter:
    found = new_augmenter(config_of(base, augment=augment), base, base, 64, torch.device("cpu"))
    assert found is not None
    return found


def make_set(base: str, path: Path, seconds: list[str] | None = None) -> tuple[LabelledSet, Tokenizer]:
    tokenizer = load_tokenizer(base, 64)
    tokens = tokenizer.encode(TEXTS, seconds)
    columns: dict[str, Any] = {"ids": tokens.id_lists(), "label": [LABELS[row % 3] for row in range(len(TEXTS))]}
    if tokens.type_ids is not None:
        columns["type_ids"] = tokens.type_id_lists()
    table = pa.table(columns)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return LabelledSet([str(path)], LABELS, Task.MULTI_CLASS, tokenizer.reference.pad_token_id, 64), tokenizer


def test_reordering_by_hand() -> None:
    """[CLS] a b1 b2 c [SEP] d [SEP]: b has two tokens; nothing crosses the separator, and d is the last of its text."""
    starts = np.array([1, 1, 1, 0, 1, 1, 1, 1], np.bool_)
    special = np.array([1, 0, 0, 0, 0, 1, 0, 1], np.bool_)
    lots = np.ones((4, 8))
    lots[SWAP, [1, 2]] = 0.0  # a and b change places; then b has had its turn
    order = reorder(starts, special, lots, AugmentSection(swap=0.1))
    assert order.tolist() == [0, 2, 3, 1, 4, 5, 6, 7]
    lots[SWAP, [1, 2, 4, 6]] = 1.0, 0.0, 0.0, 0.0  # c and d have no next word
    assert reorder(starts, special, lots, AugmentSection(swap=0.1)).tolist() == [0, 1, 4, 2, 3, 5, 6, 7]
    lots[DROP, [2, 6]] = 0.0
    assert reorder(starts, special, lots, AugmentSection(drop=0.1)).tolist() == [0, 1, 4, 5, 6, 7]
    lots[DROP, [1, 2, 4]] = 0.01, 0.02, 0.0  # one stays: that with the highest lot
    assert reorder(starts, special, lots, AugmentSection(drop=0.1)).tolist() == [0, 2, 3, 5, 6, 7]


def is_made_of(row: npt.NDArray[np.int64], words: list[npt.NDArray[np.int64]]) -> bool:
    """Whether a row is some of the words, whole and in their order."""
    ends = {0}
    for word in words:
        ends |= {end + len(word) for end in ends if np.array_equal(row[end : end + len(word)], word)}
    return len(row) in ends


def test_words_are_left_out_and_swapped_as_wholes(base: str, tmp_path: Path) -> None:
    """Each as often as is asked for, within 5 standard deviations."""
    data, _ = make_set(base, tmp_path / "set.arrow")
    rows, wanted = np.arange(len(data)), 0.2
    left_out, expected, variance, moved = 0, 0.0, 0.0, 0
    dropping, swapping = augmenter_of(base, drop=wanted), augmenter_of(base, swap=wanted)
    for step in range(20):
        short, kept, _ = dropping.rows_of(data, step).gather(rows)
        swapped, mask, _ = swapping.rows_of(data, step).gather(rows)
        for row in rows.tolist():
            before = data.ids_of(row)
            words = np.split(before, np.flatnonzero(dropping.pieces.starts(before[None])[0])[1:])
            after = short[row][kept[row]]
            assert is_made_of(after, words) and (after[0], after[-1]) == (before[0], before[-1])
            lengths = np.array([len(word) for word in words[1:-1]])
            left_out += len(before) - len(after)
            expected, variance = (
                expected + wanted * lengths.sum(),
                variance + wanted * (1 - wanted) * (lengths**2).sum(),
            )
            other = swapped[row][mask[row]]
            assert sorted(other.tolist()) == sorted(before.tolist())
            moved += not np.array_equal(other, before)
    assert abs(left_out - expected) < 5 * math.sqrt(variance)
    assert moved > 18 * len(rows)


def test_pairs_keep_their_segments(base: str, tmp_path: Path) -> None:
    data, tokenizer = make_set(base, tmp_path / "set.arrow", TEXTS[::-1])
    ids, mask, types = augmenter_of(base, drop=0.3, swap=0.3).rows_of(data, 0).gather(np.arange(len(data)))
    special = {tokenizer.reference.cls_token_id, tokenizer.reference.sep_token_id}
    for row in range(len(data)):
        before, after = data.ids_of(row), ids[row][mask[row]]
        assert [one for one in after if one in special] == [one for one in before if one in special]
        separators = [place for place, one in enumerate(before) if one == tokenizer.reference.sep_token_id]
        place = next(place for place, one in enumerate(after) if one == tokenizer.reference.sep_token_id)
        assert set(after[:place]) <= set(before[: separators[0]])
        assert set(after[place:]) <= set(before[separators[0] :])
        if tokenizer.uses_segments:
            assert types is not None
            assert types[row][mask[row]].tolist() == [0] * (place + 1) + [1] * (len(after) - place - 1)
            assert not types[row][~mask[row]].any()


def test_a_row_is_changed_alike_whatever_is_beside_it(base: str, tmp_path: Path) -> None:
    """Alone, in another order, and twice; and otherwise at another step."""
    data, _ = make_set(base, tmp_path / "set.arrow")
    augmenter = augmenter_of(base, drop=0.2, swap=0.2, replace=0.3)
    order = np.random.default_rng(0).permutation(len(data))
    ids, mask, _ = augmenter.rows_of(data, 3).gather(np.concatenate([order, order[:2]]))
    other, other_mask, _ = augmenter.rows_of(data, 4).gather(order)
    same = 0
    for place, row in enumerate([*order, *order[:2]]):
        alone, _, _ = augmenter.rows_of(data, 3).gather(np.array([row]))
        assert ids[place][mask[place]].tolist() == alone[0].tolist()
        if place < len(order):
            same += other[place][other_mask[place]].tolist() == alone[0].tolist()
    assert same < len(order) / 4


def test_rows_of_several_tasks_are_changed_too(base: str, tmp_path: Path) -> None:
    """And what is to be learned of them is as it was."""
    data, _ = make_set(base, tmp_path / "set.arrow")
    both = LabelledSet.mix([data, data])
    seen = augmenter_of(base, drop=0.3).rows_of(both, 0)
    rows = np.arange(2 * len(data))
    ids, mask, _ = seen.gather(rows)
    again, kept, _ = augmenter_of(base, drop=0.3).rows_of(data, 0).gather(np.arange(len(data)))
    for row in range(len(data)):
        assert ids[row][mask[row]].tolist() == again[row][kept[row]].tolist()
    assert (ids[len(data) :] != ids[: len(data)]).any(), "each row has lots of its own"
    assert np.array_equal(seen.targets, both.targets) and np.array_equal(seen.lengths, both.lengths)


def test_words_are_replaced_by_what_the_model_says_there(base: str, tmp_path: Path) -> None:
    """By lots evenly from 0 to 1 each token comes as often as transformers' probability says, give or take one: the word is masked."""
    data, tokenizer = make_set(base, tmp_path / "set.arrow")
    augmenter = augmenter_of(base, replace=0.1)
    assert augmenter.replacer is not None
    model, count = AutoModelForMaskedLM.from_pretrained(base).eval(), 1_000
    before = data.ids_of(0)
    chosen = np.zeros((count, len(before)), np.bool_)
    chosen[:, 3:5] = True
    lots = np.repeat((np.arange(count) + 0.5)[:, None] / count, len(before), axis=1)
    ids = np.repeat(before[None], count, axis=0)
    special = augmenter.pieces.special
    found = augmenter.replacer.replace(ids, np.ones_like(chosen), None, chosen, lots, special)
    assert np.array_equal(found[~chosen], ids[~chosen])
    hidden = torch.from_numpy(before.copy())[None]
    hidden[0, 3:5] = tokenizer.reference.mask_token_id
    with torch.no_grad():
        logits = model(input_ids=hidden).logits[0, 3:5, : len(special)].double()
    logits[:, torch.from_numpy(np.flatnonzero(special))] = -math.inf
    for place, expected in zip((3, 4), logits.softmax(1).numpy(), strict=True):
        counts = np.bincount(found[:, place], minlength=len(expected))
        assert np.abs(counts - expected * count).max() < 1.01
        assert (counts > 5).sum() > 3


def test_words_to_replace_are_chosen_as_wholes(base: str, tmp_path: Path) -> None:
    data, _ = make_set(base, tmp_path / "set.arrow")
    seen: list[npt.NDArray[np.bool_]] = []

    class Watcher:
        def replace(self, ids: Any, mask: Any, _segments: Any, chosen: Any, *_: Any) -> Any:
            seen.append(chosen[mask])
            return ids

    watched: Any = Watcher()
    augmenter = replace(augmenter_of(base, replace=0.25), replacer=watched)
    rows = np.arange(len(data))
    ids, mask, _ = data.gather(rows)
    for step in range(20):
        augmenter.rows_of(data, step).gather(rows)
    starts, special = augmenter.pieces.starts(ids)[mask], augmenter.pieces.special[ids][mask]
    for chosen in seen:
        assert not chosen[special].any()
        assert (chosen[1:] == chosen[:-1])[~starts[1:]].all()
    words = (starts & ~special).sum() * len(seen)
    total = sum(int((chosen & starts).sum()) for chosen in seen)
    assert abs(total - 0.25 * words) < 5 * math.sqrt(words * 0.25 * 0.75)


def test_nothing_else_is_changed(base: str, tmp_path: Path, process_group: None) -> None:
    """Steps with shares of 0 are those without; rows that are evaluated are never changed."""
    data, _ = make_set(base, tmp_path / "set.arrow")
    optim, objective, weights = OptimSection(learning_rate=1e-3), Objective(task=Task.MULTI_CLASS), []
    for augmenter in (None, augmenter_of(base, drop=1e-12), augmenter_of(base, drop=0.3)):
        seen_at = None if augmenter is None else augmenter.rows_of
        learner = Learner(new_classifier(base, LABELS, Task.MULTI_CLASS, 0.0, 7), optim, objective, ALONE, 3, seen_at)
        for number in range(3):
            learner.step(number, data, np.arange(len(data)))
        weights.append(copy_weights(learner.model))
        found = learner.evaluate(Subset(data, np.arange(len(data))))
        assert found is not None
        assert np.array_equal(found, logits_of_rows(learner.model, data, np.arange(len(data)), ALONE))
    assert difference(weights[0], weights[1]) == 0
    assert difference(weights[0], weights[2]) > 1e-4


def test_what_does_not_go_together_is_refused(base: str, tmp_path: Path) -> None:
    for sections, said in (
        ({"augment": {"model": base}}, "augment.model is set, but no words are replaced"),
        (
            {"augment": {"swap": 0.1}, "model": {"window_stride": 4}},
            r"augment.swap with model.window_stride: words that two",
        ),
        ({"augment": {"drop": 0.1}, "contrastive": {"iterations": 2}}, r"augment.drop with contrastive.iterations"),
    ):
        with pytest.raises(UsageError, match=said):
            check_augment(config_of(base, **sections))
    check_augment(config_of(base, model={"window_stride": 4}))
    fakes.make_encoder(tmp_path / "headless", "bert")
    fakes.make_encoder(tmp_path / "other", "xlm-roberta")
    config, headless, other = config_of(base, augment={"replace": 0.1}), f"{tmp_path}/headless", f"{tmp_path}/other"

    def prepare(config: TrainConfig, base: str, replacing: str, max_length: int) -> None:
        new_augmenter(config, base, replacing, max_length, torch.device("cpu"))

    for check in (check_augmenter, prepare):
        with pytest.raises(UsageError, match=r"augment.replace: model.base .*headless: it has no masked-language head"):
            check(config, headless, headless, 64)
        with pytest.raises(
            UsageError, match=r"augment.model .*other: its tokenizer \(600 tokens\) is another one than"
        ):
            check(config, base, other, 64)


def test_a_model_is_loaded_once_to_be_checked(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all trials of a search; and not at all where it replaces nothing."""
    loaded: list[str] = []
    monkeypatch.setattr("lib.language_model.load_language_model", lambda folder, *_: loaded.append(folder))
    check_head.cache_clear()
    for augment in ({}, {"drop": 0.1}):
        check_augmenter(config_of(base, augment=augment), base, base, 64)
    assert not loaded
    for replace_, length in ((0.1, 64), (0.2, 64), (0.1, 32)):
        check_augmenter(config_of(base, augment={"replace": replace_}), base, base, length)
    assert loaded == [base]
    check_head.cache_clear()
