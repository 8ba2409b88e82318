"""The adapters that a run leaves behind, the whole's and each client's, and models made of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ubsmoe_ds.config import Experiment, model_folder
from ubsmoe_ds.errors import UserError
from ubsmoe_ds.models import peft_format
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM, UBSMoESpec, load, read_config
from ubsmoe_ds.models.families import FAMILIES

FOLDER, CLIENTS = "adapter", "clients"  # of a run; within it the clients' own
WEIGHTS = "weights.safetensors"  # in place of an adapter where weights themselves have changed


def save_adapter(
    exp: Experiment, folder: Path, state: Mapping[str, Tensor], *, rank: int, scaling: float, k: int
) -> None:
    """Write a folder as `peft_format` does; under FLoRA, whose adapters go into the weights, all in one file of ours.

    Args:
        exp: the experiment.
        folder: to write to.
        state: see `UnitStore.full_state`.
        rank: LoRA rank of the state.
        scaling: what B A is multiplied with; written as alpha = scaling * rank.
        k: active experts it is meant for.
    """
    facts = {
        "format": "ubsmoe_ds.adapter.2",
        "base_model": exp.model.path,
        "method": exp.method,
        "k": str(k),
        "k_max": str(exp.k_max),
        "candidates": str(exp.candidates),
        "modulate": exp.dmr.modulate,
        "gate_rescale": exp.router.gate_rescale,
        "gamma": str(exp.router.gamma),
    }
    if exp.merge.rule == "flora":
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{WEIGHTS}.tmp"
        save_file(dict(state), unfinished, metadata=facts)
        unfinished.replace(folder / WEIGHTS)
        return
    path = exp.model.path
    base = path.removeprefix("hub:").partition("@")[0] if path.startswith("hub:") else str(exp.model_dir)
    peft_format.save(folder, state, rank=rank, alpha=scaling * rank, base_model=base, facts=facts)


class Adapter(NamedTuple):
    """What `read_adapter` found: `state` in our names, scaling of B A, the base's folder, and the sidecar's facts."""

    state: dict[str, Tensor]
    rank: int
    scaling: float
    base: Path
    facts: dict[str, str]


def read_adapter(folder: Path, base: str | None = None) -> Adapter:
    """A folder that `save_adapter` wrote, or PEFT with the same targets.

    Args:
        folder: of the adapter.
        base: as `model.path`; None: the model it was trained on.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    whole = folder / WEIGHTS
    facts = _facts(whole if whole.is_file() else folder / peft_format.SIDECAR)
    named = base or facts.get("base_model") or _base_of_peft(folder)
    path = model_folder(named)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        num_experts = int(config[FAMILIES[config["model_type"]].num_experts])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"adapter: its base {str(path)!r} is no model folder of a supported family; name it") from error
    if whole.is_file():
        return Adapter(load_file(whole), 0, 0.0, path, facts)
    state, rank, alpha = peft_format.read(folder, num_experts)
    return Adapter(state, rank, alpha / rank, path, facts)


def _facts(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none where there is no such file, as beside an adapter of PEFT's own."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter: {str(path)!r} cannot be read ({' '.join(str(error).split())[:200]})") from error


def _base_of_peft(folder: Path) -> str:
    path = folder / peft_format.CONFIG
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"adapter: {str(folder)!r} holds none ({peft_format.CONFIG} is missing or damaged)") from error


def load_trained(adapter: Adapter, dtype: torch.dtype = torch.float32) -> UBSMoEForCausalLM:
    """The base model with the adapter on it, all experts on this rank, for evaluation.

    Args:
        adapter: see `read_adapter`. Without our facts, as of PEFT's own adapters, it is plain Top-K at the config's K.
        dtype: of the frozen weights.

    Raises:
        UserError: if the adapter has a tensor that the model has no place for.
    """
    facts, state = adapter.facts, adapter.state
    config = read_config(adapter.base)
    k_max = int(facts.get("k_max", config.num_experts_per_tok))
    rank = max(adapter.rank, 1)
    spec = UBSMoESpec(
        k=int(facts.get("k", k_max)),
        candidates=int(facts.get("candidates", getattr(config, FAMILIES[config.model_type].num_experts))),
        lora_rank=rank,
        lora_alpha=adapter.scaling * rank,
        lora_attention=any(".attention." in name for name in state),
        phi_range=(-1.0, 1.0) if any(name.endswith(".phi") for name in state) else None,
        modulate=facts.get("modulate", "weights"),
        gate_rescale=facts.get("gate_rescale", "none"),
        gamma=float(facts.get("gamma", 0.5)),
        k_max=k_max,
    )
    model = load(adapter.base, spec, dtype)
    places = model.named_state()
    for name, value in state.items():
        if adapter.rank == 0 and name.endswith((".lora_A", ".lora_B")):
            continue  # FLoRA has merged them
        if name not in places or places[name].shape != value.shape:
            raise UserError(f"adapter: tensor {name!r} {list(value.shape)} has no place in {str(adapter.base)!r}")
        places[name].data.copy_(value)
    return model.eval()
