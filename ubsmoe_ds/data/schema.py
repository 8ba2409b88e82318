"""Check that a row has the schema, and say of a bad one where it is and which field is wrong, never what it holds.

Schema of a row: task (str), id (str), instruction (str, the prompt), answer (str), question (str),
choices (list of str), labels (list of str, how an answer names each choice), label (index of the right choice).
`answer` contains `labels[label]` as a separate word (words.py). A row's other options are `answer` with the last such
word replaced by another label. Texts are in NFC.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from ubsmoe_ds.base.errors import RowError
from ubsmoe_ds.data.words import nfc, occurrences

TEXT_FIELDS = ("task", "id", "instruction", "answer", "question")
Row = dict[str, Any]


class PlacedRow(Row):
    """A row that knows its `place`, a file and a line, for messages. It equals the plain row."""

    def __init__(self, row: Mapping[str, Any], place: str) -> None:
        super().__init__(row)
        self.place = place


def place_of(row: Row, field: str) -> str:
    """Return where a field of a row is, for messages; of a row made by the program only the field."""
    return f"{getattr(row, 'place', 'a row')}: field {field!r}"


def checked_row(row: Any, place: str) -> Row:
    """Return the row if it has the schema.

    Args:
        row: any JSON value.
        place: file and line.

    Raises:
        RowError: naming place and field.
    """
    if not isinstance(row, dict):
        raise RowError(f"data: {place}: is a {type(row).__name__}, must be an object with the fields of a row", row)
    row = PlacedRow(row, place)
    for field in TEXT_FIELDS:
        if not isinstance(row.get(field), str) or not row[field].strip():
            _refuse(row, field, f"is {_kind(row.get(field))}, must be a text")
    for field in ("choices", "labels"):
        texts = row.get(field)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            _refuse(row, field, f"is {_kind(texts)}, must be a list of texts")
    choices, labels = len(row["choices"]), len(row["labels"])
    if choices != labels:
        raise RowError(f"data: {place}: has {choices} choices but {labels} labels", row["labels"])
    if labels < 2:
        _refuse(row, "labels", "holds one label, must hold at least two")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < labels:
        _refuse(row, "label", f"must be a whole number from 0 to {labels - 1}")
    row |= {field: nfc(row[field]) for field in TEXT_FIELDS}
    row |= {field: [nfc(text) for text in row[field]] for field in ("choices", "labels")}
    if len(set(row["labels"])) != labels:
        _refuse(row, "labels", "must not repeat a label")
    if not occurrences(row["labels"][label], row["answer"]):
        _refuse(row, "answer", "must contain the label that `label` counts to, as a word")
    for field in (*TEXT_FIELDS, "choices", "labels"):
        try:
            "".join(row[field]).encode()
        except UnicodeEncodeError:
            _refuse(row, field, "holds characters that are no valid Unicode")
    return row


def as_cloze(row: Row) -> Row:
    """Return the row as a cloze: the question alone, answered by the text of a choice, for models without instructions.

    A choice that a row holds twice is one option.

    Raises:
        RowError: if all its choices are the same.
    """
    choices = list(dict.fromkeys(row["choices"]))
    if len(choices) == 1:
        _refuse(row, "choices", "offers one choice alone; a cloze row needs two")
    answer = row["choices"][row["label"]]
    changed = {"instruction": f"Question: {row['question']}\nAnswer:", "answer": answer}
    changed |= {"choices": choices, "labels": choices, "label": choices.index(answer)}
    return PlacedRow(row | changed, getattr(row, "place", "a row"))


def _refuse(row: Row, field: str, problem: str) -> NoReturn:
    raise RowError(f"data: {place_of(row, field)} {problem}", row.get(field))


def _kind(value: Any) -> str:
    """Return what a field of the wrong kind is, without its content."""
    if value is None:
        return "missing"
    if isinstance(value, str | list):
        return "blank" if isinstance(value, str) else "empty" if not value else "a list of other things"
    return f"of type {type(value).__name__}"
