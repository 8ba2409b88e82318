"""Find a label in a text as a word of its own, in scripts that put spaces between words and in those that do not.

Texts are compared in NFC, Unicode's composed form. Rows are brought into it when they are read, and generated text when
it is parsed.
"""

import unicodedata
from collections.abc import Sequence

# blocks of scripts without spaces: Thai to Myanmar, Khmer, kana to Han, and Han beyond the first plane
SPACELESS = (
    (0x0E00, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x20000, 0x3FFFF),
)


def nfc(text: str) -> str:
    """Return the text in Unicode's composed form, in which equal characters are equal."""
    return unicodedata.normalize("NFC", text)


def occurrences(label: str, text: str) -> list[int]:
    """Return where the label begins in the text as a word of its own: answer1 does not occur in answer10.

    Beside a character of a script without spaces any place may be the end of a word: A occurs in 答案是A。
    """
    starts, start = [], text.find(label)
    while start >= 0:
        end = start + len(label)
        before, after = text[start - 1 : start], text[end : end + 1]
        if not _continues(before, label[0], after=False) and not _continues(after, label[-1], after=True):
            starts.append(start)
        start = text.find(label, start + 1)
    return starts


def first_named(labels: Sequence[str], text: str) -> int | None:
    """Return the index of the label that occurs first in the text, the longest of those at one place; None: none does.

    Case does not count, but in labels of one letter (the article a is not the label A) and where labels differ in
    nothing else.
    """
    folded = [_fold(label) for label in labels]
    ignores_case = len(set(folded)) == len(labels)
    folded_text, found = _fold(text), []
    for index, label in enumerate(labels):
        fold = ignores_case and len(label) > 1
        starts = occurrences(folded[index], folded_text) if fold else occurrences(label, text)
        found += [(starts[0], -len(label), index)] if starts else []
    return min(found)[2] if found else None


def _continues(neighbour: str, edge: str, after: bool) -> bool:
    """Return whether a neighbour of a label's outermost character belongs to the same word."""
    if not neighbour:
        return False
    mark = unicodedata.category(neighbour).startswith("M")
    if mark and after:
        return True  # it is a part of the label's last letter
    return (mark or neighbour.isalnum() or neighbour == "_") and not _spaceless(neighbour) and not _spaceless(edge)


def _spaceless(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in SPACELESS)


def _fold(text: str) -> str:
    """Return the text in lower case, of the same length."""
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
