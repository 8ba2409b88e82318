"""A model's forward, backward and pseudo-gradients on a device: against the CPU, in bf16, without a host wait."""

import contextlib
import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import tiny
from tests.support.conversion import convert
from ubsmoe_ds.federation.announcement import GROUPED_PRODUCTS
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.pseudo_gradient import Moments

CPU = torch.device("cpu")


class Results(NamedTuple):
    """Loss, real gradients by parameter, pseudo-gradients in the collector's order; on the CPU."""

    loss: float
    real: dict[str, Tensor]
    pseudo: list[Tensor]


def make_model(lora_rank: int = 8, again: bool = False, quantize: str | None = None, **gate) -> UBSMoEForCausalLM:
    """Return a model of 8 experts whose sizes divide by 8, as grouped products want, with B and phi away from zero."""
    width = 48 if quantize is None else 64  # rows of whole blocks: others get other values on a CPU
    hf = tiny.hf_model(hidden_size=64, intermediate_size=width, num_attention_heads=4)
    config = GateConfig(**({"k": 2, "candidates": 8} | gate))
    model = convert(hf, UBSMoESpec(config, lora_rank=lora_rank, lora_attention=True, quantize=quantize)).train()
    generator = torch.Generator().manual_seed(0)
    for layer in model.layers:
        layer.gate.phi.data.normal_(0, 0.3, generator=generator)
    for adapter in model.adapters():
        adapter.B.data.normal_(0, 0.05, generator=generator)
    if again:
        model.checkpoint_activations()
    return model


class Step:
    """A model on a device, with rows and a source of pseudo-gradients; `run` is forward, backward and these."""

    def __init__(
        self, model: UBSMoEForCausalLM, device: torch.device, dtype=torch.float32, estimator="none", drawn=None
    ) -> None:
        self.model = copy.deepcopy(model).to(device, dtype)
        if model.layers[0].experts.recomputing or hasattr(model.decoders[0], "_gradient_checkpointing_func"):
            self.model.checkpoint_activations()  # the copy's, not the original's
        rotary = self.model.hf.model.rotary_emb
        rotary.inv_freq = model.hf.model.rotary_emb.inv_freq.to(device)  # fp32 in every precision, as in a run
        generator = torch.Generator().manual_seed(1)
        for layer in self.model.layers:
            layer.gate.reset_counts()
            values = torch.rand(3, 8, layer.experts.hidden, generator=generator).to(device)
            layer.experts.moments = Moments(*values) if estimator == "linearised" else None
        self.collector = None
        if estimator != "none":
            self.collector = PseudoGradientCollector(self.model.layers, estimator, 0.5, drawn).attach()
        ids = torch.randint(2, tiny.VOCAB, (4, 24), generator=generator)
        used = torch.ones(4, 24, dtype=torch.bool)
        used[2, 15:] = False
        answers = used.flatten().nonzero().squeeze(1)[:-1]
        self.tokens = [part.to(device) for part in (ids, used, answers, ids.flatten()[answers + 1])]

    def run(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the loss and the pseudo-gradients, both still on the device."""
        ids, used, answers, targets = self.tokens
        loss = F.cross_entropy(self.model(ids, used, answers), targets) + self.model.auxiliary_loss(0.1, 0.01)
        loss.backward()
        return loss.detach(), [] if self.collector is None else self.collector.reduce()

    def results(self) -> Results:
        """Run once and bring all results to the CPU."""
        loss, additions = self.run()
        parameters = self.model.named_parameters()
        real = {name: p.grad.float().cpu() for name, p in parameters if p.grad is not None}
        return Results(loss.item(), real, [value.float().cpu() for _, value in additions])


def assert_near(got: Results, want: Results) -> None:
    """Compare fp32 results; a device adds up in another order."""
    assert got.loss == pytest.approx(want.loss, rel=1e-4)
    assert got.real.keys() == want.real.keys() and len(got.pseudo) == len(want.pseudo)
    for name, gradient in want.real.items():
        torch.testing.assert_close(got.real[name], gradient, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for pseudo, wanted in zip(got.pseudo, want.pseudo, strict=True):
        assert wanted.any()
        torch.testing.assert_close(pseudo, wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("estimator", ["none", *ESTIMATORS])
def test_fp32_on_the_device_is_fp32_on_the_cpu(estimator, capacity, device):
    model = make_model(capacity_factor=capacity)
    assert_near(*(Step(model, where, estimator=estimator).results() for where in (device, CPU)))


def test_layers_computed_again_give_the_same(device):
    """Kept results are those of this device's kernels of attention; the rest is computed once more."""
    again, kept = (Step(make_model(again=value), device, estimator="linearised") for value in (True, False))
    assert_near(again.results(), kept.results())


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantised_weights_are_dequantised_to_the_same_on_the_device(scheme, device):
    model = make_model(quantize=scheme)
    assert_near(*(Step(model, where, estimator="linearised").results() for where in (device, CPU)))


@pytest.mark.parametrize("rank", range(1, 9))  # most tails are no multiple of 16 bytes
@pytest.mark.parametrize("k", [1, 2, 8])
def test_bf16_products_are_near_fp32_and_zero_where_an_expert_has_no_row(rank, k, device):
    """At K = 1 an expert that phi keeps from all tokens has no rows; its gradient must be zero, not left over."""
    model = make_model(lora_rank=rank, k=k)
    if k == 1:
        for layer in model.layers:
            layer.gate.phi.data[3] = -100.0
    exact, got = Step(model, CPU).results(), Step(model, device, torch.bfloat16).results()
    assert got.loss == pytest.approx(exact.loss, rel=0.05)
    empty = 0
    for name, gradient in exact.real.items():
        if ".experts." not in name:
            continue
        assert torch.isfinite(got.real[name]).all(), name
        if gradient.norm() > 0 and k == 8:  # all experts: rounding sends no token elsewhere
            assert F.cosine_similarity(got.real[name].flatten(), gradient.flatten(), dim=0) > 0.98, name
        unused_E = gradient.flatten(1).norm(dim=1) == 0
        if k == 1:
            assert unused_E[3] and not got.real[name][3].any(), name
            empty += 1
    assert empty == (12 if k == 1 else 0)  # two layers of three pairs


@contextlib.contextmanager
def waits_refused():
    """Raise an error where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cases_of_waiting():
    """Yield (estimator, capacity factor, whether layers are computed again, how weights are quantised)."""
    for estimator in ("none", *ESTIMATORS):
        yield from ((estimator, capacity, again, None) for capacity in (None, 1.0) for again in (False, True))
    yield from (("linearised", None, False, scheme) for scheme in ("nf4", "int8"))


@pytest.mark.parametrize(("estimator", "capacity", "again", "quantize"), list(cases_of_waiting()))
def test_the_host_does_not_wait(estimator, capacity, again, quantize, device, monkeypatch):
    """In forward, backward and pseudo-gradients; transformers asks once a pass whether rows are several texts."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in GROUPED_PRODUCTS:
        pytest.skip(f"torch multiplies expert by expert on compute capability {major}.{minor}, and reads their rows")
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    model = make_model(capacity_factor=capacity, again=again, quantize=quantize)
    step = Step(model, device, torch.bfloat16, estimator, drawn=4)
    step.run()  # loads kernels
    assert torch.cuda.get_sync_debug_mode() == 0
    with waits_refused():  # torch raises where the host waits
        assert torch.cuda.get_sync_debug_mode() == 2
        step.run()


def test_memory_does_not_grow_over_steps(device):
    """Nothing of a step outlives it: neither its graph nor the tokens that were drawn."""
    step = Step(make_model(), device, estimator="linearised", drawn=4)
    held, peaks = [], []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats(device)
        step.run()
        step.model.zero_grad(set_to_none=True)
        held.append(torch.cuda.memory_allocated(device))
        peaks.append(torch.cuda.max_memory_allocated(device))
    assert held[-1] == held[1] and peaks[-1] == peaks[1]
