"""No row is longer than `data.max_length`; what is cut or dropped is counted and printed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data.batches import encode, steps
from ubsmoe_ds.data.encoding import read_encoder
from ubsmoe_ds.data.evaluation_rows import pack
from ubsmoe_ds.data.lengths import LEAST_PROMPT, Lengths, by_name, fit, fit_row
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.data.sources import Unused
from ubsmoe_ds.models.hub import BUILTIN_MODELS

TOKENIZER = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])


def row(prompt: int, answer: int, other: int = 1) -> dict:
    """Return a row whose prompt, right answer and other option are so many words of one token."""
    labels = [" red" * answer, " red" * other + " box"]
    return {"task": "t", "id": f"{prompt}-{answer}", "instruction": " red" * prompt, "answer": labels[0]} | {
        "question": "?",
        "choices": ["x", "y"],
        "labels": labels,
        "label": 0,
    }


def test_the_rule_by_hand():
    """Of 30 tokens the beginning takes 1 and the answer 9: 20 are left for the prompt; 15 would be too few."""
    prompt = list(range(100, 140))
    assert fit([1], prompt[:20], 9, 30) == [1, *prompt[:20]]
    assert fit([1], prompt, 9, 30) == [1, *prompt[-20:]]
    assert fit([1], prompt, 13, 30) == [1, *prompt[-16:]] and LEAST_PROMPT == 16
    assert fit([1], prompt, 14, 30) is None
    assert fit([1], prompt[:3], 26, 30) == [1, *prompt[:3]], "a short prompt may be shorter than a cut one"
    assert fit([1], prompt[:3], 27, 30) is None and fit([1], prompt[:3], 500, 30) is None


def test_the_other_rules_by_hand():
    """Of 12 tokens the beginning takes 1: prompts of 7, 8, 10, 11 leave an answer of 4 its 4, 3, 1 or no tokens."""
    prompt, answer = list(range(100, 140)), [7, 8, 9, 1]
    found = [fit_row([1], prompt[:n], answer, 12, "cut_end") for n in (7, 8, 10, 11)]
    whole = [[1, *prompt[:n]] for n in (7, 8, 10)]
    assert found == [(whole[0], answer), (whole[1], answer[:3]), (whole[2], answer[:1]), None]
    assert [fit_row([1], prompt[:n], answer, 12, "drop") for n in (7, 8)] == [(whole[0], answer), None]
    assert fit([1], prompt, 9, 30, "drop") is None and fit([1], prompt, 9, 30, "cut_end") is None
    assert fit_row([1], prompt, [2] * 9, 30, "cut_prompt") == ([1, *prompt[-20:]], [2] * 9)


def test_rows_that_lose_their_end_are_counted():
    """Of 40 tokens: 10 + 5 fit, 30 + 30 loses 20 of its answer and end-of-text, a prompt of 60 leaves it no room."""
    rows = [row(10, 5), row(30, 30), row(60, 5)]
    examples, lengths = encode(rows, TOKENIZER, 40, overlong="cut_end")
    assert lengths == Lengths(kept=2, cut=1, dropped=1)
    whole, _ = encode(rows, TOKENIZER, 10**6)
    assert examples[0] == whole[0] and examples[1].prompt == whole[1].prompt
    assert whole[1].answer[: len(examples[1].answer)] == examples[1].answer
    assert len(examples[1].prompt) + len(examples[1].answer) == 40
    assert encode(rows, TOKENIZER, 40, overlong="drop")[1] == Lengths(kept=1, cut=0, dropped=2)
    for rule in ("cut_end", "drop"):
        assert [found is None for found in pack(rows, TOKENIZER, 40, overlong=rule)] == [False, True, True]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
    st.integers(8, 70),
)
def test_no_row_is_longer_than_the_limit(sizes, limit):
    rows = [row(*size) for size in sizes]
    examples, lengths = encode(rows, TOKENIZER, limit)
    whole, _ = encode(rows, TOKENIZER, 10**6)
    assert lengths.rows == len(rows) and lengths.kept == len(examples)
    answers = [example.answer for example in whole]
    for example in examples:
        assert len(example.prompt) + len(example.answer) <= limit and example.answer in answers, "answers are not cut"
    for packed in pack(rows, TOKENIZER, limit):
        assert packed is None or packed.longest <= limit
    if examples:
        batch = next(steps(examples, batch_size=4, micro_batches=1, rank=0, ranks=1, pad=0, seed=(0,)))
        assert batch.micro[0].input_ids.shape[1] < limit


def test_cut_and_dropped_rows_are_counted():
    """Of 40 tokens: 10 + 5 fit, 60 + 5 lose some prompt, 60 + 30 and 5 + 100 are dropped (end-of-text counts)."""
    rows = [row(10, 5), row(60, 5), row(60, 30), row(5, 100)]
    examples, lengths = encode(rows, TOKENIZER, 40)
    assert lengths == Lengths(kept=2, cut=1, dropped=2) and [len(e.answer) for e in examples] == [6, 6]
    assert len(examples[1].prompt) == 40 - 6
    packed = pack([*rows, row(10, 5, other=100)], TOKENIZER, 40)
    assert [p is None for p in packed] == [False, False, True, True, True], "each option must fit"
    assert [p.cut for p in packed[:2]] == [False, True]


def test_a_client_whose_rows_all_are_too_long_is_named():
    exp = tiny.experiment("builtin:tiny_olmoe", [{"budget": 1.0}], data={"max_length": 20})
    encoder = read_encoder(exp)
    with pytest.raises(
        UserError, match="data.max_length: 20 is too short for each of the 2 training rows of client 'x'"
    ):
        encoder.encode([row(60, 30), row(60, 40)], "x")
    with pytest.raises(UserError, match="data.max_length: 20 is too short for each of the 1 evaluation rows; raise it"):
        encoder.pack([row(60, 30)])
    assert len(encoder.pack([row(60, 30), row(3, 3)])) == 1


NONE = Unused(0, 0, 0)


def test_lines_say_which_rows_were_left_out():
    counts = {"phone": Lengths(9, 0, 1), "server": Lengths(20, 0, 0)}
    setting = DataConfig(rows=30, eval_rows=7)
    common = RowReport(counts, Lengths(7, 0, 0), [], [Unused(3, 2, 5)])
    assert list(common.lines(setting))[:3] == [
        "note: data.eval_source: 3 of 35 training rows are left out: they are evaluation rows too, with the same "
        "prompt and answer",
        "note: data.rows=30: 2 of 35 training rows are left out",
        "note: data.eval_rows=7: 5 of 12 evaluation rows are left out",
    ]
    sites = RowReport(counts, Lengths(7, 0, 0), [], [Unused(0, 1, 5), Unused(4, 0, 5)])
    first, second, third, *_ = sites.lines(setting)
    assert "4 of 35 training rows are left out (server 4):" in first
    assert third.endswith("5 of 12 evaluation rows are left out")
    assert second == "note: data.rows=30: 1 of 35 training rows are left out (phone 1)"
    assert common.record()["unused"] == [{"evaluated": 3, "beyond_rows": 2, "beyond_eval_rows": 5}]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            "cut_end",
            [
                "rows lose their end (a 3)",
                "their prompts leave no room for an answer",
                "longer (data.overlong=cut_end)",
            ],
        ),
        ("drop", ["prompts", "they are longer (data.overlong=drop); raise it", "longer (data.overlong=drop)"]),
    ],
)
def test_lines_name_the_rule(rule, expected):
    cut = 3 if rule == "cut_end" else 0
    report = RowReport({"a": Lengths(9, cut, 2)}, Lengths(5, 0, 2), ["q1", "q2"], [NONE])
    lines = list(report.lines(DataConfig(overlong=rule)))
    assert len(lines) == 2 + bool(cut)
    for line, part in zip(lines, expected if cut else expected[1:], strict=True):
        assert part in line


def test_lines_say_what_was_cut_and_dropped_of_whom():
    report = RowReport(
        {"phone": Lengths(9, 3, 0), "server": Lengths(20, 0, 2)}, Lengths(5, 1, 2), ["q1", "q17"], [NONE]
    )
    lines = list(report.lines(DataConfig(max_length=64)))
    assert lines == [
        "note: data.max_length=64: 3 of 31 training prompts lose their beginning (phone 3)",
        "warning: data.max_length=64: 2 of 31 training rows are dropped (server 2): their answers leave fewer than 16 "
        "tokens for the prompt; raise it",
        "note: data.max_length=64: 1 of 7 evaluation prompts lose their beginning",
        "warning: data.max_length=64: 2 of 7 evaluation rows are dropped ('q1', 'q17'): their answers leave fewer than "
        "16 tokens for the prompt; raise it",
    ]
    assert report.record()["training"]["server"] == {"kept": 20, "cut": 0, "dropped": 2}
    assert not list(RowReport({"a": Lengths(9, 0, 0)}, Lengths(5, 0, 0), [], [NONE]).lines(DataConfig()))
    assert by_name("abcdefg") == " ('a', 'b', 'c', 'd', 'e', ...)"
