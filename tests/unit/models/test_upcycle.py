"""Mixtures of experts made from dense models: equal where they must be, nearer after repair and recovery."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launch.prepare import read_dense
from tests.support.families import store, stored_tensors
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.models.split import recover, split
from ubsmoe_ds.models.upcycle import upcycle
from ubsmoe_ds.moe.gate import GateConfig

VOCAB = 31


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)  # far from linear
    return model


def text(rows=64, length=24, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, k):
    for layer in model.model.layers:
        layer.mlp.gate.top_k = k
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [True, False])
def test_an_upcycled_model_equals_the_dense_one_for_every_k(tied, tmp_path):
    """In memory, read from its files by transformers, and by our own reader."""
    dense, ids = llama(tie_word_embeddings=tied), text(3)
    model = upcycle(dense, experts=4, k=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=4))).eval()
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
    assert again.config.model_type == "mixtral" and again.config.num_experts_per_tok == 2
    for k in range(1, 5):
        torch.testing.assert_close(logits(model, ids, k), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits(again, ids, k), expected, atol=1e-4, rtol=1e-4)
        ours.set_active_experts(k)
        with torch.no_grad():
            given = ours(ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_upcycling_keeps_the_precision_and_tokens_that_are_none(tmp_path):
    """If the config left them out, a Mixtral would end texts at its own token 2."""
    dense = llama(eos_token_id=None, bos_token_id=None).bfloat16()
    upcycle(dense, experts=2, k=1).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert (again.config.eos_token_id, again.config.bos_token_id, again.dtype) == (None, None, torch.bfloat16)
    assert torch.equal(again.model.layers[0].mlp.experts.down_proj[1], dense.model.layers[0].mlp.down_proj.weight)


def test_a_split_model_with_equal_weights_and_all_experts_is_the_dense_one():
    """With a router of spread 0 every weight is 1 / E, and with K = E nothing is left out or needs repair."""
    dense, ids = llama(), text(3)
    model, report = split(dense, text(), experts=4, shared=8, ks=[4], router_std=1e-6)
    assert max(report.error_before) < 1e-8
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids, 4), dense(input_ids=ids).logits, atol=2e-3, rtol=1e-3)


def test_a_split_model_is_read_like_any_other(tmp_path):
    ids = text(3)
    model, _ = split(llama(), text(), experts=4, shared=8, ks=[1, 2, 4])
    model.save_pretrained(tmp_path)
    ours = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=4))).eval()
    with torch.no_grad():
        given = ours(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(given, logits(model, ids, 2), atol=1e-4, rtol=1e-4)


def test_the_neurons_that_matter_are_shared():
    dense = llama(num_hidden_layers=1)
    mlp = dense.model.layers[0].mlp
    mlp.down_proj.weight.data.mul_(0.01)
    mlp.down_proj.weight.data[:, [3, 17]] *= 10_000
    model, _ = split(dense, text(), experts=2, shared=2, ks=[1, 2])
    kept = model.model.layers[0].mlp.shared_expert.gate_proj.weight
    rows = {tuple(row.tolist()) for row in kept}
    assert rows == {tuple(mlp.gate_proj.weight[n].tolist()) for n in (3, 17)}


def test_repair_and_recovery_bring_a_split_model_nearer():
    """Repair lowers the layers' error, training the divergence from the dense model on held-out text."""
    dense, unseen = llama(), text(16, seed=9)
    model, report = split(dense, text(), experts=4, shared=8, ks=[1, 2, 4])
    assert all(after < 0.9 * before for before, after in zip(*report, strict=True))

    def divergence(k):
        with torch.no_grad():
            wanted = dense(input_ids=unseen).logits.log_softmax(-1)
        given = logits(model, unseen, k).log_softmax(-1)
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())

    before = [divergence(k) for k in (1, 2, 4)]
    steps = list(recover(model, dense, [text(16, seed=s) for s in range(60)], ks=[1, 2, 4], lr=3e-3))
    assert [k for k, _ in steps[:4]] == [1, 2, 4, 1]
    after = [divergence(k) for k in (1, 2, 4)]
    assert sum(after) < 0.8 * sum(before) and after[0] < 0.8 * before[0], (before, after)
    assert model.model.layers[0].mlp.gate.top_k == 4


def test_what_cannot_be_prepared_is_named():
    with pytest.raises(UserError, match="mlp_bias is true"):
        upcycle(llama(mlp_bias=True), 2, 1)
    with pytest.raises(UserError, match="40 - 9 neurons cannot be divided among 4 experts evenly"):
        split(llama(), text(2), experts=4, shared=9, ks=[1])
    with pytest.raises(UserError, match="model_type is 'olmoe'; only dense models of type 'llama'"):
        from tests.support import tiny

        upcycle(tiny.hf_model(), 2, 1)


@pytest.fixture
def dense_folder(tmp_path):
    """A tied Llama with the built-in model's tokenizer, in one file."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make", ["upcycle", "split"])
def test_an_own_head_in_a_tied_dense_model_stays_its_own(make, dense_folder):
    """transformers does not tie them then. With equal weights and all experts both results are the dense model."""
    tensors = stored_tensors(dense_folder)
    head = tensors["model.embed_tokens.weight"].roll(1, 0)
    store(dense_folder, tensors | {"lm_head.weight": head})
    dense, _ = read_dense(str(dense_folder), torch.float32)
    if make == "upcycle":
        model = upcycle(dense, experts=4, k=4)
    else:
        model, _ = split(dense, text(), experts=4, shared=8, ks=[4], router_std=1e-6)
    assert torch.equal(model.lm_head.weight, head) and not model.config.tie_word_embeddings
    model.save_pretrained(dense_folder / "out")
    again, ids = AutoModelForCausalLM.from_pretrained(dense_folder / "out").eval(), text(3)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, dense(input_ids=ids).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model.norm.weight", None, r"lacks 1 tensors, first 'model\.norm\.weight'"),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(41, 16), r"up_proj\.weight' has the shape \[41, 16\], .*\[40"),
        ("model.layers.1.mlp.up_proj.bias", torch.ones(40), r"does not describe, first '.*up_proj\.bias'"),
        ("lm_head.bias", torch.ones(31), r"does not describe, first 'lm_head\.bias'"),
    ],
)
def test_a_tensor_that_does_not_fit_a_dense_model_is_named(name, value, message, dense_folder):
    tensors = stored_tensors(dense_folder)
    tensors = {other: kept for other, kept in tensors.items() if other != name}
    store(dense_folder, tensors if value is None else tensors | {name: value})
    with pytest.raises(UserError, match=message) as raised:
        read_dense(str(dense_folder), torch.float32)
    assert "\n" not in str(raised.value)


def test_a_dense_folder_with_an_adapter_is_refused(dense_folder):
    (dense_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"would add .*adapter_config\.json' to the model beside it"):
        read_dense(str(dense_folder), torch.float32)


def test_the_other_name_of_silu_is_prepared():
    dense, ids = llama(hidden_act="swish"), text(3)
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
    torch.testing.assert_close(logits(upcycle(dense, 2, 1), ids, 1), expected, atol=1e-4, rtol=1e-4)
