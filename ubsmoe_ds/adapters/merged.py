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
from ubsmoe_ds.models.families import predicts_further, read_facts
from ubsmoe_ds.models.family import Family
from ubsmoe_ds.models.hub import refuse_links_out
from ubsmoe_ds.models.stored import projections, unstacked
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
    family, facts = read_facts(base)
    files = WeightFiles(base)
    if whole:
        names = [name for name in files.names if not predicts_further(family.usual_name(name), facts)]
        modules = {module for name in names for module in _our_names(name, family).values()}
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
    modules, expert, bias = _our_names(name, family), _expert_of(name, family), _bias_name(name, family)
    if bias in state:
        used.add(bias)
        _check_fit(name, weight.flatten(), state[bias].shape)
        return state[bias].to(weight.dtype).reshape(weight.shape)
    if weight.ndim < 3:
        for module in modules.values():
            weight = _merged(name, weight, module, expert, state, scaling, used)
        return weight
    if modules:  # all experts of a layer in one: expert by expert
        weight, stacked = weight.clone(), family.usual_name(name).rpartition(".")[2]
        for number, value in enumerate(weight):
            for part, view in unstacked(value, stacked, family.experts).items():
                view.copy_(_merged(name, view, modules[part], number, state, scaling, used))
    return weight


def _merged(
    name: str,
    weight: Tensor,
    module: str,
    expert: int | None,
    state: Mapping[str, Tensor],
    scaling: float,
    used: set[str],
) -> Tensor:
    """Return one projection's weight with its adapter; the same weight if it has none."""
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


def _our_names(name: str, family: Family) -> dict[str, str]:
    """Return our names, without their endings, of what a tensor in a model's files holds, by projection.

    Stacked experts' tensors hold two projections, or one; others are one, or none of ours.
    """
    name = family.usual_name(name)
    block = re.fullmatch(rf"model\.(layers\.\d+)\.{family.block}\.(.+)", name)
    attention = re.fullmatch(r"model\.(layers\.\d+)\.self_attn\.(\w+)\.weight", name)
    if attention:
        return {"": f"{attention[1]}.attention.{attention[2]}"}
    if not block:
        return {}
    if block[2] == family.router.weight:
        return {"": f"{block[1]}.router"}
    stacked, single = projections(family), re.fullmatch(r"experts\.\d+\.(\w+)\.weight", block[2])
    if single and family.gate:
        parts = {ours: stored for of_tensor in stacked.values() for ours, stored in of_tensor.items()}
        return {ours: f"{block[1]}.experts.{ours}" for ours, stored in parts.items() if stored == single[1]}
    return {ours: f"{block[1]}.experts.{ours}" for ours in stacked.get(block[2].removeprefix("experts."), {})}


def _bias_name(name: str, family: Family) -> str:
    """Return our name of a router's bias or correction; "" for other tensors."""
    block = re.fullmatch(rf"model\.(layers\.\d+)\.{family.block}\.(.+)", family.usual_name(name))
    endings = {family.router.bias: "bias", family.router.correction: "correction"}
    return f"{block[1]}.router.{endings[block[2]]}" if block and block[2] in endings else ""


def _expert_of(name: str, family: Family) -> int | None:
    """Return the expert that a tensor belongs to alone; None for others."""
    single = re.fullmatch(rf"model\.layers\.\d+\.{family.block}\.experts\.(\d+)\..+", family.usual_name(name))
    return int(single[1]) if single else None
