"""Save the adapters of a run, the shared one and each client's, and load models with them."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.adapters import peft_config, peft_format
from ubsmoe_ds.adapters.merged import check_complete
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import parse_json, replace_files
from ubsmoe_ds.base.tensor_files import open_tensors
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.formats import AUTO, CLOZE, FORMATS
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.models.causal_lm import UBSMoEForCausalLM
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.families import read_facts
from ubsmoe_ds.models.hub import model_folder
from ubsmoe_ds.models.weights import read_tensors
from ubsmoe_ds.moe.gate import GateConfig

FOLDER, CLIENTS = "adapter", "clients"  # folder of a run; in it, the folder of the clients' own adapters
FORMAT = "ubsmoe_ds.adapter.2"
WEIGHTS = "weights.safetensors"  # in place of an adapter where the frozen weights have changed


def save_adapter(
    exp: Experiment,
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    lora_rank: int,
    scaling: float,
    k: int,
    about: Mapping[str, str],
) -> None:
    """Write a folder as `peft_format` does; under FLoRA, which merges adapters into the weights, one file of ours.

    Args:
        exp: the experiment.
        folder: the folder to write.
        state: see `UnitStore.full_state`.
        lora_rank: that of the state.
        scaling: factor of B A; written as alpha = scaling * lora_rank, or with rsLoRA as scaling * sqrt(lora_rank).
        k: active experts that the adapter is meant for.
        about: further facts: `run_id`, of the run that it is of, `round`, and what the run started from.
    """
    path = exp.model.path
    is_name = path.startswith(("hub:", "builtin:"))
    facts = {
        "format": FORMAT,
        "base_model": exp.model.path if is_name else str(exp.model_dir.resolve()),
        **about,
        "method": exp.method,
        "k": str(k),
        "k_max": str(exp.k_max),
        "candidates": str(exp.candidates),
        "modulate": exp.dmr.modulate,
        "gate_rescale": exp.router.gate_rescale,
        "data_format": exp.data.format,
        "max_length": str(exp.data.max_length),
        "columns": json.dumps(exp.data.columns),
        "chat_template": exp.data.chat_template or "",
        "quantize": exp.model.quantize or "",
    }
    if exp.merge.row.stacking:
        replace_files(folder, {WEIGHTS: lambda path: save_file(dict(state), path, metadata=facts)})
        return
    base, _, revision = path.removeprefix("hub:").partition("@")
    if not path.startswith("hub:"):
        base, revision = str(exp.model_dir.resolve()), ""
    rslora = exp.lora.rslora
    alpha = scaling * (math.sqrt(lora_rank) if rslora else lora_rank)
    family, _ = read_facts(exp.model_dir)
    peft_format.save(
        folder,
        state,
        lora_rank=lora_rank,
        alpha=alpha,
        base_model=base,
        facts=facts,
        family=family,
        revision=revision or None,
        rslora=rslora,
    )


class Adapter(NamedTuple):
    """A stored adapter: `state` in our names, LoRA rank, scaling of B A, the base's folder, and the sidecar's facts."""

    state: dict[str, Tensor]
    lora_rank: int
    scaling: float
    base: Path
    facts: dict[str, str]


def read_adapter(folder: Path, base: str | None = None) -> Adapter:
    """Read a folder that `save_adapter` wrote, or one of PEFT's with the same targets.

    Args:
        folder: the adapter's.
        base: as `model.path`; None: the model that the adapter was trained on.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    whole = folder / WEIGHTS
    merged = os.path.lexists(whole)
    facts = _facts(folder)
    _check_gate(facts)
    name = base or _base_of(folder, facts)
    family, config = read_facts(model_folder(name))
    if merged:
        return Adapter(read_tensors(whole), 0, 0.0, model_folder(name, weights=True), facts)
    peft_format.check_belongs(folder, facts)
    state, lora_rank, scaling = peft_format.read(folder, family, config[family.num_experts])
    return Adapter(state, lora_rank, scaling, model_folder(name, weights=True), facts)


def asked_as(folder: Path) -> DataConfig:
    """Return how rows were read and written in an adapter's training; defaults for what it does not say.

    Raises:
        UserError: as `read_adapter`.
    """
    facts, default = _facts(folder), DataConfig()
    form = facts.get("data_format", default.format)
    if form not in (AUTO, CLOZE, *FORMATS):
        raise _wrong_fact("data_format", form, f"one of {', '.join((AUTO, CLOZE, *FORMATS))}")
    try:
        columns = parse_json(facts.get("columns", "{}"))
        found = DataConfig(columns=columns, chat_template=facts.get("chat_template") or None)
    except ValueError as error:
        raise _wrong_fact("columns", facts.get("columns", ""), "an object of texts") from error
    length = _whole(facts, "max_length", default.max_length, 8, 10**9 - 1)
    # an earlier version wrote `instruction` for every row that was asked by its prompt
    return found.model_copy(update={"format": AUTO if form == "instruction" else form, "max_length": length})


def _facts(folder: Path) -> dict[str, str]:
    """Return the facts that `save_adapter` wrote beside the tensors; none for PEFT's own adapters."""
    path = folder / (WEIGHTS if os.path.lexists(folder / WEIGHTS) else peft_format.SIDECAR)
    if not os.path.lexists(path):
        return {}
    try:
        with open_tensors(path) as file:
            facts = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter: {str(path)!r} cannot be read ({getattr(error, 'strerror', error)})") from error
    if "k" not in facts or facts.get("format", FORMAT) != FORMAT:
        raise UserError(f"adapter: {str(path)!r} has the format {facts.get('format')!r}, not {FORMAT!r}; save it again")
    return facts


def _check_gate(facts: Mapping[str, str]) -> None:
    """Raise if the adapter was trained with a gate that this version does not have."""
    modulate, rescale = facts.get("modulate", "weights"), facts.get("gate_rescale", "none")
    if modulate not in ("weights", "selection"):
        raise _wrong_fact("modulate", modulate, "weights or selection")
    if rescale not in ("none", "learned"):
        raise UserError(
            f"adapter: its {peft_format.SIDECAR} says gate_rescale {rescale!r}, which is no longer supported; only "
            "none and learned are: train it again with one of these"
        )


def _base_of(folder: Path, facts: Mapping[str, str]) -> str:
    """Return the model that the adapter was trained on, as `model.path`."""
    base = facts.get("base_model")
    if not base:
        return _base_of_peft(folder)
    if not base.startswith(("hub:", "builtin:")) and not Path(base).is_dir():
        raise UserError(f"adapter: {str(folder)!r} was trained on {base!r}, which is no folder here; use --base FOLDER")
    return base


def _base_of_peft(folder: Path) -> str:
    base = peft_config.read_config(folder / peft_format.CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"adapter: {str(folder / peft_format.CONFIG)!r} names no base model ({base!r}); use --base")
    if not Path(base).is_dir():
        raise UserError(
            f"adapter: {str(folder / peft_format.CONFIG)!r} was trained on {base!r}, which is no folder here; use "
            f"--base FOLDER, or --base hub:{base} if it is a model of the hub"
        )
    return base


def load_trained(adapter: Adapter, dtype: torch.dtype = torch.float32) -> UBSMoEForCausalLM:
    """Load the base model with the adapter on it, all experts on this rank, for evaluation; quantised as in training.

    Args:
        adapter: see `read_adapter`. Without our facts (PEFT's own adapters) the gate is plain Top-K at the config's K.
        dtype: precision of the frozen weights.

    Raises:
        UserError: if the adapter has a tensor that the model has no place for.
    """
    state = adapter.state
    spec = _spec(adapter)
    model = load(adapter.base, spec, dtype)
    places = model.named_state() | model.router_biases()
    for name, value in state.items():
        if adapter.lora_rank == 0 and name.endswith((".lora_A", ".lora_B")):
            continue  # FLoRA merged them
        if name not in places or places[name].shape != value.shape:
            raise UserError(f"adapter: tensor {name!r} {list(value.shape)} has no place in {str(adapter.base)!r}")
        places[name].data.copy_(value)
    if adapter.facts:
        check_complete(state, places)
    return model.eval()


def _spec(adapter: Adapter) -> UBSMoESpec:
    """Return how to convert the base for this adapter.

    Raises:
        UserError: naming a fact that is not valid.
    """
    facts, state = adapter.facts, adapter.state
    family, config = read_facts(adapter.base)
    experts, lora_rank = config[family.num_experts], max(adapter.lora_rank, 1)
    k_max = _whole(facts, "k_max", config["num_experts_per_tok"], 1, experts)
    k = _whole(facts, "k", k_max, 1, experts)
    quantize = facts.get("quantize", "")
    if quantize not in ("", "nf4", "int8"):
        raise _wrong_fact("quantize", quantize, "nf4, int8 or empty")
    gate = GateConfig(
        k=k,
        candidates=_whole(facts, "candidates", experts, max(k, k_max), experts),
        phi_range=(-1.0, 1.0) if any(name.endswith(".phi") for name in state) else None,
        modulate=facts.get("modulate", "weights"),
        learned_scale=facts.get("gate_rescale") == "learned",
    )
    return UBSMoESpec(
        gate=gate,
        lora_rank=lora_rank,
        lora_alpha=adapter.scaling * lora_rank,
        lora_attention=any(".attention." in name for name in state),
        quantize=quantize or None,
    )


def _whole(facts: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = facts.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise _wrong_fact(name, text, f"{least} to {most}")
    return int(text)


def _wrong_fact(name: str, value: str, right: str) -> UserError:
    return UserError(f"adapter: its {peft_format.SIDECAR} says {name} {value!r}, must be {right}; save it again")
