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
from typing import Any

from ubsmoe_ds.base.errors import RowError
from ubsmoe_ds.config.formats import AUTO, CLOZE, FORMATS, fitting, near
from ubsmoe_ds.data.schema import PlacedRow, Row, as_cloze, checked_row, refuse

Raw = Mapping[str, Any]
# names that data sets give to the roles of a chat template
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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


def read_row(raw: Any, name: str, place: str, columns: Mapping[str, str], *, cloze: bool = False) -> Row:
    """Return a row in the form that its format is read into.

    Args:
        raw: the row as its file has it.
        name: its format.
        place: file and line.
        columns: as `data.columns`: name of a field in the format -> its name in the file.
        cloze: whether questions with choices are asked as a cloze.

    Raises:
        RowError: naming place and field.
    """
    named = renamed(raw, place, columns)
    try:
        row = globals()[FORMATS[name].function](PlacedRow(named, place))
    except RowError as error:
        hint = f"; its fields are {_shown(named)}; a good row of format {name}: {_example(name)}"
        raise error.adding(hint) from error
    row = PlacedRow({"task": _name(named, "task", name), "id": _name(named, "id", place), **row}, place)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(f"data: {place}: holds characters that are no valid Unicode", raw) from None
    return as_cloze(row) if cloze else row


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
    return {"messages": _messages(row, "messages"), "given": 0}


def sharegpt(row: PlacedRow) -> Row:
    """Read `conversations`, each with `from` and `value`."""
    return {"messages": _messages(row, "conversations"), "given": 0}


def alpaca(row: PlacedRow) -> Row:
    """Read `instruction`, `input` (it may be missing or empty) and `output` as a conversation of two messages."""
    request = [text(row, "instruction"), *([text(row, "input")] if row.get("input") else [])]
    return turns("\n\n".join(request), text(row, "output"))


def prompt_completion(row: PlacedRow) -> Row:
    """Read `prompt` and `completion`: two texts, or two lists of messages, of which the second's are learned."""
    if isinstance(row.get("prompt"), str):
        return {"prompt": row["prompt"], "completion": text(row, "completion")}
    given = _messages(row, "prompt", answered=False)
    return {"messages": given + _messages(row, "completion"), "given": len(given)}


def plain_text(row: PlacedRow) -> Row:
    """Read `text`, all of which is learned."""
    return {"prompt": "", "completion": text(row, "text")}


def multiple_choice(row: PlacedRow) -> Row:
    """Read a question with choices in our own schema."""
    return checked_row(dict(row), row.place)


def mmlu(row: PlacedRow) -> Row:
    """Read `question`, `choices` and `answer`, the right one's index or letter; `subject` is the task."""
    choices = _texts(row, row.get("choices"), "choices")
    letters = list(LETTERS[: len(choices)])
    answer = row.get("answer")
    right = letters.index(str(answer)) if answer in letters else _index(row, "answer", len(choices))
    return question(row, text(row, "question"), choices, letters, right, task=row.get("subject"))


def arc(row: PlacedRow) -> Row:
    """Read `question`, `choices` with `text` and `label`, and `answerKey`, one of the labels."""
    both = row.get("choices")
    if not isinstance(both, Mapping):
        refuse(row, "choices", f"is {_kind(both)}, must be an object with text and label")
    choices, labels = (_texts(row, both.get(key), f"choices.{key}") for key in ("text", "label"))
    key = text(row, "answerKey")
    if key not in labels:
        refuse(row, "answerKey", "must be one of choices.label")
    return question(row, text(row, "question"), choices, labels, labels.index(key))


def hellaswag(row: PlacedRow) -> Row:
    """Read `ctx`, `endings` and `label`, the right ending's index."""
    endings = _texts(row, row.get("endings"), "endings")
    right = _index(row, "label", len(endings))
    return question(row, text(row, "ctx"), endings, list(LETTERS[: len(endings)]), right)


# ---- what they are made of


def turns(request: str, reply: str) -> Row:
    """Return a conversation of one question and its answer."""
    return {
        "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": reply}],
        "given": 0,
    }


def question(
    row: PlacedRow, asked: str, choices: list[str], labels: list[str], right: int, task: str | None = None
) -> Row:
    """Return a question with choices in our schema, asked as the built-in tasks are."""
    options = "\n".join(f"{label}: {choice}" for label, choice in zip(labels, choices, strict=False))
    made = {
        "task": task or _name(row, "task", "questions"),
        "id": _name(row, "id", row.place),
        "instruction": f"Please answer the following question: {asked}\n\n{options}\n\n"
        f"Answer format: {'/'.join(labels)}",
        "answer": f"the correct answer is {labels[right]}",
        "question": asked,
        "choices": choices,
        "labels": labels,
        "label": right,
    }
    return checked_row(made, row.place)


def text(row: PlacedRow, field: str) -> str:
    """Return a field that must hold a text that is not blank.

    Raises:
        RowError: if it does not.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        refuse(
            row, field, f"is {'missing' if value is None else 'blank' if value == '' else _kind(value)}, must be a text"
        )
    return value


def _messages(row: PlacedRow, field: str, *, answered: bool = True) -> list[dict[str, str]]:
    """Return the messages of a field, with the roles of chat templates.

    Args:
        row: the row.
        field: a list of objects with role and content, or from and value.
        answered: whether one of them must be the assistant's.
    """
    value = row.get(field)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        refuse(row, field, f"is {_kind(value)}, must be a list of messages")
    messages = [_message(row, message, f"{field}.{number}") for number, message in enumerate(value)]
    if answered and not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        refuse(row, field, "holds no message of the assistant, which is what is learned")
    return messages


def _message(row: PlacedRow, message: Any, field: str) -> dict[str, str]:
    """Return a message as role and text; calls of tools become text, of other keys nothing is read."""
    if not isinstance(message, Mapping):
        refuse(row, field, f"is {_kind(message)}, must be an object with role and content")
    role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in ROLES:
        refuse(row, f"{field}.role", f"must be one of {', '.join(ROLES)}")
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as of images and texts
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            refuse(row, f"{field}.content", "holds a part that is no text")
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    if calls:
        content = "\n".join([*([content] if content else []), json.dumps(calls, ensure_ascii=False)])
    if not isinstance(content, str):
        refuse(row, f"{field}.content", f"is {_kind(content)}, must be a text")
    return {"role": ROLES[role], "content": content}


def _texts(row: PlacedRow, value: Any, field: str) -> list[str]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(t, str) and t for t in value):
        refuse(row, field, "must be a list of texts")
    if not 2 <= len(value) <= len(LETTERS):
        refuse(row, field, f"holds {len(value)} texts, must hold 2 to {len(LETTERS)}")
    return list(value)


def _index(row: PlacedRow, field: str, count: int) -> int:
    """Return the index that a field holds, as a number or as digits."""
    value = row.get(field)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,2}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        refuse(row, field, f"must be a whole number from 0 to {count - 1}")
    return value


def _name(row: Raw, field: str, default: str) -> str:
    """Return `task` or `id` of a row, where it has one."""
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) and value.strip() else default


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _lacking(name: str, fields: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(field for field in FORMATS[name].fields if field not in fields)


def _shown(fields: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the names of a row's fields; one that is no plain name may be content, as in a .csv without header."""
    names = [name for name in fields if isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,39}", name)][:SHOWN]
    others = len(fields) - len(names)
    return ", ".join([*map(repr, names), *([f"{others} others"] if others else [])])


def _example(name: str) -> str:
    return json.dumps(FORMATS[name].example)
