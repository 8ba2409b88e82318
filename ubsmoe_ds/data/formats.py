"""Read rows of any format of config/formats.py into one of three forms, and say of a bad row what is wrong with it.

A row that was read is one of these; `task` and `id` name its category and itself.

    question with choices   the schema of schema.py
    conversation            messages: [{role, content}], given: how many of them are given, and not learned
    prompt and completion   prompt, completion; a plain text is a completion without prompt

Imports no torch. A message names fields, never what they hold.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.errors import RowError, UserError
from ubsmoe_ds.base.files import read_text
from ubsmoe_ds.config.formats import AUTO, CLOZE, FORMATS, fitting, near
from ubsmoe_ds.data.fields import (
    LETTERS,
    Raw,
    index_of,
    kind_of,
    messages_of,
    name_of,
    question,
    text,
    texts_of_field,
    turns,
)
from ubsmoe_ds.data.schema import PlacedRow, Row, as_cloze, checked_row, content, refuse

MOST_BYTES = 2**18  # of a chat template; the longest of known models have 20 KB
SHOWN = 8  # fields of a bad row that a message names


def format_of(row: Raw, asked: str, place: str) -> str:
    """Return the format of rows, by the fields of the first one; those that are null do not count.

    Args:
        row: the first row, with the format's names of its fields.
        asked: as `data.format`.
        place: of the row.

    Raises:
        RowError: if no format fits, or several do.
    """
    if asked in FORMATS:
        return asked
    fields = [field for field, value in row.items() if value is not None]
    names = [name for name, form in FORMATS.items() if form.choices or asked == AUTO]
    fits = fitting(fields, names)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise RowError(
            f"data: {place}: could be {' or '.join(fits)} (fields {_shown(fields)}); set data.format to one", row
        )
    nearest = near(fields, names)
    lacks = ", ".join(f"{name} (lacks {_lacking(name, fields)})" for name in nearest[:3])
    what = "no format" if asked == AUTO else f"no format with choices, which data.format={CLOZE} needs"
    raise RowError(
        f"data: {place}: fits {what}: its fields are {_shown(fields)}; near are {lacks}; map names with data.columns, "
        f"such as {{{FORMATS[nearest[0]].fields[0]}: NAME}}; a good row: {_example(nearest[0])}",
        row,
    )


def read_row(
    raw: Any,
    name: str,
    place: str,
    columns: Mapping[str, str],
    *,
    cloze: bool = False,
    kept: Mapping[str, str | None] | None = None,
) -> Row:
    """Return a row in the form that its format is read into.

    Args:
        raw: the row as its file has it.
        name: its format.
        place: file and line.
        columns: as `data.columns`: name of a field in the format -> its name in the file.
        cloze: whether questions with choices are asked as a cloze.
        kept: name in the row -> field of the file whose value is kept under it, such as `data.label_column`.

    Raises:
        RowError: naming place and field.
    """
    named = renamed(raw, place, columns)
    try:
        row = globals()[FORMATS[name].function](PlacedRow(named, place))
    except RowError as error:
        hint = f"; its fields are {_shown(named)}; a good row of format {name}: {_example(name)}"
        raise error.adding(hint) from error
    row = PlacedRow({"task": name_of(named, "task", name), "id": name_of(named, "id", place), **row}, place)
    row |= {key: _value(named, field, place) for key, field in (kept or {}).items() if field is not None}
    try:
        "\0".join([row["task"], row["id"], row.get("group", ""), row.get("owner", ""), *content(row)]).encode()
    except UnicodeEncodeError:
        raise RowError(f"data: {place}: holds characters that are no valid Unicode", raw) from None
    return as_cloze(row) if cloze else row


def read_template(file: str) -> str:
    """Return the text of a chat template's file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return read_text(Path(file), MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"data.chat_template: {file!r} cannot be read ({reason}); name a jinja file") from error


def renamed(raw: Any, place: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with the format's names of its fields.

    Raises:
        RowError: if it is no object, or lacks a field that is to be renamed.
    """
    if not isinstance(raw, Mapping):
        raise RowError(f"data: {place}: is a {type(raw).__name__}, must be an object with the fields of a row", raw)
    missing = [theirs for theirs in columns.values() if theirs not in raw]
    if missing:
        raise RowError(
            f"data: {place}: field {missing[0]!r}, which data.columns names, is missing; its fields are {_shown(raw)}",
            raw,
        )
    return {**raw, **{ours: raw[theirs] for ours, theirs in columns.items()}}


# ---- one function for each format


def chat(row: PlacedRow) -> Row:
    """Read `messages`, each with `role` and `content`."""
    return {"messages": messages_of(row, "messages"), "given": 0}


def sharegpt(row: PlacedRow) -> Row:
    """Read `conversations`, each with `from` and `value`."""
    return {"messages": messages_of(row, "conversations"), "given": 0}


def alpaca(row: PlacedRow) -> Row:
    """Read `instruction`, `input` (it may be missing or empty) and `output` as a conversation of two messages."""
    request = [text(row, "instruction"), *([text(row, "input")] if row.get("input") else [])]
    return turns("\n\n".join(request), text(row, "output"))


def prompt_completion(row: PlacedRow) -> Row:
    """Read `prompt` and `completion`: two texts, or two lists of messages, of which the second's are learned."""
    if isinstance(row.get("prompt"), str):
        return {"prompt": row["prompt"], "completion": text(row, "completion")}
    given = messages_of(row, "prompt", answered=False)
    return {"messages": given + messages_of(row, "completion"), "given": len(given)}


def plain_text(row: PlacedRow) -> Row:
    """Read `text`, all of which is learned."""
    return {"prompt": "", "completion": text(row, "text")}


def multiple_choice(row: PlacedRow) -> Row:
    """Read a question with choices in our own schema."""
    return checked_row(dict(row), row.place)


def mmlu(row: PlacedRow) -> Row:
    """Read `question`, `choices` and `answer`, the right one's index or letter; `subject` is the task."""
    choices = texts_of_field(row, row.get("choices"), "choices")
    letters = list(LETTERS[: len(choices)])
    answer = row.get("answer")
    right = letters.index(str(answer)) if answer in letters else index_of(row, "answer", len(choices))
    return question(row, text(row, "question"), choices, letters, right, task=row.get("subject"))


def arc(row: PlacedRow) -> Row:
    """Read `question`, `choices` with `text` and `label`, and `answerKey`, one of the labels."""
    both = row.get("choices")
    if not isinstance(both, Mapping):
        refuse(row, "choices", f"is {kind_of(both)}, must be an object with text and label")
    choices, labels = (texts_of_field(row, both.get(key), f"choices.{key}") for key in ("text", "label"))
    key = text(row, "answerKey")
    if key not in labels:
        refuse(row, "answerKey", "must be one of choices.label")
    return question(row, text(row, "question"), choices, labels, labels.index(key))


def hellaswag(row: PlacedRow) -> Row:
    """Read `ctx`, `endings` and `label`, the right ending's index."""
    endings = texts_of_field(row, row.get("endings"), "endings")
    right = index_of(row, "label", len(endings))
    return question(row, text(row, "ctx"), endings, list(LETTERS[: len(endings)]), right)


def _value(row: Raw, field: str, place: str) -> str:
    """Return the value of a field that rows are dealt by, as text."""
    value = row.get(field)
    if not isinstance(value, str | int | float) or value == "":
        raise RowError(
            f"data: {place}: field {field!r}, by which rows are dealt, is {kind_of(value)}, must be a text or a "
            f"number; its fields are {_shown(row)}",
            row,
        )
    return str(value)


def _lacking(name: str, fields: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(field for field in FORMATS[name].fields if field not in fields)


def _shown(fields: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the names of a row's fields; one that is no plain name may be content, as in a .csv without header."""
    names = [name for name in fields if isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,39}", name)][:SHOWN]
    others = len(fields) - len(names)
    return ", ".join([*map(repr, names), *([f"{others} others"] if others else [])])


def _example(name: str) -> str:
    return json.dumps(FORMATS[name].example)
