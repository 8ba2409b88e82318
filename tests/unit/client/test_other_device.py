"""A step on another device than the CPU, without one: on torch's "meta" tensors, which have no values.

In bf16, as on accelerators, `Client.step`: forward, backward, pseudo-gradients, `GradientHook` with clipping and
corrections, and the optimiser, of every family. An operation that mixes devices, or that asks a tensor for its values
(and so would make the host wait for a GPU), fails there. Under expert parallelism this is rank 0 of two, and messages
bring back what was sent. DeepSpeed's engine has a stand-in, which calls backward and the optimiser. Values
are not checked here: tests/unit/moe and tests/distributed do that.
"""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from deepspeed import comm as dist
from transformers import AutoModelForCausalLM, masking_utils

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import MODELS
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client import gradients
from ubsmoe_ds.client.drift import DriftCorrection
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.client.gradients import GradientHook
from ubsmoe_ds.data.batches import StepBatch, Tokens
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.models.hf_config import check_alignment
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.moments import ExpertMoments

META = torch.device("meta")


@pytest.fixture(autouse=True)
def without_transformers_question(monkeypatch):
    """transformers asks once a forward pass whether rows are several texts; the only wait that is not ours."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def check_step(family, *, estimator="linearised", again=False, attention=True, quantize=None, ep=1, **gate):
    """Run two micro-batches forward, backward and through the pseudo-gradients; assert that all tensors are on META."""
    spec = UBSMoESpec(
        GateConfig(k=2, candidates=4, **gate), lora_attention=attention, quantize=quantize, expert_parallel=ep
    )
    config = copy.deepcopy(MODELS[family])
    setattr(config, FAMILIES[config.model_type].width, 16)  # grouped products on a device want rows of 16 bytes
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = convert(hf, spec).to(META, torch.bfloat16).train()
    if again:
        model.checkpoint_activations()
    collector = PseudoGradientCollector(model.layers, estimator, 0.7, tokens_per_expert=3).attach()
    collector._world = ep
    moments = ExpertMoments(model.layers, share=0.5) if ESTIMATORS[estimator].moments else None
    for layer in model.layers:
        layer.gate.reset_counts()
    client = a_client(model, collector)
    hook = client.gradient_hook
    ids, positions = torch.randint(2, tiny.VOCAB, (2, 8)), torch.tensor([3, 5])
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), positions, positions)
    assert client.step(StepBatch([tokens, tokens], 4, 32)).device == META
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.device == META for p in trained)
    assert hook._additions and all(value.device == META for _, value in hook._additions)
    assert hook.norms == (2.0, 1.0) and not hook.skipped
    state = client.engine.optimizer.state
    assert all(value.device == META for of in state.values() for value in of.values() if value.ndim)
    assert hook.squares.sums_LE2.device == META
    assert moments is None or all(layer.experts.moment_sums_EX.device == META for layer in model.layers)
    assert all(layer.gate.routed_E.device == META for layer in model.layers)
    model.eval()
    with torch.no_grad():
        if ep == 1:
            assert model(*tokens.to(META)[:3]).device == META
        else:  # the slots of a batch without a limit are the one number that `MOELayer` reads
            with pytest.raises(RuntimeError, match="item"):
                model(*tokens.to(META)[:3])


def a_client(model, collector):
    """Return a client of these that clips, corrects against drift and steps; its engine does what DeepSpeed's must."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = SimpleNamespace(
        module=model, optimizer=optimizer, basic_optimizer=optimizer, device=META, zero_optimization_stage=lambda: 0
    )
    hook = GradientHook(engine, model.layers, 0.5, collector)
    hook.correct = DriftCorrection(optimizer, mu=0.1, scaffold=True, own=[]).correct
    steps = iter([lambda: None, optimizer.step])  # the first micro-batch is no step
    client = object.__new__(Client)
    client.model, client.collector, client.gradient_hook, client._tail, client.device = model, collector, hook, 4, META
    client.engine = Engine(model, optimizer, steps)
    client.exp = SimpleNamespace(
        dmr=SimpleNamespace(enabled=True, penalty=0.1),
        router=SimpleNamespace(aux_loss=0.3),
        lora=SimpleNamespace(prune_penalty=0.5),
    )
    return client


class Engine(NamedTuple):
    """Stands for DeepSpeed's, without its own checks."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    steps: Iterator

    def __call__(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        next(self.steps)()


@pytest.fixture(autouse=True)
def one_rank_that_reads_norms(monkeypatch):
    """The norms of a step are the one thing that the host reads; they are computed all the same."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)  # which needs a GPU
    monkeypatch.setattr(gradients.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(gradients.dist, "get_world_size", lambda group=None: 1)
    real = GradientHook._norm

    def read(hook, pseudo_norms):
        assert real(hook, hook._gradients()).device == META and real(hook, pseudo_norms).device == META
        return 2.0, 1.0

    monkeypatch.setattr(GradientHook, "_read_norms", read)


@pytest.fixture
def two_ranks(monkeypatch):
    """Messages between two ranks, each with half of the experts; return the devices and kinds of what is sent."""
    sent = []

    def exchange(received, value, group=None):
        assert received.shape == value.shape and received.device == value.device
        sent.append(("all_to_all", value.device))
        received.copy_(value)

    def reduce(value, op=None, group=None):
        sent.append(("all_reduce", value.device))

    for name, replacement in (("all_to_all_single", exchange), ("all_reduce", reduce)):
        monkeypatch.setattr(dist, name, replacement)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    return sent


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_stays_on_the_device(estimator):
    check_step("olmoe", estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_stays_on_the_device_under_expert_parallelism(estimator, two_ranks):
    """With a capacity, so that the number of slots is known on the host."""
    check_step("olmoe", estimator=estimator, ep=2, capacity_factor=0.75)
    assert {device for _, device in two_ranks} == {META}
    layers, batches = MODELS["olmoe"].num_hidden_layers, 2
    assert len([kind for kind, _ in two_ranks if kind == "all_to_all"]) >= 4 * layers * batches


@pytest.mark.parametrize("family", sorted(MODELS.keys() - {"olmoe"}))
def test_every_family_stays_on_the_device(family):
    check_step(family)


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity_factor": 0.75},
        {"learned_scale": True},
        {"modulate": "selection", "attention": False},
        {"again": True},
        {"quantize": "nf4"},
        {"quantize": "int8"},
    ],
    ids=lambda settings: "-".join(map(str, next(iter(settings.items())))),
)
def test_every_setting_stays_on_the_device(settings):
    check_step("olmoe", **({"phi_range": (-1.0, 1.0)} | settings))


def test_experts_whose_rows_are_not_aligned_are_refused_in_bf16():
    config = copy.deepcopy(MODELS["olmoe"])
    with pytest.raises(UserError, match=r"deepspeed\.bf16\.enabled: .* intermediate_size, 12, is not divisible by 8"):
        check_alignment(config, "deepspeed.bf16.enabled: true")
    config.intermediate_size = 16
    check_alignment(config, "deepspeed.bf16.enabled: true")
