"""The fidelity report: its numbers by hand, and the dense gradient of every family against transformers'."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.support.conversion import convert
from tests.support.families import MODELS, ids_and_mask, random_model, with_k
from ubsmoe_ds.data.batches import StepBatch, Tokens
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.models.stored import stacked_shapes, unstacked
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.studies.fidelity import COMPARED, Measured, bias, measure, summary


def hand_made() -> dict[str, list[Measured]]:
    """Return one layer, two experts with gradients of two elements, two batches; expert 1 is active in the second."""
    dense = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    first = Measured(dense, torch.tensor([[[4.0, 3.0], [0.0, 0.0]]]), torch.tensor([[True, False]]))
    second = Measured(dense, torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]), torch.tensor([[True, True]]))
    return {"none": [first, second]}


def test_summary_by_hand():
    """Some: cosines (24 / 25, 1, 1), sizes (1, 1, 0.5); never: no gradient at all, cosine and size 0."""
    table = summary(hand_made(), k=1).set_index("group")
    assert table.loc["never", ["experts", "cosine", "size"]].tolist() == [1, 0, 0]
    assert table.loc["some", "experts"] == 3 and table.loc["some", "size"] == 1
    assert table.loc["some", "cosine"] == pytest.approx((0.96 + 2) / 3)


def test_bias_by_hand():
    """Means (3.5, 3.5) and (0, 0.5): off by sqrt(0.5) of 5 and 1.5 of 2; torch's median of two is the lower."""
    assert bias(hand_made(), k=1).bias.tolist() == pytest.approx([0.5**0.5 / 5])


def a_client(hf, family):
    """Return what `measure` reads of a client; its adapters are fresh, so B = 0."""
    model = convert(copy.deepcopy(hf), UBSMoESpec(GateConfig(k=2, candidates=4), lora_rank=2, lora_alpha=6.0))
    exp = SimpleNamespace(
        num_experts=getattr(hf.config, family.num_experts), pseudo_gradient=SimpleNamespace(rho="sparsity")
    )
    return SimpleNamespace(model=model, exp=exp, collector=None, device=torch.device("cpu"))


def one_batch() -> StepBatch:
    ids, used = ids_and_mask()
    position_A = torch.tensor([3, 14, 25, 30])
    return StepBatch([Tokens(ids, used, position_A, ids.flatten()[position_A + 1])], len(position_A), ids.numel())


def gradients_in_transformers(hf, family, batch: StepBatch, model) -> torch.Tensor:
    """Return dL/dA = 0 and dL/dB = s dL/dW A^T of the six factors of each expert, with all experts active."""
    (tokens,) = batch.micro
    logits_AV = hf(input_ids=tokens.input_ids).logits.flatten(0, 1)[tokens.position_A]
    (F.cross_entropy(logits_AV, tokens.target_A, reduction="sum") / batch.answer_tokens).backward()
    found = []
    sparse = [n for n, layer in enumerate(hf.model.layers) if hasattr(getattr(layer, family.module), "experts")]
    for number, layer in zip(sparse, model.layers, strict=True):
        experts = getattr(hf.model.layers[number], family.module).experts
        weights = {}
        for name in stacked_shapes(family, 1, 1, 1):
            if not name.endswith("_bias"):
                weights |= unstacked(getattr(experts, name).grad, name, family.experts)
        parts = []
        for name, (A_ERI, _) in layer.experts.factors().items():
            dB_EOR = layer.experts.scaling * weights[name] @ A_ERI.detach().mT
            parts += [torch.zeros_like(A_ERI), dB_EOR]
        found.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_dense_gradient_of_every_family_is_that_of_transformers(name):
    """Where the router keeps groups, ours is of all experts in all groups, which transformers cannot activate."""
    hf = random_model(name).float()
    family = FAMILIES[hf.config.model_type]
    client, batch = a_client(hf, family), one_batch()
    experts = client.exp.num_experts
    (found,) = measure(client, iter([batch]), experts, ["none"], 1)["none"]
    assert torch.equal(found.completed_LEP, found.dense_LEP) and found.active_LE.all()
    if client.model.layers[0].gate.router.groups == 1:
        expected = gradients_in_transformers(with_k(hf, experts), family, batch, client.model)
        torch.testing.assert_close(found.dense_LEP, expected, atol=1e-5, rtol=1e-4)
        assert expected.abs().max() > 1e-3


@pytest.mark.extended
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_measured_with_every_estimator(name):
    """At K = 1 the plain gradient of experts that no token activated is zero, and estimators complete it."""
    hf = random_model(name).float()
    client = a_client(hf, FAMILIES[hf.config.model_type])
    estimators = [estimator for estimator in COMPARED if estimator != "linearised"]  # which has moments from training
    measured = measure(client, iter([one_batch()]), 1, estimators, 1)
    table = summary(measured, 1)
    never = table[(table.group == "never") & (table.experts > 0)]
    assert len(never) and (never[never.estimator == "none"].cosine == 0).all()
    assert (never[never.estimator == "dense_oracle"].cosine > 0).any()
    assert set(bias(measured, 1).estimator) == set(estimators)
