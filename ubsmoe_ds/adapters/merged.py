"""Write a model folder with an adapter merged into it: plain weights that any program for its family reads.

The merged model computes what the adapter computes under PEFT: it has no place for phi and the gate's learned scale.
One shard is in memory at a time. Shapes: E experts, R LoRA rank, O x I a projection's weight.
"""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import new_folder, require_new
from ubsmoe_ds.base.tensor_files import open_tensors
from ubsmoe_ds.models.families import Family, read_facts
from ubsmoe_ds.models.hub import refuse_links_out
from ubsmoe_ds.models.stored import projections
from ubsmoe_ds.models.weights import WeightFiles


def write_merged(base: Path, state: Mapping[str, Tensor], scaling: float, out: Path, *, whole: bool) -> None:
    """Write the base model with W + scaling B A in place of W, in its stored precision, and the trained routers.

    Args:
        base: model folder; its other files (config, tokenizer) are copied.
        state: tensors in our names, see aggregation/units.py; whole weights (FLoRA's) replace the base's.
        scaling: alpha / R.
        out: a new or empty folder.
        whole: whether to refuse an adapter in which some layers lack tensors; PEFT may adapt some layers only.

    Raises:
        UserError: if `out` is in use, the base cannot be read or has a file that is a link out of its folder, or the
            state is not of this base or not whole.
    """
    require_new(out, "--merge")
    refuse_links_out(base)
    family, _ = read_facts(base)
    files = WeightFiles(base)
    if whole:
        singles = (single for name in files.names for single in _single_names(name, family))
        modules = {_our_name(single, family)[0] for single in singles} - {""}
        check_complete(state, [f"{module}.{end}" for module in modules for end in ("weight", "lora_A", "lora_B")])
    used: set[str] = set()
    with new_folder(out, "--merge") as unfinished:
        for name in files.file_names:
            save_file(_merged_shard(base / name, family, state, scaling, used), unfinished / name, {"format": "pt"})
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
                shutil.copy(path, unfinished / path.name)
        left = sorted(name for name in state if name not in used and not name.endswith((".phi", ".scale")))
        if left:
            raise UserError(
                f"merge: {str(base)!r} has no weight for {len(left)} tensors of the adapter, first {left[0]!r}"
            )


def check_complete(state: Mapping[str, Tensor], places: Iterable[str]) -> None:
    """Check that no layer's adapter is missing; a lost tensor would look untrained.

    Args:
        state: an adapter's tensors, in our names.
        places: names of all tensors that the base has a place for.

    Raises:
        UserError: naming a tensor that other layers of this kind have.
    """
    kinds = {name.split(".", 2)[2] for name in state} - {"scale"}  # a client's own, so the shared adapter has none
    for name in sorted(places):
        if name.split(".", 2)[2] in kinds and name not in state:
            raise UserError(f"adapter: tensor {name!r} is missing, which other layers have; save it again")


def _merged_shard(
    path: Path, family: Family, state: Mapping[str, Tensor], scaling: float, used: set[str]
) -> dict[str, Tensor]:
    merged = {}
    try:
        with open_tensors(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                merged[name] = _merged_tensor(name, shard.get_tensor(name), family, state, scaling, used)
    except (OSError, SafetensorError) as error:
        raise UserError(f"merge: {str(path)!r} cannot be read ({' '.join(str(error).split())[:200]})") from error
    return merged


def _merged_tensor(
    name: str, weight: Tensor, family: Family, state: Mapping[str, Tensor], scaling: float, used: set[str]
) -> Tensor:
    singles = _single_names(name, family)
    if singles != [name] and weight.ndim == 3:  # all experts of a layer in one: expert by expert
        merged = []
        for number, value in enumerate(weight):
            names = [single.replace(".experts.0.", f".experts.{number}.") for single in singles]
            parts = zip(names, value.tensor_split(len(names)), strict=True)
            merged.append(torch.cat([_merged_tensor(*part, family, state, scaling, used) for part in parts]))
        return torch.stack(merged)
    module, expert = _our_name(name, family)
    if f"{module}.weight" in state:  # a router, or a weight that FLoRA merged into
        used |= {f"{module}.weight", f"{module}.lora_A", f"{module}.lora_B"}
        whole = _select_expert(state[f"{module}.weight"], expert, module)
        _check_fit(name, weight, whole.shape)
        return whole.to(weight.dtype).contiguous()
    if f"{module}.lora_A" not in state:
        return weight
    used |= {f"{module}.lora_A", f"{module}.lora_B"}
    A, B = (_select_expert(state[f"{module}.lora_{factor}"].float(), expert, module) for factor in "AB")
    _check_fit(name, weight, (B.shape[0], A.shape[1]))
    return torch.addmm(weight.float(), B, A, alpha=scaling).to(weight.dtype)


def _select_expert(value: Tensor, expert: int | None, module: str) -> Tensor:
    if expert is not None and expert >= len(value):
        raise UserError(
            f"merge: the adapter's {module!r} has {len(value)} experts, the base has more; give the --base that it was "
            "trained on"
        )
    return value if expert is None else value[expert]


def _check_fit(name: str, weight: Tensor, shape: Sequence[int]) -> None:
    if [*weight.shape] != [*shape]:
        raise UserError(
            f"merge: tensor {name!r} of the base has the shape {[*weight.shape]}, the adapter {[*shape]}; "
            "give the --base that it was trained on"
        )


def _single_names(name: str, family: Family) -> list[str]:
    """Return the names of the first expert's tensors where a tensor holds all experts; else its own name."""
    inside, _, last = family.usual_name(name).rpartition(".")
    parts = projections(family).get(last, {}) if inside.endswith(".experts") else {}
    return [f"{inside}.0.{part}.weight" for part in parts.values()] or [name]


def _our_name(name: str, family: Family) -> tuple[str, int | None]:
    """Return (our name, without its ending, of a tensor in a model's files; its expert, if it belongs to one)."""
    name = family.usual_name(name)
    ours = {family.gate: "gate", family.up: "up", family.down: "down"}
    expert = re.fullmatch(rf"model\.(layers\.\d+)\.{family.block}\.experts\.(\d+)\.(\w+)\.weight", name)
    if expert and expert[3] in ours:
        return f"{expert[1]}.experts.{ours[expert[3]]}", int(expert[2])
    router = re.fullmatch(rf"model\.(layers\.\d+)\.{family.block}\.gate\.weight", name)
    if router:
        return f"{router[1]}.router", None
    attention = re.fullmatch(r"model\.(layers\.\d+)\.self_attn\.(\w+)\.weight", name)
    return (f"{attention[1]}.attention.{attention[2]}", None) if attention else ("", None)
