"""Quantised models of every family: against transformers with the library's own dequantised values as weights."""

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import MODELS, ids_and_mask, saved_family
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.models.stored import DOWN, GATE_UP, unstacked
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.quantized import QuantizedLinear


def there_and_back(weight_OI: Tensor, scheme: str) -> Tensor:
    """Quantise a matrix and dequantise it, both by the library's functions.

    As rows of whole blocks: the library's CPU kernel returns other values for narrower rows, which real models lack.
    """
    if scheme == "nf4":
        blocks = weight_OI.reshape(-1, 64)
        return bnb.dequantize_4bit(*bnb.quantize_4bit(blocks, quant_type="nf4")).view(weight_OI.shape)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight_OI.contiguous())
    return bnb.int8_vectorwise_dequant(codes, scales)


@torch.no_grad()
def with_library_values(hf, scheme: str) -> int:
    """Put the library's values into transformers' model; return how many linear layers have some."""
    family = FAMILIES[hf.config.model_type]
    left_alone = {family.router.module, *family.shared[1:]}
    count = 0
    for name, module in hf.model.layers.named_modules():
        inside = name.partition(f".{family.module}.")[2]
        if isinstance(module, nn.Linear) and inside not in left_alone:
            module.weight.copy_(there_and_back(module.weight, scheme))
            count += 1
        for stacked in (GATE_UP, DOWN) if name.endswith(".experts") else ():
            for expert in getattr(module, stacked):
                for view in unstacked(expert, stacked, family.experts).values():
                    view.copy_(there_and_back(view, scheme))
    return count


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("family", MODELS)
def test_every_family_equals_hugging_face_with_the_librarys_values(family, scheme, tmp_path):
    """Logits; and gradients of all that learns, LoRA on attention too, with those of a model of whole weights."""
    hf = saved_family(family, tmp_path)
    ids, used = ids_and_mask()
    with torch.no_grad():
        before = hf(ids).logits
        linears = with_library_values(hf, scheme)
        expected = hf(ids).logits
    gate = GateConfig(k=3, candidates=8)
    ours = load(tmp_path, UBSMoESpec(gate, lora_attention=True, quantize=scheme)).eval()
    assert sum(isinstance(module, QuantizedLinear) for module in ours.modules()) == linears > 0
    with torch.no_grad():
        assert (ours(ids, used) - expected).abs().max() < 1e-4
    assert (expected - before).abs().max() > 1e-3  # quantising has changed something
    gradients = [gradients_of(model, ids, used) for model in (ours, convert(hf, UBSMoESpec(gate, lora_attention=True)))]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-3 * gradients[1][name].abs().max() + 1e-6, name


def gradients_of(model: UBSMoEForCausalLM, ids: Tensor, used: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all that learns, with adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    for adapter in model.adapters():
        adapter.B.data.normal_(std=0.1, generator=generator)
    F.cross_entropy(model.eval()(ids, used).reshape(ids.numel(), -1), ids.flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_ranks_that_share_experts_hold_parts_of_the_same_values(scheme, tmp_path):
    hf = tiny.hf_model()
    hf.save_pretrained(tmp_path)
    whole = load(tmp_path, UBSMoESpec(GateConfig(k=4, candidates=8), quantize=scheme)).layers[1].experts.base()
    for rank in range(4):
        spec = UBSMoESpec(
            GateConfig(k=4, candidates=8), lora_rank=5, quantize=scheme, expert_parallel=4, expert_rank=rank
        )
        part = load(tmp_path, spec).layers[1].experts.base()
        assert all(torch.equal(part[name], whole[name][2 * rank : 2 * rank + 2]) for name in whole)
