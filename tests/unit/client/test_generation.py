"""Answers to evaluation prompts: against transformers' own generation, shared out over ranks, stopped."""

import pytest
import torch
from transformers import AutoTokenizer, OlmoeForCausalLM

from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.client.generation import LEAST_NEW_TOKENS, Prompts
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.evaluation_rows import PackedRow
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.moe.gate import GateConfig

FOLDER = BUILTIN_MODELS["builtin:tiny_olmoe"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return Evaluator(synthetic.rows(5, seed=9), tokenizer, 256, batch_size=4).packed


@pytest.fixture(scope="module")
def model():
    return load(FOLDER, UBSMoESpec(GateConfig(k=8, candidates=16)))


def never():
    return False


def test_prompt_and_right_answer_are_taken_apart_by_hand(tokenizer):
    """The options 5 6 7 and 5 6 9 8 of the prompt 3 4 share 5 6; end-of-text belongs to the right one."""
    row = PackedRow([3, 4, 5, 6], 2, [[7, tokenizer.eos_token_id], [9, 8]], label=0, cut=False)
    prompts = Prompts([row], tokenizer)
    assert list(prompts.tokens) == [[3, 4]] and prompts.texts == [tokenizer.decode([3, 4])]
    assert prompts.answers == [tokenizer.decode([5, 6, 7])] and prompts.max_new_tokens == LEAST_NEW_TOKENS
    long = PackedRow([3, 4], 0, [[7] * 40, [9]], label=0, cut=False)
    assert Prompts([row, long], tokenizer).max_new_tokens == 40


@pytest.mark.parametrize("k", [8, 2])
def test_answers_are_those_of_transformers(k, model, rows, tokenizer):
    """Greedily, each prompt alone: at K_max on the dense path, and at another K."""
    hf = OlmoeForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, num_experts_per_tok=k).eval()
    prompts = Prompts(rows, tokenizer)
    expected = {}
    for number, prompt in enumerate(prompts.tokens):
        ids = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=prompts.max_new_tokens)
        expected[number] = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    answered = prompts.answered(model, k, (0, 1), batch_size=2, together=False, stop=never)
    assert answered == expected and any(expected.values())


def test_ranks_share_the_prompts_and_run_equally_often(model, rows, tokenizer):
    prompts = Prompts(rows, tokenizer)
    whole = prompts.answered(model, 8, (0, 1), batch_size=4, together=False, stop=never)
    parts, looks = [], []
    for worker in range(3):
        looked = []

        def stop(looked=looked):
            looked.append(1)
            return False

        parts.append(prompts.answered(model, 8, (worker, 3), batch_size=1, together=False, stop=stop))
        looks.append(len(looked))
    assert [sorted(part) for part in parts] == [[0, 3], [1, 4], [2]] and looks == [2, 2, 2]
    assert parts[0] | parts[1] | parts[2] == whole
    assert not any(prompts.answered(model, 8, (0, 1), batch_size=2, together=False, stop=lambda: True).values())
