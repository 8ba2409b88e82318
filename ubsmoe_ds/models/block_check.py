"""Check that what a family's line says about transformers' block is all of it, and true.

Nothing that a block holds may be lost: every parameter, buffer and module is named by the line (`check_block`). And
both must compute the same: transformers' block, experts and head on random numbers against ours (`check_same`). So a
model whose block has another rule is refused, and does not load with wrong logits.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token.
"""

import copy
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.family import Family
from ubsmoe_ds.models.stored import BIAS, DOWN, GATE_UP, projections, stacked_shapes, unstacked
from ubsmoe_ds.moe.activations import SWIGLU, Activation, ClampedSwish
from ubsmoe_ds.moe.expert_mlp import route_rows
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.frozen import Sizes, Views, WholeExperts
from ubsmoe_ds.moe.gate import GateConfig, UBSMoEGate
from ubsmoe_ds.moe.router import Router

TOKENS, PROBE_WIDTH = 16, 8
TOLERANCE = 1e-3  # of the largest value; other rules are off by a tenth and more


def check_block(block: Any, family: Family) -> None:
    """Check that a block of transformers holds a router, stacked experts, the shared modules, and nothing else.

    Raises:
        UserError: naming a parameter, buffer or module that would be lost.
    """
    tensors = {*family.router.tensors, *(f"experts.{name}" for name in stacked_shapes(family, 1, 1, 1))}
    known = {".".join(name.split(".")[: n + 1]) for name in tensors for n in range(name.count(".") + 1)}
    known |= {"experts.act_fn"} if family.experts.activation == "swiglu" else set()
    inside = (*block.named_parameters(), *block.named_buffers(), *block.named_modules())
    shared = tuple(f"{name}." for name in family.shared)
    found = {name for name, _ in inside if name and not f"{name}.".startswith(shared)}
    missing = {name for name in family.shared if not hasattr(block, name)}
    if found != known or missing:
        name = min((found ^ known) | missing)
        what = "has" if name in found else "lacks"
        raise UserError(
            f"model.path: a block of this model, as transformers builds it, {what} {name!r}; this program cannot train "
            "such blocks"
        )


def router_of(config: PreTrainedConfig, family: Family) -> Router:
    """Return the rule of a model's router.

    Raises:
        UserError: if its groups do not divide the experts, or leave fewer experts than are active.
    """
    line, experts = family.router, getattr(config, family.num_experts)
    groups, kept = line.groups_of(config)
    normalize = config.norm_topk_prob if line.normalizes is None else line.normalizes
    router = Router(
        score=line.score,
        corrected=bool(line.correction),
        groups=groups,
        kept_groups=kept,
        group_best=line.group_best,
        normalize=bool(normalize),
        least_sum=getattr(config, line.least_sum) if line.least_sum else 0.0,
        scaling=float(getattr(config, line.scaling)) if line.scaling else 1.0,
    )
    if experts % groups or (groups > 1 and experts // groups < line.group_best):
        raise UserError(
            f"model.path: {line.groups[0]} is {groups}, which does not divide {experts} experts into groups"
        )
    if not 1 <= kept <= groups:
        raise UserError(f"model.path: {line.groups[1]} is {kept}, must be 1 to {line.groups[0]}, {groups}")
    return router


def activation_of(config: PreTrainedConfig, family: Family) -> Activation:
    """Return the activation of a model's experts."""
    if family.experts.activation == "clamped_swish":
        return ClampedSwish(float(config.swiglu_alpha), float(config.swiglu_limit))
    return SWIGLU


@torch.random.fork_rng(devices=[])  # modules that are built draw numbers, and training goes on from its own
def check_same(block: Any, hf: PreTrainedModel, family: Family) -> None:
    """Check that transformers' block and experts compute what the family's line says, and that its files are so named.

    Args:
        block: one of the model's; of its classes new ones are built, with random values.
        hf: the model.
        family: its line.

    Raises:
        UserError: naming what differs.
    """
    _check_names(hf, family)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(TOKENS, hf.config.hidden_size, generator=generator)
    for part, check in (("router or shared experts", _routed), ("experts", _computed)):
        try:
            theirs, ours = check(block, hf.config, family, x_TD, generator)
            same = theirs.shape == ours.shape and (theirs - ours).abs().max() <= TOLERANCE * theirs.abs().max()
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            same, reason = False, f" ({' '.join(str(error).split())[:200]})"
        else:
            reason = ""
        if not same:
            raise UserError(
                f"model.path: the {part} of a block of {hf.config.model_type!r}, as transformers computes them, are "
                f"not what models/families.py says{reason}; this program cannot train such blocks"
            )


def check_head(hf: PreTrainedModel, ours: Any) -> None:
    """Check that transformers makes logits of hidden states as `ours` does, on a model without layers.

    Raises:
        UserError: if it does not, as with a scale or a cap of the logits.
    """
    layers, ids = hf.model.layers, torch.arange(4).unsqueeze(0) % hf.config.vocab_size
    hf.model.layers = nn.ModuleList()
    try:
        with torch.no_grad():
            theirs = hf(input_ids=ids, use_cache=False).logits.float()
            same = (theirs - ours(ids, torch.ones_like(ids, dtype=torch.bool))).abs().max() <= 1e-2 * theirs.abs().max()
    finally:
        hf.model.layers = layers
        for layer in ours.layers:
            layer.used_token = None  # that of these ids
    if not same:
        raise UserError(
            f"model.path: the logits of {hf.config.model_type!r}, as transformers computes them, are not the head's; "
            "this program cannot train such models"
        )


def set_tensor(block: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer of this name and any shape into a block of transformers."""
    parent, _, leaf = name.rpartition(".")
    owner = block.get_submodule(parent)
    setattr(owner, leaf, nn.Parameter(value) if leaf in owner._parameters else value)


def router_shapes(block: nn.Module, family: Family, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the router's tensors for so many experts, of a block with any number."""
    shapes = {name: tuple(attrgetter(name)(block).shape) for name in family.router.tensors}
    return {
        name: (num_experts, *shape[1:]) if name == family.router.weight else (*shape[:-1], num_experts)
        for name, shape in shapes.items()
    }


def fill_gate(gate: UBSMoEGate, block: Any, family: Family) -> None:
    """Copy a block's router to our gate."""
    line = family.router
    gate.wg.weight.data.copy_(attrgetter(line.weight)(block))
    for name, target in ((line.bias, gate.bias_E), (line.correction, gate.correction_E)):
        if name:
            target.copy_(attrgetter(name)(block).detach().reshape(-1))


class SharedExpert(nn.Module):
    """The expert that every token passes beside its K experts (Qwen2-MoE): sigmoid(gate x) * expert(x)."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return torch.sigmoid(self.gate(x)) * self.expert(x)


def shared_of(block: Any, family: Family) -> nn.Module | None:
    """Return the module that every token passes beside its K experts, of a block's modules."""
    parts = [getattr(block, name) for name in family.shared]
    if not parts or parts[0] is None:
        return None
    return SharedExpert(*parts) if len(parts) == 2 else parts[0]


class _Doubling(nn.Module):
    """Stands for a shared expert, which both sides take over as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class _Fingerprint(nn.Module):
    """Stands for the experts: x times the sum of its experts' numbers, weighted."""

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return x_TD * (weight_TK * (1 + index_TK)).sum(-1, keepdim=True)


def _routed(
    block: Any, config: PreTrainedConfig, family: Family, x_TD: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (transformers', our) outputs of a block whose experts are a function of their number."""
    with torch.device("meta"):
        theirs = type(block)(config)
    theirs.experts = _Fingerprint()
    experts = getattr(config, family.num_experts)
    for name, shape in router_shapes(theirs, family, experts).items():
        set_tensor(theirs, name, torch.randn(shape, generator=generator) / shape[-1] ** 0.5)
    for n, name in enumerate(family.shared):
        if n == 1:
            gate = nn.Linear(config.hidden_size, 1, bias=False)
            gate.weight.data.normal_(generator=generator)
        setattr(theirs, name, None if getattr(theirs, name) is None else gate if n == 1 else _Doubling())
    k = config.num_experts_per_tok
    gate_config = GateConfig(k, experts, phi_range=None)
    ours = UBSMoEGate(
        config.hidden_size, experts, gate_config, router_of(config, family), biased=bool(family.router.bias)
    )
    fill_gate(ours, theirs, family)
    with torch.no_grad():
        y = theirs.eval()(x_TD.unsqueeze(0))
        if isinstance(y, tuple) != family.returns_pair:
            raise TypeError("a block's outputs are another number")
        weight_KT = ours.eval()(x_TD)[5]
        assert ours.routing is not None
        ours_TD = _Fingerprint()(x_TD, ours.routing.index_KT.t(), weight_KT.t())
        shared = shared_of(theirs, family)
        ours_TD = ours_TD if shared is None else ours_TD + shared(x_TD)
    return (y[0] if family.returns_pair else y).reshape(x_TD.shape), ours_TD


def _computed(
    block: Any, config: PreTrainedConfig, family: Family, x_TD: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (transformers', our) outputs of two narrow experts."""
    narrow = copy.deepcopy(config)
    setattr(narrow, family.num_experts, 2)
    setattr(narrow, family.width, PROBE_WIDTH)
    with torch.device("meta"):
        theirs = type(block.experts)(narrow)
    theirs = theirs.to_empty(device="cpu").float().eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(generator=generator).mul_(0.5)
    ours = StackedExperts(
        WholeExperts(Sizes(2, PROBE_WIDTH, config.hidden_size, 1, family.experts.biased), torch.float32),
        full_rank=1,
        alpha=1.0,
        group_name="",
        generator=generator,
        num_experts=2,
        first=0,
        activation=activation_of(config, family),
    )
    copy_experts(theirs, family, ours)
    index_T1 = torch.arange(len(x_TD)).unsqueeze(1) % 2
    weight_T1 = torch.rand(index_T1.shape, generator=generator)
    location_T1, kept_E = torch.arange(len(x_TD)).unsqueeze(1) // 2, torch.bincount(index_T1.flatten(), minlength=2)
    with torch.no_grad():
        rows = route_rows(index_T1.t(), location_T1.t(), kept_E, len(x_TD))
        return theirs(x_TD, index_T1, weight_T1), ours.eval().run(x_TD, weight_T1, rows)


def copy_experts(theirs: nn.Module, family: Family, ours: StackedExperts) -> None:
    """Copy the weights of all of transformers' stacked experts to those of this rank."""
    local = slice(ours.first, ours.first + ours.num_local_experts)

    def read(base: Views, bias: Views) -> None:
        for name in stacked_shapes(family, 1, 1, 1):
            targets = bias if name.endswith(BIAS) else base
            for part, view in unstacked(getattr(theirs, name).data[local], name, family.experts).items():
                if part in targets:
                    targets[part].copy_(view)

    ours.frozen.fill(read)


def _check_names(hf: PreTrainedModel, family: Family) -> None:
    """Check that transformers joins the single experts' projections of the files in the order of ours."""
    found: dict[str, list[str]] = {}
    for rule in get_model_conversion_mapping(hf, add_legacy=False):
        for stacked in (GATE_UP, DOWN):
            if isinstance(rule, WeightConverter) and f"experts.{stacked}" in " ".join(rule.target_patterns):
                found[stacked] = [name.removesuffix(".weight").rpartition(".")[2] for name in rule.source_patterns]
    named = {stacked: list(parts.values()) for stacked, parts in projections(family).items()}
    if found != (named if family.gate else {}):
        raise UserError(
            f"model.path: transformers reads files of {hf.config.model_type!r} with an expert's projections named "
            f"{found}, and models/families.py names them {named}; this program cannot read such files"
        )
