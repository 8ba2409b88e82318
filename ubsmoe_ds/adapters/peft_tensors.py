"""Convert adapters between our names and shapes and those of Hugging Face PEFT. Pure functions on tensors.

PEFT adapts the stacked weights of transformers' experts (its `target_parameters`). Gate and up are one weight there:
- Our two adapters of LoRA rank R become one of rank 2 R: the A side by side, the B on a diagonal. So does PEFT itself.
- PEFT's own adapter of that weight has one A for both; it is read as two adapters with the same A.
Adapters of older models, where each expert was a module, are read too. Modules with a LoRA rank or a scaling of their
own get zeros up to the largest rank, and the ratio of the scalings goes into B: B A stays what it was.

Shapes: E experts, R LoRA rank, Q that of gate and up together, D model width, F expert width, I and O a projection's
inputs and outputs. Names: `layers.0.experts.gate.lora_A` and so on, see aggregation/units.py.
"""

import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ubsmoe_ds.adapters.peft_config import LoraSettings
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.causal_lm import ATTENTION_PROJECTIONS
from ubsmoe_ds.models.family import Family
from ubsmoe_ds.models.stored import GATE_UP, unstacked

PREFIX = "base_model.model."
SIDECAR_ENDINGS = (".phi", ".scale")
ROUTER_ENDINGS = (".router.weight", ".router.bias", ".router.correction")  # the last two are frozen, but PEFT's too
LAYER = r"layers\.(?:0|[1-9][0-9]{0,5})"
OURS = re.compile(rf"layers\.\d+\.(experts\.(gate|up|down)|attention\.({'|'.join(ATTENTION_PROJECTIONS)}))\.lora_[AB]")


class Pair(NamedTuple):
    """One LoRA adapter: A [.., R, I], B [.., O, R], and the factor of B A."""

    A: Tensor
    B: Tensor
    scaling: float


def needed(family: Family) -> str:
    """Return what an adapter may have, for users."""
    gate_up, down = expert_weights(family)
    return (
        f"needed is LoRA on experts (target_parameters {gate_up}, {down}) or attention (target_modules "
        f"{', '.join(family.attention)}), or modules_to_save {family.module}.{family.router.module}"
    )


def expert_weights(family: Family) -> tuple[str, str]:
    """Return PEFT's names of the experts' stacked weights, without the layer."""
    return f"{family.module}.experts.gate_up_proj", f"{family.module}.experts.down_proj"


def expert_targets(state: Mapping[str, Tensor], family: Family) -> list[str]:
    """Return PEFT's names of the experts' weights that an adapter in our names changes.

    Raises:
        UserError: if PEFT has no form for the adapter: a tensor that it does not know, A without B, gate without up,
            or layers whose experts differ in what is adapted.
    """
    kinds = defaultdict(set)
    for name in state:
        if OURS.fullmatch(name):
            other = name[:-1] + ("B" if name.endswith("A") else "A")
            if other not in state:
                raise UserError(f"adapter: tensor {name!r} has no counterpart {other!r}; save it again")
            if ".experts." in name:
                kinds[name.split(".")[1]].add(name.split(".")[3])
        elif not name.endswith((*SIDECAR_ENDINGS, *ROUTER_ENDINGS)):
            raise UserError(f"adapter: tensor {name!r} has no form in PEFT; leave it out")
    forms = list(kinds.values())
    if any(form != forms[0] or ("gate" in form) != ("up" in form) for form in forms):
        raise UserError(
            "adapter: PEFT has gate and up only together, and the same of experts in all layers; adapt both"
        )
    gate_up, down = expert_weights(family)
    return [gate_up] * any("gate" in form for form in forms) + [down] * any("down" in form for form in forms)


def to_peft(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Convert our names and shapes to PEFT's, leaving out what belongs in the sidecar; raise as `expert_targets`."""
    targets = expert_targets(state, family)
    inner = "base_layer." if len(targets) == 2 else ""  # PEFT wraps the experts once for each weight, down last
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, rest = name.split(".", 2)[1:]
        prefix = f"{PREFIX}model.layers.{layer}."
        if rest.startswith("router."):
            ending, stored = rest.removeprefix("router."), family.router.saved
            if ending in stored:  # others are outside of the module, and the base's
                shape = (1,) * (family.router.correction_ndim - 1) + (-1,) if ending == "correction" else value.shape
                tensors[f"{prefix}{family.module}.{stored[ending]}"] = value.reshape(shape).contiguous()
        elif rest.startswith("attention."):
            tensors[f"{prefix}self_attn.{rest.removeprefix('attention.')}.weight"] = value.contiguous()
        elif rest == "experts.gate.lora_A":
            joined = _join_gate_up(state, f"layers.{layer}.experts.", interleaved=family.experts.interleaved)
            tensors |= _stacked(f"{prefix}{family.module}.experts.{inner}", *joined)
        elif rest == "experts.down.lora_A":
            tensors |= _stacked(
                f"{prefix}{family.module}.experts.", value, state[f"layers.{layer}.experts.down.lora_B"]
            )
    return tensors


def from_peft(
    tensors: Mapping[str, Tensor], settings: LoraSettings, family: Family, num_experts: int
) -> tuple[dict[str, Tensor], int]:
    """Convert PEFT's names and shapes to ours, all of one LoRA rank, to be scaled by `settings.scaling`.

    Args:
        tensors: the adapter's.
        settings: of its config.
        family: of the base model.
        num_experts: E.

    Returns:
        (state in our names, LoRA rank: the largest of all).

    Raises:
        UserError: naming a tensor that our models have no place for, the form it has, and the form that is needed.
    """
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    state: dict[str, Tensor] = {}
    saved = {f"{family.module}.{name}": ending for ending, name in family.router.saved.items()}
    for name, value in tensors.items():
        router = re.fullmatch(rf"{re.escape(PREFIX)}model\.({LAYER})\.({'|'.join(map(re.escape, saved))})", name)
        lora = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not (router or lora):
            raise UserError(f"adapter: tensor {name!r} is no LoRA; {needed(family)}")
        if not value.numel() or (value.ndim != 2 and not (router and saved[router[2]] != "weight")):
            raise UserError(f"adapter: tensor {name!r} has the shape {[*value.shape]}, must be a matrix")
        if router:
            ending = saved[router[2]]
            state[f"{router[1]}.router.{ending}"] = value if ending == "weight" else value.flatten()
        elif lora:
            modules[lora[1]][lora[2]] = value
    pairs: dict[str, Pair] = {}
    for name, pair in _modules(modules, settings, family, num_experts):
        if name in pairs:
            raise UserError(f"adapter: it has {name!r} twice, stacked and for each expert; leave one out")
        pairs[name] = pair
    rank = max((pair.A.shape[-2] for pair in pairs.values()), default=settings.rank)
    for name, pair in pairs.items():
        state |= _of_rank(name, pair, rank, settings.scaling)
    return state, rank


def _modules(
    modules: Mapping[str, Mapping[str, Tensor]], settings: LoraSettings, family: Family, num_experts: int
) -> Iterator[tuple[str, Pair]]:
    """Yield (our name, pair) for PEFT's modules."""
    projections = {family.gate: "gate", family.up: "up", family.down: "down"} if family.gate else {}
    single: dict[str, dict[int, Pair]] = defaultdict(dict)
    for module, factors in modules.items():
        for factor, other in ("AB", "BA"):
            if factor not in factors:
                lost, found = (f"{PREFIX}{module}.lora_{name}.weight" for name in (factor, other))
                raise UserError(f"adapter: tensor {found!r} has no counterpart {lost!r}; save it again")
        A, B = factors["A"], factors["B"]
        attention = re.fullmatch(rf"model\.({LAYER})\.self_attn\.({'|'.join(ATTENTION_PROJECTIONS)})", module)
        stacked = re.fullmatch(rf"model\.({LAYER})\.{family.module}\.experts(\.base_layer)?", module)
        expert = re.fullmatch(rf"model\.({LAYER})\.{family.block}\.experts\.(\d{{1,5}})\.(\w+)", module)
        if attention:
            yield f"{attention[1]}.attention.{attention[2]}", _checked(module, module, A, B, settings, 1)
        elif stacked:
            weight = _adapted_weight(module, modules, settings, family)
            pair = _checked(module, weight, A, B, settings, num_experts)
            yield from (
                (f"{stacked[1]}.experts.{name}", part) for name, part in _unstacked(weight, pair, num_experts, family)
            )
        elif expert and expert[3] in projections:
            if not settings.is_plain(module):
                raise UserError(
                    f"adapter: {module!r} is an adapter of one expert with rsLoRA or a pattern, whose scaling PEFT's "
                    f"versions do not agree on; {needed(family)}"
                )
            pair = _checked(module, module, A, B, settings, 1)
            single[f"{expert[1]}.experts.{projections[expert[3]]}"][int(expert[2])] = pair
        else:
            raise UserError(f"adapter: it has LoRA on {module!r}; {needed(family)}")
    yield from ((name, _joined(name, of_experts, num_experts)) for name, of_experts in single.items())


def _adapted_weight(module: str, modules: Container[str], settings: LoraSettings, family: Family) -> str:
    """Return the weight that a stacked module adapts; PEFT wraps the experts once for each, gate and up first."""
    experts = module.removesuffix(".base_layer")
    if experts not in modules:
        raise UserError(f"adapter: it has {module!r} but not {experts!r}, its part for down_proj; save it again")
    if module != experts:
        return f"{experts}.gate_up_proj"
    if f"{experts}.base_layer" in modules:
        return f"{experts}.down_proj"
    named = [name for name in ("gate_up_proj", "down_proj") if settings.targets(f"{experts}.{name}")]
    if len(named) != 1:
        raise UserError(
            f"adapter: it has one adapter of {experts!r}, but target_parameters names {' and '.join(named) or 'none'} "
            f"of {' and '.join(expert_weights(family))}; save it again"
        )
    return f"{experts}.{named[0]}"


def _checked(module: str, weight: str, A: Tensor, B: Tensor, settings: LoraSettings, stacked: int) -> Pair:
    """Return the pair after comparing its shapes with the config; `stacked` experts are side by side."""
    rank = settings.rank_of(weight)
    for factor, value, size in (("A", A, A.shape[0]), ("B", B, B.shape[1])):
        if size != stacked * rank:
            experts = f" and the model {stacked} experts" if stacked > 1 else ""
            raise UserError(
                f"adapter: tensor '{PREFIX}{module}.lora_{factor}.weight' has the shape {[*value.shape]}, its config "
                f"says rank {rank}{experts}"
            )
    return Pair(A, B, settings.scaling_of(weight))


def _unstacked(weight: str, pair: Pair, num_experts: int, family: Family) -> Iterator[tuple[str, Pair]]:
    """Yield (projection, pair) of a stacked weight: A from [E R, I] to [E, R, I], and B from [O, R E] to [E, O, R]."""
    A_EQI = pair.A.view(num_experts, -1, pair.A.shape[1])
    B_EOQ = pair.B.view(pair.B.shape[0], -1, num_experts).permute(2, 0, 1)
    if weight.endswith("down_proj"):
        yield "down", Pair(A_EQI, B_EOQ, pair.scaling)
        return
    outputs, rank = B_EOQ.shape[1:]
    if outputs % 2:
        raise UserError(f"adapter: {weight!r} has {outputs} outputs, which have no halves for gate and up")
    half = rank // 2
    first, second = unstacked(B_EOQ, GATE_UP, replace(family.experts, transposed=False)).values()
    if rank % 2 == 0 and not first[..., half:].any() and not second[..., :half].any():
        yield "gate", Pair(A_EQI[:, :half], first[..., :half], pair.scaling)
        yield "up", Pair(A_EQI[:, half:], second[..., half:], pair.scaling)
    else:
        yield from (("gate", Pair(A_EQI, first, pair.scaling)), ("up", Pair(A_EQI, second, pair.scaling)))


def _joined(name: str, pairs: Mapping[int, Pair], num_experts: int) -> Pair:
    """Stack the pairs of single experts."""
    if set(pairs) != {*range(num_experts)}:
        wrong = min(set(pairs) ^ {*range(num_experts)})
        what = "is missing" if wrong < num_experts else "has no place"
        raise UserError(f"adapter: of {name!r} expert {wrong} {what}; the model has {num_experts} experts")
    ordered = [pairs[number] for number in range(num_experts)]
    if len({(pair.A.shape, pair.B.shape) for pair in ordered}) > 1:
        raise UserError(f"adapter: the experts of {name!r} differ in shape; save it again")
    return Pair(torch.stack([p.A for p in ordered]), torch.stack([p.B for p in ordered]), ordered[0].scaling)


def _of_rank(name: str, pair: Pair, rank: int, scaling: float) -> dict[str, Tensor]:
    """Return a pair's two tensors, with zeros up to a LoRA rank, and B such that `scaling` B A is what it was."""
    A, B = pair.A, pair.B
    if pair.scaling != scaling:
        B = B.double() * (pair.scaling / scaling)
        if not bool(B.float().isfinite().all()):
            raise UserError(f"adapter: {name!r} is scaled by {pair.scaling:g}, which is too much for its tensors")
        B = B.float()
    short = rank - A.shape[-2]
    A, B = (F.pad(A, (0, 0, 0, short)), F.pad(B, (0, short))) if short else (A, B)
    return {f"{name}.lora_A": A.contiguous(), f"{name}.lora_B": B.contiguous()}


def _stacked(prefix: str, A_ERI: Tensor, B_EOR: Tensor) -> dict[str, Tensor]:
    """Stack factors as PEFT does: A as [E R, I], expert by expert, and B as [O, R E], LoRA rank by LoRA rank."""
    B = B_EOR.permute(1, 2, 0).reshape(B_EOR.shape[1], -1)
    return {f"{prefix}lora_A.weight": A_ERI.reshape(-1, A_ERI.shape[2]), f"{prefix}lora_B.weight": B.contiguous()}


def _join_gate_up(state: Mapping[str, Tensor], prefix: str, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return A [E, Q, D] and B [E, 2 F, Q] of gate and up together."""
    A_EQD = torch.cat([state[f"{prefix}gate.lora_A"], state[f"{prefix}up.lora_A"]], dim=1)
    gate_EFR, up_EFR = state[f"{prefix}gate.lora_B"], state[f"{prefix}up.lora_B"]
    zero_EFR = torch.zeros_like(gate_EFR)
    gate_EFQ, up_EFQ = torch.cat([gate_EFR, zero_EFR], dim=2), torch.cat([zero_EFR, up_EFR], dim=2)
    if interleaved:
        return A_EQD, torch.stack([gate_EFQ, up_EFQ], dim=2).flatten(1, 2)
    return A_EQD, torch.cat([gate_EFQ, up_EFQ], dim=1)
