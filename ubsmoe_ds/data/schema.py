"""Check that a question with choices has its schema, and say of a bad row where it is and which field is wrong.

A message never says what a field holds. Schema: task (str), id (str), instruction (str, the prompt), answer (str),
question (str), choices (list of str), labels (list of str, how an answer names each choice), label (index of the right
choice). `answer` contains `labels[label]` as a separate word (words.py). A row's other options are `answer` with the
last such word replaced by another label. Texts are in NFC.
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


def question_of(row: Row) -> str:
    """Return what a row asks, by which rows are split and ordered."""
    if "choices" in row:
        return row["question"]
    if "messages" in row:
        asked = []
        for number, message in enumerate(row["messages"]):
            if message["role"] == "assistant" and number >= row["given"]:
                break
            asked.append(f"{message['role']}: {message['content']}")
        return "\n".join(asked) or row["messages"][0]["content"]
    return row["prompt"] or row["completion"]


def content(row: Row) -> tuple[str, ...]:
    """Return what makes a row the same as another, its prompt and its answer, in NFC."""
    if "choices" in row:
        return row["instruction"], row["answer"]
    if "messages" in row:
        return tuple(nfc(text) for message in row["messages"] for text in (message["role"], message["content"]))
    return nfc(row["prompt"]), nfc(row["completion"])


def whole_text(row: Row) -> str:
    """Return a row as one text, without a template."""
    if "instruction" in row:
        return f"{row['instruction']}\n{row['answer']}"
    if "messages" in row:
        return "\n\n".join(message["content"] for message in row["messages"])
    return row["prompt"] + row["completion"]


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
            refuse(row, field, f"is {_kind(row.get(field))}, must be a text")
    for field in ("choices", "labels"):
        texts = row.get(field)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            refuse(row, field, f"is {_kind(texts)}, must be a list of texts")
    choices, labels = len(row["choices"]), len(row["labels"])
    if choices != labels:
        raise RowError(f"data: {place}: has {choices} choices but {labels} labels", row["labels"])
    if labels < 2:
        refuse(row, "labels", "holds one label, must hold at least two")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < labels:
        refuse(row, "label", f"must be a whole number from 0 to {labels - 1}")
    row |= {field: nfc(row[field]) for field in TEXT_FIELDS}
    row |= {field: [nfc(text) for text in row[field]] for field in ("choices", "labels")}
    if len(set(row["labels"])) != labels:
        refuse(row, "labels", "must not repeat a label")
    if not occurrences(row["labels"][label], row["answer"]):
        refuse(row, "answer", "must contain the label that `label` counts to, as a word")
    for field in (*TEXT_FIELDS, "choices", "labels"):
        try:
            "".join(row[field]).encode()
        except UnicodeEncodeError:
            refuse(row, field, "holds characters that are no valid Unicode")
    return row


def as_cloze(row: Row) -> Row:
    """Return the row as a cloze: the question alone, answered by the text of a choice, for models without instructions.

    A choice that a row holds twice is one option.

    Raises:
        RowError: if all its choices are the same.
    """
    choices = list(dict.fromkeys(row["choices"]))
    if len(choices) == 1:
        refuse(row, "choices", "offers one choice alone; a cloze row needs two")
    answer = row["choices"][row["label"]]
    changed = {"instruction": f"Question: {row['question']}\nAnswer:", "answer": answer}
    changed |= {"choices": choices, "labels": choices, "label": choices.index(answer)}
    return PlacedRow(row | changed, getattr(row, "place", "a row"))


def refuse(row: Row, field: str, problem: str) -> NoReturn:
    """Raise the error of a bad field: where it is, and what is wrong."""
    raise RowError(f"data: {place_of(row, field)} {problem}", row.get(field))


def _kind(value: Any) -> str:
    """Return what a field of the wrong kind is, without its content."""
    if value is None:
        return "missing"
    if isinstance(value, str | list):
        return "blank" if isinstance(value, str) else "empty" if not value else "a list of other things"
    return f"of type {type(value).__name__}"
