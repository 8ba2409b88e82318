"""Several rows in one sequence: who gets which, by hand; the same losses and gradients as of rows one by one."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import MODELS
from ubsmoe_ds.data.batches import Example, collate, collate_sequences, steps
from ubsmoe_ds.data.packing import share_out
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.moe.gate import GateConfig

# a window shorter than rows and sequences: on all layers, or on some beside full attention
WINDOWS = {
    "mixtral, window": ("mixtral", {"sliding_window": 4}),
    "qwen3_moe, window": ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True}),
    "qwen2_moe, window on some layers": (
        "qwen2_moe",
        {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
}


def test_rows_are_dealt_by_hand():
    """Rows of 5 3 3 2 2 1 tokens on two parts, sequences of at most 8.

    16 tokens fit two sequences of 8: 5 | 3, then 3 to the second (6), 2 to the first (7), 2 to the second (8), 1 to the
    first (8). With at most 7 each part needs two: 5 | 3 | 3 | 2, then 2 to the fourth (4) and 1 to the second (4).
    Five rows of 4 in sequences of 8 would be three sequences of 8, 24 tokens; one by one they are 20.
    """
    lengths = [3, 5, 2, 1, 3, 2]
    assert share_out(lengths, 2, 8) == [[[1, 2, 3]], [[0, 4, 5]]]
    assert share_out(lengths, 2, 7) == [[[1], [4]], [[0, 3], [2, 5]]]
    assert share_out([4] * 5, 1, 8) == [[[0], [1], [2], [3], [4]]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rule_of_sharing_out(data):
    """Every row is in one place; no sequence is empty or too long; parts are alike, and not larger than unpacked."""
    parts, longest = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 30))
    rows = parts * data.draw(st.integers(1, 8))
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=rows, max_size=rows))
    shared = share_out(lengths, parts, longest)
    assert Counter(row for part in shared for rows in part for row in rows) == Counter(range(rows))
    assert len(shared) == parts and len({len(part) for part in shared}) == 1
    for part in shared:
        assert all(rows and sum(lengths[row] for row in rows) <= longest for rows in part)
    fullest = max(sum(lengths[row] for row in rows) for part in shared for rows in part)
    assert fullest * sum(map(len, shared)) <= len(lengths) * max(lengths)


def test_layout_of_a_sequence_by_hand():
    """Rows 5 6 | 7 1 and 4 | 9 1 in one sequence of 8, one row alone in the other."""
    first, second, third = Example([5, 6], [7, 1]), Example([4], [9, 1]), Example([3, 3, 3], [1])
    tokens = collate_sequences([[first, second], [third]], pad=0, length=8)
    assert tokens.input_ids.tolist() == [[5, 6, 7, 4, 9, 0, 0, 0], [3, 3, 3, 0, 0, 0, 0, 0]]
    assert tokens.used.sum(1).tolist() == [5, 3]
    assert tokens.position_BS.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert tokens.position_A.tolist() == [1, 2, 3, 4, 10] and tokens.target_A.tolist() == [7, 1, 9, 1, 1]


def rows_of(tokens):
    """The rows of a batch as (input tokens, targets), in no order."""
    found = Counter()
    for b, (ids, used) in enumerate(zip(tokens.input_ids, tokens.used, strict=True)):
        position = torch.arange(len(ids)) if tokens.position_BS is None else tokens.position_BS[b]
        starts = [s for s in range(len(ids)) if position[s] == 0 and used[s]]
        for start, end in zip(starts, [*starts[1:], int(used.sum())], strict=True):
            places = [n for n, p in enumerate(tokens.position_A - b * len(ids)) if start <= p < end]
            found[tuple(ids[start:end].tolist()), tuple(tokens.target_A[places].tolist())] += 1
    return found


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_a_packed_step_has_the_rows_of_the_step(ranks, micro_batches):
    """On any number of ranks and from any step on; all parts of a step have the same shape."""
    options = {"batch_size": 8, "micro_batches": micro_batches, "ranks": ranks, "pad": 0, "seed": (3, 1)}
    plain = steps(tiny.examples(20), **{**options, "micro_batches": 1, "ranks": 1}, rank=0, first=2)
    packed = [steps(tiny.examples(20), **options, rank=rank, first=2, packed_length=24) for rank in range(ranks)]
    for _ in range(4):
        of_ranks, whole = [next(batches) for batches in packed], next(plain)
        micro = [tokens for batch in of_ranks for tokens in batch.micro]
        assert sum(map(rows_of, micro), Counter()) == rows_of(whole.micro[0])
        assert len({tokens.input_ids.shape for tokens in micro}) == 1 and micro[0].input_ids.shape[1] <= 24
        assert {batch.answer_tokens for batch in of_ranks} == {whole.answer_tokens}
        assert sum(batch.used_tokens for batch in of_ranks) == whole.used_tokens
        assert sum(tokens.input_ids.numel() for tokens in micro) < whole.micro[0].input_ids.numel()


def converted(name, attention):
    family, changes = WINDOWS.get(name, (name, {}))
    config = copy.deepcopy(MODELS[family])
    for key, value in changes.items():
        setattr(config, key, value[: config.num_hidden_layers] if key == "layer_types" else value)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    return convert(hf, UBSMoESpec(GateConfig(k=3, candidates=8), lora_attention=True)).train()


def losses_and_gradients(model, tokens):
    """Loss of each answer token, by its row, and the gradient of every trained parameter."""
    model.zero_grad()
    logits = model(tokens.input_ids, tokens.used, tokens.position_A, None, tokens.position_BS)
    loss_A = F.cross_entropy(logits, tokens.target_A, reduction="none")
    loss_A.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss_A.detach(), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*MODELS, *WINDOWS])
def test_packed_losses_and_gradients_are_those_of_single_rows(name, attention):
    """Six rows in two sequences, against each row alone: to 1e-5 a token, in every family and with windows."""
    model = converted(name, attention)
    for adapter in model.adapters():
        torch.nn.init.normal_(adapter.B, std=0.2)
    rows = tiny.examples(6)
    order = [[0, 3, 4], [5, 1, 2]]
    tokens = collate_sequences([[rows[n] for n in part] for part in order], pad=0, length=60)
    packed, packed_gradients = losses_and_gradients(model, tokens)
    tokens_seen = int(model.layers[0].gate.tokens)
    alone = [losses_and_gradients(model, collate([rows[n]], 0)) for part in order for n in part]
    torch.testing.assert_close(packed, torch.cat([losses for losses, _ in alone]), atol=1e-5, rtol=0)
    assert packed.std() > 0.1
    for key, gradient in packed_gradients.items():
        total = sum(gradients[key] for _, gradients in alone if key in gradients)
        torch.testing.assert_close(gradient, total, atol=2e-4, rtol=2e-3, msg=key)
    assert tokens_seen == sum(map(len, rows)), "each token is counted once, padding never"


@pytest.mark.parametrize("name", WINDOWS)
def test_the_windows_are_shorter_than_the_rows(name):
    tokens = collate_sequences([tiny.examples(3)], pad=0, length=40)
    within, whole = (losses_and_gradients(converted(n, "sdpa"), tokens)[0] for n in (name, WINDOWS[name][0]))
    assert (within - whole).abs().max() > 0.01


def test_attention_over_rows_would_be_seen():
    """The comparison above can fail: without positions a row sees those before it."""
    model = converted("olmoe", "sdpa")
    tokens = collate_sequences([tiny.examples(3)], pad=0, length=40)
    right, _ = losses_and_gradients(model, tokens)
    wrong, _ = losses_and_gradients(model, tokens._replace(position_BS=None))
    assert (right - wrong).abs().max() > 0.01
