"""Adapters as Hugging Face PEFT stores them, so that `PeftModel.from_pretrained(base, folder)` has what was trained.

Experts' LoRA goes through PEFT's `target_parameters` on the stacked weights of transformers' experts. Gate and up are
one weight there, so that their two adapters of rank R become one of rank 2 R: the A side by side, the B on a diagonal.
(PEFT's own of that weight has one A of rank R for both; it is read as two adapters with the same A.)
A trained router is a module saved whole. What PEFT has no word for (phi, K, the gate's rescaling) stands in a file
beside: `SIDECAR`. PEFT alone then computes what the model does at phi = 0 without rescaling, at the K of its config.
FLoRA leaves no adapter but changed weights, which are no matter for PEFT.

Shapes: E experts, R LoRA rank, Q = 2 R, D model width, F expert width, I and O a projection's inputs and outputs.
Names: `layers.0.experts.gate.lora_A` and so on, see `federation/units.py`; B is scaled by alpha / R in both.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json, replace_files
from ubsmoe_ds.models.causal_lm import ATTENTION_PROJECTIONS
from ubsmoe_ds.models.weights import read_tensors

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "ubsmoe.safetensors"
PREFIX = "base_model.model.model."
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
OF_SIDECAR = (".phi", ".scale")
STACKED = {  # PEFT's names -> (which projections it holds side by side, A or B)
    "mlp.experts.base_layer.lora_A.weight": (("gate", "up"), "A"),
    "mlp.experts.base_layer.lora_B.weight": (("gate", "up"), "B"),
    "mlp.experts.lora_A.weight": (("down",), "A"),
    "mlp.experts.lora_B.weight": (("down",), "B"),
}
# what PEFT would compute otherwise than we do
NOT_OURS = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication"),
    *("corda_config", "loftq_config", "arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens"),
)
# ways to start that leave the base's weights as they are; others (pissa, olora, ...) change them whenever PEFT loads
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def to_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes -> PEFT's, without what belongs in the sidecar."""
    found: dict[str, Tensor] = {}
    for layer in sorted({name.split(".")[1] for name in state}, key=int):
        own = {
            name.removeprefix(f"layers.{layer}."): value.contiguous()
            for name, value in state.items()
            if name.startswith(f"layers.{layer}.") and not name.endswith(OF_SIDECAR)
        }
        prefix = f"{PREFIX}layers.{layer}."
        if "experts.gate.lora_A" in own:
            found |= _stacked(f"{prefix}mlp.experts.base_layer.", *_join_gate_up(own))
            found |= _stacked(f"{prefix}mlp.experts.", own["experts.down.lora_A"], own["experts.down.lora_B"])
        if "router.weight" in own:
            found[f"{prefix}mlp.gate.weight"] = own["router.weight"]
        for name in ATTENTION_PROJECTIONS:
            for factor in "AB":
                if f"attention.{name}.lora_{factor}" in own:
                    found[f"{prefix}self_attn.{name}.lora_{factor}.weight"] = own[f"attention.{name}.lora_{factor}"]
    return found


def from_peft(tensors: Mapping[str, Tensor], num_experts: int, rank: int) -> dict[str, Tensor]:
    """The way back: PEFT's names and shapes -> ours.

    Args:
        tensors: of the adapter.
        num_experts: E.
        rank: R; the one of gate and up is R as well where PEFT has trained it, and 2 R in what `to_peft` gave.

    Raises:
        UserError: for tensors that no adapter of ours has.
    """
    found: dict[str, Tensor] = {}
    pattern = re.compile(re.escape(PREFIX) + r"layers\.(0|[1-9][0-9]*)\.(.+)")
    for name, value in tensors.items():
        match = pattern.fullmatch(name)
        layer, rest = (f"layers.{match[1]}.", match[2]) if match else ("", "")
        attention = re.fullmatch(r"self_attn\.(\w+)\.(lora_[AB])\.weight", rest)
        if rest not in (*STACKED, "mlp.gate.weight") and not (attention and attention[1] in ATTENTION_PROJECTIONS):
            raise UserError(f"adapter: tensor {name!r} is none that UB-SMoE trains")
        if value.ndim != 2 or not value.numel():
            raise UserError(f"adapter: tensor {name!r} has the shape {[*value.shape]}, no matrix")
        if rest in STACKED:
            found |= {f"{layer}experts.{own}": part for own, part in _unstacked(name, value, num_experts, rank).items()}
        elif attention:
            found[f"{layer}attention.{attention[1]}.{attention[2]}"] = value
        else:
            found[f"{layer}router.weight"] = value
    return found


def _unstacked(name: str, value: Tensor, num_experts: int, rank: int) -> dict[str, Tensor]:
    """A stacked tensor of PEFT as ours of each projection: [E R, I] -> [E, R, I], and [O, R E] -> [E, O, R]."""
    projections, factor = next(found for ending, found in STACKED.items() if name.endswith(f".{ending}"))
    parts = len(projections)
    stacked = value.shape[0 if factor == "A" else 1]
    if parts == 2 and stacked == num_experts * rank:
        return _of_both(name, value, num_experts, factor)
    if stacked % (num_experts * parts) or (factor == "B" and len(value) % parts):
        raise UserError(
            f"adapter: tensor {name!r} has the shape {[*value.shape]}, which is none of {num_experts} experts"
        )
    if factor == "A":
        A_EQI = value.view(num_experts, -1, value.shape[1])
        return {f"{p}.lora_A": A.contiguous() for p, A in zip(projections, A_EQI.chunk(parts, dim=1), strict=True)}
    B_EOQ = value.view(value.shape[0], -1, num_experts).permute(2, 0, 1)
    split = _split_gate_up(B_EOQ, name) if parts == 2 else {"down": B_EOQ.contiguous()}
    return {f"{projection}.lora_B": B for projection, B in split.items()}


def _of_both(name: str, value: Tensor, num_experts: int, factor: str) -> dict[str, Tensor]:
    """One A for gate and up, and B of both: [W_gate; W_up] + [B_gate; B_up] A is what two adapters with this A do."""
    if factor == "A":
        A_ERI = value.view(num_experts, -1, value.shape[1])
        return {"gate.lora_A": A_ERI, "up.lora_A": A_ERI.clone()}
    if len(value) % 2:
        raise UserError(f"adapter: tensor {name!r} has the shape {[*value.shape]}, no halves for gate and up")
    B_EOR = value.view(value.shape[0], -1, num_experts).permute(2, 0, 1)
    gate_EFR, up_EFR = B_EOR.chunk(2, dim=1)
    return {"gate.lora_B": gate_EFR.contiguous(), "up.lora_B": up_EFR.contiguous()}


def adapter_config(
    tensors: Mapping[str, Tensor], rank: int, alpha: float, base_model: str, revision: str | None = None
) -> dict[str, Any]:
    """PEFT's config for the tensors that `to_peft` gave."""
    attention = [name for name in ATTENTION_PROJECTIONS if any(f".self_attn.{name}." in key for key in tensors)]
    experts = any(".mlp.experts.lora_A." in key for key in tensors)
    router = any(key.endswith(".mlp.gate.weight") for key in tensors)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": attention,
        "target_parameters": [GATE_UP, DOWN] if experts else None,
        "rank_pattern": {GATE_UP: 2 * rank} if experts else {},
        "alpha_pattern": {GATE_UP: 2 * alpha} if experts else {},
        "modules_to_save": ["mlp.gate"] if router else None,
    }


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    base_model: str,
    facts: Mapping[str, str],
    revision: str | None = None,
) -> None:
    """Write an adapter folder: PEFT's two files and the sidecar.

    Args:
        folder: is made; what it held under these names is replaced.
        state: in our names.
        rank, alpha: of its LoRA.
        base_model: folder or id of the base, for readers.
        facts: K, N_p and the like, into the sidecar's metadata.
        revision: of the base, if it is an id with one.
    """
    tensors = to_peft(state)
    config = adapter_config(tensors, rank, alpha, base_model, revision)
    beside = {name: value.contiguous() for name, value in state.items() if name.endswith(OF_SIDECAR)}
    replace_files(
        folder,
        {
            WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            SIDECAR: lambda path: save_file(beside, path, metadata=dict(facts)),
            CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
        },
    )


def read(folder: Path, num_experts: int) -> tuple[dict[str, Tensor], int, float]:
    """An adapter folder, ours or PEFT's own with the same targets -> (state in our names, rank, alpha).

    Without a sidecar there is no phi, which then is zero.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    rank, alpha = _rank_and_alpha(folder / CONFIG)
    found = from_peft(read_tensors(folder / WEIGHTS), num_experts, rank)
    beside = read_tensors(folder / SIDECAR) if os.path.lexists(folder / SIDECAR) else {}
    for name in beside:
        if not re.fullmatch(r"layers\.(0|[1-9][0-9]*)\.(phi|scale)", name):
            raise UserError(f"adapter: in {str(folder / SIDECAR)!r}, tensor {name!r} is none of phi or scale")
    _check_pairs(found, rank)
    return found | beside, rank, alpha


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's config of an adapter.

    Raises:
        UserError: naming the file.
    """
    try:
        config = read_json(path)
    except OSError as error:
        raise UserError(
            f"adapter: {str(path)!r} cannot be read ({error.strerror}); name an adapter's folder"
        ) from error
    except ValueError as error:
        raise UserError(f"adapter: {str(path)!r} is no valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"adapter: {str(path)!r} must hold key: value pairs, found {type(config).__name__}")
    return config


def _rank_and_alpha(path: Path) -> tuple[int, float]:
    """Of PEFT's config, if it means by them what we do: s = alpha / r for every module."""
    config = read_config(path)
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    where = f"adapter: in {str(path)!r},"
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where} r is {rank!r}, must be a whole number from 1")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"{where} lora_alpha is {alpha!r}, must be a number above 0")
    for key, plain in {"peft_type": "LORA", "bias": "none"}.items():
        if config.get(key, "none") != plain:
            raise UserError(f"{where} {key} is {config.get(key)!r}, must be {plain!r}")
    for key in NOT_OURS:
        if config.get(key):
            raise UserError(f"{where} {key} is {config[key]!r}; UB-SMoE's adapters have none")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{where} init_lora_weights is {start!r}, with which PEFT changes the base; convert it to plain LoRA"
        )
    for key, own_rank, own_alpha in _patterns(config, where):
        if own_alpha * rank != alpha * own_rank:
            raise UserError(f"{where} {key} has its own scaling, {own_alpha} / {own_rank} beside {alpha} / {rank}")
    return rank, float(alpha)


def _patterns(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, float, float]]:
    """(module, rank, alpha) where the config has some of their own."""
    patterns = []
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(type(value) in (int, float) for value in pattern.values()):
            raise UserError(f"{where} {name} is {pattern!r}, must be numbers by module")
        patterns.append(pattern)
    ranks, alphas = patterns
    for key in ranks | alphas:
        yield key, ranks.get(key, config["r"]), alphas.get(key, config["lora_alpha"])


def _check_pairs(state: Mapping[str, Tensor], rank: int) -> None:
    """That every A has its B, both of the adapter's rank."""
    for name, value in state.items():
        if not name.endswith((".lora_A", ".lora_B")):
            continue
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in state:
            raise UserError(f"adapter: tensor {name!r} is there without {other!r}")
        if value.shape[-2 if name.endswith("A") else -1] != rank:
            raise UserError(f"adapter: tensor {name!r} has the shape {[*value.shape]}, its config says rank {rank}")


def _stacked(prefix: str, A_ERI: Tensor, B_EOR: Tensor) -> dict[str, Tensor]:
    """PEFT keeps A as [E R, I], expert by expert, and B as [O, R E], rank by rank."""
    B = B_EOR.permute(1, 2, 0).reshape(B_EOR.shape[1], -1)
    return {f"{prefix}lora_A.weight": A_ERI.reshape(-1, A_ERI.shape[2]), f"{prefix}lora_B.weight": B.contiguous()}


def _join_gate_up(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A [E, Q, D] and B [E, 2 F, Q] of the fused projection."""
    A_EQD = torch.cat([own["experts.gate.lora_A"], own["experts.up.lora_A"]], dim=1)
    gate_EFR, up_EFR = own["experts.gate.lora_B"], own["experts.up.lora_B"]
    zero_EFR = torch.zeros_like(gate_EFR)
    B_EOQ = torch.cat([torch.cat([gate_EFR, zero_EFR], dim=2), torch.cat([zero_EFR, up_EFR], dim=2)], dim=1)
    return A_EQD, B_EOQ


def _split_gate_up(B_EOQ: Tensor, name: str) -> dict[str, Tensor]:
    """The two blocks on the diagonal; the others must be zero."""
    (gate_EFR, zero_EFR), (other_EFR, up_EFR) = (half.chunk(2, dim=2) for half in B_EOQ.chunk(2, dim=1))
    if zero_EFR.any() or other_EFR.any():
        raise UserError(f"adapter: {name!r} mixes gate and up, which UB-SMoE's adapters keep apart")
    return {"gate": gate_EFR.contiguous(), "up": up_EFR.contiguous()}
