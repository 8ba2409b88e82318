"""The adapters that a run leaves behind: the whole's, and each client's."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.config import Experiment
from ubsmoe_ds.models import peft_format

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
