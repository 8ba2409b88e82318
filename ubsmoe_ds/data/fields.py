"""Fields of rows in their raw form: read, checked, and made into the forms that formats.py returns.

Imports no torch. A message names fields, never what they hold.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ubsmoe_ds.data.schema import PlacedRow, Row, checked_row, refuse

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
        "task": task or name_of(row, "task", "questions"),
        "id": name_of(row, "id", row.place),
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
        refuse(row, field, f"is {'blank' if value == '' else kind_of(value)}, must be a text")
    return value


def messages_of(row: PlacedRow, field: str, *, answered: bool = True) -> list[dict[str, str]]:
    """Return the messages of a field, with the roles of chat templates.

    Args:
        row: the row.
        field: a list of objects with role and content, or from and value.
        answered: whether one of them must be the assistant's.
    """
    value = row.get(field)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        refuse(row, field, f"is {kind_of(value)}, must be a list of messages")
    messages = [_message(row, message, f"{field}.{number}") for number, message in enumerate(value)]
    if answered and not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        refuse(row, field, "holds no message of the assistant, which is what is learned")
    return messages


def _message(row: PlacedRow, message: Any, field: str) -> dict[str, str]:
    """Return a message as role and text; calls of tools become text, of other keys nothing is read."""
    if not isinstance(message, Mapping):
        refuse(row, field, f"is {kind_of(message)}, must be an object with role and content")
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
        refuse(row, f"{field}.content", f"is {kind_of(content)}, must be a text")
    return {"role": ROLES[role], "content": content}


def texts_of_field(row: PlacedRow, value: Any, field: str) -> list[str]:
    """Return the value of a field that must be a list of 2 to 26 texts."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(t, str) and t for t in value):
        refuse(row, field, "must be a list of texts")
    if not 2 <= len(value) <= len(LETTERS):
        refuse(row, field, f"holds {len(value)} texts, must hold 2 to {len(LETTERS)}")
    return list(value)


def index_of(row: PlacedRow, field: str, count: int) -> int:
    """Return the index that a field holds, as a number or as digits."""
    value = row.get(field)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,2}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        refuse(row, field, f"must be a whole number from 0 to {count - 1}")
    return value


def name_of(row: Raw, field: str, default: str) -> str:
    """Return `task` or `id` of a row, where it has one."""
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) and value.strip() else default


def kind_of(value: Any) -> str:
    """Return what a value of the wrong kind is, without its content."""
    return "missing" if value is None else f"of type {type(value).__name__}"
