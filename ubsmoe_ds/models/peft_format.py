"""Adapters as Hugging Face PEFT stores them, so that `PeftModel.from_pretrained(base, folder)` has what was trained.

Experts' LoRA goes through PEFT's `target_parameters` on the stacked weights of transformers' experts. Gate and up are
one weight there, so that their two adapters of rank R become one of rank 2 R: the A side by side, the B on a diagonal.
A trained router is a module saved whole. What PEFT has no word for (phi, K, the gate's rescaling) stands in a file
beside: `SIDECAR`. PEFT alone then computes what the model does at phi = 0 without rescaling, at the K of its config.
FLoRA leaves no adapter but changed weights, which are no matter for PEFT.

Shapes: E experts, R LoRA rank, Q = 2 R, D model width, F expert width, I and O a projection's inputs and outputs.
Names: `layers.0.experts.gate.lora_A` and so on, see `federation/units.py`; B is scaled by alpha / R in both.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ubsmoe_ds.errors import UserError

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "ubsmoe.safetensors"
PREFIX = "base_model.model.model."
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OF_SIDECAR = (".phi", ".scale")


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
        for name in ATTENTION:
            for factor in "AB":
                if f"attention.{name}.lora_{factor}" in own:
                    found[f"{prefix}self_attn.{name}.lora_{factor}.weight"] = own[f"attention.{name}.lora_{factor}"]
    return found


def from_peft(tensors: Mapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """The way back: PEFT's names and shapes -> ours.

    Raises:
        UserError: for tensors that no adapter of ours has.
    """
    found = {}
    pattern = re.compile(re.escape(PREFIX) + r"layers\.(\d+)\.(.+)")
    for name, value in tensors.items():
        match = pattern.fullmatch(name)
        layer, rest = (f"layers.{match[1]}.", match[2]) if match else ("", "")
        attention = re.fullmatch(r"self_attn\.(\w+)\.(lora_[AB])\.weight", rest)
        if rest in ("mlp.experts.base_layer.lora_A.weight", "mlp.experts.lora_A.weight"):
            A_EQI = value.view(num_experts, -1, value.shape[1])
            names = ("gate", "up") if "base_layer" in rest else ("down",)
            for projection, A_ERI in zip(names, A_EQI.chunk(len(names), dim=1), strict=True):
                found[f"{layer}experts.{projection}.lora_A"] = A_ERI.contiguous()
        elif rest in ("mlp.experts.base_layer.lora_B.weight", "mlp.experts.lora_B.weight"):
            B_EOQ = value.view(value.shape[0], -1, num_experts).permute(2, 0, 1)
            if "base_layer" in rest:
                found |= {f"{layer}experts.{p}.lora_B": B for p, B in _split_gate_up(B_EOQ, name).items()}
            else:
                found[f"{layer}experts.down.lora_B"] = B_EOQ.contiguous()
        elif rest == "mlp.gate.weight":
            found[f"{layer}router.weight"] = value
        elif attention and attention[1] in ATTENTION:
            found[f"{layer}attention.{attention[1]}.{attention[2]}"] = value
        else:
            raise UserError(f"adapter: tensor {name!r} is none that UB-SMoE trains")
    return found


def adapter_config(tensors: Mapping[str, Tensor], rank: int, alpha: float, base_model: str) -> dict[str, Any]:
    """PEFT's config for the tensors that `to_peft` gave."""
    attention = [name for name in ATTENTION if any(f".self_attn.{name}." in key for key in tensors)]
    experts = any(".mlp.experts.lora_A." in key for key in tensors)
    router = any(key.endswith(".mlp.gate.weight") for key in tensors)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
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
    folder: Path, state: Mapping[str, Tensor], *, rank: int, alpha: float, base_model: str, facts: Mapping[str, str]
) -> None:
    """Write an adapter folder: PEFT's two files and the sidecar.

    Args:
        folder: is made; what it held under these names is replaced.
        state: in our names.
        rank, alpha: of its LoRA.
        base_model: folder or id of the base, for readers.
        facts: K, N_p and the like, into the sidecar's metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_peft(state)
    config = adapter_config(tensors, rank, alpha, base_model)
    beside = {name: value.contiguous() for name, value in state.items() if name.endswith(OF_SIDECAR)}
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / SIDECAR, lambda path: save_file(beside, path, metadata=dict(facts)))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def read(folder: Path, num_experts: int) -> tuple[dict[str, Tensor], int, float]:
    """An adapter folder, ours or PEFT's own with the same targets -> (state in our names, rank, alpha).

    Without a sidecar there is no phi, which then is zero.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        beside = load_file(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"adapter: {str(folder)!r} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return from_peft(tensors, num_experts) | beside, rank, alpha


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


def _replace(path: Path, write: Any) -> None:
    """Write beside the name and then take it, so that no reader sees half a file."""
    unfinished = path.with_name(path.name + ".tmp")
    write(unfinished)
    unfinished.replace(path)
