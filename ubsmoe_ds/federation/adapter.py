"""The file that a run leaves behind: the merged state of the whole model."""

from collections.abc import Mapping

from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds.config import Experiment

ADAPTER_FILE = "adapter.safetensors"


def save_adapter(exp: Experiment, state: Mapping[str, Tensor], rank: int, scaling: float) -> None:
    """Write LoRA, router, phi and, under FLoRA, the merged weights, in fp32, to the run's folder.

    Args:
        exp: the experiment.
        state: see `UnitStore.full_state`.
        rank: LoRA rank of the state.
        scaling: what B A is multiplied with; written as alpha = scaling * rank.
    """
    metadata = {
        "format": "ubsmoe_ds.adapter.1",
        "base_model": exp.model.path,
        "method": exp.method,
        "lora_rank": str(rank),
        "lora_alpha": str(scaling * rank),
        "k_max": str(exp.k_max),
        "candidates": str(exp.candidates),
    }
    unfinished = exp.run_dir / f"{ADAPTER_FILE}.tmp"
    save_file(dict(state), unfinished, metadata=metadata)
    unfinished.replace(exp.run_dir / ADAPTER_FILE)
