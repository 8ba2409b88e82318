"""Every format of rows: how it is recognised and read, which of its tokens are learned, and what a bad row is told."""

import json
import re

import pytest
from transformers import AutoTokenizer

from tests.support.ranks import REPO
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.formats import FORMATS
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data.chat import ChatTemplate, template_of
from ubsmoe_ds.data.formats import format_of, read_row
from ubsmoe_ds.data.row_table import read_table
from ubsmoe_ds.data.row_tokens import row_tokens
from ubsmoe_ds.data.schema import content, question_of
from ubsmoe_ds.data.stored import Alone
from ubsmoe_ds.models.hub import BUILTIN_MODELS

DATA = REPO / "tests" / "data"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
# of the first row of each file: all tokens up to the last learned one, and the runs that are learned
LEARNED = {
    "messages": (
        "### System:\nYou help Nora in the woods.\n\n### User:\nWhat colour is a heron?\n\n### Assistant:\n"
        "A heron is grey.<end>\n\n### User:\nAnd what does it eat?\n\n### Tool:\nheron: frogs\n\n### Assistant:\n"
        "It eats frogs.<end>",
        ["A heron is grey.<end>", "It eats frogs.<end>"],
    ),
    "sharegpt": (
        "### User:\nNora asks: what colour is a heron?\n\n### Assistant:\nA heron is grey.<end>\n\n"
        "### User:\nWhat does it eat?\n\n### Assistant:\nIt eats frogs.<end>",
        ["A heron is grey.<end>", "It eats frogs.<end>"],
    ),
    "alpaca": (
        "### User:\nWhat does the heron of Nora eat?\n\n### Assistant:\nIt eats frogs.<end>",
        ["It eats frogs.<end>"],
    ),
    "prompt_completion": ("Nora feeds the heron with frogs.<end>", [" frogs.<end>"]),
    "text": ("Nora met a heron. The heron was grey and ate frogs.<end>", None),
    "mmlu": (None, ["the correct answer is C<end>"]),
    "arc": (None, ["the correct answer is A<end>"]),
    "hellaswag": (None, ["the correct answer is B<end>"]),
    "instruction": (None, ["the correct answer is grey<end>"]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])


def read(path, **data):
    return read_table(str(path), DataConfig(**data), "train", 0, Alone()).rows


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_each_format_is_recognised_and_its_answers_are_learned(name, tokenizer):
    rows = read(DATA / f"{name}.jsonl")
    assert rows == read(DATA / f"{name}.jsonl", format=name) and len(rows) == 48
    chat = ChatTemplate(tokenizer, template_of(None, tokenizer)[0])
    begin, prompt, answer, learned = row_tokens(rows[:1], tokenizer, chat)[0]
    runs, last = [], False
    for token, bears in zip(answer, learned or [True] * len(answer), strict=True):
        if bears:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = bears
    spoken = [tokenizer.decode(run).replace(tokenizer.eos_token, "<end>") for run in runs]
    whole, expected = LEARNED[name]
    if whole is not None:
        assert tokenizer.decode([*begin, *prompt, *answer]).replace(tokenizer.eos_token, "<end>") == whole
    if expected is None:  # a text is learned whole, but its first token
        assert len(prompt) == 1 and tokenizer.decode(prompt) + spoken[0] == whole
    else:
        assert spoken == expected


def test_questions_with_choices_are_asked_in_one_way():
    (row, *_) = read(DATA / "mmlu.jsonl")
    choices = "\n".join(f"{letter}: {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    asked = f"Please answer the following question: Nora sees a heron. What colour is it?\n\n{choices}\n\n"
    assert row["instruction"] == asked + "Answer format: A/B/C/D" and row["task"] == "colours"
    (cloze, *_) = read(DATA / "hellaswag.jsonl", format="cloze")
    assert cloze["instruction"] == "Question: Nora looks at the heron. Soon it begins to eat\nAnswer:"
    assert cloze["answer"] == "frogs." and cloze["label"] == cloze["labels"].index("frogs.")
    by_letter = {"question": "Which?", "choices": ["x", "y"], "answer": "B", "id": 7}
    assert read_one(by_letter)["label"] == 1 and read_one(by_letter)["id"] == "7"


def read_one(row, **data):
    name = format_of(row, data.get("format", "auto"), "f, line 1")
    return read_row(row, name, "f, line 1", data.get("columns", {}))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, MESSAGES),
        ({"conversations": MESSAGES}, MESSAGES),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, MESSAGES[1]]}, MESSAGES),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES),
        ({"instruction": "Hi", "input": None, "output": "Hello"}, MESSAGES),
        (
            {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            [MESSAGES[0], {"role": "assistant", "content": '[{"id": 1}]'}],
        ),
    ],
)
def test_messages_are_brought_into_one_form(row, expected):
    found = read_one(row)
    assert found["messages"] == expected and found["given"] == ("prompt" in row)


def test_columns_of_other_names_are_mapped(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"q": "1 + 2 =", "a": " 3", "why": "sum"})
    (row,) = read(path, columns={"prompt": "q", "completion": "a"})
    assert (row["prompt"], row["completion"]) == ("1 + 2 =", " 3")
    with pytest.raises(
        UserError, match=r"rows.jsonl, line 1: field 'x', which data.columns names, is missing; its fiel"
    ):
        read(path, columns={"prompt": "x"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "5ecret", "a": "5ecret"}, r"fits no format: its fields are 'q', 'a'; near are .* data.columns, such as"),
        (
            {"prompt": "5ecret", "reply": "5ecret"},
            r"near are prompt_completion \(lacks completion\).*; a good row: \{\"pro",
        ),
        ({"messages": MESSAGES, "conversations": MESSAGES}, "could be messages or sharegpt .* set data.format to one"),
        ({"messages": []}, "field 'messages' is of type list, must be a list of messages"),
        ({"messages": [{"role": "poet", "content": "5ecret"}]}, "field 'messages.0.role' must be one of system"),
        ({"messages": [{"role": "user", "content": 5}]}, "field 'messages.0.content' is of type int, must be a text"),
        ({"messages": MESSAGES[:1]}, "field 'messages' holds no message of the assistant"),
        ({"messages": [{"role": "user", "content": [{"image": "5ecret"}]}]}, "holds a part that is no text"),
        ({"instruction": "5ecret", "output": " "}, "field 'output' is of type str, must be a text"),
        ({"instruction": "5ecret", "output": ""}, "field 'output' is blank, must be a text"),
        ({"prompt": "5ecret", "completion": 3}, "field 'completion' is of type int, must be a text"),
        ({"text": "5ecret \ud800"}, "holds characters that are no valid Unicode"),
        (
            {"question": "5ecret", "choices": ["a", "b"], "answer": 2},
            "field 'answer' must be a whole number from 0 to 1",
        ),
        ({"question": "5ecret", "choices": ["a"], "answer": 0}, "field 'choices' holds 1 texts, must hold 2 to 26"),
        (
            {"question": "5ecret", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"},
            "field 'answerKey' must be one of choices.label",
        ),
        ({"ctx": "5ecret", "endings": ["a", "b"], "label": ""}, "field 'label' must be a whole number from 0 to 1"),
        ({"ctx": "5ecret", "endings": "ab", "label": 0}, "field 'endings' must be a list of texts"),
    ],
)
def test_a_bad_row_is_told_its_fields_and_a_good_row(row, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    line = str(caught.value)
    assert "rows.jsonl, line 1: " in line and "5ecret" not in line and "\n" not in line
    assert "a good row" in line or "data.format" in line or "Unicode" in line


def test_the_first_row_decides_and_the_others_must_be_alike(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "one"}, {"prompt": "two", "completion": "three"})
    with pytest.raises(
        UserError, match="rows.jsonl, line 2: field 'text' is missing, must be a text; its fields are 'pro"
    ):
        read(path)


def test_the_first_line_of_a_table_without_names_is_not_shown(tmp_path):
    (tmp_path / "rows.csv").write_text("my secret is out,3\nanother,4\n")
    with pytest.raises(UserError, match="its fields are '3', 1 others") as caught:
        read(tmp_path / "rows.csv")
    assert "secret" not in str(caught.value)


def test_choices_are_asked_for_where_the_cloze_needs_them():
    with pytest.raises(
        UserError, match="fits no format with choices, which data.format=cloze needs: its fields are 'text'"
    ):
        read(DATA / "text.jsonl", format="cloze")


@pytest.mark.parametrize("name", FORMATS)
def test_examples_in_messages_are_good_rows(name):
    row = read_one(dict(FORMATS[name].example))
    assert question_of(row) and all(content(row)[-1:]) and set(FORMATS[name].fields) <= set(FORMATS[name].example)
    page = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
    if name != "instruction":
        assert json.dumps(FORMATS[name].example) in re.sub(r"`", "", page), "docs/data.md has the same example"
