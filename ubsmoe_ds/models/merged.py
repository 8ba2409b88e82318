"""A checkpoint with an adapter merged into it: plain weights that any program for its family reads.

It computes what the adapter does with PEFT: phi and the gate's rescaling have no place in it. One shard is in memory at
a time. Shapes: E experts, R LoRA rank, O x I a projection's weight.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.errors import UserError
from ubsmoe_ds.models.families import FAMILIES, Family


def write_merged(base: Path, state: Mapping[str, Tensor], scaling: float, out: Path) -> None:
    """Write the base model with W + scaling B A for W, in the precision it is stored in, and the trained routers.

    Args:
        base: checkpoint folder; its other files (config, tokenizer) are copied.
        state: in our names, see `federation/units.py`; whole weights (FLoRA's) replace the base's.
        scaling: alpha / R.
        out: a new or empty folder.

    Raises:
        UserError: if `out` is in use, the base cannot be read, or the state is not one of this base.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"merge: {str(out)!r} is not empty; name a new folder")
    family = FAMILIES[json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]]
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    used: set[str] = set()
    for path in sorted(base.iterdir()):
        if path.suffix == ".safetensors":
            save_file(_merged_shard(path, family, state, scaling, used), unfinished / path.name, {"format": "pt"})
        elif path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copy(path, unfinished / path.name)
    left = sorted(name for name in state if name not in used and not name.endswith((".phi", ".scale")))
    if left:
        shutil.rmtree(unfinished)
        raise UserError(f"merge: {str(base)!r} has no weight for {len(left)} tensors of the adapter, first {left[0]!r}")
    if out.exists():
        out.rmdir()
    unfinished.rename(out)


def _merged_shard(
    path: Path, family: Family, state: Mapping[str, Tensor], scaling: float, used: set[str]
) -> dict[str, Tensor]:
    merged = {}
    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                merged[name] = _merged_tensor(name, shard.get_tensor(name), family, state, scaling, used)
    except (OSError, SafetensorError) as error:
        raise UserError(f"merge: {str(path)!r} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return merged


def _merged_tensor(
    name: str, weight: Tensor, family: Family, state: Mapping[str, Tensor], scaling: float, used: set[str]
) -> Tensor:
    own, expert = _own_name(name, family)
    if f"{own}.weight" in state:  # a router, or what FLoRA merged
        used |= {f"{own}.weight", f"{own}.lora_A", f"{own}.lora_B"}
        value = state[f"{own}.weight"]
        return (value if expert is None else value[expert]).to(weight.dtype).contiguous()
    if f"{own}.lora_A" not in state:
        return weight
    used |= {f"{own}.lora_A", f"{own}.lora_B"}
    A, B = (state[f"{own}.lora_{factor}"].float() for factor in "AB")
    if expert is not None:
        A, B = A[expert], B[expert]
    return torch.addmm(weight.float(), B, A, alpha=scaling).to(weight.dtype)


def _own_name(name: str, family: Family) -> tuple[str, int | None]:
    """(our name of a checkpoint's tensor, without its ending; the expert if it is one's)."""
    projections = {family.gate: "gate", family.up: "up", family.down: "down"}
    expert = re.fullmatch(rf"model\.(layers\.\d+)\.{family.block}\.experts\.(\d+)\.(\w+)\.weight", name)
    if expert and expert[3] in projections:
        return f"{expert[1]}.experts.{projections[expert[3]]}", int(expert[2])
    router = re.fullmatch(rf"model\.(layers\.\d+)\.{family.block}\.gate\.weight", name)
    if router:
        return f"{router[1]}.router", None
    attention = re.fullmatch(r"model\.(layers\.\d+)\.self_attn\.(\w+)\.weight", name)
    return (f"{attention[1]}.attention.{attention[2]}", None) if attention else ("", None)
