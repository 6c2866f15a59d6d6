"""The demo's corpus is a fair one: no module and no text in two splits, balanced, the same every time, no giveaway."""

from collections import Counter
from pathlib import Path

import pytest

from jobs import demo_corpus
from jobs.demo_corpus import MAX_CHARACTERS, MIN_CHARACTERS, NAMES, PACKAGES, SPLITS, Docstring, corpus, docstrings_in


@pytest.fixture(scope="module")
def found() -> list[Docstring]:
    return corpus()


def test_splits_share_no_module(found: list[Docstring]) -> None:
    splits: dict[str, set[str]] = {}
    for one in found:
        splits.setdefault(one.module, set()).add(one.split)
    assert all(len(of_module) == 1 for of_module in splits.values())


def test_no_text_is_there_twice(found: list[Docstring]) -> None:
    assert max(Counter(one.text for one in found).values()) == 1


def test_every_package_has_the_same_number_in_each_split(found: list[Docstring]) -> None:
    for split, most in SPLITS.items():
        counts = Counter(one.package for one in found if one.split == split)
        assert set(counts) == set(PACKAGES)
        assert len(set(counts.values())) == 1
        assert most * 0.8 <= counts[PACKAGES[0]] <= most


def test_texts_do_not_name_their_package(found: list[Docstring]) -> None:
    assert not [one for one in found if NAMES.search(one.text) or one.package in one.text.split()]
    assert all(MIN_CHARACTERS <= len(one.text) <= 2 * MAX_CHARACTERS for one in found)


def test_classes_are_mixed(found: list[Docstring]) -> None:
    assert len({one.package for one in found[:60]}) == len(PACKAGES)


def test_the_corpus_is_the_same_every_time(found: list[Docstring]) -> None:
    assert corpus() == found


def test_files_are_read_and_never_run(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""A docstring of a module about pandas frames."""\nraise SystemExit("was run")\n'
        'class A:\n    """Short."""\n    async def f(self):\n        """Wait for the result of the call, and return it."""\n'
    )
    assert list(docstrings_in(file)) == [
        "A docstring of a module about package frames.",
        "Wait for the result of the call, and return it.",
    ]
    file.write_text("{% template %}")
    assert list(docstrings_in(file)) == []


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpus, "PACKAGES", ("no_such_package",))
    with pytest.raises(ModuleNotFoundError, match="no_such_package, which is not installed"):
        corpus()
