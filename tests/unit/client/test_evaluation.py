"""Test loss, option scores, generated answers and heat maps against plain computations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, OlmoeForCausalLM

from tests.support import tiny
from tests.support.conversion import convert
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.evaluation import FIELDS, Evaluator, generate_answers, parse_answer, score
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.batches import encode
from ubsmoe_ds.data.evaluation_rows import PackedRow
from ubsmoe_ds.federation.monitor import CELL, heat_map
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.moe.gate import GateConfig

FOLDER = BUILTIN_MODELS["builtin:tiny_olmoe"]


@pytest.fixture(scope="module")
def parts():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rows = synthetic.rows(14, seed=9)
    # options of several tokens that differ from the first token on, that share a beginning, that begin another option
    rows.append(rows[0] | {"labels": ["blue", "a dog", "two cats"], "answer": "so it is a dog then", "label": 1})
    rows.append(rows[1] | {"labels": ["answer12", "answer1", "answer123"], "answer": "answer1", "label": 1})
    rows.append(rows[2] | {"labels": ["six of them", "six"], "answer": "six of them", "label": 0})
    model = load(FOLDER, UBSMoESpec(GateConfig(k=8, candidates=16))).eval()

    def logits(tokens, k):
        model.set_active_experts(k)
        with torch.no_grad():
            return model(tokens.input_ids, tokens.used, tokens.position_A, tokens.branch_BS)

    return tokenizer, rows, SimpleNamespace(device=torch.device("cpu"), logits=logits, model=model)


def plain(rows, tokenizer, k):
    """Return the sums of `FIELDS`, each option scored alone by Hugging Face's model with num_experts_per_tok = k."""
    hf = OlmoeForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, num_experts_per_tok=k).eval()

    def logp(prompt, answer):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            return (
                F.log_softmax(hf(ids).logits[0, len(prompt) - 1 : -1], -1)
                .gather(1, ids[0, len(prompt) :, None])
                .sum()
                .item()
            )

    nll = tokens = correct = normalised = by_characters = 0
    for row in rows:
        prompt = tokenizer(row["instruction"] + "\n")["input_ids"]
        texts = [row["answer"].replace(row["labels"][row["label"]], label) for label in row["labels"]]
        encoded = [tokenizer(text)["input_ids"] for text in texts]
        right = [*encoded[row["label"]], tokenizer.eos_token_id]
        nll -= logp(prompt, right)
        tokens += len(right)
        scores = [logp(prompt, option) for option in encoded]
        correct += int(np.argmax(scores)) == row["label"]
        lengths = [len(option) for option in encoded]
        normalised += int(np.argmax([s / n for s, n in zip(scores, lengths, strict=True)])) == row["label"]
        by_characters += int(np.argmax([s / len(t) for s, t in zip(scores, texts, strict=True)])) == row["label"]
    return nll, tokens, correct, normalised, by_characters, len(rows), len(rows)


@pytest.mark.parametrize("k", [8, 2])
def test_evaluation_equals_one_option_at_a_time(k, parts):
    tokenizer, rows, client = parts
    sums = Evaluator(rows, tokenizer, 256, batch_size=4).sums(client, k, 0, 1)
    assert sums.shape == (len({row["task"] for row in rows}), len(FIELDS))
    np.testing.assert_allclose(sums.sum(0), plain(rows, tokenizer, k), rtol=1e-4)


def test_a_batch_holds_all_options_in_one_pass(parts):
    tokenizer, rows, client = parts
    shapes = []
    recording = SimpleNamespace(
        device=client.device, logits=lambda t, k: shapes.append(t.input_ids.shape) or client.logits(t, k)
    )
    Evaluator(rows, tokenizer, 256, batch_size=4).sums(recording, 2, 0, 1)
    assert sum(shape[0] for shape in shapes) == len(rows)


def test_a_sliding_window_shorter_than_a_question_with_an_answer_is_refused(parts):
    """A window that is only shorter than the row, which holds all answers, is accepted."""
    model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=2, candidates=8)))
    ids = torch.tensor([[2, 3, 4, 5]])
    branch_BS = torch.tensor([[0, 0, 1, 2]])  # 2 3 4 and 2 3 5
    with torch.no_grad():
        expected = model(ids, ids.bool(), None, branch_BS)
        model.hf.config.sliding_window = 3
        assert torch.equal(model(ids, ids.bool(), None, branch_BS), expected)
    model.hf.config.sliding_window = 2
    with pytest.raises(UserError, match="an answer has 3 tokens, the sliding window 2; lower max_length"):
        model(ids, ids.bool(), None, branch_BS)
    tokenizer, rows, _ = parts
    evaluator = Evaluator(rows, tokenizer, 256, batch_size=4)
    lengths = [len(option) + len(row.start) - 1 for row in evaluator.packed for option in row.options]
    assert evaluator.longest == max(lengths)


def test_the_length_of_an_option_can_decide():
    """By hand, -3 for 2 tokens against -2 for 1 token: raw the second option wins, normalised by length the first."""
    row = PackedRow([9], 0, [[1, 2, 4], [3]], label=0, cut=False, characters=(2, 1))
    logp = [torch.tensor([]), torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-2.0])]
    assert score(row, logp) == (3.5, 3, 0, 1, 1, 1, 1)
    few = PackedRow(*row[:5], characters=(3, 4))  # -1 and -0.5 per character
    assert score(few, logp) == (3.5, 3, 0, 1, 0, 1, 1)
    common = PackedRow([9, 8], 1, [[2, 4], [3]], label=0, cut=False, characters=(5, 5))
    logp = [torch.tensor([-1.0]), torch.tensor([-2.0, -0.5]), torch.tensor([-3.0])]
    assert score(common, logp) == (3.5, 3, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "values, chance", [([-1.0, -1.0], 0.5), ([-1.0, -1.0, -0.5], 0), ([-1.0, float("nan")], 0), ([float("nan")] * 2, 0)]
)
def test_a_tie_counts_as_a_draw_and_nan_as_wrong(values, chance):
    """Without this the first option would win ties, and in some data it is right more often than the others."""
    options = [[1, 4], *([n] for n in range(2, 1 + len(values)))]
    row = PackedRow([9], 0, options, label=0, cut=False, characters=(3,) * len(values))
    logp = [torch.tensor([]), torch.tensor([values[0], -0.5]), *(torch.tensor([value]) for value in values[1:])]
    assert score(row, logp)[2:] == (chance, chance, chance, 1, 1)


@pytest.mark.parametrize("k", [8, 2])
def test_generated_answers_equal_transformers_one_row_at_a_time(k, parts):
    tokenizer, rows, client = parts
    hf = OlmoeForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, num_experts_per_tok=k).eval()
    expected = []
    for row in rows[:6]:
        ids = torch.tensor([tokenizer(row["instruction"] + "\n")["input_ids"]])
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, hf(ids).logits[:, -1:].argmax(-1)], dim=1)
        new = ids[0, -8:].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    generated = generate_answers(client.model, k, rows[:6], tokenizer, max_length=256, batch_size=4, max_new_tokens=8)
    assert generated == expected and any(generated)


def test_prompts_are_cut_for_generation_as_in_training(parts):
    """The right answer's length decides the cut; the generated answer may be longer than the room left."""
    tokenizer, rows, client = parts
    shortest = min(len(tokenizer(row["instruction"])["input_ids"]) for row in rows[:6])
    examples, lengths = encode(rows[:6], tokenizer, shortest)
    assert lengths == (6, 6, 0)
    hf = OlmoeForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    expected = []
    for example in examples:
        ids = hf.generate(torch.tensor([example.prompt]), do_sample=False, max_new_tokens=shortest + 5)
        expected.append(tokenizer.decode(ids[0, len(example.prompt) :], skip_special_tokens=True))
    limits = {"max_length": shortest, "batch_size": 4, "max_new_tokens": shortest + 5}
    assert generate_answers(client.model, 8, rows[:6], tokenizer, **limits) == expected and any(expected)
    with pytest.raises(UserError, match="max_new_tokens: 1024 and the longest prompt need .* the model has 1024;"):
        generate_answers(client.model, 8, rows[:6], tokenizer, **limits | {"max_new_tokens": 1024})
    with pytest.raises(UserError, match="max_length: 8 is too short for 6 of 6 rows; raise it"):
        generate_answers(client.model, 8, rows[:6], tokenizer, **limits | {"max_length": 8})


def test_rows_that_do_not_fit_are_not_scored_but_named(parts):
    """One option of the last row is far too long: the others score as if it were not there."""
    tokenizer, rows, client = parts
    long = rows[0] | {"id": "long", "task": "other", "labels": [*rows[0]["labels"][:-1], "very " * 300]}
    long |= {"label": 0, "answer": rows[0]["labels"][0]}
    evaluator, without = (Evaluator(some, tokenizer, 256, batch_size=4) for some in ([*rows[:6], long], rows[:6]))
    assert evaluator.dropped == ["long"] and evaluator.lengths == (6, 0, 1) and evaluator.rows == rows[:6]
    np.testing.assert_array_equal(evaluator.sums(client, 2, 0, 1), without.sums(client, 2, 0, 1))
    with pytest.raises(UserError, match="max_length: 256 is too short for each of the 1 evaluation rows; raise it"):
        Evaluator([long], tokenizer, 256, batch_size=4)


def test_answers_are_parsed_by_hand():
    labels = ["answer1", "answer2", "answer10"]
    assert parse_answer("The correct answer is answer2.", labels) == 1
    assert parse_answer("answer1? no: the correct answer is answer10", labels) == 2
    assert parse_answer("I think Answer1", labels) == 0
    assert parse_answer("the correct answer is answer100", labels) is None
    assert parse_answer("", labels) is None
    assert parse_answer("the correct answer is false", ["true", "false"]) == 1
    assert parse_answer("the correct answer is C++", ["C", "C++"]) == 1
    assert parse_answer("The Correct Answer is Co", ["CO", "Co"]) == 1
    assert parse_answer("the correct answer is co", ["CO", "Co"]) is None
    assert parse_answer("The correct answer is a square, so B", list("ABCD")) == 1  # the article is no label
    assert parse_answer("the correct answer is D", list("abcd")) is None
    assert parse_answer("正确答案是B。因为A不对", list("ABCD")) == 1
    assert parse_answer("la r\u00e9ponse est e\u0301t\u00e9", ["hiver", "\u00e9te\u0301"]) == 1  # composed or not


def test_workers_share_the_rows(parts):
    tokenizer, rows, client = parts
    evaluator = Evaluator(rows, tokenizer, 256, batch_size=4)
    whole = evaluator.sums(client, 4, 0, 1)
    np.testing.assert_allclose(sum(evaluator.sums(client, 4, w, 3) for w in range(3)), whole, rtol=1e-5)


def test_all_workers_run_equally_often(parts):
    """Ranks of a client meet in the experts' all-to-all, so none may run one batch more than another."""
    tokenizer, rows, client = parts
    calls = []
    counting = SimpleNamespace(device=client.device, logits=lambda t, k: calls.append(worker) or client.logits(t, k))
    evaluator = Evaluator(rows[:5] + rows[-3:-2], tokenizer, 256, batch_size=1)  # 2, 2, 1, 1 rows
    for worker in range(4):
        evaluator.sums(counting, 2, worker, 4)
    assert len({calls.count(w) for w in range(4)}) == 1 and calls


def test_heat_map_is_dark_at_zero_and_bright_at_the_largest():
    picture = heat_map(torch.tensor([[0.0, 1.0, 2.0]]))
    assert picture.shape == (3, CELL, 3 * CELL) and picture.min() >= 0 and picture.max() <= 1
    brightness = picture.sum(0)[0, ::CELL]
    assert brightness[0] < brightness[1] < brightness[2]
    assert torch.isfinite(heat_map(torch.zeros(2, 2))).all()
