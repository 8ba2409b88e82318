"""Check rows, their partition, and batches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig, DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.batches import collate, encode, steps
from ubsmoe_ds.data.evaluation_rows import PackedRow, collate_packed, pack
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.row_table import read_table
from ubsmoe_ds.data.sources import evaluation_rows, load_rows
from ubsmoe_ds.data.stored import Alone
from ubsmoe_ds.data.tokenizing import beginning
from ubsmoe_ds.models.hub import BUILTIN_MODELS

COMMONSENSE = Path(__file__).resolve().parents[4] / "shared" / "data" / "commonsense" / "dev.jsonl"
GOOD = {
    "task": "t",
    "id": "1",
    "instruction": "Which?",
    "answer": "the correct answer is b",
    "question": "Which?",
    "choices": ["one", "two"],
    "labels": ["a", "b"],
    "label": 1,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])


def test_synthetic_rows_repeat_and_differ():
    rows = synthetic.rows(400, seed=1)
    assert rows == synthetic.rows(400, seed=1) != synthetic.rows(400, seed=2)
    assert len({row["question"] for row in rows}) == 400
    assert {row["task"] for row in rows} == set(synthetic.TASKS)
    for row in rows:
        assert row["labels"][row["label"]] in row["answer"] and len(set(row["choices"])) == len(row["choices"])


def test_synthetic_answers_are_right():
    """Answers are computed again from the text of the question."""
    checked = 0
    for row in synthetic.rows(800, seed=3):
        words, answer = row["question"].rstrip("?").split(), row["choices"][row["label"]]
        if row["task"] == "sums":
            a, b = int(words[2]), int(words[4])
            assert int(answer) == (a + b if words[3] == "plus" else a - b)
            checked += 1
        elif row["task"] == "legs":
            count = int(words[4]) * synthetic.LEGS[words[5]] + int(words[7]) * synthetic.LEGS[words[8]]
            assert int(answer) == count
            checked += 1
        elif row["task"] == "weekdays":
            start = synthetic.DAYS.index(words[5].rstrip("."))
            assert answer == synthetic.DAYS[(start + int(words[-2])) % 7]
            checked += 1
    assert checked > 200


def test_asking_for_more_rows_than_a_synthetic_world_has_is_an_error():
    with pytest.raises(UserError, match="data.rows: task 'colours' has only 792 different questions; use at most 8712"):
        synthetic.rows(9000, 0)


def test_split_is_by_question_and_repeats():
    train, held_out, _ = load_rows(DataConfig(rows=1000), seed=0)
    assert not {r["question"] for r in train} & {r["question"] for r in held_out}
    assert 50 < len(held_out) < 150 and len(train) + len(held_out) == 1000
    again = load_rows(DataConfig(rows=1000), seed=0)
    assert (train, held_out, (0, 0, 0)) == again


def read_jsonl(path):
    return read_table(f"jsonl:{path}", DataConfig(), "train", 0, Alone()).rows


def save(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:{path}"


def test_rows_of_eval_source_never_train(tmp_path):
    """A row is the same if prompt and answer are, in any form of Unicode; a question that many rows share is none."""
    rows = [GOOD | {"id": str(i), "instruction": f"Caf\u00e9 {i % 4}?", "question": "Which?"} for i in range(8)]
    other_answer = {"answer": "the correct answer is a", "label": 0}
    source = save(tmp_path / "train.jsonl", *rows)
    dev = save(
        tmp_path / "dev.jsonl",
        rows[1] | {"instruction": "Cafe\u0301 1?", "id": "other"},
        rows[2] | other_answer,
    )
    config = DataConfig(source=source, eval_source=dev, rows=5)
    train, held_out, unused = load_rows(config, seed=0)
    assert sorted({row["instruction"][-2] for row in train}) == ["0", "2", "3"] and len(held_out) == 2
    assert (len(train), unused) == (5, (2, 1, 0))  # of 8 rows two ask what is evaluated, and one is over data.rows
    assert load_rows(config.model_copy(update={"eval_rows": 1}), seed=0).unused == (2, 1, 1)


def test_rows_are_compared_as_they_are_shown(tmp_path):
    """As a cloze, two prompts with one question and one answer are the same row."""
    source = save(tmp_path / "train.jsonl", GOOD, GOOD | {"question": "another?"})
    dev = save(tmp_path / "dev.jsonl", GOOD | {"instruction": "asked otherwise"})
    assert len(load_rows(DataConfig(source=source, eval_source=dev), 0).training) == 2
    rows = load_rows(DataConfig(source=source, eval_source=dev, format="cloze"), 0)
    assert [row["question"] for row in rows.training] == ["another?"] and rows.unused == (1, 0, 0)


def test_held_out_rows_beyond_the_limit_are_counted(tmp_path):
    source = save(tmp_path / "rows.jsonl", *(GOOD | {"question": f"Q{i}?"} for i in range(100)))
    rows = load_rows(DataConfig(source=source, eval_rows=3), 0)
    assert len(rows.evaluation) == 3 and len(rows.training) + 3 + rows.unused.beyond_eval_rows == 100


def test_a_source_that_leaves_nothing_says_why(tmp_path):
    source = save(tmp_path / "rows.jsonl", GOOD, GOOD | {"instruction": "the same question again"})
    with pytest.raises(UserError, match=r"leaves no \w+ rows \((they ask 1 questions|0 are evaluation rows)\)"):
        load_rows(DataConfig(source=source), 0)
    with pytest.raises(UserError, match=r"leaves no training rows \(2 are evaluation rows\); give more rows"):
        load_rows(DataConfig(source=source, eval_source=source), 0)


BAD_LINES = {
    "truncated": ('{"task": "t", "id"', "is not a JSON object"),
    "no object": ("[1, 2]", "is a list, must be an object"),
    "invalid UTF-8": (b"\xff\xfe{}", "is not a JSON object"),
    "missing field": (
        json.dumps({k: v for k, v in GOOD.items() if k != "answer"}),
        "field 'answer' is missing, must be a text",
    ),
    "wrong type": (json.dumps(GOOD | {"question": 3}), "field 'question' is of type int, must be a text"),
    "empty choices": (json.dumps(GOOD | {"choices": []}), "field 'choices' is empty, must be a list of texts"),
    "unequal lists": (json.dumps(GOOD | {"labels": ["a", "b", "c"]}), "has 2 choices but 3 labels"),
    "repeated labels": (json.dumps(GOOD | {"labels": ["b", "b"]}), "must not repeat a label"),
    "label out of range": (json.dumps(GOOD | {"label": 2}), "field 'label' must be a whole number from 0 to 1"),
    "boolean label": (json.dumps(GOOD | {"label": True}), "field 'label' must be a whole number"),
    "answer without label": (
        json.dumps(GOOD | {"answer": "the correct answer is c"}),
        "field 'answer' must contain the label",
    ),
    "label within a word": (
        json.dumps(GOOD | {"answer": "the right one is about"}),
        "must contain the label that `label` counts to, as a word",
    ),
    "one option": (
        json.dumps(GOOD | {"choices": ["one"], "labels": ["b"], "label": 0}),
        "field 'labels' holds one label, must hold at least two",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_rows_are_named_by_file_and_line(name, tmp_path):
    line, expected = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    message = str(caught.value)
    assert "rows.jsonl, line 3" in message and expected in message and "\n" not in message


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(tmp_path / "missing.jsonl")


def test_hub_rows_are_checked_and_an_unreachable_hub_is_reported(monkeypatch):
    import datasets

    found = {
        "a/rows@train": [GOOD | {"instruction": f"Q{i}?"} for i in range(3)],
        "a/rows@test": [GOOD],
        "a/rows@bad": [GOOD | {"label": 5}],
        "a/rows@empty": [],
    }
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(found[f"{name}@{split}"])
    )
    train, held_out, _ = load_rows(DataConfig(source="hub:a/rows", eval_source="hub:a/rows"), 0)
    assert len(train) == 3 and held_out == [GOOD]
    with pytest.raises(UserError, match="hub:a/rows@bad, row 1: field 'label' must be"):
        load_rows(DataConfig(source="hub:a/rows@bad"), 0)
    with pytest.raises(UserError, match="data: hub:a/rows@empty holds no rows"):
        load_rows(DataConfig(source="hub:a/rows", eval_source="hub:a/rows@empty"), 0)

    def offline(name, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="data: hub:a/rows@train cannot be loaded: no route to the hub"):
        load_rows(DataConfig(source="hub:a/rows"), 0)


def clients(*shares):
    return [ClientConfig(name=f"c{i}", budget=1.0, share=float(share)) for i, share in enumerate(shares)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["iid", "dirichlet", "by_task"]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 5),
    st.floats(0.05, 10),
)
def test_partition_deals_every_row_once(kind, count, tasks, seed, alpha):
    names = [f"t{i % tasks}" for i in range(300)]
    config = DataConfig(partition=kind, alpha=alpha)
    try:
        dealt = partition(names, clients(*[1] * count), config, seed)
    except UserError as error:
        assert kind == "dirichlet" and "would get none" in str(error)
        return
    assert sorted(row for part in dealt for row in part) == list(range(300))
    again = partition(names, clients(*[1] * count), config, seed)
    assert [part.tolist() for part in dealt] == [part.tolist() for part in again]


def test_iid_follows_the_shares():
    assert [len(part) for part in partition(["t"] * 100, clients(1, 3, 1), DataConfig(partition="iid"), 0)] == [
        20,
        60,
        20,
    ]


def test_by_task_keeps_tasks_whole():
    names = ["a", "b", "c", "d", "e"] * 10
    dealt = partition(names, clients(1, 1), DataConfig(partition="by_task"), 0)
    assert [{names[i] for i in part} for part in dealt] == [{"a", "c", "e"}, {"b", "d"}]
    shared = partition(["a", "b"] * 30, clients(1, 1, 2), DataConfig(partition="by_task"), 0)
    assert [len(part) for part in shared] == [10, 30, 20]  # clients 0 and 2 split task a, 1 : 2


def test_dirichlet_gets_unequal_with_small_alpha():
    names = [f"t{i % 8}" for i in range(1600)]

    def spread(alpha):
        dealt = partition(names, clients(1, 1, 1, 1), DataConfig(partition="dirichlet", alpha=alpha), 0)
        return np.std([[sum(names[i] == f"t{t}" for i in part) for t in range(8)] for part in dealt])

    assert spread(0.1) > 2 * spread(10.0)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_dirichlet_keeps_the_shares_in_the_mean(alpha):
    """Mean of 40 tasks by 60 seeds, within four standard errors: a part's variance is p (1 - p) / (4 alpha + 1)."""
    names, shares = [f"t{i % 40}" for i in range(4000)], np.array([1, 2, 3, 4])
    config = DataConfig(partition="dirichlet", alpha=alpha)
    found = [[len(part) / 4000 for part in partition(names, clients(*shares), config, seed)] for seed in range(60)]
    expected = shares / 10
    errors = np.sqrt(expected * (1 - expected) / (4 * alpha + 1) / 40 / 60)
    assert (np.abs(np.mean(found, axis=0) - expected) < 4 * errors).all()


@pytest.mark.parametrize("share", [0.3, 1.0, 7.0])
def test_equal_shares_are_the_plain_dirichlet(share):
    """The draw is that of numpy with `alpha` for each client, whatever number the equal shares are."""
    names = ["a"] * 100
    config = DataConfig(partition="dirichlet", alpha=0.5)
    draw = np.random.default_rng([3, 1]).dirichlet([0.5] * 4)
    sizes = np.diff(np.round(np.cumsum([0, *draw]) * 100))
    assert [len(part) for part in partition(names, clients(*[share] * 4), config, 3)] == sizes.tolist()


def test_empty_share_is_named():
    with pytest.raises(UserError, match=r"clients: 'c1' would get none of the 3 rows \(share 0.001, partition iid\)"):
        partition(["t"] * 3, clients(1, 0.001), DataConfig(partition="iid"), 0)


def test_targets_are_the_answer_tokens_only():
    """Prompt 5 6, answer 7 8, end 1: inputs 5 6 7 8 -> targets 7, 8, 1 at positions 1, 2, 3."""
    tokens = collate([tiny.Example([5, 6], [7, 8, 1]), tiny.Example([9], [4, 1])], pad=0)
    assert tokens.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert tokens.used.tolist() == [[True] * 4, [True, True, False, False]]
    assert tokens.position_A.tolist() == [1, 2, 3, 4, 5] and tokens.target_A.tolist() == [7, 8, 1, 4, 1]


def test_encode_cuts_long_prompts_at_the_front(tokenizer):
    row = synthetic.rows(1, 0)[0]
    (whole,), lengths = encode([row], tokenizer, 512)
    assert lengths == (1, 0, 0) and tokenizer.decode(whole.prompt) == row["instruction"] + "\n"
    assert tokenizer.decode(whole.answer[:-1]) == row["answer"] and whole.answer[-1] == tokenizer.eos_token_id
    (short,), lengths = encode([row], tokenizer, len(whole.answer) + 16)
    assert lengths == (1, 1, 0) and short.prompt == whole.prompt[-16:] and short.answer == whole.answer


def test_texts_begin_with_the_tokenizers_own_first_token(tokenizer):
    """Llama's and Mixtral's tokenizers put a token before a text, which their models need; it is never cut."""
    assert beginning(tokenizer) == []
    other = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    other.add_special_tokens({"bos_token": "<begin>"})
    begin = other.bos_token_id
    assert beginning(other) == [], "a tokenizer may have the token and not put it there"
    special = [("<begin>", begin)]
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=special)
    assert other("x")["input_ids"][0] == begin and beginning(other) == [begin]
    row = GOOD | {"labels": ["answer1", "answer2"], "answer": "the correct answer is answer2"}
    ((plain,), _), ((whole,), lengths) = (encode([row], one, 256) for one in (tokenizer, other))
    assert lengths == (1, 0, 0) and whole.prompt == [begin, *plain.prompt] and whole.answer == plain.answer
    row |= {"instruction": GOOD["instruction"] * 10}
    ((plain,), _), ((short,), lengths) = (encode([row], one, len(whole.answer) + 17) for one in (tokenizer, other))
    assert lengths == (1, 1, 0) and short.prompt == [begin, *plain.prompt[-16:]]
    (unmarked,), (packed,) = (pack([row], one, 256) for one in (tokenizer, other))
    assert packed == PackedRow([begin, *unmarked.start], *unmarked[1:])


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_steps_hold_the_same_rows_in_every_layout(ranks, micro):
    examples = tiny.examples(10)

    def take(rank, ranks, micro, first=0):
        return steps(
            examples, batch_size=8, micro_batches=micro, rank=rank, ranks=ranks, pad=0, seed=(7, 1), first=first
        )

    whole = take(0, 1, 1)
    parts = [take(rank, ranks, micro) for rank in range(ranks)]
    for number in range(4):
        expected = next(whole)
        found = [next(part) for part in parts]
        rows = [found[r].micro[m].input_ids for m in range(micro) for r in range(ranks)]
        torch.testing.assert_close(torch.cat(rows), expected.micro[0].input_ids)
        assert len({row.shape for row in rows}) == 1, "unequal token counts"
        assert {f.answer_tokens for f in found} == {len(expected.micro[0].target_A)}
        assert sum(f.used_tokens for f in found) == expected.used_tokens
        later = next(take(0, 1, 1, first=number))
        torch.testing.assert_close(later.micro[0].input_ids, expected.micro[0].input_ids)


def test_every_row_is_seen_once_in_a_pass():
    examples = [tiny.Example([100 + i], [2, 1]) for i in range(12)]
    stream = steps(examples, batch_size=4, micro_batches=1, rank=0, ranks=1, pad=0, seed=(0, 0))
    passes = [[int(v) for _ in range(3) for v in next(stream).micro[0].input_ids[:, 0]] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == [100 + i for i in range(12)] and passes[0] != passes[1]


def test_cloze_rows_by_hand(tmp_path):
    row = GOOD | {"question": "why?", "choices": ["sky", "sea", "sky"], "labels": ["a", "b", "c"]}
    row |= {"answer": "the correct answer is c", "label": 2}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (asked,) = evaluation_rows(f"jsonl:{path}", None, 0, "cloze")
    assert (asked["instruction"], asked["answer"]) == ("Question: why?\nAnswer:", "sky")
    assert asked["labels"] == ["sky", "sea"] and asked["label"] == 0, "a choice given twice is one option"
    assert evaluation_rows(f"jsonl:{path}", None, 0) == [row]
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps(row | {"choices": ["sky"] * 3}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="same.jsonl, line 1: field 'choices' offers one choice alone"):
        evaluation_rows(f"jsonl:{same}", None, 0, "cloze")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row | {"question": "how?"}) + "\n", encoding="utf-8")
    config = DataConfig(source=f"jsonl:{path}", eval_source=f"jsonl:{other}", format="cloze")
    assert [rows[0]["instruction"].split()[1] for rows in load_rows(config, 0)[:2]] == ["why?", "how?"]


def test_options_share_the_prompt_and_their_common_beginning(tokenizer):
    row = GOOD | {"labels": ["answer1", "answer2"], "answer": "the correct answer is answer2"}
    ((start, common, options, label, cut, characters, _),) = pack([row], tokenizer, 256)
    assert tokenizer.decode(start) == row["instruction"] + "\nthe correct answer is answer"
    assert tokenizer.decode(start[len(start) - common :]) == "the correct answer is answer"
    assert [tokenizer.decode(option) for option in options] == ["1", "2" + tokenizer.eos_token]
    assert label == 1 and not cut and characters == (len(row["answer"]),) * 2
    row = GOOD | {"labels": ["a", "b"], "answer": "as it is, a day: a", "label": 0}
    (packed,) = pack([row], tokenizer, 256)
    assert tokenizer.decode(packed.start + packed.options[1]) == row["instruction"] + "\nas it is, a day: b"
    row = GOOD | {"labels": ["Monday", "blue green"], "answer": "it is Monday", "label": 0}
    row |= {"instruction": GOOD["instruction"] * 10}
    (packed,) = pack([row], tokenizer, 22)
    assert packed.cut and packed.common == 2 and [len(option) for option in packed.options] == [2, 2]
    assert len(packed.start) == (22 - 4) + 2, "the prompt keeps what the longest option leaves of 22 tokens"
    assert pack([row], tokenizer, 19) == [None], "15 tokens of the prompt are too few"


def test_packed_rows_are_laid_out_by_hand():
    """Prompt 5 6, common 7; options 8 9 and 3 4 1 (1 ends the text): the last token of an option is not an input."""
    several = PackedRow([5, 6, 7], 1, [[8, 9], [3, 4, 1]], label=1, cut=False)
    one = PackedRow([5], 0, [[2, 1], [3]], label=0, cut=False)
    tokens = collate_packed([several, one], pad=0)
    assert tokens.input_ids.tolist() == [[5, 6, 7, 8, 3, 4], [5, 2, 0, 0, 0, 0]]
    assert tokens.used.tolist() == [[True] * 6, [True, True, False, False, False, False]]
    assert tokens.branch_BS.tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 0, 0, 0, 0]]
    assert tokens.target_A.tolist() == [7, 8, 9, 3, 4, 1, 2, 1, 3]
    assert tokens.position_A.tolist() == [1, 2, 3, 2, 4, 5, 6, 7, 6]
    assert several.parts() == [1, 2, 3] and len(several) == 6
    assert collate_packed([one], pad=0).branch_BS is None, "one continuation is a plain text"
    empty = PackedRow([5, 6], 1, [[], [3, 1]], label=1, cut=False)  # the first option ends where the second goes on
    assert collate_packed([empty], pad=0).position_A.tolist() == [0, 1, 2]


@pytest.mark.skipif(not COMMONSENSE.exists(), reason="the shared commonsense rows are not beside this checkout")
def test_shared_commonsense_rows_have_the_schema():
    assert len(read_jsonl(COMMONSENSE)) == 1200
