"""Labels as words of their own: by hand in several scripts, and against a regular expression in ASCII."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe_ds.data.words import first_named, occurrences

ASCII = st.text(alphabet="ab1_ +-.", max_size=12)


@pytest.mark.parametrize(
    ("label", "text", "starts"),
    [
        ("answer1", "answer10, answer1 or answer1.", [10, 21]),
        ("A", "正确答案是A。", [5]),
        ("A", "A组", [0]),
        ("正确", "答案是正确的", [3]),
        ("あ", "答えはあです", [3]),
        ("ก", "คำตอบคือก", [8]),
        ("ก", "กิน", []),  # a vowel sign makes it another syllable
        ("क", "कि", []),
        ("क", "उत्तर क है", [6]),
        ("कल", "आजकल", []),
        ("да", "нет, да", [5]),
        ("да", "дата", []),
        ("C++", "C++ or C", [0]),
        ("C", "C++ or C", [0, 7]),
        ("a", "", []),
    ],
)
def test_by_hand(label, text, starts):
    assert occurrences(label, text) == starts


@given(ASCII.filter(bool), ASCII)
def test_in_ascii_a_word_is_what_a_regular_expression_takes_for_one(label, text):
    pattern = rf"(?=(?<!\w){re.escape(label)}(?!\w))"
    assert occurrences(label, text) == [match.start() for match in re.finditer(pattern, text)]


@pytest.mark.parametrize(
    ("labels", "text", "index"),
    [
        (["C", "C++"], "C++ it is", 1),  # the longest at one place
        (["true", "false"], "FALSE, not true", 1),
        (["A", "B"], "a B", 1),
        (["CO", "Co"], "Co", 1),
        (["不正确", "正确"], "这是不正确的", 0),
        (["one", "two"], "three", None),
        (["İ", "x"], "İx x İ", 1),
    ],
)
def test_the_first_label_is_named(labels, text, index):
    assert first_named(labels, text) == index
