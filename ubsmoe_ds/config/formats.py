"""The formats of rows: one row each, which names its function in data/formats.py. Imports no torch.

docs/extending.md adds one as an example.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

AUTO, CLOZE = "auto", "cloze"  # values of data.format beside the names of formats
REST = "text"  # fits whatever has a field `text`, so only rows that fit nothing else


@dataclass(frozen=True)
class Format:
    """A form of rows that is recognised by its fields.

    function: its name in data/formats.py; it reads a row.
    fields: those that a row must have; it may have others.
    example: a good row, for messages and docs/data.md.
    choices: whether a row offers choices, of which one is right.
    """

    function: str
    fields: tuple[str, ...]
    example: Mapping[str, Any]
    choices: bool = False


FORMATS: dict[str, Format] = {
    "messages": Format(
        "chat",
        ("messages",),
        {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]},
    ),
    "sharegpt": Format(
        "sharegpt",
        ("conversations",),
        {"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello!"}]},
    ),
    "alpaca": Format(
        "alpaca", ("instruction", "output"), {"instruction": "Add them up.", "input": "1 2", "output": "3"}
    ),
    "prompt_completion": Format(
        "prompt_completion", ("prompt", "completion"), {"prompt": "1 + 2 =", "completion": " 3"}
    ),
    "text": Format("plain_text", ("text",), {"text": "Once upon a time"}),
    "instruction": Format(
        "multiple_choice",
        ("task", "id", "instruction", "answer", "question", "choices", "labels", "label"),
        {
            "task": "sums",
            "id": "1",
            "instruction": "1 + 2? a: 3, b: 4",
            "answer": "the correct answer is a",
            "question": "1 + 2?",
            "choices": ["3", "4"],
            "labels": ["a", "b"],
            "label": 0,
        },
        choices=True,
    ),
    "mmlu": Format(
        "mmlu", ("question", "choices", "answer"), {"question": "1 + 2?", "choices": ["3", "4"], "answer": 0}, True
    ),
    "arc": Format(
        "arc",
        ("question", "choices", "answerKey"),
        {"question": "1 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "A"},
        choices=True,
    ),
    "hellaswag": Format(
        "hellaswag",
        ("ctx", "endings", "label"),
        {"ctx": "One and two", "endings": ["is 3.", "is 4."], "label": 0},
        True,
    ),
}


def fitting(fields: Collection[str], names: Iterable[str]) -> list[str]:
    """Return the formats whose fields a row has; one whose fields are all another's too gives way to it."""
    fits = [name for name in names if set(FORMATS[name].fields) <= set(fields)]
    best = [name for name in fits if not any(set(FORMATS[name].fields) < set(FORMATS[other].fields) for other in fits)]
    return [name for name in best if name != REST] or best


def near(fields: Collection[str], names: Iterable[str]) -> list[str]:
    """Return the formats of which a row has some fields, fewest missing first; all formats if there is none."""
    missing = {name: len(set(FORMATS[name].fields) - set(fields)) for name in names}
    some = [name for name, count in missing.items() if count < len(FORMATS[name].fields)]
    return sorted(some, key=lambda name: missing[name]) or list(missing)
