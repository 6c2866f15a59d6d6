"""Explanations as people see them: on a page, where texts are text, and on a terminal, where they move no cursor."""

import re
from dataclasses import replace

import lxml.html
import pytest

from lib.attribution import Explanation
from lib.highlight import colored_text, explanation_page, marked_html, printable, terminal_lines
from lib.schema import Task
from lib.words import Word

EVIL = "<script>alert(1)</script> & \"quoted\" <img src=x onerror='y'>"
TEXT = "a great day, never dull"
WORDS = (Word(0, 1, 0.01), Word(2, 7, 2.0), Word(8, 11, 0.4), Word(13, 18, -1.0), Word(19, 23, -0.08))
FOUND = Explanation(
    task=Task.MULTI_CLASS, label="good", value=1.5, without=0.17, missing=0.0, steps=16, text=TEXT, words=WORDS
)  # fmt: skip


def test_words_are_marked_by_sign_and_strength() -> None:
    page = marked_html(TEXT, WORDS)
    marks = re.findall(
        r'<mark class="(\w+)" style="background:rgba\(([\d,]+),([\d.]+)\)" title="(.+?)">(\w+)</mark>', page
    )
    assert [(kind, word) for kind, _, _, _, word in marks] == [("for", "great"), ("for", "day"), ("against", "never")]
    assert marks[0][1] == marks[1][1] != marks[2][1]
    assert float(marks[0][2]) > float(marks[2][2]) > float(marks[1][2])
    assert [float(value) for _, _, _, value, _ in marks] == [2.0, 0.4, -1.0]
    assert lxml.html.fromstring(f"<p>{page}</p>").text_content() == TEXT
    assert marked_html(TEXT, ()) == TEXT and marked_html(TEXT, (Word(0, 1, 0.0),)) == TEXT


def test_texts_and_labels_on_a_page_are_text() -> None:
    words = tuple(Word(place, place + 6, 1.0) for place in range(0, len(EVIL) - 6, 6))
    found = replace(FOUND, label=EVIL, text=EVIL, words=words)
    page = explanation_page(EVIL, [[found], []], [EVIL, EVIL])
    tree = lxml.html.fromstring(page)
    assert not tree.xpath("//script | //img | //link | //@src | //@href")
    assert [one.text_content() for one in tree.find_class("text")] == [EVIL, EVIL]
    assert "No answer." in page and EVIL in tree.xpath("//h3")[0].text_content()
    assert page.count("<mark") == len(words) + 2, "and the two of the legend"


def test_a_page_says_all_values() -> None:
    many = tuple(Word(place, place + 1, 0.1 * place) for place in range(12))
    page = explanation_page("m", [[FOUND, replace(FOUND, words=many)]], [TEXT])
    first, second = (
        [[cell.text_content() for cell in row] for row in table.xpath(".//tr")][1:]
        for table in lxml.html.fromstring(page).xpath("//table")
    )
    assert first[0] == ["great", "+2.000"] and first[-1] == ["without the words", "+0.170"]
    assert sum(float(value) for _, value in first) == pytest.approx(1.5)
    assert second[-2] == ["2 more", "+0.100"] and len(second) == 12
    assert "prefers-color-scheme: dark" in page


def test_without_colours_the_strongest_words_are_listed() -> None:
    lines = terminal_lines(3, FOUND, colored=False)
    assert lines[0] == "text 3: good, score 0.818; log-odds +1.50, without the words +0.17"
    assert lines[1:] == ["  great +2.00", "  never -1.00", "  day +0.40", "  dull -0.08", "  a +0.01"]
    many = replace(FOUND, words=WORDS * 3)
    assert terminal_lines(1, many, colored=False)[-1] == "  (5 more: -0.13)"
    number = terminal_lines(1, replace(FOUND, label="stars", task=Task.REGRESSION), colored=False)[0]
    assert number == "text 1: stars 1.5; without the words 0.17"
    short = terminal_lines(1, replace(FOUND, missing=-0.5, steps=512), colored=False)[0]
    assert short.endswith("; the words' values miss -0.5 of the difference after 512 steps")
    assert "score 0.000" in terminal_lines(1, replace(FOUND, value=-900.0), colored=False)[0]


def test_on_a_terminal_words_stand_on_colours_and_those_against_are_underlined() -> None:
    shown = colored_text(TEXT, WORDS)
    assert re.sub(r"\x1b\[[\d;]+m", "", shown) == TEXT
    assert re.findall(r"\x1b\[([\d;]+)m(\w+)\x1b\[0m", shown) == [
        ("38;5;16;48;5;75", "great"),
        ("38;5;16;48;5;195", "day"),
        ("4;38;5;16;48;5;223", "never"),
    ]


def test_a_text_moves_no_cursor() -> None:
    evil = "a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\u2028g\x00h\n"
    assert printable(evil) == "a [2Jb 31mc d e f g h "
    found = replace(FOUND, label=evil, text=evil, words=(Word(0, 5, 1.0), Word(5, len(evil), -1.0)))
    for colored in (True, False):
        shown = "\n".join(terminal_lines(1, found, colored))
        assert not re.search(
            r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", re.sub(r"\x1b\[[\d;]+m(.*?)\x1b\[0m", r"\1", shown)
        )
    assert printable("नमस्ते 👩‍👩‍👧 שלום") == "नमस्ते 👩‍👩‍👧 שלום"
