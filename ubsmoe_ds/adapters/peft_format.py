"""Read and write adapters as Hugging Face PEFT stores them, so that `PeftModel.from_pretrained(base, folder)` works.

Experts' LoRA goes through PEFT's `target_parameters` on the stacked weights of transformers' experts. Gate and up are
one weight there, so their two adapters of LoRA rank R become one of rank 2 R: the A side by side, the B on a diagonal.
(PEFT's own adapter of that weight has one A of rank R for both; it is read as two adapters with the same A.)
A trained router is a module saved whole. Values that PEFT does not know (phi, K, the gate's learned scale) are in a
file beside, `SIDECAR`. PEFT alone therefore computes the model at phi = 0 and scale 1, at the K of its config.
FLoRA leaves changed weights and no adapter, so PEFT is not used there.

Shapes: E experts, R LoRA rank, Q = 2 R, D model width, F expert width, I and O a projection's inputs and outputs.
Names: `layers.0.experts.gate.lora_A` and so on, see aggregation/units.py; B is scaled by alpha / R in both.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.adapters.peft_config import adapter_config, rank_and_alpha
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import replace_files
from ubsmoe_ds.models.causal_lm import ATTENTION_PROJECTIONS
from ubsmoe_ds.models.weights import read_tensors

CONFIG, WEIGHTS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "ubsmoe.safetensors"
PREFIX = "base_model.model.model."
SIDECAR_ENDINGS = (".phi", ".scale")
STACKED = {  # PEFT's name -> (projections that the tensor holds side by side, A or B)
    "mlp.experts.base_layer.lora_A.weight": (("gate", "up"), "A"),
    "mlp.experts.base_layer.lora_B.weight": (("gate", "up"), "B"),
    "mlp.experts.lora_A.weight": (("down",), "A"),
    "mlp.experts.lora_B.weight": (("down",), "B"),
}


def to_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert our names and shapes to PEFT's, leaving out what belongs in the sidecar."""
    tensors: dict[str, Tensor] = {}
    for layer in sorted({name.split(".")[1] for name in state}, key=int):
        of_layer = {
            name.removeprefix(f"layers.{layer}."): value.contiguous()
            for name, value in state.items()
            if name.startswith(f"layers.{layer}.") and not name.endswith(SIDECAR_ENDINGS)
        }
        prefix = f"{PREFIX}layers.{layer}."
        if "experts.gate.lora_A" in of_layer:
            tensors |= _stacked(f"{prefix}mlp.experts.base_layer.", *_join_gate_up(of_layer))
            down_A, down_B = of_layer["experts.down.lora_A"], of_layer["experts.down.lora_B"]
            tensors |= _stacked(f"{prefix}mlp.experts.", down_A, down_B)
        if "router.weight" in of_layer:
            tensors[f"{prefix}mlp.gate.weight"] = of_layer["router.weight"]
        for name in ATTENTION_PROJECTIONS:
            for factor in "AB":
                value = of_layer.get(f"attention.{name}.lora_{factor}")
                if value is not None:
                    tensors[f"{prefix}self_attn.{name}.lora_{factor}.weight"] = value
    return tensors


def from_peft(tensors: Mapping[str, Tensor], num_experts: int, rank: int) -> dict[str, Tensor]:
    """Convert PEFT's names and shapes to ours; the inverse of `to_peft`.

    Args:
        tensors: the adapter's.
        num_experts: E.
        rank: R; gate and up together have R too in an adapter that PEFT trained, and 2 R in a result of `to_peft`.

    Raises:
        UserError: for tensors that none of our adapters has.
    """
    state: dict[str, Tensor] = {}
    pattern = re.compile(re.escape(PREFIX) + r"layers\.(0|[1-9][0-9]*)\.(.+)")
    for name, value in tensors.items():
        match = pattern.fullmatch(name)
        layer, rest = (f"layers.{match[1]}.", match[2]) if match else ("", "")
        attention = re.fullmatch(r"self_attn\.(\w+)\.(lora_[AB])\.weight", rest)
        if rest not in (*STACKED, "mlp.gate.weight") and not (attention and attention[1] in ATTENTION_PROJECTIONS):
            raise UserError(f"adapter: tensor {name!r} is not one that UB-SMoE trains; leave it out of the adapter")
        if value.ndim != 2 or not value.numel():
            raise UserError(f"adapter: tensor {name!r} has the shape {[*value.shape]}, must be a matrix")
        if rest in STACKED:
            parts = _unstacked(name, value, num_experts, rank)
            state |= {f"{layer}experts.{our_name}": part for our_name, part in parts.items()}
        elif attention:
            state[f"{layer}attention.{attention[1]}.{attention[2]}"] = value
        else:
            state[f"{layer}router.weight"] = value
    return state


def _unstacked(name: str, value: Tensor, num_experts: int, rank: int) -> dict[str, Tensor]:
    """Split PEFT's stacked tensor into ours of each projection: [E R, I] to [E, R, I], and [O, R E] to [E, O, R]."""
    projections, factor = next(held for ending, held in STACKED.items() if name.endswith(f".{ending}"))
    parts = len(projections)
    stacked = value.shape[0 if factor == "A" else 1]
    if parts == 2 and stacked == num_experts * rank:
        return _share_gate_up(name, value, num_experts, factor)
    if stacked % (num_experts * parts) or (factor == "B" and len(value) % parts):
        raise UserError(
            f"adapter: tensor {name!r} has the shape {[*value.shape]}, which {num_experts} experts cannot share"
        )
    if factor == "A":
        A_EQI = value.view(num_experts, -1, value.shape[1])
        return {f"{p}.lora_A": A.contiguous() for p, A in zip(projections, A_EQI.chunk(parts, dim=1), strict=True)}
    B_EOQ = value.view(value.shape[0], -1, num_experts).permute(2, 0, 1)
    split = _split_gate_up(B_EOQ, name) if parts == 2 else {"down": B_EOQ.contiguous()}
    return {f"{projection}.lora_B": B for projection, B in split.items()}


def _share_gate_up(name: str, value: Tensor, num_experts: int, factor: str) -> dict[str, Tensor]:
    """Split PEFT's own tensor of gate and up: [W_gate; W_up] + [B_gate; B_up] A equals two adapters with the same A."""
    if factor == "A":
        A_ERI = value.view(num_experts, -1, value.shape[1])
        return {"gate.lora_A": A_ERI, "up.lora_A": A_ERI.clone()}
    if len(value) % 2:
        raise UserError(f"adapter: tensor {name!r} has the shape {[*value.shape]}, which has no halves for gate and up")
    B_EOR = value.view(value.shape[0], -1, num_experts).permute(2, 0, 1)
    gate_EFR, up_EFR = B_EOR.chunk(2, dim=1)
    return {"gate.lora_B": gate_EFR.contiguous(), "up.lora_B": up_EFR.contiguous()}


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    lora_rank: int,
    alpha: float,
    base_model: str,
    facts: Mapping[str, str],
    revision: str | None = None,
) -> None:
    """Write an adapter folder: PEFT's two files and the sidecar.

    Args:
        folder: created if missing; files of these names in it are replaced.
        state: tensors in our names.
        lora_rank, alpha: those of LoRA.
        base_model: folder or id of the base, for readers.
        facts: K, N_p and the like, for the sidecar's metadata.
        revision: revision of the base, if it is an id that has one.
    """
    tensors = to_peft(state)
    config = adapter_config(tensors, lora_rank, alpha, base_model, revision)
    beside = {name: value.contiguous() for name, value in state.items() if name.endswith(SIDECAR_ENDINGS)}
    replace_files(
        folder,
        {
            WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            SIDECAR: lambda path: save_file(beside, path, metadata=dict(facts)),
            CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
        },
    )


def read(folder: Path, num_experts: int) -> tuple[dict[str, Tensor], int, float]:
    """Read an adapter folder, ours or PEFT's own with the same targets.

    Without a sidecar there is no phi, which then is zero.

    Returns:
        (state in our names, LoRA rank, alpha).

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    rank, alpha = rank_and_alpha(folder / CONFIG)
    state = from_peft(read_tensors(folder / WEIGHTS), num_experts, rank)
    beside = read_tensors(folder / SIDECAR) if os.path.lexists(folder / SIDECAR) else {}
    for name in beside:
        if not re.fullmatch(r"layers\.(0|[1-9][0-9]*)\.(phi|scale)", name):
            raise UserError(f"adapter: in {str(folder / SIDECAR)!r}, tensor {name!r} is neither phi nor scale")
    _check_pairs(state, rank)
    return state | beside, rank, alpha


def _check_pairs(state: Mapping[str, Tensor], rank: int) -> None:
    """Check that every A has its B, both of the adapter's LoRA rank."""
    for name, value in state.items():
        if not name.endswith((".lora_A", ".lora_B")):
            continue
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in state:
            raise UserError(f"adapter: tensor {name!r} has no counterpart {other!r}; save it again")
        if value.shape[-2 if name.endswith("A") else -1] != rank:
            raise UserError(f"adapter: tensor {name!r} has the shape {[*value.shape]}, its config says rank {rank}")


def _stacked(prefix: str, A_ERI: Tensor, B_EOR: Tensor) -> dict[str, Tensor]:
    """Stack factors as PEFT does: A as [E R, I], expert by expert, and B as [O, R E], LoRA rank by LoRA rank."""
    B = B_EOR.permute(1, 2, 0).reshape(B_EOR.shape[1], -1)
    return {f"{prefix}lora_A.weight": A_ERI.reshape(-1, A_ERI.shape[2]), f"{prefix}lora_B.weight": B.contiguous()}


def _join_gate_up(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A [E, Q, D] and B [E, 2 F, Q] of gate and up together."""
    A_EQD = torch.cat([state["experts.gate.lora_A"], state["experts.up.lora_A"]], dim=1)
    gate_EFR, up_EFR = state["experts.gate.lora_B"], state["experts.up.lora_B"]
    zero_EFR = torch.zeros_like(gate_EFR)
    B_EOQ = torch.cat([torch.cat([gate_EFR, zero_EFR], dim=2), torch.cat([zero_EFR, up_EFR], dim=2)], dim=1)
    return A_EQD, B_EOQ


def _split_gate_up(B_EOQ: Tensor, name: str) -> dict[str, Tensor]:
    """Return the two blocks of B on the diagonal; raise unless the others are zero."""
    (gate_EFR, zero_EFR), (other_EFR, up_EFR) = (half.chunk(2, dim=2) for half in B_EOQ.chunk(2, dim=1))
    if zero_EFR.any() or other_EFR.any():
        raise UserError(
            f"adapter: {name!r} mixes gate and up, which our adapters keep apart; use an adapter of gate and up each"
        )
    return {"gate": gate_EFR.contiguous(), "up": up_EFR.contiguous()}
